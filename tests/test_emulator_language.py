"""The language that kernels find under the emulator (tools/emulator), feature by feature, against torch."""

from __future__ import annotations

import re

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from tritongru.kernels import gates
from tritongru.kernels.gates import gru_gates
from tritongru.tools.emulator import TWINS, EmulatorError, KernelError, emulate

try:
    from triton.language.core import _aggregate as aggregate
except ImportError:
    from triton.language.core import aggregate  # Triton 3.9

pytestmark = pytest.mark.usefixtures("one_thread")

SIZE = 64
HALVES = (torch.float16, torch.bfloat16)
LAYOUT = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))


def run(kernel, arguments: dict, grid=(1,), num_warps: int = 4, **constants) -> None:
    emulate(kernel, grid, arguments, constants, num_warps)


def tensors(*values: Tensor) -> dict[str, Tensor]:
    return {f"{name}_ptr": value for name, value in zip("abcd", values, strict=False)}


def blank(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """What no kernel wrote."""
    return torch.full(shape, 99, dtype=dtype)


def fails(kernel, arguments: dict, match: str, **constants) -> None:
    with pytest.raises(KernelError, match=match):
        run(kernel, arguments, **constants)


# ---- integers --------------------------------------------------------------------------------------------------------


@gluon.jit
def integers(a_ptr, b_ptr, c_ptr, SIZE: gl.constexpr):
    i = gl.arange(0, SIZE, layout=LAYOUT)
    a = gl.load(a_ptr + i)
    b = gl.load(b_ptr + i)
    gl.store(c_ptr + i, a // b)
    gl.store(c_ptr + 1 * SIZE + i, a % b)
    gl.store(c_ptr + 2 * SIZE + i, a // 7 + (100 // b) * 1000)
    gl.store(c_ptr + 3 * SIZE + i, a % 7 - (100 % b) * 1000)
    gl.store(c_ptr + 4 * SIZE + i, (a << 3) ^ (a >> 2) | (b & 5))
    gl.store(c_ptr + 5 * SIZE + i, (~a) - (-b))
    gl.store(c_ptr + 6 * SIZE + i, gl.where((a < b) & (a >= -3) | (a == 7), 1, 0) + gl.where(a != b, 10, 20))
    gl.store(c_ptr + 7 * SIZE + i, gl.minimum(a, b) * 100 + gl.maximum(a, 3))
    gl.store(c_ptr + 8 * SIZE + i, a * 0x10001)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_integers_are_those_of_c(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    a, b = torch.randint(-40, 40, (SIZE,), dtype=dtype), torch.randint(1, 9, (SIZE,), dtype=dtype)
    a[:4] = torch.tensor([2**30, -(2**30), 2**31 - 1, -(2**31)])
    b[:4] = 3  # the least integer by -1 has no quotient
    b = b * torch.where(torch.arange(SIZE) % 2 == 0, 1, -1).to(dtype)
    c = blank(9, SIZE, dtype=dtype)
    run(integers, tensors(a, b, c), SIZE=SIZE)

    def quotient(x, y):
        return torch.div(torch.as_tensor(x), torch.as_tensor(y), rounding_mode="trunc")

    expected = [
        quotient(a, b), torch.fmod(a, b), quotient(a, 7) + quotient(100, b) * 1000,
        torch.fmod(a, 7) - torch.fmod(torch.full_like(b, 100), b) * 1000, (a << 3) ^ (a >> 2) | (b & 5), ~a + b,
        ((a < b) & (a >= -3) | (a == 7)).to(dtype) + torch.where(a != b, 10, 20),
        torch.minimum(a, b) * 100 + a.clamp(min=3), a * 0x10001,
    ]  # fmt: skip
    for found, value in zip(c, expected, strict=True):
        assert torch.equal(found, value.to(dtype))


@gluon.jit
def widths(a_ptr, b_ptr, n, SIZE: gl.constexpr):
    i = gl.arange(0, SIZE, layout=LAYOUT)
    far = gl.program_id(0).to(gl.int64) + n * 2
    gl.store(a_ptr, far)
    gl.store(a_ptr + 1, n * 2)  # 32 bits: wraps
    small = gl.load(b_ptr + i)
    gl.static_assert(small.dtype == gl.int8)
    gl.static_assert((small + i).dtype == gl.int32)
    gl.static_assert((small + 1).dtype == gl.int8)
    gl.static_assert((small + small.to(gl.int64)).dtype == gl.int64)
    gl.static_assert((small / 2).dtype == gl.float32)
    gl.static_assert((i + 1.5).dtype == gl.float32)
    gl.static_assert((i < 3).dtype == gl.int1)
    gl.static_assert(((i < 3) + 1).dtype == gl.int32)
    gl.store(b_ptr + i, small * 2)


def test_widths_of_integers() -> None:
    a, b = torch.zeros(2, dtype=torch.int64), torch.arange(SIZE, dtype=torch.int8) + 60
    run(widths, {**tensors(a, b.clone()), "n": 2**30}, SIZE=SIZE)
    assert a.tolist() == [-(2**31), -(2**31)]
    run(widths, {**tensors(a, given := b.clone()), "n": 2**33}, SIZE=SIZE)
    assert a.tolist() == [2**34, 2**34]
    assert torch.equal(given, b * 2)


# ---- floats ----------------------------------------------------------------------------------------------------------


@gluon.jit
def arithmetic(a_ptr, b_ptr, c_ptr, SIZE: gl.constexpr):
    i = gl.arange(0, SIZE, layout=LAYOUT)
    a = gl.load(a_ptr + i)
    b = gl.load(b_ptr + i)
    gl.static_assert((a + b).dtype == a.dtype)
    gl.static_assert((a * 0.1).dtype == a.dtype)
    gl.static_assert((a / b).dtype == gl.float32)
    gl.store(c_ptr + i, (a + b).to(gl.float32))
    gl.store(c_ptr + SIZE + i, (a * b - b).to(gl.float32))
    gl.store(c_ptr + 2 * SIZE + i, (a * 0.1).to(gl.float32))
    gl.store(c_ptr + 3 * SIZE + i, a / b)
    gl.store(c_ptr + 4 * SIZE + i, (a + b.to(gl.float32)).to(a.dtype).to(gl.float32))
    gl.store(c_ptr + 5 * SIZE + i, (1.0 - a).to(gl.float32))


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_floats_are_rounded_as_torch_rounds_them(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    a, b, c = torch.randn(SIZE).to(dtype), torch.randn(SIZE).to(dtype), blank(6, SIZE)
    run(arithmetic, tensors(a, b, c), SIZE=SIZE)
    wide = b.float()
    tenth = torch.tensor(0.1, dtype=dtype)  # a number takes the tensor's type
    expected = [a + b, a * b - b, a * tenth, a.float() / wide, (a.float() + wide).to(dtype), 1.0 - a]
    for found, value in zip(c, expected, strict=True):
        assert torch.equal(found, value.float())


@gluon.jit
def casts(a_ptr, b_ptr, c_ptr, d_ptr, SIZE: gl.constexpr, DTYPE: gl.constexpr):
    i = gl.arange(0, SIZE, layout=LAYOUT)
    a = gl.load(a_ptr + i)
    gl.store(b_ptr + i, a.to(DTYPE))
    gl.store(c_ptr + i, a.to(DTYPE).to(gl.int16, bitcast=True))
    gl.store(d_ptr + i, gl.load(c_ptr + i).to(DTYPE, bitcast=True).to(gl.float32))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_casts_round_to_nearest_even_and_bitcasts_keep_bits(dtype: torch.dtype) -> None:
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    exact = bits.view(dtype).float()
    exact = exact[exact.isfinite()]
    between = torch.cat([exact, exact * (1 + 2.0**-8), exact * (1 + 2.0**-9), exact * (1 + 2.0**-11 - 2.0**-20)])
    specials = torch.tensor([float("inf"), -float("inf"), 3.4e38, -3.4e38, 1e-45, -0.0, float("nan"), 65520.0])
    a = torch.cat([between, specials])
    a = torch.nn.functional.pad(a, (0, -len(a) % SIZE))
    triton_type = gl.float16 if dtype == torch.float16 else gl.bfloat16
    for part in a.split(2**15):
        if (n := len(part)) != 2**15:
            part = torch.nn.functional.pad(part, (0, 2**15 - n))
        b, c, d = blank(2**15, dtype=dtype), blank(2**15, dtype=torch.int16), blank(2**15)
        run(casts, tensors(part, b, c, d), SIZE=2**15, DTYPE=triton_type)
        expected, real = part.to(dtype), ~part.isnan()
        assert torch.equal(b.view(torch.int16)[real], expected.view(torch.int16)[real])
        assert torch.equal(c[real], expected.view(torch.int16)[real])
        assert torch.equal(d[real], expected.float()[real])
        assert b[~real].isnan().all() and d[~real].isnan().all()


@gluon.jit
def pass_bits(a_ptr, b_ptr, SIZE: gl.constexpr):
    i = gl.arange(0, SIZE, layout=LAYOUT)
    gl.store(b_ptr + i, gl.load(a_ptr + i))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_a_nan_keeps_its_bits_from_load_to_store(dtype: torch.dtype) -> None:
    width = torch.int16 if dtype != torch.float32 else torch.int32
    a, b = torch.full((SIZE,), -1, dtype=width), torch.zeros(SIZE, dtype=width)
    run(pass_bits, tensors(a.view(dtype), b.view(dtype)), SIZE=SIZE)
    assert torch.equal(a, b)


@gluon.jit
def maths(a_ptr, b_ptr, c_ptr, SIZE: gl.constexpr):
    i = gl.arange(0, SIZE, layout=LAYOUT)
    a = gl.load(a_ptr + i)
    b = gl.load(b_ptr + i)
    gl.store(c_ptr + i, gl.exp(a))
    gl.store(c_ptr + SIZE + i, gl.log(gl.abs(a)))
    gl.store(c_ptr + 2 * SIZE + i, gl.fma(a, b, -(a * b)))  # the error of the product, rounded once
    gl.store(c_ptr + 3 * SIZE + i, gl.minimum(gl.maximum(a, b), 0.5))
    gl.store(c_ptr + 4 * SIZE + i, gl.where(i < 2, a, gl.where(i % 2 == 0, b, 1.0)))
    gl.store(c_ptr + 5 * SIZE + i, gl.sqrt(gl.abs(a)))
    gl.store(c_ptr + 6 * SIZE + i, gl.exp2(a))
    gl.store(c_ptr + 7 * SIZE + i, gl.floor(a) + gl.ceil(b))


def test_functions_of_floats() -> None:
    torch.manual_seed(2)
    a, b, c = torch.randn(SIZE), torch.randn(SIZE), blank(8, SIZE)
    a[5] = float("nan")
    run(maths, tensors(a, b, c), SIZE=SIZE)
    i = torch.arange(SIZE)
    exact = (a.double() * b.double() - (a * b).double()).float()
    expected = [a.exp(), a.abs().log(), exact, torch.fmax(a, b).clamp(max=0.5)]
    expected += [torch.where(i < 2, a, torch.where(i % 2 == 0, b, 1.0)), a.abs().sqrt(), a.exp2(), a.floor() + b.ceil()]
    for found, value in zip(c, expected, strict=True):
        torch.testing.assert_close(found, value, rtol=4e-7, atol=0, equal_nan=True)
    assert torch.equal(c[2][6:], exact[6:]) and c[2][6:].abs().max() > 0
    assert not c[3].isnan().any()  # as the instruction has it: the number wins


# ---- shapes ----------------------------------------------------------------------------------------------------------


@gluon.jit
def shapes(a_ptr, b_ptr, M: gl.constexpr, N: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [4, 1], [1, 0])
    m = gl.expand_dims(gl.arange(0, M, layout=gl.SliceLayout(1, layout)), 1)
    n = gl.arange(0, N, layout=gl.SliceLayout(0, layout))[None, :]
    a = gl.load(a_ptr + m * N + n)
    gl.static_assert(a.shape == [M, N])
    at = gl.arange(0, M, layout=gl.SliceLayout(1, layout))
    gl.store(b_ptr + at, gl.sum(a, 1))
    gl.store(b_ptr + M + at, gl.max(a, axis=1))
    gl.store(b_ptr + 2 * M + at, gl.min(a, 1))
    gl.store(b_ptr + 3 * M + at, gl.sum(gl.permute(gl.reshape(a, (M, N // 2, 2)), (0, 2, 1)).reshape(M, N), 1))
    even, odd = gl.split(gl.reshape(a, (M, N // 2, 2)))
    gl.store(b_ptr + 4 * M + at, gl.sum(even - odd, 1))
    gl.store(b_ptr + 5 * M, gl.sum(gl.sum(a, 0), 0))
    gl.store(b_ptr + 5 * M + 1, gl.reduce(gl.ravel(a), 0, larger))
    both = gl.join(even, odd)
    gl.store(b_ptr + 6 * M + at, gl.sum(gl.reshape(both, (M, N)) - a + gl.full([M, N], 2.5, gl.float32, layout), 1))
    zero = gl.zeros([M, N], gl.float32, layout=layout) + gl.zeros_like(a)
    gl.store(b_ptr + 7 * M + at, gl.sum(zero, 1))


@gluon.jit
def larger(x, y):
    return gl.where(x > y, x, y)


def test_shapes_and_reductions() -> None:
    torch.manual_seed(3)
    M, N = 16, 32
    a, b = torch.randn(M, N), blank(8, M)
    run(shapes, tensors(a, b), M=M, N=N)
    even, odd = a[:, ::2], a[:, 1::2]
    expected = [a.sum(1), a.amax(1), a.amin(1), a.sum(1), (even - odd).sum(1)]
    for found, value in zip(b, expected, strict=False):
        torch.testing.assert_close(found, value, rtol=1e-6, atol=1e-5)
    assert abs(b[5, 0] - a.sum()) < 1e-4 and b[5, 1] == a.max()
    assert b[6].tolist() == [2.5 * N] * M and b[7].tolist() == [0.0] * M


@gluon.jit
def sums(a_ptr, b_ptr, SIZE: gl.constexpr):
    a = gl.load(a_ptr + gl.arange(0, SIZE, layout=LAYOUT))
    total = gl.sum(a, 0)
    gl.static_assert(total.dtype == b_ptr.dtype.element_ty)
    gl.store(b_ptr, total)


@pytest.mark.parametrize(
    "of, into", [(torch.int8, torch.int32), (torch.bfloat16, torch.float32), (torch.float16, torch.float16)], ids=str
)
def test_a_sum_is_as_wide_as_triton_makes_it(of: torch.dtype, into: torch.dtype) -> None:
    a, b = torch.full((SIZE,), 101).to(of), torch.zeros(1, dtype=into)
    run(sums, tensors(a, b), SIZE=SIZE)
    assert b.item() == 101 * SIZE


# ---- memory ----------------------------------------------------------------------------------------------------------


@gluon.jit
def masks(a_ptr, b_ptr, n, SIZE: gl.constexpr):
    i = gl.arange(0, SIZE, layout=LAYOUT)
    gl.store(b_ptr + i, gl.load(a_ptr + i, mask=i < n))
    gl.store(b_ptr + SIZE + i, gl.load(a_ptr + i, mask=i < n, other=7))
    gl.store(b_ptr + 2 * SIZE + i, gl.load(a_ptr + i, mask=i < 0, other=i.to(a_ptr.dtype.element_ty)))
    gl.store(b_ptr + 3 * SIZE + i, gl.load(a_ptr + i, mask=i < n, other=0), mask=(i < n) & (i != 1))
    gl.store(b_ptr + 4 * SIZE, gl.load(a_ptr + 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32, torch.int8], ids=str)
def test_masked_lanes_touch_no_memory_and_are_poisoned(dtype: torch.dtype) -> None:
    n = 10
    a, b = torch.arange(1, n + 1).to(dtype), torch.zeros(4 * SIZE + 1, dtype=dtype)
    run(masks, {**tensors(a, b), "n": n}, SIZE=SIZE)
    poisoned, filled, others, stored = b[:-1].view(4, SIZE)
    assert torch.equal(poisoned[:n], a) and torch.equal(filled[:n], a)
    assert poisoned[n:].isnan().all() if dtype.is_floating_point else (poisoned[n:] > 40).all()
    assert (filled[n:] == 7).all() and torch.equal(others, torch.arange(SIZE).to(dtype))
    assert stored[:3].tolist() == [1, 0, 3] and not stored[n:].any() and b[-1] == 3


@gluon.jit
def strided(a_ptr, b_ptr, stride_m, stride_n, M: gl.constexpr, N: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [4, 1], [1, 0])
    m = gl.arange(0, M, layout=gl.SliceLayout(1, layout))[:, None]
    n = gl.arange(0, N, layout=gl.SliceLayout(0, layout))[None, :]
    end = a_ptr + (M - 1) * stride_m + (N - 1) * stride_n  # backwards, from the last element
    base = end.to(gl.int64)  # and by way of an address
    pointers = base.to(gl.pointer_type(a_ptr.dtype.element_ty)) - (m * stride_m + n * stride_n)
    gl.store(b_ptr + m * N + n, gl.load(pointers))


def test_strides_and_pointers_as_integers() -> None:
    a, b = torch.arange(8 * 12.0).view(8, 12)[::2, 1::3], torch.zeros(4, 4)
    run(strided, {**tensors(a, b), "stride_m": a.stride(0), "stride_n": a.stride(1)}, M=4, N=4)
    assert torch.equal(b, a.flip(0, 1))


@gluon.jit
def atomics(a_ptr, b_ptr, SIZE: gl.constexpr):
    i = gl.arange(0, SIZE, layout=LAYOUT)
    gl.store(b_ptr, gl.atomic_add(a_ptr, 5))
    gl.atomic_add(a_ptr + 1 + i % 2, i)  # many elements of a tile to one place
    gl.store(b_ptr + 1, gl.atomic_max(a_ptr + 3, 17))
    gl.store(b_ptr + 2, gl.atomic_cas(a_ptr + 3, 17, 4))
    gl.store(b_ptr + 3, gl.atomic_cas(a_ptr + 3, 17, 5))
    gl.store(b_ptr + 4, gl.atomic_xchg(a_ptr, 9))
    gl.atomic_add(a_ptr + 4, 1, mask=gl.program_id(0) == 1)


def test_atomics() -> None:
    a, b = torch.tensor([3, 0, 0, 2, 0], dtype=torch.int32), torch.zeros(5, dtype=torch.int32)
    run(atomics, tensors(a, b), SIZE=SIZE)
    even = sum(range(0, SIZE, 2))
    assert a.tolist() == [9, even, even + SIZE // 2, 4, 0]
    assert b.tolist() == [3, 2, 17, 4, 8]


# ---- shared memory and products --------------------------------------------------------------------------------------


@gluon.jit
def shared_memory(a_ptr, b_ptr, M: gl.constexpr, N: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [4, 1], [1, 0])
    m = gl.arange(0, M, layout=gl.SliceLayout(1, layout))[:, None]
    n = gl.arange(0, N, layout=gl.SliceLayout(0, layout))[None, :]
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    a = gl.load(a_ptr + m * N + n)
    two = gl.allocate_shared_memory(gl.float32, [2, M, N], flat)
    for i in range(2):
        two.index(i).store(a * (i + 1).to(gl.float32))
    gl.store(b_ptr + m * N + n, two.index(1).load(layout) - two.index(0).load(layout))
    gl.store(b_ptr + M * N + n * M + m, two.index(1).permute((1, 0)).load(layout).trans())
    half = two.index(0).slice(N // 2, N // 2, dim=1)
    half.store(half.load(layout) * 0.0)
    gl.store(b_ptr + 2 * M * N + m * N + n, two.index(0).load(layout))
    filled = gl.allocate_shared_memory(gl.float32, [M, N], flat, a)
    gl.store(b_ptr + 3 * M * N + m * N + n, filled.reshape((N, M)).load(layout).reshape(M, N))
    fresh = gl.allocate_shared_memory(gl.float32, [M, N], flat)
    gl.store(b_ptr + 4 * M * N + m * N + n, fresh.load(layout))


def test_shared_memory() -> None:
    M, N = 16, 32
    a, b = torch.randn(M, N), torch.zeros(5, M * N)
    run(shared_memory, tensors(a, b), M=M, N=N)
    left = torch.cat([a[:, : N // 2], torch.zeros(M, N // 2)], 1)
    for found, value in zip(b[:4], (a, (2 * a).t(), left, a), strict=True):
        assert torch.equal(found, value.flatten())
    assert b[4].isnan().all()  # fresh: nobody wrote it


@gluon.jit
def wrong_shape(SIZE: gl.constexpr):
    shared = gl.allocate_shared_memory(gl.float32, [SIZE], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    shared.store(gl.zeros([SIZE // 2], gl.float32, layout=LAYOUT))


@gluon.jit
def wrong_index(SIZE: gl.constexpr):
    gl.allocate_shared_memory(gl.float32, [2, SIZE], gl.SwizzledSharedLayout(1, 1, 1, [0])).index(2)


def test_shared_memory_has_bounds() -> None:
    fails(wrong_shape, {}, r"fp32\[64\], the value fp32\[32\]", SIZE=SIZE)
    fails(wrong_index, {}, r"index 2 of shared memory of shape \[2, 64\]", SIZE=SIZE)


@gluon.jit
def products(a_ptr, b_ptr, c_ptr, BATCH: gl.constexpr, M: gl.constexpr, K: gl.constexpr, N: gl.constexpr):
    dtype: gl.constexpr = a_ptr.dtype.element_ty
    width: gl.constexpr = 1 if dtype == gl.float32 else 2
    if BATCH == 1:
        mma: gl.constexpr = gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[4, 1], instr_shape=[16, 8])
        left: gl.constexpr = gl.DotOperandLayout(0, mma, width)
        right: gl.constexpr = gl.DotOperandLayout(1, mma, width)
        m = gl.arange(0, M, layout=gl.SliceLayout(1, left))[:, None]
        k = gl.arange(0, K, layout=gl.SliceLayout(0, left))[None, :]
        a = gl.load(a_ptr + m * K + k)
        b = gl.load(b_ptr + k.trans() * N + gl.arange(0, N, layout=gl.SliceLayout(0, right))[None, :])
        acc = mma_v2(a, b, gl.full([M, N], 1.0, gl.float32, layout=mma))
        gl.store(c_ptr + m * N + gl.arange(0, N, layout=gl.SliceLayout(0, mma))[None, :], acc)
    else:
        batch = gl.arange(0, BATCH)[:, None, None]
        m = gl.arange(0, M)[None, :, None]
        k = gl.arange(0, K)
        n = gl.arange(0, N)[None, None, :]
        a = gl.load(a_ptr + (batch * M + m) * K + k[None, None, :])
        b = gl.load(b_ptr + (batch * K + k[None, :, None]) * N + n)
        acc = mma_v2(a, b, gl.full([BATCH, M, N], 1.0, gl.float32))
        gl.store(c_ptr + (batch * M + m) * N + n, acc)


def truncated(x: Tensor) -> Tensor:
    return (x.view(torch.int32) & ~0x1FFF).view(torch.float32)


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_products_of_the_tensor_core(dtype: torch.dtype, batch: int) -> None:
    torch.manual_seed(4)
    M, K, N = 16, 32, 8
    a, b = torch.randn(batch, M, K).to(dtype), torch.randn(batch, K, N).to(dtype)
    c = blank(batch, M, N)
    run(products, tensors(a, b, c), BATCH=batch, M=M, K=K, N=N)
    read = [truncated(x) if dtype == torch.float32 else x for x in (a, b)]
    expected = read[0].double() @ read[1].double() + 1
    torch.testing.assert_close(c.double(), expected, rtol=1e-5, atol=1e-5)
    if dtype == torch.float32:  # who forgot to round to nearest sees it in the error
        rounded = [((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32) for x in (a, b)]
        exact = a.double() @ b.double() + 1
        run(products, tensors(*rounded, c2 := blank(batch, M, N)), BATCH=batch, M=M, K=K, N=N)
        assert (c - exact).norm() > 1.5 * (c2 - exact).norm()


# ---- control, calls, constants ---------------------------------------------------------------------------------------


@gluon.constexpr_function
def twice(x):
    return 2 * x


@gluon.jit
def loops(a_ptr, n, start, FLAG: gl.constexpr, SIZE: gl.constexpr, STEPS: gl.constexpr):
    half: gl.constexpr = SIZE // 2
    taken = ()
    for i in gl.static_range(3):
        gl.static_assert(isinstance(i, gl.constexpr))
        taken = taken + (i * twice(half),)
    total = 0
    for t in range(start, n, 2):
        total += t.to(gl.int64)  # the loop variable is a tensor
    for t in range(STEPS):
        total += t.to(gl.int64)
    left = n
    while left > 0:
        left -= 3
    a, b, c = taken
    gl.store(a_ptr, total + a + b + c + len(taken))
    gl.store(a_ptr + 1, left)
    if FLAG == "twelve" and not (n < 3):
        gl.store(a_ptr + 2, min(n, 12) + max(left, 0))
    gl.store(a_ptr + 3, gl.num_warps() * 100 + gl.num_programs(0) * 10 + gl.num_programs(2))


def test_loops_tuples_and_constants() -> None:
    a = torch.zeros(4, dtype=torch.int64)
    run(loops, {**tensors(a), "n": 16, "start": 1}, num_warps=8, FLAG="twelve", SIZE=SIZE, STEPS=3)
    assert a.tolist() == [64 + 3 + 0 + 64 + 128 + 3, -2, 12, 811]
    constants = {"FLAG": gl.constexpr("no"), "SIZE": gl.constexpr(SIZE), "STEPS": 0}
    emulate(loops, (2, 1, 3), {**tensors(a.zero_()), "n": 16, "start": 17}, constants, 4)
    assert a.tolist() == [195, -2, 0, 423]


@triton.jit
def through_triton(x, y):
    """A function of Triton's own dialect, which calls another and one of another file."""
    h, r, z, n = gru_gates(x, y, x, y, tl.full(x.shape, 0.5, tl.float32))
    return h + gates.sigmoid(r) + tl.zeros(x.shape, tl.float32) + largest(z, n)


@triton.jit
def largest(a, b):
    return tl.maximum(a, b)


@gluon.jit
def calls(a_ptr, b_ptr, c_ptr, SIZE: gl.constexpr, COMBINE: gl.constexpr):
    i = gl.arange(0, SIZE, layout=LAYOUT)
    a = gl.load(a_ptr + i)
    gl.store(c_ptr + i, COMBINE(through_triton(a, gl.load(b_ptr + i)), a))


def test_calls_of_two_levels_across_dialects_and_files() -> None:
    torch.manual_seed(5)
    a, b, c = torch.randn(SIZE), torch.randn(SIZE), blank(SIZE)
    run(calls, tensors(a, b, c), SIZE=SIZE, COMBINE=larger)
    r, z = torch.sigmoid(a), torch.sigmoid(b)
    n = torch.tanh(a + r * b)
    h = n + z * (0.5 - n)
    torch.testing.assert_close(c, torch.maximum(h + torch.sigmoid(r) + torch.maximum(z, n), a))


def test_functions_of_an_enclosing_scope() -> None:
    factor = gl.constexpr(3)

    @gluon.jit
    def scaled(x):
        return x * factor

    @gluon.jit
    def kernel(a_ptr):
        gl.store(a_ptr, scaled(gl.load(a_ptr)))

    a = torch.ones(1)
    run(kernel, tensors(a))
    assert a.item() == 3


@aggregate
class Pair:
    first: gl.tensor
    second: gl.tensor
    weight: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, first, second, weight):
        self.first = first
        self.second = second
        self.weight = gl.constexpr(weight)

    @gluon.jit
    def blended(self):
        return scale(self.first, self.weight) + self.second

    @gluon.jit
    def swapped(self):
        return Pair(self.second, self.first, self.weight)


@gluon.jit
def scale(x, FACTOR: gl.constexpr):
    return x * FACTOR


@gluon.jit
def aggregates(a_ptr, SIZE: gl.constexpr):
    i = gl.arange(0, SIZE, layout=LAYOUT)
    pair = Pair(gl.load(a_ptr + i), gl.full([SIZE], 1.0, gl.float32, LAYOUT), 10)
    gl.store(a_ptr + i, pair.swapped().blended() + pair.blended())


def test_aggregates() -> None:
    a = torch.arange(float(SIZE))
    run(aggregates, tensors(a), SIZE=SIZE)
    assert torch.equal(a, torch.arange(SIZE) * 11.0 + 11)


# ---- inline PTX ------------------------------------------------------------------------------------------------------

HALVE = "shr.u32 $0, $1, 1; // of this test"
DIVIDE = "div.u32 $0, $2, $3; rem.u32 $1, $2, $3; // of this test"


@gluon.jit
def assembly(a_ptr, SIZE: gl.constexpr, HALVE: gl.constexpr, DIVIDE: gl.constexpr):
    i = gl.arange(0, SIZE, layout=LAYOUT)
    half = gl.inline_asm_elementwise(HALVE, "=r,r", [i], dtype=gl.int32, is_pure=True, pack=1)
    quotient, rest = gl.inline_asm_elementwise(
        DIVIDE, "=&r,=&r,r,r", [i, 7], dtype=(gl.int32, gl.int32), is_pure=True, pack=1
    )
    gl.store(a_ptr + i, half * 10000 + quotient * 100 + rest)


def test_twins_of_inline_ptx(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TWINS, HALVE, lambda turn, x, dtype: (x >> 1).to(dtype))
    monkeypatch.setitem(TWINS, DIVIDE, lambda turn, x, y, dtype: (x // y, x % y))
    a, i = torch.zeros(SIZE, dtype=torch.int32), torch.arange(SIZE)
    run(assembly, tensors(a), SIZE=SIZE, HALVE=HALVE, DIVIDE=DIVIDE)
    assert torch.equal(a, (i // 2 * 10000 + i // 7 * 100 + i % 7).int())
    fails(assembly, tensors(a), r"no twin .*'mov.u32 \$0, 1;'", SIZE=SIZE, HALVE="mov.u32 $0, 1;", DIVIDE=DIVIDE)


# ---- what is refused -------------------------------------------------------------------------------------------------


@gluon.jit
def histogram(a_ptr, SIZE: gl.constexpr):
    gl.histogram(gl.arange(0, SIZE, layout=LAYOUT), 16)


@gluon.jit
def misspelt(a_ptr, SIZE: gl.constexpr):
    gl.arrange(0, SIZE)


@gluon.jit
def odd_size(a_ptr, SIZE: gl.constexpr):
    gl.arange(0, SIZE - 1, layout=LAYOUT)


@gluon.jit
def false_assertion(a_ptr, SIZE: gl.constexpr):
    gl.static_assert(SIZE == 3, "three are needed")


@gluon.jit
def mixed_ranks(a_ptr, SIZE: gl.constexpr):
    i = gl.arange(0, SIZE, layout=LAYOUT)
    i[:, None] + i


@gluon.jit
def two_pointers(a_ptr, SIZE: gl.constexpr):
    a_ptr + a_ptr


@gluon.jit
def half_exponential(a_ptr, SIZE: gl.constexpr):
    gl.exp(gl.zeros([SIZE], gl.bfloat16, layout=LAYOUT))


@gluon.jit
def vague_branch(a_ptr, SIZE: gl.constexpr):
    if gl.arange(0, SIZE, layout=LAYOUT) > 3:
        pass


@gluon.jit
def bad_layout(a_ptr, SIZE: gl.constexpr):
    gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[4, 1])


@pytest.mark.parametrize(
    "kernel, message",
    [
        (histogram, "does not know .*histogram"),
        (misspelt, "no 'arrange'"),
        (odd_size, r"powers of 2, got \[63\]"),
        (false_assertion, "three are needed"),
        (mixed_ranks, "their ranks differ"),
        (two_pointers, "pointer"),
        (half_exponential, "expected dtype fp32 or fp64, got bf16"),
        (vague_branch, "decides no branch"),
        (bad_layout, "instr_shape"),
    ],
    ids=lambda value: getattr(getattr(value, "fn", None), "__name__", ""),
)
def test_mistakes_are_named_with_their_line(kernel, message: str) -> None:
    with pytest.raises(KernelError) as caught:
        run(kernel, tensors(torch.zeros(1)), SIZE=SIZE)
    text = str(caught.value)
    assert re.search(message, text), text
    start = kernel.fn.__code__.co_firstlineno
    line = int(re.search(rf"test_emulator_language.py:(\d+) in {kernel.fn.__name__}", text)[1])
    assert start < line <= start + 4 and "program (0, 0, 0)" in text


def test_arguments_that_are_none_of_the_kernels() -> None:
    with pytest.raises(TypeError, match="missing a required argument: 'SIZE'"):
        run(histogram, tensors(torch.zeros(1)))
    with pytest.raises(TypeError, match="unexpected keyword argument 'other'"):
        run(histogram, {**tensors(torch.zeros(1)), "other": 3}, SIZE=SIZE)
    with pytest.raises(EmulatorError, match="a_ptr is on meta"):
        run(histogram, tensors(torch.zeros(1, device="meta")), SIZE=SIZE)
    with pytest.raises(EmulatorError, match="complex64, the type of a_ptr"):
        run(histogram, tensors(torch.zeros(1, dtype=torch.complex64)), SIZE=SIZE)
    with pytest.raises(EmulatorError, match="a_ptr is str"):
        run(histogram, {"a_ptr": "text"}, SIZE=SIZE)
