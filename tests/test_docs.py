"""What the documents say is so: examples run, quoted code is the code, named files and commands exist, dependencies run
one way, and a Triton backend's name is compared nowhere."""

import ast
import doctest
import importlib
import inspect
import re
from pathlib import Path

import pytest

import tritongru
from tests.kit import reference
from tritongru.planning.choose import TRITON_BACKENDS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = ("reference", "differences", "padded", "how-it-works", "measuring", "extending", "streaming")
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "kernels/README.md", *(f"docs/{page}.md" for page in PAGES))


def test_examples_run():
    for module in ("functional", "module", "registry", "tools.gates", "tools.plan"):
        assert not doctest.testmod(importlib.import_module(f"tritongru.{module}")).failed
    found = doctest.testfile(str(ROOT / "docs" / "padded.md"), module_relative=False)
    assert not found.failed and found.attempted >= 15
    exec(compile(README.split("## Use")[1].split("```python\n")[1].split("```")[0], "README.md", "exec"), {})


def test_every_public_name_has_a_page():
    """Arguments or none, errors and a runnable example, as committed: `python -m tests.kit.reference` writes it."""
    assert reference.PAGE.read_text(encoding="utf-8") == reference.page()
    for name in reference.PUBLIC:
        section = reference.section(name)
        assert "**Example**" in section and ">>> " in section, name
        takes = [p for p in inspect.signature(getattr(tritongru, name)).parameters.values() if p.name != "refused"]
        assert not takes or ("**Args**" in section and "**Raises**" in section), name


def test_differences_are_each_held_by_a_test():
    table = [line for line in (ROOT / "docs" / "differences.md").read_text().splitlines() if line.startswith("| **")]
    assert len(table) >= 20
    for row in table:
        assert re.fullmatch(r"\| \*\*.+\*\* \|.*\|.+\| `tests/\w+\.py::\w+`(, `tests/\w+\.py::\w+`)* \|", row), row
        for file, test in re.findall(r"`(tests/\w+\.py)::(\w+)`", row):
            assert f"def {test}(" in (ROOT / file).read_text(), row


def test_quoted_kernel_is_the_kernel():
    block = (ROOT / "docs" / "how-it-works.md").read_text().split("```python\n")[1].split("```")[0]
    kernels = "".join((ROOT / "kernels" / name).read_text() for name in ("step.py", "gates.py"))
    source = {line.strip() for line in kernels.splitlines()}
    quoted = [line.split("  #")[0].strip() for line in block.splitlines() if line.strip() not in ("", "...")]
    assert len(quoted) >= 12
    assert [line for line in quoted if line not in source and not line.startswith("#")] == []


@pytest.mark.parametrize("name", ["sequence", "small", "step"])
def test_a_time_loop_fits_on_a_screen(name):
    """The body of a kernel's time loop has at most 40 lines; of `step`, which has none, what follows its wait."""
    for kernel in ast.parse((ROOT / "kernels" / f"{name}.py").read_text()).body:
        if isinstance(kernel, ast.FunctionDef) and kernel.name in (f"{name}_forward", f"{name}_backward"):
            lines = [node.end_lineno - node.lineno for node in ast.walk(kernel) if isinstance(node, ast.For)]
            waits = [node.lineno for node in ast.walk(kernel) if ast.unparse(node).endswith(".gdc_wait()")]
            lines = [kernel.end_lineno - max(waits)] if name == "step" else lines
            assert 15 <= max(lines) <= 40, (kernel.name, lines)


def test_the_readme_is_short_and_its_make_targets_exist():
    assert len(README.splitlines()) <= 150
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"\bmake ([\w-]+)", README + (ROOT / "CONTRIBUTING.md").read_text()):
        assert re.search(rf"^{target}:", makefile, re.M), target


CLAIM = re.compile(
    r"\d\s*(x|×|times|%)\s*(as fast|faster|slower)|(faster|slower) than (cuDNN|`?nn\.GRU)|\d\s*(µs|us) (per|a) "
)


@pytest.mark.parametrize("document", [*DOCUMENTS, "CHANGELOG.md", "benchmarks/QUESTIONS.md"])
def test_what_a_document_names_exists_and_the_rows_show_the_speed_that_it_claims(document):
    """Commands name the Python that make has set up. The changelog tells of the past, questions claim nothing."""
    text = (ROOT / document).read_text()
    links = [(ROOT / document).parent / link for link in re.findall(r"\]\(([^)#:]+)\)", text)]
    named = [ROOT / name for name in re.findall(r"`((?:tritongru|kernels|tests|benchmarks)/[\w/.]+)`", text)]
    commands = [line for line in re.sub(r"<!--.*?-->", "", text).splitlines() if "a project" not in line]
    others = [line for line in commands if re.search(r"(?<!\.venv/bin/)\bpython3? -m (?!venv)", line)]
    assert document == "CHANGELOG.md" or not (others or [path for path in links + named if not path.exists()])
    for claim in filter(CLAIM.search, text.split("\n\n")):
        assert document == "benchmarks/QUESTIONS.md" or "benchmarks/results/" in claim or "estimate" in claim, claim
    assert all(map(CLAIM.search, ("1.7x faster", "12 % slower", "faster than cuDNN", "1.2 us per step")))
    assert not CLAIM.search("one launch per timestep, three minutes")


def test_no_test_file_imports_another():
    """What several need stands in tests/kit. (One that starts processes hands them itself.)"""
    for path in Path(__file__).parent.rglob("*.py"):
        assert not re.findall(rf"^\s*(?:from|import) tests\.test_(?!{path.stem[5:]}\b).*", path.read_text(), re.M)


PACKAGE = ROOT / "tritongru"
ROOMS = (  # each may import those before it, and itself
    "kernels < _version ambient beside latest parts < status < planning batch < products reference < launch < registry"
    " < checks < double_backward flops gradients < layer < call < functional < module < tools < __init__ < demo"
    " < __main__"
)
RANK = {name: rank for rank, names in enumerate(ROOMS.split(" < ")) for name in names.split()}
WHEN_ASKED_FOR = {("launch", "tools")}  # of a launch that is interpreted
MODULES = {path: path.relative_to(PACKAGE).with_suffix("").parts for path in sorted(PACKAGE.rglob("*.py"))}
HOST = {path: parts[0] for path, parts in MODULES.items() if parts[0] != "kernels"}  # their rooms


def imported(path):
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level >= len(MODULES[path]):
            names = [node.module.split(".")[0]] if node.module else [alias.name for alias in node.names]
            yield from ((name if name in RANK else "__init__", node in tree.body) for name in names)


def test_dependencies_run_one_way():
    assert set(HOST.values()) | {"kernels"} == set(RANK)  # every module has a room
    against = [
        f"{path.relative_to(PACKAGE)}: {name}"
        for path, room in HOST.items()
        for name, at_the_top in imported(path)
        if name != room and RANK[name] >= RANK[room] and (at_the_top or (room, name) not in WHEN_ASKED_FOR)
    ]
    assert not against


def test_no_line_compares_a_backend_s_name():
    """What tells backends apart is in their rows of registry.py, and in what their launchers and planners say."""
    name = rf"[\"'](?:{'|'.join(TRITON_BACKENDS)})[\"']"
    compared = rf".*(?:==|!=|\bin) \(?{name}.*|.*{name} (?:==|!=|in)\b.*|.*BACKENDS\[[\"'].*"
    assert not [line for path in HOST if path.name != "registry.py" for line in re.findall(compared, path.read_text())]
