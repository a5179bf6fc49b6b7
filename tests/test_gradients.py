"""Autograd: cotangents, frozen leaves, graphs kept, changes in place, second derivatives, batched cotangents.

Derivatives are those of PyTorch's own path on the CPU, which autograd takes to any order. Tolerance:
tests/kit/modules.py. And the library products around the recurrence: column sums, PyTorch's precision of RNNs.
"""

from contextlib import ExitStack
from types import SimpleNamespace

import pytest
import torch
from torch.autograd.functional import hessian

from tests.kit import modules as kit
from tests.kit.operators import Seen, assert_second
from tritongru import products
from tritongru.products import column_sums, rnn_precision, surroundings

COTANGENTS = {
    "sum": lambda o, h: o.sum() + h.sum(),  # of stride 0
    "output-alone": lambda o, h: o.square().sum(),
    "h_n-alone": lambda o, h: h.mean(),
    "one-element-of-each": lambda o, h: o[1, 2] + h[-1, 1, 2],
    "transposed": lambda o, h: (o.transpose(0, -1) * kit.randn(*o.transpose(0, -1).shape)).sum() + h.T.square().sum(),
    "half-of-the-features": lambda o, h: o[..., ::2].square().sum() + h[..., 1::2].sum(),
    "negated-lazily": lambda o, h: torch.complex(o, o.square()).conj().imag.sum() + h.sum(),
    "zero": lambda o, h: 0 * o.sum() + 0 * h.sum(),
}


@pytest.mark.filterwarnings("ignore:The use of `x.T`")
@kit.table("loss", COTANGENTS)
@kit.table("form", kit.some_forms("plain", "no-bias-batch-first", "packed", "cell"))
def test_cotangents_of_every_kind(backend, form, loss):
    def call(module):
        output, *h_n = kit.tensors(module(*form.given()))
        return torch.autograd.grad(loss(output.flatten(0, -2), *(h_n or [output[None]])), list(module.parameters()))

    kit.both(*form.pair(backend), call)


def test_frozen_leaves_get_no_gradient_and_the_one_that_trains_the_right_one(backend):
    for recompute in (False, True):
        theirs, ours = kit.pair(backend, 3, 4, num_layers=2, bidirectional=True, recompute=recompute)
        names = [None, "input", "h_0", *dict(ours.named_parameters())][recompute::2]  # half of them each way

        def call(module, trained):
            x, hx = kit.randn(2, 2, 3), kit.randn(4, 2, 4, seed=3)
            leaves = {"input": x, "h_0": hx, **dict(module.named_parameters())}
            for name, leaf in leaves.items():
                leaf.requires_grad_(name == trained).grad = None
            output, h_n = module(x, hx)
            assert output.requires_grad == h_n.requires_grad == (trained is not None)
            if trained:
                kit.loss_of(output, h_n).backward()
            return [leaf.grad for leaf in leaves.values()]

        for trained in names:
            found = kit.both(theirs, ours, lambda module, trained=trained: call(module, trained))
            assert sum(g is not None for g in found) == (trained is not None)


def test_backward_twice_and_of_calls_that_interleave(backend):
    theirs, ours = kit.pair(backend, 3, 5, num_layers=2)

    def call(module):
        results, others = module(kit.randn(3, 2, 3)), module(kit.randn(2, 2, 3, seed=7))
        parameters = list(module.parameters())
        first = torch.autograd.grad(kit.loss_of(*results), parameters, retain_graph=True)
        second = torch.autograd.grad(results[1].sum(), parameters, retain_graph=True, allow_unused=True)
        third = torch.autograd.grad(kit.loss_of(*results), parameters)
        assert kit.same_bits(third, first)
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            kit.loss_of(*results).backward()
        return [*first, *second, *torch.autograd.grad(kit.loss_of(*others), parameters)]

    kit.both(theirs, ours, call)


def scale_(tensor):
    with torch.no_grad():
        tensor.mul_(3.0).add_(1.0)


IN_PLACE = {
    "h_0": lambda m, x, hx, o, h: scale_(hx),
    "input": lambda m, x, hx, o, h: scale_(x),
    "w_ih": lambda m, x, hx, o, h: scale_(m.weight_ih_l0),
    "w_hh": lambda m, x, hx, o, h: scale_(m.weight_hh_l1),
    "output-detached": lambda m, x, hx, o, h: o.detach().zero_(),
    "h_n": lambda m, x, hx, o, h: scale_(h),
}
TRACKED = {
    "output-mul_": lambda o, h: (o.mul_(2), h),
    "step-of-output-zeroed": lambda o, h: (o[0].zero_(), (o, h))[1],
    "h_n-mul_": lambda o, h: (o, h.mul_(2)),
    "h_n-added-to-output": lambda o, h: (o.add_(h[-1]), h),
}


