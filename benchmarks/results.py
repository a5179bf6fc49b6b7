"""Result files: CSV, a row per measurement, appended as it comes; every row says where it was taken."""

import csv
import dataclasses
import os
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib import import_module
from pathlib import Path

import torch
from torch import device as Device

import tritongru
from tritongru.registry import has_triton

from .cases import Case

SCHEMA = 2  # raise it with any change of the columns or of what they mean
ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
# What measuring writes is no change of the code that was measured.
WRITTEN = (":(exclude)benchmarks/results", ":(exclude)tritongru/planning/tiles")
UNKNOWN = "unknown"
ERRORS = ("output", "h_n", "x", "h_0", "w_ih", "w_hh", "b_ih", "b_hh")  # the tensors whose errors are kept


@dataclass(frozen=True)
class Environment:
    """Where and with what a row was measured."""

    date: str
    device: str
    driver: str
    torch: str
    triton: str
    cudnn: str
    tritongru: str
    commit: str
    dirty: str  # yes: tracked or new files outside the results differ from the commit

    @classmethod
    def here(cls, device: Device) -> "Environment":
        cuda = device.type == "cuda"
        commit, dirty = _commit()
        return cls(
            date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            device=torch.cuda.get_device_name(device) if cuda else processor(),
            driver=_driver() if cuda else "",
            torch=torch.__version__,
            triton=import_module("triton").__version__ if has_triton() else "none",
            cudnn=str(torch.backends.cudnn.version() or "none"),
            tritongru=tritongru.__version__,
            commit=commit,
            dirty=dirty,
        )

    def __str__(self) -> str:
        software = {"torch": self.torch, "triton": self.triton, "cuDNN": self.cudnn, "driver": self.driver}
        versions = ", ".join(f"{name} {of_it}" for name, of_it in software.items() if of_it not in ("", "none"))
        changed = {"no": "", "yes": ", with changes"}.get(self.dirty, f" (changed: {self.dirty})")
        host = f"host {processor()} with {os.cpu_count()} cores"
        return f"{self.device}, {host}; {versions}; commit {self.commit}{changed}"


def _figure(value: float | None) -> str:
    return "" if value is None else str(value) if isinstance(value, int) else f"{value:.6g}"


@dataclass(frozen=True)
class Row:
    """One measurement. Times are microseconds per call."""

    case: Case
    provider: str
    pass_: str  # inference, forward, forward+backward, streaming
    status: str = "ok"  # ok, wrong, error, out of memory, unserved
    note: str = ""
    products: str = ""  # of float32: tf32 or ieee
    l2: str = ""  # warm: as the call before left it
    first_call_s: float | None = None  # with the compilation of kernels that no earlier call had compiled
    rounds: int | None = None
    calls: int | None = None  # per sample
    p50_us: float | None = None
    p20_us: float | None = None
    p80_us: float | None = None
    p99_us: float | None = None  # streaming
    ratio: float | None = None  # p50 to nn.GRU's in the same rounds; below 1 is faster
    host_us: float | None = None  # p50 until the host has issued the call
    device_us: float | None = None  # p50 replayed from a CUDA graph (first rows: with all launches queued beforehand)
    peak_mib: float | None = None  # of forward and backward, above what lay there before
    saved_mib: float | None = None  # between them, without the results
    errors: dict[str, float] | None = None  # ||found - truth|| / ||truth|| against float64, by tensor

    def cells(self) -> dict[str, object]:
        """The row's own columns."""
        case = self.case
        given = {
            "case": case.name, "provider": self.provider, "pass": self.pass_, "dtype": case.dtype,
            "products": self.products, "T": case.T, "B": case.B, "I": case.I, "H": case.H, "layers": case.layers,
            "directions": case.directions, "packed": "yes" if case.packed else "no",
            "cell": "yes" if case.cell else "no", "l2": self.l2, "status": self.status, "note": self.note,
        }  # fmt: skip
        derived = {"us_per_step": None if self.p50_us is None else self.p50_us / (case.T * case.layers)}
        figures = {name: _figure(derived.get(name, getattr(self, name, None))) for name in _FIGURES}
        errors = {f"error_{name}": _figure((self.errors or {}).get(name)) for name in ERRORS}
        return {**given, **figures, **errors}


