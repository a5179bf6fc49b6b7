"""The figures: drawn from what they say, readable, and none from data of another kind."""

from dataclasses import asdict

import pytest

pytest.importorskip("matplotlib")
from matplotlib.patches import Rectangle

from benchmarks import compiled, results
from benchmarks.cases import Case
from plots import __main__ as command
from plots import compiled as compiled_figures
from plots import measured

HERE = results.Environment("2026-01-01", "NVIDIA H200", "580.1", "2.13", "3.7", "9", "0.0", "c0ffee", "no")


def row(B, H, provider, us="", in_a_graph="", **cells):
    """Of T 100, as it is read."""
    found = results.Row(Case(100, B, H, H, "bf16"), provider, "inference", l2="warm").cells()
    times = {**dict.fromkeys(("p20_us", "p50_us", "p80_us"), us), "us_per_step": us / 100 if us else ""}
    return {name: str(v) for name, v in {**asdict(HERE), **found, **times, "device_us": in_a_graph, **cells}.items()}


@pytest.fixture(scope="module")
def facts():
    """Of the committed rows, in which a CPU's are no figure's."""
    found = command.Facts.read(results.RESULTS)
    assert set(found.gpus) == {"nvidia-h200"}
    return found


@pytest.mark.parametrize("name", command.ENTRIES)
def test_every_figure_is_drawn_and_says_where_its_numbers_come_from(name, facts):
    source, _ = command.ENTRIES[name]
    ((file, figure),) = command.draw(name, facts)
    assert file == name + "-nvidia-h200" * (source == command.DAY)
    header = " ".join(text.get_text().replace("\n", " ") for text in figure.texts)
    kinds = {command.SIZES: "Counted from sizes; no GPU", command.COMPILED: "Compiled with Triton"}
    kinds[command.STUDY] = kinds[command.COMPILED]
    kinds[command.STORY] = "5 seeds; bands: mean ± standard deviation over them; torch "
    assert kinds.get(source, "Measured on NVIDIA H200, driver") in header


def in_cells(axes):
    """The words of a heat map by place, and the corners of its hatched boxes."""
    boxes = [patch for patch in axes.patches if isinstance(patch, Rectangle) and patch.get_hatch() == "////"]
    return {t.get_position(): t.get_text() for t in axes.texts}, {(box.get_x(), box.get_y()) for box in boxes}


def test_losing_and_missing_cells_show():
    """One of each: faster, slower, wrong (not drawn), not measured; a map of what was not measured is not drawn."""
    rows = [row(B, H, "nn.GRU", 100) for B in (1, 64) for H in (64, 512)]
    rows += [row(1, 64, "default", 50), row(1, 512, "default", 125), row(64, 64, "default", 50)]
    figure = measured.draw_speedup([*rows, row(64, 512, "default", status="wrong")])
    words = {(0, 0): "2.0", (1, 0): "0.80", (0, 1): "2.0", (1, 1): "–"}
    assert in_cells(figure.axes[0]) == (words, {(0.5, -0.5)})
    assert "0.8 to 2 times as fast as nn.GRU" in figure.texts[0].get_text()
    few = [row(B, H, name, 100) for B, H in ((1, 64), (8, 128), (64, 512)) for name in ("nn.GRU", "default")]
    assert measured.draw_speedup(few) is None


def test_of_the_grid_the_fastest_kernel_both_ways():
    """As it is called, and in a CUDA graph; where every kernel is slower in one of them cuDNN runs."""
    rows = [row(B, H, "nn.GRU", 250, 100) for B in (1, 32) for H in (64, 512)]
    rows += [row(B, H, "sequence", 100, 125 if B == 1 else 25) for B in (1, 32) for H in (64, 512)]
    rows += [row(1, 64, "step", 200, 50)]  # slower as it is called
    words = {(0, 0): "1.2\n2.0", (1, 0): "cuDNN", (0, 1): "2.5\n4.0", (1, 1): "2.5\n4.0"}
    assert in_cells(measured.draw_speedup(rows).axes[0]) == (words, set())


def test_times_are_per_step_and_only_of_rows_that_are_right():
    both = (("nn.GRU", 3), ("default", 2))
    rows = [row(8, H, name, us * H, ratio=us / 3) for H in (64, 256) for name, us in both]
    figure = measured.draw_step_time([*rows, row(8, 512, "default", status="wrong")])
    lines = {line.get_label(): line.get_xydata().tolist() for line in figure.axes[0].lines}
    for name, us in (("nn.GRU", 3), ("tritongru (default)", 2)):
        assert lines[name] == [pytest.approx([H, us * H / 100]) for H in (64, 256)]
    assert "faster in all 2 cases, 1.5 to 1.5 times its speed" in figure.texts[0].get_text()


def test_what_cannot_be_drawn_says_why(tmp_path, capsys):
    arguments = ["--results", str(tmp_path), "--out", str(tmp_path / "out")]
    assert command.main([*arguments, "--only", "accuracy"]) == 1
    assert "`python -m benchmarks day` on a CUDA machine" in capsys.readouterr().out
    (tmp_path / "gru.csv").write_text(f"{','.join(results.COLUMNS)}\n1{',' * (len(results.COLUMNS) - 1)}\n")
    assert command.main(arguments) == 2 and "another schema" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert command.main(["--out", str(tmp_path), "--only", "study"]) == 0 and (tmp_path / "study.png").exists()


SAMPLE = "h200-step-forward-bf16-B32-H1024 a100-sequence-backward-bf16-B32-H256 mi300x-step-backward-fp32-B32-H64"
FORMS = list(compiled.forms(*compiled.DEVICES))


def committed():
    return results.read(results.RESULTS / compiled.FILE, compiled.COLUMNS)


def test_what_the_figure_of_instructions_says_holds():
    """Neither products nor memory accesses: that is all but these three groups."""
    loops = [row for row in committed() if row["device"] == "h200" and row["backend"] == "sequence"]
    groups = ("matrix products", "shared memory", "global memory")
    named = [name for group in groups for name in compiled_figures.MIX[group][0]]
    assert loops
    for row in loops:
        assert sum(int(row[name]) for name in named) < 0.5 * int(row["loop_instructions"]), row["H"]


def test_compiled_rows_are_those_of_the_plans():
    """Another tile, size or device: generate benchmarks/results/compiled.csv again."""
    columns = ("device", "backend", "kind", "dtype", "B", "H", "form")
    found = {tuple(row[name] for name in columns) for row in committed()}
    sizes = [(f.problem.dtype, str(f.problem.batch), str(f.problem.hidden_size), f.words) for f in FORMS]
    assert found == {(f.device, f.backend, f.kind, *size) for f, size in zip(FORMS, sizes, strict=True)}


IN_FULL = [pytest.param(f, marks=[pytest.mark.long] * (str(f) not in SAMPLE.split()), id=str(f)) for f in FORMS]


@pytest.mark.compiled
@pytest.mark.parametrize("form", IN_FULL)
def test_a_compiled_row_is_what_the_code_compiles_to(form):
    import triton

    rows = committed()
    if {row["triton"] for row in rows} != {triton.__version__}:
        pytest.skip(f"the rows are of Triton {rows[0]['triton']}, this is {triton.__version__}")
    assert compiled.compiled(form) in rows
