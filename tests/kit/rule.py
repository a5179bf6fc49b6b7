"""The rule of numerics (tritongru/tools/check.py) as assertions."""

import zlib

import torch
from torch.nn.utils.rnn import pack_padded_sequence

import tritongru
from tritongru.tools.check import Case, measure

CPU = torch.device("cpu")


def assert_right(case: Case, backend: str, dtype: torch.dtype = torch.float32, device: torch.device = CPU) -> None:
    """The rule itself, for every tensor."""
    figures = measure(case, backend, dtype, device)
    wrong = {name: f for name, f in figures.items() if not f.holds}
    assert not wrong, f"{backend} {dtype} {case.name}: {wrong}"


def assert_not_wrong(case: Case, backend: str, dtype: torch.dtype = torch.float32) -> None:
    """One draw, or as many as give every tensor 8 elements, by the rule or by eight times the floor: for many shapes
    quickly. A wrong mask or term gives errors of order 1, while a single draw's error of a tensor with much
    cancellation scatters above its RMS figure, nn.GRU's as much as ours."""
    draws, seed = max(1, case.draws // 32), zlib.crc32(repr(case).encode())
    figures = measure(case, backend, dtype, CPU, draws, seed)
    wrong = {name: f for name, f in figures.items() if not (f.holds or f.error <= 8 * f.floor)}
    assert not wrong, f"{backend} {dtype} {case.name}: {wrong}"


def assert_finite_where_nn_gru_is(backend: str) -> None:
    """NaN and infinity in h_0 and x, packed, both directions, forward and backward."""
    torch.manual_seed(0)
    ours = tritongru.GRU(4, 13, bidirectional=True, backend=backend)
    theirs = torch.nn.GRU(4, 13, bidirectional=True)
    theirs.load_state_dict(ours.state_dict())
    x = pack_padded_sequence(torch.randn(3, 6, 4), torch.tensor([1, 3, 2, 3, 1, 2]), enforce_sorted=False)
    h_0 = torch.randn(2, 6, 13)
    x.data[0, 1], x.data[-1, 2] = float("inf"), float("nan")
    h_0[1, 2, 3] = float("-inf")
    h_0.view(torch.int32)[0, 4, 5] = -1  # the sentinel of an exchange
    found = []
    for module in (ours, theirs):
        leaf = x.data.clone().requires_grad_()
        output, h_n = module(x._replace(data=leaf), h_0)
        (output.data.square().sum() + h_n.square().sum()).backward()
        found.append([output.data, h_n, leaf.grad, *(p.grad for p in module.parameters())])
    for our, their in zip(*found, strict=True):
        assert torch.equal(our.isfinite(), their.isfinite())
    assert all(torch.equal(our.isnan(), their.isnan()) for our, their in zip(found[0][:2], found[1][:2], strict=True))
    assert any(t.isfinite().any() and not t.isfinite().all() for t in found[0])
