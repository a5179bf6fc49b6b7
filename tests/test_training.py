"""Training as people do it: mixed precision with a scaler, the same bits in another process, several processes.

`nn.GRU` in the same place is the measure everywhere.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tritongru
from tests.kit.modules import FORMS, PLAIN, loss_of, ours_only, randn
from tritongru.planning import Problem, choose, describe

ROOT = Path(__file__).parents[1]
LONG, INTERPRETED = pytest.mark.long, pytest.mark.interpreted

# Mixed precision.

CLASSES, STEPS, LENGTH = 4, 40, 5
Make = Callable[[int, int], nn.GRU]


def remember_first(make: Make, seed: int, dtype: torch.dtype, autocast: bool) -> tuple[float, float]:
    """Train to say at the end of a sequence which of four symbols began it; the loss at the beginning and at the end.

    With autocast the parameters are float32, and Adam trains them. Else they are of that dtype, which Adam's squares of
    gradients do not fit into (with float16 nn.GRU learns nothing so): then it is SGD with momentum.
    """
    torch.manual_seed(seed)
    layer, head = make(CLASSES, 16), nn.Linear(16, CLASSES)
    if not autocast:
        layer.to(dtype)
    parameters = [*layer.parameters(), *head.parameters()]
    optimiser = torch.optim.Adam(parameters, lr=0.02) if autocast else torch.optim.SGD(parameters, 1.0, momentum=0.9)
    generator = torch.Generator().manual_seed(1000 + seed)
    losses = []
    for _ in range(STEPS):
        first = torch.randint(CLASSES, (16,), generator=generator)
        x = 0.3 * torch.randn(LENGTH, 16, CLASSES, generator=generator)
        x[0] += 2 * F.one_hot(first, CLASSES)
        with torch.autocast("cpu", dtype, enabled=autocast):
            output, _ = layer(x if autocast else x.to(dtype))
        loss = F.cross_entropy(head(output[-1].float()), first)
        optimiser.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.dtype == p.dtype for p in layer.parameters())
        optimiser.step()
        losses.append(loss.item())
    return losses[0], sum(losses[-10:]) / 10


@cache
def losses_of_nn_gru(dtype: torch.dtype, autocast: bool) -> list[float]:
    """Of ten seeds, trained in the same way; they do learn."""
    found = [remember_first(nn.GRU, seed, dtype, autocast) for seed in range(10)]
    assert all(last < 0.5 * first for first, last in found), found
    return [last for _, last in found]


@pytest.mark.parametrize(
    "dtype, autocast",
    [pytest.param(torch.bfloat16, True, id="bfloat16-autocast"),
     pytest.param(torch.float16, False, id="float16-half-parameters"),
     pytest.param(torch.float16, True, id="float16-autocast", marks=LONG),
     pytest.param(torch.bfloat16, False, id="bfloat16-half-parameters", marks=LONG)],
)  # fmt: skip
@pytest.mark.parametrize(
    "backend",
    ["reference", pytest.param("step", marks=[INTERPRETED, LONG]), pytest.param("sequence", marks=INTERPRETED)],
)
def test_half_precision_trains_to_nn_gru_s_loss(backend: str, dtype: torch.dtype, autocast: bool) -> None:
    """Another rounding is, after many steps, at most what another draw of the parameters is: our loss is no farther
    from nn.GRU's of the same seed than nn.GRU's seeds are from each other, and it has learned as much."""
    seed, theirs = 1, losses_of_nn_gru(dtype, autocast)
    first, last = remember_first(lambda i, h: tritongru.GRU(i, h, backend=backend), seed, dtype, autocast)
    assert last < 0.5 * first
    assert abs(last - theirs[seed]) <= max(theirs) - min(theirs)


@ours_only
def test_a_scaler_skips_an_overflow_as_with_nn_gru(backend: str) -> None:
    found = []
    for layer in PLAIN.pair(backend):
        optimiser = torch.optim.SGD(layer.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        scales = []
        for size in (1.0, float("inf"), 1.0):
            before = [p.detach().clone() for p in layer.parameters()]
            with torch.autocast("cpu", torch.bfloat16):
                output, h_n = layer(randn(3, 2, 3))
            optimiser.zero_grad()
            scaler.scale(size * loss_of(output.float(), h_n.float())).backward()
            scaler.step(optimiser)
            scaler.update()
            scales.append(scaler.get_scale())
            moved = [not torch.equal(p, b) for p, b in zip(layer.parameters(), before, strict=True)]
            assert all(moved) if size == 1.0 else not any(moved)
        found.append(scales)
    assert found[0] == found[1] == [2.0**10, 2.0**9, 2.0**9]


# Several processes.


def digest(backend: str) -> str:
    """Of values and gradients of dense, packed and padded input."""
    every = [t for form in FORMS.values() for t in form.results(form.pair(backend)[1]).values()]
    return hashlib.sha256(b"".join(t.numpy().tobytes() for t in every)).hexdigest()


@INTERPRETED
def test_another_process_has_the_same_bits() -> None:
    names = ("reference", "step", "sequence")
    code = f"from tests.test_training import digest; print(*map(digest, {names}))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"PYTHONHASHSEED": "7"},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [digest(name) for name in names]


def test_a_plan_depends_on_the_problem_alone() -> None:
    """Not on the plans before it, nor on when it is made: the same in any order, and nothing is tuned by timing."""
    problems = [
        (Problem(batch=B, time=T, input_size=64, hidden_size=H, dtype=dtype, precision="tf32"), device)
        for B in (1, 33) for T in (1, 100) for H in (128, 1000) for dtype in ("fp32", "bf16")
        for device in ("h200", "l4")
    ]  # fmt: skip
    choose.cache_clear()
    plans = [str(choose(problem, describe(device))) for problem, device in problems]
    choose.cache_clear()
    again = [str(choose(problem, describe(device))) for problem, device in reversed(problems)]
    assert plans == again[::-1]
    sources = [*(ROOT / "kernels").rglob("*.py"), *(ROOT / "tritongru").rglob("*.py")]
    assert len(sources) > 20
    assert [path for path in sources if "autotune" in path.read_text() or "do_bench" in path.read_text()] == []


DISTRIBUTED = """
import sys
import torch
import torch.distributed as dist
from datetime import timedelta
from torch.nn.parallel import DistributedDataParallel
from tests.kit.modules import randn
from tests.test_training import model_of

