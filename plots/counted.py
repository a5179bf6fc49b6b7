"""Figures of what is counted from sizes: no GPU, no compiler, no clock."""

from collections import Counter
from itertools import groupby

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

from benchmarks.traffic import step_traffic
from tritongru.gradients import steps_at_once
from tritongru.planning import Device, Plan, Problem, describe
from tritongru.planning.choose import off_chip, unserved
from tritongru.planning.devices import DEVICES
from tritongru.planning.problem import BYTES, Recurrence
from tritongru.planning.sequence import SequenceTiles, sequence_tiles
from tritongru.tools.counted import planned
from tritongru.tools.style import BLUE, GREEN, GREY, ORANGE, PALE, SKY, VERMILION, Look, figure

from .axes import log_axis, sizes_axis
from .rows import patches

KIND = "Counted from sizes; no GPU, nothing timed."
B, T, H, DTYPE, DEVICE = 32, 512, 512, "bf16", "h200"
WHERE = f"One layer, one direction, {DTYPE}, B {B}, I = H, training; planned for an H200."
TIMES = (1, 2, 8, 32, 128, 512, 2048, 8192)
SIZES = (64, 128, 256, 512, 1024, 2048, 4096)
LINES: dict[str, Look] = {"step": {"color": ORANGE, "marker": "s"}, "sequence": {"color": BLUE, "marker": "o"}}


def _plan(way: str, T: int = T, H: int = H) -> Plan | None:
    """What a backend would do, "step, recompute" with recompute; None where it does not serve."""
    backend, _, recompute = way.partition(", ")
    problem = Problem(batch=B, time=T, input_size=H, hidden_size=H, dtype=DTYPE, recompute=bool(recompute))
    try:
        return planned(problem, describe(DEVICE), backend)
    except ValueError:
        return None


def draw_launches() -> Figure:
    """Launches of a call by T and by kind, bytes that a step reads by H, of `step` and `sequence`."""
    found, axes = figure(
        "step launches a kernel per timestep, each of which reads W_h again; "
        "sequence has one launch forward and a few backward, and reads W_h once in each",
        [WHERE, f"{KIND} Bytes are those that all programs load, most of which L2 delivers."],
        (10, 8.4), 2, 2,
    )  # fmt: skip
    by_time, by_size = axes[0]
    for backend, look in LINES.items():
        plans = {t: plan for t in TIMES if (plan := _plan(backend, T=t))}
        counts = [sum(n for _, n in (*p.launches.forward, *p.launches.backward)) for p in plans.values()]
        by_time.plot(list(plans), counts, label=backend, **look)
        by_time.annotate(f"{counts[-1]:,}", (TIMES[-1], counts[-1]), xytext=(-8, 5 if backend == "sequence" else -3),
                         textcoords="offset points", ha="right")  # fmt: skip
        plans = {h: plan for h in SIZES if (plan := _plan(backend, H=h))}
        by_size.plot(list(plans), [step_traffic(plan)[0] / 1e6 for plan in plans.values()], label=backend, **look)
    by_size.plot(SIZES, [6 * h * h / 1e6 for h in SIZES], color=GREY, ls=":", zorder=1, label="W_h itself: 6 H² bytes")
    by_size.annotate("up to H 128 a program\nkeeps W_h and h", (128, 0.022), xytext=(170, 0.013))
    by_size.annotate("beyond H 2048\nW_h does not fit", (2048, 14), xytext=(1350, 1.3))
    log_axis(by_time, "y", "launches of a call")
    log_axis(by_size, "y", "MB read in one forward step")
    sizes_axis(by_time, TIMES, "T, timesteps")
    sizes_axis(by_size, SIZES, "H, hidden units")
    by_time.set_title(f"All launches of forward and backward, H {H}")
    by_size.set_title("Bytes that a forward step reads")
    by_time.legend()
    by_size.legend()
    for pane, direction in zip(axes[1], ("forward", "backward"), strict=True):
        _draw_launches_by_kind(pane, direction)
    return found


