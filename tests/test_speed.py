"""What the documents say of the layer's speed is what the committed rows say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks import speed
from benchmarks.cases import Case
from benchmarks.generated import generate, generated
from benchmarks.results import CEILINGS, CEILINGS_COLUMNS, ROWS, Environment, ResultsFile, Row, read
from benchmarks.suites import GRID_T


@pytest.mark.parametrize(("document", "text"), speed.GENERATED, ids=lambda given: getattr(given, "name", ""))
def test_a_document_says_what_the_rows_make(document: Path, text) -> None:
    """`python -m benchmarks speed` writes it again."""
    assert generated(document, "speed") == text()


def test_the_committed_rows_are_of_one_clean_run_on_one_gpu() -> None:
    rows = read(speed.FOLDER / ROWS) + read(speed.FOLDER / CEILINGS, CEILINGS_COLUMNS)
    assert {(row["device"], row["dirty"], row["commit"][:7]) for row in rows} == {("NVIDIA H200", "no", "23040e0")}
    assert {row["name"] for row in speed.rows_of("ceilings.csv", speed.FOLDER)} >= {"graph_us", "l2_read_tb_s"}


def test_every_loss_is_named() -> None:
    """By another way than `ratio`: straight from first_look.csv."""
    said = f"\n{speed.losses_text()}".split("\n- ")
    for backend in speed.BACKENDS:
        for way, words in list(speed.WAYS.items())[:3]:
            line = next(line for line in said if line.startswith(f"`{backend}`, {words}: "))
            for row in speed.rows_of("first_look.csv", speed.FOLDER):
                ours, theirs = row.get(f"{backend}_{way}"), row[f"nn_{way}"]
                if ours and theirs:
                    name = f"{row['dtype']}, H {row['H']}, B {row['B']}: "
                    assert (name in line) == (float(ours) > float(theirs)), (backend, way, name)


def test_figures_in_sentences_are_those_of_the_rows() -> None:
    rows = {(row["case"], row["provider"], row["pass"]): row for row in read(speed.FOLDER / ROWS)}
    step = {
        mark: float(rows[f"T512-B32-I512-H512-bf16{mark}", "step", "inference"]["device_us"]) / speed.T
        for mark in ("", "-packed", "-bidirectional")
    }
    shapes = {shape.key: shape for shape in speed.shapes()}
    graph = {key: shapes[key].us["forward_graph", "step"] for key in (("bf16", 512, 32), ("bf16", 2048, 16))}
    top = {row["name"]: float(row["value"]) for row in speed.rows_of("ceilings.csv", speed.FOLDER)}
    kernels = speed.kernel_times()["bf16", 512, 32]["sequence"]
    small, whole = (
        sum(float(row["total_us"]) for row in kernels if row["kernel"].startswith(head)) for head in ("void", "")
    )
    limits = [1 / float(r["of_limit"]) for r in rows.values() if r["provider"] == "sequence" and r["device_us"]]
    text = (speed.FOLDER / "exchange.txt").read_text(encoding="utf-8")
    us = {what: float(ns) / 1000 for what, ns in re.findall(r"^(.+): ([0-9.]+) ns", text, re.M)}
    flags, cluster = "flags {} programs x 1 groups mode 1", "dsmem cluster {} x 1 block 1024 B"
    said = " ".join(speed.KERNELS.read_text(encoding="utf-8").split())
    for sentence in (
        f"with all launches queued {step['']:.1f}, with a packed batch {step['-packed']:.1f}, with both directions in "
        f"one launch {step['-bidirectional']:.1f} ",
        f"Replayed from a CUDA graph {graph['bf16', 512, 32]:.1f};",
        f"a step in a graph takes {graph['bf16', 2048, 16]:.1f}, where reading W_h from L2 at the measured rate would "
        f"take {2 * 3 * 2048**2 / top['l2_read_tb_s'] / 1e6:.1f} and a launch {top['graph_us']:.1f}:",
        f"{small:.0f} of {whole:.0f} us of a training call's kernels",
        f"take {min(limits):.0f} to {max(limits):.0f} times the limit",
        f"with flags, {us[flags.format(8)]:.2f} us among 8 programs and {us[flags.format(32)]:.2f} among 32;",
        "blocks of 1 KB, " + ", ".join(f"{us[cluster.format(n)]:.2f} among {n}" for n in (2, 4, 8)),
    ):
        assert sentence in said, sentence


FIRST_LOOK = """dtype,H,B,nn_forward,nn_training,nn_forward_graph,sequence_forward,sequence_training
bf16,512,32,20,40,4,5,50
fp32,64,8,10,30,,1,3
"""
KERNELS = """provider,dtype,H,B,kernel,count,total_us
sequence,bf16,512,32,sequence_forward,1,1024
sequence,bf16,512,32,sequence_backward,1,512
nn.GRU,bf16,512,32,product,1024,2048
nn.GRU,bf16,512,32,gates,512,1024
sequence,fp32,64,8,sequence_forward,1,512
nn.GRU,fp32,64,8,gates,512,512
"""
PROTOTYPES = """kernel,dtype,H,B,save_gates,us_per_step
forward,bf16,512,32,0,1.5
forward,bf16,512,32,0,1.25
forward,bf16,512,32,1,0.5
forward tanh.approx,bf16,512,32,0,0.25
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, rows in (("first_look", FIRST_LOOK), ("kernels", KERNELS), ("prototypes", PROTOTYPES)):
        (tmp_path / f"{name}.csv").write_text(rows, encoding="utf-8")
    return tmp_path


