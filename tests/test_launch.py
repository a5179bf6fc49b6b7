"""What a call launches and allocates: no launch and no byte that `plan` does not list."""

from collections import defaultdict
from typing import Any

import pytest
import torch
from torch.nn.utils.rnn import pack_sequence

import tritongru
from benchmarks import hostcost
from tests.kit.counting import memory
from tests.kit.drawn import SMALL
from tests.kit.modules import states, table, tensors
from tritongru import products
from tritongru.kernels import step as kernels
from tritongru.latest import Latest
from tritongru.launch import runtime
from tritongru.planning import Problem, describe, sequence
from tritongru.tools.counted import counted

interpreted, LONG = pytest.mark.interpreted, pytest.mark.long
backends = pytest.mark.parametrize("backend", ["step", "sequence", SMALL])

VARIANTS = {
    "plain": {},
    "bidirectional": {"bidirectional": True},
    "two-layers": {"num_layers": 2, "bidirectional": True},
    "no-bias": {"bias": False, "bidirectional": True},
    "bf16": {"dtype": torch.bfloat16, "num_layers": 2},
}
VARIANTS |= {f"{name}-recompute": {**options, "recompute": True} for name, options in VARIANTS.items()}


def as_planned(layer, x, monkeypatch, h_0_needs_grad: bool = False):
    """Launches of forward and of backward of 2 rows; these, bytes saved and both peaks are those of the plan."""
    plan = tritongru.plan(layer, x)
    h_0 = torch.zeros(states(layer), 2, layer.hidden_size, dtype=layer.weight_hh_l0.dtype)
    with memory(monkeypatch) as found:
        results = tensors(layer(x, h_0.requires_grad_(h_0_needs_grad)))
        forward, peak_forward, saved = dict(found.launches), found.peak(results), found.now(results)
        cotangents = [torch.randn_like(t) for t in results]
        found.launches.clear()
        found.peak()
        torch.autograd.backward(results, cotangents)
        peak_backward = found.peak([*results, *cotangents, *(p.grad for p in layer.parameters())])
    if not h_0_needs_grad:
        assert (forward, dict(found.launches)) == (dict(plan.launches.forward), dict(plan.launches.backward))
        bytes_of_plan = plan.cost.saved_bytes, plan.cost.peak_forward_bytes, plan.cost.peak_backward_bytes
        assert (saved, peak_forward, peak_backward) == bytes_of_plan
    return forward, found.launches


@interpreted
@backends
@table("options", VARIANTS)
@pytest.mark.parametrize(("T", "packed"), [(4, False), (4, True), (1, False), pytest.param(1, True, marks=LONG)])
def test_a_plan_tells_what_runs(backend, options, T: int, packed: bool, few_rows_at_once, monkeypatch) -> None:
    few_rows_at_once(4)  # recompute in chunks of time
    layer = tritongru.GRU(5, 6, backend=backend, **options)
    x = torch.randn(T, 2, 5, dtype=layer.weight_hh_l0.dtype)
    forward, _ = as_planned(layer, pack_sequence(list(x.transpose(0, 1))) if packed else x, monkeypatch)
    assert backend != SMALL or "padded copy" not in forward


@interpreted
@pytest.mark.parametrize("hidden", [32, 21])
@pytest.mark.parametrize("exchange_bytes", [None, 0], ids=["one-launch", "several"])
@table("options", {"plain": {}, "recompute": {"recompute": True}})
def test_a_plan_tells_what_runs_of_programs_that_exchange(options, exchange_bytes, hidden: int, monkeypatch) -> None:
    """An exchange buffer, with a fill before each launch, and another where K is wider than H."""
    if exchange_bytes is not None:
        monkeypatch.setattr(sequence, "EXCHANGE_BYTES", exchange_bytes)
    counted.cache_clear()  # what was counted before has other launches
    layer = tritongru.GRU(5, hidden, backend="sequence", **options)
    x = torch.randn(3, 2, 5)
    assert isinstance(dict(tritongru.plan(layer, x).tiles)["forward"], sequence.SequenceTiles)
    forward, _ = as_planned(layer, x, monkeypatch)
    counted.cache_clear()
    assert (forward["sequence_forward"] > 1) == (exchange_bytes == 0)


@interpreted
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("T", [1, 2, 5])
def test_one_recurrent_launch_per_timestep(T: int, bidirectional: bool, monkeypatch) -> None:
    """T each way, one more for the gradient of h_0; a cell is one; batch_first launches what time-major input does."""
    layer = tritongru.GRU(5, 6, backend="step", bidirectional=bidirectional)
    for wanted in (True, False):
        forward, backward = as_planned(layer, torch.randn(T, 2, 5), monkeypatch, h_0_needs_grad=wanted)
        assert forward["step_forward"] == T and backward["step_backward"] == T + wanted
        assert "step_backward" not in forward and "step_forward" not in backward
        layer.zero_grad()
    cell, x, h = tritongru.GRUCell(5, 6, backend="step"), torch.randn(T, 2, 5), torch.zeros(1, 2, 6)
    time_major, first = (tritongru.GRU(5, 6, backend="step", batch_first=first) for first in (False, True))
    found = []
    for call, *given in ((cell, x[0], h[0]), (time_major, x, h), (first, x.transpose(0, 1).contiguous(), h)):
        with memory(monkeypatch) as watch, torch.no_grad():
            call(*given)
        found.append(watch.launches)
    assert dict(found[0]) == {"step_forward": 1} and found[1] == found[2] and found[2]["step_forward"] == T


