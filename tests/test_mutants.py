"""The tests can fail: kernels with one mistake each, and each is found by the comparison that the suite makes."""

from __future__ import annotations

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence

import tritongru
from tests.kit.fences import fences, poisoned
from tests.kit.mutants import mutant
from tests.kit.rule import assert_not_wrong
from tritongru.tools.check import Case

pytestmark = pytest.mark.interpreted

DENSE = Case(T=3, B=3, I=5, H=18, bidirectional=True)
ONE_STEP = Case(T=1, B=3, I=5, H=18)
PACKED = Case(I=5, H=18, bidirectional=True, lengths=(3, 1, 2))

GATES = {
    "gates swapped": ("r = sigmoid(a_r)\n    z = sigmoid(a_z)", "r = sigmoid(a_z)\n    z = sigmoid(a_r)"),
    "update turned round": ("h = n + z * (h_prev - n)", "h = h_prev + z * (n - h_prev)"),
    "reset before the sum": ("tanh(a_n + r * q)", "tanh(r * (a_n + q))"),
    "no reset": ("tanh(a_n + r * q)", "tanh(a_n + q)"),
    "tanh's far branch without its sign": ("far = tl.where(x < 0.0, -far, far)", "far = far"),
    "dn without 1 - z": ("dn = dh * (1.0 - z) * (1.0 - n * n)", "dn = dh * (1.0 - n * n)"),
    "dn without tanh'": ("dn = dh * (1.0 - z) * (1.0 - n * n)", "dn = dh * (1.0 - z)"),
    "dz without h_prev": ("dz = dh * (h_prev - n)", "dz = dh * (0.0 - n)"),
    "dz without n": ("dz = dh * (h_prev - n)", "dz = dh * h_prev"),
    "dz without sigmoid'": ("* z * (1.0 - z)\n", "\n"),
    "dq without r": ("dq = dn * r", "dq = dn"),
    "dr without q": ("dr = dn * q * r * (1.0 - r)", "dr = dn * r * (1.0 - r)"),
    "dr without sigmoid'": ("dr = dn * q * r * (1.0 - r)", "dr = dn * q"),
}
STEP = {
    "products of r and z swapped": ("acc_r = product(acc_r, left, w_r,", "acc_r = product(acc_r, left, w_z,"),
    "product of n dropped": (
        "        acc_n = product(acc_n, left, w_n, PRECISION)\n",
        "",
    ),
    "x_proj of n dropped": ("        a_n += x_n.to(tl.float32)\n", ""),
    "b_hn inside the input part": ("q += b_hn", "a_n += b_hn"),
    "K mask one short": ("(k < K)", "(k < K - 1)"),
    "units' mask one short": ("h_mask = offs_h < H\n", "h_mask = offs_h < H - 1\n"),
    "h not handed on": ("tl.store(h_next_ptrs[:, None]", "tl.store(h_prev_ptrs[:, None]"),
    "h_n of every step": ("mask=mask & ~goes_on[:, None])\n    if KEEP", "mask=mask & goes_on[:, None])\n    if KEEP"),
    "gates not saved": ("    if SAVE_GATES:\n", "    if SAVE_GATES and H == 0:\n"),
    "r and z swapped in the memory of x_proj": (
        "tl.store(rzn_ptrs, r.to(dtype), mask=mask)\n        tl.store(rzn_ptrs + H, z",
        "tl.store(rzn_ptrs, z.to(dtype), mask=mask)\n        tl.store(rzn_ptrs + H, r",
    ),
    "n not saved": ("        tl.store(rzn_ptrs + 2 * H, n.to(dtype), mask=mask)\n", ""),
    "q not saved": ("q.to(dtype), mask=mask)", "q.to(dtype), mask=mask & (H == 0))"),
    "x_proj of the other direction": ("(row_rzn * D + direction) * (3 * H)", "(row_rzn * D) * (3 * H)"),
    "r, z, n of the other direction": ("(row_rzn_dst * D + direction) * (3 * H)", "(row_rzn_dst * D) * (3 * H)"),
    "q of the other direction": ("q_ptr + (row_dst * D + direction) * H", "q_ptr + (row_dst * D) * H"),
    "dgates of the other direction": ("dgates_ptr += direction * size_rows * (4 * H)", "dgates_ptr += 0"),
    "dh * z dropped": ("dh_prev += dh_src * z_src", "dh_prev += 0.0 * z_src"),
    "dr W_hr dropped": ("product(dh_prev, dr,", "product(dh_prev, 0.0 * dr,"),
    "dz W_hz dropped": ("product(dh_prev, dz,", "product(dh_prev, 0.0 * dz,"),
    "dq W_hn dropped": ("product(dh_prev, dq,", "product(dh_prev, 0.0 * dq,"),
    "dy dropped": ("return dh_n + dy", "return dh_n + 0.0 * dy"),
    "dh_n dropped": ("return dh_n + dy", "return 0.0 * dh_n + dy"),
    "h_prev of the wrong step": ("load_h_prev(y_before_ptrs,", "load_h_prev(y_dst_ptrs,"),
    "h_0 never read in backward": (
        "return tl.where(carries[:, None], y, h_0)",
        "return tl.where(carries[:, None], y, y)",
    ),
    "dh_0 of rows that go on": ("ends = in_src & ~goes_on", "ends = goes_on"),
}
FIRST = {
    "dh * z dropped in the first launch": ("    dh_prev += dh_src * z_src.to(tl.float32)\n", ""),
    "first launch's gate gradients not stored": (
        "        store_dgates(dgates_ptr, row_src, offs_h, mask_src, dn, dr, dz, dq, H)\n",
        "",
    ),
    "x product dropped": ("if FUSE_INPUT:\n        x_ptrs", "if H == 0:\n        x_ptrs"),
    "b_in dropped": ("            a_n += b_in.to(tl.float32)[None, :]\n", ""),
}
ROWS = {
    "every row carries": ("here & (offs_b < rows_neighbour)", "here"),
    "no row carries": ("here & (offs_b < rows_neighbour)", "here & (offs_b < 0)"),
    "a row too few": ("here = offs_b < rows", "here = offs_b < rows - 1"),
    "directions swapped": ("tl.where(direction == 0, forward, reverse)", "tl.where(direction == 1, forward, reverse)"),
}
CUT = Case(T=5, I=5, H=18, bidirectional=True, lengths=(2, 4, 3), padded=True, resets=0.4)
PADDING = {
    "a length too short": ("here = here & (t < length)", "here = here & (t < length - 1)"),
    "the neighbour runs always": ("both & here & (t_neighbour < length)", "both & here"),
    "a reset one step late": ("resets_ptr + (t + direction)", "resets_ptr + (t + direction + (t < 2))"),
    "resets in the forward direction alone": (
        "mask = here & (carries | (direction == 0))",
        "mask = here & (direction == 0)",
    ),
}
RESETS = {
    "the state but not what is multiplied": ("h_prev_ptrs, enters, 1,", "h_prev_ptrs, runs, 1,"),
    "what is multiplied but not the state": ("mask_h = enters[:, None]", "mask_h = runs[:, None]"),
    "the state but not its gradient": ("dh_prev = tl.where(src_anew[:, None], 0.0, dh_prev)\n", ""),
    "h_prev of another sequence": ("mask_dst & ~dst_anew[:, None], dst_carries", "mask_dst, dst_carries"),
    "h_prev of another sequence in the first launch": ("mask_src & ~src_anew[:, None], goes_on", "mask_src, goes_on"),
}
MUTANTS = [
    pytest.param(file, old, new, case, id=f"{file}: {name}")
    for file, found, case in (
        ("gates.py", GATES, DENSE),
        ("step.py", STEP, DENSE),
        ("step.py", FIRST, ONE_STEP),
        ("rows.py", ROWS, PACKED),
        ("rows.py", PADDING, CUT),
        ("step.py", RESETS, CUT),
    )
    for name, (old, new) in found.items()
]


