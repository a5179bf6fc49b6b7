"""What a Chrome trace of torch.profiler says of a call: the time of its parts, and of its launches.

Ranges `tritongru: <part>` (tritongru/parts.py) tell the parts, ranges `tritongru profile: forward` and
`backward` the passes. A pure function of the parsed file: no GPU, no profiler.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from ..parts import PREFIX

PASSES = ("forward", "backward")
PASS = "tritongru profile: "  # and the pass: ranges around the calls
ATEN, ELSEWHERE = "PyTorch's own GRU", "elsewhere"
ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")  # categories of a trace's events

Event = Mapping[str, Any]  # of a Chrome trace, times in microseconds
Counted = tuple[str, Mapping[str, Any]]  # a Triton launch: kernel name, what kernels/metadata.py tells of it


@dataclass(frozen=True)
class Part:
    """One part in one pass, per call; launches are those of the device, None where the trace has none."""

    pass_: str
    name: str
    us: float
    launches: float | None


@dataclass(frozen=True)
class Row:
    """Launches of one name (or ops of the CPU), per call; bytes and flops of all of them, None where not counted."""

    name: str
    count: float
    each_us: float | None  # median over all
    us: float | None  # of all in a call
    bytes: int | None = None
    flops: int | None = None


@dataclass(frozen=True)
class Split:
    """What a trace says, as medians over the calls."""

    parts: tuple[Part, ...]
    rows: tuple[Row, ...]
    wall_us: Mapping[str, float]  # of each pass, on the host's clock
    notes: tuple[str, ...] = ()


def _end(event: Event) -> float:
    return float(event["ts"] + event.get("dur", 0))


def _in_order(event: Event) -> tuple[float, float]:
    return event["ts"], -event.get("dur", 0)  # what encloses another begins before it, or with it


def enclosed(events: Iterable[Event]) -> Iterator[tuple[Event, Event | None]]:
    """Each event with the one that encloses it most closely on its thread."""
    open_: dict[Any, list[Event]] = {}
    for event in sorted(events, key=_in_order):
        stack = open_.setdefault((event.get("pid"), event.get("tid")), [])
        while stack and _end(stack[-1]) <= event["ts"]:
            stack.pop()
        yield event, stack[-1] if stack else None
        stack.append(event)


def own_times(events: Iterable[Event]) -> Iterator[tuple[Event, float]]:
    """Each event with its microseconds outside those that it encloses."""
    inside: Counter[int] = Counter()
    listed = list(enclosed(events))
    for event, around in listed:
        inside[id(around)] += event.get("dur", 0)
    for event, _ in listed:
        yield event, event.get("dur", 0) - inside[id(event)]


def _of(events: Sequence[Event], *categories: str) -> list[Event]:
    return [e for e in events if e.get("ph") == "X" and e.get("cat") in categories]


def _labels(events: Sequence[Event]) -> dict[int, str]:
    """The part of each range that has one, by the event's id.

    A range `tritongru: <part>` says its own. PyTorch's GRU has none: its forward is an op, and a node of its backward
    has the sequence number of the op that made it, which of those with this number began last.
    """
    found = {id(e): e["name"][len(PREFIX) :] for e in _of(events, "user_annotation") if e["name"].startswith(PREFIX)}
    ops = sorted(_of(events, "cpu_op"), key=_in_order)
    aten = [e for e in ops if e["name"] in ("aten::gru", "aten::gru_cell")]
    makers: dict[Any, Event] = {}
    nodes = []
    for e in ops:
        number = e.get("args", {}).get("Sequence number")
        if number is not None and e["name"].startswith("autograd::engine::evaluate_function"):
            nodes.append((e, number))
        elif number is not None and not e["args"].get("Fwd thread id"):
            makers[number] = e
    theirs = {id(e) for e in aten}  # and what runs inside
    for e, around in enclosed([*aten, *makers.values()]):
        if id(around) in theirs:
            theirs.add(id(e))
    made_by = {number: id(e) for number, e in makers.items()}
    return found | {id(e): ATEN for e in aten} | {id(e): ATEN for e, n in nodes if made_by.get(n) in theirs}


def read(trace: Mapping[str, Any], calls: int, counted: Mapping[str, Sequence[Counted]], kind: str) -> Split:
    """The split of a Chrome trace of torch.profiler over `calls` calls.

    Args:
        trace: the parsed file. Ranges `tritongru profile: forward` and `backward` are around the passes of a call.
        counted: per pass, the Triton launches of one call in their order.
        kind: "cuda" (the times are those of kernels), "cpu" (of ranges and ops) or "interpreter" (as on the CPU; the
            launches are the counted ones, and have no times).
    """
    events = trace["traceEvents"]
    windows: list[tuple[str, int, Event]] = []
    wall: dict[str, list[float]] = {}
    for e in sorted(_of(events, "user_annotation"), key=_in_order):
        if (p := e["name"].removeprefix(PASS)) in PASSES:
            windows.append((p, len(wall.setdefault(p, [])), e))
            wall[p].append(e.get("dur", 0))

    def when(event: Event) -> tuple[str, int] | None:
        """The pass that an event began in, and the number of the call."""
        return next(((p, call) for p, call, e in windows if e["ts"] <= event["ts"] <= _end(e)), None)

    labels = _labels(events)
    ranges = [e for e in events if id(e) in labels]
    of_parts: list[tuple[tuple[str, str], int, float]] = []  # pass and part, number of the call, microseconds
    of_rows: list[tuple[str, int, float]] = []  # name, number of the call, microseconds
    notes: list[str] = []
    if kind == "cuda":
        launched = {
            e["args"]["correlation"]: e
            for e in _of(events, "cuda_runtime", "cuda_driver")
            if "correlation" in e.get("args", {})
        }
        part_of: dict[int, str] = {}
        for e, outer in enclosed([*ranges, *launched.values()]):
            if outer is not None:
                part_of[id(e)] = labels.get(id(outer)) or part_of.get(id(outer), ELSEWHERE)
        for kernel in _of(events, *ON_DEVICE):
            launch = launched.get(kernel.get("args", {}).get("correlation"))
            at = when(launch or kernel)  # passes wait for the device: a kernel runs in the one that launched it
            if at is not None:
                of_parts.append(((at[0], part_of.get(id(launch), ELSEWHERE)), at[1], kernel.get("dur", 0)))
                of_rows.append((kernel["name"], at[1], kernel.get("dur", 0)))
        if not of_rows:
            notes.append("no kernel in the trace: the profiler saw nothing of the GPU (does CUPTI work here?)")
        launches = Counter(key for key, _, _ in of_parts)
        rows = _with_counts(_timed_rows(of_rows, calls), counted, notes)
    else:
        of_parts = [((at[0], labels[id(e)]), at[1], us) for e, us in own_times(ranges) if (at := when(e)) is not None]
        for p, call, e in windows:
            inside = sum(us for (of, _), of_call, us in of_parts if (of, of_call) == (p, call))
            of_parts.append(((p, ELSEWHERE), call, e.get("dur", 0) - inside))
        launches = Counter({(p, "recurrence"): calls * len(counted.get(p, ())) for p in wall})
        if kind == "cpu":
            own = own_times(_of(events, "cpu_op"))
            rows = _timed_rows([(e["name"], at[1], us) for e, us in own if (at := when(e)) is not None], calls)
        else:
            rows = _counted_rows(counted)
    parts = [
        Part(p, name, median(us), launches[p, name] / calls if kind == "cuda" or launches[p, name] else None)
        for (p, name), us in _sums(of_parts, calls).items()
    ]
    parts.sort(key=lambda part: (PASSES.index(part.pass_), part.name == ELSEWHERE))
    return Split(tuple(parts), tuple(rows), {p: median(us) for p, us in wall.items()}, tuple(notes))


def _sums(pieces: Iterable[tuple[Any, int, float]], calls: int) -> dict[Any, list[float]]:
    """By key: microseconds in each call, from (key, number of the call, microseconds)."""
    found: dict[Any, list[float]] = {}
    for key, call, us in pieces:
        found.setdefault(key, [0.0] * calls)[call] += us
    return found


def _timed_rows(of_calls: Iterable[tuple[str, int, float]], calls: int) -> list[Row]:
    """By name, the longest first, from (name, number of the call, microseconds)."""
    by_name: dict[str, list[tuple[str, int, float]]] = {}
    for name, call, us in of_calls:
        by_name.setdefault(name, []).append((name, call, us))
    found = [
        Row(name, len(each) / calls, median(us for *_, us in each), median(_sums(each, calls)[name]))
        for name, each in by_name.items()
    ]
    return sorted(found, key=lambda row: -(row.us or 0))


def _with_counts(rows: list[Row], counted: Mapping[str, Sequence[Counted]], notes: list[str]) -> list[Row]:
    """The rows with bytes and flops where every launch of the name was counted; in notes, what does not fit."""
    sums = {row.name: row for row in _counted_rows(counted)}
    found = []
    for row in rows:
        counts = sums.pop(row.name, None)
        if counts is not None and counts.count == row.count:
            row = replace(row, bytes=counts.bytes, flops=counts.flops)
        elif counts is not None:
            notes.append(f"{row.name}: {row.count:g} kernels of a call in the trace, {counts.count:g} launched")
        found.append(row)
    notes += [f"{name}: launched, and not in the trace" for name in sums]
    return found


def _counted_rows(counted: Mapping[str, Sequence[Counted]]) -> list[Row]:
    found: dict[str, Row] = {}
    for p in PASSES:
        for name, told in counted.get(p, ()):
            row = found.get(name, Row(name, 0, None, None, 0, 0))
            count, moved, flops = row.count + 1, (row.bytes or 0) + told["bytes"], (row.flops or 0) + told["flops"]
            found[name] = replace(row, count=count, bytes=moved, flops=flops)
    return list(found.values())
