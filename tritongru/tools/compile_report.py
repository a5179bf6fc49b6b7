"""What the compiler makes of a kernel, for a GPU that need not be present.

`compile_report` compiles a launch ahead of time and reads the machine code: registers, spills, shared memory,
instructions by class, in total and per loop. Everything is read from the binary that would be launched, never from a
second run of the assembler, whose options Triton changes between versions.
"""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from ..planning.devices import Device
from .files import show

if TYPE_CHECKING:
    from ..launch.runtime import Kernel

# Instruction classes, each a pattern for the whole opcode up to its first dot. NVIDIA (SASS):
SASS_CLASSES = {
    "HGMMA": r"[HIQB]GMMA",  # matrix product of a warp group, sm_90
    "UTCMMA": r"UTC\w*MMA",  # matrix product in tensor memory, sm_100
    "HMMA": r"[HIQO]MMA",  # matrix product of a warp
    "FFMA": r"FFMA2?", "HFMA": r"HFMA2?", "MUFU": r"MUFU",
    "LDG": r"LDG", "LDGSTS": r"LDGSTS", "STG": r"STG", "UTMALDG": r"UTMALDG", "UTMASTG": r"UTMASTG",  # global memory
    "LDS": r"LDS", "LDSM": r"LDSM", "STS": r"STS", "STSM": r"STSM",  # shared memory
    "LDTM": r"LDTM", "STTM": r"STTM",  # tensor memory
    "LDL": r"LDL", "STL": r"STL",  # local memory: spills
    "BAR": r"BAR", "MEMBAR": r"MEMBAR|ERRBAR|CCTL", "ATOM": r"ATOMG?", "RED": r"REDG?", "SHFL": r"SHFL",
    "WARPGROUP": r"WARPGROUP", "R2UR": r"R2UR",
}  # fmt: skip
# AMD:
AMDGCN_CLASSES = {
    "mfma": r"v_mfma_\w+",
    "global_load": r"(global|buffer)_load_\w+", "global_store": r"(global|buffer)_store_\w+",
    "atomic": r"(global|buffer|flat)_atomic_\w+", "ds": r"ds_\w+", "scratch": r"scratch_\w+",
    "exp": r"v_exp_\w+", "rcp": r"v_rcp_\w+",
    "barrier": r"s_barrier", "waitcnt": r"s_waitcnt", "inv": r"buffer_inv", "wbl2": r"buffer_wbl2",
}  # fmt: skip


class Loop(NamedTuple):
    """The instructions of one loop, those of the loops inside it included, each counted once."""

    instructions: int
    counts: dict[str, int]


@dataclass(frozen=True)
class CompileReport:
    """A compiled kernel in numbers. `counts` and `loops` count instructions of the program text, not of a run."""

    kernel: str
    target: str  # "sm_90", "gfx942"
    num_warps: int
    num_stages: int
    registers: int  # per thread; on AMD vector registers, accumulation registers included
    spill_bytes: int  # per thread: the width of all local loads and stores; on AMD the spilled registers, 4 bytes each
    shared_bytes: int  # dynamic shared memory of a program; a compile succeeds above the device's limit too
    instructions: int
    counts: dict[str, int]  # by class (SASS_CLASSES or AMDGCN_CLASSES), without the classes that do not occur
    loops: tuple[Loop, ...]  # largest first; empty on AMD
    sass: str = field(repr=False, compare=False)  # the disassembly; on AMD the assembly

    @property
    def matrix_instructions(self) -> int:
        return sum(self.counts.get(name, 0) for name in ("HGMMA", "UTCMMA", "HMMA", "mfma"))


def compile_report(specimen: "Kernel", device: Device) -> CompileReport:
    """Compile a launch for `device`, of which only the target matters, and read the result. RuntimeError where kernels
    are interpreted (TRITON_INTERPRET=1), or a disassembler is missing; a compiler's error is passed on as it is."""
    compiled = _compile(specimen, device)
    if device.vendor == "nvidia":
        text, classes = disassembled(compiled.asm["cubin"]), SASS_CLASSES
        (registers,) = map(int, re.findall(r"\bREG:(\d+)", text))
        opcodes, _, bodies = control_flow(text)
        spilled = sum(bytes_moved(opcode) for opcode in opcodes if opcode.startswith(("LDL", "STL")))
    else:
        text, classes, bodies = compiled.asm["amdgcn"], AMDGCN_CLASSES, []
        usage = dict(re.findall(r"\.(vgpr_\w+):\s+(\d+)", text))
        registers, spilled = int(usage["vgpr_count"]), 4 * int(usage["vgpr_spill_count"])
        opcodes = re.findall(r"^\t([a-z]\w*)", text, flags=re.MULTILINE)  # directives begin with a dot
    loops = tuple(Loop(len(body), count((opcodes[i] for i in body), classes)) for body in bodies)
    name, of = specimen.kernel.fn.__name__, compiled.metadata
    numbers = of.num_warps, of.num_stages, registers, spilled, of.shared, len(opcodes)
    return CompileReport(name, device.arch, *numbers, count(opcodes, classes), loops, text)


