"""What a Chrome trace of torch.profiler says of a call (tritongru/tools/trace.py): of events as a GPU leaves them."""

from __future__ import annotations

from pathlib import Path

import torch
from rich.console import Console

from tritongru.tools import profile
from tritongru.tools.trace import ATEN, ELSEWHERE, enclosed, own_times, read


def event(cat: str, name: str, ts: float, dur: float, tid: int = 1, **args) -> dict:
    return {"ph": "X", "cat": cat, "name": name, "pid": 7, "tid": tid, "ts": ts, "dur": dur, "args": args}


def a_range(name: str, ts: float, dur: float, tid: int = 1) -> dict:
    return event("user_annotation", f"tritongru: {name}", ts, dur, tid)


def a_pass(name: str, ts: float, dur: float) -> dict:
    return event("user_annotation", f"tritongru profile: {name}", ts, dur)


def launched(name: str, at: float, runs: float, dur: float, number: int, tid: int = 1, driver: bool = False) -> list:
    """A launch on the host, and what runs on the device later."""
    api = ("cuda_driver", "cuLaunchKernelEx") if driver else ("cuda_runtime", "cudaLaunchKernel")
    cat = "gpu_memset" if name.startswith("Memset") else "kernel"
    return [event(*api, at, 2, tid, correlation=number), event(cat, name, runs, dur, tid=99, correlation=number)]


def times(split) -> dict:
    return {(part.pass_, part.name): (part.us, part.launches) for part in split.parts}


GPU = [
    a_pass("forward", 0, 1000),
    a_range("recurrence", 100, 500),
    a_range("projection", 150, 100),
    *launched("gemm", 160, 180, 30, 1),
    *launched("step_forward", 300, 650, 11, 2, driver=True),  # no op around it, and it runs after the range has ended
    *launched("step_forward", 310, 670, 13, 3, driver=True),
    *launched("softmax", 700, 720, 5, 4),  # outside all ranges
    event("kernel", "orphan", 800, 7, tid=99),  # no correlation
    event("kernel", "stranger", 810, 9, tid=99, correlation=555),  # of which there is no launch
    a_pass("backward", 2000, 1000),  # on the main thread, which waits
    a_range("gradient products", 2100, 800, tid=2),
    a_range("recurrence", 2200, 200, tid=2),
    a_range("fill", 2210, 20, tid=2),
    *launched("Memset (Device)", 2215, 2230, 2, 5, tid=2),
    *launched("step_backward", 2300, 2400, 17, 6, tid=2, driver=True),
    *launched("gemm", 2500, 2600, 19, 7, tid=2),
    *launched("gemm", 2950, 2960, 23, 8, tid=2),
    *launched("gemm", 3500, 3600, 1000, 9),  # between the passes
]


def counts(bytes: int, flops: int) -> dict:
    return {"bytes": bytes, "flops": flops}


COUNTED = {
    "forward": [("step_forward", counts(1000, 100)), ("step_forward", counts(2000, 200))],
    "backward": [("step_backward", counts(4000, 400))],
}


def test_a_kernel_belongs_to_the_innermost_part_that_launched_it():
    split = read({"traceEvents": GPU}, 1, COUNTED, "cuda")
    assert times(split) == {
        ("forward", "projection"): (30, 1),
        ("forward", "recurrence"): (24, 2),
        ("forward", ELSEWHERE): (5 + 7 + 9, 3),
        ("backward", "fill"): (2, 1),
        ("backward", "recurrence"): (17, 1),
        ("backward", "gradient products"): (19, 1),
        ("backward", ELSEWHERE): (23, 1),
    }
    assert split.wall_us == {"forward": 1000, "backward": 1000} and not split.notes


def test_kernels_have_the_counts_of_their_launches():
    rows = {row.name: row for row in read({"traceEvents": GPU}, 1, COUNTED, "cuda").rows}
    row = rows["step_forward"]
    assert (row.count, row.each_us, row.us, row.bytes, row.flops) == (2, 12, 24, 3000, 300)
    assert rows["gemm"].count == 3 and rows["gemm"].bytes is None
    assert next(iter(rows)) == "gemm"  # the longest first


def test_what_does_not_fit_is_said_and_not_divided():
    counted = {"forward": [*COUNTED["forward"], ("step_forward", counts(1, 1)), ("sequence_forward", counts(1, 1))]}
    split = read({"traceEvents": GPU}, 1, counted, "cuda")
    assert {row.name: row.bytes for row in split.rows}["step_forward"] is None
    assert [note.partition(":")[0] for note in split.notes] == ["step_forward", "sequence_forward"]


