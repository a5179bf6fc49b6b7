"""The language of the emulator (tools/emulator): values and functions against torch, and small kernels. Who runs when
is tests/test_scheduler.py's; the layer's kernels run in tests/test_exchange.py.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from tritongru.kernels import gates
from tritongru.kernels.gates import gru_gates
from tritongru.tools import emulator
from tritongru.tools.emulator import EmulatorError, KernelError, emulate
from tritongru.tools.emulator.language import FUNCTIONS
from tritongru.tools.emulator.values import RAW, raw, unraw

try:
    from triton.language.core import _aggregate as aggregate
except ImportError:
    from triton.language.core import aggregate  # Triton 3.9

pytestmark = pytest.mark.usefixtures("one_thread")

SIZE = 64
LAYOUT = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))
INT32, FP32, HALVES = torch.int32, torch.float32, (torch.float16, torch.bfloat16)
TYPES = {torch.bool: gl.int1, torch.int8: gl.int8, torch.int16: gl.int16, INT32: gl.int32, torch.int64: gl.int64}
TYPES |= {FP32: gl.float32, torch.float16: gl.float16, torch.bfloat16: gl.bfloat16}


# ---- values, and functions of them -----------------------------------------------------------------------------------


def given(x: Tensor) -> emulator.Tensor:
    dtype = TYPES[x.dtype]
    bits = x.numpy() if x.dtype != torch.bfloat16 else x.view(torch.int16).numpy()
    return emulator.Tensor(unraw(bits.view(RAW[dtype]), dtype), dtype)


def bits(x: Tensor) -> np.ndarray:
    return x.view({1: torch.uint8, 2: torch.int16, 4: INT32, 8: torch.int64}[x.element_size()]).numpy()


def assert_computed(found: emulator.Tensor, expected: Tensor, exactly: bool = True) -> None:
    """Bit for bit; a NaN as any other. Else to the last bits."""
    assert found.dtype == TYPES[expected.dtype]
    if exactly:
        nan = expected.isnan().numpy()
        right = (raw(found.v, found.dtype).view(bits(expected).dtype) == bits(expected)) | (nan & (found.v != found.v))
        assert right.all(), (found.v[~right], expected[torch.from_numpy(~right)])
    else:
        torch.testing.assert_close(torch.from_numpy(np.array(found.v)), expected, rtol=4e-7, atol=4e-7, equal_nan=True)


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


SAME = {  # for Triton as for torch
    "sum": lambda a, b: a + b, "difference": lambda a, b: a - b - 3, "product": lambda a, b: a * b * 2,
    "from a number": lambda a, b: 1 - a, "sign": lambda a, b: -a, "comparisons": lambda a, b: (a < b) & (a >= -3),
    "equality": lambda a, b: (a == b) | (b != 3), "greater": lambda a, b: (a > 1) ^ (a <= b),
}  # fmt: skip
OF_INTEGERS = {
    "bits": lambda a, b: (a << 3) ^ (a >> 2) | (b & 5) & ~a,
    "quotient": (lambda a, b: a // b + a // 7, lambda a, b: divided(a, b) + divided(a, 7)),
    "remainder": (lambda a, b: a % b - a % 7, lambda a, b: torch.fmod(a, b) - torch.fmod(a, 7)),
    "of a number": (lambda a, b: 100 // b + 100 % b, lambda a, b: divided(b * 0 + 100, b) + torch.fmod(b * 0 + 100, b)),
    "division": (lambda a, b: a / b, lambda a, b: a.float() / b.float()),
    "with a float": (lambda a, b: a * 1.5, lambda a, b: a.float() * 1.5),
    "wider": lambda a, b: a + b.to(gl.int64 if isinstance(b, emulator.Tensor) else torch.int64),
}
OF_FLOATS = {
    "a number": (lambda a, b: a * 0.1, lambda a, b: a * torch.tensor(0.1).to(a.dtype)),  # takes the tensor's type
    "division": (lambda a, b: a / b, lambda a, b: a.float() / b.float()),
    "truth": (lambda a, b: (a < b) + 1, lambda a, b: (a < b).int() + 1),
}
OPERATORS = [
    pytest.param(dtype, f, id=f"{dtype}-{name}")
    for dtype in (INT32, torch.int64, torch.int8, FP32, *HALVES)
    for name, f in {**SAME, **(OF_FLOATS if dtype.is_floating_point else OF_INTEGERS)}.items()
]


@pytest.mark.parametrize(("dtype", "f"), OPERATORS)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_operators(dtype: torch.dtype, f) -> None:
    """Integers are those of C, floats are rounded as torch rounds them."""
    a, b = drawn(dtype)
    ours, theirs = f if isinstance(f, tuple) else (f, f)
    assert_computed(ours(given(a), given(b)), theirs(a, b))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
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


@pytest.mark.parametrize("name", ["exp", "exp2", "log", "log2", "sin", "cos", "sqrt", "rsqrt", "floor", "ceil", "tanh"])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_functions_of_floats(name: str) -> None:
    a, _ = drawn(FP32)
    assert_computed(FUNCTIONS[name](given(a)), getattr(torch, name)(a), exactly=False)
    with pytest.raises(ValueError, match="expected dtype fp32 or fp64, got bf16"):
        FUNCTIONS[name](given(a.bfloat16()))


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
        "trans": ((x,), a.t()),
        "broadcast_to": ((x[:, None], [16, 8, 32]), a[:, None].expand(16, 8, 32)),
        "join": ((x, y), torch.stack([a, b], -1)),
        "max": ((y, 1), b.amax(1)),
        "min": ((y, 0), b.amin(0)),
        "cast": ((y, gl.int32), b.int()),
        "zeros_like": ((x,), torch.zeros_like(a)),
        "full": (([4, 2], 2.5, gl.float16), torch.full((4, 2), 2.5, dtype=torch.float16)),
    }
    for name, (arguments, expected) in right.items():
        assert_computed(FUNCTIONS[name](*arguments), expected.contiguous())
    assert_computed(FUNCTIONS["sum"](y, 1), b.sum(1), exactly=False)
    even, odd = y.reshape(16, 16, 2).split()
    assert_computed(even - odd, b[:, ::2] - b[:, 1::2])


@pytest.mark.parametrize(
    ("of", "into"), [(torch.int8, INT32), (torch.bfloat16, FP32), (torch.float16, torch.float16)], ids=str
)
def test_a_sum_is_as_wide_as_triton_makes_it(of: torch.dtype, into: torch.dtype) -> None:
    assert_computed(given(torch.full((SIZE,), 101).to(of)).sum(0), torch.tensor(101 * SIZE, dtype=into))


@pytest.mark.parametrize("batch", [(), (4,)], ids=["one", "batch"])
@pytest.mark.parametrize("dtype", [FP32, *HALVES], ids=str)
def test_products_of_the_tensor_core(dtype: torch.dtype, batch: tuple[int, ...]) -> None:
    a, b = torch.randn(*batch, 16, 32).to(dtype), torch.randn(*batch, 32, 8).to(dtype)
    one = given(torch.ones(*batch, 16, 8))

    def product(a: Tensor, b: Tensor) -> Tensor:
        return torch.from_numpy(FUNCTIONS["mma_v2"](given(a), given(b), one).v).double()

    read = [(x.view(INT32) & ~0x1FFF).view(FP32) if dtype == FP32 else x for x in (a, b)]
    torch.testing.assert_close(product(a, b), read[0].double() @ read[1].double() + 1, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="K must be at least 16"):
        FUNCTIONS["mma_v2"](given(a[..., :8]), given(b[..., :8, :]), one)


# ---- kernels ---------------------------------------------------------------------------------------------------------


def run(kernel, arguments: dict, grid=(1,), num_warps: int = 4, **constants) -> None:
    emulate(kernel, grid, arguments, constants, num_warps)


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
    two = gl.allocate_shared_memory(gl.float32, [2, SIZE], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    two.index(0).store(gl.load(a_ptr + i))
    half = two.index(0).slice(SIZE // 2, SIZE // 2)
    half.store(half.load(LAYOUT) * 0.0)
    gl.store(b_ptr + i, two.index(0).load(LAYOUT))
    gl.store(b_ptr + SIZE + i, two.index(1).load(LAYOUT))


def test_shared_memory() -> None:
    a, b = torch.randn(SIZE), torch.zeros(2, SIZE)
    run(shared_memory, {"a_ptr": a, "b_ptr": b}, SIZE=SIZE)
    assert torch.equal(b[0], a * (torch.arange(SIZE) < SIZE // 2))
    assert b[1].isnan().all()  # fresh: nobody wrote it


@gluon.constexpr_function
def twice(x):
    return 2 * x


@gluon.jit
def loops(a_ptr, n, FLAG: gl.constexpr, SIZE: gl.constexpr):
    half: gl.constexpr = SIZE // 2
    taken = ()
    for i in gl.static_range(3):
        taken = taken + (i * twice(half),)
    total = 0
    for t in range(1, n, 2):
        total += t.to(gl.int64)  # the loop variable is a tensor
    left = n
    while left > 0:
        left -= 3
    a, b, c = taken
    gl.store(a_ptr, total + a + b + c + len(taken))
    if FLAG == "twelve" and not (n < 3):
        gl.store(a_ptr + 1, min(n, 12) + max(left, 0))
    gl.store(a_ptr + 2, gl.num_warps() * 100 + gl.num_programs(0) * 10 + gl.num_programs(2))


@pytest.mark.parametrize(
    ("flag", "found"), [("twelve", [64 + 3 * SIZE + 3, 12, 823]), (gl.constexpr("no"), [259, 0, 823])]
)
def test_loops_tuples_and_constants(flag, found: list[int]) -> None:
    a = torch.zeros(3, dtype=torch.int64)
    run(loops, {"a_ptr": a, "n": 16}, (2, 1, 3), num_warps=8, FLAG=flag, SIZE=SIZE)
    assert a.tolist() == found


@triton.jit
def through_triton(x, y):
    """A function of Triton's own dialect, which calls another and one of another file."""
    h, r, z, n = gru_gates(x, y, x, y, tl.full(x.shape, 0.5, tl.float32))
    return h + gates.sigmoid(r) + tl.zeros(x.shape, tl.float32) + largest(z, n)


