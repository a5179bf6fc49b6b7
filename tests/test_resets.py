"""Lengths and resets of a padded batch: against nn.GRU run sequence by sequence, output and every gradient.

Of every backend by the floor of `check`'s rule; then what must not come through: NaN, infinity, gradients; what a call
may be wrapped in; and what is refused.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import tritongru
from tests.kit.plans import ShrunkenPlan, exchanging
from tests.kit.rule import assert_not_wrong, assert_right
from tritongru.inspection.check import Case, run
from tritongru.launch import sequence
from tritongru.launch.emulator import emulating
from tritongru.visits import Visits

SEQUENCE = pytest.param("sequence", marks=pytest.mark.interpreted)
BACKENDS = ("aten", "reference", pytest.param("step", marks=pytest.mark.interpreted), SEQUENCE)
LENGTHS_OF_18 = (3,) * 9 + (4, 1) + (2,) * 6 + (4,)

CASES = (
    Case(T=5, I=3, H=10, bidirectional=True, lengths=(5, 1, 3), padded=True),
    Case(T=4, I=3, H=9, lengths=(2, 1, 3), padded=True, batch_first=True),  # none as long as x
    Case(T=4, B=3, I=3, H=10, bidirectional=True, resets=0.4),
    Case(T=3, B=2, I=3, H=10, bidirectional=True, resets=1.0, bias=False),
    Case(T=5, I=3, H=10, layers=2, bidirectional=True, batch_first=True, lengths=(4, 5, 1), padded=True, resets=0.3),
    Case(T=5, I=3, H=10, bidirectional=True, lengths=(2, 5, 4), padded=True, resets=0.3, recompute=True),
    Case(T=4, I=3, H=10, bidirectional=True, lengths=LENGTHS_OF_18, padded=True, resets=0.3),  # two tiles of rows
    Case(T=1, B=2, I=3, H=10, bidirectional=True, resets=0.5),
    Case(T=1, B=3, I=3, H=10, resets=1.0),
    Case(T=3, I=3, H=10, lengths=(3, 2), padded=True, resets=0.0),
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("backend", BACKENDS)
def test_against_nn_gru_sequence_by_sequence(backend: str, case: Case) -> None:
    assert_not_wrong(case, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rule(backend: str) -> None:
    assert_right(Case(T=4, I=5, H=20, lengths=(4, 1, 3), padded=True, resets=0.3), backend)


@pytest.mark.parametrize("backend", ["aten", "reference"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_in_float64(backend: str, case: Case) -> None:
    assert_not_wrong(case, backend, torch.float64)


@pytest.mark.interpreted
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype: torch.dtype) -> None:
    assert_not_wrong(CASES[4], "sequence", dtype)


def drawn(case: Case, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Arguments of `run`, x finite, and a module's."""
    torch.manual_seed(seed)
    T, B, D = case.sizes
    leading = (B, T) if case.batch_first else (T, B)
    return dict(
        x=torch.randn(*leading, case.I, dtype=dtype),
        h_0=torch.randn(case.layers * D, B, case.H, dtype=dtype),
        dy=torch.randn(*leading, D * case.H, dtype=dtype),
        dh_n=torch.randn(case.layers * D, B, case.H, dtype=dtype),
        lengths=torch.tensor(case.lengths) if case.lengths else None,
        resets=None if case.resets is None else torch.rand(*leading) < case.resets,
    )


def layer_of(case: Case, backend: str | None, dtype: torch.dtype = torch.float32, **kwargs: Any) -> tritongru.GRU:
    torch.manual_seed(1)
    return tritongru.GRU(
        case.I, case.H, case.layers, case.bias, case.batch_first, bidirectional=case.bidirectional, dtype=dtype,
        backend=backend, recompute=case.recompute, **kwargs,
    )  # fmt: skip


def same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


