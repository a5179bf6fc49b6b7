"""torch.compile around layers: full graphs of one operator per layer, also where sizes are known only when they run;
compiled autograd; and layers beside graphs, where none of our Python is compiled."""

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

import tritongru
from tests.kit import inside
from tests.kit import modules as kit
from tests.kit.operators import BACKWARD, FORWARD, Graphs, arguments, compiled, runs


def full_graph(call):
    graphs = Graphs()
    return torch.compile(call, backend=graphs, fullgraph=True), graphs


@kit.table("form", kit.some_forms("two-layers-bidirectional", "recompute-batch-first-bidirectional", "padded", "cell"))
@kit.default_too
def test_a_module_compiles_as_a_full_graph(backend, form, dynamo, ran):
    theirs, ours = form.pair(backend)
    call, graphs = full_graph(ours)
    kit.assert_same(form.results(call, of=ours), form.results(theirs))
    by_operator = backend != "aten" and (backend or not form.cell)
    assert (FORWARD in graphs[0]) == bool(by_operator)
    assert set(ran) == (runs(backend) if by_operator else set())


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@kit.default_too
def test_with_no_setting_gru_is_a_full_graph_and_a_module_breaks_it(backend, dynamo, ran, compiler):
    form = kit.FORMS["two-layers-bidirectional"]
    theirs, ours = form.pair(backend)
    call = torch.compile(kit.as_function(theirs, tritongru.gru, backend=backend), backend=compiler, fullgraph=True)
    beside = torch.compile(lambda x, h_0: ours(x * 2, h_0), backend="eager")
    with dynamo.config.patch(allow_rnn=False):
        kit.assert_same(form.results(call, of=theirs), form.results(theirs))
        assert ran == [*runs(backend)] * 2
        if compiler == "eager":
            expected = form.results(lambda x, h_0: theirs(x * 2, h_0), of=theirs)
            kit.assert_same(form.results(beside, of=ours), expected)


@kit.ours_and_default
def test_a_graph_knows_neither_time_nor_batch(backend, dynamo):
    """As many operations for T = 1000 as for 10, and after the first changes of T and of B no graph is made again."""
    _, ours = kit.pair(backend, 2, 3)
    (call, graphs), (padded, with_padding) = full_graph(ours), full_graph(ours)
    for T, B in ((4, 2), (5, 2), (5, 3), (6, 4), (9, 2), (3, 7)):
        kit.loss_of(*call(kit.randn(T, B, 2))).backward()
    if backend in (None, "reference"):
        call(kit.randn(1000, 2, 2))
        dynamo.reset()
        of_long, graphs_of_long = full_graph(ours)
        of_long(kit.randn(1000, 2, 2))
        assert len(graphs_of_long[0]) <= len(graphs[-1]) < 40
    dynamo.reset()
    for T, B in ((4, 2), (5, 2), (5, 3), (6, 4), (3, 7)):
        how = {"lengths": torch.randint(1, T + 1, (B,)), "resets": torch.rand(T, B) < 0.3}
        kit.assert_all_close(padded(kit.randn(T, B, 2), **how), ours(kit.randn(T, B, 2), **how))
    assert len(graphs) <= 3 and len(with_padding) <= 3  # static, then a size that changes, then both


@kit.ours_and_default
def test_packed_input_compiles_as_a_full_graph(backend, dynamo):
    _, ours = kit.FORMS["two-layers-bidirectional"].pair(backend)
    for with_hx in (True, False):
        dynamo.reset()
        call, graphs = full_graph(ours)
        for lengths in ((4, 3, 3), (5, 2, 1), (6, 4, 2, 1), (2, 2))[: 2 if backend in ("step", "sequence") else 4]:
            given = kit.packed(*lengths), kit.randn(4, len(lengths), 5, seed=3) if with_hx else None
            kit.assert_same(kit.results(call, *given, of=ours), kit.results(ours, *given), terms=26)
        assert len(graphs) <= 3 and all(graph.count(FORWARD) == 2 for graph in graphs)
        assert isinstance(call(*given)[0], PackedSequence)


