"""Double backward: the derivative of a layer's gradients, by autograd through the reference equations, in float32 at
least, for y and the gates are functions of x, h_0 and the weights. Under create_graph it is differentiable in turn."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import products
from .batch import Visits
from .checks import Operands, read_sizes
from .reference import gru_layer


def keep_for_second(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    """Of `tritongru::layer_backward`."""
    dy, dh_n, _, _, _, ctx.wanted, *operands = inputs
    of = Operands(*operands)
    ctx.batch_first = of.batch_first
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(of.batch_sizes, of.lengths, of.resets, dy, dh_n, of.x, of.h_0, *of.weights)


def second_gradients(ctx: Any, cotangents: Sequence[Tensor | None]) -> tuple[Any, ...]:
    """Gradients of the arguments of `tritongru::layer_backward`, from those of its results; None: zero."""
    batch_sizes, lengths, resets, *tensors = ctx.saved_tensors
    _, _, x, h_0, *_weights = tensors
    if lengths is not None:
        lengths = lengths.clamp(1, x.shape[1 if ctx.batch_first else 0])  # looked at before, and now maybe traced
    visits = Visits.of(x, read_sizes(batch_sizes, x, h_0), lengths, resets, ctx.batch_first)
    need_dy, need_dh_n, _, _, _, _, need_x, need_h_0, need_weights, *_others = ctx.needs_input_grad
    needed, further = [need_dy, need_dh_n, need_x, need_h_0, *need_weights], torch.is_grad_enabled()
    # Inputs of a graph of this call's own. For a further derivative it hangs on the tensors given.
    own: list[Any] = [
        None if t is None else t.view_as(t) if further and t.requires_grad else t.detach().requires_grad_()
        for t in tensors
    ]
    with torch.enable_grad(), products.surroundings(x, "ieee"):
        wide: list[Any] = [None if t is None else t.to(torch.promote_types(t.dtype, torch.float32)) for t in own]
        dy, dh_n, x, h_0, *weights = wide
        x = x.transpose(0, 1) if ctx.batch_first else x
        y, h_n, _ = gru_layer(x, h_0, weights, visits)
        results = y.transpose(0, 1) if ctx.batch_first else y, h_n
        of = [t for t, want in zip(own[2:], ctx.wanted, strict=True) if want]
        first = _pulled_back(results, (dy, dh_n), of, create_graph=True)
        asked = [t for t, need in zip(own, needed, strict=True) if need and t is not None]
        second = iter(_pulled_back(first, cotangents, asked, create_graph=further))
    found = [next(second) if need and t is not None else None for t, need in zip(own, needed, strict=True)]
    return *found[:2], *[None] * 4, *found[2:4], found[4:], *[None] * 7


def _pulled_back(
    outputs: Sequence[Tensor | None], cotangents: Sequence[Tensor | None], inputs: Sequence[Any], create_graph: bool
) -> Sequence[Tensor | None]:
    """torch.autograd.grad, without those of the outputs that have no cotangent; None for what depends on nothing."""
    pairs = [(o, c) for o, c in zip(outputs, cotangents, strict=True) if o is not None and c is not None]
    if not pairs or not inputs:
        return [None] * len(inputs)
    of, by = [o for o, _ in pairs], [c for _, c in pairs]
    return torch.autograd.grad(of, inputs, by, create_graph=create_graph, allow_unused=True)
