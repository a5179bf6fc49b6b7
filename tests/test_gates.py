"""`tritongru.gates`: what it shows is what a backend computes."""

import math
import re

import pytest
import torch
from torch.nn.utils.rnn import pad_packed_sequence

import tritongru
from tests.kit.inside import default_device_elsewhere
from tests.kit.modules import assert_close, ours_only, same_bits, some_forms, states, table


@ours_only
@table("form", some_forms("plain", "no-bias-batch-first", "two-layers-bidirectional", "packed"))
def test_the_gates_shown_are_those_that_a_backend_saves(backend, form) -> None:
    """r, z, n, q of every layer, direction and step, and h, by equations of its own, wherever tensors go by default."""
    theirs, ours = form.pair(backend)
    (x, hx), D, H = form.given(), states(ours) // ours.num_layers, ours.hidden_size
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        output, _ = ours(x, hx)

    def in_time(rows):
        """[T, B, ...] in the order of the user's batch, NaN where a packed row has no such step."""
        return pad_packed_sequence(x._replace(data=rows), padding_value=math.nan)[0] if form.lengths else rows

    dims = 3 if form.lengths else 4
    rzn, q = (
        torch.stack([in_time(t) for t in saved if t.shape[-2:] == (D, n * H) and t.dim() == dims]).movedim(-2, 1)
        for n in (3, 1)
    )
    assert len(rzn) == len(q) == ours.num_layers
    h = in_time(output.data if form.lengths else output.transpose(0, 1) if ours.batch_first else output).detach()
    for module in (theirs, ours):
        with default_device_elsewhere():
            found = tritongru.gates(module, x, hx)
        shown = found.r, found.z, found.n, found.q, torch.cat(list(found.h[-1]), -1)
        for actual, expected in zip((*rzn.chunk(3, -1), q, h), shown, strict=True):
            assert torch.equal(actual.isnan(), expected.isnan())
            assert_close(actual.nan_to_num(), expected.nan_to_num())


def test_gates_of_unbatched_input_without_h_0() -> None:
    layer, x = torch.nn.GRU(2, 3, 2, bidirectional=True, batch_first=True), torch.randn(4, 2)
    assert same_bits(tritongru.gates(layer, x), tritongru.gates(layer, x[None], torch.zeros(4, 1, 3)))


def test_gates_refuses_what_is_no_gru_and_what_a_gru_refuses() -> None:
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.GRU, got LSTM"):
        tritongru.gates(torch.nn.LSTM(2, 3), torch.randn(4, 1, 2))
    for size in ((4, 1, 5), (4, 1, 2, 2), (2,), (0, 1, 2)):  # in nn.GRU's words
        x, layer = torch.randn(size), torch.nn.GRU(2, 3)
        with pytest.raises((RuntimeError, ValueError)) as theirs:
            layer(x)
        with pytest.raises(theirs.type, match=f"^{re.escape(str(theirs.value))}$"):
            tritongru.gates(layer, x)
