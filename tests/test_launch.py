"""What a call launches: one recurrent launch per timestep each way, none that `plan` does not list; and its memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence

import tritongru
from tests.kit.counting import counted
from tests.kit.fences import call_between_fences, fences, poisoned, with_gaps
from tests.kit.modules import randn, states, table, tensors

interpreted, LONG = pytest.mark.interpreted, pytest.mark.long

VARIANTS = {
    "plain": {},
    "bidirectional": {"bidirectional": True},
    "two-layers": {"num_layers": 2, "bidirectional": True},
    "no-bias": {"bias": False, "bidirectional": True},
    "recompute": {"recompute": True},
    "fp16": {"dtype": torch.float16},
}


def forward_and_backward(layer, x, monkeypatch, h_0_needs_grad: bool = False):
    B = x.shape[1] if isinstance(x, torch.Tensor) else int(x.batch_sizes[0])
    h_0 = torch.zeros(states(layer), B, layer.hidden_size, dtype=layer.weight_hh_l0.dtype)
    h_0.requires_grad_(h_0_needs_grad)
    with counted(monkeypatch) as forward:
        results = tensors(layer(x, h_0))
    cotangents = [torch.randn_like(t) for t in results]
    with counted(monkeypatch) as backward:
        torch.autograd.backward(results, cotangents)
    return forward, backward


def assert_planned(layer, x, monkeypatch) -> None:
    listed = tritongru.plan(layer, x).launches
    forward, backward = forward_and_backward(layer, x, monkeypatch)
    assert dict(forward) == dict(listed.forward)
    assert dict(backward) == dict(listed.backward)


variants = table("options", VARIANTS)


@interpreted
@pytest.mark.parametrize("T", [1, 4])
@variants
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("backend", ["step", "sequence"])
def test_what_plan_lists_is_what_runs(backend: str, options: dict, T: int, packed: bool, monkeypatch) -> None:
    layer = tritongru.GRU(5, 6, backend=backend, **options)
    x = torch.randn(T, 2, 5, dtype=layer.weight_hh_l0.dtype)
    assert_planned(layer, pack_sequence([x[:, 0], x[:1, 1]]) if packed else x, monkeypatch)


@interpreted
@pytest.mark.parametrize("rows", [4, *(pytest.param(rows, marks=LONG) for rows in (2, 6))])
@pytest.mark.parametrize("B", [pytest.param(1, marks=LONG), 2])
@variants
@pytest.mark.parametrize("backend", ["step", "sequence"])
def test_what_plan_lists_is_what_runs_in_chunks(
    backend: str, options: dict, B: int, rows: int, few_rows_at_once, monkeypatch
) -> None:
    """Backward with recompute, a few timesteps at a time."""
    few_rows_at_once(rows)
    layer = tritongru.GRU(5, 6, backend=backend, **{**options, "recompute": True})
    assert_planned(layer, torch.randn(7, B, 5, dtype=layer.weight_hh_l0.dtype), monkeypatch)


@interpreted
@pytest.mark.parametrize("rows", [2, 3, 4])
def test_what_plan_lists_is_what_runs_of_column_sums(rows: int, few_rows_in_a_sum, monkeypatch) -> None:
    few_rows_in_a_sum(rows)
    assert_planned(tritongru.GRU(5, 6, backend="step"), torch.randn(7, 3, 5), monkeypatch)


@interpreted
@pytest.mark.parametrize("hidden", [32, 21])
@pytest.mark.parametrize("exchange_bytes", [None, 0], ids=["one-launch", "several"])
@pytest.mark.parametrize("variant", ["plain", pytest.param("two-layers", marks=LONG), "recompute"])
def test_what_plan_lists_is_what_runs_of_programs_that_exchange(
    variant: str, exchange_bytes: int | None, hidden: int, monkeypatch
) -> None:
    """And their bytes: an exchange buffer, with a fill before each launch, and another where K is wider than H."""
    from tests.kit.memory import memory
    from tritongru.planning import sequence
    from tritongru.tools.counted import counted as count

    if exchange_bytes is not None:
        monkeypatch.setattr(sequence, "EXCHANGE_BYTES", exchange_bytes)
    count.cache_clear()  # what was counted before has other launches
    layer = tritongru.GRU(5, hidden, backend="sequence", **VARIANTS[variant])
    x = torch.randn(3, 2, 5)
    plan = tritongru.plan(layer, x)
    assert isinstance(dict(plan.tiles)["forward"], sequence.SequenceTiles)
    forward, backward = forward_and_backward(layer, x, monkeypatch)
    h_0 = torch.zeros(states(layer), 2, hidden)
    layer.zero_grad()  # or gradients are added to those there, and both are alive for a moment
    with memory(monkeypatch) as found:
        results = list(layer(x, h_0))
        peak_forward = found.peak(results)
        cotangents = [torch.randn_like(t) for t in results]
        found.peak()
        torch.autograd.backward(results, cotangents)
        peak_backward = found.peak([*results, *cotangents, *(p.grad for p in layer.parameters())])
    count.cache_clear()
    assert dict(forward) == dict(plan.launches.forward)
    assert dict(backward) == dict(plan.launches.backward)
    assert (forward["sequence_forward"] > layer.num_layers) == (exchange_bytes == 0)
    assert (peak_forward, peak_backward) == (plan.cost.peak_forward_bytes, plan.cost.peak_backward_bytes)


@interpreted
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("T", [1, 2, 5])
def test_one_recurrent_launch_per_timestep(T: int, bidirectional: bool, monkeypatch) -> None:
    """T forward and T backward, both directions in one, the gradient of h_0 among them; a cell is one; and batch_first
    launches exactly what time-major input does, without a copy."""
    layer = tritongru.GRU(5, 6, backend="step", bidirectional=bidirectional)
    forward, backward = forward_and_backward(layer, torch.randn(T, 2, 5), monkeypatch, h_0_needs_grad=True)
    assert forward["step_forward"] == T and backward["step_backward"] == T
    assert forward["step_backward"] == 0 and backward["step_forward"] == 0
    cell, x, h = tritongru.GRUCell(5, 6, backend="step"), torch.randn(T, 2, 5), torch.zeros(1, 2, 6)
    time_major, first = (tritongru.GRU(5, 6, backend="step", batch_first=first) for first in (False, True))
    found = []
    for call, *given in ((cell, x[0], h[0]), (time_major, x, h), (first, x.transpose(0, 1).contiguous(), h)):
        with counted(monkeypatch) as launches, torch.no_grad():
            call(*given)
        found.append(launches)
    assert dict(found[0]) == {"step_forward": 1} and found[1] == found[2] and found[2]["step_forward"] == T


def fake_specialisations(calls) -> set[tuple]:
    """What Triton's JIT would compile apart: types, and for specialised integers 1 / divisible by 16 / neither."""
    found = set()
    for kernel, arguments in calls:
        key = []
        for parameter in kernel.params:
            value = arguments[parameter.name]
            if parameter.is_constexpr or isinstance(value, torch.Tensor):
                aligned = isinstance(value, torch.Tensor) and value.data_ptr() % 16 == 0
                key.append(value if parameter.is_constexpr else (str(value.dtype), aligned))
            elif parameter.do_not_specialize:
                key.append("i64" if abs(value) >= 2**31 else "i32")
            else:
                key.append(1 if value == 1 else value % 16 == 0)
        found.add((kernel.fn.__name__, *key))
    return found


