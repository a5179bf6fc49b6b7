"""A recurrence whose programs hand slices of the state to each other, small enough to be read at once.

    s_g = sigmoid(h_{t-1} W_g),  g = 0, 1, 2        h_t = h_{t-1} / 4 + (s_0 + s_1 + s_2) / 4

Backward, with dh arriving at h_t:  a_g = dh s_g (1 - s_g) / 4,  dh_{t-1} = dh / 4 + sum over g of a_g W_g^T

Forward and backward have the shape of kernels/sequence.py: weights stay in registers, K is split over the warps, a wait
is one inline PTX text, the parts of a product are added through shared memory, the state is float32 in registers.
The exchange buffer is [T + 1, (3,) 16 rows, H] int16, in rows; a vector of a thread is 8 elements of one row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from tritongru.kernels.gates import sigmoid
from tritongru.tools import emulator

SENTINEL = -1
ROWS = gl.constexpr(16)
VECTOR = gl.constexpr(8)  # elements of 16 bits in 16 bytes: neighbours in K, by the layout of the factors


def wait_text(vectors: int, planes: int = 1, plane_bytes: int = 0, limit: int = 1 << 20) -> tuple[str, str]:
    """PTX and its constraints: load each of a thread's 16-byte vectors from each plane until no half is all ones, at
    most `limit` times. Operands: the registers of the planes, then a base address and a byte offset per element."""
    outputs, pack = 4 * vectors * planes, VECTOR.value * vectors
    lines = ["{", ".reg .pred again;", ".reg .b32 any, half, looks;", ".reg .b64 offset;"]
    for v in range(vectors):
        lines += [f".reg .b64 at{v};", f"cvt.s64.s32 offset, ${outputs + pack + v * VECTOR.value};"]
        lines += [f"add.s64 at{v}, ${outputs + v * VECTOR.value}, offset;"]
    lines += ["mov.u32 looks, 0;", "LOOK:"]
    for p in range(planes):
        for v in range(vectors):
            registers = ", ".join(f"${(p * vectors + v) * 4 + i}" for i in range(4))
            lines += [f"ld.relaxed.gpu.global.v4.b32 {{{registers}}}, [at{v}+{p * plane_bytes}];"]
    lines += ["mov.u32 any, 0;"]
    for i in range(outputs):  # bit 15 or 31 of (~1 - x) & x is set just where that half of x is all ones
        lines += [f"sub.u32 half, 0xFFFEFFFE, ${i};", f"and.b32 half, half, ${i};", "or.b32 any, any, half;"]
    lines += ["and.b32 any, any, 0x80008000;", "setp.ne.u32 again, any, 0;", "add.u32 looks, looks, 1;"]
    lines += [f"setp.lt.and.u32 again, looks, {limit}, again;", "@again bra LOOK;", "}"]
    return "\n".join(lines), ",".join(["=&r"] * outputs + ["l"] * pack + ["r"] * pack)


def wait_twin(planes: int = 1, plane_bytes: int = 0) -> Any:
    """What `wait_text` does, for all threads at once, and without its limit."""

    def twin(turn: emulator.Turn, base: Any, offsets: Any, dtype: Any) -> Any:
        addresses = base.v + offsets.v
        while True:
            found = tuple(turn.load(addresses + p * plane_bytes, gl.int16) for p in range(planes))
            if not any((plane.v == SENTINEL).any() for plane in found):
                return found if planes > 1 else found[0]
            turn.wait()

    return twin


@gluon.jit
def publish(pointers, value):
    bits = value.to(gl.int16, bitcast=True)
    gl.store(pointers, gl.where(bits == -1, 0x7FC0, bits).to(gl.int16), cache_modifier=".cg")


@gluon.jit
def total(parts, shared, own: gl.constexpr, spread: gl.constexpr):
    """The sum of the warps' parts, through shared memory."""
    shared.store(parts)
    return gl.convert_layout(gl.sum(shared.load(spread), 0), own)


