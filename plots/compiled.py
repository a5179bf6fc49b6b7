"""Figures of what the compiler made of the kernels: benchmarks/results/compiled.csv. No GPU, no clock."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.compiled import HIDDEN
from tritongru.planning import describe
from tritongru.planning.choose import off_chip
from tritongru.planning.problem import Recurrence
from tritongru.tools.style import BLUE, ORANGE, PALE, SKY, VERMILION, YELLOW, Look, figure

from .rows import Row, patches

B, DEVICE = 32, "h200"
REGISTERS = 255  # of a thread at most, on NVIDIA
DTYPES: dict[tuple[str, str], tuple[str, Look]] = {
    ("bf16", ""): ("bf16", {"facecolor": BLUE}),
    ("fp32", "tf32"): ("fp32 (TF32; sequence up to H 128 FMA)", {"facecolor": ORANGE, "hatch": "///"}),
}
BACKENDS = ("sequence", "step")
PASSES = ("forward", "backward")
# Instruction classes of SASS by what they do.
MIX: dict[str, tuple[tuple[str, ...], Look]] = {
    "matrix products": (("HMMA", "HGMMA", "UTCMMA"), {"facecolor": BLUE}),
    "shared memory": (("LDS", "LDSM", "STS", "STSM", "LDTM", "STTM"), {"facecolor": SKY, "hatch": "///"}),
    "global memory": (("LDG", "LDGSTS", "STG", "UTMALDG", "UTMASTG"), {"facecolor": ORANGE, "hatch": "..."}),
    "multiply-adds, exp, reciprocal": (("FFMA", "HFMA", "MUFU"), {"facecolor": YELLOW, "hatch": "xxx"}),
    "barriers, shuffles": (("BAR", "MEMBAR", "SHFL", "WARPGROUP"), {"facecolor": VERMILION, "hatch": "\\\\\\"}),
}
REST: Look = {"facecolor": PALE, "edgecolor": "none"}
LEGEND = {name: look for name, (_, look) in MIX.items()} | {"other: sums, addresses, masks, moves": REST}


def _kind(rows: Sequence[Row]) -> str:
    triton = ", ".join(sorted({row["triton"] for row in rows}))
    return f"Compiled with Triton {triton} for {rows[0]['target']}; no GPU, nothing timed."


def _of(rows: Sequence[Row], backend: str, kind: str, dtype: str, products: str) -> dict[int, Row]:
    """The rows of one kernel by H."""
    same = {"backend": backend, "kind": kind, "dtype": dtype, "products": products, "B": str(B)}
    return {int(row["H"]): row for row in rows if same.items() <= row.items()}


def _off_chip(H: int, dtype: str, products: str) -> bool:
    return off_chip(Recurrence(B, H, 1, dtype, products or "tf32", describe(DEVICE)), True) is not None


def draw_resources(rows: Sequence[Row]) -> Figure | None:
    """Registers and shared memory of the plans' kernels, by H."""
    rows = [row for row in rows if row["device"] == DEVICE]
    if not rows:
        return None
    device = describe(DEVICE)
    found, axes = figure(
        "sequence keeps its slice of W_h in registers, and in shared memory what these cannot hold; "
        "step keeps none of it",
        [f"Kernels of the plans for an {device.name}, B {B}, one direction, training: {BACKENDS[0]} (one launch for "
         f"all timesteps) and {BACKENDS[1]} (one per timestep).",
         f"{_kind(rows)} Dashed: what a thread, or a program, can have at most."],
        (10, 11), 4, 2, sharey="row",
    )  # fmt: skip
    limit = device.shared_per_program / 1024
    for pair, backend in enumerate(BACKENDS):
        for column, kind in enumerate(PASSES):
            registers, shared = axes[2 * pair, column], axes[2 * pair + 1, column]
            _bars(registers, rows, backend, kind, lambda row: int(row["registers"]), REGISTERS)
            _bars(shared, rows, backend, kind, lambda row: int(row["shared_bytes"]) / 1024, limit)
            registers.set_title(f"{backend}, {kind}: registers of a thread")
            shared.set_title(f"{backend}, {kind}: shared memory of a program")
        axes[2 * pair, 0].set_ylabel("registers")
        axes[2 * pair + 1, 0].set_ylabel("KiB")
    for pane in axes[-1]:
        pane.set_xlabel("H, hidden units")
    patches(found, dict(DTYPES.values()), 2)
    return found


