"""Two launches per timestep: a library product for all gates, then everything element-wise.

    a = h_prev W_h^T                                                                             library product
    r, z = sigmoid(x_proj_r + a_r + b_hr), sigmoid(x_proj_z + a_z + b_hz)                        this kernel
    q = a_n + b_hn;  n = tanh(x_proj_n + r * q);  h = n + z * (h_prev - n)

`a` goes through memory between them, rounded to the storage dtype.
"""

import triton
import triton.language as tl

from ..gates import gru_gates

SCALARS = ("at", "B")


@triton.jit(do_not_specialize=SCALARS)
def unfused_forward(
    at,  # the first row of the time step: t * B
    B,
    a_ptr,  # [B, 3H] h_prev W_h^T
    x_ptr,  # [T, B, 3H] x_proj
    b_ptr,  # [3H] b_hh
    state_ptr,  # [B, H] float32: h unrounded
    y_ptr,  # [T, B, H]
    H: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    offs_b, offs_u = (offs // H).to(tl.int64), offs % H
    mask = offs_b < B
    row = at.to(tl.int64) + offs_b
    a_ptrs = a_ptr + offs_b * (3 * H) + offs_u
    x_ptrs = x_ptr + row * (3 * H) + offs_u
    state_ptrs = state_ptr + offs_b * H + offs_u

    a_r = tl.load(a_ptrs, mask=mask, other=0.0).to(tl.float32) + tl.load(b_ptr + offs_u).to(tl.float32)
    a_z = tl.load(a_ptrs + H, mask=mask, other=0.0).to(tl.float32) + tl.load(b_ptr + H + offs_u).to(tl.float32)
    q = tl.load(a_ptrs + 2 * H, mask=mask, other=0.0).to(tl.float32) + tl.load(b_ptr + 2 * H + offs_u).to(tl.float32)
    a_r += tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)
    a_z += tl.load(x_ptrs + H, mask=mask, other=0.0).to(tl.float32)
    a_n = tl.load(x_ptrs + 2 * H, mask=mask, other=0.0).to(tl.float32)
    h_prev = tl.load(state_ptrs, mask=mask, other=0.0)
    h, _, _, _ = gru_gates(a_r, a_z, a_n, q, h_prev)
    tl.store(state_ptrs, h, mask=mask)
    tl.store(y_ptr + row * H + offs_u, h.to(y_ptr.dtype.element_ty), mask=mask)
