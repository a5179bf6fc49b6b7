"""Inline PTX as one thread executes it, instruction by instruction: to hold a text against its twin in Python.

A subset: loads and stores, integer arithmetic, predicates, branches, the clock. Memory is a function that is called at
each load, so that a test can let values arrive in parts. Stricter than a compiler where that shows mistakes:

    a register that is read before it was written is an error, an output too
    an output without early clobber (`=r`) shares its register with an input of its class, as a compiler may let it
    the width of an operand is that of its instruction; a vector is aligned to its size
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

CLASSES = {"r": 32, "l": 64, "h": 16, "f": 32, "d": 64}  # bits of a register, by the letter of its constraint
NOTHING = ("membar", "fence", "bar", "prefetch")  # one thread's memory is in order here


class PtxError(Exception):
    """What is wrong with a text, or that this interpreter does not know it."""


@dataclass(frozen=True)
class Access:
    """A load or store: where, elements of how many bits, how many, and the words of its instruction (".relaxed")."""

    address: int
    bits: int
    count: int
    modifiers: tuple[str, ...]


@dataclass
class Result:
    outputs: list[int]  # bits of the output operands
    steps: int
    now: int  # the clock at the end
    accesses: list[Access] = field(default_factory=list)


class _Register:
    def __init__(self, name: str, bits: int, value: int | None = None):
        self.name, self.bits, self.value = name, bits, value  # 1 bit: a predicate

    def read(self) -> int:
        if self.value is None:
            raise PtxError(f"{self.name} is read before it was written")
        return self.value


@dataclass
class _Instruction:
    text: str
    guard: str
    name: str
    modifiers: tuple[str, ...]
    operands: list[str]
    scope: _Scope


class _Scope:
    """What is declared between two braces."""

    def __init__(self, outer: _Scope | None = None):
        self.outer = outer
        self.registers: dict[str, _Register] = {}
        self.labels: dict[str, int] = {}

    def register(self, name: str) -> _Register:
        if name in self.registers:
            return self.registers[name]
        if self.outer is None:
            raise PtxError(f"{name} is not declared")
        return self.outer.register(name)

    def label(self, name: str) -> int:
        if name in self.labels:
            return self.labels[name]
        if self.outer is None:
            raise PtxError(f"there is no label {name}")
        return self.outer.label(name)


def _split(operands: str) -> list[str]:
    """At the commas outside of braces and brackets."""
    return [part.strip() for part in re.split(r",(?![^{\[]*[}\]])", operands) if part.strip()]


def _parse(text: str, outermost: _Scope) -> list[_Instruction]:
    text = re.sub(r"//[^\n]*|/\*.*?\*/", " ", text, flags=re.DOTALL)
    scope, found = outermost, []
    for statement in text.split(";"):
        rest = statement.strip()
        while rest:
            label = re.match(r"([A-Za-z_$%][\w$%]*)\s*:", rest)
            if rest[0] == "{":
                scope, rest = _Scope(scope), rest[1:].lstrip()
            elif rest[0] == "}":
                if scope is outermost:
                    raise PtxError("a closing brace too many")
                assert scope.outer is not None
                scope, rest = scope.outer, rest[1:].lstrip()
            elif label:
                if label[1] in scope.labels:
                    raise PtxError(f"two labels {label[1]} between the same braces")
                scope.labels[label[1]] = len(found)
                rest = rest[label.end() :].lstrip()
            elif rest.startswith(".reg"):
                _declare(rest, scope)
                break
            else:
                match = re.fullmatch(r"(?:@(!?[\w$%]+)\s+)?([a-z]\w*)((?:\.[\w:]+)*)\s*(.*)", rest, flags=re.DOTALL)
                if match is None:
                    raise PtxError(f"no instruction: {rest!r}")
                guard, name, modifiers, operands = match.groups()
                words = tuple(modifiers.split(".")[1:])
                found.append(_Instruction(rest, guard or "", name, words, _split(operands), scope))
                break
    if scope is not outermost:
        raise PtxError("a brace is not closed")
    return found


def _declare(statement: str, scope: _Scope) -> None:
    match = re.fullmatch(r"\.reg\s+\.(\w+)\s+(.*)", statement, flags=re.DOTALL)
    if match is None:
        raise PtxError(f"no declaration: {statement!r}")
    bits = 1 if match[1] == "pred" else _bits(match[1])
    for name in _split(match[2]):
        many = re.fullmatch(r"(.*)<(\d+)>", name)
        for each in [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [name]:
            if each in scope.registers:
                raise PtxError(f"{each} is declared twice")
            scope.registers[each] = _Register(each, bits)


def _bits(kind: str) -> int:
    match = re.fullmatch(r"[busf](8|16|32|64)", kind)
    if match is None:
        raise PtxError(f"no type: {kind!r}")
    return int(match[1])


def _signed(value: int, bits: int) -> int:
    return value - (1 << bits) if value >> (bits - 1) & 1 else value


def _operands(constraints: str, inputs: Sequence[int], scope: _Scope) -> list[_Register]:
    """Declare $0, $1, ... as the constraints have them; the registers of the outputs."""
    outputs: list[_Register] = []
    kinds = [kind.strip() for kind in constraints.split(",") if kind.strip()]
    given = list(inputs)
    free: dict[str, list[_Register]] = {}  # inputs whose register an output may have
    waiting = []
    for number, kind in enumerate(kinds):
        if kind.startswith("=") and (len(outputs) < number or kind.lstrip("=&") not in CLASSES):
            raise PtxError(f"constraint {kind!r} of ${number}")
        if kind.startswith("="):
            register = _Register(f"${number}", CLASSES[kind.lstrip("=&")])
            outputs.append(register)
            if "&" not in kind:
                waiting.append((number, kind[1:]))
        else:
            if not given:
                raise PtxError(f"no value is given for ${number}")
            value = given.pop(0)
            if kind.isdigit():  # tied to an output: one register
                register = outputs[int(kind)]
            elif kind in CLASSES:
                register = _Register(f"${number}", CLASSES[kind])
                free.setdefault(kind, []).append(register)
            else:
                raise PtxError(f"constraint {kind!r} of ${number}")
            register.value = value & ((1 << register.bits) - 1)
        scope.registers[f"${number}"] = register
    if given:
        raise PtxError(f"{len(given)} values too many")
    for number, kind in waiting:
        if scope.registers[f"${number}"].value is None and free.get(kind):
            shared = free[kind].pop(0)
            outputs[number] = scope.registers[f"${number}"] = shared
    return outputs


COMPARISONS: dict[str, Callable[[int, int], bool]] = {
    "eq": lambda a, b: a == b, "ne": lambda a, b: a != b,
    "lt": lambda a, b: a < b, "le": lambda a, b: a <= b, "gt": lambda a, b: a > b, "ge": lambda a, b: a >= b,
    "lo": lambda a, b: a < b, "ls": lambda a, b: a <= b, "hi": lambda a, b: a > b, "hs": lambda a, b: a >= b,
}  # fmt: skip
LOGIC: dict[str, Callable[[int, int], int]] = {
    "and": lambda a, b: a & b, "or": lambda a, b: a | b, "xor": lambda a, b: a ^ b,
}  # fmt: skip
ARITHMETIC: dict[str, Callable[[int, int], int]] = {
    **LOGIC, "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b, "min": min, "max": max,
}  # fmt: skip


def execute(
    text: str,
    constraints: str,
    inputs: Sequence[int],
    load: Callable[[Access], Sequence[int]],
    store: Callable[[Access, Sequence[int]], None] | None = None,
    *,
    clock: Callable[[], int] | None = None,
    max_steps: int = 100_000,
) -> Result:
    """Run a text to its end.

    Args:
        inputs: bits of the input operands, in their order.
        load: called at each load with what is loaded; returns as many unsigned integers.
        store: called at each store with the values.
        clock: nanoseconds, for %globaltimer; by default one per instruction, and those of nanosleep.

    Raises:
        PtxError: for a mistake in the text, an instruction unknown here, or more than `max_steps` instructions.
    """
    scope = _Scope()
    outputs = _operands(constraints, inputs, scope)
    thread = _Thread(_parse(text, scope), load, store, clock)
    while thread.at < len(thread.instructions):
        if thread.result.steps >= max_steps:
            raise PtxError(f"no end after {max_steps} instructions")
        instruction = thread.instructions[thread.at]
        try:
            thread.step(instruction)
        except PtxError as error:
            raise PtxError(f"{error}, in {instruction.text!r}") from None
    thread.result.outputs = [register.read() for register in outputs]
    return thread.result


class _Thread:
    def __init__(
        self,
        instructions: list[_Instruction],
        load: Callable[[Access], Sequence[int]],
        store: Callable[[Access, Sequence[int]], None] | None,
        clock: Callable[[], int] | None,
    ):
        self.instructions, self.load, self.store, self.clock = instructions, load, store, clock
        self.at = 0
        self.result = Result([], 0, 0)

    def step(self, instruction: _Instruction) -> None:
        self.at += 1
        self.result.steps += 1
        self.result.now += 1
        if instruction.guard:
            taken = self.predicate(instruction.guard, instruction.scope)
            if not taken:
                return
        name = instruction.name
        if name in NOTHING:
            return
        method = getattr(self, f"do_{name}", None)
        if method is None:
            if name not in ARITHMETIC:
                raise PtxError(f"{name!r} is unknown here")
            method = self.arithmetic
        method(instruction)

    # ---- operands ----------------------------------------------------------------------------------------------------

    def predicate(self, name: str, scope: _Scope) -> bool:
        register = scope.register(name.lstrip("!"))
        if register.bits != 1:
            raise PtxError(f"{name} is no predicate")
        return bool(register.read()) != name.startswith("!")

    def value(self, operand: str, bits: int, scope: _Scope) -> int:
        """Unsigned."""
        if operand == "%globaltimer":
            return self.clock() if self.clock else self.result.now
        if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", operand):
            return int(operand.rstrip("U"), 0) & ((1 << bits) - 1)
        if re.fullmatch(r"0[fF][0-9a-fA-F]{8}", operand):
            return int(operand[2:], 16)
        register = scope.register(operand)
        if register.bits != bits:
            raise PtxError(f"{operand} has {register.bits} bits, {bits} are needed")
        return register.read()

    def write(self, operand: str, value: int, bits: int, scope: _Scope) -> None:
        if operand == "_":
            return
        register = scope.register(operand)
        if register.bits != bits:
            raise PtxError(f"{operand} has {register.bits} bits, not {bits}")
        register.value = value & ((1 << bits) - 1)

    def kind(self, instruction: _Instruction) -> tuple[str, int]:
        """The type of an instruction: its last word."""
        if instruction.modifiers[-1:] == ("pred",):
            return "pred", 1
        if not instruction.modifiers:
            raise PtxError("a type is missing")
        return instruction.modifiers[-1], _bits(instruction.modifiers[-1])

    def values(self, instruction: _Instruction, operands: Sequence[str]) -> list[int]:
        """Of an instruction's type: signed where it is."""
        kind, bits = self.kind(instruction)
        found = [self.value(operand, bits, instruction.scope) for operand in operands]
        return [_signed(value, bits) for value in found] if kind.startswith("s") else found

    # ---- instructions ------------------------------------------------------------------------------------------------

    def arithmetic(self, instruction: _Instruction) -> None:
        kind, bits = self.kind(instruction)
        if kind.startswith("f"):
            raise PtxError(f"arithmetic of {kind} is unknown here")
        allowed = {"mul": ("lo",)}.get(instruction.name, ())
        if any(word not in allowed for word in instruction.modifiers[:-1]):
            raise PtxError(f"{'.'.join(instruction.modifiers)} is unknown here")
        target, *sources = instruction.operands
        a, b = self.values(instruction, sources)
        self.write(target, ARITHMETIC[instruction.name](a, b), bits, instruction.scope)

    def do_not(self, instruction: _Instruction) -> None:
        target, source = instruction.operands
        (a,) = self.values(instruction, [source])
        self.write(target, ~a, self.kind(instruction)[1], instruction.scope)

    def do_mov(self, instruction: _Instruction) -> None:
        target, source = instruction.operands
        self.write(target, self.values(instruction, [source])[0], self.kind(instruction)[1], instruction.scope)

    def do_mad(self, instruction: _Instruction) -> None:
        if instruction.modifiers[0] != "lo":
            raise PtxError("only mad.lo is known here")
        target, *sources = instruction.operands
        a, b, c = self.values(instruction, sources)
        self.write(target, a * b + c, self.kind(instruction)[1], instruction.scope)

    def shift(self, instruction: _Instruction, left: bool) -> None:
        target, source, by = instruction.operands
        (a,) = self.values(instruction, [source])
        bits = self.kind(instruction)[1]
        count = min(self.value(by, 32, instruction.scope), bits)  # clamped, as PTX does
        self.write(target, a << count if left else a >> count, bits, instruction.scope)

    def do_shl(self, instruction: _Instruction) -> None:
        self.shift(instruction, True)

    def do_shr(self, instruction: _Instruction) -> None:
        self.shift(instruction, False)

    def do_lop3(self, instruction: _Instruction) -> None:
        target, *sources, table = instruction.operands
        a, b, c = self.values(instruction, sources)
        out = 0
        for bit in range(32):
            row = (a >> bit & 1) << 2 | (b >> bit & 1) << 1 | (c >> bit & 1)
            out |= (int(table, 0) >> row & 1) << bit
        self.write(target, out, 32, instruction.scope)

    def do_setp(self, instruction: _Instruction) -> None:
        comparison, *logic = instruction.modifiers[:-1]
        targets, a, b, *third = instruction.operands
        if comparison not in COMPARISONS or self.kind(instruction)[0].startswith("f"):
            raise PtxError("this comparison is unknown here")
        found = COMPARISONS[comparison](*self.values(instruction, [a, b]))
        pair = [found, not found]
        if logic:
            other = self.predicate(third[0], instruction.scope)
            pair = [bool(LOGIC[logic[0]](value, other)) for value in pair]
        for target, value in zip(targets.split("|"), pair, strict=False):
            self.write(target.strip(), int(value), 1, instruction.scope)

    def do_selp(self, instruction: _Instruction) -> None:
        target, a, b, chooses = instruction.operands
        chosen = a if self.predicate(chooses, instruction.scope) else b
        self.write(target, self.values(instruction, [chosen])[0], self.kind(instruction)[1], instruction.scope)

    def do_bra(self, instruction: _Instruction) -> None:
        (target,) = instruction.operands
        self.at = instruction.scope.label(target)

    def do_cvt(self, instruction: _Instruction) -> None:
        target, source = instruction.operands
        *rounding, new, old = instruction.modifiers
        if (*rounding, new, old) == ("rna", "tf32", "f32"):
            bits = self.value(source, 32, instruction.scope)
            nan = (bits & 0x7FFFFFFF) > 0x7F800000
            self.write(target, 0x7FFFFFFF if nan else (bits + 0x1000) & 0xFFFFE000, 32, instruction.scope)
            return
        if rounding or "f" in (new[0], old[0]):
            raise PtxError("this conversion is unknown here")
        value = self.value(source, _bits(old), instruction.scope)
        self.write(target, _signed(value, _bits(old)) if old[0] == "s" else value, _bits(new), instruction.scope)

    def do_nanosleep(self, instruction: _Instruction) -> None:
        self.result.now += self.value(instruction.operands[0], 32, instruction.scope)

    def access(self, instruction: _Instruction, place: str) -> Access:
        match = re.fullmatch(r"\[\s*([\w$%]+)\s*(?:\+\s*(-?\w+)\s*)?\]", place)
        if match is None:
            raise PtxError(f"no address: {place!r}")
        address = self.value(match[1], 64, instruction.scope) + int(match[2] or "0", 0)
        bits = self.kind(instruction)[1]
        count = next((int(word[1:]) for word in instruction.modifiers if re.fullmatch(r"v[248]", word)), 1)
        if address % (bits // 8 * count):
            raise PtxError(f"address {address:#x} is not aligned to {bits // 8 * count} bytes")
        if not any(word.split("::")[0] == "global" for word in instruction.modifiers):
            raise PtxError("only global memory is known here")
        found = Access(address, bits, count, instruction.modifiers)
        self.result.accesses.append(found)
        return found

    def do_ld(self, instruction: _Instruction) -> None:
        targets, place = instruction.operands
        access = self.access(instruction, place)
        values = self.load(access)
        names = _split(targets.strip("{}"))
        if not len(names) == len(values) == access.count:
            raise PtxError(f"{access.count} elements, {len(names)} registers, {len(values)} values")
        for name, value in zip(names, values, strict=True):
            self.write(name, value, access.bits, instruction.scope)

    def do_st(self, instruction: _Instruction) -> None:
        place, sources = instruction.operands
        access = self.access(instruction, place)
        names = _split(sources.strip("{}"))
        if len(names) != access.count:
            raise PtxError(f"{access.count} elements, {len(names)} registers")
        if self.store is None:
            raise PtxError("no memory to store to")
        self.store(access, [self.value(name, access.bits, instruction.scope) for name in names])
