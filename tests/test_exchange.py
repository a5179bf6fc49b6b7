"""Programs that hand tiles to each other (kernels/exchange.py), all alive in the emulator under a seeded scheduler.

Shrunken plans: right against float64 by the floor of `check`'s rule, and the same bits under every seed and in any
number of launches; then what a buffer of sentinels could trip over: NaNs with the sentinel's bits, infinities, rows
that do not run, and waits that end without what they waited for.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

import tritongru
from tests.kit.drawn import BF16, DTYPES, FP16, FP32, ONE_PROGRAM, SHORT, SHORT_SECONDS, Call, Drawn, put
from tests.kit.inside import several_launches_over_time
from tests.kit.mutants import mutant
from tests.kit.plans import ShrunkenPlan, exchanging
from tritongru import layer as layers
from tritongru import status as status_words
from tritongru.kernels.exchange import publish
from tritongru.launch import exchange, runtime, sequence
from tritongru.tools.check import Case
from tritongru.tools.emulator import emulate, emulating

pytestmark = [
    pytest.mark.interpreted,
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),  # NaNs and infinities are meant
]

LONG, INFINITY = pytest.mark.long, float("inf")


LENGTHS_OF_18 = (2,) * 9 + (3, 1) + (2,) * 6 + (3,)  # in the second tile one row runs twice, and one once
LENGTHS_OF_33 = (3,) * 2 + (2,) * 15 + (1,) * 16  # in the second tile one row runs twice, in the third none
WIDE = ShrunkenPlan(block_h=32, block_k=64)
NARROW = ShrunkenPlan(block_h=8)
THREE = ShrunkenPlan(num_k=3, waits=3)
EIGHT = ShrunkenPlan(block_b=8, block_k=64)
PADDED = Case(T=4, I=3, H=20, bidirectional=True, lengths=LENGTHS_OF_18, padded=True, resets=0.3)

CALLS = {
    "odd-H": Call(ShrunkenPlan(), Case(T=4, B=3, I=5, H=20), FP32),
    "odd-H-bf16": Call(ShrunkenPlan(), Case(T=3, B=3, I=5, H=21), BF16),
    "narrow-slices": Call(NARROW, Case(T=4, B=3, I=5, H=24), FP32),
    "wide-slices": Call(WIDE, Case(T=4, B=3, I=5, H=40), FP16),
    "one-program-with-itself": Call(ShrunkenPlan(), Case(T=3, B=2, I=3, H=9), FP16),
    "one-step-one-row": Call(ShrunkenPlan(), Case(T=1, B=1, I=4, H=13), BF16),
    "one-step-bidirectional": Call(ShrunkenPlan(), Case(T=1, B=3, I=4, H=24, bidirectional=True), FP32, False),
    "no-gradient-of-h_0": Call(ShrunkenPlan(), Case(T=3, B=3, I=5, H=16, batch_first=True, bias=False), FP32, False),
    "two-groups": Call(replace(NARROW, groups=2), Case(T=2, B=17, I=3, H=16), FP32),
    "two-tiles": Call(ShrunkenPlan(tiles=2, waits=3), Case(T=2, B=17, I=3, H=30), FP16),
    "an-empty-tile": Call(ShrunkenPlan(groups=2, tiles=2), Case(T=2, B=33, I=3, H=13), FP32),
    "tall-tile": Call(ShrunkenPlan(block_b=64), Case(T=2, B=35, I=3, H=25), BF16),
    "eight-rows": Call(EIGHT, Case(T=3, B=5, I=3, H=25), BF16),
    "eight-rows-packed": Call(
        replace(EIGHT, tiles=2, waits=3, shared_gates=2), Case(I=4, H=37, bidirectional=True, lengths=(2, 1) * 5), FP32
    ),
    "three-tiles-of-eight-rows": Call(replace(EIGHT, tiles=3), Case(T=2, B=17, I=3, H=20), BF16),
    "directions-together": Call(ShrunkenPlan(), Case(T=3, B=3, I=5, H=20, bidirectional=True), FP32),
    "a-launch-per-direction": Call(ShrunkenPlan(together=False), Case(T=3, B=3, I=5, H=19, bidirectional=True), BF16),
    "packed-sorted": Call(ShrunkenPlan(), Case(I=4, H=20, lengths=(4, 3, 3, 1)), FP16),
    "packed-both-directions": Call(NARROW, Case(I=4, H=13, bidirectional=True, lengths=(2, 1, 3)), FP32),
    "packed-two-tiles": Call(
        ShrunkenPlan(together=False, tiles=2), Case(I=4, H=18, bidirectional=True, lengths=LENGTHS_OF_18), FP32
    ),
    "packed-two-groups": Call(
        ShrunkenPlan(groups=2), Case(I=4, H=20, bidirectional=True, lengths=LENGTHS_OF_18), FP16
    ),
    "three-tensors": Call(THREE, Case(T=3, B=3, I=5, H=70), BF16),
    "gates-in-shared-memory": Call(replace(THREE, shared_gates=2, waits=1), Case(T=2, B=3, I=5, H=75), FP32),
    "padded-two-tiles": Call(ShrunkenPlan(tiles=2, waits=3), PADDED, FP16),
    "padded-two-groups": Call(ShrunkenPlan(groups=2, together=False), PADDED, FP32),
    "padded-three-tensors": Call(THREE, Case(T=4, I=3, H=70, lengths=(4, 1, 2), padded=True, resets=0.3), BF16),
    "recompute": Call(ShrunkenPlan(), Case(I=4, H=12, lengths=(3, 1, 4), recompute=True), BF16),
    "recompute-both-ways": Call(ShrunkenPlan(), Case(T=3, B=3, I=4, H=21, bidirectional=True, recompute=True), FP16),
    "two-layers": Call(ShrunkenPlan(), Case(T=3, B=3, I=5, H=16, layers=2, bidirectional=True), FP16),
    "as-planned": Call(None, Case(T=2, B=3, I=5, H=77), FP32),
}  # fmt: skip


def assert_same(found: dict[str, Tensor], other: dict[str, Tensor], what: str) -> None:
    wrong = [name for name in found if not torch.equal(found[name], other[name])]
    assert not wrong, f"{what}: other bits of {wrong}"


@pytest.mark.parametrize("seeds", [range(3), pytest.param(range(3, 23), marks=LONG)], ids=["three", "twenty"])
@pytest.mark.parametrize("name", CALLS)
def test_right_and_the_same_bits_under_every_seed(name: str, seeds: range, monkeypatch) -> None:
    """And in launches over time: the state goes from one to the next in float32, that of rows that do not run too; with
    recompute dh goes so between two steps at a time."""
    monkeypatch.setattr(layers, "steps_at_once", lambda T, B: 2)
    drawn, launches = Drawn(CALLS[name]), []
    with exchanging(monkeypatch, drawn.call.plan), runtime.observe(lambda kernel, grid: launches.append(kernel)):
        first, *others = (drawn.of_ours(seed) for seed in seeds)
        for steps in (1, 2):
            several_launches_over_time(monkeypatch, steps)
            launches.clear()
            others.append(drawn.of_ours(seeds[steps]))
            least = -(-drawn.call.case.sizes[0] // steps)
            assert min(launches.count("sequence_forward"), launches.count("sequence_backward")) >= least
    drawn.assert_right(first, name)
    for i, other in enumerate(others, 1):
        assert_same(first, other, f"{name}, call {i}")


# ---- several launches ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize(
    ("plan", "launches"),
    [(dict(groups=1), 3), (dict(groups=1, tiles=2), 2), (dict(together=False), 2), (dict(), 1)],
    ids=str,
)
def test_launches_over_rows_or_directions_give_the_bits_of_one(
    plan: dict, launches: int, packed: bool, monkeypatch
) -> None:
    case = Case(I=4, H=20, bidirectional=True, lengths=LENGTHS_OF_33) if packed else Case(T=3, B=33, I=4, H=20)
    if "together" in plan:
        case = replace(case, bidirectional=True)
    drawn = Drawn(Call(ShrunkenPlan(groups=3), case, BF16))
    with exchanging(monkeypatch, drawn.call.plan):
        whole = drawn.of_ours(0)
    found: list[str] = []
    parts = replace(drawn.call.plan, **plan)
    with exchanging(monkeypatch, parts), runtime.observe(lambda kernel, grid: found.append(kernel)):
        assert_same(whole, drawn.of_ours(1), "in several launches")
    assert found.count("sequence_forward") == found.count("sequence_backward") == launches
    drawn.assert_right(whole)


# ---- NaNs and infinities ---------------------------------------------------------------------------------------------

SPECIAL = {
    "dense": Call(ShrunkenPlan(), Case(T=3, B=3, I=4, H=20), FP32),
    "half-precision": Call(ShrunkenPlan(waits=3), Case(T=3, B=3, I=4, H=24), FP16),
    "packed": Call(ShrunkenPlan(), Case(I=4, H=16, bidirectional=True, lengths=(1, 3, 2)), BF16),
    "packed-two-tiles": Call(ShrunkenPlan(), Case(I=4, H=13, lengths=LENGTHS_OF_18), FP32),
    "one-program": ONE_PROGRAM,
}


def not_finite(drawn: Drawn, monkeypatch) -> dict[str, Tensor]:
    """What comes, which is not finite where nn.GRU's is not."""
    with exchanging(monkeypatch, drawn.call.plan):
        ours = drawn.of_ours(0)
    drawn.assert_not_finite_as_nn_gru(ours)
    return ours


