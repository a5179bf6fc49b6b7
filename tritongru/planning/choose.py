"""Choosing what runs, as a `Plan`: a pure function of the problem and a described device. Needs no GPU, no Triton."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any

from . import sequence, step
from .devices import Device
from .measured import Choice, Timed, fastest
from .problem import BYTES, Overrides, Problem, Recurrence
from .sequence import SequenceTiles
from .small import SmallTiles
from .step import StepTiles
from .tuned import parse_overrides

# float32 up to this H cuDNN computes the recurrence with FMA, though TF32 is allowed (seen on an H200 in the error of
# dh_0; the products around it are TF32 all the same).
FMA = 128


@dataclass(frozen=True)
class Launches:
    """Launches of one call by what they are, (what, how many): a kernel's name, or a kind of PyTorch's own."""

    forward: tuple[tuple[str, int], ...] = ()
    backward: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class Cost:
    """Bytes of one call. Of a packed batch a bound: as if every row ran at every timestep."""

    saved_bytes: int = 0  # kept for backward beyond input, output, h_0 and weights
    peak_forward_bytes: int = 0  # the most at once in forward beyond input, h_0, weights, output and h_n
    peak_backward_bytes: int = 0  # the same in backward, what was saved included, gradients of weights and input not


@dataclass(frozen=True)
class Plan:
    """What would run, and why. Launches and bytes are for a contiguous input and an h_0 that need no gradient, without
    dropout; `choose` leaves them empty, tools/counted.py counts them."""

    problem: Problem
    device: str
    backend: str
    reason: str
    tiles: tuple[tuple[str, StepTiles | SequenceTiles | SmallTiles], ...]  # (kind, tiles) of the recurrent launches
    candidates: tuple[Timed, ...]  # what each took in the nearest measured cell, the fastest first; none: no row says
    launches: Launches = Launches()
    cost: Cost = Cost()

    def as_dict(self) -> dict[str, Any]:
        """The plan as plain values, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        p, mib = self.problem, [f"{count / 2**20:.1f} MiB" for count in vars(self.cost).values()]
        lines = [
            f"backend   {self.backend} on {self.device}: {self.reason}",
            f"problem   B {p.batch}, T {p.time}, I {p.input_size}, H {p.hidden_size}, {p.layers} layer(s), "
            f"{p.directions} direction(s), {p.dtype}{f' ({p.precision} products)' * (p.dtype == 'fp32')}, "
            f"{'training' if p.training else 'inference'}{', packed' * p.packed}",
        ]
        lines += [f"candidate {one.backend:<9} {one.call_us(p.time):.0f} us a layer: {one}" for one in self.candidates]
        lines += [f"tiles     {kind}: {tiles.words}" for kind, tiles in self.tiles]
        for way, counts in vars(self.launches).items():
            lines += [f"{way:<9} " + ", ".join(f"{n} x {name}" for name, n in counts)] * bool(counts)
        if self.launches.backward:
            lines += [
                f"saved     {mib[0]} for backward beyond input, output and weights; nn.GRU keeps cuDNN's reserve, "
                "whose size only a GPU can tell (python -m benchmarks)",
                f"peak      {mib[1]} at once in forward, {mib[2]} in backward, what is saved included, beyond "
                "input, output, weights and their gradients",
            ]
        elif self.launches.forward:
            lines.append(f"peak      {mib[1]} at once beyond input, output and weights")
        return "\n".join(lines)


def unserved(dtype: str, device: Device) -> str | None:
    """Why no Triton kernel serves this dtype on this device; None if one does."""
    if dtype not in ("fp32", "fp16", "bf16"):
        return f"the kernels take fp32, fp16, bf16, not {dtype}"
    capability = device.capability or 0
    if device.vendor == "nvidia" and capability < 80:  # bfloat16 and TF32 matrix instructions, cp.async
        return f"the kernels need compute capability 8.0, {device.name} has {capability / 10}"
    return None


# How a backend's recurrent launches are planned: tiles of a kind of them, or in words why the device cannot hold them;
# the kinds of a call, by T and whether it trains; and the fields of tiles that may be set for a measurement.
PLANNERS: dict[str, tuple[Callable[[str, Recurrence], Any], Callable[[int, bool], tuple[str, ...]], Sequence[str]]] = {
    "step": (step.step_tiles, step.kinds, step.OVERRIDABLE),
    "sequence": (sequence.sequence_tiles, sequence.kinds, sequence.OVERRIDABLE),
}
TRITON_BACKENDS = tuple(PLANNERS)
BACKENDS = ("aten", "reference", *TRITON_BACKENDS)


def off_chip(of: Recurrence, training: bool, backend: str = "sequence") -> str | None:
    """Why the device cannot hold what a backend keeps on chip; None if it can, in every pass that is needed."""
    tiles, kinds, _ = PLANNERS[backend]
    found = (tiles(kind, of) for kind in kinds(2, training))
    return next((why for why in found if isinstance(why, str)), None)


