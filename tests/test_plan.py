"""What would run, and why: devices, tiles, `plan` and its command. The choice by measured times is test_choice.py."""

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn.utils.rnn import pack_sequence

import tritongru
from benchmarks.traffic import step_traffic
from tests.kit.modules import outcome
from tritongru import cli, planning
from tritongru.planning import Problem, choose, describe
from tritongru.planning.choose import off_chip
from tritongru.planning.devices import GPUS, KIB, MIB, described_as, of_cuda
from tritongru.planning.step import step_tiles
from tritongru.tools.counted import with_counts

H200, L4 = describe("h200"), describe("l4")
PROBLEM = Problem(batch=32, time=100, input_size=512, hidden_size=512, dtype="bf16")

# ---- devices


def test_described_devices():
    interpreter = describe("interpreter")
    for device in map(describe, GPUS):
        assert device.shared_per_program <= min(device.shared_per_sm, interpreter.shared_per_program)
        assert min(device.sms, device.memory_bytes) > 0
        assert (device.capability is not None) == (device.vendor == "nvidia")
    assert (describe("H200").target, describe("mi300x").target) == (("cuda", 90, 32), ("hip", "gfx942", 64))
    assert (H200.arch, describe("mi300x").arch) == ("sm_90", "gfx942")
    assert interpreter.sms == 8  # programs that wait for each other are threads: few
    with pytest.raises(ValueError, match="interpreter"):
        _ = interpreter.target
    with pytest.raises(ValueError, match="unknown device 'v100'") as error:
        describe("v100")
    assert all(name in str(error.value) for name in GPUS) and "interpreter" not in str(error.value)


A_GPU = SimpleNamespace(name="NVIDIA H100", major=9, minor=0, multi_processor_count=132)
A_MIG_SLICE = dict(name="NVIDIA H100 80GB HBM3 MIG 1g.10gb", multi_processor_count=16)
AN_A100 = dict(name="NVIDIA A100-SXM4-80GB", major=8)
TOLD = dict(shared_memory_per_block_optin=160 * KIB, shared_memory_per_multiprocessor=161 * KIB, total_memory=79 * MIB)
A_MI300 = dict(name="AMD Instinct MI300X", gcnArchName="gfx942:sramecc+:xnack-")
REPORTED = [  # what torch says of a GPU, and what it is taken for: what is reported wins, the rest is the product's
    (A_MIG_SLICE, dict(sms=16, target=("cuda", 90, 32), shared_per_program=227 * KIB)),
    (AN_A100 | TOLD, dict(shared_per_program=160 * KIB, shared_per_sm=161 * KIB, memory_bytes=79 * MIB)),
    # Not described: the limits of its capability
    (dict(name="NVIDIA L40S", major=8, minor=9), dict(target=("cuda", 89, 32), shared_per_program=99 * KIB, sms=132)),
    (dict(name="NVIDIA T400", major=7, minor=5), dict(target=("cuda", 75, 32), shared_per_program=64 * KIB)),
    (A_MI300, dict(vendor="amd", target=("hip", "gfx942", 64), capability=None, shared_per_program=64 * KIB)),
]


@pytest.mark.parametrize(("properties", "expected"), REPORTED)
def test_a_present_gpu(properties, expected, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.2" if "gcnArchName" in properties else None)
    reported = SimpleNamespace(**vars(A_GPU) | properties)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: reported)
    of_cuda.cache_clear()
    device = of_cuda(0)
    assert device.name == reported.name and {name: getattr(device, name) for name in expected} == expected
    monkeypatch.setattr(torch.cuda, "get_device_properties", None)
    assert of_cuda(0) is device  # read once
    of_cuda.cache_clear()


def test_names_of_products():
    """A part of one (MIG), or another one, is not it."""
    products = dict(rtx4090="NVIDIA GeForce RTX 4090", rtx5090="NVIDIA GeForce RTX 5090", a100="NVIDIA A100 80GB PCIe")
    products |= dict(l4="NVIDIA L4", t4="Tesla T4", b200="NVIDIA B200", mi300x="AMD Instinct MI300X")
    for key, product in products.items():
        device = replace(describe(key), name=product)
        assert described_as(device) == key and described_as(replace(device, sms=16)) is None
        assert described_as(replace(device, name="NVIDIA L40S")) is None


