"""What the layer takes when nobody asks: by the rows that one H200 measured, each decision held against its row."""

from __future__ import annotations

import csv
import itertools
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.utils.rnn import pack_sequence

import tritongru
from benchmarks import table
from tritongru import functional, module, ops, registry
from tritongru.demo.training import Sizes
from tritongru.planning import Device, Problem, choose, describe, measured
from tritongru.planning.choose import fastest_backend
from tritongru.planning.measured import TABLES, Table, Timed, nearest_table

H200 = describe("h200")
ROWS = table.MEASURED["h200"]


def chosen(
    H: int, B: int, dtype: str, training: bool, T: int = 512, device: Device = H200, precision: str = "tf32",
    aten: bool = True, D: int = 1,
) -> tuple[str, str]:  # fmt: skip
    return fastest_backend(B, T, H, D, dtype, precision, training, device, aten)


def first_look(dtype: str, H: int, B: int) -> dict[str, str]:
    with (ROWS / "first_look.csv").open(newline="") as file:
        found = [row for row in csv.DictReader(file) if (row["dtype"], row["H"], row["B"]) == (dtype, str(H), str(B))]
    return found[0]


def host(H: int, T: int) -> dict[str, float]:
    with (ROWS / "host.csv").open(newline="") as file:
        (found,) = [row for row in csv.DictReader(file) if (row["H"], row["T"]) == (str(H), str(T))]
    return {name: float(value) for name, value in found.items()}


@pytest.mark.parametrize("name", table.MEASURED)
def test_the_table_is_what_the_results_say(name: str) -> None:
    """`python -m benchmarks.table` writes it."""
    assert (TABLES / f"{name}.csv").read_text(encoding="utf-8") == table.table(table.MEASURED[name])


