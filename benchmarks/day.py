"""Command `day`: all that a GPU is wanted for, in at most nine minutes, one part after another, into one folder.

    compile    every kernel form that the others use, by many processes into one Triton cache; first calls on the side
    right      every backend and dtype on the grid's sizes against float64
    tune       for each class of tiles its candidates; what wins is written as data that planning reads
    grid       T 128 over H, B, dtype: nn.GRU, step, sequence, as they are called and in CUDA graphs
    long       T 512, and memory
    workloads  the GRUs that people train
    study      the forms of kernels/README.md
    tests      python -m pytest -m gpu, in several processes side by side; what captures graphs has one of its own
    memcheck   compute-sanitizer over suite memcheck: small, odd calls, each tensor an allocation of its own
    summary    losses first, and the table that the layer chooses by

Each part is one or more processes with a limit of their own: one that fails, hangs or loses the device takes no other
with it. What an early part leaves of its minutes is the later ones'. Rows go to OUT/gru.csv as they come, what is
printed to OUT/<part>.log, what became of each part to OUT/day.txt. With --resume parts that passed are left out, and
rows that are there; --only tune,grid takes these parts alone. --dry-run goes through all of it without a GPU, small,
the kernels emulated.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

import torch

from .results import ROOT, Environment, folder_of
from .run import DEVICE_LOST, SPENT, no_gpu

PYTHON = sys.executable
MINUTES = 9.0
AGAIN = 10  # times that a suite is begun again after the device was lost
GRACE_SECONDS = 8.0  # for a suite to finish the case that its budget ends in
PROCESSES = min(14, max(1, (os.cpu_count() or 1) - 2))  # of the tests


@dataclass(frozen=True)
class Run:
    """What a command is made from: the folder of rows and logs, seconds, and when the day began."""

    out: Path
    seconds: float
    began: str
    dry: bool = False


@dataclass(frozen=True)
class Part:
    """Commands, as `words` takes them, that run side by side for so many minutes at the most, of a day of MINUTES."""

    name: str
    minutes: float
    commands: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)


def sanitizer() -> str | None:
    """compute-sanitizer: on the path, or where CUDA is."""
    places = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda", "/opt/cuda"]
    found = (shutil.which("compute-sanitizer", path=os.path.join(place, "bin")) for place in places if place)
    return shutil.which("compute-sanitizer") or next((path for path in found if path), None)


def words(command: str, run: Run) -> Sequence[str]:
    """The process of a command; empty: its tool is missing."""
    name, _, of = command.partition(" ")
    here = (PYTHON, "-m", "benchmarks")
    if name == "warm":
        return (PYTHON, "-m", "benchmarks.warm", *["--dry-run"] * run.dry)
    if name == "tests":
        # Only files with a GPU test: to collect the others would take each process seconds.
        paths = sorted((ROOT / "tests").glob("test_*.py"))
        files = [str(path) for path in paths if "mark.gpu" in path.read_text(encoding="utf-8")]
        options = ("-v", "--durations=5", "-m", "gpu", "-p", "no:cacheprovider", f"--shard={of}/{PROCESSES}")
        return (PYTHON, "-m", "pytest", *options, *files, *["--collect-only"] * run.dry)
    if name in ("summary", "table"):
        return (*here, name, "--out", str(run.out))
    suite = (*here, "--suite", of, "--out", str(run.out))
    if run.dry:
        return (*suite, "--dry-run")
    budget = max(0.0, run.seconds - GRACE_SECONDS) / 60
    suite = (*suite, "--since", run.began, "--budget-minutes", f"{budget:.2f}")
    if name == "suite":
        return suite
    tool = sanitizer()
    return (tool, "--tool", "memcheck", "--error-exitcode", "86", "--report-api-errors", "no", *suite) if tool else ()


# A step beyond a tensor is seen where each is an allocation of its own; a checker slows those that others wait for.
CHECKED = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "TRITONGRU_WAIT_SECONDS": "600"}
PARTS = (
    Part("compile", 1.5, ("warm", "suite first"), {"TRITONGRU_WAIT_SECONDS": "10"}),  # processes share the GPU
    Part("right", 0.4, ("suite right",)),
    Part("tune", 1.3, ("suite tune",)),
    Part("grid", 1.9, ("suite grid",)),
    Part("long", 0.4, ("suite long",)),
    Part("workloads", 0.7, ("suite workloads",)),
    Part("study", 0.3, ("suite study",)),
    Part("tests", 1.7, tuple(f"tests {shard}" for shard in range(PROCESSES))),
    Part("memcheck", 0.7, ("checked memcheck",), CHECKED),
    Part("summary", 0.1, ("summary", "table")),
)


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
        environment = Environment.here(torch.device("cpu"))
        with tempfile.TemporaryDirectory() as folder:
            return run(parts, (out or Path(folder)).resolve(), budget_minutes, environment, dry=True)
    why_not = no_gpu()
    if why_not:
        print(f"python -m benchmarks day: {why_not}", file=sys.stderr)
        return 1
    environment = Environment.here(torch.device("cuda"))
    out = (folder_of(environment.device) if out is None else out).resolve()
    return run(parts, out, budget_minutes, environment, resume)


def _ends(parts: Sequence[Part], budget_minutes: float) -> list[float]:
    """Seconds after the beginning at which each part must have ended."""
    whole = sum(part.minutes for part in parts)
    return [60 * budget_minutes * at / whole for at in accumulate(part.minutes for part in parts)]


def run(
    parts: Sequence[Part], out: Path, budget_minutes: float, environment: Environment, resume: bool = False,
    dry: bool = False,
) -> int:  # fmt: skip
    """Run `parts` in order and write day.txt."""
    out.mkdir(parents=True, exist_ok=True)
    told = out / "day.txt"
    before = told.read_text(encoding="utf-8").splitlines() if resume and told.exists() else []
    began = before[0].split()[0] if before else environment.date
    passed = {line.split()[0]: line for line in before[1:] if " passed" in line}
    lines, failed, start = [f"{began} {environment}"], 0, time.monotonic()
    print(lines[0], flush=True)
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
        told.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return 1 if failed else 0


def _run_part(part: Part, out: Path, ends: float, began: str, dry: bool) -> tuple[str, bool]:
    """What became of a part, and whether that is a failure."""
    environment = {
        **os.environ,
        "TRITON_CACHE_DIR": str(Path(tempfile.gettempdir()) / f"tritongru-day-{os.getuid()}"),
        "PYTHONUNBUFFERED": "1",  # what was printed is there, whatever becomes of the part
        **part.environment,
        **({"TRITON_INTERPRET": "1"} if dry else {}),
    }
    lost, short, outcomes = 0, False, dict.fromkeys(range(len(part.commands)), "")
    again = list(outcomes)
    while again:
        seconds = ends - time.monotonic()
        if seconds <= 0:
            return "FAILED: not run, the budget was spent", True
        commands = {number: words(part.commands[number], Run(out, seconds, began, dry)) for number in again}
        if not all(commands.values()):
            return "not run: its tool was not found", False
        print(f"{part.name}: up to {seconds:.0f} s", flush=True)
        codes = _side_by_side(commands, part.name, out, environment, ends)
        again = []
        for number, code in codes.items():
            short |= code == SPENT
            outcomes[number] = _meaning(code)
            if code == DEVICE_LOST and lost < AGAIN:
                lost += 1  # a suite goes on behind the entry that the device was lost in
                again.append(number)
    wrong = [outcome for outcome in outcomes.values() if outcome]
    if lost:
        wrong.append(f"the device was lost {lost} time(s)")
    if wrong:
        return f"FAILED: {'; '.join(dict.fromkeys(wrong))}", True
    return ("cut short, its minutes were up: --resume goes on" if short else "passed"), False


def _meaning(code: int | None) -> str:
    """Of an exit code; nothing where all is well."""
    if code is None:
        return "stopped, its time was up"
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return f"exit code {code}" if code not in (0, SPENT) else ""


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
            for how in (signal.SIGINT, signal.SIGKILL):
                late = time.monotonic() + 3
                for process in [process for process in processes.values() if process.poll() is None]:
                    with suppress(ProcessLookupError):
                        os.killpg(process.pid, how)
                for process in processes.values():
                    with suppress(subprocess.TimeoutExpired):
                        process.wait(max(0.0, late - time.monotonic()))
    for number, code in codes.items():
        if code != 0:
            text = logs[number].read_text(encoding="utf-8", errors="replace")
            print("\n".join(text.replace(str(ROOT), ".").splitlines()[-15:]), flush=True)
    return codes
