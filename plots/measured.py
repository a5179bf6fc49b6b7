"""Figures of measured rows: benchmarks/results/<gpu>/gru.csv and ceilings.csv. Each takes the rows of one GPU."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from benchmarks.cases import BASELINE
from benchmarks.summary import OURS, compared
from tritongru.tools.style import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PALE,
    PURPLE,
    SKY,
    VERMILION,
    Look,
    figure,
    log_y,
    sizes_axis,
)

Row = dict[str, str]
Ceilings = dict[str, float]
PASSES = ("inference", "forward", "forward+backward")
DTYPES = ("bf16", "fp16", "fp32 (TF32)", "fp32 (IEEE)")  # as `dtype_of` has them
LINES: dict[str, Look] = {
    BASELINE: {"color": BLACK, "marker": "o", "ls": "--"},
    "step": {"color": ORANGE, "marker": "s"},
    "sequence": {"color": BLUE, "marker": "P"},
    OURS: {"color": GREEN, "marker": "X", "lw": 2.4},
    "cell-loop": {"color": PURPLE, "marker": "<", "ls": "-."},
    "torchrl": {"color": SKY, "marker": ">", "ls": "-."},
    "step-recompute": {"color": ORANGE, "marker": "s", "ls": ":"},
    "sequence-recompute": {"color": BLUE, "marker": "P", "ls": ":"},
    "nn.LSTM": {"color": VERMILION, "marker": "D"},
    "nn.RNN": {"color": PURPLE, "marker": "^"},
}
NAMES = {OURS: "tritongru (default)"}
LIMIT: Look = {"color": GREY, "lw": 1.4, "ls": ":"}


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


def richest(rows: Sequence[Row], same: Callable[[Row], object], of: Callable[[Row], object]) -> list[Row]:
    """Of the rows that agree in `same` those that differ most in `of`, and where several tie the most rows."""
    groups: dict[object, list[Row]] = defaultdict(list)
    for row in rows:
        groups[same(row)].append(row)
    return max(groups.values(), key=lambda group: (len({of(row) for row in group}), len(group)), default=[])


def ordered(values: Iterable[str], order: Sequence[str]) -> list[str]:
    """The distinct values, those in `order` first and as there."""
    found = list(dict.fromkeys(values))
    return [v for v in order if v in found] + sorted(v for v in found if v not in order)


def _grid(rows: Sequence[Row]) -> tuple[list[str], list[str]]:
    """Passes and dtypes of small multiples."""
    return ordered((row["pass"] for row in rows), PASSES), ordered(map(dtype_of, rows), DTYPES)


def _panes(
    rows: Sequence[Row], message: str, conditions: Sequence[str], draw: Callable[[Axes, list[Row]], None]
) -> Figure:
    """Small multiples, a row per pass and a column per dtype, with one legend for all."""
    passes, dtypes = _grid(rows)
    height = 2.1 + 2.9 * len(passes)
    found, axes = figure(message, conditions, (10, height), len(passes), len(dtypes), sharex=True, sharey="row")
    for i, pass_ in enumerate(passes):
        for j, dtype in enumerate(dtypes):
            pane = axes[i, j]
            draw(pane, [row for row in rows if row["pass"] == pass_ and dtype_of(row) == dtype])
        axes[i, 0].set_ylabel(f"{pass_}\nµs per timestep")
    for pane, dtype in zip(axes[0], dtypes, strict=True):
        pane.set_title(dtype)
    for pane in axes.flat:
        pane.label_outer()
    handles: dict[str, Line2D] = {}
    for pane in axes.flat:
        for handle, label in zip(*pane.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    found.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(4, len(handles)))
    return found


def _apart(sizes: Sequence[int], columns: int) -> list[int]:
    """Of rising sizes those whose labels do not touch on a logarithmic axis, one of so many side by side."""
    found = [sizes[0]]
    for size in sizes[1:]:
        if math.log2(size / found[-1]) >= math.log2(sizes[-1] / sizes[0]) * columns / 21:
            found.append(size)
    return found


def _times(axes: Axes, rows: Sequence[Row], x: str, providers: Sequence[str], limit: bool) -> None:
    """us per step of each provider against a size, p20 to p80 as a band, and the limit."""
    for provider in ordered((row["provider"] for row in rows), providers):
        of_provider = sorted((row for row in rows if row["provider"] == provider), key=lambda row: int(row[x]))
        sizes = [int(row[x]) for row in of_provider]
        steps = [float(row["us_per_step"]) / float(row["p50_us"]) for row in of_provider]
        p20, p50, p80 = (
            [float(row[name]) * step for row, step in zip(of_provider, steps, strict=True)]
            for name in ("p20_us", "p50_us", "p80_us")
        )
        style: Look = {"ms": 6, "lw": 1.6, **LINES[provider]}
        axes.plot(sizes, p50, label=NAMES.get(provider, provider), **style)
        axes.fill_between(sizes, p20, p80, color=style["color"], alpha=0.2, lw=0)
    if limit:
        least: dict[int, float] = {}
        for row in rows:
            if (us := number(row, "limit_us")) is not None:
                step = us / (int(row["T"]) * int(row["layers"]))
                least[int(row[x])] = min(step, least.get(int(row[x]), math.inf))
        if least:
            axes.plot(*zip(*sorted(least.items()), strict=True), label="limit by the card's ceilings", **LIMIT)
    log_y(axes, "")


def _against_baseline(rows: Sequence[Row]) -> str:
    """A sentence of how `default` compares, losing cases first in mind."""
    speedups = [1 / ratio for row in rows if row["provider"] == OURS and (ratio := number(row, "ratio"))]
    if not speedups:
        return f"{NAMES[OURS]} and {BASELINE} side by side"
    lost = sum(s < 1 for s in speedups)
    where = f"slower in {lost} of {len(speedups)} cases" if lost else f"faster in all {len(speedups)} cases"
    return f"{NAMES[OURS]} against {BASELINE}: {where}, {min(speedups):.2g} to {max(speedups):.2g} times its speed"


COMPARED = (BASELINE, "cell-loop", "torchrl", "step", "sequence", OURS)
NETWORKS = (BASELINE, "nn.LSTM", "nn.RNN", OURS)


def _curves(rows: Sequence[Row], x: str) -> list[Row]:
    """The rows of those panels that have several sizes to draw a line through, and not far fewer than the others."""
    sizes: dict[object, set[str]] = defaultdict(set)
    for row in rows:
        sizes[row["pass"], dtype_of(row)].add(row[x])
    enough = max(2, max(map(len, sizes.values()), default=0) / 2)
    return [row for row in rows if len(sizes[row["pass"], dtype_of(row)]) >= enough]


def _same_shape(row: Row) -> object:
    return row["T"], row["B"], input_of(row)


def _per_step(
    chosen: Sequence[Row], x: str, what: str, held: str, message: str, providers: Sequence[str], limit: bool
) -> Figure:
    """us per step over the sizes of column `x`; `held`: what is the same in all rows."""
    sizes, columns = sorted({int(row[x]) for row in chosen}), len(_grid(chosen)[1])

    def draw(axes: Axes, some: list[Row]) -> None:
        _times(axes, some, x, providers, limit)
        sizes_axis(axes, _apart(sizes, columns), f"{x}, {what}")

    conditions = [
        f"Microseconds per timestep, a whole call's over T; median, band p20 to p80. {held}, one layer, one direction, "
        "L2 warm.",
        hardware(chosen),
    ]
    return _panes(chosen, message, conditions, draw)


def _step_time(rows: Sequence[Row], providers: Sequence[str], message: str, limit: bool) -> Figure | None:
    usable = [r for r in ok(plain(rows)) if r["provider"] in providers and r["pass"] in PASSES and int(r["T"]) > 1]
    chosen = _curves(richest(usable, _same_shape, lambda row: (dtype_of(row), row["H"])), "H")
    if not chosen:
        return None
    held = f"T {chosen[0]['T']}, B {chosen[0]['B']}, {input_of(chosen[0])}"
    return _per_step(chosen, "H", "hidden units", held, message or _against_baseline(chosen), providers, limit)


def draw_step_time(rows: Sequence[Row], ceilings: Ceilings) -> Figure | None:
    """us per step against H, of one T and B, with the baseline and the limit."""
    return _step_time(rows, COMPARED, "", limit=True)


def draw_networks(rows: Sequence[Row], ceilings: Ceilings) -> Figure | None:
    """The same of GRU, LSTM and plain RNN."""
    others = {row["case"] for row in ok(rows) if row["provider"] in ("nn.LSTM", "nn.RNN")}
    rows = [row for row in rows if row["case"] in others]
    return _step_time(rows, NETWORKS, "A GRU against an LSTM and a plain RNN of the same H", limit=False)


def draw_time_scaling(rows: Sequence[Row], ceilings: Ceilings) -> Figure | None:
    """us per step against T, of one B and H."""
    usable = [row for row in ok(plain(rows)) if row["provider"] in COMPARED and row["pass"] in PASSES]
    chosen = richest(usable, lambda row: (row["B"], row["H"], row["I"]), lambda row: (dtype_of(row), row["T"]))
    chosen = _curves(chosen, "T")
    if not chosen:
        return None
    held = f"B {chosen[0]['B']}, H {chosen[0]['H']}, I {chosen[0]['I']}"
    message = "What a call costs once, and what it costs per timestep"
    return _per_step(chosen, "T", "timesteps", held, message, COMPARED, limit=True)


MARKS = {"wrong": "wrong", "out of memory": "out of\nmem.", "unserved": "not\nserved", "error": "error"}


def draw_speedup(rows: Sequence[Row], ceilings: Ceilings) -> Figure | None:
    """nn.GRU's time over default's, over H and B, for each dtype, in inference and training."""
    passes = [pass_ for pass_ in PASSES if pass_ != "forward"]  # of which few cases are measured
    beside = compared(plain(rows))
    graphs = {(pair.ours["case"], pair.ours["pass"]): pair.in_a_graph for pair in beside}
    known = {(row["case"], row["pass"]) for row in rows if row["provider"] == OURS}
    ours = [row for row in plain(rows) if row["provider"] == OURS]
    ours += [pair.ours for pair in beside if (pair.ours["case"], pair.ours["pass"]) not in known]  # the fastest kernel
    usable = [row for row in ours if row["pass"] in passes and int(row["T"]) > 1]
    chosen = richest(usable, lambda row: (row["T"], input_of(row)), lambda row: (dtype_of(row), row["B"], row["H"]))
    ratios = [ratio for row in ok(chosen) if (ratio := number(row, "ratio"))]
    if not ratios:
        return None
    sizes, batches = (sorted({int(row[name]) for row in chosen}) for name in ("H", "B"))
    _, dtypes = _grid(chosen)
    if 2 * len(chosen) < len(sizes) * len(batches) * len(dtypes) * len({row["pass"] for row in chosen}):
        return None  # a map of what was not measured
    far = max(1.0, *(abs(math.log2(ratio)) for ratio in ratios))  # symmetrical about 1; at least from half to twice
    first = chosen[0]
    found, axes = figure(
        _against_baseline(ok(chosen)),
        [f"{BASELINE}'s time over {NAMES[OURS]}'s (of the grid: over its fastest kernel's), in the same rounds, each "
         "as it is called, and below it both in a CUDA graph: above 1 is faster; hatched: slower; –: not measured. "
         f"T {first['T']}, {input_of(first)}, one layer, one direction, L2 warm.", hardware(chosen)],
        (10, 2.2 + len(dtypes) * (0.8 + 0.4 * len(batches))), len(dtypes), len(passes), sharex=True, sharey=True,
    )  # fmt: skip
    for i, dtype in enumerate(dtypes):
        for j, pass_ in enumerate(passes):
            pane = axes[i, j]
            cells = {(int(r["H"]), int(r["B"])): r for r in chosen if r["pass"] == pass_ and dtype_of(r) == dtype}
            image = _heat_map(pane, cells, graphs, sizes, batches, far)
            pane.set_title(f"{dtype}, {pass_}")
            pane.label_outer()
    bar = found.colorbar(image, ax=axes, label=f"times as fast as {BASELINE}", shrink=0.8, aspect=30)
    ticks = range(-math.floor(far), math.floor(far) + 1)
    bar.set_ticks(list(ticks), labels=[f"{2.0**tick:g}" for tick in ticks])
    return found


def _heat_map(
    axes: Axes, cells: dict[tuple[int, int], Row], graphs: dict[tuple[str, str], float | None], sizes: Sequence[int],
    batches: Sequence[int], far: float,
) -> AxesImage:  # fmt: skip
    values = np.full((len(batches), len(sizes)), np.nan)
    for y, B in enumerate(batches):
        for x, H in enumerate(sizes):
            look: Look = {"color": BLACK}
            row = cells.get((H, B))
            ratio = number(row, "ratio") if row and row["status"] == "ok" else None
            if row is None:
                axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, hatch="....", edgecolor=PALE, lw=0))
                text = "–"
            elif ratio is None:
                axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=PALE, edgecolor="white"))
                text = MARKS.get(row["status"], "no\nbaseline")
            else:
                values[y, x] = -math.log2(ratio)
                graph = graphs.get((row["case"], row["pass"]))
                text = "\n".join(f"{1 / r:.{2 if r > 1 else 1}f}" for r in (ratio, graph) if r)
                slower = ratio > 1 or (graph or 0) > 1
                if abs(values[y, x]) > 0.65 * far:
                    look["color"] = "white"
                if slower:
                    axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, hatch="////", edgecolor="#404040",
                                             lw=1.2))  # fmt: skip
                    look |= {"weight": "bold", "color": BLACK,
                             "bbox": {"facecolor": "white", "edgecolor": "none", "pad": 1}}  # fmt: skip
            axes.text(x, y, text, ha="center", va="center", fontsize=9 if ratio else 7.5, **look)
    image = axes.imshow(values, cmap="RdBu", norm=Normalize(-far, far), aspect="auto", origin="lower")
    axes.set_xticks(range(len(sizes)), [str(size) for size in sizes])
    axes.set_yticks(range(len(batches)), [str(batch) for batch in batches])
    axes.set_xlabel("H, hidden units")
    axes.set_ylabel("B, batch")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    return image


def draw_streaming(rows: Sequence[Row], ceilings: Ceilings) -> Figure | None:
    """Latency of one step at a time: median and p99."""
    chosen = [row for row in ok(rows) if row["pass"] == "streaming" and row["p99_us"] and row["provider"] in LINES]
    chosen = richest(chosen, lambda row: (row["B"], row["layers"]), lambda row: row["case"])
    if not chosen:
        return None
    sizes = sorted({int(row["H"]) for row in chosen})
    _, dtypes = _grid(chosen)
    ways = [(provider, cell) for cell in ("no", "yes") for provider in ordered(LINES, COMPARED)]
    ways = [way for way in ways if any(way == (row["provider"], row["cell"]) for row in chosen)]
    group = len(ways) + 1  # a line for the name of the group
    found, axes = figure(
        "One timestep at a time: how long a call takes, in the median and for one in a hundred",
        [f"Microseconds per call from an idle device until the result is there; bar: median, whisker: up to p99. T 1, "
         f"B {chosen[0]['B']}, I = H, one layer; cell: GRUCell.", hardware(chosen)],
        (10, 2.0 + 0.24 * group * len(sizes)), 1, len(dtypes), sharey=True, sharex=True,
    )  # fmt: skip
    for pane, dtype in zip(axes[0], dtypes, strict=True):
        for row in chosen:
            if dtype_of(row) != dtype:
                continue
            way = row["provider"], row["cell"]
            y = group * sizes.index(int(row["H"])) + 1 + ways.index(way)
            p50, p99 = float(row["p50_us"]), float(row["p99_us"])
            pane.barh(y, p50, 0.8, facecolor=LINES[way[0]]["color"], edgecolor="white",
                      hatch="///" if way[1] == "yes" else None)  # fmt: skip
            pane.plot([p50, p99], [y, y], color=GREY, lw=1.5, marker="|", ms=8)
            pane.annotate(f"{p50:.3g}, p99 {p99:.3g}", (p99, y), xytext=(6, 0), textcoords="offset points",
                          va="center", fontsize=9)  # fmt: skip
        for i, H in enumerate(sizes):
            pane.annotate(f"H {H}", (0, group * i), xytext=(4, 0), textcoords="offset points", va="center",
                          weight="bold")  # fmt: skip
        pane.set_title(dtype)
        pane.set_xlabel("µs per call")
    names = [NAMES.get(provider, provider) + (", cell" if cell == "yes" else "") for provider, cell in ways]
    axes[0, 0].set_yticks([group * i + 1 + j for i in range(len(sizes)) for j in range(len(ways))], names * len(sizes))
    axes[0, 0].set_ylim(group * len(sizes), -0.8)
    longest = max(float(row["p99_us"]) for row in chosen)
    axes[0, 0].set_xlim(0, longest * (1.15 + 0.2 * len(dtypes)))  # room for the words behind the bars
    for pane in axes[0]:
        pane.tick_params(axis="y", length=0)
    return found
