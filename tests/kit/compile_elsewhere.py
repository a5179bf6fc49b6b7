"""Forms of `sequence`'s kernels, compiled by another Triton: in an environment without PyTorch, of `make long`, which
runs this file. It is handed names and types, since kernels/ imports Triton and nothing else."""

import importlib
import pickle
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

ROOT = Path(__file__).parents[2]


def python_of(version: str) -> Path:
    return ROOT / f".venv-triton-{version}" / "bin" / "python"


def examined(version: str, forms: Sequence[Any]) -> tuple[str, dict[str, list[str]]]:
    """The version of Triton that compiled the forms, and of those with faults what they are."""
    from tritongru.launch.sequence import specimen

    jobs = []
    for form in forms:
        of = specimen(*form[1:])
        launch = {name: getattr(of, name) for name in ("arguments", "constants", "options")}
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
    found = {}
    for form, module, name, launch in pickle.load(sys.stdin.buffer):
        kernel = getattr(importlib.import_module(module), name)
        report = compile_report(SimpleNamespace(kernel=kernel, **launch), describe(form.device))
        if wrong := faults(form, report):
            found[str(form)] = wrong
    sys.stdout.buffer.write(pickle.dumps((triton.__version__, found)))


if __name__ == "__main__":
    main()
