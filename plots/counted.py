"""Figures of what is counted from sizes: no GPU, no compiler, no clock."""

from __future__ import annotations

from collections import Counter
from itertools import groupby

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

from benchmarks.traffic import step_traffic
from tritongru.gradients import steps_at_once
from tritongru.planning import Device, Plan, Problem, choose, describe
from tritongru.planning.choose import off_chip, unserved
from tritongru.planning.devices import DEVICES
from tritongru.planning.problem import BYTES
from tritongru.planning.sequence import SequenceTiles, sequence_tiles
from tritongru.tools.counted import with_counts
from tritongru.tools.style import BLUE, GREEN, GREY, ORANGE, PALE, SKY, VERMILION, Look, figure, log_y, sizes_axis

KIND = "Counted from sizes; no GPU, nothing timed."
B, T, H, DTYPE, DEVICE = 32, 512, 512, "bf16", "h200"
WHERE = f"One layer, one direction, {DTYPE}, B {B}, I = H, training; planned for an H200."
TIMES = (1, 2, 8, 32, 128, 512, 2048, 8192)
SIZES = (64, 128, 256, 512, 1024, 2048, 4096)
LINES: dict[str, Look] = {"step": {"color": ORANGE, "marker": "s"}, "sequence": {"color": BLUE, "marker": "o"}}


def _plan(backend: str, T: int = T, H: int = H, recompute: bool = False) -> Plan | None:
    """What a backend would do; None where it does not serve."""
    problem = Problem(batch=B, time=T, input_size=H, hidden_size=H, dtype=DTYPE, recompute=recompute)
    try:
        return with_counts(choose(problem, describe(DEVICE), backend), describe(DEVICE))
    except ValueError:
        return None


def draw_launches() -> Figure:
    """Launches of a call by T and by kind, bytes that a step reads by H, of `step` and `sequence`."""
    found, axes = figure(
        "step launches a kernel per timestep, each of which reads W_h again; "
        "sequence launches one for all timesteps and reads W_h once",
        [WHERE, f"{KIND} Bytes are those that all programs load, most of which L2 delivers."],
        (10, 8.4), 2, 2,
    )  # fmt: skip
    _draw_launches_by_time(axes[0, 0])
    _draw_bytes(axes[0, 1])
    for pane, direction in zip(axes[1], ("forward", "backward"), strict=True):
        _draw_launches_by_kind(pane, direction)
    return found


def _draw_launches_by_time(axes: Axes) -> None:
    for backend, style in LINES.items():
        plans = {t: plan for t in TIMES if (plan := _plan(backend, T=t))}
        counts = [sum(n for _, n in (*p.launches.forward, *p.launches.backward)) for p in plans.values()]
        axes.plot(list(plans), counts, label=backend, **style)
        axes.annotate(f"{counts[-1]:,}", (list(plans)[-1], counts[-1]), xytext=(-8, 5 if backend == "sequence" else -3),
                      textcoords="offset points", ha="right")  # fmt: skip
    log_y(axes, "launches of a call")
    sizes_axis(axes, TIMES, "T, timesteps")
    axes.set_title(f"All launches of forward and backward, H {H}")
    axes.legend()


def _draw_bytes(axes: Axes) -> None:
    for backend, style in LINES.items():
        plans = {h: plan for h in SIZES if (plan := _plan(backend, H=h))}
        axes.plot(list(plans), [step_traffic(plan)[0] / 1e6 for plan in plans.values()], label=backend, **style)
    axes.plot(SIZES, [6 * h * h / 1e6 for h in SIZES], color=GREY, ls=":", zorder=1, label="W_h itself: 6 H² bytes")
    log_y(axes, "MB read in one forward step")
    sizes_axis(axes, SIZES, "H, hidden units")
    axes.annotate("up to H 128 a program\nkeeps W_h and h", (128, 0.022), xytext=(170, 0.013))
    axes.annotate("beyond H 2048\nW_h does not fit", (2048, 14), xytext=(1350, 1.3))
    axes.set_title("Bytes that a forward step reads")
    axes.legend()


