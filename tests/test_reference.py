"""The reference equations: against nn.GRU, their written-out backward against autograd, and gradcheck in float64."""

from __future__ import annotations

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence

import tritongru
from tritongru.batch import Visits
from tritongru.reference import direction_backward, direction_forward, gru_layer

LENGTHS = {"dense": None, "packed": (3, 3, 2, 1)}  # batch_sizes


def operands(batch_sizes, dtype=torch.float64):
    torch.manual_seed(0)
    T, B, I, H = 4, 3, 2, 3
    rows = (T, B) if batch_sizes is None else (sum(batch_sizes),)
    x = torch.randn(*rows, I, dtype=dtype)
    module = torch.nn.GRU(I, H, bidirectional=True, dtype=dtype)
    return x, torch.randn(2, B, H, dtype=dtype), module, Visits.of(x, batch_sizes)


@pytest.mark.parametrize("batch_sizes", LENGTHS.values(), ids=LENGTHS)
def test_layer_is_nn_gru(batch_sizes) -> None:
    x, h_0, module, visits = operands(batch_sizes)
    y, h_n = gru_layer(x, h_0, list(module.parameters()), True, visits, 2)
    if batch_sizes is None:
        expected, expected_h_n = module(x, h_0)
    else:
        packed = torch.nn.utils.rnn.PackedSequence(x, torch.tensor(batch_sizes))
        expected, expected_h_n = module(packed, h_0)
        expected = expected.data
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(h_n, expected_h_n)


@pytest.mark.parametrize("batch_sizes", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("direction", [0, 1], ids=["forward", "reverse"])
def test_written_backward_is_autograd(batch_sizes, direction: int) -> None:
    x, h_0, module, visits = operands(batch_sizes)
    w_hh, b_hh = module.weight_hh_l0.detach(), module.bias_hh_l0.detach()
    x_proj = torch.nn.functional.linear(x, module.weight_ih_l0.detach()).requires_grad_()
    h_0 = h_0[direction].requires_grad_()
    y, h_n, steps = direction_forward(x_proj, h_0, w_hh, b_hh, visits, direction)
    dy, dh_n = torch.randn_like(y), torch.randn_like(h_n)
    d_x_proj, d_h_0 = torch.autograd.grad([y, h_n], [x_proj, h_0], [dy, dh_n])
    with torch.no_grad():
        dgates, dh_0 = direction_backward(dy, dh_n, h_0, steps, w_hh, visits, direction)
    dn, dr, dz, _ = dgates.chunk(4, -1)
    torch.testing.assert_close(torch.cat([dr, dz, dn], -1), d_x_proj)
    torch.testing.assert_close(dh_0, d_h_0)


@pytest.mark.parametrize("batch_sizes", LENGTHS.values(), ids=LENGTHS)
def test_gradcheck_of_the_equations_to_second_order(batch_sizes) -> None:
    x, h_0, module, visits = operands(batch_sizes)
    inputs = [t.detach().clone().requires_grad_() for t in (x, h_0, *module.parameters())]

    def layer(x, h_0, *params):
        return gru_layer(x, h_0, params, True, visits, 2)

    assert torch.autograd.gradcheck(layer, inputs)
    assert torch.autograd.gradgradcheck(layer, inputs, atol=1e-4)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_gradcheck_of_the_backend(packed: bool, recompute: bool) -> None:
    """The autograd Function with its library products, around the written-out backward."""
    layer = tritongru.GRU(2, 3, 2, bidirectional=True, backend="reference", recompute=recompute, dtype=torch.float64)
    x = torch.randn(3, 3, 2, dtype=torch.float64)
    if packed:
        x = pack_padded_sequence(x, torch.tensor([2, 3, 1]), enforce_sorted=False)

    def call(data, h_0, *params):
        named = dict(zip([name for name, _ in layer.named_parameters()], params, strict=True))
        output, h_n = torch.func.functional_call(layer, named, (x._replace(data=data) if packed else data, h_0))
        return output.data if packed else output, h_n

    data = (x.data if packed else x).clone().requires_grad_()
    h_0 = torch.randn(4, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(call, [data, h_0, *layer.parameters()])


@pytest.mark.parametrize("module", [torch.nn.GRU, tritongru.GRU])
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_gates_follow_the_equations(module, packed: bool) -> None:
    """`tritongru.gates`: h is the module's output, and each gate satisfies its own equation."""
    torch.manual_seed(0)
    T, B, I, H = 4, 3, 5, 6
    layer = module(I, H, 2, bidirectional=True, batch_first=True)
    x = torch.randn(B, T, I)
    lengths = torch.tensor([4, 2, 3]) if packed else torch.full((B,), T)
    given = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False) if packed else x
    found = tritongru.gates(layer, given)
    assert found.r.shape == (2, 2, T, B, H)
    output, _ = layer(given)
    if packed:
        output, _ = torch.nn.utils.rnn.pad_packed_sequence(output, batch_first=True)
    running = (torch.arange(T)[:, None] < lengths).bool()
    last = torch.cat([found.h[1, 0], found.h[1, 1]], -1)
    torch.testing.assert_close(last[running], output.transpose(0, 1)[running])
    assert last[~running].isnan().all()
    torch.testing.assert_close(found.h, found.n + found.z * (previous(found.h, lengths) - found.n), equal_nan=True)
    q = torch.nn.functional.linear(
        previous(found.h, lengths)[0, 0], layer.weight_hh_l0[2 * H :], layer.bias_hh_l0[2 * H :]
    )
    torch.testing.assert_close(found.q[0, 0], q, equal_nan=True)


def previous(h: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """h_{t-1} in each direction's order, zero before its first step, NaN beyond a row's length."""
    before = torch.zeros_like(h)
    before[:, 0, 1:] = h[:, 0, :-1]
    before[:, 1, :-1] = h[:, 1, 1:]
    for row, length in enumerate(lengths.tolist()):
        before[:, 1, length - 1, row] = 0.0
        before[:, :, length:, row] = float("nan")
    return before


def test_gates_refuses_what_is_no_gru() -> None:
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.GRU, got LSTM"):
        tritongru.gates(torch.nn.LSTM(2, 3), torch.randn(4, 1, 2))
    with pytest.raises(RuntimeError, match="must be equal to input_size"):
        tritongru.gates(torch.nn.GRU(2, 3), torch.randn(4, 1, 5))
