"""`day`: everything a GPU is wanted for, one part after the other, into one folder.

    tests      python -m pytest -m gpu                            tests.log
    memcheck   compute-sanitizer over python -m benchmarks.memcheck   memcheck.log
    check      python -m tritongru check                          check.log
    quick      python -m benchmarks --suite quick --resume        gru.csv, ceilings.csv
    full       python -m benchmarks --suite full --resume         gru.csv: as much of it as the budget allows
    summary    python -m benchmarks summary                       summary.log

Each part is a process of its own, so that one that fails, hangs or loses the device does not take the others with it;
what became of each is printed and kept in day.txt.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from .results import ROOT, Environment, folder_of
from .run import DEVICE_LOST, no_gpu

PYTHON = sys.executable
AGAIN = 10  # times that a suite is begun again after the device was lost
GRACE_MINUTES = 1.0  # for a suite to finish the case that the budget ends in


@dataclass(frozen=True)
class Part:
    """One command; `share` is how much of the time that is left it may take."""

    name: str
    command: Callable[[Path, float], Sequence[str] | None]  # from the folder and its minutes; None: its tool is missing
    share: float
    log: bool = True  # what it prints goes to <name>.log, otherwise to the terminal
    environment: tuple[tuple[str, str], ...] = ()
    meanings: tuple[tuple[int, str], ...] = ()  # of exit codes
    least: float = 0.0  # minutes that it has in any case
    optional: bool = False  # that nothing is left for it is no failure


def sanitizer() -> str | None:
    """compute-sanitizer: on the path, or where CUDA is."""
    places = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda", "/opt/cuda"]
    found = (shutil.which("compute-sanitizer", path=os.path.join(place, "bin")) for place in places if place)
    return shutil.which("compute-sanitizer") or next((path for path in found if path), None)


def _memcheck(out: Path, minutes: float) -> Sequence[str] | None:
    tool = sanitizer()
    options = ("--tool", "memcheck", "--error-exitcode", "86", "--report-api-errors", "no")
    return tool and (tool, *options, PYTHON, "-m", "benchmarks.memcheck")


def _suite(name: str) -> Callable[[Path, float], Sequence[str]]:
    def command(out: Path, minutes: float) -> Sequence[str]:
        budget = max(0.0, minutes - GRACE_MINUTES)
        here = ("--out", str(out), "--budget-minutes", f"{budget:.1f}")
        return PYTHON, "-m", "benchmarks", "--suite", name, "--resume", *here

    return command


PARTS = (
    Part(
        "tests", lambda out, minutes: (PYTHON, "-m", "pytest", "-m", "gpu"), 0.4,
        meanings=((5, "no GPU test was found"),),
    ),
    Part(
        "memcheck", _memcheck, 0.3, environment=(("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),),
        meanings=((86, "memory errors found"),),
    ),
    Part("check", lambda out, minutes: (PYTHON, "-m", "tritongru", "check"), 0.4),
    Part("quick", _suite("quick"), 1.0, log=False),
    Part("full", _suite("full"), 1.0, log=False, optional=True),
    Part("summary", lambda out, minutes: (PYTHON, "-m", "benchmarks", "summary", "--out", str(out)), 1.0, least=1.0),
)  # fmt: skip


def main(out: Path | None, budget_minutes: float) -> int:
    """Run every part; 0 if none failed. A part whose tool is missing did not fail, and is said not to have run."""
    why_not = no_gpu()
    if why_not:
        print(f"python -m benchmarks day: {why_not}", file=sys.stderr)
        return 1
    environment = Environment.here(torch.device("cuda", torch.cuda.current_device()))
    if out is None:
        out = folder_of(environment.device)
    out.mkdir(parents=True, exist_ok=True)
    return run(PARTS, out.resolve(), budget_minutes, environment)


def run(parts: Sequence[Part], out: Path, budget_minutes: float, environment: Environment) -> int:
    """Run `parts` in order and write day.txt."""
    ends = time.monotonic() + 60 * budget_minutes
    head = f"{environment.date} {environment.device}, driver {environment.driver}, torch {environment.torch}, "
    head += f"triton {environment.triton}, commit {environment.commit} (dirty: {environment.dirty})"
    lines, failed = [head], 0
    print(head, flush=True)
    for part in parts:
        start, lost = time.monotonic(), 0
        try:
            while True:
                minutes = max(part.least, part.share * (ends - time.monotonic()) / 60)
                outcome, bad, code = _run_part(part, out, minutes)
                if code != DEVICE_LOST or lost == AGAIN:
                    break
                lost += 1  # a suite goes on behind the entry that the device was lost in
        except KeyboardInterrupt:
            print(f"interrupted in {part.name}; what came before is in {out}", flush=True)
            return 130
        if lost:
            outcome, bad = f"FAILED: the device was lost {lost} time(s), at last {outcome}", True
        failed += bad
        log = f" ({part.name}.log)" if part.log and (out / f"{part.name}.log").exists() else ""
        lines.append(f"{part.name:<9} {outcome}, {time.monotonic() - start:.0f} s{log}")
        print(lines[-1], flush=True)
        (out / "day.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return 1 if failed else 0


def _run_part(part: Part, out: Path, minutes: float) -> tuple[str, bool, int | None]:
    """What became of a part, whether that is a failure, and the exit code if there is one."""
    log = out / f"{part.name}.log"
    log.unlink(missing_ok=True)
    command = part.command(out, minutes)
    if command is None:
        return "not run: compute-sanitizer was not found", False, None
    if minutes <= (GRACE_MINUTES if part.optional else 0):
        return ("not run" if part.optional else "FAILED: not run") + ", the budget was spent", not part.optional, None
    print(f"{part.name}: up to {minutes:.0f} min", flush=True)
    code = _process(command, log if part.log else None, dict(part.environment), 60 * minutes)
    if part.log:
        text = log.read_text(encoding="utf-8", errors="replace")
        log.write_text(text.replace(str(ROOT), "."), encoding="utf-8")
        if code:
            print("\n".join(text.splitlines()[-15:]), flush=True)
    if code is None:
        return f"FAILED: stopped after {minutes:.1f} min", True, None
    meaning = dict(part.meanings).get(code, f"exit code {code}")
    return (f"FAILED: {meaning}" if code else "passed"), bool(code), code


def _process(command: Sequence[str], log: Path | None, environment: dict[str, str], seconds: float) -> int | None:
    """The exit code, or None where it was stopped for its time; stopped too, with all it started, on interruption."""
    with log.open("wb") if log else nullcontext() as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, **environment}, stdout=file,
            stderr=None if file is None else subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            for how in (signal.SIGINT, signal.SIGKILL):
                if process.poll() is None:
                    os.killpg(process.pid, how)
                    with suppress(subprocess.TimeoutExpired):
                        process.wait(10)
