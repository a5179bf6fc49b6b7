"""`python -m tritongru profile`: what the launches tell of themselves, what is read from a trace, and the command.

The bytes of kernels/metadata.py are held against the addresses that the kernels load and store in the emulator.
"""

import json
from collections import defaultdict
from contextlib import contextmanager, nullcontext

import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import pack_sequence

import tritongru
from tests.kit.modules import tensors
from tritongru import parts
from tritongru.__main__ import main
from tritongru.tools import profile
from tritongru.tools.files import show
from tritongru.tools.profile import ATEN, ELSEWHERE


@contextmanager
def watched(monkeypatch):
    """The launches of the block: name, what it told, and the addresses that it touched, by load or store and element
    size. The status words, which waiting programs look at, are left out."""
    from tritongru.launch import runtime
    from tritongru.status import status
    from tritongru.tools.emulator.launch import Memory

    launches, checked, of_waits = [], Memory.checked, status(torch.device("cpu"))
    words = {of_waits.word.data_ptr(), of_waits.report.data_ptr()}

    def noted(self, verb, addresses, itemsize):
        launches[-1][2][verb, itemsize] |= set(np.unique(addresses).tolist()) - words
        return checked(self, verb, addresses, itemsize)

    def begin(name, told):
        launches.append((name, told, defaultdict(set)))

    with monkeypatch.context() as patch, runtime.observe(begin, runtime.Launch.counts):
        patch.setattr(Memory, "checked", noted)
        yield launches


PASSES, PRODUCTS = ("forward", "backward"), "gradient products"
DENSE, ONE_STEP, PACKED = (3, 3), (1, 1, 1), (4, 3, 3, 1)
STEP, SEQUENCE, SMALL = dict(backend="step"), dict(backend="sequence"), dict(backend="sequence:exchange=0")
BOTH, HALF, NO_BIAS = dict(bidirectional=True), dict(dtype=torch.float16), dict(bias=False)
CALLS = [  # the layer's options, H, lengths; without biases h_0 wants no gradient either
    *((how | more, 11, lengths) for how in (STEP, SEQUENCE) for more in ({}, BOTH, HALF, BOTH | HALF, NO_BIAS)
      for lengths in (DENSE, ONE_STEP, PACKED)),
    *((SMALL | more, 11, lengths) for more in (BOTH, BOTH | NO_BIAS) for lengths in (DENSE, ONE_STEP, PACKED)),
    *((dict(backend=f"sequence:directions={n}") | BOTH, H, (3, 2)) for H in (16, 13) for n in (2, 1)),
    (STEP | NO_BIAS, 70, (2,) * 20),  # on an H200 many programs
]  # fmt: skip


@pytest.mark.interpreted
@pytest.mark.parametrize(("how", "H", "lengths"), CALLS)
def test_bytes_are_the_addresses_touched_and_flops_those_of_the_rows_that_run(how, H, lengths, monkeypatch, request):
    """Forward and backward, of one length dense; an address is counted once, whichever programs touch it."""
    if H == 70:
        request.getfixturevalue("h200_tiles")
    layer, dtype, D = tritongru.GRU(5, H, **how), how.get("dtype"), 1 + how.get("bidirectional", False)
    sequences, want = [torch.randn(n, 5, dtype=dtype) for n in lengths], how.get("bias", True)
    x = torch.stack(sequences, 1) if len(set(lengths)) == 1 else pack_sequence(sequences)
    with watched(monkeypatch) as launches:
        results = tensors(layer(x, torch.randn(D, len(lengths), H, dtype=dtype).requires_grad_(want)))
        torch.autograd.backward(results, [torch.randn_like(t) for t in results])
    assert launches
    if "directions" in how["backend"]:
        assert [name for name, _, _ in launches].count("sequence_forward") == 3 - int(how["backend"][-1])
    for name, told, touched in launches:
        assert told["bytes"] == sum(size * len(addresses) for (_, size), addresses in touched.items()), name
        assert told["flops16" if dtype == torch.float16 else "flops32"] == told["flops"]
    N, B = sum(lengths), len(lengths)
    fused = how["backend"] == "step" and max(lengths) == 1  # the kernel multiplies x too
    forward, backward = (sum(told["flops"] for name, told, _ in launches if name.endswith(w)) for w in PASSES)
    assert forward == D * 2 * N * 3 * H * (H + 5 * fused)
    if want or D == 1 or len(set(lengths)) == 1:
        assert backward == D * 2 * (N if want else N - B) * 3 * H * H


