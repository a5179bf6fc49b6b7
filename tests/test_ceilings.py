"""The micro-benchmarks of the card: what their kernels compute, what they compile to, and what becomes of a figure."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.kit.ceilings import TOP

pytest.importorskip("triton")


from benchmarks import ceilings as micro
from benchmarks.ceilings import UNITS, Card, measure, of_card
from benchmarks.results import CEILINGS as FILE
from benchmarks.results import CEILINGS_COLUMNS as COLUMNS
from benchmarks.results import Environment, ResultsFile, read
from tritongru.launch.runtime import Specimen
from tritongru.planning import describe
from tritongru.tools.compile_report import compile_report, loop_opcodes

HERE = Environment("2026-01-01", "a device", "1.2", "2.11", "3.6", "9", "0.1", "c0ffee", "no")
H200 = describe("h200")


# what the kernels compute


@pytest.fixture
def repaired() -> None:
    """The interpreter counts a `range` over an argument only with repairs."""
    from tritongru.tools.interpreter import repair

    repair()


@pytest.mark.interpreted
@pytest.mark.usefixtures("repaired")
@pytest.mark.parametrize(("programs", "chunks", "repeats"), [(1, 3, 2), (3, 6, 4), (4, 4, 1)])
def test_every_chunk_is_read_in_every_round(programs: int, chunks: int, repeats: int) -> None:
    x = torch.arange(chunks * 32, dtype=torch.int32)
    sums = torch.zeros(programs, dtype=torch.int32)
    micro.read_repeatedly[(programs,)](x, sums, repeats, chunks, BLOCK=32)
    assert sums.sum() == repeats * x.sum()


@pytest.mark.interpreted
@pytest.mark.usefixtures("repaired")
def test_a_chain_leads_through_every_line_once() -> None:
    card = Card(H200, 0)
    card.where = torch.device("cpu")
    links, lines, last = card._chain(128 * 40)
    seen, at = [], 0
    for _ in range(lines):
        seen.append(at)
        at = int(links[at])
    assert at == 0 and seen[-1] == last and sorted(seen) == list(range(0, 40 * 32, 32))
    end = torch.zeros(1, dtype=torch.int32)
    micro.chase[(1,)](links, end, lines - 1)
    assert end.item() == last


@pytest.mark.interpreted
@pytest.mark.usefixtures("repaired")
def test_products_add_up() -> None:
    a, b = torch.randint(-2, 3, (16, 16)).half(), torch.randint(-2, 3, (16, 16)).half()
    c = torch.zeros(2, 16, 16)
    micro.multiply_repeatedly[(2,)](a, b, c, 3, M=16, N=16, K=16)
    assert torch.equal(c, (3 * micro.PER_ROUND.value * (a.float() @ b.float())).expand(2, -1, -1))


@pytest.mark.interpreted
def test_a_small_kernel_counts_itself() -> None:
    x = torch.zeros(64, dtype=torch.int32)
    for _ in range(3):
        micro.increment[(2,)](x, BLOCK=32)
    assert (x == 3).all()


# what they compile to: the loop does what is timed, and hardly anything else

SPECIMENS = {
    "read": lambda: Specimen(
        micro.read_repeatedly, {"x_ptr": "*i32", "sums_ptr": "*i32", "repeats": "i32", "chunks": "i32"},
        {"BLOCK": micro.READ_BLOCK}, micro.READ_WARPS, 1,
    ),
    "chase": lambda: Specimen(micro.chase, {"next_ptr": "*i32", "end_ptr": "*i32", "steps": "i32"}, {}, 1, 3),
    "multiply": lambda: Specimen(
        micro.multiply_repeatedly, {"a_ptr": "*fp16", "b_ptr": "*fp16", "c_ptr": "*fp32", "repeats": "i32"},
        dict(zip("MNK", micro.MMA_TILE, strict=True)), 4, 3,
    ),
    "shared": lambda: Specimen(micro.read_shared, {"counts_ptr": "*i32", "repeats": "i32"}, {"THREADS": 1024}, 32, 3),
    "clock": lambda: Specimen(micro.clock, {"next_ptr": "*i32", "out_ptr": "*i64", "steps": "i32"}, {}, 1, 3),
}  # fmt: skip


@pytest.mark.compiled
@pytest.mark.parametrize("device", [
    "h200", *(pytest.param(name, marks=pytest.mark.long) for name in ("a100", "b200", "rtx4090", "rtx5090"))
])  # fmt: skip
def test_the_loops_do_what_is_timed(device: str) -> None:
    reports = {name: compile_report(make(), describe(device)) for name, make in SPECIMENS.items()}
    assert all(report.spill_bytes == 0 for report in reports.values())
    inner = {name: loop_opcodes(report)[-1] for name, report in reports.items()}
    assert inner["read"]["LDG.E.128.STRONG.GPU"] == 4 and not any("LDS" in name for name in inner["read"])
    for name in ("chase", "clock"):
        assert inner[name]["LDG.E.STRONG.GPU"] == 1 and inner[name].total() <= 8
    matrix = sum(n for name, n in inner["multiply"].items() if name.startswith("HMMA"))
    assert matrix == 16 * micro.PER_ROUND.value and inner["multiply"].total() <= 1.1 * matrix
    assert inner["shared"]["LDS.128"] == 4 and inner["shared"].total() <= 16
    text = reports["clock"].sass
    assert text.count("SR_CLOCKLO") >= 2 and text.count("SR_GLOBALTIMERLO") >= 2


# what becomes of a figure


class Fake:
    """An H200's figures, unless given."""

    device = H200

    def __init__(self, **given: object):
        self.given = given

    def __getattr__(self, name: str):
        def figure(*needs: float) -> float:
            found = self.given.get(name, getattr(TOP, name))
            if isinstance(found, Exception):
                raise found
            return found

        return figure


