"""The language of the emulator (tools/emulator): values and functions against torch, and small kernels. Who runs when
is tests/test_scheduler.py's; the layer's kernels run in tests/test_exchange.py.
"""

from __future__ import annotations

import numpy as np
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
from tritongru.tools import emulator
from tritongru.tools.emulator import EmulatorError, KernelError, emulate
from tritongru.tools.emulator.language import FUNCTIONS, bound
from tritongru.tools.emulator.values import POINTERS, RAW, raw, unraw

SIZE = 64
LAYOUT = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))
TWO = gl.constexpr(2)
INT32, FP32, HALVES = torch.int32, torch.float32, (torch.float16, torch.bfloat16)
TYPES = {torch.bool: gl.int1, torch.int8: gl.int8, torch.int16: gl.int16, INT32: gl.int32, torch.int64: gl.int64}
TYPES |= {FP32: gl.float32, torch.float16: gl.float16, torch.bfloat16: gl.bfloat16}

quiet = pytest.mark.filterwarnings("ignore::RuntimeWarning")


# ---- values, and functions of them -----------------------------------------------------------------------------------


def given(x: Tensor) -> emulator.Tensor:
    dtype = TYPES[x.dtype]
    bits = x.numpy() if x.dtype != torch.bfloat16 else x.view(torch.int16).numpy()
    return emulator.Tensor(unraw(bits.view(RAW[dtype]), dtype), dtype)


def assert_computed(found: emulator.Tensor, expected: Tensor, what: object = "") -> None:
    """Bit for bit; a NaN as any other."""
    assert found.dtype == TYPES[expected.dtype], what
    bits = expected.view({1: torch.uint8, 2: torch.int16, 4: INT32, 8: torch.int64}[expected.itemsize]).numpy()
    right = (raw(found.v, found.dtype).view(bits.dtype) == bits) | (expected.isnan().numpy() & (found.v != found.v))
    assert right.all(), (what, found.v[~right], expected[torch.from_numpy(~right)])


