"""Training as people do it: mixed precision with a scaler, the same bits again, several processes, several threads.

`nn.GRU` in the same place is the measure everywhere.
"""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence
from torch.utils._python_dispatch import TorchDispatchMode

import tritongru
from tests.kit.counting import looked_into
from tests.kit.modules import loss_of, ours_only, pair, randn, states, trained
from tritongru import registry
from tritongru.planning import Problem, choose, describe

ROOT = Path(__file__).parents[1]


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
     pytest.param(torch.float16, True, id="float16-autocast", marks=pytest.mark.long),
     pytest.param(torch.bfloat16, False, id="bfloat16-half-parameters", marks=pytest.mark.long)],
)  # fmt: skip
@pytest.mark.parametrize(
    "backend",
    ["reference", pytest.param("step", marks=[pytest.mark.interpreted, pytest.mark.long]),
     pytest.param("sequence", marks=pytest.mark.interpreted)],
)  # fmt: skip
def test_half_precision_trains_to_nn_gru_s_loss(backend: str, dtype: torch.dtype, autocast: bool) -> None:
    """Another rounding is, after many steps, at most what another draw of the parameters is: our loss is no farther
    from nn.GRU's of the same seed than nn.GRU's seeds are from each other, and it has learned as much."""
    seed, theirs = 1, losses_of_nn_gru(dtype, autocast)
    first, last = remember_first(lambda i, h: tritongru.GRU(i, h, backend=backend), seed, dtype, autocast)
    assert last < 0.5 * first
    assert abs(last - theirs[seed]) <= max(theirs) - min(theirs)


@ours_only
def test_a_scaler_skips_an_overflow_as_with_nn_gru(backend: str) -> None:
    theirs, ours = pair(backend, 3, 5)
    found = []
    for layer in (theirs, ours):
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


# The same bits again.

OPTIONS = {
    "plain": {},
    "two-layers-dropout": {"num_layers": 2, "dropout": 0.4},
    "bidirectional-no-bias": {"bidirectional": True, "bias": False},
    "batch-first": {"batch_first": True},
}


def everything(backend: str, recompute: bool = False, **options: object) -> list[Tensor]:
    """Values and gradients of dense and packed input, from one seed."""
    _, layer = pair(backend, 3, 5, recompute=recompute, **options)
    torch.manual_seed(4)
    x = randn(4, 2, 3)
    found = trained(layer, x, randn(states(layer), 4 if layer.batch_first else 2, 5, seed=3))
    return [*found, *trained(layer, pack_sequence([randn(n, 3, seed=n) for n in (4, 2, 2)]))]


@ours_only
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recompute"])
def test_same_bits_and_nothing_to_complain_about(
    backend: str, options: dict, recompute: bool, few_rows_at_once
) -> None:
    """Twice, and under use_deterministic_algorithms, which fills fresh memory with NaN besides."""
    few_rows_at_once(4)
    first = everything(backend, recompute, **options)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        again = everything(backend, recompute, **options)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all((a is None and b is None) or torch.equal(a, b) for a, b in zip(first, again, strict=True))


def digest(backend: str) -> str:
    return hashlib.sha256(
        b"".join(t.detach().numpy().tobytes() for t in everything(backend) if t is not None)
    ).hexdigest()


@pytest.mark.interpreted
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


# Several processes, several threads.

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


@pytest.mark.interpreted
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


@pytest.mark.parametrize("backend", ["aten", "reference"])
def test_threads_compute_what_one_does(backend: str) -> None:
    """Forward and backward at once, on one layer and on several. (Triton's interpreter patches its language while a
    kernel runs, for the whole process: kernels in threads are for a GPU, tests/test_gpu.py.)"""
    layers = [pair(backend, 3, 5, seed=seed)[1] for seed in (0, 0, 1, 1)]
    layers[1], layers[3] = layers[0], layers[2]
    inputs = [randn(20, 2, 3, seed=seed) for seed in range(4)]

    def gradient(index: int) -> Tensor:
        x = inputs[index].clone().requires_grad_()
        (found,) = torch.autograd.grad(loss_of(*layers[index](x)), x)
        return found

    expected = [gradient(index) for index in range(4)]

    def work(index: int) -> list[bool]:
        return [torch.equal(gradient(index), expected[index]) for _ in range(20)]

    with ThreadPoolExecutor(4) as pool:
        assert all(all(found) for found in pool.map(work, range(4), timeout=120))


def test_use_backend_is_a_thread_s_own() -> None:
    seen: dict[str, object] = {}
    inside, done = threading.Event(), threading.Event()

    def other() -> None:
        with tritongru.use_backend("reference"):
            inside.set()
            done.wait(30)
            seen["other"] = registry.asked_for(None)

    thread = threading.Thread(target=other)
    thread.start()
    assert inside.wait(30)
    seen["this"] = registry.asked_for(None)
    with tritongru.use_backend("aten"):
        done.set()
        thread.join(30)
    assert seen["this"] is None and getattr(seen["other"], "name", None) == "reference"


def test_a_whole_module_loads_with_weights_only() -> None:
    _, layer = pair("reference", 3, 5, num_layers=2)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    assert torch.serialization.get_unsafe_globals_in_checkpoint(file) == ["tritongru.module.GRU"]  # to be trusted
    file.seek(0)
    with torch.serialization.safe_globals([tritongru.GRU]):
        loaded = torch.load(file, weights_only=True)
    assert loaded.backend == "reference" and torch.equal(loaded(randn(3, 2, 3))[0], layer(randn(3, 2, 3))[0])


# What a capture into a CUDA graph forbids, as far as it shows on the CPU.


class ReadByTheHost(TorchDispatchMode):
    """The tensors whose values the host asks for inside: on a GPU it would wait for each."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors: list[Tensor] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            self.tensors.append(args[0])
        return func(*args, **(kwargs or {}))


@ours_only
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recompute"])
def test_the_host_reads_no_tensor_of_a_call(
    backend: str, options: dict, recompute: bool, few_rows_at_once, monkeypatch
) -> None:
    """Forward and backward, after a first call: nothing but the reports of waits that ran out and of wrong lengths,
    which lie in the host's own memory, as batch_sizes of packed input does. (It sees item() and bool(), not tolist()
    nor cpu() of a host tensor, nor what the driver waits for.)"""
    few_rows_at_once(4)
    _, layer = pair(backend, 3, 5, recompute=recompute, **options)
    x, sequence = randn(4, 2, 3), pack_sequence([randn(n, 3, seed=n) for n in (4, 2, 2)])
    for _ in range(2):
        with looked_into(monkeypatch), ReadByTheHost() as read:
            trained(layer, x)
            trained(layer, sequence)
    launcher = sys.modules.get("tritongru.launch.exchange")
    allowed = [sequence.batch_sizes]
    for status in launcher._statuses.values() if launcher else ():
        allowed += [status.report, status.lengths_report]
    memory = {tensor.untyped_storage().data_ptr() for tensor in allowed}
    assert [tensor for tensor in read.tensors if tensor.untyped_storage().data_ptr() not in memory] == []
