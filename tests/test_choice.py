"""What the layer takes when nobody asks: by the times that one H200 measured."""

import csv
import logging
import shutil
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

import tritongru
from benchmarks import table
from tests.kit.modules import Form, same_bits
from tritongru import call, functional, module, registry
from tritongru import layer as operators
from tritongru.checks import Operands
from tritongru.latest import Latest
from tritongru.planning import Problem, choose, describe, measured
from tritongru.planning.choose import fastest_backend
from tritongru.planning.measured import TABLES, Cell, Timed, nearest, nearest_device
from tritongru.planning.problem import Recurrence

H200 = describe("h200")


def chosen(H, B, dtype, training, T=512, device=H200, precision="tf32", aten=True, cell=False):
    return fastest_backend(Recurrence(B, H, 1, dtype, precision, device), T, training, aten, cell)


def test_every_table_is_what_its_results_say_and_is_shipped():
    """`python -m benchmarks table` writes it."""
    for name, results in table.MEASURED.items():
        assert (TABLES / f"{name}.csv").read_text(encoding="utf-8") == table.table(results)
    shipped = '"tritongru.planning" = ["tables/*.csv", "tiles/*.csv"]'
    assert shipped in (Path(__file__).parents[1] / "pyproject.toml").read_text()
    assert sorted(path.stem for path in TABLES.iterdir()) == sorted(table.MEASURED)


@pytest.mark.parametrize("T", [1, 2, 16, 512])
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_in_every_cell_what_takes_the_least(training, T):
    """T times us per step plus us per call, by the file itself; nothing that is slower than aten on the device."""
    cells = {}
    for row in csv.DictReader((TABLES / "h200.csv").read_text(encoding="utf-8").splitlines()):
        if row["pass"] == ("training" if training else "inference") and row["T"] == ("1" if T == 1 else ""):
            cells.setdefault((row["dtype"], int(row["H"]), int(row["B"])), []).append(row)
    assert len(cells) > (1 if T == 1 else 20)
    for (dtype, H, B), rows in cells.items():
        us = {row["backend"]: T * float(row["us_per_step"]) + float(row["us_per_call"]) for row in rows}
        alone = {
            row["backend"]: T * float(row["device_us_per_step"] or "nan") + float(row["device_us_per_call"] or "nan")
            for row in rows
        }
        most = alone.get("aten", float("inf")) * (1.1 if T == 1 else 1)
        able = [backend for backend in us if not alone[backend] > most]
        if dtype != "fp32" or H > 128:  # there exactness decides
            assert chosen(H, B, dtype, training, T).backend == min(able, key=lambda name: us[name])


