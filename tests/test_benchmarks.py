"""The measuring itself: suites, how samples are taken, what is refused and kept, what a row says. No time is tested."""

import weakref
from contextlib import nullcontext
from itertools import count
from unittest.mock import Mock

import pytest
import torch

from benchmarks import cpu, hostcost, providers, results, run, suites, timing, work
from benchmarks.__main__ import main
from benchmarks.cases import BASELINE, Case, Entry
from benchmarks.providers import PROVIDERS, Provider, find
from benchmarks.results import COLUMNS, ROWS, SCHEMA, Environment, OtherSchemaError, ResultsFile, Row, read
from benchmarks.suites import SUITES
from benchmarks.timing import CudaMeter, HostMeter, Sample, Timed, WaitsError, interleave
from benchmarks.workloads import BY_CASE, WORKLOADS
from tritongru.planning import choose, describe, tuned

DENSE, OTHER = Case(4, 3, 5, 6), Case(4, 3, 5, 7)
PASSES = ("inference", "forward", "forward+backward")
HERE = Environment("2026-01-01", "a device", "1.2", "2.11", "3.6", "9", "0.1", "c0ffee", "no")
CPU = torch.device("cpu")


class Meter(HostMeter):
    """Every look at the clock is a millisecond later. Sampled calls are counted, not made: each takes `us`, in a graph,
    where there are any, 30; a call that `refuses` is not captured."""

    def __init__(self, us=lambda n: 100.0, graphs=False, refuses=None):
        self.us, self.graphs, self.refuses = us, graphs, refuses
        self.timed, self.replays, self.l2 = [], [], "warm" if graphs else ""
        super().__init__(count(0.0, 1e-3).__next__)

    def captured(self, call):
        if self.refuses is not None:
            raise self.refuses
        self.replays += [lambda: None] * self.graphs
        return self.replays[-1] if self.graphs else None

    def sample(self, timed):
        self.timed.append(timed)
        return Sample(30.0, 5.0) if timed.call in self.replays else Sample(self.us(len(self.timed)), 50.0)


def wrong(output, h_n):
    return output + 0.5 * (torch.arange(output.shape[-1]) == output.shape[-1] - 1), h_n


def made(change, **options):
    """A provider of nn.GRU but for what `change` makes of its results; an exception is raised instead."""
    change = change if callable(change) else Mock(side_effect=change)

    def make(case, **place):
        module = torch.nn.GRU(case.I, case.H, **place)
        module.register_forward_hook(lambda module, given, results: change(*results))
        return module

    return Provider("theirs", make, **options)


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """A function that runs entries of nn.GRU and `others` on the CPU: exit code and rows."""

    def measure(cases, others, meter=None, passes=PASSES, ends=float("inf"), **how):
        for provider in others:
            monkeypatch.setitem(PROVIDERS, provider.name, provider)
        names = (BASELINE, *(provider.name for provider in others))
        with ResultsFile(tmp_path / ROWS, HERE) as file:
            code = run.run([Entry(case, passes, names, **how) for case in cases], meter or Meter(), file, ends)
        return code, read(tmp_path / ROWS)

    return measure


