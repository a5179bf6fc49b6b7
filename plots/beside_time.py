"""Figures of measured rows beside times: memory, errors, and how far from the card's ceilings."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, StrMethodFormatter

from benchmarks.cases import BASELINE
from benchmarks.summary import OURS
from benchmarks.traffic import step_traffic
from benchmarks.work import RULE
from tritongru.planning import Problem, choose
from tritongru.planning.choose import TRITON_BACKENDS, unserved_by
from tritongru.planning.devices import _described
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
    figure,
    log_x,
    log_y,
)

from .measured import DTYPES, LINES, NAMES, Ceilings, Row, dtype_of, hardware, number, ok, ordered, plain, richest

MOST = 12  # cases in a figure of bars
STORED = (BASELINE, "step", "step-recompute", "sequence", "sequence-recompute", OURS)


def _more_or_less(chosen: Sequence[Row], of_baseline: dict[str, Row]) -> str:
    """In how many cases `default` keeps less than nn.GRU, and in how many it needs more at the peak."""
    ours = [row for row in chosen if row["provider"] == OURS]
    less = sum(float(row["saved_mib"]) < float(of_baseline[row["case"]]["saved_mib"]) for row in ours)
    more = sum(float(row["peak_mib"]) > float(of_baseline[row["case"]]["peak_mib"]) for row in ours)
    return (
        f"Memory of training: {NAMES[OURS]} keeps less than {BASELINE} in {less} of {len(ours)} cases, and needs more "
        f"at the peak in {more}"
    )


def draw_measured_memory(rows: Sequence[Row], ceilings: Ceilings) -> Figure | None:
    """What forward keeps and what forward and backward need at once, against nn.GRU."""
    usable = [
        row for row in ok(plain(rows))
        if row["pass"] == "forward+backward" and row["provider"] in STORED and row["saved_mib"] and row["peak_mib"]
    ]  # fmt: skip
    of_baseline = {row["case"]: row for row in usable if row["provider"] == BASELINE}
    by_peak = sorted(of_baseline, key=lambda case: float(of_baseline[case]["peak_mib"]))
    cases = [row["case"] for row in usable if "recompute" in row["provider"] and row["case"] in of_baseline][:MOST]
    rest = [case for case in by_peak if case not in cases]
    places = np.linspace(0, len(rest) - 1, min(len(rest), MOST - len(set(cases)))).round().astype(int)
    cases = sorted({*cases, *(rest[place] for place in places)}, key=by_peak.index)
    if not cases:
        return None
    chosen = [row for row in usable if row["case"] in cases]
    some = f"; {len(cases)} of {len(of_baseline)} cases, small to large" if len(cases) < len(of_baseline) else ""
    found, axes = figure(
        _more_or_less(chosen, of_baseline),
        [f"MiB by torch's allocator, beyond what lay there before: kept between forward and backward without the "
         f"results; at most during both, results and gradients included{some}.", hardware(chosen)],
        (10, 2.6 + 0.75 * len(cases)), 1, 2, sharey=True,
    )  # fmt: skip
    providers = ordered((row["provider"] for row in chosen), STORED)
    for pane, name, title in ((axes[0, 0], "saved_mib", "kept for backward"), (axes[0, 1], "peak_mib", "peak")):
        for provider in providers:
            y = (0.5 - (providers.index(provider) + 0.5) / len(providers)) * 0.7  # each a little lower than the last
            points = [(float(r[name]), cases.index(r["case"]) + y) for r in chosen if r["provider"] == provider]
            style = LINES[provider]
            pane.plot(*zip(*points, strict=True), ls="", marker=style["marker"], ms=6, color=style["color"],
                      mfc="none" if "recompute" in provider else style["color"],
                      label=NAMES.get(provider, provider))  # fmt: skip
            for mib, place in points:
                pane.annotate(f"{mib:.3g}", (mib, place), xytext=(7, 0), textcoords="offset points", va="center",
                              fontsize=8.5)  # fmt: skip
        pane.set_title(title)
        every = [float(row[name]) for row in chosen]
        if min(every) > 0:
            pane.set_xscale("log")
            pane.set_xlim(min(every) / 1.5, 2 * max(every))  # room for the last figures
        else:  # recompute keeps nothing
            pane.set_xscale("symlog", linthresh=1)
            pane.set_xlim(-0.15, 3 * max(every))
        pane.xaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
        pane.set_xlabel("MiB")
        for y in range(1, len(cases)):
            pane.axhline(y - 0.5, color=PALE, lw=0.8, zorder=0)
    axes[0, 0].set_yticks(range(len(cases)), cases)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    found.legend(handles, labels, loc="outside lower center", ncols=3)
    return found


TENSORS = {
    "output": (BLACK, "o"), "h_n": (GREY, "v"), "x": (ORANGE, "s"), "h_0": (SKY, "^"), "w_ih": (GREEN, "D"),
    "w_hh": (BLUE, "P"), "b_ih": (VERMILION, "X"), "b_hh": (PURPLE, "*"),
}  # fmt: skip


def draw_accuracy(rows: Sequence[Row], ceilings: Ceilings) -> Figure | None:
    """Errors against float64: ours over nn.GRU's, by tensor and dtype."""
    usable = [row for row in rows if row["status"] in ("ok", "wrong") and row["pass"] != "streaming"]
    of_baseline = {row["case"]: row for row in usable if row["provider"] == BASELINE and row["error_output"]}
    pairs: dict[str, list[tuple[Row, Row]]] = defaultdict(list)
    seen = set()
    for row in usable:
        key = row["case"], row["provider"]
        if row["provider"] in TRITON_BACKENDS and row["case"] in of_baseline and key not in seen:
            seen.add(key)  # every pass of a provider has the same errors
            pairs[dtype_of(row)].append((of_baseline[row["case"]], row))
    if not pairs:
        return None
    chosen = [row for pair in pairs.values() for both in pair for row in both]
    dtypes = ordered(pairs, DTYPES)
    rows_of_panes = -(-len(dtypes) // 2)
    both = [
        (x, y) for some in pairs.values() for theirs, ours in some for tensor in TENSORS
        if (x := number(theirs, f"error_{tensor}")) and (y := number(ours, f"error_{tensor}"))
    ]  # fmt: skip
    excess = [y / x - 1 for x, y in both if y > x]
    by = f", by {100 * max(excess):.2g} % at most" if excess else ""
    found, axes = figure(
        f"Errors against float64: {len(excess)} of {len(both)} are larger than {BASELINE}'s{by}",
        ["RMS error over the tensor's RMS, a point for each tensor of a case: output, h_n, and the gradients of the "
         f"others; step and sequence. Solid line: as large as {BASELINE}'s. Dashed: the rule, {RULE:g} times that or a "
         "floor of rounding.", hardware(chosen)],
        (10, 1.9 + 4.3 * rows_of_panes), rows_of_panes, min(2, len(dtypes)),
    )  # fmt: skip
    for pane in axes.flat[len(dtypes) :]:
        pane.remove()
    for pane, dtype in zip(axes.flat, dtypes, strict=False):
        every = []
        for tensor, (colour, marker) in TENSORS.items():
            points = [
                (x, y) for theirs, ours in pairs[dtype]
                if (x := number(theirs, f"error_{tensor}")) and (y := number(ours, f"error_{tensor}"))
            ]  # fmt: skip
            every += points
            if points:
                pane.plot(*zip(*points, strict=True), marker, ms=5, color=colour, alpha=0.6, label=tensor)
        smallest, largest = (math.log10(of(map(of, every))) for of in (min, max))
        ends = 10.0 ** np.array([math.floor(smallest), math.ceil(largest)])
        pane.plot(ends, ends, color=GREY, lw=1, label="as large")
        pane.plot(ends, RULE * ends, color=BLACK, lw=1.2, ls="--", label=f"rule: {RULE:g} times")
        pane.set(xscale="log", yscale="log", xlim=ends, ylim=ends)
        pane.set(xlabel=f"error of {BASELINE}", ylabel="error of tritongru")
        for axis in (pane.xaxis, pane.yaxis):
            axis.set_minor_formatter(NullFormatter())
        pane.set_aspect("equal")
        over = sum(y > RULE * x for x, y in every)
        pane.set_title(f"{dtype}: {over} of {len(every):,} above the rule's line")
    handles, labels = axes.flat[0].get_legend_handles_labels()
    found.legend(handles, labels, loc="outside lower center", ncols=5)
    return found


PRODUCTS = {"fp32 (TF32)": "tf32_tflops", "fp32 (IEEE)": "fma_tflops"}  # else half precision


def draw_roofline(rows: Sequence[Row], ceilings: Ceilings) -> Figure | None:
    """Achieved rate of the recurrence's products against flops per byte read, under the card's measured ceilings."""
    device = _described(rows[0]["device"]) if rows else None
    needed = ("l2_read_tb_s", "dram_tb_s", "half_tflops", "tf32_tflops", "fma_tflops", "mma_share")
    if device is None or any(name not in ceilings for name in needed):
        return None
    points: dict[str, list[tuple[float, float, str]]] = defaultdict(list)
    chosen, most = [], 0.0
    usable = [r for r in ok(plain(rows)) if r["provider"] in TRITON_BACKENDS and r["pass"] == "inference"]
    for row in richest([r for r in usable if r["T"] != "1"], lambda row: row["T"], lambda row: row["case"]):
        problem = Problem(
            batch=int(row["B"]), time=int(row["T"]), input_size=int(row["I"]), hidden_size=int(row["H"]),
            dtype=row["dtype"], training=False, precision=row["products"] or "tf32",
        )  # fmt: skip
        us = number(row, "device_us")
        if us is None or unserved_by(row["provider"], problem, device):  # the plan may have changed since
            continue
        read_bytes, flops = step_traffic(choose(problem, device, row["provider"]))
        rate = flops * problem.time / us / 1e6  # Tflop/s
        intensity = flops / read_bytes
        products = ceilings[PRODUCTS.get(dtype_of(row), "half_tflops")]
        most = max(most, rate / min(intensity * ceilings["l2_read_tb_s"], products))
        points[row["provider"]].append((intensity, rate, dtype_of(row)))
        chosen.append(row)
    if not points:
        return None
    found, axes = figure(
        f"The recurrence's products reach at most {100 * most:.0f} % of what L2 and the products allow",
        ["Flops of the products with W_h only, time of the whole call on the device, the input projection's included; "
         f"inference, T {chosen[0]['T']}. Bytes: all that the programs read in a step. Ceilings: of the same card.",
         hardware(chosen)],
        (10, 6.2),
    )  # fmt: skip
    pane = axes[0, 0]
    intensities = [x for some in points.values() for x, *_ in some]
    x = np.geomspace(min(intensities) / 3, max(intensities) * 12, 200)
    peak = ceilings["half_tflops"]
    roofs = (("L2", "l2_read_tb_s", {"color": BLACK}), ("DRAM", "dram_tb_s", {"color": GREY, "ls": "--"}))
    for name, field, style in roofs:
        bandwidth = ceilings[field]
        pane.plot(x, np.minimum(x * bandwidth, peak), label=f"{name}: {bandwidth:.3g} TB/s", **style)
    for name, rate in (
        ("half precision, warp-group products", peak),
        ("half precision, warp products (tiles of 16 rows)", peak * ceilings["mma_share"]),
        ("TF32, warp products", ceilings["tf32_tflops"] * ceilings["mma_share"]),
        ("float32 without matrix units", ceilings["fma_tflops"]),
    ):
        pane.axhline(rate, color=PALE, lw=1, zorder=0)
        left = rate / ceilings["l2_read_tb_s"] > 30 * x[0]  # where no roof crosses the words
        pane.annotate(f"{name}: {rate:,.0f} Tflop/s", (x[0 if left else -1], rate), xytext=(4 if left else -4, 2),
                      textcoords="offset points", ha="left" if left else "right", fontsize=9,
                      color="#404040")  # fmt: skip
    fills = {"bf16": "full", "fp16": "left", "fp32 (TF32)": "none", "fp32 (IEEE)": "top"}
    for provider, some in points.items():
        for dtype in ordered((dtype for *_, dtype in some), tuple(fills)):
            at = [(a, b) for a, b, d in some if d == dtype]
            pane.plot(*zip(*at, strict=True), ls="", ms=8, marker=LINES[provider]["marker"],
                      color=LINES[provider]["color"], fillstyle=fills[dtype], markerfacecoloralt="white",
                      label=f"{provider}, {dtype}")  # fmt: skip
    log_x(pane, "flop per byte read by the programs")
    log_y(pane, "Tflop/s")
    pane.set_xlim(x[0], x[-1])
    found.legend(*pane.get_legend_handles_labels(), loc="outside right center")
    return found