def right_or_refused(loss, ours, expected):
    try:
        found = torch.autograd.grad(loss(), list(ours.parameters()))
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
    else:
        kit.assert_all_close(found, expected)


@pytest.mark.parametrize("recompute", [False, True], ids=["saved", "recompute"])
@kit.table("change", IN_PLACE)
def test_in_place_changes_before_backward_give_a_right_gradient_or_an_error(backend, change, recompute):
    theirs, ours = kit.pair(backend, 3, 5, num_layers=2, recompute=recompute)
    x, hx = kit.randn(3, 2, 3), kit.randn(2, 2, 5, seed=3)
    expected = torch.autograd.grad(kit.loss_of(*theirs(x, hx)), list(theirs.parameters()))
    output, h_n = ours(x, hx)
    loss = kit.loss_of(output, h_n)
    change(ours, x, hx, output, h_n)
    right_or_refused(lambda: loss, ours, expected)


@kit.table("change", TRACKED)
def test_in_place_operations_on_the_results_that_autograd_follows(backend, change):
    theirs, ours = kit.PLAIN.pair(backend)
    copies = [r.clone() for r in theirs(kit.randn(3, 2, 3))]
    expected = torch.autograd.grad(kit.loss_of(*change(*copies)), list(theirs.parameters()))
    right_or_refused(lambda: kit.loss_of(*change(*ours(kit.randn(3, 2, 3)))), ours, expected)


def leaves_of(form, module):
    x, h_0 = form.given()
    leaf, h_0 = (x.data if form.lengths else x).requires_grad_(), h_0.requires_grad_()
    return kit.tensors(form.of(module)(x, h_0)), [leaf, h_0, *module.parameters()]


def cotangents_of(results, *each):
    return [kit.randn(*each, *r.shape, seed=8 + i) for i, r in enumerate(results)]


def second(form, module):
    """Second derivatives, by input, h_0, every parameter and the cotangents; and the first."""
    results, leaves = leaves_of(form, module)
    upstream = [c.requires_grad_() for c in cotangents_of(results)]
    first = torch.autograd.grad(results, leaves, upstream, create_graph=True)
    assert all(f.requires_grad for f in first)
    penalty = sum((g * kit.randn(*g.shape, seed=i)).sum() + g.square().sum() for i, g in enumerate(first))
    return first, torch.autograd.grad(penalty, [*leaves, *upstream])


@kit.ours_by_form()
def test_double_backward(backend, form, few_rows_at_once):
    """And first derivatives with create_graph have the bits of those without."""
    few_rows_at_once(4)  # recompute in chunks of time
    theirs, ours = form.pair(backend)
    first, found = second(form, ours)
    assert_second(found, second(form, theirs)[1])
    results, leaves = leaves_of(form, ours)
    assert kit.same_bits(torch.autograd.grad(results, leaves, cotangents_of(results)), first)


@kit.ours_only
@pytest.mark.parametrize("of", range(6), ids=["input", "h_0", "w_ih", "w_hh", "b_ih", "b_hh"])
@pytest.mark.parametrize("on", [0, 1], ids=["output", "h_n"])
def test_double_backward_of_one_gradient(backend, of, on):
    def one(module):
        results, leaves = leaves_of(kit.PLAIN, module)
        cotangent = cotangents_of(results)[on].requires_grad_()
        (gradient,) = torch.autograd.grad(results[on], leaves[of], cotangent, create_graph=True)
        penalty = (gradient * kit.randn(*gradient.shape, seed=9)).sum()
        return torch.autograd.grad(penalty, [*leaves, cotangent], allow_unused=True, materialize_grads=True)

    theirs, ours = kit.PLAIN.pair(backend)
    assert_second(one(ours), one(theirs))


