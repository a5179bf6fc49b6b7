"""What the layer takes when nobody asks: by the times that one H200 measured."""

from __future__ import annotations

import csv
import itertools
import logging
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.utils.rnn import pack_sequence

import tritongru
from benchmarks import speed, table
from tritongru import call, functional, module, registry
from tritongru import layer as operators
from tritongru.demo.training import Sizes
from tritongru.planning import Device, Problem, choose, describe, measured
from tritongru.planning.choose import fastest_backend
from tritongru.planning.measured import TABLES, Cell, Choice, Timed, nearest, nearest_device

H200 = describe("h200")


def chosen(
    H: int, B: int, dtype: str, training: bool, T: int = 512, device: Device = H200, precision: str = "tf32",
    aten: bool = True, D: int = 1,
) -> Choice:  # fmt: skip
    return fastest_backend(B, T, H, D, dtype, precision, training, device, aten)


@pytest.mark.parametrize("name", table.MEASURED)
def test_the_table_is_what_the_results_say(name: str) -> None:
    """`python -m benchmarks table` writes it."""
    assert (TABLES / f"{name}.csv").read_text(encoding="utf-8") == table.table(table.MEASURED[name])


def test_every_table_has_its_results_and_is_shipped() -> None:
    assert (
        '"tritongru.planning" = ["tables/*.csv", "tiles/*.csv"]'
        in (Path(__file__).parents[1] / "pyproject.toml").read_text()
    )
    assert sorted(path.stem for path in TABLES.iterdir()) == sorted(table.MEASURED)


