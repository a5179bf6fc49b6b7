"""Figures of measured rows, each of those of one GPU."""

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle
from matplotlib.ticker import NullFormatter, StrMethodFormatter

from benchmarks.cases import BASELINE
from benchmarks.summary import OURS, Compared, compared
from benchmarks.traffic import step_traffic
from benchmarks.work import RULE
from benchmarks.workloads import BY_CASE
from tritongru.planning import Problem, choose
from tritongru.planning.choose import TRITON_BACKENDS, unserved_by
from tritongru.planning.devices import DEVICES, product_key
from tritongru.tools.style import BLACK, GREY, PALE, Look, figure

from .axes import log_axis, sizes_axis
from .rows import (
    DTYPES,
    LINES,
    NAMES,
    PASSES,
    TENSORS,
    Row,
    against_baseline,
    dtype_of,
    hardware,
    input_of,
    number,
    ok,
    ordered,
    plain,
    richest,
)

COMPARED = (BASELINE, "step", "sequence", OURS)


def draw_step_time(rows: Sequence[Row]) -> Figure | None:
    """us per step against H, of one T and B: a pane for each pass and dtype with several H."""
    usable = [r for r in ok(plain(rows)) if r["provider"] in COMPARED and r["pass"] in PASSES and int(r["T"]) > 1]
    usable = [row for row in usable if row["p50_us"]]
    chosen = richest(usable, lambda row: (row["T"], row["B"], input_of(row)), lambda row: (dtype_of(row), row["H"]))
    sizes_of: dict[object, set[str]] = defaultdict(set)
    for row in chosen:
        sizes_of[row["pass"], dtype_of(row)].add(row["H"])
    chosen = [row for row in chosen if len(sizes_of[row["pass"], dtype_of(row)]) > 1]
    if not chosen:
        return None
    passes, dtypes = ordered((row["pass"] for row in chosen), PASSES), ordered(map(dtype_of, chosen), DTYPES)
    sizes = sorted({int(row["H"]) for row in chosen})
    found, axes = figure(
        against_baseline(chosen),
        ["Microseconds per timestep, a whole call's over T; median, band p20 to p80. "
         f"T {chosen[0]['T']}, B {chosen[0]['B']}, {input_of(chosen[0])}, one layer, one direction, L2 warm.",
         hardware(chosen)],
        (10, 2.1 + 2.9 * len(passes)), len(passes), len(dtypes), sharex=True, sharey="row",
    )  # fmt: skip
    for i, pass_ in enumerate(passes):
        for pane, dtype in zip(axes[i], dtypes, strict=True):
            _lines(pane, [row for row in chosen if (row["pass"], dtype_of(row)) == (pass_, dtype)])
            sizes_axis(pane, _apart(sizes, len(dtypes)), "H, hidden units")
            pane.set_title(dtype if i == 0 else "")
        axes[i, 0].set_ylabel(f"{pass_}\nµs per timestep")
    handles = {}
    for pane in axes.flat:
        pane.label_outer()
        handles |= {label: handle for handle, label in zip(*pane.get_legend_handles_labels(), strict=True)}
    found.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4)
    return found


def _apart(sizes: Sequence[int], columns: int) -> list[int]:
    """Of rising sizes those whose labels do not touch on a logarithmic axis, one of so many side by side."""
    found = [sizes[0]]
    for size in sizes[1:]:
        if math.log2(size / found[-1]) >= math.log2(sizes[-1] / sizes[0]) * columns / 21:
            found.append(size)
    return found


def _lines(axes: Axes, rows: Sequence[Row]) -> None:
    """us per step of each provider against H, p20 to p80 as a band."""
    for provider in ordered((row["provider"] for row in rows), COMPARED):
        of_provider = sorted((row for row in rows if row["provider"] == provider), key=lambda row: int(row["H"]))
        sizes = [int(row["H"]) for row in of_provider]
        p20, p50, p80 = (
            [float(row[name]) * float(row["us_per_step"]) / float(row["p50_us"]) for row in of_provider]
            for name in ("p20_us", "p50_us", "p80_us")
        )
        look: Look = {"ms": 6, "lw": 1.6, **LINES[provider]}
        axes.plot(sizes, p50, label=NAMES.get(provider, provider), **look)
        axes.fill_between(sizes, p20, p80, color=look["color"], alpha=0.2, lw=0)
    log_axis(axes, "y", "")


