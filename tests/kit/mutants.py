"""Kernels broken on purpose: the same files with one piece of text replaced, as a package of its own."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

KERNELS = Path(__file__).parents[2] / "kernels"


def mutant(folder: Path, file: str, old: str, new: str, module: str = "step", moved: str = "") -> ModuleType:
    """`module` of a copy of kernels/ in which `old`, which must occur in `file`, is replaced by `new`, and put before
    `moved` if that is given."""
    name = f"mutant_{folder.name.replace('-', '_')}"
    package = folder / name
    package.mkdir()
    for source in KERNELS.rglob("*.py"):
        text = source.read_text()
        if source == KERNELS / file:
            assert text.count(old) >= 1, f"{file} no longer holds {old!r}: this mutant tests nothing"
            text = text.replace(old, new)
            if moved:
                assert text.count(moved) >= 1, f"{file} no longer holds {moved!r}: this mutant tests nothing"
                text = text.replace(moved, old + moved)
        copy = package / source.relative_to(KERNELS)
        copy.parent.mkdir(exist_ok=True)
        copy.write_text(text)
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module(f"{name}.{module}")
    finally:
        sys.path.remove(str(folder))