def with_overrides(backend: str) -> tuple[str, Overrides]:
    """A backend's name without the fields of tiles set behind a colon, and these."""
    name, colon, fields = backend.partition(":")
    if not colon or name not in PLANNERS:
        return backend, ()
    return name, parse_overrides(fields, name, PLANNERS[name][2])


@lru_cache(maxsize=4096)
def fastest_backend(of: Recurrence, time: int, training: bool, aten: bool = True, cell: bool = False) -> Choice:
    """What runs the recurrence of a layer that the kernels serve, and why: by measured rows where there are any.

    aten: whether PyTorch's own path is a candidate (not where only the output is to be kept, nor in a compiled graph);
    cell: whether the call is a GRUCell's."""
    off = off_chip(of, training) if time > 1 else None
    one_launch = time > 1 and off is None
    by_cudnn = aten and of.dtype == "fp32" and of.device.vendor == "nvidia"
    if by_cudnn and of.precision == "ieee" and of.hidden_size > FMA:
        return Choice("aten", f"float32 without TF32 was not measured above H {FMA}")
    if by_cudnn and cell:  # `step` by the switch of RNNs, which allows TF32 unless told otherwise
        return Choice("aten", "nn.GRUCell computes float32 by the switch of matrix products, more exactly")
    found = fastest(("aten",) * aten + ("sequence",) * one_launch + ("step",), of, time, training, cell)
    if by_cudnn and of.hidden_size <= FMA and (found is None or found.backend not in ("aten", "sequence")):
        exact = f"cuDNN computes float32 up to H {FMA} without TF32, more exactly than step"
        return Choice("aten", exact, found.candidates if found else ())
    if found is not None:
        return replace(found, reason=f"{found.reason}; sequence cannot run: {off}") if off else found
    if one_launch:  # rather than many
        return Choice("sequence", "one launch per sequence, W_h kept on chip, not measured")
    if time == 1:
        return Choice("step", "one step is one launch, the input product in it, not measured")
    return Choice("step", f"one fused launch per timestep, not measured: {off}")


def too_large(problem: Problem, device: Device) -> str | None:
    """Why the device's memory cannot hold even the weights, the input and the output of a call; None if it can."""
    p, wide = problem, problem.directions * problem.hidden_size
    inputs = p.input_size + (p.layers - 1) * wide  # of all layers together
    weights = 3 * wide * (inputs + p.layers * (p.hidden_size + 2 * p.bias))
    rows = p.time + p.batch - 1 if p.packed else p.time * p.batch  # at the least
    needed = {
        "weights and their gradients" if p.training else "weights": weights * (1 + p.training),
        "input and output": rows * (p.input_size + wide),
    }
    if not 0 < device.memory_bytes < BYTES[p.dtype] * sum(needed.values()):
        return None
    sizes = ", ".join(f"{BYTES[p.dtype] * count / 2**30:.3g} GiB of {name}" for name, count in needed.items())
    return f"too large for {device.name} with its {device.memory_bytes / 2**30:.0f} GiB: {sizes}"


def unserved_by(backend: str, problem: Problem, device: Device) -> str | None:
    """Why a Triton backend cannot serve a problem; None if it can."""
    name, overrides = with_overrides(backend)
    return unserved(problem.dtype, device) or off_chip(problem.on(device, overrides), problem.training, name)


def choose(problem: Problem, device: Device, backend: str | None = None, aten: bool = True) -> Plan:
    """What would run for `problem` on `device`; `backend` forces one, as the layer's argument does. aten: whether
    PyTorch's own path may be chosen where kernels serve; not with recompute, which it does not know.

    Raises:
        ValueError: a forced backend is unknown, or cannot serve the problem; or the device's memory cannot hold it.
    """
    p, (name, overrides) = problem, with_overrides(backend or "")
    if why_not := too_large(p, device):
        raise ValueError(why_not)
    if backend is None and (why_not := unserved(p.dtype, device)):
        choice = Choice("aten", why_not)
    elif backend is None:
        choice = fastest_backend(p.on(device), p.time, p.training, aten and not (p.recompute and p.training))
    elif name not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}: expected one of {', '.join(BACKENDS)}")
    elif name in PLANNERS and (why_not := unserved_by(backend, p, device)):
        able = [b for b in BACKENDS if b not in PLANNERS or unserved_by(b, p, device) is None]
        raise ValueError(f"backend {backend!r} cannot run here: {why_not}; these can: {', '.join(able)}")
    else:
        choice = Choice(name, "asked for")
    of_kinds: tuple[tuple[str, Any], ...] = ()
    if choice.backend in PLANNERS:
        tiles, kinds, _ = PLANNERS[choice.backend]
        of_kinds = tuple((kind, tiles(kind, p.on(device, overrides))) for kind in kinds(p.time, p.training))
    return Plan(p, device.name, choice.backend, choice.reason, of_kinds, choice.candidates)