def draw_speedup(rows: Sequence[Row]) -> Figure | None:
    """nn.GRU's time over that of what the layer takes, over H and B, for each dtype, in inference and training."""
    passes = [pass_ for pass_ in PASSES if pass_ != "forward"]  # of which few cases are measured
    rows = [row for row in plain(rows) if row["pass"] in passes and int(row["T"]) > 1 and row["case"] not in BY_CASE]
    usable = compared(rows)
    chosen = richest(
        usable, lambda pair: (pair.ours["T"], input_of(pair.ours)),
        lambda pair: (dtype_of(pair.ours), pair.ours["B"], pair.ours["H"]),
    )  # fmt: skip
    of_dtype = Counter(dtype_of(pair.ours) for pair in chosen)
    # a dtype of which little was measured is no map
    chosen = [pair for pair in chosen if 3 * of_dtype[dtype_of(pair.ours)] >= max(of_dtype.values())]
    taken = [pair for pair in chosen if not _left_to_cudnn(pair)]
    if not taken:
        return None
    rows = [pair.ours for pair in chosen]
    sizes, batches = (sorted({int(row[name]) for row in rows}) for name in ("H", "B"))
    dtypes = ordered(map(dtype_of, rows), DTYPES)
    if 2 * len(rows) < len(sizes) * len(batches) * len(dtypes) * len({row["pass"] for row in rows}):
        return None  # a map of what was not measured
    far = max(1.0, *(abs(math.log2(pair.ratio)) for pair in taken))  # symmetrical about 1; at least from half to twice
    times = [[1 / r for pair in taken if (r := of(pair))] for of in (lambda p: p.ratio, lambda p: p.in_a_graph)]
    spans = [f"{min(some):.2g} to {max(some):.2g} times as fast" for some in times if some]
    found, axes = figure(
        "As called tritongru is " + f" as {BASELINE}, in a CUDA graph ".join(spans) + f" as {BASELINE}",
        [f"{BASELINE}'s time divided by ours (of our fastest kernel where the layer's choice was not timed). Upper "
         "number: both as called; lower: both in a CUDA graph. cuDNN: no kernel is faster in both, so PyTorch's own "
         f"path runs. Hatched: slower; –: not measured. T {rows[0]['T']}, {input_of(rows[0])}, one layer, one "
         "direction, L2 warm.", hardware(rows)],
        (10, 2.2 + len(dtypes) * (0.8 + 0.4 * len(batches))), len(dtypes), len(passes), sharex=True, sharey=True,
    )  # fmt: skip
    for i, dtype in enumerate(dtypes):
        for pane, pass_ in zip(axes[i], passes, strict=True):
            of_pane = [pair for pair in chosen if (pair.ours["pass"], dtype_of(pair.ours)) == (pass_, dtype)]
            cells = {(int(pair.ours["H"]), int(pair.ours["B"])): pair for pair in of_pane}
            image = _heat_map(pane, cells, sizes, batches, far)
            pane.set_title(f"{dtype}, {pass_}")
            pane.label_outer()
    bar = found.colorbar(image, ax=axes, label=f"times as fast as {BASELINE}", shrink=0.8, aspect=30)
    ticks = range(-math.floor(far), math.floor(far) + 1)
    bar.set_ticks(list(ticks), labels=[f"{2.0**tick:g}" for tick in ticks])
    return found


def _left_to_cudnn(pair: Compared) -> bool:
    """Of a kernel alone, which the layer does not take."""
    return pair.ours["provider"] != OURS and (pair.ratio > 1 or (pair.in_a_graph or 0) > 1)