@pytest.mark.compiled
@pytest.mark.parametrize("hidden", [24, 33, 128])
@pytest.mark.parametrize("batch_first", [False, True])
def test_fifty_shapes_compile_at_most_three_forms_of_a_kernel(hidden: int, batch_first: bool, monkeypatch) -> None:
    """With the JIT's own parameters, real arguments and launches recorded instead of made."""
    from tritongru import registry
    from tritongru.launch import runtime, step
    from tritongru.planning import describe

    calls = []

    class Recorded(runtime.Kernel):
        def launch(self, arguments, pdl=False):
            calls.append((self.kernel, {**dict.fromkeys(self.scalars, 0), **self.constants, **arguments}))
            return super().launch(arguments, pdl)

    monkeypatch.setattr(step, "Kernel", Recorded)
    monkeypatch.setattr(runtime.Launch, "each", lambda self, steps, same: None)
    monkeypatch.setattr(registry, "device_of", lambda device: describe("h200"))
    monkeypatch.setattr(registry.Backend, "why_not", lambda self, device, dtype: None)
    layer = tritongru.GRU(20, hidden, backend="step", batch_first=batch_first)
    for T in range(2, 12):
        for B in (1, 3, 16, 48, 64):
            output, _ = layer(torch.randn(B, T, 20) if batch_first else torch.randn(T, B, 20))
            output.backward(torch.randn_like(output))
    compiled = fake_specialisations(calls)
    for kernel in ("step_forward", "step_backward"):
        assert 1 <= sum(key[0] == kernel for key in compiled) <= 3


