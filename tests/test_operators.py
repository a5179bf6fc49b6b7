"""The operators of tritongru/ops.py, and what puts them into graphs: torch.compile, AOTAutograd, make_fx, fake tensors,
vmap. The tolerance is that of tests/kit/modules.py: a graph runs the passes that an eager call runs.
"""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck
from torch.nn.utils.rnn import PackedSequence

import tritongru
from tests.kit.fences import fences
from tests.kit.modules import (
    BACKENDS,
    OURS,
    assert_all_close,
    both,
    loss_of,
    ours_only,
    packed,
    pair,
    randn,
    states,
    trained,
)
from tests.kit.operators import BACKWARD, DEFAULT_TOO, FORWARD, SHAPES, Graphs, arguments, backward_arguments, calls
from tritongru import functional, ops, registry


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


# Operators, by themselves.

every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


QUICK = {("step", "packed"), ("sequence", "batch-first-bidirectional"), *(("reference", name) for name in SHAPES)}


def marks_of(backend, name):
    return [pytest.mark.interpreted] * (backend != "reference") + [pytest.mark.long] * ((backend, name) not in QUICK)


OPCHECKS = [
    pytest.param(backend, shape, id=f"{name}-{backend}", marks=marks_of(backend, name))
    for backend in ("reference", "step", "sequence")
    for name, shape in SHAPES.items()
]


@pytest.mark.parametrize(("backend", "shape"), OPCHECKS)
def test_opcheck(backend, shape):
    given = arguments(backend, **shape)
    opcheck(ops.layer_forward, given)
    if given[6]:
        # The derivative of layer_backward reads batch_sizes, which it cannot while it is traced: eager mode alone.
        every = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
        opcheck(
            ops.layer_backward, backward_arguments(given, ops.layer_forward(*given)),
            test_utils=every[:3] if given[3] is not None else every,
        )  # fmt: skip


@pytest.mark.interpreted
@pytest.mark.parametrize("backend", ["step", "sequence"])
def test_no_result_holds_memory_that_nobody_wrote(backend, monkeypatch):
    """Rows that do not run save no gates: the operator's q is zero there."""
    given = arguments(backend, **SHAPES["padded"])
    with fences(monkeypatch):  # fresh memory is NaN
        results = ops.layer_forward(*given)
    assert all(t.isfinite().all() for t in results)


def layouts(tensors):
    """Shape, dtype, and strides where they mean something."""
    return [(t.shape, t.dtype, [s for s, n in zip(t.stride(), t.shape, strict=True) if n > 1]) for t in tensors]


@ours_only
@every_shape
def test_fakes_have_the_layout_of_what_comes_out(backend, shape):
    given = arguments(backend, **shape)
    found = ops.layer_forward(*given)
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = ops.layer_forward(*given)
    assert layouts(fake) == layouts(found)
    if given[6]:
        given = backward_arguments(given, found)
        found = ops.layer_backward(*given)
        with FakeTensorMode(allow_non_fake_inputs=True):
            fake = ops.layer_backward(*given)
        assert layouts(fake) == layouts(found)


@ours_only
@every_shape
def test_operators_are_the_layer(backend, shape):
    """The same bits as an eager call, and the gradients that are wanted alone."""
    given = arguments(backend, **shape)
    x, h_0, weights, batch_sizes, _, batch_first, training, recompute, lengths, resets = given
    how = dict(backend=backend, recompute=recompute, lengths=lengths)
    if resets is not None:
        how["resets"] = resets.T if batch_first else resets
    D, bias = len(h_0), len(weights) == 4 * len(h_0)
    expected = (
        tritongru.gru(x, h_0, weights, bias, 1, 0.0, False, D == 2, batch_first, **how)
        if batch_sizes is None
        else tritongru.gru(x, batch_sizes, h_0, weights, bias, 1, 0.0, False, D == 2, backend=backend)
    )
    found = ops.layer_forward(*given)
    assert all(torch.equal(f, e) for f, e in zip(found, expected, strict=False))
    if training:
        backward = backward_arguments(given, found)
        leaves, cotangents = [x, h_0, *weights], backward[:2]
        gradients = torch.autograd.grad(expected, leaves, cotangents)
        assert all(torch.equal(f, e) for f, e in zip(ops.layer_backward(*backward), gradients, strict=True))
        assert all(
            torch.equal(f, e)
            for f, e in zip(torch.autograd.grad(found[:2], leaves, cotangents), gradients, strict=True)
        )
        wanted = [index % 2 == 1 for index in range(len(leaves))]
        some = ops.layer_backward(*backward[:11], wanted, *backward[12:])
        expected = [g for g, want in zip(gradients, wanted, strict=True) if want]
        assert all(torch.equal(f, e) for f, e in zip(some, expected, strict=True))


