"""Where a graph breaks, Dynamo compiles each Python function that is called there: none of ours, so that a model with
many layers has the graphs that it has with torch's own layers, and meets no limit.
"""

import pytest
import torch
from torch import nn

import tritongru
from tests.kit.modules import assert_close, randn
from tests.kit.operators import FORWARD, Graphs

SIZES = range(3, 23)  # of the layers: more than Dynamo's limit of graphs for one function, whatever it counts


@pytest.fixture
def plain(dynamo):
    with dynamo.config.patch(allow_rnn=False, fail_on_recompile_limit_hit=True):
        yield dynamo


class Loop(nn.Module):
    """Layers in a loop: Dynamo gives up on the whole frame where a call in a loop breaks the graph."""

    def __init__(self, layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x):
        for layer in self.layers:
            torch._dynamo.graph_break()
            found = layer(x)
            x = found[0] if isinstance(found, tuple) else found
        return x


class InARow(nn.Module):
    """Three layers, with operations between them that are graphs of their own; the middle is a model by itself."""

    def __init__(self, layers):
        super().__init__()
        self.first, self.inner, self.last = layers[0], Loop(layers[1:-1]), layers[-1]

    def forward(self, x):
        x, _ = self.first(x * 2)
        x = self.inner(torch.tanh(x))
        x, _ = self.last(torch.tanh(x))
        return x


class ScaledOfTorch(nn.GRU):
    """A subclass as users write them; but super() of such a module Dynamo of torch 2.15 cannot trace."""

    def forward(self, input, hx=None):
        output, h_n = nn.GRU.forward(self, 2 * input, hx)
        return output / 2, h_n


class Scaled(tritongru.GRU):
    def forward(self, input, hx=None):
        output, h_n = tritongru.GRU.forward(self, 2 * input, hx)
        return output / 2, h_n


def models(make, theirs, ours, sizes, backend):
    """The model with torch's layers and with ours, of the same parameters."""
    torch.manual_seed(0)
    expected = make([theirs(size, size + 1) for size in sizes])
    found = make([ours(size, size + 1, backend=backend) for size in sizes])
    found.load_state_dict(expected.state_dict())
    return expected, found


def graphs_of(dynamo, model, rows):
    """What Dynamo made of training, inference, frozen weights and inputs of several sizes, and each call's result."""
    dynamo.reset()
    graphs, results = Graphs(), []
    compiled = torch.compile(model, backend=graphs)
    for mode, shape in enumerate(rows):
        model.train(mode != 1)
        model.requires_grad_(mode != 2)
        with torch.set_grad_enabled(mode != 1):
            x = randn(*shape, 3).requires_grad_(mode == 3)
            results.append(compiled(x))
        if results[-1].requires_grad:
            results[-1].sum().backward()
    return graphs, results


ROWS = ((4, 2), (5, 2), (5, 3), (3, 4), (1, 2))
KINDS = {
    "GRU": (Loop, nn.GRU, tritongru.GRU, ROWS),
    "nested": (InARow, nn.GRU, tritongru.GRU, ROWS),
    "subclass": (Loop, ScaledOfTorch, Scaled, ROWS),
    "GRUCell": (Loop, nn.GRUCell, tritongru.GRUCell, tuple((B,) for _, B in ROWS)),
}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("backend", [None, "reference"], ids=["default", "reference"])
def test_a_model_of_many_sizes_has_the_graphs_that_it_has_with_torch_s_layers(kind, backend, plain):
    make, theirs, ours, rows = kind
    expected, found = models(make, theirs, ours, SIZES, backend)
    (their_graphs, their_results), (our_graphs, our_results) = (graphs_of(plain, m, rows) for m in (expected, found))
    assert our_graphs == their_graphs
    for f, e in zip(our_results, their_results, strict=True):
        assert_close(f, e, terms=16 * len(SIZES))


@pytest.mark.parametrize("backend", [None, "reference", pytest.param("step", marks=pytest.mark.interpreted)])
@pytest.mark.parametrize("cell", [False, True], ids=["gru", "gru_cell"])
def test_the_functions_beside_a_graph_are_not_compiled(backend, cell, plain):
    """Nor their backward, which a compiled step of training calls."""
    layers = [(nn.GRUCell if cell else nn.GRU)(size, size + 1) for size in (3, 4, 5)]
    graphs = Graphs()

    @torch.compile(backend=graphs)
    def step(x):
        for layer in layers:
            torch._dynamo.graph_break()
            weights, H = list(layer.parameters()), layer.hidden_size
            if cell:
                x = tritongru.gru_cell(x, x.new_zeros(x.shape[0], H), *weights, backend=backend)
            else:
                h_0 = x.new_zeros(1, x.shape[1], H)
                x, _ = tritongru.gru(x, h_0, weights, True, 1, 0.0, True, False, False, backend=backend)
        x.sum().backward()
        return x

    for T, B in ((2, 2), (3, 2), (2, 3)):
        step(randn(B, 3) if cell else randn(T, B, 3))
    assert graphs == []


def test_what_is_given_to_compile_is_still_compiled(dynamo):
    """The functions, the modules, their methods, and a module's own `compile`."""
    layer, cell, theirs = tritongru.GRU(3, 4), tritongru.GRUCell(3, 4), nn.GRU(3, 4)
    x, h_0, weights = randn(3, 2, 3), torch.zeros(1, 2, 4), list(theirs.parameters())
    subclass = Scaled(3, 4)
    given = {
        "gru": (tritongru.gru, (x, h_0, weights, True, 1, 0.0, True, False, False)),
        "gru_cell": (tritongru.gru_cell, (x[0], h_0[0], *weights)),
        "GRU": (layer, (x,)),
        "GRU.forward": (layer.forward, (x,)),
        "subclass": (subclass, (x,)),
        "GRUCell": (cell, (x[0], h_0[0])),
        "GRUCell.forward": (cell.forward, (x[0],)),
    }
    for name, (function, arguments) in given.items():
        dynamo.reset()
        graphs = Graphs()
        found, expected = torch.compile(function, backend=graphs, fullgraph=True)(*arguments), function(*arguments)
        found, expected = (each if isinstance(each, torch.Tensor) else each[0] for each in (found, expected))
        assert_close(found, expected, what=name)
        assert len(graphs) == 1 and (FORWARD in graphs[0]) == ("ell" not in name), name
    for module, arguments in ((layer, (x,)), (cell, (x[0],))):
        dynamo.reset()
        graphs, expected = Graphs(), module(*arguments)[0]
        module.compile(backend=graphs, fullgraph=True)
        assert_close(module(*arguments)[0], expected)
        assert len(graphs) == 1
