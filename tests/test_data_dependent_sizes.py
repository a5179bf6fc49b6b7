"""Graphs of sizes that only data tells (x[:, mask]): no operator may ask for them while the graph is made, and all must
be right for whatever comes when it runs. The tolerance is that of tests/kit/modules.py.
"""

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

import tritongru
from tests.kit.modules import OURS, both, loss_of, pair, randn, states
from tests.kit.operators import DEFAULT_TOO, arguments
from tritongru import ops

OURS_AND_DEFAULT = pytest.mark.parametrize("backend", [None, *OURS], ids=lambda b: b or "default")


@pytest.fixture
def unbacked(dynamo):
    with dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        yield dynamo


def compiled(function):
    return torch.compile(function, backend="aot_eager", fullgraph=True)


def trained(module, call, *given):
    """Results of call(module, *given), and the gradients of the parameters."""
    module.zero_grad()
    results = call(module, *given)
    loss_of(*results).backward()
    return [*results, *(p.grad for p in module.parameters())]


def some(*chosen):
    return torch.tensor(chosen, dtype=torch.bool)


OPTIONS = {
    "plain": {},
    "two-layers-bi-batch-first": {"num_layers": 2, "bidirectional": True, "batch_first": True},
}
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def layer_of(backend, options):
    """A call of `tritongru.gru` and of a module on the rows that a mask leaves of `dim` of x."""

    def call(module, x, mask, dim):
        x = x[mask] if dim == 0 else x[:, mask]
        if type(module) is nn.GRU:
            return module(x)
        B = x.shape[0 if module.batch_first else 1]
        hx = x.new_zeros(states(module), B, module.hidden_size)
        return tritongru.gru(
            x, hx, list(module.parameters()), True, module.num_layers, 0.0, True, module.bidirectional,
            module.batch_first, backend=backend,
        )  # fmt: skip

    return call, *pair(backend, 3, 4, **options)


@every_option
@DEFAULT_TOO
def test_a_batch_whose_size_only_data_tells(backend, options, unbacked, ran):
    """Of one, of all and of no sequences, too."""
    call, theirs, ours = layer_of(backend, options)
    batch_dim = 0 if ours.batch_first else 1
    graph = compiled(call)
    for chosen in ((1, 0, 1, 1), (0, 1, 0, 0), (1, 1, 1, 1), (0, 0, 0, 0)):
        x = randn(4, 2, 3) if ours.batch_first else randn(2, 4, 3)
        given = (x, some(*chosen), batch_dim)
        both(theirs, ours, lambda m, given=given: trained(m, graph if m is ours else call, *given))
    assert set(ran) == {backend or "reference"} - {"aten"}


@every_option
@OURS_AND_DEFAULT
def test_a_time_that_only_data_tells(backend, options, unbacked):
    """torch.gru has no graph for it: it unrolls."""
    call, theirs, ours = layer_of(backend, options)
    time_dim = 1 if ours.batch_first else 0
    graph = compiled(call)
    x = randn(2, 4, 3) if ours.batch_first else randn(4, 2, 3)
    for chosen in ((1, 0, 1, 1), (0, 1, 0, 0)):
        given = (x, some(*chosen), time_dim)
        both(theirs, ours, lambda m, given=given: trained(m, graph if m is ours else call, *given))
    with pytest.raises(RuntimeError, match=r"x must have elements, got \[(0, 2|2, 0), 3\]"):
        graph(ours, x, some(0, 0, 0, 0), time_dim)


@pytest.mark.parametrize("dim", [0, 1], ids=["time", "batch"])
@OURS_AND_DEFAULT
def test_a_module_on_sizes_that_only_data_tells(backend, dim, unbacked):
    theirs, ours = pair(backend, 3, 4, num_layers=2)

    def call(module, x, mask):
        return module(x[mask] if dim == 0 else x[:, mask])

    graph = compiled(call)
    for chosen in ((1, 0, 1, 1), *([] if dim == 0 else [(0, 0, 0, 0)])):
        given = (randn(4, 4, 3), some(*chosen))
        both(theirs, ours, lambda m, given=given: trained(m, graph if m is ours else call, *given))


