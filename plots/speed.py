"""The figure of the layer's speed on an H200: every shape that was timed, as it is called and without the host."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from benchmarks.cases import BASELINE
from benchmarks.speed import BACKENDS, Shape, T
from tritongru.tools.style import GREY, PALE, figure, log_x

from .measured import LINES, Row, hardware

PANES = (
    ("forward", "forward", "forward_graph", "in a CUDA graph"),
    ("training (forward and backward)", "training", "kernels", "kernels alone"),
)


def draw_speed(shapes: Sequence[Shape], rows: Sequence[Row]) -> Figure | None:
    """How many times as fast as nn.GRU, of each shape and backend; rows: of the same device, for versions."""
    if not shapes or not rows:
        return None
    ratios = [r for shape in shapes for _, *ways, _ in PANES for way in ways for b in BACKENDS
              if (r := shape.ratio(way, b))]  # fmt: skip
    found, axes = figure(
        f"As it is called, {BASELINE} waits for its host; in a CUDA graph it does not, and less of the gain is left",
        [f"Speed over that of {BASELINE} (cuDNN); shaded: slower. Filled: the call as it is made, from an idle device, "
         "on a host with a slow processor. Hollow: without the host, forward in a CUDA graph, training by the GPU time "
         "of its kernels; missing: not measured. One layer, one direction, TF32 in fp32; sequence as first built. "
         f"T {T}, I = H.", hardware(rows)],
        (10, 2.9 + 0.21 * len(shapes)), 1, 2, sharey=True,
    )  # fmt: skip
    ends = 0.8 / max(ratios), 1.25 / min(ratios)
    for pane, (title, called, alone, _) in zip(axes[0], PANES, strict=True):
        _pane(pane, shapes, called, alone)
        pane.set_title(title)
        log_x(pane, f"times as fast as {BASELINE}")
        pane.set_xlim(ends)
        ticks = [tick for tick in (0.1, 0.2, 0.5, 1, 2, 5, 10) if ends[0] < tick < ends[1]]
        pane.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        pane.xaxis.set_minor_locator(NullLocator())
        pane.axvspan(ends[0], 1, color=PALE, alpha=0.6, lw=0, zorder=0)
        pane.axvline(1, color=GREY, lw=1, zorder=1)
    axes[0, 0].set_yticks(range(len(shapes)), [shape.name for shape in shapes])
    axes[0, 0].set_ylim(len(shapes) - 0.4, -0.6)
    handles = [
        Line2D([], [], ls="", ms=7, color=LINES[backend]["color"], marker=LINES[backend]["marker"],
               mfc=LINES[backend]["color"] if filled else "white",
               label=f"{backend}, {'as called' if filled else ' / '.join(pane[3] for pane in PANES)}")
        for filled in (True, False) for backend in BACKENDS
    ]  # fmt: skip
    found.legend(handles=handles, loc="outside lower center", ncols=2)
    return found


def _pane(axes: Axes, shapes: Sequence[Shape], called: str, alone: str) -> None:
    for place, shape in enumerate(shapes):
        if place % 2:
            axes.axhspan(place - 0.5, place + 0.5, color="#F6F6F6", lw=0, zorder=-1)
        for y, backend in zip((place - 0.17, place + 0.17), BACKENDS, strict=True):
            look = LINES[backend]
            speeds = {way: 1 / ratio for way in (called, alone) if (ratio := shape.ratio(way, backend))}
            axes.plot(list(speeds.values()), [y] * len(speeds), color=look["color"], lw=1, zorder=2)
            for way, speed in speeds.items():
                axes.plot(speed, y, look["marker"], ms=5.5, color=look["color"],
                          mfc=look["color"] if way == called else "white", zorder=3)  # fmt: skip
