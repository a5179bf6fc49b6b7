"""What would run, and why: `plan` for a module or a problem; `choose` is the pure function behind it."""

from __future__ import annotations

from typing import Any

from .choose import Plan, Problem, choose
from .devices import Device, describe

__all__ = ["Device", "Plan", "Problem", "choose", "describe", "plan"]


def plan(module_or_problem: Any, input: Any = None, device: Any = None) -> Plan:
    """What would run for a module on an input, or for a `Problem`, and why. Runs nothing, needs no GPU.

    Args:
        module_or_problem: a tritongru.GRU (or torch.nn.GRU, taken as one), or a `tritongru.planning.Problem`.
        input: for a module, the tensor or PackedSequence it would be called with; only its shape is read.
        device: a described device's name ("h200"), a `Device`, or a torch.device; None: where the module is.

    Raises:
        TypeError: neither a module nor a Problem, or a module without input. ValueError: unknown device, or a backend
        forced on the module that cannot serve the problem there.

    Example:
        >>> import torch, tritongru
        >>> found = tritongru.plan(tritongru.GRU(64, 512), torch.randn(100, 32, 64), "h200")
        >>> found.backend
        'step'
    """
    if isinstance(module_or_problem, Problem):
        if device is None:
            raise TypeError("plan of a Problem needs a device, got None")
        return choose(module_or_problem, _described(device))

    import torch
    from torch.nn.utils.rnn import PackedSequence

    from ..registry import DTYPES, asked_for

    module = module_or_problem
    if not isinstance(module, torch.nn.GRU):
        raise TypeError(f"expected a GRU module or a Problem, got {type(module).__name__}")
    if input is None:
        raise TypeError("plan of a module needs the input it would be called with, got None")
    if isinstance(input, PackedSequence):
        T, B = len(input.batch_sizes), int(input.batch_sizes[0])
    else:
        x = input if input.dim() == 3 else input.unsqueeze(0 if module.batch_first else 1)
        T, B = (x.shape[1], x.shape[0]) if module.batch_first else (x.shape[0], x.shape[1])
    weight = module.weight_hh_l0
    where = _described(weight.device if device is None else device)
    on_gpu = where.vendor in ("nvidia", "amd")
    tf32 = torch.backends.cudnn.rnn.fp32_precision == "tf32" and where.vendor == "nvidia"
    problem = Problem(
        batch=B, time=T, input_size=module.input_size, hidden_size=module.hidden_size, layers=module.num_layers,
        directions=2 if module.bidirectional else 1, dtype=DTYPES.get(weight.dtype, "fp64"),
        training=torch.is_grad_enabled() and any(p.requires_grad for p in module.parameters()),
        packed=isinstance(input, PackedSequence), bias=module.bias, recompute=getattr(module, "recompute", False),
        precision="tf32" if tf32 else "ieee",
    )  # fmt: skip
    forced = asked_for(getattr(module, "backend", None))
    name = forced.name if forced else None if on_gpu else "aten"
    return choose(problem, where, name)


def _described(device: Any) -> Device:
    if isinstance(device, Device):
        return device
    if isinstance(device, str) and not device.startswith(("cuda", "cpu")):
        return describe(device)
    import torch

    from ..registry import device_of

    found: Device = device_of(torch.device(device))
    return found
