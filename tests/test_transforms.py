"""Other tracers than torch.compile: make_fx, export, ONNX, jit.trace; and derivatives of torch.func and of
forward mode, inside a graph, around one and without, which go PyTorch's own path. Tolerance: tests/kit/modules.py."""

import io
from functools import partial

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

import tritongru
from tests.kit import modules as kit
from tests.kit.operators import FORWARD, calls, compiled, runs

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")


@pytest.mark.parametrize("tracing_mode", ["real", "fake", "symbolic"])
def test_make_fx(backend, ran, tracing_mode):
    theirs, ours = kit.PLAIN.pair(backend)

    def call(x, weights):
        return torch.func.functional_call(ours, weights, (x,))

    graph = make_fx(call, tracing_mode=tracing_mode)(kit.randn(3, 2, 3), dict(ours.named_parameters()))
    assert (FORWARD in calls(graph.graph)) == (backend != "aten")
    ran.clear()
    x, weights = kit.randn(3, 2, 3, seed=9), {n: p * 0.5 for n, p in ours.named_parameters()}
    kit.assert_all_close(graph(x, weights), torch.func.functional_call(theirs, weights, (x,)))
    assert set(ran) == runs(backend)


@pytest.mark.filterwarnings("ignore")
@kit.table("form", kit.some_forms("plain", "two-layers-bidirectional", "no-bias-batch-first"))
def test_exporters_and_jit_trace_hold_aten_gru(backend, ran, form):
    theirs, ours = (m.eval() for m in form.pair(backend))
    given = form.given()
    for strict in (False, True):
        program = torch.export.export(ours, given, strict=strict)
        assert "aten.gru.input" in calls(program.graph)
        assert calls(program.graph) == calls(torch.export.export(theirs, given, strict=strict).graph)
        assert kit.same_bits(program.module()(*given), theirs(*given))
    onnx = pytest.importorskip("onnx")
    graphs = []
    for module in (ours, theirs):
        torch.onnx.export(module, given[:1], file := io.BytesIO(), dynamo=False)
        model = onnx.load_from_string(file.getvalue())
        onnx.checker.check_model(model)
        graphs.append(model.graph)
    assert graphs[0] == graphs[1] and [node.op_type for node in graphs[0].node].count("GRU") == ours.num_layers
    assert ran == []
    traced, x = torch.jit.trace(ours, given[:1]), form.given(seed=9)[0]
    assert kit.same_bits(traced(x), theirs(x)) and "aten::gru" in str(traced.inlined_graph)
    assert set(ran) <= {backend}  # by the tracer's check of its trace against a plain call


@pytest.mark.filterwarnings("ignore")
def test_onnx_export_by_dynamo(backend, ran):
    pytest.importorskip("onnxscript")
    theirs, ours = kit.PLAIN.pair(backend)
    program, expected = (torch.onnx.export(m.eval(), (kit.randn(3, 2, 3),), dynamo=True) for m in (ours, theirs))
    assert [n.op_type for n in program.model.graph] == [n.op_type for n in expected.model.graph]
    assert ran == []


def test_export_of_lengths_and_resets():
    """The equations: of how many sequences there are only values tell."""
    layer = tritongru.GRU(3, 5, bidirectional=True).eval()
    x, exported = kit.randn(4, 3, 3), kit.FORMS["padded"].how()
    program = torch.export.export(layer, (x,), exported).module()
    for how in (exported, {"lengths": torch.tensor([1, 3, 4]), "resets": ~exported["resets"]}):
        kit.assert_all_close(program(x, **how), layer(x, **how))


# Derivatives of torch.func's and forward mode: each takes a function of one tensor, where that is, and a direction.


def dual(f, x, v):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, v))).tangent


def squares(f):
    return lambda x: f(x).square().sum()


DERIVATIVES = {
    "jvp": lambda f, x, v: torch.func.jvp(f, (x,), (v,))[1],
    "jacfwd": lambda f, x, v: torch.func.jacfwd(f)(x),
    "dual-level": dual,
    "hessian": lambda f, x, v: torch.func.hessian(squares(f))(x),
    "grad": lambda f, x, v: torch.func.grad(squares(f))(x),
    "vjp": lambda f, x, v: (lambda output, pull_back: pull_back(output)[0])(*torch.func.vjp(f, x)),
    "jacrev": lambda f, x, v: torch.func.jacrev(f)(x),
    "grad-of-grad": lambda f, x, v: torch.func.grad(squares(torch.func.grad(squares(f))))(x),
}


def some_of_each(f, x, v):
    return [DERIVATIVES[name](f, x, v) for name in ("jvp", "dual-level", "grad")]


