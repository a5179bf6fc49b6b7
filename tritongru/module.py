"""`GRU` and `GRUCell`: torch's own modules, but for `forward` where another backend than PyTorch's own runs, and for
keyword-only arguments."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from . import call, registry
from .beside import eager_beside_graphs
from .call import InGraph, is_aten, requested
from .functional import cell, gru
from .layer import zeros_like


class _WithBackend(nn.Module):
    """What both have besides torch's own."""

    # On the class for an object that no __init__ of ours made: its class was set, or an older pickle had its state.
    backend: str | None = None
    recompute: bool = False

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """nn.Module's begins a call in a frame of torch's own, which Dynamo of torch 2.11 and 2.13 leaves alone, with
        what it calls beside any graph; this in one of ours."""
        call = self._call_impl
        self._compiled_call_impl = torch.compile(lambda *given, **named: call(*given, **named), *args, **kwargs)

    def extra_repr(self) -> str:
        backend = f", backend={self.backend!r}" if self.backend else ""
        return super().extra_repr() + backend + (", recompute=True" if self.recompute else "")


class GRU(_WithBackend, nn.GRU):
    """torch.nn.GRU with one fused Triton kernel for the recurrent step on the GPU: a drop-in.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device, dtype: as torch.nn.GRU.
        backend: "aten", "reference", "step" or "sequence"; None: that of `use_backend` or TRITONGRU_BACKEND, or else
            the one that `plan` names.
        recompute: keep only the output for backward, which computes the gates again: less memory, more time.

    Shapes:
        forward(input, hx=None, *, lengths=None, resets=None) -> (output, h_n), as torch.nn.GRU: input [T, B, I],
        [B, T, I] with batch_first, [T, I] unbatched, or a PackedSequence; hx [num_layers * D, B, H]; output
        [T, B, D * H]. lengths [B] and resets [T, B] ([B, T] with batch_first; unbatched without B) of a padded batch:
        see `gru`.

    Dtypes: the kernels take float32, float16 and bfloat16, the same for parameters and input, or autocast's; float64
    and other dtypes of torch.nn.GRU run PyTorch's own path.

    Raises:
        What torch.nn.GRU raises; ValueError for an unknown backend; RuntimeError at the call for a backend that cannot
        run, and for lengths or resets that do not fit (see `gru`).

    Example:
        >>> import torch, tritongru
        >>> layer = tritongru.GRU(8, 16, batch_first=True)
        >>> output, h_n = layer(torch.randn(4, 10, 8))
        >>> output.shape, h_n.shape
        (torch.Size([4, 10, 16]), torch.Size([1, 4, 16]))
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,
        device: Any = None,
        dtype: Any = None,
        backend: str | None = None,
        recompute: bool = False,
        **refused: Any,
    ) -> None:
        if backend is not None:
            registry.find(backend)
        super().__init__(
            input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional,
            device=device, dtype=dtype, **refused,  # proj_size and what nobody knows, in nn.GRU's words
        )  # fmt: skip
        self.backend = backend
        self.recompute = recompute

    @eager_beside_graphs
    def forward(
        self,
        input: Any,
        hx: Tensor | None = None,
        *defaults: None,  # ONNX export hands over by position those of keywords too
        lengths: Tensor | None = None,
        resets: Tensor | None = None,
    ) -> Any:
        if defaults and any(t is not None for t in defaults):
            raise TypeError(f"forward() takes from 2 to 3 positional arguments but {3 + len(defaults)} were given")
        padded, states = lengths is not None or resets is not None, self.num_layers * (2 if self.bidirectional else 1)
        flags = self.bias, self.num_layers, self.dropout, self.training, self.bidirectional
        plain = not padded and call.may_know(input) and input.dim() == 3 and type(self).check_forward_args is CHECK
        if plain and self._as_they_were():
            how = *flags, self.batch_first, self.recompute, True, True  # as `gru` has them
            weights: Any = self._flat_weights
            B = input.shape[0 if self.batch_first else 1]
            h_0 = zeros_like(input, (states, B, self.hidden_size), "h_0") if hx is None else hx
            _, run = call.known(self.backend, input, h_0, weights, False, *how)
            if run is not None:
                return run(input, h_0, weights)
        packed = isinstance(input, PackedSequence)
        whole: tuple[Any, ...] = input if packed else (input, None, None, None)
        x, batch_sizes, order, back = whole
        meant = requested(self.backend, x)
        wrong = not packed and (x.dim() not in (2, 3) or (hx is not None and hx.dim() != x.dim()))
        if wrong or (is_aten(meant) and not padded):
            return super().forward(input, hx)  # its own error, if wrong
        self._update_flat_weights()
        batched, at = packed or x.dim() == 3, 0 if self.batch_first else 1
        if not batched:
            x, hx = x.unsqueeze(at), None if hx is None else hx.unsqueeze(1)
            lengths = lengths.unsqueeze(0) if isinstance(lengths, Tensor) else lengths
            resets = resets.unsqueeze(at) if isinstance(resets, Tensor) else resets
        if hx is None:
            # The indices' length is known while a graph is made, what batch_sizes holds is not.
            B = x.size(at) if not packed else int(batch_sizes[0]) if order is None else len(order)
            hx = torch.zeros(states, B, self.hidden_size, dtype=x.dtype, device=x.device)
        else:
            hx = self.permute_hidden(hx, order)
        if packed and isinstance(meant, InGraph):
            self.check_input(x, batch_sizes)  # the operator looks at the rest
        else:
            self.check_forward_args(x, hx, batch_sizes)
        ours: dict[str, Any] = dict(backend=self.backend, recompute=self.recompute, lengths=lengths, resets=resets)
        if packed:
            output, h_n = gru(x, batch_sizes, hx, self._flat_weights, *flags, **ours)
            return PackedSequence(output, batch_sizes, order, back), self.permute_hidden(h_n, back)
        output, h_n = gru(x, hx, self._flat_weights, *flags, self.batch_first, **ours)
        return (output, h_n) if batched else (output.squeeze(at), h_n.squeeze(1))

    def _as_they_were(self) -> bool:
        """Whether nn.GRU's `_flat_weights` are the parameters: a look at each would find nothing new."""
        own = self._parameters
        each = zip(self._flat_weights_names, self._flat_weights, self._flat_weight_refs, strict=True)
        try:
            return all([own[name] is weight and ref is not None and ref() is weight for name, weight, ref in each])
        except (KeyError, ValueError):  # one is made of others, by a parametrization, or somebody's own
            return False


