"""What suite `tune` found: for each class of tiles those that win over the planned ones by more than the calls vary, or
none, written as data.

Of each class of tiles the candidates were replayed from CUDA graphs in turn (run.py), forward with gradients wanted,
and that with backward; backward is the difference. A candidate wins a pass where its p80 lies below the p20 of the
planned tiles, of the difference with both ends at their worst, and its median is less by a share that is worth another
kernel to compile; of several the one with the least median.
"""

import csv
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

from tritongru import call
from tritongru.planning import tuned
from tritongru.planning.devices import product_key

from .candidates import TILED
from .results import read_rows
from .suites import TUNE_T

WORTH = 0.03
Times = tuple[float, float, float]  # p20, p50, p80, in us of a call


def winners(rows: Iterable[dict[str, str]]) -> Iterator[dict[str, object]]:
    """Of measured rows, those of tritongru/planning/tiles: one of each class and pass."""
    measured = by_class(rows)
    for backend, dtype, H, B in TILED:
        by_provider = measured.get((dtype, H, B), {})
        for kind, before in passes_of(by_provider.get(backend, {})).items():
            found = {"": before}
            for provider, timed in by_provider.items():
                base, _, fields = provider.partition(":")
                if base == backend and fields and (times := passes_of(timed).get(kind)) and _wins(times, before):
                    found[fields] = times
            best = min(found, key=lambda fields: found[fields][1])
            yield {
                "backend": backend, "pass": kind, "dtype": dtype, "H": H, "B": B, "fields": best,
                "us_per_step": f"{found[best][1] / TUNE_T:.4g}", "planned_us": f"{before[1] / TUNE_T:.4g}",
            }  # fmt: skip


def _wins(times: Times, planned: Times) -> bool:
    return times[2] < planned[0] and times[1] <= (1 - WORTH) * planned[1]


def by_class(rows: Iterable[dict[str, str]]) -> dict[tuple[str, int, int], dict[str, dict[str, Times]]]:
    """Times by dtype, H and B, then by provider, then by pass."""
    found: dict[tuple[str, int, int], dict[str, dict[str, Times]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        if row["status"] == "ok" and row["p50_us"]:
            times = float(row["p20_us"]), float(row["p50_us"]), float(row["p80_us"])
            found[row["dtype"], int(row["H"]), int(row["B"])][row["provider"]][row["pass"]] = times
    return found


def passes_of(timed: dict[str, Times]) -> dict[str, Times]:
    """Of forward, and of that with backward: forward and backward."""
    found = {"forward": timed["forward"]} if "forward" in timed else {}
    if found and (whole := timed.get("forward+backward")):
        less = timed["forward"]
        found["backward"] = whole[0] - less[2], whole[1] - less[1], whole[2] - less[0]
    return found


def write(out: Path) -> str:
    """Write the winners of the rows under `out` as data that planning reads; what was done, in words."""
    rows = [row for row in read_rows(out) if row["T"] == str(TUNE_T)]
    path = file_of(rows[0]["device"]) if rows else None
    if path is None:
        return "no tiles written: no rows of suite tune, or of a GPU that planning/devices.py does not describe"
    found = list(winners(rows))
    _write(path, found)
    won = sum(bool(row["fields"]) for row in found)
    return f"of {len(found)} classes of tiles {won} have better ones than planned, in {path.parent.name}/{path.name}"


def file_of(product: str) -> Path | None:
    """Of a GPU by the name that its driver gives it; None: nobody has described it."""
    key = product_key(product)
    return tuned.FOLDER / f"{key}.csv" if key else None


def forget(product: str) -> None:
    """Have no winners, of an earlier run or of a GPU alike: candidates are held against tiles as they are planned."""
    if path := file_of(product):
        _write(path, [])


def _write(path: Path, found: Iterable[dict[str, object]]) -> None:
    path.parent.mkdir(exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, tuned.COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(found)
    tuned.forget()
    call.forget()  # calls that are known have their tiles