def csv_rows() -> list[dict[str, str]]:
    with (TABLES / "h200.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("T", [1, 2, 16, 512])
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_in_every_cell_what_takes_the_least(training: bool, T: int) -> None:
    """T times us per step plus us per call, by the file itself; nothing that is slower than aten on the device."""
    cells: dict[tuple[str, int, int], list[dict[str, str]]] = {}
    for row in csv_rows():
        if row["pass"] == ("training" if training else "inference") and (row["T"] == "1") == (T == 1):
            cells.setdefault((row["dtype"], int(row["H"]), int(row["B"])), []).append(row)
    assert len(cells) > (1 if T == 1 else 20)
    for (dtype, H, B), rows in cells.items():
        us = {row["backend"]: T * float(row["us_per_step"]) + float(row["us_per_call"]) for row in rows}
        alone = {row["backend"]: float(row["device_us_per_step"] or "nan") for row in rows}
        able = [backend for backend in us if not alone[backend] > alone["aten"]]
        if dtype != "fp32" or H > 192:  # there exactness decides
            assert chosen(H, B, dtype or "bf16", training, T).backend == min(able, key=lambda name: us[name])


DECISIONS = [  # H, B, dtype, pass, backend
    (64, 32, "fp32", "training", "aten"),  # cuDNN's persistent kernel
    (128, 16, "fp16", "inference", "aten"),  # and in float16
    (1536, 32, "fp32", "training", "aten"),
    (2816, 32, "bf16", "inference", "aten"),
    (2816, 32, "bf16", "training", "aten"),
    (2048, 64, "bf16", "inference", "step"),
    (2048, 64, "bf16", "training", "step"),
    (2048, 16, "bf16", "inference", "sequence"),
    (512, 32, "bf16", "training", "sequence"),
    (256, 64, "bf16", "inference", "sequence"),
    (1024, 1, "fp16", "training", "sequence"),
]


@pytest.mark.parametrize(("H", "B", "dtype", "kind", "backend"), DECISIONS)
def test_a_decision_and_its_figures(H: int, B: int, dtype: str, kind: str, backend: str) -> None:
    found = chosen(H, B, dtype, kind == "training")
    assert found.backend == backend and {"aten", backend} <= {timed.backend for timed in found.candidates}
    assert list(found.candidates) == sorted(found.candidates, key=lambda timed: timed.call_us(512))
    printed = str(choose(Problem(B, 512, H, H, dtype=dtype, training=kind == "training"), H200))
    for timed in found.candidates:
        assert (
            f"candidate {timed.backend:<9} {timed.call_us(512):.0f} us a layer: {timed.us_per_step:.3g} us" in printed
        )


def test_no_row_of_a_form_that_is_gone() -> None:
    """`sequence` was timed in another form: what stands for its kernels now is the study's, and says so."""
    rows = [row for row in csv_rows() if row["backend"] == "sequence"]
    assert len(rows) > 25 and {row["source"] for row in rows} == {"study in bf16: prototypes.csv"}
    assert {row["dtype"] for row in rows} == {"bf16", "fp16"}
    assert "study in bf16: prototypes.csv" in str(choose(Problem(32, 512, 512, 512, dtype="bf16"), H200))
    assert "where sequence was not timed" in chosen(512, 32, "fp32", True).reason
    assert all(row["source"].endswith("(as first built)") == (row["backend"] == "step") for row in csv_rows())


def test_the_study_in_the_rest_of_a_call() -> None:
    """H 512, B 32, by hand: its kernels, what else a training call launched, and saving the gates."""
    kernels = speed.kernel_times()["bf16", 512, 32]["sequence"]
    rest = sum(float(row["total_us"]) for row in kernels if not row["kernel"].startswith("sequence_")) / 512
    at = {"pass": "training", "dtype": "bf16", "H": "512", "B": "32", "backend": "sequence"}
    (row,) = [row for row in csv_rows() if at.items() <= row.items()]
    assert float(row["us_per_step"]) == pytest.approx(1.595 + 2.236 + 0.2 + rest, abs=2e-3)
    assert float(row["us_per_call"]) == pytest.approx(1991.25, abs=0.1)  # the median of 1780.3, 2182.8, 2263.9, 1799.5


def test_the_nearest_cell_in_octaves() -> None:
    for H, B, at in ((600, 80, "H 512, B 64"), (512, 4096, "H 512, B 64"), (768, 32, "H 1024, B 32")):
        assert f"at bf16, training, {at}" in chosen(H, B, "bf16", True).reason
    timed = (Timed("aten", 1, 1, None, ""), Timed("step", 1, 1, None, ""))
    small, large = cells = [Cell("training", "bf16", H, B, 0) for H, B in ((64, 64), (128, 128))]
    of_cells = {**dict.fromkeys(cells, timed), Cell("training", "bf16", 90, 90, 0): timed[:1]}
    for H, B, cell in ((90, 90, small), (91, 91, large), (64, 300, large)):
        assert nearest(of_cells, "training", "bf16", B, 9, H, ("aten", "step")) == (cell, timed)  # one time is no cell
    for kind, T in (("inference", 9), ("training", 1)):
        assert nearest(of_cells, kind, "bf16", 64, T, 64, ("aten", "step")) is None


def test_in_a_graph_no_kernel_that_is_slower_there() -> None:
    """H 1024, B 16 where sequence does not fit: step is the faster call and the slower graph."""
    l4 = describe("l4")
    found = chosen(1024, 16, "bf16", False, device=l4)
    step, aten = found.candidates
    assert (step.backend, aten.backend) == ("step", "aten")
    assert step.device_us_per_step == 7.351 > aten.device_us_per_step == 6.965
    assert found.backend == "aten" and "step, which takes longer than aten in a CUDA graph" in found.reason
    assert chosen(1024, 16, "bf16", True, device=l4).backend == "step"  # no figure speaks against it


@pytest.mark.parametrize("H", [128, 256])
def test_what_a_short_call_costs(H: int) -> None:
    """host.csv: T 1 is step's in inference and nn.GRU's in training, as T 2 to 8 are; T 128 is sequence's."""
    B = {128: 16, 256: 32}[H]
    assert [chosen(H, B, "bf16", False, T=T).backend for T in (1, 128)] == ["step", "sequence"]
    assert [chosen(H, B, "bf16", True, T=T).backend for T in (1, 2, 8, 128)] == ["aten", "aten", "aten", "sequence"]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_the_choice_changes_once_with_time(dtype: str, training: bool) -> None:
    for H, B in ((256, 32), (512, 32), (1024, 32), (2048, 64), (2816, 32)):
        found = [chosen(H, B, dtype, training, T=T).backend for T in range(2, 600)]
        assert sum(a != b for a, b in itertools.pairwise(found)) <= 1, (H, B)


def test_the_reasons_of_a_shape_are_few() -> None:
    """Each is logged once: they must not tell every T and B apart."""
    reasons = {chosen(512, B, "bf16", True, T=T).reason for B in range(1, 1025, 3) for T in range(2, 100)}
    assert len(reasons) < 20


def test_float32_is_never_less_exact_than_nn_gru() -> None:
    """Up to H 192 cuDNN computes with FMA where TF32 is allowed, and the kernels would not."""
    for H in (1, 64, 128, 129, 160, 192):
        for T in (1, 2, 16, 512):
            for training in (False, True):
                for precision in ("tf32", "ieee"):
                    assert chosen(H, 32, "fp32", training, T=T, precision=precision).backend == "aten"
    assert "without TF32, more exactly than the kernels" in chosen(192, 64, "fp32", True).reason
    found = chosen(512, 32, "fp32", True, precision="ieee")
    assert found.backend == "aten" and "not measured" in found.reason


def test_where_pytorch_s_path_is_no_candidate_the_best_kernel_runs() -> None:
    """By the one-line rules where fewer than two of them were timed."""
    assert chosen(128, 32, "fp32", True, aten=False).backend == "sequence"
    assert chosen(512, 64, "bf16", True, aten=False).backend == "sequence"
    found = chosen(2816, 32, "bf16", True, aten=False)
    assert found.backend == "step" and "one fused launch per timestep, not measured: H 2816 is above" in found.reason
    found = chosen(512, 32, "bf16", True, T=1, aten=False)
    assert found.backend == "step" and "one launch" in found.reason


def test_a_device_that_nobody_measured_has_the_nearest_one_s_rows() -> None:
    for name in ("a100", "h100", "l4", "rtx4090", "b200", "rtx5090"):
        found = chosen(512, 32, "bf16", True, device=describe(name))
        assert found.backend == "sequence" and f"on NVIDIA H200, nearest to {describe(name).name}, at" in found.reason
    real = replace(H200, name="NVIDIA H200")
    assert "measured on NVIDIA H200 at" in chosen(512, 32, "bf16", True, device=real).reason
    part = replace(H200, name="NVIDIA H200 MIG 1g.18gb", sms=16)
    assert "nearest to NVIDIA H200 MIG" in chosen(64, 16, "bf16", True, device=part).reason


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """An empty folder in place of the package's tables."""
    caches = (nearest_device, measured.table, measured.fastest, fastest_backend)
    monkeypatch.setattr(measured, "TABLES", tmp_path)
    for cached in caches:
        cached.cache_clear()
    yield tmp_path
    for cached in caches:
        cached.cache_clear()


def test_the_nearest_table_is_that_of_the_nearest_capability(tables: Path) -> None:
    for name in ("a100", "h200", "rtx5090"):
        shutil.copy(Path(measured.__file__).with_name("tables") / "h200.csv", tables / f"{name}.csv")
    found = {name: nearest_device(describe(name)) for name in ("l4", "h100", "b200", "a100", "rtx5090")}
    assert found == {"l4": "h200", "h100": "h200", "b200": "h200", "a100": "a100", "rtx5090": "rtx5090"}


def test_without_a_table_rules_of_one_line(tables: Path) -> None:
    for H, T, backend in ((512, 100, "sequence"), (512, 1, "step"), (3000, 100, "step"), (64, 2, "sequence")):
        found = chosen(H, 32, "bf16", True, T=T)
        assert (found.backend, found.candidates) == (backend, ()) and "not measured" in found.reason
    assert "candidate" not in str(choose(Problem(32, 9, 512, 512, dtype="bf16"), replace(H200, sms=131)))


def test_what_the_chip_does_not_hold_falls_to_the_next_best() -> None:
    """H 1024, B 16, training, on an L4: sequence takes the least, and step less than nn.GRU."""
    found = chosen(1024, 16, "bf16", True, device=describe("l4"))
    assert found.backend == "step" and "sequence cannot run: L4 cannot hold W_h of H 1024" in found.reason
    assert chosen(1024, 16, "bf16", True, device=describe("a100")).backend == "sequence"


def test_amd_was_not_measured() -> None:
    for H in (64, 512):
        found = chosen(H, 32, "bf16", True, device=describe("mi300x"))
        assert found.backend == "step" and "not measured" in found.reason


def test_interpreted_kernels_are_not_chosen_by_a_gpu_s_times() -> None:
    device = describe("interpreter")
    assert {chosen(H, 4, "fp32", True, T=T, device=device).backend for H in (5, 64) for T in (2, 9)} == {"sequence"}
    assert chosen(64, 4, "fp32", True, T=1, device=device).backend == "step"


@pytest.mark.parametrize("window", [16, Sizes().window])
@pytest.mark.parametrize("batch", [Sizes().batch, Sizes().check_batch])
def test_the_demo_takes_what_is_fastest(window: int, batch: int) -> None:
    """`step` there trained in 10.7 s where nn.GRU took 2.2 (benchmarks/results/nvidia-h200/README.md)."""
    sizes = Sizes()
    layer = tritongru.GRU(sizes.embedding, sizes.hidden)
    assert tritongru.plan(layer, torch.empty(window, batch, sizes.embedding), "h200").backend == "aten"
    with torch.no_grad():
        assert tritongru.plan(layer, torch.empty(1, 1, sizes.embedding), "h200").backend == "aten"


def test_recompute_keeps_the_output_alone_so_a_kernel_runs() -> None:
    problem = Problem(batch=32, time=100, input_size=64, hidden_size=64, recompute=True)
    assert choose(problem, H200).backend == "sequence"
    assert choose(replace(problem, recompute=False), H200).backend == "aten"
    assert choose(replace(problem, training=False), H200).backend == "aten"  # nothing is kept


@pytest.fixture
def as_on_an_h200(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU tensors are routed as those of an H200 are."""
    monkeypatch.setattr(registry, "device_of", lambda device: H200)
    monkeypatch.setattr(registry.Backend, "why_not", lambda self, device, dtype: None)
    for where in (functional, module):
        monkeypatch.setattr(where, "uses_aten", lambda backend, input: False)


def settled(T: int, H: int, dtype: torch.dtype, **how: Any) -> str:
    x = torch.empty(T, 32, 8, dtype=dtype, requires_grad=True)
    found = call.settle(None, x, T, 32, H, 1, (x,), **how)
    assert isinstance(found, registry.Backend)
    return found.name


@pytest.mark.usefixtures("as_on_an_h200")
def test_a_call_is_routed_as_planned() -> None:
    for H, T, dtype in ((64, 50, torch.float32), (512, 100, torch.bfloat16), (512, 2, torch.bfloat16)):
        layer = tritongru.GRU(8, H, dtype=dtype)
        assert settled(T, H, dtype) == tritongru.plan(layer, torch.empty(T, 32, 8, dtype=dtype), "h200").backend
    assert settled(50, 64, torch.float32) == "aten" and settled(50, 64, torch.float32, recompute=True) == "sequence"
    with torch.no_grad():
        assert settled(50, 64, torch.float32, recompute=True) == "aten"


@pytest.mark.usefixtures("as_on_an_h200")
def test_pytorch_s_path_is_chosen_only_as_it_was_measured() -> None:
    """With cuDNN; and not where it would answer in another dtype than autocast's."""
    assert settled(2, 512, torch.bfloat16) == "aten"
    with torch.backends.cudnn.flags(enabled=False):
        assert settled(2, 512, torch.bfloat16) == "step"
    with torch.autocast("cpu", torch.bfloat16):
        assert settled(2, 512, torch.float32) == "step"
        layer = tritongru.GRU(8, 512)
        assert tritongru.plan(layer, torch.empty(2, 32, 8), "h200").backend == "step"


@pytest.mark.usefixtures("as_on_an_h200")
def test_a_cell_stays_with_its_launch() -> None:
    """nn.GRU was timed at T 1, nn.GRUCell was not."""
    assert settled(1, 512, torch.bfloat16, cell=True) == settled(1, 64, torch.float32, cell=True) == "step"


@pytest.mark.usefixtures("as_on_an_h200")
@pytest.mark.parametrize("H", [64, 2048])
def test_the_operator_of_a_graph_chooses_among_the_layers_backends(H: int) -> None:
    x, h_0 = torch.empty(4, 128, 8, device="meta"), torch.empty(1, 128, H, device="meta")
    weights = [torch.empty(3 * H, n, device="meta") for n in (8, H)]
    assert chosen(H, 128, "fp32", True, T=4).backend == "aten"
    for training in (False, True):
        assert (
            operators._of_operator("", x, h_0, weights, (None, None, None), False, training, False).backend.module
            is not None
        )


@pytest.mark.usefixtures("as_on_an_h200")
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_pytorch_s_path_by_choice_is_nn_gru_and_no_fallback(
    packed: bool, batch_first: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Bit for bit, gradients too, dropout included; logged once as a choice with its figures, not as a warning."""
    registry.log_once.cache_clear()
    caplog.set_level(logging.INFO, logger="tritongru")
    layers = [
        make(6, 10, 2, bidirectional=True, batch_first=batch_first, dropout=0.5)
        for make in (torch.nn.GRU, tritongru.GRU)
    ]
    layers[1].load_state_dict(layers[0].state_dict())
    given: Any = pack_sequence([torch.randn(n, 6) for n in (5, 3, 2)]) if packed else torch.randn(5, 3, 6)
    results = []
    for layer in layers:
        for _ in range(2):
            layer.zero_grad()
            torch.manual_seed(0)
            output, h_n = layer(given)
            (output.data.square().sum() + h_n.sum()).backward()
        results.append((output.data, h_n, *(p.grad for p in layer.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    (record,) = caplog.records
    assert record.levelno == logging.INFO and "take backend 'aten': fastest by what was" in record.getMessage()
    registry.log_once.cache_clear()


@pytest.mark.usefixtures("as_on_an_h200")
def test_pytorch_s_path_by_choice_takes_what_the_kernels_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN refuses an h_0 with strides, and backward of a call that did not train."""
    calls: list[tuple[Any, ...]] = []
    gru = torch.gru
    monkeypatch.setattr(torch, "gru", lambda *args: calls.append(args) or gru(*args))
    layer = tritongru.GRU(6, 10, 2, dropout=0.5).eval()
    x, h_0 = torch.randn(5, 3, 6), torch.zeros(2, 1, 10).expand(2, 3, 10)
    layer(x, h_0)
    with torch.no_grad():
        layer(x, h_0)
    layer.train()(x, h_0)
    assert [(args[1].is_contiguous(), *args[5:7]) for args in calls] == [
        (True, 0.0, True), (True, 0.5, False), (True, 0.5, True)
    ]  # fmt: skip
