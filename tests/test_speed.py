"""What the documents say of the layer's speed is what the committed rows say."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

import pytest

from benchmarks import speed, table
from benchmarks.cases import Case
from benchmarks.generated import generate, generated
from benchmarks.results import CEILINGS, CEILINGS_COLUMNS, RESULTS, ROWS, Environment, ResultsFile, Row, read
from benchmarks.suites import GRID_T, LONG_T, TUNE_T
from benchmarks.tune import by_class, passes_of
from benchmarks.workloads import BY_CASE
from tritongru.planning import describe
from tritongru.planning.choose import fastest_backend
from tritongru.planning.problem import Recurrence


@pytest.mark.parametrize(("document", "text"), speed.GENERATED, ids=lambda given: getattr(given, "name", ""))
def test_a_document_says_what_the_rows_make(document: Path, text) -> None:
    """`python -m benchmarks speed` writes it again."""
    assert generated(document, "speed") == text()


def test_the_committed_rows_are_of_one_kind_of_gpu_and_software() -> None:
    rows = read(speed.FOLDER / ROWS) + read(speed.FOLDER / CEILINGS, CEILINGS_COLUMNS)
    assert {(row["device"], row["torch"], row["triton"]) for row in rows} == {("NVIDIA H200", "2.11.0+cu130", "3.6.0")}
    assert {row["commit"][:7] for row in rows} <= set(re.findall(r"\b[0-9a-f]{7}\b", speed.ALL.read_text("utf-8")))


def test_figures_in_sentences_are_those_of_the_rows() -> None:
    rows = by_class(row for row in read(speed.FOLDER / ROWS) if row["T"] == str(TUNE_T))

    def us(H: int, B: int, provider: str, pass_: str = "forward") -> float:
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


def test_every_loss_is_named() -> None:
    """By another way than `ratio`: straight from the rows."""
    said = f"\n{speed.losses_text()}".split("\n- ")
    us: dict[tuple[str, str, str], dict[str, float]] = {}
    for row in read(speed.FOLDER / ROWS):
        if (row["T"], row["status"]) == (str(GRID_T), "ok") and row["ratio"]:
            for column, words in (("p50_us", ""), ("device_us", " in a CUDA graph")):
                if row[column]:
                    us.setdefault((row["case"], row["pass"], words), {})[row["provider"]] = float(row[column])
    lost = 0
    for (case, pass_, words), by_provider in us.items():
        if match := re.fullmatch(rf"T{GRID_T}-B(\d+)-I(\d+)-H\2-(\w+)", case):
            name, way = f"{match[3]}, H {match[2]}, B {match[1]}: ", {"inference": "forward"}.get(pass_, "training")
            for backend in by_provider.keys() & set(speed.BACKENDS):
                line = next(line for line in said if line.startswith(f"`{backend}`, {way}{words}: "))
                slower = by_provider[backend] > by_provider["nn.GRU"]
                assert (name in line) == slower, (backend, way, words, name)
                lost += slower
    assert lost > 20


HERE = Environment("2026-01-01", "NVIDIA H200", "1.2", "2.11", "3.6", "9", "0.1", "c0ffee", "no")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """us of T 128 as called and in a graph, MiB of T 512, and two candidates of T 160."""
    with ResultsFile(tmp_path / ROWS, HERE) as file:
        for provider, us, small in (("nn.GRU", 1280.0, 128.0), ("sequence", 256.0, 160.0)):
            for pass_ in ("inference", "forward+backward"):
                file.append(
                    Row(Case(GRID_T, 32, 512, 512, "bf16"), provider, pass_, l2="warm", p50_us=us, device_us=us / 2)
                )
                file.append(Row(Case(GRID_T, 8, 64, 64), provider, pass_, l2="warm", p50_us=small))
                file.append(Row(Case(2, 8, 64, 64), provider, pass_, l2="warm", p50_us=small))
            file.append(
                Row(Case(LONG_T, 32, 512, 512, "bf16"), provider, pass_, l2="warm", saved_mib=us, peak_mib=small)
            )
        times = {"nn.GRU": (160, 480), "sequence": (80, 240), "sequence:delay=400": (64, 240)}
        for provider, of_passes in times.items():
            for pass_, us in zip(("forward", "forward+backward"), of_passes, strict=True):
                case = Case(TUNE_T, 64, 512, 512, "bf16")
                file.append(Row(case, provider, pass_, p50_us=us, p20_us=us - 1, p80_us=us + 1))
    return tmp_path


def test_a_ratio_is_ours_over_theirs_in_each_way(folder: Path) -> None:
    large, small = speed.shapes(folder)
    assert large.ratio("forward", "sequence") == large.ratio("training_graph", "sequence") == 0.2
    assert small.ratio("training", "sequence") == 1.25 and small.ratio("training_graph", "sequence") is None
    assert large.ratio("forward", "step") is None
    assert speed.cell(small, "training", "sequence") == "1.25 / 1.00 = **1.25**"
    said = "\n".join(speed.losses([large, small]))
    assert "training: median ratio 0.72; slower in 1 of 2 shapes (fp32, H 64, B 8: 1.25)" in said
    assert "| T 2, fp32 | `sequence` | **1.25** |  | **1.25** |  |" in speed.losses_text(folder)


def test_times_are_of_the_grid_memory_of_long_calls_tiles_of_their_sweep(folder: Path) -> None:
    (line,) = speed.text(folder).splitlines()[2:]
    called, alone = "2.00 / 10.0 = 0.20", "1.00 / 5.00 = 0.20"
    assert line.endswith(f"| `sequence` | {called} | {alone} | {called} | {alone} | 256 / 1280 | **160 / 128** |")
    assert speed.kernel_text(folder).splitlines()[2:] == [
        "| bf16, H 512, B 64 | 1 | 0.5 | 0.4 (delay=400) | 2 | 1 |  |"
    ]


def test_the_command_writes_between_its_marks_alone(tmp_path: Path) -> None:
    document = tmp_path / "README.md"
    marks = "<!-- begin: python -m benchmarks speed -->\n{}<!-- end: python -m benchmarks speed -->\nafter\n"
    document.write_text("before\n" + marks.format("old\n"), encoding="utf-8")
    generate(document, "speed", "new")
    assert document.read_text(encoding="utf-8") == "before\n" + marks.format("new\n")
    assert generated(document, "speed") == "new"


H100 = RESULTS / "nvidia-h100-80gb-hbm3"


def test_an_h100_takes_an_h200_s_table() -> None:
    """What the table chooses was never slower than nn.GRU on an H100 than its README says, as it is called or in a CUDA
    graph, beyond what calls vary by."""
    us: dict[tuple[Recurrence, int, bool, bool], dict[str, tuple[float, float]]] = defaultdict(dict)
    for row in read(H100 / ROWS):
        kind, backend = table.PASSES.get(row["pass"]), table.BACKENDS.get(row["provider"])
        of_grid = row["case"] not in BY_CASE and row["T"] in ("1", table.SHORT, table.GRID)
        if of_grid and kind and backend and row["p50_us"]:
            of = Recurrence(int(row["B"]), int(row["H"]), 1, row["dtype"], "tf32", describe("h100"))
            times = float(row["p50_us"]), float(row["device_us"] or "nan")
            us[of, int(row["T"]), kind == "training", row["cell"] == "yes"][backend] = times
    slower = set()
    for (of, T, training, cell), times in us.items():
        backend = fastest_backend(of, T, training, cell=cell).backend
        for way, ours, theirs, most in zip(
            ("called", "graph"), times[backend], times["aten"], (1.05, 1.1), strict=True
        ):
            if ours / theirs > most:
                slower.add(f"{of.dtype}, H {of.hidden_size}, B {of.batch}, T {T} ({way}: {ours / theirs:.2f})")
    said = " ".join((H100 / "README.md").read_text(encoding="utf-8").split())
    assert set(re.findall(r"\w+, H \d+, B \d+, T \d+ \(\w+: [\d.]+\)", said)) == slower
    assert f"Of {len(us)} calls" in said
