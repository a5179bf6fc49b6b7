"""vmap over backward, which maps cotangents: is_grads_batched, jacobian(vectorize=True), gradcheck(check_batched_grad).

As PyTorch's own path does it on the CPU, to the last detail of which tensors come out. Helpers and tolerances:
tests/kit/modules.py.
"""

import pytest
import torch
from torch.autograd.functional import hessian, jacobian
from torch.nn.utils.rnn import PackedSequence

import tritongru
from tests.kit.modules import assert_all_close, ours_only, packed, pair, randn, states

OPTIONS = {
    "plain": {},
    "two-layers-bidirectional": {"num_layers": 2, "bidirectional": True},
    "batch-first-no-bias": {"batch_first": True, "bias": False},
    "recompute": {"recompute": True},
}
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def layers(backend, recompute=False, **options):
    theirs, ours = pair(backend, 3, 5, **options)
    ours.recompute = recompute
    return theirs, ours


def called(layer):
    """Outputs and what they depend on."""
    x = randn(2, 3, 3).requires_grad_()
    h_0 = randn(states(layer), 2 if layer.batch_first else 3, 5, seed=3).requires_grad_()
    return layer(x, h_0), [x, h_0, *layer.parameters()]


def cotangents(*outputs, each=(3,)):
    return [randn(*each, *output.shape, seed=seed) for seed, output in enumerate(outputs)]


def one_by_one(outputs, leaves, batched):
    """What autograd gives for each cotangent by itself, stacked."""
    rows = [
        torch.autograd.grad(outputs, leaves, row, retain_graph=True, allow_unused=True)
        for row in zip(*batched, strict=True)
    ]
    return [None if parts[0] is None else torch.stack(parts) for parts in zip(*rows, strict=True)]


@ours_only
@every_option
def test_is_grads_batched(backend, options):
    _, ours = layers(backend, **options)
    outputs, leaves = called(ours)
    batched = cotangents(*outputs)
    found = torch.autograd.grad(outputs, leaves, batched, is_grads_batched=True, retain_graph=True)
    assert_all_close(found, one_by_one(outputs, leaves, batched))
    for output, each in zip(outputs, batched, strict=True):  # one of them alone, and one row alone
        found = torch.autograd.grad(output, leaves[:3], each[:1], is_grads_batched=True, retain_graph=True)
        assert_all_close(found, one_by_one([output], leaves[:3], [each[:1]]))


@ours_only
def test_is_grads_batched_of_packed_input_and_of_a_cell(backend):
    _, ours = layers(backend, bidirectional=True)
    sequence = packed(3, 1, 2)
    data = sequence.data.requires_grad_()
    output, h_n = ours(PackedSequence(data, *sequence[1:]))
    batched = cotangents(output.data, h_n)
    leaves = [data, *ours.parameters()]
    found = torch.autograd.grad([output.data, h_n], leaves, batched, is_grads_batched=True, retain_graph=True)
    assert_all_close(found, one_by_one([output.data, h_n], leaves, batched))

    cell = tritongru.GRUCell(3, 5, backend=backend)
    x = randn(2, 3).requires_grad_()
    h, leaves = cell(x), [x, *cell.parameters()]
    found = torch.autograd.grad(h, leaves, *cotangents(h), is_grads_batched=True, retain_graph=True)
    assert_all_close(found, one_by_one([h], leaves, cotangents(h)))


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # PyTorch's own, of one vmap in the other
@ours_only
@pytest.mark.parametrize("sizes", [(2, 3), (1, 2), (2, 1), (1, 1)], ids=str)
def test_several_levels_of_vmap(backend, sizes):
    """torch.vmap of torch.vmap, of the older vmap, and the older one of itself."""
    _, ours = layers(backend)
    outputs, leaves = called(ours)
    batched = cotangents(*outputs, each=sizes)
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


@ours_only
def test_some_cotangents_mapped_and_others_not(backend):
    _, ours = layers(backend)
    outputs, leaves = called(ours)
    dy, dh_n = cotangents(*outputs)
    expected = one_by_one(outputs, leaves, [dy, dh_n[:1].expand_as(dh_n)])
    found = torch.vmap(lambda row: torch.autograd.grad(outputs, leaves, [row, dh_n[0]], retain_graph=True))(dy)
    assert_all_close(found, expected)


@ours_only
def test_jacobian_and_hessian_vectorized(backend):
    theirs, ours = layers(backend)
    x = randn(2, 3, 3)

    def derivatives(layer):
        def inner(x):
            return jacobian(lambda x: layer(x)[0].sum((0, 1)), x, vectorize=True, create_graph=True)

        return [
            jacobian(lambda x: layer(x)[0], x, vectorize=True),
            hessian(lambda x: layer(x)[0].square().sum(), x, vectorize=True),
            jacobian(inner, x, vectorize=True),
        ]

    assert_all_close(derivatives(ours), derivatives(theirs))


@ours_only
def test_batched_gradients_are_differentiable(backend):
    found = []
    for layer in layers(backend):
        outputs, leaves = called(layer)
        first = torch.autograd.grad(outputs, leaves, cotangents(*outputs), is_grads_batched=True, create_graph=True)
        found.append([*first, *torch.autograd.grad(sum(g.sin().sum() for g in first), leaves)])
    expected, found = found
    assert_all_close(found, expected)


@every_option
def test_gradcheck_of_batched_gradients_in_float64(options):
    torch.manual_seed(0)
    layer = tritongru.GRU(2, 2, **options, dtype=torch.float64, backend="reference")
    x = torch.randn(2, 2, 2, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in layer.named_parameters()]

    def call(x, *weights):
        return torch.func.functional_call(layer, dict(zip(names, weights, strict=True)), (x,))

    assert torch.autograd.gradcheck(call, (x, *layer.parameters()), check_batched_grad=True)
    assert torch.autograd.gradgradcheck(call, (x, *layer.parameters()), check_batched_grad=True)


@pytest.mark.parametrize("backend", [None, *(p for p in ours_only.args[1])], ids=str)
def test_batched_gradients_of_a_compiled_layer(backend):
    theirs, ours = layers(backend, num_layers=2)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(allow_rnn=True):
        outputs, leaves = called(ours)
        compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
        found = torch.autograd.grad(compiled(*leaves[:2]), leaves, cotangents(*outputs), is_grads_batched=True)
    torch._dynamo.reset()
    outputs, leaves = called(theirs)
    assert_all_close(found, one_by_one(outputs, leaves, cotangents(*outputs)))


@ours_only
def test_lengths_cannot_be_mapped_over(backend):
    from tests.kit.operators import SHAPES, arguments, backward_arguments
    from tritongru import ops

    given = arguments(backend, **SHAPES["packed"])
    given = backward_arguments(given, ops.layer_forward(*given))
    sizes = torch.stack([given[8]] * 2)
    for vmap in (torch.vmap, torch._vmap_internals._vmap):
        with pytest.raises(RuntimeError, match="batch_sizes must be the same for all that vmap maps over"):
            vmap(lambda each: tuple(ops.layer_backward(*given[:8], each, *given[9:])))(sizes)