def functions(backend, form):
    """torch's function and ours of the input alone, that input and a direction; weights want no gradient, for else
    autograd would refuse what it must not take for a constant."""
    theirs, _ = form.pair(None)
    theirs.requires_grad_(False)
    of_torch, ours = (torch.gru_cell, tritongru.gru_cell) if form.cell else (torch.gru, tritongru.gru)
    (x, h_0), more = form.given(), form.how()
    sizes, weights, bi = getattr(x, "batch_sizes", None), list(theirs.parameters()), "bidirectional" in form.options

    def of(function, **how):
        if form.lengths:  # Dynamo cannot look into a PackedSequence everywhere
            return lambda t: function(t, sizes, h_0, weights, True, 1, 0.0, True, bi, **how)[0]
        call = kit.as_function(theirs, function, **how, **more)
        return lambda t: kit.tensors(call(t, h_0))[0]

    x_of = x.data if form.lengths else x
    return None if form.resets else of(of_torch), of(ours, backend=backend), x_of, kit.randn(*x_of.shape, seed=8)


BATCHES = kit.some_forms("recompute-batch-first-bidirectional", "cell")


@kit.table("derivative", DERIVATIVES)
@kit.table("form", BATCHES)
def test_every_derivative_inside_a_compiled_function_and_without(derivative, form, dynamo, ran):
    theirs, ours, x, v = functions("reference", form)
    expected = derivative(theirs, x, v)
    with dynamo.config.patch(allow_rnn=False):
        found = [compiled(lambda x, v: derivative(ours, x, v))(x, v), derivative(ours, x, v)]
    kit.assert_all_close(found, [expected] * 2)
    assert ran == []


@kit.ours_only
@kit.table("form", kit.some_forms("plain", "padded"))
def test_derivatives_of_a_module(backend, form, ran):
    (x, h_0), (theirs, ours) = form.given(), form.pair(backend)

    def found(module):
        call = form.of(module.requires_grad_(False))
        return some_of_each(lambda t: call(t, h_0)[0], x, kit.randn(*x.shape, seed=8))

    def by_weights(module):
        of = torch.func.grad(lambda weights: kit.loss_of(*torch.func.functional_call(module, weights, (x, h_0))))
        return list(of(dict(module.named_parameters())).values())

    kit.assert_all_close(found(ours), found(theirs))
    if form.resets:
        each = torch.func.grad(lambda t, lengths: ours(t, h_0, lengths=lengths)[0].square().sum())
        several = torch.stack([form.how()["lengths"], form.how()["lengths"].flip(0)])
        kit.assert_all_close(list(torch.vmap(each, in_dims=(None, 0))(x, several)), [each(x, n) for n in several])
    else:
        kit.assert_all_close(by_weights(ours), by_weights(theirs))
    assert ran == []
    form.of(ours)(x, h_0)
    assert ran == [backend]


@kit.table("form", BATCHES)
@kit.default_too
def test_a_derivative_inside_and_around_a_compiled_function(backend, form, dynamo, ran):
    """Also where a graph with our operator has been made for the same arguments before. Around one under
    fullgraph=True Dynamo refuses it, whatever the function."""
    theirs, ours, x, v = functions(backend, form)
    expected = some_of_each(theirs, x, v)
    kit.assert_all_close(compiled(lambda x, v: some_of_each(ours, x, v))(x, v), expected)
    assert ran == []
    function = torch.compile(ours, backend="aot_eager")
    kit.assert_all_close([function(x)], [theirs(x)])
    by_operator = list(ran)
    assert set(ran) == runs(backend, "aten" if form.cell else "reference")
    kit.assert_all_close(some_of_each(function, x, v), expected)
    assert ran == by_operator
    kit.assert_all_close([function(x)], [theirs(x)])


@kit.table("form", BATCHES | kit.some_forms("plain", "packed", "padded"))
@kit.ours_only
def test_vmap_inside_a_compiled_function(backend, form, dynamo, ran):
    _, ours, x, _ = functions(backend, form)
    many = torch.stack([x, 2 * x])
    expected = torch.stack([ours(each) for each in many])
    ran.clear()
    kit.assert_all_close([compiled(torch.vmap(ours))(many)], [expected])
    assert set(ran) == {backend}


def test_a_graph_made_before_says_that_it_has_no_forward_mode(dynamo):
    """make_fx's and AOTAutograd's know nothing of where they are called; a compiled function is made anew."""
    _, ours, x, v = functions("reference", kit.PLAIN)
    graph = make_fx(ours)(x)
    assert torch.equal(graph(x), ours(x))
    for form in (DERIVATIVES["jvp"], dual):
        for call in (partial(form, graph), compiled(lambda x, v, form=form: form(graph, x, v))):
            with pytest.raises(RuntimeError, match=r"layer_forward has no forward-mode derivative: make the graph"):
                call(x, v)
