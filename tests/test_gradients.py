"""Autograd: cotangents, frozen leaves, graphs kept, changes in place, second derivatives, batched cotangents.

Derivatives are those of PyTorch's own path on the CPU, which autograd takes to any order. Tolerance:
tests/kit/modules.py.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.autograd.functional import hessian, jacobian

import tritongru
from tests.kit.inside import default_device_elsewhere, layer_backward, layer_forward
from tests.kit.modules import (
    OURS,
    PLAIN,
    assert_all_close,
    both,
    by_segments,
    loss_of,
    ours_by_form,
    ours_only,
    pair,
    randn,
    same_bits,
    some_forms,
    states,
    table,
    tensors,
)
from tests.kit.operators import SHAPES, arguments, assert_second, backward_arguments

COTANGENTS = {
    "sum": lambda o, h: o.sum() + h.sum(),
    "sum-of-output": lambda o, h: o.sum(),
    "sum-of-h_n": lambda o, h: h.sum(),
    "mean-of-h_n": lambda o, h: h.mean(),
    "last-step": lambda o, h: o[-1].square().sum(),
    "one-element": lambda o, h: o[1, 0, 2],
    "one-element-of-h_n": lambda o, h: h[0, 1, 2],
    "sum-over-the-batch": lambda o, h: (o.sum(1) * randn(*o.sum(1).shape)).sum(),
    "sum-over-time": lambda o, h: (o.sum(0) * randn(*o.sum(0).shape)).sum(),
    "transposed": lambda o, h: (o.permute(2, 1, 0) * randn(*o.permute(2, 1, 0).shape)).sum(),
    "half-of-the-features": lambda o, h: o[..., ::2].square().sum() + h[..., 1::2].sum(),
    "negated-lazily": lambda o, h: torch.complex(o, o.square()).conj().imag.sum() + h.sum(),
    "zero": lambda o, h: 0 * o.sum() + 0 * h.sum(),
}


@table("loss", COTANGENTS)
@pytest.mark.parametrize("batch_first", [False, True], ids=["time-first", "batch-first"])
def test_cotangents_of_every_kind(backend, loss, batch_first):
    theirs, ours = pair(backend, 3, 5, batch_first=batch_first)

    def call(module):
        x, hx = randn(3, 2, 3).requires_grad_(), randn(1, 3 if batch_first else 2, 5, seed=3).requires_grad_()
        return torch.autograd.grad(loss(*module(x, hx)), [x, hx, *module.parameters()])

    both(theirs, ours, call)


@table("form", some_forms("plain", "packed", "cell"))
@pytest.mark.parametrize("on", [(0,), (1,), (0, 1)], ids=["output", "h_n", "both"])
def test_cotangents_of_stride_0_given_by_hand_on_some_results(backend, on, form):
    def call(module):
        results = tensors(module(*form.given()))
        results = [results[min(i, len(results) - 1)] for i in on]
        cotangents = [torch.tensor(0.75).expand(r.shape) for r in results]
        return torch.autograd.grad(results, list(module.parameters()), cotangents)

    both(*form.pair(backend), call)


TRAINED = {
    "w_ih": ["weight_ih_l0"],
    "w_hh": ["weight_hh_l1"],
    "b_ih": ["bias_ih_l0"],
    "b_hh": ["bias_hh_l0"],
    "biases": ["bias_ih_l0", "bias_hh_l0", "bias_ih_l0_reverse", "bias_hh_l0_reverse"],
    "reverse": ["weight_ih_l0_reverse", "weight_hh_l0_reverse"],
    "second-layer": ["weight_ih_l1", "weight_hh_l1", "bias_ih_l1", "bias_hh_l1"],
    "input": ["input"],
    "h_0": ["h_0"],
    "input-and-b_hh": ["input", "bias_hh_l0_reverse"],
    "nothing": [],
}
FROZEN = {name: (of, False) for name, of in TRAINED.items()}
FROZEN |= {f"{name}-recompute": (TRAINED[name], True) for name in ("w_ih", "w_hh", "input")}


@table("trainable, recompute", FROZEN)
def test_frozen_weights_get_no_gradient_and_the_others_the_right_one(backend, trainable, recompute):
    theirs, ours = pair(backend, 3, 4, num_layers=2, bidirectional=True, recompute=recompute)

    def call(module):
        x, hx = randn(2, 2, 3), randn(4, 2, 4, seed=3)
        leaves = {"input": x, "h_0": hx, **dict(module.named_parameters())}
        for name, leaf in leaves.items():
            leaf.requires_grad_(name in trainable)
        output, h_n = module(x, hx)
        assert output.requires_grad == h_n.requires_grad == bool(trainable)
        if trainable:
            loss_of(output, h_n).backward()
        return [leaf.grad for leaf in leaves.values()]

    found = both(theirs, ours, call)
    assert sum(g is not None for g in found) == len(trainable)


def test_backward_twice(backend):
    """Through a retained graph, and PyTorch's error where it was not."""
    theirs, ours = pair(backend, 3, 5, num_layers=2)

    def call(module):
        results = module(randn(3, 2, 3))
        parameters = list(module.parameters())
        first = torch.autograd.grad(loss_of(*results), parameters, retain_graph=True)
        second = torch.autograd.grad(results[1].sum(), parameters, retain_graph=True, allow_unused=True)
        third = torch.autograd.grad(loss_of(*results), parameters)
        assert same_bits(third, first)
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            loss_of(*results).backward()
        return [*first, *second]

    both(theirs, ours, call)