@kit.ours_and_default
def test_one_graph_for_all_lengths_and_resets(backend, dynamo):
    """Their values are what the graph is run with, and a bad one is an error then."""
    _, ours = kit.pair(backend, 3, 5, 2, batch_first=True, bidirectional=True)
    call, graphs = full_graph(ours)
    x, h_0 = kit.randn(3, 5, 3), kit.randn(4, 3, 5)
    for seed, lengths in enumerate(((4, 5, 1), (1, 2, 5), (5, 5, 5))):
        how = {"lengths": torch.tensor(lengths), "resets": kit.randn(3, 5, seed=seed) > 0.6}
        kit.assert_same(kit.results(call, x, h_0, of=ours, **how), kit.results(ours, x, h_0, **how), terms=23)
    assert len(graphs) == 1
    with pytest.raises(RuntimeError, match="got 6 where input has 5 steps"):
        call(x, h_0, lengths=torch.tensor([5, 6, 1]), resets=how["resets"])


@kit.default_too
def test_compiled_calls_that_are_not_training(backend, dynamo):
    theirs, ours = (m.eval() for m in kit.pair(backend, 3, 5, num_layers=2, dropout=0.5))
    call = compiled(ours)
    with torch.no_grad():
        kit.assert_all_close(call(kit.randn(3, 2, 3)), theirs(kit.randn(3, 2, 3)))
    kit.assert_all_close(call(kit.randn(3, 3)), theirs(kit.randn(3, 3)))
    if backend != "aten":  # torch 2.13 draws the same there at each call
        ours.train()
        assert not torch.equal(call(kit.randn(3, 2, 3))[0], call(kit.randn(3, 2, 3))[0])


@kit.ours_and_default
def test_compiled_autocast_is_eager_autocast(backend, dynamo):
    """In bfloat16 where a backend is forced, else float32 comes out, as of nn.GRU (whose products are autocast)."""
    _, ours = kit.PLAIN.pair(backend)
    autocast = torch.autocast("cpu", torch.bfloat16)
    expected, found = (kit.PLAIN.results(autocast(module), of=ours) for module in (ours, compiled(ours)))
    assert expected["output"].dtype == (torch.bfloat16 if backend else torch.float32)
    for name, e in expected.items():
        assert found[name].dtype == e.dtype
        limit = 4 * torch.finfo(torch.bfloat16).eps * max(1.0, e.abs().max())
        assert (found[name].float() - e.float()).abs().max() <= limit


@pytest.mark.long
@kit.ours_and_default
def test_inductor(backend, dynamo):
    theirs, ours = kit.pair(backend, 3, 5, num_layers=2, batch_first=True)
    head, of_h_n = nn.Linear(5, 2), kit.randn(2, 2, 5, seed=6)

    def loss(module, x):
        output, h_n = module(torch.tanh(x))
        return head(output).square().mean() + (h_n * of_h_n).sum()

    def gradients(module, call):
        return torch.autograd.grad(call(module, kit.randn(2, 7, 3)), list(module.parameters()))

    kit.assert_all_close(gradients(ours, torch.compile(loss, fullgraph=True)), gradients(theirs, loss))


def test_under_use_backend_and_the_environment_a_graph_is_made_for_what_is_asked(dynamo, ran, monkeypatch):
    def made():
        dynamo.reset()
        torch.compile(ours, backend="eager", fullgraph=True)(kit.randn(3, 2, 3))

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


@kit.ours_by_form({name: form for name, form in kit.FORMS.items() if name not in ("unbatched", "one-step")})
@pytest.mark.filterwarnings("ignore")  # Dynamo's own, of what it does not trace
def test_backward_under_compiled_autograd(backend, form, dynamo):
    """Where Dynamo traces what backward does: one operator."""
    _, layer = form.pair(backend)

    def loss(on):
        return sum((t * kit.randn(*t.shape, seed=5)).sum() for t in kit.tensors(layer(*form.given(), **form.how()))[on])

    for on in (slice(None), slice(-1, None)):  # all results, or h_n alone
        layer.zero_grad()
        expected, graphs, of = torch.autograd.grad(loss(on), list(layer.parameters())), Graphs(), loss(on)
        dynamo.reset()
        with dynamo.config.patch(compiled_autograd=True):
            torch.compile(lambda of=of: of.backward(), backend=graphs)()
        kit.assert_all_close([p.grad for p in layer.parameters()], expected)
        assert [name for graph in graphs for name in graph].count(BACKWARD) == getattr(layer, "num_layers", 1)
        assert not [name for graph in graphs for name in graph if "mm" in name or "empty" in name]


