"""One layer as an operator of PyTorch, tritongru::layer_forward and layer_backward: by itself, for a fake tensor, under
vmap, and as all that a torch_dispatch mode or `FlopCounterMode` sees of a layer. Tolerance: tests/kit/modules.py."""

import gc
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.utils.rnn import PackedSequence
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import tritongru
from tests.kit import inside
from tests.kit import modules as kit
from tests.kit.fences import fences
from tests.kit.inside import layer_backward, layer_forward
from tests.kit.operators import BACKWARD, FORWARD, SHAPES, Seen, arguments, backward_arguments


def of_shape(name, backend="reference"):
    form, how = SHAPES[name]
    return arguments(form.pair(backend)[1], form, **how)


SLOW = [pytest.param(name, marks=pytest.mark.long) for name in SHAPES if name not in ("packed", "padded")]


@kit.ours_only
@pytest.mark.parametrize("name", ["packed", "padded", *SLOW])
def test_opcheck(backend, name):
    given = of_shape(name, backend)
    opcheck(layer_forward, given)
    if given[6]:
        # The derivative of layer_backward reads batch_sizes, which it cannot while it is traced: eager mode alone.
        every = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
        given = backward_arguments(given, layer_forward(*given))
        opcheck(layer_backward, given, test_utils=every[:3] if given[9] is not None else every)


@pytest.mark.interpreted
@pytest.mark.parametrize("backend", ["step", "sequence"])
def test_no_result_holds_memory_that_nobody_wrote(backend, monkeypatch):
    """Rows that do not run save no gates: the operator's q is zero there."""
    given = of_shape("padded", backend)
    with fences(monkeypatch):  # fresh memory is NaN
        found = layer_forward(*given)
    assert all(t.isfinite().all() for t in found)


@kit.ours_only
@kit.table("form, how", SHAPES)
def test_operators_are_the_layer(backend, form, how):
    """The same bits as an eager call, and the gradients that are wanted alone."""
    _, layer = form.pair(backend)
    given = arguments(layer, form, **how)
    x, h_0, weights, batch_sizes, *_ = given
    of = x if batch_sizes is None else PackedSequence(x, batch_sizes)
    expected, found = kit.tensors(layer(of, h_0, **form.how())), layer_forward(*given)
    assert kit.same_bits(found[:2], expected)
    if given[6]:
        backward = backward_arguments(given, found)
        leaves, cotangents = [x, h_0, *weights], backward[:2]
        gradients = torch.autograd.grad(expected, leaves, cotangents)
        assert kit.same_bits(layer_backward(*backward), gradients)
        assert kit.same_bits(torch.autograd.grad(found[:2], leaves, cotangents), gradients)
        wanted = [index % 2 == 1 for index in range(len(leaves))]
        some = layer_backward(*backward[:5], wanted, *given)
        assert kit.same_bits(some, [g for g, want in zip(gradients, wanted, strict=True) if want])