# limit_us, of_limit: of the first rows alone, the least time of the call by the card's measured ceilings and its share.
_FIGURES = (
    "first_call_s", "rounds", "calls", "p50_us", "p20_us", "p80_us", "p99_us", "us_per_step", "ratio", "host_us",
    "device_us", "limit_us", "of_limit", "peak_mib", "saved_mib",
)  # fmt: skip
FIXED = ("schema", *(field.name for field in dataclasses.fields(Environment)))  # the columns of every results file
COLUMNS = (*FIXED, *Row(Case(1, 1, 1, 1), "", "").cells())
ROWS = "gru.csv"  # the name of a file of such rows
CEILINGS = "ceilings.csv"  # and of one of what a card does at most
CEILINGS_COLUMNS = (*FIXED, "name", "value", "unit", "note")
KEY = ("device", "case", "provider", "pass", "l2")  # what tells measurements apart


class OtherSchemaError(ValueError):
    """A results file that rows of this schema must not be mixed into."""


class ResultsFile(AbstractContextManager["ResultsFile"]):
    """A CSV file that rows are appended to; each is on disk before the next is measured.

    Args:
        columns: FIXED, which `environment` fills, and the row's own.

    Raises:
        OtherSchemaError: the file holds rows of another schema.
    """

    def __init__(self, path: Path, environment: Environment, columns: Sequence[str] = COLUMNS):
        self.path, self.environment = path, environment
        self.fixed = {"schema": SCHEMA, **dataclasses.asdict(environment)}
        self.count = 0
        before = read(path, columns)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", newline="", encoding="utf-8")
        self._writer = csv.DictWriter(self._file, columns, lineterminator="\n")
        if not before and path.stat().st_size == 0:
            self._writer.writeheader()
            self._file.flush()

    def append(self, row: Row | Mapping[str, object]) -> None:
        """One more row."""
        self._writer.writerow({**self.fixed, **(row.cells() if isinstance(row, Row) else row)})
        self._file.flush()
        self.count += 1

    def __exit__(self, *_: object) -> None:
        self._file.close()


def read(path: Path, columns: Sequence[str] = COLUMNS) -> list[dict[str, str]]:
    """The rows of a results file, none where there is no file.

    Raises:
        OtherSchemaError: other columns or another schema number.
    """
    if not path.exists() or path.stat().st_size == 0:
        return []
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    schemas = {row.get("schema") or "none" for row in rows} or {str(SCHEMA)}
    if tuple(reader.fieldnames or ()) != tuple(columns) or schemas != {str(SCHEMA)}:
        found = ", ".join(sorted(schemas)) if schemas != {str(SCHEMA)} else "other columns"
        raise OtherSchemaError(
            f"{path} is of another schema (expected {SCHEMA}, found {found}): move it or give another folder"
        )
    return rows


def read_rows(folder: Path = RESULTS) -> list[dict[str, str]]:
    """The measured rows under a folder, of every measurement (KEY) the latest; the order is that of the files.

    Raises:
        OtherSchemaError: as `read`.
    """
    found: dict[tuple[str, ...], dict[str, str]] = {}
    for row in (row for path in sorted(folder.rglob(ROWS)) for row in read(path)):
        key = tuple(row[name] for name in KEY)
        if key not in found or found[key]["date"] <= row["date"]:
            found[key] = row
    return list(found.values())


def folder_of(device: str) -> Path:
    """Where the rows of a device belong: benchmarks/results/nvidia-h200."""
    return RESULTS / re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def _commit() -> tuple[str, str]:
    """Commit and whether the checkout differs from it; TRITONGRU_COMMIT speaks for a copy without git."""
    if (ROOT / ".git").exists():
        head = _output("git", "rev-parse", "HEAD")
        changes = _output("git", "status", "--porcelain", "--", ".", *WRITTEN, none_is="")
        if head != UNKNOWN:
            return head, UNKNOWN if changes == UNKNOWN else "yes" if changes else "no"
    return os.environ.get("TRITONGRU_COMMIT") or UNKNOWN, UNKNOWN


def _driver() -> str:
    if torch.version.hip:
        return f"ROCm {torch.version.hip}"
    return _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").splitlines()[0]


def processor() -> str:
    """The host's, by name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _output(*command: str, none_is: str = UNKNOWN) -> str:
    """What a command prints; "unknown" where it fails, `none_is` where it prints nothing."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return UNKNOWN
    return done.stdout.strip() or none_is
