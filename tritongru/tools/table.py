"""A table on the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table


def show(title: str, header: Sequence[str], rows: Iterable[Sequence[object]], names: int = 1) -> None:
    """Print it, a row a line in a pipe too. names: the columns at the left that hold words; the others hold figures."""
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(header):
        table.add_column(column, justify="left" if i < names else "right", overflow="ellipsis", no_wrap=i < names)
    for row in rows:
        table.add_row(*map(str, row))
    Console(width=120).print(table)