@pytest.mark.interpreted
def test_without_a_name_the_plan_decides_at_each_run(ran):
    given = arguments("", **SHAPES["dense"])
    ops.layer_forward(*given)
    device = registry.device_of(given[0].device)
    name = functional.fastest_backend(2, 3, 5, 1, "fp32", "ieee", True, device, aten=False).backend
    assert ran == [name]


def test_a_gradient_of_what_was_not_kept_is_an_error():
    given = arguments("reference", **SHAPES["dense"])
    y, *_ = ops.layer_forward(*given[:6], False, False, None, None)
    with pytest.raises(RuntimeError, match="training must be True"):
        y.sum().backward()


WRONG = {
    "x without a dimension": (0, lambda a: a[0][0], "x must have 3 dimensions without batch_sizes, got [2, 3]"),
    "x of integers": (0, lambda a: a[0].detach().to(torch.int64), "x must be of dtype torch.float32"),
    "h_0 of another batch": (1, lambda a: torch.zeros(1, 4, 5), "h_0 must have x's batch size, 2, got [1, 4, 5]"),
    "h_0 of three directions": (1, lambda a: torch.zeros(3, 2, 5), "h_0 must be [D, B, H] with 1 or 2 directions"),
    "h_0 in double": (1, lambda a: a[1].double(), "h_0 must be torch.float32 on cpu, as x is, got torch.float64"),
    "h_0 elsewhere": (1, lambda a: a[1].to("meta"), "on cpu, as x is, got torch.float32 on meta"),
    "three weights": (2, lambda a: a[2][:3], "weights must be 2 or 4 tensors for 1 direction(s), got 3"),
    "w_hh of another size": (
        2, lambda a: [a[2][0], a[2][0], *a[2][2:]], "w_hh of direction 0 must be [15, 5], got [15, 3]"
    ),
    "b_hh in half": (
        2, lambda a: [*a[2][:3], a[2][3].half()], "b_hh of direction 0 must be torch.float32 on cpu, as x is"
    ),
    "batch_sizes of a dense batch": (3, lambda a: torch.tensor([2, 2]), "x must have 2 dimensions with batch_sizes"),
    "nothing": (0, lambda a: a[0][:0], "x must have elements, got [0, 2, 3]"),
    "lengths of another batch": (
        8, lambda a: torch.ones(3, dtype=torch.int64), "lengths must be a tensor [2] of integers on cpu, got [3]"
    ),
    "lengths that are no integers": (8, lambda a: torch.ones(2), "of integers on cpu, got [2] of torch.float32 on cpu"),
    "resets of another time": (
        9, lambda a: torch.ones(2, 2, dtype=torch.bool), "resets must be a tensor [3, 2] of bool on cpu, got [2, 2]"
    ),
    "resets elsewhere": (9, lambda a: torch.ones(3, 2, dtype=torch.bool, device="meta"), "torch.bool on meta"),
}  # fmt: skip