DEFAULT = PROVIDERS["default"]
CASES = [
    DENSE,
    Case(4, 3, 5, 6, packed=True, bidirectional=True),
    Case(4, 3, 5, 6, padded=True, resets=0.3, bidirectional=True),  # of nn.GRU sequence by sequence
    Case(1, 3, 5, 6, cell=True),
    Case(3, 2, 4, 5, layers=2, dtype="bf16"),
    Case(4, 3, 5, 6, blocks=3),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_right_provider_gets_a_row_for_every_pass(measured, case):
    code, rows = measured([case], [DEFAULT, PROVIDERS["reference"]])
    expected = [(name, pass_, "ok") for pass_ in PASSES for name in (BASELINE, "default", "reference")]
    assert code == 0 and [(r["provider"], r["pass"], r["status"]) for r in rows] == expected
    for row in rows:
        assert float(row["p50_us"]) == 100 and float(row["host_us"]) == 50 and float(row["ratio"]) == 1
        assert float(row["us_per_step"]) == pytest.approx(100 / (case.T * case.layers), rel=1e-5)
        assert row["schema"] == str(SCHEMA) and row["commit"] == "c0ffee" and row["case"] == case.name
        assert row["error_output"] and row["error_w_hh"] and bool(row["error_h_n"]) != case.cell
        assert row["p99_us"] == "" and row["cell"] == ("yes" if case.cell else "no")


def test_streaming_is_sampled_call_by_call_and_has_a_tail(measured):
    meter = Meter(us=lambda n: 1000.0 if n % 50 == 0 else 10.0)
    code, rows = measured([Case(1, 1, 5, 6)], [DEFAULT], meter, ("streaming",))
    assert code == 0 and {timed.calls for timed in meter.timed} == {1} and len(rows) == 2
    assert all(float(r["p50_us"]) == 10 and float(r["p99_us"]) == 1000 for r in rows)
    assert all(r["error_output"] and not r["error_x"] for r in rows)  # nothing trains: no gradient is looked at


REFUSAL = RuntimeError("backend 'sequence' cannot run here: too large; these can: step")
OUTCOMES = {  # by what a provider does: exit code, status, and how the note begins
    "wrong": (made(wrong, ours=True), 1, "wrong", "output "),
    "a wrong gradient": (made(lambda y, h_n: (y, 2 * h_n - h_n.detach()), ours=True), 1, "wrong", "x "),
    "raising": (made(ValueError("not today")), 1, "error", "ValueError: not today"),
    "out of memory": (made(torch.OutOfMemoryError("full")), 0, "out of memory", "OutOfMemoryError"),
    "refusing": (made(REFUSAL), 0, "unserved", "RuntimeError: backend"),
    "declining": (made(None, unserved=lambda case: "not this one"), 0, "unserved", "not this one"),
}


@pytest.mark.parametrize(("provider", "expected", "status", "note"), OUTCOMES.values(), ids=OUTCOMES)
def test_what_is_not_right_is_said_and_not_timed(measured, provider, expected, status, note):
    """A row for every pass; the others are timed all the same, and nothing large of it is held meanwhile."""
    code, rows = measured([DENSE], [provider, DEFAULT])
    theirs = [r for r in rows if r["provider"] == "theirs"]
    assert code == expected and [r["pass"] for r in theirs] == list(PASSES)
    assert all(r["status"] == status and r["note"].startswith(note) and not r["p50_us"] for r in theirs)
    assert sum(r["status"] == "ok" and r["p50_us"] != "" for r in rows) == 6


def test_a_baseline_beyond_all_measure_is_said_and_still_a_yardstick(measured, monkeypatch):
    monkeypatch.setattr(work, "SANE", 1e-12)
    code, rows = measured([DENSE], [DEFAULT], passes=("forward",))
    assert code == 1 and [(r["status"], r["ratio"]) for r in rows] == [("wrong", ""), ("ok", "")]


def test_a_failing_truth_fails_every_row(measured, monkeypatch):
    monkeypatch.setattr(run, "_truth", Mock(side_effect=torch.OutOfMemoryError("8 GiB")))
    code, rows = measured([DENSE], [])
    assert code == 0 and len(rows) == 3
    assert {(r["status"], r["note"]) for r in rows} == {("out of memory", "float64: OutOfMemoryError: 8 GiB")}


THREADS = f"{torch.get_num_threads()} thread(s)"  # what a CPU's row says


def test_the_device_s_own_time_is_a_replay(measured, capsys):
    code, rows = measured([DENSE], [DEFAULT], Meter(graphs=True), ("forward",))
    assert code == 0 and [(r["p50_us"], r["device_us"], r["note"]) for r in rows] == [("100", "30", THREADS)] * 2
    assert "ratio 1.000  host 50.0, in a graph 30.0 ratio 1.000" in capsys.readouterr().out  # never one alone
    code, rows = measured([OTHER], [DEFAULT], Meter(graphs=True), ("forward",), replayed=True, rounds=3, note="again")
    assert code == 0 and [(r["p50_us"], r["device_us"], r["rounds"]) for r in rows[2:]] == [("30", "", "3")] * 2
    assert {r["note"] for r in rows[2:]} == {f"{THREADS}; again"}


def test_a_call_that_waits_for_the_device_is_timed_in_no_graph(measured):
    meter = Meter(graphs=True, refuses=WaitsError("in no CUDA graph"))
    code, rows = measured([DENSE, OTHER], [DEFAULT], meter, PASSES[1:])
    found = {(r["status"], r["p50_us"], r["device_us"], r["note"]) for r in rows}
    assert code == 0 and len(rows) == 8 and found == {("ok", "100", "", f"{THREADS}; in no CUDA graph")}
    code, rows = measured([DENSE], [DEFAULT], meter, PASSES[:1], replayed=True)
    assert code == 1 and {(r["status"], r["p50_us"]) for r in rows[8:]} == {("error", "")}


@pytest.mark.parametrize("error", [RuntimeError, torch.AcceleratorError])
@pytest.mark.parametrize("replayed", [False, True])
def test_a_capture_that_fails_ends_the_run_and_a_resumed_one_begins_behind_it(measured, tmp_path, replayed, error):
    meter = Meter(graphs=True, refuses=error("operation not permitted when stream is capturing"))
    code, rows = measured([DENSE, OTHER], [DEFAULT], meter, PASSES[:2], replayed=replayed)
    assert code == run.DEVICE_LOST and {r["case"] for r in rows} == {DENSE.name} and len(rows) == 4
    assert all("not captured in a CUDA graph: " in r["note"] for r in rows)
    if not replayed:  # what was timed before is a row all the same
        assert (rows[0]["status"], rows[0]["p50_us"], rows[0]["device_us"]) == ("ok", "100", "")
    entries = [Entry(case, PASSES[:2], (BASELINE, "default")) for case in (DENSE, OTHER)]
    assert run.unmeasured(entries, tmp_path / ROWS, HERE.date) == entries[1:]
    assert run.unmeasured(entries, tmp_path / ROWS, "2026-01-02") == entries


def test_a_lost_device_and_an_interruption_end_the_run_and_keep_its_rows(measured, capsys):
    code, rows = measured([DENSE, OTHER], [made(torch.AcceleratorError("illegal memory access")), DEFAULT])
    assert code == run.DEVICE_LOST and {r["case"] for r in rows} == {DENSE.name} and len(rows) == 9
    assert {(r["status"], r["note"]) for r in rows} == {("error", "AcceleratorError: illegal memory access")}
    assert "the device failed" in capsys.readouterr().out

    def stop(output, h_n):
        if h_n.shape[-1] == 7:
            raise KeyboardInterrupt
        return output, h_n

    code, rows = measured([DENSE, OTHER], [made(stop)])
    assert code == 130 and len(rows[9:]) == 6 and {r["case"] for r in rows} == {DENSE.name}
    assert "interrupted; the 6 rows so far" in capsys.readouterr().out


def test_what_is_not_checked_is_timed_at_once_and_what_is_only_checked_is_not_timed(measured):
    code, rows = measured([DENSE], [made(wrong, ours=True)], checked=False, rounds=2)
    assert code == 0 and len(rows) == 6 and all(r["p50_us"] and not r["error_output"] for r in rows)
    assert {r["rounds"] for r in rows} == {"2"}
    code, rows = measured([OTHER], [DEFAULT, made(wrong, ours=True)], rounds=0)
    assert code == 1 and len(rows[6:]) == 9 and all(r["error_output"] and not r["p50_us"] for r in rows[6:])
    found = [(r["provider"], r["status"]) for r in rows[6:]]
    assert set(found) == {(BASELINE, "ok"), ("default", "ok"), ("theirs", "wrong")}


def test_a_call_that_fails_while_it_is_timed_fails_alone(measured):
    calls = iter(range(8))  # as many as warm it up

    def later(output, h_n):
        if next(calls, None) is None:
            raise RuntimeError("a wait ran out")
        return output, h_n

    code, rows = measured([DENSE], [made(later), DEFAULT], HostMeter(), ("forward",), rounds=10)
    found = [(r["provider"], r["status"]) for r in rows]
    assert code == 1 and found == [("theirs", "error"), (BASELINE, "ok"), ("default", "ok")]


def test_a_spent_budget_says_what_was_not_measured(measured, monkeypatch, capsys):
    assert measured([DENSE, OTHER], [], ends=0.0) == (1, [])
    assert f"2 cases not measured, {DENSE.name} the first" in capsys.readouterr().out
    monkeypatch.setattr(run.time, "monotonic", iter([0.0, 2.0]).__next__)
    code, rows = measured([DENSE, OTHER], [], ends=1.0)
    assert code == run.SPENT and {r["case"] for r in rows} == {DENSE.name}


def test_rows_are_on_disk_as_they_come_and_appended(tmp_path):
    path = tmp_path / "new" / ROWS
    for run_ in range(2):
        with ResultsFile(path, HERE) as file:
            file.append(Row(DENSE, "step", "forward", p50_us=12.5))
            assert len(read(path)) == run_ + 1  # before it is closed
    row = read(path)[-1]
    assert tuple(row) == COLUMNS
    assert (row["device"], row["p50_us"], row["H"], row["directions"]) == ("a device", "12.5", "6", "1")


@pytest.mark.parametrize("change", [("schema,date", "schema,day"), ("\n2,", "\n1,")], ids=["columns", "number"])
def test_another_schema_is_refused_and_left_alone(tmp_path, change, capsys):
    path = tmp_path / cpu.FILE
    with ResultsFile(path, HERE) as file:
        file.append(Row(DENSE, "step", "forward"))
    path.write_text(path.read_text().replace(*change))
    before = path.read_text()
    with pytest.raises(OtherSchemaError, match="another schema"):
        ResultsFile(path, HERE)
    assert main(["cpu", "--out", str(tmp_path)]) == 2
    assert "another schema" in capsys.readouterr().err
    assert path.read_text() == before


def test_every_round_samples_every_call_in_changing_order():
    order, meter = [], HostMeter()
    meter.sample = lambda timed: order.append(timed.calls) or Sample(100.0, 50.0)
    interleave({str(i): Timed(lambda: None, i) for i in range(3)}, meter, rounds=20, seconds=1e9)
    rounds = [tuple(order[i : i + 3]) for i in range(0, 60, 3)]
    assert all(sorted(r) == [0, 1, 2] for r in rounds) and len(set(rounds)) > 1


def test_a_sample_is_per_call():
    made, meter = [], HostMeter(iter([10.0, 10.5]).__next__)
    assert meter.sample(Timed(lambda: made.append(1), 5)).time_us == pytest.approx(1e5)
    assert len(made) == 5
    assert timing.quantiles([3.0, 1.0, 2.0]) == pytest.approx([1.4, 2.0, 2.6])
    assert timing.quantiles(range(101), (0.99,)) == [99] and timing.quantiles([7.0]) == [7.0] * 3


@pytest.fixture
def captured(monkeypatch):
    """What `CudaMeter.captured` makes of a call; whether it was captured; and whether waiting is an error now."""
    graphs, modes = [], ["default"]
    for name in ("Stream", "current_stream", "CUDAGraph"):
        monkeypatch.setattr(torch.cuda, name, Mock)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: graphs.append(graph) or nullcontext())
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    return lambda call: CudaMeter.captured(HostMeter(), call), graphs, lambda: modes[-1] == "error"