OFTEN = (
    *itertools.product(("dense", "half-precision", "packed"), ("h_0", "x", "dy"), [None]),
    ("packed-two-tiles", "h_0", None), ("packed", "h_0", -INFINITY), ("packed", "x", -INFINITY),
    ("one-program", "h_0", None), ("one-program", "h_0", -INFINITY), ("one-program", "x", INFINITY),
)  # fmt: skip
PLACES = ("h_0", "h_0 of the last row", "x", "dy", "dh_n")


@pytest.mark.parametrize(
    ("name", "place", "value"),
    [
        pytest.param(*given, marks=() if given in OFTEN else LONG)
        for given in itertools.product(SPECIAL, PLACES, (None, INFINITY, -INFINITY))
    ],
)
def test_what_is_not_finite_is_where_nn_gru_has_it(name: str, place: str, value: float | None, monkeypatch) -> None:
    """None: a NaN with the sentinel's bits, which hangs nothing. They are not rare: PyTorch's own conversion to
    bfloat16 makes them on the CPU."""
    drawn = Drawn(SPECIAL[name])
    put(drawn, place, value)
    not_finite(drawn, monkeypatch)


@pytest.mark.parametrize("name", ["dense", "packed-two-tiles"])
def test_an_infinite_unit_leaves_the_others_finite(name: str, monkeypatch) -> None:
    """Where every weight on an infinite unit is positive, r = z = n = 1: it stays infinite and the others keep theirs.
    Zeros of padded weights times infinity must not reach them."""
    drawn = Drawn(SPECIAL[name])
    put(drawn, "h_0", INFINITY)
    with torch.no_grad():
        drawn.ours.weight_hh_l0[:, 2].abs_()
    ours = not_finite(drawn, monkeypatch)
    assert not ours["output"].isfinite().all() and not ours["output"].isnan().any()