def _heat_map(
    axes: Axes, cells: dict[tuple[int, int], Compared], sizes: Sequence[int], batches: Sequence[int], far: float
) -> AxesImage:
    values = np.full((len(batches), len(sizes)), np.nan)

    def box(x: int, y: int, **look: object) -> None:
        axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, **look))

    for y, B in enumerate(batches):
        for x, H in enumerate(sizes):
            look: Look = {"color": BLACK}
            pair = cells.get((H, B))
            if pair is None:
                box(x, y, fill=False, hatch="....", edgecolor=PALE, lw=0)
                text = "–"
            elif _left_to_cudnn(pair):
                box(x, y, facecolor=PALE, edgecolor="white")
                text = "cuDNN"
            else:
                values[y, x] = -math.log2(pair.ratio)
                text = "\n".join(f"{1 / r:.{2 if r > 1 else 1}f}" for r in (pair.ratio, pair.in_a_graph) if r)
                if abs(values[y, x]) > 0.65 * far:
                    look["color"] = "white"
                if pair.ratio > 1 or (pair.in_a_graph or 0) > 1:
                    box(x, y, fill=False, hatch="////", edgecolor="#404040", lw=1.2)
                    behind = {"facecolor": "white", "edgecolor": "none", "pad": 1}
                    look |= {"weight": "bold", "color": BLACK, "bbox": behind}
            axes.text(x, y, text, ha="center", va="center", fontsize=6 if text == "cuDNN" else 9, **look)
    image = axes.imshow(values, cmap="RdBu", norm=Normalize(-far, far), aspect="auto", origin="lower")
    axes.set_xticks(range(len(sizes)), [str(size) for size in sizes])
    axes.set_yticks(range(len(batches)), [str(batch) for batch in batches])
    axes.set(xlabel="H, hidden units", ylabel="B, batch")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    return image


MOST = 12  # cases in a figure of bars
STORED = (BASELINE, "step", "step-recompute", "sequence", "sequence-recompute", OURS)


def draw_measured_memory(rows: Sequence[Row]) -> Figure | None:
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
    ours = [row for row in chosen if row["provider"] != BASELINE]
    less = sum(float(row["saved_mib"]) < float(of_baseline[row["case"]]["saved_mib"]) for row in ours)
    more = sum(float(row["peak_mib"]) > float(of_baseline[row["case"]]["peak_mib"]) for row in ours)
    some = f"; {len(cases)} of {len(of_baseline)} cases, small to large" if len(cases) < len(of_baseline) else ""
    found, axes = figure(
        f"Memory of training: tritongru keeps less than {BASELINE} in {less} of {len(ours)} rows, and needs more "
        f"at the peak in {more}",
        [f"MiB by torch's allocator, beyond what lay there before: kept between forward and backward without the "
         f"results; at most during both, results and gradients included{some}.", hardware(chosen)],
        (10, 2.6 + 0.75 * len(cases)), 1, 2, sharey=True,
    )  # fmt: skip
    for pane, name, title in ((axes[0, 0], "saved_mib", "kept for backward"), (axes[0, 1], "peak_mib", "peak")):
        _points(pane, chosen, cases, name)
        pane.set_title(title)
    axes[0, 0].set_yticks(range(len(cases)), cases)
    found.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return found


def _points(axes: Axes, rows: Sequence[Row], cases: Sequence[str], name: str) -> None:
    """A point for each row, a line for each case, each provider a little lower than the last."""
    providers = ordered((row["provider"] for row in rows), STORED)
    for provider in providers:
        y = (0.5 - (providers.index(provider) + 0.5) / len(providers)) * 0.7
        points = [(float(r[name]), cases.index(r["case"]) + y) for r in rows if r["provider"] == provider]
        look = LINES[provider]
        axes.plot(*zip(*points, strict=True), ls="", marker=look["marker"], ms=6, color=look["color"],
                  mfc="none" if "recompute" in provider else look["color"],
                  label=NAMES.get(provider, provider))  # fmt: skip
        for mib, place in points:
            axes.annotate(f"{mib:.3g}", (mib, place), xytext=(7, 0), textcoords="offset points", va="center",
                          fontsize=8.5)  # fmt: skip
    every = [float(row[name]) for row in rows]
    if min(every) > 0:
        axes.set_xscale("log")
        axes.set_xlim(min(every) / 1.5, 2 * max(every))  # room for the last figures
    else:  # recompute keeps nothing
        axes.set_xscale("symlog", linthresh=1)
        axes.set_xlim(-0.15, 3 * max(every))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    axes.set_xlabel("MiB")
    for y in range(1, len(cases)):
        axes.axhline(y - 0.5, color=PALE, lw=0.8, zorder=0)


