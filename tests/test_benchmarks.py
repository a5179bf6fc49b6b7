"""The measuring itself: what is refused, what is kept, what a row says. No time is asserted anywhere."""

import csv
import re
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # benchmarks/ is of the checkout, not of the package

from benchmarks import cpu, day, gpu, hostcost, providers, results, work
from benchmarks.__main__ import main
from benchmarks.cases import CPU_CASES, GPU_CASES, MEMCHECK_CASES, Case
from benchmarks.providers import BASELINE, PROVIDERS, Provider
from benchmarks.results import COLUMNS, SCHEMA, Environment, OtherSchemaError, ResultsFile, Row
from benchmarks.timing import CudaMeter, HostMeter, Sample, Timed, interleave, quantiles

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


def made(kind, name="theirs", *first):
    return Provider(name, "", lambda case, **place: kind(*first, case.I, case.H, **place))


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def run(tmp_path, cases, others, meter=None):
    """The suite over nn.GRU and `others` on the CPU: exit code and rows."""
    with ResultsFile(tmp_path / "gpu.csv", HERE) as file:
        code = gpu.run(cases, [PROVIDERS[BASELINE], *others], meter or FakeMeter(), file)
    return code, rows_of(tmp_path / "gpu.csv")


@pytest.mark.parametrize(
    "case",
    [
        DENSE,
        Case(4, 3, 5, 6, packed=True, bidirectional=True),
        Case(1, 3, 5, 6, cell=True),
        Case(3, 2, 4, 5, layers=2, dtype="bf16"),
    ],
    ids=lambda case: case.name,
)
def test_a_right_provider_gets_a_row_for_every_pass(tmp_path, case):
    code, rows = run(tmp_path, [case], [PROVIDERS["default"]])
    assert code == 0
    assert [(r["provider"], r["pass"], r["status"]) for r in rows] == [
        (name, pass_, "ok") for pass_ in work.PASSES for name in (BASELINE, "default")
    ]
    for row in rows:
        assert float(row["p50_us"]) == 100 and float(row["host_us"]) == 50 and float(row["ratio"]) == 1
        assert row["schema"] == str(SCHEMA) and row["commit"] == "c0ffee" and row["case"] == case.name
        assert row["error_output"] and row["error_w_hh"] and bool(row["error_h_n"]) != case.cell


@pytest.mark.parametrize("kind", [Wrong, partial(Raising, ValueError("not today"))], ids=["wrong", "raising"])
def test_what_is_wrong_or_fails_is_said_and_not_timed(tmp_path, kind):
    meter = FakeMeter()
    code, rows = run(tmp_path, [DENSE], [made(kind), PROVIDERS["default"]], meter)
    assert code == 1
    theirs = [r for r in rows if r["provider"] == "theirs"]
    assert len(theirs) == 1 and theirs[0]["pass"] == "check" and not theirs[0]["p50_us"]
    if kind is Wrong:
        assert theirs[0]["status"] == "wrong" and theirs[0]["note"].startswith("output ")
    else:
        assert theirs[0]["status"] == "error" and theirs[0]["note"] == "ValueError: not today"
    assert sum(r["status"] == "ok" for r in rows) == 6  # the others are timed all the same


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


def test_out_of_memory_is_a_row_and_no_failure(tmp_path):
    code, rows = run(tmp_path, [DENSE], [made(partial(Raising, torch.OutOfMemoryError("out of memory")))])
    assert code == 0
    assert [r["status"] for r in rows if r["provider"] == "theirs"] == ["out of memory"]


def test_an_interrupted_run_keeps_its_rows(tmp_path, capsys):
    stop = made(lambda *a, **k: Raising(KeyboardInterrupt(), *a, **k) if a[1] == 7 else torch.nn.GRU(*a, **k))
    code, rows = run(tmp_path, [DENSE, Case(4, 3, 5, 7), Case(4, 3, 5, 8)], [stop])
    assert code == 130
    assert len(rows) == 6 and {r["case"] for r in rows} == {DENSE.name}
    assert "interrupted; the 6 rows so far" in capsys.readouterr().out.replace("\n", " ")


def test_a_lost_device_ends_the_run_and_keeps_its_rows(tmp_path, capsys):
    lost = made(lambda *a, **k: Raising(torch.AcceleratorError("illegal memory access"), *a, **k))
    code, rows = run(tmp_path, [DENSE], [lost])
    assert code == 1 and not rows
    assert "the device failed" in capsys.readouterr().out


def test_a_spent_budget_says_what_was_not_measured(tmp_path, capsys):
    with ResultsFile(tmp_path / "gpu.csv", HERE) as file:
        assert gpu.run([DENSE], [PROVIDERS[BASELINE]], FakeMeter(), file, budget_minutes=-1) == 1
    assert f"not measured: {DENSE.name}" in capsys.readouterr().out


# results files


def test_the_columns_belong_to_the_schema():
    assert SCHEMA == 1, "new columns, new list"
    assert ",".join(COLUMNS) == (
        "schema,date,device,driver,torch,triton,cudnn,tritongru,commit,dirty,"
        "case,provider,pass,dtype,products,T,B,I,H,layers,directions,packed,status,note,"
        "first_call_s,rounds,calls,p50_us,p20_us,p80_us,ratio,host_us,device_us,peak_mib,saved_mib,"
        "error_output,error_h_n,error_x,error_h_0,error_w_ih,error_w_hh,error_b_ih,error_b_hh"
    )


