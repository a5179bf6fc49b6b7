"""How programs of one launch hand tiles to each other: the data is its own flag.

The buffer is filled beforehand with a SENTINEL, the bit pattern of all ones, which is a NaN in every format. A program
publishes its tile once; a consumer re-loads until no sentinel is left. There is no counter and no read-modify-write.

Why this is right
1. Every element is written once after the fill, and a store of 2 or 4 aligned bytes is not torn. So an element that is
   not the sentinel is the published one: each validates itself, and no order between elements or programs is needed.
2. What is published is never the sentinel: a NaN with these bits becomes the format's quiet NaN (`publish`).
3. The fill is an earlier launch on the same stream, so it happens before every load here.
4. Publishing stores go to L2 (`.cg`) and are strong at GPU scope in the machine code; receiving loads are volatile, so
   the compiler neither merges nor drops them, and they pass L1 by. tests/kit/lint.py reads both from the binary, and
   that no load was moved ahead by software pipelining (num_stages = 1).
5. A consumer waits only for rows that its producers publish: those that ran at the visit before (kernels/rows.py). What
   a row starts from (h_0) has its own pointer, and may hold any bits.
6. All programs that wait for each other are on the device at once (a cooperative launch), and each publishes visit v
   before it waits for v + 1: the least visit that anyone waits for is always on its way.

No wait is without bound. After `bound` nanoseconds a program sets a status word, which the others look at while they
wait; all stop waiting, what depends on the missing data becomes NaN, and the host raises an error at its next call.
"""

import triton
import triton.language as tl

POLLS_PER_LOOK = tl.constexpr(64)  # polls between two looks at the clock and the status word


@triton.jit
def as_unsigned(bits):
    """Integer bits as uint32, for comparison: all ones is the largest value of its width."""
    if bits.dtype.primitive_bitwidth == 16:
        return bits.to(tl.uint16, bitcast=True).to(tl.uint32)
    else:
        return bits.to(tl.uint32, bitcast=True)


@triton.jit
def sentinel_of(bits):
    """The sentinel as `as_unsigned` shows it."""
    return 0xFFFF if bits.dtype.primitive_bitwidth == 16 else 0xFFFFFFFF


@triton.jit
def publish(ptrs, value, mask):
    """Store a tile so that others see it. ptrs: integers of the value's width."""
    bits = value.to(ptrs.dtype.element_ty, bitcast=True)
    if value.dtype == tl.float16:
        quiet_nan = 0x7E00
    elif value.dtype == tl.bfloat16:
        quiet_nan = 0x7FC0
    else:
        quiet_nan = 0x7FC00000
    bits = tl.where(bits == -1, quiet_nan, bits).to(ptrs.dtype.element_ty)
    tl.store(ptrs, bits, mask=mask, cache_modifier=".cg")


@triton.jit
def load_all(ptrs, masks):
    """The tiles of a tuple of pointers, as they are now; 0 where the mask is off."""
    found = ()
    for i in tl.static_range(len(ptrs)):
        found = found + (tl.load(ptrs[i], mask=masks[i], other=0, volatile=True),)
    return found


@triton.jit
def any_missing(found):
    """Whether a sentinel is left in tiles of one shape: one reduction for all of them."""
    largest = as_unsigned(found[0])
    for i in tl.static_range(1, len(found)):
        largest = tl.maximum(largest, as_unsigned(found[i]))
    return (tl.max(largest) == sentinel_of(found[0])).to(tl.int32)


@triton.jit
def receive(ptrs, masks, lost, status_ptr, report_ptr, bound, dtype: tl.constexpr):
    """Wait for a tuple of tiles: the tiles as `dtype`, and whether a wait was given up (this one, or before: `lost`).

    status_ptr: int32 word on the device; report_ptr: one that the host reads. bound: nanoseconds.
    """
    found = load_all(ptrs, masks)
    missing = any_missing(found)
    polls = 0
    deadline = tl.zeros((), tl.int64)
    while (missing != 0) & (lost == 0):
        found = load_all(ptrs, masks)
        missing = any_missing(found)
        polls += 1
        if polls % POLLS_PER_LOOK == 0:
            now = tl.extra.cuda.globaltimer()
            deadline = tl.where(polls == POLLS_PER_LOOK, now + bound, deadline)
            late = ((now > deadline) | (tl.load(status_ptr, volatile=True) != 0)) & (missing != 0)
            # each warp has looked for itself: one answer for all, or they would part at the barriers of the next poll
            lost = tl.max(tl.zeros(found[0].shape, tl.int32) + late.to(tl.int32))
    if (missing != 0) & (lost != 0):
        tl.store(status_ptr, 1)
        tl.store(report_ptr, 1)
    values = ()
    for i in tl.static_range(len(found)):
        values = values + (found[i].to(dtype, bitcast=True),)
    return values, lost
