"""Training as people do it: mixed precision with a scaler, the same bits in another process, data parallel.

`nn.GRU` in the same place is the measure everywhere.
"""

import hashlib
import os
import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel

import tritongru
from tests.kit import modules as kit

ROOT = Path(__file__).parents[1]

# Mixed precision.


@kit.ours_only
def test_a_scaler_skips_an_overflow_as_with_nn_gru(backend):
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


def digest(backend):
    """Of values and gradients of dense, packed and padded input."""
    every = [t for form in kit.FORMS.values() for t in form.results(form.pair(backend)[1]).values()]
    return hashlib.sha256(b"".join(t.numpy().tobytes() for t in every)).hexdigest()


@pytest.mark.interpreted
def test_another_process_has_the_same_bits():
    names = ("reference", "step", "sequence")
    code = f"from tests.test_training import digest; print(*map(digest, {names}))"
    environment = os.environ | {"PYTHONHASHSEED": "7"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [digest(name) for name in names]


def test_nothing_is_tuned_by_timing():
    sources = [*(ROOT / "kernels").rglob("*.py"), *(ROOT / "tritongru").rglob("*.py")]
    assert len(sources) > 20
    assert [path for path in sources if re.search(r"\b(autotune\(|do_bench)", path.read_text())] == []


class Model(nn.Module):
    def __init__(self, backend):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.head = tritongru.GRU(3, 5, 2, backend=backend), nn.Linear(5, 2)
        self.unused = tritongru.GRU(2, 2, backend=backend)

    def forward(self, x):
        return self.head(self.layer(x)[0][-1])


OPTIONS = [{}, {"static_graph": True}, {"find_unused_parameters": True}]


def gradients(backend, options, rows, distributed=True):
    """After two calls; those of the first are kept back where they may be, and the second adds to them."""
    model = Model(backend)
    if "find_unused_parameters" not in options:
        del model.unused
    wrapped = DistributedDataParallel(model, **options) if distributed else model
    for seed in (2, 3):
        with wrapped.no_sync() if distributed and seed == 2 and not options else nullcontext():
            wrapped(kit.randn(6, 4, 3, seed=seed)[:, rows]).square().sum().backward()
    return [p.grad for p in model.parameters()]


def of_a_rank(rank, store, backends):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    rows = slice(2 * rank, 2 * rank + 2)
    found = [gradients(backend, options, rows) for backend in backends for options in OPTIONS]
    if rank == 0:
        torch.save(found, f"{store}.gradients")
    dist.destroy_process_group()


@pytest.mark.interpreted
def test_two_processes_have_the_gradients_of_one(tmp_path):
    """DistributedDataParallel over gloo: the mean over the ranks is half the gradient of the sum over all rows."""
    backends, store = ["aten", "reference", "step", "sequence"], tmp_path / "store"
    multiprocessing.spawn(of_a_rank, (str(store), backends), nprocs=2)
    found = iter(torch.load(f"{store}.gradients"))
    for backend in backends:
        for options in OPTIONS:
            expected = gradients(backend, options, slice(4), distributed=False)
            kit.assert_all_close(next(found), [None if g is None else g / 2 for g in expected])
