"""The backends against float64 and nn.GRU: output, h_n and every gradient, by `check`'s rule.

Of `sequence` what is quick stands in tests/test_sequence.py; here it runs in `make long`. So does what takes long
of `step` and another case shows: bfloat16, where float16 rounds in the same places; tiles of a GPU in half precision;
most of backward in chunks, which is outside backends.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings

from tests.kit.cases import HALF, MORE_CASES, quiet, shapes
from tests.kit.drawn import DTYPES
from tests.kit.rule import assert_not_wrong, assert_right
from tritongru.launch import step
from tritongru.planning.step import FORMS, StepTiles
from tritongru.tools.check import CASES, Case

BACKENDS = (
    "reference",
    pytest.param("step", marks=pytest.mark.interpreted),
    pytest.param("sequence", marks=(pytest.mark.interpreted, pytest.mark.long)),
)


def with_long(quick: Callable[..., bool], *values: Sequence[Any]) -> list[Any]:
    """Every combination, of which those with backend `step` that are not `quick` are marked `long`."""
    found = []
    for backend, *others in product(BACKENDS, *values):
        name, marks = (backend, []) if isinstance(backend, str) else (backend.values[0], list(backend.marks))
        if name == "step" and not quick(*others):
            marks.append(pytest.mark.long)
        ids = "-".join([name, *(other.name if isinstance(other, Case) else str(other) for other in others)])
        found.append(pytest.param(name, *others, marks=marks, id=ids))
    return found


@pytest.mark.parametrize(
    "backend, case, dtype",
    with_long(lambda case, dtype: dtype != torch.bfloat16, CASES + MORE_CASES, DTYPES),
)
def test_rule(case: Case, backend: str, dtype: torch.dtype) -> None:
    assert_right(case, backend, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (2, 1, 3, 1), (2, 3, 1, 2)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_smallest_sizes(sizes: tuple[int, int, int, int], backend: str, dtype: torch.dtype) -> None:
    assert_not_wrong(Case(*sizes, bidirectional=True), backend, dtype)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_reference_in_float64(case: Case) -> None:
    assert_right(case, "reference", torch.float64)


CHUNKED = (
    Case(T=7, B=3, I=5, H=18, bias=False, recompute=True),
    Case(T=7, B=3, I=5, H=18, layers=2, bidirectional=True, batch_first=True, recompute=True),
    Case(I=4, H=13, bidirectional=True, lengths=(7, 1, 4), recompute=True),
)


@pytest.mark.parametrize(
    "backend, case, rows, dtype",
    with_long(
        lambda case, rows, dtype: case.layers == 1 and rows == 3 and dtype == torch.float16, CHUNKED, (3, 12), DTYPES
    ),
)
def test_rule_in_chunks(case: Case, rows: int, dtype: torch.dtype, backend: str, few_rows_at_once) -> None:
    few_rows_at_once(rows)
    assert_right(case, backend, dtype)


@pytest.mark.interpreted
@pytest.mark.parametrize(
    "dtype", [torch.float32, *(pytest.param(dtype, marks=pytest.mark.long) for dtype in HALF)], ids=str
)
@pytest.mark.parametrize("case", [CASES[2], CASES[4], Case(T=2, B=20, I=35, H=70)], ids=lambda case: case.name)
def test_rule_with_the_tiles_of_a_gpu(case: Case, dtype: torch.dtype, h200_tiles: None) -> None:
    """Several programs in rows and columns, and several tiles of K, ragged at every end."""
    assert_right(case, "step", dtype)


@pytest.mark.interpreted
@pytest.mark.parametrize("form", [0, 3, *(pytest.param(i, marks=pytest.mark.long) for i in (1, 2, 4, 5))])
def test_rule_with_every_form_and_part_of_the_weights_ahead(form: int, h200_tiles: None, monkeypatch) -> None:
    """K in two or three chunks, ragged at the end, one of them loaded before the wait."""
    chosen = step.step_tiles

    def forced(kind: str, *problem: Any) -> StepTiles:
        return replace(FORMS[kind][form], ahead=1) if kind in FORMS else chosen(kind, *problem)

    monkeypatch.setattr(step, "step_tiles", forced)
    assert_not_wrong(Case(T=2, B=18, I=3, H=150), "step", torch.float16)


@pytest.mark.interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(case=shapes)
@settings(quiet, max_examples=8)
def test_any_shape(dtype: torch.dtype, case: Case) -> None:
    assert_not_wrong(case, "step", dtype)


@pytest.mark.long
@pytest.mark.interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(case=shapes)
@settings(quiet, max_examples=60)
def test_any_shape_with_the_tiles_of_a_gpu(dtype: torch.dtype, case: Case, h200_tiles: None) -> None:
    assert_not_wrong(case, "step", dtype)


@given(case=shapes)
@settings(quiet, max_examples=25)
def test_any_shape_by_the_reference(case: Case) -> None:
    assert_not_wrong(case, "reference", torch.float32)


@pytest.mark.interpreted
def test_same_call_same_bits() -> None:
    """No atomics, no plan that depends on anything but the call."""
    import tritongru

    torch.manual_seed(0)
    layer = tritongru.GRU(5, 12, bidirectional=True, backend="step")
    x = torch.randn(3, 4, 5)

    def once() -> list[torch.Tensor]:
        layer.zero_grad()
        output, h_n = layer(x)
        (output.square().sum() + h_n.sum()).backward()
        return [output, h_n, *(p.grad.clone() for p in layer.parameters())]

    assert all(torch.equal(a, b) for a, b in zip(once(), once(), strict=True))


@pytest.mark.interpreted
def test_tf32_factors_are_rounded_to_nearest(monkeypatch) -> None:
    """The interpreter multiplies in float32, so that what it computes from rounded factors is TF32's own product."""
    import tritongru
    from tritongru import products

    def rounded(t: torch.Tensor) -> torch.Tensor:  # 10 bits of fraction, ties away from zero
        return ((t.contiguous().view(torch.int32) + 0x1000) & -0x2000).view(torch.float32)

    torch.manual_seed(0)
    layer = tritongru.GRU(9, 20, backend="step", bias=False)
    x, h_0 = torch.randn(1, 4, 9), torch.randn(1, 4, 20)
    with torch.no_grad():
        plain = layer(x, h_0)[0]
        monkeypatch.setattr(products, "rnn_precision", lambda nvidia: "tf32")
        found = layer(x, h_0)[0]
        a_i = rounded(x[0]) @ rounded(layer.weight_ih_l0).T
        a_h = rounded(h_0[0]) @ rounded(layer.weight_hh_l0).T
        r, z = torch.sigmoid(a_i[:, :40] + a_h[:, :40]).chunk(2, -1)
        n = torch.tanh(a_i[:, 40:] + r * a_h[:, 40:])
        expected = n + z * (h_0[0] - n)
    torch.testing.assert_close(found[0], expected, rtol=0, atol=1e-6)
    assert (found - plain).abs().max() > 1e-5  # the rounding is there
    poisoned = x.clone()
    poisoned[0, 0, 0], poisoned[0, 1, 0] = float("nan"), float("inf")
    with torch.no_grad():
        assert (
            layer(poisoned, h_0)[0].isfinite().tolist()
            == torch.nn.GRU.forward(layer, poisoned, h_0)[0].isfinite().tolist()
        )
