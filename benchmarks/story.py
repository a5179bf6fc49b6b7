"""Command `story`: `python -m tritongru demo --story` over several seeds, into benchmarks/results/story.

answers.csv has a row per network, seed and question (columns: tritongru/demo/networks.py), words.csv one per word of
the story. Rows are appended as trainings end.
"""

import sys
from pathlib import Path

import torch

from tritongru.demo import claims, networks
from tritongru.demo.data import DemoError

from .results import FIXED, RESULTS, Environment, ResultsFile

FOLDER = "story"  # in benchmarks/results
ANSWERS, WORDS = "answers.csv", "words.csv"
COLUMNS = (*FIXED, *networks.COLUMNS)
WORD_COLUMNS = (*FIXED, *networks.WORD_COLUMNS)
SEEDS = range(10, 15)  # not those that the trainings were set up with


def main(out: Path | None = None, sizes: networks.Sizes | None = None, processes: int | None = None) -> int:
    """Train, append, judge; returns the exit code: 0, 1 where a training was ended from outside, 130 interrupted.

    Raises: OtherSchemaError, FileExistsError where rows are there already, which must not be mixed with new ones.
    """
    folder = (RESULTS if out is None else out) / FOLDER
    for path in (folder / ANSWERS, folder / WORDS):
        if path.exists():
            raise FileExistsError(f"{path} is there already: move it away to train again")
    environment = Environment.here(torch.device("cpu"))
    rows: list[networks.Row] = []
    try:
        with (
            ResultsFile(folder / ANSWERS, environment, COLUMNS) as answers,
            ResultsFile(folder / WORDS, environment, WORD_COLUMNS) as words,
        ):
            for name, found, of_words in networks.results(sizes or networks.Sizes(), SEEDS, processes):
                rows += found
                for row in found:
                    answers.append(row)
                for row in of_words:
                    words.append(row)
                print(f"trained and asked: {name}", flush=True)
    except KeyboardInterrupt:
        print(f"python -m benchmarks story: interrupted; what had ended is in {folder}", file=sys.stderr)
        return 130
    except DemoError as error:
        print(f"python -m benchmarks story: {error}", file=sys.stderr)
        return 1
    claims.show(rows)
    return 0
