"""A day on a GPU, and what is made of its rows: tiles, the layer's table, the summary, figures in the documents."""

import csv
import dataclasses
import re
import sys
import time
from collections import defaultdict
from functools import cache
from statistics import median

import pytest

from benchmarks import day, speed, summary, table, tune, warm
from benchmarks.__main__ import main
from benchmarks.cases import BASELINE, Case
from benchmarks.generated import generate, generated
from benchmarks.results import CEILINGS, CEILINGS_COLUMNS, KEY, ROWS, Environment, ResultsFile, Row, read, read_rows
from benchmarks.suites import GRID_T, LONG_T, SUITES, TUNE_T
from benchmarks.tune import by_class, passes_of
from benchmarks.workloads import BY_CASE, WORKLOADS
from tests.kit import peaks
from tritongru.planning import describe, sequence, step, tuned
from tritongru.planning.choose import fastest_backend
from tritongru.planning.problem import Recurrence

HERE = Environment("2026-01-01", "NVIDIA H200", "1.2", "2.11", "3.6", "9", "0.1", "c0ffee", "no")
H200 = describe("h200")


@pytest.fixture
def part(monkeypatch):
    """A function that makes a part of commands that run Python code; none: their tool is missing."""
    command = (sys.executable, "-c")
    monkeypatch.setattr(day, "words", lambda code, run: (*command, code.format(out=run.out)) if code else ())
    return lambda name, *codes, minutes=1.0, **options: day.Part(name, minutes, codes, **options)


def told(folder):
    return (folder / "day.txt").read_text().splitlines()


