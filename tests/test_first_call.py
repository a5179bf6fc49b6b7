"""A first call: its kernels are foreseen, compiled side by side, and whoever waits is told once."""

from __future__ import annotations

import logging
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import hostcost
from tritongru import registry
from tritongru.batch import Visits
from tritongru.launch import first_call, sequence, step
from tritongru.launch.protocol import LayerCall, LayerWeights
from tritongru.launch.runtime import Specimen
from tritongru.planning import Problem, describe

B, I = 3, 8
H200 = describe("h200")


def kernels_of(module: Any, hidden_size: int) -> list[Any]:
    from tritongru.kernels import sequence as of_sequence
    from tritongru.kernels import small as of_small
    from tritongru.kernels import step as of_step

    if module is step:
        return [of_step.step_forward, of_step.step_backward]
    if hidden_size <= 128:
        return [of_small.small_forward, of_small.small_backward]
    return [of_sequence.sequence_forward, of_sequence.sequence_backward]


@pytest.mark.compiled
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(("module", "T", "H"), [(step, 4, 20), (step, 1, 20), (sequence, 4, 200), (sequence, 4, 40)])
def test_what_is_compiled_is_what_is_launched(
    module: Any, T: int, H: int, dtype: str, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the keys under which Triton looks a kernel up: the real launchers, and the launch itself left out."""
    asked: list[object] = []

    def get(self: Any, key: object, default: object = None) -> object:
        asked.append(key)
        return self.kernel

    monkeypatch.setattr(hostcost._Always, "get", get)
    own = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    sizes = tuple(max(1, B - t) for t in range(T)) if packed else None
    rows = (T, B) if sizes is None else (sum(sizes),)
    x, h_0 = torch.randn(*rows, I, dtype=own), torch.randn(1, B, H, dtype=own)
    flat = tuple(torch.randn(*shape, dtype=own) for shape in ((3 * H, I), (3 * H, H), (3 * H,), (3 * H,)))
    call = LayerCall(Visits.of(x, sizes), 1, H, dtype, "tf32", H200, save_gates=True)
    first_call._seen.clear()
    with hostcost.without_gpu(*kernels_of(module, H)):
        first_call.prepare(module, call, I, flat, recompute=False)
        foreseen = set(asked)
        asked.clear()
        weights = LayerWeights.of(flat, 1)
        y, h_n, gates = module.forward(call, x, h_0, weights)
        module.backward(call, torch.zeros_like(y), torch.zeros_like(h_n), y, h_0, gates, weights, own)
        assert set(asked) == foreseen and len(foreseen) == (3 if module is step and T > 1 else 2)
        asked.clear()
        first_call.prepare(module, call, I, flat, recompute=False)
        assert not asked  # known by now


class Kernel:
    """As Triton's, of which a warm-up ends once `together` of them have begun."""

    arg_names = ("x_ptr", "n", "BLOCK")

    def __init__(self, together: int, seconds: float = 0.0, error: Exception | None = None):
        self.barrier, self.seconds, self.error, self.given = threading.Barrier(together), seconds, error, []
        self.fn = SimpleNamespace(__name__="kernel")

    def warmup(self, *arguments: Any, grid: Any, **options: Any) -> None:
        from triton.runtime._async_compile import active_mode

        self.given.append((arguments, grid, options))
        if self.error:
            raise self.error

        def compile_kernel() -> SimpleNamespace:
            self.barrier.wait(timeout=20)  # alone it would not get past this
            time.sleep(self.seconds)
            return SimpleNamespace()

        active_mode.get().submit(len(self.given), compile_kernel, lambda *kernel: None, *self.more())

    @staticmethod
    def more() -> list[Any]:
        from tests.kit.versions import TRITON

        return [lambda *of: None] if TRITON >= (3, 9) else []


def specimen(kernel: Kernel) -> Specimen:
    return Specimen(kernel, {"x_ptr": "*bf16:2", "n": "i32:16"}, {"BLOCK": 64}, 4, 1)


def test_kernels_compile_side_by_side() -> None:
    kernel = Kernel(together=3)
    first_call.compile_side_by_side([specimen(kernel)] * 3)
    assert not kernel.barrier.broken and len(kernel.given) == 3
    (x, n, block), grid, options = kernel.given[0]
    assert x.dtype == torch.bfloat16 and x.data_ptr() % 16 == 2 and (n, block) == (16, 64)
    assert grid == (1, 1, 1) and options["num_warps"] == 4


def test_a_kernel_that_cannot_be_compiled_is_left_to_its_launch() -> None:
    first_call.compile_side_by_side([specimen(Kernel(1, error=RuntimeError("ptxas")))])


def test_who_waits_more_than_a_second_is_told_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(first_call, "_told", False)
    monkeypatch.setattr(first_call, "SECONDS", 0.05)
    first_call.compile_side_by_side([specimen(Kernel(1))])
    assert not caplog.records
    for _ in range(2):
        first_call.compile_side_by_side([specimen(Kernel(1, seconds=0.1))])
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and record.name == "tritongru"
    assert "compiled its kernels for 0." in record.getMessage()


def test_other_tiles_have_specimens_of_their_own() -> None:
    specimens = registry.find("sequence:num_warps=4").specimens(Problem(4, 9, 8, 512, dtype="bf16"), H200)
    assert [s.num_warps for s in specimens] == [4, 4] and all(s.cooperative for s in specimens)