@triton.jit
def largest(a, b):
    return tl.maximum(a, b)


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
        return self.first * self.weight + self.second

    @gluon.jit
    def swapped(self):
        return Pair(self.second, self.first, self.weight)


@gluon.jit
def calls(a_ptr, b_ptr, c_ptr, SIZE: gl.constexpr, COMBINE: gl.constexpr):
    i = gl.arange(0, SIZE, layout=LAYOUT)
    a = gl.load(a_ptr + i)
    gl.store(c_ptr + i, COMBINE(through_triton(a, gl.load(b_ptr + i)), a))
    pair = Pair(a, gl.full([SIZE], 1.0, gl.float32, LAYOUT), 10)
    gl.store(b_ptr + i, pair.swapped().blended() + pair.blended())


def test_calls_across_dialects_and_files_closures_and_aggregates() -> None:
    factor = gl.constexpr(3)

    @gluon.jit
    def combine(x, y):
        return largest(x, y) * factor

    (a, b), c = drawn(FP32), torch.zeros(SIZE)
    r, z = torch.sigmoid(a), torch.sigmoid(b)
    n = torch.tanh(a + r * b)
    h = n + z * (0.5 - n)
    run(calls, {"a_ptr": a, "b_ptr": b, "c_ptr": c}, SIZE=SIZE, COMBINE=combine)
    torch.testing.assert_close(c, 3 * torch.maximum(h + torch.sigmoid(r) + torch.maximum(z, n), a))
    torch.testing.assert_close(b, 11 * a + 11)