L4, HIP, INTERPRETER = (describe(name) for name in ("l4", "mi300x", "interpreter"))
PART = replace(H200, name="NVIDIA H200 MIG 1g.18gb", sms=16)
DECISIONS = [  # H, B, dtype, training, backend, words of the reason; further arguments
    # The nearest cell, in octaves
    (512, 32, "fp32", True, "sequence", "at fp32, training, H 512, B 32", {}),
    (600, 80, "bf16", True, "sequence", "at bf16, training, H 512, B 64", {}),
    (512, 4096, "bf16", True, "step", "at bf16, training, H 512, B 512", {}),
    (900, 32, "fp16", True, "sequence", "at fp16, training, H 1024, B 32", {}),
    (1536, 256, "fp16", True, "aten", "at fp16, training, H 1536, B 256", {}),  # as bf16 was measured
    # A GRUCell and one step
    (512, 32, "bf16", False, "aten", "at bf16, inference, H 512, B 32, a GRUCell", {"T": 1, "cell": True}),
    (512, 32, "fp32", False, "aten", "by the switch of matrix products", {"T": 1, "cell": True}),
    (512, 32, "bf16", False, "step", "at bf16, inference, H 512, B 32, T 1", {"T": 1}),
    (512, 32, "bf16", True, "aten", "but for step, which takes longer than aten in a CUDA graph", {"T": 1}),
    # Of few steps what a pass does once counts on the device too
    (512, 32, "bf16", True, "aten", "but for step, which takes longer than aten in a CUDA graph", {"T": 2}),
    (512, 32, "bf16", True, "sequence", "but for step", {"T": 4}),
    # A device that nobody measured has the nearest one's rows
    *(
        (512, 32, "bf16", True, "sequence", f"on NVIDIA H200, nearest to {device.name}, at", {"device": device})
        for device in map(describe, ("a100", "h100", "l4", "rtx4090", "b200", "rtx5090"))
    ),
    (512, 32, "bf16", True, "sequence", "measured on NVIDIA H200 at", {"device": replace(H200, name="NVIDIA H200")}),
    (64, 16, "bf16", True, "sequence", "nearest to NVIDIA H200 MIG", {"device": PART}),
    # What the chip does not hold falls to the next best; in a graph no kernel that is slower there
    (1024, 16, "bf16", True, "step", "sequence cannot run: L4 cannot hold W_h of H 1024", {"device": L4}),
    (1024, 16, "bf16", True, "sequence", "", {"device": describe("a100")}),
    (1536, 16, "bf16", False, "aten", "step, which takes longer than aten in a CUDA graph", {"device": L4}),
    # Float32 up to H 128, where cuDNN's recurrence is FMA: PyTorch's path or one program, which is FMA too
    *(
        (H, B, "fp32", training, backend, "", {"T": T, "precision": precision})
        for H, B, T, training, backend in (
            (64, 512, 512, True, "sequence"), (128, 256, 512, True, "sequence"), (1, 32, 1, False, "aten"),
            (64, 32, 2, True, "aten"), (128, 32, 9, False, "aten"),
        )
        for precision in ("tf32", "ieee")
    ),
    (64, 32, "fp32", False, "aten", "more exactly than step", {"T": 1}),
    (192, 64, "fp32", True, "sequence", "", {}),
    (512, 32, "fp32", True, "aten", "not measured", {"precision": "ieee"}),
    # Where PyTorch's path is no candidate the best kernel, by the rules of one line where fewer than two were timed
    (128, 32, "fp32", True, "sequence", "", {"aten": False}),
    (512, 64, "bf16", True, "sequence", "", {"aten": False}),
    (2816, 32, "bf16", True, "step", "one fused launch per timestep, not measured: H 2816 is above", {"aten": False}),
    (512, 32, "bf16", True, "step", "one launch", {"T": 1, "aten": False}),
    # AMD was not measured, and interpreted kernels are not chosen by a GPU's times
    *((H, 32, "bf16", True, "step", "not measured", {"device": HIP}) for H in (64, 512)),
    *((H, 4, "fp32", True, "sequence", "", {"T": T, "device": INTERPRETER}) for H in (5, 64) for T in (2, 9)),
    (64, 4, "fp32", True, "step", "", {"T": 1, "device": INTERPRETER}),
]  # fmt: skip


@pytest.mark.parametrize(("H", "B", "dtype", "training", "backend", "words", "how"), DECISIONS)
def test_a_decision(H, B, dtype, training, backend, words, how):
    found = chosen(H, B, dtype, training, **how)
    assert found.backend == backend and words in found.reason
    T = how.get("T", 512)
    assert list(found.candidates) == sorted(found.candidates, key=lambda timed: timed.call_us(T))


def test_the_figures_of_a_decision_are_printed():
    found = chosen(512, 32, "bf16", True)
    assert {"aten", "sequence"} <= {timed.backend for timed in found.candidates}
    printed = str(choose(Problem(32, 512, 512, 512, dtype="bf16"), H200))
    for timed in found.candidates:
        figures = f"{timed.call_us(512):.0f} us a layer: {timed.us_per_step:.3g} us"
        assert f"candidate {timed.backend:<9} {figures}" in printed


