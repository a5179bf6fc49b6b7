"""The mark `own_process` (tests/kit/own_process.py), which only tests that need a GPU use."""

import os
import sys

from tests.kit.own_process import HERE

pytest_plugins = ["pytester"]
TESTS = """
import os, pytest
pytestmark = pytest.mark.own_process

def test_passes():
    assert os.environ["TRITONGRU_OWN_PROCESS"]

def test_fails():
    assert 3 == 4, "three is not four"

def test_skips():
    pytest.skip("nothing to do")

def test_dies():
    os._exit(0)
"""


def test_what_became_of_a_process_is_the_test_s_own_result(pytester, monkeypatch):
    monkeypatch.delenv(HERE, raising=False)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    monkeypatch.setenv("PYTEST_PLUGINS", "tests.kit.own_process")
    pytester.makepyfile(TESTS)
    pytester.makeini("[pytest]\nmarkers = own_process: .\n")
    done = pytester.runpytest_subprocess("-rs", "-n", "2")
    done.assert_outcomes(passed=1, failed=2, skipped=1)
    done.stdout.fnmatch_lines_random(["*three is not four*", "*nothing to do*", "*exit code 0*"])