def test_a_ratio_is_ours_over_theirs_and_kernels_add_up(folder: Path) -> None:
    large, small = speed.shapes(folder)
    assert (large.ratio("forward", "sequence"), large.ratio("training", "sequence")) == (0.25, 1.25)
    assert large.ratio("forward_graph", "sequence") is None and large.ratio("forward", "step") is None
    assert large.us["kernels", "sequence"] == 3 and large.ratio("kernels", "sequence") == 0.5
    assert speed.cell(large, "training", "sequence") == "50.0 / 40.0 = **1.25**"
    assert speed.cell(large, "forward", "sequence") == "5.00 / 20.0 = 0.25"
    said = "\n".join(speed.losses([large, small]))
    assert "training: median ratio 0.68; slower in 1 of 2 shapes (bf16, H 512, B 32: 1.25)" in said


def test_of_a_grid_both_ratios_are_of_its_rows(folder: Path) -> None:
    """As called and in a CUDA graph, of T 128; the first rows count no longer, but for memory."""
    here = Environment("2026-01-01", "NVIDIA H200", "1.2", "2.11", "3.6", "9", "0.1", "c0ffee", "no")
    with ResultsFile(folder / ROWS, here) as file:
        for provider, us in (("nn.GRU", 1280.0), ("sequence", 256.0)):
            for pass_ in ("inference", "forward+backward"):
                case = Case(GRID_T, 32, 512, 512, "bf16")
                file.append(Row(case, provider, pass_, l2="warm", p50_us=us, device_us=us / 2))
            file.append(Row(Case(speed.T, 32, 512, 512, "bf16"), provider, pass_, l2="warm", p50_us=1.0, saved_mib=us))
    (line,) = speed.text(folder).splitlines()[2:]
    called, alone = "2.00 / 10.0 = 0.20", "1.00 / 5.00 = 0.20"
    assert f"| `sequence` | {called} | {alone} | {called} | {alone} | 256 / 1280 |" in line
    assert "training in a CUDA graph" in speed.text(folder).splitlines()[0]


def test_a_listing_that_lacks_most_of_a_call_is_no_measure_of_it(folder: Path) -> None:
    _, small = speed.shapes(folder)
    assert small.ratio("kernels", "sequence") is None
    text = (
        (folder / "kernels.csv").read_text(encoding="utf-8").replace("fp32,64,8,gates,512", "fp32,64,8,blockPersist,1")
    )
    (folder / "kernels.csv").write_text(text, encoding="utf-8")
    assert speed.shapes(folder)[1].ratio("kernels", "sequence") == 1


def test_the_study_is_its_fastest_form_that_computes_the_same(folder: Path) -> None:
    assert speed.kernel_text(folder).splitlines()[2:] == ["| H 512, B 32 | 2.00 | 1.25 | 1.00 |  |"]


def test_the_command_writes_between_its_marks_alone(folder: Path) -> None:
    document = folder / "README.md"
    marks = "<!-- begin: python -m benchmarks speed -->\n{}<!-- end: python -m benchmarks speed -->\nafter\n"
    document.write_text("before\n" + marks.format("old\n"), encoding="utf-8")
    generate(document, "speed", "new")
    assert document.read_text(encoding="utf-8") == "before\n" + marks.format("new\n")
    assert generated(document, "speed") == "new"
