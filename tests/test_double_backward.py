"""Double backward: the derivative of the gradients, which autograd takes of PyTorch's own path on the CPU to any order,
and gradgradcheck, which takes it by differences. Helpers and tolerances: tests/kit/modules.py.
"""

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence

import tritongru
from tests.kit.modules import OURS, loss_of, ours_only, packed, pair, randn, states
from tests.kit.operators import assert_second

DOUBLE = {
    "plain": ({}, lambda m: m(m.x, m.hx)),
    "two-layers-bidirectional": ({"num_layers": 2, "bidirectional": True}, lambda m: m(m.x, m.hx)),
    "batch-first-no-bias": ({"batch_first": True, "bias": False}, lambda m: m(m.x.transpose(0, 1), m.hx)),
    "recompute": ({"recompute": True}, lambda m: m(m.x, m.hx)),
}


def differentiable(backend, recompute=False, **options):
    """A layer and everything of it that has a gradient."""
    _, layer = pair(backend, 3, 4, recompute=recompute, **options)
    layer.x, layer.hx = randn(2, 2, 3).requires_grad_(), randn(states(layer), 2, 4, seed=3).requires_grad_()
    return layer, {"input": layer.x, "h_0": layer.hx, **dict(layer.named_parameters())}


@ours_only
@pytest.mark.parametrize(("options", "call"), DOUBLE.values(), ids=DOUBLE)
def test_first_order_gradients_with_create_graph_are_right(backend, options, call):
    layer, leaves = differentiable(backend, **options)
    expected = torch.autograd.grad(loss_of(*call(layer)), list(leaves.values()))
    found = torch.autograd.grad(loss_of(*call(layer)), list(leaves.values()), create_graph=True)
    assert all(torch.equal(a, e) for a, e in zip(found, expected, strict=True))
    assert all(f.requires_grad for f in found)


def twice(backend, call, **options):
    """Second derivatives of `call(layer)`'s loss, by input, h_0 and every parameter."""
    layer, leaves = differentiable(backend, **options)
    gradients = torch.autograd.grad(loss_of(*call(layer)), list(leaves.values()), create_graph=True)
    penalty = sum((g * randn(*g.shape, seed=i)).sum() + g.square().sum() for i, g in enumerate(gradients))
    return torch.autograd.grad(penalty, list(leaves.values()))


@ours_only
@pytest.mark.parametrize(("options", "call"), DOUBLE.values(), ids=DOUBLE)
def test_double_backward(backend, options, call):
    expected = twice("aten", call, **{name: value for name, value in options.items() if name != "recompute"})
    assert_second(twice(backend, call, **options), expected)


@ours_only
@pytest.mark.parametrize("of", ["input", "h_0", "weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"])
@pytest.mark.parametrize("on", ["output", "h_n"])
def test_double_backward_of_one_gradient(backend, of, on):
    """The gradient of one leaf, differentiated by each leaf, by the cotangent, and by what made the input."""

    def second(backend):
        layer, leaves = differentiable(backend)
        upstream = torch.ones(3, requires_grad=True)
        output, h_n = layer(layer.x * upstream, layer.hx)
        result = output if on == "output" else h_n
        cotangent = randn(*result.shape, seed=8).requires_grad_()
        (gradient,) = torch.autograd.grad(result, leaves[of], cotangent, create_graph=True)
        by = [*leaves.values(), cotangent, upstream]
        return torch.autograd.grad((gradient * randn(*gradient.shape, seed=9)).sum(), by)

    assert_second(second(backend), second("aten"))


@ours_only
def test_double_backward_through_packed_input_a_cell_and_a_frozen_layer(backend):
    def second(backend):
        layer, leaves = differentiable(backend, bidirectional=True)
        sequence = packed(3, 1, 2)
        data = sequence.data.requires_grad_()
        output, h_n = layer(PackedSequence(data, *sequence[1:]))
        (gradient,) = torch.autograd.grad(loss_of(output, h_n), data, create_graph=True)
        found = list(torch.autograd.grad(gradient.square().sum(), [data, *layer.parameters()]))

        torch.manual_seed(1)
        cell = tritongru.GRUCell(3, 4, backend=backend)
        x, h = randn(2, 3).requires_grad_(), randn(2, 4, seed=4).requires_grad_()
        (gradient,) = torch.autograd.grad(cell(x, h).square().sum(), x, create_graph=True)
        found += torch.autograd.grad(gradient.square().sum(), [x, h, *cell.parameters()])

        layer.requires_grad_(False)
        (gradient,) = torch.autograd.grad(layer(leaves["input"])[0].square().sum(), leaves["input"], create_graph=True)
        gradient.square().sum().backward()
        assert all(p.grad is None for p in layer.parameters())
        return [*found, leaves["input"].grad]

    assert_second(second(backend), second("aten"))