@gluon.jit
def places(H: gl.constexpr, SPLIT: gl.constexpr, layout: gl.constexpr):
    """Rows, and units of K: [SPLIT, ROWS, H / SPLIT]."""
    k = gl.arange(0, H // SPLIT, layout=gl.SliceLayout(0, gl.SliceLayout(1, layout)))
    part = gl.arange(0, SPLIT, layout=gl.SliceLayout(1, gl.SliceLayout(2, layout)))
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(0, gl.SliceLayout(2, layout)))
    k = gl.expand_dims(gl.expand_dims(part, 1), 2) * (H // SPLIT) + gl.expand_dims(gl.expand_dims(k, 0), 1)
    return gl.expand_dims(gl.expand_dims(row, 0), 2), k


@gluon.jit
def load_weights(w_ptr, first_unit, H: gl.constexpr, UNITS: gl.constexpr, SPLIT: gl.constexpr, layout: gl.constexpr):
    """[SPLIT, H / SPLIT, UNITS] of one matrix [H, H] of rows of units."""
    k = gl.arange(0, H // SPLIT, layout=gl.SliceLayout(0, gl.SliceLayout(2, layout)))
    part = gl.arange(0, SPLIT, layout=gl.SliceLayout(1, gl.SliceLayout(2, layout)))
    unit = gl.arange(0, UNITS, layout=gl.SliceLayout(0, gl.SliceLayout(1, layout)))
    k = gl.expand_dims(gl.expand_dims(part, 1), 2) * (H // SPLIT) + gl.expand_dims(gl.expand_dims(k, 0), 2)
    return gl.load(w_ptr + k * H + gl.expand_dims(gl.expand_dims(unit, 0), 1) + first_unit)


@gluon.constexpr_function
def product_layout(split):
    return gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[split, 1, 1], instr_shape=[1, 16, 8])


@gluon.jit(do_not_specialize=["T", "B"])
def forward(T, B, h_0_ptr, w_ptr, e_ptr, s_ptr, y_ptr, H: gl.constexpr, UNITS: gl.constexpr, SPLIT: gl.constexpr,
            TEXT: gl.constexpr, CONSTRAINTS: gl.constexpr, PACK: gl.constexpr):  # fmt: skip
    """h_0 [B, H], w [3, H, H] by K and unit, e int16, s [T, B, 3, H], y [T, B, H]; a program has UNITS units."""
    dtype: gl.constexpr = y_ptr.dtype.element_ty
    mma: gl.constexpr = product_layout(SPLIT)
    left: gl.constexpr = gl.DotOperandLayout(0, mma, VECTOR)
    right: gl.constexpr = gl.DotOperandLayout(1, mma, VECTOR)
    own: gl.constexpr = gl.BlockedLayout([1, 1], [32 // UNITS, UNITS], [SPLIT, 1], [1, 0])
    spread: gl.constexpr = gl.BlockedLayout([SPLIT, 1, 1], [1, 32 // UNITS, UNITS], [1, SPLIT, 1], [2, 1, 0])
    first = gl.program_id(0) * UNITS
    w = ()
    shared = ()
    for g in gl.static_range(3):
        w = w + (load_weights(w_ptr + g * H * H, first, H, UNITS, SPLIT, right),)
        shared = shared + (
            gl.allocate_shared_memory(gl.float32, [SPLIT, ROWS, UNITS], gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])),
        )
    row_k, k = places(H, SPLIT, left)
    row = gl.expand_dims(gl.arange(0, ROWS, layout=gl.SliceLayout(1, own)), 1)
    unit = gl.expand_dims(gl.arange(0, UNITS, layout=gl.SliceLayout(0, own)), 0) + first
    here = row * H + unit
    mask = row < B
    h_0 = gl.load(h_0_ptr + here, mask=mask, other=0.0)
    publish(e_ptr + here, h_0)  # whatever bits it has
    h = h_0.to(gl.float32)
    zero = gl.zeros([SPLIT, ROWS, UNITS], gl.float32, layout=mma)
    for t in range(T):
        base = e_ptr.to(gl.int64) + gl.zeros([SPLIT, ROWS, H // SPLIT], gl.int64, layout=left)
        seen = gl.inline_asm_elementwise(
            TEXT, CONSTRAINTS, [base, (row_k * H + k) * 2], dtype=gl.int16, is_pure=False, pack=PACK
        )
        a = seen.to(dtype, bitcast=True)
        s = ()
        for g in gl.static_range(3):
            s_g = sigmoid(total(mma_v2(a, w[g], zero), shared[g], own, spread))
            gl.store(s_ptr + ((t.to(gl.int64) * B + row) * 3 + g) * H + unit, s_g, mask=mask)
            s = s + (s_g,)
        h = 0.25 * (h + s[0] + s[1] + s[2])
        e_ptr += ROWS * H
        publish(e_ptr + here, h.to(dtype))
        gl.store(y_ptr + t.to(gl.int64) * B * H + here, h.to(dtype), mask=mask)


@gluon.jit(do_not_specialize=["T", "B"])
def backward(T, B, dy_ptr, s_ptr, w_ptr, e_ptr, dh_0_ptr, H: gl.constexpr, UNITS: gl.constexpr, SPLIT: gl.constexpr,
             TEXT: gl.constexpr, CONSTRAINTS: gl.constexpr, PACK: gl.constexpr):  # fmt: skip
    """dy [T, B, H], s as forward made it, w [3, H, H] transposed, e [T, 3, ROWS, H] int16, dh_0 [B, H] float32."""
    dtype: gl.constexpr = dy_ptr.dtype.element_ty
    mma: gl.constexpr = product_layout(SPLIT)
    left: gl.constexpr = gl.DotOperandLayout(0, mma, VECTOR)
    right: gl.constexpr = gl.DotOperandLayout(1, mma, VECTOR)
    own: gl.constexpr = gl.BlockedLayout([1, 1], [32 // UNITS, UNITS], [SPLIT, 1], [1, 0])
    spread: gl.constexpr = gl.BlockedLayout([SPLIT, 1, 1], [1, 32 // UNITS, UNITS], [1, SPLIT, 1], [2, 1, 0])
    first = gl.program_id(0) * UNITS
    w = ()
    for g in gl.static_range(3):
        w = w + (load_weights(w_ptr + g * H * H, first, H, UNITS, SPLIT, right),)
    shared = gl.allocate_shared_memory(gl.float32, [SPLIT, ROWS, UNITS], gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0]))
    row_k, k = places(H, SPLIT, left)
    row = gl.expand_dims(gl.arange(0, ROWS, layout=gl.SliceLayout(1, own)), 1)
    unit = gl.expand_dims(gl.arange(0, UNITS, layout=gl.SliceLayout(0, own)), 0) + first
    here = row * H + unit
    mask = row < B
    dh = gl.zeros([ROWS, UNITS], gl.float32, layout=own)
    zero = gl.zeros([SPLIT, ROWS, UNITS], gl.float32, layout=mma)
    for visit in range(T):
        t = (T - 1 - visit).to(gl.int64)
        dh += gl.load(dy_ptr + t * B * H + here, mask=mask, other=0.0).to(gl.float32)
        for g in gl.static_range(3):
            s_g = gl.load(s_ptr + ((t * B + row) * 3 + g) * H + unit, mask=mask, other=0.0)
            publish(e_ptr + g * (ROWS * H) + here, (0.25 * dh * s_g * (1.0 - s_g)).to(dtype))
        base = e_ptr.to(gl.int64) + gl.zeros([SPLIT, ROWS, H // SPLIT], gl.int64, layout=left)
        a_0, a_1, a_2 = gl.inline_asm_elementwise(
            TEXT, CONSTRAINTS, [base, (row_k * H + k) * 2], dtype=(gl.int16, gl.int16, gl.int16), is_pure=False,
            pack=PACK,
        )  # fmt: skip
        acc = mma_v2(a_0.to(dtype, bitcast=True), w[0], zero)
        acc = mma_v2(a_1.to(dtype, bitcast=True), w[1], acc)
        acc = mma_v2(a_2.to(dtype, bitcast=True), w[2], acc)
        dh = 0.25 * dh + total(acc, shared, own, spread)
        e_ptr += 3 * ROWS * H
    gl.store(dh_0_ptr + here, dh, mask=mask)


def run(
    w: Tensor, h_0: Tensor, dy: Tensor, units: int = 16, split: int = 2, kernels: Any = None
) -> tuple[Tensor, Tensor]:
    """y and dh_0 of w [3, H, H], h_0 [B, H] and dy [T, B, H], emulated; `kernels` stands for this module."""
    kernels = kernels or __import__(__name__, fromlist=["forward"])
    (T, B, H), dtype = dy.shape, dy.dtype
    rows = ROWS.value
    pack = VECTOR.value
    plane = 2 * rows * H
    texts = [wait_text(1), wait_text(1, 3, plane)]
    emulator.TWINS[texts[0][0]] = wait_twin()
    emulator.TWINS[texts[1][0]] = wait_twin(3, plane)
    sizes = {"H": H, "UNITS": units, "SPLIT": split, "PACK": pack}
    y, s = torch.full((T, B, H), torch.nan, dtype=dtype), torch.full((T, B, 3, H), torch.nan)
    buffer = torch.full((T + 1, rows, H), SENTINEL, dtype=torch.int16)
    grid = (H // units,)
    emulator.emulate(
        kernels.forward, grid, {"T": T, "B": B, "h_0_ptr": h_0, "w_ptr": w, "e_ptr": buffer, "s_ptr": s, "y_ptr": y},
        {**sizes, "TEXT": texts[0][0], "CONSTRAINTS": texts[0][1]}, num_warps=split,
    )  # fmt: skip
    dh_0 = torch.full((B, H), torch.nan)
    buffer = torch.full((T, 3, rows, H), SENTINEL, dtype=torch.int16)
    transposed = w.transpose(1, 2).contiguous()
    emulator.emulate(
        kernels.backward, grid,
        {"T": T, "B": B, "dy_ptr": dy, "s_ptr": s, "w_ptr": transposed, "e_ptr": buffer, "dh_0_ptr": dh_0},
        {**sizes, "TEXT": texts[1][0], "CONSTRAINTS": texts[1][1]}, num_warps=split,
    )  # fmt: skip
    return y, dh_0


def truth(w: Tensor, h_0: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """The same in float64, by autograd."""
    h = first = h_0.double().requires_grad_()
    outputs = []
    for _ in range(len(dy)):
        h = 0.25 * (h + torch.sigmoid(h @ w.double()).sum(0))
        outputs.append(h)
    y = torch.stack(outputs)
    return y.detach(), torch.autograd.grad(y, first, dy.double())[0]