@pytest.mark.compiled
def test_a_launch_hook_is_told_at_every_launch():
    """Through Triton's own CompiledKernel.launch_metadata, at the first launch and at those that pass the JIT by."""
    import triton
    from triton.compiler.compiler import ASTSource

    from benchmarks.hostcost import as_on_a_gpu
    from tritongru.kernels import step as kernels
    from tritongru.launch import runtime

    T, hooked, told = 4, [], []
    hook = triton.knobs.runtime.launch_enter_hook

    def note(metadata):
        hooked.append(metadata.get())

    with as_on_a_gpu() as stand_in, torch.no_grad():
        stand_in.src = ASTSource.__new__(ASTSource)
        stand_in.src.fn, stand_in.metadata, stand_in.hooked = kernels.step_forward, None, True

        hook.add(note)
        try:
            with runtime.observe(lambda name, counts: told.append(counts), runtime.Launch.counts):
                tritongru.GRU(5, 16, backend="step")(torch.randn(T, 2, 5))
        finally:
            hook.remove(note)
    assert len(hooked) == T
    assert [{key: found[key] for key in told[0]} for found in hooked] == told
    assert told[0]["name"] == "step_forward [B=2, H=16, D=1]"
    # what Proton takes of it as metrics: numbers under names of its own
    assert {key for key, value in told[0].items() if not isinstance(value, str)} == {"flops", "flops32", "bytes"}


def test_a_part_is_a_range_where_a_profiler_is_on(monkeypatch):
    marked, ranges = parts.part("recurrence")(abs), []
    monkeypatch.setattr(parts.profiler, "record_function", lambda name: ranges.append(name) or nullcontext())
    assert marked(-1) == 1 and not ranges
    with torch.profiler.profile():
        assert marked(-1) == 1 and ranges == ["tritongru: recurrence"]
    assert marked(-1) == 1 and len(ranges) == 1


def test_a_long_name_leaves_room_for_the_figures(capsys):
    figures = (71, 12.5, 34.5, 6.75, 8.25)
    show("launches", ("launch", "count", "us", "MB", "Mflop", "GB/s"), [("kernel<int>" * 20, *figures)])
    assert set(capsys.readouterr().out.split()) >= set(map(str, figures))


def event(cat, name, ts, dur, tid=1, **args):
    return {"ph": "X", "cat": cat, "name": name, "pid": 7, "tid": tid, "ts": ts, "dur": dur, "args": args}


def a_range(name, ts, dur, tid=1):
    return event("user_annotation", f"tritongru{name}", ts, dur, tid)


def launched(name, at, runs, dur, number, tid=1):
    """A launch on the host, Triton's by the driver, and what runs on the device later."""
    api = ("cuda_driver", "cuLaunchKernelEx") if "step" in name else ("cuda_runtime", "cudaLaunchKernel")
    cat = "gpu_memset" if name.startswith("Memset") else "kernel"
    return [event(*api, at, 2, tid, correlation=number), event(cat, name, runs, dur, tid=99, correlation=number)]


