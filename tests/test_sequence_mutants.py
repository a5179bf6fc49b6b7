"""The tests of backend `sequence` can fail: kernels with one mistake each, and each is found by a comparison that
tests/test_sequence.py or tests/test_exchange.py makes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

import tritongru
from tests.kit.drawn import SHORT, SHORT_SECONDS, Call, Drawn, put
from tests.kit.fences import fences
from tests.kit.mutants import mutant
from tests.kit.plans import ShrunkenPlan, exchanging
from tests.kit.rule import assert_not_wrong
from tritongru.launch import exchange, runtime, sequence
from tritongru.tools.check import Case
from tritongru.tools.emulator import EmulatorError, emulating

pytestmark = pytest.mark.interpreted

LONG = pytest.mark.long
THREE_PROGRAMS = (ShrunkenPlan(block_k=64), Case(T=3, B=3, I=4, H=40), torch.float32)
HALF = (*THREE_PROGRAMS[:2], torch.float16)
TWO_TILES = (ShrunkenPlan(tiles=2), Case(T=2, B=17, I=4, H=20), torch.float32)
TWO_GROUPS = (ShrunkenPlan(groups=2), *TWO_TILES[1:])
TWO_DIRECTIONS = (ShrunkenPlan(together=False), Case(T=2, B=2, I=4, H=20, bidirectional=True), torch.float32)
PACKED_BOTH = (ShrunkenPlan(), Case(I=4, H=20, bidirectional=True, lengths=(1, 3, 2)), torch.float32)
CUT = (
    ShrunkenPlan(),
    Case(T=4, I=4, H=20, bidirectional=True, lengths=(2, 3, 3), padded=True, resets=0.4),
    torch.float32,
)
THREE_WAITS = (replace(THREE_PROGRAMS[0], waits=3), *THREE_PROGRAMS[1:])
THREE_TENSORS = (ShrunkenPlan(num_k=3), Case(T=2, B=3, I=4, H=70), torch.float32)
IN_SHARED = (replace(THREE_PROGRAMS[0], shared_gates=2), *THREE_PROGRAMS[1:])
ASKED_EARLY = (ShrunkenPlan(tiles=2, early=1), Case(T=3, B=17, I=4, H=20), torch.float32)
EIGHT_ROWS = (ShrunkenPlan(block_b=8, block_k=64), Case(T=2, B=3, I=4, H=40), torch.float16)
PAST_H = (EIGHT_ROWS[0], Case(I=4, H=37, lengths=(1, 3, 2)), torch.float16)

# What is broken, how, by which plan and call it is found, and as what: "wrong" values, a "time-out" of the kernel's
# own, or by the "emulator" (an access out of bounds).
EXCHANGE = {
    "a wait on the wrong slot": (
        "tile = here + i * (ROWS * K)\n",
        "tile = here + slot + i * (ROWS * K)\n",
        THREE_PROGRAMS,
        "time-out",
    ),
    "a wait on the wrong slot in backward": (
        "publish(published, as_factor(gl.where(hands_on, dr",
        "publish(published + slot, as_factor(gl.where(hands_on, dr",
        THREE_PROGRAMS,
        "time-out",
    ),
    "a stale row tile": (
        "asked, tile.to(gl.int64) + vector, status",
        "asked, here.to(gl.int64) + vector, status",
        TWO_TILES,
        "wrong",
    ),
    "a stale row tile in backward": (
        "asked, tile.to(gl.int64) + vector, following",
        "asked, here.to(gl.int64) + vector, following",
        TWO_TILES,
        "wrong",
    ),
    "another tile asked for early": (
        "following = here + slot if i + 1 == TILES else tile + ROWS * K",
        "following = here + slot if i + 1 == TILES else here",
        ASKED_EARLY,
        "wrong",
    ),
    "the same tile asked for again": (
        "following = here + slot if i + 1 == TILES else tile + ROWS * K",
        "following = here if i + 1 == TILES else tile + ROWS * K",
        ASKED_EARLY,
        "wrong",
    ),
    "another tile asked for early in backward": (
        "following = here + slot if i + 1 == TILES else tile + 3 * GATE",
        "following = here if i + 1 == TILES else tile + 3 * GATE",
        ASKED_EARLY,
        "wrong",
    ),
    "programs past H end with their own rows": (
        "gl.max(gl.max(given, 0), 0)",
        "gl.max(gl.max(gl.where(is_unit, given, 0), 0), 0)",
        PAST_H,
        "time-out",
    ),
    "a row that starts early": (
        "h_new = gl.where(runs, h_new, h[i])",
        "h_new = gl.where((t >= 0) & (T > 0), h_new, h[i])",
        PACKED_BOTH,
        "wrong",
    ),
    "a row that does not run publishes nothing": (
        "publish(tile + slot + own_place, as_factor(h_new.to(dtype), PRECISION))",
        "gl.store(tile + slot + own_place, y.to(e_ptr.dtype.element_ty, bitcast=True), mask=runs)",
        PACKED_BOTH,
        "time-out",
    ),
    "units past H are not published": (
        "publish(tile + slot + own_place, as_factor(h_new.to(dtype), PRECISION))",
        "gl.store(tile + slot + own_place, y.to(e_ptr.dtype.element_ty, bitcast=True), mask=is_unit)",
        THREE_PROGRAMS,
        "time-out",
    ),
    "h_0 is not published": (
        "publish(here + i * (ROWS * K) + own_place, as_factor(h_i.to(dtype), PRECISION))",
        "pass",
        THREE_PROGRAMS,
        "time-out",
    ),
    "backward begins without zeros": (
        "publish(here + (3 * i + gate) * GATE + own_place, nothing)",
        "pass",
        THREE_PROGRAMS,
        "time-out",
    ),
    "the carry of a row that does not run dropped": (
        "gl.where(runs, dh * z, dh)",
        "gl.where(runs, dh * z, 0.0)",
        PACKED_BOTH,
        "wrong",
    ),
    "a row that does not run goes through its gate": (
        "gl.where(runs, dh * z, dh)",
        "dh * z",
        PACKED_BOTH,
        "wrong",
    ),
    "h not handed on": ("h_next = h_next + (h_new,)", "h_next = h_next + (h[i],)", THREE_PROGRAMS, "wrong"),
    "x_proj of the first visit for all": (
        "h, x = h_next, x_next",
        "h = h_next",
        THREE_PROGRAMS,
        "wrong",
    ),
    "gates of the last visit for all": (
        "carry, given = carry_next, given_next",
        "carry = carry_next",
        THREE_PROGRAMS,
        "wrong",
    ),
    "h_prev of the wrong step": ("times(at_before, step_y)", "times(at, step_y)", THREE_PROGRAMS, "wrong"),
    "the first group's rows for all": (
        "first = first_row + group * (TILES * ROWS)",
        "first = first_row",
        TWO_GROUPS,
        "wrong",
    ),
    "the first direction in both launches": (
        "direction = first_direction + gl.program_id(2)",
        "direction = gl.program_id(2)",
        TWO_DIRECTIONS,
        "wrong",
    ),
    "weights of the other direction": (
        "w_ptr = gl.where(direction == 0, w_ptr, w_reverse_ptr)",
        "w_ptr = w_ptr + 0",
        TWO_DIRECTIONS,
        "wrong",
    ),
    "reverse begins at the last timestep of all": (
        "longest - 1 - first_visit",
        "T - first_visit",
        PACKED_BOTH,
        "wrong",
    ),
}
RESETS = {
    "a reset one step late": ("boundary = t + direction", "boundary = t + direction + 1", CUT, "wrong"),
    "resets in the forward direction alone": ("mask=(t >= 0) &", "mask=(t >= 0) & (direction == 0) &", CUT, "wrong"),
    "a reset past a row's length": ("(boundary < length)", "(boundary < length + 1)", CUT, "emulator"),
    "h_0 of a row that begins anew": (" & ~anew, other", ", other", CUT, "wrong"),
    "y after a reset": (
        "y = h_new.to(dtype)\n            h_new = gl.where(clear, 0.0, h_new)",
        "h_new = gl.where(clear, 0.0, h_new)\n            y = h_new.to(dtype)",
        CUT,
        "wrong",
    ),
    "the state but not its gradient": ("hands_on = runs & ~clear", "hands_on = runs", CUT, "wrong"),
    "the state but not what is carried back": (
        "gl.where(clear, 0.0, gl.where(runs, dh * z, dh))",
        "gl.where(runs, dh * z, dh)",
        CUT,
        "wrong",
    ),
    "h_prev of another sequence in backward": (
        "h_prev = gl.where(clear, 0.0, h_prev.to(gl.float32))",
        "h_prev = h_prev.to(gl.float32)",
        CUT,
        "wrong",
    ),
    "the first tile's resets for all": (
        "clear = cleared(t_next, first + i * ROWS + row,",
        "clear = cleared(t_next, first + row,",
        (ShrunkenPlan(tiles=2), Case(T=3, B=17, I=4, H=20, resets=0.4), torch.float32),
        "wrong",
    ),
}
PRODUCTS = {
    "a gate dropped": (
        "sum_z.store(add_product(zeros, seen, w_z, 0, SHARED > 1, ROWS, PRECISION))",
        "sum_z.store(zeros)",
        THREE_PROGRAMS,
        "wrong",
    ),
    "a gate dropped in backward": (
        "acc = add_product(acc, seen, w_z, PARTS,",
        "acc = add_product(acc, seen, (), PARTS,",
        THREE_PROGRAMS,
        "wrong",
    ),
    "a gate dropped where each is awaited": (
        "acc = add_product(acc, seen_q, w_n,",
        "acc = add_product(acc, seen_q, (),",
        THREE_WAITS,
        "wrong",
    ),
    "another gate's gradients": (
        "address += 2 * GATE_BYTES",
        "address += GATE_BYTES",
        THREE_WAITS,
        "wrong",
    ),
    "gates swapped": ("add_product(zeros, seen, w_r, 0,", "add_product(zeros, seen, w_z, 0,", THREE_PROGRAMS, "wrong"),
    "the first tensor for all": ("mma_v2(seen[FIRST + part]", "mma_v2(seen[FIRST]", THREE_TENSORS, "wrong"),
    "weights of the first tensor": (
        "weights[part].load(",
        "weights[0].load(",
        (replace(THREE_TENSORS[0], shared_gates=3), *THREE_TENSORS[1:]),
        "wrong",
    ),
    "a part of the sum dropped": (
        "gl.sum(buffer.load(summed(",
        "gl.max(buffer.load(summed(",
        THREE_PROGRAMS,
        "wrong",
    ),
    "the first warp's K for all": ("warp * K_OF_WARP + k", "k", THREE_PROGRAMS, "wrong"),
    "dr stored as dz": ("gl.store(dgates + H, dr,", "gl.store(dgates + H, dz,", THREE_PROGRAMS, "wrong"),
    "gates not saved": (
        "saves = runs & (save_gates != 0)",
        "saves = runs & (save_gates == 0)",
        THREE_PROGRAMS,
        "wrong",
    ),
    "b_hn dropped": ("            q += b_hn\n", "", THREE_PROGRAMS, "wrong"),
}
PLACES = {
    "a wrong place in the fragment": (
        "unit // (128 // WIDTH) * 2 + row // 8",
        "unit // (128 // WIDTH) + row // 8 * 2",
        THREE_PROGRAMS,
        "wrong",
    ),
    "a wrong lane": (
        "unit % (128 // WIDTH) // (32 // WIDTH)\n        register = unit // (128 // WIDTH) *",
        "unit % (32 // WIDTH)\n        register = unit // (128 // WIDTH) *",
        HALF,
        "time-out",
    ),
    "a wrong place in a fragment of 8 rows": (
        "register = unit // (128 // WIDTH)\n",
        "register = unit // (128 // WIDTH) ^ 1\n",
        EIGHT_ROWS,
        "wrong",
    ),
    "a wrong block": (
        "(unit // UNITS) * (HEIGHT * UNITS)",
        "(unit // UNITS) * (8 * UNITS)",
        THREE_PROGRAMS,
        "time-out",
    ),
    "a wrong first vector": ("part * (HEIGHT * K_OF_WARP", "part * (8 * K_OF_WARP", THREE_PROGRAMS, "wrong"),
}
OFTEN = (
    "a wait on the wrong slot", "a stale row tile", "a row that starts early",
    "a row that does not run publishes nothing",
    "units past H are not published", "the carry of a row that does not run dropped", "a gate dropped",
    "a wrong place in the fragment", "a reset one step late", "the state but not its gradient",
)  # fmt: skip
EXCHANGING = [
    pytest.param(file, *rest, id=name, marks=() if name in OFTEN else LONG)
    for file, found in (
        ("sequence.py", EXCHANGE),
        ("sequence.py", RESETS),
        ("sequence.py", PRODUCTS),
        ("exchange.py", PLACES),
    )
    for name, rest in found.items()
]


def outcome(plan: ShrunkenPlan, case: Case, dtype: torch.dtype, monkeypatch, seeds: int = 3) -> str:
    """How a call is found wrong under one of the seeds, or "survived"."""
    for seed in range(seeds):
        found = "survived"
        try:
            with (
                exchanging(monkeypatch, plan),
                emulating(seed, **SHORT),
                fences(monkeypatch),  # memory that nobody wrote is NaN, and not the sentinel
            ):
                assert_not_wrong(case, "sequence", dtype)
        except AssertionError:
            found = "wrong"
        except EmulatorError:
            found = "emulator"
        except RuntimeError as error:
            assert "TRITONGRU_WAIT_SECONDS" in str(error)
            found = "time-out"
        try:
            sequence.check_all()
        except RuntimeError:
            found = "time-out"
        if found != "survived":
            return found
    return "survived"


@pytest.fixture
def short_waits(monkeypatch) -> Iterator[None]:
    monkeypatch.setenv("TRITONGRU_WAIT_SECONDS", SHORT_SECONDS)
    yield
    with contextlib.suppress(RuntimeError):
        sequence.check_all()


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize(("file", "old", "new", "call", "how"), EXCHANGING)
def test_exchanging_mutant_is_killed(
    file: str, old: str, new: str, call: tuple[ShrunkenPlan, Case, torch.dtype], how: str, short_waits, tmp_path,
    monkeypatch,
) -> None:  # fmt: skip
    assert outcome(*call, monkeypatch, seeds=1) == "survived"
    monkeypatch.setattr(sequence, "kernels", mutant(tmp_path, file, old, new, module="sequence"))
    assert outcome(*call, monkeypatch) == how


def test_no_fill_is_killed(short_waits, monkeypatch) -> None:
    monkeypatch.setattr(exchange, "SENTINEL", 0)
    assert outcome(*THREE_PROGRAMS, monkeypatch) == "wrong"


def test_blocks_that_nobody_owns_and_nobody_zeroes_are_killed(short_waits, monkeypatch) -> None:
    buffer = exchange.Buffer.__init__
    monkeypatch.setattr(
        exchange.Buffer, "__init__", lambda self, shape, slots, owned, *rest: buffer(self, shape, slots, 1 << 20, *rest)
    )
    assert outcome(*THREE_PROGRAMS, monkeypatch) == "time-out"


@pytest.fixture
def a_program_is_missing(monkeypatch) -> None:
    launch = runtime.Launch.__call__
    monkeypatch.setattr(
        runtime.Launch, "__call__", lambda self, grid, scalars: launch(self, (grid[0] - 1, *grid[1:]), scalars)
    )


def test_a_missing_program_is_killed(a_program_is_missing, short_waits, monkeypatch) -> None:
    assert outcome(*THREE_PROGRAMS, monkeypatch) == "time-out"


def test_a_status_word_that_is_reset_is_killed(a_program_is_missing, short_waits, monkeypatch) -> None:
    """Whoever clears the words without telling of them; the kernel's own stores are tests/test_wait.py's."""

    def clear(self: exchange.Status) -> None:
        self.word.zero_()
        self.report.zero_()

    monkeypatch.setattr(exchange.Status, "check", clear)
    assert outcome(*THREE_PROGRAMS, monkeypatch) == "wrong"  # not the "time-out" that it is


def test_a_state_that_is_handed_on_rounded_is_killed(tmp_path, monkeypatch) -> None:
    """Between launches over time: where z is near 1 a step changes h by less than bfloat16 can hold."""
    torch.manual_seed(0)
    layer = tritongru.GRU(3, 16, dtype=torch.bfloat16, backend="sequence")
    with torch.no_grad():
        layer.bias_hh_l0[16:32] += 7.0
    x = torch.randn(120, 2, 3, dtype=torch.bfloat16) + 1
    monkeypatch.setattr(sequence, "_visits_per_launch", lambda *_: 1)

    def output() -> torch.Tensor:
        with torch.no_grad(), exchanging(monkeypatch, ShrunkenPlan()):
            return layer(x)[0].double()

    truth = torch.nn.GRU(3, 16, dtype=torch.float64)
    truth.load_state_dict(layer.state_dict())
    true = truth(x.double())[0].detach()
    kept = (output() - true).norm()
    old, new = "h[i].to(gl.int32, bitcast=True)", "h[i].to(dtype).to(gl.float32).to(gl.int32, bitcast=True)"
    monkeypatch.setattr(sequence, "kernels", mutant(tmp_path, "sequence.py", old, new, module="sequence"))
    assert (output() - true).norm() > 4 * kept


def test_a_sentinel_that_is_published_is_killed(short_waits, tmp_path, monkeypatch) -> None:
    """By test_exchange.py's dy with the sentinel's bits, which arithmetic hands on."""
    drawn = Drawn(Call(*THREE_PROGRAMS))
    put(drawn, "dy", None)
    old = "gl.where(bits == -1, quiet_nan, bits)"
    monkeypatch.setattr(sequence, "kernels", mutant(tmp_path, "exchange.py", old, "bits", module="sequence"))
    with exchanging(monkeypatch, drawn.call.plan):
        drawn.of_ours(0, **SHORT)
    with pytest.raises(RuntimeError, match="TRITONGRU_WAIT_SECONDS"):
        sequence.check_all()
