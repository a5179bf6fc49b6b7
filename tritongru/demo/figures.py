"""The demo's two figures. matplotlib is optional: without it nothing is drawn, and the demo says so."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .output import replacing
from .storytelling import Told
from .training import Curve

# Okabe and Ito's palette: apart for every common kind of colour blindness, and in grey.
BLUE, ORANGE, GREY = "#0072B2", "#E69F00", "#767676"
_SIZE = 130  # dots per inch


def available() -> bool:
    """Whether matplotlib is here."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


def _axes(width: float, height: float) -> tuple[Any, Any]:
    # Not pyplot: that would pick a window system and keep global state.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

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