def test_every_part_of_the_day_runs_and_is_accounted_for(part, tmp_path, capsys):
    parts = [
        part("good", "print('fine')", "print('beside')"),
        part("bad", "print('broken'); raise SystemExit(5)"),
        part("killed", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"),
        part("memcheck", ""),
        part("last", "import os; print(os.environ['GIVEN'])", environment={"GIVEN": "here"}),
    ]
    assert day.run(parts, tmp_path, 1.0, HERE) == 1
    lines = told(tmp_path)
    assert [line.split()[0] for line in lines[1:]] == ["good", "bad", "killed", "memcheck", "last"]
    assert "passed" in lines[1] and "FAILED: exit code 5" in lines[2] and "FAILED: killed by SIGKILL" in lines[3]
    assert "not run: its tool" in lines[4] and "passed" in lines[5] and "host " in lines[0]
    assert (tmp_path / "last.log").read_text() == "here\n" and (tmp_path / "good-1.log").read_text() == "beside\n"
    assert "broken" in capsys.readouterr().out
    assert day.run(parts[:1] + parts[3:], tmp_path, 1.0, HERE) == 0  # a missing tool is no failure


def test_a_part_that_hangs_is_stopped_and_what_it_left_is_the_later_ones(part, tmp_path):
    hanging = "import signal, subprocess, sys, time; signal.signal(signal.SIGINT, signal.SIG_IGN); "
    hanging += "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); time.sleep(60)"
    parts = [part("slow", hanging, hanging, minutes=1.0), part("after", "print('ran')", minutes=9.0)]
    start = time.monotonic()
    assert day.run(parts, tmp_path, 0.2, HERE) == 1
    assert time.monotonic() - start < 10
    assert "FAILED: stopped, its time was up" in told(tmp_path)[1] and "passed" in told(tmp_path)[2]
    assert day._ends(parts, 10.0) == [60.0, 600.0]  # a part ends by the sum of its own and the earlier
    assert day.run(parts[1:], tmp_path, 0.0, HERE) == 1 and "FAILED: not run, the budget" in told(tmp_path)[1]


BEGIN = "import pathlib; path = pathlib.Path('{out}/NAME'); text = path.read_text() if path.exists() else ''; "
BEGIN += "path.write_text(text + 'x'); "


def test_a_day_that_is_resumed_leaves_out_what_passed_and_goes_on_with_the_rest(part, tmp_path):
    parts = [
        part("once", BEGIN.replace("NAME", "ran")),
        part("grid", BEGIN.replace("NAME", "short") + "raise SystemExit(0 if text else 4)"),
        part("lost", BEGIN.replace("NAME", "lost") + "raise SystemExit(3 if len(text) < 2 else 0)"),
    ]
    assert day.run(parts, tmp_path, 1.0, HERE) == 1 and "cut short" in told(tmp_path)[2]
    # A suite goes on behind the entry in which the device was lost.
    assert "FAILED: the device was lost 2 time(s)" in told(tmp_path)[3] and (tmp_path / "lost").read_text() == "xxx"
    later = dataclasses.replace(HERE, date="2027-01-01")
    assert day.run(parts, tmp_path, 1.0, later, resume=True) == 0 and "passed" in told(tmp_path)[2]
    assert (tmp_path / "ran").read_text() == "x" and told(tmp_path)[0].startswith(HERE.date)
    assert day.run(parts, tmp_path, 1.0, later) == 0 and (tmp_path / "ran").read_text() == "xx"


def test_the_day_has_all_suites_and_nine_minutes(tmp_path):
    assert sum(part.minutes for part in day.PARTS) == pytest.approx(9)
    suites = [command for p in day.PARTS for command in p.commands if command.split()[0] in ("suite", "checked")]
    assert {command.split()[1] for command in suites} == set(SUITES)
    words = day.words(suites[0], day.Run(tmp_path, 128.0, HERE.date))
    assert words[-4:] == ("--since", HERE.date, "--budget-minutes", "2.00")


@pytest.mark.long
@pytest.mark.interpreted
def test_the_whole_day_is_rehearsed(tmp_path):
    assert main(["day", "--dry-run", "--out", str(tmp_path)]) == 0
    assert [line.split()[1] for line in told(tmp_path)[1:]] == ["passed,"] * len(day.PARTS)
    assert {row["status"] for row in read_rows(tmp_path)} <= {"ok", "unserved"}


def test_kernels_are_compiled_beforehand_for_the_suites(capsys):
    found = list(warm.calls(("grid",), H200))
    assert {case.T for case, _, _ in found} == {1, 2} and len(found) < 2 * len(SUITES["grid"](H200))
    assert warm.main(dry=True) == 0 and "compile the forms of tune" in capsys.readouterr().out


TUNED = Case(TUNE_T, 64, 512, 512, "bf16")
PLANNED = ((100, 101, 102), (300, 302, 304))  # p20, p50, p80 of each pass; backward 201, from 198 to 204


def written(folder, rows, environment=HERE):
    """Rows through their file, as they are read."""
    with ResultsFile(folder / ROWS, environment) as file:
        for row in rows:
            file.append(row)
    return read_rows(folder)


def timed(figures, case=TUNED):
    for provider, of_passes in figures.items():
        for pass_, (p20, p50, p80) in zip(("forward", "forward+backward"), of_passes, strict=True):
            yield Row(case, provider, pass_, p20_us=p20, p50_us=p50, p80_us=p80)


def test_tiles_win_by_more_than_the_calls_vary(tmp_path):
    figures = {
        "sequence": PLANNED,
        "sequence:num_warps=4": ((80, 81, 82), (270, 272, 274)),  # 191, from 188 to 194
        "sequence:delay=100": ((99, 99.5, 101), (299, 301, 303)),
        "sequence:block_h=8": ((70, 90, 100.5), (250, 260, 400)),
    }
    found = list(tune.winners(written(tmp_path / "faster", timed(figures))))
    assert [(row["pass"], row["fields"]) for row in found] == [("forward", "num_warps=4"), ("backward", "num_warps=4")]
    assert found[0]["us_per_step"] == f"{81 / TUNE_T:.4g}" and found[1]["planned_us"] == f"{201 / TUNE_T:.4g}"
    slower = {"sequence": PLANNED, "sequence:num_warps=4": ((98, 100, 101), (290, 301, 310))}
    found = list(tune.winners(written(tmp_path / "slower", timed(slower))))
    assert [(row["fields"], row["us_per_step"] == row["planned_us"]) for row in found] == [("", True)] * 2


@pytest.fixture
def planned(monkeypatch, tmp_path):
    monkeypatch.setattr(tuned, "FOLDER", tmp_path / "tiles")
    tuned.forget()

    def tiles(kind, batch, H, dtype, backend=sequence.sequence_tiles, device=H200):
        tuned.or_winner.cache_clear()
        return backend(kind, Recurrence(batch, H, 1, dtype, "tf32", device))

    yield tiles
    tuned.forget()


def test_planning_reads_what_tuning_writes(planned, tmp_path, monkeypatch):
    shape = (64, 500, "fp16")
    before = planned("forward", *shape)
    wins = {"sequence": PLANNED, "sequence:num_warps=4,delay=400": ((50, 51, 52), (260, 290, 340))}
    written(tmp_path, timed(wins))
    assert "of 2 classes of tiles 1 have" in tune.write(tmp_path)
    found = planned("forward", *shape)
    assert (found.num_warps, found.delay) == (4, 400) != (before.num_warps, before.delay)
    assert planned("backward", *shape).delay != 400  # which did not win
    assert planned("forward", 65, *shape[1:]).delay != 400  # above the largest class that was timed
    assert planned("forward", *shape, device=describe("h100")).delay == 400  # with as many SMs
    assert planned("forward", *shape, device=dataclasses.replace(H200, sms=114)).delay != 400
    with monkeypatch.context() as patch:  # fields that this layer cannot have: the planned tiles
        patch.setattr(tuned, "winner", lambda *of: "block_h=8,num_warps=16,block_k=32")
        assert planned("forward", *shape) == before
    tune.forget("NVIDIA H100 80GB HBM3")  # its candidates are held against planned tiles too
    assert planned("forward", *shape, device=describe("h100")) == before != planned("forward", *shape)
    tune.forget("NVIDIA H200")
    assert planned("forward", *shape) == before


def test_step_takes_the_winner_of_the_next_size(planned, monkeypatch):
    row = {"backend": "step", "pass": "forward", "dtype": "bf16", "H": "1024", "B": "32", "fields": "pdl=0"}
    monkeypatch.setattr(tuned, "_rows", cache(lambda key: (row, {**row, "H": "2048", "fields": "block_h=7"})))

    def pdl(kind, batch, H, dtype="bf16"):
        return planned(kind, batch, H, dtype, step.step_tiles).pdl

    assert not pdl("forward", 20, 700) and not pdl("forward", 32, 1024, "fp16")
    assert pdl("forward", 33, 700)  # above the largest batch that was timed
    assert pdl("forward", 20, 512)  # half of H, where nothing was timed
    assert pdl("backward", 20, 700) and pdl("forward", 20, 700, "fp32")
    assert pdl("forward", 20, 1100)  # fields that no kernel can have: the planned tiles


def test_the_table_of_a_grid(tmp_path):
    """A step as it is called, without what any call costs, and never less than one on the device alone."""
    with ResultsFile(tmp_path / ROWS, HERE) as file:
        for T, us in ((1, 200.0), (2, 300.0), (GRID_T, 2860.0)):
            for provider in (BASELINE, "step", "sequence") if T > 1 else (BASELINE, "step"):
                for pass_ in ("inference", "forward+backward"):
                    called = us if provider != "sequence" else us / 10 + 300
                    file.append(Row(Case(T, 32, 512, 512, "bf16"), provider, pass_, p50_us=called, device_us=128.0 * 5))
    rows = list(csv.DictReader(table.table(tmp_path).splitlines()))
    by_backend = {(r["backend"], r["T"]): r for r in rows if (r["pass"], r["dtype"]) == ("training", "bf16")}
    of_fp16 = [r for r in rows if r["dtype"] == "fp16"]
    assert len(of_fp16) == 6 and {r["source"] for r in of_fp16} == {f"{ROWS}, in bf16"}
    assert len(rows) == 16 and by_backend["aten", "1"]["us_per_call"] == "200.0" and rows[0]["source"] == ROWS
    assert (by_backend["aten", ""]["us_per_step"], by_backend["aten", ""]["us_per_call"]) == ("20.000", "300.0")
    assert by_backend["sequence", ""]["us_per_step"] == by_backend["sequence", ""]["device_us_per_step"] == "5.000"
    assert by_backend["sequence", ""]["device_us_per_call"] == "630.000"  # two steps took 640
    with ResultsFile(tmp_path / ROWS, dataclasses.replace(HERE, commit="later")) as file:  # when the host was slower
        for T, H, us in ((2, 512, 700.0), (GRID_T, 256, 3260.0)):
            file.append(Row(Case(T, 32, H, H, "bf16"), BASELINE, "inference", p50_us=us))
    slower = list(csv.DictReader(table.table(tmp_path).splitlines()))
    called = {r["H"]: (r["us_per_step"], r["us_per_call"]) for r in slower if r["pass"] == "inference" and not r["T"]
              and (r["backend"], r["dtype"]) == ("aten", "bf16")}  # fmt: skip
    assert called == {"512": ("20.000", "300.0"), "256": ("20.000", "700.0")}
    assert main(["table", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "table.csv").read_text() == table.table(tmp_path)


def both(cases, ratio=0.5, graph=0.5, ours="default", status="ok"):
    """Rows of nn.GRU and of ours, which takes `ratio` times as long, in a graph `graph` times."""
    for case in cases:
        for provider in (BASELINE, ours):
            us, in_a_graph = (100.0, 50.0) if provider == BASELINE else (100 * ratio, graph and 50 * graph)
            figures = dict(p50_us=us, p20_us=0.95 * us, p80_us=1.1 * us, device_us=in_a_graph, peak_mib=7.0)
            yield Row(case, provider, "inference", status, "host AMD EPYC, 16 cores", l2="warm", **figures)


TINY = [Case(4, B, 5, 6) for B in (1, 2, 3)]


def test_losses_come_first_with_both_ratios_host_and_device(tmp_path, capsys):
    rows = [*both(TINY[:1], 1.7, 0.8), *both(TINY[1:2], 0.4, None), *both([WORKLOADS[2].case], 0.25, 1.3)]
    written(tmp_path / "a", rows, dataclasses.replace(HERE, device="a device"))
    written(tmp_path / "b", both(TINY[2:], 3.0), dataclasses.replace(HERE, device="another"))
    assert main(["summary", "--out", str(tmp_path)]) == 0
    first, second = capsys.readouterr().out.split("another: ")
    assert "host      AMD EPYC, 16 cores" in first and "a device: 6 rows" in first
    said = first[first.index("losses: slower than nn.GRU as it is called, or in a CUDA graph, in 2 of 3") :]
    losses, workloads = said.split("workloads, the slowest first")
    assert losses.index("1.700") < losses.index("0.250") and "0.800" in losses and "1.300" in losses
    assert TINY[1].name not in losses and "RNNoise" in workloads and "frames of speech (10 ms) a second" in workloads
    assert "median ratio, inference in fp32: 0.400 in 3; in a graph 1.050 in 2" in said and "in 1 of 1" in second


@pytest.mark.parametrize(
    ("ratio", "graph", "lost"),
    [(0.8, 0.9, False), (1.1, 0.9, False), (1.2, 0.9, True), (0.5, 1.1, True), (0.5, None, False)],
)
def test_a_loss_is_more_than_the_calls_vary_or_slower_in_a_graph(ratio, graph, lost, tmp_path):
    """Each lies between 0.95 and 1.1 times its median: up to 1.158 times as long is within that."""
    (pair,) = summary.compared(written(tmp_path, both(TINY[:1], ratio, graph)))
    assert pair.lost == lost


def test_where_the_layer_as_it_comes_was_not_timed_its_fastest_kernel_is_compared(tmp_path):
    rows = written(tmp_path, [*both(TINY[:1], 0.8, ours="step"), *both(TINY[:1], 0.6, ours="sequence")])
    (pair,) = summary.compared(rows)
    assert pair.ours["provider"] == "sequence"
    assert not summary.compared(written(tmp_path, both(TINY[:1], 0.1, ours="sequence:num_warps=4")))  # candidates
    assert not summary.compared(written(tmp_path / "wrong", both(TINY[:1], status="wrong")))


def test_the_latest_row_of_a_measurement_counts(tmp_path):
    for date, us in (("2026-02-01", 1.0), ("2026-03-01", 2.0), ("2026-01-01", 3.0)):
        rows = [Row(TINY[0], "step", "forward", p50_us=us)]
        rows.append(Row(TINY[0], "step", "inference", p50_us=us, l2="cold" if us == 3.0 else "warm"))
        written(tmp_path / date, rows, dataclasses.replace(HERE, date=date))
    rows = read_rows(tmp_path)
    assert len({tuple(row[name] for name in KEY) for row in rows}) == len(rows) == 3
    found = {(row["pass"], row["l2"]): row["p50_us"] for row in rows}
    assert found == {("forward", ""): "2", ("inference", "warm"): "2", ("inference", "cold"): "3"}


@pytest.mark.parametrize(("document", "text"), speed.GENERATED, ids=lambda given: getattr(given, "name", ""))
def test_a_document_says_what_the_rows_make(document, text):
    """`python -m benchmarks speed` writes it again."""
    assert generated(document, "speed") == text()


@pytest.mark.compiled  # in the interpreter an H200's plans would need the scheduler
def test_the_peaks_beside_those_that_were_measured():
    """`python -m tests.kit.peaks` writes them again. None is above nn.GRU's, and what was measured is what was counted
    but for the allocator's rounding (512 bytes a tensor, 2 MiB for a large one) and what a library takes for itself."""
    said = generated(peaks.DOCUMENT, *peaks.MARK)
    assert said == peaks.text()
    for line in said.splitlines()[2:]:
        theirs, step, step_counted, sequence, sequence_counted = map(float, line.strip("| ").split(" | ")[1:])
        assert max(step, sequence) < theirs
        assert max(abs(step - step_counted), abs(sequence - sequence_counted)) <= 2.0


def test_the_committed_rows_are_of_one_kind_of_gpu_and_software():
    rows = read(speed.FOLDER / ROWS) + read(speed.FOLDER / CEILINGS, CEILINGS_COLUMNS)
    assert {(row["device"], row["torch"], row["triton"]) for row in rows} == {("NVIDIA H200", "2.11.0+cu130", "3.6.0")}
    assert {row["commit"][:7] for row in rows} <= set(re.findall(r"\b[0-9a-f]{7}\b", speed.ALL.read_text("utf-8")))


def test_figures_in_sentences_are_those_of_the_rows():
    rows = by_class(row for row in read(speed.FOLDER / ROWS) if row["T"] == str(TUNE_T))

    def us(H, B, provider, pass_="forward"):
        return passes_of(rows["bf16", H, B][provider])[pass_][1] / TUNE_T

    both, alone, late = ("step", "step:pdl=0", "step:ahead=0")
    back = [us(1024, 32, name, "backward") for name in (both, alone, late)]
    said = " ".join(speed.KERNELS.read_text(encoding="utf-8").split())
    for sentence in (
        f"At H 1024, B 32 forward takes {us(1024, 32, both):.1f}; {us(1024, 32, alone):.1f} where no launch overlaps",
        f"the one before; {us(1024, 32, late):.1f} where they overlap but load no weights ahead",
        "Backward {:.1f}, {:.1f} and {:.1f}.".format(*back),
        f"H 1024, B 192 takes {us(1024, 192, both):.1f} forward, {us(1024, 192, alone):.1f} without",
        f"{us(1024, 64, 'sequence:tiles=2,early=1'):.2f} instead of {us(1024, 64, 'sequence'):.2f}",
    ):
        assert sentence in said, sentence


def test_every_loss_is_named_and_every_median_right():
    """By another way than `Shape`: straight from the rows."""
    us, ratios = defaultdict(dict), defaultdict(dict)
    for row in read(speed.FOLDER / ROWS):
        match = re.fullmatch(rf"T{GRID_T}-B(\d+)-I(\d+)-H\2-(\w+)", row["case"])
        way = {"inference": "forward", "forward+backward": "training"}.get(row["pass"])
        for column, words in (("p50_us", ""), ("device_us", " in a CUDA graph")):
            if match and way and row["status"] == "ok" and row[column]:
                shape = f"{match[3]}, H {match[2]}, B {match[1]}"
                us[way + words, shape][row["provider"]] = float(row[column])
    for (way, shape), by_provider in us.items():
        for backend in by_provider.keys() & set(speed.BACKENDS):
            ratios[f"- `{backend}`, {way}: "][shape] = by_provider[backend] / by_provider["nn.GRU"]
    said = [line for line in speed.losses_text().splitlines() if line.startswith("-")]
    assert len(said) == len(ratios) == 8
    for begin, of_shapes in ratios.items():
        (line,) = (line for line in said if line.startswith(begin))
        lost = {f"{shape}: {ratio:.2f}" for shape, ratio in of_shapes.items() if ratio > 1}
        assert f"median ratio {median(of_shapes.values()):.2f}; slower in {len(lost)} of {len(of_shapes)} " in line
        assert set(line.partition("(")[2].rstrip(")").split("; ")) - {""} == lost


def test_times_are_of_the_grid_memory_of_long_calls_tiles_of_their_sweep(tmp_path):
    """us of T 128 as called and in a graph, MiB of T 512, two candidates of T 160; of T 2 nothing in a graph."""
    times = {"nn.GRU": (160, 480), "sequence": (80, 240), "sequence:delay=400": (64, 240)}
    rows = list(timed({name: [(us - 1, us, us + 1) for us in of_passes] for name, of_passes in times.items()}))
    for provider, us, small in (("nn.GRU", 1280.0, 128.0), ("sequence", 256.0, 160.0)):
        for pass_ in ("inference", "forward+backward"):
            what, large = (provider, pass_, "ok", "", "", "warm"), (32, 512, 512, "bf16")
            rows.append(Row(Case(GRID_T, *large), *what, p50_us=us, device_us=us / 2))
            rows.append(Row(Case(2, 8, 64, 64), *what, p50_us=small))
        rows.append(Row(Case(LONG_T, *large), *what, saved_mib=us, peak_mib=small))
    written(tmp_path, rows)
    (line,) = speed.text(tmp_path).splitlines()[2:]
    called, alone = "2.00 / 10.0 = 0.20", "1.00 / 5.00 = 0.20"
    assert line.endswith(f"| `sequence` | {called} | {alone} | {called} | {alone} | 256 / 1280 | **160 / 128** |")
    (line,) = speed.kernel_text(tmp_path).splitlines()[2:]
    assert line == "| bf16, H 512, B 64 | 1 | 0.5 | 0.4 (delay=400) | 2 | 1 |  |"
    assert "| T 2, fp32 | `sequence` | **1.25** |  | **1.25** |  |" in speed.losses_text(tmp_path)


H100 = speed.RESULTS / "nvidia-h100-80gb-hbm3"


def test_an_h100_takes_an_h200_s_table():
    """Its choice was slower than nn.GRU there, beyond run-to-run noise, only where the H100's README says so."""
    us = defaultdict(dict)
    for row in read(H100 / ROWS):
        kind, backend = table.PASSES.get(row["pass"]), table.BACKENDS.get(row["provider"])
        of_grid = row["case"] not in BY_CASE and row["T"] in ("1", table.SHORT, table.GRID)
        of_grid &= kind == "inference" or row["T"] == table.GRID  # `step` has another first launch of backward since
        if of_grid and kind and backend and row["p50_us"]:
            of = Recurrence(int(row["B"]), int(row["H"]), 1, row["dtype"], "tf32", describe("h100"))
            times = float(row["p50_us"]), float(row["device_us"] or "nan")
            us[of, int(row["T"]), kind == "training", row["cell"] == "yes"][backend] = times
    slower = set()
    for (of, T, training, cell), times in us.items():
        ours = times[fastest_backend(of, T, training, cell=cell).backend]
        for way, mine, theirs, most in zip(("called", "graph"), ours, times["aten"], (1.05, 1.1), strict=True):
            if mine / theirs > most:
                slower.add(f"{of.dtype}, H {of.hidden_size}, B {of.batch}, T {T} ({way}: {mine / theirs:.2f})")
    said = " ".join((H100 / "README.md").read_text(encoding="utf-8").split())
    assert set(re.findall(r"\w+, H \d+, B \d+, T \d+ \(\w+: [\d.]+\)", said)) == slower
    assert f"Of {len(us)} calls" in said


def test_the_command_writes_between_its_marks_alone(tmp_path):
    document = tmp_path / "README.md"
    marks = "<!-- begin: python -m benchmarks speed -->\n{}<!-- end: python -m benchmarks speed -->\nafter\n"
    document.write_text("before\n" + marks.format("old\n"), encoding="utf-8")
    generate(document, "speed", "new")
    assert document.read_text(encoding="utf-8") == "before\n" + marks.format("new\n")
    assert generated(document, "speed") == "new"
