"""Measured rows (benchmarks/results/<gpu>/gru.csv): which a figure takes, what it says of them, how they look."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from benchmarks.cases import BASELINE
from benchmarks.summary import OURS
from tritongru.tools.style import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILION, Look

Row = dict[str, str]
PASSES = ("inference", "forward", "forward+backward")
DTYPES = ("bf16", "fp16", "fp32 (TF32)", "fp32 (IEEE)")  # as `dtype_of` has them
LINES: dict[str, Look] = {
    BASELINE: {"color": BLACK, "marker": "o", "ls": "--"},
    "step": {"color": ORANGE, "marker": "s"},
    "sequence": {"color": BLUE, "marker": "P"},
    OURS: {"color": GREEN, "marker": "X", "lw": 2.4},
    "step-recompute": {"color": ORANGE, "marker": "s", "ls": ":"},
    "sequence-recompute": {"color": BLUE, "marker": "P", "ls": ":"},
}
TENSORS = {  # colour and marker of each
    "output": (BLACK, "o"), "h_n": (GREY, "v"), "x": (ORANGE, "s"), "h_0": (SKY, "^"), "w_ih": (GREEN, "D"),
    "w_hh": (BLUE, "P"), "b_ih": (VERMILION, "X"), "b_hh": (PURPLE, "*"),
}  # fmt: skip
NAMES = {OURS: "tritongru (default)"}


def number(row: Row, name: str) -> float | None:
    """A figure of a row; None where it is empty."""
    return float(row[name]) if row[name] else None


def dtype_of(row: Row) -> str:
    """The dtype in words, products of float32 included."""
    return row["dtype"] + {"tf32": " (TF32)", "ieee": " (IEEE)"}.get(row["products"], "")


def input_of(row: Row) -> str:
    return "I = H" if row["I"] == row["H"] else f"I {row['I']}"


def hardware(rows: Sequence[Row]) -> str:
    """Where and with what rows were measured."""

    def all_of(name: str) -> str:
        return " / ".join(sorted({row[name] for row in rows}))

    commits = " / ".join(sorted({row["commit"][:8] for row in rows}))
    changed = " with changes" if any(row["dirty"] != "no" for row in rows) else ""
    days = sorted({row["date"][:10] for row in rows})
    software = {"driver": "driver", "torch": "torch", "triton": "Triton", "cudnn": "cuDNN"}
    rows = [{**row, "cudnn": _cudnn(row["cudnn"])} for row in rows]
    versions = [f"{name} {all_of(column)}" for column, name in software.items() if all_of(column) not in ("", "none")]
    return (
        f"Measured on {all_of('device')}, {', '.join(versions)}; commit {commits}{changed}, "
        f"{days[0] if len(days) == 1 else f'{days[0]} to {days[-1]}'}."
    )


def _cudnn(version: str) -> str:
    """91900, as PyTorch has it, in words: 9.19.0."""
    if not version.isdecimal() or int(version) < 90000:
        return version
    return f"{int(version) // 10000}.{int(version) // 100 % 100}.{int(version) % 100}"


def plain(rows: Iterable[Row]) -> list[Row]:
    """One layer, one direction, dense, no cell, L2 as the call before left it."""
    usual = {"layers": "1", "directions": "1", "packed": "no", "cell": "no", "l2": "warm"}
    return [row for row in rows if usual.items() <= row.items()]


def ok(rows: Iterable[Row]) -> list[Row]:
    return [row for row in rows if row["status"] == "ok"]


def richest(rows: Sequence[Any], same: Callable[[Any], object], of: Callable[[Any], object]) -> list[Any]:
    """Of the rows that agree in `same` those that differ most in `of`, and where several tie the most rows."""
    groups: dict[object, list[Any]] = defaultdict(list)
    for row in rows:
        groups[same(row)].append(row)
    return max(groups.values(), key=lambda group: (len({of(row) for row in group}), len(group)), default=[])


def ordered(values: Iterable[str], order: Sequence[str]) -> list[str]:
    """The distinct values, those in `order` first and as there."""
    found = list(dict.fromkeys(values))
    return [v for v in order if v in found] + sorted(v for v in found if v not in order)


def against_baseline(rows: Sequence[Row]) -> str:
    """A sentence of how `default` compares, losing cases first in mind."""
    speedups = [1 / ratio for row in rows if row["provider"] == OURS and (ratio := number(row, "ratio"))]
    if not speedups:
        return f"As they are called: the kernels and {BASELINE}, by H"
    lost = sum(s < 1 for s in speedups)
    where = f"slower in {lost} of {len(speedups)} cases" if lost else f"faster in all {len(speedups)} cases"
    return f"{NAMES[OURS]} against {BASELINE}: {where}, {min(speedups):.2g} to {max(speedups):.2g} times its speed"


def patches(found: Figure, looks: Mapping[str, Look], columns: int, edge: str = "white") -> None:
    """A legend below the figure: a patch of each look."""
    handles = [Patch(label=label, **{"edgecolor": edge, **look}) for label, look in looks.items()]
    found.legend(handles=handles, loc="outside lower center", ncols=columns)
