"""`python -m benchmarks.table`: the rows by which the layer chooses its backend, from the results of one GPU.

Writes tritongru/planning/tables/h200.csv, which tritongru/planning/measured.py reads. Whole calls of one layer, one
direction, dense. Where the harness (gru.csv) timed a call, its row is taken, else first_look.csv's, which has the times
in a CUDA graph besides.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path

from tritongru.planning.measured import COLUMNS, TABLES

from .results import RESULTS

MEASURED = {"h200": RESULTS / "nvidia-h200"}  # the device's key in tritongru/planning/devices.py: its results
T = 512  # of first_look.csv
LAYERS = {"aten": "nn", "sequence": "sequence", "step": "step"}  # first_look.csv's names of the backends
PASSES = {"inference": "forward", "training": "training"}  # and of the passes

Row = tuple[str, str, str, str, str, str, str, str, str]


def table(folder: Path) -> str:
    """The file's text."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows([*_calls(folder), *_short_calls(folder)])
    return out.getvalue()


def _calls(folder: Path) -> Iterator[Row]:
    """Of long calls: the harness's, then those that only the first look has."""
    graphs: dict[tuple[str, ...], str] = {}
    looked: dict[tuple[str, ...], str] = {}
    for row in _read(folder / "first_look.csv"):
        for backend, name in LAYERS.items():
            for kind, of_kind in PASSES.items():
                key = kind, row["dtype"], row["H"], row["B"], str(T), backend
                if each := row[f"{name}_{of_kind}"]:
                    looked[key] = f"{T * float(each):.1f}"
                if kind == "inference":
                    graphs[key] = row[f"{name}_forward_graph"]
    harness: dict[tuple[str, ...], str] = {}
    for row in _read(folder / "gru.csv"):
        provider = {"nn.GRU": "aten"}.get(row["provider"], row["provider"])
        kind = {"forward+backward": "training"}.get(row["pass"], row["pass"])
        plain = row["layers"] == row["directions"] == "1" and row["packed"] == row["cell"] == "no"
        if plain and row["status"] == "ok" and provider in LAYERS and kind in PASSES:
            harness[kind, row["dtype"], row["H"], row["B"], row["T"], provider] = f"{float(row['p50_us']):.1f}"
    timed = {key: (us, "first_look.csv") for key, us in looked.items()}
    timed |= {key: (us, "gru.csv") for key, us in harness.items()}
    for key in sorted(timed, key=_order):
        us, source = timed[key]
        kind, dtype, H, B, time, backend = key
        yield kind, dtype, H, B, time, backend, us, graphs.get(key, ""), source


def _short_calls(folder: Path) -> Iterator[Row]:
    """Of short ones, which take what a call costs however short it is. Their dtype was not written down."""
    for row in _read(folder / "host.csv"):
        for kind, suffix in (("inference", "f"), ("training", "fb")):
            for backend, name in (("aten", "nn"), ("sequence", "seq"), ("step", "step"), ("step", "ours")):
                if name != "ours" or row["T"] == "1":  # of one step the layer as it came took `step`
                    yield kind, "", row["H"], row["B"], row["T"], backend, row[f"{name}_{suffix}"], "", "host.csv"


def _order(key: tuple[str, ...]) -> tuple[object, ...]:
    kind, dtype, H, B, time, backend = key
    return kind, dtype, int(H), int(B), int(time), backend


def _read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


if __name__ == "__main__":
    for name, folder in MEASURED.items():
        (TABLES / f"{name}.csv").write_text(table(folder), encoding="utf-8")