def test_every_table_has_its_results_and_is_shipped() -> None:
    assert '"tritongru.planning" = ["tables/*.csv"]' in (Path(__file__).parents[1] / "pyproject.toml").read_text()
    assert sorted(path.stem for path in TABLES.iterdir()) == sorted(table.MEASURED)


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_no_measured_call_takes_a_backend_that_was_not_the_fastest(training: bool) -> None:
    """By the results themselves: the harness's rows, and the first look's for what only that timed."""
    of_look = {"aten": "nn", "sequence": "sequence", "step": "step"}
    suffix, of_pass = ("training", "forward+backward") if training else ("forward", "inference")
    us: dict[tuple[str, int, int], dict[str, float]] = {}
    with (ROWS / "first_look.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            timed = {name: row[f"{theirs}_{suffix}"] for name, theirs in of_look.items()}
            us[row["dtype"], int(row["H"]), int(row["B"])] = {name: float(t) for name, t in timed.items() if t}
    with (ROWS / "gru.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            plain = (row["packed"], row["directions"], row["layers"]) == ("no", "1", "1")
            if plain and row["pass"] == of_pass and row["provider"] != "default":
                provider = "aten" if row["provider"] == "nn.GRU" else row["provider"]
                us.setdefault((row["dtype"], int(row["H"]), int(row["B"])), {})[provider] = float(row["us_per_step"])
    assert len(us) > 35
    for (dtype, H, B), timed in us.items():
        backend, reason = chosen(H, B, dtype, training)
        assert backend == min(timed, key=lambda name: timed[name]), (dtype, H, B, timed)
        assert f"at {dtype}, {'training' if training else 'inference'}, H {H}, B {B}, T 512" in reason


DECISIONS = [  # H, B, dtype, pass, backend: each by the row of these sizes in first_look.csv
    (64, 32, "fp32", "training", "aten"),  # cuDNN's persistent kernel
    (128, 32, "fp32", "inference", "aten"),
    (1536, 32, "fp32", "training", "aten"),
    (2048, 128, "bf16", "inference", "aten"),
    (2048, 128, "bf16", "training", "aten"),
    (2816, 32, "bf16", "inference", "aten"),
    (2816, 32, "bf16", "training", "aten"),
    (2048, 64, "bf16", "inference", "step"),
    (2048, 64, "bf16", "training", "step"),
    (2048, 16, "bf16", "training", "sequence"),
    (1024, 1, "bf16", "inference", "sequence"),
    (128, 1024, "bf16", "training", "sequence"),
    # Trains faster, by the time of a call, and infers slower. No training call was timed in a CUDA graph.
    (512, 512, "bf16", "training", "sequence"),
    (512, 512, "bf16", "inference", "aten"),
]


@pytest.mark.parametrize(("H", "B", "dtype", "kind", "backend"), DECISIONS)
def test_a_decision_and_its_figures(H: int, B: int, dtype: str, kind: str, backend: str) -> None:
    found, reason = chosen(H, B, dtype, kind == "training")
    assert found == backend
    row, suffix = first_look(dtype, H, B), "training" if kind == "training" else "forward"
    assert reason.startswith(f"measured on NVIDIA H200 at {dtype}, {kind}, H {H}, B {B}, T 512: {backend} ")
    for name, theirs in (("aten", "nn"), ("sequence", "sequence"), ("step", "step")):
        if us := row[f"{theirs}_{suffix}"]:
            assert f"{name} {float(us):.3g}" in reason
        if (us := row[f"{theirs}_forward_graph"]) and suffix == "forward":
            assert f"({float(us):.3g} in a CUDA graph)" in reason


def test_float16_of_h_128_by_the_harness_s_row() -> None:
    for training, aten, sequence in ((False, 955.7, 2093.3), (True, 2191.5, 4614.7)):  # p50_us of gru.csv
        found, reason = chosen(128, 16, "fp16", training)
        assert found == "aten" and f"aten {aten / 512:.3g}" in reason and f"sequence {sequence / 512:.3g}" in reason
        assert chosen(64, 16, "fp16", training)[0] == "aten"


def test_float16_from_h_512_on_is_like_bfloat16() -> None:
    """Whose rows of these sizes it has not; at H 128 it is not like it at all."""
    for training in (False, True):
        for H, B in ((2816, 32), (2048, 128), (2048, 16), (1536, 32), (512, 1)):
            found, reason = chosen(H, B, "fp16", training)
            assert (
                found == chosen(H, B, "bf16", training)[0] and f"at bf16, {'training' if training else 'inf'}" in reason
            )
        assert "at fp16" in chosen(512, 32, "fp16", training)[1]
        assert "at fp16" in chosen(192, 32, "fp16", training)[1]


def test_a_cell_in_which_the_choice_is_decided_by_h() -> None:
    """An octave of H counts as two of B: a large batch of H 128 is not taken for one of H 512."""
    assert "at fp16, training, H 128, B 16" in chosen(128, 512, "fp16", True)[1]
    assert "at bf16, training, H 512, B 64" in chosen(600, 80, "bf16", True)[1]


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_no_kernel_is_taken_on_a_hope(dtype: str) -> None:
    """Far beyond what was timed a kernel's advantage is not taken for granted."""
    assert chosen(1024, 128, "bf16", True)[0] == "sequence"
    found, reason = chosen(1024, 256, "bf16", True)
    assert found == "aten" and "taken to grow" in reason
    for H in (1024, 2048, 4096):
        assert chosen(H, 4096, dtype, True)[0] == chosen(H, 4096, dtype, False)[0] == "aten"


def test_in_a_graph_no_kernel_that_is_slower_there() -> None:
    """H 1024, B 16 where sequence does not fit: step is the faster call (10.3 us against 18.4), the slower graph."""
    l4 = describe("l4")
    found, reason = chosen(1024, 16, "bf16", False, device=l4)
    row = first_look("bf16", 1024, 16)
    assert float(row["step_forward_graph"]) > float(row["nn_forward_graph"])
    assert found == "aten" and "slower in a CUDA graph" in reason
    assert chosen(1024, 16, "bf16", True, device=l4)[0] == "step"  # no figure speaks against it


@pytest.mark.parametrize("H", [128, 256])
def test_what_a_short_call_costs(H: int) -> None:
    """host.csv: T 1 is step's in inference and nn.GRU's in training, as T 2 to 8 are; T 128 is sequence's."""
    B = {128: 16, 256: 32}[H]
    one, two, many = host(H, 1), host(H, 2), host(H, 128)
    assert one["ours_f"] < one["nn_f"] and chosen(H, B, "bf16", False, T=1)[0] == "step"
    assert one["ours_fb"] > one["nn_fb"] and chosen(H, B, "bf16", True, T=1)[0] == "aten"
    assert two["seq_fb"] > two["nn_fb"] and chosen(H, B, "bf16", True, T=2)[0] == "aten"
    assert host(H, 8)["seq_fb"] > host(H, 8)["nn_fb"] and chosen(H, B, "bf16", True, T=8)[0] == "aten"
    for training, suffix in ((False, "f"), (True, "fb")):
        assert many[f"seq_{suffix}"] < min(many[f"nn_{suffix}"], many[f"step_{suffix}"])
        assert chosen(H, B, "bf16", training, T=128)[0] == "sequence"
    assert "mostly what any call costs: aten 1045 us" in chosen(H, B, "bf16", True, T=2)[1]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_the_choice_changes_once_with_time(dtype: str, training: bool) -> None:
    for H, B in ((256, 32), (512, 32), (1024, 32), (2048, 64), (2816, 32)):
        found = [chosen(H, B, dtype, training, T=T)[0] for T in range(2, 600)]
        assert sum(a != b for a, b in itertools.pairwise(found)) <= 1, (H, B)


def test_the_reasons_of_a_shape_are_few() -> None:
    """Each is logged once: they must not tell every T and B apart."""
    reasons = {chosen(512, B, "bf16", True, T=T)[1] for B in range(1, 1025, 3) for T in range(2, 100)}
    assert len(reasons) < 20


def test_float32_is_never_less_exact_than_nn_gru() -> None:
    """Up to H 192 cuDNN computes with FMA where TF32 is allowed, and the kernels would not."""
    for H in (1, 64, 128, 129, 160, 192):
        for T in (1, 2, 16, 512):
            for training in (False, True):
                for precision in ("tf32", "ieee"):
                    assert chosen(H, 32, "fp32", training, T=T, precision=precision)[0] == "aten"
    found, reason = chosen(192, 64, "fp32", False)
    assert found == "aten" and "without TF32, more exactly than the kernels" in reason
    assert chosen(193, 64, "fp32", False)[0] == "sequence"
    found, reason = chosen(512, 32, "fp32", True, precision="ieee")
    assert found == "aten" and "not measured" in reason


def test_where_pytorch_s_path_is_no_candidate_the_best_kernel_runs() -> None:
    assert chosen(128, 32, "fp32", True, aten=False)[0] == "sequence"
    assert chosen(2048, 128, "bf16", True, aten=False)[0] == "step"  # of the cell H 2048, B 64, that timed both
    found, reason = chosen(2816, 32, "bf16", True, aten=False)
    assert found == "step" and "one fused launch per timestep: H 2816 is above 2048" in reason
    found, reason = chosen(512, 32, "bf16", True, T=1, aten=False)
    assert found == "step" and "one launch" in reason


def test_a_device_that_nobody_measured_has_the_nearest_one_s_rows() -> None:
    for name in ("a100", "h100", "l4", "rtx4090", "b200", "rtx5090"):
        found, reason = chosen(512, 32, "bf16", True, device=describe(name))
        assert found == "sequence" and f"measured on NVIDIA H200, nearest to {describe(name).name}, at" in reason
    real = replace(H200, name="NVIDIA H200")
    assert chosen(512, 32, "bf16", True, device=real)[1].startswith("measured on NVIDIA H200 at")
    part = replace(H200, name="NVIDIA H200 MIG 1g.18gb", sms=16)
    assert "nearest to NVIDIA H200 MIG" in chosen(64, 16, "bf16", True, device=part)[1]


def test_the_nearest_table_is_that_of_the_nearest_capability(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    for name in ("a100", "h200", "rtx5090"):
        (tmp_path / f"{name}.csv").write_text((TABLES / "h200.csv").read_text())
    monkeypatch.setattr(measured, "TABLES", tmp_path)
    nearest_table.cache_clear()
    measured._read.cache_clear()
    nearest = {name: nearest_table(describe(name)).device.name for name in ("l4", "h100", "b200", "a100", "rtx5090")}
    nearest_table.cache_clear()
    measured._read.cache_clear()
    assert nearest == {"l4": "H200", "h100": "H200", "b200": "H200", "a100": "A100", "rtx5090": "RTX 5090"}


def test_what_the_chip_does_not_hold_falls_to_the_next_best() -> None:
    """H 1024, B 16, training, on an L4: sequence was the fastest on the H200, and step before nn.GRU."""
    row = first_look("bf16", 1024, 16)
    assert float(row["sequence_training"]) < float(row["step_training"]) < float(row["nn_training"])
    found, reason = chosen(1024, 16, "bf16", True, device=describe("l4"))
    assert found == "step" and "sequence cannot run: L4 cannot hold W_h of H 1024" in reason
    assert chosen(1024, 16, "bf16", True, device=describe("a100"))[0] == "sequence"


def test_amd_was_not_measured() -> None:
    for H, backend in ((128, "sequence"), (512, "step")):
        found, reason = chosen(H, 32, "bf16", True, device=describe("mi300x"))
        assert found == backend and "not measured" in reason


@pytest.mark.parametrize("name", ["interpreter"])
def test_interpreted_kernels_are_not_chosen_by_a_gpu_s_times(name: str) -> None:
    device = describe(name)
    assert {chosen(H, 4, "fp32", True, T=T, device=device)[0] for H in (5, 64) for T in (2, 9)} == {"sequence"}
    assert chosen(64, 4, "fp32", True, T=1, device=device)[0] == "step"


def test_a_cell_without_a_graph_is_chosen_by_its_calls() -> None:
    cell = nearest_table(H200).nearest("training", "bf16", 512, 512, ("aten", "sequence"))
    assert cell is not None and cell.timed["aten"] == Timed(pytest.approx(512 * 56.039, abs=0.1), None)
    empty = Table(H200, {"training": ()}, {})
    assert empty.nearest("training", "bf16", 1, 1, ("aten", "step")) is None


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
    found = functional._settle(None, x, T, 32, H, 1, (x,), **how)
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
    assert chosen(H, 128, "fp32", True, T=4)[0] == "aten"
    for training in (False, True):
        assert ops._layer("", x, h_0, None, False, training, False).backend.module is not None


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
    assert record.levelno == logging.INFO and "take backend 'aten': measured on NVIDIA H200" in record.getMessage()
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