def test_calls_may_interleave(backend):
    """Two graphs of one layer alive at once, and a gradient that gathers over both."""

    def call(module):
        first, second = module(randn(3, 2, 3)), module(randn(2, 2, 3, seed=7))
        loss_of(*first).backward()
        loss_of(*second).backward()
        return [p.grad for p in module.parameters()]

    both(*PLAIN.pair(backend), call)


def scale_(tensor):
    with torch.no_grad():
        tensor.mul_(3.0).add_(1.0)


IN_PLACE = {
    "h_0": lambda m, x, hx, o, h: scale_(hx),
    "input": lambda m, x, hx, o, h: scale_(x),
    "w_ih": lambda m, x, hx, o, h: scale_(m.weight_ih_l0),
    "w_hh": lambda m, x, hx, o, h: scale_(m.weight_hh_l1),
    "b_hh": lambda m, x, hx, o, h: scale_(m.bias_hh_l0),
    "output": lambda m, x, hx, o, h: scale_(o),
    "output-detached": lambda m, x, hx, o, h: o.detach().zero_(),
    "step-of-output": lambda m, x, hx, o, h: scale_(o[1]),
    "h_n": lambda m, x, hx, o, h: scale_(h),
    "h_n-detached": lambda m, x, hx, o, h: h.detach().zero_(),
}
TRACKED = {
    "output-mul_": lambda o, h: (o.mul_(2), h),
    "output-relu_": lambda o, h: (torch.relu_(o), h),
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
        assert_all_close(found, expected)


@pytest.mark.parametrize("recompute", [False, True], ids=["saved", "recompute"])
@table("change", IN_PLACE)
def test_in_place_changes_before_backward_give_a_right_gradient_or_an_error(backend, change, recompute):
    theirs, ours = pair(backend, 3, 5, num_layers=2, recompute=recompute)
    x, hx = randn(3, 2, 3), randn(2, 2, 5, seed=3)
    expected = torch.autograd.grad(loss_of(*theirs(x, hx)), list(theirs.parameters()))
    output, h_n = ours(x, hx)
    loss = loss_of(output, h_n)
    change(ours, x, hx, output, h_n)
    right_or_refused(lambda: loss, ours, expected)


@table("change", TRACKED)
def test_in_place_operations_on_the_results_that_autograd_follows(backend, change):
    theirs, ours = PLAIN.pair(backend)
    copies = [r.clone() for r in theirs(randn(3, 2, 3))]
    expected = torch.autograd.grad(loss_of(*change(*copies)), list(theirs.parameters()))
    right_or_refused(lambda: loss_of(*change(*ours(randn(3, 2, 3)))), ours, expected)


# Second derivatives.


def leaves_of(form, module):
    """Results of one call of a module, and all that they depend on."""
    x, h_0 = form.given()
    leaf, h_0 = (x.data if form.lengths else x).requires_grad_(), h_0.requires_grad_()
    given, how = x._replace(data=leaf) if form.lengths else leaf, form.how()
    padded_by_torch = how and type(module) is nn.GRU
    found = by_segments(module, given, h_0, *how.values()) if padded_by_torch else module(given, h_0, **how)
    return tensors(found), [leaf, h_0, *module.parameters()]


def cotangents_of(results, *each):
    return [randn(*each, *r.shape, seed=8 + i) for i, r in enumerate(results)]


def second(form, module):
    """Second derivatives, by input, h_0, every parameter and the cotangents; and the first."""
    results, leaves = leaves_of(form, module)
    upstream = [c.requires_grad_() for c in cotangents_of(results)]
    first = torch.autograd.grad(results, leaves, upstream, create_graph=True)
    assert all(f.requires_grad for f in first)
    penalty = sum((g * randn(*g.shape, seed=i)).sum() + g.square().sum() for i, g in enumerate(first))
    return first, torch.autograd.grad(penalty, [*leaves, *upstream])


@ours_by_form()
def test_double_backward(backend, form, few_rows_at_once):
    """And first derivatives with create_graph have the bits of those without; wherever new tensors go by default."""
    few_rows_at_once(4)  # recompute in chunks of time
    theirs, ours = form.pair(backend)
    first, found = second(form, ours)
    assert_second(found, second(form, theirs)[1])
    results, leaves = leaves_of(form, ours)
    assert same_bits(torch.autograd.grad(results, leaves, cotangents_of(results)), first)


@ours_only
@table("form", some_forms("recompute-batch-first-bidirectional", "packed", "cell"))
def test_double_backward_with_a_default_device_elsewhere(backend, form):
    _, ours = form.pair(backend)
    results, leaves = leaves_of(form, ours)

    def call():
        first = torch.autograd.grad(results, leaves, given, create_graph=True, retain_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves, retain_graph=True)

    given = cotangents_of(results)
    expected = call()
    with default_device_elsewhere():
        assert same_bits(call(), expected)


@ours_only
@pytest.mark.parametrize("of", range(6), ids=["input", "h_0", "w_ih", "w_hh", "b_ih", "b_hh"])
@pytest.mark.parametrize("on", [0, 1], ids=["output", "h_n"])
def test_double_backward_of_one_gradient(backend, of, on):
    """The gradient of one leaf, differentiated by each leaf and by the cotangent."""

    def one(module):
        results, leaves = leaves_of(PLAIN, module)
        cotangent = cotangents_of(results)[on].requires_grad_()
        (gradient,) = torch.autograd.grad(results[on], leaves[of], cotangent, create_graph=True)
        penalty = (gradient * randn(*gradient.shape, seed=9)).sum()
        return torch.autograd.grad(penalty, [*leaves, cotangent], allow_unused=True, materialize_grads=True)

    theirs, ours = PLAIN.pair(backend)
    assert_second(one(ours), one(theirs))


@ours_only
def test_double_backward_of_a_frozen_layer_hessian_gradient_penalty_and_third_order(backend):
    def derivatives(layer):
        x = randn(2, 2, 3).requires_grad_()
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

    theirs, ours = pair(backend, 3, 4)
    assert_second(derivatives(ours), derivatives(theirs))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@ours_only
def test_double_backward_in_half_precision(backend, dtype):
    """Computed in float32: off by the roundings of weights, input and first gradient and of its own result."""
    theirs, ours = pair(backend, 3, 4)
    ours.to(dtype)
    theirs.load_state_dict(ours.state_dict())
    found = []
    for layer, of in ((ours, dtype), (theirs, torch.float32)):
        x = randn(2, 2, 3).to(dtype).to(of).requires_grad_()
        (gradient,) = torch.autograd.grad(layer(x)[0].sum(), x, create_graph=True)
        penalty = (gradient * randn(*gradient.shape, seed=9).to(of)).sum()
        found.append(torch.autograd.grad(penalty, [x, *layer.parameters()]))
    for actual, expected in zip(*found, strict=True):
        assert actual.dtype == dtype
        scale = max(1.0, expected.abs().max().item())
        torch.testing.assert_close(actual.float(), expected, rtol=0, atol=4 * torch.finfo(dtype).eps * scale)


def checked(backend, dtype, **options):
    """A function of input, h_0 and every weight of a tiny layer, and its arguments."""
    torch.manual_seed(0)
    layer = tritongru.GRU(2, 2, **options, dtype=dtype, backend=backend)
    sizes = (2, 2, 2), (states(layer), 2, 2)
    x, h_0 = (torch.randn(*size, dtype=dtype, requires_grad=True) for size in sizes)
    names = [name for name, _ in layer.named_parameters()]

    def call(x, h_0, *weights):
        return torch.func.functional_call(layer, dict(zip(names, weights, strict=True)), (x, h_0))

    return call, (x, h_0, *layer.parameters())


CHECKED = {
    "plain": {},
    "bidirectional-batch-first": {"bidirectional": True, "batch_first": True},
    "two-layers-no-bias": {"num_layers": 2, "bias": False},
    "recompute": {"recompute": True},
}


@table("options", CHECKED)
def test_gradcheck_to_second_order_in_float64(options):
    call, given = checked("reference", torch.float64, **options)
    assert torch.autograd.gradcheck(call, given, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(call, given, check_batched_grad=True)


@pytest.mark.parametrize("backend", OURS)
def test_gradgradcheck_in_float32(backend):
    """Through the kernels, which know no float64. A central difference of width h of gradients with error u is off by
    u / h and by h^2 / 6 of a third derivative (of order 1 here): with h = 2e-2 and u = 32 eps by 2e-4 and 7e-5.
    Along random directions (fast_mode), for the interpreter is slow; element by element above."""
    call, given = checked(backend, torch.float32)
    cotangents = [torch.randn(t.shape, requires_grad=True) for t in call(*given)]
    with pytest.warns(UserWarning, match="double precision"):
        assert torch.autograd.gradgradcheck(call, given, cotangents, eps=2e-2, atol=1e-3, rtol=1e-3, fast_mode=True)


# vmap over backward, which maps cotangents: is_grads_batched, jacobian(vectorize=True), gradcheck(check_batched_grad).


def one_by_one(outputs, leaves, batched):
    """What autograd gives for each cotangent by itself, stacked."""
    rows = [
        torch.autograd.grad(outputs, leaves, row, retain_graph=True, allow_unused=True)
        for row in zip(*batched, strict=True)
    ]
    return [None if parts[0] is None else torch.stack(parts) for parts in zip(*rows, strict=True)]


@ours_by_form()
def test_is_grads_batched(backend, form):
    outputs, leaves = leaves_of(form, form.pair(backend)[1])
    batched = cotangents_of(outputs, 3)
    found = torch.autograd.grad(outputs, leaves, batched, is_grads_batched=True, retain_graph=True)
    assert_all_close(found, one_by_one(outputs, leaves, batched))
    for output, each in zip(outputs, batched, strict=True):  # one of them alone, and one row alone
        found = torch.autograd.grad(output, leaves[:3], each[:1], is_grads_batched=True, retain_graph=True)
        assert_all_close(found, one_by_one([output], leaves[:3], [each[:1]]))


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # PyTorch's own, of one vmap in the other
@ours_only
@pytest.mark.parametrize("sizes", [(2, 3), (1, 2), (2, 1), (1, 1)], ids=str)
def test_several_levels_of_vmap(backend, sizes):
    """torch.vmap of torch.vmap, of the older vmap, and the older one of itself; and of some cotangents alone."""
    outputs, leaves = leaves_of(PLAIN, PLAIN.pair(backend)[1])
    batched = cotangents_of(outputs, *sizes)
    expected = one_by_one(outputs, leaves, [c.flatten(0, 1) for c in batched])

    def backward(*rows, **options):
        return torch.autograd.grad(outputs, leaves, rows, retain_graph=True, **options)

    def batched_backward(*rows):
        return backward(*rows, is_grads_batched=True)

    older = torch._vmap_internals._vmap
    for found in (
        torch.vmap(torch.vmap(backward))(*batched),
        torch.vmap(torch.vmap(backward), in_dims=1, out_dims=1)(*batched),
        torch.vmap(batched_backward)(*batched),
        older(older(backward))(*batched),
    ):
        assert_all_close([f.flatten(0, 1) for f in found], expected)
    dy, dh_n = batched[0][0], batched[1][0]
    expected = one_by_one(outputs, leaves, [dy, dh_n[:1].expand_as(dh_n)])
    assert_all_close(torch.vmap(lambda row: backward(row, dh_n[0]))(dy), expected)


@ours_only
def test_batched_derivatives_of_derivatives(backend):
    def derivatives(layer):
        x = randn(2, 3, 3)

        def inner(x):
            return jacobian(lambda x: layer(x)[0].sum((0, 1)), x, vectorize=True, create_graph=True)

        outputs, leaves = leaves_of(PLAIN, layer)
        batched = cotangents_of(outputs, 2)
        first = torch.autograd.grad(outputs, leaves, batched, is_grads_batched=True, create_graph=True)
        return [
            jacobian(lambda x: layer(x)[0], x, vectorize=True),
            hessian(lambda x: layer(x)[0].square().sum(), x, vectorize=True),
            jacobian(inner, x, vectorize=True),
            *torch.autograd.grad(sum(g.sin().sum() for g in first), leaves),
        ]

    both(*PLAIN.pair(backend), derivatives)


@ours_only
def test_lengths_cannot_be_mapped_over(backend):
    given = arguments(backend, **SHAPES["packed"])
    given = backward_arguments(given, layer_forward(*given))
    sizes = torch.stack([given[8]] * 2)
    for vmap in (torch.vmap, torch._vmap_internals._vmap):
        with pytest.raises(RuntimeError, match="batch_sizes must be the same for all that vmap maps over"):
            vmap(lambda each: tuple(layer_backward(*given[:8], each, *given[9:])))(sizes)
