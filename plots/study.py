"""Figures of the kernel study: where W_h is kept and what waits for what, and each form's instructions by kind."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from benchmarks.study import of_a_step
from tritongru.tools.style import BLUE, GREY, ORANGE, PALE, SKY, VERMILION, YELLOW, Look, figure

from .compiled import LEGEND, shares
from .counted import KIND
from .rows import Row, patches

# What a box is.
BOXES: dict[str, Look] = {
    "W_h or a part of it": {"facecolor": BLUE, "hatch": "///"},
    "h": {"facecolor": YELLOW},
    "product": {"facecolor": SKY, "hatch": "..."},
    "gates": {"facecolor": PALE},
}
# A form: its title, what a launch is and what waits, and what goes through memory besides h.
FORMS = (
    ("unfused", "2 launches a step; all wait for all, twice", "gates"),
    ("step, step-input", "1 launch a step; all wait for all", ""),
    ("sequence-barrier", "1 launch; a program waits for a count", "count"),
    ("sequence", "1 launch; a program waits for the data", "data"),
)


def _box(axes: Axes, x: float, y: float, width: float, height: float, kind: str, words: str = "") -> None:
    axes.add_patch(Rectangle((x, y), width, height, edgecolor="black", lw=0.8, **BOXES[kind]))
    if words:
        axes.text(
            x + width / 2, y + height / 2, words, ha="center", va="center", fontsize=9,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
        )  # fmt: skip


def _arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str, dashed: bool = False) -> None:
    line = {"arrowstyle": "->", "color": colour, "lw": 1.6, "ls": "--" if dashed else "-"}
    axes.annotate("", end, start, arrowprops=line)


def draw_forms() -> Figure:
    """Two programs of each form over one timestep."""
    found, axes = figure(
        "From unfused to sequence: the gates join the product, W_h stays in the programs, which wait for data alone",
        [f"Two programs (thread blocks) over one timestep; time runs downwards. {KIND}",
         "Solid: h or sums that pass through memory. Dashed: a wait for something other than the data."],
        (10, 9.2), 2, 2,
    )  # fmt: skip
    for pane, (title, told, through) in zip(axes.flat, FORMS, strict=True):
        pane.set_title(f"{title}: {told}")
        pane.set_axis_off()
        pane.set_xlim(0, 10)
        pane.set_ylim(0, 10)
        _box(pane, 0.4, 9.0, 9.2, 0.75, "h", "h of t-1, all units")
        _box(pane, 0.4, 0.2, 9.2, 0.75, "h", "h of t")
        resident = through in ("count", "data")
        for left in (0.4, 5.4):
            _program(pane, left, through, resident)
        if through == "gates":  # the boundary of two launches
            pane.axhline(3.68, color=VERMILION, ls="--", lw=1.6)
            pane.text(0.3, 3.62, "launch ends", va="top", fontsize=9)
        if not resident:
            pane.axhline(1.35, color=VERMILION, ls="--", lw=1.6)
            pane.text(9.9, 1.42, "launch ends", ha="right", va="bottom", fontsize=9)
        if through == "count":
            pane.text(5.0, 7.98, "count = programs?", ha="center", va="center", fontsize=9)
            for x in (1.4, 8.6):
                _arrow(pane, (x, 8.95), (x, 7.5), VERMILION, dashed=True)
    patches(found, BOXES, 4, "black")
    return found


def _program(axes: Axes, left: float, through: str, resident: bool) -> None:
    width, middle = 4.2, left + 2.1
    if resident:  # on chip for all timesteps, so inside the program
        axes.add_patch(Rectangle((left - 0.15, 1.75), width + 0.3, 5.75, fill=False, edgecolor="black", lw=1.8))
        _box(axes, left, 6.2, width, 1.1, "W_h or a part of it", "own part of W_h, kept")
    else:
        _box(axes, left, 6.2, width, 1.1, "W_h or a part of it", "W_h, read again")
    _box(axes, left, 4.5, width, 1.2, "product", "product, own units")
    _arrow(axes, (middle, 6.2), (middle, 5.7), BLUE)
    _arrow(axes, (middle, 9.0), (middle, 7.32), ORANGE)
    _box(axes, left, 2.0, width, 1.2, "gates", "gates: h of own units")
    _arrow(axes, (middle, 4.5), (middle, 3.2), ORANGE if through == "gates" else GREY)
    if through == "gates":
        axes.text(middle + 0.15, 4.1, "sums, in memory", va="center", fontsize=9)
    _arrow(axes, (middle, 2.0), (middle, 0.95), ORANGE)
    if through == "count":
        axes.text(middle + 0.15, 1.25, "store, then count", va="center", fontsize=9)
    if through == "data":
        axes.text(middle + 0.15, 1.25, "publish", va="center", fontsize=9)
        axes.text(middle + 0.15, 8.1, "until none missing", va="center", fontsize=9)


def draw_study(rows: Sequence[Row]) -> Figure | None:
    """The instructions of a timestep by class, of each form."""
    if not rows:
        return None
    first = rows[0]
    found, axes = figure(
        "With W_h in registers, and warps that wait by themselves, a step takes less than half the instructions",
        [f"Compiled with Triton {first['triton']} for {first['target']}, {first['dtype']}, B {first['B']}, "
         f"H {first['H']}, I = H, inference; no GPU, nothing timed. Text of the time loop, or of a launch where each "
         "timestep is one, as one warp runs it. unfused: without the library's kernel."],
        (10, 5.6),
    )  # fmt: skip
    pane = axes[0, 0]
    for y, row in enumerate(rows):
        total = of_a_step(row)
        for before, count, look in shares(row, total):
            pane.barh(y, count, 0.7, left=before, **look)
        pane.annotate(str(total), (total, y), xytext=(3, 0), textcoords="offset points", va="center")
    pane.set_yticks(range(len(rows)), [f"{row['form']}, {row['warps']} warps" for row in rows])
    pane.invert_yaxis()
    pane.set_xlabel("instructions")
    patches(found, LEGEND, 3)
    return found
