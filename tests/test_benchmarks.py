"""The measuring itself: what is refused, what is kept, what a row says. No time is asserted anywhere."""

import csv
import dataclasses
import gc
import importlib.machinery
import re
import sys
import types
import weakref
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # benchmarks/ is of the checkout, not of the package

from benchmarks import cpu, day, hostcost, providers, results, run, summary, timing, work
from benchmarks.__main__ import main
from benchmarks.cases import ALL_PASSES, CPU_CASES, MEMCHECK_CASES, SUITES, Case, Entry, merged
from benchmarks.providers import BASELINE, PROVIDERS, Provider
from benchmarks.results import COLUMNS, KEY, ROWS, SCHEMA, Environment, OtherSchemaError, ResultsFile, Row, read_rows
from benchmarks.timing import CudaMeter, HostMeter, Sample, Timed, interleave, p99, quantiles

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

    def measure(cases, others, meter=None, passes=ALL_PASSES, **options):
        for provider in others:
            monkeypatch.setitem(PROVIDERS, provider.name, provider)
        names = (BASELINE, *(provider.name for provider in others))
        with ResultsFile(tmp_path / ROWS, HERE) as file:
            code = run.run([Entry(case, passes, names) for case in cases], meter or FakeMeter(), file, **options)
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


def test_graphs_and_torchrl_say_what_they_do_not_serve():
    packed, dense = Case(4, 3, 5, 6, packed=True), Case(4, 3, 5, 6)
    assert PROVIDERS["step-graph"].unserved(packed) and not PROVIDERS["step-graph"].unserved(dense)
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

        def on_device_alone(self, timed, host_us):
            return 80.0

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


class Queue(FakeMeter):
    """A device whose queue is filled in time where the host is given `needs` us for it; a call in a row takes it 50."""

    late = "too late"

    def __init__(self, needs):
        super().__init__()
        self.needs, self.given = needs, []

    def on_device_alone(self, timed, host_us):
        self.given.append(host_us)
        return 80.0 if host_us >= self.needs else None


@pytest.mark.parametrize(
    ("needs", "device_us", "note"),
    [(50, "80", THREADS), (180, "80", THREADS), (float("inf"), "", "device_us: too late")],
    ids=["as the samples say", "longer alone than in a row", "more than a queue holds"],
)
def test_the_device_s_own_time_is_a_number_or_a_reason(measured, needs, device_us, note):
    meter = Queue(needs)
    code, rows = measured([DENSE], [], meter, ("forward",))
    assert code == 0 and [(r["status"], r["device_us"], r["note"]) for r in rows] == [("ok", device_us, note)]
    assert meter.given.count(max(meter.given)) == (10 if device_us else 1)


def test_a_long_call_is_not_waited_for_again_and_again(measured):
    meter = Queue(float("inf"))
    meter.sample = lambda timed: Sample(2e5, 1e5)
    measured([DENSE], [], meter, ("forward",))
    assert meter.given == [1e5]


def test_a_failure_alone_on_the_device_is_its_reason(measured):
    meter = Queue(0)
    meter.on_device_alone = partial(Raising.forward, SimpleNamespace(error=RuntimeError("a wait ran out")))
    code, rows = measured([DENSE], [], meter, ("forward",))
    assert code == 0 and rows[0]["note"] == "device_us: RuntimeError: a wait ran out" and not rows[0]["device_us"]


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


def test_a_spent_budget_says_what_was_not_measured(measured, capsys):
    assert measured([DENSE, Case(4, 3, 5, 7)], [], ends=0.0) == (1, [])
    assert f"2 cases not measured, {DENSE.name} the first" in capsys.readouterr().out.replace("\n", " ")


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


@pytest.mark.parametrize("command", [["--suite", "quick"], ["--suite", "full"], ["day"]], ids=" ".join)
def test_without_a_gpu_one_line_says_so(command, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([*command, "--out", str(tmp_path)]) != 0
    said = capsys.readouterr()
    assert not said.out and len(said.err.splitlines()) == 1
    assert "no CUDA device" in said.err and "python -m benchmarks --suite cpu" in said.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["cudnn", "step:", "step:block_q=1", "step:block_b=x", "aten:block_b=1"])
