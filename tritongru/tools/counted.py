"""What a call launches and how much memory it takes at once, counted while its own launchers run on meta tensors, which
have sizes and no memory, and launches are recorded, not made. What libraries allocate inside an operator, and how an
allocator rounds, is not in it. tests/test_launch.py holds the counts against calls that compute.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from ..call import Call
from ..launch.protocol import LayerCall
from ..layer import Layer, backward_pass, forward_pass
from ..planning.choose import TRITON_BACKENDS, Cost, Launches, Plan, choose
from ..planning.devices import Device
from ..planning.problem import Problem
from ..registry import DTYPES, find, has_triton

# PyTorch's launches by what they are: "library product" is a matrix product, "copy" what only moves data (cat, roll,
# flip, gather, cast), "padded copy" a fill and a copy
KINDS = {
    "library product": ("addmm", "mm", "addmm_", "bmm"),
    "copy": ("cat", "copy_", "roll", "flip", "index_select", "index_copy_", "clone", "_to_copy"),
    "padded copy": ("constant_pad_nd",),
    "column sum": ("sum",),
    "element-wise": ("add", "mul", "sigmoid", "tanh", "add_", "mul_", "sigmoid_", "tanh_", "addcmul_"),
    "fill": ("zeros", "fill_", "zero_", "new_zeros", "full", "ones_like"),
}  # fmt: skip
KIND_OF = {op: kind for kind, ops in KINDS.items() for op in ops}
NOTHING = ("empty", "new_empty", "empty_like", "_unsafe_view", "_local_scalar_dense")  # is launched, nor by views


def planned(problem: Problem, device: Device, backend: str | None = None, aten: bool = True) -> Plan:
    """The plan that `choose` gives for the same arguments, with its launches and bytes where there are kernels, and a
    Triton to ask."""
    plan = choose(problem, device, backend, aten)
    if plan.backend not in TRITON_BACKENDS or not has_triton():
        return plan
    launches, cost = counted(problem, device, backend or plan.backend)
    return replace(plan, launches=launches, cost=cost)


class Watch(TorchDispatchMode):
    """What runs inside: launches by kind, and storages of floating tensors while they live."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}  # by address, which a weak reference keeps taken
        self.history: list[dict[int, int]] = []  # after every operation: bytes by address of those that live

    def note(self, tensors: object, fresh: bool) -> None:
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, Tensor) and tensor.dtype.is_floating_point:
                storage = tensor.untyped_storage()
                self.storages.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes() * fresh))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.note((args, kwargs), fresh=False)  # what was not seen before was made outside
        result = func(*args, **(kwargs or {}))
        self.note(result, fresh=True)
        op, view = func.overloadpacket.__name__, func.is_view or torch.Tag.inplace_view in func.tags
        floating = not isinstance(result, Tensor) or result.dtype.is_floating_point
        # other integer arithmetic is the packed batch's index, made on the host
        if not view and op not in NOTHING and (floating or op == "fill_"):
            self.launches[KIND_OF.get(op, f"unknown: {op}")] += 1
        self.history.append(self.living())
        return result

    def living(self) -> dict[int, int]:
        return {at: size for at, (weak, size) in self.storages.items() if not weak.expired()}

    def now(self, without: Sequence[Tensor | None] = ()) -> int:
        """Bytes that live, but for those of the tensors in `without`."""
        return _bytes(self.living(), without)

    def peak(self, without: Sequence[Tensor | None] = ()) -> int:
        """The most bytes at once since the last call of it, but for those of the tensors in `without`."""
        history, self.history = self.history, []
        return max(_bytes(living, without) for living in history)


def _bytes(living: dict[int, int], without: Sequence[Tensor | None]) -> int:
    left_out = {tensor.untyped_storage()._cdata for tensor in without if tensor is not None}
    return sum(size for at, size in living.items() if at not in left_out)


@lru_cache(maxsize=1024)
@torch.inference_mode(False)
@torch.no_grad()
@_disable_current_modes()  # whatever is on where a plan is asked for
def counted(problem: Problem, device: Device, backend: str) -> tuple[Launches, Cost]:
    """Of a call that a Triton backend serves (`choose` says so). Needs Triton, no GPU."""
    from ..launch.runtime import recording

    p, D, H, found = problem, problem.directions, problem.hidden_size, find(backend)
    call = LayerCall.of(p, device, found.overrides)
    layer = Layer.of(found, call, recompute=p.recompute)
    where: dict[str, Any] = dict(dtype=next(kind for kind in DTYPES if DTYPES[kind] == p.dtype), device="meta")
    weights = list(nn.GRU(p.input_size, H, p.layers, p.bias, bidirectional=D == 2, **where).parameters())
    x = torch.empty((*((p.time * p.batch,) if p.packed else (p.time, p.batch)), p.input_size), **where)
    hx, saved = torch.empty((p.layers * D, p.batch, H), **where), list[tuple[Any, ...]]()

    def kept(x: Tensor, h_0: Tensor, flat: Sequence[Tensor], _: None) -> tuple[Tensor, Tensor]:
        """As `GRULayer` keeps it."""
        y, h_n, gates = forward_pass(layer, x, h_0, tuple(flat))
        saved.append((x, h_0, y, [gates] if gates else [], tuple(flat)))
        return y, h_n

    run = Call([kept if p.training else layer] * p.layers, D, together=p.layers > 1 and not p.training)
    with recording() as kernels, Watch() as watch:
        results = run(x, hx, weights)
        forward = kernels + watch.launches
        peak_forward, saved_bytes = watch.peak(results), watch.now(results)
        if not p.training:
            return Launches(_sorted(forward), ()), Cost(0, peak_forward, 0)
        dy: Tensor | None
        dy, dh_n = map(torch.empty_like, results)
        gradients: list[Tensor | None] = [dy, dh_n]
        while saved:
            x, h_0, y, gates, flat = saved.pop()
            wanted = bool(saved), False, *[True] * len(flat)
            dy, _, *of_weights = backward_pass(layer, x, h_0, y, gates, flat, dy, dh_n.split(D)[len(saved)], wanted)
            gradients += of_weights
        backward = kernels + watch.launches - forward
        peak_backward = watch.peak([*results, *gradients])
    return Launches(_sorted(forward), _sorted(backward)), Cost(saved_bytes, peak_forward, peak_backward)


def _sorted(counts: Counter[str]) -> tuple[tuple[str, int], ...]:
    """Kernels of ours first."""
    return tuple(sorted(counts.items(), key=lambda item: (item[0] in KINDS, item[0])))