def test_a_graph_is_captured_warm_and_holds_nothing_that_was_made(captured):
    made, (capture, _, _) = [], captured

    def call():
        result = torch.empty(1)
        made.append(weakref.ref(result))
        return result

    replay = capture(call)
    assert len(made) == 4 and not any(ref() for ref in made)
    replay()
    assert len(made) == 4  # the graph's launches, not the call again


@pytest.mark.parametrize("error", [RuntimeError("a synchronizing CUDA operation"), torch.AcceleratorError("ECC")])
def test_what_waits_for_the_device_is_found_before_a_capture_could_fail(captured, error):
    capture, graphs, waiting_is_an_error = captured

    def call():
        if waiting_is_an_error():
            raise error

    with pytest.raises(RuntimeError, match=str(error)) as found:
        capture(call)
    assert isinstance(found.value, WaitsError) == (type(error) is RuntimeError)
    assert graphs == [] and not waiting_is_an_error()


def test_the_rule_allows_what_nn_gru_itself_gets_wrong_and_no_nan():
    truth = {"output": torch.ones(2, dtype=torch.float64)}
    found = work.errors({"output": torch.tensor([1.0, float("nan")])}, truth)
    assert work.verdict(DENSE, found, None, False) and work.verdict(DENSE, found, {"output": float("nan")}, False)
    two = {"weight_ih_l0": truth["output"], "weight_ih_l0_reverse": truth["output"]}
    nan_first = {"weight_ih_l0": torch.full((2,), float("nan")), "weight_ih_l0_reverse": torch.ones(2)}
    assert work.verdict(DENSE, work.errors(nan_first, two), None, False)
    assert not work.verdict(DENSE, {"output": 0.019}, {"output": 0.01}, False)
    assert work.verdict(DENSE, {"output": 0.021}, {"output": 0.01}, False)
    assert work.verdict(DENSE, {"output": 0.021}, {"output": float("nan")}, False)  # the floor is left
    assert not work.verdict(DENSE, {"output": 0.4}, None, False) and work.verdict(DENSE, {"output": 0.6}, None, False)


