"""The demo's figures, drawn from its rows alone. matplotlib is optional: this module is imported where it is there."""

import math
from collections.abc import Sequence
from statistics import fmean

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from ..tools.style import BLACK, BLUE, GREEN, GREY, ORANGE, PALE, PURPLE, SKY, VERMILION, Look, figure
from .claims import LONGEST, Rows, Spread, accuracy, gaps_of, size_of, spread
from .networks import GRU, GRU_SHORT, LSTM, LSTM_EQUAL, NO_RESET, NO_UPDATE, RNN, RNN_EQUAL, RNN_SHORT, SHORT, TRIGRAM
from .story import DISHES, EXPECTED, QUESTION

_GRU: Look = {"color": GREEN, "marker": "X", "ms": 9, "lw": 3}  # drawn first, and seen below what coincides with it
_LSTM: Look = {"color": VERMILION, "marker": "D"}
_RNN: Look = {"color": PURPLE, "marker": "^"}
PANES: tuple[tuple[str, int, dict[str, Look]], ...] = (
    ("Trained on gaps of 7 to 30 words, equal hidden size", LONGEST,
     {GRU.name: _GRU, LSTM.name: _LSTM, RNN.name: _RNN, TRIGRAM: {"color": BLACK, "marker": ".", "ls": ":"}}),
    ("The same, equal number of parameters", LONGEST, {GRU.name: _GRU, LSTM_EQUAL.name: _LSTM, RNN_EQUAL.name: _RNN}),
    ("Trained on gaps of 7 to 10 alone", SHORT[-1], {GRU_SHORT.name: _GRU, RNN_SHORT.name: _RNN}),
    ("What a gate is worth: the GRU trained without one", LONGEST,
     {GRU.name: _GRU, NO_RESET.name: {"color": SKY, "marker": "v"}, NO_UPDATE.name: {"color": ORANGE, "marker": "s"}}),
)  # fmt: skip


def _conditions(rows: Rows) -> str:
    """Seeds and, where the rows have them, versions and commit."""
    seeds = len({str(row["seed"]) for row in rows})
    shown = f"{seeds} seeds; bands: mean ± standard deviation over them" if seeds > 1 else "One seed: no spread"
    where = {name: {str(row[name])[:10] for row in rows if row.get(name)} for name in ("torch", "commit")}
    return "; ".join([shown, *(f"{name} {' / '.join(sorted(found))}" for name, found in where.items() if found)]) + "."


def _line(axes: Axes, at: Sequence[int], found: Sequence[Spread], look: Look, bounds: tuple[float, float]) -> None:
    """Means with a band of the deviation, which ends at the bounds."""
    axes.plot(at, [s.mean for s in found], **look)
    low, high = (np.clip([s.mean + sign * s.deviation for s in found], *bounds) for sign in (-1, 1))
    axes.fill_between(at, low, high, color=look["color"], alpha=0.17, lw=0)


def draw_gaps(rows: Rows) -> Figure | None:
    """Accuracy by gap, of networks with equal hidden size, equal parameters, short gaps, or a gate less; or None."""
    if not rows:
        return None
    gaps = gaps_of(rows)
    near, far = (
        ", ".join(f"{model} {accuracy(rows, model, 'gap', gap)}" for model in PANES[0][2])
        for gap in (LONGEST, gaps[-1])
    )
    found, axes = figure(
        f"Who still knows the cuisine {LONGEST} words after the dish: {near}; {gaps[-1]} words after: {far}",
        ["Share of texts whose cuisine is the likeliest of all words; texts of the story's kind, none of them trained "
         f"on. Bands end at 0 and 100 %. {_conditions(rows)}"],
        (11, 9), 2, 2, sharex=True, sharey=True,
    )  # fmt: skip
    for pane, (title, trained, looks) in zip(axes.flat, PANES, strict=True):
        for model, look in looks.items():
            label = model if model == TRIGRAM else f"{model.split(',')[0]} (H {size_of(rows, model)['hidden']})"
            _line(pane, gaps, [accuracy(rows, model, "gap", gap) for gap in gaps], look | {"label": label}, (0, 1))
        pane.axvspan(gaps[0], trained, color=PALE, alpha=0.45, lw=0, zorder=0)
        pane.axhline(1 / len(DISHES), color=GREY, lw=0.9, ls=(0, (1, 3)), label="chance")
        pane.set_title(title)
        pane.legend(loc="center")
    pane.set(xscale="log", ylim=(-0.03, 1.05))
    pane.set_xticks([10, 30, 100, 200], ["10", "30", "100", "200"])
    pane.minorticks_off()
    pane.yaxis.set_major_formatter(PercentFormatter(1))
    for pane in axes[1]:
        pane.set_xlabel("gap: words between dish and cuisine (grey: trained on)")
    return found


