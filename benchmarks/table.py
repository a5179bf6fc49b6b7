"""Command `table`: the times by which the layer chooses its backend, from the results of a GPU.

Writes tritongru/planning/tables/h200.csv, which tritongru/planning/measured.py reads, and tiles/h200.csv beside it
(tune.py): whole calls of one layer, one direction, dense. From suite `grid` where the folder has its rows.

Where it has not: `sequence` has been written anew since its calls were timed, and no row of the old form is a
candidate. In their place stand the times of the Gluon prototype (prototypes.csv), in the rest of such a call as it
was: what its kernels took besides the recurrence.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from statistics import median

from tritongru.planning.devices import DEVICES, _described
from tritongru.planning.measured import COLUMNS, TABLES

from .cases import BASELINE
from .results import RESULTS, ROWS, read_rows
from .speed import Shape, kernel_times, rows_of, shapes, study_times
from .suites import GRID_T, SHORT_T
from .tune import write as write_tiles

# The device's key in tritongru/planning/devices.py: its results.
MEASURED = {
    key: folder
    for folder in sorted(RESULTS.iterdir())
    for key, device in DEVICES.items()
    if folder.is_dir() and _described(folder.name) is device
}
PASSES = {"inference": "inference", "forward+backward": "training"}
BACKENDS = {BASELINE: "aten", "step": "step", "sequence": "sequence"}  # by provider
Row = dict[str, object]


def table(folder: Path) -> str:
    """The file's text."""
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(list(of_grid(read_rows(folder))) or of_first_look(folder))
    return out.getvalue()


def _row(backend: str, step: float, once: float, on_device: float | None, source: str) -> Row:
    return {
        "backend": backend, "us_per_step": f"{step:.3f}", "us_per_call": f"{once:.1f}",
        "device_us_per_step": "" if on_device is None else f"{on_device:.3f}", "source": source,
    }  # fmt: skip


def of_grid(rows: Iterable[dict[str, str]]) -> Iterator[Row]:
    """Of rows of suite `grid`. A step as it is called is never less than one on the device alone."""
    us: dict[tuple[str, str, int, int, int, str], tuple[float, float | None]] = {}
    for row in rows:
        kind, backend, time = PASSES.get(row["pass"]), BACKENDS.get(row["provider"]), int(row["T"])
        plain = row["layers"] == row["directions"] == "1" and row["packed"] == row["cell"] == "no"
        timed = row["status"] == "ok" and row["p50_us"] and time in (1, SHORT_T, GRID_T)
        if kind and backend and plain and timed:
            key = (kind, row["dtype"], int(row["H"]), int(row["B"]), time, backend)
            us[key] = float(row["p50_us"]), float(row["device_us"]) if row["device_us"] else None
    if not any(key[4] == GRID_T for key in us):
        return
    for (kind, dtype, H, B, time, backend), (called, on_device) in sorted(us.items()):
        at = {"pass": kind, "dtype": dtype, "H": H, "B": B}
        if time == 1:
            yield {**at, "T": 1, **_row(backend, 0, called, None, ROWS)}
        elif time == GRID_T:
            short = [t[0] for key, t in us.items() if (key[0], *key[4:]) == (kind, SHORT_T, backend)]
            once, alone = median(short) if short else 0.0, None if on_device is None else on_device / GRID_T
            yield {**at, **_row(backend, max((called - once) / GRID_T, alone or 0), once, alone, ROWS)}


# Until there is a grid: of first_look.csv and what stands beside it
T = 512  # of every long call
SHORT = 8  # calls of T up to this take little but what any call costs
FIRST_FORM = " (as first built)"  # of `step`, whose launches wait for each other there; nothing else of it was timed
SAVING = 0.2  # us that saving the gates adds to a step of the prototype at the most, which was timed without
ON_CHIP = 2048  # half precision below this H stays on chip: what was timed there without `sequence` says little
LIKE = 512  # from this H on float16 has bfloat16's kernels, and takes cuDNN as long
# by pass: how a call is timed, how its device's share is, the columns of host.csv, the recurrent kernels
WAYS = {
    "inference": ("forward", "forward_graph", "f", ("forward",)),
    "training": ("training", "kernels", "fb", ("forward", "backward")),
}