class Pool(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.made = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {} if func is torch.ops.aten.lift_fresh.default else storages(args)  # which gets torch.tensor's own
        result = func(*args, **(kwargs or {}))
        self.made |= {at: StorageWeakRef(of) for at, of in storages(result).items() if at not in given}
        return result

    def living(self):
        gc.collect()
        return {at for at, weak in self.made.items() if not weak.expired()}


def storages(*trees):
    found = [t.untyped_storage() for t in tree_leaves(trees) if isinstance(t, torch.Tensor)]
    return {storage._cdata: storage for storage in found}


@pytest.mark.parametrize("name", ["dense", "packed", "padded"])
@kit.ours_only
def test_a_first_run_in_a_memory_pool_keeps_nothing_there(backend, name, monkeypatch):
    """torch.compile makes its first runs in the memory pool of its CUDA graphs, where nothing lives on but results."""
    forward = of_shape(name, backend)
    backward = backward_arguments(forward, layer_forward(*forward))
    inside.nothing_kept(monkeypatch)
    with torch.no_grad(), Pool() as pool:
        found = [inside.body(layer_forward)(*forward), inside.body(layer_backward)(*backward)]
    results = storages(forward, backward, found).keys()
    assert pool.living() and pool.living() <= results
    assert inside.is_anything_kept() == (name == "packed" or backend.startswith("sequence"))


def test_batch_sizes_are_not_captured_for_good(monkeypatch):
    """Inductor puts an operator into a CUDA graph whose one input on the CPU would have its first values for ever."""
    packed = of_shape("packed")
    backward = backward_arguments(packed, layer_forward(*packed))
    inside.in_a_capture(monkeypatch)
    for operator, given in ((layer_forward, packed), (layer_backward, backward)):
        with pytest.raises(RuntimeError, match="a packed batch in a compiled graph cannot be part of a CUDA graph"):
            operator(*given)
    layer_forward(*of_shape("padded"))


WRONG = {  # of arguments, what is wrong and what is said of it
    "x without a dimension": (0, lambda x: x[0], "the arguments do not fit a GRU"),
    "nothing": (0, lambda x: x[:0], "x must have elements, got [0, 2, 3]"),
    "h_0 of another batch": (1, lambda h: torch.zeros(1, 4, 5), "h_0 must be [1, 2, 5], got [1, 4, 5]"),
    "h_0 in double": (1, torch.Tensor.double, "several dtypes"),
    "w_hh of another size": (2, lambda w: [w[0], w[0], *w[2:]], "w_hh number 0 must be [15, 5], got [15, 3]"),
    "b_hh in half": (2, lambda w: [*w[:3], w[3].half()], "several dtypes"),
    "lengths of another batch": (8, lambda _: torch.ones(3, dtype=torch.int64), "lengths must be a tensor [2] of int"),
    "resets elsewhere": (9, lambda _: torch.ones(3, 2, dtype=torch.bool, device="meta"), "torch.bool on meta"),
}


@kit.table("at, make, message", WRONG)
def test_what_is_no_layer_s_is_refused_in_every_mode(at, make, message, dynamo):
    given = of_shape("dense")
    given[at] = make(given[at])
    in_a_graph = torch.compile(layer_forward, backend="eager", fullgraph=True)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    for call, around in ((layer_forward, nullcontext()), (layer_forward, fake), (in_a_graph, nullcontext())):
        with pytest.raises(Exception) as caught, around:
            call(*given)
        assert message in str(caught.value)
        assert call is in_a_graph or type(caught.value) is RuntimeError


def with_sizes(given, sizes):
    return layer_forward(*given[:3], torch.as_tensor(sizes), *given[4:])[0]


def test_errors_of_packed_batches_and_of_backends(monkeypatch):
    dense, packed = of_shape("dense"), of_shape("packed")
    in_order = "must begin with h_0's batch size, 3, never rise"
    refused = [
        ("training must be True", lambda: layer_forward(*dense[:6], False, False, None, None)[0].sum().backward()),
        ("one of aten, reference, step, sequence, got 'cudnn'", lambda: layer_forward(*dense[:4], "cudnn", *dense[5:])),
        ("backend must run a layer", lambda: layer_forward(*dense[:4], "aten", *dense[5:])),
        (r"batch_sizes must be \[T\], int64, on the CPU", lambda: with_sizes(packed, [3.0, 2.0, 1.0])),
        *((in_order, partial(with_sizes, packed, sizes)) for sizes in ([2, 3, 1], [3, 2], [3, 2, 0, 1], [2, 2, 2])),
    ]
    for message, call in refused:
        with pytest.raises((RuntimeError, ValueError), match=message):
            call()
    inside.without(monkeypatch, interpreter=True)
    with pytest.raises(RuntimeError, match="backend 'step' cannot run here: CPU tensors need"):
        layer_forward(*of_shape("dense", "step"))


def test_fake_tensors(backend, ran):
    with FakeTensorMode():
        output, h_n = tritongru.GRU(3, 5, 2, backend=backend)(torch.empty(3, 2, 3))
        h = tritongru.GRUCell(3, 5, backend=backend)(torch.empty(2, 3))
    assert output.shape == (3, 2, 5) and h_n.shape == (2, 2, 5) and h.shape == (2, 5)
    assert ran == []


@kit.ours_by_form({name: form for name, form in kit.FORMS.items() if len(form.sizes) > 1})
def test_vmap_over_the_batch(backend, form, ran):
    """What is mapped over joins the batch: one layer runs, and values and gradients are those of a loop."""
    _, ours = form.pair(backend)
    (x, hx), how = form.given(), form.how()
    many = torch.stack([x.data, 2 * x.data, -x.data]).requires_grad_()
    states_of = torch.stack([hx, -hx, hx / 2], 1).requires_grad_()

    def call(data, hx, *padding):
        of = x._replace(data=data) if form.lengths else data
        return tuple(kit.tensors(ours(of, hx, **dict(zip(how, padding, strict=True)))))

    padding = [torch.stack([t, t, t.flip(-1)]) for t in how.values()]
    found = torch.vmap(call, in_dims=(0, 1, *[0] * len(how)), out_dims=(0, 1))(many, states_of, *padding)
    assert len(ran) == ours.num_layers * (3 if form.lengths else 1)
    outputs, h_ns = zip(*(call(many[i], states_of[:, i], *(t[i] for t in padding)) for i in range(3)), strict=True)
    expected = torch.stack(outputs), torch.stack(h_ns, 1)
    kit.assert_all_close(found, expected)
    leaves = [many, states_of, *ours.parameters()]
    kit.assert_all_close(*(torch.autograd.grad(kit.loss_of(*each), leaves) for each in (found, expected)))


@kit.ours_only
@kit.table("form", kit.some_forms("plain", "padded", "cell"))
def test_vmap_over_weights_and_nested(backend, form):
    layers = [form.pair(backend)[1] for _ in range(3)]
    for index, layer in enumerate(layers):
        for p in layer.parameters():
            p.data.mul_(1 - index)
    weights, _ = torch.func.stack_module_state(layers)
    how, given = form.how(), form.given()

    def call(weights, x):
        return kit.tensors(torch.func.functional_call(layers[0], weights, (x, given[1]), how))[0]

    x = torch.stack([given[0], 2 * given[0]])
    found = torch.vmap(torch.vmap(call, in_dims=(None, 0)), in_dims=(0, None))(weights, x)
    expected = [kit.tensors(layer(t, given[1], **how))[0] for layer in layers for t in x]
    kit.assert_all_close(list(found.flatten(0, 1)), expected)


def test_vmap_over_batch_sizes():
    packed = of_shape("packed")
    backward = backward_arguments(packed, layer_forward(*packed))
    cases = [(torch.vmap, layer_forward, packed, 3), (torch.vmap, layer_backward, backward, 9)]
    for vmap, operator, given, at in (*cases, (torch._vmap_internals._vmap, layer_backward, backward, 9)):

        def call(sizes, operator=operator, given=given, at=at):
            return tuple(operator(*given[:at], sizes, *given[at + 1 :]))

        found = vmap(call)(torch.stack([given[at]] * 2))
        assert kit.same_bits(found, [torch.stack([t, t]) for t in call(given[at])])


@kit.ours_by_form()
def test_a_mode_sees_one_operator_each_way_and_nothing_inside_it(backend, form):
    """Of both passes, or of the one that it is on in; values and gradients are those without it."""
    _, layer = form.pair(backend)
    expected, n = form.results(layer), getattr(layer, "num_layers", 1)
    with Seen() as outer, Seen() as inner:
        found = form.results(layer)
    kit.assert_same(found, expected)
    with torch.autocast("cpu", torch.bfloat16), Seen():
        assert {t.dtype for t in kit.tensors(layer(*form.given(), **form.how()))} == {torch.bfloat16}
    assert outer.names == inner.names and inner.products() == [FORWARD] * n + [BACKWARD] * n

    def in_forward_alone(*given, **how):
        with Seen() as seen:
            found = layer(*given, **how)
        assert seen.products() == [FORWARD] * n
        return found

    kit.assert_same(form.results(in_forward_alone, of=layer), expected)
    out = kit.tensors(layer(*form.given(), **form.how()))
    with Seen() as seen:
        torch.autograd.grad(out, list(layer.parameters()), [torch.ones_like(t) for t in out])
    assert seen.products() == [BACKWARD] * n


def operations(form, layer, frozen=()):
    """Of forward and of backward; of torch's in a checkpoint where ours computes gates again, which is a forward."""
    x, h_0 = form.given()
    for name, leaf in {"input": x.data, "h_0": h_0, **dict(layer.named_parameters())}.items():
        leaf.requires_grad_(not name.startswith(tuple(frozen)))
    again = form.recompute and type(layer) is torch.nn.GRU
    with FlopCounterMode(display=False) as forward:
        found = checkpoint(partial(layer, x, h_0), use_reentrant=False) if again else layer(x, h_0)
    with FlopCounterMode(display=False) as backward:
        sum(t.square().sum() for t in kit.tensors(found)).backward()
    return forward.get_total_flops(), backward.get_total_flops()


COUNTED = {name: form for name, form in kit.FORMS.items() if not form.resets}
COUNTED["packed-bidirectional-two-layers"] = kit.Form({"num_layers": 2, "bidirectional": True}, lengths=(4, 1, 2))
FROZEN = ((), ["h_0"], ["input"], ["weight_ih"], ["weight_hh"], ["bias_hh"], ["weight_ih", "weight_hh"])


@kit.ours_only
@kit.table("form", COUNTED)
def test_flops_are_those_of_nn_gru(backend, form):
    theirs, ours = form.pair(backend)
    for frozen in FROZEN if form in (kit.PLAIN, kit.FORMS["packed"]) else FROZEN[:1]:
        expected = operations(form, theirs, frozen)
        assert operations(form, ours, frozen) == expected and min(expected) > 0
