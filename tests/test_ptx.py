"""The interpreter of inline PTX (tests/kit/ptx.py). What it executes of kernels/exchange.py is tests/test_wait.py's."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest

from tests.kit.ptx import Access, PtxError, execute

M32, BASE = 0xFFFFFFFF, 0x7F00_0000_1000


def run(text: str, constraints: str = "=&r,r,r", inputs: Sequence[int] = (), **options) -> list[int]:
    return execute(text, constraints, inputs, **options)[0]


@pytest.mark.parametrize(
    ("text", "a", "b", "expected"),
    [
        ("add.u32 $0, $1, $2;", M32, 2, 1),
        ("sub.u32 $0, $1, 0x3;", 1, 3, M32 - 1),
        ("and.b32 $0, $1, $2;", 0xABC, 0xF0, 0xB0),
        ("or.b32 $0, $1, $2;", 0xF0, 0x0F, 0xFF),
        ("max.u32 $0, $1, $2;", M32, 2, M32),
        ("mov.u32 $0, -1;", 0, 0, M32),
        ("{ .reg .b64 x, y; cvt.u64.u32 x, $1; shr.u64 y, x, 4; cvt.u32.u64 $0, y; }", M32, 0, M32 >> 4),
        ("{ .reg .b64 x; mul.wide.s32 x, $1, $2; shr.u64 x, x, 32; cvt.u32.u64 $0, x; }", M32, 3, M32),
        ("{ .reg .pred p; mov.u32 $0, 1; setp.lt.s32 p, $1, $2; @p mov.u32 $0, 2; }", M32, 0, 2),
        ("{ .reg .pred p; mov.u32 $0, 1; setp.lt.u32 p, $1, $2; @p mov.u32 $0, 2; }", M32, 0, 1),
        ("{ .reg .pred p; mov.u32 $0, 1; setp.eq.u32 p, $1, $2; @!p mov.u32 $0, 2; }", 5, 5, 1),
        ("{ .reg .pred p; .reg .b32 i; mov.u32 i, 0; mov.u32 $0, 0; AGAIN: add.u32 i, i, 1; add.u32 $0, $0, i; "
         "setp.ne.u32 p, i, $1; @p bra AGAIN; }", 4, 0, 10),
        ("{ bra.uni END; mov.u32 $0, 1; END: mov.u32 $0, 2; }", 0, 0, 2),
    ],
)  # fmt: skip
def test_instructions(text: str, a: int, b: int, expected: int) -> None:
    assert run(text, inputs=(a, b)) == [expected]


@pytest.mark.parametrize(
    ("text", "constraints", "message"),
    [
        ("add.u32 $0, $1, x;", "=&r,r", "x is not declared"),
        ("add.u64 $0, $1, 1;", "=&r,r", r"\$1 has 32 bits, 64 are needed"),
        ("mov.u32 $0, $1;", "=&l,r", r"\$0 has 64 bits, 32 are needed"),
        ("add.u32 $0, $0, $1;", "=&r,r", r"\$0 is read before it was written, in 'add.u32"),
        ("mov.u32 $1, 0;", "=&r,r", r"\$0 is read before it was written"),
        ("bra A;", "r", "no label A"),
        ("mov $0, 1;", "=&r,r", "no type"),
        ("brev.b32 $0, $1, 1;", "=&r,r", "brev.b32 is unknown"),
        ("mul.lo.u32 $0, $1, $1;", "=&r,r", "mul.lo.u32 is unknown"),
        ("A: bra A;", "r", "no end"),
        ("mov.u32 $0, 1;", "=r,r", "constraint '=r'"),
        ("mov.u32 $0, 1;", "=&r,r,r", "1 values for 2 operands"),
        ("ld.global.b32 $0, [$1];", "=&r,r", r"\$1 has 32 bits"),
        ("ld.shared.b32 $0, [$1];", "=&r,l", "only global"),
        ("ld.global.v4.b32 {$0, $0}, [$1];", "=&r,l", "2 registers"),
        ("ld.global.b32 $0, [$1+2];", "=&r,l", "not aligned to 4"),
        ("ld.global.b32 $0, [$1+3];", "=&r,l", "no memory is given"),
    ],
)
def test_mistakes(text: str, constraints: str, message: str) -> None:
    with pytest.raises(PtxError, match=message):
        run(text, constraints, [1], max_steps=50)


def test_tied_operands_are_one_register() -> None:
    assert run("add.u32 $0, $0, $2;", "=&r,0,r", [1, 2]) == [3]


def test_memory_and_the_clock() -> None:
    loads: list[Access] = []
    stores: list[tuple[int, list[int]]] = []

    def load(access: Access) -> list[int]:
        loads.append(access)
        return [1, 2, 3, 4]

    text = """{ .reg .u64 now, later; .reg .b32 a, b;
        mov.u64 now, %globaltimer;
        ld.relaxed.gpu.global.v4.b32 {$0, a, $1, b}, [$3];
        st.volatile.global.v2.b32 [$3+8], {$1, $0};
        nanosleep.u32 1000;
        mov.u64 later, %globaltimer; sub.u64 $2, later, now; }"""
    given = (text, "=&r,=&r,=&l,l", [BASE], load, lambda access, values: stores.append((access.address, values)))
    (first, second, waited), now = execute(*given)
    assert (first, second) == (1, 3) and stores == [(BASE + 8, [3, 1])]
    assert 1000 < waited < 1010 and now >= 1006
    assert loads == [Access(BASE, 32, 4, ("relaxed", "gpu", "global", "v4", "b32"))]
    assert execute(*given, clock=itertools.count(100, 5).__next__)[0][2] == 5