@pytest.mark.compiled
def test_each_launch_but_the_first_begins_while_the_one_before_it_runs(monkeypatch) -> None:
    """And a call whose arguments are those of a call before hands over what that one did, no other call does."""
    import triton

    from benchmarks.hostcost import without_gpu
    from tests.kit.memory import SameMemory
    from tritongru.batch import Visits
    from tritongru.kernels import step as kernels
    from tritongru.launch import runtime, step
    from tritongru.launch.protocol import LayerCall, LayerWeights
    from tritongru.planning import describe

    T, B, I, H = 5, 2, 7, 16
    weights = LayerWeights.of((torch.randn(3 * H, I), torch.randn(3 * H, H), torch.randn(3 * H), torch.randn(3 * H)), 1)
    x, h_0, x_proj, memory = torch.randn(T, B, I), torch.randn(1, B, H), torch.randn(T, B, 3 * H), SameMemory()
    monkeypatch.setattr(step, "empty", memory.empty)
    monkeypatch.setattr(step, "project", lambda *given: x_proj)
    handed: list[tuple[Any, ...]] = []

    def forward(T: int, device: str = "h200") -> list[tuple[Any, ...]]:
        memory.again()
        handed.clear()
        call = LayerCall(Visits(T, B), 1, H, "fp32", "tf32", describe(device), save_gates=True)
        step.forward(call, x, h_0, weights)
        return handed.copy()

    def beside(found: list[tuple[Any, ...]]) -> list[bool]:
        return [bool(given[6]) for given in found]  # of Triton's launcher: grid, stream, function, cooperative, pdl

    with without_gpu(kernels.step_forward) as stand_in, monkeypatch.context() as patch:
        patch.setattr(runtime, "_observers", [])  # who is told of launches gets them one by one
        stand_in.run.launch = lambda *given: handed.append(given)
        found = forward(T)  # by the JIT
        assert beside(found) == [False] + [True] * (T - 1) and len(runtime._kept) == 0
        assert beside(forward(T)) == beside(found) and len(runtime._kept) == 1
        noted = handed.copy()
        assert forward(T) == noted and len(runtime._kept) == 1
        assert beside(forward(T - 1)) == [False] + [True] * (T - 2) and len(runtime._kept) == 2
        assert beside(forward(T, "a100")) == [False] * T  # another kernel: the JIT's, then noted
        assert beside(forward(T, "a100")) == [False] * T and len(runtime._kept) == 3
        x_proj = x_proj.clone()
        assert forward(T) != noted and len(runtime._kept) == 4
        hook = triton.knobs.runtime.launch_enter_hook
        hook.add(print)
        try:
            assert len(forward(T)) == T and len(runtime._kept) == 4
        finally:
            hook.remove(print)