def test_an_unknown_provider_is_a_usage_error(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--with", name])
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and repr(name.partition(":")[2] or name)[1:-1] in said
    assert "block_b" in said if "step:" in name and name != "step:" else "sequence-recompute" in said  # the valid ones


@pytest.mark.parametrize(
    ("arguments", "listed"),
    [
        (["--suite", "medium"], ("'quick'", "'full'", "'cpu'")),
        (["--suite", "quick", "--only", "H7"], ("'H7'", SUITES["quick"][0].case.name)),
        (["--suite", "full", "--only", "bf16", "--only", "H7-"], ("'bf16' and 'H7-'", "more")),
        (["--device", "cuda:9"], ("'cuda:9'", "CUDA devices here")),
        (["tomorrow"], ("summary", "compiled", "study", "day")),
        (["study", "--out", "x"], ("--out is not of study",)),
        (["summary", "--suite", "quick"], ("not of summary",)),
    ],
    ids=" ".join,
)
def test_what_names_nothing_is_a_usage_error_that_lists_the_valid(arguments, listed, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    said = " ".join(capsys.readouterr().err.split())
    assert stopped.value.code == 2 and all(text in said for text in listed), said


def test_other_tiles_reach_the_launcher_inside_only():
    step = pytest.importorskip("tritongru.launch.step")
    from tritongru.planning import describe

    problem = ("forward", 8, 64, 1, "fp16", "tf32", describe("h100"))
    chosen = step.step_tiles(*problem)
    with providers.find("step:num_warps=8,block_b=32").around():
        changed = step.step_tiles(*problem)
    assert (changed.num_warps, changed.block_b, changed.block_h) == (8, 32, chosen.block_h)
    assert step.step_tiles(*problem) == chosen


def test_every_part_of_the_day_runs_and_is_accounted_for(tmp_path, capsys):
    def part(name, code, share=0.9, **options):
        return day.Part(name, lambda out, minutes: code and (sys.executable, "-c", code), share, **options)

    parts = [
        part("good", "print('fine')"),
        part("bad", "print('broken'); raise SystemExit(5)", meanings=((5, "nothing found"),)),
        part("slow", "import time; time.sleep(60)", share=0.01),
        part("tool", None),
        part("last", "import os; print(os.environ['GIVEN'])", environment=(("GIVEN", "here"),)),
    ]
    assert day.run(parts, tmp_path, 1.0, HERE) == 1
    told = (tmp_path / "day.txt").read_text().splitlines()
    assert [line.split()[0] for line in told[1:]] == ["good", "bad", "slow", "tool", "last"]
    assert "passed" in told[1] and "FAILED: nothing found" in told[2] and "stopped after" in told[3]
    assert "not run" in told[4] and "passed" in told[5]
    assert (tmp_path / "last.log").read_text() == "here\n"
    assert "broken" in capsys.readouterr().out
    assert day.run(parts[:1] + parts[3:], tmp_path, 1.0, HERE) == 0  # a missing tool is no failure


def test_what_the_budget_leaves_out_is_said(tmp_path):
    def part(name, **options):
        return day.Part(name, lambda out, minutes: (sys.executable, "-c", "print('ran')"), 1.0, **options)

    parts = [part("whole"), part("rest", optional=True), part("end", least=1.0)]
    assert day.run(parts, tmp_path, 0.0, HERE) == 1
    told = (tmp_path / "day.txt").read_text().splitlines()[1:]
    assert "FAILED: not run, the budget was spent" in told[0] and "not run, the budget was spent" in told[1]
    assert "FAILED" not in told[1] and "passed" in told[2]
    assert day.run(parts[1:], tmp_path, 0.0, HERE) == 0


def test_a_suite_goes_on_after_the_device_was_lost(tmp_path):
    code = f"""
import pathlib
seen = pathlib.Path({str(tmp_path / "seen")!r})
runs = len(seen.read_text()) if seen.exists() else 0
seen.write_text("x" * (runs + 1))
raise SystemExit(3 if runs < 2 else 0)
"""
    assert (
        day.run([day.Part("suite", lambda out, minutes: (sys.executable, "-c", code), 1.0)], tmp_path, 1.0, HERE) == 1
    )
    assert (tmp_path / "seen").read_text() == "xxx"
    assert "the device was lost 2 time(s), at last passed" in (tmp_path / "day.txt").read_text()


def test_the_commands_of_the_day_exist(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    commands = {part.name: part.command(Path("out"), 10.0) for part in day.PARTS}
    assert list(commands) == ["tests", "memcheck", "check", "quick", "full", "summary"]
    for name in ("quick", "full"):
        assert commands[name][-4:] == ("--out", "out", "--budget-minutes", "9.0") and "--suite" in commands[name]
        assert main(commands[name][3:]) == 1 and "no CUDA device" in capsys.readouterr().err
        assert "--resume" in commands[name]
    assert main([*commands["summary"][3:-1], "nowhere"]) == 1


def test_the_questions_ask_with_commands_that_exist():
    text = (Path(results.__file__).parent / "QUESTIONS.md").read_text()
    commands = re.findall(r"python -m benchmarks((?: [^`\n]*)?)`", text)
    assert len(commands) > 10
    for command in commands:
        words = command.split()
        if words and not words[0].startswith("--"):
            assert words in (["day"], ["compiled"], ["summary"])
            continue
        given = list(zip(words[::2], words[1::2], strict=True))
        suite, *more = [value for option, value in given if option == "--suite"] or ["quick"]
        assert not more and {option for option, _ in given} <= {"--suite", "--only", "--with"}
        run.chosen(suite, *([v for o, v in given if o == option] for option in ("--only", "--with")))


# summary


def rows_for(entries, ratio=0.5, device="a device", status="ok"):
    fixed = {"schema": SCHEMA, **dataclasses.asdict(dataclasses.replace(HERE, device=device))}
    for entry in entries:
        for provider in entry.providers:
            for pass_ in entry.passes:
                of_us = 1.0 if provider == BASELINE else ratio
                us = 100 * of_us
                figures = dict(p50_us=us, p20_us=0.95 * us, p80_us=1.1 * us, ratio=of_us, host_us=us, device_us=50.0)
                figures = figures if status == "ok" else {}
                yield {**fixed, **Row(entry.case, provider, pass_, status, l2="warm", **figures).cells()}


def mean_of(rows, provider="default", pass_="inference", suite="tiny"):
    found = [m for m in summary.means(rows, [suite]) if (m.provider, m.pass_) == (provider, pass_)]
    assert len(found) == 1
    return found[0]


@pytest.fixture
def tiny(monkeypatch):
    entries = tuple(Entry(Case(4, B, 5, 6)) for B in (1, 2, 3))
    monkeypatch.setitem(SUITES, "tiny", entries)
    return entries


def test_a_whole_suite_has_a_geometric_mean(tiny):
    rows = [*rows_for(tiny[:1], 0.25), *rows_for(tiny[1:2], 1.0), *rows_for(tiny[2:], 2.0)]
    found = mean_of(rows)
    assert found.mean == pytest.approx(0.5 ** (1 / 3)) and (found.run, found.rows) == (3, 3)


def test_an_incomplete_suite_has_none(tiny):
    found = mean_of(list(rows_for(tiny[:2])))
    assert found.mean is None and (found.run, found.rows) == (2, 3) and "incomplete" in found.verdict


@pytest.mark.parametrize("status", ["wrong", "error", "out of memory"])
def test_a_suite_with_a_failure_has_none(tiny, status):
    broken = rows_for(tiny[2:], status=status)
    found = mean_of([*rows_for(tiny[:2]), *broken])
    assert found.mean is None and found.broken == 1 and found.run == 3


def test_what_is_not_served_is_counted_and_left_out_of_the_mean(tiny):
    unserved = rows_for(tiny[2:], status="unserved")
    found = mean_of([*rows_for(tiny[:2], 0.25), *unserved])
    assert found.mean == pytest.approx(0.25) and (found.run, found.unserved) == (3, 1)


def test_losses_come_before_wins_and_means(tiny, tmp_path, capsys):
    path = tmp_path / "a" / ROWS
    path.parent.mkdir()
    rows = [*rows_for(tiny[:1], 1.7), *rows_for(tiny[1:], 0.4), *rows_for(tiny, 3.0, device="another")]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    assert main(["summary", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    first, second = said.split("another: ")
    assert (
        first.index("takes longer than nn.GRU in 2 of 6")
        < first.index("1.700")
        < first.index("wins")
        < first.index("0.400")
    )
    assert first.index("0.400") < first.index("geometric means") and "0.648" in first
    assert "in 6 of 6" in second


@pytest.mark.parametrize(
    ("ratio", "verdict"), [(0.8, "win"), (0.9, "no difference"), (1.1, "no difference"), (1.2, "loss")]
)
def test_what_the_calls_themselves_vary_by_is_no_difference(tiny, ratio, verdict):
    """Each of both lies between 0.95 and 1.1 times its median: 0.864 to 1.158 times as long is within that."""
    pairs = summary.compared(list(rows_for(tiny, ratio)))
    assert len(pairs) == 6 and {pair.verdict for pair in pairs} == {verdict}


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
    assert "--suite quick" in capsys.readouterr().err


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
    assert meter.sample(Timed(lambda: made.append(1), 5, nullcontext)).time_us == pytest.approx(1e5)
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
    monkeypatch.setitem(SUITES, "cpu", (dataclasses.replace(SUITES["cpu"][0], case=DENSE, passes=("forward",)),))
    threads = torch.get_num_threads()
    try:
        assert cpu.main(tmp_path, rounds=4, seconds=0.0) == 0
    finally:
        torch.set_num_threads(threads)
    assert len(rows_of(tmp_path / "cpu.csv")) == 2 * 2 * 3
    assert [row["provider"] for row in rows_of(tmp_path / ROWS)] == list(SUITES["cpu"][-1].providers)
    said = capsys.readouterr()
    last = said.out.strip().splitlines()[-4:]
    assert last[0] == cpu.CONCLUSION and last[-1].endswith("was not measured: Triton is not installed")
    assert said.out.count("within 2 %") == said.out.count("nothing to compute") == 1 and not said.err


def test_a_cuda_sample_lies_between_its_events(monkeypatch):
    log, late = [], False
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("record")

        def query(self):
            return log.append("asked") or late

        def elapsed_time(self, end):
            return 0.3  # ms

    for name, fake in {
        "current_device": lambda: 0,
        "synchronize": lambda device: log.append("idle"),
        "Event": Event,
        "_sleep": lambda cycles: log.append(cycles),
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    meter = CudaMeter()
    timed = Timed(lambda: log.append("call"), 2)
    assert meter.sample(timed).time_us == pytest.approx(150)
    assert log == ["idle", "record", "call", "call", "record", "idle"]
    log.clear()
    assert meter.on_device_alone(timed, host_us=10.0) == pytest.approx(300)
    assert log == ["idle", 40000, "record", "call", "record", "asked", "idle"]
    late = True  # the device had begun before all was queued: its time would be the host's
    assert meter.on_device_alone(timed, host_us=10.0) is None

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
    active, seen = driver._active, []
    with monkeypatch.context() as patch, runtime.observe(lambda name, grid: seen.append(name)):
        patch.setattr(runtime, "_observers", runtime._observers[-1:])  # nobody else is to take these for launches
        for sizes in (None, (8, 8, 5, 3, 1, 1)):
            found = hostcost.calls(sizes, 6, repeats=2)
            assert len(found["forward"][0]) == len(found["backward"][0]) == 2
            assert all(us > 0 for pass_ in found.values() for part in pass_ for us in part)
    calls = 2 * (2 * 2 + 2)
    assert seen.count("step_forward") == seen.count("step_backward") == calls * 6
    assert driver._active is active
    assert not any(
        hostcost._NOWHERE in kernel.device_caches for kernel in (kernels.step_forward, kernels.step_backward)
    )


# cases


def test_cases_are_told_apart_by_name():
    for cases in (CPU_CASES, MEMCHECK_CASES, *([entry.case for entry in suite] for suite in SUITES.values())):
        assert len({case.name for case in cases}) == len(cases)


def test_suites_name_passes_and_providers_that_exist():
    for suite in SUITES.values():
        for entry in suite:
            assert set(entry.passes) <= set(work.PASSES) and set(entry.providers) <= set(PROVIDERS)
            assert entry.providers[0] == BASELINE and len(set(entry.providers)) == len(entry.providers)


def test_the_full_suite_is_what_it_says():
    full = {entry.case: entry for entry in SUITES["full"]}
    assert (
        all(full[e.case] | e == full[e.case] for e in SUITES["quick"])
        and SUITES["full"][0].case == SUITES["quick"][0].case
    )
    for H in (2816, 2560, 2048, 1536):
        for T in (1500, 750, 375, 187):
            assert "forward+backward" in full[Case(T, 32, H, H, "fp16")].passes
            assert all("inference" in full[Case(T, B, H, H, "fp16")].passes for B in (1, 2, 4))
    grid = [
        (H, B) for H in (64, 128, 152, 192, 256, 384, 512, 768, 1024, 1536, 2048) for B in (1, 4, 16, 32, 64, 128, 512)
    ]
    for dtype, precision in (("fp32", "tf32"), ("fp32", "ieee"), ("fp16", "tf32"), ("bf16", "tf32")):
        assert all(Case(512, B, H, H, dtype, precision) in full for H, B in grid)
    marks = {
        mark for case in full for mark in ("2layers", "4layers", "bidirectional", "packed", "cell") if mark in case.name
    }
    assert len(marks) == 5 and {1, 8192} <= {case.T for case in full}
    assert any("streaming" in e.passes for e in full.values()) and any("nn.LSTM" in e.providers for e in full.values())


def test_suites_merge_by_shape_in_turn():
    a, b, c = (Case(1, 1, 1, H) for H in (1, 2, 3))
    found = merged([Entry(a, ("forward",), ("x",)), Entry(b)], [Entry(c), Entry(a, ("inference",), ("x", "y"))])
    assert [entry.case for entry in found] == [a, c, b]
    assert found[0] == Entry(a, ("forward", "inference"), ("x", "y"))


def test_packed_lengths_fall_from_the_longest():
    case = Case(128, 32, 8, 8, packed=True)
    assert case.lengths[0] == 128 and list(case.lengths) == sorted(case.lengths, reverse=True)
    assert case.batch_sizes[0] == 32 and sum(case.batch_sizes) == sum(case.lengths)
    assert 128 / 6 < case.lengths[16] < 128 / 2 and case.lengths[-1] >= 1
