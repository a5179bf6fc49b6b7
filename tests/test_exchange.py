"""Programs that hand tiles to each other (kernels/exchange.py), all alive in the emulator under a seeded scheduler.
They are right, with the same bits under every seed and in any number of launches. Then what a buffer of sentinels could
trip over: NaNs with its bits, infinities, rows that do not run, waits that end without what they waited for."""

import contextlib
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

import tritongru
from tests.kit.cases import DTYPES
from tests.kit.counting import launched
from tests.kit.drawn import BF16, FP16, FP32, ONE_PROGRAM, SHORT, SHORT_SECONDS, Call, Drawn
from tests.kit.inside import several_launches_over_time
from tests.kit.modules import same_bits
from tests.kit.mutants import mutant
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
DENSE, BOTH = Case(T=3, B=3, I=5), Case(T=3, B=3, I=5, bidirectional=True)
PACKED = Case(I=4, bidirectional=True, lengths=LENGTHS_OF_18)
PADDED = Case(T=4, I=3, bidirectional=True, lengths=LENGTHS_OF_18, padded=True, resets=0.3)
EIGHT, THREE = "block_b=8,block_k=64", "num_k=3,block_k=32"


def call(case: Case, fields: str = "", dtype: torch.dtype = FP32, wants_dh_0: bool = True) -> Call:
    return Call(case, f"sequence:{fields}" if fields else "sequence", dtype, wants_dh_0)


CALLS = {
    "odd-H": call(replace(DENSE, T=4)),
    "odd-H-bf16": call(replace(DENSE, H=21), "", BF16),
    "narrow-slices": call(replace(DENSE, T=4, H=24), "block_h=8"),
    "wide-slices": call(replace(DENSE, T=4, H=40), "block_h=32,num_warps=4", FP16),
    "one-program-with-itself": call(Case(T=3, B=2, I=3, H=9), "", FP16),
    "one-step-one-row": call(Case(T=1, B=1, I=4, H=13), "", BF16),
    "one-step-bidirectional": call(replace(BOTH, T=1, H=24), wants_dh_0=False),
    "no-gradient-of-h_0": call(replace(DENSE, H=16, batch_first=True, bias=False), wants_dh_0=False),
    "two-groups": call(Case(T=2, B=17, I=3, H=16), "block_h=8,groups=2"),
    "two-tiles": call(Case(T=2, B=17, I=3, H=30), "tiles=2,waits=3", FP16),
    "an-empty-tile": call(Case(T=2, B=33, I=3, H=13), "groups=2,tiles=2"),
    "tall-tile": call(Case(T=2, B=35, I=3, H=25), "block_b=64", BF16),
    "32-rows-one-warp": call(PACKED, "block_b=32,num_warps=1,waits=3"),
    "eight-rows": call(Case(T=3, B=5, I=3, H=25), EIGHT, BF16),
    "eight-rows-packed": call(replace(PACKED, H=37, lengths=(2, 1) * 5), f"{EIGHT},tiles=2,waits=3,shared_gates=2"),
    "three-tiles-of-eight-rows": call(Case(T=2, B=17, I=3), f"{EIGHT},groups=1,tiles=3", BF16),
    "directions-together": call(BOTH),
    "a-launch-per-direction": call(replace(BOTH, H=19), "directions=1", BF16),
    "packed-sorted": call(Case(I=4, lengths=(4, 3, 3, 1)), "", FP16),
    "packed-both-directions": call(replace(PACKED, H=13, lengths=(2, 1, 3)), "block_h=8"),
    "packed-two-tiles": call(replace(PACKED, H=18), "directions=1,tiles=2"),
    "packed-two-groups": call(PACKED, "groups=2", FP16),
    "three-tensors": call(replace(DENSE, H=70), f"{THREE},waits=3", BF16),
    "gates-in-shared-memory": call(Case(T=2, B=3, I=5, H=75), f"{THREE},shared_gates=2"),
    "padded-two-tiles": call(PADDED, "tiles=2,waits=3", FP16),
    "padded-two-groups": call(PADDED, "groups=2,directions=1"),
    "padded-three-tensors": call(replace(PADDED, H=70, lengths=(4, 1, 2)), f"{THREE},directions=1,waits=3", BF16),
    "recompute": call(Case(I=4, H=12, lengths=(3, 1, 4), recompute=True), "", BF16),
    "recompute-both-ways": call(replace(BOTH, H=21, recompute=True), "", FP16),
    "two-layers": call(replace(BOTH, H=16, layers=2), "", FP16),
    "wide": call(Case(T=2, B=3, I=5, H=77)),
}


