"""`python -m plots`: draw every figure whose data is there."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks import compiled as compiling
from benchmarks import results, speed
from benchmarks import story as telling
from benchmarks import study as studying
from tritongru.demo import figures
from tritongru.tools.style import save, settings

from . import __doc__ as about
from . import beside_time, compiled, counted, measured, study
from .speed import draw_speed

SIZES = ""  # nothing has to be made
COMPILED = "`python -m benchmarks compiled`"
STUDY = "`python -m benchmarks study`"
STORY = "`python -m benchmarks story`"
DAY = "`python -m benchmarks day` on a CUDA machine"
TIMED = "what benchmarks/results/nvidia-h200/README.md describes"


@dataclass(frozen=True)
class Entry:
    """A figure: its name, which command makes its data, and the function, which returns None where there is none."""

    name: str
    source: str
    draw: Callable[..., Figure | None]


ENTRIES = {
    entry.name: entry
    for entry in (
        Entry("launches", SIZES, counted.draw_launches),
        Entry("residency", SIZES, counted.draw_residency),
        Entry("memory", SIZES, counted.draw_memory),
        Entry("resources", COMPILED, compiled.draw_resources),
        Entry("instructions", COMPILED, compiled.draw_instructions),
        Entry("forms", SIZES, study.draw_forms),
        Entry("study", STUDY, study.draw_study),
        *(Entry(name, STORY, draw) for name, draw in figures.STORY.items()),
        Entry("speed", TIMED, draw_speed),
        Entry("step-time", DAY, measured.draw_step_time),
        Entry("speedup", DAY, measured.draw_speedup),
        Entry("time-scaling", DAY, measured.draw_time_scaling),
        Entry("measured-memory", DAY, beside_time.draw_measured_memory),
        Entry("accuracy", DAY, beside_time.draw_accuracy),
        Entry("roofline", DAY, beside_time.draw_roofline),
        Entry("networks", DAY, measured.draw_networks),
        Entry("streaming", DAY, measured.draw_streaming),
    )
}


@dataclass(frozen=True)
class Facts:
    """What the results folder holds; measured rows and ceilings by GPU."""

    compiled: list[dict[str, str]]
    study: list[dict[str, str]]
    story: list[dict[str, str]]
    words: list[dict[str, str]]
    shapes: list[speed.Shape]
    measured: dict[str, list[dict[str, str]]]
    ceilings: dict[str, dict[str, float]]

    @classmethod
    def read(cls, folder: Path) -> Facts:
        """Raises: OtherSchemaError."""
        rows: dict[str, list[dict[str, str]]] = {}
        for row in results.read_rows(folder):
            if row["driver"]:  # empty: a CPU, where the layer runs PyTorch's own path
                rows.setdefault(row["device"], []).append(row)
        ceilings: dict[str, dict[str, float]] = {}
        for path in sorted(folder.rglob(results.CEILINGS)):
            for row in sorted(results.read(path, results.CEILINGS_COLUMNS), key=lambda row: row["date"]):
                if row["value"]:
                    ceilings.setdefault(row["device"], {})[row["name"]] = float(row["value"])
        compiled = results.read(folder / compiling.FILE, compiling.COLUMNS)
        study = results.read(folder / studying.FILE, studying.COLUMNS)
        story = results.read(folder / telling.FOLDER / telling.ANSWERS, telling.COLUMNS)
        words = results.read(folder / telling.FOLDER / telling.WORDS, telling.WORD_COLUMNS)
        shapes = speed.shapes(folder / speed.FOLDER.name)
        return cls(compiled, study, story, words, shapes, rows, ceilings)


def draw(entry: Entry, facts: Facts) -> Iterator[tuple[str, Figure]]:
    """An entry's figures with the names of their files; of measured ones a figure for each GPU."""
    calls: list[tuple[str, tuple[Any, ...]]]
    if entry.source == DAY:
        calls = [
            (f"{entry.name}-{results.folder_of(device).name}", (rows, facts.ceilings.get(device, {})))
            for device, rows in facts.measured.items()
        ]
    elif entry.source == TIMED:
        calls = [
            (f"{entry.name}-{results.folder_of(device).name}", (facts.shapes, rows))
            for device, rows in facts.measured.items()
            if results.folder_of(device).name == speed.FOLDER.name
        ]
    else:
        rows_of = {
            COMPILED: (facts.compiled,),
            STUDY: (facts.study,),
            STORY: (facts.words if entry.draw is figures.draw_gates else facts.story,),
        }
        calls = [(entry.name, rows_of.get(entry.source, ()))]
    for name, arguments in calls:
        with settings():
            found = entry.draw(*arguments)
        if found is not None:
            yield name, found


def main(argv: Sequence[str] | None = None) -> int:
    """Draw; returns the exit code: 0, or 1 if a figure asked for by name has no data, or 2."""
    parser = argparse.ArgumentParser(
        prog="python -m plots", description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=results.RESULTS, help="folder of results (benchmarks/results)")
    parser.add_argument("--out", type=Path, default=Path("out", "plots"), help="folder of the figures (./out/plots)")
    parser.add_argument("--only", metavar="NAME", choices=ENTRIES, help=f"one of {', '.join(ENTRIES)}")
    arguments = parser.parse_args(argv)
    if not arguments.results.is_dir():
        parser.error(f"--results must be a folder, got {arguments.results}")
    try:
        facts = Facts.read(arguments.results)
    except results.OtherSchemaError as error:
        print(f"python -m plots: {error}", file=sys.stderr)
        return 2
    missing = False
    for entry in ENTRIES.values():
        if arguments.only not in (None, entry.name):
            continue
        drawn = False
        for name, found in draw(entry, facts):
            print(f"{entry.name:<16} {save(found, arguments.out, name)}")
            drawn = True
        if not drawn:
            print(f"{entry.name:<16} not drawn, no rows for it: {entry.source} makes them")
            missing = True
    return 1 if missing and arguments.only else 0


if __name__ == "__main__":
    sys.exit(main())