def test_planning_imports_neither_torch_nor_triton_nor_what_does():
    for path in Path(planning.__path__[0]).glob("*.py"):
        assert not re.search(r"^(import|from) (torch|triton|\.\.)", path.read_text(), re.M), path


# ---- a plan of a problem


def planned(problem, backend):
    return with_counts(choose(problem, H200, backend), H200)


def test_what_is_chosen_and_why():
    plans = {name: choose(PROBLEM, describe(name)) for name in GPUS}
    found = {name: plan.backend for name, plan in plans.items()}
    assert found == {name: {"t4": "aten", "mi300x": "step"}.get(name, "sequence") for name in GPUS}
    assert all(plan.reason for plan in plans.values())
    assert "7.5" in plans["t4"].reason and "8.0" in plans["t4"].reason and "not coherent" in plans["mi300x"].reason
    plan = choose(replace(PROBLEM, dtype="fp64"), H200)
    assert plan.backend == "aten" and "fp64" in plan.reason


LARGEST = [(name, "bf16", H) for name, H in (("h200", 2048), ("b200", 2048), ("a100", 1536), ("l4", 768))]
LARGEST += [("h100", "fp16", 2048), ("h200", "fp32", 1024), ("rtx4090", "fp16", 1536)]


@pytest.mark.parametrize(("device", "dtype", "largest"), LARGEST)
def test_the_largest_layer_kept_on_chip(device, dtype, largest):
    long = replace(PROBLEM, time=5000, batch=16, dtype=dtype)
    assert choose(replace(long, hidden_size=largest), describe(device), "sequence").backend == "sequence"
    plan = choose(replace(long, hidden_size=largest + 600), describe(device))
    why_not = off_chip(replace(long, hidden_size=largest + 600).on(describe(device)), True)
    assert plan.backend != "sequence" and why_not is not None and why_not in plan.reason


def test_host_and_kernel_know_the_same_blocks():
    """Of the exchange buffer: a block belongs to whole programs."""
    from tritongru.kernels.exchange import units_of_block
    from tritongru.planning import sequence

    for rows, units in ((8, (32, 16)), (16, (16, 8)), (64, (16, 8))):
        assert tuple(sequence._units_of_block(dtype, rows) for dtype in ("bf16", "fp32")) == units
        assert tuple(units_of_block(width, rows) for width in (16, 32)) == units


def test_both_directions_in_one_launch_where_both_fit():
    both = replace(PROBLEM, directions=2, layers=2)
    assert dict(planned(both, "sequence").launches.forward)["sequence_forward"] == 2
    launches = planned(replace(both, hidden_size=1536, time=10), "sequence").launches
    assert dict(launches.forward)["sequence_forward"] == dict(launches.backward)["sequence_backward"] == 4


SMALL, IEEE = dict(hidden_size=64), dict(dtype="fp32", precision="ieee")
SAID = [  # problem, backend, what is said
    (dict(dtype="fp64"), "step", r"'step' cannot run here.*fp64.*: aten, reference"),
    (dict(hidden_size=3000), "sequence", r"'sequence' cannot run here.*H 3000.*: aten, reference, step"),
    ({}, "cudnn", r"unknown backend 'cudnn': expected one of aten, reference, step, sequence"),
    (IEEE, "sequence", "no matrix instructions"),
    ({}, "step:block_b=24", "block_b must be one of 1, 2, .., 4096 here, got 24"),
    ({}, "step:split=4", "split must be one of 1, 8 here, got 4"),
    ({}, "step:num_warps=16", "split must be one of 1, 8 here, got 16"),
    ({}, "step:block_b=256,block_h=256,ahead=64", "bytes of shared memory"),
    ({}, "step:rows=16", "takes the fields block_b, block_h"),
    ({}, "step:ahead=all", "must be a number of digits"),
    ({}, "sequence:block_h=24", "block_h must be one of 8, 16, 32 here, got 24"),
    ({}, "sequence:block_b=24", "block_b must be one of 8, 16, 32, 64"),
    ({}, "sequence:groups=9", "groups must be 1 to 4 here, got 9"),
    ({}, "sequence:delay=1000001", "delay must be 0 to 1000000 here, got 1000001"),
    ({}, "sequence:num_warps=3", "num_warps must be"),
    ({}, "sequence:waits=2", "must be one of 1, 3"),  # of backward
    ({}, "sequence:num_k=2", "num_k must be one of 1, 3"),
    ({}, "sequence:block_k=48", "block_k must be one of"),
    ({}, "sequence:shared_gates=4", "shared_gates must be 0 to 3"),
    ({}, "sequence:directions=2", "directions must be 1 here"),
    ({}, "sequence:exchange=1,rows=2", "with exchange the fields are .*, got rows"),
    ({}, "sequence:block_b=8,block_h=8,block_k=512", "block_h must be one of 16, 32 here"),
    (SMALL, "sequence:exchange=0,block_h=8", "without exchange the fields"),
    (SMALL, "sequence:rows=3", "rows must be one of 4, 8, 16 here, got 3"),
    (SMALL, "sequence:rows=4,units=16", "units must be"),
    (SMALL, "sequence:rows=4,ahead=3", "ahead"),
    (SMALL | IEEE, "sequence:rows=1,lanes=3", "lanes must be"),
    *(({field: 0}, None, f"{field} must be at least 1, got 0")
      for field in ("batch", "time", "input_size", "hidden_size", "layers")),
]  # fmt: skip