by_data = torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)


def some(*chosen):
    return torch.tensor(chosen, dtype=torch.bool)


SOME, ONE, ALL, NONE = some(1, 0, 1, 1), some(0, 1, 0, 0), some(1, 1, 1, 1), some(0, 0, 0, 0)
BY_BATCH = {"num_layers": 2, "bidirectional": True, "batch_first": True}


def of_some(module, x, in_time, mask):
    return module(x[:, mask] if in_time == module.batch_first else x[mask])


def cell_twice(cell, x, mask):
    return (h := cell(x[mask])), cell(x[mask], h)


def packed_rows(module, data, batch_sizes, rows, steps):
    output, h_n = module(PackedSequence(data[rows], batch_sizes[steps]), torch.zeros(2, 3, 4))
    return output.data, h_n


X, DATA, SIZES_OF_DATA = kit.randn(4, 4, 3), kit.randn(8, 3), torch.tensor([3, 2, 2, 1])
MASKS = [(some(1, 1, 1, 1, 1, 1, 0, 0), some(1, 1, 0, 1)), (some(0, 0, 0, 1, 1, 1, 1, 1), some(1, 0, 1, 0))]
TIME, PACKED = "x must have elements, got ", r"batch_sizes must begin with h_0's batch size, 3, .*got "
BY_DATA = {  # options of the layer, its call, what is given but masks, good masks, bad ones and what is said
    "batch": ({}, of_some, [X, False], [[SOME], [ONE], [ALL], [NONE]], []),
    "batch-first": (BY_BATCH, of_some, [X, False], [[SOME], [ONE], [ALL], [NONE]], []),
    "cell": (None, cell_twice, [X[0]], [[SOME], [ONE], [NONE]], []),
    "time": ({}, of_some, [X, True], [[SOME], [ONE]], [([NONE], TIME + r"\[0, 4, 3\]")]),
    "time-batch-first": (BY_BATCH, of_some, [X, True], [[SOME], [ONE]], [([NONE], TIME + r"\[4, 0, 3\]")]),
    "packed": (
        {"bidirectional": True}, packed_rows, [DATA, SIZES_OF_DATA], MASKS,
        [((some(*[1] * 7, 0), ALL), PACKED + r"\[3, 2, 2, 1\]"), ((some(*[1] * 7, 0), NONE), PACKED + r"\[\]")],
    ),
}  # fmt: skip


@kit.table("case", BY_DATA)
@kit.ours_and_default
@by_data
def test_a_time_that_only_data_tells(backend, case, dynamo):
    """Or a batch, of none too, or packed rows: no operator asks for sizes while the graph is made."""
    options, call, given, masks, refused = case
    theirs, ours = kit.FORMS["cell"].pair(backend) if options is None else kit.pair(backend, 3, 4, **options)
    graph = compiled(call)

    def run(call, module, mask):
        found = call(module, *given, *mask)
        return [*found, *torch.autograd.grad(kit.loss_of(*found), list(module.parameters()))]

    for mask in masks:
        kit.assert_all_close(run(graph, ours, mask), run(call, theirs, mask))
    for mask, words in refused:
        with pytest.raises(RuntimeError, match=words):
            graph(ours, *given, *mask)


@by_data
def test_sizes_that_differ_when_the_graph_runs_are_refused_in_words(dynamo):
    """Of the operator alone: those of x and h_0 here come from two masks."""
    form = kit.Form(sizes=(3, 4))
    x, h_0, weights, *others = arguments(form.pair("reference")[1], form, training=False)
    call = compiled(lambda of_x, of_h_0: inside.layer_forward(x[:, of_x], h_0[:, of_h_0], weights, *others)[0])
    assert call(some(1, 0, 1, 0), some(0, 1, 1, 0)).shape == (3, 2, 5)
    with pytest.raises(RuntimeError, match=r"h_0 must be \[1, 2, 5\], got \[1, 1, 5\]"):
        call(some(1, 0, 1, 0), ONE)


# Where a graph breaks, Dynamo compiles each Python function that is called there, up to a limit; but none of ours.
plain = torch._dynamo.config.patch(allow_rnn=False, fail_on_recompile_limit_hit=True)
SIZES = range(3, 23)  # of the layers: more than Dynamo's limit of graphs for one function, whatever it counts


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