def test_the_nearest_cell_in_octaves():
    timed = (Timed("aten", 1, 1, None, None, ""), Timed("step", 1, 1, None, None, ""))
    small, large = cells = [Cell("training", "bf16", H, B, "") for H, B in ((64, 64), (128, 128))]
    of_cells = {**dict.fromkeys(cells, timed), Cell("training", "bf16", 90, 90, ""): timed[:1]}
    for H, B, kind, T, expected in (
        (90, 90, "training", "", (small, timed)),  # one time is no cell
        (91, 91, "training", "", (large, timed)),
        (64, 300, "training", "", (large, timed)),
        (64, 64, "inference", "", None),
        (64, 64, "training", "1", None),
    ):
        shape = Recurrence(B, H, 1, "bf16", "tf32", H200)
        assert nearest(of_cells, kind, shape, T, ("aten", "step")) == expected


def test_the_reasons_of_a_shape_are_few():
    """Each is logged once: they must not tell every T and B apart."""
    reasons = {chosen(512, B, "bf16", True, T=T).reason for B in range(1, 1025, 3) for T in range(2, 100)}
    assert len(reasons) < 20


@pytest.fixture
def tables(monkeypatch, tmp_path):
    def forget():
        measured.table.cache_clear()
        fastest_backend.cache_clear()

    monkeypatch.setattr(measured, "TABLES", tmp_path)
    forget()
    yield tmp_path
    forget()


def test_the_nearest_table_is_that_of_the_nearest_capability(tables):
    for name in ("a100", "h100", "h200", "rtx5090"):
        shutil.copy(Path(measured.__file__).with_name("tables") / "h200.csv", tables / f"{name}.csv")
    names = ("a100", "h100", "h200", "rtx5090")
    assert {name: nearest_device(describe(name)) for name in names} == dict(zip(names, names, strict=True))
    (tables / "h100.csv").unlink()
    found = {name: nearest_device(describe(name)) for name in ("l4", "h100", "b200")}
    assert found == {"l4": "h200", "h100": "h200", "b200": "h200"}


def test_without_a_table_rules_of_one_line(tables):
    for H, T, backend in ((512, 100, "sequence"), (512, 1, "step"), (3000, 100, "step"), (64, 2, "sequence")):
        found = chosen(H, 32, "bf16", True, T=T)
        assert (found.backend, found.candidates) == (backend, ()) and "not measured" in found.reason
    assert "candidate" not in str(choose(Problem(32, 9, 512, 512, dtype="bf16"), replace(H200, sms=131)))


FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16


@pytest.fixture
def as_on_an_h200(monkeypatch):
    """CPU tensors are routed as those of an H200 are."""
    monkeypatch.setattr(registry, "device_of", lambda device: H200)
    monkeypatch.setattr(registry.Backend, "why_not", lambda self, device, dtype: None)
    for where in (functional, module):
        monkeypatch.setattr(where, "way", lambda backend, input: registry.asked_for(backend))


without_cudnn, autocast = partial(torch.backends.cudnn.flags, enabled=False), partial(torch.autocast, "cpu", BF16)
RECOMPUTE, CELL = {"recompute": True}, {"cell": True}
SETTLED = [  # T, H, dtype, further arguments, around the call, backend
    (50, 64, FP32, {}, nullcontext, "aten"),
    (50, 64, FP32, RECOMPUTE, nullcontext, "sequence"),
    (50, 64, FP32, RECOMPUTE, torch.no_grad, "aten"),
    (100, 512, BF16, {}, nullcontext, "sequence"),
    (2, 512, FP16, {}, nullcontext, "aten"),
    # PyTorch's own path only as it was measured: with cuDNN, and not where it would answer in another dtype
    (2, 512, FP16, {}, without_cudnn, "step"),
    (2, 512, FP32, {}, autocast, "step"),
    (1, 512, BF16, CELL, nullcontext, "aten"),
    (1, 64, FP32, CELL, nullcontext, "aten"),
]


