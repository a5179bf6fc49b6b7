"""The kernels, emulated, against float64 and nn.GRU by the rule of tritongru/tools/check.py: output, h_n and every
gradient. What takes long and another case shows runs in `make long`."""

from collections.abc import Iterable
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence

import tritongru
from tests.kit.cases import DTYPES, HALF, MORE_CASES, assert_not_wrong, assert_right, quiet, shapes
from tests.kit.counting import launched
from tests.kit.drawn import BF16, FP16, FP32, SMALL
from tests.kit.fences import fences, poisoned, with_gaps
from tests.kit.modules import randn, results, same_bits, states, tensors
from tritongru import layer as layers
from tritongru import products
from tritongru.launch import runtime
from tritongru.planning.step import FORMS
from tritongru.tools import check
from tritongru.tools.check import CASES, Case

pytestmark = pytest.mark.interpreted
LONG = pytest.mark.long
EXCHANGING = "sequence:exchange=1"
BACKENDS = ("reference", "step", "sequence")


def every(*values: Iterable[Any], long: Any = False) -> list[Any]:
    """Every combination; all of them only in `make long`, or those for which a function says so."""
    slow = long if callable(long) else lambda *of: long
    return [
        pytest.param(*of, marks=LONG if slow(*of) else (), id="-".join(getattr(v, "name", str(v)) for v in of))
        for of in product(*values)
    ]


RULE = every(["reference", "step"], CASES + MORE_CASES, DTYPES)
RULE += every(["sequence"], CASES + MORE_CASES, DTYPES, long=True)
RULE += every(["reference"], CASES, [torch.float64])
RULE += every(["sequence"], [Case(T=3)], [FP32]) + every([SMALL], [Case(T=3)], [FP32, FP16])


@pytest.mark.parametrize(("backend", "case", "dtype"), RULE)
def test_rule(backend: str, case: Case, dtype: torch.dtype) -> None:
    assert_right(case, backend, dtype)


CHUNKED = (
    Case(T=7, B=3, I=5, H=18, bias=False, recompute=True),
    Case(T=7, B=3, I=5, H=18, layers=2, bidirectional=True, batch_first=True, recompute=True),
    Case(I=4, H=13, bidirectional=True, lengths=(7, 1, 4), recompute=True),
)
IN_CHUNKS = every(["reference"], CHUNKED, (3, 12), DTYPES) + every(["sequence"], CHUNKED, (3, 12), DTYPES, long=True)
IN_CHUNKS += every(["step"], CHUNKED, (3, 12), DTYPES, long=lambda _, case, *of: (case.layers, *of) != (1, 3, FP16))


@pytest.mark.parametrize(("backend", "case", "rows", "dtype"), IN_CHUNKS)
def test_rule_in_chunks(backend: str, case: Case, rows: int, dtype: torch.dtype, few_rows_at_once) -> None:
    few_rows_at_once(rows)
    assert_right(case, backend, dtype)


SMALLEST = [Case(*sizes, bidirectional=True) for sizes in ((1, 1, 1, 1), (2, 1, 3, 1), (2, 3, 1, 2))]
SOME = (CASES[4], MORE_CASES[1])
# Every field that a measurement may set: programs of more rows, several of them, of a wider class
FIELDS = {
    FP32: ("rows=2", "rows=2,lanes=8", "rows=1,lanes=2,num_warps=1", "rows=2,ahead=1", "rows=1,units=64"),
    FP16: ("rows=4", "rows=8", "rows=16", "rows=8,ahead=1", "rows=4,units=32"),
}
SMALL_TILES = {dtype: [f"sequence:{fields}" for fields in of] for dtype, of in FIELDS.items()}


