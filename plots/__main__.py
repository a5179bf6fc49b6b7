"""`python -m plots`: draw every figure whose data is there."""

import argparse
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks import compiled as compiling
from benchmarks import results
from benchmarks import story as telling
from benchmarks import study as studying
from benchmarks.table import MEASURED
from tritongru.demo import figures
from tritongru.tools.style import save, settings

from . import __doc__ as about
from . import compiled, counted, measured, study

Rows = list[dict[str, str]]


@dataclass(frozen=True)
class Gpu:
    """What is known of one GPU: rows, and ceilings by name."""

    rows: Rows = field(default_factory=list)
    ceilings: dict[str, float] = field(default_factory=dict)


# The files of `Facts`, in the results folder, and their columns.
COMPILED_ROWS, STUDY_ROWS = Path(compiling.FILE), Path(studying.FILE)
STORY_ROWS, STORY_WORDS = Path(telling.FOLDER, telling.ANSWERS), Path(telling.FOLDER, telling.WORDS)
COLUMNS = {
    COMPILED_ROWS: compiling.COLUMNS, STUDY_ROWS: studying.COLUMNS, STORY_ROWS: telling.COLUMNS,
    STORY_WORDS: telling.WORD_COLUMNS,
}  # fmt: skip


@dataclass(frozen=True)
class Facts:
    """What the results folder holds: rows by file, and of every GPU by its folder."""

    rows: dict[Path, Rows]
    gpus: dict[str, Gpu]

    @classmethod
    def read(cls, folder: Path) -> "Facts":
        """Of the committed results the GPUs that have a table; those that confirm one of these have no figures.

        Raises:
            OtherSchemaError: as `results.read`.
        """
        gpus: dict[str, Gpu] = defaultdict(Gpu)
        for row in results.read_rows(folder):
            if row["driver"]:  # empty: a CPU, where the layer runs PyTorch's own path
                gpus[results.folder_of(row["device"]).name].rows.append(row)
        for path in sorted(folder.rglob(results.CEILINGS)):
            for row in results.read(path, results.CEILINGS_COLUMNS):
                if row["value"]:
                    gpus[results.folder_of(row["device"]).name].ceilings[row["name"]] = float(row["value"])
        if folder == results.RESULTS:
            gpus = {of.name: gpus[of.name] for of in MEASURED.values()}
        return cls({file: results.read(folder / file, columns) for file, columns in COLUMNS.items()}, gpus)


SIZES = ""  # nothing has to be made
COMPILED, STUDY, STORY = (f"`python -m benchmarks {command}`" for command in ("compiled", "study", "story"))
DAY = "`python -m benchmarks day` on a CUDA machine"

# By name: which command makes its data, and the figure of `Facts`, or of a `Gpu`: None where there is none.
ENTRIES: dict[str, tuple[str, Callable[[Any], Figure | None]]] = {
    "launches": (SIZES, lambda facts: counted.draw_launches()),
    "residency": (SIZES, lambda facts: counted.draw_residency()),
    "memory": (SIZES, lambda facts: counted.draw_memory()),
    "resources": (COMPILED, lambda facts: compiled.draw_resources(facts.rows[COMPILED_ROWS])),
    "instructions": (COMPILED, lambda facts: compiled.draw_instructions(facts.rows[COMPILED_ROWS])),
    "forms": (SIZES, lambda facts: study.draw_forms()),
    "study": (STUDY, lambda facts: study.draw_study(facts.rows[STUDY_ROWS])),
    "story-gaps": (STORY, lambda facts: figures.draw_gaps(facts.rows[STORY_ROWS])),
    "story-gates": (STORY, lambda facts: figures.draw_gates(facts.rows[STORY_WORDS])),
    "step-time": (DAY, lambda gpu: measured.draw_step_time(gpu.rows)),
    "speedup": (DAY, lambda gpu: measured.draw_speedup(gpu.rows)),
    "measured-memory": (DAY, lambda gpu: measured.draw_measured_memory(gpu.rows)),
    "accuracy": (DAY, lambda gpu: measured.draw_accuracy(gpu.rows)),
    "roofline": (DAY, lambda gpu: measured.draw_roofline(gpu.rows, gpu.ceilings)),
}


def draw(name: str, facts: Facts) -> Iterator[tuple[str, Figure]]:
    """An entry's figures with the names of their files; of measured ones one for each GPU."""
    source, make = ENTRIES[name]
    given = {f"{name}-{gpu}": of_it for gpu, of_it in facts.gpus.items()} if source == DAY else {name: facts}
    for file, of_it in given.items():
        with settings():
            found = make(of_it)
        if found is not None:
            yield file, found


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
    for name, (source, _) in ENTRIES.items():
        if arguments.only not in (None, name):
            continue
        drawn = [save(found, arguments.out, file) for file, found in draw(name, facts)]
        missing |= not drawn
        for said in drawn or [f"not drawn, no rows for it: {source} makes them"]:
            print(f"{name:<16} {said}")
    return 1 if missing and arguments.only else 0


if __name__ == "__main__":
    sys.exit(main())