@pytest.mark.usefixtures("as_on_an_h200")
@pytest.mark.parametrize(("T", "H", "dtype", "how", "around", "backend"), SETTLED)
def test_a_call_is_routed_as_planned(T, H, dtype, how, around, backend):
    x = torch.empty(T, 32, 8, dtype=dtype, requires_grad=True)
    with around():
        found = call.settle(None, x, T, 32, H, 1, (x,), **how)
        assert isinstance(found, registry.Backend) and found.name == backend
        if how is not CELL and around is not without_cudnn:
            layer = tritongru.GRU(8, H, dtype=dtype, **how)
            assert tritongru.plan(layer, x.detach(), "h200").backend == backend


@pytest.mark.usefixtures("as_on_an_h200")
def test_a_cell_by_choice_is_nn_gru_cell_and_is_known_from_then_on():
    ours = tritongru.GRUCell(5, 64)
    theirs = torch.nn.GRUCell(5, 64)
    theirs.load_state_dict(ours.state_dict())
    x, h = torch.randn(3, 5), torch.randn(3, 64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(call, "DEVICES", ("cpu",))
        patch.setattr(call, "_known", Latest(9))
        assert torch.equal(ours(x, h), theirs(x, h))
        patch.setattr(functional, "settle", lambda *of, **how: pytest.fail("asked again"))
        assert torch.equal(ours(x, h), theirs(x, h))


@pytest.mark.usefixtures("as_on_an_h200")
@pytest.mark.parametrize("H", [64, 2048])
def test_the_operator_of_a_graph_chooses_among_the_layers_backends(H):
    x, h_0 = torch.empty(4, 128, 8, device="meta"), torch.empty(1, 128, H, device="meta")
    weights = [torch.empty(3 * H, n, device="meta") for n in (8, H)]
    assert chosen(H, 128, "fp32", True, T=4).backend == "aten"
    for training in (False, True):
        layer = operators._of_operator(Operands(x, h_0, weights, None, "", False, training, False, None, None))
        assert layer.backend.module is not None


@pytest.mark.usefixtures("as_on_an_h200")
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_pytorch_s_path_by_choice_is_nn_gru_and_no_fallback(packed, batch_first, caplog):
    registry.log_once.cache_clear()
    caplog.set_level(logging.INFO, logger="tritongru")
    options = {"num_layers": 2, "bidirectional": True, "batch_first": batch_first, "dropout": 0.5}
    form, results = Form(options, lengths=(5, 3, 2) if packed else ()), []
    for layer in form.pair(None):
        for _ in range(2):
            torch.manual_seed(0)
            results.append(form.results(layer))
    assert all(same_bits(each, results[0]) for each in results)
    (record,) = caplog.records
    assert record.levelno == logging.INFO and "take backend 'aten': fastest by what was" in record.getMessage()
    registry.log_once.cache_clear()


@pytest.mark.usefixtures("as_on_an_h200")
def test_pytorch_s_path_by_choice_takes_what_the_kernels_take(monkeypatch):
    """cuDNN refuses an h_0 with strides, and backward of a call that did not train."""
    given = []
    gru = torch.gru
    monkeypatch.setattr(torch, "gru", lambda *args: given.append(args) or gru(*args))
    layer = tritongru.GRU(6, 10, 2, dropout=0.5).eval()
    x, h_0 = torch.randn(5, 3, 6), torch.zeros(2, 1, 10).expand(2, 3, 10)
    layer(x, h_0)
    with torch.no_grad():
        layer(x, h_0)
    layer.train()(x, h_0)
    flags = [(args[1].is_contiguous(), *args[5:7]) for args in given]
    assert flags == [(True, 0.0, True), (True, 0.5, False), (True, 0.5, True)]
