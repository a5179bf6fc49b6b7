"""The interpreter of inline PTX (tests/kit/ptx.py). What it executes of kernels/exchange.py is tests/test_wait.py's."""

from __future__ import annotations

from unittest.mock import Mock

import pytest

from tests.kit.ptx import Access, PtxError, execute

M32, BASE = 0xFFFFFFFF, 0x7F00_0000_1000


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
    assert execute(text, "=&r,r,r", [a, b]) == ([expected], 0)


@pytest.mark.parametrize(
    ("text", "constraints", "message"),
    [
        ("add.u32 $0, $0, $1;", "=&r,r", "read before it was written.*_0"),
        ("mov.u32 $1, 0;", "=&r,r", "read before it was written.*_0"),
        ("bra A;", "r", "unknown.*'A'"),
        ("mov $0, 1;", "=&r,r", "no type"),
        ("brev.b32 $0, $1;", "=&r,r", "unknown here: 'brev.b32"),
        ("mul.lo.u32 $0, $1, $1;", "=&r,r", "unknown here: 'mul.lo.u32"),
        ("A: bra A;", "r", "no end"),
        ("mov.u32 $0, 1;", "=r,r", "constraints '=r,r'"),
        ("mov.u32 $0, 1;", "=&r,r,r", "1 values for 2 operands"),
        ("ld.shared.b32 $0, [$1];", "=&r,l", "not to global memory"),
        ("ld.global.b32 $0, [$1+2];", "=&r,l", "not aligned"),
        ("ld.global.b32 $0, [$1+3];", "=&r,l", "no memory is given"),
    ],
)
def test_mistakes(text: str, constraints: str, message: str) -> None:
    with pytest.raises(PtxError, match=message):
        execute(text, constraints, [1])


def test_tied_operands_memory_and_the_clock() -> None:
    """Tied operands are one register."""
    assert execute("add.u32 $0, $0, $2;", "=&r,0,r", [1, 2]) == ([3], 0)
    text = """{ .reg .b32 a, b;
        ld.relaxed.gpu.global.v4.b32 {$0, a, $1, b}, [$3];
        st.volatile.global.v2.b32 [$3+8], {$1, $0};
        nanosleep.u32 1000; mov.u64 $2, %globaltimer; }"""
    load, store = Mock(return_value=[1, 2, 3, 4]), Mock()
    assert execute(text, "=&r,=&r,=&l,l", [BASE], load, store, clock=lambda: 7) == ([1, 3, 7], 1000)
    load.assert_called_once_with(Access(BASE, 32, 4, ("relaxed", "gpu", "global", "v4", "b32")))
    store.assert_called_once_with(Access(BASE + 8, 32, 2, ("volatile", "global", "v2", "b32")), [3, 1])