ONE_DRAW = every(BACKENDS, SMALLEST, DTYPES, long=lambda b, _, dtype: b == "sequence" and dtype != FP32)
ONE_DRAW += every([SMALL], SMALLEST, [FP32]) + every(["sequence"], CASES + MORE_CASES, [FP32])
ONE_DRAW += every([SMALL], CASES + MORE_CASES, [FP32], long=lambda _, case, __: case in MORE_CASES)
ONE_DRAW += every(["sequence", SMALL], SOME, HALF) + every([SMALL], [Case(T=4, B=5, I=3, H=127)], HALF)
for dtype, tiles in SMALL_TILES.items():
    cases = (CASES[4], Case(T=4, B=18, I=3, H=30))
    ONE_DRAW += every(tiles, cases, [dtype], long=lambda _, case, __: case.B == 18)


@pytest.mark.parametrize(("backend", "case", "dtype"), ONE_DRAW)
def test_one_draw(backend: str, case: Case, dtype: torch.dtype) -> None:
    assert_not_wrong(case, backend, dtype)


ON_A_GPU = every(["step"], [*CASES[2:5:2], Case(T=2, B=20, I=35, H=70)], DTYPES, long=lambda *of: of[-1] != FP32)
ON_A_GPU += every([EXCHANGING], [Case(I=4, H=20, bidirectional=True, lengths=(2, 4))], [FP32])
ON_A_GPU += every([EXCHANGING], [Case(T=2, B=3, I=4, H=67)], [FP16])


@pytest.mark.parametrize(("backend", "case", "dtype"), ON_A_GPU)
def test_rule_with_the_tiles_of_a_gpu(backend: str, case: Case, dtype: torch.dtype, h200_tiles: None) -> None:
    """Several programs in rows and columns, several tiles of K, ragged at every end; weights padded to 128 units."""
    assert_right(case, backend, dtype)


AHEAD = sorted({(form.rows, form.units) for forms in FORMS.values() for form in forms})


@pytest.mark.parametrize("form", [pytest.param(form, marks=LONG if i % 3 else ()) for i, form in enumerate(AHEAD)])
def test_every_form_of_step_with_a_part_of_the_weights_ahead(form: tuple[int, int], h200_tiles: None) -> None:
    """K in two or three chunks, ragged at the end, one of them loaded before the wait."""
    rows, units = form
    split, block_k = (8, 128) if rows <= 32 else (1, 64)
    fields = f"block_b={rows},block_h={units},block_k={block_k},num_warps=8,split={split},ahead=1,per_sm=1,pdl=1"
    assert_not_wrong(Case(T=2, B=18, I=3, H=150), f"step:{fields}", FP16)


ANY = every(["step"], DTYPES, [8], [False]) + every(["reference"], [FP32], [25], [False])
ANY += every(["sequence"], DTYPES, [2], [False])
ANY += every(["step", EXCHANGING], DTYPES, [60], [True], long=True)
ANY += every([SMALL], DTYPES, [60], [False], long=True)


@pytest.mark.parametrize(("backend", "dtype", "examples", "on_a_gpu"), ANY)
def test_any_shape(backend: str, dtype: torch.dtype, examples: int, on_a_gpu: bool, request) -> None:
    """With the interpreter's tiles or a GPU's; of a small layer with any of its own."""
    some = SMALL_TILES[FP32 if dtype == FP32 else FP16][:4] if backend == SMALL else [backend]
    if on_a_gpu:
        request.getfixturevalue("h200_tiles")

    @given(case=shapes, backend=st.sampled_from(some))
    @settings(quiet, max_examples=examples)
    def any_shape(case: Case, backend: str) -> None:
        assert_not_wrong(case, backend, dtype)

    any_shape()


@pytest.mark.parametrize("dtype", [FP32, FP16], ids=str)
def test_triton_s_own_interpreter_computes_the_same_bits(dtype: torch.dtype, monkeypatch) -> None:
    """An independent witness of the emulator. (bfloat16 the interpreter multiplies as integers.)"""
    layer = tritongru.GRU(9, 20, bidirectional=True, dtype=dtype, backend="step")
    x, h_0 = torch.randn(3, 17, 9).to(dtype), torch.randn(2, 17, 20).to(dtype)
    emulated = results(layer, x, h_0)

    def interpreted(self: runtime.Launch, grid: runtime.Grid, scalars: tuple[int, ...]) -> None:
        self.kernel.kernel[grid](*scalars, *self.rest, num_warps=1)

    monkeypatch.setattr(runtime.Launch, "_emulate", interpreted)
    assert same_bits(results(layer, x, h_0), emulated)


