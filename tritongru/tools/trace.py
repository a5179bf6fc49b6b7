"""What a Chrome trace of torch.profiler says of a call: the time of its parts, and of its launches.

Ranges `tritongru: <part>` (tritongru/parts.py) tell the parts, ranges `tritongru profile: forward` and `backward` the
passes. A pure function of the parsed file: no GPU, no profiler.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from ..parts import PREFIX

PASS = "tritongru profile: "  # and the pass: ranges around the calls
ATEN, ELSEWHERE = "PyTorch's own GRU", "elsewhere"
HOST = ("user_annotation", "cpu_op", "cuda_runtime", "cuda_driver")  # categories of a trace's events
DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")

Event = Mapping[str, Any]  # of a Chrome trace, times in microseconds


class Figures(NamedTuple):
    """Of one call, the mean over those of a trace."""

    us: float
    n: float  # of launches, on the CPU of ops and ranges


class Split(NamedTuple):
    parts: dict[tuple[str, str], Figures]  # by pass and part
    rows: dict[str, Figures]  # by the name of a launch, on the CPU of an op; the longest first
    wall_us: dict[str, float]  # of each pass, on the host's clock


def _end(event: Event) -> float:
    return float(event["ts"] + event["dur"])


def enclosed(events: Iterable[Event]) -> Iterator[tuple[Event, Event | None]]:
    """Each event with the one that encloses it most closely on its thread, in the order in which they begin."""
    open_: dict[Any, list[Event]] = {}
    for event in sorted(events, key=lambda e: (e["ts"], -e["dur"])):  # what encloses another begins no later
        stack = open_.setdefault((event["pid"], event["tid"]), [])
        while stack and _end(stack[-1]) <= event["ts"]:
            stack.pop()
        yield event, stack[-1] if stack else None
        stack.append(event)


def read(trace: Mapping[str, Any], calls: int, on_gpu: bool) -> Split:
    """The split of a parsed trace of torch.profiler over `calls` calls.

    on_gpu: times are those of kernels, each in the part that launched it; otherwise of ranges and ops, each without
    what it encloses.
    """
    events = [e for e in trace["traceEvents"] if "dur" in e and e.get("cat") in (*HOST, *DEVICE)]
    host = [e for e in events if e["cat"] in HOST]
    passes = [(e["name"].removeprefix(PASS), e) for e in host if e["name"].startswith(PASS)]
    part: dict[int, str] = {}  # by the event's id, as below
    own_us: Counter[int] = Counter()
    made_by: dict[Any, str] = {}  # the part of the op that made an autograd node, by the node's sequence number
    for e, around in enclosed(host):
        number = e.get("args", {}).get("Sequence number")
        part[id(e)] = part[id(around)] if around else ELSEWHERE
        if e["name"].startswith(PREFIX):
            part[id(e)] = e["name"].removeprefix(PREFIX)
        elif e["name"] in ("aten::gru", "aten::gru_cell") or (
            e["name"].startswith("autograd::engine::evaluate_function") and made_by.get(number) == ATEN
        ):
            part[id(e)] = ATEN
        if number is not None and not e.get("args", {}).get("Fwd thread id"):
            made_by[number] = part[id(e)]  # of ops with this number it is the last: others made no node
        own_us[id(e)] += e["dur"]
        own_us[id(around)] -= e["dur"]
    launched = {e["args"]["correlation"]: e for e in host if "correlation" in e.get("args", {})}
    of_parts: Counter[tuple[str, str]] = Counter()
    of_names: Counter[str] = Counter()
    counts: Counter[Any] = Counter()
    for e in [e for e in events if (e["cat"] in DEVICE) == on_gpu]:
        begun_by = launched.get(e.get("args", {}).get("correlation"), e) if on_gpu else e
        # Passes wait for the device: a kernel runs in the one that launched it.
        for in_pass in [name for name, p in passes if p["ts"] <= begun_by["ts"] <= _end(p)]:
            key, us = (in_pass, part.get(id(begun_by), ELSEWHERE)), e["dur"] if on_gpu else own_us[id(e)]
            of_parts[key] += us
            of_names[e["name"]] += us
            counts.update([key, e["name"]])
    parts = {key: Figures(us / calls, counts[key] / calls) for key, us in of_parts.items()}
    rows = {name: Figures(us / calls, counts[name] / calls) for name, us in of_names.most_common()}
    wall: Counter[str] = Counter()
    for name, e in passes:
        wall[name] += e["dur"]
    order = list(wall)
    in_order = sorted(parts, key=lambda key: (order.index(key[0]), key[1] == ELSEWHERE))
    return Split({key: parts[key] for key in in_order}, rows, {name: us / calls for name, us in wall.items()})
