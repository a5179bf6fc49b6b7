"""The bytes that `plan` says are the bytes that are allocated: saved for backward, and the peaks of both passes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence

import tritongru
from tests.kit.memory import memory
from tritongru import products
from tritongru.planning import Plan, Problem, describe
from tritongru.tools.counted import counted

pytestmark = pytest.mark.interpreted
BACKENDS = ("step", "sequence")
VARIANTS = {
    "plain": {},
    "bidirectional": {"bidirectional": True},
    "three-layers": {"num_layers": 3},
    "two-layers": {"num_layers": 2, "bidirectional": True},
    "no-bias": {"bias": False, "bidirectional": True, "num_layers": 2},
    "bf16": {"dtype": torch.bfloat16, "num_layers": 2},
}
# Three layers and no biases add terms that two layers and the plain layer have
QUICK = [pytest.param(v, marks=pytest.mark.long) if v in ("three-layers", "no-bias") else v for v in VARIANTS]


Bytes = tuple[int, int, int]  # saved, and the peaks of forward and backward


def planned(plan: Plan) -> Bytes:
    return plan.cost.saved_bytes, plan.cost.peak_forward_bytes, plan.cost.peak_backward_bytes


def allocated(layer: tritongru.GRU, x, monkeypatch) -> Bytes:
    data = x if isinstance(x, Tensor) else x.data
    B = x.shape[1] if isinstance(x, Tensor) else int(x.batch_sizes[0])
    h_0 = torch.zeros(layer.num_layers * (1 + layer.bidirectional), B, layer.hidden_size, dtype=data.dtype)
    with memory(monkeypatch) as found:
        output, h_n = layer(x, h_0)
        output = output if isinstance(x, Tensor) else output.data
        results = [output, h_n]
        forward, saved = found.peak(results), found.now(results)
        cotangents = [torch.randn_like(t) for t in results]
        found.peak()
        torch.autograd.backward(results, cotangents)
        backward = found.peak([*results, *cotangents, *(p.grad for p in layer.parameters())])
    return saved, forward, backward


@pytest.mark.parametrize("recompute", [False, True], ids=["saved", "recompute"])
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("T", [pytest.param(1, marks=pytest.mark.long), 5])
@pytest.mark.parametrize("variant", QUICK)
@pytest.mark.parametrize("backend", BACKENDS)
def test_training(backend: str, variant: str, T: int, packed: bool, recompute: bool, monkeypatch) -> None:
    layer = tritongru.GRU(5, 6, backend=backend, recompute=recompute, **VARIANTS[variant])
    x = torch.randn(T, 4, 5, dtype=layer.weight_hh_l0.dtype)
    given = pack_sequence(list(x.transpose(0, 1))) if packed else x
    assert allocated(layer, given, monkeypatch) == planned(tritongru.plan(layer, given))


@pytest.mark.parametrize("rows", [8, *(pytest.param(rows, marks=pytest.mark.long) for rows in (4, 15))])
@pytest.mark.parametrize("variant", QUICK)
@pytest.mark.parametrize("backend", BACKENDS)
def test_recompute_in_chunks(backend: str, variant: str, rows: int, few_rows_at_once, monkeypatch) -> None:
    few_rows_at_once(rows)
    test_training(backend, variant, 5, False, True, monkeypatch)


@pytest.mark.parametrize("rows", [2, 3, 5, 19, 20])
@pytest.mark.parametrize("variant", ["plain", "two-layers", "bf16"])
def test_column_sums_of_few_rows_at_once(variant: str, rows: int, few_rows_in_a_sum, monkeypatch) -> None:
    few_rows_in_a_sum(rows)
    test_training("step", variant, 5, False, False, monkeypatch)


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gates_that_were_read_are_gone_unless_the_graph_is_retained(backend: str, packed: bool, monkeypatch) -> None:
    """They are not there when the gradients of the weights are made."""
    layer, lived = tritongru.GRU(5, 6, backend=backend), []
    x = torch.randn(3, 4, 5, requires_grad=True)
    column_sums = products.column_sums

    def watched(rows: Tensor) -> Tensor:
        lived.append(found.now())
        return column_sums(rows)

    monkeypatch.setattr(products, "column_sums", watched)
    for retain in (True, False):
        with memory(monkeypatch) as found:
            output, _ = layer(pack_sequence(list(x.transpose(0, 1))) if packed else x)
            output = output.data if packed else output
            torch.autograd.grad(output, [x, *layer.parameters()], torch.ones_like(output), retain_graph=retain)
    assert lived[0] - lived[1] == tritongru.plan(layer, x).cost.saved_bytes > 0


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("T", [1, 5])
def test_inference(T: int, layers: int, bidirectional: bool, batch_first: bool, monkeypatch) -> None:
    layer = tritongru.GRU(5, 6, layers, backend="step", bidirectional=bidirectional, batch_first=batch_first)
    x = torch.randn(4, T, 5) if batch_first else torch.randn(T, 4, 5)
    h_0 = torch.zeros(layers * (1 + bidirectional), 4, 6)
    with memory(monkeypatch) as found, torch.no_grad():
        results = layer(x, h_0)
        plan = tritongru.plan(layer, x)
        assert (found.now(results), found.peak(results)) == (0, plan.cost.peak_forward_bytes)
    assert plan.cost.saved_bytes == plan.cost.peak_backward_bytes == 0


def test_chunks_bound_the_peak_of_a_long_sequence(few_rows_at_once) -> None:
    """With one layer it does not grow with T."""
    few_rows_at_once(1 << 14)
    problem = Problem(batch=32, time=1024, input_size=512, hidden_size=512, dtype="bf16", recompute=True)
    short, long = (counted(replace(problem, time=T), describe("h200"), "step")[1] for T in (2048, 1 << 13))
    assert short.peak_backward_bytes == long.peak_backward_bytes
