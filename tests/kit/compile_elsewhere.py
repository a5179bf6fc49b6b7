"""Forms of kernels/sequence.py's kernels, compiled by another Triton, in an environment without PyTorch.

`examined` hands what is to be compiled to that environment's interpreter, which runs this file: names and types alone,
since kernels/ imports Triton and nothing else. `make long` makes the environments.
"""

from __future__ import annotations

import importlib
import pickle
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .forms import Form

ROOT = Path(__file__).parents[2]


def python_of(version: str) -> Path:
    """The interpreter of the environment with this Triton."""
    return ROOT / f".venv-triton-{version}" / "bin" / "python"


def examined(version: str, forms: Sequence[Form]) -> list[tuple[str, list[str]]]:
    """For each form the version of Triton that compiled it, and what is wrong with it."""
    from tritongru.launch.sequence import specimen

    jobs = []
    for form in forms:
        of = specimen(*form[1:])
        launch = dict(arguments=dict(of.arguments), constants=dict(of.constants), options=of.options)
        jobs.append((form, of.kernel.fn.__module__, of.name, launch))
    command = [python_of(version), "-m", "tests.kit.compile_elsewhere"]
    done = subprocess.run(command, cwd=ROOT, input=pickle.dumps(jobs), capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    return pickle.loads(done.stdout)


def main() -> None:
    package = ModuleType("tritongru")  # its parts that need no PyTorch, without the __init__.py that does
    package.__path__ = [str(ROOT / "tritongru")]
    sys.modules["tritongru"] = package
    import triton

    from tests.kit import disassembly
    from tests.kit.forms import faults
    from tritongru.planning.devices import describe
    from tritongru.tools.compile_report import compile_report

    disassembly.keep()
    found = []
    for form, module, name, launch in pickle.load(sys.stdin.buffer):
        kernel = getattr(importlib.import_module(module), name)
        report = compile_report(SimpleNamespace(kernel=kernel, **launch), describe(form.device))
        found.append((triton.__version__, faults(form, report)))
    sys.stdout.buffer.write(pickle.dumps(found))


if __name__ == "__main__":
    main()
