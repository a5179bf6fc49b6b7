"""What the committed rows say, per device: losses first, then wins, then means over whole suites.

A loss is a shape and pass where tritongru as it comes (provider "default") takes longer than nn.GRU in the same
rounds, by more than the calls themselves vary: its p20 over nn.GRU's p80 is above 1. A win is where its p80 over
nn.GRU's p20 is below 1; what lies between is no difference. A mean is the geometric one of `ratio`, over the rows of a
suite where the provider serves the shape. It is not given where rows are missing, or where one is wrong, failed or ran
out of memory: a mean over what is left would flatter.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from .cases import SUITES
from .providers import BASELINE
from .results import ROOT, folder_of, read_rows

OURS = "default"
LEGEND = (
    "us of a call, median; host: until it was issued; device: with all its launches queued beforehand, - where that is "
    f"not possible. Where host is as long as the call, launches bind it: that of {BASELINE} is shorter in a CUDA graph."
)
Rows = Sequence[dict[str, str]]


@dataclass(frozen=True)
class Mean:
    """Of one suite, provider and pass: how many of its rows there are, and the geometric mean of their ratios."""

    suite: str
    provider: str
    pass_: str
    rows: int  # of the suite
    run: int  # of these, measured or found not to be served
    unserved: int
    broken: int  # wrong, failed, out of memory
    mean: float | None

    @property
    def verdict(self) -> str:
        """The mean, or why there is none."""
        if self.run < self.rows:
            return "none: incomplete"
        if self.broken:
            return f"none: {self.broken} wrong or failed"
        return "none: serves nothing" if self.mean is None else f"{self.mean:.3f}"


def main(folder: Path) -> int:
    """Print the summary of every device under `folder`; 1 where there are no rows."""
    from rich.console import Console

    console = Console(highlight=False, markup=False)
    console.width = max(console.width, 160)
    rows = read_rows(folder)
    if not rows:
        print(
            f"no rows under {folder}: `python -m benchmarks --suite quick` on a CUDA machine makes them",
            file=sys.stderr,
        )
        return 1
    for device in dict.fromkeys(row["device"] for row in rows):
        _print(console, device, [row for row in rows if row["device"] == device])
    return 0


@dataclass(frozen=True)
class Compared:
    """A row of tritongru as it comes beside nn.GRU's."""

    ours: dict[str, str]
    theirs: dict[str, str]

    @property
    def ratio(self) -> float:
        return float(self.ours["ratio"])

    @property
    def spread(self) -> tuple[float, float]:
        """Of the ratio: p20 of ours over p80 of theirs, and p80 of ours over p20 of theirs."""

        def away(row: dict[str, str], end: str) -> float:  # of a quantile from the median, as a factor
            return float(row[end]) / float(row["p50_us"])

        return (
            self.ratio * away(self.ours, "p20_us") / away(self.theirs, "p80_us"),
            self.ratio * away(self.ours, "p80_us") / away(self.theirs, "p20_us"),
        )

    @property
    def verdict(self) -> str:
        low, high = self.spread
        return "loss" if low > 1 else "win" if high < 1 else "no difference"


def compared(rows: Rows) -> list[Compared]:
    """tritongru as it comes beside nn.GRU, of rows of one device and L2 state, the slowest first."""
    theirs = {(row["case"], row["pass"]): row for row in rows if row["provider"] == BASELINE}
    found = [
        Compared(row, theirs[row["case"], row["pass"]])
        for row in rows
        if row["provider"] == OURS and row["status"] == "ok" and row["ratio"]
    ]
    return sorted(found, key=lambda pair: -pair.ratio)


def means(rows: Rows, suites: Sequence[str] | None = None) -> Iterator[Mean]:
    """Of every suite that any row belongs to, by provider and pass; rows of one L2 state, in SUITES' order."""
    by_key = {(row["case"], row["provider"], row["pass"]): row for row in rows}
    for suite in SUITES if suites is None else suites:
        expected: dict[tuple[str, str], list[str]] = {}
        for entry in SUITES[suite]:
            for provider in entry.providers:
                for pass_ in entry.passes:
                    expected.setdefault((provider, pass_), []).append(entry.case.name)
        for (provider, pass_), cases in expected.items():
            there = [by_key[case, provider, pass_] for case in cases if (case, provider, pass_) in by_key]
            if not there or provider == BASELINE:
                continue
            ratios = [float(row["ratio"]) for row in there if row["status"] == "ok" and row["ratio"]]
            unserved = sum(row["status"] == "unserved" for row in there)
            broken = len(there) - unserved - len(ratios)
            whole = len(there) == len(cases) and not broken and ratios
            mean = math.exp(sum(map(math.log, ratios)) / len(ratios)) if whole else None
            yield Mean(suite, provider, pass_, len(cases), len(there), unserved, broken, mean)