def draw_accuracy(rows: Sequence[Row]) -> Figure | None:
    """Errors against float64: ours over nn.GRU's, by tensor and dtype."""
    usable = [row for row in rows if row["status"] in ("ok", "wrong") and row["pass"] != "streaming"]
    of_baseline = {row["case"]: row for row in usable if row["provider"] == BASELINE and row["error_output"]}
    ours = {
        (row["case"], row["provider"]): row  # every pass of a provider has the same errors
        for row in reversed(usable) if row["provider"] in TRITON_BACKENDS and row["case"] in of_baseline
    }  # fmt: skip
    chosen = [row for key, row in ours.items() for row in (of_baseline[key[0]], row)]
    points: dict[str, dict[str, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    for row in reversed(ours.values()):
        for tensor in TENSORS:
            x, y = (number(of_it, f"error_{tensor}") for of_it in (of_baseline[row["case"]], row))
            if x and y:
                points[dtype_of(row)][tensor].append((x, y))
    if not points:
        return None
    dtypes = ordered(points, DTYPES)
    both = [point for of_dtype in points.values() for some in of_dtype.values() for point in some]
    above = sum(y > RULE * x for x, y in both)
    rows_of_panes = -(-len(dtypes) // 2)
    found, axes = figure(
        f"Errors against float64: {above} of {len(both):,} are more than {RULE:g} times {BASELINE}'s",
        ["RMS error over the tensor's RMS, a point for each tensor of a case: output, h_n, and the gradients of the "
         f"others; step and sequence. Solid line: as large as {BASELINE}'s. Dashed: the rule, {RULE:g} times that or a "
         "floor of rounding.", hardware(chosen)],
        (10, 1.9 + 4.3 * rows_of_panes), rows_of_panes, min(2, len(dtypes)),
    )  # fmt: skip
    for pane in axes.flat[len(dtypes) :]:
        pane.remove()
    for pane, dtype in zip(axes.flat, dtypes, strict=False):
        for tensor, (colour, marker) in TENSORS.items():
            if some := points[dtype][tensor]:
                pane.plot(*zip(*some, strict=True), marker, ms=5, color=colour, alpha=0.6, label=tensor)
        every = [point for some in points[dtype].values() for point in some]
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
    found.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return found


PRODUCTS = {"fp32 (TF32)": "tf32_tflops", "fp32 (IEEE)": "fma_tflops"}  # else half precision
CEILINGS = ("l2_read_tb_s", "dram_tb_s", "half_tflops", "tf32_tflops", "fma_tflops", "mma_share")


def draw_roofline(rows: Sequence[Row], ceilings: Mapping[str, float]) -> Figure | None:
    """Achieved rate of the recurrence's products against flops per byte read, under the card's measured ceilings."""
    device = DEVICES.get(product_key(rows[0]["device"]) or "") if rows else None
    if device is None or any(name not in ceilings for name in CEILINGS):
        return None
    l2, dram, half, tf32, fma, mma_share = (ceilings[name] for name in CEILINGS)
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
        rate, intensity = flops * problem.time / us / 1e6, flops / read_bytes  # Tflop/s
        most = max(most, rate / min(intensity * l2, ceilings[PRODUCTS.get(dtype_of(row), "half_tflops")]))
        points[row["provider"]].append((intensity, rate, dtype_of(row)))
        chosen.append(row)
    if not points:
        return None
    found, axes = figure(
        f"The recurrence reaches at most {100 * most:.0f} % of its roofline limit (L2 and matrix units)",
        ["Flops of the products with W_h only, over the time of the whole call on the device, which includes the input "
         f"projection; inference, T {chosen[0]['T']}. Bytes: all that the programs read in a step. Limits: measured.",
         hardware(chosen)],
        (10, 6.2),
    )  # fmt: skip
    pane = axes[0, 0]
    intensities = [x for some in points.values() for x, *_ in some]
    x = np.geomspace(min(intensities) / 3, max(intensities) * 12, 200)
    for name, bandwidth, look in (("L2", l2, {"color": BLACK}), ("DRAM", dram, {"color": GREY, "ls": "--"})):
        pane.plot(x, np.minimum(x * bandwidth, half), label=f"{name}: {bandwidth:.3g} TB/s", **look)
    for name, rate in (
        ("half precision, warp-group products", half),
        ("half precision, warp products (tiles of 16 rows)", half * mma_share),
        ("TF32, warp products", tf32 * mma_share),
        ("float32 without matrix units", fma),
    ):
        pane.axhline(rate, color=PALE, lw=1, zorder=0)
        left = rate / l2 > 30 * x[0]  # where no roof crosses the words
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
    log_axis(pane, "x", "flop per byte read by the programs")
    log_axis(pane, "y", "Tflop/s")
    pane.set_xlim(x[0], x[-1])
    found.legend(*pane.get_legend_handles_labels(), loc="outside right center")
    return found
