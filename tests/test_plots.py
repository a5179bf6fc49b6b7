"""The figures: drawn from what they say, readable, and none from data of another kind."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
from matplotlib.patches import Rectangle

from benchmarks import compiled, results
from benchmarks.cases import Case
from plots import __main__ as command
from plots import compiled as compiled_figures
from plots import measured

HERE = {
    "schema": results.SCHEMA, "date": "2026-01-01T00:00:00+00:00", "device": "NVIDIA H200", "driver": "580.1",
    "torch": "2.13.0", "triton": "3.7.1", "cudnn": "91002", "tritongru": "0.0", "commit": "0123456789", "dirty": "no",
}  # fmt: skip
SPEED = {"nn.GRU": 1.0, "step": 0.8, "step-recompute": 0.9, "sequence": 0.4, "default": 0.5}


def row(T: int, B: int, H: int, provider: str, pass_: str = "inference", dtype: str = "bf16", **cells: object):
    us, factor = T * (2 + H / 500) * SPEED[provider], SPEED[provider]
    found = results.Row(
        Case(T, B, H, H, dtype), provider, pass_, products="tf32" if dtype == "fp32" else "", l2="warm", p50_us=us,
        p20_us=0.9 * us, p80_us=1.2 * us, ratio=factor, device_us=us, peak_mib=90 * factor,
        saved_mib=0 if "recompute" in provider else 40, errors=dict.fromkeys(results.ERRORS, 1e-3 * factor),
    )  # fmt: skip
    return {name: str(value) for name, value in {**HERE, **found.cells(), **cells}.items()}


@pytest.fixture(scope="module")
def facts() -> command.Facts:
    """Of the committed rows, in which a CPU's are no figure's."""
    found = command.Facts.read(results.RESULTS)
    assert set(found.gpus) == {"nvidia-h200"}
    return found


@pytest.mark.parametrize("name", command.ENTRIES)
def test_every_figure_is_drawn_and_says_where_its_numbers_come_from(name: str, facts: command.Facts) -> None:
    source, _ = command.ENTRIES[name]
    ((file, figure),) = command.draw(name, facts)
    assert file == name + "-nvidia-h200" * (source == command.DAY)
    header = " ".join(text.get_text().replace("\n", " ") for text in figure.texts)
    kinds = {command.SIZES: "Counted from sizes; no GPU", command.COMPILED: "Compiled with Triton"}
    kinds[command.STUDY] = kinds[command.COMPILED]
    kinds[command.STORY] = "5 seeds; bands: mean ± standard deviation over them; torch "
    assert kinds.get(source, "Measured on NVIDIA H200, driver") in header


def in_cells(axes) -> tuple[dict, set]:
    """The words of a heat map by place, and the corners of its hatched boxes."""
    boxes = [patch for patch in axes.patches if isinstance(patch, Rectangle) and patch.get_hatch() == "////"]
    return {t.get_position(): t.get_text() for t in axes.texts}, {(box.get_x(), box.get_y()) for box in boxes}


def test_losing_and_missing_cells_show() -> None:
    """One of each: faster, slower, wrong (not drawn), not measured; a map of what was not measured is not drawn."""
    rows = [row(128, B, H, "nn.GRU", p50_us="100", device_us="") for B in (1, 64) for H in (64, 512)]
    for B, H, us in ((1, 64, "50"), (1, 512, "125"), (64, 64, "50")):
        rows.append(row(128, B, H, "default", p50_us=us, device_us=""))
    rows.append(row(128, 64, 512, "default", status="wrong", p50_us=""))
    figure = measured.draw_speedup(rows)
    words = {(0, 0): "2.0", (1, 0): "0.80", (0, 1): "2.0", (1, 1): "–"}
    assert in_cells(figure.axes[0]) == (words, {(0.5, -0.5)})
    assert "0.8 to 2 times as fast as nn.GRU" in figure.texts[0].get_text()
    few = [row(128, B, H, name) for B, H in ((1, 64), (8, 128), (64, 512)) for name in ("nn.GRU", "default")]
    assert measured.draw_speedup(few) is None


def test_of_the_grid_the_fastest_kernel_both_ways() -> None:
    """As it is called, and in a CUDA graph; where every kernel is slower in one of them cuDNN runs."""
    rows = [row(128, B, H, "nn.GRU", device_us="100") for B in (1, 32) for H in (64, 512)]
    rows += [row(128, B, H, "sequence", device_us="125" if B == 1 else "25") for B in (1, 32) for H in (64, 512)]
    rows += [row(128, 1, 64, "step", device_us="50")]  # slower as it is called
    words = {(0, 0): "1.3\n2.0", (1, 0): "cuDNN", (0, 1): "2.5\n4.0", (1, 1): "2.5\n4.0"}
    assert in_cells(measured.draw_speedup(rows).axes[0]) == (words, set())


def test_times_are_per_step_and_only_of_rows_that_are_right() -> None:
    rows = [row(100, 8, H, p) for H in (64, 256) for p in ("nn.GRU", "default")]
    rows += [row(100, 8, 512, "default", status="wrong", p50_us="", us_per_step="")]
    lines = {line.get_label(): line.get_xydata().tolist() for line in measured.draw_step_time(rows).axes[0].lines}
    for name, factor in (("nn.GRU", 1.0), ("tritongru (default)", 0.5)):
        assert lines[name] == [pytest.approx([H, (2 + H / 500) * factor]) for H in (64, 256)]


def test_what_cannot_be_drawn_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No rows, rows of another schema; and what can is a file."""
    arguments = ["--results", str(tmp_path), "--out", str(tmp_path / "out")]
    assert command.main([*arguments, "--only", "accuracy"]) == 1
    assert "`python -m benchmarks day` on a CUDA machine" in capsys.readouterr().out
    (tmp_path / "gru.csv").write_text(f"{','.join(results.COLUMNS)}\n1{',' * (len(results.COLUMNS) - 1)}\n")
    assert command.main(arguments) == 2 and "another schema" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert command.main(["--out", str(tmp_path), "--only", "study"]) == 0 and (tmp_path / "study.png").exists()


