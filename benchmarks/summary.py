"""What the committed rows say, per device: losses first, then wins, then means over whole suites.

A loss is a shape and pass where tritongru as it comes (provider "default") takes longer than nn.GRU in the same rounds.
A mean is the geometric one of `ratio`, over the rows of a suite where the provider serves the shape. It is not given
where rows are missing, or where one is wrong, failed or ran out of memory: a mean over what is left would flatter.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from .cases import SUITES
from .providers import BASELINE
from .results import read_rows

OURS = "default"
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
    console.width = max(console.width, 120)
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


def compared(rows: Rows) -> list[dict[str, str]]:
    """Rows of tritongru as it comes with a ratio, the slowest first."""
    found = [row for row in rows if row["provider"] == OURS and row["status"] == "ok" and row["ratio"]]
    return sorted(found, key=lambda row: -float(row["ratio"]))


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
    dates = sorted(row["date"] for row in rows)
    console.print(f"  dates     {dates[0]} to {dates[-1]}")
    for l2 in dict.fromkeys(row["l2"] for row in rows):
        of_l2 = [row for row in rows if row["l2"] == l2]
        state = f", L2 {l2}" if l2 else ""
        for row in of_l2:
            if row["status"] not in ("ok", "unserved"):
                console.print(f"  {row['status']}: {row['provider']} {row['case']} {row['pass']}: {row['note']}")
        ours = compared(of_l2)
        losses = [row for row in ours if float(row["ratio"]) > 1]
        title = f"losses{state}: {OURS} takes longer than {BASELINE} in {len(losses)} of {len(ours)} comparisons"
        console.print(_table(title, losses) if losses else title)
        wins = ours[len(losses) :][::-1]
        console.print(
            _table(f"wins{state}: {len(wins)} of {len(ours)}, the largest first", wins) if wins else "no wins"
        )
        console.print(_table_of_means(f"geometric means of the ratio to {BASELINE}{state}, below 1 is faster", of_l2))


def _table(title: str, rows: Rows) -> object:
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for column in ("case", "pass"):
        table.add_column(column)
    for column in ("us", f"{BASELINE}, us", "ratio", "us per step", "% of the limit"):
        table.add_column(column, justify="right")
    for row in rows:
        us, ratio = float(row["p50_us"]), float(row["ratio"])
        of_limit = f"{100 * float(row['of_limit']):.0f}" if row["of_limit"] else ""
        per_step = f"{float(row['us_per_step']):.2f}"
        table.add_row(row["case"], row["pass"], f"{us:.1f}", f"{us / ratio:.1f}", f"{ratio:.3f}", per_step, of_limit)
    return table


def _table_of_means(title: str, rows: Rows) -> object:
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for column in ("suite", "provider", "pass"):
        table.add_column(column)
    for column in ("rows run / rows of the suite", "unserved", "geometric mean"):
        table.add_column(column, justify="right")
    for found in means(rows):
        run = f"{found.run} / {found.rows}"
        table.add_row(found.suite, found.provider, found.pass_, run, str(found.unserved), found.verdict)
    return table
