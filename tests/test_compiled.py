"""A layer in graphs of torch.compile: forward, backward, under compiled autograd, of sizes that only data tells.

Tolerance: tests/kit/modules.py; a graph runs the passes that an eager call runs."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

import tritongru
from tests.kit import inside
from tests.kit.modules import (
    FORMS,
    PLAIN,
    as_function,
    assert_all_close,
    assert_same,
    both,
    default_too,
    loss_of,
    ours_and_default,
    ours_by_form,
    packed,
    pair,
    randn,
    results,
    some_forms,
    table,
    tensors,
)
from tests.kit.operators import BACKWARD, FORWARD, Graphs, Seen, arguments, assert_second, compiled, runs

long = pytest.mark.long

# torch.compile.


@table("form", some_forms("two-layers-bidirectional", "recompute-batch-first-bidirectional", "padded", "cell"))
@default_too
def test_a_module_compiles_as_a_full_graph(backend, form, dynamo, ran):
    """Where Dynamo may trace RNNs."""
    theirs, ours = form.pair(backend)
    graphs = Graphs()
    found = form.results(torch.compile(ours, backend=graphs, fullgraph=True), of=ours)
    assert_same(found, form.results(theirs))
    by_operator = backend != "aten" and (backend or not form.cell)
    assert (FORWARD in graphs[0]) == bool(by_operator)
    assert set(ran) == (runs(backend) if by_operator else set())


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@default_too
def test_gru_compiles_as_a_full_graph_with_no_setting(backend, dynamo, ran, compiler):
    form = FORMS["two-layers-bidirectional"]
    theirs, _ = form.pair(None)
    call = torch.compile(as_function(theirs, tritongru.gru, backend=backend), backend=compiler, fullgraph=True)
    with dynamo.config.patch(allow_rnn=False):
        assert_same(form.results(call, of=theirs), form.results(theirs))
    assert ran == [*runs(backend)] * 2


def test_without_a_setting_a_module_breaks_the_graph_and_computes_the_same(backend, dynamo):
    theirs, ours = PLAIN.pair(backend)
    head = nn.Linear(5, 2)

    @torch.compile(backend="eager")
    def call(module, x):
        output, h_n = module(x * 2)
        return head(output), h_n

    output, h_n = theirs(randn(3, 2, 3) * 2)
    with dynamo.config.patch(allow_rnn=False):
        assert_all_close(call(ours, randn(3, 2, 3)), [head(output), h_n])


@ours_and_default
def test_a_graph_knows_neither_time_nor_batch(backend, dynamo):
    """As many operations for T = 1000 as for 10, and after the first changes of T and of B no graph is made again."""
    _, ours = pair(backend, 2, 3)
    graphs, with_padding = Graphs(), Graphs()
    compiled, padded = (torch.compile(ours, backend=g, fullgraph=True) for g in (graphs, with_padding))
    for T, B in ((4, 2), (5, 2), (5, 3), (6, 4), (9, 2), (3, 7)):
        loss_of(*compiled(randn(T, B, 2))).backward()
    if backend in (None, "reference"):
        compiled(randn(1000, 2, 2))
        dynamo.reset()
        of_long = Graphs()
        torch.compile(ours, backend=of_long, fullgraph=True)(randn(1000, 2, 2))
        assert len(of_long[0]) <= len(graphs[-1]) < 40
    dynamo.reset()
    for T, B in ((4, 2), (5, 2), (5, 3), (6, 4), (3, 7)):
        how = {"lengths": torch.randint(1, T + 1, (B,)), "resets": torch.rand(T, B) < 0.3}
        assert_all_close(padded(randn(T, B, 2), **how), ours(randn(T, B, 2), **how))
    assert len(graphs) <= 3 and len(with_padding) <= 3  # static, then a size that changes, then both


@ours_and_default
def test_packed_input_compiles_as_a_full_graph(backend, dynamo):
    """Its lengths are read when the graph runs: other lengths, the same graph."""
    _, ours = FORMS["two-layers-bidirectional"].pair(backend)
    for with_hx in (True, False):
        dynamo.reset()
        graphs = Graphs()
        compiled = torch.compile(ours, backend=graphs, fullgraph=True)

        def call(*given, compiled=compiled):
            found = compiled(*given)
            assert isinstance(found[0], PackedSequence)
            return found

        for lengths in ((4, 3, 3), (5, 2, 1), (6, 4, 2, 1), (2, 2))[: 2 if backend in ("step", "sequence") else 4]:
            given = packed(*lengths), randn(4, len(lengths), 5, seed=3) if with_hx else None
            assert_same(results(call, *given, of=ours), results(ours, *given), terms=26)
        assert len(graphs) <= 3 and all(graph.count(FORWARD) == 2 for graph in graphs)


@ours_and_default
def test_one_graph_for_all_lengths_and_resets(backend, dynamo):
    """Their values are what the graph is run with, and a bad one is an error then."""
    _, ours = pair(backend, 3, 5, 2, batch_first=True, bidirectional=True)
    graphs = Graphs()
    compiled = torch.compile(ours, backend=graphs, fullgraph=True)
    x, h_0 = randn(3, 5, 3), randn(4, 3, 5)
    for seed, lengths in enumerate(((4, 5, 1), (1, 2, 5), (5, 5, 5))):
        how = {"lengths": torch.tensor(lengths), "resets": randn(3, 5, seed=seed) > 0.6}
        assert_same(results(compiled, x, h_0, of=ours, **how), results(ours, x, h_0, **how), terms=23)
    assert len(graphs) == 1
    with pytest.raises(RuntimeError, match="got 6 where input has 5 steps"):
        compiled(x, h_0, lengths=torch.tensor([5, 6, 1]), resets=how["resets"])


@default_too
def test_compiled_calls_that_are_not_training(backend, dynamo):
    theirs, ours = (m.eval() for m in pair(backend, 3, 5, num_layers=2, dropout=0.5))
    call = compiled(ours)
    with torch.no_grad():
        assert_all_close(call(randn(3, 2, 3)), theirs(randn(3, 2, 3)))
    assert_all_close(call(randn(3, 3)), theirs(randn(3, 3)))
    if backend != "aten":  # torch 2.13 draws the same there at each call
        ours.train()
        assert not torch.equal(call(randn(3, 2, 3))[0], call(randn(3, 2, 3))[0])


@ours_and_default
def test_compiled_autocast_is_eager_autocast(backend, dynamo):
    """In bfloat16 where a backend is forced, else float32 comes out, as of nn.GRU (whose products are autocast)."""
    _, ours = PLAIN.pair(backend)

    def call(module):
        def autocast(*given):
            with torch.autocast("cpu", torch.bfloat16):
                return module(*given)

        return PLAIN.results(autocast, of=ours)

    expected, found = call(ours), call(compiled(ours))
    assert expected["output"].dtype == (torch.bfloat16 if backend else torch.float32)
    for name, e in expected.items():
        assert found[name].dtype == e.dtype
        limit = 4 * torch.finfo(torch.bfloat16).eps * max(1.0, e.abs().max())
        assert (found[name].float() - e.float()).abs().max() <= limit


@long
@ours_and_default
def test_inductor(backend, dynamo):
    """The compiler that people use, around the operators, for a whole model with a loss."""
    theirs, ours = pair(backend, 3, 5, num_layers=2, batch_first=True)
    head, of_h_n = nn.Linear(5, 2), randn(2, 2, 5, seed=6)

    def model(module, x):
        output, h_n = module(torch.tanh(x))
        return head(output).square().mean() + (h_n * of_h_n).sum()

    for module, run in ((theirs, model), (ours, torch.compile(model, fullgraph=True))):
        module.zero_grad()
        run(module, randn(2, 7, 3)).backward()
    assert_all_close([p.grad for p in ours.parameters()], [p.grad for p in theirs.parameters()])


def test_under_use_backend_and_the_environment_a_graph_is_made_for_what_is_asked(dynamo, ran, monkeypatch):
    def made():
        dynamo.reset()
        torch.compile(ours, backend="eager", fullgraph=True)(randn(3, 2, 3))

    ours = tritongru.GRU(3, 5)
    with tritongru.use_backend("aten"):
        made()
    assert ran == []
    monkeypatch.setenv("TRITONGRU_BACKEND", "reference")
    made()
    assert ran == ["reference"]
    ours.backend = "step"
    inside.without(monkeypatch, interpreter=True)
    with pytest.raises(Exception, match="backend 'step' cannot run here: CPU tensors need"):
        made()


# Backward under compiled autograd, where Dynamo traces what backward does: one operator.


def compiled_backward(loss, compiler):
    torch._dynamo.reset()
    with torch._dynamo.config.patch(compiled_autograd=True):
        torch.compile(lambda: loss.backward(), backend=compiler)()


@ours_by_form({name: form for name, form in FORMS.items() if name not in ("unbatched", "one-step")})
@pytest.mark.filterwarnings("ignore")  # Dynamo's own, of what it does not trace
def test_backward_under_compiled_autograd(backend, form, dynamo):
    _, layer = form.pair(backend)

    def loss(on=slice(None), call=layer):
        return sum((t * randn(*t.shape, seed=5)).sum() for t in tensors(call(*form.given(), **form.how()))[on])

    for on in (slice(None), slice(-1, None)):  # all results, or h_n alone
        layer.zero_grad()
        expected, graphs = torch.autograd.grad(loss(on), list(layer.parameters())), Graphs()
        compiled_backward(loss(on), graphs)
        assert_all_close([p.grad for p in layer.parameters()], expected)
        assert [name for graph in graphs for name in graph].count(BACKWARD) == getattr(layer, "num_layers", 1)
        assert not [name for graph in graphs for name in graph if "mm" in name or "empty" in name]


@pytest.mark.filterwarnings("ignore")
@default_too
def test_a_step_of_training_under_compiled_autograd(backend, dynamo):
    """By AOTAutograd; of a cell and a layer, of a forward that was an operator already, and of a second derivative."""
    cell, (_, layer) = tritongru.GRUCell(3, 5, backend=backend), PLAIN.pair(backend)
    parameters = [*cell.parameters(), *layer.parameters()]

    def call(run=layer):
        return cell(randn(2, 3)).square().sum() + loss_of(*run(randn(3, 2, 3)))

    def penalty(run=layer):
        x = randn(3, 2, 3).requires_grad_()
        (gradient,) = torch.autograd.grad(run(x)[0].square().sum(), x, create_graph=True)
        return gradient.square().sum() + cell(randn(2, 3)).sum()

    def seen():
        with Seen():
            return call()

    kinds = {"eager": (call, call, "aot_eager"), "penalty": (penalty, penalty, "eager"), "seen": (seen, call, "eager")}
    kinds["compiled"] = (lambda: call(compiled(layer)), call, "eager")
    if backend in (None, "aten"):
        kinds = {"eager": kinds["eager"]}
    for name, (made, plain, compiler) in kinds.items():
        expected = torch.autograd.grad(plain(), parameters)
        layer.zero_grad(), cell.zero_grad()
        compiled_backward(made(), compiler)
        (assert_second if name == "penalty" else assert_all_close)([p.grad for p in parameters], expected)


@ours_and_default
def test_batched_gradients_of_a_compiled_layer(backend, dynamo):
    theirs, ours = pair(backend, 3, 5, num_layers=2)
    found = []
    for module, call in ((theirs, theirs), (ours, compiled(ours))):
        x = randn(3, 2, 3).requires_grad_()
        out = call(x)
        given = [randn(3, *t.shape, seed=i) for i, t in enumerate(out)]
        leaves = [x, *module.parameters()]
        if module is ours:
            found.append(torch.autograd.grad(out, leaves, given, is_grads_batched=True))
        else:
            each = [torch.autograd.grad(out, leaves, row, retain_graph=True) for row in zip(*given, strict=True)]
            found.append([torch.stack(parts) for parts in zip(*each, strict=True)])
    assert_all_close(found[1], found[0])


# Sizes that only data tells (x[:, mask]): no operator may ask for them while the graph is made, and all must be right
# for whatever comes when it runs.


@pytest.fixture
def unbacked(dynamo):
    with dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        yield dynamo


def some(*chosen):
    return torch.tensor(chosen, dtype=torch.bool)


def assert_graph_is_nn_gru_s(theirs, ours, call, masks, *given):
    """`call(module, *given, mask)`, results and gradients of the parameters, for each of the masks."""
    graph = compiled(call)
    for mask in masks:
        both(
            theirs, ours,
            lambda m, mask=mask: [
                *(found := (graph if m is ours else call)(m, *given, *mask)),
                *torch.autograd.grad(loss_of(*found), list(m.parameters())),
            ],
        )  # fmt: skip
    return graph


OPTIONS = {"plain": {}, "two-layers-bi-batch-first": {"num_layers": 2, "bidirectional": True, "batch_first": True}}
SOME, ONE, ALL, NONE = some(1, 0, 1, 1), some(0, 1, 0, 0), some(1, 1, 1, 1), some(0, 0, 0, 0)


def on_rows_of(dim):
    return lambda module, x, mask: module(x[mask] if dim == 0 else x[:, mask])


@table("options", OPTIONS)
@default_too
def test_a_batch_whose_size_only_data_tells(backend, options, unbacked, ran):
    """Of one, of all and of no sequences, too."""
    theirs, ours = pair(backend, 3, 4, **options)
    call = on_rows_of(0 if ours.batch_first else 1)
    assert_graph_is_nn_gru_s(theirs, ours, call, ([SOME], [ONE], [ALL], [NONE]), randn(4, 4, 3))
    assert set(ran) == runs(backend)


@table("options", OPTIONS)
@ours_and_default
def test_a_time_that_only_data_tells(backend, options, unbacked):
    """torch.gru has no graph for it: it unrolls."""
    theirs, ours = pair(backend, 3, 4, **options)
    call, x = on_rows_of(1 if ours.batch_first else 0), randn(4, 4, 3)
    graph = assert_graph_is_nn_gru_s(theirs, ours, call, ([SOME], [ONE]), x)
    with pytest.raises(RuntimeError, match=r"x must have elements, got \[(0, 4|4, 0), 3\]"):
        graph(ours, x, NONE)


@default_too
def test_a_cell_s_batch_that_only_data_tells(backend, unbacked):
    def call(cell, x, mask):
        h = cell(x[mask])
        return h, cell(x[mask], h)

    assert_graph_is_nn_gru_s(*FORMS["cell"].pair(backend), call, ([SOME], [ONE], [NONE]), randn(4, 3))


@ours_and_default
def test_packed_rows_and_lengths_that_only_data_tells(backend, unbacked):
    """torch.gru has no graph for packed rows."""
    theirs, ours = pair(backend, 3, 4, bidirectional=True)

    def call(module, data, batch_sizes, rows, steps):
        hx = torch.zeros(2, 3, 4)
        output, h_n = module(PackedSequence(data[rows], batch_sizes[steps]), hx)
        return output.data, h_n

    data, sizes = randn(8, 3), torch.tensor([3, 2, 2, 1])
    masks = ((some(1, 1, 1, 1, 1, 1, 0, 0), some(1, 1, 0, 1)), (some(0, 0, 0, 1, 1, 1, 1, 1), some(1, 0, 1, 0)))
    graph = assert_graph_is_nn_gru_s(theirs, ours, call, masks, data, sizes)
    for steps, got in ((ALL, r"\[3, 2, 2, 1\]"), (NONE, r"\[\]")):
        with pytest.raises(RuntimeError, match=f"batch_sizes must begin with h_0's batch size, 3, .*got {got}"):
            graph(ours, data, sizes, some(*[1] * 7, 0), steps)


def test_sizes_that_differ_when_the_graph_runs_are_refused_in_words(unbacked):
    """Of the operator alone: those of x and h_0 here come from two masks."""
    x, h_0, weights, *others = arguments("reference", T=3, B=4, I=3, H=5, training=False)
    call = compiled(lambda of_x, of_h_0: inside.layer_forward(x[:, of_x], h_0[:, of_h_0], weights, *others)[0])
    assert call(some(1, 0, 1, 0), some(0, 1, 1, 0)).shape == (3, 2, 5)
    with pytest.raises(RuntimeError, match=r"h_0 must have x's batch size, 2, got \[1, 1, 5\]"):
        call(some(1, 0, 1, 0), ONE)
