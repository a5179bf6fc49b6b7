"""Inline PTX as one thread executes it: to hold the texts of kernels/exchange.py against their twins in Python.
Declarations and widths are ptxas's to check, which compiles the same texts; a register that is read before it was
written is an error here, an output too."""

import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

VALUES = {  # of an instruction, from its operands
    "mov": "{0}", "cvt": "{0}", "add": "{0} + {1}", "sub": "{0} - {1}", "mul": "{0} * {1}", "and": "{0} & {1}",
    "or": "{0} | {1}", "max": "max({0}, {1})", "shr": "{0} >> {1}", "setp": "int({0} {compares} {1})",
}  # fmt: skip
COMPARISONS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}


class PtxError(Exception):
    """A mistake in a text, or an instruction unknown here."""


class Access(NamedTuple):
    """A load or store of `count` elements, and the words of its instruction ("relaxed")."""

    address: int
    bits: int
    count: int
    modifiers: tuple[str, ...]


def aligned(address: int, bits: int, count: int, *modifiers: str) -> Access:
    if address % (bits // 8 * count) or "global" not in modifiers:
        raise PtxError(f"{modifiers} at {address:#x}, {count} times {bits} bits: not aligned, or not to global memory")
    return Access(address, bits, count, modifiers)


def signed(value: int, bits: int) -> int:
    return value - (1 << bits) if value >> (bits - 1) & 1 else value


def to_tf32(value: int) -> int:
    """Bits of a float32 rounded to nearest, ties away from zero."""
    return 0x7FFFFFFF if value & 0x7FFFFFFF > 0x7F800000 else (value + 0x1000) & 0xFFFFE000


def in_python(statement: str) -> str:
    """An instruction as a line of Python, in which AT is the label to go on from."""
    match = re.fullmatch(r"(?:@(\w+) )?([a-z]\w*)((?:\.\w+)*) (.*)", statement)
    if match is None:
        raise PtxError(f"no instruction: {statement!r}")
    guard, name, modifiers, operands = match.groups()
    words, operand = modifiers.split(".")[1:], re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^\s,]+", operands)
    size = re.fullmatch(r"[busf](32|64)", words[-1] if words else "")
    bits = int(size[1]) if size else 0
    if name == "bra":
        line = f"AT = LABELS[{operand[0]!r}]; continue"
    elif not bits:
        raise PtxError(f"no type: {statement!r}")
    elif name in ("ld", "st"):
        registers, place = operand if name == "ld" else operand[::-1]
        names = re.findall(r"\w+", registers)
        count = next((int(word[1:]) for word in words if re.fullmatch(r"v\d", word)), 1)
        access = f"aligned({place.strip('[]')}, {bits}, {count}, *{words})"
        line = f"{', '.join(names)}, = LOAD({access})" if name == "ld" else f"STORE({access}, [{', '.join(names)}])"
    elif name == "nanosleep":
        line = f"SLEPT += {operand[0]}"
    else:
        target, *sources = operand
        known, compares = VALUES.get(name), COMPARISONS.get(words[0], "")
        if known is None or bool(compares) != (name == "setp") or words[0] in ("lo", "hi"):
            raise PtxError(f"unknown here: {statement!r}")
        if words[-1][0] == "s":
            sources = [f"signed({source}, {bits})" for source in sources]
        if words[:2] == ["rna", "tf32"]:
            sources = [f"to_tf32({sources[0]})"]
        to = 2 * bits if words[0] == "wide" else 32 if name == "cvt" and "32" in words[-2] else bits
        line = f"{target} = {known.format(*sources, compares=compares)} & {(1 << to) - 1}"
    return f"if {guard}: {line}" if guard else line


@lru_cache(maxsize=64)
def function_of(text: str, constraints: str) -> tuple[Callable[..., Any], int]:
    """A text as a function of memory, the clock and its inputs, and how many those are."""
    kinds = constraints.split(",")
    outputs = sum(kind.startswith("=&") for kind in kinds)  # without early clobber an output may lose an input
    if not set(kinds[outputs:]) <= {"r", "l", "f"}:
        raise PtxError(f"constraints {constraints!r}")
    body = re.sub(r"\$(\d+)", r"_\1", text.strip())
    body = (body[1:-1] if body.startswith("{") else body).replace("%globaltimer", "CLOCK()")
    names = [f"_{i}" for i in range(outputs, len(kinds))]
    labels: dict[str, int] = {}
    lines = [f"def run(LOAD, STORE, CLOCK, TURNS, {', '.join(names)}):", " AT = SLEPT = 0", " while TURNS:"]
    lines += ["  TURNS -= 1", "  if AT <= 0:", "   pass"]
    for statement in body.split(";"):
        rest = statement.strip()
        while label := re.match(r"(\w+):\s*", rest):
            labels[label[1]] = len(labels) + 1
            lines += [f"  if AT <= {len(labels)}:", "   pass"]
            rest = rest[label.end() :]
        if rest and not rest.startswith(".reg "):
            lines.append(f"   {in_python(rest)}")
    lines += [f"  return [{', '.join(f'_{i}' for i in range(outputs))}], SLEPT", " raise PtxError('no end')"]
    scope = {**globals(), "LABELS": labels}
    exec("\n".join(lines), scope)
    return scope["run"], len(names)


def execute(text: str, constraints: str, inputs: Sequence[int], load=None, store=None, clock=None) -> Any:
    """The bits of the outputs and the nanoseconds slept, given the bits of the inputs. `load(access)` and
    `store(access, values)` are called at each access, `clock()` for %globaltimer. PtxError also of an endless loop."""
    run, count = function_of(text, constraints)
    if len(inputs) != count:
        raise PtxError(f"{len(inputs)} values for {count} operands")
    try:
        return run(load, store, clock, 10_000, *inputs)
    except (NameError, KeyError) as error:
        raise PtxError(f"read before it was written, or unknown: {error}") from None
