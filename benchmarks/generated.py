"""Parts of documents that a command writes: between two marks, which name it. A test holds each against its rows."""

from collections.abc import Sequence
from pathlib import Path

from tritongru.tools.files import replacing

PROGRAM = "python -m benchmarks"


def _around(document: Path, command: str, program: str) -> tuple[str, str, str]:
    """What is before, between and after the marks, which belong to the first and the last."""
    begin, end = (f"<!-- {mark}: {program} {command} -->" for mark in ("begin", "end"))
    before, rest = document.read_text(encoding="utf-8").split(begin)
    between, after = rest.split(end)
    return before + begin, between, end + after


def generated(document: Path, command: str, program: str = PROGRAM) -> str:
    """What stands between the marks."""
    return _around(document, command, program)[1].strip("\n")


def generate(document: Path, command: str, text: str, program: str = PROGRAM) -> None:
    """Put `text` between them."""
    before, _, after = _around(document, command, program)
    with replacing(document) as temporary:
        temporary.write_text(f"{before}\n{text}\n{after}", encoding="utf-8")


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """In Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in lines)
