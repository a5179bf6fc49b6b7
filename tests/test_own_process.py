"""The mark `own_process` (tests/kit/own_process.py), which only tests that need a GPU use."""

import os
import subprocess
import sys

import pytest

from tests.kit.own_process import HERE

TESTS = """
import os, pytest
pytestmark = pytest.mark.own_process

@pytest.mark.parametrize("number", [1, 2])
def test_passes(number):
    with open(f"ran-{number}", "w") as file:
        file.write(str(os.getpid()))

def test_fails():
    assert 3 == 4, "three is not four"

def test_skips():
    pytest.skip("nothing to do")

def test_dies():
    os._exit(0)
"""


@pytest.mark.parametrize("workers", [(), ("-n", "2")], ids=["alone", "xdist"])
def test_each_has_a_process_and_what_became_of_it_is_the_test_s_own_result(workers, tmp_path):
    (tmp_path / "test_some.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = own_process: .\n")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", HERE))}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    environment["PYTEST_PLUGINS"] = "tests.kit.own_process"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-rs", *workers], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert "2 failed, 2 passed, 1 skipped" in done.stdout, done.stdout + done.stderr
    assert "three is not four" in done.stdout and "nothing to do" in done.stdout and "exit code 0" in done.stdout
    assert len({(tmp_path / f"ran-{number}").read_text() for number in (1, 2)}) == 2