@pytest.mark.parametrize(("at", "make", "message"), WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("mode", ["eager", "fake", "compiled"])
def test_errors_name_the_argument_in_every_mode(mode, at, make, message, dynamo):
    given = arguments("reference", **SHAPES["dense"])
    given[at] = make(given)
    call = (
        torch.compile(ops.layer_forward, backend="eager", fullgraph=True) if mode == "compiled" else ops.layer_forward
    )
    with pytest.raises(Exception) as caught:
        if mode == "fake":
            with FakeTensorMode(allow_non_fake_inputs=True):
                call(*given)
        else:
            call(*given)
    assert message in str(caught.value)
    assert mode == "compiled" or type(caught.value) is RuntimeError


def test_errors_of_backward_and_of_packed_batches():
    given = arguments("reference", **SHAPES["dense"])
    backward = backward_arguments(given, ops.layer_forward(*given))
    with pytest.raises(RuntimeError, match=r"dy must be \[3, 2, 5\], got \[2, 2, 5\]"):
        ops.layer_backward(backward[0][1:], *backward[1:])
    with pytest.raises(RuntimeError, match="wanted must have 6 entries, got 2"):
        ops.layer_backward(*backward[:11], [True, True], None, None)
    for sizes in ([2, 3, 1], [3, 2], [3, 2, 0, 1], [2, 2, 2]):
        given = arguments("reference", **SHAPES["packed"])
        given[3] = torch.tensor(sizes)
        with pytest.raises(RuntimeError, match="batch_sizes must begin with h_0's batch size, 3, never rise"):
            ops.layer_forward(*given)
    given[3] = torch.tensor([3.0, 2.0, 1.0])
    with pytest.raises(RuntimeError, match=r"batch_sizes must be \[T\], int64, on the CPU, got \[3\]"):
        ops.layer_forward(*given)


def test_backends_that_are_none_or_cannot_run(monkeypatch):
    given = arguments("cudnn", **SHAPES["dense"])
    with pytest.raises(ValueError, match="backend must be one of aten, reference, step, sequence, got 'cudnn'"):
        ops.layer_forward(*given)
    given[4] = "aten"
    with pytest.raises(ValueError, match="backend must run a layer"):
        ops.layer_forward(*given)
    monkeypatch.setattr(registry, "interpreting", lambda: False)
    if registry.has_triton():
        given[4] = "step"
        with pytest.raises(RuntimeError, match="backend 'step' cannot run here: CPU tensors need"):
            ops.layer_forward(*given)


# torch.compile.


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@DEFAULT_TOO
def test_gru_compiles_as_a_full_graph_with_no_setting(backend, dynamo, ran, compiler):
    theirs, _ = pair(None, 3, 5, num_layers=2)
    weights = list(theirs.parameters())

    @torch.compile(backend=compiler, fullgraph=True)
    def call(x, hx):
        return tritongru.gru(x, hx, weights, True, 2, 0.0, True, False, False, backend=backend)

    x, hx = randn(3, 2, 3), torch.zeros(2, 2, 5)
    with dynamo.config.patch(allow_rnn=False):
        found = call(x, hx)
    assert_all_close(found, theirs(x))
    assert_all_close(torch.autograd.grad(loss_of(*found), weights), torch.autograd.grad(loss_of(*theirs(x)), weights))
    assert ran == ([] if backend == "aten" else [backend or "reference"] * 2)


OPTIONS = {
    "plain": {},
    "two-layers-bidirectional": {"num_layers": 2, "bidirectional": True},
    "batch-first-no-bias": {"batch_first": True, "bias": False},
    "recompute": {"recompute": True},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@DEFAULT_TOO
def test_with_allow_rnn_a_module_compiles_as_a_full_graph(backend, options, dynamo, ran):
    theirs, ours = pair(backend, 3, 5, **{k: v for k, v in options.items() if k != "recompute"})
    ours.recompute = options.get("recompute", False)
    graphs = Graphs()
    compiled = torch.compile(ours, backend=graphs, fullgraph=True)
    hx = randn(states(ours), 2, 5, seed=3)
    x = randn(2, 3, 3) if ours.batch_first else randn(3, 2, 3)
    both(theirs, compiled, lambda module: trained(module, x, hx))
    assert (FORWARD in graphs[0]) == (backend != "aten")
    assert set(ran) == (set() if backend == "aten" else {backend or "reference"})


def test_without_a_setting_a_module_breaks_the_graph_and_computes_the_same(backend, dynamo):
    theirs, ours = pair(backend, 3, 5)
    head = nn.Linear(5, 2)

    @torch.compile(backend="eager")
    def call(module, x):
        output, h_n = module(x * 2)
        return head(output), h_n

    output, h_n = theirs(randn(3, 2, 3) * 2)
    with dynamo.config.patch(allow_rnn=False):
        assert_all_close(call(ours, randn(3, 2, 3)), [head(output), h_n])


@pytest.mark.parametrize("backend", [None, *OURS], ids=lambda b: b or "default")
def test_a_graph_knows_neither_time_nor_batch(backend, dynamo):
    """As many operations for T = 1000 as for 10, and after the first changes of T and of B no graph is made again."""
    _, ours = pair(backend, 2, 3)
    graphs = Graphs()
    compiled = torch.compile(ours, backend=graphs, fullgraph=True)
    for T, B in ((4, 2), (5, 2), (5, 3), (6, 4), (9, 2), (3, 7)):
        loss_of(*compiled(randn(T, B, 2))).backward()
    assert len(graphs) <= 3, graphs  # static, then a size that changes, then both
    if backend in (None, "reference"):
        compiled(randn(1000, 2, 2))
        assert len(graphs) <= 3
        dynamo.reset()
        of_long = Graphs()
        torch.compile(ours, backend=of_long, fullgraph=True)(randn(1000, 2, 2))
        assert len(of_long[0]) <= len(graphs[-1]) < 40


@pytest.mark.parametrize("backend", [None, *OURS], ids=lambda b: b or "default")
@pytest.mark.parametrize("with_hx", [True, False], ids=["h_0", "no-h_0"])
def test_packed_input_compiles_as_a_full_graph(backend, with_hx, dynamo):
    """Its lengths are read when the graph runs: other lengths, the same graph."""
    _, ours = pair(backend, 3, 5, num_layers=2, bidirectional=True)
    graphs = Graphs()
    compiled = torch.compile(ours, backend=graphs, fullgraph=True)
    some = backend in ("step", "sequence")  # the interpreter is slow
    for lengths in ((4, 3, 3), (2, 1)) if some else ((4, 3, 3), (5, 2, 1), (6, 4, 2, 1), (2, 2)):
        hx = randn(4, len(lengths), 5, seed=3) if with_hx else None
        sequence = packed(*lengths)
        assert isinstance(compiled(sequence, hx)[0], PackedSequence)
        both(ours, compiled, lambda module, s=sequence, h=hx: trained(module, s, h))
    assert len(graphs) <= 3 and all(graph.count(FORWARD) == 2 for graph in graphs)


@DEFAULT_TOO
def test_compiled_calls_that_are_not_training(backend, dynamo, ran):
    theirs, ours = pair(backend, 3, 5, num_layers=2, dropout=0.5)
    for module in (theirs, ours):
        module.eval()
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert_all_close(compiled(randn(3, 2, 3)), theirs(randn(3, 2, 3)))
    assert_all_close(compiled(randn(3, 3)), theirs(randn(3, 3)))
    if backend != "aten":  # torch 2.13 draws the same there at each call
        ours.train()
        dropped = compiled(randn(3, 2, 3))[0]
        assert not torch.equal(dropped, compiled(randn(3, 2, 3))[0])


@DEFAULT_TOO
def test_a_compiled_cell(backend, dynamo, ran):
    torch.manual_seed(0)
    theirs, ours = nn.GRUCell(3, 5), tritongru.GRUCell(3, 5, backend=backend)
    ours.load_state_dict(theirs.state_dict())
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)

    def call(cell):
        cell.zero_grad()
        h = cell(randn(2, 3), randn(2, 5, seed=3))
        h.square().sum().backward()
        return [h, *(p.grad for p in cell.parameters()), cell(randn(3))]

    both(theirs, compiled, call)
    assert set(ran) == {backend} - {None, "aten"}  # by default, on the CPU, a cell is traced as it stands


@pytest.mark.parametrize("backend", [None, *OURS], ids=lambda b: b or "default")
def test_compiled_autocast_is_eager_autocast(backend, dynamo):
    """In bfloat16 where a backend is forced, else float32 comes out, as of nn.GRU (whose products are autocast)."""
    _, ours = pair(backend, 3, 5)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)

    def call(module):
        module.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            output, h_n = module(randn(3, 2, 3))
        loss_of(output, h_n).backward()
        return [output, h_n, *(p.grad for p in ours.parameters())]

    expected, found = call(ours), call(compiled)
    assert expected[0].dtype == (torch.bfloat16 if backend else torch.float32)
    for f, e in zip(found, expected, strict=True):
        assert (f.float() - e.float()).abs().max() <= 4 * torch.finfo(torch.bfloat16).eps * max(1.0, e.abs().max())
    assert [t.dtype for t in found] == [t.dtype for t in expected]


