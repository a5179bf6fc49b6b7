"""Command `table`: the times by which the layer chooses its backend, from the results of a GPU.

Writes tritongru/planning/tables/h200.csv, which tritongru/planning/measured.py reads, and tiles/h200.csv beside it
(tune.py): whole calls of one layer, one direction, dense, from suite `grid`.
"""

import csv
import io
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from statistics import median

from tritongru.planning.measured import CELL, COLUMNS, TABLES, distance

from .cases import BASELINE
from .results import RESULTS, ROWS, read
from .suites import GRID_T, SHORT_T
from .tune import write as write_tiles
from .workloads import BY_CASE

# The device's key in tritongru/planning/devices.py: its results. The H100 has no table of its own: its rows confirm
# that of the H200, whose chip it has.
MEASURED = {"h200": RESULTS / "nvidia-h200"}
GRID, SHORT = str(GRID_T), str(SHORT_T)
PASSES = {"inference": "inference", "forward+backward": "training"}
BACKENDS = {BASELINE: "aten", "step": "step", "sequence": "sequence"}  # by provider
LIKE = 256  # from this H on float16 takes nn.GRU and our kernels as long as bfloat16 does
Row = dict[str, object]


def table(folder: Path) -> str:
    """The file's text."""
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(of_grid(read(folder / ROWS)))
    return out.getvalue()


def _row(backend: str, step: float, once: float, alone: tuple[float, float] | None, source: str) -> Row:
    """alone: microseconds per step and per call on the device."""
    step_alone, once_alone = ("", "") if alone is None else (f"{us:.3f}" for us in alone)
    return {
        "backend": backend, "us_per_step": f"{step:.3f}", "us_per_call": f"{once:.1f}",
        "device_us_per_step": step_alone, "device_us_per_call": once_alone, "source": source,
    }  # fmt: skip


def of_grid(rows: Iterable[dict[str, str]]) -> Iterator[Row]:
    """Of rows of suite `grid`, of a measurement repeated the last. A step as it is called is never less than one on the
    device alone."""
    us: dict[tuple[str, str, int, int, str, str], tuple[float, float | None, str]] = {}
    short: dict[tuple[str, str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        kind, backend = PASSES.get(row["pass"]), BACKENDS.get(row["provider"])
        time = CELL if row["cell"] == "yes" else row["T"]
        plain = row["layers"] == row["directions"] == "1" and row["packed"] == "no" and row["case"] not in BY_CASE
        timed = row["status"] == "ok" and row["p50_us"] and time in ("1", CELL, SHORT, GRID)
        if kind and backend and plain and timed:
            key = (kind, row["dtype"], int(row["H"]), int(row["B"]), time, backend)
            called, on_device = float(row["p50_us"]), float(row["device_us"]) if row["device_us"] else None
            us[key] = called, on_device, row["commit"]
            if time == SHORT:
                short[kind, row["dtype"], backend][row["commit"]].append(called)

    def any_call(kind: str, dtype: str, backend: str, commit: str) -> float:
        """What a call takes however short it is, in rows of that commit, when the host was as fast; or the least."""
        found = {of: median(calls) for of, calls in short[kind, dtype, backend].items()}
        return found.get(commit, min(found.values(), default=0.0))

    def once_alone(kind: str, dtype: str, H: int, B: int, backend: str) -> float:
        """On the device, beyond its steps, of the nearest call of few: the first launches of a pass do more."""
        found = {
            (h, b): few - SHORT_T * long / GRID_T
            for (*of, h, b, time, name), (_, few, _) in us.items()
            if (*of, time, name) == (kind, dtype, SHORT, backend) and few
            if (long := us.get((kind, dtype, h, b, GRID, backend), (0.0, None, ""))[1])
        }
        nearest = min(found, key=lambda cell: distance(cell, H, B), default=None)
        return max(found[nearest], 0.0) if nearest else 0.0

    for (kind, dtype, H, B, time, backend), (called, on_device, commit) in sorted(us.items()):
        at = {"pass": kind, "H": H, "B": B}
        if time in ("1", CELL):
            alone = None if on_device is None else (0.0, on_device)
            yield {**at, "dtype": dtype, "T": time, **_row(backend, 0, called, alone, ROWS)}
        elif time == GRID:
            alone = None if on_device is None else (on_device / GRID_T, once_alone(kind, dtype, H, B, backend))
            once = any_call(kind, dtype, backend, commit)
            step = max((called - once) / GRID_T, alone[0] if alone else 0)
            yield {**at, "dtype": dtype, **_row(backend, step, once, alone, ROWS)}
            measured = any(key[:5] == (kind, "fp16", H, B, time) for key in us)
            if dtype == "bf16" and H >= LIKE and not measured:
                once = any_call(kind, "fp16", backend, commit)
                yield {**at, "dtype": "fp16", **_row(backend, step, once, alone, f"{ROWS}, in bf16")}


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
