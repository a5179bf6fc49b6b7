"""`choose` and `plan`: pure, on described devices, with a reason; and what the public function reads from a module."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch.nn.utils.rnn import pack_sequence

import tritongru
from tritongru.planning import Problem, choose, describe
from tritongru.planning.devices import DEVICES
from tritongru.planning.step import step_tiles

GPUS = [name for name, device in DEVICES.items() if device.vendor != "interpreter"]
PROBLEM = Problem(batch=32, time=100, input_size=512, hidden_size=512, dtype="bf16")


@pytest.mark.parametrize("name", GPUS)
def test_what_is_chosen_and_why(name: str) -> None:
    plan = choose(PROBLEM, describe(name))
    assert plan.backend == {"t4": "aten", "mi300x": "step"}.get(name, "sequence")
    assert plan.reason
    if name == "t4":
        assert "7.5" in plan.reason and "8.0" in plan.reason
    if name == "mi300x":
        assert "not coherent" in plan.reason


@pytest.mark.parametrize(
    ("device", "dtype", "largest"),
    [
        ("h200", "bf16", 2048), ("h100", "fp16", 2048), ("b200", "bf16", 2048), ("h200", "fp32", 1024),
        ("a100", "bf16", 1536), ("rtx4090", "fp16", 1536), ("l4", "bf16", 768), ("mi300x", "bf16", 128),
    ],
)  # fmt: skip
def test_the_largest_layer_kept_on_chip(device: str, dtype: str, largest: int) -> None:
    """And step, with the reason, beyond it."""
    long = replace(PROBLEM, time=5000, batch=16, dtype=dtype)
    assert choose(replace(long, hidden_size=largest), describe(device)).backend == "sequence"
    plan = choose(replace(long, hidden_size=largest + 600), describe(device))
    assert plan.backend == "step" and "one fused launch per timestep: " in plan.reason


def test_host_and_kernel_know_the_same_blocks() -> None:
    """Of the exchange buffer: a block belongs to whole programs."""
    from tritongru.kernels.exchange import units_of_block
    from tritongru.planning import sequence

    assert [sequence._units_of_block(dtype) for dtype in ("fp16", "bf16", "fp32")] == [16, 16, 8]
    assert [units_of_block(width) for width in (16, 32)] == [16, 8]


def test_one_step_is_one_launch_of_step() -> None:
    plan = choose(replace(PROBLEM, time=1), describe("h200"))
    assert plan.backend == "step" and "one launch" in plan.reason


def test_float32_without_tf32_has_no_matrix_instructions() -> None:
    ieee = replace(PROBLEM, dtype="fp32", precision="ieee", time=1000)
    plan = choose(ieee, describe("h200"))
    assert plan.backend == "step" and "no matrix instructions" in plan.reason
    assert choose(replace(ieee, hidden_size=64), describe("h200")).backend == "sequence"


def test_both_directions_in_one_launch_where_both_fit() -> None:
    both = replace(PROBLEM, directions=2, layers=2)
    assert dict(choose(both, describe("h200")).launches.forward)["sequence_forward"] == 2
    large = replace(both, hidden_size=1536, time=10)
    assert dict(choose(large, describe("h200")).launches.forward)["sequence_forward"] == 4
    assert dict(choose(large, describe("h200")).launches.backward)["sequence_backward"] == 4


def test_limit_and_prediction_are_kept_apart() -> None:
    plan = choose(PROBLEM, describe("h200"))
    assert [time.kind for time in plan.times] == ["forward", "backward"]
    for time in plan.times:
        assert time.limit is not None and time.predicted_us is not None
        assert 0 < time.limit.us < time.predicted_us
    printed = str(plan)
    assert "limit" in printed and "an estimate: no GRU timed" in printed


def test_no_kernel_for_float64() -> None:
    plan = choose(replace(PROBLEM, dtype="fp64"), describe("h200"))
    assert plan.backend == "aten" and "fp64" in plan.reason


def test_a_forced_backend_that_cannot_serve_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'step' cannot run here.*fp64.*: aten, reference"):
        choose(replace(PROBLEM, dtype="fp64"), describe("h200"), "step")
    with pytest.raises(ValueError, match=r"'sequence' cannot run here.*H 3000.*: aten, reference, step"):
        choose(replace(PROBLEM, hidden_size=3000), describe("h200"), "sequence")
    with pytest.raises(ValueError, match=r"unknown backend 'cudnn': expected one of aten, reference, step, sequence"):
        choose(PROBLEM, describe("h200"), "cudnn")


@pytest.mark.parametrize("name", GPUS)
@pytest.mark.parametrize("kind", ["forward", "cell", "backward", "backward_first"])
def test_few_forms_of_a_kernel_whatever_the_batch(name: str, kind: str) -> None:
    forms = {step_tiles(kind, batch, 512, 1, "bf16", "tf32", describe(name)) for batch in range(1, 600)}
    assert len(forms) <= 2


@pytest.mark.parametrize("backend", ["step", "sequence"])
def test_tiles_do_not_depend_on_time(backend: str) -> None:
    tiles = {choose(replace(PROBLEM, time=T), describe("h200"), backend).tiles for T in (2, 50, 5000)}
    assert len(tiles) == 1


@pytest.mark.parametrize("field", ["batch", "time", "input_size", "hidden_size", "layers"])
def test_sizes_below_one_are_refused_by_name(field: str) -> None:
    with pytest.raises(ValueError, match=f"{field} must be at least 1, got 0"):
        replace(PROBLEM, **{field: 0})


def test_launches_and_saved_bytes_are_those_of_the_problem() -> None:
    plan = choose(PROBLEM, describe("h200"), "step")
    assert dict(plan.launches.forward)["step_forward"] == 100
    assert plan.cost.saved_bytes == 100 * 32 * 4 * 512 * 2
    assert choose(replace(PROBLEM, recompute=True), describe("h200")).cost.saved_bytes == 0
    assert plan.cost.step_flops == 2 * 32 * 3 * 512 * 512


def test_saved_bytes_are_what_autograd_saves() -> None:
    """The reference saves what `step` saves: gates beyond input, output, h_0 and weights."""
    layer = tritongru.GRU(5, 6, 2, bidirectional=True, backend="reference")
    x, h_0 = torch.randn(7, 3, 5), torch.zeros(4, 3, 6)
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output, _ = layer(x, h_0)
    kept = [x, h_0, output, *layer.parameters()]
    for tensor in kept:
        saved.pop(tensor.untyped_storage().data_ptr(), None)
    problem = Problem(batch=3, time=7, input_size=5, hidden_size=6, layers=2, directions=2)
    assert sum(saved.values()) == choose(problem, describe("h200"), "step").cost.saved_bytes


@pytest.mark.parametrize("batch_first", [False, True])
def test_recompute_saves_no_gates(batch_first: bool) -> None:
    layer = tritongru.GRU(5, 6, backend="reference", recompute=True, batch_first=batch_first)
    x = torch.randn(7, 3, 5)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        output, _ = layer(x)
    kept = {t.untyped_storage().data_ptr() for t in (x, output, *layer.parameters())}
    others = [t for t in saved if t.untyped_storage().data_ptr() not in kept]
    assert [tuple(t.shape) for t in others] == [(1, 7 if batch_first else 3, 6)]  # h_0


def test_a_plan_prints_its_memory() -> None:
    printed = str(choose(PROBLEM, describe("h200"), "step"))
    assert "saved     12.5 MiB for backward" in printed and "nn.GRU keeps cuDNN's reserve" in printed
    assert "peak      12.6 MiB at once in forward, 26.5 MiB in backward, what" in printed
    printed = str(choose(replace(PROBLEM, training=False), describe("h200"), "step"))
    assert "saved" not in printed and "peak      9.5 MiB at once beyond" in printed


def test_plan_of_a_module() -> None:
    layer = tritongru.GRU(20, 64, num_layers=2, bidirectional=True, batch_first=True)
    x = torch.randn(8, 50, 20)
    plan = tritongru.plan(layer, x, "a100")
    assert plan.backend == "sequence"
    expected = dict(
        batch=8, time=50, input_size=20, hidden_size=64, layers=2, directions=2, dtype="fp32", training=True
    )
    assert {name: getattr(plan.problem, name) for name in expected} == expected
    with torch.no_grad():
        assert not tritongru.plan(layer, x, "a100").problem.training
    assert tritongru.plan(layer, x).backend == "aten"  # where the module is: on the CPU
    packed = pack_sequence([torch.randn(n, 20) for n in (5, 3)])
    assert tritongru.plan(layer, packed, "h100").problem.packed
    assert tritongru.plan(torch.nn.GRU(20, 64), torch.randn(4, 20), "l4").problem.batch == 1


def test_plan_refuses_clearly() -> None:
    with pytest.raises(TypeError, match="expected a GRU module or a Problem, got Linear"):
        tritongru.plan(torch.nn.Linear(2, 2), torch.randn(2, 2), "h200")
    with pytest.raises(TypeError, match="needs the input"):
        tritongru.plan(tritongru.GRU(2, 3), device="h200")
    with pytest.raises(TypeError, match="needs a device"):
        tritongru.plan(PROBLEM)
    with pytest.raises(ValueError, match="h200"):
        tritongru.plan(PROBLEM, device="h2000")


def test_planning_imports_neither_torch_nor_triton() -> None:
    """Loaded by its files, since the package itself imports torch."""
    code = (
        "import sys, types, pathlib, tritongru._version as v; root = pathlib.Path(v.__file__).parent\n"
        "[sys.modules.pop(m) for m in list(sys.modules) if m.split('.')[0] in ('torch', 'triton', 'tritongru')]\n"
        "package = types.ModuleType('tritongru'); package.__path__ = [str(root)]; sys.modules['tritongru'] = package\n"
        "import tritongru.planning\n"
        "assert not {'torch', 'triton'} & set(sys.modules), 'imported'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def run_plan(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tritongru", "plan", *arguments], capture_output=True, text=True, timeout=300
    )


SIZES = ("--batch", "32", "--hidden", "512", "--time", "100", "--dtype", "bf16")


def test_command_prints_backend_reason_and_tiles() -> None:
    found = run_plan("--device", "h200", *SIZES)
    assert found.returncode == 0, found.stderr
    assert "backend   sequence on " in found.stdout and "1 x sequence_forward" in found.stdout
    forced = run_plan("--device", "h200", *SIZES, "--backend", "step")
    assert "backend   step on " in forced.stdout and "100 x step_forward" in forced.stdout
    refused = run_plan("--device", "mi300x", *SIZES, "--backend", "sequence")
    assert refused.returncode == 2 and "'sequence' cannot run here" in refused.stderr


@pytest.mark.compiled
def test_command_compiles() -> None:
    found = run_plan("--device", "h200", *SIZES, "--compile", "--json")
    assert found.returncode == 0, found.stderr
    plan = json.loads(found.stdout)
    assert plan["backend"] == "sequence"
    assert {report["kernel"] for report in plan["compiled"]} == {"sequence_forward", "sequence_backward"}
    assert all(report["spill_bytes"] == 0 and report["matrix_instructions"] > 0 for report in plan["compiled"])


def test_command_refuses_bad_sizes_and_devices() -> None:
    bad = run_plan("--device", "h200", "--batch", "0", "--hidden", "5", "--time", "1")
    assert bad.returncode == 2 and "batch must be at least 1, got 0" in bad.stderr
    unknown = run_plan("--device", "h2000", *SIZES)
    assert unknown.returncode == 2 and "h200" in unknown.stderr
