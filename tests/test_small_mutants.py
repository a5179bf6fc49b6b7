"""The tests of kernels/small.py can fail: kernels with one mistake each are found as test_small.py compares."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import tritongru
from tests.kit.fences import fences
from tests.kit.mutants import mutant
from tests.kit.rule import assert_finite_where_nn_gru_is, assert_not_wrong
from tritongru.launch import small
from tritongru.tools.check import Case
from tritongru.tools.emulator import EmulatorError

pytestmark = pytest.mark.interpreted

SMALL, LONG = "sequence:exchange=0", pytest.mark.long
DENSE = Case(T=4, B=3, I=5, H=18)
BOTH = replace(DENSE, bidirectional=True)
PACKED = Case(I=5, H=18, bidirectional=True, lengths=(4, 1, 2))
FMA, MATRIX = torch.float32, torch.float16

FORWARD = {
    "products of r and z swapped": ("a_r = product(w_r, h_all,", "a_r = product(w_z, h_all,"),
    "product of n dropped": ("q = own_sums(q, FORM) +", "q = 0.0 * x[2].to(gl.float32) +"),
    "x_proj of r dropped": ("+ (x[0].to(gl.float32) + b_hr)", "+ b_hr"),
    "x_proj of n dropped": ("x[2].to(gl.float32), q, h)", "0.0 * x[2].to(gl.float32), q, h)"),
    "x_proj of the first visit for all": ("x, x_next = x_next, x_ahead", "x_next = x_ahead"),
    "x_proj of a visit too early": ("at_later = place_of(t_ahead + step_t,", "at_later = place_of(t_ahead,"),
    "b_hz dropped": ("(x[1].to(gl.float32) + b_hz)", "x[1].to(gl.float32)"),
    "b_hn dropped": ("FORM) + b_hn", "FORM)"),
    "h_0 never read": ("h = gl.load(h_0_ptr + of_state,", "h = 0.0 * gl.load(h_0_ptr + of_state,"),
    "h not handed on": ("h = gl.where(runs, h_new, h)", "h = gl.where(runs & (visit < 1), h_new, h)"),
    "h handed over too late": (
        "hand_over(h_shared, h.to(dtype), FORM)\n        h_all = received(h_shared, FORM)",
        "h_all = received(h_shared, FORM)\n        hand_over(h_shared, h.to(dtype), FORM)",
    ),
    "gates not saved": ("saves = runs & (save_gates != 0)", "saves = runs & (save_gates == 0)"),
    "z saved as r": ("gl.store(rzn, r.to(dtype),", "gl.store(rzn, z.to(dtype),"),
    "n not saved": ("        gl.store(rzn + 2 * H, n.to(dtype), mask=saves)\n", ""),
    "gates saved where the next visit's belong": (
        "rzn = time_step(rzn_ptr, at, step_x,", "rzn = time_step(rzn_ptr, at_next, step_x,"
    ),
    "units' mask one short": ("    is_unit = unit < H\n", "    is_unit = unit < H - 1\n"),
}  # fmt: skip
BACKWARD = {
    "dh * z dropped": ("dh = gl.where(runs, dh * z, dh)", "dh = gl.where(runs, 0.0 * dh, dh)"),
    "dh without z": ("dh = gl.where(runs, dh * z, dh)", "dh = dh"),
    "products dropped": ("dh + own_sums(parts,", "dh + 0.0 * own_sums(parts,"),
    "dz for dr": ("product(w_r, received(dr_shared,", "product(w_r, received(dz_shared,"),
    "dq W_hn dropped": ("parts += product(w_n,", "parts += 0.0 * product(w_n,"),
    "weights not transposed": ("w_z = load_weights(w_ptr, 1, H, True,", "w_z = load_weights(w_ptr, 1, H, False,"),
    "dy dropped": ("        dh += dy.to(gl.float32)\n", ""),
    "dh_n dropped": ("dh = gl.load(dh_n_ptr + of_state,", "dh = 0.0 * gl.load(dh_n_ptr + of_state,"),
    "h_prev of the wrong step": ("time_step(y_ptr, at_before, step_y,", "time_step(y_ptr, at, step_y,"),
    "h_0 never read": ("gl.where(begins, h_0, h_prev)", "h_prev"),
    "gates of the last visit for all": ("given, given_next = given_next, given_ahead", "given_next = given_ahead"),
    "dgates where the visit before belong": (
        "time_step(dgates_ptr, at, step_dgates,", "time_step(dgates_ptr, at_next, step_dgates,"
    ),
    "dn stored as dq": ("gl.store(dgates, dn.to(dtype),", "gl.store(dgates, dq,"),
    "dr stored as dz": ("gl.store(dgates + H, dr,", "gl.store(dgates + H, dz,"),
    "dh_0 not made": ("& (want_dh != 0))", "& (want_dh == 0))"),
}  # fmt: skip
DIRECTIONS = {
    "weights of the other direction": ("w_ptr = gl.where(direction == 0, w_ptr, w_reverse_ptr)", "w_ptr = w_ptr + 0"),
    "biases of the other direction": ("b_ptr = gl.where(direction == 0, b_ptr, b_reverse_ptr)", "b_ptr = b_ptr + 0"),
    "x_proj of the other direction": ("stride_rzn_b * D + direction) * (3 * H)", "stride_rzn_b * D) * (3 * H)"),
    "y of the other direction": ("of_y = (row * D + direction) * H", "of_y = (row * D) * H"),
    "dy of the other direction": ("(direction.to(gl.int64) * H + unit) * stride_dy_h", "unit * stride_dy_h"),
    "dgates of the other direction": ("times(direction * size_rows,", "times(0 * size_rows,"),
    "state of the other direction": ("of_state = (direction * B + row)", "of_state = row"),
}
LENGTHS = {
    "a row that starts early": ("h = gl.where(runs, h_new, h)", "h = gl.where(is_unit, h_new, h)"),
    "a row that does not run goes through its gate": ("dh = gl.where(runs, dh * z, dh)", "dh = dh * z"),
    "reverse begins at the last timestep of all": ("direction == 0, 0, longest - 1)", "direction == 0, 0, T - 2)"),
    "h_0 at the first timestep alone": ("(t + step_t >= length)", "(t + step_t >= T)"),
    "lengths of the row before": ("lengths_of(row, row >= 0,", "lengths_of(row - 1, row >= 1,"),
    "h_prev of a row that has not begun": ("(t_before < length)", "(t_before < T)"),
}  # fmt: skip
ORDERS = {  # of units, in half precision
    "weights in the order of memory": ("place // 16 * 16 + place % 8 * 2 + place % 16 // 8", "place"),
    "h in the order of memory": (".permute([1, 3, 2, 0])", ".permute([1, 2, 3, 0])"),
    "sums in the order of the instruction": ("parts.permute([3, 0, 2, 1])", "parts.permute([3, 0, 1, 2])"),
}
SUMS = {  # over lanes, in float32
    "lanes that swap keep the larger half": (
        "parts = gl.sum(gl.convert_layout(parts,",
        "parts = gl.max(gl.convert_layout(parts,",
    ),
    "the largest part for the sum": ("gl.sum(parts, 2)", "gl.max(parts, 2)"),
}
RESETS = {
    "the state not cleared": ("        h = gl.where(clear & is_unit, 0.0, h)\n", ""),
    "its gradient not cleared": (
        "dh = gl.where(clear, 0.0, dh + own_sums(parts, FORM))",
        "dh = dh + own_sums(parts, FORM)",
    ),
    "h_prev of another sequence": ("gl.where(clear, 0.0, gl.where(begins,", "(gl.where(begins,"),
    "h_0 of a row that begins anew": (" & is_unit & ~anew, other", " & is_unit, other"),
    "a reset one step late": ("clear = cleared(t + step_t, row,", "clear = cleared(t, row,"),
}
CUT = Case(T=5, I=5, H=18, bidirectional=True, lengths=(2, 4, 3), padded=True, resets=0.4)
MUTANTS = [
    pytest.param(old, new, case, dtype, id=f"{part}{name}", marks=() if i % 5 == 0 else LONG)
    for part, found, case, dtype in (
        ("forward, ", FORWARD, DENSE, FMA),
        ("backward, ", BACKWARD, DENSE, FMA),
        ("", DIRECTIONS, BOTH, FMA),
        ("", LENGTHS, PACKED, MATRIX),  # whose programs have several rows
        ("resets, ", RESETS, CUT, MATRIX),
        ("", ORDERS, DENSE, MATRIX),
        ("", SUMS, DENSE, FMA),
        ("", {"a bias where there is none": ("is_unit & (has_bias != 0)", "is_unit")}, replace(DENSE, bias=False), FMA),
    )
    for i, (name, (old, new)) in enumerate(found.items())
]


@pytest.mark.parametrize("dtype", [FMA, MATRIX], ids=str)
@pytest.mark.parametrize("case", [BOTH, PACKED, CUT, replace(DENSE, bias=False)], ids=lambda case: case.name)
def test_the_kernels_as_they_are_survive(case: Case, dtype: torch.dtype) -> None:
    assert_not_wrong(case, SMALL, dtype)


def broken(tmp_path, monkeypatch, old: str, new: str) -> None:
    monkeypatch.setattr(small, "kernels", mutant(tmp_path, "small.py", old, new, module="small"))


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize(("old", "new", "case", "dtype"), MUTANTS)
def test_mutant_is_killed(old: str, new: str, case: Case, dtype: torch.dtype, tmp_path, monkeypatch) -> None:
    broken(tmp_path, monkeypatch, old, new)
    with pytest.raises((AssertionError, EmulatorError)) as found, fences(monkeypatch):  # memory nobody wrote is NaN
        assert_not_wrong(case, SMALL, dtype)
    assert "error=" in str(found.value) or isinstance(found.value, EmulatorError)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_units_past_h_that_take_a_state_are_killed(tmp_path, monkeypatch) -> None:
    """Zero times an infinity of the units before is NaN."""
    broken(
        tmp_path,
        monkeypatch,
        "        runs = (t < length) & is_unit\n        h =",
        "        runs = t < length\n        h =",
    )
    with pytest.raises((AssertionError, EmulatorError)):
        assert_finite_where_nn_gru_is(SMALL)


def test_a_state_that_is_rounded_is_killed(tmp_path, monkeypatch) -> None:
    """Where z is near 1 a step changes h by less than bfloat16 can hold."""
    torch.manual_seed(0)
    layer = tritongru.GRU(3, 16, dtype=torch.bfloat16, backend=SMALL)
    with torch.no_grad():
        layer.bias_hh_l0[16:32] += 7.0
    x = torch.randn(120, 2, 3, dtype=torch.bfloat16) + 1
    truth = torch.nn.GRU(3, 16, dtype=torch.float64)
    truth.load_state_dict(layer.state_dict())
    with torch.no_grad():
        true, _ = truth(x.double())
        kept = (layer(x)[0].double() - true).norm()
        broken(
            tmp_path,
            monkeypatch,
            "h = gl.where(runs, h_new, h)",
            "h = gl.where(runs, h_new, h).to(dtype).to(gl.float32)",
        )
        assert (layer(x)[0].double() - true).norm() > 4 * kept