class InARow(Loop):
    """Operations between the layers that are graphs of their own; those between first and last are a model itself."""

    def __init__(self, layers):
        super().__init__([layers[0], Loop(layers[1:-1]), layers[-1]])

    def forward(self, x):
        first, inner, last = self.layers
        return last(torch.tanh(inner(torch.tanh(first(x * 2)[0]))))[0]


def graphs_of(dynamo, model, rows):
    """What Dynamo made of training, inference, frozen weights and inputs of several sizes, and each call's result."""
    dynamo.reset()
    graphs, results = Graphs(), []
    compiled = torch.compile(model, backend=graphs)
    for mode, shape in enumerate(rows):
        model.train(mode != 1)
        model.requires_grad_(mode != 2)
        with torch.set_grad_enabled(mode != 1):
            x = kit.randn(*shape, 3).requires_grad_(mode == 3)
            results.append(compiled(x))
        if results[-1].requires_grad:
            results[-1].sum().backward()
    return graphs, results


ROWS = ((4, 2), (5, 2), (5, 3), (3, 4), (1, 2))
KINDS = {
    "GRU": (Loop, nn.GRU, tritongru.GRU, ROWS),
    "nested": (InARow, nn.GRU, tritongru.GRU, ROWS),
    "GRUCell": (Loop, nn.GRUCell, tritongru.GRUCell, tuple((B,) for _, B in ROWS)),
}


@kit.table("kind", KINDS)
@kit.backends(None, "reference")
@plain
def test_a_model_of_many_sizes_has_the_graphs_that_it_has_with_torch_s_layers(kind, backend, dynamo):
    make, theirs, ours, rows = kind
    expected = make([theirs(size, size + 1) for size in SIZES])
    found = make([ours(size, size + 1, backend=backend) for size in SIZES])
    found.load_state_dict(expected.state_dict())
    (their_graphs, their_results), (our_graphs, our_results) = (graphs_of(dynamo, m, rows) for m in (expected, found))
    assert our_graphs == their_graphs
    for f, e in zip(our_results, their_results, strict=True):
        kit.assert_close(f, e, terms=16 * len(SIZES))


@kit.ours_and_default
@pytest.mark.parametrize("cell", [False, True], ids=["gru", "gru_cell"])
@plain
def test_the_functions_beside_a_graph_are_not_compiled(backend, cell, dynamo):
    """Nor their backward, which a compiled step of training calls."""
    layers = [(nn.GRUCell if cell else nn.GRU)(size, size + 1) for size in (3, 4, 5)]
    graphs = Graphs()

    @torch.compile(backend=graphs)
    def step(x):
        for layer in layers:
            torch._dynamo.graph_break()
            weights, h = list(layer.parameters()), x.new_zeros(*x.shape[1 - cell : -1], layer.hidden_size)
            if cell:
                x = tritongru.gru_cell(x, h, *weights, backend=backend)
            else:
                x, _ = tritongru.gru(x, h[None], weights, True, 1, 0.0, True, False, False, backend=backend)
        x.sum().backward()
        return x

    for T, B in ((2, 2), (3, 2), (2, 3)):
        step(kit.randn(B, 3) if cell else kit.randn(T, B, 3))
    assert graphs == []


def test_what_is_given_to_compile_is_still_compiled(dynamo):
    layer, cell, theirs = tritongru.GRU(3, 4), tritongru.GRUCell(3, 4), nn.GRU(3, 4)
    x, h_0, weights = kit.randn(3, 2, 3), torch.zeros(1, 2, 4), list(theirs.parameters())
    for function, *given in (
        (tritongru.gru, x, h_0, weights, True, 1, 0.0, True, False, False),
        (tritongru.gru_cell, x[0], h_0[0], *weights),
        (layer, x), (layer.forward, x), (cell, x[0], h_0[0]), (cell.forward, x[0]),
    ):  # fmt: skip
        dynamo.reset()
        call, graphs = full_graph(function)
        kit.assert_close(kit.tensors(call(*given))[0], kit.tensors(function(*given))[0])
        assert len(graphs) == 1 and (FORWARD in graphs[0]) == (given[0] is x)
    dynamo.reset()
    graphs, expected = Graphs(), layer(x)[0]
    layer.compile(backend=graphs, fullgraph=True)
    kit.assert_close(layer(x)[0], expected)
    assert len(graphs) == 1