rank, store, backends = int(sys.argv[1]), sys.argv[2], sys.argv[3].split(",")
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timedelta(seconds=120))
for backend in backends:
    for name in ("no_sync", "static_graph", "find_unused_parameters"):
        options = {name: True} if name != "no_sync" else {}
        model = DistributedDataParallel(model_of(backend, unused=name.startswith("find")), **options)
        x = randn(6, 4, 3)[:, 2 * rank : 2 * rank + 2]
        with model.no_sync() if not options else torch.enable_grad():
            model(x).square().sum().backward()
        if not options:  # gradients that were kept back are added by the next backward
            model(torch.zeros_like(x)[:1]).sum().mul(0).backward()
        if rank == 0:
            gradients = {n: p.grad for n, p in model.module.named_parameters()}
            torch.save(gradients, f"{store}.{backend}.{name}")
dist.destroy_process_group()
"""


class Model(nn.Module):
    """A layer inside a model; `unused`: with parameters that no loss reaches."""

    def __init__(self, backend: str, unused: bool) -> None:
        super().__init__()
        self.layer, self.head = tritongru.GRU(3, 5, 2, backend=backend), nn.Linear(5, 2)
        self.unused = tritongru.GRU(2, 2, backend=backend) if unused else None

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x)[0][-1])


def model_of(backend: str, unused: bool = False) -> Model:
    torch.manual_seed(0)
    return Model(backend, unused)


@INTERPRETED
def test_two_processes_have_the_gradients_of_one(tmp_path: Path) -> None:
    """DistributedDataParallel over gloo: the mean over ranks is half the gradient of the sum over the whole batch."""
    names = ["aten", "reference", "step", "sequence"]
    store = tmp_path / "store"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", DISTRIBUTED, str(rank), str(store), ",".join(names)], cwd=ROOT,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        outputs = [process.communicate(timeout=400)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    for backend in names:
        model = model_of(backend)
        model(randn(6, 4, 3)).square().sum().backward()
        files = sorted(tmp_path.glob(f"store.{backend}.*"))
        assert len(files) == 3
        for file in files:
            found = torch.load(file)
            for name, parameter in model.named_parameters():
                torch.testing.assert_close(found.pop(name), parameter.grad / 2, rtol=0, atol=2e-6)
            assert bool(found) == file.name.endswith("find_unused_parameters")
            assert all(gradient is None or not gradient.any() for gradient in found.values())
