"""The least time of a step and of a call, from ceilings that an H200 measured."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from benchmarks.limit import CallLimit, Ceilings, Limit, call_limit_us, limit_us, weights_us
from tests.kit.ceilings import TOP
from tritongru.planning import Problem, describe
from tritongru.planning.devices import Device
from tritongru.planning.sequence import SequenceTiles, sequence_tiles
from tritongru.planning.step import StepTiles, step_tiles

H200 = describe("h200")
KINDS = ("forward", "backward")
DTYPES = (("bf16", "tf32"), ("fp16", "tf32"), ("fp32", "tf32"), ("fp32", "ieee"))
SIZES_H = (64, 100, 128, 192, 256, 300, 512, 640, 1024, 1536, 2048)
SIZES_B = (1, 7, 16, 32, 33, 64, 128, 512)


def tiles_of(
    kind: str, backend: str, B: int, H: int, D: int, dtype: str, precision: str, device: Device
) -> StepTiles | SequenceTiles | None:
    if backend == "step":
        return step_tiles(kind, B, H, D, dtype, precision, device)
    tiles = sequence_tiles(kind, B, H, D, dtype, precision, device)
    return None if isinstance(tiles, str) else tiles


def limit(
    kind: str, backend: str, B: int, H: int, D: int = 1, dtype: str = "bf16", precision: str = "tf32",
    device: Device = H200, tiles: StepTiles | SequenceTiles | None = None, top: Ceilings = TOP,
) -> Limit:  # fmt: skip
    tiles = tiles or tiles_of(kind, backend, B, H, D, dtype, precision, device)
    assert tiles is not None
    return limit_us(kind, backend, tiles, B, H, D, dtype, precision, device, top)


def test_backward_in_one_group_is_bound_by_l2() -> None:
    """B 64, H 2048 in one group is 100 MB per step, at 11.9 TB/s 8.6 us."""
    found = limit("backward", "sequence", 64, 2048)
    assert found.binding == "l2" and found.us == pytest.approx(8.6, rel=0.01)


def test_terms_of_a_step_by_hand() -> None:
    """H 512, B 32, bf16, H200: 32 programs of 16 units, 2 groups of one row tile."""
    tiles = SequenceTiles(
        block_b=16, block_h=16, block_k=512, num_k=1, num_warps=8, shared_gates=1, waits=1, delay=0,
        early=0, programs_per_sm=1, tiles=1, programs=32, groups=2, directions=1,
    )  # fmt: skip
    found = limit("forward", "sequence", 32, 512, tiles=tiles)
    weights = 3 * 16 * 512 * 2
    assert found.shared_us == pytest.approx(weights / 3 / 128 / 1980)  # of the one gate that is there
    assert found.l2_us == pytest.approx(16 * (512 + 3 * 16) * 2 / 92.3 / 1980)  # one SM's reads, not the 2 MB of all
    assert found.products_us == pytest.approx(2 * 16 * weights / 2 / (0.71 * 881e6 / 132))
    read = 16 * 512 * 2 / 92.3 / 1980
    assert found.latency_us == pytest.approx(
        0.254 + read + max(found.shared_us, found.products_us) + (33 + 70 + 120) / 1980
    )
    assert (found.us, found.binding) == (found.latency_us, "latency")
    assert (found.launch_us, found.dram_us) == (0, 0)


def test_a_step_is_a_launch_and_the_reading_of_w() -> None:
    tiles = StepTiles(block_b=16, block_h=16, block_k=64, num_warps=4, num_stages=3)
    found = limit("forward", "step", 1, 2048, tiles=tiles)
    everything = 2 * (3 * 2048 * 2048 + 2048 * (128 + 3))
    assert found.launch_us == TOP.graph_us
    assert found.us == pytest.approx(found.launch_us + everything / 11.9e6)
    assert found.dram_us == 0
    large = limit("forward", "step", 1, 4096, tiles=tiles)  # 101 MB of W_h in 60 MB of L2
    assert large.dram_us == pytest.approx((6 * 4096**2 - 60 * 2**20) / 4.48e6)


def test_more_than_one_row_tile_hides_the_latency() -> None:
    tiles = sequence_tiles("forward", 16, 2048, 1, "bf16", "tf32", H200)
    assert isinstance(tiles, SequenceTiles)
    found = limit("forward", "sequence", 128, 2048, tiles=replace(tiles, tiles=8))
    assert found.latency_us < found.us == found.l2_us


def test_two_launches_take_twice_as_long() -> None:
    """Both directions of H 2048 are not on the device at once."""
    tiles = sequence_tiles("forward", 16, 2048, 2, "bf16", "tf32", H200)
    assert isinstance(tiles, SequenceTiles) and tiles.directions == 1
    assert limit("forward", "sequence", 16, 2048, D=2).us == pytest.approx(
        2 * limit("forward", "sequence", 16, 2048).us
    )


@pytest.mark.parametrize("backend", ["step", "sequence"])
@pytest.mark.parametrize("kind", KINDS)
def test_positive_and_the_largest_of_its_terms(backend: str, kind: str) -> None:
    device, served = H200, 0
    for dtype, precision in DTYPES:
        for D in (1, 2):
            for H in SIZES_H:
                for B in SIZES_B:
                    tiles = tiles_of(kind, backend, B, H, D, dtype, precision, device)
                    if tiles is None:
                        continue
                    served += 1
                    least = limit(kind, backend, B, H, D, dtype, precision, device, tiles)
                    terms = (least.l2_us, least.dram_us, least.products_us, least.shared_us, least.latency_us)
                    assert min(terms) >= 0 and least.us == least.launch_us + max(terms) > 0
                    assert math.isfinite(least.us)
    assert served


@pytest.mark.parametrize("kind", KINDS)
def test_grows_with_the_sizes_at_the_same_tiles(kind: str) -> None:
    """Other tiles may be faster at a larger size, as wide tiles of `step` are; the same ones are not."""
    step = StepTiles(block_b=16, block_h=16, block_k=64, num_warps=4, num_stages=3)
    one_row_tile = SequenceTiles(
        block_b=16, block_h=16, block_k=512, num_k=1, num_warps=8, shared_gates=0, waits=1, delay=0,
        early=0, programs_per_sm=1, tiles=1, programs=32, groups=1, directions=1,
    )  # fmt: skip

    def sequence(tiles: int) -> SequenceTiles:
        return replace(one_row_tile, tiles=tiles)

    by_b = [limit(kind, "step", B, 512, tiles=step).us for B in SIZES_B]
    assert by_b == sorted(by_b)
    by_h = [limit(kind, "step", 32, H, tiles=step).us for H in SIZES_H]
    assert by_h == sorted(by_h)
    by_b = [limit(kind, "sequence", B, 512, tiles=sequence(-(-B // 16))).us for B in SIZES_B]
    assert by_b == sorted(by_b)
    by_h = [
        limit(kind, "sequence", 32, H, tiles=replace(sequence(2), programs=-(-H // 16))).us
        for H in (272, 300, 400, 512)
    ]
    assert by_h == sorted(by_h)


def test_mma_sync_is_the_smaller_rate_only_below_64_rows() -> None:
    assert TOP.product_tflops("bf16", "tf32", 16) == pytest.approx(0.71 * TOP.product_tflops("bf16", "tf32", 64))
    assert TOP.product_tflops("fp32", "ieee", 64) == TOP.fma_tflops


def test_refuses_other_kinds_and_backends() -> None:
    step = step_tiles("forward", 32, 512, 1, "bf16", "tf32", H200)
    with pytest.raises(ValueError, match="backend must be one of step, sequence, got 'aten'"):
        limit_us("forward", "aten", step, 32, 512, 1, "bf16", "tf32", H200, TOP)
    with pytest.raises(ValueError, match="kind must be forward or backward, got 'sideways'"):
        limit_us("sideways", "step", step, 32, 512, 1, "bf16", "tf32", H200, TOP)


def call(rows: int | None = None, top: Ceilings = TOP, **sizes: Any) -> CallLimit:
    problem = replace(Problem(batch=32, time=100, input_size=256, hidden_size=512, dtype="bf16"), **sizes)
    return call_limit_us(problem, H200, top, rows)


def test_a_step_is_bound_by_what_the_card_measured() -> None:
    slower = replace(TOP, l2_round_trip_ns=1254.0)
    key = ("forward", "sequence", 16, 1024)
    assert limit(*key, top=slower).us == pytest.approx(limit(*key).us + 1.0)  # one wait in forward, and latency binds


def test_a_call_is_its_steps_and_its_products_by_hand() -> None:
    """Those of the backend whose steps are the shorter ones."""
    found = call(training=False)
    name, step = min(((b, limit("forward", b, 32, 512)) for b in ("step", "sequence")), key=lambda of_it: of_it[1].us)
    N, I, columns = 100 * 32, 256, 3 * 512
    product = max(2 * N * I * columns / 881e6, 2 * (N * I + I * columns + N * columns) / 11.9e6)
    assert found == CallLimit(
        pytest.approx(100 * step.us + product), pytest.approx(100 * step.us), pytest.approx(product), name,
        (step.binding,),
    )  # fmt: skip


def test_training_counts_every_product() -> None:
    """With T large the products are bound by flops or DRAM, whose sums are known."""
    sizes = dict(time=4000, batch=64, layers=2, directions=2)
    flops = 0.0
    N, H = 4000 * 64, 512
    for I in (256, 1024):
        flops += 2 * N * 2 * 3 * H * (3 * I + H)  # projection, dW_i and dx; dW_h
    found = call(top=replace(TOP, dram_tb_s=1e9, l2_read_tb_s=1e9), **sizes)
    assert found.products_us == pytest.approx(flops / 881e6)
    assert call(**sizes).products_us >= found.products_us


def test_what_does_not_fit_l2_comes_from_dram() -> None:
    found = call(top=replace(TOP, half_tflops=1e9), batch=512, time=1000, input_size=512, training=False)
    N = 512 * 1000
    assert found.products_us == pytest.approx(2 * (N * 512 + 512 * 1536 + N * 1536) / 4.48e6)


def test_what_is_too_large_for_the_chip_is_bound_by_step() -> None:
    assert call(hidden_size=2816).backend == "step" and call(hidden_size=2048).backend == "sequence"


def test_a_packed_batch_is_bound_by_its_own_rows() -> None:
    dense, packed = call(packed=True, batch=128), call(packed=True, batch=128, rows=50 * 128)
    assert packed.us < dense.us and packed.products_us == pytest.approx(dense.products_us / 2, rel=0.1)
    assert packed.recurrence_us <= dense.recurrence_us
    assert call(packed=True, rows=3200) == call()


@pytest.mark.parametrize("training", [False, True])
def test_a_call_takes_longer_with_more_of_anything(training: bool) -> None:
    for dtype, precision in DTYPES:
        same: dict[str, Any] = dict(dtype=dtype, precision=precision, training=training)
        for name_of_size, values in (("time", (2, 3, 10, 1000)), ("layers", (1, 2, 4))):
            found = [call(**same, **{name_of_size: value}).us for value in values]
            assert found == sorted(set(found)) and found[0] > 0


def test_a_step_beside_the_launch_before_it_reads_its_weights_before() -> None:
    """And waits for that one's stores and its own loads, two ways to L2 and back, instead of a launch's boundary."""
    tiles = StepTiles(block_b=16, block_h=16, block_k=128, num_warps=8, num_stages=1, split=8, ahead=4, pdl=True)
    found = limit("forward", "step", 16, 512, tiles=tiles)
    h = 2 * 16 * (512 + 3 * 16) / (92.3 * 1980)
    assert found.l2_us == pytest.approx(max(h, 2 * (3 * 512**2 + 16 * 512 * 35) / 11.9e6))
    assert found.launch_us == pytest.approx(2 * 0.254)


def test_w_is_read_from_l2_and_what_that_does_not_hold_from_dram() -> None:
    assert weights_us(512, 1, "bf16", H200, TOP) == pytest.approx(6 * 512**2 / 11.9e6)
    assert weights_us(4096, 1, "bf16", H200, TOP) == pytest.approx((6 * 4096**2 - 60 * 2**20) / 4.48e6)
    assert weights_us(4096, 2, "bf16", H200, TOP) == pytest.approx((12 * 4096**2 - 60 * 2**20) / 4.48e6)