def measured(tmp_path: Path, card: Fake):
    with ResultsFile(tmp_path / FILE, HERE, COLUMNS) as results:
        found = measure(card, results)
    return found, {row["name"]: row for row in read(tmp_path / FILE, COLUMNS)}


def test_the_figures_are_those_of_ceilings() -> None:
    assert set(UNITS) == {field.name for field in dataclasses.fields(TOP)}
    assert all(hasattr(Card, name) for name in UNITS if name != "sms")


def test_what_is_measured_is_kept_and_takes_effect(tmp_path) -> None:
    found, rows = measured(tmp_path, Fake())
    assert found.dram_tb_s == TOP.dram_tb_s and found.sms == 132
    assert (
        float(rows["dram_tb_s"]["value"]) == pytest.approx(found.dram_tb_s) and rows["dram_tb_s"]["note"] == "measured"
    )
    assert rows["dram_tb_s"]["unit"] == "TB/s" and rows["sms"]["note"] == "reported by the driver"


@pytest.mark.parametrize("value", [-5.0, 0.0, float("inf"), float("nan")])
def test_what_no_card_can_have_is_not_believed(tmp_path, value) -> None:
    found, rows = measured(tmp_path, Fake(l2_read_tb_s=value))
    assert found is None and rows["l2_read_tb_s"]["value"] == "" and "no figure" in rows["l2_read_tb_s"]["note"]
    assert rows["dram_tb_s"]["value"]


def test_inline_ptx_does_not_reach_amd_s_compiler(tmp_path, monkeypatch) -> None:
    """LLVM would end the process."""

    class Kernel:
        def __getitem__(self, grid):
            pytest.fail("reached the compiler")

    monkeypatch.setattr(micro, "clock", Kernel())
    monkeypatch.setattr(micro, "read_shared", Kernel())
    card = Card(describe("mi300x"), 0)
    for figure in (card.clock_ghz, lambda: card.shared_bytes_per_clock(2.1)):
        with pytest.raises(RuntimeError, match="inline PTX"):
            figure()


def test_matmul_s_switch_is_put_back(monkeypatch) -> None:
    card = Card(H200, 0)
    card.where = torch.device("cpu")
    seen = []
    card.seconds = lambda call: seen.append(torch.backends.cuda.matmul.fp32_precision) or 2e-3
    before = torch.backends.cuda.matmul.fp32_precision
    for precision in ("tf32", "ieee", None):
        rate = card._matmul_tflops(torch.float32, 64, precision)
        assert rate == pytest.approx(2 * 64**3 / 2e-3 / 1e12)
    assert seen == ["tf32", "ieee", before] and torch.backends.cuda.matmul.fp32_precision == before


@pytest.mark.parametrize(
    ("figure", "kernel", "needs", "work"),
    [
        # per round: all warps of a program four times 16 bytes a thread
        ("shared_bytes_per_clock", "read_shared", (2.0,), 1024 * 4 * 16 / 2e9),
        # per round: PER_ROUND products of each program
        ("mma_share", "multiply_repeatedly", (100.0,), 16 * 4 * 132 * 2 * 16 * 128 * 64 / 1e12 / 100.0),
    ],
    ids=["shared", "mma"],
)
def test_a_figure_is_work_over_time(monkeypatch, figure, kernel, needs, work) -> None:
    card = Card(H200, 0)
    state = timed(card, seconds_of_a_round=1e-6)

    class Kernel:
        def __getitem__(self, grid):
            def launch(*args, **options):
                result = args[0] if figure.startswith("shared") else args[2]
                state.rounds = args[-1]
                result.fill_(args[-1] * (4 if figure.startswith("shared") else 16 * 64))

            return launch

    monkeypatch.setattr(micro, kernel, Kernel())
    assert getattr(card, figure)(*needs) == pytest.approx(work / 1e-6)


