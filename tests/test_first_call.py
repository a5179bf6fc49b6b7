"""A first call: its kernels are foreseen, compiled side by side, and whoever waits is told once."""

import logging
import threading
import time
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import triton
from torch.nn.utils.rnn import pack_sequence
from triton.runtime._async_compile import active_mode

import tritongru
from benchmarks import hostcost
from tests.kit.modules import tensors
from tritongru import layer as layers
from tritongru import registry
from tritongru.latest import Latest
from tritongru.launch import first_call
from tritongru.launch.runtime import Kernel
from tritongru.planning import Problem, describe


@pytest.mark.compiled
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("backend", "T", "H"), [("step", 4, 20), ("step", 1, 20), ("sequence", 4, 200), ("sequence", 4, 40)]
)
def test_what_is_compiled_is_what_is_launched(backend: str, T: int, H: int, dtype, packed: bool, monkeypatch) -> None:
    """By the keys under which Triton looks a kernel up, in a whole call that trains, but for the launches."""
    asked, foreseen = [], set()

    def prepare(layer: Any, input_size: int, weights: Any, copied: bool = False) -> None:
        """As is done of a GPU's tensors; the second time all is known."""
        for known in (False, True):
            first_call.prepare(layer.launcher, layer.call, input_size, weights, layer.recompute, copied)
            assert bool(asked) != known
            foreseen.update(asked)
            asked.clear()

    monkeypatch.setattr(hostcost._Always, "get", lambda self, key, _=None: asked.append(key) or self.kernel)
    monkeypatch.setattr(layers, "prepare", prepare)
    monkeypatch.setattr(first_call, "_seen", Latest(10))
    layer, h_0 = tritongru.GRU(8, H, dtype=dtype, backend=backend), torch.randn(1, 3, H, dtype=dtype).requires_grad_()
    sequences = [torch.randn(max(1, T - packed * row), 8, dtype=dtype) for row in range(3)]
    with hostcost.as_on_a_gpu():
        results = tensors(layer(pack_sequence(sequences) if packed else torch.stack(sequences, 1), h_0))
        torch.autograd.backward(results, [torch.randn_like(t) for t in results])
        assert set(asked) == foreseen and len(foreseen) == (3 if backend == "step" else 2)


def specimen(together: int = 1, seconds: float = 0.0, error: Exception | None = None) -> Kernel:
    """Of a kernel of which a compilation ends once `together` of them have begun."""
    barrier = threading.Barrier(together)

    def compile_kernel() -> Mock:
        barrier.wait(timeout=20)  # alone it would not get past this
        time.sleep(seconds)
        return Mock()

    def warmup(*arguments: Any, **options: Any) -> None:
        then = [lambda *of: None] * (2 if triton.__version__ >= "3.9" else 1)
        active_mode.get().submit(object(), compile_kernel, *then)

    told = {"is_gluon.return_value": False, "warmup.side_effect": error or warmup}
    kernel = Mock(arg_names=("x_ptr", "n", "BLOCK"), barrier=barrier, **told)
    return Kernel(kernel, {"BLOCK": 64}, 4, arguments={"x_ptr": "*bf16:2", "n": "i32:16"})


def test_kernels_compile_side_by_side() -> None:
    """One that cannot be compiled is left to its launch."""
    three = specimen(together=3)
    first_call.compile_side_by_side([specimen(error=RuntimeError("ptxas")), *[three] * 3])
    assert not three.kernel.barrier.broken and three.kernel.warmup.call_count == 3
    _, given = three.kernel.warmup.call_args
    x = given["x_ptr"]
    assert x.dtype == "bf16" and x.data_ptr() % 16 == 2 and (given["n"], given["BLOCK"]) == (16, 64)
    assert given["grid"] == (1, 1, 1) and given["num_warps"] == 4


def test_who_waits_more_than_a_second_is_told_once(monkeypatch, caplog) -> None:
    monkeypatch.setattr(first_call, "_told", False)
    monkeypatch.setattr(first_call, "SECONDS", 0.05)
    first_call.compile_side_by_side([specimen()])
    assert not caplog.records
    for _ in range(2):
        first_call.compile_side_by_side([specimen(seconds=0.1)])
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and record.name == "tritongru"
    assert "compiled its kernels for 0." in record.getMessage()


def test_other_tiles_have_specimens_of_their_own() -> None:
    specimens = registry.find("sequence:num_warps=4").specimens(Problem(4, 9, 8, 512, dtype="bf16"), describe("h200"))
    assert [s.num_warps for s in specimens] == [4, 4] and all(s.cooperative for s in specimens)
