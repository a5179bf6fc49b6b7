"""The backends: what exists, what can run here, which one is meant. A new one is a file in launch/ and a line below."""

import importlib
import importlib.util
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from . import ambient, status
from .beside import F
from .launch.protocol import Launcher, LayerCall
from .planning import Device, Problem, describe
from .planning.choose import fastest_backend, off_chip, unserved, with_overrides
from .planning.devices import of_cuda
from .planning.problem import Overrides, Recurrence
from .products import rnn_precision

logger = logging.getLogger("tritongru")

ON_THE_CPU = "tensors on the CPU take PyTorch's own path"
DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float64: "fp64"}


@dataclass(frozen=True, eq=False)
class Backend:
    """One way to run a GRU. `module`, a `launch.protocol.Launcher`, runs a layer; None: PyTorch's own path."""

    name: str
    about: str
    module: str | None
    triton: bool = False
    forms: tuple[tuple[str, str], ...] = ()  # fields of its tiles that ask for another kernel, and what that does
    overrides: Overrides = ()  # fields of its tiles, set for a measurement

    def load(self) -> Launcher:
        assert self.module is not None
        return cast(Launcher, importlib.import_module(self.module))

    def specimens(self, problem: Problem, device: Device) -> list[Any]:
        """What a layer's call of a Triton backend launches, by its types: a `launch.runtime.Kernel` each."""
        p, call = problem, LayerCall.of(problem, device, self.overrides)
        return self.load().specimens(call, p.input_size, p.bias, p.recompute)

    def too_large(self, x: Tensor, B: int, H: int, D: int, training: bool) -> str | None:
        """Why it cannot run a layer on x for its size; None if it can."""
        if not self.triton:
            return None
        return off_chip(_recurrence(x, B, H, D, self.overrides), training, with_overrides(self.name)[0])

    def why_not(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why it cannot run on tensors of this device and dtype; None if it can."""
        if self.module is not None and dtype not in DTYPES:
            return f"it takes {', '.join(DTYPES.values())}, not {dtype}"
        if not self.triton:
            return None
        if not has_triton():
            return "Triton is not installed (pip install 'tritongru[triton]')"
        if device.type not in ("cpu", "cuda"):
            return f"the kernels run on CUDA devices, not on {device.type}"
        if device.type == "cpu" and not interpreting():
            return "CPU tensors need the kernels emulated: start Python with TRITON_INTERPRET=1"
        return unserved(DTYPES.get(dtype, str(dtype)), device_of(device))


_EVERY = (
    Backend("aten", "PyTorch's own path, what torch.nn.GRU runs", None),
    Backend("reference", "the equations in PyTorch, backward written out", "tritongru.launch.reference"),
    Backend("step", "one fused Triton launch per timestep, each way", "tritongru.launch.step", triton=True),
    Backend(
        "sequence", "one Triton launch per sequence, W_h kept on chip", "tritongru.launch.sequence", triton=True,
        forms=(("exchange=1", "exchanging"), ("exchange=0", "one program")),
    ),
)  # fmt: skip
BACKENDS = {backend.name: backend for backend in _EVERY}
ATEN = BACKENDS["aten"]
IN_GRAPHS_ON_THE_CPU = BACKENDS["reference"]  # in place of ATEN, which would be traced as T times a dozen operations
ANY_SIZE = BACKENDS["step"]  # kernels that serve whatever kernels can


class BackendStatus(NamedTuple):
    """A line of `tritongru.backends()`: `why_not` is None where the backend can run."""

    name: str
    about: str
    device: str
    why_not: str | None


@cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def interpreting() -> bool:
    """Whether Triton kernels of this process run in the emulator: settled when Triton is first imported."""
    import triton

    return bool(triton.knobs.runtime.interpret)


def device_of(device: torch.device) -> Device:
    """The described device behind a torch.device; on the CPU kernels can only be emulated."""
    if device.type == "cuda":
        return of_cuda(torch.cuda.current_device() if device.index is None else device.index)
    return describe("interpreter")


def constant_in_graphs(function: F) -> F:
    """torch.compiler.assume_constant_result, which would import Dynamo, and so Triton, for all who import tritongru."""
    vars(function)["_dynamo_marked_constant"] = True
    return function


@constant_in_graphs  # Dynamo of torch 2.11 cannot trace the question
def _has_autocast(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type)


def autocasting(device: torch.device) -> bool:
    """Whether autocast is on for a device; there are some, meta among them, that have none."""
    return _has_autocast(device.type) and torch.is_autocast_enabled(device.type)


def computing_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype that a call on this tensor computes in: its own, or autocast's where that is on for its device."""
    if tensor.dtype != torch.float64 and autocasting(tensor.device):
        return torch.get_autocast_dtype(tensor.device.type)
    return tensor.dtype


def aten_as_measured(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether PyTorch's own path may be chosen where a kernel could run: if it is cuDNN, which was timed, and answers
    in the dtype that was asked for (under autocast to bfloat16 cuDNN's GRU answers in float16)."""
    return torch.backends.cudnn.enabled and not (dtype == torch.bfloat16 and autocasting(device))


def _recurrence(x: Tensor, B: int, H: int, D: int, overrides: Overrides = ()) -> Recurrence:
    device = device_of(x.device)
    precision = rnn_precision(device.vendor == "nvidia")
    return Recurrence(B, H, D, DTYPES[computing_dtype(x)], precision, device, overrides)


def fastest(
    x: Tensor, T: int, B: int, H: int, D: int, training: bool, aten: bool, cell: bool = False
) -> tuple[Backend, str]:
    """What the plan takes for a layer on x that kernels serve, and why; aten: whether PyTorch's own path may be it."""
    choice = fastest_backend(_recurrence(x, B, H, D), T, training, aten, cell)
    return BACKENDS[choice.backend], choice.reason


def backends() -> tuple[BackendStatus, ...]:
    """A `BackendStatus` for every backend: its name, what it is (about), the device (CUDA if there is one), and why it
    cannot run float32 there (why_not; None if it can).

    Example:
        >>> import tritongru
        >>> [backend.name for backend in tritongru.backends()]
        ['aten', 'reference', 'step', 'sequence']
    """
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    return tuple(
        BackendStatus(b.name, b.about, str(device), b.why_not(device, torch.float32)) for b in BACKENDS.values()
    )


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Inside the block every tritongru layer without its own `backend` argument runs `name`; None cancels an outer
    block's choice.

    The environment variable TRITONGRU_BACKEND does the same for the whole process; this block overrides it. The choice
    is local to a thread or task (a ContextVar). Backward runs the backend of its forward, and so does a recompute by
    torch.utils.checkpoint; a compiled graph keeps the backend chosen when it was made.

    Args:
        name: "aten", "reference", "step", "sequence" or None.

    Raises:
        ValueError: unknown backend. A backend that cannot run raises RuntimeError at the call of the layer.

    Example:
        >>> import torch, tritongru
        >>> layer = tritongru.GRU(3, 4)
        >>> with tritongru.use_backend("reference"):
        ...     output, h_n = layer(torch.randn(5, 2, 3))
    """
    if name is not None:
        find(name)
    with ambient.choose(name):
        yield


@lru_cache(maxsize=256)
def find(name: str) -> Backend:
    """The backend of that name; ValueError lists the valid ones. "sequence:block_h=8,num_warps=4" is `sequence` with
    fields of its tiles set, as planning/sequence.py names them (of `step`: planning/step.py)."""
    base, overrides = with_overrides(name) if isinstance(name, str) else ("", ())
    if base not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {name!r}")
    return replace(BACKENDS[base], name=name, overrides=overrides) if overrides else BACKENDS[base]


def asked_for(argument: str | None) -> Backend | None:
    """The backend that argument, `use_backend` or TRITONGRU_BACKEND ask for, in this order; None: choose."""
    name = argument or ambient.chosen() or os.environ.get("TRITONGRU_BACKEND")
    return find(name) if name else None


def refuse(backend: Backend, reason: str, device: torch.device, dtype: torch.dtype) -> RuntimeError:
    """The error of a forced backend that cannot run."""
    able = [b.name for b in BACKENDS.values() if b is not backend and b.why_not(device, dtype) is None]
    return RuntimeError(f"backend {backend.name!r} cannot run here: {reason}; these can: {', '.join(able)}")


@cache
def log_once(level: int, message: str) -> None:
    """Log a message the first time it comes up in this process."""
    logger.log(level, message)


def synchronize(device: Any = None) -> None:
    """torch.cuda.synchronize, which also raises if a wait inside a kernel of `sequence` ran out, or if `lengths` were
    out of range.

    Without it these errors come with a later call of a layer. TRITONGRU_WAIT_SECONDS bounds the wait (10 by default).

    Args:
        device: as torch.cuda.synchronize takes it; None: the current one. Without CUDA there is nothing to wait for.

    Raises:
        RuntimeError: on any device a wait ran out (results since then are NaN), or a length was outside 1 .. T.

    Example:
        >>> import tritongru
        >>> tritongru.synchronize()
    """
    if torch.cuda.is_available():
        torch.cuda.synchronize(device)
    status.check_all()
