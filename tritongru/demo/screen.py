"""What the demo shows while it works: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

Advance = Callable[[int, str], None]  # (done so far, what to say)


class Screen:
    """A console that takes plain text only: no markup in a user's words, no guesses at highlighting."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False)

    def say(self, text: str = "", style: str | None = None) -> None:
        self.console.print(text, style=style, markup=False, soft_wrap=True)

    def title(self, text: str) -> None:
        self.console.print()
        self.console.print(text, style="bold", markup=False, soft_wrap=True)

    def table(self, header: list[str], rows: list[list[str]]) -> None:
        """Columns of numbers to the right, of words to the left."""
        table = Table(box=None, pad_edge=False, header_style="dim")
        for number, name in enumerate(header):
            numeric = all(row[number][:1] in "+-0123456789" for row in rows)
            table.add_column(escape(name), justify="right" if numeric else "left")
        for row in rows:
            table.add_row(*map(escape, row))
        self.console.print(table)

    @contextmanager
    def progress(self, what: str, total: int) -> Iterator[Advance]:
        """Shows how far a long piece of work is, and at its end how long it took."""
        start = time.perf_counter()
        if self.console.is_terminal:
            columns = (
                TextColumn("{task.description}", markup=False), BarColumn(), TextColumn("{task.fields[note]}"),
                TimeElapsedColumn(), TimeRemainingColumn(),
            )  # fmt: skip
            with Progress(*columns, console=self.console, transient=True) as bar:
                task = bar.add_task(what, total=total, note="")
                yield lambda done, note: bar.update(task, completed=done, note=note)
        else:
            shown = 0

            def advance(done: int, note: str) -> None:
                nonlocal shown
                if done * 4 // total > shown:
                    shown = done * 4 // total
                    self.say(f"  {what}: {done} of {total}, {note}")

            yield advance
        self.say(f"{what}: done in {time.perf_counter() - start:.1f} s")
