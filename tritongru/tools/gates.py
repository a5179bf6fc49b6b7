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
    packed = isinstance(input, PackedSequence)
    if not packed and input.dim() == 2:
        return gates(module, input.unsqueeze(0 if module.batch_first else 1), None if hx is None else hx.unsqueeze(1))
    batch: tuple[Any, ...] = input if packed else (input, None, None, None)
    x, batch_sizes, order, back = batch
    B = int(batch_sizes[0]) if packed else x.shape[0 if module.batch_first else -2]
    D, L, H = (2 if module.bidirectional else 1), module.num_layers, module.hidden_size
    hx = x.new_zeros(L * D, B, H) if hx is None else module.permute_hidden(hx, order)
    module.check_forward_args(x, hx, batch_sizes)
    x = x.transpose(0, 1) if module.batch_first and not packed else x
    visits = Visits.of(x, batch_sizes.tolist() if packed else None)

    def padded(steps: Sequence[Tensor]) -> Tensor:
        if not packed:
            return torch.stack(list(steps))
        rows = PackedSequence(torch.cat(list(steps)), batch_sizes, None, back)
        return pad_packed_sequence(rows, padding_value=float("nan"))[0]

    found: list[list[Tensor]] = []
    with torch.no_grad():
        for layer in range(0, L * D, D):
            weights = [w for of in module.all_weights[layer : layer + D] for w in of]
            x, _, every = gru_layer(x, hx[layer : layer + D], weights, module.bias, visits, D)
            in_time = (steps[::-1] if direction else steps for direction, steps in enumerate(every))
            found += [[padded([getattr(s, name) for s in steps]) for name in Gates._fields] for steps in in_time]
    return Gates(*(torch.stack(parts).unflatten(0, (L, D)) for parts in zip(*found, strict=True)))
