"""The mark `own_process` (tests/kit/own_process.py), which only tests that need a GPU use."""

import os
import sys

import pytest

from tests.kit.own_process import HERE

pytest_plugins = ["pytester"]
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
def test_each_has_a_process_and_what_became_of_it_is_the_test_s_own_result(workers, pytester, monkeypatch):
    monkeypatch.delenv(HERE, raising=False)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    monkeypatch.setenv("PYTEST_PLUGINS", "tests.kit.own_process")
    pytester.makepyfile(TESTS)
    pytester.makeini("[pytest]\nmarkers = own_process: .\n")
    done = pytester.runpytest_subprocess("-rs", *workers)
    done.assert_outcomes(passed=2, failed=2, skipped=1)
    done.stdout.fnmatch_lines_random(["*three is not four*", "*nothing to do*", "*exit code 0*"])
    assert len({(pytester.path / f"ran-{number}").read_text() for number in (1, 2)}) == 2