@pytest.mark.parametrize(("sizes", "backend", "said"), SAID)
def test_what_cannot_be_is_refused_in_words(sizes, backend, said):
    with pytest.raises(ValueError, match=said):
        choose(replace(PROBLEM, **sizes), H200, backend)


@pytest.mark.parametrize("name", GPUS)
def test_what_no_memory_holds_is_refused(name):
    of_weights = [{size: 10**9} for size in ("hidden_size", "layers", "input_size")] + [{"hidden_size": 10**30}]
    for sizes in (*of_weights, dict(time=10**12), dict(batch=10**9)):
        what = "weights and their gradients" if sizes in of_weights else "input and output"
        with pytest.raises(ValueError, match=f"too large for {describe(name).name} with its .* GiB: .*{what}"):
            choose(replace(PROBLEM, **sizes), describe(name))


def test_what_the_memory_holds_is_not_refused():
    """Weights, gradients, input and output of 23 GiB fit 24; a packed batch may have little more than T rows."""
    large = Problem(batch=1, time=10**6, input_size=4096, hidden_size=2048, dtype="bf16", training=False)
    assert 2 * 10**6 * 6144 < 23 * 2**30 < 2 * 2 * 10**6 * 6144 + 2**30
    assert choose(large, L4).problem == large
    with pytest.raises(ValueError, match="too large for L4"):
        choose(replace(large, batch=3), L4)
    assert choose(replace(large, batch=3, packed=True), L4).problem.packed
    assert choose(replace(large, batch=3), replace(L4, memory_bytes=0)).problem.batch == 3  # unknown


@pytest.mark.parametrize("name", GPUS)
@pytest.mark.parametrize("kind", ["forward", "cell", "backward", "backward_first"])
def test_few_forms_of_a_kernel_whatever_the_batch(name, kind):
    forms = {step_tiles(kind, replace(PROBLEM, batch=batch).on(describe(name))) for batch in range(1, 600)}
    # with PDL tiles follow the rows: 16, 32, 64 or 128 of them, and how much of W_h is loaded ahead; and what has won
    assert len(forms) <= (8 if any(tiles.pdl for tiles in forms) else 2)


@pytest.mark.parametrize("backend", ["step", "sequence"])
def test_tiles_do_not_depend_on_time(backend):
    assert len({choose(replace(PROBLEM, time=T), H200, backend).tiles for T in (2, 50, 5000)}) == 1


def test_fields_of_a_step_s_tiles_may_be_set():
    before = dict(choose(PROBLEM, H200, "step").tiles)
    found = dict(choose(PROBLEM, H200, "step:ahead=0,num_stages=3,pdl=0").tiles)
    for kind in ("forward", "backward"):
        assert found[kind] == replace(before[kind], ahead=0, num_stages=3, pdl=False)
    assert found["backward_first"] == before["backward_first"]
    fewer = dict(choose(PROBLEM, H200, "step:num_warps=4").tiles)["forward"]
    assert (fewer.num_warps, fewer.split) == (4, 4)
    assert not dict(choose(PROBLEM, describe("a100"), "step:pdl=1").tiles)["forward"].pdl


