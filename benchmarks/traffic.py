"""What a timestep reads and multiplies, counted from sizes and tiles."""

from tritongru.planning import Plan
from tritongru.planning.problem import BYTES
from tritongru.planning.sequence import SequenceTiles


def step_traffic(plan: Plan) -> tuple[int, int]:
    """Of one forward step of one layer: bytes that its programs read, W_h once per row tile and h once per column tile
    (`sequence`: what is exchanged), and flops of its products."""
    p, tiles = plan.problem, dict(plan.tiles)
    B, H, D, size = p.batch, p.hidden_size, p.directions, BYTES[p.dtype]
    if plan.backend == "sequence":
        found = tiles["forward"]
        received = 0
        if isinstance(found, SequenceTiles):
            received = found.programs * -(-B // found.block_b) * found.block_b * H * size
        return D * (received + B * 3 * H * size), 2 * D * B * 3 * H * H
    found = tiles["cell" if p.time == 1 else "forward"]
    inputs = p.input_size if p.time == 1 else 0
    read = -(-B // found.block_b) * 3 * H * (H + inputs) + -(-H // found.block_h) * B * (H + inputs)
    return D * size * (read + (0 if inputs else B * 3 * H)), 2 * D * B * 3 * H * (H + inputs)
