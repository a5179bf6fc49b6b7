"""What the gates of a GRU do on an input: r, z, n, q and h of every layer, direction and step."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence


class Gates(NamedTuple):
    """Each [num_layers, D, T, B, H], in time order for both directions; NaN where a packed row has no such step."""

    r: Tensor
    z: Tensor
    n: Tensor
    q: Tensor
    h: Tensor


def gates(module: nn.GRU, input: Any, hx: Tensor | None = None) -> Gates:
    """The gates of `module` (tritongru.GRU or torch.nn.GRU) on `input`, by the reference equations; no dropout.

    Args:
        module: the layer. Its own `forward` is not called.
        input: [T, B, I], [B, T, I] with batch_first, [T, I] unbatched (then B is 1), or a PackedSequence.
        hx: as in module.forward; None is zeros. Any floating dtype, that of the parameters.

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
    from ..batch import Visits
    from ..reference import direction_forward

    if not isinstance(module, nn.GRU):
        raise TypeError(f"module must be a torch.nn.GRU, got {type(module).__name__}")
    packed = isinstance(input, PackedSequence)
    with torch.no_grad():
        if packed:
            x, batch_sizes, sorted_indices, unsorted_indices = input
            hx = None if hx is None else module.permute_hidden(hx, sorted_indices)
            B = int(batch_sizes[0])
        else:
            x, batch_sizes, unsorted_indices = input, None, None
            if x.dim() == 2:
                x = x.unsqueeze(0 if module.batch_first else 1)
                hx = None if hx is None else hx.unsqueeze(1)
            B = x.size(0) if module.batch_first and x.dim() == 3 else x.size(-2)
        D, L, H = (2 if module.bidirectional else 1), module.num_layers, module.hidden_size
        if hx is None:
            hx = x.new_zeros(L * D, B, H)
        module.check_forward_args(x, hx, batch_sizes)
        if not packed and module.batch_first:
            x = x.transpose(0, 1)
        visits = Visits.of(x, None if batch_sizes is None else tuple(batch_sizes.tolist()))

        def padded(rows: Tensor) -> Tensor:
            if not packed:
                return rows
            sequence = PackedSequence(rows, batch_sizes, None, unsorted_indices)
            return pad_packed_sequence(sequence, padding_value=float("nan"))[0]

        layers = []
        for layer in range(L):
            found, ys = [], []
            for direction in range(D):
                suffix = f"_l{layer}" + ("_reverse" if direction else "")
                w_ih, w_hh = (getattr(module, f"weight_{kind}{suffix}") for kind in ("ih", "hh"))
                b_ih, b_hh = (
                    (getattr(module, f"bias_{kind}{suffix}") for kind in ("ih", "hh")) if module.bias else (None, None)
                )
                x_proj = nn.functional.linear(x, w_ih, b_ih)
                y, _, steps = direction_forward(x_proj, hx[layer * D + direction], w_hh, b_hh, visits, direction)
                join = torch.cat if packed else torch.stack
                in_time = steps if direction == 0 else steps[::-1]
                found.append([padded(join([getattr(s, name) for s in in_time])) for name in Gates._fields])
                ys.append(y)
            x = torch.cat(ys, -1)
            layers.append([torch.stack(parts) for parts in zip(*found, strict=True)])
        return Gates(*(torch.stack(parts) for parts in zip(*layers, strict=True)))
