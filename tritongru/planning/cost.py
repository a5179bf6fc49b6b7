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


def step_launches(
    T: int, layers: int, D: int, dtype: str, training: bool, bias: bool, packed: bool, recompute: bool
) -> Launches:
    """Launches of backend `step`; tests/test_launches.py holds them against what really ran.

    "library product" is a matrix product of PyTorch's, "copy" any PyTorch launch that only moves data (cat, roll,
    gather, cast), "host to device" a memcpy of a small index.
    """
    L, narrow = layers, dtype != "fp32"
    several = T > 1
    forward = {
        "step_forward": L * T,
        "library product": L * several,  # x_proj
        # h_0 into the exchange buffer; both directions' W_i and b_i side by side; the layers' h_n
        "copy": L * several * (1 + (D == 2) * (1 + bias)) + (L > 1),
    }
    backward: dict[str, int] = {}
    if training:
        # per direction: dW_i; dW_h, in a dense batch y and h_0 apart; per inner layer dx
        dense_parts = 2 if several and not packed else 1
        backward = {
            "step_backward": L * (T - 1 if several else 1),
            "library product": L * D * (1 + dense_parts) + (L - 1) * D,
            # per direction: dW_i into order r z n; the two db put together (and cast); h_prev gathered; W_i for dx
            "copy": L * D * (1 + bias * (2 + narrow) + packed * 2) + (L - 1) * D,
            "column sum": L * D * bias,
            "host to device": L * D * packed,
        }
        if recompute:  # per direction and part of h_prev, where it fits one chunk
            parts = L * D * dense_parts
            backward["library product"] += 2 * parts
            backward["element-wise"] = 5 * parts
            backward["copy"] += parts
    return Launches(_counted(forward), _counted(backward))


def _counted(counts: dict[str, int]) -> Counts:
    return tuple((what, int(n)) for what, n in counts.items() if n)


def step_cost(
    B: int, T: int, I: int, H: int, layers: int, D: int, dtype: str, recompute: bool, block_b: int, block_h: int
) -> Cost:
    """Bytes and flops of backend `step`."""
    size = BYTES[dtype]
    gates = 0 if recompute else layers * D * T * B * 4 * H * size
    between = (layers - 1) * T * B * D * H * size  # outputs of the inner layers
    row_tiles, column_tiles = -(-B // block_b), -(-H // block_h)
    inputs = I if T == 1 else 0
    step_bytes = D * size * (row_tiles * 3 * H * (H + inputs) + column_tiles * B * (H + inputs) + B * 3 * H)
    return Cost(gates + between, step_bytes, 2 * D * B * 3 * H * (H + inputs))