@pytest.mark.long
@pytest.mark.parametrize("backend", [None, *OURS], ids=lambda b: b or "default")
def test_inductor(backend, dynamo):
    """The compiler that people use, around the operators, for a whole model with a loss."""
    theirs, ours = pair(backend, 3, 5, num_layers=2, batch_first=True)
    head, of_h_n = nn.Linear(5, 2), randn(2, 2, 5, seed=6)

    def model(module, x):
        output, h_n = module(torch.tanh(x))
        return head(output).square().mean() + (h_n * of_h_n).sum()

    x = randn(2, 7, 3)
    for module, run in ((theirs, model), (ours, torch.compile(model, fullgraph=True))):
        module.zero_grad()
        run(module, x).backward()
    assert_all_close([p.grad for p in ours.parameters()], [p.grad for p in theirs.parameters()])


def test_under_use_backend_and_the_environment_a_graph_is_made_for_what_is_asked(dynamo, ran, monkeypatch):
    _, ours = pair(None, 3, 5)
    with tritongru.use_backend("aten"):
        torch.compile(ours, backend="eager", fullgraph=True)(randn(3, 2, 3))
    assert ran == []
    dynamo.reset()
    monkeypatch.setenv("TRITONGRU_BACKEND", "reference")
    torch.compile(ours, backend="eager", fullgraph=True)(randn(3, 2, 3))
    assert ran == ["reference"]


