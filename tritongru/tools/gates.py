"""What the gates of a GRU do on an input: r, z, n, q and h of every layer, direction and step."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from ..batch import Visits
from ..reference import gru_layer


class Gates(NamedTuple):
    """Each [num_layers, D, T, B, H], in time order for both directions; NaN where a packed row has no such step."""

    r: Tensor
    z: Tensor
    n: Tensor
    q: Tensor
    h: Tensor


def time_major(module: nn.GRU, input: Any, hx: Tensor | None = None) -> tuple[Tensor, Tensor, Visits]:
    """input and hx of `module` as its first layer takes them, time-major or packed, and which rows run when. Raises
    what module.forward raises for them."""
    packed, first = isinstance(input, PackedSequence), module.batch_first
    if not packed and input.dim() not in (2, 3):
        raise ValueError(f"GRU: Expected input to be 2D or 3D, got {input.dim()}D instead")
    if not packed and input.dim() == 2:
        input, hx = input.unsqueeze(0 if first else 1), None if hx is None else hx.unsqueeze(1)
    batch: tuple[Any, ...] = input if packed else (input, None, None, None)
    x, batch_sizes, order, _ = batch
    visits = Visits.of(x, batch_sizes.tolist() if packed else None, batch_first=first)
    states = module.num_layers * (1 + module.bidirectional), visits.batch, module.hidden_size
    hx = x.new_zeros(()).expand(states) if hx is None else module.permute_hidden(hx, order)
    module.check_forward_args(x, hx, batch_sizes)
    if visits.time == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    return x if packed or not first else x.transpose(0, 1), hx, visits


def gates(module: nn.GRU, input: Any, hx: Tensor | None = None) -> Gates:
    """The gates of `module` (tritongru.GRU or torch.nn.GRU) on `input`, by the reference equations, without dropout.

    Args:
        module: the layer. Its own `forward` is not called.
        input: [T, B, I], [B, T, I] with batch_first, [T, I] unbatched (then B is 1), or a PackedSequence.
        hx: as in module.forward; None: zeros. Input and hx have the dtype of the parameters, any floating one.

    Returns:
        `Gates` (r, z, n, q, h), each [num_layers, D, T, B, H].

    Raises:
        What module.forward raises for a wrong input or hx; TypeError for a module that is no GRU.

    Example:
        >>> import torch, tritongru
        >>> found = tritongru.gates(torch.nn.GRU(3, 4), torch.randn(5, 2, 3))
        >>> found.z.shape
        torch.Size([1, 1, 5, 2, 4])
    """
    if not isinstance(module, nn.GRU):
        raise TypeError(f"module must be a torch.nn.GRU, got {type(module).__name__}")
    x, hx, visits = time_major(module, input, hx)
    D, L = 1 + module.bidirectional, module.num_layers

    def padded(steps: Sequence[Tensor]) -> Tensor:
        if not isinstance(input, PackedSequence):
            return torch.stack(list(steps))
        rows = PackedSequence(torch.cat(list(steps)), input.batch_sizes, None, input.unsorted_indices)
        return pad_packed_sequence(rows, padding_value=float("nan"))[0]

    found: list[list[Tensor]] = []
    with torch.no_grad():
        for layer in range(0, L * D, D):
            weights = [w for of in module.all_weights[layer : layer + D] for w in of]
            x, _, every = gru_layer(x, hx[layer : layer + D], weights, visits)
            in_time = (steps[::-1] if direction else steps for direction, steps in enumerate(every))
            found += [[padded([getattr(s, name) for s in steps]) for name in Gates._fields] for steps in in_time]
    return Gates(*(torch.stack(parts).unflatten(0, (L, D)) for parts in zip(*found, strict=True)))
