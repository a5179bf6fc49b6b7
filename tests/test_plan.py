"""`choose` and `plan`: pure, on described devices, with a reason; and what the public function reads from a module."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn.utils.rnn import pack_sequence

import tritongru
from benchmarks.traffic import step_traffic
from tritongru import cli
from tritongru.planning import Plan, Problem, choose, describe
from tritongru.planning.choose import off_chip
from tritongru.planning.devices import GPUS
from tritongru.planning.step import step_tiles
from tritongru.tools.counted import with_counts

PROBLEM = Problem(batch=32, time=100, input_size=512, hidden_size=512, dtype="bf16")


def planned(problem: Problem, backend: str) -> Plan:
    return with_counts(choose(problem, describe("h200"), backend), describe("h200"))


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
        ("a100", "bf16", 1536), ("rtx4090", "fp16", 1536), ("l4", "bf16", 768),
    ],
)  # fmt: skip
def test_the_largest_layer_kept_on_chip(device: str, dtype: str, largest: int) -> None:
    """And not beyond it, with the reason."""
    long = replace(PROBLEM, time=5000, batch=16, dtype=dtype)
    assert choose(replace(long, hidden_size=largest), describe(device), "sequence").backend == "sequence"
    plan = choose(replace(long, hidden_size=largest + 600), describe(device))
    why_not = off_chip(16, largest + 600, 1, dtype, "tf32", True, describe(device))
    assert plan.backend != "sequence" and why_not is not None and why_not in plan.reason


def test_host_and_kernel_know_the_same_blocks() -> None:
    """Of the exchange buffer: a block belongs to whole programs."""
    from tritongru.kernels.exchange import units_of_block
    from tritongru.planning import sequence

    for rows, units in ((8, (32, 16)), (16, (16, 8)), (64, (16, 8))):
        assert tuple(sequence._units_of_block(dtype, rows) for dtype in ("bf16", "fp32")) == units
        assert tuple(units_of_block(width, rows) for width in (16, 32)) == units


def test_float32_without_tf32_has_no_matrix_instructions() -> None:
    ieee = replace(PROBLEM, dtype="fp32", precision="ieee", time=1000)
    with pytest.raises(ValueError, match="no matrix instructions"):
        choose(ieee, describe("h200"), "sequence")
    assert choose(replace(ieee, hidden_size=64), describe("h200"), "sequence").backend == "sequence"


def test_both_directions_in_one_launch_where_both_fit() -> None:
    both = replace(PROBLEM, directions=2, layers=2)
    assert dict(planned(both, "sequence").launches.forward)["sequence_forward"] == 2
    large = replace(both, hidden_size=1536, time=10)
    assert dict(planned(large, "sequence").launches.forward)["sequence_forward"] == 4
    assert dict(planned(large, "sequence").launches.backward)["sequence_backward"] == 4


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
    # with PDL tiles follow the rows: 16, 32, 64 or 128 of them, and how much of W_h is loaded ahead
    assert len(forms) <= (7 if any(tiles.pdl for tiles in forms) else 2)


@pytest.mark.parametrize("backend", ["step", "sequence"])
def test_tiles_do_not_depend_on_time(backend: str) -> None:
    tiles = {choose(replace(PROBLEM, time=T), describe("h200"), backend).tiles for T in (2, 50, 5000)}
    assert len(tiles) == 1


@pytest.mark.parametrize("field", ["batch", "time", "input_size", "hidden_size", "layers"])
def test_sizes_below_one_are_refused_by_name(field: str) -> None:
    with pytest.raises(ValueError, match=f"{field} must be at least 1, got 0"):
        replace(PROBLEM, **{field: 0})


def test_launches_and_saved_bytes_are_those_of_the_problem() -> None:
    plan = planned(PROBLEM, "step")
    assert dict(plan.launches.forward)["step_forward"] == 100
    assert plan.cost.saved_bytes == 100 * 32 * 4 * 512 * 2
    assert planned(replace(PROBLEM, recompute=True), "step").cost.saved_bytes == 0
    assert step_traffic(plan)[1] == 2 * 32 * 3 * 512 * 512


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
    assert sum(saved.values()) == planned(problem, "step").cost.saved_bytes


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
    printed = str(planned(PROBLEM, "step"))
    assert "saved     12.5 MiB for backward" in printed and "nn.GRU keeps cuDNN's reserve" in printed
    assert "peak      12.6 MiB at once in forward, 25.1 MiB in backward, what" in printed
    printed = str(planned(replace(PROBLEM, training=False), "step"))
    assert "saved" not in printed and "peak      9.5 MiB at once beyond" in printed


def test_plan_of_a_module() -> None:
    layer = tritongru.GRU(20, 64, num_layers=2, bidirectional=True, batch_first=True)
    x = torch.randn(8, 50, 20)
    plan = tritongru.plan(layer, x, "a100")
    assert plan.backend == "aten"  # float32, H 64
    expected = dict(
        batch=8, time=50, input_size=20, hidden_size=64, layers=2, directions=2, dtype="fp32", training=True
    )
    assert {name: getattr(plan.problem, name) for name in expected} == expected
    with torch.no_grad():
        assert not tritongru.plan(layer, x, "a100").problem.training
    on_cpu = tritongru.plan(layer, x)  # where the module is
    assert on_cpu.backend == "aten" and "asked for" not in on_cpu.reason and "on the CPU" in on_cpu.reason
    assert "interpreter" not in str(on_cpu)
    with tritongru.use_backend("aten"):
        assert tritongru.plan(layer, x).reason == tritongru.plan(layer, x, "h200").reason == "asked for"
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


REFUSED = {
    "features": torch.randn(5, 2, 7),
    "unbatched features": torch.randn(5, 7),
    "packed features": pack_sequence([torch.randn(3, 7)]),
    "1-D": torch.randn(6),
    "4-D": torch.randn(1, 5, 2, 6),
    "float64": torch.randn(5, 2, 6).double(),
    "packed float64": pack_sequence([torch.randn(3, 6).double()]),
    "integers": torch.ones(5, 2, 6, dtype=torch.int64),
    "no time": torch.randn(0, 2, 6),
    "no tensor": [1.0],
}


@pytest.mark.parametrize("input", REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("device", [None, "h200"])
def test_a_plan_refuses_what_the_layer_refuses(input: Any, device: str | None) -> None:
    with pytest.raises(Exception) as of_layer:
        torch.nn.GRU(6, 4)(input)
    with pytest.raises(type(of_layer.value)) as of_plan:
        tritongru.plan(tritongru.GRU(6, 4), input, device)
    assert str(of_plan.value) == str(of_layer.value)


def test_no_time_is_refused_batch_first_too() -> None:
    layer = tritongru.GRU(6, 4, batch_first=True)
    with pytest.raises(RuntimeError, match="Expected sequence length to be larger than 0 in RNN"):
        tritongru.plan(layer, torch.randn(2, 0, 6))
    assert tritongru.plan(layer, torch.randn(2, 3, 6)).problem.time == 3


@pytest.mark.parametrize(
    ("sizes", "word"),
    [
        (dict(hidden_size=10**9), "weights and their gradients"), (dict(time=10**12), "input and output"),
        (dict(batch=10**9), "input and output"), (dict(layers=10**9), "weights"), (dict(input_size=10**9), "weights"),
        (dict(hidden_size=10**30, layers=10**30), "weights"),
    ],
)  # fmt: skip
def test_what_no_memory_holds_is_refused_in_words(sizes: dict[str, int], word: str) -> None:
    for device in (describe(name) for name in GPUS):
        with pytest.raises(ValueError, match=f"too large for {device.name} with its .* GiB: .*{word}"):
            choose(replace(PROBLEM, **sizes), device)


def test_what_the_memory_holds_is_not_refused() -> None:
    """Weights, gradients, input and output of 23 GiB fit 24; a packed batch may have little more than T rows."""
    large = Problem(batch=1, time=10**6, input_size=4096, hidden_size=2048, dtype="bf16", training=False)
    assert 2 * 10**6 * 6144 < 23 * 2**30 < 2 * 2 * 10**6 * 6144 + 2**30
    assert choose(large, describe("l4")).problem == large
    with pytest.raises(ValueError, match="too large for L4"):
        choose(replace(large, batch=3), describe("l4"))
    assert choose(replace(large, batch=3, packed=True), describe("l4")).problem.packed
    assert choose(replace(large, batch=3), replace(describe("l4"), memory_bytes=0)).problem.batch == 3  # unknown


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


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ("--device", "h200", "--batch", "0", "--hidden", "5", "--time", "1"),
            "--batch: expected a number of at least 1, got '0'",
        ),
        (("--device", "h200", "--batch", "2", "--hidden", "0", "--time", "1"), "--hidden: expected a number"),
        (("--device", "h200", *SIZES, "--input", "0"), "--input: expected a number"),
        (("--device", "h200", "--batch", "2", "--hidden", "9" * 40, "--time", "1"), "too large for H200"),
        (("--device", "h200", "--batch", "2", "--hidden", "64", "--time", "1" + 12 * "0"), "too large for H200"),
        (
            ("--device", "h200", "--batch", "two", "--hidden", "64", "--time", "1"),
            "of at least 1, got 'two'",
        ),
        (("--device", "h2000", *SIZES), "'h200'"),
        (("--device", "interpreter", *SIZES), "invalid choice: 'interpreter'"),
        (("--device", "t4", *SIZES, "--backend", "step"), "'step' cannot run here"),
        (SIZES, "--device"),
    ],
)
def test_command_refuses_in_one_line(arguments: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = cli.main(["plan", *arguments])
    except SystemExit as exit:
        code = exit.code
    printed = capsys.readouterr()
    assert code == 2 and said in printed.err and printed.out == "" and printed.err.count("\n") == 1
    assert "concurrent" not in printed.err and "choose from 'interpreter'" not in printed.err


def test_command_takes_a_device_in_any_case_and_lists_the_gpus(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "--device", "H200", *SIZES]) == cli.main(["plan", "--device", "Mi300X", *SIZES]) == 0
    printed = capsys.readouterr().out
    assert " on H200: " in printed and " on MI300X: " in printed
    with pytest.raises(SystemExit):
        cli.main(["plan", "--help"])
    printed = capsys.readouterr().out
    assert all(name in printed for name in GPUS) and "interpreter" not in printed and "concurrent" not in printed


def test_a_reader_that_has_seen_enough_gets_no_traceback() -> None:
    command = [sys.executable, "-m", "tritongru", "plan", "--device", "h200", *SIZES, "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()  # before anything is written
        said = process.stderr.read()
        assert process.wait(timeout=300) == 1 and said == ""


def test_fields_of_a_step_s_tiles_may_be_set() -> None:
    planned = dict(choose(PROBLEM, describe("h200"), "step").tiles)
    found = dict(choose(PROBLEM, describe("h200"), "step:ahead=0,num_stages=3,pdl=0").tiles)
    assert found["forward"] == replace(planned["forward"], ahead=0, num_stages=3, pdl=False)
    assert found["backward"] == replace(planned["backward"], ahead=0, num_stages=3, pdl=False)
    assert found["backward_first"] == planned["backward_first"]
    fewer = dict(choose(PROBLEM, describe("h200"), "step:num_warps=4").tiles)["forward"]
    assert (fewer.num_warps, fewer.split) == (4, 4)
    assert not dict(choose(PROBLEM, describe("a100"), "step:pdl=1").tiles)["forward"].pdl


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ("block_b=24", "powers of two"),
        ("split=4", "split 1 or the number of up to 8 warps"),
        ("num_warps=16", "split 1 or the number of up to 8 warps"),
        ("block_b=256,block_h=256,ahead=64", "bytes of shared memory"),
        ("rows=16", "takes the fields block_b, block_h"),
        ("ahead=all", "must be a number of digits"),
    ],
)
def test_fields_that_no_step_has_are_refused(fields: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        choose(PROBLEM, describe("h200"), f"step:{fields}")