@torch.no_grad()
def test_tf32_factors_are_rounded_to_nearest(monkeypatch) -> None:
    """The emulator multiplies in float32, so that what it computes from rounded factors is TF32's own product."""

    def rounded(t: torch.Tensor) -> torch.Tensor:  # 10 bits of fraction, ties away from zero
        return ((t.contiguous().view(torch.int32) + 0x1000) & -0x2000).view(torch.float32)

    torch.manual_seed(0)
    layer = tritongru.GRU(9, 20, backend="step", bias=False)
    x, h_0 = torch.randn(1, 4, 9), torch.randn(1, 4, 20)
    plain = layer(x, h_0)[0]
    monkeypatch.setattr(products, "rnn_precision", lambda nvidia: "tf32")
    found = layer(x, h_0)[0]
    a_i, a_h = rounded(x[0]) @ rounded(layer.weight_ih_l0).T, rounded(h_0[0]) @ rounded(layer.weight_hh_l0).T
    r, z = torch.sigmoid(a_i[:, :40] + a_h[:, :40]).chunk(2, -1)
    n = torch.tanh(a_i[:, 40:] + r * a_h[:, 40:])
    torch.testing.assert_close(found[0], n + z * (h_0[0] - n), rtol=0, atol=1e-6)
    assert (found - plain).abs().max() > 1e-5  # the rounding is there
    x[0, 0, 0], x[0, 1, 0] = float("nan"), float("inf")
    assert torch.equal(layer(x, h_0)[0].isfinite(), torch.nn.GRU.forward(layer, x, h_0)[0].isfinite())


def test_a_small_layer_is_not_rounded_to_tf32_where_the_switch_allows_it(h200_tiles: None, monkeypatch) -> None:
    """The rule holds it to 1.5 times nn.GRU's error on the CPU, which is that of FMA."""
    seen, forward = [], layers.forward_pass
    monkeypatch.setattr(layers, "forward_pass", lambda layer, *rest: seen.append(layer) or forward(layer, *rest))
    assert_right(Case(), "sequence")
    assert {(layer.call.precision, layer.backward_precision) for layer in seen} == {("tf32", "ieee")}


FENCED = [
    *every(["step"], (1, 3), [19], DTYPES, ("", "on a GPU")),
    *every(["step"], [5], [19], [FP32], ("packed, on a GPU", "packed, recompute, on a GPU")),
    *every([EXCHANGING], [1], [19], [BF16], ["on a GPU"]), *every([EXCHANGING], [3], [19], [FP32, FP16], ["on a GPU"]),
    *every([EXCHANGING], [5], [19], [FP32], ("packed", "packed, recompute")),
    *every([SMALL], [3], [19], [FP32, BF16], [""]), *every([SMALL], [3], [20], [FP16], [""]),
    *every([SMALL], [5], [20], [FP16], ["packed"]),
]  # fmt: skip