GPU = [
    a_range(" profile: forward", 0, 1000),
    a_range(": recurrence", 100, 500),
    a_range(": projection", 150, 100),
    *launched("gemm", 160, 180, 30, 1),
    *launched("step_forward", 300, 650, 11, 2),  # no op around it, and it runs after the range has ended
    *launched("step_forward", 310, 670, 13, 3),
    *launched("softmax", 700, 720, 5, 4),  # outside all ranges
    event("kernel", "orphan", 800, 7, tid=99),  # no correlation
    event("kernel", "stranger", 810, 9, tid=99, correlation=555),  # of which there is no launch
    a_range(" profile: backward", 2000, 1000),  # on the main thread, which waits
    a_range(": gradient products", 2100, 800, tid=2),
    a_range(": recurrence", 2200, 200, tid=2),
    a_range(": fill", 2210, 20, tid=2),
    *launched("Memset (Device)", 2215, 2230, 2, 5, tid=2),
    *launched("step_backward", 2300, 2400, 17, 6, tid=2),
    *launched("gemm", 2500, 2600, 19, 7, tid=2),
    event("cpu_op", "autograd::engine::evaluate_function: CudnnRnnBackward0", 2940, 30, tid=2),
    *launched("gemm", 2950, 2960, 23, 8, tid=2),
    *launched("gemm", 3500, 3600, 1000, 9),  # between the passes
]
FORWARD, BACKWARD = PASSES


def test_a_kernel_belongs_to_the_innermost_part_that_launched_it():
    split = profile.read(GPU, 1, on_gpu=True)
    assert split.parts == {  # what each part takes, and how many launches
        FORWARD: {"projection": (30, 1), "recurrence": (24, 2), ELSEWHERE: (5 + 7 + 9, 3)},
        BACKWARD: {"fill": (2, 1), "recurrence": (17, 1), PRODUCTS: (19, 1), ATEN: (23, 1)},
    }
    assert set(split.wall_us.values()) == {1000} and split.rows["gemm"] == (72, 3)
    assert list(split.rows.values()) == sorted(split.rows.values(), reverse=True)
    mean = profile.read(GPU, 2, on_gpu=True)  # had they been of two calls
    assert mean.parts[FORWARD]["recurrence"] == (12, 1) and mean.rows["gemm"] == (36, 1.5)
    assert set(mean.wall_us.values()) == {500}


def test_launches_that_were_all_counted_have_rates():
    counted = {"step_forward": {"count": 2, "bytes": 3000, "flops": 300}, "step_backward": {"count": 2}}
    found = profile.Found("cuda", profile.read(GPU, 1, True), 1, counted, [])
    rows = {name: cells for name, *cells in profile._rows(found)}
    assert rows["step_forward"] == ["2", "24.0", "0.003", "0.000", "0.125", "1.25e-05"]
    assert rows["step_backward"] == ["1", "17.0"] and rows["gemm"] == ["3", "72.0"]


@pytest.fixture
def told(tmp_path, monkeypatch, capsys):
    found, measure = [], profile.profile
    monkeypatch.setattr(profile, "profile", lambda *of: found.append(measure(*of)) or found[-1])

    def run(*arguments):
        assert main(["profile", *arguments, "--device", "cpu", "--out", str(tmp_path)]) == 0
        printed = capsys.readouterr().out
        split, said = found[-1].split, found[-1].said
        assert ("Mflop" in printed and "mean nothing" in printed) == bool(found[-1].counted) and "GB/s" not in printed
        assert all(line in printed for line in said)
        assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"] and "trace.json" in printed
        for pass_, wall in split.wall_us.items():
            of_parts = [us for us, _ in split.parts[pass_].values()]
            assert all(f"{us:.1f}" in printed for us in of_parts)
            assert sum(of_parts) == pytest.approx(wall, rel=1e-3) and min(of_parts) > 0
        return found[-1]

    return run


@pytest.mark.interpreted
@pytest.mark.parametrize("backend", ["step", "sequence"])
def test_interpreted_launches_are_listed_without_times(backend, told):
    found = told(*["--batch", "2", "--hidden", "6", "--time", "3", "--backend"], backend)
    assert found.kind == "emulator" and set(found.counted) == {f"{backend}_forward", f"{backend}_backward"}
    forward = found.counted[f"{backend}_forward"]
    assert forward["count"] == (3 if backend == "step" else 1)
    assert forward["bytes"] > 0 and forward["flops"] == 2 * 6 * 3 * 6 * 6


