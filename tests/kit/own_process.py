"""Tests marked `own_process` run in a process of their own: those that capture CUDA graphs. A failed capture spoils
its process for every later use of CUDA, and what earlier tests left behind makes one fail, such as a gradient's node
that lives on the default stream."""

import os
import subprocess
import sys

import pytest

HERE = "TRITONGRU_OWN_PROCESS"  # set in that process
COMMAND = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "-p", "no:xdist"]


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """True: the test has run, elsewhere; None: it is to run here."""
    if pyfuncitem.get_closest_marker("own_process") is None or os.environ.get(HERE):
        return None
    command, where = (
        [*COMMAND, pyfuncitem.nodeid],
        {"cwd": pyfuncitem.config.rootpath, "env": {**os.environ, HERE: "1"}},
    )
    done = subprocess.run(command, **where, capture_output=True, text=True, timeout=600)
    said = done.stdout + done.stderr
    if done.returncode == 0 and "1 skipped" in said:
        pytest.skip("in a process of its own: " + next(line for line in said.splitlines() if "SKIPPED" in line))
    if done.returncode or "1 passed" not in said:
        pytest.fail(f"in a process of its own, exit code {done.returncode}:\n{said}", pytrace=False)
    return True