CHECK = nn.GRU.check_forward_args
CELL = "weight_ih", "weight_hh", "bias_ih", "bias_hh"  # in the order of torch.gru_cell


class GRUCell(_WithBackend, nn.GRUCell):
    """torch.nn.GRUCell; on a Triton backend the whole cell is one launch, input product included.

    Args:
        input_size, hidden_size, bias, device, dtype: as torch.nn.GRUCell.
        backend: as in `GRU`.

    Shapes:
        forward(input [B, I] or [I], hx=None) -> h [B, H] or [H]. Dtypes as `GRU`.

    Raises:
        What torch.nn.GRUCell raises; ValueError for an unknown backend; RuntimeError at the call for one that cannot
        run.

    Example:
        >>> import torch, tritongru
        >>> cell = tritongru.GRUCell(8, 16)
        >>> h = cell(torch.randn(4, 8))
        >>> cell(torch.randn(4, 8), h).shape
        torch.Size([4, 16])
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        backend: str | None = None,
    ) -> None:
        if backend is not None:
            registry.find(backend)
        super().__init__(input_size, hidden_size, bias, device=device, dtype=dtype)
        self.backend = backend

    @eager_beside_graphs
    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        if (dim := input.dim()) not in (1, 2) or (hx is not None and hx.dim() not in (1, 2)):
            return super().forward(input, hx)  # its own error
        batched = dim == 2
        if not batched:
            input = input.unsqueeze(0)
        if hx is None:
            hx = torch.zeros(input.size(0), self.hidden_size, dtype=input.dtype, device=input.device)
        elif not batched:
            hx = hx.unsqueeze(0)
        own = self._parameters  # found faster than attributes; one that is made of others is not there
        weights: list[Any] = [own[name] if name in own else getattr(self, name) for name in CELL]
        h = cell(self.backend, input, hx, *weights)
        return h if batched else h.squeeze(0)
