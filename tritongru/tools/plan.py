"""`tritongru.plan`: what would run for a module on an input."""

from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from ..planning import Device, Plan, Problem, choose, describe
from ..products import rnn_precision
from ..registry import DTYPES, ON_THE_CPU, asked_for, aten_as_measured, computing_dtype, device_of
from .counted import planned
from .gates import time_major


def plan(module_or_problem: Any, input: Any = None, device: Any = None) -> Plan:
    """What would run for a module on an input, or for a `Problem`, and why. Runs nothing, needs no GPU.

    Args:
        module_or_problem: a tritongru.GRU (or torch.nn.GRU, taken as one), or a `tritongru.planning.Problem`.
        input: for a module, the tensor or PackedSequence that it would be called with; only its shape is read.
        device: a described device's name ("h200"), a `Device`, or a torch.device; None: where the module is.

    Raises:
        TypeError: neither a module nor a Problem, or a module without input. ValueError: an unknown device, a device
        whose memory cannot hold the problem, or a forced backend that cannot run there. And what the module itself
        raises on the input.

    Returns:
        A `Plan`: backend and reason, candidates with their measured times, tiles, launches of each pass, saved and peak
        bytes. Print it.

    Example:
        >>> import torch, tritongru
        >>> layer = tritongru.GRU(64, 512, dtype=torch.bfloat16)
        >>> found = tritongru.plan(layer, torch.randn(100, 32, 64, dtype=torch.bfloat16), "h200")
        >>> found.backend
        'sequence'
    """
    module = module_or_problem
    if isinstance(module, Problem) and device is None:
        raise TypeError("plan of a Problem needs a device, got None")
    if isinstance(module, Problem):
        return planned(module, _described(device))
    if not isinstance(module, torch.nn.GRU):
        raise TypeError(f"expected a GRU module or a Problem, got {type(module).__name__}")
    if input is None:
        raise TypeError("plan of a module needs the input it would be called with, got None")
    _, _, visits = time_major(module, input)
    weight = cast(Tensor, module.weight_hh_l0)
    dtype, where = computing_dtype(weight), _described(weight.device if device is None else device)
    problem = Problem(
        batch=visits.batch, time=visits.time, input_size=module.input_size, hidden_size=module.hidden_size,
        layers=module.num_layers, directions=1 + module.bidirectional, dtype=DTYPES.get(dtype, str(dtype)),
        training=torch.is_grad_enabled() and any(p.requires_grad for p in module.parameters()),
        packed=isinstance(input, PackedSequence), bias=module.bias, recompute=getattr(module, "recompute", False),
        precision=rnn_precision(where.vendor == "nvidia"),
    )  # fmt: skip
    forced = asked_for(getattr(module, "backend", None))
    if forced is None and where.vendor == "interpreter":
        return replace(choose(problem, where, "aten"), device="the CPU", reason=ON_THE_CPU)
    return planned(problem, where, forced.name if forced else None, aten_as_measured(weight.device, dtype))


def _described(device: Any) -> Device:
    if isinstance(device, str) and not device.startswith(("cuda", "cpu")):
        return describe(device)
    return device if isinstance(device, Device) else device_of(torch.device(device))