@kit.ours_only
def test_double_backward_of_a_frozen_layer_hessian_gradient_penalty_and_third_order(backend):
    def derivatives(layer):
        x = kit.randn(2, 2, 3).requires_grad_()
        found = [hessian(lambda x: layer(x)[0].square().sum(), x.detach())]
        output, _ = layer(x)
        (gradient,) = torch.autograd.grad(output.sum(), x, create_graph=True)
        (output.mean() + (gradient.norm() - 1).square()).backward()
        found += [x.grad.clone(), *(p.grad for p in layer.parameters())]
        layer.requires_grad_(False)
        layer.zero_grad()
        value = layer(x)[0].square().sum()
        for _ in range(3):
            (value,) = torch.autograd.grad(value.square().sum(), x, create_graph=True)
        value.square().sum().backward()
        assert all(p.grad is None for p in layer.parameters())
        return [*found, value.detach()]

    theirs, ours = kit.pair(backend, 3, 4)
    assert_second(derivatives(ours), derivatives(theirs))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@kit.ours_only
def test_double_backward_in_half_precision(backend, dtype):
    """Computed in float32: off by the roundings of weights, input and first gradient and of its own result."""
    theirs, ours = kit.pair(backend, 3, 4)
    ours.to(dtype)
    theirs.load_state_dict(ours.state_dict())
    found = []
    for layer, of in ((ours, dtype), (theirs, torch.float32)):
        x = kit.randn(2, 2, 3).to(dtype).to(of).requires_grad_()
        (gradient,) = torch.autograd.grad(layer(x)[0].sum(), x, create_graph=True)
        penalty = (gradient * kit.randn(*gradient.shape, seed=9).to(of)).sum()
        found.append(torch.autograd.grad(penalty, [x, *layer.parameters()]))
    for actual, expected in zip(*found, strict=True):
        assert actual.dtype == dtype
        scale = max(1.0, expected.abs().max().item())
        torch.testing.assert_close(actual.float(), expected, rtol=0, atol=4 * torch.finfo(dtype).eps * scale)


# vmap over backward, which maps cotangents: is_grads_batched, jacobian(vectorize=True).


def one_by_one(outputs, leaves, batched):
    """What autograd gives for each cotangent by itself, stacked."""
    how = {"retain_graph": True, "allow_unused": True}
    rows = [torch.autograd.grad(outputs, leaves, row, **how) for row in zip(*batched, strict=True)]
    return [None if parts[0] is None else torch.stack(parts) for parts in zip(*rows, strict=True)]


@kit.ours_by_form()
def test_is_grads_batched(backend, form):
    outputs, leaves = leaves_of(form, form.pair(backend)[1])
    batched = cotangents_of(outputs, 3)
    found = torch.autograd.grad(outputs, leaves, batched, is_grads_batched=True, retain_graph=True)
    kit.assert_all_close(found, one_by_one(outputs, leaves, batched))
    for output, each in zip(outputs, batched, strict=True):  # one of them alone, and one row alone
        found = torch.autograd.grad(output, leaves[:3], each[:1], is_grads_batched=True, retain_graph=True)
        kit.assert_all_close(found, one_by_one([output], leaves[:3], [each[:1]]))


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # PyTorch's own, of one vmap in the other
@kit.ours_only
@pytest.mark.parametrize("sizes", [(2, 3), (1, 2), (2, 1)], ids=str)
def test_several_levels_of_vmap(backend, sizes):
    outputs, leaves = leaves_of(kit.PLAIN, kit.PLAIN.pair(backend)[1])
    batched = cotangents_of(outputs, *sizes)
    expected = one_by_one(outputs, leaves, [c.flatten(0, 1) for c in batched])

    def backward(*rows, **options):
        return torch.autograd.grad(outputs, leaves, rows, retain_graph=True, **options)

    older = torch._vmap_internals._vmap
    for found in (
        torch.vmap(torch.vmap(backward), in_dims=1, out_dims=1)(*batched),
        torch.vmap(lambda *rows: backward(*rows, is_grads_batched=True))(*batched),
        older(older(backward))(*batched),
    ):
        kit.assert_all_close([f.flatten(0, 1) for f in found], expected)
    dy, dh_n = batched[0][0], batched[1][0]
    expected = one_by_one(outputs, leaves, [dy, dh_n[:1].expand_as(dh_n)])
    kit.assert_all_close(torch.vmap(lambda row: backward(row, dh_n[0]))(dy), expected)


@kit.ours_only
def test_batched_derivatives_of_derivatives(backend):
    def derivatives(layer):
        outputs, leaves = leaves_of(kit.PLAIN, layer)
        batched = cotangents_of(outputs, 2)
        first = torch.autograd.grad(outputs, leaves, batched, is_grads_batched=True, create_graph=True)
        of_first = torch.autograd.grad(sum(g.sin().sum() for g in first), leaves)
        return [hessian(lambda x: layer(x)[0].square().sum(), kit.randn(2, 3, 3), vectorize=True), *of_first]

    kit.both(*kit.PLAIN.pair(backend), derivatives)


