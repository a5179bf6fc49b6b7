"""What would run, and why: devices, tiles, `plan` and its command; and the choice by the times of an H200."""

import csv
import json
import logging
import re
import shutil
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn.utils.rnn import pack_sequence

import tritongru
from benchmarks import table
from benchmarks.traffic import step_traffic
from tests.kit.modules import Form, outcome, same_bits
from tritongru import __main__ as cli
from tritongru import call, functional, module, planning, registry
from tritongru import layer as operators
from tritongru.checks import Operands
from tritongru.latest import Latest
from tritongru.planning import Problem, choose, describe, measured
from tritongru.planning.choose import fastest_backend, off_chip
from tritongru.planning.devices import GPUS, KIB, MIB, described_as, nearest_file, of_cuda
from tritongru.planning.measured import TABLES, Timed, nearest
from tritongru.planning.problem import Recurrence
from tritongru.planning.step import step_tiles
from tritongru.tools.counted import planned

H200, L4 = describe("h200"), describe("l4")
PROBLEM = Problem(batch=32, time=100, input_size=512, hidden_size=512, dtype="bf16")


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


LIMITS = dict(shared_memory_per_block_optin=160 * KIB, shared_memory_per_multiprocessor=164 * KIB, total_memory=MIB)
A_GPU = SimpleNamespace(name="NVIDIA H100", major=9, minor=0, multi_processor_count=132, **LIMITS)
A_MI300 = dict(name="AMD Instinct MI300X", gcnArchName="gfx942:sramecc+:xnack-", shared_memory_per_block=64 * KIB)
REPORTED = [  # what torch says of a GPU, and what it is taken for
    (dict(name="NVIDIA H100 80GB HBM3 MIG 1g.10gb", multi_processor_count=16), dict(sms=16, target=("cuda", 90, 32))),
    ({}, dict(shared_per_program=160 * KIB, shared_per_sm=164 * KIB, memory_bytes=MIB)),
    (dict(name="NVIDIA L40S", major=8, minor=9), dict(target=("cuda", 89, 32), arch="sm_89")),
    (A_MI300, dict(vendor="amd", target=("hip", "gfx942", 64), capability=None, shared_per_program=64 * KIB)),
    (A_MI300 | dict(shared_memory_per_multiprocessor=0), dict(shared_per_sm=64 * KIB)),  # the driver does not say
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
    from tritongru.kernels.exchange import units_of_block
    from tritongru.planning import sequence

    for rows, units in ((8, (32, 16)), (16, (16, 8)), (64, (16, 8))):
        assert tuple(sequence._units_of_block(dtype, rows) for dtype in ("bf16", "fp32")) == units
        assert tuple(units_of_block(width, rows) for width in (16, 32)) == units


def test_both_directions_in_one_launch_where_both_fit():
    both = replace(PROBLEM, directions=2, layers=2)
    assert dict(planned(both, H200, "sequence").launches.forward)["sequence_forward"] == 2
    launches = planned(replace(both, hidden_size=1536, time=10), H200, "sequence").launches
    assert dict(launches.forward)["sequence_forward"] == dict(launches.backward)["sequence_backward"] == 4


SMALL, IEEE = dict(hidden_size=64), dict(dtype="fp32", precision="ieee")
SAID = [  # problem, backend, what is said
    (dict(dtype="fp64"), "step", r"'step' cannot run here.*fp64.*: aten, reference"),
    (dict(hidden_size=3000), "sequence", r"'sequence' cannot run here.*H 3000.*: aten, reference, step"),
    ({}, "cudnn", r"unknown backend 'cudnn': expected one of aten, reference, step, sequence"),
    (IEEE, "sequence", "no matrix instructions"),
    (dict(batch=1 << 20, time=1), "sequence", "more elements than its kernels count"),
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
    plan = planned(PROBLEM, H200, "step")
    assert dict(plan.launches.forward)["step_forward"] == 100
    assert plan.cost.saved_bytes == 100 * 32 * 4 * 512 * 2 and step_traffic(plan)[1] == 2 * 32 * 3 * 512 * 512
    assert "saved     12.5 MiB for backward" in str(plan) and "12.6 MiB at once in forward, 25.1 MiB" in str(plan)
    printed = str(planned(replace(PROBLEM, training=False), H200, "step"))
    assert "saved" not in printed and "peak      9.5 MiB at once beyond" in printed


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
    _, printed = capsys.readouterr().out.split("compiled for sm_90")
    assert re.search(r"spill bytes +│ +0 │ +0 │", printed) and not re.search(r"matrix instructions .* 0 │", printed)


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
    with pytest.raises(SystemExit) as stopped:
        cli.main(["plan", *arguments])
    printed = capsys.readouterr()
    assert stopped.value.code == 2 and said in printed.err and printed.out == "" and printed.err.count("\n") == 1
    assert "choose from 'interpreter'" not in printed.err


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
        us, alone = (
            {
                r["backend"]: T * float(r[f"{on}us_per_step"] or "nan") + float(r[f"{on}us_per_call"] or "nan")
                for r in rows
            }
            for on in ("", "device_")
        )
        most = alone.get("aten", float("inf")) * (1.1 if T == 1 else 1)
        able = [backend for backend in us if not alone[backend] > most]
        if dtype != "fp32" or H > 128:  # there exactness decides
            assert chosen(H, B, dtype, training, T).backend == min(able, key=lambda name: us[name])


HIP, INTERPRETER = describe("mi300x"), describe("interpreter")
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
    (512, 32, "bf16", True, "step", "at bf16, training, H 512, B 32, T 1", {"T": 1}),
    (1024, 256, "fp16", True, "aten", "but for step, which takes longer than aten in a CUDA graph", {"T": 1}),
    # Of few steps what a pass does once counts on the device too
    (512, 32, "bf16", True, "aten", "but for step, which takes longer than aten in a CUDA graph", {"T": 2}),
    (512, 256, "bf16", True, "sequence", "but for step", {"T": 4}),
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
    timed = [Timed(backend, 1, 1, None, None, "") for backend in ("aten", "step")]
    cells = {(64, 64): timed, (128, 128): timed, (90, 90): timed[:1]}  # one time is no cell
    for H, B, expected in ((90, 90, 64), (91, 91, 128), (64, 300, 128)):
        assert nearest(cells, H, B, ("aten", "step")) == ((expected, expected), timed)
    assert nearest({}, 64, 64, ("aten", "step")) is None


def test_the_reasons_of_a_shape_are_few():
    """Each is logged once: they must not tell every T and B apart."""
    reasons = {chosen(512, B, "bf16", True, T=T).reason for B in range(1, 1025, 3) for T in range(2, 100)}
    assert len(reasons) < 20


@pytest.fixture
def tables(monkeypatch, tmp_path):
    def forget():
        for kept in (measured.table, measured.measured, fastest_backend):
            kept.cache_clear()

    monkeypatch.setattr(measured, "TABLES", tmp_path)
    forget()
    yield tmp_path
    forget()


def test_the_nearest_table_is_that_of_the_nearest_capability(tables):
    for name in ("a100", "h100", "h200", "rtx5090"):
        shutil.copy(Path(measured.__file__).with_name("tables") / "h200.csv", tables / f"{name}.csv")
    names = ("a100", "h100", "h200", "rtx5090")
    assert {name: nearest_file(tables, describe(name)).stem for name in names} == dict(zip(names, names, strict=True))
    (tables / "h100.csv").unlink()
    found = {name: nearest_file(tables, describe(name)).stem for name in ("l4", "h100", "b200")}
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
        monkeypatch.setattr(where, "requested", lambda backend, input: registry.asked_for(backend))


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
        patch.setattr(call, "settle", lambda *of, **how: pytest.fail("asked again"))
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
def test_pytorch_s_path_by_choice_is_nn_gru_and_no_fallback(packed, batch_first, messages):
    options = {"num_layers": 2, "bidirectional": True, "batch_first": batch_first, "dropout": 0.5}
    form, results = Form(options, lengths=(5, 3, 2) if packed else ()), []
    for layer in form.pair(None):
        for _ in range(2):
            torch.manual_seed(0)
            results.append(form.results(layer))
    assert all(same_bits(each, results[0]) for each in results)
    (record,) = messages.records
    assert record.levelno == logging.INFO and "take backend 'aten': fastest by what was" in record.getMessage()


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
