"""Inline PTX as one thread executes it: to hold the texts of kernels/exchange.py against their twins in Python.

What those need: loads and stores, integer arithmetic, predicates, branches, the clock. Memory is a function that is
called at each load, so that a test can let values arrive in parts. Stricter than a compiler where that shows mistakes:
a register that is read before it was written is an error, an output too; an operand is as wide as its instruction; a
vector is aligned to its size.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

CLASSES = {"r": 32, "f": 32, "l": 64}  # bits of a register, by the letter of its constraint
BINARY: dict[str, Callable[[int, int], int]] = {
    "add": operator.add, "sub": operator.sub, "and": operator.and_, "or": operator.or_, "max": max,
    "shr": operator.rshift, "mul": operator.mul,
}  # fmt: skip


class PtxError(Exception):
    """What is wrong with a text, or that this interpreter does not know it."""


@dataclass(frozen=True)
class Access:
    """A load or store: where, elements of how many bits, how many, and the words of its instruction ("relaxed")."""

    address: int
    bits: int
    count: int
    modifiers: tuple[str, ...]


@dataclass
class Thread:
    """values: of registers, and of numbers in the text; now: nanoseconds, one for each instruction and those slept."""

    values: dict[str, int]
    load: Callable[[Access], Sequence[int]]
    store: Callable[[Access, Sequence[int]], None]
    clock: Callable[[], int]
    now: int = 0

    def sleep(self, nanoseconds: int) -> None:
        self.now += nanoseconds


class Instruction(NamedTuple):
    """What a thread does, if the register `guard` has its value, and where the result goes."""

    run: Callable[[Thread], Any] = lambda thread: None
    target: str = ""
    label: str = ""  # of a branch
    statement: str = ""
    guard: tuple[str, int] | None = None


def _bits(kind: str) -> int:
    match = re.fullmatch(r"[busf](32|64)", kind)
    if match is None:
        raise PtxError(f"no type: {kind!r}")
    return int(match[1])


def _signed(value: int, bits: int) -> int:
    return value - (1 << bits) if value >> (bits - 1) & 1 else value


def _to_tf32(value: int) -> int:
    """Bits of a float32 rounded to nearest, ties away from zero."""
    return 0x7FFFFFFF if value & 0x7FFFFFFF > 0x7F800000 else (value + 0x1000) & 0xFFFFE000


@lru_cache(maxsize=64)
class Text:
    """A text, read once: its instructions as functions of a thread."""

    def __init__(self, text: str, constraints: str):
        self.bits: dict[str, int] = {}  # of each register, 1: a predicate
        self.numbers: dict[str, int] = {}
        self.tied: dict[str, str] = {}
        self.labels: dict[str, int] = {}
        self.instructions: list[Instruction] = []
        kinds = constraints.split(",")
        self.outputs = [f"${i}" for i, kind in enumerate(kinds) if kind.startswith("=")]
        self.inputs = [f"${i}" for i in range(len(self.outputs), len(kinds))]
        for i, kind in enumerate(kinds):
            if kind.isdigit():
                self.tied[f"${i}"] = f"${kind}"
            elif kind.removeprefix("=&") in CLASSES:  # without early clobber an output may lose an input
                self.bits[f"${i}"] = CLASSES[kind.removeprefix("=&")]
            else:
                raise PtxError(f"constraint {kind!r} of ${i}")
        body = text.strip()
        for statement in (body[1:-1] if body.startswith("{") else body).split(";"):
            self._read(statement.strip())
        for instruction in self.instructions:
            if instruction.label and instruction.label not in self.labels:
                raise PtxError(f"no label {instruction.label}")

    def _read(self, statement: str) -> None:
        while label := re.match(r"(\w+):\s*", statement):
            self.labels[label[1]] = len(self.instructions)
            statement = statement[label.end() :]
        if declared := re.fullmatch(r"\.reg \.(\w+) (.*)", statement):
            for name in declared[2].split(","):
                self.bits[name.strip()] = 1 if declared[1] == "pred" else _bits(declared[1])
        elif statement:
            match = re.fullmatch(r"(?:@(!?)(\w+) )?([a-z]\w*)((?:\.\w+)*) (.*)", statement)
            if match is None:
                raise PtxError(f"no instruction: {statement!r}")
            negated, guard, name, modifiers, operands = match.groups()
            try:
                found = self._instruction(name, modifiers.split(".")[1:], re.split(r",\s*(?![^{]*\})", operands))
                guarded = (self._register(guard, 1), 0 if negated else 1) if guard else None
            except PtxError as error:
                raise PtxError(f"{error}, in {statement!r}") from None
            self.instructions.append(found._replace(statement=statement, guard=guarded))

    def _register(self, name: str, bits: int) -> str:
        name = self.tied.get(name, name)
        if name not in self.bits:
            raise PtxError(f"{name} is not declared")
        if self.bits[name] != bits:
            raise PtxError(f"{name} has {self.bits[name]} bits, {bits} are needed")
        return name

    def _source(self, operand: str, bits: int) -> str:
        """A register, or the name of a number."""
        if not re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)", operand):
            return self._register(operand, bits)
        self.numbers[f"{operand}:{bits}"] = int(operand, 0) & ((1 << bits) - 1)
        return f"{operand}:{bits}"

    def _instruction(self, name: str, words: list[str], operands: list[str]) -> Instruction:
        if name == "bra":
            return Instruction(label=operands[0])
        if name in ("ld", "st"):
            return self._access(name, words, *(operands if name == "ld" else operands[::-1]))
        kind = words[-1] if words else ""
        bits, signed = _bits(kind), kind.startswith("s")
        if name == "nanosleep":
            duration = self._source(operands[0], bits)
            return Instruction(lambda thread: thread.sleep(thread.values[duration]))
        target, *sources = operands
        if sources == ["%globaltimer"]:
            return Instruction(lambda thread: thread.clock(), self._register(target, bits))
        a, *rest = (self._source(source, bits) for source in sources)
        if (name, *words) == ("cvt", "rna", "tf32", "f32"):
            return Instruction(lambda thread: _to_tf32(thread.values[a]), self._register(target, 32))
        if name in ("mov", "cvt"):
            to = _bits(words[0]) if name == "cvt" else bits
            return Instruction(lambda thread: thread.values[a], self._register(target, to))
        b = rest[0]
        if name == "setp":
            f, target = getattr(operator, words[0]), self._register(target, 1)
        else:
            wide = words[0] == "wide"
            if name not in BINARY or (name == "mul") != wide or signed != wide:
                raise PtxError(f"{name}.{'.'.join(words)} is unknown here")
            f, target = BINARY[name], self._register(target, 2 * bits if wide else bits)
        if signed:
            return Instruction(
                lambda thread: f(_signed(thread.values[a], bits), _signed(thread.values[b], bits)), target
            )
        return Instruction(lambda thread: f(thread.values[a], thread.values[b]), target)

    def _access(self, name: str, words: list[str], registers: str, place: str) -> Instruction:
        match = re.fullmatch(r"\[([$\w]+)(?:\+(\d+))?\]", place)
        if match is None or "global" not in words:
            raise PtxError("only global memory is known here, at a register and a number")
        bits, address, offset = _bits(words[-1]), self._register(match[1], 64), int(match[2] or 0)
        names = [self._register(each, bits) for each in re.split(r",\s*", registers.strip("{}"))]
        if len(names) != next((int(word[1:]) for word in words if re.fullmatch(r"v\d", word)), 1):
            raise PtxError(f"{len(names)} registers")

        def run(thread: Thread) -> None:
            access = Access(thread.values[address] + offset, bits, len(names), tuple(words))
            if access.address % (bits // 8 * len(names)):
                raise PtxError(f"address {access.address:#x} is not aligned to {bits // 8 * len(names)} bytes")
            if name == "ld":
                thread.values.update(zip(names, thread.load(access), strict=True))
            else:
                thread.store(access, [thread.values[each] for each in names])

        return Instruction(run)


def _nowhere(access: Access, values: Sequence[int] = ()) -> Any:
    raise PtxError("no memory is given")


def execute(
    text: str,
    constraints: str,
    inputs: Sequence[int],
    load: Callable[[Access], Sequence[int]] = _nowhere,
    store: Callable[[Access, Sequence[int]], None] = _nowhere,
    clock: Callable[[], int] | None = None,
    max_steps: int = 1_000_000,
) -> tuple[list[int], int]:
    """Run a text to its end: bits of the output operands, and the nanoseconds that it took.

    Args:
        inputs: bits of the input operands, in their order.
        load: called at each load with what is loaded; returns as many unsigned integers.
        store: called at each store with the values.
        clock: nanoseconds, for %globaltimer; by default those that the text takes.

    Raises:
        PtxError: for a mistake in the text, an instruction unknown here, or more than `max_steps` instructions.
    """
    program = Text(text, constraints)
    if len(inputs) != len(program.inputs):
        raise PtxError(f"{len(inputs)} values for {len(program.inputs)} operands")
    values = dict(program.numbers)
    for name, value in zip(program.inputs, inputs, strict=True):
        name = program.tied.get(name, name)
        values[name] = value & ((1 << program.bits[name]) - 1)
    thread = Thread(values, load, store, clock or (lambda: thread.now))
    at, statement = 0, ""
    try:
        while at < len(program.instructions):
            run, target, label, statement, guard = program.instructions[at]
            at += 1
            thread.sleep(1)
            max_steps -= 1
            if max_steps < 0:
                raise PtxError("no end")
            if guard is None or values[guard[0]] == guard[1]:
                found = run(thread)
                if target:
                    values[target] = found & ((1 << program.bits[target]) - 1)
                elif label:
                    at = program.labels[label]
        statement = "the outputs"
        return [values[name] for name in program.outputs], thread.now
    except KeyError as error:
        raise PtxError(f"{error.args[0]} is read before it was written, in {statement!r}") from None
    except PtxError as error:
        raise PtxError(f"{error}, in {statement!r}") from None
