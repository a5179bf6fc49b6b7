"""Kernels broken on purpose: the same files with one piece of text replaced, as a package of its own."""

import contextlib
import importlib
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import reduce
from pathlib import Path
from types import ModuleType

from tritongru import status as status_words
from tritongru.tools.check import Case
from tritongru.tools.emulator import EmulatorError, emulating

from .cases import assert_not_wrong
from .drawn import FP16, SHORT, SMALL, Call
from .fences import fences

CUT = Case(T=5, I=5, H=18, bidirectional=True, lengths=(2, 4, 3, 5), padded=True, resets=0.5)
PACKED = Case(I=5, H=18, bidirectional=True, lengths=(4, 1, 2))
DENSE = Case(T=4, B=3, I=5, H=18)
BOTH = replace(DENSE, bidirectional=True)
WIDE = Case(T=3, B=3, I=4, H=40)
MANY_ROWS = Case(T=3, B=17, I=4, H=20)
SETTINGS = {  # calls that find mutants
    "step": Call(BOTH, "step"),
    "one step": Call(replace(DENSE, T=1), "step"),
    "step packed": Call(PACKED, "step"),
    "step cut": Call(CUT, "step"),
    "fma": Call(DENSE, SMALL),
    "fma both": Call(BOTH, SMALL),
    "no bias": Call(replace(DENSE, bias=False), SMALL),
    "matrix": Call(DENSE, SMALL, FP16),  # whose programs have several rows
    "matrix packed": Call(PACKED, SMALL, FP16),
    "matrix cut": Call(CUT, SMALL, FP16),
    "three programs": Call(WIDE),
    "half": Call(WIDE, dtype=FP16),
    "three waits": Call(WIDE, "sequence:waits=3"),
    "three tensors": Call(replace(WIDE, H=70), "sequence:num_k=3,block_k=32,shared_gates=3"),
    "eight rows": Call(Case(I=4, H=37, lengths=(1, 3, 2)), "sequence:block_b=8,block_k=64", FP16),
    "two tiles": Call(replace(MANY_ROWS, resets=0.4), "sequence:tiles=2"),
    "two groups": Call(MANY_ROWS, "sequence:groups=2"),
    "two directions": Call(BOTH, "sequence:directions=1"),
    "packed both": Call(PACKED),
    "sequence cut": Call(CUT),
}
KERNELS = Path(__file__).parents[2] / "kernels"


def table(text: str, columns: int) -> Iterator[tuple[list[str], list[str]]]:
    """The fields of a line "x, y: z", with each of the rows "a | b" below it; a row goes on after a backslash."""
    group: list[str] = []
    for line in re.sub(r"\\\n\s*", "", text).strip().splitlines():
        if " | " in line:
            yield group, [field.replace(r"\n", "\n") for field in line.strip().split(" | ", columns - 1)]
        else:
            group = re.split(", |: ", line.strip())


def edited(text: str, edit: str) -> str:
    """A text in which "h = {n=>z}" has put h = z for h = n."""
    old, new = (re.sub(r"\{(.*?)=>(.*?)\}", side, edit, flags=re.DOTALL) for side in (r"\1", r"\2"))
    assert old in text, f"no longer there: {old!r}; this mutant tests nothing"
    return text.replace(old, new)


def mutant(folder: Path, file: str, *edits: str, module: str = "step") -> ModuleType:
    """`module` of a copy of kernels/ in which each edit has changed `file`."""
    name = f"mutant_{folder.name.replace('-', '_')}"
    package = folder / name
    shutil.copytree(KERNELS, package, ignore=shutil.ignore_patterns("__pycache__"))
    (package / file).write_text(reduce(edited, edits, (KERNELS / file).read_text()))
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module(f"{name}.{module}")
    finally:
        sys.path.remove(str(folder))


def outcome(name: str, monkeypatch) -> str:
    """How the call of a setting goes wrong under one of three seeds: "wrong" values, a "time-out" of the kernel's own,
    the "emulator"'s error (an access out of bounds), or "survived"."""
    call = SETTINGS[name]
    exchanges = call.backend not in ("step", SMALL)
    for seed in range(3 if exchanges else 1):
        found = "survived"
        try:
            with (
                emulating(seed, **SHORT) if exchanges else contextlib.nullcontext(),
                fences(monkeypatch),  # memory that nobody wrote is NaN, and not the sentinel
            ):
                assert_not_wrong(call.case, call.backend, call.dtype)
        except AssertionError as error:
            assert "error=" in str(error)
            found = "wrong"
        except EmulatorError:
            found = "emulator"
        except RuntimeError as error:
            assert "TRITONGRU_WAIT_SECONDS" in str(error)
            found = "time-out"
        try:
            status_words.check_all()
        except RuntimeError:
            found = "time-out"
        if found != "survived":
            return found
    return "survived"
