"""Training as people do it: mixed precision with a scaler, the same bits in another process, data parallel.

`nn.GRU` in the same place is the measure everywhere.
"""

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import tritongru
from tests.kit import modules as kit

ROOT = Path(__file__).parents[1]

# Mixed precision.


@kit.ours_only
def test_a_scaler_skips_an_overflow_as_with_nn_gru(backend: str) -> None:
    scales = []
    for layer in kit.PLAIN.pair(backend):
        optimiser, scaler = torch.optim.SGD(layer.parameters(), lr=0.1), torch.amp.GradScaler("cpu", init_scale=1024.0)
        for size in (1.0, float("inf"), 1.0):
            before = [p.detach().clone() for p in layer.parameters()]
            optimiser.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                scaler.scale(size * kit.loss_of(*layer(kit.randn(3, 2, 3)))).backward()
            scaler.step(optimiser)
            scaler.update()
            scales.append(scaler.get_scale())
            moved = [not torch.equal(p, b) for p, b in zip(layer.parameters(), before, strict=True)]
            assert all(moved) if size == 1.0 else not any(moved)
    assert scales == [1024.0, 512.0, 512.0] * 2


# Several processes.


def digest(backend: str) -> str:
    """Of values and gradients of dense, packed and padded input."""
    every = [t for form in kit.FORMS.values() for t in form.results(form.pair(backend)[1]).values()]
    return hashlib.sha256(b"".join(t.numpy().tobytes() for t in every)).hexdigest()


@pytest.mark.interpreted
def test_another_process_has_the_same_bits() -> None:
    names = ("reference", "step", "sequence")
    code = f"from tests.test_training import digest; print(*map(digest, {names}))"
    environment = os.environ | {"PYTHONHASHSEED": "7"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [digest(name) for name in names]


def test_nothing_is_tuned_by_timing() -> None:
    sources = [*(ROOT / "kernels").rglob("*.py"), *(ROOT / "tritongru").rglob("*.py")]
    assert len(sources) > 20
    assert [path for path in sources if "autotune" in path.read_text() or "do_bench" in path.read_text()] == []


@pytest.fixture(scope="module")
def a_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Of this process alone: what DistributedDataParallel does to a module is there, what gloo adds up is one."""
    store = tmp_path_factory.mktemp("gloo") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Model(nn.Module):
    def __init__(self, backend: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.head = tritongru.GRU(3, 5, 2, backend=backend), nn.Linear(5, 2)
        self.unused = tritongru.GRU(2, 2, backend=backend)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x)[0][-1])


@pytest.mark.parametrize("options", [{}, {"static_graph": True}, {"find_unused_parameters": True}], ids=str)
def test_distributed_data_parallel_has_the_gradients_of_the_module(backend: str, options: dict, a_group: None) -> None:
    found = []
    for wrap in (lambda model: model, lambda model: DistributedDataParallel(model, **options)):
        model = Model(backend)
        if "find_unused_parameters" not in options:
            del model.unused
        wrapped = wrap(model)
        for rows in (2, 3):  # the second adds to the gradients of the first, which are kept back where they may be
            first = rows == 2 and not options and wrapped is not model
            with wrapped.no_sync() if first else nullcontext():
                wrapped(kit.randn(6, rows, 3)).square().sum().backward()
        found.append([p.grad for p in model.parameters()])
    kit.assert_all_close(*found)