@gluon.jit
def publish_all(x_ptr, out_ptr, SIZE: gl.constexpr):
    offs = gl.arange(0, SIZE, layout=gl.BlockedLayout([1], [32], [1], [0]))
    publish(out_ptr + offs, gl.load(x_ptr + offs))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_published_is_never_the_sentinel(dtype: torch.dtype) -> None:
    """It becomes another NaN, and all else keeps its bits, the NaNs beside it too."""
    integer = torch.int16 if dtype.itemsize == 2 else torch.int32
    bits = torch.randn(16).to(dtype).view(integer)
    sentinel = exchange.SENTINEL
    bits[:4] = torch.tensor([sentinel, sentinel - 1, torch.iinfo(integer).max, 0])
    bits[4:6] = torch.tensor([float("inf"), float("-inf")]).to(dtype).view(integer)
    out = torch.full_like(bits, sentinel)
    emulate(publish_all, (1, 1, 1), {"x_ptr": bits.view(dtype), "out_ptr": out}, {"SIZE": 16})
    assert out[0] != sentinel and out.view(dtype)[0].isnan()
    assert torch.equal(out[1:], bits[1:])


# ---- waits that end without what they waited for ---------------------------------------------------------------------

BUT_ROW_0 = ".to(e_ptr.dtype.element_ty, bitcast=True), mask=(gl.program_id(0) != 1) | (tile.row != 0))"
NEVER_PUBLISHES = {  # program 1 keeps row 0 to itself
    "forward": "{publish=>gl.store}(place + group.slot + group.own, "
    f"{{as_factor(h_next[i].to(dtype), PRECISION))=>h_next[i].to(dtype){BUT_ROW_0}}}",
    "backward": "{publish=>gl.store}(own, "
    f"{{as_factor(gl.where(runs & ~clear, dr, nothing), PRECISION))=>dr{BUT_ROW_0}}}",
}
NEVER_RUNS = "for visit in range(first_visit, {stop=>gl.where(gl.program_id(0) == 1, first_visit, stop)}):"


