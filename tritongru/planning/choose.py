"""Choosing what runs: a pure function of the problem and a described device. Needs no GPU, no Triton, no tensors.

`choose(problem, device)` returns a `Plan`: backend, reason, tiles of each kernel, launches, bytes. `step_tiles` is the
part of it that a launcher asks for at every call.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import lru_cache

from .cost import Cost, Launches, sequence_cost, sequence_launches, step_cost, step_launches
from .devices import Device
from .limit import Limit, faster, limit_us, predicted_us
from .problem import Problem
from .sequence import Overrides, SequenceTiles, parse_overrides, sequence_tiles
from .step import StepTiles, step_tiles

KERNEL_DTYPES = ("fp32", "fp16", "bf16")  # what the Triton kernels take
TRITON_BACKENDS = ("step", "sequence")
BACKENDS = ("aten", "reference", *TRITON_BACKENDS)
MINIMUM_CAPABILITY = 80  # bfloat16 and TF32 matrix instructions, cp.async


@dataclass(frozen=True)
class StepTime:
    """Two figures of one step of a pass, never mixed (tritongru/planning/limit.py): `limit`, from the machine's
    ceilings alone, and `predicted_us`, which may be fitted to measured GRUs and is not yet. None: none are known."""

    kind: str
    limit: Limit | None
    predicted_us: float | None


@dataclass(frozen=True)
class Plan:
    """What would run, and why."""

    problem: Problem
    device: str
    backend: str
    reason: str
    tiles: tuple[tuple[str, StepTiles | SequenceTiles], ...]  # (kind, tiles) of the recurrent launches
    times: tuple[StepTime, ...]  # what a step of them takes, at the least and as expected
    launches: Launches
    cost: Cost

    def as_dict(self) -> dict[str, object]:
        """The plan as plain values, for JSON."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        p = self.problem
        shape = f"B {p.batch}, T {p.time}, I {p.input_size}, H {p.hidden_size}"
        lines = [
            f"backend   {self.backend} on {self.device}: {self.reason}",
            f"problem   {shape}, {p.layers} layer(s), {p.directions} direction(s), {p.dtype}"
            f"{' (' + p.precision + ' products)' if p.dtype == 'fp32' else ''}, "
            f"{'training' if p.training else 'inference'}{', packed' if p.packed else ''}",
        ]
        lines += [f"tiles     {kind}: {_in_words(t)}" for kind, t in self.tiles]
        for label, counts in (("forward", self.launches.forward), ("backward", self.launches.backward)):
            if counts:
                lines.append(f"{label:<9} " + ", ".join(f"{n} x {name}" for name, n in counts))
        if self.backend in TRITON_BACKENDS:
            lines += self._memory()
            lines.append(
                f"step      {self.cost.step_bytes / 1e6:.2f} MB read by the programs of one forward step, "
                f"{self.cost.step_flops / 1e6:.1f} Mflop in it (computed, not measured)"
            )
            for time in self.times:
                if time.limit is not None and time.predicted_us is not None:
                    lines.append(
                        f"time      {time.kind}: limit {time.limit.us:.2f} us per step ({time.limit.binding}), by "
                        f"public figures of the device; predicted {time.predicted_us:.2f} us, an estimate: no GRU timed"
                    )
        return "\n".join(lines)

    def _memory(self) -> list[str]:
        saved, forward, backward = (
            f"{count / 2**20:.1f} MiB"
            for count in (self.cost.saved_bytes, self.cost.peak_forward_bytes, self.cost.peak_backward_bytes)
        )
        if not self.problem.training:
            return [f"peak      {forward} at once beyond input, output and weights"]
        return [
            f"saved     {saved} for backward beyond input, output and weights; nn.GRU keeps cuDNN's reserve, "
            "whose size only a GPU can tell (python -m benchmarks)",
            f"peak      {forward} at once in forward, {backward} in backward, what is saved included, beyond input, "
            "output, weights and their gradients",
        ]


def _in_words(tiles: StepTiles | SequenceTiles) -> str:
    if isinstance(tiles, StepTiles):
        t = tiles
        return f"{t.block_b} rows x {t.block_h} units, K by {t.block_k}, {t.num_warps} warps, {t.num_stages} stages"
    s = tiles
    each = f"{s.block_b} rows x {s.block_h} units a program, {s.num_warps} warps"
    both = " of both directions" if s.directions == 2 else ""
    if not s.exchange:
        return f"{each}, {s.groups * s.directions} programs{both} with all of W_h each, nothing exchanged"
    shared = f", {s.shared_gates} of 3 gates' weights in shared memory" if s.shared_gates else ""
    return (
        f"{each}, K {s.num_k} x {s.block_k}{shared}; {s.groups * s.directions} group(s){both} of {s.programs} "
        f"programs, {s.tiles} row tile(s) each"
    )


def unserved(dtype: str, device: Device) -> str | None:
    """Why no Triton kernel serves this dtype on this device; None if one does."""
    if dtype not in KERNEL_DTYPES:
        return f"the kernels take {', '.join(KERNEL_DTYPES)}, not {dtype}"
    if device.vendor == "nvidia" and (device.capability or 0) < MINIMUM_CAPABILITY:
        have = (device.capability or 0) / 10
        return f"the kernels need compute capability {MINIMUM_CAPABILITY / 10}, {device.name} has {have}"
    return None