@pytest.mark.parametrize("case", [DENSE, ONE_STEP, PACKED], ids=lambda case: case.name)
def test_the_kernels_as_they_are_survive(case: Case) -> None:
    assert_not_wrong(case, "step")


@pytest.mark.parametrize(("file", "old", "new", "case"), MUTANTS)
def test_mutant_is_killed(file: str, old: str, new: str, case: Case, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("tritongru.launch.step.kernels", mutant(tmp_path, file, old, new))
    with pytest.raises(AssertionError, match=r"error=|beyond"):
        assert_not_wrong(case, "step")


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        pytest.param("rows.py", "here = offs_b < rows", "here = offs_b <= rows", id="a row too many"),
        pytest.param("step.py", "h_mask = offs_h < H\n", "h_mask = offs_h < H + 1\n", id="a unit too many"),
        pytest.param("step.py", "(k < K)", "(k < K + 1)", id="K too long"),
    ],
)
def test_a_mask_too_wide_is_killed(file: str, old: str, new: str, tmp_path, monkeypatch) -> None:
    """By the fences, or by the poison beyond every tensor."""
    monkeypatch.setattr("tritongru.launch.step.kernels", mutant(tmp_path, file, old, new))
    torch.manual_seed(0)
    layer = tritongru.GRU(5, 18, bidirectional=True, backend="step")
    for p in layer.parameters():
        p.data = poisoned(p.data)
    x = pack_padded_sequence(torch.randn(3, 3, 5), torch.tensor([3, 1, 2]), enforce_sorted=False)
    leaf = poisoned(x.data).requires_grad_()
    with pytest.raises(AssertionError), fences(monkeypatch):
        output, h_n = layer(x._replace(data=leaf), poisoned(torch.randn(2, 3, 18)))
        (output.data.square().sum() + h_n.square().sum()).backward()
        found = [output.data, h_n, leaf.grad, *(p.grad for p in layer.parameters())]
        assert all(t.isfinite().all() for t in found)


def test_half_precision_keeps_its_state_in_float32(tmp_path, monkeypatch) -> None:
    """Where z is near 1 a step changes h by less than bfloat16 can hold, and a rounded state would stand still."""
    torch.manual_seed(0)
    layer = tritongru.GRU(3, 16, dtype=torch.bfloat16, backend="step")
    with torch.no_grad():
        layer.bias_hh_l0[16:32] += 7.0
    x = torch.randn(120, 2, 3, dtype=torch.bfloat16) + 1
    truth = torch.nn.GRU(3, 16, dtype=torch.float64)
    truth.load_state_dict(layer.state_dict())
    with torch.no_grad():
        true, _ = truth(x.double())

        def error() -> float:
            return ((layer(x)[0].double() - true).norm() / true.norm()).item()

        kept = error()
        old = "tl.store(state_ptrs, h, mask=mask)"
        monkeypatch.setattr(
            "tritongru.launch.step.kernels",
            mutant(tmp_path, "step.py", old, "tl.store(state_ptrs, y.to(tl.float32), mask=mask)"),
        )
        assert error() > 4 * kept