def _print(console: object, device: str, rows: Rows) -> None:
    from rich.console import Console

    assert isinstance(console, Console)
    console.print(f"{device}: {len(rows)} rows")
    for what in ("driver", "torch", "triton", "cudnn", "tritongru", "commit"):
        console.print(f"  {what:<9} {', '.join(dict.fromkeys(row[what] for row in rows)) or '-'}", soft_wrap=True)
    dates = sorted({row["date"] for row in rows})
    console.print(f"  measured  {' to '.join(dates[:: max(1, len(dates) - 1)])}")
    if (about := folder_of(device) / "README.md").exists():
        console.print(f"  about it  {about.relative_to(ROOT)}")
    for l2 in dict.fromkeys(row["l2"] for row in rows):
        of_l2 = [row for row in rows if row["l2"] == l2]
        state = f", L2 {l2}" if l2 else ""
        for row in of_l2:
            if row["status"] not in ("ok", "unserved"):
                console.print(f"  {row['status']}: {row['provider']} {row['case']} {row['pass']}: {row['note']}")
        pairs = compared(of_l2)
        for verdict, title in (
            ("loss", f"losses{state}: {OURS} takes longer than {BASELINE} in"),
            ("no difference", f"no difference{state}, by the spread of the calls:"),
            ("win", f"wins{state}, the largest first:"),
        ):
            some = [pair for pair in pairs if pair.verdict == verdict]
            told = f"{title} {len(some)} of {len(pairs)} comparisons"
            console.print(told)
            if some:
                console.print(_table(some[::-1] if verdict == "win" else some))
        if pairs and l2:
            console.print(LEGEND, soft_wrap=True)
        console.print(f"geometric means of the ratio to {BASELINE}{state}, below 1 is faster:")
        for found in _means(of_l2):
            console.print(found, soft_wrap=isinstance(found, str))


def _table(pairs: Sequence[Compared]) -> object:
    from rich.table import Table

    table = Table()
    for column in ("case", "pass"):
        table.add_column(column, no_wrap=True)
    for column in (
        "us", BASELINE, "ratio", "[p20, p80]", "us/step", f"host / {BASELINE}'s", f"device / {BASELINE}'s", "% of limit"
    ):  # fmt: skip
        table.add_column(column, justify="right", no_wrap=True)
    for pair in pairs:
        ours, theirs = pair.ours, pair.theirs
        host, device = (
            " / ".join(f"{float(row[name]):.0f}" if row[name] else "-" for row in (ours, theirs))
            for name in ("host_us", "device_us")
        )
        low, high = pair.spread
        table.add_row(
            ours["case"], ours["pass"], f"{float(ours['p50_us']):.0f}", f"{float(theirs['p50_us']):.0f}",
            f"{pair.ratio:.3f}", f"[{low:.2f}, {high:.2f}]", f"{float(ours['us_per_step']):.2f}", host, device,
            f"{100 * float(ours['of_limit']):.0f}" if ours["of_limit"] else "",
        )  # fmt: skip
    return table


def _means(rows: Rows) -> Iterator[object]:
    """A table of what is complete, and a line on each suite of which rows are missing."""
    from rich.table import Table

    table = Table()
    for column in ("suite", "provider", "pass"):
        table.add_column(column)
    for column in ("rows", "unserved", "geometric mean"):
        table.add_column(column, justify="right")
    missing: dict[str, list[Mean]] = {}
    for found in means(rows):
        if found.run < found.rows:
            missing.setdefault(found.suite, []).append(found)
        else:
            table.add_row(found.suite, found.provider, found.pass_, str(found.rows), str(found.unserved), found.verdict)
    if table.row_count:
        yield table
    for suite, some in missing.items():
        ways = "; ".join(f"{found.provider} {found.pass_} {found.run} of {found.rows}" for found in some)
        yield f"no mean, rows of suite {suite} are missing: {ways}"