def of_first_look(folder: Path) -> Iterator[Row]:
    """Of every shape that was timed before there was a grid."""
    every = {shape.key: shape for shape in shapes(folder) if (folder / "first_look.csv").exists()}
    like = {("fp16", H, B): every[dtype, H, B] for dtype, H, B in every if dtype == "bf16" and H >= LIKE}
    for kind, (*_, suffix, _) in WAYS.items():
        for key in sorted({*every, *like}):
            dtype, H, B = key
            timed = [*_of_calls(kind, every.get(key) or like[key], folder)]
            timed += _of_the_study(kind, like.get(key) or every[key], folder)
            on_chip = H < ON_CHIP and (dtype == "bf16" or key in like)
            if len(timed) > 1 and not (on_chip and timed[-1]["backend"] != "sequence"):
                yield from ({"pass": kind, "dtype": dtype, "H": H, "B": B, **row} for row in timed)
        for host in rows_of("host.csv", folder):
            if host["T"] == "1":
                for backend, names in {"aten": ("nn",), "step": ("step", "ours")}.items():  # which was `step` there
                    us = min(float(host[f"{name}_{suffix}"]) for name in names)
                    source = "host.csv" + FIRST_FORM * (backend == "step")
                    at = {"pass": kind, "H": host["H"], "B": host["B"], "T": 1}
                    yield {**at, **_row(backend, 0, us, None, source)}


def _of_calls(kind: str, shape: Shape, folder: Path) -> Iterator[Row]:
    """Of PyTorch's own path and `step`."""
    called, alone, *_ = WAYS[kind]
    for backend, name in (("aten", BASELINE), ("step", "step")):
        us, on_device = shape.us.get((called, name)), shape.us.get((alone, name))
        if us is not None:
            once = _any_call(kind, backend, folder)
            source = shape.source + FIRST_FORM * (backend == "step")
            yield _row(backend, max(us - once / T, on_device or 0), once, on_device, source)


def _of_the_study(kind: str, shape: Shape, folder: Path) -> Iterator[Row]:
    """Of `sequence`: the prototype's kernels, and what the others of such a call took."""
    _, alone, _, passes = WAYS[kind]
    study = [study_times(folder).get((shape.key, pass_)) for pass_ in passes]
    whole, listed = shape.us.get((alone, "sequence")), kernel_times(folder)[shape.key]["sequence"]
    if whole is not None and None not in study:
        recurrent = {f"sequence_{pass_}" for pass_ in passes}
        rest = whole - sum(float(row["total_us"]) for row in listed if row["kernel"] in recurrent) / T
        us = sum(filter(None, study)) + rest + SAVING * (kind == "training")
        source = f"prototype in {shape.key[0]}: prototypes.csv"
        yield _row("sequence", us, _any_call(kind, "sequence", folder), us, source)


def _any_call(kind: str, backend: str, folder: Path) -> float:
    """us that a call takes however short it is. They vary by half: PyTorch's path is given its least one."""
    column = {"aten": "nn", "sequence": "seq", "step": "step"}[backend] + f"_{WAYS[kind][2]}"
    us = [float(row[column]) for row in rows_of("host.csv", folder) if 1 < int(row["T"]) <= SHORT]
    return min(us) if backend == "aten" else median(us)


def main(out: Path | None = None) -> int:
    """Write the package's files from the committed results; of a folder `out` its table.csv alone."""
    if out is not None:
        found = table(out)
        (out / "table.csv").write_text(found, encoding="utf-8")
        print(f"what {out.name} says, of {len(found.splitlines()) - 1} calls, is in its table.csv")
        return 0
    for name, folder in MEASURED.items():
        (TABLES / f"{name}.csv").write_text(table(folder), encoding="utf-8")
        print(f"what {folder.name} says is in tritongru/planning/tables/{name}.csv")
        print(write_tiles(folder))
    return 0
