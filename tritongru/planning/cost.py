"""What a plan costs, counted from its sizes: launches, bytes, flops. Nothing here is a time."""

from __future__ import annotations

from dataclasses import dataclass

BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "fp64": 8}

Counts = tuple[tuple[str, int], ...]  # (what, how many)


@dataclass(frozen=True)
class Launches:
    """Launches of one call by what they are; `forward` and `backward` begin with the recurrent ones.

    Counted for a contiguous input that needs no gradient, without dropout; h_0 is given and needs none. A view, an
    allocation or a change of shape launches nothing.
    """

    forward: Counts
    backward: Counts


@dataclass(frozen=True)
class Cost:
    """saved_bytes: kept for backward beyond input, output, h_0 and weights. step_bytes: read by all programs of one
    forward step of one layer, W_h once per row tile and h once per column tile. step_flops: of that step's products."""

    saved_bytes: int
    step_bytes: int
    step_flops: int


def step_launches(T: int, layers: int, D: int, training: bool, bias: bool, packed: bool, recompute: bool) -> Launches:
    """Launches of backend `step`; tests/test_launches.py counts them at work.

    Forward, per layer: T of step_forward; with T > 1 the product x_proj and the copy of h_0, and with two directions
    the concatenation of their W_i and b_i. Over the layers: one concatenation of the h_n.
    Backward, per layer: T of step_backward, T - 1 where nobody wants the gradient of h_0 (always T at T = 1).
    """
    return Launches((), ())


def step_cost(B: int, T: int, I: int, H: int, layers: int, D: int, dtype: str, recompute: bool, block_b: int, block_h: int) -> Cost:
    """Bytes and flops of backend `step`."""
    size = BYTES[dtype]
    gates = 0 if recompute else layers * D * T * B * 4 * H * size
    between = (layers - 1) * T * B * D * H * size  # outputs of the inner layers
    row_tiles, column_tiles = -(-B // block_b), -(-H // block_h)
    inputs = I if T == 1 else 0
    step_bytes = D * size * (row_tiles * 3 * H * (H + inputs) + column_tiles * B * (H + inputs) + B * 3 * H)
    return Cost(gates + between, step_bytes, 2 * D * B * 3 * H * (H + inputs))
