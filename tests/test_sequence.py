"""Backend `sequence`: values and gradients of its Gluon kernels, which exchange, in the emulator, all programs alive.

The rule over all its draws is tests/test_step.py's, which runs this backend in `make long`; what goes wrong between
programs is tests/test_exchange.py.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence

import tritongru
from tests.kit.cases import MORE_CASES, quiet, shapes
from tests.kit.counting import counted
from tests.kit.drawn import DTYPES
from tests.kit.fences import call_between_fences, poisoned, with_gaps
from tests.kit.rule import assert_finite_where_nn_gru_is, assert_not_wrong, assert_right
from tritongru.launch import runtime
from tritongru.tools.check import CASES, Case

pytestmark = pytest.mark.interpreted
EXCHANGING = "sequence:exchange=1"  # also where a GPU would give a layer this small to one program


def test_rule() -> None:
    assert_right(Case(T=3, B=3, I=7, H=20), "sequence")


@pytest.mark.parametrize("case", CASES + MORE_CASES, ids=lambda case: case.name)
def test_every_case(case: Case) -> None:
    assert_not_wrong(case, "sequence")


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("case", [CASES[4], MORE_CASES[1]], ids=lambda case: case.name)
def test_half_precision(case: Case, dtype: torch.dtype) -> None:
    assert_not_wrong(case, "sequence", dtype)


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (2, 1, 3, 1), (2, 3, 1, 2)], ids=str)
def test_smallest_sizes(sizes: tuple[int, int, int, int]) -> None:
    assert_not_wrong(Case(*sizes, bidirectional=True), "sequence")


def test_weights_wider_than_the_layer(h200_tiles: None) -> None:
    """On a GPU K comes in classes: here the weights are padded to 128 units."""
    assert_not_wrong(Case(I=4, H=20, bidirectional=True, lengths=(2, 4)), EXCHANGING)
    assert_not_wrong(Case(T=2, B=3, I=4, H=67), EXCHANGING, torch.float16)


@given(case=shapes, dtype=st.sampled_from(DTYPES))
@settings(quiet, max_examples=3)
def test_any_shape(case: Case, dtype: torch.dtype) -> None:
    assert_not_wrong(case, "sequence", dtype)


@pytest.mark.long
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(case=shapes)
@settings(quiet, max_examples=60)
def test_many_shapes(dtype: torch.dtype, case: Case, h200_tiles: None) -> None:
    assume(case.draws <= 32)  # every tensor has 8 elements: one draw of fewer scatters more, nn.GRU's as much as ours
    assert_not_wrong(case, EXCHANGING, dtype)


FIELDS = [
    "block_b=8,block_k=64", "num_warps=1", "block_b=32,waits=3", "tiles=2,early=1", "groups=1,shared_gates=2",
    "block_h=32,block_k=64,num_warps=4,directions=1",
]  # fmt: skip


@pytest.mark.parametrize("fields", FIELDS)
def test_tiles_that_a_user_sets(fields: str) -> None:
    assert_not_wrong(Case(I=4, H=20, bidirectional=True, lengths=(2, 1) * 9), f"sequence:{fields}")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ("block_x=8", "takes the fields"), ("block_h=x", "a number of digits"), ("block_h=24", "block_h must be 8, 16"),
        ("block_b=8,block_h=8,block_k=64", "block_h must be 16 or 32 where block_b is 8"),
        ("block_b=24", "block_b must be 8, 16"),
        ("early=1", "early needs tiles above 1"), ("tiles=2,early=2", "early must be 0 or 1"),
        ("num_warps=3", "num_warps must be"), ("block_b=8,num_warps=2", "block_k must be 32 units a warp"),
        ("waits=2", "waits must be 1 or 3"), ("num_k=2", "num_k must be 1 or 3"), ("block_k=48", "a power of 2"),
        ("shared_gates=4", "shared_gates must be 0 to 3"), ("directions=2", "directions must be 1"),
        ("block_k=16,num_warps=1", "must be H, 20, or more"), ("delay=9999999", "delay must be"),
    ],
)  # fmt: skip
def test_tiles_that_no_kernel_can_have(fields: str, words: str) -> None:
    """waits is backward's alone."""
    with pytest.raises(ValueError, match=words):
        layer = tritongru.GRU(4, 20, backend=f"sequence:{fields}")
        layer(torch.randn(2, 3, 4))[0].sum().backward()