@interpreted
@pytest.mark.parametrize("options", [{}, {"bidirectional": True, "batch_first": True}], ids=str)
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("T", [1, 5])
@torch.no_grad()
def test_memory_of_inference(T: int, layers: int, options: dict, monkeypatch) -> None:
    layer = tritongru.GRU(5, 6, layers, backend="step", **options)
    x = torch.randn(4, T, 5) if layer.batch_first else torch.randn(T, 4, 5)
    cost, h_0 = tritongru.plan(layer, x).cost, torch.zeros(states(layer), 4, 6)
    with memory(monkeypatch) as found:
        results = layer(x, h_0)
    assert (found.now(results), found.peak(results)) == (0, cost.peak_forward_bytes)
    assert cost.saved_bytes == cost.peak_backward_bytes == 0


@interpreted
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@backends
def test_gates_that_were_read_are_gone_unless_the_graph_is_retained(backend: str, packed: bool, monkeypatch) -> None:
    """They are not there when the gradients of the weights are made."""
    layer, lived = tritongru.GRU(5, 6, backend=backend), []
    x = torch.randn(3, 4, 5, requires_grad=True)
    column_sums = products.column_sums

    def watched(*given: Any) -> torch.Tensor:
        lived.append(found.now())
        return column_sums(*given)

    monkeypatch.setattr(products, "column_sums", watched)
    for retain in (True, False):
        with memory(monkeypatch) as found:
            output, _ = layer(pack_sequence(list(x.transpose(0, 1))) if packed else x)
            output = output.data if packed else output
            torch.autograd.grad(output, [x, *layer.parameters()], torch.ones_like(output), retain_graph=retain)
    assert lived[0] - lived[1] == tritongru.plan(layer, x).cost.saved_bytes > 0


def test_chunks_bound_the_peak_of_a_long_sequence(few_rows_at_once) -> None:
    """With one layer it does not grow with T."""
    few_rows_at_once(1 << 14)
    problems = [Problem(32, T, 512, 512, dtype="bf16", recompute=True) for T in (2048, 1 << 13)]
    short, long = (counted(problem, describe("h200"), "step")[1] for problem in problems)
    assert short.peak_backward_bytes == long.peak_backward_bytes


@pytest.mark.compiled
def test_a_plan_is_the_same_in_inference_mode() -> None:
    asked = Problem(4, 5, 6, 7, layers=2, training=False), describe("h200"), "step"
    found = counted.__wrapped__(*asked)
    with torch.inference_mode():
        assert counted.__wrapped__(*asked) == found


@pytest.mark.compiled
def test_a_plan_of_a_streaming_step_asks_no_driver() -> None:
    launches, _ = counted(Problem(3, 1, 8, 16, training=False), describe("h200"), "step")
    assert launches.forward == (("step_forward", 1),)


@pytest.mark.compiled
@pytest.mark.parametrize("hidden", [24, 33, 128])
@pytest.mark.parametrize("batch_first", [False, True])
def test_fifty_shapes_compile_at_most_three_forms_of_a_kernel(hidden: int, batch_first: bool, monkeypatch) -> None:
    """By the keys of the JIT's own cache of each kernel."""
    keys: defaultdict[int, set[Any]] = defaultdict(set)
    monkeypatch.setattr(hostcost._Always, "get", lambda self, key, _=None: keys[id(self)].add(key) or self.kernel)
    layer = tritongru.GRU(20, hidden, backend="step", batch_first=batch_first)
    with hostcost.as_on_a_gpu():
        for T in range(2, 12):
            for B in (1, 3, 16, 48, 64):
                output, _ = layer(torch.randn(B, T, 20) if batch_first else torch.randn(T, B, 20))
                output.backward(torch.randn_like(output))
    assert len(keys) == 2 and all(1 <= len(of_kernel) <= 3 for of_kernel in keys.values())


@pytest.mark.compiled
def test_launches_are_told_apart_as_the_jit_does(monkeypatch) -> None:
    """By dtype, alignment, the width of numbers, and what is compiled in; not by addresses, nor by other numbers."""
    own = torch.zeros(64)
    names = kernels.step_forward.arg_names[len(kernels.FORWARD_SCALARS) :]
    given: dict[str, Any] = {name: own if name.endswith("_ptr") else 8 for name in names}
    compiled_in = [p.name for p in kernels.step_forward.params if p.is_constexpr]

    def kernels_after(first_scalar: int = 0, **changed: Any) -> int:
        own = {**given, **changed}
        constants = {name: own.pop(name) for name in compiled_in}
        launch = runtime.Kernel(kernels.step_forward, constants, 4).launch(own, rows=first_scalar)
        launch(runtime.one_step((1, 1, 1), (first_scalar,) + (0,) * (len(kernels.FORWARD_SCALARS) - 1)))
        return len(runtime._compiled)

    with hostcost.without_gpu(kernels.step_forward), monkeypatch.context() as patch:
        patch.setattr(runtime, "_observers", [])
        assert kernels_after() == kernels_after() == kernels_after(B=9, x_ptr=torch.zeros(64)) == kernels_after(7) == 1
        assert kernels_after(x_ptr=own[1:]) == 2 and kernels_after(x_ptr=own.half()) == 3
        assert kernels_after(B=2**40) == kernels_after(2**40) == 4  # scalars of 64 bits are the JIT's own
        assert kernels_after(stride_x_i=1) == 5 and kernels_after(BLOCK_K=64) == 6


def test_what_is_kept_is_bounded() -> None:
    kept = Latest[str | int, list[None]](10, lambda key, value: max(1, len(value)))
    for name in "abcd":
        kept.keep(name, [None] * 4)
    assert list(kept) == ["c", "d"]
    kept.keep("d", [None] * 6)  # in place of what was there
    assert list(kept) == ["c", "d"]
    kept.keep("large", [None] * 11)
    assert list(kept) == []
    for number in range(20):
        kept.keep(number, [])
    assert list(kept) == [*range(10, 20)]
