"""What the card does at most, and waits at least: `Ceilings`, measured by small kernels, none of which is a GRU.

Each figure comes from a kernel that does one thing, whose result is compared with what it must be, so that nothing was
optimised away. The best of several runs counts: a ceiling is what the card can do, not what it does on average. Where a
figure cannot be measured (a wrong result; inline PTX on AMD) its row says why, and there is no limit (limit.py).

    clock_ghz               %clock64 over %globaltimer while one program runs: the highest, other loads may lower it
    l2_read_tb_s            all SMs read the same few megabytes of L2 again and again, past L1
    l2_bytes_per_clock      one program does
    l2_round_trip_ns        a chain of loads, each from where the one before says, over more than one half of L2, which
                            has two partitions
    dram_tb_s               all SMs read eight times the size of L2, in turn; what of it L2 keeps makes it too high, by
                            an eighth at most
    half_, tf32_, fma_tflops  torch.matmul of large square matrices of ones, which takes less power than other values do
    mma_share               tl.dot of tiles of 16 rows, operands on chip, over half_tflops
    shared_bytes_per_clock  all warps of one program read shared memory, 16 bytes a thread
    graph_us, stream_us     from one small kernel to the next, which needs its result: in a CUDA graph, and launched one
                            by one (whichever of host and device takes longer)
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tritongru.planning.devices import Device, of_cuda

from .limit import Ceilings
from .results import CEILINGS, CEILINGS_COLUMNS, UNKNOWN, Environment, ResultsFile, read
from .timing import captured

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("the card's ceilings are measured by Triton kernels: pip install 'tritongru[triton]'") from error


UNITS = {
    "sms": "", "clock_ghz": "GHz", "l2_read_tb_s": "TB/s", "l2_bytes_per_clock": "bytes", "l2_round_trip_ns": "ns",
    "dram_tb_s": "TB/s", "half_tflops": "Tflop/s", "tf32_tflops": "Tflop/s", "fma_tflops": "Tflop/s", "mma_share": "",
    "graph_us": "us", "stream_us": "us", "shared_bytes_per_clock": "bytes",
}  # fmt: skip
TIMES = 5  # runs, of which the best counts

READ_BLOCK, READ_WARPS = 16384, 32  # int32 of a program's chunk: four 16-byte loads of each thread are under way
LINE = 32  # int32 of a cache line
MMA_TILE = (16, 128, 64)  # rows, columns, reduced
PER_ROUND = tl.constexpr(16)  # products
KERNELS = 200  # small ones in a row
# 16 bytes of shared memory for each thread of a program of 1024, in an array that only this text knows: zeroed, and its
# address. Loads that are volatile are neither merged nor taken out of a loop.
ZEROED = tl.constexpr("""{ .shared .align 16 .b8 tile[16384]; .reg .u32 start, zero;
    mov.u32 start, tile; mov.u32 zero, 0;
    and.b32 $0, $1, 1023; shl.b32 $0, $0, 4; add.u32 $0, $0, start;
    st.volatile.shared.v4.u32 [$0], {zero, zero, zero, zero}; }""")
READ_4 = tl.constexpr("""{ .reg .u32 a<4>, b<4>, c<4>, d<4>; .reg .pred none;
    ld.volatile.shared.v4.u32 {a0, a1, a2, a3}, [$1]; ld.volatile.shared.v4.u32 {b0, b1, b2, b3}, [$1];
    ld.volatile.shared.v4.u32 {c0, c1, c2, c3}, [$1]; ld.volatile.shared.v4.u32 {d0, d1, d2, d3}, [$1];
    or.b32 a0, a0, b1; or.b32 c2, c2, d3; or.b32 a0, a0, c2; setp.eq.u32 none, a0, 0; selp.u32 $0, 4, 0, none; }""")
CLOCKS = tl.constexpr("{ .reg .u32 after; mov.u32 after, $1; mov.u64 $0, %clock64; }")
NANOSECONDS = tl.constexpr("{ .reg .u32 after; mov.u32 after, $1; mov.u64 $0, %globaltimer; }")


@triton.jit(do_not_specialize=["repeats", "chunks"])
def read_repeatedly(x_ptr, sums_ptr, repeats, chunks, BLOCK: tl.constexpr):
    """sums[program] = what a program read of x [chunks, BLOCK] in `repeats` rounds, modulo 2^32: every round its share
    of the chunks, a neighbour's the next round, so that L1 would not help even if it were not passed by."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    offsets = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.int32)
    for repeat in range(repeats):
        chunk = (program + repeat) % programs
        while chunk < chunks:
            total += tl.load(x_ptr + chunk.to(tl.int64) * BLOCK + offsets, cache_modifier=".cg")
            chunk += programs
    tl.store(sums_ptr + program, tl.sum(total))


