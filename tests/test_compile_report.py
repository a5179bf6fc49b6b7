"""Ahead-of-time compiles: what is read from the machine code is what is in it."""

import re
from dataclasses import replace

import pytest
import triton
import triton.language as tl

from tritongru.launch.runtime import Kernel
from tritongru.planning.devices import describe
from tritongru.tools import compile_report as module
from tritongru.tools.compile_report import compile_report

pytestmark = pytest.mark.compiled


@triton.jit
def normalize_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    """All of x stays alive across a reduction."""
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs)
    tl.store(y_ptr + offs, x - tl.max(x, 0))


# One warp holds the whole block, more than its threads have registers.
SPILLING = Kernel(normalize_kernel, {"BLOCK": 8192}, 1, arguments={"x_ptr": "*fp32", "y_ptr": "*fp32"})


def test_spill_bytes_are_what_the_assembler_says(tmp_path, monkeypatch, capfd):
    """An independent witness: ptxas -v of the very compile (a fresh cache makes it run)."""
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    monkeypatch.setattr(triton.knobs.nvidia, "dump_ptxas_log", True)
    report = compile_report(SPILLING, describe("a100"))
    log = capfd.readouterr().out
    stores, loads = (int(re.search(rf"(\d+) bytes spill {what}", log)[1]) for what in ("stores", "loads"))
    assert report.spill_bytes == stores + loads > 0
    assert report.registers == int(re.search(r"Used (\d+) registers", log)[1])
    assert {"STL", "LDL"} <= set(report.counts)
    on_amd = compile_report(replace(SPILLING, constants={"BLOCK": 32768}), describe("mi300x"))
    assert on_amd.spill_bytes > 0 and on_amd.counts["scratch"] > 0


# A kernel as the assembler lays it out. The rare path at 0xc0 stands behind the end and jumps back into the loop.
SASS = """
		Function : kernel
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 EXIT ;
        /*0020*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0030*/                   LDGDEPBAR ;
        /*0040*/                   MUFU.EX2 R5, R5 ;
        /*0050*/               @P1 BRA 0x40 ;
        /*0060*/                   BRA.DIV ~URZ, 0xc0 ;
        /*0070*/               @P0 BRA 0x20 ;
        /*0080*/                   STG.E [R2.64], R4 ;
        /*0090*/                   BRA.U UP0, 0xc0 ;
        /*00a0*/                   STL.64 [R1], R4 ;
        /*00b0*/                   EXIT ;
        /*00c0*/                   SHFL.BFLY PT, R4, R4, 0x1, 0x1f ;
        /*00d0*/                   BRA 0x70  &req={3,2,1} ?trans5;
        /*00e0*/                   BRA 0xe0;
"""


def loops(sass):
    opcodes, _, bodies = module.control_flow(sass)
    return [module.Loop(len(body), module.count((opcodes[i] for i in body), module.SASS_CLASSES)) for body in bodies]


def test_loops_follow_the_control_flow():
    """The outer loop: 0x20 to 0x70, the rare path, and the way from the loop's end to that path. The inner: itself."""
    outer, inner = loops(SASS)
    assert inner == (2, {"MUFU": 1})
    assert outer.counts == {"MUFU": 1, "LDG": 1, "STG": 1, "SHFL": 1}
    assert outer.instructions == 10
    # Reached from outside only, the rare path's jump back closes nothing.
    assert loops(SASS.replace("               @P0 BRA 0x20 ;", "                   NOP ;")) == [(2, {"MUFU": 1})]


def test_opcodes_are_told_apart_by_their_whole_name():
    opcodes = ["LDGDEPBAR", "LDG.E", "LDGSTS.E.128", "LDSM.16.M88.4", "LDS.128", "HGMMA.64x16x16.F32", "REDUX.MAX.S32"]
    counts = module.count(opcodes, module.SASS_CLASSES)
    assert counts == {"HGMMA": 1, "LDG": 1, "LDGSTS": 1, "LDS": 1, "LDSM": 1}
    widths = [module.bytes_moved(opcode) for opcode in ("STL", "STL.64", "LDL.LU.128", "LDL.U8", "STL.U16")]
    assert widths == [4, 8, 16, 1, 2]