@DEFAULT_TOO
def test_a_cell_s_batch_that_only_data_tells(backend, unbacked):
    torch.manual_seed(0)
    theirs, ours = nn.GRUCell(3, 5), tritongru.GRUCell(3, 5, backend=backend)
    ours.load_state_dict(theirs.state_dict())

    def call(cell, x, mask):
        h = cell(x[mask])
        return h, cell(x[mask], h)

    graph = compiled(call)
    for chosen in ((1, 0, 1, 1), (0, 1, 0, 0), (0, 0, 0, 0)):
        both(
            theirs, ours, lambda m, chosen=chosen: trained(m, graph if m is ours else call, randn(4, 3), some(*chosen))
        )


@OURS_AND_DEFAULT
def test_packed_rows_and_lengths_that_only_data_tells(backend, unbacked):
    """torch.gru has no graph for packed rows."""
    theirs, ours = pair(backend, 3, 4, bidirectional=True)

    def call(module, data, batch_sizes, rows, steps):
        hx = torch.zeros(2, 3, 4)
        output, h_n = module(PackedSequence(data[rows], batch_sizes[steps]), hx)
        return output.data, h_n

    graph = compiled(call)
    data, sizes = randn(8, 3), torch.tensor([3, 2, 2, 1])
    for rows, steps in (((1, 1, 1, 1, 1, 1, 0, 0), (1, 1, 0, 1)), ((0, 0, 0, 1, 1, 1, 1, 1), (1, 0, 1, 0))):
        given = (data, sizes, some(*rows), some(*steps))
        both(theirs, ours, lambda m, given=given: trained(m, graph if m is ours else call, *given))
    with pytest.raises(RuntimeError, match=r"batch_sizes must begin with h_0's batch size, 3, .*got \[3, 2, 2, 1\]"):
        graph(ours, data, sizes, some(*[1] * 7, 0), some(1, 1, 1, 1))
    with pytest.raises(RuntimeError, match=r"batch_sizes must begin with h_0's batch size, 3, .*got \[\]"):
        graph(ours, data, sizes, some(*[1] * 7, 0), some(0, 0, 0, 0))


def test_sizes_that_differ_when_the_graph_runs_are_refused_in_words(unbacked):
    """Of the operator alone: those of x and h_0 here come from two masks."""
    x, h_0, weights, *others = arguments("reference", T=3, B=4, I=3, H=5, training=False)

    @compiled
    def call(of_x, of_h_0):
        return ops.layer_forward(x[:, of_x], h_0[:, of_h_0], weights, *others)[0]

    assert call(some(1, 0, 1, 0), some(0, 1, 1, 0)).shape == (3, 2, 5)
    with pytest.raises(RuntimeError, match=r"h_0 must have x's batch size, 2, got \[1, 1, 5\]"):
        call(some(1, 0, 1, 0), some(0, 1, 0, 0))


@pytest.mark.parametrize("batch_first", [False, True], ids=["time-first", "batch-first"])
@pytest.mark.parametrize("recompute", [False, True], ids=["gates-kept", "recompute"])
@pytest.mark.parametrize("backend", OURS)
def test_the_operators_on_an_empty_batch(backend, recompute, batch_first, ran):
    given = arguments(backend, T=3, B=0, I=3, H=5, D=2, batch_first=batch_first, recompute=recompute)
    y, h_n, *_ = ops.layer_forward(*given)
    assert y.shape == ((0, 3, 10) if batch_first else (3, 0, 10)) and h_n.shape == (2, 0, 5)
    x, h_0, weights, *_others = given
    found = torch.autograd.grad(loss_of(y, h_n), [x, h_0, *weights])
    assert all(f.shape == t.shape and not f.any() for f, t in zip(found, [x, h_0, *weights], strict=True))
    assert ran == []
