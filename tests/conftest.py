"""Which tests run in which process, and how many of them reached a Triton kernel.

It is settled when Triton is imported whether kernels are emulated, so `make test` starts two processes: one with
TRITON_INTERPRET=1 for tests marked `interpreted`, one without for those marked `compiled`. Elsewhere they skip.
"""

import gc
import os

import pytest

# On work as small as the emulator's threads only wait for each other: one halves the time. Said before numpy loads.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from tests.kit.modules import BACKENDS
from tests.kit.own_process import pytest_pyfunc_call as pytest_pyfunc_call
from tritongru import gradients, registry

INTERPRETING = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
REASONS = {
    "interpreted": None if INTERPRETING else "needs a process with TRITON_INTERPRET=1",
    "compiled": "needs a process without TRITON_INTERPRET" if INTERPRETING else None,
    "gpu": None if torch.cuda.is_available() and not INTERPRETING else "needs a CUDA device, and no TRITON_INTERPRET",
}
REACHED = ("reached", "a Triton kernel")


def pytest_addoption(parser):
    parser.addoption("--shard", metavar="N/M", help="of the tests every M-th alone, from the N-th, counted from 0")


def pytest_configure():
    if not INTERPRETING:
        from tests.kit import disassembly

        disassembly.keep()


def pytest_collection_finish():
    gc.freeze()  # modules and tests stay: no later collection looks at them


def pytest_collection_modifyitems(config, items):
    if shard := config.getoption("--shard"):
        first, step = map(int, shard.split("/"))
        gpu = [item for item in items if item.get_closest_marker("gpu")]
        items[:] = gpu[first::step]
    for item in items:
        for marker, reason in REASONS.items():
            if reason and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _reached(request, monkeypatch):
    """Note on the report of a test that it launched, or compiled, a Triton kernel."""
    import triton

    from tritongru.launch.runtime import observe

    reached = []
    compiling = triton.compile
    monkeypatch.setattr(triton, "compile", lambda *args, **how: reached.append(args) or compiling(*args, **how))
    with observe(lambda name, grid: reached.append(name)):
        yield
    if reached:
        request.node.user_properties.append(REACHED)


def _that_reached(terminalreporter):
    reports = [report for of_kind in terminalreporter.stats.values() for report in of_kind]
    return len({r.nodeid for r in reports if REACHED in getattr(r, "user_properties", ())})


def pytest_sessionfinish(session):
    """A run of all tests in which none reached a kernel has shown nothing: it fails."""
    config, options = session.config, session.config.option
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS and not (options.keyword or options.collectonly)
    if reporter and whole and not _that_reached(reporter):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter):
    kind = "emulated" if INTERPRETING else "compiled"
    terminalreporter.write_line(f"Tests that reached a Triton kernel: {_that_reached(terminalreporter)}, {kind}.")


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


@pytest.fixture
def ran(monkeypatch):
    """The names of the backends whose layers ran, in order; PyTorch's own path leaves no trace."""
    names = []
    for found in registry.BACKENDS.values():
        if found.module is not None:
            module = found.load()

            def watched(*args, name=found.name, forward=module.forward, **kwargs):
                names.append(name)
                return forward(*args, **kwargs)

            monkeypatch.setattr(module, "forward", watched)
    return names


@pytest.fixture
def messages(caplog):
    """caplog in a process in which nothing has been logged yet."""
    registry.log_once.cache_clear()
    caplog.set_level("INFO", logger="tritongru")
    yield caplog
    registry.log_once.cache_clear()


@pytest.fixture(scope="module")
def one_thread():
    """As the demo itself: several threads only wait for each other on work this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def few_rows_at_once(monkeypatch):
    """A function that sets how many rows backward with recompute takes at once."""
    from tritongru.tools.counted import counted

    def set_rows(rows):
        monkeypatch.setattr(gradients, "ROWS_AT_ONCE", rows)
        counted.cache_clear()  # what was counted before has other chunks

    yield set_rows
    counted.cache_clear()


@pytest.fixture
def h200_tiles(monkeypatch):
    """Interpreted launches take the tiles of an H200 instead of one large program."""
    from tritongru.planning import describe

    monkeypatch.setattr(registry, "device_of", lambda device: describe("h200"))


@pytest.fixture
def dynamo():
    torch._dynamo.reset()
    with torch._dynamo.config.patch(allow_rnn=True):
        yield torch._dynamo
    torch._dynamo.reset()
