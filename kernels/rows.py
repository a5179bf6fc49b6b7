"""Which rows of the batch run at a step, and where their state comes from: one rule for every kernel.

A direction visits its time steps in an order of its own (forward t = 0 .. T-1, reverse t = T-1 .. 0). At each visit the
first `rows` rows of the batch run: all of them in a dense batch, batch_sizes[t] of them in a packed one; in a padded
one those of them whose length is above t.

- A row that ran at the visit before CARRIES its state; one that did not STARTS here, from h_0.
- A row that does not run at the visit after ENDS here: its state is its h_n.

Backward is the same rule with the order turned round: a row starts from the gradient of h_n and ends in that of h_0.

Where a row's step t begins a new sequence (`resets`), the state that enters t is 0, and no gradient leaves it. In the
reverse direction, which comes to t - 1 from t, it is the state that enters t - 1. Resets select: neither NaN nor
infinity comes through.
"""

import triton
import triton.language as tl


@triton.jit
def running(offs_b, rows, rows_neighbour, t=0, t_neighbour=0, lengths_ptr=None, PADDED: tl.constexpr = False):
    """Masks [BLOCK_B]: rows that run here, and those of them that also run at the neighbouring visit. lengths_ptr: [B]
    int32, of a padded batch."""
    here = offs_b < rows
    both = here & (offs_b < rows_neighbour)
    if PADDED:
        length = tl.load(lengths_ptr + offs_b, mask=here, other=0)
        here = here & (t < length)
        both = both & here & (t_neighbour < length)
    return here, both


@triton.jit
def entered_anew(t, offs_b, direction, here, carries, B, resets_ptr, RESETS: tl.constexpr):
    """Mask of the rows that run at t (`here`) whose incoming state a reset clears. carries: those that also ran at the
    visit before (in the reverse direction t + 1). resets_ptr: [T, B] int8."""
    if RESETS:
        mask = here & (carries | (direction == 0))
        return tl.load(resets_ptr + (t + direction).to(tl.int64) * B + offs_b, mask=mask, other=0) != 0
    else:
        return here & ~here


@triton.jit
def of_direction(direction, forward, reverse):
    """The value (or base pointer) that belongs to this program's direction: 0 is forward, 1 is reverse."""
    return tl.where(direction == 0, forward, reverse)
