"""What the interpreter of inline PTX (tests/kit/ptx.py) refuses; what it computes is test_wait.py's, beside twins."""

from __future__ import annotations

import pytest

from tests.kit.ptx import PtxError, execute


@pytest.mark.parametrize(
    ("text", "constraints", "message"),
    [
        ("add.u32 $0, $0, $1;", "=&r,r", "read before it was written.*_0"),
        ("mov.u32 $1, 0;", "=&r,r", "read before it was written.*_0"),
        ("bra A;", "r", "unknown.*'A'"),
        ("mov $0, 1;", "=&r,r", "no type"),
        ("@!p mov.u32 $0, 1;", "=&r,r", "no instruction"),
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