def test_a_forced_backend_that_cannot_run_is_refused_in_a_graph_too(dynamo, monkeypatch):
    monkeypatch.setattr(registry, "interpreting", lambda: False)
    _, ours = pair("step", 3, 5)
    if registry.has_triton():
        with pytest.raises(Exception, match="backend 'step' cannot run here: CPU tensors need"):
            torch.compile(ours, backend="eager", fullgraph=True)(randn(3, 2, 3))


# Other tracers, and vmap.


@pytest.mark.parametrize("tracing_mode", ["real", "fake", "symbolic"])
def test_make_fx(backend, ran, tracing_mode):
    theirs, ours = pair(backend, 3, 5)

    def call(x, weights):
        return torch.func.functional_call(ours, weights, (x,))

    graph = make_fx(call, tracing_mode=tracing_mode)(randn(3, 2, 3), dict(ours.named_parameters()))
    assert (FORWARD in calls(graph.graph)) == (backend != "aten")
    ran.clear()
    x, weights = randn(3, 2, 3, seed=9), {n: p * 0.5 for n, p in ours.named_parameters()}
    assert_all_close(graph(x, weights), torch.func.functional_call(theirs, weights, (x,)))
    assert ran == ([] if backend == "aten" else [backend])


@ours_only
def test_aot_autograd(backend, ran):
    from functorch.compile import aot_function

    theirs, ours = pair(backend, 3, 5)
    weights, graphs = list(ours.parameters()), []

    def keep(graph, inputs):
        graphs.append(calls(graph.graph))
        return graph

    def call(x, hx, *weights):
        return tritongru.gru(x, hx, list(weights), True, 1, 0.0, True, False, False, backend=backend)

    found = aot_function(call, fw_compiler=keep, bw_compiler=keep)(randn(3, 2, 3), torch.zeros(1, 2, 5), *weights)
    gradients = torch.autograd.grad(loss_of(*found), weights)
    assert_all_close(gradients, torch.autograd.grad(loss_of(*theirs(randn(3, 2, 3))), list(theirs.parameters())))
    assert FORWARD in graphs[0] and BACKWARD in graphs[1]


