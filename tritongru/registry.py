"""The backends: what exists, what can run here, which one is meant. A new one is a file in launch/ and a line below."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

logger = logging.getLogger("tritongru")

DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float64: "fp64"}


@dataclass(frozen=True)
class Backend:
    """One way to run a GRU. `module` has forward and backward of one layer; None is PyTorch's own whole-call path."""

    name: str
    about: str
    module: str | None
    triton: bool = False

    def load(self) -> Any:
        """The module with `forward` and `backward`."""
        assert self.module is not None
        return _load(self.module)

    def why_not(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why it cannot run on tensors of this device and dtype; None if it can."""
        if not self.triton:
            return None
        if not has_triton():
            return "Triton is not installed (pip install 'tritongru[triton]')"
        if device.type not in ("cpu", "cuda"):
            return f"the kernels run on CUDA devices, not on {device.type}"
        if device.type == "cpu" and not interpreting():
            return "CPU tensors need Triton's interpreter: start Python with TRITON_INTERPRET=1"
        from .planning.choose import unserved

        return unserved(DTYPES.get(dtype, str(dtype)), device_of(device))


BACKENDS = {
    backend.name: backend
    for backend in (
        Backend("aten", "PyTorch's own path, what torch.nn.GRU runs", None),
        Backend("reference", "the equations step by step in PyTorch, backward written out", "tritongru.launch.reference"),
        Backend("step", "one fused Triton launch per timestep, each way", "tritongru.launch.step", triton=True),
    )
}


@dataclass(frozen=True)
class BackendStatus:
    """A line of `tritongru.backends()`: `why_not` is None where the backend can run."""

    name: str
    about: str
    device: str
    why_not: str | None


@cache
def _load(module: str) -> Any:
    return importlib.import_module(module)


@cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def interpreting() -> bool:
    """Whether Triton kernels of this process run in the interpreter: settled when Triton is first imported."""
    import triton

    return bool(triton.knobs.runtime.interpret)


@cache
def device_of(device: torch.device) -> Any:
    """The described device (planning/devices.py) behind a torch.device."""
    from .planning import devices

    if device.type == "cuda":
        return devices.of_cuda(torch.cuda.current_device() if device.index is None else device.index)
    return devices.describe("interpreter")


def backends() -> tuple[BackendStatus, ...]:
    """What exists, what can run here on float32 tensors, and why not: on CUDA where there is one, else on the CPU."""
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    return tuple(
        BackendStatus(b.name, b.about, str(device), b.why_not(device, torch.float32)) for b in BACKENDS.values()
    )


_asked_for: ContextVar[str | None] = ContextVar("tritongru_backend", default=None)


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Inside the block every tritongru layer without a backend of its own runs `name`; None lifts an outer choice.

    The environment variable TRITONGRU_BACKEND does the same for a process, and yields to this.

    Raises:
        ValueError: unknown backend.
    """
    if name is not None:
        find(name)
    token = _asked_for.set(name)
    try:
        yield
    finally:
        _asked_for.reset(token)


def find(name: str) -> Backend:
    """The backend of that name; ValueError lists the valid ones."""
    try:
        return BACKENDS[name]
    except (KeyError, TypeError):
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {name!r}") from None


def asked_for(argument: str | None) -> Backend | None:
    """The backend that argument, `use_backend` or TRITONGRU_BACKEND ask for, in this order; None: choose."""
    name = argument or _asked_for.get() or os.environ.get("TRITONGRU_BACKEND")
    return find(name) if name else None


def refuse(backend: Backend, reason: str, device: torch.device, dtype: torch.dtype) -> RuntimeError:
    """The error of a forced backend that cannot run."""
    able = [b.name for b in BACKENDS.values() if b.why_not(device, dtype) is None]
    return RuntimeError(f"backend {backend.name!r} cannot run here: {reason}; these can: {', '.join(able)}")


@cache
def log_once(level: int, message: str) -> None:
    """Log a message the first time it comes up in this process."""
    logger.log(level, message)