@ours_only
def test_double_backward_with_recompute_in_chunks_of_time(backend, few_rows_at_once):
    few_rows_at_once(4)
    call = DOUBLE["plain"][1]
    assert_second(twice(backend, call, recompute=True), twice("aten", call))


@ours_only
def test_hessian_gradient_penalty_and_third_order(backend):
    def derivatives(backend):
        layer, _ = differentiable(backend)
        hessian = torch.autograd.functional.hessian(lambda x: layer(x)[0].square().sum(), layer.x.detach())
        output, _ = layer(layer.x)
        (gradient,) = torch.autograd.grad(output.sum(), layer.x, create_graph=True)
        (output.mean() + (gradient.norm() - 1).square()).backward()
        found = [hessian, layer.x.grad, *(p.grad for p in layer.parameters())]
        value = layer(layer.x)[0].square().sum()
        for _ in range(3):
            (value,) = torch.autograd.grad(value.square().sum(), layer.x, create_graph=True)
        return [*found, value.detach()]

    assert_second(derivatives(backend), derivatives("aten"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@ours_only
def test_double_backward_in_half_precision(backend, dtype):
    """Computed in float32: off by the roundings of weights, input and first gradient and of its own result."""

    def second(backend, of):
        layer, _ = differentiable(backend)
        layer.load_state_dict({name: p.to(dtype) for name, p in layer.state_dict().items()})
        layer.to(of)
        x = layer.x.detach().to(dtype).to(of).requires_grad_()
        (gradient,) = torch.autograd.grad(layer(x)[0].sum(), x, create_graph=True)
        return torch.autograd.grad((gradient * randn(*gradient.shape, seed=9).to(of)).sum(), [x, *layer.parameters()])

    for found, expected in zip(second(backend, dtype), second("aten", torch.float32), strict=True):
        assert found.dtype == dtype
        scale = max(1.0, expected.abs().max().item())
        torch.testing.assert_close(found.float(), expected, rtol=0, atol=4 * torch.finfo(dtype).eps * scale)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"bidirectional": True, "batch_first": True}, {"num_layers": 2, "bias": False}]
)
def test_gradgradcheck_in_float64(options, recompute):
    torch.manual_seed(0)
    layer = tritongru.GRU(2, 2, **options, dtype=torch.float64, backend="reference", recompute=recompute)
    x = torch.randn(2, 2, 2, dtype=torch.float64, requires_grad=True)
    h_0 = torch.randn(states(layer), 2, 2, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in layer.named_parameters()]

    def call(x, h_0, *weights):
        return torch.func.functional_call(layer, dict(zip(names, weights, strict=True)), (x, h_0))

    assert torch.autograd.gradgradcheck(call, (x, h_0, *layer.parameters()))


@pytest.mark.parametrize("backend", OURS)
def test_gradgradcheck_in_float32(backend):
    """Through the kernels, which know no float64. A central difference of width h of gradients with error u is off by
    u / h and by h^2 / 6 of a third derivative (of order 1 here): with h = 2e-2 and u = 32 eps by 2e-4 and 7e-5.
    Along random directions (fast_mode), for the interpreter is slow; element by element above."""
    torch.manual_seed(0)
    layer = tritongru.GRU(2, 3, backend=backend)
    x, h_0 = torch.randn(2, 2, 2, requires_grad=True), torch.randn(1, 2, 3, requires_grad=True)
    names = [name for name, _ in layer.named_parameters()]

    def call(x, h_0, *weights):
        return torch.func.functional_call(layer, dict(zip(names, weights, strict=True)), (x, h_0))

    cotangents = [torch.randn(2, 2, 3, requires_grad=True), torch.randn(1, 2, 3, requires_grad=True)]
    with pytest.warns(UserWarning, match="double precision"):
        assert torch.autograd.gradgradcheck(
            call, (x, h_0, *layer.parameters()), cotangents, eps=2e-2, atol=1e-3, rtol=1e-3, fast_mode=True
        )
