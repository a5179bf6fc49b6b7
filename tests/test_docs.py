"""What the documents say is so: examples run, quoted code is the code, named files and commands exist."""

from __future__ import annotations

import doctest
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("module", ["functional", "module", "registry", "inspection.gates"])
def test_docstring_examples(module: str) -> None:
    found = doctest.testmod(importlib.import_module(f"tritongru.{module}"))
    assert found.failed == 0


def test_examples_exist() -> None:
    assert sum("Example:" in path.read_text() for path in (ROOT / "tritongru").rglob("*.py")) >= 4


def test_quoted_kernel_is_the_kernel() -> None:
    block = README.split("that are the GRU**")[1].split("```python\n")[1].split("```")[0]
    kernels = "".join((ROOT / "kernels" / name).read_text() for name in ("step.py", "gates.py"))
    source = {line.strip() for line in kernels.splitlines()}
    quoted = [line.split("  #")[0].strip() for line in block.splitlines() if line.strip() not in ("", "...")]
    assert len(quoted) >= 12
    assert [line for line in quoted if line not in source and not line.startswith("#")] == []


def test_usage_runs() -> None:
    block = README.split("## Use")[1].split("```python\n")[1].split("```")[0]
    exec(compile(block, "README.md", "exec"), {})


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", "kernels/README.md"])
def test_named_files_exist(document: str) -> None:
    folder = (ROOT / document).parent
    text = (ROOT / document).read_text()
    links = re.findall(r"\]\(([^)#:]+)\)", text)
    named = re.findall(r"`((?:tritongru|kernels|tests|benchmarks)/[\w/.]+)`", text)
    missing = [link for link in links if not (folder / link).exists()]
    missing += [name for name in named if not (ROOT / name).exists()]
    assert missing == []


def test_make_targets_and_commands_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`?make ([\w-]+)", README + (ROOT / "CONTRIBUTING.md").read_text()):
        if target not in ("by",):
            assert re.search(rf"^{target}:", makefile, re.M), target


def test_no_speed_is_claimed_without_results() -> None:
    if not list((ROOT / "benchmarks" / "results").rglob("*.csv")):
        assert "No GPU timing yet" in README