@pytest.mark.parametrize("rows", [1, 2, 3, 127, 128, 129, 255, 256, 1000, 4097, 16384, 16385, 40000])
def test_column_sums(rows):
    """Of bfloat16 in float32, whose partial sums are not rounded: exact where they fit float32. And no sum has so many
    rows that PyTorch's CUDA kernel may take a buffer: from 256 values a thread on (max_values_per_thread of
    aten/src/ATen/native/cuda/Reduce.cuh)."""
    torch.manual_seed(0)
    values = torch.randint(-8, 9, (rows, 6)).to(torch.bfloat16)
    with Seen() as seen:
        found = column_sums(values, torch.float32)
    assert found.dtype == torch.float32
    assert torch.equal(found.double(), values.double().sum(0))
    lengths = [args[0].shape[args[1][0]] for name, args in seen.calls if name.startswith("aten.sum.")]
    assert lengths and max(lengths) < 256


@pytest.fixture
def switches():
    backends = torch.backends
    places = (backends, backends.cudnn, backends.cudnn.conv, backends.cudnn.rnn, backends.cuda.matmul)
    before = [place.fp32_precision for place in places]
    yield backends
    for place, value in zip(places, before, strict=True):
        place.fp32_precision = value


def test_tf32_follows_the_rnn_switch_and_not_matmul_s(switches):
    """The default on NVIDIA alone; by allow_tf32 and by the general switch as well."""
    assert rnn_precision(True) == "tf32" and rnn_precision(False) == "ieee"
    for ours in ("ieee", "tf32"):
        switches.cudnn.rnn.fp32_precision = ours
        for matmul in ("tf32", "ieee"):
            switches.cuda.matmul.fp32_precision = matmul
            assert rnn_precision(True) == ours and rnn_precision(False) == "ieee"
    for allowed, expected in ((False, "ieee"), (True, "tf32")):
        switches.cudnn.allow_tf32 = allowed
        assert rnn_precision(True) == expected
    switches.cudnn.rnn.fp32_precision = "none"
    for general in ("ieee", "tf32"):
        switches.fp32_precision = general
        assert rnn_precision(True) == general


# Stands for a tensor, of which `surroundings` reads device and dtype
ON_CUDA = SimpleNamespace(device=torch.device("cuda"), dtype=torch.float32)


@pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda'")
@pytest.mark.parametrize("precision", ["tf32", "ieee"])
@pytest.mark.parametrize("matmul", ["tf32", "ieee"])
def test_products_run_in_the_given_precision_and_restore_matmul_s(switches, precision, matmul):
    """Where it says something; and a switch that follows the general one goes on following it."""
    switches.cuda.matmul.fp32_precision = matmul
    with surroundings(ON_CUDA, precision):
        assert switches.cuda.matmul.fp32_precision == precision
    assert switches.cuda.matmul.fp32_precision == matmul
    with pytest.raises(ZeroDivisionError), surroundings(ON_CUDA, precision):
        raise ZeroDivisionError
    assert switches.cuda.matmul.fp32_precision == matmul
    for tensor in (SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16), kit.randn(2)):
        with surroundings(tensor, precision):
            assert switches.cuda.matmul.fp32_precision == matmul
    switches.cuda.matmul.fp32_precision = "none"
    for general in ("tf32", "ieee"):
        switches.fp32_precision = general
        assert switches.cuda.matmul.fp32_precision == general
        with surroundings(ON_CUDA, precision):
            pass
    with torch.autocast("cpu", torch.bfloat16), surroundings(kit.randn(2, 2), precision):
        assert (kit.randn(2, 2) @ kit.randn(2, 2)).dtype == torch.float32


@pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda'")
def test_matmuls_switch_survives_two_threads(monkeypatch):
    """The first call inside turns it, the last one turns it back, whichever order they leave in."""
    matmul, first, second = SimpleNamespace(fp32_precision="none"), ExitStack(), ExitStack()
    monkeypatch.setattr(products, "_matmul", matmul)
    for thread in (first, second):
        thread.enter_context(surroundings(ON_CUDA, "tf32"))
    first.close()
    assert matmul.fp32_precision == "tf32"
    second.close()
    assert matmul.fp32_precision == "none"
