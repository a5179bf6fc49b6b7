"""Command `day`: all that a GPU is wanted for, in at most nine minutes, one part after another, into one folder.

    compile    every kernel form that the others use, by many processes into one Triton cache; first calls on the side
    right      every backend and dtype on the grid's sizes against float64
    tune       for each class of tiles its candidates; what wins is written as data that planning reads
    grid       T 128 over H, B, dtype: nn.GRU, step, sequence, as they are called and in CUDA graphs
    workloads  the GRUs that people train
    study      the forms of kernels/README.md
    tests      python -m pytest -m gpu, in several processes side by side; what captures graphs has one of its own
    memcheck   compute-sanitizer over python -m benchmarks.memcheck
    summary    losses first, and the table that the layer chooses by

Each part is one or more processes with a limit of their own: one that fails, hangs or loses the device takes no other
with it. What an early part leaves of its minutes is the later ones'. Rows go to OUT/gru.csv as they come, what is
printed to OUT/<part>.log, what became of each part to OUT/day.txt. With --resume parts that passed are left out, and
rows that are there; --only tune,grid takes these parts alone. --dry-run goes through all of it without a GPU, small,
the kernels emulated, and prints the plan.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch

from tritongru.planning import describe

from .results import ROOT, Environment, folder_of, processor
from .run import DEVICE_LOST, SPENT, no_gpu
from .suites import SUITES

PYTHON = sys.executable
MINUTES = 9.0
AGAIN = 10  # times that a suite is begun again after the device was lost
GRACE_SECONDS = 8.0  # for a suite to finish the case that its budget ends in
PROCESSES = min(14, max(1, (os.cpu_count() or 1) - 2))  # of the tests
NOT_FOUND = "compute-sanitizer was not found"


@dataclass(frozen=True)
class Run:
    """What a command is made from: the folder of rows and logs, seconds, and when the day began."""

    out: Path
    seconds: float
    began: str
    dry: bool = False


Command = Callable[[Run], Sequence[str] | None]  # None: its tool is missing


@dataclass(frozen=True)
class Part:
    """Commands that run side by side for so many minutes at the most, of a day of MINUTES."""

    name: str
    minutes: float
    commands: tuple[Command, ...]
    environment: dict[str, str] = field(default_factory=dict)
    meanings: dict[int, str] = field(default_factory=dict)  # of exit codes


def sanitizer() -> str | None:
    """compute-sanitizer: on the path, or where CUDA is."""
    places = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda", "/opt/cuda"]
    found = (shutil.which("compute-sanitizer", path=os.path.join(place, "bin")) for place in places if place)
    return shutil.which("compute-sanitizer") or next((path for path in found if path), None)


def _memcheck(run: Run) -> Sequence[str] | None:
    tool = sanitizer()
    options = ("--tool", "memcheck", "--error-exitcode", "86", "--report-api-errors", "no")
    return tool and (tool, *options, PYTHON, "-m", "benchmarks.memcheck")


def _suite(name: str) -> Command:
    def command(run: Run) -> Sequence[str]:
        here = (PYTHON, "-m", "benchmarks", "--suite", name, "--out", str(run.out))
        if run.dry:
            return (*here, "--dry-run")
        budget = max(0.0, run.seconds - GRACE_SECONDS) / 60
        return (*here, "--resume", "--since", run.began, "--budget-minutes", f"{budget:.2f}")

    return command


def _compile(run: Run) -> Sequence[str]:
    return (PYTHON, "-m", "benchmarks.warm", *(["--dry-run"] if run.dry else []))


def _tests(shard: int) -> Command:
    def command(run: Run) -> Sequence[str]:
        # Only what has any: to collect the others would take each process seconds.
        files = sorted(
            str(path) for path in (ROOT / "tests").glob("test_*.py") if "mark.gpu" in path.read_text("utf-8")
        )
        options = ("-v", "-m", "gpu", "-p", "no:cacheprovider", f"--shard={shard}/{PROCESSES}")
        found = (PYTHON, "-m", "pytest", *options, *files)
        return (*found, "--collect-only") if run.dry else found

    return command


def _benchmarks(*words: str) -> Command:
    return lambda run: (PYTHON, "-m", "benchmarks", *words, "--out", str(run.out))


PARTS = (
    Part("compile", 1.9, (_compile, _suite("first")), {"TRITONGRU_WAIT_SECONDS": "10"}),  # processes share the GPU
    Part("right", 0.5, (_suite("right"),)),
    Part("tune", 1.5, (_suite("tune"),)),
    Part("grid", 2.4, (_suite("grid"),)),
    Part("workloads", 0.8, (_suite("workloads"),)),
    Part("study", 0.1, (_suite("study"),)),
    Part("tests", 1.2, tuple(map(_tests, range(PROCESSES))), meanings={5: "no GPU test was found"}),
    Part(
        "memcheck", 0.4, (_memcheck,), {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, {86: "memory errors found"},
    ),
    Part("summary", 0.2, (_benchmarks("summary"), _benchmarks("table"))),
)  # fmt: skip


def chosen(only: Sequence[str]) -> tuple[Part, ...]:
    """The parts of that names, separated by commas, or all.

    Raises:
        ValueError: there is no such part.
    """
    names = [name for text in only for name in text.split(",")]
    if unknown := [name for name in names if name not in {part.name for part in PARTS}]:
        raise ValueError(f"parts of day are {', '.join(part.name for part in PARTS)}, got {', '.join(unknown)}")
    return tuple(part for part in PARTS if not names or part.name in names)


def main(
    out: Path | None, budget_minutes: float = MINUTES, only: Sequence[str] = (), resume: bool = False, dry: bool = False
) -> int:
    """Run the parts; 0 if none failed. A part whose tool is missing did not fail, and is said not to have run."""
    parts = chosen(only)
    if dry:
        with tempfile.TemporaryDirectory() as folder:
            print(plan(parts, budget_minutes))
            return run(parts, (out or Path(folder)).resolve(), budget_minutes, _here("cpu"), dry=True)
    why_not = no_gpu()
    if why_not:
        print(f"python -m benchmarks day: {why_not}", file=sys.stderr)
        return 1
    environment = _here("cuda")
    out = (folder_of(environment.device) if out is None else out).resolve()
    return run(parts, out, budget_minutes, environment, resume)


def _here(kind: str) -> Environment:
    return Environment.here(torch.device(kind))


def plan(parts: Sequence[Part], budget_minutes: float) -> str:
    """What would run on an H200, and for how long at the most."""
    lines = [f"a day of {budget_minutes:g} minutes, each part and when it ends at the latest:"]
    for part, ends in zip(parts, _ends(parts, budget_minutes), strict=True):
        suites = [name for name in SUITES if any(name in (command(_NOWHERE) or ()) for command in part.commands)]
        told = []
        for name in suites:
            entries = SUITES[name](describe("h200"))
            calls = sum(len(entry.providers) * len(entry.passes) for entry in entries)
            told.append(f"suite {name}: {len(entries)} shapes, {calls} rows")
        processes = f"{len(part.commands)} processes side by side" if len(part.commands) > 1 else ""
        lines.append(f"  {part.name:<9} {ends / 60:4.1f} min  {'; '.join(filter(None, (*told, processes)))}".rstrip())
    return "\n".join(lines)


_NOWHERE = Run(Path("."), 0.0, "")


def _ends(parts: Sequence[Part], budget_minutes: float) -> list[float]:
    """Seconds after the beginning at which each part must have ended."""
    whole, at = sum(part.minutes for part in parts), 0.0
    found = []
    for part in parts:
        at += 60 * budget_minutes * part.minutes / whole
        found.append(at)
    return found


def run(
    parts: Sequence[Part], out: Path, budget_minutes: float, environment: Environment, resume: bool = False,
    dry: bool = False,
) -> int:  # fmt: skip
    """Run `parts` in order and write day.txt."""
    out.mkdir(parents=True, exist_ok=True)
    told = out / "day.txt"
    before = told.read_text(encoding="utf-8").splitlines() if resume and told.exists() else []
    began = before[0].split()[0] if before else environment.date
    head = (
        f"{began} {environment.device}, host {processor()} with {os.cpu_count()} cores, driver {environment.driver}, "
    )
    head += f"torch {environment.torch}, triton {environment.triton}, commit {environment.commit} "
    head += f"(dirty: {environment.dirty})"
    passed = {line.split()[0]: line for line in before[1:] if " passed" in line}
    lines, failed, start = [head], 0, time.monotonic()
    print(head, flush=True)
    for part, ends in zip(parts, _ends(parts, budget_minutes), strict=True):
        if part.name in passed:
            lines.append(passed[part.name])
            continue
        began_at = time.monotonic()
        try:
            outcome, bad = _run_part(part, out, start + ends, began, dry)
        except KeyboardInterrupt:
            print(f"interrupted in {part.name}; what came before is in {out}", flush=True)
            return 130
        failed += bad
        lines.append(f"{part.name:<9} {outcome}, {time.monotonic() - began_at:.0f} s")
        print(lines[-1], flush=True)
        try:
            told.write_text("\n".join(lines) + "\n", encoding="utf-8")
        except OSError as error:  # a full disk: what is printed is left
            print(f"day.txt was not written: {error}", flush=True)
    return 1 if failed else 0


def _run_part(part: Part, out: Path, ends: float, began: str, dry: bool) -> tuple[str, bool]:
    """What became of a part, and whether that is a failure."""
    cache = {"TRITON_CACHE_DIR": str(Path(tempfile.gettempdir()) / f"tritongru-day-{os.getuid()}")}
    unbuffered = {"PYTHONUNBUFFERED": "1"}  # what was printed is there, whatever becomes of the part
    environment = {
        **os.environ,
        **cache,
        **unbuffered,
        **part.environment,
        **({"TRITON_INTERPRET": "1"} if dry else {}),
    }
    lost, short, outcomes = 0, False, {number: "" for number in range(len(part.commands))}
    if part.name == "memcheck" and (dry or part.commands[0](_NOWHERE) is None):
        return "not run: " + ("left out of a dry run" if dry else NOT_FOUND), False
    again = list(outcomes)
    while again:
        seconds = ends - time.monotonic()
        if seconds <= 0:
            return "FAILED: not run, the budget was spent", True
        commands = {number: part.commands[number](Run(out, seconds, began, dry)) or () for number in again}
        print(f"{part.name}: up to {seconds:.0f} s", flush=True)
        codes = _side_by_side(commands, part.name, out, environment, ends)
        again = []
        for number, code in codes.items():
            short |= code == SPENT
            outcomes[number] = _meaning(code, part.meanings)
            if code == DEVICE_LOST and lost < AGAIN:
                lost += 1  # a suite goes on behind the entry that the device was lost in
                again.append(number)
    wrong = [outcome for outcome in outcomes.values() if outcome]
    if lost:
        wrong.append(f"the device was lost {lost} time(s)")
    if wrong:
        return f"FAILED: {'; '.join(dict.fromkeys(wrong))}", True
    return ("cut short, its minutes were up: --resume goes on" if short else "passed"), False


def _meaning(code: int | None, meanings: dict[int, str]) -> str:
    """Of an exit code; nothing where all is well."""
    if code is None:
        return "stopped, its time was up"
    if code == SPENT:
        return ""
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return meanings.get(code, f"exit code {code}") if code else ""


def _side_by_side(
    commands: dict[int, Sequence[str]], name: str, out: Path, environment: dict[str, str], ends: float
) -> dict[int, int | None]:
    """Exit codes; None of what was stopped for its time. All are stopped, with all they started, on interruption."""
    processes: dict[int, subprocess.Popen[bytes]] = {}
    logs = {number: out / (f"{name}-{number}.log" if number else f"{name}.log") for number in commands}
    with ExitStack() as files:
        try:
            for number, command in commands.items():
                log = files.enter_context(logs[number].open("ab"))
                processes[number] = subprocess.Popen(
                    command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
                )
            for process in processes.values():
                with suppress(subprocess.TimeoutExpired):
                    process.wait(max(0.0, ends - time.monotonic()))
            codes = {number: process.poll() for number, process in processes.items()}
        finally:
            for process in processes.values():
                for how in (signal.SIGINT, signal.SIGKILL):
                    if process.poll() is None:
                        os.killpg(process.pid, how)
                        with suppress(subprocess.TimeoutExpired):
                            process.wait(3)
    for number, code in codes.items():
        if code != 0:
            text = logs[number].read_text(encoding="utf-8", errors="replace")
            print("\n".join(text.replace(str(ROOT), ".").splitlines()[-15:]), flush=True)
    return codes