def test_layers_side_by_side_are_layers_of_their_own():
    module = PROVIDERS["default"].make(Case(4, 3, 5, 6, blocks=3), device="cpu", dtype=torch.float32)
    x, h_0, states = torch.randn(4, 3, 15), torch.randn(1, 3, 18), []
    for layer in module.blocks:
        layer.register_forward_pre_hook(lambda _, given: states.append(given[1]))
    output, h_n = module(x, h_0)
    assert len(states) == 3 and all(h.is_contiguous() for h in states)  # cuDNN takes no other
    parts = zip(*(t.chunk(3, -1) for t in (x, h_0, output, h_n)), strict=True)
    for layer, (of_x, of_h_0, *found) in zip(module.blocks, parts, strict=True):
        torch.testing.assert_close(tuple(found), layer(of_x, of_h_0.contiguous()))


def test_lengths_of_a_padded_case_are_a_shuffle_of_the_packed_one_s_and_nothing_comes_out_past_them():
    case = Case(6, 5, 3, 8, padded=True)
    module = find("reference").make(case, device="cpu", dtype=torch.float32)
    (output, *_), (lengths, _) = work.Inputs.draw(case, CPU).through(module), providers.padding(case, CPU)
    past = torch.arange(6)[:, None] >= lengths
    assert past.any() and not output[past].any() and sorted(lengths.tolist(), reverse=True) == [*case.lengths]