@pytest.mark.parametrize(("backend", "T", "H", "dtype", "how"), FENCED)
def test_nothing_beyond_a_tensor(backend: str, T: int, H: int, dtype, how: str, request, monkeypatch) -> None:
    """Fences around every buffer and poison beyond every argument, with gaps in it or not: neither is reached."""
    if "on a GPU" in how:
        request.getfixturevalue("h200_tiles")
    torch.manual_seed(0)
    layer = tritongru.GRU(7, H, bidirectional=True, backend=backend, dtype=dtype, recompute="recompute" in how)
    for p in layer.parameters():
        p.data = poisoned(p.data)

    def call(*given: Any) -> list[torch.Tensor]:
        found = tensors(layer(*given))
        for t in found:
            t.register_hook(poisoned)
        return found

    B = 18 if how else 9
    x, h_0 = torch.randn(T, B, 7, dtype=dtype), torch.randn(2, B, H, dtype=dtype)
    given = poisoned(x)
    if "packed" in how:
        given = pack_padded_sequence(x, [5] + [1, 2, 3] * 5 + [4, 4], enforce_sorted=False)
        given = given._replace(data=poisoned(given.data))
    with fences(monkeypatch):
        found = results(call, given, poisoned(h_0), of=layer)
    assert all(t.isfinite().all() for t in found.values())
    if "packed" not in how:
        with fences(monkeypatch):
            gaps = results(call, with_gaps(x), with_gaps(h_0), of=layer)
        # only the library products may sum in another order: a few roundings to storage
        assert all((t - gaps[name]).norm() <= 4 * torch.finfo(dtype).eps * t.norm() for name, t in found.items())


def shifted(tensor: torch.Tensor) -> torch.Tensor:
    """The same, aligned to one element alone."""
    return torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape)


def test_tensors_that_are_laid_out_in_any_way() -> None:
    """dy, and what a hook makes of saved tensors: in half precision units are read in pairs where they lie so."""
    layer = tritongru.GRU(5, 12, backend=SMALL, dtype=FP16)
    x, dense = randn(3, 4, 5).half(), randn(3, 4, 12).half()
    expanded = dense[:1, :1, :1].expand(3, 4, 12)

    def gradients(dy: torch.Tensor, output: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(layer(x)[0] if output is None else output, list(layer.parameters()), dy)

    assert same_bits(gradients(expanded), gradients(expanded.contiguous()))
    assert same_bits(gradients(dense.repeat_interleave(2, -1)[..., ::2]), gradients(dense))
    assert same_bits(gradients(shifted(dense)), gradients(dense))
    with torch.autograd.graph.saved_tensors_hooks(shifted, lambda tensor: tensor):
        output = layer(x)[0]
    assert same_bits(gradients(dense, output), gradients(dense))


@pytest.mark.parametrize(("backend", "dtype"), [("sequence", FP32), (SMALL, FP32), (SMALL, FP16)])
@pytest.mark.parametrize(
    "variant", [{}, {"bidirectional": True}, {"num_layers": 2, "bidirectional": True}, {"recompute": True}], ids=str
)
@pytest.mark.parametrize(("T", "packed"), [(1, False), (4, False), (4, True)], ids=["one-step", "dense", "packed"])
def test_one_launch_per_sequence(backend: str, dtype, packed: bool, variant: dict, T: int) -> None:
    """One each way for every layer, both directions and the gradient of h_0 in it."""
    layer = tritongru.GRU(5, 6, backend=backend, dtype=dtype, **variant)
    x = (pack_sequence([torch.randn(T, 5), torch.randn(1, 5)]) if packed else torch.randn(T, 2, 5)).to(dtype)
    with launched() as names:
        results(layer, x, torch.zeros(states(layer), 2, 6, dtype=dtype))
    name, layers = "small" if backend == SMALL else "sequence", layer.num_layers
    assert names == [f"{name}_forward"] * layers + [f"{name}_backward"] * layers


@pytest.mark.usefixtures("h200_tiles")
def test_check_leaves_out_a_form_that_the_device_cannot_run(monkeypatch, capsys):
    monkeypatch.setattr(torch.backends.cudnn.rnn, "fp32_precision", "ieee")
    monkeypatch.setattr(check, "CASES", (Case(T=2),))
    monkeypatch.setattr(check.registry, "BACKENDS", {"sequence": check.registry.BACKENDS["sequence"]})
    assert check.main() == 0
    told = capsys.readouterr().out
    assert "sequence, exchanging does not run in fp32: float32 without TF32 has no matrix instructions" in told
    assert "sequence, one program │ fp32" in told and "sequence, exchanging  │ fp32" not in told
