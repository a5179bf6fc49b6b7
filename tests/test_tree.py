"""The package's rooms: dependencies run one way, and a Triton backend's name is compared nowhere."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tritongru.planning.choose import TRITON_BACKENDS

PACKAGE = Path(__file__).parents[1] / "tritongru"
ROOMS = (  # each may import those before it, and itself
    ("kernels",),
    ("_version", "ambient", "beside", "latest", "parts"),
    ("status",),
    ("planning", "batch"),
    ("products", "reference"),
    ("launch",),
    ("registry",),
    ("checks", "double_backward", "flops", "gradients"),
    ("layer",),
    ("call",),
    ("functional",),
    ("module",),
    ("tools",),
    ("__init__",),
    ("demo",),
    ("cli",),
    ("__main__",),
)
RANK = {name: rank for rank, names in enumerate(ROOMS) for name in names}
# Of a launch that is interpreted.
WHEN_ASKED_FOR = {("launch", "tools")}


def files() -> Iterator[tuple[str, Path]]:
    """(room, file) of every module but device code."""
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if parts[0] != "kernels":
            yield parts[0], path


def imported(path: Path) -> Iterator[tuple[str, bool]]:
    """Rooms of the package that a module imports, and whether at its top."""
    tree = ast.parse(path.read_text())
    inside = path.relative_to(PACKAGE).parts[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level > len(inside):
            names = [node.module.split(".")[0]] if node.module else [alias.name for alias in node.names]
            for name in names:
                yield name if name in RANK else "__init__", node in tree.body


def test_every_module_has_a_room() -> None:
    assert {room for room, _ in files()} | {"kernels"} == set(RANK)


@pytest.mark.parametrize(("room", "path"), files(), ids=lambda given: str(getattr(given, "name", given)))
def test_dependencies_run_one_way(room: str, path: Path) -> None:
    against = [
        name
        for name, at_the_top in imported(path)
        if name != room and RANK[name] >= RANK[room] and (at_the_top or (room, name) not in WHEN_ASKED_FOR)
    ]
    assert not against


def test_no_line_compares_a_backend_s_name() -> None:
    """What tells backends apart is in their rows of registry.py, and in what their launchers and planners say."""
    name = rf"[\"']({'|'.join(TRITON_BACKENDS)})[\"']"
    compared = re.compile(rf"(==|!=|\bin) \(?{name}|{name} (==|!=|in)\b|BACKENDS\[[\"']")
    found = [
        f"{path.relative_to(PACKAGE)}: {line.strip()}"
        for _, path in files()
        if path.name != "registry.py"
        for line in path.read_text().splitlines()
        if compared.search(line)
    ]
    assert not found
