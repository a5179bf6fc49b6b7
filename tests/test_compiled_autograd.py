"""Forward in eager, backward under compiled autograd, where Dynamo traces what backward does: one operator.

Helpers and tolerances: tests/kit/modules.py.
"""

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence

import tritongru
from tests.kit.modules import BACKENDS, assert_all_close, loss_of, ours_only, packed, pair, randn
from tests.kit.operators import BACKWARD, FORWARD, Graphs, Seen, assert_second


def compiled_backward(loss, compiler):
    torch._dynamo.reset()
    with torch._dynamo.config.patch(compiled_autograd=True):
        torch.compile(lambda: loss.backward(), backend=compiler)()
    torch._dynamo.reset()


FORMS = {
    "plain": ({}, lambda layer: layer(randn(3, 2, 3))),
    "two-layers-bidirectional": ({"num_layers": 2, "bidirectional": True}, lambda layer: layer(randn(3, 2, 3))),
    "batch-first-no-bias": ({"batch_first": True, "bias": False}, lambda layer: layer(randn(2, 3, 3))),
    "recompute": ({"recompute": True}, lambda layer: layer(randn(3, 2, 3))),
    "packed": ({"bidirectional": True}, lambda layer: layer(packed(3, 1, 2))),
    "h_n-alone": ({}, lambda layer: (torch.zeros(1), layer(randn(3, 2, 3))[1])),
}


@pytest.mark.filterwarnings("ignore")  # Dynamo's own, of what it does not trace
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@ours_only
def test_backward_under_compiled_autograd(backend, form):
    options, call = form
    _, layer = pair(backend, 3, 5, **options)
    expected = torch.autograd.grad(loss_of(*call(layer)), list(layer.parameters()))
    graphs = Graphs()
    compiled_backward(loss_of(*call(layer)), graphs)
    assert_all_close([p.grad for p in layer.parameters()], expected)
    assert [name for graph in graphs for name in graph].count(BACKWARD) == layer.num_layers
    assert not [name for graph in graphs for name in graph if "mm" in name or "empty" in name]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backend", [None, *BACKENDS], ids=lambda b: b or "default")
def test_a_cell_and_a_layer_under_aot_eager(backend):
    torch.manual_seed(0)
    cell, layer = tritongru.GRUCell(3, 5, backend=backend), tritongru.GRU(3, 5, backend=backend)
    parameters = [*cell.parameters(), *layer.parameters()]

    def call():
        return cell(randn(2, 3)).square().sum() + loss_of(*layer(randn(3, 2, 3)))

    expected = torch.autograd.grad(call(), parameters)
    compiled_backward(call(), "aot_eager")
    assert_all_close([p.grad for p in parameters], expected)


@pytest.mark.filterwarnings("ignore")
@ours_only
def test_of_a_forward_that_was_an_operator_already(backend):
    """Under a dispatch mode, and in a compiled graph."""
    _, layer = pair(backend, 3, 5)
    weights = list(layer.parameters())
    expected = torch.autograd.grad(loss_of(*layer(randn(3, 2, 3))), weights)
    with Seen() as seen:
        loss = loss_of(*layer(randn(3, 2, 3)))
    assert FORWARD in seen.names
    compiled_backward(loss, "eager")
    assert_all_close([p.grad for p in weights], expected)
    layer.zero_grad()
    with torch._dynamo.config.patch(allow_rnn=True):
        loss = loss_of(*torch.compile(layer, backend="aot_eager", fullgraph=True)(randn(3, 2, 3)))
    compiled_backward(loss, "eager")
    assert_all_close([p.grad for p in weights], expected)


@pytest.mark.filterwarnings("ignore")
@ours_only
def test_of_a_second_derivative(backend):
    _, layer = pair(backend, 3, 5)
    weights = list(layer.parameters())

    def penalty(x, call):
        (gradient,) = torch.autograd.grad(call(x)[0].square().sum(), x, create_graph=True)
        return gradient.square().sum()

    sequence = packed(3, 1, 2)
    for x, call in (
        (randn(3, 2, 3), layer),
        (sequence.data, lambda data: layer(PackedSequence(data, *sequence[1:]))[0]),
    ):
        x.requires_grad_()
        expected = torch.autograd.grad(penalty(x, call), weights)
        layer.zero_grad()
        compiled_backward(penalty(x, call), "eager")
        assert_second([p.grad for p in weights], expected)