def bytes_moved(opcode: str) -> int:
    """Bytes that a thread moves with one load or store: "STL.64" 8, "LDG.E.128" 16, "STG.E.U16" 2, "STL" 4."""
    widths = {"256": 32, "128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
    return next((widths[part] for part in opcode.split(".") if part in widths), 4)


class _Pointer:
    """What the JIT asks of a tensor: its type, its alignment, and (AMD) whether 32 bits reach all of it."""

    def __init__(self, kind: str):
        self.dtype, _, alignment = kind[1:].partition(":")
        self.data_ptr = lambda: int(alignment or 16)
        self.ptr_range = lambda: 0


def examples(specimen: "Kernel") -> dict[str, Any]:
    """By name, what the JIT takes for arguments of a launch's types, and the constants."""
    kinds = specimen.arguments.items()
    found = {name: _Pointer(kind) if kind[0] == "*" else int(kind[4:] or 7) for name, kind in kinds}
    return {**found, **specimen.constants}


def _compile(specimen: "Kernel", device: Device) -> Any:
    """Triton's CompiledKernel. The JIT's own binder and packer decide the specialisation, as at a launch."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.experimental.gluon._runtime import GluonASTSource
    from triton.runtime.jit import JITFunction, create_function_from_signature

    kernel = specimen.kernel
    if triton.knobs.runtime.interpret or not isinstance(kernel, JITFunction):
        raise RuntimeError("kernels of this process are interpreted: a compile needs one without TRITON_INTERPRET")
    target = GPUTarget(*device.target)
    backend = make_backend(target)
    # to be cooperative changes a launch alone
    options = {name: value for name, value in specimen.options.items() if name != "launch_cooperative_grid"}
    launch = {**examples(specimen), **options, "debug": kernel.debug or triton.knobs.runtime.debug}
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    parsed, signature, constants, attributes = kernel._pack_args(backend, launch, *bind(**launch))
    source = GluonASTSource if kernel.is_gluon() else ASTSource
    return triton.compile(source(kernel, signature, constants, attributes), target=target, options=parsed.__dict__)


def disassembled(cubin: bytes) -> str:
    """A binary's resources and instructions, by cuobjdump of Triton's wheels (TRITON_CUOBJDUMP_PATH overrides)."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", "-sass", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


# address, predicate, opcode, operands; what the scheduler noted may follow: "&req={3,2,1} ?trans5" (sm_120, Triton 3.6)
SASS_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)([^;&?]*)[^;]*;", re.MULTILINE)


def control_flow(sass: str) -> tuple[list[str], list[list[int]], list[set[int]]]:
    """Of a disassembly: each instruction's whole opcode, the instructions that it may follow, and the loops as sets of
    instructions, largest first.

    The assembler moves rare paths behind the end of the kernel; they jump back into the middle of it, and the text
    between such a jump and its target is no loop. A backward branch closes one only if its target lies on every way
    from the entry to it; its members are then all instructions that reach the branch without passing the target.
    """
    instructions = SASS_LINE.findall(sass)
    places = {int(address, 16): i for i, (address, *_) in enumerate(instructions)}
    before: list[list[int]] = [[] for _ in instructions]
    loops: dict[int, set[int]] = {}  # by the first instruction
    backward: list[tuple[int, int]] = []  # branches: target, branch
    for i, (_, predicate, opcode, operands) in enumerate(instructions):
        kind = opcode.split(".")[0]
        if kind == "BRA":
            target = places[int(operands.split("0x")[-1], 16)]
            before[target].append(i)
            if target < i:
                backward.append((target, i))
        conditional = predicate or "," in operands  # "@P0 BRA 0x40", "BRA.U UP0, 0x40"
        if (conditional or kind not in ("BRA", "BRX", "EXIT", "RET")) and i + 1 < len(instructions):
            before[i + 1].append(i)
    for head, tail in backward:
        body, pending = {head, tail}, [tail]
        while pending:
            new = [i for i in before[pending.pop()] if i not in body]
            body.update(new)
            pending += new
        if head == 0 or 0 not in body:
            loops.setdefault(head, set()).update(body)
    return [opcode for _, _, opcode, _ in instructions], before, sorted(loops.values(), key=lambda body: -len(body))


def count(opcodes: Iterable[str], classes: Mapping[str, str]) -> dict[str, int]:
    """How many of the opcodes fall into each class, in the order of the classes."""
    kinds = Counter(opcode.split(".")[0] for opcode in opcodes)
    of_class = {name: sum(n for kind, n in kinds.items() if re.fullmatch(how, kind)) for name, how in classes.items()}
    return {name: n for name, n in of_class.items() if n}


def show_reports(reports: Sequence[CompileReport], forms: Sequence[str]) -> None:
    """Print the reports, a column each, headed by the kernel and which form of it this is."""
    numbers = ("num_warps", "num_stages", "registers", "spill_bytes", "shared_bytes", "instructions")
    lines = [(n.replace("_", " "), *(getattr(r, n) for r in reports)) for n in (*numbers, "matrix_instructions")]
    lines.append(("largest loop", *(r.loops[0].instructions if r.loops else "unrolled" for r in reports)))
    names = dict.fromkeys(name for r in reports for name in r.counts)
    lines += [(f"  {name}", *(r.counts.get(name, 0) for r in reports)) for name in names]
    header = ("per program", *(f"{r.kernel}\n({form})" for r, form in zip(reports, forms, strict=True)))
    title = f"compiled for {reports[0].target}, nothing timed; registers and spills of a thread, a loop's instructions"
    show(title, header, lines)