def _draw_launches_by_kind(axes: Axes, direction: str) -> None:
    kinds = ["recurrent kernel", "library product", "copy", "column sum", "fill"]
    for i, (backend, look) in enumerate(LINES.items()):
        plan = _plan(backend)
        assert plan is not None
        counts: Counter[str] = Counter()
        for what, n in getattr(plan.launches, direction):
            counts["recurrent kernel" if what.startswith(backend) else what] += n
        assert set(counts) <= set(kinds), counts
        places = [y + 0.2 * (2 * i - 1) for y in range(len(kinds))]
        axes.barh(places, [counts[kind] for kind in kinds], 0.36, color=look["color"], label=backend,
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
STEPPING = "does not fit: of the kernels step alone can run"
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
        layer = Recurrence(B, H, 1, dtype, precision, device)
        if off_chip(layer, True):
            return STEPPING
        tiles = sequence_tiles("backward", layer)
        return EXCHANGING if isinstance(tiles, SequenceTiles) else RESIDENT

    return [(name, max(sizes)) for name, sizes in groupby(range(GRAIN, LAST + 1, GRAIN), class_of)]


def draw_residency() -> Figure:
    """Which H of which dtype keep W_h on which GPU's chip."""
    devices = [device for device in DEVICES.values() if device.vendor != "interpreter"]
    most = max(last for name, last in residency(describe("h200"), "bf16", "tf32") if name in (RESIDENT, EXCHANGING))
    found, axes = figure(
        f"Up to which H a GPU keeps W_h on its chip for all timesteps: {most} on an H200 in bf16",
        [
            "Training, one layer, one direction, any B; H in multiples of 16. The number is the last H of its field.",
            f"Where W_h fits, sequence can run; which backend is chosen depends on measured times, too. {KIND}",
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
    patches(found, CLASSES, 2)
    return found


MIB = 2**20
LONG = 2048  # timesteps: long enough for recompute to go in several chunks
WAYS: dict[str, Look] = {
    "step": {"color": ORANGE, "marker": "s", "ms": 9, "lw": 5, "alpha": 0.7},  # the two coincide: one wide, one narrow
    "sequence": {"color": BLUE, "marker": "o", "ms": 5, "lw": 1.6},
    "step, recompute": {"color": VERMILION, "marker": "D", "ms": 9, "lw": 5, "alpha": 0.6},
    "sequence, recompute": {"color": GREEN, "marker": "^", "ms": 5, "lw": 1.6},
}
PARTS: dict[str, tuple[str, Look]] = {
    "kept for backward": ("saved_bytes", {"color": BLUE}),
    "peak of forward": ("peak_forward_bytes", {"color": SKY, "hatch": "///"}),
    "peak of backward": ("peak_backward_bytes", {"color": ORANGE, "hatch": "..."}),
}


def draw_memory() -> Figure:
    """What training keeps and what it needs at once, by backend, with and without recompute."""
    found, axes = figure(
        "Training keeps the gates, four times the output; recompute keeps nothing of a layer, "
        "and lowers the peak of long sequences",
        [f"{WHERE} Beyond input, output, weights and gradients.",
         f"{KIND} nn.GRU is missing: only a GPU tells what cuDNN reserves."],
        (10, 8.6), 2, 2,
    )  # fmt: skip
    bars, (left, right) = axes[0, 0], axes[1]
    axes[0, 1].remove()
    bars.set_subplotspec(bars.get_gridspec()[0, :])
    plans = [plan for way in WAYS if (plan := _plan(way, LONG))]
    for i, (part, (field, look)) in enumerate(PARTS.items()):
        values, places = [getattr(plan.cost, field) / MIB for plan in plans], [x + 0.27 * (i - 1) for x in range(4)]
        bars.bar_label(bars.bar(places, values, 0.25, label=part, edgecolor="white", **look), fmt="{:,.0f}", padding=2)
    both = _input_and_output(LONG, H)
    bars.axhline(both, color=GREY, ls=":", label=f"input and output: {both:,.0f} MiB")
    bars.set_xticks(range(len(WAYS)), list(WAYS))
    bars.set_ylabel("MiB")
    bars.set_title(f"T {LONG}, H {H}")
    bars.legend(loc="upper right")
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


def _input_and_output(T: int, H: int) -> float:
    return 2 * T * B * H * BYTES[DTYPE] / MIB


def _draw_peak(axes: Axes, points: list[tuple[int, int, int]]) -> None:
    """points: (x, T, H)."""
    for way, look in WAYS.items():
        costs = {x: plan.cost for x, T, H in points if (plan := _plan(way, T, H))}
        peaks = [max(c.peak_forward_bytes, c.peak_backward_bytes) / MIB for c in costs.values()]
        axes.plot(list(costs), peaks, label=way, **look)
    both = [_input_and_output(T, H) for _, T, H in points]
    axes.plot([x for x, *_ in points], both, color=GREY, ls=":", label="input and output")
    log_axis(axes, "y", "MiB")