@triton.jit(do_not_specialize=["steps"])
def chase(next_ptr, end_ptr, steps):
    """end[0] = where a chain of `steps` loads leads from 0."""
    at = 0
    for _ in range(steps):
        at = tl.load(next_ptr + at, cache_modifier=".cg")
    tl.store(end_ptr, at)


@triton.jit(do_not_specialize=["repeats"])
def multiply_repeatedly(a_ptr, b_ptr, c_ptr, repeats, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    """c[program] = repeats * PER_ROUND * a b, with a [M, K] and b [K, N] loaded once."""
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    a = tl.load(a_ptr + m[:, None] * K + k[None, :])
    b = tl.load(b_ptr + k[:, None] * N + n[None, :])
    c = tl.zeros([M, N], tl.float32)
    for _ in range(repeats):
        for _ in tl.static_range(PER_ROUND):  # the compiler loads operands from shared memory anew in each round
            c = tl.dot(a, b, c)
    tl.store(c_ptr + (tl.program_id(0) * M + m[:, None]) * N + n[None, :], c)


@triton.jit(do_not_specialize=["repeats"])
def read_shared(counts_ptr, repeats, THREADS: tl.constexpr):
    """counts[thread] = how many of its 16-byte reads of zeroed shared memory found zeros: four in each round."""
    thread = tl.arange(0, THREADS)
    at = tl.inline_asm_elementwise(ZEROED, "=r,r", [thread], dtype=tl.int32, is_pure=False, pack=1)
    count = tl.zeros([THREADS], tl.int32)
    for _ in range(repeats):
        count += tl.inline_asm_elementwise(READ_4, "=r,r", [at], dtype=tl.int32, is_pure=False, pack=1)
    tl.store(counts_ptr + thread, count)


@triton.jit
def special(REGISTER: tl.constexpr, after):
    """A 64-bit special register, not read before `after` is known."""
    return tl.inline_asm_elementwise(REGISTER, "=l,r", [after], dtype=tl.int64, is_pure=False, pack=1)


@triton.jit(do_not_specialize=["steps"])
def clock(next_ptr, out_ptr, steps):
    """out = clocks and nanoseconds that a chain of `steps` loads took, and its end."""
    at = 0
    clocks, nanoseconds = special(CLOCKS, at), special(NANOSECONDS, at)
    for _ in range(steps):
        at = tl.load(next_ptr + at, cache_modifier=".cg")
    tl.store(out_ptr, special(CLOCKS, at) - clocks)
    tl.store(out_ptr + 1, special(NANOSECONDS, at) - nanoseconds)
    tl.store(out_ptr + 2, at.to(tl.int64))


@triton.jit
def increment(x_ptr, BLOCK: tl.constexpr):
    """x += 1: what the next of its kind has to wait for."""
    at = x_ptr + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(at, tl.load(at) + 1)


class WrongResultError(ArithmeticError):
    """A micro-benchmark did not compute what it must, so that its time says nothing."""


def _expect(found: Tensor, expected: int, what: str) -> None:
    if not bool((found == expected).all()):
        raise WrongResultError(f"{what} is not what it must be: what was timed is not what was meant")


class Card:
    """The micro-benchmarks on one CUDA device; each returns its figure, or raises."""

    def __init__(self, device: Device, index: int):
        self.device = device
        self.where = torch.device("cuda", index)
        self.l2_bytes = device.l2_bytes or 32 << 20

    def seconds(self, call: Callable[..., object], *arguments: int) -> float:
        """The shortest of several runs by events on the stream, after one that is not counted."""
        found = []
        for _ in range(TIMES + 1):  # the first also compiles, and wakes the clock
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize(self.where)
            begin.record()
            call(*arguments)
            end.record()
            end.synchronize()
            found.append(begin.elapsed_time(end) / 1e3)
        return min(found[1:])

    def _read(self, size: int, repeats: int, programs: int) -> float:
        """Bytes per second of `read_repeatedly` over x of about so many bytes."""
        chunks = max(size // (4 * READ_BLOCK * programs), 1) * programs
        x = torch.ones(chunks * READ_BLOCK, dtype=torch.int32, device=self.where)
        sums = torch.zeros(programs, dtype=torch.int32, device=self.where)

        def call(rounds: int) -> None:
            read_repeatedly[(programs,)](x, sums, rounds, chunks, BLOCK=READ_BLOCK, num_warps=READ_WARPS, num_stages=1)

        short, long = (self.seconds(call, rounds) for rounds in (repeats, 3 * repeats))
        expected = 3 * repeats * chunks // programs * READ_BLOCK
        _expect(sums.to(torch.int64) & 0xFFFFFFFF, expected & 0xFFFFFFFF, "the sum of what was read")
        return 4 * READ_BLOCK * chunks * 2 * repeats / (long - short)  # what the launch takes is in both

    def _chain(self, size: int) -> tuple[Tensor, int, int]:
        """Indices, one cycle from 0 through an element of every line of `size` bytes, in a random order; how many lines
        these are, and the last of them."""
        count = size // (4 * LINE)
        lines = LINE * torch.cat((torch.zeros(1, dtype=torch.int64), 1 + torch.randperm(count - 1)))
        links = torch.zeros(count * LINE, dtype=torch.int32)
        links[lines] = lines.roll(-1).to(torch.int32)
        return links.to(self.where), count, int(lines[-1])

    def _needs_ptx(self) -> None:
        """Raises where inline PTX cannot be compiled, before LLVM ends the process for it."""
        if self.device.vendor != "nvidia":
            raise RuntimeError(f"it takes inline PTX, which {self.device.vendor}'s compiler does not know")

    def clock_ghz(self) -> float:
        self._needs_ptx()
        links, lines, last = self._chain(1 << 18)
        out = torch.zeros(3, dtype=torch.int64, device=self.where)
        for _ in range(TIMES):  # the first ones wake the clock
            clock[(1,)](links, out, 20 * lines - 1, num_warps=1)
        clocks, nanoseconds, end = out.tolist()
        _expect(torch.tensor(end), last, "where the chain of loads ends")
        return float(clocks / nanoseconds)

    def l2_round_trip_ns(self) -> float:
        links, lines, last = self._chain(self.l2_bytes * 3 // 5)
        end = torch.zeros(1, dtype=torch.int32, device=self.where)
        # The first run, which is not counted, brings the lines into L2.
        seconds = self.seconds(lambda: chase[(1,)](links, end, lines - 1, num_warps=1))
        _expect(end, last, "where the chain of loads ends")
        return seconds / (lines - 1) * 1e9

    def l2_read_tb_s(self) -> float:
        return self._read(self.l2_bytes // 4, 40, self.device.sms) / 1e12

    def l2_bytes_per_clock(self, clock_ghz: float) -> float:
        return self._read(self.l2_bytes // 16, 4, 1) / (1e9 * clock_ghz)

    def dram_tb_s(self) -> float:
        return self._read(8 * self.l2_bytes, 1, self.device.sms) / 1e12

    def _matmul_tflops(self, dtype: torch.dtype, size: int, precision: str | None = None) -> float:
        matmul = torch.backends.cuda.matmul
        before = matmul.fp32_precision
        a = torch.ones(size, size, dtype=dtype, device=self.where)
        if precision:
            matmul.fp32_precision = precision
        try:
            seconds = self.seconds(lambda: a @ a)
            product = a @ a
        finally:
            matmul.fp32_precision = before
        _expect(product, size, "the product")
        return 2 * size**3 / seconds / 1e12

    def half_tflops(self) -> float:
        return self._matmul_tflops(torch.float16, 8192)

    def tf32_tflops(self) -> float:
        return self._matmul_tflops(torch.float32, 8192, "tf32")

    def fma_tflops(self) -> float:
        return self._matmul_tflops(torch.float32, 4096, "ieee")

    def mma_share(self, half_tflops: float) -> float:
        M, N, K = MMA_TILE
        programs, repeats = 4 * self.device.sms, 200
        a, b = (torch.ones(shape, dtype=torch.float16, device=self.where) for shape in ((M, K), (K, N)))
        c = torch.zeros(programs, M, N, device=self.where)

        def call(rounds: int) -> None:
            multiply_repeatedly[(programs,)](a, b, c, rounds, M=M, N=N, K=K, num_warps=4)

        short, long = (self.seconds(call, rounds) for rounds in (repeats, 3 * repeats))
        products = 2 * repeats * PER_ROUND.value
        _expect(c, 3 * products // 2 * K, "the product")
        return 2 * M * N * K * programs * products / (long - short) / 1e12 / half_tflops

    def shared_bytes_per_clock(self, clock_ghz: float) -> float:
        self._needs_ptx()
        threads, repeats = 1024, 20000
        counts = torch.zeros(threads, dtype=torch.int32, device=self.where)

        def call(rounds: int) -> None:
            read_shared[(1,)](counts, rounds, THREADS=threads, num_warps=threads // 32)

        short, long = (self.seconds(call, rounds) for rounds in (repeats, 3 * repeats))
        _expect(counts, 4 * 3 * repeats, "the number of reads")
        return 16 * 4 * threads * 2 * repeats / (long - short) / (1e9 * clock_ghz)

    def _between_kernels(self, graphed: bool) -> float:
        from tritongru.launch.runtime import Launch

        x = torch.zeros(1 << 14, dtype=torch.int32, device=self.where)  # 64 KiB

        def several() -> None:
            launch = Launch(increment, (), {"x_ptr": x, "BLOCK": 1024}, num_warps=4, num_stages=1)  # of this stream
            for _ in range(KERNELS):
                launch((16, 1, 1), ())

        several()
        call = captured(several) if graphed else several
        x.zero_()
        seconds = self.seconds(call)
        _expect(x, (TIMES + 1) * KERNELS, "the number of kernels")
        return seconds / KERNELS * 1e6

    def graph_us(self) -> float:
        return self._between_kernels(graphed=True)

    def stream_us(self) -> float:
        return self._between_kernels(graphed=False)


def of_card(index: int, out: Path, environment: Environment, reuse: bool = False) -> Ceilings | None:
    """Ceilings of the current CUDA device, measured, printed and appended to OUT/ceilings.csv.

    None where a figure cannot be measured.

    reuse: take what the file has from the same code, versions and device.

    Raises:
        OtherSchemaError: the file is of another schema.
    """
    if reuse and (before := _there(out / CEILINGS, environment)) is not None:
        return before
    with ResultsFile(out / CEILINGS, environment, CEILINGS_COLUMNS) as results:
        return measure(Card(of_cuda(index), index), results)


def _there(path: Path, environment: Environment) -> Ceilings | None:
    if environment.dirty == "yes" or environment.commit == UNKNOWN:
        return None
    same = {name: str(value) for name, value in dataclasses.asdict(environment).items() if name != "date"}
    rows = [row for row in read(path, CEILINGS_COLUMNS) if all(row[name] == value for name, value in same.items())]
    return from_rows(rows)


def from_rows(rows: Iterable[Mapping[str, str]]) -> Ceilings | None:
    """Of a ceilings.csv; None where a figure is missing."""
    return _ceilings({row["name"]: float(row["value"]) for row in rows if row["value"]})


def _ceilings(values: Mapping[str, float]) -> Ceilings | None:
    if set(values) != set(UNITS):
        return None
    return Ceilings(**{name: round(value) if name == "sms" else value for name, value in values.items()})


def measure(card: Any, results: ResultsFile) -> Ceilings | None:
    """Every figure of `Ceilings`, a row each; None where one cannot be measured."""
    found: dict[str, float] = {"sms": card.device.sms}
    needs = {
        "l2_bytes_per_clock": ("clock_ghz",), "shared_bytes_per_clock": ("clock_ghz",), "mma_share": ("half_tflops",)
    }  # fmt: skip
    for name, unit in UNITS.items():
        note = "measured" if name != "sms" else "reported by the driver"
        value: float | None
        try:
            value = found[name] if name in found else getattr(card, name)(*(found[n] for n in needs.get(name, ())))
            if not (math.isfinite(value) and value > 0):
                raise WrongResultError(f"{value:.3g} is no figure: the longer run did not take longer")
        except torch.AcceleratorError:
            raise
        except Exception as error:  # whatever it is, the other figures are still of interest
            value, note = None, f"not measured: {type(error).__name__}: {str(error)[:150]}"
        else:
            found[name] = value
        results.append({"name": name, "value": "" if value is None else f"{value:.6g}", "unit": unit, "note": note})
        print(f"ceiling {name:<22} {'unknown' if value is None else f'{value:.4g} {unit}'}  {note}", flush=True)
    return _ceilings(found)