def draw_gates(words: Rows) -> Figure | None:
    """The story word by word: what is answered, what the dishes left in the state, and the gates; None without rows."""
    if not words:
        return None
    told = [str(row["word"]) for row in words if row["seed"] == words[0]["seed"]]
    first, second = (place for place, word in enumerate(told) if word == "is")  # where the cuisines are asked for

    def by_word(name: str) -> list[Spread]:
        at = [[float(str(row[name])) for row in words if int(str(row["place"])) == i] for i in range(len(told))]
        return [spread(values) for values in at]

    kept, z = {dish: by_word(f"like {dish}") for dish in ("samosa", "pasta")}, by_word("z")
    found, axes = figure(
        f"What the GRU's state holds of samosa: {kept['samosa'][first]} when the first cuisine is asked for, "
        f"{kept['samosa'][second]} at the second; of pasta, then: {kept['pasta'][second]}",
        [f"tritongru.GRU, H {words[0]['hidden']}, reads the story, whose own sentences it was never trained on. "
         f"{_conditions(words)}",
         "A dish's mark: by how much the state, right after it, differs from its mean over the story told with every "
         "dish. Of it later: that difference projected on the mark; what has turned another way counts as gone."],
        (11, 9.4), 3, 1, sharex=True, height_ratios=(1, 1, 1),
    )  # fmt: skip
    state, answer, gates = axes[:, 0]
    looks: dict[str, Look] = {"samosa": {"color": ORANGE, "marker": "s"}, "pasta": {"color": BLUE, "marker": "o"}}
    places, free = range(len(told)), (-math.inf, math.inf)
    for (dish, look), cuisine in zip(looks.items(), EXPECTED, strict=True):
        at = told.index(dish)
        _line(state, places[at:], kept[dish][at:], look | {"label": f"of {dish}'s mark"}, free)
        _line(answer, places, by_word(f"P({cuisine})"), look | {"label": f"P({cuisine.title()})"}, (0, 1))
    _line(gates, places, z, {"color": GREEN, "marker": "X", "label": "z: part of the past that is retained"}, free)
    shaping = "r: part of the past that shapes what is new"
    _line(gates, places, by_word("r"), {"color": PURPLE, "marker": "^", "ls": "--", "label": shaping}, free)
    at_dishes, at_all = fmean(z[told.index(dish)].mean for dish in looks), fmean(s.mean for s in z)
    for pane, title, label in (
        (state, "In the state: what each dish left, and how much of it is still there", "part of the mark"),
        (answer, f'The answer: the next word if the text broke off here with "{QUESTION}"', "probability"),
        (gates, "The gates: how much of the past is let through, mean over ALL units "
         f"(z {at_dishes:.2f} at the two dishes, {at_all:.2f} over all words)", "mean gate"),
    ):  # fmt: skip
        pane.set(title=title, ylabel=label)
        pane.axhline(0, color=GREY, lw=0.6, zorder=0)
        for dish, look in looks.items():
            pane.axvline(told.index(dish), color=look["color"], lw=9, alpha=0.13, zorder=0)
        pane.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    answer.set_ylim(-0.05, 1.08)
    gates.set_xticks(places, told, rotation=60, ha="right", rotation_mode="anchor")
    for word, tick in zip(told, gates.get_xticklabels(), strict=True):
        tick.set_fontweight("bold" if word in (*looks, *EXPECTED) else "normal")
    gates.set(ylim=(0, 1), xlim=(-0.6, len(told) - 0.4), xlabel="word just read (bold: the dishes and the cuisines)")
    return found


STORY = {"story-gaps": draw_gaps, "story-gates": draw_gates}