@pytest.fixture(autouse=True)
def _no_report_left():
    """A time-out of a test that failed is no other test's error."""
    yield
    with contextlib.suppress(RuntimeError):
        status_words.check_all()


@contextlib.contextmanager
def broken(mistake: str, tmp_path, monkeypatch) -> Iterator[None]:
    """Inside: kernels with a mistake, and waits cut short."""
    with monkeypatch.context() as patch:
        patch.setenv("TRITONGRU_WAIT_SECONDS", SHORT_SECONDS)
        patch.setattr(sequence, "kernels", mutant(tmp_path, "sequence.py", mistake, module="sequence"))
        yield


def forward_alone(drawn: Drawn, **options: Any) -> Tensor:
    with emulating(0, **options), torch.no_grad():
        return drawn.ours(drawn.x, drawn.h_0)[0]


@pytest.mark.parametrize(
    ("mistake", "name", "hears"),
    [
        pytest.param(NEVER_PUBLISHES["forward"], "odd-H", "the next call", id="never-publishes"),
        pytest.param(NEVER_PUBLISHES["forward"], "three-tensors", "synchronize", id="never-publishes-three-tensors"),
        pytest.param(NEVER_RUNS, "odd-H", "backward", id="never-runs"),
    ],
)
def test_a_wait_in_forward_that_runs_out(mistake: str, name: str, hears: str, tmp_path, monkeypatch) -> None:
    """The launch ends; rows that were waited for are NaN from there on, others right. The user hears of it once: from
    `synchronize`, or from whichever kernel is launched next."""
    drawn, word = Drawn(CALLS[name]), status_words.status(torch.device("cpu")).word
    there = torch.ones(drawn.call.case.H, dtype=torch.bool)
    there[16:] = False  # the units of program 1
    x = drawn.x.clone().requires_grad_()
    with exchanging(monkeypatch, drawn.call.plan):
        true = forward_alone(drawn)
        with broken(mistake, tmp_path, monkeypatch), emulating(0, **SHORT):
            output, h_n = drawn.ours(x, drawn.h_0)
        assert word.item() == 1  # which the others look at
        assert torch.equal(output[0][:, there], true[0][:, there])
        lost = [0] if mistake is not NEVER_RUNS else [0, 1, 2]
        assert output[1:, lost][..., there].isnan().all() and h_n[:, lost][..., there].isnan().all()
        if mistake is not NEVER_RUNS:
            assert torch.equal(output[:, 1:], true[:, 1:])
        loss = output.float().square().mean()
        assert loss.isnan()
        with pytest.raises(RuntimeError, match=r"ran out on cpu.*set TRITONGRU_WAIT_SECONDS higher, or use"):
            {"the next call": lambda: forward_alone(drawn), "synchronize": tritongru.synchronize,
             "backward": loss.backward}[hears]()  # fmt: skip
        tritongru.synchronize()
        assert word.item() == 0
        assert hears == "backward" or torch.autograd.grad(loss, x)[0].isnan().any()
        assert torch.equal(forward_alone(drawn), true)


@pytest.mark.parametrize("name", ["odd-H", pytest.param("packed-both-directions", marks=LONG)])
def test_a_wait_in_backward_that_runs_out(name: str, tmp_path, monkeypatch) -> None:
    """So in backward; `check_all` says so too, once."""
    drawn = Drawn(CALLS[name])
    with exchanging(monkeypatch, drawn.call.plan):
        with broken(NEVER_PUBLISHES["backward"], tmp_path, monkeypatch):
            found = drawn.of_ours(0, **SHORT)
        assert found["output"].isfinite().all() and found["h_n"].isfinite().all()
        assert all(found[gradient].isnan().any() for gradient in ("h_0", "weight_ih_l0", "weight_hh_l0"))
        if not drawn.call.case.lengths:
            assert found["x"][:-1, 0].isnan().all() and found["x"][:, 1:].isfinite().all()
        with pytest.raises(RuntimeError, match="TRITONGRU_WAIT_SECONDS"):
            status_words.check_all()
        status_words.check_all()
        drawn.assert_right(drawn.of_ours(0))