@pytest.mark.compiled
def test_launches_are_told_apart_as_the_jit_does(monkeypatch) -> None:
    """By dtype, alignment, the width of numbers, and what is compiled in; not by addresses, nor by other numbers."""
    from benchmarks.hostcost import without_gpu
    from tritongru.kernels import step as kernels
    from tritongru.launch import runtime

    own = torch.zeros(64)
    names = kernels.step_forward.arg_names[len(kernels.FORWARD_SCALARS) :]
    given: dict[str, Any] = {name: own if name.endswith("_ptr") else 8 for name in names}
    compiled_in = [p.name for p in kernels.step_forward.params if p.is_constexpr]

    def kernels_after(first_scalar: int = 0, **changed: Any) -> int:
        own = {**given, **changed}
        constants = {name: own.pop(name) for name in compiled_in}
        launch = runtime.Kernel(kernels.step_forward, kernels.FORWARD_SCALARS, constants, 4).launch(own)
        launch((1, 1, 1), (first_scalar,) + (0,) * (len(kernels.FORWARD_SCALARS) - 1))
        return len(runtime._compiled)

    with without_gpu(kernels.step_forward), monkeypatch.context() as patch:
        patch.setattr(runtime, "_observers", [])
        assert kernels_after() == kernels_after() == kernels_after(B=9, x_ptr=torch.zeros(64)) == kernels_after(7) == 1
        assert kernels_after(x_ptr=own[1:]) == 2 and kernels_after(x_ptr=own.half()) == 3
        assert kernels_after(B=2**40) == 4 and kernels_after(2**40) == 5
        assert kernels_after(stride_x_i=1) == 6 and kernels_after(BLOCK_K=64) == 7


def test_what_is_kept_of_passes_is_bounded() -> None:
    from tritongru.launch.runtime import Kept, Pass

    kept = Kept(10)
    for name in "abcd":
        kept.keep(name, Pass(None, print, [()] * 4))
    assert list(kept) == ["c", "d"]
    kept.keep("d", Pass(None, print, [()] * 9))  # there already
    assert list(kept) == ["c", "d"]
    kept.keep("large", Pass(None, print, [()] * 11))
    assert list(kept) == []


# Nothing outside a tensor is read into a result or written, and every element of a result is written.


def poisoned_layer(**kwargs: Any) -> tritongru.GRU:
    layer = tritongru.GRU(7, 19, backend="step", **kwargs)
    for p in layer.parameters():
        p.data = poisoned(p.data)
    return layer


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize("tiles", ["one", "h200"])
def test_memory_between_fences(T: int, dtype: torch.dtype, tiles: str, monkeypatch, request) -> None:
    if tiles == "h200":
        request.getfixturevalue("h200_tiles")
    layer = poisoned_layer(bidirectional=True, dtype=dtype)
    x, h_0 = randn(T, 18, 7).to(dtype), randn(2, 18, 19).to(dtype)
    found = call_between_fences(layer, poisoned(x), poisoned(h_0), monkeypatch)
    assert all(t.isfinite().all() for t in found)
    gaps = call_between_fences(layer, with_gaps(x), with_gaps(h_0), monkeypatch)
    # only the library products may sum in another order: a few roundings to storage
    u = torch.finfo(dtype).eps / 2
    assert all((a - b).norm() <= 8 * u * b.norm() for a, b in zip(found, gaps, strict=True))


@interpreted
@pytest.mark.parametrize("recompute", [False, True])
def test_memory_between_fences_of_packed_rows(recompute: bool, monkeypatch, h200_tiles: None) -> None:
    layer = poisoned_layer(bidirectional=True, recompute=recompute)
    x = pack_padded_sequence(randn(5, 18, 7), torch.tensor([5] + [1, 2, 3] * 5 + [4, 4]), enforce_sorted=False)
    found = call_between_fences(layer, x._replace(data=poisoned(x.data)), poisoned(randn(2, 18, 19)), monkeypatch)
    assert all(t.isfinite().all() for t in found)


@interpreted
def test_a_fence_catches_a_store_outside(monkeypatch) -> None:
    """The fence itself: a launcher that writes one element too many is found."""
    from tritongru.launch import step

    with pytest.raises(AssertionError, match="beyond"), fences(monkeypatch):
        tensor = step.empty(4, dtype=torch.float32, device=torch.device("cpu"))
        tensor.as_strided((5,), (1,))[4] = 0.0