def test_same_call_same_bits() -> None:
    torch.manual_seed(0)
    layer = tritongru.GRU(5, 12, bidirectional=True, backend="sequence")
    x = torch.randn(3, 4, 5)

    def once() -> list[torch.Tensor]:
        layer.zero_grad()
        output, h_n = layer(x)
        (output.square().sum() + h_n.sum()).backward()
        return [output, h_n, *(p.grad.clone() for p in layer.parameters())]

    assert all(torch.equal(a, b) for a, b in zip(once(), once(), strict=True))


@pytest.mark.parametrize(
    "variant",
    [{}, {"bidirectional": True}, {"num_layers": 2, "bidirectional": True}, {"recompute": True}],
    ids=["plain", "bidirectional", "two-layers", "recompute"],
)
@pytest.mark.parametrize(("T", "packed"), [(1, False), (4, False), (4, True)], ids=["one-step", "dense", "packed"])
def test_one_launch_per_sequence(packed: bool, variant: dict, T: int, monkeypatch) -> None:
    """One each way for every layer, both directions and the gradient of h_0 in it."""
    layer = tritongru.GRU(5, 6, backend="sequence", **variant)
    x = pack_sequence([torch.randn(T, 5), torch.randn(1, 5)]) if packed else torch.randn(T, 2, 5)
    h_0 = torch.zeros(layer.num_layers * (2 if layer.bidirectional else 1), 2, 6, requires_grad=True)
    with counted(monkeypatch) as forward:
        output, h_n = layer(x, h_0)
    with counted(monkeypatch) as backward:
        ((output.data if packed else output).sum() + h_n.sum()).backward()
    kernels = [
        {name: n for name, n in found.items() if name.startswith(("step", "sequence"))} for found in (forward, backward)
    ]
    assert kernels == [{"sequence_forward": layer.num_layers}, {"sequence_backward": layer.num_layers}]


def test_a_program_for_every_tile_of_rows() -> None:
    layer = tritongru.GRU(3, 5, bidirectional=True, backend="sequence")
    grids = []
    with runtime.observe(lambda name, grid: grids.append(grid)):
        layer(torch.randn(1, 33, 3))
    assert grids == [(1, 3, 2)]


def poisoned_layer(**kwargs) -> tritongru.GRU:
    layer = tritongru.GRU(7, 19, backend=EXCHANGING, **kwargs)
    for p in layer.parameters():
        p.data = poisoned(p.data)
    return layer


@pytest.mark.parametrize(("T", "dtype"), [(1, torch.bfloat16), (3, torch.float32), (3, torch.float16)], ids=str)
def test_nothing_beyond_a_tensor(T: int, dtype: torch.dtype, monkeypatch, h200_tiles: None) -> None:
    """Fences around every buffer and poison beyond every argument, with gaps in it or not: neither is reached."""
    torch.manual_seed(0)
    layer = poisoned_layer(bidirectional=True, dtype=dtype)
    x, h_0 = torch.randn(T, 18, 7, dtype=dtype), torch.randn(2, 18, 19, dtype=dtype)
    found = call_between_fences(layer, poisoned(x), poisoned(h_0), monkeypatch)
    assert all(t.isfinite().all() for t in found)
    gaps = call_between_fences(layer, with_gaps(x), with_gaps(h_0), monkeypatch)
    # only the library products may sum in another order: a few roundings to storage
    u = torch.finfo(dtype).eps / 2
    assert all((a - b).norm() <= 8 * u * b.norm() for a, b in zip(found, gaps, strict=True))


@pytest.mark.parametrize("recompute", [False, True])
def test_nothing_beyond_a_packed_tensor(recompute: bool, monkeypatch) -> None:
    torch.manual_seed(0)
    layer = poisoned_layer(bidirectional=True, recompute=recompute)
    lengths = torch.tensor([5] + [1, 2, 3] * 5 + [4, 4])
    x = pack_padded_sequence(torch.randn(5, 18, 7), lengths, enforce_sorted=False)
    found = call_between_fences(layer, x._replace(data=poisoned(x.data)), poisoned(torch.randn(2, 18, 19)), monkeypatch)
    assert all(t.isfinite().all() for t in found)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_what_is_not_finite_is_where_nn_gru_has_it() -> None:
    assert_finite_where_nn_gru_is("sequence")
