"""The measuring itself: what is refused, what is kept, what a row says. No time is asserted anywhere."""

import csv
import dataclasses
import gc
import importlib.machinery
import re
import sys
import time
import types
import weakref
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # benchmarks/ is of the checkout, not of the package

from benchmarks import cpu, day, hostcost, providers, results, run, suites, summary, table, timing, tune, warm, work
from benchmarks.__main__ import main
from benchmarks.cases import ALL_PASSES, BASELINE, CPU_CASES, GRID_T, MEMCHECK_CASES, TUNE_T, Case, Entry
from benchmarks.providers import PROVIDERS, Provider, find
from benchmarks.results import COLUMNS, KEY, ROWS, SCHEMA, Environment, OtherSchemaError, ResultsFile, Row, read_rows
from benchmarks.suites import SUITES
from benchmarks.timing import CudaMeter, HostMeter, Sample, Timed, interleave, p99, quantiles
from benchmarks.workloads import BY_CASE, WORKLOADS
from tritongru.planning import describe, tuned

DENSE = Case(4, 3, 5, 6)
HERE = Environment("2026-01-01", "a device", "1.2", "2.11", "3.6", "9", "0.1", "c0ffee", "no")


class FakeMeter(HostMeter):
    """Every look at the clock is a millisecond later; sampled calls are counted, not made."""

    def __init__(self):
        self.now = 0.0
        self.sampled = 0
        super().__init__(self._tick)

    def _tick(self):
        self.now += 1e-3
        return self.now

    def sample(self, timed):
        self.sampled += 1
        return Sample(100.0, 50.0)

    def release(self):
        pass