def drawn(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    if dtype.is_floating_point:
        return torch.randn(SIZE).to(dtype), torch.randn(SIZE).to(dtype)
    a, b = torch.randint(-40, 40, (SIZE,), dtype=dtype), torch.randint(1, 9, (SIZE,), dtype=dtype)
    a[:2] = torch.tensor([torch.iinfo(dtype).max, torch.iinfo(dtype).min])
    b[:2] = 3  # the least integer by -1 has no quotient
    return a, b * torch.where(torch.arange(SIZE) % 2 == 0, 1, -1).to(dtype)


def divided(x: Tensor, y: Tensor | int) -> Tensor:
    return torch.div(x, y, rounding_mode="trunc")


SAME = [  # for Triton as for torch
    lambda a, b: a + b, lambda a, b: a - b - 3, lambda a, b: a * b * 2, lambda a, b: 1 - a, lambda a, b: -a,
    lambda a, b: (a < b) & (a >= -3), lambda a, b: (a == b) | (b != 3), lambda a, b: (a > 1) ^ (a <= b),
]  # fmt: skip
OF_INTEGERS = [
    lambda a, b: (a ^ 3) | (b & 5) & ~a,
    lambda a, b: a + b.to(gl.int64 if isinstance(b, emulator.Tensor) else torch.int64),
    (lambda a, b: a // b + a // 7, lambda a, b: divided(a, b) + divided(a, 7)),
    (lambda a, b: a % b - a % 7, lambda a, b: torch.fmod(a, b) - torch.fmod(a, 7)),
    (lambda a, b: 100 // b + 100 % b, lambda a, b: divided(b * 0 + 100, b) + torch.fmod(b * 0 + 100, b)),
    (lambda a, b: a * 1.5, lambda a, b: a.float() * 1.5),
]
OF_FLOATS = [
    (lambda a, b: a * 0.1, lambda a, b: a * torch.tensor(0.1).to(a.dtype)),  # a number takes the tensor's type
    (lambda a, b: a / b, lambda a, b: a.float() / b.float()),
    (lambda a, b: (a < b) + 1, lambda a, b: (a < b).int() + 1),
]


@pytest.mark.parametrize("dtype", (INT32, torch.int64, torch.int8, FP32, *HALVES), ids=str)
@quiet
def test_operators(dtype: torch.dtype) -> None:
    """Integers are those of C, floats are rounded as torch rounds them."""
    a, b = drawn(dtype)
    for i, f in enumerate(SAME + (OF_FLOATS if dtype.is_floating_point else OF_INTEGERS)):
        ours, theirs = f if isinstance(f, tuple) else (f, f)
        assert_computed(ours(given(a), given(b)), theirs(a, b), i)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@quiet
def test_casts_round_to_nearest_even_and_bitcasts_keep_bits(dtype: torch.dtype) -> None:
    every = torch.arange(2**16, dtype=INT32).to(torch.int16)
    assert_computed(given(every).to(TYPES[dtype], bitcast=True).to(gl.float32), every.view(dtype).float())
    kept = given(every.view(dtype)).to(gl.int16, bitcast=True)
    assert (kept.v == every.numpy()).all()  # NaNs too
    exact = every.view(dtype).float()
    exact = exact[exact.isfinite()]
    between = [exact * (1 + 2.0**-8), exact * (1 + 2.0**-9), exact * (1 + 2.0**-11 - 2.0**-20)]
    special = torch.tensor([float("inf"), -float("inf"), 3.4e38, -3.4e38, 1e-45, -0.0, float("nan"), 65520.0])
    for x in (exact, *between, special):
        assert_computed(given(x).to(TYPES[dtype]), x.to(dtype))


def test_functions_of_tiles() -> None:
    a, b = torch.randn(16, 32), torch.randn(16, 32)
    a[3, 5] = float("nan")
    x, y = given(a), given(b)
    right = {
        "where": ((x < y, x, 0.5), torch.where(a < b, a, 0.5)),
        "maximum": ((x, y), torch.fmax(a, b)),  # as the instruction has it: the number wins
        "minimum": ((x, 0.5), torch.fmin(a, torch.tensor(0.5))),
        "abs": ((x,), a.abs()),
        "expand_dims": ((x, 1), a[:, None]),
        "reshape": ((x, (4, 4, 32)), a.reshape(4, 4, 32)),
        "permute": ((x, (1, 0)), a.t()),
        "join": ((x, y), torch.stack([a, b], -1)),
        "max": ((y, 1), b.amax(1)),
        "zeros_like": ((x,), torch.zeros_like(a)),
    }
    for name, (arguments, expected) in right.items():
        assert_computed(FUNCTIONS[name](*arguments), expected.contiguous(), name)
    for name, (arguments, expected) in {"sum": ((y, 1), b.sum(1)), "exp": ((x,), a.exp())}.items():
        found = torch.from_numpy(FUNCTIONS[name](*arguments).v)
        torch.testing.assert_close(found, expected, rtol=4e-7, atol=4e-7, equal_nan=True)
    even, odd = FUNCTIONS["split"](y.reshape((16, 16, 2)))
    assert_computed(even - odd, b[:, ::2] - b[:, 1::2])


@pytest.mark.parametrize("dtype", [FP32, *HALVES], ids=str)
def test_products_of_the_tensor_core(dtype: torch.dtype) -> None:
    for batch in ((), (4,)):
        a, b = torch.randn(*batch, 16, 32).to(dtype), torch.randn(*batch, 32, 8).to(dtype)
        found = FUNCTIONS["mma_v2"](given(a), given(b), given(torch.ones(*batch, 16, 8)))
        read = [(x.view(INT32) & ~0x1FFF).view(FP32) if dtype == FP32 else x for x in (a, b)]
        expected = read[0].double() @ read[1].double() + 1
        torch.testing.assert_close(torch.from_numpy(found.v).double(), expected, rtol=1e-5, atol=1e-5)


# ---- kernels ---------------------------------------------------------------------------------------------------------


def run(kernel, arguments: dict, **constants) -> None:
    emulate(kernel, (1, 1, 1), arguments, constants)


@gluon.jit
def masks(a_ptr, b_ptr, n, SIZE: gl.constexpr):
    i = gl.arange(0, SIZE, layout=LAYOUT)
    gl.store(b_ptr + i, gl.load(a_ptr + i, mask=i < n))
    gl.store(b_ptr + SIZE + i, gl.load(a_ptr + i, mask=i < n, other=7))
    gl.store(b_ptr + 2 * SIZE + i, gl.load(a_ptr + i, mask=i < 0, other=i.to(a_ptr.dtype.element_ty)))
    gl.store(b_ptr + 3 * SIZE + i, gl.load(a_ptr + i, mask=i < n, other=0), mask=(i < n) & (i != 1))
    gl.store(b_ptr + 4 * SIZE, gl.load(a_ptr + 2))


@pytest.mark.parametrize("dtype", [FP32, torch.bfloat16, INT32, torch.int8], ids=str)
def test_masked_lanes_touch_no_memory_and_are_poisoned(dtype: torch.dtype) -> None:
    n = 10
    a, b = torch.arange(1, n + 1).to(dtype), torch.zeros(4 * SIZE + 1, dtype=dtype)
    run(masks, {"a_ptr": a, "b_ptr": b, "n": n}, SIZE=SIZE)
    poisoned, filled, others, stored = b[:-1].view(4, SIZE)
    assert torch.equal(poisoned[:n], a) and torch.equal(filled[:n], a)
    assert poisoned[n:].isnan().all() if dtype.is_floating_point else (poisoned[n:] > 40).all()
    assert (filled[n:] == 7).all() and torch.equal(others, torch.arange(SIZE).to(dtype))
    assert stored[:3].tolist() == [1, 0, 3] and not stored[n:].any() and b[-1] == 3


@gluon.jit
def shared_memory(a_ptr, b_ptr, SIZE: gl.constexpr):
    i = gl.arange(0, SIZE, layout=LAYOUT)
    layout: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    shared = gl.allocate_shared_memory(gl.float32, [SIZE], layout, gl.load(a_ptr + i))
    half = shared.slice(SIZE // 2, SIZE // 2)
    half.store(half.load(LAYOUT) * 0.0)
    gl.store(b_ptr + i, shared.load(LAYOUT))
    gl.store(b_ptr + SIZE + i, gl.allocate_shared_memory(gl.float32, [SIZE], layout).load(LAYOUT))


def test_shared_memory() -> None:
    a, b = torch.randn(SIZE), torch.zeros(2, SIZE)
    run(shared_memory, {"a_ptr": a, "b_ptr": b}, SIZE=SIZE)
    assert torch.equal(b[0], a * (torch.arange(SIZE) < SIZE // 2))
    assert b[1].isnan().all()  # fresh: nobody wrote it


@gluon.constexpr_function
def twice(x):
    return 2 * x


@triton.jit
def through_triton(x, y):
    """A function of Triton's own dialect, which calls one of another file."""
    h, r, z, n = gru_gates(x, y, x, y, 0.5)
    return h + gates.sigmoid(r) + tl.maximum(z, n)


@gluon.jit
def calls(a_ptr, b_ptr, c_ptr, n, FLAG: gl.constexpr, SIZE: gl.constexpr, HALF: gl.constexpr = TWO):
    i = gl.arange(0, SIZE, layout=LAYOUT)
    gl.store(b_ptr + i, through_triton(gl.load(a_ptr + i), gl.load(b_ptr + i)))
    half: gl.constexpr = SIZE // HALF
    taken = ()
    for k in gl.static_range(3):
        taken = taken + (k * twice(half),)
    total = 0
    for t in range(1, n, 2):
        total += t.to(gl.int64)  # the loop variable is a tensor
    left = n
    while left > 0:
        left -= 3
    a, b, c = taken
    if FLAG == "twelve" and not (n < 3):
        gl.store(c_ptr, total + a + b + c + len(taken))
    gl.store(c_ptr + 1, left + gl.num_programs(0))


def test_calls_across_dialects_and_files_loops_tuples_and_constants() -> None:
    (a, b), c = drawn(FP32), torch.zeros(2, dtype=torch.int64)
    r, z = torch.sigmoid(a), torch.sigmoid(b)
    n = torch.tanh(a + r * b)
    expected = n + z * (0.5 - n) + torch.sigmoid(r) + torch.maximum(z, n)
    run(calls, {"a_ptr": a, "b_ptr": b, "c_ptr": c, "n": 16}, FLAG=gl.constexpr("twelve"), SIZE=SIZE)
    torch.testing.assert_close(b, expected)
    assert c.tolist() == [64 + 3 * SIZE + 3, -1]


SHARED = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))
MISTAKES = [  # with i = arange(0, 64) and a pointer to floats
    (lambda i, p: gl.histogram(i, 16), "does not know histogram"),
    (lambda i, p: gl.arrange(0, 64), "no attribute 'arrange'"),
    (lambda i, p: gl.arange(0, 63), "powers of 2, got 63"),
    (lambda i, p: gl.expand_dims(i, 1) + i, "their ranks differ"),
    (lambda i, p: gl.load(p + i, mask=gl.expand_dims(i, 1) < 0), "their ranks differ"),
    (lambda i, p: gl.store(p + i, gl.expand_dims(i, 1)), "their ranks differ"),
    (lambda i, p: p + p, "pointer"),
    (lambda i, p: p * 2, "pointer"),
    (lambda i, p: p + 1.5, "pointer"),
    (lambda i, p: gl.store(i, 0), "a pointer is needed"),
    (lambda i, p: gl.load(p + i, mask=i), "a mask must be boolean"),
    (lambda i, p: i.to(gl.float32) & 1, "bitwise_and"),
    (lambda i, p: i + 2**31, "2147483648"),
    (lambda i, p: i.to(gl.float8e5), "float8e5"),
    (lambda i, p: i.to(gl.float16, bitcast=True), "reshape"),
    (lambda i, p: i.to(gl.float32) + None, "NoneType"),
    (lambda i, p: i / i, "true_divide|divide"),
    (lambda i, p: gl.exp(i), "expected dtype fp32, got int32"),
    (lambda i, p: gl.sum(i.to(gl.int8), 0), "reduces no tensor of int8"),
    (lambda i, p: gl.split(i.reshape([16, 4])), "too many values"),
    (lambda i, p: 1 if i > 3 else 2, "ambiguous"),
    (lambda i, p: gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[4, 1]), "instr_shape"),
    (lambda i, p: gl.inline_asm_elementwise("brk;", "=r,r", [i], gl.int32, True, 1), "no twin .*'brk;'"),
    (lambda i, p: gl.allocate_shared_memory(gl.int32, [128], SHARED).store(i), r"is int32\[128\], .* int32\[64\]"),
    (lambda i, p: gl.allocate_shared_memory(gl.int32, [64], SHARED).slice(1, 64), r"slice \[1, 65\) .* \[64\]"),
    (lambda i, p: mma_v2(gl.zeros([16, 8], gl.float32), i, i), "K must be at least 16"),
    (
        lambda i, p: mma_v2(gl.zeros([16, 16], gl.float16), gl.zeros([16, 8], gl.float16), gl.zeros([1], gl.float32)),
        r"must be fp32\[16, 8\], got fp32\[1\]",
    ),
]


@pytest.mark.parametrize(("mistake", "message"), MISTAKES, ids=[message for _, message in MISTAKES])
def test_mistakes(mistake, message: str) -> None:
    with pytest.raises(Exception, match=message):
        bound(mistake)(FUNCTIONS["arange"](0, 64), emulator.Tensor(np.int64(4096), POINTERS[FP32]))


@pytest.mark.parametrize(
    ("error", "match", "arguments"),
    [
        (KernelError, "missing 1 required positional argument: 'SIZE'", {"a_ptr": torch.zeros(1), "b_ptr": None}),
        (KernelError, "unexpected keyword argument 'other'", {"a_ptr": torch.zeros(1), "SIZE": 1, "other": 3}),
        (EmulatorError, "on meta, as a_ptr is", {"a_ptr": torch.zeros(1, device="meta")}),
        (EmulatorError, "complex64 on cpu, as a_ptr is", {"a_ptr": torch.zeros(1) * 1j}),
        (KeyError, "str", {"a_ptr": "text"}),
    ],
)
def test_arguments_that_are_none_of_the_kernels(error: type[Exception], match: str, arguments: dict) -> None:
    with pytest.raises(error, match=match):
        run(shared_memory, arguments)