@lru_cache(maxsize=4096)
def off_chip(
    batch: int, hidden_size: int, directions: int, dtype: str, precision: str, training: bool, device: Device,
    overrides: Overrides = (),
) -> str | None:  # fmt: skip
    """Why `sequence` cannot keep W_h on chip; None if it can, in every pass that is needed."""
    for kind in ("forward", "backward") if training else ("forward",):
        tiles = sequence_tiles(kind, batch, hidden_size, directions, dtype, precision, device, overrides)
        if isinstance(tiles, str):
            return tiles
    return None


def with_overrides(backend: str) -> tuple[str, Overrides]:
    """A backend's name without the fields of tiles set behind a colon, and these."""
    name, colon, fields = backend.partition(":")
    return (name, parse_overrides(fields)) if name == "sequence" and colon else (backend, ())


@lru_cache(maxsize=4096)
def triton_backend(
    batch: int, time: int, hidden_size: int, directions: int, dtype: str, precision: str, training: bool, device: Device
) -> tuple[str, str]:
    """Which Triton backend runs the recurrence of a layer that the kernels serve, and why."""
    if time == 1:
        return "step", "one step is one launch, the input product in it"
    why_not = off_chip(batch, hidden_size, directions, dtype, precision, training, device)
    if why_not:
        return "step", f"one fused launch per timestep: {why_not}"
    p = Problem(
        batch=batch, time=time, input_size=1, hidden_size=hidden_size, directions=directions, dtype=dtype,
        training=training, precision=precision,
    )  # fmt: skip
    forward, backward = (sequence_tiles(kind, *_shape(p), device) for kind in ("forward", "backward"))
    if faster(p, device, step_tiles("forward", *_shape(p), device), forward, backward) == "step":
        return "step", "one fused launch per timestep, which is predicted to take less than filling and loading for one"
    return "sequence", "one launch per sequence, W_h kept on chip"


def unserved_by(backend: str, problem: Problem, device: Device) -> str | None:
    """Why a Triton backend cannot serve a problem; None if it can."""
    p, (name, overrides) = problem, with_overrides(backend)
    why_not = unserved(p.dtype, device)
    if why_not or name != "sequence":
        return why_not
    return off_chip(p.batch, p.hidden_size, p.directions, p.dtype, p.precision, p.training, device, overrides)


@lru_cache(maxsize=1024)
def choose(problem: Problem, device: Device, backend: str | None = None) -> Plan:
    """What would run for `problem` on `device`; `backend` forces one, as the layer's argument does.

    Raises:
        ValueError: a forced backend is unknown, or cannot serve the problem.
    """
    p = problem
    if backend is None:
        why_not = unserved(p.dtype, device)
        if why_not:
            chosen, reason = "aten", why_not
        else:
            shape = (p.batch, p.time, p.hidden_size, p.directions)
            chosen, reason = triton_backend(*shape, p.dtype, p.precision, p.training, device)
    elif (name := with_overrides(backend)[0]) in BACKENDS:
        why_not = unserved_by(backend, p, device) if name in TRITON_BACKENDS else None
        if why_not:
            able = [b for b in BACKENDS if b not in TRITON_BACKENDS or unserved_by(b, p, device) is None]
            raise ValueError(f"backend {backend!r} cannot run here: {why_not}; these can: {', '.join(able)}")
        chosen, reason = name, "asked for"
    else:
        raise ValueError(f"unknown backend {backend!r}: expected one of {', '.join(BACKENDS)}")
    if chosen not in TRITON_BACKENDS:
        return Plan(p, device.name, chosen, reason, (), (), Launches((), ()), Cost(0, 0, 0, 0, 0))
    if chosen == "sequence":
        return _sequence_plan(p, device, reason, with_overrides(backend)[1] if backend else ())
    kinds = ["cell" if p.time == 1 else "forward"]
    if p.training:
        kinds += ["backward_first"] if p.time == 1 else ["backward_first", "backward"]
    tiles = {kind: step_tiles(kind, *_shape(p), device) for kind in kinds}
    times = tuple(_time(kind, "step", tiles[kind], p, device) for kind in (kinds[0], *kinds[-1:]) if kind in tiles)
    return Plan(
        p, device.name, chosen, reason, tuple(tiles.items()), times, step_launches(p),
        step_cost(p, tiles[kinds[0]].block_b, tiles[kinds[0]].block_h),
    )  # fmt: skip


def _shape(p: Problem) -> tuple[int, int, int, str, str]:
    return p.batch, p.hidden_size, p.directions, p.dtype, p.precision


def _sequence_plan(p: Problem, device: Device, reason: str, overrides: Overrides) -> Plan:
    def tiles_of(kind: str, directions: int) -> SequenceTiles:
        found = sequence_tiles(kind, p.batch, p.hidden_size, directions, p.dtype, p.precision, device, overrides)
        assert isinstance(found, SequenceTiles)  # else `unserved_by` had a reason
        return found

    tiles = {kind: tiles_of(kind, p.directions) for kind in (("forward", "backward") if p.training else ("forward",))}
    return Plan(
        p, device.name, "sequence", reason, tuple(tiles.items()),
        tuple(_time(kind, "sequence", t, p, device) for kind, t in tiles.items()),
        sequence_launches(p, tiles_of), sequence_cost(p, tiles_of),
    )  # fmt: skip


def _time(kind: str, backend: str, tiles: StepTiles | SequenceTiles, p: Problem, device: Device) -> StepTime:
    of_step = (kind, backend, tiles, *_shape(p), device)
    return StepTime(kind, limit_us(*of_step), predicted_us(*of_step))
