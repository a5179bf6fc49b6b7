"""Logarithmic axes."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator


def sizes_axis(axes: Axes, sizes: Sequence[int], label: str) -> None:
    """A logarithmic x axis with a tick at each of these sizes."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(sizes), [str(size) for size in sizes])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(label)


def log_axis(axes: Axes, which: str, label: str) -> None:
    """A logarithmic axis, "x" or "y": 0.1, 1, 1,000; below two powers of ten 2 and 5 of each too."""
    axes.set(**{f"{which}scale": "log", f"{which}label": label})
    axis = getattr(axes, f"{which}axis")

    def between(value: float, place: int) -> str:
        low, high = axis.get_view_interval()
        return f"{value:,.10g}" if high < 100 * low and f"{value:e}"[0] in "25" else ""

    axis.set_major_formatter("{x:,.10g}")
    axis.set_minor_formatter(between)