def _bars(
    axes: Axes, rows: Sequence[Row], backend: str, kind: str, value: Callable[[Row], float], limit: float
) -> None:
    for i, ((dtype, products), (_, look)) in enumerate(DTYPES.items()):
        of_size = _of(rows, backend, kind, dtype, products)
        places = np.arange(len(HIDDEN)) + 0.4 * i - 0.2
        for x, H in zip(places, HIDDEN, strict=True):
            if H in of_size:
                found = value(of_size[H])
                axes.bar(x, found, 0.38, edgecolor="white", **look)
                axes.annotate(
                    f"{found:.0f}", (x, found), xytext=(0, 2), textcoords="offset points", ha="center", fontsize=9,
                    bbox={"facecolor": "white", "edgecolor": "none", "pad": 0}, zorder=2.5,
                )  # fmt: skip
                spilled = of_size[H]["spill_bytes"]
                if spilled != "0" and limit == REGISTERS:
                    axes.annotate(
                        f"spills {spilled} bytes", (x, found + 28), xytext=(8, 34), textcoords="offset points",
                        arrowprops={"arrowstyle": "-"},
                    )  # fmt: skip
            else:
                why = "does not fit" if backend == "sequence" and _off_chip(H, dtype, products) else "no row"
                axes.annotate(why, (x, 6), ha="center", va="bottom", rotation=90, fontsize=9)
    axes.axhline(limit, color="#404040", lw=1, ls="--", zorder=0)
    axes.set_ylim(0, 1.2 * limit)
    axes.set_xlim(-0.6, len(HIDDEN) - 0.4)
    axes.set_xticks(range(len(HIDDEN)), [str(H) for H in HIDDEN])


def draw_instructions(rows: Sequence[Row]) -> Figure | None:
    """What the time loop of `sequence` consists of, by H."""
    rows = [r for r in rows if r["device"] == DEVICE and r["backend"] == "sequence" and r["counted"] == "loop"]
    if not rows:
        return None
    found, axes = figure(
        "Most instructions of a timestep of sequence are neither products nor memory accesses",
        [f"Text of the loop over time, as one warp runs it, with the wait for other programs. Plans for an "
         f"{describe(DEVICE).name}, B {B}, training.",
         _kind(rows)],
        (10, 8.4), 2, 2, sharey=True,
    )  # fmt: skip
    for column, kind in enumerate(PASSES):
        for pane, ((dtype, products), (label, _)) in zip(axes[:, column], DTYPES.items(), strict=True):
            of_size = _of(rows, "sequence", kind, dtype, products)
            _stack(pane, of_size, [H for H in HIDDEN if _off_chip(H, dtype, products)])
            pane.set_title(f"{kind}, {label}")
    for pane in axes[:, 0]:
        pane.set_ylabel("instructions")
    for pane in axes[-1]:
        pane.set_xlabel("H, hidden units")
    patches(found, LEGEND, 3)
    return found


def shares(row: Row, total: int) -> Iterator[tuple[int, int, Look]]:
    """A row's `total` instructions by MIX and the rest: how many come before, how many there are, and their look."""
    before = 0
    for classes, look in MIX.values():
        count = sum(int(row[name]) for name in classes)
        yield before, count, {"edgecolor": "white", "linewidth": 0.4, **look}
        before += count
    yield before, total - before, REST


def _stack(axes: Axes, of_size: dict[int, Row], too_large: Sequence[int]) -> None:
    for x, H in enumerate(HIDDEN):
        if H not in of_size:
            axes.annotate(
                "does not fit" if H in too_large else "no row", (x, 30), ha="center", va="bottom", rotation=90
            )
            continue
        row = of_size[H]
        total = int(row["loop_instructions"])
        for before, count, look in shares(row, total):
            axes.bar(x, count, 0.7, bottom=before, **look)
        axes.annotate(str(total), (x, total), xytext=(0, 2), textcoords="offset points", ha="center")
    axes.set_xlim(-0.6, len(HIDDEN) - 0.4)
    axes.set_xticks(range(len(HIDDEN)), [str(H) for H in HIDDEN])
