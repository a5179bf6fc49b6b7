"""What a command leaves: files that appear whole or not at all, and a table on the terminal."""

import csv
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path in the same folder; its file takes the place of `path` at the end, or vanishes on an error. A link stays,
    and what it points to is replaced. Raises: OSError where the folder takes no files."""
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}-{os.getpid()}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_rows(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A CSV file; floats keep every digit that tells them apart."""
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])


def show(title: str, header: Sequence[str], rows: Iterable[Sequence[object]], names: int = 1) -> None:
    """Print a table, a row a line in a pipe too. names: the columns at the left that hold words, not figures."""
    from rich.console import Console  # which environments that only compile do not have
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for i, column in enumerate(header):
        is_name = i < names  # of a kernel it may be long: figures keep half of the width
        how: Any = dict(justify="left", no_wrap=True, max_width=60 // names) if is_name else dict(justify="right")
        table.add_column(column, overflow="ellipsis", **how)
    for row in rows:
        table.add_row(*map(str, row))
    Console(width=120).print(table)