def test_the_cpu_command_leaves_its_rows(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cpu, "no_compiler", lambda: "no Triton")
    monkeypatch.setattr(torch, "set_num_threads", Mock())
    assert cpu.main(tmp_path, rounds=4, seconds=0.0) == 0
    rows, modules = results.read(tmp_path / cpu.FILE), (BASELINE, providers.TWIN, "default")
    assert [(row["provider"], row["pass"]) for row in rows] == [(m, p) for p in cpu.PASSES for m in modules] * 2
    assert all(float(row["p50_us"]) > 0 and row["ratio"] and row["status"] == "ok" for row in rows)
    assert "was not measured: no Triton" in capsys.readouterr().out


@pytest.mark.compiled
def test_the_host_s_cost_is_that_of_whole_calls_that_launch_nothing():
    found = [(case.name, backend, pass_) for case, backend, pass_, times in hostcost.measure(0.0) if min(times) > 0]
    assert len(set(found)) == len(found) == 2 * (2 * len(hostcost.CASES) - 2)
    assert {backend for _, backend, _ in found} == {"step", "sequence"}


def entries_of(*names):
    return [entry for name in names or SUITES for entry in SUITES[name](describe("h200"))]


def test_no_row_of_a_day_is_taken_for_another():
    rows = [(e.case.name, provider, pass_) for e in entries_of() for provider in e.providers for pass_ in e.passes]
    assert len(set(rows)) == len(rows) > 2500
    for entry in entries_of():
        assert set(entry.passes) <= set(work.PASSES) and all(map(find, entry.providers))
        assert entry.providers[0] == BASELINE or not (entry.checked or entry.rounds)
        assert len(set(entry.providers)) == len(entry.providers)
    cases = {entry.case for entry in entries_of()}
    assert len({case.name for case in cases}) == len(cases)


def test_candidates_are_tiles_of_their_own_that_the_device_can_run():
    for entry in entries_of("tune")[:6]:
        tiles = [choose(entry.case.problem(True), describe("h200"), name).tiles for name in entry.providers[1:]]
        assert len(set(tiles)) == len(tiles) > 3


def test_workloads_say_how_many_units_a_call_computes():
    assert len(BY_CASE) == len(WORKLOADS)
    for workload in WORKLOADS:
        assert workload.entry.providers == (BASELINE, "default") and "," not in workload.unit
        assert workload.count == (sum(workload.case.lengths) or workload.case.T * workload.case.B)
    by_name = {workload.name: workload for workload in WORKLOADS}
    assert by_name["RNNoise"].rate(384_000) == "1,000,000 frames of speech (10 ms) a second"


