"""The reference equations: against nn.GRU, their written-out backward against autograd, gradcheck in float64; and what
`tritongru.gates` shows."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import tritongru
from tests.kit.inside import default_device_elsewhere
from tests.kit.modules import assert_close, ours_only, some_forms, states, table
from tritongru.batch import Visits
from tritongru.reference import direction_backward, direction_forward, gru_layer

every_batch = table("batch_sizes", {"dense": None, "packed": (3, 3, 2, 1)})


def operands(batch_sizes, dtype=torch.float64):
    torch.manual_seed(0)
    T, B, I, H = 4, 3, 2, 3
    x = torch.randn(*((T, B) if batch_sizes is None else (sum(batch_sizes),)), I, dtype=dtype)
    module = torch.nn.GRU(I, H, bidirectional=True, dtype=dtype)
    return x, torch.randn(2, B, H, dtype=dtype), module, Visits.of(x, batch_sizes)


@every_batch
def test_layer_is_nn_gru_and_differentiable_twice(batch_sizes) -> None:
    x, h_0, module, visits = operands(batch_sizes)

    def layer(x, h_0, *params):
        return gru_layer(x, h_0, params, True, visits, 2)

    given = x if batch_sizes is None else torch.nn.utils.rnn.PackedSequence(x, torch.tensor(batch_sizes))
    expected, expected_h_n = module(given, h_0)
    y, h_n = layer(x, h_0, *module.parameters())
    torch.testing.assert_close(y, expected if batch_sizes is None else expected.data)
    torch.testing.assert_close(h_n, expected_h_n)
    inputs = [t.detach().clone().requires_grad_() for t in (x, h_0, *module.parameters())]
    assert torch.autograd.gradcheck(layer, inputs)
    assert torch.autograd.gradgradcheck(layer, inputs, atol=1e-4)


@every_batch
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
    _, dr, dz, dn = dgates.chunk(4, -1)
    torch.testing.assert_close(torch.cat([dr, dz, dn], -1), d_x_proj)
    torch.testing.assert_close(dh_0, d_h_0)


@pytest.mark.parametrize("module", [torch.nn.GRU, tritongru.GRU])
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_gates_follow_the_equations(module, packed: bool) -> None:
    """`tritongru.gates`: h is the module's output, and each gate satisfies its own equation; wherever tensors go."""
    torch.manual_seed(0)
    T, B, I, H = 4, 3, 5, 6
    layer = module(I, H, 2, bidirectional=True, batch_first=True)
    x, lengths = torch.randn(B, T, I), torch.tensor([4, 2, 3]) if packed else torch.full((B,), T)
    given = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False) if packed else x
    output, _ = layer(given)
    output = pad_packed_sequence(output, batch_first=True)[0] if packed else output
    with default_device_elsewhere():
        found = tritongru.gates(layer, given)
    assert found.r.shape == (2, 2, T, B, H)
    running = (torch.arange(T)[:, None] < lengths).bool()
    last = torch.cat([found.h[1, 0], found.h[1, 1]], -1)
    torch.testing.assert_close(last[running], output.transpose(0, 1)[running])
    assert last[~running].isnan().all()
    before = torch.zeros_like(found.h)  # h_{t-1} in each direction's order, NaN beyond a row's length
    before[:, 0, 1:], before[:, 1, :-1] = found.h[:, 0, :-1], found.h[:, 1, 1:]
    for row, length in enumerate(lengths.tolist()):
        before[:, 1, length - 1, row] = 0.0
        before[:, :, length:, row] = math.nan
    torch.testing.assert_close(found.h, found.n + found.z * (before - found.n), equal_nan=True)
    q = torch.nn.functional.linear(before[0, 0], layer.weight_hh_l0[2 * H :], layer.bias_hh_l0[2 * H :])
    torch.testing.assert_close(found.q[0, 0], q, equal_nan=True)


@ours_only
@table("form", some_forms("plain", "no-bias-batch-first", "two-layers-bidirectional", "packed"))
def test_the_gates_shown_are_those_that_a_backend_saves(backend, form) -> None:
    """`tritongru.gates` has its own equations: r, z, n, q of every layer, direction and step, and h in the output."""
    theirs, ours = form.pair(backend)
    (x, hx), D, H = form.given(), states(ours) // ours.num_layers, ours.hidden_size
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        output, _ = ours(x, hx)

    def in_time(rows):
        """[T, B, ...] in the order of the user's batch, NaN where a packed row has no such step."""
        return pad_packed_sequence(x._replace(data=rows), padding_value=math.nan)[0] if form.lengths else rows

    dims = 3 if form.lengths else 4
    rzn, q = ([in_time(t) for t in saved if t.shape[-2:] == (D, n * H) and t.dim() == dims] for n in (3, 1))
    assert len(rzn) == len(q) == ours.num_layers
    h = output.data if form.lengths else output.transpose(0, 1) if ours.batch_first else output
    for module in (theirs, ours):
        found = tritongru.gates(module, x, hx)
        for layer in range(ours.num_layers):
            for direction in range(D):
                kept = [*rzn[layer][:, :, direction].chunk(3, -1), q[layer][:, :, direction]]
                for name, actual in zip("rznq", kept, strict=True):
                    shown = getattr(found, name)[layer, direction]
                    torch.testing.assert_close(shown.isnan(), actual.isnan())
                    assert_close(actual.nan_to_num(), shown.nan_to_num(), what=f"{name} of layer {layer}")
        assert_close(in_time(h.detach()).nan_to_num(), torch.cat(list(found.h[-1]), -1).nan_to_num(), what="h")


def test_gates_refuses_what_is_no_gru() -> None:
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.GRU, got LSTM"):
        tritongru.gates(torch.nn.LSTM(2, 3), torch.randn(4, 1, 2))
    with pytest.raises(RuntimeError, match="must be equal to input_size"):
        tritongru.gates(torch.nn.GRU(2, 3), torch.randn(4, 1, 5))