@pytest.mark.gpu
def test_kernels_of_a_gpu_are_those_that_were_counted(tmp_path):
    layer = tritongru.GRU(64, 64, backend="step", device="cuda")
    found = profile.profile(layer, (torch.randn(5, 3, 64, device="cuda"),), True, tmp_path / "trace.json")
    assert found.kind == "cuda" and found.split.rows["step_forward"].n == found.counted["step_forward"]["count"] == 5
    forward, backward = (found.split.parts[in_pass] for in_pass in PASSES)
    assert forward["recurrence"].n >= 5 and "projection" in forward and {"recurrence", PRODUCTS} <= set(backward)


MODEL = """
import torch, tritongru
from torch import nn
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head, self.cell = nn.Embedding(10, 4), nn.Linear(5, 10), tritongru.GRUCell(5, 5)
        self.ours = tritongru.GRU(4, 6, batch_first=True, backend="reference", recompute=True)
        self.theirs = nn.GRU(6, 5, batch_first=True)
    def forward(self, ids, scale=1.0):
        h = self.theirs(self.ours(self.embedding(ids))[0])[0]
        return {"logits": self.head(self.cell(h[:, -1])) * scale, "ids": ids}
gru, x = tritongru.GRU(3, 4), torch.randn(2, 1, 3)
model = lambda: (Model(), (torch.randint(0, 10, (2, 4)), 2.0))
compiled = lambda: (torch.compile(nn.Sequential(gru), backend="eager"), x)
packed = lambda: (gru, nn.utils.rnn.pack_sequence([torch.randn(2, 3), torch.randn(1, 3)]))
five = lambda: 5
"""
FORWARD_PARTS, BACKWARD_PARTS = {"projection", "recurrence", ELSEWHERE}, {PRODUCTS, "recurrence", ELSEWHERE}
MODELS = {  # by function: parts of forward and of backward, and what is said of backends
    "model": (FORWARD_PARTS | {ATEN}, BACKWARD_PARTS | {"recompute", "projection"}, "'reference': asked for"),
    "packed": (FORWARD_PARTS, BACKWARD_PARTS, "'reference'"),
    "compiled": (FORWARD_PARTS, BACKWARD_PARTS, ""),  # in an operator as in an eager call
}


@pytest.fixture
def model_py(tmp_path):
    (tmp_path / "model_to_profile.py").write_text(MODEL)
    return tmp_path / "model_to_profile.py"


@pytest.mark.parametrize("inference", [False, True], ids=["training", "inference"])
@pytest.mark.parametrize("function", MODELS)
def test_a_model(function, inference, model_py, told):
    forward, backward, said = MODELS[function]
    backend = () if function == "model" else ("--backend", "reference")
    found = told("--module", f"{model_py}:{function}", *backend, *["--inference"] * inference)
    of_passes = {"forward": forward} if inference else {"forward": forward, "backward": backward}
    assert {in_pass: set(parts) for in_pass, parts in found.split.parts.items()} == of_passes
    assert found.kind == "cpu" and said in "".join(found.said) and found.split.rows["aten::addmm"].us > 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--module nowhere.py:make", "no Python file 'nowhere.py'"), ("--batch 3", "--batch, --hidden and --time"),
        ("--module {file}:five", "(module, inputs), got int"), ("--module {file}:model --layers 3", "module alone"),
        ("--module {file}:packed --device cuda", "no CUDA device"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(arguments, said, model_py, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        main(["profile", *arguments.format(file=model_py).split(), "--out", str(tmp_path / "out")])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and said in error and error.count("\n") == 1 and not (tmp_path / "out").exists()