def test_a_wait_ends_where_another_has_given_up(tmp_path, monkeypatch) -> None:
    """In a launch that was on its way when a wait of an earlier one ran out: at the first look at the status word."""
    drawn = Drawn(Call(ShrunkenPlan(), Case(T=2, B=1, I=3, H=24), FP32))
    status_words.status(drawn.x.device).word.fill_(1)
    with (
        exchanging(monkeypatch, drawn.call.plan),
        broken(NEVER_PUBLISHES["forward"], tmp_path, monkeypatch),
        emulating(0) as scheduler,
    ):
        monkeypatch.setenv("TRITONGRU_WAIT_SECONDS", "1000")
        _, h_n = drawn.ours(drawn.x, drawn.h_0)
    assert scheduler.steps < 2000 and h_n[0, 0].isnan().all()
    status_words.status(drawn.x.device).word.zero_()
    status_words.check_all()  # whose wait ran out has said so


@pytest.mark.parametrize("mode", ["default device", "inference mode"])
def test_status_words_are_host_memory_that_can_be_reset(mode: str) -> None:
    """Whatever the first call of a process is made under."""
    with torch.device("meta") if mode == "default device" else torch.inference_mode():
        status = status_words.Status(torch.device("cpu"))
    assert status.report.device.type == "cpu" and not status.report.is_inference()
    status.report.fill_(1)
    with pytest.raises(RuntimeError, match="ran out"):
        status.check()
    status.check()  # told once


def test_a_capture_before_the_first_call_is_refused_in_words(monkeypatch) -> None:
    """Status words made inside a capture would lie in the graph's memory and be zeroed at each replay."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="call a layer once before the capture"):
        status_words.Status(torch.device("cuda"))
    status_words.Status(torch.device("cpu"))


@pytest.mark.parametrize("given", ["", "0", "-1", "nan", "inf", "2000", "ten"])
def test_a_bound_that_is_none(given: str, monkeypatch) -> None:
    monkeypatch.setenv("TRITONGRU_WAIT_SECONDS", given)
    drawn = Drawn(CALLS["odd-H"])
    with exchanging(monkeypatch, drawn.call.plan), pytest.raises(ValueError, match="TRITONGRU_WAIT_SECONDS"):
        forward_alone(drawn)


def test_a_bound(monkeypatch) -> None:
    monkeypatch.delenv("TRITONGRU_WAIT_SECONDS", raising=False)
    assert status_words.wait_seconds() == status_words.WAIT_SECONDS
    for given in ("0.5", "1999"):
        monkeypatch.setenv("TRITONGRU_WAIT_SECONDS", given)
        assert status_words.wait_seconds() == float(given)


# ---- a launch that fails ---------------------------------------------------------------------------------------------


def refusing(monkeypatch, message: str, which: str, number: int) -> None:
    """Launch number `number` and all later ones of kernels whose name begins with `which` fail."""
    launch, seen = runtime.Launch.__call__, []

    def fail(self, grid, scalars):
        if self.kernel.name.startswith(which):
            seen.append(self.kernel.name)
            if len(seen) > number:
                raise RuntimeError(message)
        launch(self, grid, scalars)

    monkeypatch.setattr(runtime.Launch, "__call__", fail)


@pytest.mark.parametrize(
    ("which", "number"),
    [("sequence_", 0), ("sequence_forward", 1), ("sequence_backward", 0), ("sequence_backward", 1)],
    ids=["at-once", "second-direction", "in-backward", "second-direction-in-backward"],
)
def test_a_refused_cooperative_launch_falls_back_to_step(which: str, number: int, monkeypatch, caplog) -> None:
    """With one warning, and right; later calls do not try again."""
    monkeypatch.setattr(sequence, "_refused", set())
    drawn = Drawn(CALLS["a-launch-per-direction"])
    refusing(monkeypatch, "Triton Error [CUDA]: too many blocks in cooperative launch", which, number)
    with exchanging(monkeypatch, drawn.call.plan), caplog.at_level(logging.WARNING, "tritongru"):
        drawn.assert_right(drawn.of_ours(0))
        launches: list[str] = []
        with runtime.observe(lambda name, grid: launches.append(name)):
            drawn.assert_right(drawn.of_ours(1))
    assert set(launches) == {"step_forward", "step_backward"}
    warnings = [record.getMessage() for record in caplog.records if record.name == "tritongru"]
    assert len(warnings) == 1 and "refused a cooperative launch" in warnings[0] and "'step' runs" in warnings[0]


def test_any_other_error_of_a_launch_is_raised(monkeypatch) -> None:
    monkeypatch.setattr(sequence, "_refused", set())
    drawn = Drawn(CALLS["odd-H"])
    refusing(monkeypatch, "Triton Error [CUDA]: out of memory", "sequence_", 0)
    with exchanging(monkeypatch, drawn.call.plan), pytest.raises(RuntimeError, match="out of memory"):
        forward_alone(drawn)
