"""Double backward: the derivative of a layer's gradients, by autograd through the reference equations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import products
from .batch import Visits
from .reference import gru_layer


def second_gradients(
    tensors: Sequence[Any], visits: Visits, batch_first: bool, wanted: Sequence[bool],
    cotangents: Sequence[Tensor | None], needed: Sequence[bool],
) -> list[Tensor | None]:  # fmt: skip
    """The derivative of a layer's gradients.

    The equations are computed again, in float32 at least, for y and the gates are functions of x, h_0 and the weights
    and so have no gradient of their own. Under create_graph the result is differentiable in turn, to any order.

    Args:
        tensors: dy, dh_n (None: zero), x, h_0 and the weights, as the layer got them.
        wanted: which of the gradients of x, h_0 and the weights the first backward gave.
        cotangents: of each of those that it gave; None: zero.
        needed: of which of `tensors` a gradient is wanted now; the others come as None.
    """
    further = torch.is_grad_enabled()
    # Inputs of a graph of this call's own. For a further derivative it hangs on the tensors given.
    own: list[Any] = [
        None if t is None else t.view_as(t) if further and t.requires_grad else t.detach().requires_grad_()
        for t in tensors
    ]
    with torch.enable_grad(), products.surroundings(tensors[2], "ieee"):
        wide: list[Any] = [None if t is None else t.to(products.at_least_float32(t.dtype)) for t in own]
        dy, dh_n, x, h_0, *weights = wide
        D = len(h_0)
        x = x.transpose(0, 1) if batch_first else x
        y, h_n, _ = gru_layer(x, h_0, weights, len(weights) == 4 * D, visits, D)
        results = y.transpose(0, 1) if batch_first else y, h_n
        of = [t for t, want in zip(own[2:], wanted, strict=True) if want]
        first = _pulled_back(results, (dy, dh_n), of, create_graph=True)
        asked = [t for t, need in zip(own, needed, strict=True) if need and t is not None]
        second = iter(_pulled_back(first, cotangents, asked, create_graph=further))
    return [next(second) if need and t is not None else None for t, need in zip(own, needed, strict=True)]


def _pulled_back(
    outputs: Sequence[Tensor | None], cotangents: Sequence[Tensor | None], inputs: Sequence[Any], create_graph: bool
) -> Sequence[Tensor | None]:
    """torch.autograd.grad, without those of the outputs that have no cotangent; None for what depends on nothing."""
    pairs = [(o, c) for o, c in zip(outputs, cotangents, strict=True) if o is not None and c is not None]
    if not pairs or not inputs:
        return [None] * len(inputs)
    of, by = [o for o, _ in pairs], [c for _, c in pairs]
    return torch.autograd.grad(of, inputs, by, create_graph=create_graph, allow_unused=True)