@gluon.jit
def mistakes(a_ptr, SIZE: gl.constexpr, WHICH: gl.constexpr):
    i = gl.arange(0, SIZE, layout=LAYOUT)
    if WHICH == "histogram":
        gl.histogram(i, 16)
    if WHICH == "arrange":
        gl.arrange(0, SIZE)
    if WHICH == "size":
        gl.arange(0, SIZE - 1, layout=LAYOUT)
    if WHICH == "assertion":
        gl.static_assert(SIZE == 3, "three are needed")
    if WHICH == "ranks":
        i[:, None] + i
    if WHICH == "pointers":
        a_ptr + a_ptr
    if WHICH == "branch" and i > 3:
        pass
    if WHICH == "mask":
        gl.load(a_ptr + i, mask=i)
    if WHICH == "layout":
        gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[4, 1])
    if WHICH == "assembly":
        gl.inline_asm_elementwise("brk;", "=r,r", [i], dtype=gl.int32, is_pure=True, pack=1)
    if WHICH == "shape":
        gl.allocate_shared_memory(gl.int32, [2 * SIZE], gl.SwizzledSharedLayout(1, 1, 1, [0])).store(i)
    if WHICH == "index":
        gl.allocate_shared_memory(gl.int32, [2, SIZE], gl.SwizzledSharedLayout(1, 1, 1, [0])).index(2)


MISTAKES = {
    "histogram": "does not know .*histogram", "arrange": "no 'arrange'", "size": r"powers of 2, got \[63\]",
    "assertion": "three are needed", "ranks": "their ranks differ", "pointers": "pointer", "layout": "instr_shape",
    "branch": "decides no branch", "assembly": "no twin .*'brk;'", "index": r"index 2 of shared memory of shape \[2, ",
    "mask": "a mask must be boolean", "shape": r"is int32\[128\], the value int32\[64\]",
}  # fmt: skip


@pytest.mark.parametrize("which", MISTAKES)
def test_mistakes_are_named_with_their_line(which: str) -> None:
    with pytest.raises(KernelError, match=MISTAKES[which]) as caught:
        run(mistakes, {"a_ptr": torch.zeros(1)}, SIZE=SIZE, WHICH=which)
    line = int(re.search(r"(?s)program \(0, 0, 0\).*test_emulator.py:(\d+) in mistakes", str(caught.value))[1])
    text = Path(__file__).read_text().splitlines()
    assert any(f'WHICH == "{which}"' in text[at] for at in (line - 1, line - 2))


def test_arguments_that_are_none_of_the_kernels() -> None:
    def refused(error: type[Exception], match: str, arguments: dict, **constants) -> None:
        with pytest.raises(error, match=match):
            run(mistakes, arguments, WHICH="", **constants)

    refused(TypeError, "missing a required argument: 'SIZE'", {"a_ptr": torch.zeros(1)})
    refused(TypeError, "unexpected keyword argument 'other'", {"a_ptr": torch.zeros(1), "other": 3}, SIZE=SIZE)
    refused(EmulatorError, "a_ptr is on meta", {"a_ptr": torch.zeros(1, device="meta")}, SIZE=SIZE)
    refused(EmulatorError, "complex64, the type of a_ptr", {"a_ptr": torch.zeros(1) * 1j}, SIZE=SIZE)
    refused(EmulatorError, "a_ptr is str", {"a_ptr": "text"}, SIZE=SIZE)
