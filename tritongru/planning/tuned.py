"""Fields of tiles that are not as planned: set by hand behind a backend's name ("sequence:block_h=8"), or winners of a
measurement, rows in planning/tiles/, a file per GPU.

`python -m benchmarks --suite tune` writes the rows, one for each class of tiles that it timed, without fields where the
planned tiles won. Each is of one pass of a backend, in one dtype: for H up to the row's and above half of it, of tiles
with a class of K for that class; and for batches up to its B, above those of the row before. A GPU without a file takes
that of one of the same compute capability and as many SMs.
"""

import csv
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from .devices import DEVICES, Device, nearest_file
from .problem import Overrides, Recurrence

FOLDER = Path(__file__).with_name("tiles")
# fields: as behind a backend's colon. us_per_step, planned_us: of these tiles and of the planned ones.
COLUMNS = ("backend", "pass", "dtype", "H", "B", "fields", "us_per_step", "planned_us")
LIKE = {"fp16": "bf16"}  # whose kernels are the same


def parse_overrides(text: str, backend: str = "", fields: Sequence[str] = ()) -> Overrides:
    """Fields of a backend's tiles from "block_h=8,num_warps=4".

    Raises:
        ValueError: one that is none of `fields`, where these are told, or no number.
    """
    found = {}
    for part in text.split(","):
        name, _, value = part.strip().partition("=")
        if fields and name not in fields:
            raise ValueError(f"backend {backend!r} takes the fields {', '.join(fields)}, got {name!r}")
        if not value.isdecimal():
            raise ValueError(f"field {name} of backend {backend!r} must be a number of digits, got {value!r}")
        found[name] = int(value)
    return tuple(found.items())


def check(backend: str, fields: Mapping[str, int], possible: Mapping[str, Sequence[int]]) -> None:
    """Raise ValueError of the first field that is none of what it may be."""
    for name, of in possible.items():
        if name in fields and fields[name] not in of:
            every = [f"{of[0]} to {of[-1]}"] if isinstance(of, range) else [*dict.fromkeys(map(str, of))]
            if len(every) > 6:  # powers of 2
                every[2:-1] = [".."]
            expected = ("one of " if len(every) > 1 else "") + ", ".join(every)
            raise ValueError(f"tiles of backend {backend!r}: {name} must be {expected} here, got {fields[name]}")


@lru_cache(maxsize=8192)
def or_winner(planner: Callable[[str, Recurrence], Any], backend: str, kind: str, of: Recurrence) -> Any:
    """What a planner gives; with the fields of a winner where none are set, if the layer can have them."""
    planned = planner(kind, of)
    if of.overrides or isinstance(planned, str):
        return planned
    with suppress(ValueError, TypeError):  # nothing won, or for another layer, or of fields that there were once
        won = parse_overrides(winner(backend, kind, of, getattr(planned, "units", 0)))
        tuned = planner(kind, of._replace(overrides=won))
        return planned if isinstance(tuned, str) else tuned
    return planned


def winner(backend: str, kind: str, of: Recurrence, units: int) -> str:
    """The fields that won; none where the planned tiles did, or nothing was timed. units: the class of K, of tiles that
    have one; 0: by H."""
    found = [
        (int(row["H"]), int(row["B"]), row["fields"])
        for row in _rows(of.device)
        if (row["backend"], row["pass"], row["dtype"]) == (backend, kind, LIKE.get(of.dtype, of.dtype))
    ]
    # At half the H an H200 took longer with the winners than with the planned tiles (`step`, H 512, B 128, bf16).
    H = units or min((H for H, *_ in found if H // 2 < of.hidden_size <= H), default=0)
    of_class = sorted(row for row in found if row[0] == H)
    return next((fields for _, B, fields in of_class if of.batch <= B), "")


@lru_cache
def _rows(device: Device) -> list[dict[str, str]]:
    """What was timed on that GPU, or on one of the same compute capability with as many SMs."""
    path = nearest_file(FOLDER, device)
    if path and (DEVICES[path.stem].capability, DEVICES[path.stem].sms) == (device.capability, device.sms):
        return list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))
    return []


def forget() -> None:
    """Read the files again: they have been written."""
    or_winner.cache_clear()
    _rows.cache_clear()
