"""The interpreter of inline PTX (tests/kit/ptx.py), and a wait's text held against its twin in Python."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from triton.experimental.gluon import language as gl

from tests.kit import exchanging
from tests.kit.ptx import Access, PtxError, execute
from tritongru.tools.emulator import Tensor

BASE = 0x7F00_0000_1000
M32 = 0xFFFFFFFF


class Memory:
    """32-bit words; those that are to come arrive one 16-bit half a load, in a random order."""

    def __init__(self, words: dict[int, int], late: dict[int, int] | None = None, seed: int = 0):
        self.words, self.stores, self.loads = dict(words), [], 0
        self.halves = [(address, half) for address in late or {} for half in (0, 16)]
        self.late = dict(late or {})
        random.Random(seed).shuffle(self.halves)
        self.words.update(dict.fromkeys(self.late, M32))

    def load(self, access: Access) -> list[int]:
        found = [self.words[access.address + 4 * i] for i in range(access.count)]
        self.loads += 1
        if self.halves:
            address, half = self.halves.pop()
            mask = 0xFFFF << half
            self.words[address] = self.words[address] & ~mask | self.late[address] & mask
        return found

    def store(self, access: Access, values: Sequence[int]) -> None:
        self.stores.append((access.address, list(values)))


def run(text: str, constraints: str = "=&r,r,r", inputs: Sequence[int] = (), **options) -> list[int]:
    return execute(text, constraints, inputs, Memory({}).load, **options).outputs


# ---- instructions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, a, b, expected",
    [
        ("add.u32 $0, $1, $2;", M32, 2, 1),
        ("sub.s32 $0, $1, $2;", 1, 3, M32 - 1),
        ("mul.lo.u32 $0, $1, $2;", 1 << 31, 3, 1 << 31),
        ("mad.lo.s32 $0, $1, $2, 5;", M32, 3, 2),
        ("and.b32 $0, $1, 0xF0U;", 0xABC, 0, 0xB0),
        ("or.b32 $0, $1, $2;", 0xF0, 0x0F, 0xFF),
        ("xor.b32 $0, $1, -1;", 0xF0, 0, M32 ^ 0xF0),
        ("not.b32 $0, $1;", 0, 0, M32),
        ("shl.b32 $0, $1, $2;", 3, 31, 1 << 31),
        ("shl.b32 $0, $1, $2;", 3, 32, 0),
        ("shr.u32 $0, $1, 4;", M32, 0, M32 >> 4),
        ("shr.s32 $0, $1, $2;", 1 << 31, 40, M32),
        ("min.s32 $0, $1, $2;", M32, 2, M32),
        ("min.u32 $0, $1, $2;", M32, 2, 2),
        ("max.u32 $0, $1, $2;", M32, 2, M32),
        ("lop3.b32 $0, $1, $2, 0xFF, 0xE8;", 0b0011, 0b0101, 0b0111),  # the majority
        ("mov.b32 $0, 0f3F800000;", 0, 0, 0x3F800000),
        ("cvt.rna.tf32.f32 $0, $1;", 0x3F801000, 0, 0x3F802000),
        ("cvt.rna.tf32.f32 $0, $1;", 0x3F800FFF, 0, 0x3F800000),
        ("cvt.rna.tf32.f32 $0, $1;", M32, 0, 0x7FFFFFFF),
        ("{ .reg .b64 x, y; cvt.s64.s32 x, $1; shr.u64 y, x, 32; cvt.u32.u64 $0, y; }", M32, 0, M32),
        ("{ .reg .b64 x, y; cvt.u64.u32 x, $1; shr.u64 y, x, 32; cvt.u32.u64 $0, y; }", M32, 0, 0),
        ("{ .reg .pred p; setp.lt.s32 p, $1, $2; selp.u32 $0, 7, 8, p; }", M32, 0, 7),
        ("{ .reg .pred p; setp.lt.u32 p, $1, $2; selp.u32 $0, 7, 8, p; }", M32, 0, 8),
        ("{ .reg .pred p, q; setp.eq.u32 p|q, $1, $2; selp.b32 $0, 1, 2, q; }", 5, 5, 2),
        ("{ .reg .pred p, q; setp.ne.u32 q, 1, 2; setp.ge.and.u32 p, $1, $2, !q; selp.b32 $0, 1, 2, p; }", 5, 5, 2),
        ("{ .reg .pred p; setp.gt.u32 p, $1, $2; mov.u32 $0, 1; @p mov.u32 $0, 2; @!p add.u32 $0, $0, 5; }", 3, 4, 6),
        ("{ .reg .b32 r<3>; mov.u32 r0, 1; mov.u32 r2, r0; { .reg .b32 r0; mov.u32 r0, 9; } add.u32 $0, r0, r2; }",
         0, 0, 2),
        ("/* loops */ { .reg .pred p; .reg .b32 i; mov.u32 i, 0; mov.u32 $0, 0; // from here\nAGAIN: add.u32 i, i, 1; "
         "add.u32 $0, $0, i; setp.lt.u32 p, i, $1; @p bra AGAIN; }", 4, 0, 10),
        ("{ bra.uni END; mov.u32 $0, 1; END: mov.u32 $0, 2; }", 0, 0, 2),
        ("{ .reg .pred p; setp.eq.u32 p, 1, 1; @p bra AT; AT: { bra AT; AT: mov.u32 $0, 4; } }", 0, 0, 4),
    ],
)  # fmt: skip
def test_instructions(text: str, a: int, b: int, expected: int) -> None:
    assert run(text, inputs=(a, b)) == [expected]


@pytest.mark.parametrize(
    "text, constraints, message",
    [
        ("add.u32 $0, $1, x;", "=&r,r", "x is not declared"),
        ("add.u64 $0, $1, 1;", "=&r,r", r"\$1 has 32 bits, 64 are needed"),
        ("mov.u32 $0, $1;", "=&l,r", r"\$0 has 64 bits, not 32"),
        ("add.u32 $0, $0, $1;", "=&r,r", r"\$0 is read before it was written, in 'add.u32"),
        ("", "=&r,r", r"\$0 is read before it was written"),
        ("{ .reg .b32 a; .reg .b32 a; }", "r", "declared twice"),
        ("A: A: mov.u32 $0, 1;", "=&r,r", "two labels A"),
        ("bra A; { A: }", "r", "no label A"),
        ("{ mov.u32 $0, 1;", "=&r,r", "not closed"),
        ("mov.u32 $0, 1; }", "=&r,r", "too many"),
        ("mov $0, 1;", "=&r,r", "a type is missing"),
        ("brev.b32 $0, $1;", "=&r,r", "'brev' is unknown"),
        ("add.f32 $0, $1, $1;", "=&r,r", "arithmetic of f32"),
        ("mul.hi.u32 $0, $1, $1;", "=&r,r", "hi.u32 is unknown"),
        ("A: bra A;", "r", "no end after 50"),
        ("mov.u32 $0, 1;", "=&x,r", "constraint '=&x'"),
        ("mov.u32 $0, 1;", "r,=&r", "constraint '=&r' of .1"),
        ("mov.u32 $0, 1;", "=&r,r,r", r"no value is given for \$2"),
        ("mov.u32 $0, 1;", "=&r", "values too many"),
        ("ld.global.b32 $0, [$1];", "=&r,r", r"\$1 has 32 bits"),
    ],
)
def test_mistakes(text: str, constraints: str, message: str) -> None:
    with pytest.raises(PtxError, match=message):
        run(text, constraints, [1], max_steps=50)


def test_an_output_without_early_clobber_may_share_an_inputs_register() -> None:
    text = "mov.u32 $0, 7; add.u32 $1, $2, $3;"
    assert run(text, "=&r,=&r,r,r", [1, 2]) == [7, 3]
    assert run(text, "=r,=&r,r,r", [1, 2]) == [7, 9]  # the mistake: 7 stands where 1 was
    assert run("add.u32 $0, $1, $2;", "=r,r,r", [1, 2]) == [3]
    assert run("add.u32 $0, $0, $2;", "=r,0,r", [1, 2]) == [3]  # tied on purpose


def test_memory_and_the_clock() -> None:
    memory = Memory({BASE: 1, BASE + 4: 2, BASE + 8: 3, BASE + 12: 4})
    text = """{ .reg .u64 now, later; .reg .b32 skipped;
        mov.u64 now, %globaltimer;
        ld.relaxed.gpu.global.v4.b32 {$0, _, $1, skipped}, [$3 + 0];
        st.volatile.global.v2.b32 [$3+8], {$1, $0};
        nanosleep.u32 1000;
        mov.u64 later, %globaltimer; sub.u64 $2, later, now; }"""
    result = execute(text, "=&r,=&r,=&l,l", [BASE], memory.load, memory.store)
    first, second, waited = result.outputs
    assert (first, second) == (1, 3) and memory.stores == [(BASE + 8, [3, 1])]
    assert 1000 < waited < 1010 and result.now >= 1006 and result.steps == 6
    assert result.accesses[0] == Access(BASE, 32, 4, ("relaxed", "gpu", "global", "v4", "b32"))
    ticks = itertools.count(100, 5)
    assert execute(text, "=&r,=&r,=&l,l", [BASE], memory.load, memory.store, clock=lambda: next(ticks)).outputs[2] == 5
    with pytest.raises(PtxError, match="not aligned to 16"):
        execute(text, "=&r,=&r,=&l,l", [BASE + 4], memory.load, memory.store)
    with pytest.raises(PtxError, match="only global"):
        execute("ld.shared.b32 $0, [$1];", "=&r,l", [BASE], memory.load)
    with pytest.raises(PtxError, match="no memory to store to"):
        execute("mov.u32 $0, 1; st.global.u32 [$1], $0;", "=&r,l", [BASE], memory.load)


# ---- a wait; that of kernels/exchange.py is tests/test_wait.py's -----------------------------------------------------


def test_the_kits_wait_against_its_twin() -> None:
    """The text of tests/kit/exchanging.py as a thread executes it, against its twin under the emulator."""

    for planes, vectors in ((1, 1), (3, 2)):
        text, constraints = exchanging.wait_text(vectors, planes, 1024)
        offsets = [48, 16][:vectors]
        late = {
            BASE + o + p * 1024 + 4 * i: (o + p + i) * 0x10001
            for o in offsets for p in range(planes) for i in range(4)
        }  # fmt: skip
        memory = Memory({}, late)
        inputs = [BASE] * (8 * vectors) + [offset for offset in offsets for _ in range(8)]
        found = execute(text, constraints, inputs, memory.load).outputs

        def halves_at(addresses, dtype, late=late):
            found = torch.tensor([late[int(a) & ~3] >> 8 * (int(a) & 3) & 0xFFFF for a in addresses])
            return Tensor(found.to(torch.int16).numpy(), dtype)

        per_element = np.array([offset + 2 * i for offset in offsets for i in range(8)])
        base = Tensor(np.full(8 * vectors, BASE), gl.int64)
        told = exchanging.wait_twin(planes, 1024)(
            SimpleNamespace(load=halves_at), base, Tensor(per_element, gl.int32), gl.int16
        )
        halves = np.concatenate([plane.v for plane in (told if planes > 1 else (told,))])
        assert found == halves.view(np.uint32).tolist()