@pytest.mark.parametrize("command", [["--suite", "grid"], ["run", "--suite", "workloads"], ["day"]], ids=" ".join)
def test_without_a_gpu_one_line_says_so(command, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([*command, "--out", str(tmp_path)]) != 0
    said = capsys.readouterr()
    assert not said.out and len(said.err.splitlines()) == 1
    assert "no CUDA device" in said.err and "python -m benchmarks cpu" in said.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "listed"),
    [
        (["--suite", "medium"], ("'workloads'", "'grid'", "'cpu'")),
        (["--suite", "grid", "--only", "bf16", "--only", "H7-"], ("'bf16' and 'H7-'", "more")),
        (["--with", "cudnn"], ("'cudnn'", "sequence-recompute")),
        (["--with", "sequence:block_q=1"], ("block_q", "block_b")),
        (["day", "--only", "tune,tea"], ("parts of day are compile, right", "got tea")),
        (["tomorrow"], ("summary", "compiled", "study", "day")),
    ],
    ids=" ".join,
)
def test_what_names_nothing_is_a_usage_error_that_lists_the_valid(arguments, listed, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    said = " ".join(capsys.readouterr().err.split())
    assert stopped.value.code == 2 and all(text in said for text in listed), said


@pytest.mark.interpreted
@pytest.mark.parametrize("suite", sorted(set(SUITES) - {"right"}))
def test_a_suite_is_rehearsed_without_a_gpu(suite, tmp_path, monkeypatch):
    """The same code, small, kernels emulated: one of its entries, of each provider a right row."""
    monkeypatch.setattr(run, "shrunk", lambda name: suites.shrunk(name, most=1))
    assert main(["--suite", suite, "--dry-run", "--out", str(tmp_path)]) == 0
    rows = read(tmp_path / ROWS)
    assert {r["status"] for r in rows} <= {"ok", "unserved"} and sum(r["status"] == "ok" for r in rows) >= 2
    assert all(r["p50_us"] or suite == "memcheck" for r in rows if r["status"] == "ok")


@pytest.mark.interpreted
def test_the_command_of_a_suite_on_a_gpu(tmp_path, monkeypatch):
    """What asks for CUDA is told of an H200, graphs are the calls themselves. Rows as called and in graphs; resumed by
    the date; tiles written where it tunes, none of an earlier run kept."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for module, name, fake in (
        (run, "no_gpu", lambda: None),
        (run, "CudaMeter", type("Captured", (HostMeter,), {"captured": lambda self, call: call})),
        (run, "of_cuda", lambda index: describe("h200")),
        (results, "processor", lambda: "NVIDIA H200"),
        (tuned, "FOLDER", tmp_path / "tiles"),
    ):
        monkeypatch.setattr(module, name, fake)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    entries = [Entry(Case(3, 2, 4, H), ("inference",), (BASELINE, "step"), checked=False, rounds=1) for H in (5, 6)]
    monkeypatch.setitem(SUITES, "grid", lambda device: entries)
    command = ["--suite", "grid", "--out", str(tmp_path), "--budget-minutes", "1000"]
    assert main([*command, "--only", "H5"]) == 0
    rows = read(tmp_path / ROWS)
    assert [r["provider"] for r in rows] == [BASELINE, "step"] and all(r["device_us"] and r["p50_us"] for r in rows)
    assert main([*command, "--since", rows[0]["date"]]) == 0
    assert [r["H"] for r in read(tmp_path / ROWS)] == ["5", "5", "6", "6"]
    assert main([*command, "--since", "2999-01-01"]) == 0
    assert len(read(tmp_path / ROWS)) == 8

    tuning = Entry(Case(suites.TUNE_T, 2, 4, 5), ("inference",), (BASELINE,), checked=False, rounds=1, replayed=True)
    monkeypatch.setitem(SUITES, "tune", lambda device: [tuning])
    before = tmp_path / "tiles" / "h200.csv"
    before.parent.mkdir()
    before.write_text("of an earlier run")
    assert main(["--suite", "tune", "--out", str(tmp_path)]) == 0
    assert before.read_text() == ",".join(tuned.COLUMNS) + "\n"  # nothing won
    tuned.forget()