def test_fake_tensors(backend, ran):
    with FakeTensorMode():
        output, h_n = tritongru.GRU(3, 5, 2, backend=backend)(torch.empty(3, 2, 3))
        h = tritongru.GRUCell(3, 5, backend=backend)(torch.empty(2, 3))
    assert output.shape == (3, 2, 5) and h_n.shape == (2, 2, 5) and h.shape == (2, 5)
    assert ran == []


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_of_a_cell(backend, ran):
    torch.manual_seed(0)
    theirs, ours = nn.GRUCell(3, 5), tritongru.GRUCell(3, 5, backend=backend)
    ours.load_state_dict(theirs.state_dict())
    both(theirs, ours, lambda cell: [torch.vmap(cell)(randn(4, 2, 3))])

    def ensemble(cell):
        weights = {n: torch.stack([p, p * 0.5]).detach() for n, p in cell.named_parameters()}
        x, h = randn(2, 4, 3), randn(2, 4, 5, seed=3)
        return [torch.vmap(lambda *given: torch.func.functional_call(cell, given[0], given[1:]))(weights, x, h)]

    both(theirs, ours, ensemble)
    ran.clear()

    def gradients(cell):  # a derivative of torch.func's: PyTorch's own path
        each = torch.func.grad(lambda x, h: cell(x, h).square().sum())
        return [torch.vmap(each)(randn(4, 2, 3), randn(4, 2, 5, seed=3))]

    both(theirs, ours, gradients)
    assert ran == []


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@ours_only
def test_vmap_over_the_batch(backend, options, ran):
    """What is mapped over joins the batch: one layer runs, and values and gradients are those of a loop."""
    _, ours = pair(backend, 3, 5, **{k: v for k, v in options.items() if k != "recompute"})
    ours.recompute = options.get("recompute", False)
    x, hx = randn(4, 3, 2, 3).requires_grad_(), randn(states(ours), 4, 3 if ours.batch_first else 2, 5, seed=3)
    leaves = [x, *ours.parameters()]
    found = torch.vmap(ours, in_dims=(0, 1), out_dims=(0, 1))(x, hx)
    assert len(ran) == ours.num_layers
    outputs, h_ns = zip(*(ours(x[i], hx[:, i]) for i in range(4)), strict=True)
    expected = torch.stack(outputs), torch.stack(h_ns, 1)
    assert_all_close(found, expected)
    assert_all_close(torch.autograd.grad(loss_of(*found), leaves), torch.autograd.grad(loss_of(*expected), leaves))


@ours_only
def test_vmap_over_weights_and_nested(backend):
    layers = [pair(backend, 3, 5, seed=seed)[1] for seed in range(3)]
    weights, _ = torch.func.stack_module_state(layers)

    def call(weights, x):
        return torch.func.functional_call(layers[0], weights, (x,))[0]

    x = randn(2, 4, 2, 3)
    found = torch.vmap(torch.vmap(call, in_dims=(None, 0)), in_dims=(0, None))(weights, x)
    assert_all_close(list(found.flatten(0, 1)), [layer(each)[0] for layer in layers for each in x])


@ours_only
def test_vmap_of_packed_batches(backend):
    _, ours = pair(backend, 3, 5)
    sequence = packed(3, 1, 2)
    x = torch.stack([sequence.data, 2 * sequence.data])

    def call(data):
        output, h_n = ours(PackedSequence(data, *sequence[1:]))
        return output.data, h_n

    expected = [call(each) for each in x]
    assert_all_close(torch.vmap(call)(x), [torch.stack(parts) for parts in zip(*expected, strict=True)])


def test_vmap_of_a_layer_on_pytorch_s_own_path_ends_as_nn_gru_s_does():
    """torch 2.13 has no batching rule for aten::gru: the same error then, the same values once it has one."""
    theirs, ours = pair("aten", 3, 5)
    ends = []
    for module in (theirs, ours):
        try:
            ends.append(torch.vmap(lambda x, m=module: m(x)[0])(randn(4, 3, 2, 3)))
        except RuntimeError as error:
            ends.append(str(error))
    expected, found = ends
    assert type(found) is type(expected)
    assert found == expected if isinstance(found, str) else torch.equal(found, expected)


def test_vmap_says_that_lengths_cannot_be_mapped_over():
    given = arguments("reference", **SHAPES["packed"])
    with pytest.raises(RuntimeError, match="batch_sizes must be the same for all that vmap maps over"):
        torch.vmap(lambda sizes: ops.layer_forward(*given[:3], sizes, *given[4:])[0])(torch.tensor([[3, 2, 1]] * 2))