# benchmarks/compiled.py

KEY = ("device", "backend", "kind", "dtype", "B", "H")
SAMPLE = (
    "h200-step-forward-bf16-B32-H1024", "a100-sequence-backward-bf16-B32-H256", "mi300x-step-backward-fp32-B32-H64"
)  # fmt: skip


def committed() -> list[dict[str, str]]:
    return results.read(results.RESULTS / compiled.FILE, compiled.COLUMNS)


def forms_of(*names: str) -> list[compiled.Form]:
    return [form for form in compiled.forms(*compiled.DEVICES) if not names or str(form) in names]


def test_what_the_figure_of_instructions_says_holds() -> None:
    """Neither products nor memory accesses: that is all but these three groups."""
    loops = [row for row in committed() if row["device"] == "h200" and row["backend"] == "sequence"]
    groups = ("matrix products", "shared memory", "global memory")
    named = [name for group in groups for name in compiled_figures.MIX[group][0]]
    assert loops
    for row in loops:
        assert sum(int(row[name]) for name in named) < 0.5 * int(row["loop_instructions"]), row["H"]


def test_compiled_rows_are_those_of_the_plans() -> None:
    """Another tile, size or device: generate benchmarks/results/compiled.csv again."""
    found = {tuple(row[name] for name in KEY): row["form"] for row in committed()}
    assert found == {
        (f.device, f.backend, f.kind, f.problem.dtype, str(f.problem.batch), str(f.problem.hidden_size)): f.words
        for f in forms_of()
    }


@pytest.mark.compiled
@pytest.mark.parametrize("form", [
    form if str(form) in SAMPLE else pytest.param(form, marks=pytest.mark.long)
    for form in forms_of()
], ids=str)  # fmt: skip
def test_a_compiled_row_is_what_the_code_compiles_to(form: compiled.Form) -> None:
    import triton

    rows = committed()
    if {row["triton"] for row in rows} != {triton.__version__}:
        pytest.skip(f"the rows are of Triton {rows[0]['triton']}, this is {triton.__version__}")
    assert compiled.compiled(form) in rows