@pytest.mark.parametrize("seeds", [range(3), pytest.param(range(3, 23), marks=LONG)], ids=["three", "twenty"])
@pytest.mark.parametrize("name", CALLS)
def test_right_and_the_same_bits_under_every_seed(name: str, seeds: range, monkeypatch) -> None:
    """And in launches over time: the state goes on in float32, with recompute dh between two steps at a time."""
    monkeypatch.setattr(layers, "steps_at_once", lambda T, B: 2)
    drawn = Drawn(CALLS[name])
    with launched() as launches:
        first, *others = (drawn.of_ours(seed) for seed in seeds)
        for steps in (1, 2):
            several_launches_over_time(monkeypatch, steps)
            launches.clear()
            others.append(drawn.of_ours(seeds[steps]))
            least = -(-drawn.call.case.sizes[0] // steps)
            assert min(launches.count("sequence_forward"), launches.count("sequence_backward")) >= least
    drawn.assert_right(first)
    assert all(same_bits(first, other) for other in others)


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize(
    ("fields", "launches"),
    [("groups=1,tiles=1", 3), ("groups=1,tiles=2", 2), ("groups=3,directions=1", 2), ("groups=3,programs_per_sm=2", 1)],
)
def test_launches_over_rows_or_directions_give_the_bits_of_one(fields: str, launches: int, packed: bool) -> None:
    case = replace(PACKED, lengths=LENGTHS_OF_33) if packed else Case(T=3, B=33, I=4, bidirectional="dir" in fields)
    drawn = Drawn(call(case, "groups=3,programs_per_sm=2", BF16))
    whole = drawn.of_ours(0)
    drawn.ours.backend = f"sequence:{fields}"
    with launched() as found:
        assert same_bits(whole, drawn.of_ours(1))
    assert found.count("sequence_forward") == found.count("sequence_backward") == launches
    drawn.assert_right(whole)


SPECIAL = {
    "dense": call(replace(DENSE, I=4)),
    "half-precision": call(replace(DENSE, I=4, H=24), "waits=3", FP16),
    "packed": call(replace(PACKED, H=16, lengths=(1, 3, 2)), "", BF16),
    "packed-two-tiles": call(Case(I=4, H=13, lengths=LENGTHS_OF_18), "groups=1,tiles=1"),
    "one-program": ONE_PROGRAM,
}


@pytest.mark.parametrize("value", [None, INFINITY, -INFINITY])
@pytest.mark.parametrize("place", ["h_0", "h_0 of the last row", "x", "dy", "dh_n"])
@pytest.mark.parametrize("name", SPECIAL)
def test_what_is_not_finite_is_where_nn_gru_has_it(name: str, place: str, value: float | None) -> None:
    """None: a NaN with the sentinel's bits, as PyTorch's own conversion to bfloat16 makes them on the CPU."""
    drawn = Drawn(SPECIAL[name])
    drawn.put(place, value)
    drawn.assert_not_finite_as_nn_gru(drawn.of_ours(0))


@pytest.mark.parametrize("name", ["dense", "packed-two-tiles"])
def test_an_infinite_unit_leaves_the_others_finite(name: str) -> None:
    """Its weights are positive, so r = z = n = 1 and it stays so. Zeros of padded weights times it reach no other."""
    drawn = Drawn(SPECIAL[name])
    drawn.put("h_0", INFINITY)
    with torch.no_grad():
        drawn.ours.weight_hh_l0[:, 2].abs_()
    ours = drawn.of_ours(0)
    drawn.assert_not_finite_as_nn_gru(ours)
    assert not ours["output"].isfinite().all() and not ours["output"].isnan().any()


@gluon.jit
def publish_all(x_ptr, out_ptr, SIZE: gl.constexpr):
    offs = gl.arange(0, SIZE, layout=gl.BlockedLayout([1], [32], [1], [0]))
    publish(out_ptr + offs, gl.load(x_ptr + offs))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_published_is_never_the_sentinel(dtype: torch.dtype) -> None:
    """It becomes another NaN, and all else keeps its bits, the NaNs beside it too."""
    integer = torch.int16 if dtype.itemsize == 2 else torch.int32
    bits, sentinel = torch.randn(16).to(dtype).view(integer), exchange.SENTINEL
    bits[:4] = torch.tensor([sentinel, sentinel - 1, torch.iinfo(integer).max, 0])
    bits[4:6] = torch.tensor([INFINITY, -INFINITY]).to(dtype).view(integer)
    out = torch.full_like(bits, sentinel)
    emulate(publish_all, (1, 1, 1), {"x_ptr": bits.view(dtype), "out_ptr": out}, {"SIZE": 16})
    assert out[0] != sentinel and out.view(dtype)[0].isnan()
    assert torch.equal(out[1:], bits[1:])


# Waits that end without what they waited for
BUT_ROW_0 = ".to(e_ptr.dtype.element_ty, bitcast=True), mask=(gl.program_id(0) != 1) | (tile.row != 0))"
NEVER_PUBLISHES = {  # program 1 keeps row 0 to itself
    "forward": "{publish=>gl.store}(place + group.slot + group.own, "
    f"{{as_factor(h_next[i].to(dtype), PRECISION))=>h_next[i].to(dtype){BUT_ROW_0}}}",
    "backward": "{publish=>gl.store}(own, "
    f"{{as_factor(gl.where(runs & ~clear, dr, nothing), PRECISION))=>dr{BUT_ROW_0}}}",
}
NEVER_RUNS = "for visit in range(first_visit, {stop=>gl.where(gl.program_id(0) == 1, first_visit, stop)}):"


@contextlib.contextmanager
def broken(mistake: str, tmp_path, monkeypatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setenv("TRITONGRU_WAIT_SECONDS", SHORT_SECONDS)
        patch.setattr(sequence, "kernels", mutant(tmp_path, "sequence.py", mistake, module="sequence"))
        yield


def forward_alone(drawn: Drawn) -> Tensor:
    with emulating(0), torch.no_grad():
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
    """The launch ends; rows that were waited for are NaN from there on, others right. The user hears of it once."""
    drawn, word = Drawn(CALLS[name]), status_words.status(torch.device("cpu")).word
    there = torch.arange(drawn.call.case.H) < 16  # the units of program 0
    x = drawn.x.clone().requires_grad_()
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
    calls = {"the next call": lambda: forward_alone(drawn), "synchronize": tritongru.synchronize}
    with pytest.raises(RuntimeError, match=r"ran out on cpu.*set TRITONGRU_WAIT_SECONDS higher, or use"):
        calls.get(hears, loss.backward)()
    tritongru.synchronize()
    assert word.item() == 0
    assert hears == "backward" or torch.autograd.grad(loss, x)[0].isnan().any()
    assert torch.equal(forward_alone(drawn), true)


@pytest.mark.parametrize("name", ["odd-H", pytest.param("packed-both-directions", marks=LONG)])
def test_a_wait_in_backward_that_runs_out(name: str, tmp_path, monkeypatch) -> None:
    drawn = Drawn(CALLS[name])
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
    drawn = Drawn(call(Case(T=2, B=1, I=3, H=24)))
    status_words.status(drawn.x.device).word.fill_(1)
    with broken(NEVER_PUBLISHES["forward"], tmp_path, monkeypatch), emulating(0) as scheduler:
        monkeypatch.setenv("TRITONGRU_WAIT_SECONDS", "1000")
        _, h_n = drawn.ours(drawn.x, drawn.h_0)
    assert scheduler.steps < 2000 and h_n[0, 0].isnan().all()
    status_words.status(drawn.x.device).word.zero_()
    status_words.check_all()  # whose wait ran out has said so


@pytest.mark.parametrize("mode", ["default device", "inference mode"])
def test_status_words_are_host_memory_that_can_be_reset(mode: str) -> None:
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


def test_a_bound(monkeypatch) -> None:
    monkeypatch.delenv("TRITONGRU_WAIT_SECONDS", raising=False)
    assert status_words.wait_seconds() == status_words.WAIT_SECONDS
    for given in ("0.5", "1999"):
        monkeypatch.setenv("TRITONGRU_WAIT_SECONDS", given)
        assert status_words.wait_seconds() == float(given)
    for given in ("", "0", "-1", "nan", "inf", "2000", "ten"):
        monkeypatch.setenv("TRITONGRU_WAIT_SECONDS", given)
        with pytest.raises(ValueError, match="TRITONGRU_WAIT_SECONDS"):
            forward_alone(Drawn(CALLS["odd-H"]))


def refusing(monkeypatch, message: str, which: str, number: int) -> None:
    """Launch number `number` and all later ones of kernels whose name begins with `which` fail."""
    once, left = runtime.Launch.once, [None] * number

    def fail(self, grid, scalars):
        if self.kernel.name.startswith(which) and (not left or left.pop()):
            raise RuntimeError(message)
        once(self, grid, scalars)

    monkeypatch.setattr(runtime.Launch, "once", fail)
    monkeypatch.setattr(sequence, "_refused", set())


@pytest.mark.parametrize(
    ("which", "number"), [("sequence_", 0), ("sequence_forward", 1), ("sequence_backward", 0), ("sequence_backward", 1)]
)
def test_a_refused_cooperative_launch_falls_back_to_step(which: str, number: int, monkeypatch, caplog) -> None:
    """With one warning, and right; later calls do not try again."""
    drawn = Drawn(CALLS["a-launch-per-direction"])
    refusing(monkeypatch, "Triton Error [CUDA]: too many blocks in cooperative launch", which, number)
    drawn.assert_right(drawn.of_ours(0))
    with launched() as launches:
        drawn.assert_right(drawn.of_ours(1))
    assert set(launches) == {"step_forward", "step_backward"}
    warnings = [record.getMessage() for record in caplog.records if record.name == "tritongru"]
    assert len(warnings) == 1 and "refused a cooperative launch" in warnings[0] and "'step' runs" in warnings[0]


def test_any_other_error_of_a_launch_is_raised(monkeypatch) -> None:
    refusing(monkeypatch, "Triton Error [CUDA]: out of memory", "sequence_", 0)
    with pytest.raises(RuntimeError, match="out of memory"):
        forward_alone(Drawn(CALLS["odd-H"]))
