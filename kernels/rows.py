"""Which rows of the batch run at a step, and where their state comes from: one rule for every kernel.

A direction visits its time steps in an order of its own (forward t = 0 .. T-1, reverse t = T-1 .. 0). At each visit the
first `rows` rows of the batch run: all of them in a dense batch, batch_sizes[t] of them in a packed one.

- A row that ran at the visit before CARRIES its state; one that did not STARTS here, from h_0.
- A row that does not run at the visit after ENDS here: its state is its h_n.

Backward is the same rule with the order turned round: a row starts from the gradient of h_n and ends in that of h_0.
"""

import triton
import triton.language as tl


@triton.jit
def running(offs_b, rows, rows_neighbour):
    """Masks [BLOCK_B]: rows that run here, and those of them that also run at the neighbouring visit."""
    here = offs_b < rows
    return here, here & (offs_b < rows_neighbour)


@triton.jit
def of_direction(direction, forward, reverse):
    """The value (or base pointer) that belongs to this program's direction: 0 is forward, 1 is reverse."""
    return tl.where(direction == 0, forward, reverse)