def test_a_round_trip_is_the_chain_s_time_over_its_loads(monkeypatch) -> None:
    card = Card(dataclasses.replace(H200, l2_bytes=128 * 1000), 0)
    timed(card, 0.0, launch=599 * 200e-9)

    class Kernel:
        def __getitem__(self, grid):
            def launch(links, end, steps, **options):
                at = 0
                for _ in range(steps):
                    at = int(links[at])
                end.fill_(at)

            return launch

    monkeypatch.setattr(micro, "chase", Kernel())
    assert card.l2_round_trip_ns() == pytest.approx(200)


@pytest.mark.parametrize(
    "error", [micro.WrongResultError("the product"), RuntimeError("PTX")], ids=["wrong", "failing"]
)
def test_what_cannot_be_measured_says_so_and_the_rest_is(tmp_path, error) -> None:
    found, rows = measured(tmp_path, Fake(half_tflops=error))
    assert found is None and rows["half_tflops"]["value"] == "" and rows["tf32_tflops"]["value"] == "448"
    assert rows["half_tflops"]["note"].startswith("not measured: ") and str(error) in rows["half_tflops"]["note"]


def test_a_lost_device_is_not_taken_for_a_missing_figure(tmp_path) -> None:
    with pytest.raises(torch.AcceleratorError):
        measured(tmp_path, Fake(dram_tb_s=torch.AcceleratorError("gone")))


def test_figures_are_taken_again_from_the_same_commit_only(tmp_path, monkeypatch) -> None:
    made = []
    monkeypatch.setattr(micro, "of_cuda", lambda index: H200)
    monkeypatch.setattr(micro, "Card", lambda device, index: made.append(index) or Fake())
    first = of_card(0, tmp_path, HERE, reuse=True)
    later = dataclasses.replace(HERE, date="2027-01-01")
    again = of_card(0, tmp_path, later, reuse=True)
    assert made == [0] and again.sms == first.sms and again.dram_tb_s == pytest.approx(first.dram_tb_s)
    of_card(0, tmp_path, dataclasses.replace(later, commit="f00d"), reuse=True)
    of_card(0, tmp_path, later)
    assert made == [0, 0, 0]


def test_a_figure_that_was_not_measured_is_tried_again(tmp_path, monkeypatch) -> None:
    made = []
    monkeypatch.setattr(micro, "of_cuda", lambda index: H200)
    monkeypatch.setattr(micro, "Card", lambda device, index: made.append(index) or Fake(dram_tb_s=RuntimeError("busy")))
    for _ in range(2):
        of_card(0, tmp_path, HERE, reuse=True)
    assert made == [0, 0]


def timed(card: Card, seconds_of_a_round: float, launch: float = 1e-5):
    """A card on the CPU whose kernels are not run: times and results as if they had been."""
    card.where = torch.device("cpu")
    state = SimpleNamespace(rounds=0)

    def seconds(call, *arguments):
        call(*arguments)
        return launch + state.rounds * seconds_of_a_round

    card.seconds = seconds
    return state


def test_a_rate_is_without_the_launch(monkeypatch) -> None:
    card = Card(H200, 0)
    state = timed(card, seconds_of_a_round=1e-6)

    class Kernel:
        def __getitem__(self, grid):
            def launch(x, sums, rounds, chunks, BLOCK, **options):
                state.rounds = rounds
                sums.fill_(rounds * chunks // grid[0] * BLOCK)

            return launch

    monkeypatch.setattr(micro, "read_repeatedly", Kernel())
    size = 4 * micro.READ_BLOCK * 8
    assert card._read(size, 5, programs=4) == pytest.approx(size / 1e-6)
    wrong = Kernel()
    wrong.__class__ = type("Lazy", (Kernel,), {"__getitem__": lambda self, grid: lambda *args, **kwargs: None})
    monkeypatch.setattr(micro, "read_repeatedly", wrong)
    with pytest.raises(micro.WrongResultError, match="the sum of what was read"):
        card._read(size, 5, programs=4)


@pytest.mark.gpu
def test_the_card_is_measured(tmp_path) -> None:
    """Every figure, with a result that was right, and none beyond what is plausible."""
    index = torch.cuda.current_device()
    found = of_card(index, tmp_path, HERE)
    notes = {row["name"]: row["note"] for row in read(tmp_path / FILE, COLUMNS)}
    assert found is not None and not any("not measured" in note for note in notes.values()), notes
    assert 0 < found.mma_share <= 1.05 and found.shared_bytes_per_clock <= 1.05 * 128
    assert found.dram_tb_s < found.l2_read_tb_s and found.graph_us <= 1.5 * found.stream_us