# ---- what must not come through --------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_past_a_length_is_seen(backend: str) -> None:
    """The same bits, whatever lies there in x, dy and resets; zeros in output and the gradient of x."""
    case = CASES[4]
    given, layer = drawn(case), layer_of(case, backend)
    past = torch.arange(case.T) >= given["lengths"][:, None]
    found = run(layer, **given)
    given["x"][past], given["resets"][past] = math.inf, True
    given["dy"][past] = math.nan
    assert same_bits(found, run(layer, **given))
    assert not found["output"][past].any() and not found["x"][past].any() and found["x"][~past].all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_nothing_comes_through_a_reset(backend: str, value: float) -> None:
    """The state of another sequence, not even one that is not finite, nor its gradient."""
    case = Case(T=4, B=2, I=3, H=9, bidirectional=True)
    given, layer = drawn(case), layer_of(case, backend)
    given["resets"] = torch.zeros(4, 2, dtype=torch.bool)
    given["resets"][2] = True
    first, second = slice(0, 2), slice(2, 4)
    for spoilt, other, of_h_0 in ((first, second, 0), (second, first, 1)):
        x, h_0, dy, dh_n = (given[name].clone() for name in ("x", "h_0", "dy", "dh_n"))
        x[spoilt], h_0[of_h_0], dy[spoilt], dh_n[1 - of_h_0] = value, value, value, value
        found = run(layer, x, h_0, dy, dh_n, None, given["resets"])
        true = run(layer, **given)
        assert found["output"][spoilt].isnan().all() or found["x"][spoilt].isnan().all()
        for name, part in (("output", other), ("x", other), ("h_n", of_h_0)):
            assert torch.equal(found[name][part], true[name][part]), name
        assert torch.equal(found["h_0"][1 - of_h_0], true["h_0"][1 - of_h_0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_changed_after_the_call_changes_no_gradient(backend: str) -> None:
    case = CASES[5]
    given, layer = drawn(case), layer_of(case, backend)
    expected = run(layer, **given)
    x = given["x"].requires_grad_()
    output, h_n = layer(x, given["h_0"], lengths=given["lengths"], resets=given["resets"])
    given["resets"].fill_(True)
    given["lengths"].fill_(1)
    torch.autograd.backward([output, h_n], [given["dy"], given["dh_n"]])
    assert torch.equal(x.grad, expected["x"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_to_packing_and_unpacking(backend: str) -> None:
    """To a few roundings: a product of other rows may sum in another order."""
    case = CASES[0]
    given, layer = drawn(case), layer_of(case, backend)
    output, h_n = layer(given["x"], given["h_0"], lengths=given["lengths"])
    packed, h_n_of_packed = layer(
        pack_padded_sequence(given["x"], given["lengths"], enforce_sorted=False), given["h_0"]
    )
    of_packed, _ = pad_packed_sequence(packed, total_length=case.T)
    for ours, theirs in ((output, of_packed), (h_n, h_n_of_packed)):
        assert (ours - theirs).abs().max() <= 16 * 2**-24


@pytest.mark.parametrize("backend", BACKENDS)
def test_fresh_results(backend: str) -> None:
    """h_n may be detached in place, as after nn.GRU."""
    case = CASES[4]
    given, layer = drawn(case), layer_of(case, backend)
    output, h_n = layer(given["x"], given["h_0"], lengths=given["lengths"], resets=given["resets"])
    assert h_n.is_contiguous() and not h_n._is_view()
    h_n.detach_()
    output.sum().backward()


# ---- programs that exchange ------------------------------------------------------------------------------------------

EXCHANGING = {
    "two-tiles": (ShrunkenPlan(tiles=2, waits=3), replace(CASES[6], H=20), torch.float16),
    "two-groups": (ShrunkenPlan(groups=2, together=False), replace(CASES[6], H=20), torch.float32),
    "three-tensors": (
        ShrunkenPlan(num_k=3),
        Case(T=4, I=3, H=70, lengths=(4, 1, 2), padded=True, resets=0.3),
        torch.bfloat16,
    ),
}


@pytest.mark.interpreted
@pytest.mark.parametrize(("plan", "case", "dtype"), EXCHANGING.values(), ids=EXCHANGING)
def test_programs_that_exchange(plan: ShrunkenPlan, case: Case, dtype: torch.dtype, monkeypatch) -> None:
    """Right, and the same bits under every seed and in several launches over time."""
    given, layer = drawn(case, dtype=dtype), layer_of(case, "sequence", dtype)
    with exchanging(monkeypatch, plan):
        assert_not_wrong(case, "sequence", dtype)
        found = run(layer, **given)
        for seed, visits in ((1, 4), (2, 1), (3, 3)):
            monkeypatch.setattr(sequence, "_visits_per_launch", lambda *_, visits=visits: visits)
            with emulating(seed):
                assert same_bits(found, run(layer, **given)), (seed, visits)


def test_h_prev_is_the_state_that_enters_a_step() -> None:
    """Of y's rows, numbered from 1, and h_0's, below 0."""
    lengths, resets = torch.tensor([4, 2], dtype=torch.int32), torch.zeros(4, 2, dtype=torch.bool)
    resets[0, 1] = resets[2, 0] = resets[3, 1] = True  # the last past its row's length
    y, h_0 = torch.arange(1, 9).view(8, 1), torch.tensor([[-1], [-2]])
    visits = Visits(4, 2, None, lengths, resets)
    runs = visits.runs()
    expected = {0: [[-1, 0], [1, 2], [0, 0], [5, 0]], 1: [[3, 4], [0, -2], [7, 0], [-1, 0]]}
    for direction, values in expected.items():
        [(_, found)] = visits.h_prev(y, h_0, direction)
        assert found.view(4, 2).masked_fill(~runs, 0).tolist() == values