def test_launches_and_saved_bytes_are_printed():
    plan = planned(PROBLEM, "step")
    assert dict(plan.launches.forward)["step_forward"] == 100
    assert plan.cost.saved_bytes == 100 * 32 * 4 * 512 * 2 and step_traffic(plan)[1] == 2 * 32 * 3 * 512 * 512
    assert "saved     12.5 MiB for backward" in str(plan) and "12.6 MiB at once in forward, 25.1 MiB" in str(plan)
    printed = str(planned(replace(PROBLEM, training=False), "step"))
    assert "saved" not in printed and "peak      9.5 MiB at once beyond" in printed


# ---- `tritongru.plan` of a module, and the command


def test_plan_of_a_module():
    layer = tritongru.GRU(20, 64, num_layers=2, bidirectional=True, batch_first=True)
    x = torch.randn(8, 50, 20)
    plan = tritongru.plan(layer, x, "a100")
    assert plan.backend == "aten"  # float32, H 64
    assert plan.problem == Problem(8, 50, 20, 64, 2, 2, "fp32", precision=plan.problem.precision)
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


def test_plan_refuses_clearly_and_what_the_layer_refuses():
    for arguments, error, said in (
        ((torch.nn.Linear(2, 2), torch.randn(2, 2), "h200"), TypeError, "a GRU module or a Problem, got Linear"),
        ((tritongru.GRU(2, 3), None, "h200"), TypeError, "needs the input"),
        ((PROBLEM,), TypeError, "needs a device"),
        ((PROBLEM, None, "h2000"), ValueError, "h200"),
    ):
        with pytest.raises(error, match=said):
            tritongru.plan(*arguments)
    sizes = (5, 2, 7), (1, 5, 2, 6), (0, 2, 6)
    for x in (*map(torch.randn, sizes), torch.randn(5, 2, 6).double(), pack_sequence([torch.randn(3, 7)]), [1.0]):
        expected = outcome(lambda x=x: torch.nn.GRU(6, 4)(x))
        for device in (None, "h200"):
            assert outcome(lambda x=x, on=device: tritongru.plan(tritongru.GRU(6, 4), x, on)) == expected


SIZES = ("--batch", "32", "--hidden", "512", "--time", "100", "--dtype", "bf16")


def test_command_prints_backend_reason_and_tiles(capsys):
    assert cli.main(["plan", "--device", "H200", *SIZES]) == 0
    printed = capsys.readouterr().out
    assert "backend   sequence on H200: " in printed and "1 x sequence_forward" in printed
    assert cli.main(["plan", "--device", "H200", *SIZES, "--backend", "step"]) == 0
    printed = capsys.readouterr().out
    assert "backend   step on H200: " in printed and "100 x step_forward" in printed
    with pytest.raises(SystemExit):
        cli.main(["plan", "--help"])
    printed = capsys.readouterr().out
    assert all(name in printed for name in GPUS) and "interpreter" not in printed


@pytest.mark.compiled
def test_command_compiles(capsys):
    command = ["plan", "--device", "h200", *SIZES, "--compile"]
    assert cli.main([*command, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["backend"], plan["problem"]["hidden_size"]) == ("sequence", 512) and plan["cost"]["saved_bytes"] > 0
    reports = plan["compiled"]
    kernels = [[report["kernel"], 1] for report in reports]
    assert kernels == [["sequence_forward", 1], ["sequence_backward", 1]] and kernels[0] in plan["launches"]["forward"]
    assert all(report["spill_bytes"] == 0 and report["counts"]["HMMA"] > 0 for report in reports)
    assert cli.main(command) == 0
    _, table = capsys.readouterr().out.split("compiled for sm_90")
    assert re.search(r"spill bytes +│ +0 │ +0 │", table) and not re.search(r"matrix instructions .* 0 │", table)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--device", "h200", *SIZES, "--batch", "0"), "--batch: expected a number"),
        (("--device", "h200", *SIZES, "--hidden", "9" * 40), "too large for H200"),
        (("--device", "h2000", *SIZES), "'h200'"),
        (("--device", "interpreter", *SIZES), "invalid choice: 'interpreter'"),
        (("--device", "mi300x", *SIZES, "--backend", "sequence"), "'sequence' cannot run here"),
        (SIZES, "--device"),
    ],
)
def test_command_refuses_in_one_line(arguments, said, capsys):
    try:
        code = cli.main(["plan", *arguments])
    except SystemExit as exit:
        code = exit.code
    printed = capsys.readouterr()
    assert code == 2 and said in printed.err and printed.out == "" and printed.err.count("\n") == 1
    assert "choose from 'interpreter'" not in printed.err