def test_a_trace_without_kernels_says_so():
    split = read({"traceEvents": [a_pass("forward", 0, 10), a_range("recurrence", 1, 5)]}, 1, {}, "cuda")
    assert not split.parts and "no kernel" in split.notes[0]


def test_several_calls_give_medians():
    events = []
    for call, dur in enumerate((10, 1000, 30)):
        at = 5000 * call
        events += [a_pass("forward", at, 2000), a_range("recurrence", at + 1, 500)]
        events += launched("step_forward", at + 2, at + 600, dur, call, driver=True)
    split = read({"traceEvents": events}, 3, {"forward": [("step_forward", counts(60, 6))]}, "cuda")
    assert times(split) == {("forward", "recurrence"): (30, 1)}
    assert [(row.count, row.us, row.bytes) for row in split.rows] == [(1, 30, 60)]


def op(name: str, ts: float, dur: float, number: int | None = None, backward: bool = False, tid: int = 1) -> dict:
    args = {} if number is None else {"Sequence number": number, "Fwd thread id": int(backward)}
    return event("cpu_op", name, ts, dur, tid, **args)


NODE = "autograd::engine::evaluate_function: "
ATEN_CALL = [
    a_pass("forward", 0, 1000),
    op("aten::zeros", 10, 5, 4),  # makes no node: the number is the next op's
    op("aten::gru", 100, 300, 4),
    op("aten::_cudnn_rnn", 120, 200, 4),
    *launched("cudnn", 130, 140, 40, 1),
    op("aten::linear", 500, 50, 5),
    *launched("gemm", 510, 560, 3, 2),
    a_pass("backward", 2000, 1000),
    op(NODE + "AddmmBackward0", 2100, 50, 5, backward=True, tid=2),
    *launched("gemm", 2110, 2120, 5, 3, tid=2),
    op(NODE + "CudnnRnnBackward0", 2200, 300, 4, backward=True, tid=2),
    *launched("cudnn", 2210, 2300, 90, 4, tid=2),
]


def test_pytorchs_own_gru_is_a_part_each_way():
    assert times(read({"traceEvents": ATEN_CALL}, 1, {}, "cuda")) == {
        ("forward", ATEN): (40, 1),
        ("forward", ELSEWHERE): (3, 1),
        ("backward", ATEN): (90, 1),
        ("backward", ELSEWHERE): (5, 1),
    }
    assert times(read({"traceEvents": ATEN_CALL}, 1, {}, "cpu")) == {
        ("forward", ATEN): (300, None),
        ("forward", ELSEWHERE): (700, None),
        ("backward", ATEN): (300, None),
        ("backward", ELSEWHERE): (700, None),
    }


def test_on_the_cpu_a_part_has_the_time_outside_the_parts_inside_it():
    split = read({"traceEvents": GPU}, 1, {}, "cpu")
    assert times(split)["forward", "recurrence"] == (400, None)
    assert times(split)["backward", "gradient products"] == (600, None)
    assert times(split)["backward", "recurrence"] == (180, None)
    for pass_ in ("forward", "backward"):
        assert sum(part.us for part in split.parts if part.pass_ == pass_) == split.wall_us[pass_]


def test_events_that_follow_each_other_do_not_enclose():
    a, b, c, d = op("a", 0, 10), op("b", 0, 5), op("c", 5, 5), op("d", 5, 5, tid=2)
    assert {e["name"]: outer and outer["name"] for e, outer in enclosed([d, c, b, a])} == {
        "a": None, "b": "a", "c": "a", "d": None,
    }  # fmt: skip
    assert {e["name"]: us for e, us in own_times([a, b, c, d])} == {"a": 0, "b": 5, "c": 5, "d": 5}


def test_what_is_printed_of_a_gpu_has_rates(capsys):
    """Of a trace that a GPU could have left."""
    split = read({"traceEvents": GPU}, 1, COUNTED, "cuda")
    profile._print(Console(width=120), split, torch.device("cpu"), "cuda", ["a line [0]"], 1, Path("t.json"))
    said = capsys.readouterr().out
    assert "GB/s" in said and "0.125" in said.split("step_forward")[1] and "host's clock" in said
