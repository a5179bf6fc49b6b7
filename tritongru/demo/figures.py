"""The demo's figures. matplotlib is optional: this module needs it, and is imported where it is there."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from . import claims
from .claims import LONGEST, Rows, Spread, accuracy, gaps_of, size_of, spread, whole
from .networks import (
    AVERAGED,
    CLAMPED,
    GRU,
    GRU_SHORT,
    LSTM,
    LSTM_EQUAL,
    NO_RESET,
    NO_UPDATE,
    ON_SHORT,
    RNN,
    RNN_EQUAL,
    RNN_SHORT,
    SHORT,
    STATES,
    TRIGRAM,
    flops,
    gates_of,
    step_bytes,
)
from .output import replacing
from .story import DISHES, EXPECTED
from .storytelling import Told
from .style import BLACK, BLUE, GREEN, GREY, ORANGE, PALE, PURPLE, SKY, VERMILION, Look, figure, log_x
from .training import Curve

_SIZE = 130  # dots per inch


def _axes(width: float, height: float) -> tuple[Any, Any]:
    # Not pyplot: that would pick a window system and keep global state.
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure: Any, path: Path) -> None:
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=_SIZE)


def moving_mean(values: Sequence[float], width: int) -> list[float]:
    """Mean of each value and up to `width - 1` before it."""
    return [sum(values[max(0, i + 1 - width) : i + 1]) / min(i + 1, width) for i in range(len(values))]


def draw_losses(
    path: Path, ours: tuple[str, Curve], theirs: tuple[str, Curve], baselines: dict[str, float], difference: float
) -> None:
    """Training loss of both models over the steps, held-out loss, and what counting words reaches."""
    figure, axes = _axes(8.0, 4.8)
    steps = range(1, len(ours[1].losses) + 1)
    width = max(1, len(steps) // 50)
    # The curves may coincide: the one below is wide and light, the one above narrow and dashed.
    below, above = {"color": ORANGE, "lw": 5, "alpha": 0.7}, {"color": BLUE, "lw": 1.6, "ls": (0, (4, 2))}
    axes.plot(steps, moving_mean(theirs[1].losses, width), label=f"{theirs[0]}, training", **below)
    axes.plot(steps, moving_mean(ours[1].losses, width), label=f"{ours[0]}, training", **above)
    for (name, curve), marker, size, colour in ((theirs, "s", 9, ORANGE), (ours, "o", 4.5, BLUE)):
        at, values = zip(*((step, math.log(value)) for step, value in curve.held_out), strict=True)
        axes.plot(at, values, marker, ms=size, color=colour, label=f"{name}, held-out", clip_on=False, zorder=3)
    for name, value in baselines.items():
        axes.axhline(math.log(value), color=GREY, lw=1, ls=":")
        axes.annotate(
            f"{name},\nheld-out", (1, math.log(value)), xycoords=("axes fraction", "data"), xytext=(8, 0),
            textcoords="offset points", va="center", color="#505050", fontsize=9,
        )  # fmt: skip
    axes.set_xlabel(f"training step (training loss: mean of the last {width} steps)")
    axes.set_ylabel("cross-entropy (nats per word)")
    same = "the same at every step" if difference == 0 else f"at most {difference:.1e} nats apart"
    axes.set_title(f"Word autocomplete, both layers from the same seed: training losses {same}", fontsize=11)
    axes.set_xlim(0, len(steps))
    axes.legend(frameon=False, fontsize=9)
    _save(figure, path)


def draw_story(path: Path, told: Told, backend: str) -> None:
    """P(Indian) and P(Italian), asked after each word of the running text."""
    figure, axes = _axes(11.0, 4.8)
    places = range(len(told.words))
    for cuisine, colour, marker in (("indian", ORANGE, "s"), ("italian", BLUE, "o")):
        label = f"P({cuisine.title()})"
        axes.plot(places, told.probabilities[cuisine], color=colour, marker=marker, ms=5, lw=1.8, label=label)
    others = [sum(p[i] for c, p in told.probabilities.items() if c not in ("indian", "italian")) for i in places]
    axes.plot(places, others, color=GREY, lw=1.2, ls=":", label="P(any other cuisine)")
    for dish in ("samosa", "pasta"):
        axes.axvline(told.words.index(dish), color=GREY, lw=0.8, zorder=0)
    axes.axvspan(-0.5, told.words.index("samosa") - 0.5, color=GREY, alpha=0.12, lw=0)
    axes.text(-0.3, 0.5, "no dish yet", color="#505050", fontsize=9, rotation=90, va="center")
    axes.set_xticks(list(places), told.words, rotation=60, ha="right", rotation_mode="anchor")
    answers = {len(told.words) - 1, told.words.index(".") - 1}  # the model's own words in the running text
    for place, tick in enumerate(axes.get_xticklabels()):
        if place in answers:
            tick.set_fontweight("bold")
    axes.set_xlim(-0.5, len(told.words) - 0.5)
    axes.set_ylim(-0.02, 1.05)
    axes.set_ylabel("probability as next word")
    axes.set_xlabel(
        'word just read; then the model is asked "; his favourite cuisine is ..." (bold: its own completions)'
    )
    axes.set_title(f"What the GRU remembers of the story as it reads (tritongru.GRU, {backend})", fontsize=11)
    axes.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1.0, 0.5))
    _save(figure, path)


# The story in full: drawn from the rows of networks.py alone

LINES: dict[str, Look] = {
    GRU.name: {"color": GREEN, "marker": "X", "ms": 9, "lw": 3},  # drawn first, and seen below what coincides with it
    LSTM.name: {"color": VERMILION, "marker": "D"},
    RNN.name: {"color": PURPLE, "marker": "^"},
    LSTM_EQUAL.name: {"color": VERMILION, "marker": "D"},
    RNN_EQUAL.name: {"color": PURPLE, "marker": "^"},
    GRU_SHORT.name: {"color": GREEN, "marker": "X", "ms": 9, "lw": 3},
    RNN_SHORT.name: {"color": PURPLE, "marker": "^"},
    TRIGRAM: {"color": BLACK, "marker": ".", "ls": ":"},
}
CHANCE: Look = {"color": GREY, "lw": 0.9, "ls": (0, (1, 3))}
EQUAL_HIDDEN = (GRU.name, LSTM.name, RNN.name, TRIGRAM)
EQUAL_PARAMETERS = (GRU.name, LSTM_EQUAL.name, RNN_EQUAL.name)


def _conditions(rows: Rows) -> str:
    """Seeds and, where the rows have them, versions and commit."""
    seeds = len({str(row["seed"]) for row in rows})
    shown = (
        f"{seeds} seeds; bands and bars: mean ± standard deviation over them" if seeds > 1 else "One seed: no spread"
    )
    found = [f"{name} {text}" for name in ("torch", "commit") if (text := _all_of(rows, name))]
    return "; ".join([shown, *found]) + "."


def _all_of(rows: Rows, name: str) -> str:
    return " / ".join(sorted({str(row[name])[:10] for row in rows if row.get(name)}))


def _curve(axes: Axes, rows: Rows, model: str, measure: str) -> None:
    places = gaps_of(rows, measure)
    found = [accuracy(rows, model, measure, place) for place in places]
    size = "" if model == TRIGRAM else f" (H {size_of(rows, model)['hidden']})"
    axes.plot(places, [100 * s.mean for s in found], label=_short(model) + size, **LINES[model])
    low, high = ([100 * min(1, max(0, s.mean + sign * s.deviation)) for s in found] for sign in (-1, 1))
    axes.fill_between(places, low, high, color=LINES[model]["color"], alpha=0.16, lw=0)


def _short(model: str) -> str:
    return model.split(",")[0]


def draw_gaps(rows: Rows) -> Figure | None:
    """Accuracy by gap and by number of switches; None without rows."""
    if not (rows := whole(rows)):
        return None
    gaps = gaps_of(rows)
    within, far = max(gap for gap in gaps if gap <= LONGEST), gaps[-1]

    def said(gap: int) -> str:
        return ", ".join(f"{m} {accuracy(rows, m, 'gap', gap).short} %" for m in EQUAL_HIDDEN)

    a_little_on = min(gap for gap in gaps if gap > 1.4 * SHORT[-1])
    apart = ", ".join(f"{n.cell} {accuracy(rows, n.name, 'gap', a_little_on).short} %" for n in ON_SHORT[::-1])
    found, axes = figure(
        f"Who still knows the cuisine {within} words after the dish: {said(within)}; {far} words after: {said(far)}",
        ["Share of texts whose cuisine is the likeliest of all words; texts of the story's kind, none of them trained "
         f"on. Bands end at 0 and 100 %. {_conditions(rows)}",
         f"Memories that were trained alike and did learn (below, left), {a_little_on} words after: {apart}."],
        (11, 9), 2, 2, sharey=True,
    )  # fmt: skip
    sides = (
        (f"Trained on gaps of {gaps[0]} to {LONGEST} words, equal hidden size", EQUAL_HIDDEN, LONGEST),
        ("The same, equal number of parameters", EQUAL_PARAMETERS, LONGEST),
        (f"Trained on gaps of {SHORT[0]} to {SHORT[-1]} alone", [n.name for n in ON_SHORT[::-1]], SHORT[-1]),
    )
    for pane, (title, models, longest) in zip(axes.flat, sides, strict=False):
        pane.axvspan(gaps[0], longest, color=PALE, alpha=0.45, lw=0, zorder=0)
        for model in models:
            _curve(pane, rows, model, "gap")
        log_x(pane, "gap: words between dish and cuisine (grey: trained on)")
        pane.set_xticks([10, 30, 100, 200], ["10", "30", "100", "200"])
        pane.minorticks_off()
        pane.set_title(title)
    last = axes[1, 1]
    for model in EQUAL_HIDDEN:
        _curve(last, rows, model, "switches")
    last.set_xticks(gaps_of(rows, "switches"))
    last.set_xlabel("switches to a dish of another cuisine, gaps as trained")
    last.set_title("By number of switches, equal hidden size")
    axes[0, 0].set_ylim(-3, 105)
    for pane in axes.flat:
        pane.axhline(100 / len(DISHES), label="chance", **CHANCE)
        pane.legend(loc="center left" if pane is not axes[1, 0] else "center")
    for pane in axes[:, 0]:
        pane.set_ylabel("right, %")
    return found


def draw_gates(words: Rows) -> Figure | None:
    """The story word by word: what is answered, what the dishes left in the state, and the gates; None without rows."""
    if not (words := _ended(words)):
        return None
    first = [row for row in words if row["seed"] == words[0]["seed"]]
    told = [str(row["word"]) for row in first]
    asked = [place for place, word in enumerate(told) if word == "is"]

    def by_word(name: str) -> list[Spread]:
        return [
            spread(float(str(row[name])) for row in words if int(str(row["place"])) == place)
            for place in range(len(told))
        ]

    kept = {dish: by_word(f"like {dish}") for dish in ("samosa", "pasta")}

    def part(dish: str, question: int) -> str:
        return f"{kept[dish][asked[question]].short} %"

    found, axes = figure(
        f"What the GRU's state holds of samosa: {part('samosa', 0)} when the first cuisine is asked for, "
        f"{part('samosa', 1)} at the second; of pasta, then: {part('pasta', 1)}",
        [f"tritongru.GRU, H {_all_of(words, 'hidden')}, reads the story, whose own sentences it was never trained "
         f"on. {_conditions(words)}",
         "A dish's mark: by how much the state, right after it, differs from its mean over the story told with every "
         "dish. Of it later: that difference projected on the mark; what has turned another way counts as gone."],
        (11, 9.4), 3, 1, sharex=True, height_ratios=(1, 1, 1),
    )  # fmt: skip
    panes = axes[:, 0]
    looks: dict[str, Look] = {"samosa": {"color": ORANGE, "marker": "s"}, "pasta": {"color": BLUE, "marker": "o"}}
    for (dish, look), cuisine in zip(looks.items(), EXPECTED, strict=True):
        at = told.index(dish)
        _by_word(panes[0], kept[dish], look | {"label": f"of {dish}'s mark"}, at)
        _by_word(panes[1], by_word(f"P({cuisine})"), look | {"label": f"P({cuisine.title()})"}, probability=True)
    _by_word(panes[2], by_word("z"), {"color": GREEN, "marker": "X", "label": "z: part of the past that is retained"})
    r_look: Look = {"color": PURPLE, "marker": "^", "ls": "--", "label": "r: part of the past that shapes what is new"}
    _by_word(panes[2], by_word("r"), r_look)
    z = [found.mean for found in by_word("z")]
    at_dishes, at_all = fmean(z[told.index(dish)] for dish in looks), fmean(z)
    titles = (
        "In the state: what each dish left, and how much of it is still there",
        'The answer: the next word if the text broke off here with "; his favourite cuisine is"',
        "The gates: how much of the past is let through, mean over ALL units "
        f"(z {at_dishes:.2f} at the two dishes, {at_all:.2f} over all words)",
    )
    for pane, title, label in zip(panes, titles, ("part of the mark", "probability", "mean gate"), strict=True):
        pane.set_title(title)
        pane.set_ylabel(label)
        pane.axhline(0, color=GREY, lw=0.6, zorder=0)
        for dish, look in looks.items():
            pane.axvline(told.index(dish), color=look["color"], lw=9, alpha=0.13, zorder=0)
        pane.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    panes[1].set_ylim(-0.05, 1.08)
    panes[2].set_ylim(0, 1)
    panes[2].set_xticks(range(len(told)), told, rotation=60, ha="right", rotation_mode="anchor")
    for place, tick in enumerate(panes[2].get_xticklabels()):
        if told[place] in (*looks, *EXPECTED):
            tick.set_fontweight("bold")
    panes[2].set_xlim(-0.6, len(told) - 0.4)
    panes[2].set_xlabel("word just read (bold: the dishes and the cuisines)")
    return found


def _ended(words: Rows) -> Rows:
    """The rows of seeds that have the story to its end: a run that was interrupted may leave others."""
    found = Counter(row["seed"] for row in words)
    return [row for row in words if found[row["seed"]] == max(found.values())]


def _by_word(axes: Axes, found: Sequence[Spread], look: Look, start: int = 0, probability: bool = False) -> None:
    places = range(start, len(found))
    axes.plot(places, [found[i].mean for i in places], lw=1.8, ms=5, **look)
    low, high = ([found[i].mean + sign * found[i].deviation for i in places] for sign in (-1, 1))
    if probability:
        low, high = [max(0, value) for value in low], [min(1, value) for value in high]
    axes.fill_between(places, low, high, color=look["color"], alpha=0.2, lw=0)


def draw_networks(rows: Rows) -> Figure | None:
    """RNN, LSTM and GRU of equal hidden size side by side, counted and measured; None without rows."""
    if not (rows := whole(rows)):
        return None
    cells = (RNN.name, LSTM.name, GRU.name)
    sizes = {cell: size_of(rows, cell) for cell in cells}
    I, H = sizes[GRU.name]["input"], sizes[GRU.name]["hidden"]
    far = gaps_of(rows)[-1]
    within = max(gap for gap in gaps_of(rows) if gap <= LONGEST)
    panels: dict[str, list[tuple[float, float]]] = {
        "gates": [(gates_of(cell), 0) for cell in cells],
        "states": [(STATES[cell], 0) for cell in cells],
        "parameters of the model": [(sizes[cell]["parameters"], 0) for cell in cells],
        "flops of a step": [(flops(cell, I, H), 0) for cell in cells],
        "bytes of a step (float32)": [(step_bytes(cell, I, H), 0) for cell in cells],
        "CPU time of a step, µs": [(s.mean, s.deviation) for s in (claims.measured_time(rows, cell) for cell in cells)],
        f"right at {within} words, %": [_percent(accuracy(rows, cell, "gap", within)) for cell in cells],
        f"right at {far} words, %": [_percent(accuracy(rows, cell, "gap", far)) for cell in cells],
    }
    lighter = sizes[GRU.name]["parameters"] < sizes[LSTM.name]["parameters"]
    found, axes = figure(
        f"The GRU is {'lighter' if lighter else 'not lighter'} than the LSTM by one gate and one state; what each "
        f"remembers {far} words after a dish, trained to {LONGEST}: "
        + ", ".join(f"{cell} {accuracy(rows, cell, 'gap', far).short} %" for cell in cells),
        [f"I {I}, H {H} for all. Gates to bytes are counted, of one step of one sequence (least bytes: weights, x, "
         f"states). Time: {_all_of_device(rows)}one thread, T 64, B 16, forward and backward, PyTorch's own code "
         "of each (of an LSTM one oneDNN layer where there is one, of the others a loop of small operations).",
         f"Bars of what was right end at 100 %. {_conditions(rows)}"],
        (11, 5.2), 2, 4, sharey=True,
    )  # fmt: skip
    for pane, (title, values) in zip(axes.flat, panels.items(), strict=True):
        most = 100 if title.endswith("%") else math.inf  # no bar says that more than all was right
        for y, (cell, (value, deviation)) in enumerate(zip(cells, values, strict=True)):
            hatch = {RNN.name: "///", LSTM.name: "...", GRU.name: None}[cell]
            above = min(deviation, most - value)
            bars = [[deviation], [above]] if deviation else None
            pane.barh(y, value, 0.7, xerr=bars, color=LINES[cell]["color"], hatch=hatch, edgecolor="white",
                      error_kw={"capsize": 3})  # fmt: skip
            error = f" ± {deviation:.0f}" if deviation else ""
            pane.annotate(f"{value:,.0f}{error}", (value + above, y), xytext=(4, 0), textcoords="offset points",
                          va="center")  # fmt: skip
        pane.set_xlim(0, 1.45 * max(1e-9, *(value + deviation for value, deviation in values)))
        pane.set_xticks([])
        pane.spines["bottom"].set_visible(False)
        pane.set_yticks(range(len(cells)), cells)
        pane.set_title(title)
    axes[0, 0].invert_yaxis()
    return found


def _percent(found: Spread) -> tuple[float, float]:
    return 100 * found.mean, 100 * found.deviation


def _all_of_device(rows: Rows) -> str:
    names = sorted({str(row["device"]) for row in rows if row.get("device")})
    return f"{' / '.join(names)}, " if names else ""


def draw_worth(rows: Rows) -> Figure | None:
    """What each gate is worth: the GRU without it, trained so and afterwards; None without rows."""
    if not (rows := whole(rows)):
        return None
    models: dict[str, Look] = {
        GRU.name: {"color": GREEN},
        NO_RESET.name: {"color": SKY, "hatch": "///"},
        CLAMPED: {"color": BLUE, "hatch": "\\\\\\"},
        NO_UPDATE.name: {"color": ORANGE, "hatch": "..."},
        AVERAGED: {"color": VERMILION, "hatch": "xx"},
    }
    gaps = gaps_of(rows)
    within, far = max(gap for gap in gaps if gap <= LONGEST), gaps[-1]
    middle = gaps[-3]
    most = gaps_of(rows, "switches")[-1]
    places = [("gap", within), ("gap", middle), ("gap", far), ("switches", most)]

    def says(model: str) -> str:
        near, distant = (accuracy(rows, model, "gap", gap).short for gap in (within, far))
        return f"{near} ({distant}) %"

    found, axes = figure(
        f"What a gate is worth at {within} ({far}) words: the GRU {says(GRU.name)}; trained without the reset gate "
        f"{says(NO_RESET.name)}, without the update gate {says(NO_UPDATE.name)}; robbed of them once trained "
        f"{says(CLAMPED)} and {says(AVERAGED)}",
        ["Without the reset gate: r = 1. Without the update gate: z constant per unit, learned, or (afterwards) its "
         f"mean over held-out texts. Bars end at 0 and 100 %. {_conditions(rows)}"],
        (11, 5.2),
    )  # fmt: skip
    pane = axes[0, 0]
    for i, (model, look) in enumerate(models.items()):
        values = [_percent(accuracy(rows, model, *place)) for place in places]
        at = [x + 0.17 * (i - 2) for x in range(len(places))]
        bars = [[min(v, d) for v, d in values], [min(100 - v, d) for v, d in values]]  # within 0 and 100
        pane.bar(at, [v for v, _ in values], 0.155, yerr=bars, label=model, edgecolor="white",
                 error_kw={"capsize": 2, "lw": 1}, **look)  # fmt: skip
        for x, (value, deviation) in zip(at, values, strict=True):
            pane.annotate(
                f"{value:.0f}", (x, min(100, value + deviation)), xytext=(0, 2), textcoords="offset points", ha="center"
            )
    pane.axhline(100 / len(DISHES), label="chance", **CHANCE)
    names = [f"gap of {at} words" if kind == "gap" else f"{at} switches" for kind, at in places]
    pane.set_xticks(range(len(places)), names)
    pane.set_ylabel("right, %")
    pane.set_ylim(0, 108)
    pane.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return found


WORDS = "story-gates"  # of the story's words; the others are of the answers
STORY = {
    "story-gaps": draw_gaps, WORDS: draw_gates, "story-networks": draw_networks, "story-worth": draw_worth,
}  # fmt: skip
