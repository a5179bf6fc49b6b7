"""How a figure looks: its header, its colours, its file."""

import textwrap
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .files import replacing

# Okabe and Ito's palette: apart for every common kind of colour blindness. A marker, a hatch or a dash goes with each
# colour, so that none is the only cue.
BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
YELLOW, BLUE, VERMILION, PURPLE = "#F0E442", "#0072B2", "#D55E00", "#CC79A7"
GREY, PALE = "#767676", "#D9D9D9"

Look = dict[str, Any]  # of a line or a patch, as matplotlib takes it

DPI = 140
_SETTINGS = {
    "font.size": 10, "axes.titlesize": 10.5, "axes.labelsize": 10, "legend.fontsize": 9.5, "xtick.labelsize": 9.5,
    "ytick.labelsize": 9.5, "hatch.linewidth": 0.7, "axes.spines.top": False, "axes.spines.right": False,
    "axes.titlelocation": "left", "legend.frameon": False,
}  # fmt: skip
settings = partial(rc_context, _SETTINGS)  # the context in which a figure is drawn and saved


def figure(
    message: str, conditions: Iterable[str], size: tuple[float, float], rows: int = 1, columns: int = 1, **grid: Any
) -> tuple[Figure, Any]:
    """A figure of this width and height in inches, and its axes [rows, columns] (grid: as `Figure.subplots` takes it).
    Its header: the message, what is to be seen, in bold; below it conditions: units, sizes, hardware, versions."""
    width, height = size
    top = textwrap.wrap(message, int(9.3 * width))
    below = [line for text in conditions for line in textwrap.wrap(text, int(13.4 * width))]
    found = Figure(figsize=size)
    FigureCanvasAgg(found)  # not pyplot, which would pick a window system and keep global state
    header = (0.22 + 0.24 * len(top) + 0.19 * len(below)) / height
    found.set_layout_engine("constrained", rect=(0, 0, 1, 1 - header), h_pad=0.06, w_pad=0.06)
    x, y = 0.12 / width, 1 - 0.12 / height
    look: Look = {"ha": "left", "va": "top", "in_layout": False}
    found.text(x, y, "\n".join(top), fontsize=12.5, weight="bold", linespacing=1.2, **look)
    y -= (0.04 + 0.24 * len(top)) / height
    found.text(x, y, "\n".join(below), fontsize=10, color="#404040", linespacing=1.25, **look)
    return found, found.subplots(rows, columns, squeeze=False, **grid)


def save(found: Figure, folder: Path, name: str) -> Path:
    """The figure's file, in place only when it is whole; without versions, which would change it."""
    path = folder / f"{name}.png"
    with settings(), replacing(path) as temporary:
        found.savefig(temporary, dpi=DPI, metadata={"Software": None})
    return path