def _draw_launches_by_kind(axes: Axes, direction: str) -> None:
    kinds = ["recurrent kernel", "library product", "copy", "column sum", "fill"]
    for i, (backend, style) in enumerate(LINES.items()):
        plan = _plan(backend)
        assert plan is not None
        counts: Counter[str] = Counter()
        for what, n in getattr(plan.launches, direction):
            counts["recurrent kernel" if what.startswith(backend) else what] += n
        assert set(counts) <= set(kinds), counts
        places = [y + 0.2 * (2 * i - 1) for y in range(len(kinds))]
        axes.barh(places, [counts[kind] for kind in kinds], 0.36, color=style["color"], label=backend,
                  hatch="///" if i else None, edgecolor="white")  # fmt: skip
        for y, kind in zip(places, kinds, strict=True):
            axes.annotate(str(counts[kind]), (max(counts[kind], 0.5), y), xytext=(4, 0), textcoords="offset points",
                          va="center")  # fmt: skip
    axes.set_xscale("log")
    axes.set_xlim(0.5, 2000)
    axes.xaxis.set_major_locator(FixedLocator((1, 10, 100, 1000)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("launches of a call")
    axes.set_yticks(range(len(kinds)), kinds)
    axes.invert_yaxis()
    axes.set_title(f"{direction.capitalize()}, T {T}, H {H}, by kind")
    axes.legend(loc="lower right")


RESIDENT = "one program holds all of W_h"
EXCHANGING = "programs hold a slice each and exchange h"
STEPPING = "does not fit: a launch per timestep (step)"
UNSERVED = "not served: PyTorch's own path (aten)"
CLASSES: dict[str, Look] = {
    RESIDENT: {"facecolor": GREEN},
    EXCHANGING: {"facecolor": SKY, "hatch": "///"},
    STEPPING: {"facecolor": ORANGE, "hatch": "..."},
    UNSERVED: {"facecolor": PALE},
}
PRODUCTS = {
    "bf16, fp16": ("bf16", "tf32"),
    "fp32 (TF32 products)": ("fp32", "tf32"),
    "fp32 (IEEE products)": ("fp32", "ieee"),
}
LAST = 3072  # no described device goes so far
GRAIN = 16


def residency(device: Device, dtype: str, precision: str) -> list[tuple[str, int]]:
    """The runs of H, in multiples of 16 up to LAST, that a device serves alike: (class, the last H of the run)."""

    def class_of(H: int) -> str:
        if unserved(dtype, device):
            return UNSERVED
        if off_chip(B, H, 1, dtype, precision, True, device):
            return STEPPING
        tiles = sequence_tiles("backward", B, H, 1, dtype, precision, device)
        return EXCHANGING if isinstance(tiles, SequenceTiles) else RESIDENT

    runs = groupby(range(GRAIN, LAST + 1, GRAIN), class_of)
    return [(name, max(sizes)) for name, sizes in runs]


def draw_residency() -> Figure:
    """Which H of which dtype keep W_h on which GPU's chip."""
    devices = [device for device in DEVICES.values() if device.vendor != "interpreter"]
    most = max(last for name, last in residency(describe("h200"), "bf16", "tf32") if name in (RESIDENT, EXCHANGING))
    found, axes = figure(
        f"Up to which H a GPU keeps W_h on its chip for all timesteps: {most} on an H200 in bf16",
        [
            "Training, one layer, one direction, any B; H in multiples of 16. The number is the last H of its field.",
            f"Where W_h fits, sequence runs, unless T is so short that step is expected to take less. {KIND}",
        ],
        (10, 10.2), len(PRODUCTS), 1, sharex=True,
    )  # fmt: skip
    for pane, (title, (dtype, precision)) in zip(axes[:, 0], PRODUCTS.items(), strict=True):
        for y, device in enumerate(devices):
            left = GRAIN
            for name, last in residency(device, dtype, precision):
                pane.barh(y, last - left, 0.74, left=left, edgecolor="white", **CLASSES[name])
                if last < LAST:
                    pane.annotate(
                        str(last), (last, y), xytext=(-6, -0.5), textcoords="offset points", ha="right", va="center",
                        fontsize=9, weight="bold", bbox={"facecolor": "white", "edgecolor": "#404040", "pad": 1.2},
                    )  # fmt: skip
                left = last
        pane.set_yticks(range(len(devices)), [f"{d.name} ({d.sms} SMs)" for d in devices])
        pane.invert_yaxis()
        sizes_axis(pane, (16, 32, 64, 128, 256, 512, 1024, 2048, 3072), "")
        pane.tick_params(labelbottom=True)
        pane.set_xlim(GRAIN, LAST)
        pane.set_title(title)
    axes[-1, 0].set_xlabel("H, hidden units")
    found.legend(handles=[Patch(label=name, edgecolor="white", **style) for name, style in CLASSES.items()],
                 loc="outside lower center", ncols=2)  # fmt: skip
    return found


MIB = 2**20


LONG = 2048  # timesteps: long enough for recompute to go in several chunks
WAYS: dict[str, Look] = {
    "step": {"color": ORANGE, "marker": "s", "ms": 9, "lw": 5, "alpha": 0.7},  # the two coincide: one wide, one narrow
    "sequence": {"color": BLUE, "marker": "o", "ms": 5, "lw": 1.6},
    "step, recompute": {"color": VERMILION, "marker": "D", "ms": 9, "lw": 5, "alpha": 0.6},
    "sequence, recompute": {"color": GREEN, "marker": "^", "ms": 5, "lw": 1.6},
}


def _of_way(way: str, T: int = LONG, H: int = H) -> Plan | None:
    return _plan(way.split(",")[0], T, H, recompute="recompute" in way)


def draw_memory() -> Figure:
    """What training keeps and what it needs at once, by backend, with and without recompute."""
    found, axes = figure(
        "Training keeps the gates, four times the output; recompute keeps nothing of a layer, "
        "and lowers the peak of long sequences",
        [f"{WHERE} Beyond input, output, weights and gradients.",
         f"{KIND} nn.GRU is missing: only a GPU tells what cuDNN reserves."],
        (10, 8.6), 2, 2,
    )  # fmt: skip
    grid = axes[0, 0].get_gridspec()
    axes[0, 1].remove()
    axes[0, 0].set_subplotspec(grid[0, :])
    _draw_memory_bars(axes[0, 0])
    left, right = axes[1]
    _draw_peak(left, [(T, T, H) for T in TIMES[1:]])
    _draw_peak(right, [(H, LONG, H) for H in SIZES])
    sizes_axis(left, TIMES[1:], "T, timesteps")
    sizes_axis(right, SIZES, "H, hidden units")
    left.set_title(f"Peak of forward and backward, H {H}")
    right.set_title(f"Peak of forward and backward, T {LONG}")
    left.legend(loc="upper left")
    steps = steps_at_once(TIMES[-1], B)
    left.axvline(steps, color=GREY, lw=0.8, zorder=0)
    left.annotate(f"beyond T {steps} recompute\ngoes chunk by chunk", (steps, 0.12), xytext=(-6, 0),
                  textcoords="offset points", ha="right", color="#404040")  # fmt: skip
    return found


def _draw_memory_bars(axes: Axes) -> None:
    parts = {"kept for backward": "saved_bytes", "peak of forward": "peak_forward_bytes",
             "peak of backward": "peak_backward_bytes"}  # fmt: skip
    looks: tuple[Look, ...] = ({"color": BLUE}, {"color": SKY, "hatch": "///"}, {"color": ORANGE, "hatch": "..."})
    for i, ((part, field), look) in enumerate(zip(parts.items(), looks, strict=True)):
        plans = [_of_way(way) for way in WAYS]
        values = [getattr(plan.cost, field) / MIB for plan in plans if plan]
        bars = axes.bar([x + 0.27 * (i - 1) for x in range(len(WAYS))], values, 0.25, label=part, edgecolor="white",
                        **look)  # fmt: skip
        axes.bar_label(bars, fmt="{:,.0f}", padding=2)
    both = 2 * LONG * B * H * BYTES[DTYPE] / MIB
    axes.axhline(both, color=GREY, ls=":", label=f"input and output: {both:,.0f} MiB")
    axes.set_xticks(range(len(WAYS)), list(WAYS))
    axes.set_ylabel("MiB")
    axes.set_title(f"T {LONG}, H {H}")
    axes.legend(loc="upper right")


def _draw_peak(axes: Axes, points: list[tuple[int, int, int]]) -> None:
    """points: (x, T, H)."""
    for way, style in WAYS.items():
        costs = {x: plan.cost for x, T, H in points if (plan := _of_way(way, T, H))}
        peaks = [max(c.peak_forward_bytes, c.peak_backward_bytes) / MIB for c in costs.values()]
        axes.plot(list(costs), peaks, label=way, **style)
    both = [2 * T * B * H * BYTES[DTYPE] / MIB for _, T, H in points]
    axes.plot([x for x, *_ in points], both, color=GREY, ls=":", label="input and output")
    log_y(axes, "MiB")