class Raising(torch.nn.GRU):
    def __init__(self, error, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.error = error

    def forward(self, input, hx=None):
        raise self.error


class Wrong(torch.nn.GRU):
    """Right but for the bias of the last unit."""

    def forward(self, input, hx=None):
        output, h_n = super().forward(input, hx)
        return output + 0.5 * (torch.arange(output.shape[-1]) == output.shape[-1] - 1), h_n


def made(kind, name="theirs", *first, **options):
    return Provider(name, "", lambda case, **place: kind(*first, case.I, case.H, **place), **options)


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """A function that runs the suite over nn.GRU and `others` on the CPU: exit code and rows."""

    def measure(cases, others, meter=None, passes=ALL_PASSES, how=None, **options):
        for provider in others:
            monkeypatch.setitem(PROVIDERS, provider.name, provider)
        names = (BASELINE, *(provider.name for provider in others))
        with ResultsFile(tmp_path / ROWS, HERE) as file:
            entries = [Entry(case, passes, names, **(how or {})) for case in cases]
            code = run.run(entries, meter or FakeMeter(), file, **options)
        return code, rows_of(tmp_path / ROWS)

    return measure


CASES = [
    DENSE,
    Case(4, 3, 5, 6, packed=True, bidirectional=True),
    Case(1, 3, 5, 6, cell=True),
    Case(3, 2, 4, 5, layers=2, dtype="bf16"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_right_provider_gets_a_row_for_every_pass(measured, case):
    code, rows = measured([case], [PROVIDERS["default"]])
    assert code == 0
    assert [(r["provider"], r["pass"], r["status"]) for r in rows] == [
        (name, pass_, "ok") for pass_ in ALL_PASSES for name in (BASELINE, "default")
    ]
    for row in rows:
        assert float(row["p50_us"]) == 100 and float(row["host_us"]) == 50 and float(row["ratio"]) == 1
        assert float(row["us_per_step"]) == pytest.approx(100 / (case.T * case.layers), rel=1e-5)
        assert row["schema"] == str(SCHEMA) and row["commit"] == "c0ffee" and row["case"] == case.name
        assert row["error_output"] and row["error_w_hh"] and bool(row["error_h_n"]) != case.cell
        assert row["p99_us"] == "" and row["cell"] == ("yes" if case.cell else "no")


def test_streaming_is_sampled_call_by_call_and_has_a_tail(measured):
    calls = []

    class Meter(FakeMeter):
        def sample(self, timed):
            calls.append(timed.calls)
            return Sample(1000.0 if len(calls) % 50 == 0 else 10.0, 5.0)

    code, rows = measured([Case(1, 1, 5, 6)], [PROVIDERS["default"]], Meter(), ("streaming",))
    assert code == 0 and set(calls) == {1} and [r["pass"] for r in rows] == ["streaming"] * 2
    assert all(float(r["p50_us"]) == 10 and float(r["p99_us"]) == 1000 for r in rows)
    assert all(r["error_output"] and not r["error_x"] for r in rows)  # nothing trains: no gradient is looked at


def test_a_baseline_beyond_all_measure_is_said_and_still_a_yardstick(measured, monkeypatch):
    bad = dataclasses.replace(PROVIDERS[BASELINE], make=lambda case, **place: Wrong(case.I, case.H, **place))
    truth = run._truth

    def right(case, name, inputs, trains):
        with monkeypatch.context() as patch:
            patch.setitem(PROVIDERS, BASELINE, baseline)
            return truth(case, name, inputs, trains)

    baseline = PROVIDERS[BASELINE]
    monkeypatch.setattr(run, "_truth", right)
    monkeypatch.setattr(work, "SANE", 0.01)
    monkeypatch.setitem(PROVIDERS, BASELINE, bad)
    code, rows = measured([DENSE], [PROVIDERS["default"]], passes=("forward",))
    assert code == 1 and [(r["provider"], r["status"], r["ratio"]) for r in rows] == [
        (BASELINE, "wrong", ""), ("default", "ok", "")
    ]  # fmt: skip


@pytest.mark.parametrize("kind", [Wrong, partial(Raising, ValueError("not today"))], ids=["wrong", "raising"])
def test_what_is_wrong_or_fails_is_said_and_not_timed(measured, kind):
    code, rows = measured([DENSE], [made(kind, ours=True), PROVIDERS["default"]])
    assert code == 1
    theirs = [r for r in rows if r["provider"] == "theirs"]
    assert [r["pass"] for r in theirs] == list(ALL_PASSES) and not any(r["p50_us"] or r["ratio"] for r in theirs)
    for row in theirs:
        if kind is Wrong:
            assert row["status"] == "wrong" and row["note"].startswith("output ")
        else:
            assert row["status"] == "error" and row["note"] == "ValueError: not today"
    assert sum(r["status"] == "ok" for r in rows) == 6  # the others are timed all the same


def test_a_wrong_gradient_alone_is_wrong(measured):
    class Twice(torch.nn.GRU):
        def forward(self, input, hx=None):
            output, h_n = super().forward(input, hx)
            return output, 2 * h_n - h_n.detach()

    code, rows = measured([DENSE], [made(Twice, ours=True)])
    assert code == 1 and {r["status"] for r in rows if r["provider"] == "theirs"} == {"wrong"}
    assert not any(text in rows[0]["note"] for text in ("output", "h_n"))


def test_what_is_not_served_is_a_row_and_no_failure(measured):
    refusing = made(partial(Raising, RuntimeError("backend 'sequence' cannot run here: too large; these can: step")))
    declining = made(torch.nn.GRU, "declining", unserved=lambda case: "not this one")
    code, rows = measured([DENSE], [refusing, declining])
    assert code == 0
    for name in ("theirs", "declining"):
        assert [r["status"] for r in rows if r["provider"] == name] == ["unserved"] * 3


def test_a_failing_truth_fails_every_row(measured, monkeypatch):
    def no_truth(*args):
        raise torch.OutOfMemoryError("8 GiB")

    monkeypatch.setattr(run, "_truth", no_truth)
    code, rows = measured([DENSE], [])
    assert code == 0 and {(r["status"], r["note"]) for r in rows} == {
        ("out of memory", "float64: OutOfMemoryError: 8 GiB")
    }
    assert len(rows) == 3


def test_every_provider_of_the_cpu_is_right(measured):
    code, rows = measured([Case(4, 3, 5, 6, layers=2, bidirectional=True)], [PROVIDERS[name] for name in (
        "default", "aten", "reference", "cell-loop", "nn.LSTM", "nn.RNN"
    )])  # fmt: skip
    assert code == 0 and {r["status"] for r in rows} == {"ok"} and len(rows) == 21
    errors = {r["provider"]: r["error_output"] for r in rows}
    assert len({errors["nn.LSTM"], errors["nn.RNN"], errors["nn.GRU"]}) == 3  # each against itself in float64


def test_loops_and_torchrl_say_what_they_do_not_serve():
    packed, dense = Case(4, 3, 5, 6, packed=True), Case(4, 3, 5, 6)
    assert "not installed" in PROVIDERS["torchrl"].unserved(dense)
    assert PROVIDERS["cell-loop"].unserved(packed) and PROVIDERS["nn.LSTM"].unserved(Case(1, 3, 5, 6, cell=True))


def test_torchrl_is_called_as_it_documents(measured, monkeypatch):
    """With a stand-in of the documented signature: [B, T, I], hidden [B, T, H], and a mask of the starting steps."""
    name = "torchrl.modules.tensordict_module._rnn_triton"

    def gru_triton(x, hidden, w_ih, w_hh, b_ih, b_hh, is_init):
        assert x.shape[:2] == hidden.shape[:2] == is_init.shape and is_init[:, 0].all() and not is_init[:, 1:].any()
        output, h_n = torch.gru(x, hidden[:, 0][None], [w_ih, w_hh, b_ih, b_hh], True, 1, 0.0, True, False, True)
        return output, h_n[0]

    for part in ("torchrl", "torchrl.modules", "torchrl.modules.tensordict_module", name):
        module = types.ModuleType(part)
        module.__spec__ = importlib.machinery.ModuleSpec(part, None)
        monkeypatch.setitem(sys.modules, part, module)
    sys.modules[name].gru_triton = gru_triton
    code, rows = measured([DENSE], [PROVIDERS["torchrl"]])
    assert code == 0 and [r["status"] for r in rows if r["provider"] == "torchrl"] == ["ok"] * 3


def test_the_limit_is_of_the_card_and_of_tritongru_only(measured, monkeypatch):
    """What is passed on, as on a CUDA device, and what becomes of it."""

    class Meter(FakeMeter):
        l2 = "warm"

        def captured(self, call):
            return lambda: None

        def sample(self, timed):
            return Sample(80.0, 50.0)

    asked = []

    def call_limit_us(problem, device, top, rows):
        asked.append((problem.training, rows))
        return SimpleNamespace(us=20.0)

    monkeypatch.setattr(run, "call_limit_us", call_limit_us)
    monkeypatch.setattr(run, "of_cuda", lambda index: "a device")
    given = run._limit_us
    monkeypatch.setattr(
        run, "_limit_us", lambda case, pass_, provider, meter, top: given(case, pass_, provider, CUDA, top)
    )
    CUDA = SimpleNamespace(device=torch.device("cuda", 0))
    packed = Case(4, 3, 5, 6, packed=True)
    code, rows = measured([packed], [PROVIDERS["default"], PROVIDERS["nn.RNN"]], Meter(), ceilings=object())
    assert code == 0 and {r["l2"] for r in rows} == {"warm"}
    assert {(r["provider"], r["limit_us"], r["of_limit"]) for r in rows} == {
        (BASELINE, "", ""), ("default", "20", "0.25"), ("nn.RNN", "", "")
    }  # fmt: skip
    assert sorted(asked) == [(False, sum(packed.lengths))] * 2 + [(True, sum(packed.lengths))]


THREADS = f"{torch.get_num_threads()} thread(s)"  # what a CPU's row says


class Graphs(FakeMeter):
    """A device whose graphs take 30 us where the call takes 100; a call that `refuses` is not captured."""

    l2 = "warm"

    def __init__(self, refuses=None):
        super().__init__()
        self.refuses, self.replays = refuses, []

    def captured(self, call):
        if self.refuses is not None:
            raise self.refuses
        self.replays.append(lambda: None)
        return self.replays[-1]

    def sample(self, timed):
        return Sample(30.0, 5.0) if timed.call in self.replays else Sample(100.0, 50.0)


def test_the_device_s_own_time_is_a_replay(measured, capsys):
    code, rows = measured([DENSE], [PROVIDERS["default"]], Graphs(), ("forward",))
    assert code == 0 and [(r["p50_us"], r["device_us"], r["note"]) for r in rows] == [("100", "30", THREADS)] * 2
    assert (
        "ratio 1.000  host 50.0, in a graph 30.0 ratio 1.000" in capsys.readouterr().out
    )  # never one without the other


def test_a_replayed_entry_is_sampled_in_its_graph(measured):
    how = dict(replayed=True, rounds=3, note="replayed")
    code, rows = measured([DENSE], [PROVIDERS["default"]], Graphs(), ("forward",), how)
    assert code == 0 and [(r["p50_us"], r["device_us"], r["rounds"]) for r in rows] == [("30", "", "3")] * 2
    assert {r["note"] for r in rows} == {f"{THREADS}; replayed"}


@pytest.mark.parametrize("replayed", [False, True])
def test_a_capture_that_fails_ends_the_run_and_a_resumed_one_begins_behind_it(measured, tmp_path, replayed):
    meter = Graphs(RuntimeError("operation not permitted when stream is capturing"))
    cases, how = [DENSE, Case(4, 3, 5, 7)], dict(replayed=replayed)
    code, rows = measured(cases, [PROVIDERS["default"]], meter, ("forward", "inference"), how)
    assert code == run.DEVICE_LOST and {r["case"] for r in rows} == {DENSE.name} and len(rows) == 4
    assert all("not captured in a CUDA graph: RuntimeError: operation not" in r["note"] for r in rows)
    if not replayed:  # what was timed before is a row all the same
        assert (rows[0]["status"], rows[0]["p50_us"], rows[0]["device_us"]) == ("ok", "100", "")
    entries = [Entry(case, ("forward", "inference"), (BASELINE, "default")) for case in cases]
    with ResultsFile(tmp_path / ROWS, HERE) as file:
        assert run.unmeasured(entries, file, "warm") == entries[1:]


def test_what_is_not_checked_is_timed_at_once(measured, monkeypatch):
    monkeypatch.setattr(work, "outcome", lambda *args: pytest.fail("compared"))
    code, rows = measured([DENSE], [made(Wrong, ours=True)], how=dict(checked=False, rounds=2))
    assert code == 0 and len(rows) == 6 and all(r["p50_us"] and not r["error_output"] for r in rows)
    assert {r["rounds"] for r in rows} == {"2"}


def test_what_is_only_checked_is_not_timed(measured):
    code, rows = measured([DENSE], [PROVIDERS["default"], made(Wrong, ours=True)], how=dict(rounds=0))
    assert code == 1 and not any(r["p50_us"] for r in rows) and len(rows) == 9
    assert {(r["provider"], r["status"]) for r in rows} == {(BASELINE, "ok"), ("default", "ok"), ("theirs", "wrong")}
    assert all(r["error_output"] for r in rows)


def test_layers_side_by_side_are_layers_of_their_own(measured):
    case = Case(4, 3, 5, 6, blocks=3)
    module = PROVIDERS["default"].make(case, device="cpu", dtype=torch.float32)
    x, h_0 = torch.randn(4, 3, 15), torch.randn(1, 3, 18)
    output, h_n = module(x, h_0)
    for block, layer in enumerate(module.blocks):
        expected, last = layer(x[..., 5 * block : 5 * block + 5], h_0[..., 6 * block : 6 * block + 6].contiguous())
        torch.testing.assert_close(output[..., 6 * block : 6 * block + 6], expected)
        torch.testing.assert_close(h_n[..., 6 * block : 6 * block + 6], last)
    code, rows = measured([case], [PROVIDERS["default"]])
    assert code == 0 and all(r["error_w_hh"] and r["case"].endswith("-3blocks") for r in rows)


def test_a_gpu_in_use_is_said_in_every_row(monkeypatch):
    meter = CudaMeter.__new__(CudaMeter)
    meter.device = torch.device("cuda", 0)
    gib = 1 << 30
    for name, value in (("mem_get_info", (60 * gib, 80 * gib)), ("memory_reserved", 3 * gib)):
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert re.fullmatch(r"host .+, \d+ cores; 15.0 GiB of the GPU are others'", meter.note())
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (76 * gib, 80 * gib))
    assert "others" not in meter.note()


def test_nan_is_wrong():
    truth = {"output": torch.ones(2, dtype=torch.float64)}
    found = work.errors({"output": torch.tensor([1.0, float("nan")])}, truth)
    assert work.verdict(DENSE, found, None, False) and work.verdict(DENSE, found, {"output": float("nan")}, False)
    two = {"weight_ih_l0": truth["output"], "weight_ih_l0_reverse": truth["output"]}
    nan_first = {"weight_ih_l0": torch.full((2,), float("nan")), "weight_ih_l0_reverse": torch.ones(2)}
    assert work.verdict(DENSE, work.errors(nan_first, two), None, False)


def test_the_rule_allows_what_nn_gru_itself_gets_wrong():
    assert not work.verdict(DENSE, {"output": 0.019}, {"output": 0.01}, False)
    assert work.verdict(DENSE, {"output": 0.021}, {"output": 0.01}, False)
    assert work.verdict(DENSE, {"output": 0.021}, {"output": float("nan")}, False)  # the floor is left
    assert not work.verdict(DENSE, {"output": 0.4}, None, False) and work.verdict(DENSE, {"output": 0.6}, None, False)


def test_out_of_memory_is_a_row_and_no_failure(measured):
    code, rows = measured([DENSE], [made(partial(Raising, torch.OutOfMemoryError("out of memory")))])
    assert code == 0
    assert [r["status"] for r in rows if r["provider"] == "theirs"] == ["out of memory"] * 3


def test_an_interrupted_run_keeps_its_rows(measured, capsys):
    stop = made(lambda *a, **k: Raising(KeyboardInterrupt(), *a, **k) if a[1] == 7 else torch.nn.GRU(*a, **k))
    code, rows = measured([DENSE, Case(4, 3, 5, 7), Case(4, 3, 5, 8)], [stop])
    assert code == 130
    assert len(rows) == 6 and {r["case"] for r in rows} == {DENSE.name}
    assert "interrupted; the 6 rows so far" in capsys.readouterr().out.replace("\n", " ")


def test_a_lost_device_ends_the_run_and_a_resumed_one_begins_behind_it(measured, tmp_path, capsys):
    """Any CUDA error, one of a capture among them. What was not reached of the entry is a row that says so."""
    lost = made(lambda *a, **k: Raising(torch.AcceleratorError("illegal memory access"), *a, **k))
    code, rows = measured([DENSE, Case(4, 3, 5, 7)], [lost, PROVIDERS["default"]])
    assert code == run.DEVICE_LOST and {r["case"] for r in rows} == {DENSE.name} and len(rows) == 9
    assert {(r["status"], r["note"]) for r in rows} == {("error", "AcceleratorError: illegal memory access")}
    assert "the device failed" in capsys.readouterr().out
    entries = [Entry(case, ALL_PASSES, (BASELINE, "theirs", "default")) for case in (DENSE, Case(4, 3, 5, 7))]
    with ResultsFile(tmp_path / ROWS, HERE) as file:
        assert run.unmeasured(entries, file, "") == entries[1:]


def test_a_call_that_fails_while_it_is_timed_fails_alone(measured):
    class Later(torch.nn.GRU):
        calls = 0

        def forward(self, input, hx=None):
            Later.calls += 1
            if Later.calls > 5:
                raise RuntimeError("a wait ran out")
            return super().forward(input, hx)

    class Meter(FakeMeter):
        def sample(self, timed):
            timed.call()
            return super().sample(timed)

    code, rows = measured([DENSE], [made(Later), PROVIDERS["default"]], Meter(), ("forward",))
    assert code == 1 and [(r["provider"], r["status"]) for r in rows] == [
        ("theirs", "error"), (BASELINE, "ok"), ("default", "ok")
    ]  # fmt: skip


def test_one_that_fails_in_a_later_round_is_left_out_of_the_next():
    calls = []

    def failing():
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("no more")

    timed = {"good": Timed(lambda: None), "bad": Timed(failing)}
    failures = {}
    samples = interleave(timed, HostMeter(), rounds=5, seconds=9.0, failures=failures)
    assert list(samples) == ["good"] and len(samples["good"]) == 5 and str(failures["bad"]) == "no more"
    with pytest.raises(ZeroDivisionError):
        interleave({"bad": Timed(lambda: 1 / 0)}, HostMeter(), rounds=5, seconds=9.0)


def test_nothing_large_is_held_while_the_calls_are_timed(measured, monkeypatch):
    """The float64 outcome, and a module that was wrong."""
    alive = []
    truth, prepare, timed = run._truth, run._prepare, run._timed

    def watch(made):
        alive.extend(map(weakref.ref, made))
        return made

    monkeypatch.setattr(run, "_truth", lambda *args: (lambda found: (found[0], watch_all(found[1])))(truth(*args)))

    def watch_all(found):
        watch(found.values())
        return found

    def prepared(*args):
        found = prepare(*args)
        if args[0].name == "theirs":
            watch([found.module])
        return found

    def then(*args):
        gc.collect()
        assert alive and not any(ref() is not None for ref in alive)
        return timed(*args)

    monkeypatch.setattr(run, "_prepare", prepared)
    monkeypatch.setattr(run, "_timed", then)
    code, rows = measured([DENSE], [PROVIDERS["default"], made(Wrong, ours=True)])
    assert code == 1 and {r["status"] for r in rows} == {"ok", "wrong"}


def test_a_spent_budget_says_what_was_not_measured(measured, monkeypatch, capsys):
    assert measured([DENSE, Case(4, 3, 5, 7)], [], ends=0.0) == (1, [])
    assert f"2 cases not measured, {DENSE.name} the first" in capsys.readouterr().out.replace("\n", " ")
    monkeypatch.setattr(run.time, "monotonic", iter([0.0, 2.0]).__next__)
    code, rows = measured([DENSE, Case(4, 3, 5, 7)], [], ends=1.0)
    assert code == run.SPENT and {r["case"] for r in rows} == {DENSE.name}


def test_resuming_leaves_out_what_is_there(measured, tmp_path):
    entries = [Entry(DENSE, ("forward",), (BASELINE,)), Entry(Case(4, 3, 5, 7), ("forward",), (BASELINE,))]
    measured([DENSE], [])
    later = dataclasses.replace(HERE, date="2027-01-01")
    for environment, left in ((later, entries[1:]), (dataclasses.replace(later, commit="f00d"), entries)):
        with ResultsFile(tmp_path / ROWS, environment) as file:
            assert run.unmeasured(entries, file, "") == left
            assert run.unmeasured(entries, file, "cold") == entries


# results files


def test_the_columns_belong_to_the_schema():
    assert SCHEMA == 2, "new columns, new list"
    assert ",".join(COLUMNS) == (
        "schema,date,device,driver,torch,triton,cudnn,tritongru,commit,dirty,"
        "case,provider,pass,dtype,products,T,B,I,H,layers,directions,packed,cell,l2,status,note,"
        "first_call_s,rounds,calls,p50_us,p20_us,p80_us,p99_us,us_per_step,ratio,host_us,device_us,limit_us,of_limit,"
        "peak_mib,saved_mib,"
        "error_output,error_h_n,error_x,error_h_0,error_w_ih,error_w_hh,error_b_ih,error_b_hh"
    )


def test_on_a_full_disk_rows_are_printed_and_the_rest_goes_on(measured, monkeypatch, capsys):
    class Full:
        def writerow(self, row):
            raise OSError(28, "No space left on device")

    init = ResultsFile.__init__

    def full(self, *args):
        init(self, *args)
        self._writer = Full()

    monkeypatch.setattr(ResultsFile, "__init__", full)
    code, rows = measured([DENSE, Case(4, 3, 5, 7)], [], passes=("forward",))
    said = capsys.readouterr().err
    assert code == 1 and not rows and said.count("No space left on device") == 2
    assert said.count(DENSE.name) == 1 and ",100," in said


def test_rows_are_on_disk_as_they_come_and_appended(tmp_path):
    path = tmp_path / "new" / ROWS
    for run_ in range(2):
        with ResultsFile(path, HERE) as file:
            file.append(Row(DENSE, "step", "forward", p50_us=12.5))
            assert len(rows_of(path)) == run_ + 1  # before it is closed
    row = rows_of(path)[-1]
    assert tuple(row) == COLUMNS
    assert (row["device"], row["p50_us"], row["H"], row["directions"]) == ("a device", "12.5", "6", "1")


@pytest.mark.parametrize("change", [("schema,date", "schema,day"), ("\n2,", "\n1,")], ids=["columns", "number"])
def test_another_schema_is_refused_and_left_alone(tmp_path, change, capsys):
    path = tmp_path / "cpu.csv"
    with ResultsFile(path, HERE) as file:
        file.append(Row(DENSE, "step", "forward"))
    path.write_text(path.read_text().replace(*change))
    before = path.read_text()
    with pytest.raises(OtherSchemaError, match="another schema"):
        ResultsFile(path, HERE)
    assert main(["--suite", "cpu", "--out", str(tmp_path)]) == 2
    assert "another schema" in capsys.readouterr().err
    assert path.read_text() == before


def test_a_copy_without_git_takes_the_commit_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "ROOT", tmp_path)
    monkeypatch.delenv("TRITONGRU_COMMIT", raising=False)
    assert Environment.here(torch.device("cpu")).commit == "unknown"
    monkeypatch.setenv("TRITONGRU_COMMIT", "abc")
    found = Environment.here(torch.device("cpu"))
    assert (found.commit, found.dirty) == ("abc", "unknown") and found.device


# commands


@pytest.mark.parametrize("command", [["--suite", "grid"], ["--suite", "workloads"], ["day"]], ids=" ".join)
def test_without_a_gpu_one_line_says_so(command, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([*command, "--out", str(tmp_path)]) != 0
    said = capsys.readouterr()
    assert not said.out and len(said.err.splitlines()) == 1
    assert "no CUDA device" in said.err and "python -m benchmarks --suite cpu" in said.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["cudnn", "sequence:", "sequence:block_q=1", "sequence:block_b=x", "aten:block_b=1"])
def test_an_unknown_provider_is_a_usage_error(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--with", name])
    said = capsys.readouterr().err
    said_of = {"sequence:block_q=1": "block_q", "sequence:block_b=x": "'x'"}.get(name, name)
    assert stopped.value.code == 2 and said_of in said
    assert ("block_b" if "=" in name else "sequence-recompute") in said  # the valid ones


@pytest.mark.parametrize(
    ("arguments", "listed"),
    [
        (["--suite", "medium"], ("'workloads'", "'grid'", "'cpu'")),
        (["--suite", "workloads", "--only", "H7-"], ("'H7-'", WORKLOADS[0].case.name)),
        (["--suite", "grid", "--only", "bf16", "--only", "H7-"], ("'bf16' and 'H7-'", "more")),
        (["day", "--only", "tune,tea"], ("parts of day are compile, right", "got tea")),
        (["--device", "cuda:9"], ("'cuda:9'", "CUDA devices here")),
        (["tomorrow"], ("summary", "compiled", "study", "day")),
        (["study", "--out", "x"], ("--out is not of study",)),
        (["summary", "--suite", "grid"], ("not of summary",)),
        (["summary", "--dry-run"], ("not of summary",)),
    ],
    ids=" ".join,
)
def test_what_names_nothing_is_a_usage_error_that_lists_the_valid(arguments, listed, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    said = " ".join(capsys.readouterr().err.split())
    assert stopped.value.code == 2 and all(text in said for text in listed), said


def test_other_tiles_are_a_backend_s_own_argument():
    provider = run.find("sequence:block_h=8,num_warps=4")
    module = provider.make(DENSE, device="cpu", dtype=torch.float32)
    assert module.backend == provider.name and provider.ours


# the day


def part(name, *codes, minutes=1.0, **options):
    """Of commands that run Python code; None: its tool is missing."""
    commands = tuple(
        (lambda run, code=code: code and (sys.executable, "-c", code.format(out=run.out))) for code in codes
    )
    return day.Part(name, minutes, commands, **options)


def told(folder):
    return (folder / "day.txt").read_text().splitlines()


def test_every_part_of_the_day_runs_and_is_accounted_for(tmp_path, capsys):
    parts = [
        part("good", "print('fine')", "print('beside')"),
        part("bad", "print('broken'); raise SystemExit(5)", meanings={5: "nothing found"}),
        part("killed", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"),
        part("memcheck", None),
        part("last", "import os; print(os.environ['GIVEN'])", environment={"GIVEN": "here"}),
    ]
    assert day.run(parts, tmp_path, 1.0, HERE) == 1
    lines = told(tmp_path)
    assert [line.split()[0] for line in lines[1:]] == ["good", "bad", "killed", "memcheck", "last"]
    assert "passed" in lines[1] and "FAILED: nothing found" in lines[2] and "FAILED: killed by SIGKILL" in lines[3]
    assert "not run: compute-sanitizer" in lines[4] and "passed" in lines[5] and "host " in lines[0]
    assert (tmp_path / "last.log").read_text() == "here\n" and (tmp_path / "good-1.log").read_text() == "beside\n"
    assert "broken" in capsys.readouterr().out
    assert day.run(parts[:1] + parts[3:], tmp_path, 1.0, HERE) == 0  # a missing tool is no failure


def test_a_part_that_hangs_is_stopped_and_what_it_left_is_the_later_ones(tmp_path):
    """By when it should have ended, and all that it has started."""
    hanging = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])"
    parts = [part("slow", hanging + "; time.sleep(60)", minutes=1.0), part("after", "print('ran')", minutes=9.0)]
    start = time.monotonic()
    assert day.run(parts, tmp_path, 0.2, HERE) == 1
    assert time.monotonic() - start < 10
    assert "FAILED: stopped, its time was up" in told(tmp_path)[1] and "passed" in told(tmp_path)[2]
    assert day._ends([parts[0], parts[1]], 10.0) == [60.0, 600.0]  # a part ends by the sum of its own and the earlier


def test_what_the_budget_leaves_out_is_said(tmp_path):
    assert day.run([part("whole", "print('ran')")], tmp_path, 0.0, HERE) == 1
    assert "FAILED: not run, the budget was spent" in told(tmp_path)[1]


def test_a_suite_goes_on_after_the_device_was_lost(tmp_path):
    code = """
import pathlib
seen = pathlib.Path("{out}/seen")
runs = len(seen.read_text()) if seen.exists() else 0
seen.write_text("x" * (runs + 1))
raise SystemExit(3 if runs < 2 else 0)
"""
    assert day.run([part("suite", code, "print('beside')")], tmp_path, 1.0, HERE) == 1
    assert (tmp_path / "seen").read_text() == "xxx" and (tmp_path / "suite-1.log").read_text() == "beside\n"
    assert "FAILED: the device was lost 2 time(s)" in told(tmp_path)[1]


def test_a_day_that_is_resumed_leaves_out_what_passed(tmp_path):
    begin = "import pathlib; path = pathlib.Path('{out}/NAME'); text = path.read_text() if path.exists() else ''; "
    begin += "path.write_text(text + 'x'); "
    once = part("once", begin.replace("NAME", "ran"))
    fails_once = begin.replace("NAME", "failed") + "raise SystemExit(not text)"
    parts = [once, part("again", fails_once)]
    assert day.run(parts, tmp_path, 1.0, HERE) == 1
    later = dataclasses.replace(HERE, date="2027-01-01")
    assert day.run(parts, tmp_path, 1.0, later, resume=True) == 0
    assert (tmp_path / "ran").read_text() == "x" and told(tmp_path)[0].startswith(HERE.date)
    assert day.run(parts, tmp_path, 1.0, later) == 0
    assert (tmp_path / "ran").read_text() == "xx"


def test_a_part_that_is_cut_short_is_no_failure_and_goes_on_when_resumed(tmp_path):
    short = "import pathlib; path = pathlib.Path('{out}/begun'); code = 0 if path.exists() else 4; path.touch(); "
    parts = [part("grid", short + "raise SystemExit(code)")]
    assert day.run(parts, tmp_path, 1.0, HERE) == 0 and "cut short" in told(tmp_path)[1]
    assert day.run(parts, tmp_path, 1.0, HERE, resume=True) == 0 and "passed" in told(tmp_path)[1]


def test_a_day_on_a_full_disk_goes_on(tmp_path, monkeypatch, capsys):
    def full(self, *args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    assert day.run([part("one", "pass"), part("two", "pass")], tmp_path, 1.0, HERE) == 0
    assert capsys.readouterr().out.count("day.txt was not written: [Errno 28] No space left on device") == 2


def test_the_commands_of_the_day_exist(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert [part.name for part in day.PARTS] == [
        "compile", "right", "tune", "grid", "workloads", "study", "tests", "memcheck", "summary"
    ]  # fmt: skip
    assert sum(part.minutes for part in day.PARTS) == pytest.approx(9)
    suites_of_it = set()
    for dry in (False, True):
        given = day.Run(tmp_path, 128.0, HERE.date, dry)
        for found in day.PARTS:
            for command in found.commands:
                words = command(given)
                if words and "--suite" in words:
                    suites_of_it.add(words[words.index("--suite") + 1])
                    assert ("--dry-run" in words) == dry and ("--since" in words) != dry
                    if not dry:
                        assert words[-1] == "2.00" and main(words[3:]) == 1
                        assert "no CUDA device" in capsys.readouterr().err
    assert suites_of_it == set(SUITES) - {"cpu"}


def test_the_plan_of_the_day_has_its_minutes():
    lines = day.plan(day.PARTS, 9.0).splitlines()[1:]
    assert [float(line.split()[1]) for line in lines] == pytest.approx(
        [1.9, 2.4, 3.9, 6.3, 7.1, 7.2, 8.4, 8.8, 9.0], abs=0.05
    )
    grid = next(line for line in lines if line.split()[0] == "grid")
    assert "360 shapes, 2088 rows" in grid  # 12 x 8 x 3, and 72 short ones; both passes
    half = day.plan(day.chosen(["grid,tune"]), 4.5).splitlines()
    assert len(half) == 3 and float(half[-1].split()[1]) == pytest.approx(4.5)


@pytest.mark.interpreted
@pytest.mark.parametrize("suite", sorted(set(SUITES) - {"cpu", "right"}))
def test_a_suite_is_rehearsed_without_a_gpu(suite, tmp_path, monkeypatch):
    """The same code, small, kernels emulated: one of its entries, of each provider a right row."""
    monkeypatch.setattr(run, "shrunk", lambda name: suites.shrunk(name, most=1))
    assert main(["--suite", suite, "--dry-run", "--out", str(tmp_path)]) == 0
    rows = rows_of(tmp_path / ROWS)
    assert {r["status"] for r in rows} <= {"ok", "unserved"} and sum(r["status"] == "ok" for r in rows) >= 2
    assert all(r["p50_us"] for r in rows if r["status"] == "ok")


@pytest.mark.long
@pytest.mark.interpreted
def test_the_whole_day_is_rehearsed(tmp_path):
    assert main(["day", "--dry-run", "--out", str(tmp_path)]) == 0
    assert [line.split()[1] for line in told(tmp_path)[1:]] == ["passed,"] * 7 + ["not", "passed,"]
    assert {row["status"] for row in rows_of(tmp_path / ROWS)} <= {"ok", "unserved"}


@pytest.fixture
def as_on_a_gpu(monkeypatch, tmp_path):
    """A suite's whole command, on the CPU: what asks for CUDA is told of an H200, graphs are the calls themselves."""

    class Meter(HostMeter):
        l2 = "warm"

        def __init__(self, cold):
            super().__init__()

        def captured(self, call):
            return call

    asked = {"is_available": lambda: True, "set_device": lambda index: None, "device_count": lambda: 1,
             "get_device_name": lambda device=0: "NVIDIA H200"}  # fmt: skip
    for name, fake in asked.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(run, "no_gpu", lambda: None)
    monkeypatch.setattr(run, "CudaMeter", Meter)
    monkeypatch.setattr(run, "of_cuda", lambda index: describe("h200"))
    monkeypatch.setattr(results, "processor", lambda: "NVIDIA H200")
    monkeypatch.setattr(tuned, "FOLDER", tmp_path / "tiles")
    monkeypatch.setattr(run, "SECONDS", 0.0)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    yield
    tuned.forget()


@pytest.mark.interpreted
@pytest.mark.usefixtures("as_on_a_gpu")
def test_the_command_of_a_suite_on_a_gpu(tmp_path, monkeypatch):
    """Rows as called and in graphs; resumed by the date where no commit is known; tiles written where it tunes."""
    entries = [Entry(Case(3, 2, 4, H), ("inference",), (BASELINE, "step"), checked=False, rounds=1) for H in (5, 6)]
    monkeypatch.setitem(SUITES, "grid", lambda device: entries)
    monkeypatch.setattr(results, "_commit", lambda: ("unknown", "unknown"))
    command = ["--suite", "grid", "--out", str(tmp_path), "--budget-minutes", "1000"]
    assert main([*command, "--only", "H5"]) == 0
    rows = rows_of(tmp_path / ROWS)
    assert [r["provider"] for r in rows] == [BASELINE, "step"] and all(r["device_us"] and r["p50_us"] for r in rows)
    assert main([*command, "--resume", "--since", rows[0]["date"]]) == 0
    assert [r["H"] for r in rows_of(tmp_path / ROWS)] == ["5", "5", "6", "6"]
    assert main([*command, "--resume", "--since", "2999-01-01"]) == 0
    assert len(rows_of(tmp_path / ROWS)) == 8

    tuning = Entry(Case(TUNE_T, 2, 4, 5), ("inference",), (BASELINE,), checked=False, rounds=1, replayed=True)
    monkeypatch.setitem(SUITES, "tune", lambda device: [tuning])
    before = tmp_path / "tiles" / "h200.csv"
    before.parent.mkdir()
    before.write_text("of an earlier run")
    assert main(["--suite", "tune", "--out", str(tmp_path)]) == 0
    assert before.read_text() == ",".join(tuned.COLUMNS) + "\n"  # nothing won


def test_compiling_takes_one_call_for_each_kernel():
    device = describe("h200")
    found = list(warm.calls(("grid",), device))
    forms = {warm._form(case, *t) for case, name, training in found
             for t in warm.choose(case.problem(training), device, name).tiles}  # fmt: skip
    assert len(found) <= len(forms) < 2 * len(SUITES["grid"](device))  # of two kernels, in two passes
    assert {case.T for case, _, _ in found} == {1, 2} and all(training for _, _, training in found)
    for entry in SUITES["grid"](device):
        for name in ("step", "sequence"):
            try:
                tiles = warm.choose(entry.case.problem(True), device, name).tiles
            except ValueError:
                continue
            if name in entry.providers:
                assert {warm._form(entry.case, *t) for t in tiles} <= forms


def test_the_dry_run_of_compiling_says_how_many(capsys):
    assert warm.main(["--dry-run"]) == 0
    assert re.match(r"\d+ calls compile the forms of tune, grid, right, workloads", capsys.readouterr().out)


# tiles and times as data


def timed_rows(figures, case, passes=("forward", "forward+backward")):
    """Rows of providers: (p20, p50, p80) of each pass."""
    fixed = {"schema": SCHEMA, **dataclasses.asdict(dataclasses.replace(HERE, device="NVIDIA H200"))}
    for provider, of_passes in figures.items():
        for pass_, (p20, p50, p80) in zip(passes, of_passes, strict=True):
            row = Row(case, provider, pass_, p20_us=p20, p50_us=p50, p80_us=p80, l2="warm", device_us=p50 / 2)
            yield {name: str(value) for name, value in {**fixed, **row.cells()}.items()}


TUNED = Case(TUNE_T, 64, 512, 512, "bf16")
PLANNED = ((100, 101, 102), (300, 302, 304))


def test_tiles_win_by_more_than_the_calls_vary():
    figures = {
        "sequence": PLANNED,  # backward 201, from 198 to 204
        "sequence:num_warps=4": ((80, 81, 82), (270, 272, 274)),  # 191, from 188 to 194
        "sequence:delay=100": ((99, 99.5, 101), (299, 301, 303)),
        "sequence:block_h=8": ((70, 90, 100.5), (250, 260, 400)),
    }
    rows = timed_rows(figures, TUNED)
    found = list(tune.winners(rows))
    assert [(row["pass"], row["fields"]) for row in found] == [("forward", "num_warps=4"), ("backward", "num_warps=4")]
    assert found[0]["us_per_step"] == f"{81 / TUNE_T:.4g}" and found[1]["planned_us"] == f"{201 / TUNE_T:.4g}"
    slower = {"sequence": PLANNED, "sequence:num_warps=4": ((98, 100, 101), (290, 301, 310))}
    assert not list(tune.winners(timed_rows(slower, TUNED)))


def test_planning_reads_what_tuning_writes(tmp_path, monkeypatch):
    from tritongru.planning import sequence

    h200, shape = describe("h200"), (64, 500, 1, "fp16", "tf32")
    monkeypatch.setattr(tuned, "FOLDER", tmp_path / "tiles")
    caches = (sequence.sequence_tiles, tuned.winner)

    def tiles(kind, device=h200, shape=shape):
        for cached in caches:
            cached.cache_clear()
        return sequence.sequence_tiles(kind, *shape, device)

    before = tiles("forward")
    with ResultsFile(tmp_path / ROWS, dataclasses.replace(HERE, device="NVIDIA H200")) as file:
        wins = {"sequence": PLANNED, "sequence:num_warps=4,delay=400": ((50, 51, 52), (260, 290, 340))}
        for provider, figures in wins.items():
            for pass_, (p20, p50, p80) in zip(("forward", "forward+backward"), figures, strict=True):
                file.append(Row(TUNED, provider, pass_, p20_us=p20, p50_us=p50, p80_us=p80))
    assert "1 tiles that win" in tune.write(tmp_path)
    try:
        found = tiles("forward")
        assert (found.num_warps, found.delay) == (4, 400) != (before.num_warps, before.delay)
        assert tiles("backward").delay != 400  # which did not win
        assert tiles("forward", shape=(65, *shape[1:])).delay != 400  # another class of batches
        assert tiles("forward", dataclasses.replace(h200, name="H100")).delay != 400
        with monkeypatch.context() as patch:  # fields that this layer cannot have: the planned tiles
            patch.setattr(sequence, "winner", lambda *of: "block_h=8,num_warps=16,block_k=32")
            assert tiles("forward") == before
        tune.forget("NVIDIA H200")
        assert tiles("forward") == before
    finally:
        tuned.forget()
        for cached in caches:
            cached.cache_clear()


def test_step_takes_the_winner_of_the_next_size(monkeypatch):
    from tritongru.planning import step

    row = {"backend": "step", "pass": "forward", "dtype": "bf16", "H": "1024", "B": "32", "fields": "pdl=0"}
    monkeypatch.setattr(tuned, "_rows", lambda device: (row, {**row, "H": "2048", "fields": "block_h=7"}))

    def pdl(kind, batch, H, dtype="bf16"):
        for cached in (step.step_tiles, tuned.winner):
            cached.cache_clear()
        return step.step_tiles(kind, batch, H, 1, dtype, "tf32", describe("h200")).pdl

    try:
        assert not pdl("forward", 20, 700) and not pdl("forward", 32, 1024, "fp16")
        assert pdl("backward", 20, 700) and pdl("forward", 33, 700) and pdl("forward", 20, 700, "fp32")
        assert pdl("forward", 20, 1100)  # fields that no kernel can have: the planned tiles
    finally:
        for cached in (step.step_tiles, tuned.winner):
            cached.cache_clear()


def test_the_table_of_a_grid(tmp_path):
    """A step as it is called, without what any call costs, and never less than one on the device alone."""
    passes = ("inference", "forward+backward")
    with ResultsFile(tmp_path / ROWS, dataclasses.replace(HERE, device="NVIDIA H200")) as file:
        for T, us in ((1, 200.0), (2, 300.0), (GRID_T, 2860.0)):
            for provider in (BASELINE, "step", "sequence") if T > 1 else (BASELINE, "step"):
                for pass_ in passes:
                    called = us if provider != "sequence" else us / 10 + 300
                    file.append(Row(Case(T, 32, 512, 512, "bf16"), provider, pass_, p50_us=called, device_us=128.0 * 5))
    rows = list(csv.DictReader(table.table(tmp_path).splitlines()))
    by_backend = {(r["backend"], r["T"]): r for r in rows if r["pass"] == "training"}
    assert len(rows) == 10 and by_backend["aten", "1"]["us_per_call"] == "200.0" and rows[0]["source"] == ROWS
    assert (by_backend["aten", ""]["us_per_step"], by_backend["aten", ""]["us_per_call"]) == ("20.000", "300.0")
    assert by_backend["sequence", ""]["us_per_step"] == by_backend["sequence", ""]["device_us_per_step"] == "5.000"
    assert main(["table", "--out", str(tmp_path)]) == 0 and (tmp_path / "table.csv").read_text() == table.table(
        tmp_path
    )


# workloads


def test_workloads_name_their_source_and_what_differs():
    assert len(BY_CASE) == len(WORKLOADS) == 13
    for workload in WORKLOADS:
        note = workload.entry.note
        assert "github.com/" in note or workload.passes == ("streaming",) or workload.case.padded
        assert "," not in workload.unit and workload.entry.providers == (BASELINE, "default", "torchrl")
        assert workload.count == (sum(workload.case.lengths) or workload.case.T * workload.case.B)
    by_name = {workload.name: workload for workload in WORKLOADS}
    assert by_name["RNNoise"].rate(384_000) == "1,000,000 frames of speech (10 ms) a second"
    assert "resets at episode ends left out" in by_name["IPPO on SMAX"].entry.note
    assert by_name["Dreamer's world model"].case.name == "T64-B16-I1024-H1024-bf16-8blocks"


@pytest.mark.parametrize("ragged", [dict(padded=True), dict(resets=0.3), dict(padded=True, resets=0.3)], ids=str)
def test_padded_cases_are_the_same_for_ours_and_for_nn_gru(ragged):
    """nn.GRU over their sequences as rows of a packed batch, and the layer with the arguments."""
    case = Case(6, 5, 3, 8, bidirectional=True, **ragged)
    inputs = work.Inputs.draw(case, torch.device("cpu"))
    state, found = work.weights(case, torch.device("cpu")), []
    for name in (BASELINE, "reference"):
        module = find(name).make(case, device="cpu", dtype=torch.float32)
        module.load_state_dict(state)
        found.append(inputs.through(module))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*found, strict=True))
    lengths, resets = providers.padding(case, torch.device("cpu"))
    if lengths is not None:
        past = torch.arange(6)[:, None] >= lengths
        assert past.any() and not found[0][0][past].any() and sorted(lengths.tolist(), reverse=True) == [*case.lengths]
    assert resets is None or resets.any()
    assert "lengths or resets" in find("nn.LSTM").unserved(case)


def test_the_questions_ask_with_commands_that_exist():
    text = (Path(results.__file__).parent / "QUESTIONS.md").read_text()
    commands = re.findall(r"python -m benchmarks((?: [^`\n]*)?)`", text)
    assert len(commands) > 3
    for command in commands:
        words = command.split()
        if words and not words[0].startswith("--"):
            assert words in (["table"], ["day", "--dry-run"], ["day"]) or (words[:2] == ["day", "--only"])
            assert day.chosen(words[2:])
            continue
        given = list(zip(words[::2], words[1::2], strict=True))
        suite, *more = [value for option, value in given if option == "--suite"] or ["workloads"]
        assert not more and {option for option, _ in given} <= {"--suite", "--only", "--with"}
        run.chosen(suite, *([v for o, v in given if o == option] for option in ("--only", "--with")))


# summary


def rows_for(cases, ratio=0.5, graph=0.5, device="a device", ours="default", status="ok"):
    fixed = {"schema": SCHEMA, **dataclasses.asdict(dataclasses.replace(HERE, device=device))}
    for case in cases:
        for provider in (BASELINE, ours):
            us, in_a_graph = (100.0, 50.0) if provider == BASELINE else (100 * ratio, graph and 50 * graph)
            figures = dict(p50_us=us, p20_us=0.95 * us, p80_us=1.1 * us, device_us=in_a_graph, peak_mib=7.0)
            row = Row(case, provider, "inference", status, "host AMD EPYC, 16 cores", l2="warm", **figures)
            yield {name: str(value) for name, value in {**fixed, **row.cells()}.items()}


TINY = [Case(4, B, 5, 6) for B in (1, 2, 3)]


def test_losses_come_first_with_both_ratios_host_and_device(tmp_path, capsys):
    path = tmp_path / "a" / ROWS
    path.parent.mkdir()
    workload = WORKLOADS[2].case
    rows = [*rows_for(TINY[:1], 1.7, 0.8), *rows_for(TINY[1:2], 0.4, None), *rows_for([workload], 0.25, 1.3),
            *rows_for(TINY[2:], 3.0, device="another")]  # fmt: skip
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    assert main(["summary", "--out", str(tmp_path)]) == 0
    first, second = capsys.readouterr().out.split("another: ")
    assert "host      AMD EPYC, 16 cores" in first and "a device: 6 rows" in first
    told = first[first.index("losses: slower than nn.GRU as it is called, or in a CUDA graph, in 2 of 3") :]
    losses, workloads = told.split("workloads, the slowest first")
    assert losses.index("1.700") < losses.index("0.250") and "0.800" in losses and "1.300" in losses
    assert TINY[1].name not in losses and "RNNoise" in workloads and "frames of speech (10 ms) a second" in workloads
    assert "median ratio, inference in fp32: 0.400 in 3; in a graph 1.050 in 2" in told
    assert "in 1 of 1" in second


@pytest.mark.parametrize(
    ("ratio", "graph", "lost"),
    [(0.8, 0.9, False), (1.1, 0.9, False), (1.2, 0.9, True), (0.5, 1.1, True), (0.5, None, False)],
)
def test_a_loss_is_more_than_the_calls_vary_or_slower_in_a_graph(ratio, graph, lost):
    """Each lies between 0.95 and 1.1 times its median: up to 1.158 times as long is within that."""
    (pair,) = summary.compared(list(rows_for(TINY[:1], ratio, graph)))
    assert pair.lost == lost


def test_where_the_layer_as_it_comes_was_not_timed_its_fastest_kernel_is_compared():
    rows = [*rows_for(TINY[:1], 0.8, ours="step"), *rows_for(TINY[:1], 0.6, ours="sequence")]
    (pair,) = summary.compared(rows)
    assert pair.ours["provider"] == "sequence"
    assert not summary.compared([*rows, *rows_for(TINY[:1], 0.1, ours="sequence:num_warps=4")])  # candidates' tiles
    assert not summary.compared(list(rows_for(TINY[:1], status="wrong")))


def test_the_latest_row_of_a_measurement_counts(tmp_path):
    for date, us in (("2026-02-01", 1.0), ("2026-03-01", 2.0), ("2026-01-01", 3.0)):
        with ResultsFile(tmp_path / date / ROWS, dataclasses.replace(HERE, date=date)) as file:
            file.append(Row(DENSE, "step", "forward", p50_us=us))
            file.append(Row(DENSE, "step", "inference", p50_us=us, l2="cold" if us == 3.0 else "warm"))
    rows = read_rows(tmp_path)
    assert len({tuple(row[name] for name in KEY) for row in rows}) == len(rows) == 3
    assert {(row["pass"], row["l2"]): row["p50_us"] for row in rows} == {
        ("forward", ""): "2", ("inference", "warm"): "2", ("inference", "cold"): "3"
    }  # fmt: skip


def test_a_summary_of_nothing_says_how_to_get_rows(tmp_path, capsys):
    assert main(["summary", "--out", str(tmp_path)]) == 1
    assert "python -m benchmarks day" in capsys.readouterr().err


# timing


def test_every_round_samples_every_call_in_changing_order():
    order = []

    class Meter(FakeMeter):
        def sample(self, timed):
            order.append(timed.calls)
            return super().sample(timed)

    timed = {str(i): Timed(lambda: None, i) for i in range(1, 4)}
    samples = interleave(timed, Meter(), rounds=20, seconds=1e9)
    assert {len(taken) for taken in samples.values()} == {20}
    rounds = [tuple(order[i : i + 3]) for i in range(0, 60, 3)]
    assert all(sorted(r) == [1, 2, 3] for r in rounds) and len(set(rounds)) > 1
    assert len(interleave(timed, FakeMeter(), rounds=20, seconds=0, fewest=4)["1"]) == 4


def test_a_sample_is_per_call():
    meter = HostMeter(iter([10.0, 10.5]).__next__)
    made = []
    assert meter.sample(Timed(lambda: made.append(1), 5)).time_us == pytest.approx(1e5)
    assert len(made) == 5
    assert quantiles([3.0, 1.0, 2.0]) == pytest.approx((1.4, 2.0, 2.6))
    assert p99(list(range(101))) == 99


@pytest.mark.parametrize(
    ("ours", "answer"),
    [((101.0,), "yes"), ((100.0, 104.0), "yes, as far as this run can tell"), ((103.0,), "no")],
    ids=["within", "in doubt", "not"],
)
def test_the_cpu_s_conclusion_is_one(ours, answer):
    """What a call adds from where there is nothing to compute; of TARGET whether it keeps to the limit."""

    def found(case, us):
        samples = {BASELINE: (100.0,), cpu.TWIN: (101.0,), cpu.OURS: us}
        taken = {name: [Sample(v, v) for v in (values * 60)[:60]] for name, values in samples.items()}
        return {pass_: cpu.Found.of(case, pass_, taken) for pass_ in cpu.PASSES}

    a_call, target = cpu.conclusion({cpu.EMPTY: found(cpu.EMPTY, (103.0,)), cpu.TARGET: found(cpu.TARGET, ours)})
    assert "adds 3.0 us a forward, 3.0 us a forward+backward" in a_call and target.endswith(f"within 2 %: {answer}")
    assert f"at {cpu.TARGET.name} that is 3.0 % and 3.0 % of nn.GRU's time" in target


def test_the_overhead_is_measured_against_nn_gru_and_its_twin():
    found = cpu.overhead(DENSE, "forward+backward", HostMeter(), rounds=3, seconds=9.0)
    assert {name: len(taken) for name, taken in found.items()} == {BASELINE: 3, cpu.TWIN: 3, cpu.OURS: 3}


def test_the_cpu_suite_leaves_its_rows_and_says_whether_it_is_within_the_limit(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cpu, "has_triton", lambda: False)
    monkeypatch.setattr(run, "SECONDS", 0.0)
    entry = dataclasses.replace(SUITES["cpu"](describe("h200"))[0], case=DENSE, passes=("forward",))
    monkeypatch.setitem(SUITES, "cpu", lambda device: (entry,))
    threads = torch.get_num_threads()
    try:
        assert cpu.main(tmp_path, rounds=4, seconds=0.0) == 0
    finally:
        torch.set_num_threads(threads)
    assert len(rows_of(tmp_path / "cpu.csv")) == 2 * 2 * 3
    assert [row["provider"] for row in rows_of(tmp_path / ROWS)] == list(entry.providers)
    said = capsys.readouterr()
    last = said.out.strip().splitlines()[-4:]
    assert last[0] == cpu.CONCLUSION and last[-1].endswith("was not measured: Triton is not installed")
    assert said.out.count("within 2 %") == said.out.count("nothing to compute") == 1 and not said.err


def test_a_cuda_sample_lies_between_its_events(monkeypatch):
    log = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("record")

        def elapsed_time(self, end):
            return 0.3  # ms

    for name, fake in {
        "current_device": lambda: 0,
        "synchronize": lambda device: log.append("idle"),
        "Event": Event,
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    meter = CudaMeter()
    timed = Timed(lambda: log.append("call"), 2)
    assert meter.sample(timed).time_us == pytest.approx(150)
    assert log == ["idle", "record", "call", "call", "record", "idle"]

    monkeypatch.setattr(timing, "of_cuda", lambda index: SimpleNamespace(l2_bytes=0))
    flushed = SimpleNamespace(zero_=lambda: log.append("flush"))
    monkeypatch.setattr(torch, "empty", lambda size, dtype, device: flushed if size == 128 << 20 else None)
    log.clear()
    cold = CudaMeter(cold=True)
    cold.sample(timed)
    assert (meter.l2, cold.l2) == ("warm", "cold") and log[:3] == ["flush", "idle", "record"]


def test_a_graph_is_captured_warm_and_holds_nothing_that_was_made(monkeypatch):
    log = []

    class Stream:
        def wait_stream(self, other):
            log.append("wait")

    class Graph:
        def replay(self):
            log.append("replay")

    class Made:
        pass

    made = []

    def call():
        result = Made()
        made.append(weakref.ref(result))
        log.append("call")
        return result

    for name, fake in {
        "Stream": Stream, "current_stream": Stream, "stream": nullcontext, "CUDAGraph": Graph, "graph": nullcontext,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, fake)
    replay = timing.captured(call)
    assert log == ["wait", "call", "call", "call", "wait", "call"]
    assert replay() is None and log[-1] == "replay"
    assert not any(ref() for ref in made)


@pytest.mark.compiled
def test_host_cost_runs_the_real_launchers_and_launches_nothing(monkeypatch):
    triton = pytest.importorskip("triton")
    from tritongru.kernels import step as kernels
    from tritongru.launch import runtime

    driver = triton.runtime.driver
    active = driver._active
    with monkeypatch.context() as patch:
        patch.setattr(runtime, "_observers", [])  # nobody is to take these for launches
        for sizes in (None, (8, 8, 5, 3, 1, 1)):
            found = hostcost.calls(sizes, 6, repeats=2)
            assert set(found) == {(pass_, kind) for pass_ in ("forward", "backward") for kind in ("new", "again")}
            for first, steps in found.values():
                assert len(first) == 2 and len(steps) == 2 * (6 - 1 - hostcost._SETTLED)
                assert all(us > 0 for us in first + steps)
    assert driver._active is active
    assert not any(
        hostcost._NOWHERE in kernel.device_caches for kernel in (kernels.step_forward, kernels.step_backward)
    )


# cases


def test_cases_are_told_apart_by_name():
    everything = [entry.case for suite in SUITES.values() for entry in suite(describe("h200"))]
    for cases in (CPU_CASES, MEMCHECK_CASES, set(everything)):
        assert len({case.name for case in cases}) == len(cases)


def test_no_row_of_a_day_is_taken_for_another():
    rows = [
        (entry.case.name, provider, pass_)
        for name, suite in SUITES.items() if name != "cpu" for entry in suite(describe("h200"))
        for provider in entry.providers for pass_ in entry.passes
    ]  # fmt: skip
    assert len(set(rows)) == len(rows) > 2500


def test_suites_name_passes_and_providers_that_exist():
    for suite in SUITES.values():
        for entry in suite(describe("h200")):
            assert set(entry.passes) <= set(work.PASSES) and all(map(run.find, entry.providers))
            assert entry.providers[0] == BASELINE and len(set(entry.providers)) == len(entry.providers)


def test_the_grid_is_what_it_says():
    cases = {entry.case for entry in SUITES["grid"](describe("h200")) if entry.case.T == 128}
    assert cases == {
        Case(128, B, H, H, dtype) for dtype in ("bf16", "fp16", "fp32") for B in (1, 4, 16, 32, 64, 128, 256, 512)
        for H in (32, 64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 2816)
    }  # fmt: skip


def test_candidates_are_tiles_that_the_device_can_run_and_does_not_anyhow():
    entries = SUITES["tune"](describe("h200"))
    names = {name for entry in entries for name in entry.providers}
    assert "sequence:programs_per_sm=2,num_warps=4" in names and "sequence:tiles=2,early=1" in names
    assert {(e.case.H, e.case.dtype) for e in entries} >= {(2048, "bf16"), (1024, "fp32")}
    assert not any(e.case.H == 2048 and e.case.dtype == "fp32" for e in entries)  # not on chip
    assert any("step:pdl=0" in e.providers for e in entries)
    for entry in entries[:6]:
        tiles = [warm.choose(entry.case.problem(True), describe("h200"), name).tiles for name in entry.providers[1:]]
        assert len(set(tiles)) == len(tiles) > 3


def test_packed_lengths_fall_from_the_longest():
    case = Case(128, 32, 8, 8, packed=True)
    assert case.lengths[0] == 128 and list(case.lengths) == sorted(case.lengths, reverse=True)
    assert case.batch_sizes[0] == 32 and sum(case.batch_sizes) == sum(case.lengths)
    assert 128 / 6 < case.lengths[16] < 128 / 2 and case.lengths[-1] >= 1