def test_rows_are_on_disk_as_they_come_and_appended(tmp_path):
    path = tmp_path / "new" / "gpu.csv"
    for run_ in range(2):
        with ResultsFile(path, HERE) as file:
            file.append(Row(DENSE, "step", "forward", p50_us=12.5))
            assert len(rows_of(path)) == run_ + 1  # before it is closed
    row = rows_of(path)[-1]
    assert tuple(row) == COLUMNS
    assert (row["device"], row["p50_us"], row["H"], row["directions"]) == ("a device", "12.5", "6", "1")


@pytest.mark.parametrize("change", [("schema,date", "schema,day"), ("\n1,", "\n2,")], ids=["columns", "number"])
def test_another_schema_is_refused_and_left_alone(tmp_path, change, capsys):
    path = tmp_path / "cpu.csv"
    with ResultsFile(path, HERE) as file:
        file.append(Row(DENSE, "step", "forward"))
    path.write_text(path.read_text().replace(*change))
    before = path.read_text()
    with pytest.raises(OtherSchemaError, match="another schema"):
        ResultsFile(path, HERE)
    assert main(["cpu", "--out", str(tmp_path)]) == 2
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


@pytest.mark.parametrize("suite", ["gpu", "day"])
def test_without_a_gpu_one_line_says_so(suite, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([suite, "--out", str(tmp_path)]) != 0
    said = capsys.readouterr()
    assert not said.out and len(said.err.splitlines()) == 1
    assert "no CUDA device" in said.err and "python -m benchmarks cpu" in said.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["cudnn", "step:", "step:block_q=1", "step:block_b=x", "aten:block_b=1"])
def test_an_unknown_provider_is_a_usage_error(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["gpu", "--with", name])
    assert stopped.value.code == 2 and repr(name.partition(":")[2] or name)[1:-1] in capsys.readouterr().err


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


def test_the_commands_of_the_day_exist():
    for part in day.PARTS:
        command = part.command(Path("out"), 10.0)
        assert command is None or command[0]
    assert day.PARTS[-1].command(Path("out"), 10.0)[-4:] == ("--out", "out", "--budget-minutes", "8.0")


def test_the_questions_ask_with_commands_that_exist():
    text = (Path(results.__file__).parent / "QUESTIONS.md").read_text()
    commands = re.findall(r"python -m benchmarks((?: [^`\n]*)?)`", text)
    assert len(commands) > 10
    for command in commands:
        suite, *options = command.split() or ["cpu"]
        assert suite in ("cpu", "gpu", "day")
        for option, value in zip(options[::2], options[1::2], strict=True):
            if option == "--with":
                providers.find(value)
            else:
                assert option == "--only" and any(value in case.name for case in GPU_CASES), command


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


def test_the_overhead_is_measured_against_nn_gru_and_its_twin(monkeypatch):
    samples = {"nn.GRU": [Sample(100.0, 100.0)] * 20, cpu.TWIN: [Sample(101.0, 101.0)] * 20}
    for ours, answer in ((101.0, "yes"), (103.0, "no")):
        samples[cpu.OURS] = [Sample(ours, ours)] * 20
        row = dict(cpu.rows(cpu.TARGET, "forward", samples))[cpu.OURS]
        assert row.ratio == ours / 100
        assert f"within 2 %: {answer} " in cpu.verdict(cpu.TARGET, "forward", row, samples)
    found = cpu.overhead(DENSE, "forward+backward", HostMeter(), rounds=3, seconds=9.0)
    assert {name: len(taken) for name, taken in found.items()} == {"nn.GRU": 3, cpu.TWIN: 3, cpu.OURS: 3}


def test_the_cpu_suite_leaves_its_rows_and_says_whether_it_is_within_the_limit(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cpu, "has_triton", lambda: False)
    threads = torch.get_num_threads()
    try:
        assert cpu.main(tmp_path, rounds=4, seconds=0.0) == 0
    finally:
        torch.set_num_threads(threads)
    assert len(rows_of(tmp_path / "cpu.csv")) == 2 * 2 * 3
    said = capsys.readouterr()
    assert said.out.count("within 2 %: ") == 2 and "not measured, Triton is not installed" in said.err


def test_a_cuda_sample_lies_between_its_events(monkeypatch):
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("record")

        def synchronize(self):
            log.append("wait")

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
    assert log == ["idle", "record", "call", "call", "record", "wait"]
    log.clear()
    assert meter.on_device_alone(timed, host_us=10.0) == pytest.approx(300)
    assert log == ["idle", 40000, "record", "call", "record", "wait"]


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
    for cases in (CPU_CASES, GPU_CASES, MEMCHECK_CASES):
        assert len({case.name for case in cases}) == len(cases)
    assert {case.dtype for case in GPU_CASES} == {"fp32", "fp16", "bf16"}


def test_packed_lengths_fall_from_the_longest():
    case = Case(128, 32, 8, 8, packed=True)
    assert case.lengths[0] == 128 and list(case.lengths) == sorted(case.lengths, reverse=True)
    assert case.batch_sizes[0] == 32 and sum(case.batch_sizes) == sum(case.lengths)
