"""`python -m tritongru profile`: what the launches tell of themselves, and the command. test_trace.py reads traces.

The bytes of kernels/metadata.py are held against the addresses that the kernels load and store in the interpreter.
"""

from __future__ import annotations

import json
import timeit
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import tritongru
from tests.kit.plans import ShrunkenPlan, exchanging
from tritongru import parts
from tritongru.cli import main
from tritongru.tools.trace import ATEN, ELSEWHERE

# ---- what a launch tells


@dataclass
class Watched:
    """A launch, what it told, and the bytes at the addresses that it read and wrote."""

    name: str
    told: dict
    touched: dict = field(default_factory=dict)  # (loads or stores, element size): addresses

    @property
    def bytes(self) -> int:
        return sum(size * len(np.unique(np.concatenate(found))) for (_, size), found in self.touched.items())


@contextmanager
def watched(monkeypatch) -> Iterator[list[Watched]]:
    """The launches of the block. The status words, which waiting programs look at, are left out."""
    import triton.runtime.interpreter as interpreter

    from tritongru import status as status_words
    from tritongru.launch import runtime
    from tritongru.tools.emulator.memory import Memory

    launches: list[Watched] = []
    builder = interpreter.interpreter_builder
    status = status_words.status(torch.device("cpu"))
    words = [status.word.data_ptr(), status.report.data_ptr()]

    def noting(what, method, mask_at):
        def noted(ptrs, *rest):
            mask = np.broadcast_to(np.asarray(rest[mask_at].data, bool), ptrs.data.shape)
            addresses = np.unique(ptrs.data[mask])
            size = ptrs.get_element_ty().primitive_bitwidth // 8
            kept = addresses[~np.isin(addresses.astype(np.int64), words)]
            launches[-1].touched.setdefault((what, size), []).append(kept)
            return method(ptrs, *rest)

        return noted

    checked = Memory.checked

    def emulated(self, verb, addresses, itemsize):
        what, found = "stores" if verb == "stores" else "loads", np.unique(addresses)
        launches[-1].touched.setdefault((what, itemsize), []).append(found[~np.isin(found, words)])
        return checked(self, verb, addresses, itemsize)

    with monkeypatch.context() as patch, runtime.observe_counts(lambda *told: launches.append(Watched(*told))):
        # raising=False: an attribute of the one instance, before the method of its class
        patch.setattr(builder, "create_masked_load", noting("loads", builder.create_masked_load, 0), raising=False)
        patch.setattr(builder, "create_masked_store", noting("stores", builder.create_masked_store, 1), raising=False)
        patch.setattr(Memory, "checked", emulated)
        yield launches


def a_call(layer, lengths, grad_h_0: bool = True, cotangents: str = "random") -> None:
    """Forward and backward; `lengths` of one length are a dense batch."""
    dtype, D = layer.weight_hh_l0.dtype, 1 + layer.bidirectional
    sequences = [torch.randn(n, layer.input_size, dtype=dtype) for n in lengths]
    x = torch.stack(sequences, 1) if len(set(lengths)) == 1 else pack_sequence(sequences)
    output, h_n = layer(x, torch.randn(D, len(lengths), layer.hidden_size, dtype=dtype).requires_grad_(grad_h_0))
    output = output.data if isinstance(output, PackedSequence) else output
    if cotangents == "sum":
        output.sum().backward()
    else:
        torch.autograd.backward([output, h_n], [torch.randn_like(output), torch.randn_like(h_n)])


def assert_bytes(launches: list[Watched], shared_by_step_backward: int = 0) -> None:
    assert launches
    for launch in launches:
        shared = shared_by_step_backward if launch.name == "step_backward" else 0
        assert 0 <= launch.told["bytes"] - launch.bytes <= shared, launch.name


LENGTHS = {"dense": (3, 3), "one-step": (1, 1, 1), "packed": (4, 3, 3, 1)}
LAYERS = [
    *(
        dict(backend=backend, bidirectional=both, dtype=dtype)
        for backend in ("step", "sequence")
        for both in (False, True)
        for dtype in (torch.float32, torch.float16)
    ),
    dict(backend="sequence:exchange=0", bidirectional=True),
    dict(backend="sequence:exchange=0", bidirectional=True, bias=False),
]


@pytest.mark.interpreted
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("how", LAYERS, ids=lambda how: "-".join(map(str, how.values())))
def test_bytes_are_the_addresses_touched(how, lengths, monkeypatch):
    with watched(monkeypatch) as launches:
        a_call(tritongru.GRU(5, 11, **how), lengths, grad_h_0=how.get("bias", True))
    assert_bytes(launches)


@pytest.mark.interpreted
def test_bytes_of_many_programs_are_counted_once(h200_tiles, monkeypatch):
    with watched(monkeypatch) as launches:
        a_call(tritongru.GRU(5, 70, bias=False, backend="step"), (2,) * 20, grad_h_0=False)
    assert_bytes(launches)


@pytest.mark.interpreted
@pytest.mark.parametrize("lengths", [(3, 3), (1, 1)], ids=["three-steps", "one-step"])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["one-way", "bidirectional"])
@pytest.mark.parametrize("backend", ["step", "sequence"])
def test_bytes_where_the_gradient_of_the_output_is_one_element(backend, bidirectional, lengths, monkeypatch):
    layer = tritongru.GRU(5, 11, bidirectional=bidirectional, backend=backend)
    with watched(monkeypatch) as launches:
        a_call(layer, lengths, grad_h_0=False, cotangents="sum")
    assert_bytes(launches, shared_by_step_backward=4)  # its directions, and its two visits, may share the one element


@pytest.mark.interpreted
@pytest.mark.parametrize("together", [True, False], ids=["one-launch", "a-launch-each"])
@pytest.mark.parametrize("hidden", [16, 13], ids=["H16", "H13-padded"])
def test_bytes_of_programs_that_exchange(hidden, together, monkeypatch):
    layer = tritongru.GRU(5, hidden, bidirectional=True, backend="sequence")
    with exchanging(monkeypatch, ShrunkenPlan(together=together)), watched(monkeypatch) as launches:
        a_call(layer, (3, 2))
    assert [launch.name for launch in launches].count("sequence_forward") == 2 - together
    assert_bytes(launches)


@pytest.mark.interpreted
@pytest.mark.parametrize("want", [True, False], ids=["dh_0", "no-dh_0"])
@pytest.mark.parametrize("lengths", [(3, 3), (1, 1, 1), (4, 3, 3, 1)], ids=str)
@pytest.mark.parametrize("backend", ["step", "sequence"])
def test_flops_are_those_of_the_rows_that_run(backend, lengths, want, monkeypatch):
    from tritongru.launch import runtime

    I, H = 5, 11
    told: list = []
    with runtime.observe_counts(lambda name, counts: told.append((name, counts))):
        a_call(tritongru.GRU(I, H, backend=backend, dtype=torch.float16), lengths, grad_h_0=want)
    N, B = sum(lengths), len(lengths)
    fused = backend == "step" and max(lengths) == 1  # the kernel multiplies x too, and always gives dh_0
    forward = sum(counts["flops"] for name, counts in told if name.endswith("forward"))
    backward = sum(counts["flops"] for name, counts in told if name.endswith("backward"))
    assert forward == 2 * N * 3 * H * (H + I * fused)
    assert backward == 2 * (N if want or fused else N - B) * 3 * H * H
    assert all(counts["flops16"] == counts["flops"] for _, counts in told)


@pytest.mark.compiled
def test_a_launch_hook_is_told_at_every_launch():
    """Through Triton's own CompiledKernel.launch_metadata, at the first launch and at those that pass the JIT by."""
    import triton
    from triton.compiler.compiler import ASTSource

    from benchmarks.hostcost import without_gpu
    from tritongru.batch import Visits
    from tritongru.kernels import step as kernels
    from tritongru.launch import runtime, step
    from tritongru.launch.protocol import LayerCall, LayerWeights
    from tritongru.planning import describe

    T, B, I, H = 4, 2, 5, 16
    call = LayerCall(Visits(T, B), 1, H, "fp32", "tf32", describe("h200"), save_gates=True)
    weights = LayerWeights.of((torch.randn(3 * H, I), torch.randn(3 * H, H), torch.randn(3 * H), torch.randn(3 * H)), 1)
    hooked, told = [], []
    hook = triton.knobs.runtime.launch_enter_hook
    with without_gpu(kernels.step_forward) as stand_in:
        stand_in.src = ASTSource.__new__(ASTSource)
        stand_in.src.fn, stand_in.metadata, stand_in.hooked = kernels.step_forward, None, True

        def note(metadata) -> None:
            hooked.append(metadata.get())

        hook.add(note)
        try:
            with runtime.observe_counts(lambda name, counts: told.append(counts)):
                step.forward(call, torch.randn(T, B, I), torch.randn(1, B, H), weights)
        finally:
            hook.remove(note)
    assert len(hooked) == T
    assert [{key: found[key] for key in told[0]} for found in hooked] == told
    assert told[0]["name"] == "step_forward [B=2, H=16, D=1]"
    # what Proton takes of it as metrics: numbers under names of its own
    assert {key for key, value in told[0].items() if not isinstance(value, str)} == {"flops", "flops32", "bytes"}


# ---- parts


def test_outside_of_profiling_a_part_is_no_range_and_costs_next_to_nothing(monkeypatch):
    def plain(a):
        return a

    marked = parts.part("recurrence")(plain)

    def refuse(name):
        raise AssertionError(f"a range {name!r} outside of profiling()")

    with monkeypatch.context() as patch:
        patch.setattr(parts, "record_function", refuse)
        assert marked(1) == 1
        with pytest.raises(AssertionError, match="tritongru: recurrence"), parts.profiling():
            marked(1)
        assert marked(1) == 1
    cost = min(timeit.repeat(lambda: marked(1), number=2000, repeat=20)) / 2000
    assert cost < 1e-6, f"{cost * 1e9:.0f} ns for a part that nobody looks at"


# ---- the command


def profile(*arguments: str) -> int:
    return main(["profile", *arguments])


SHAPE = ("--batch", "2", "--hidden", "6", "--time", "3")


def told(capsys, tmp_path, *arguments: str) -> dict:
    assert profile(*arguments, "--device", "cpu", "--out", str(tmp_path), "--json") == 0
    found = json.loads(capsys.readouterr().out)
    trace = json.loads((tmp_path / "trace.json").read_text())
    assert trace["traceEvents"] and [path.name for path in tmp_path.glob("trace*")] == ["trace.json"]
    found["by part"] = {(part["pass_"], part["name"]): part for part in found["parts"]}
    for pass_, wall in found["wall_us"].items():
        shares = [part["us"] for part in found["parts"] if part["pass_"] == pass_]
        assert len(found["parts"]) > 1 and 0 < sum(shares) < 2 * wall and min(shares) >= 0
    return found


@pytest.mark.parametrize("backend", [None, "reference"])
def test_the_cpus_own_numbers(backend, tmp_path, capsys):
    found = told(capsys, tmp_path, *SHAPE, *(("--backend", backend) if backend else ()))
    forward = ["recurrence", "projection"] if backend else [ATEN]
    backward = ["gradient products", "recurrence"] if backend else [ATEN]
    expected = {("forward", name) for name in forward} | {("backward", name) for name in backward}
    assert set(found["by part"]) == expected | {("forward", ELSEWHERE), ("backward", ELSEWHERE)}
    assert any(row["name"] == "aten::addmm" and row["us"] > 0 for row in found["rows"])
    assert (backend or "aten") in found["backends"][0]


def test_recompute_is_a_part_of_its_own(tmp_path, capsys):
    (tmp_path / "m.py").write_text(
        "import tritongru\ndef make():\n    return tritongru.GRU(3, 4, backend='reference', recompute=True)\n"
    )
    found = told(capsys, tmp_path, "--module", f"{tmp_path / 'm.py'}:make", "--batch", "2", "--time", "3")
    assert {("backward", "recompute"), ("backward", "projection")} <= set(found["by part"])


@pytest.mark.interpreted
@pytest.mark.parametrize("backend", ["step", "sequence"])
def test_interpreted_launches_are_listed_without_times(backend, tmp_path, capsys):
    found = told(capsys, tmp_path, *SHAPE, "--backend", backend)
    launches = 3 if backend == "step" else 1
    assert found["by part"]["forward", "recurrence"]["launches"] == launches
    rows = {row["name"]: row for row in found["rows"]}
    assert set(rows) == {f"{backend}_forward", f"{backend}_backward"}
    row = rows[f"{backend}_forward"]
    assert row["count"] == launches and row["bytes"] > 0 and row["flops"] == 2 * 6 * 3 * 6 * 6 and row["us"] is None
    assert "interpreter" in found["times"]


@pytest.mark.interpreted
def test_what_is_printed_of_the_interpreter_has_no_rate(tmp_path, capsys):
    assert profile(*SHAPE, "--backend", "step", "--inference", "--device", "cpu", "--out", str(tmp_path)) == 0
    said = capsys.readouterr().out
    assert "step_forward" in said and "mean nothing" in said and "GB/s" not in said and "backward" not in said


MODEL = """
import torch, tritongru
from torch import nn

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(10, 4)
        self.ours = tritongru.GRU(4, 6, batch_first=True, backend="reference")
        self.theirs = nn.GRU(6, 5, batch_first=True)
        self.cell = tritongru.GRUCell(5, 5)
        self.head = nn.Linear(5, 10)

    def forward(self, ids, scale=1.0):
        h = self.theirs(self.ours(self.embedding(ids))[0])[0]
        return {"logits": self.head(self.cell(h[:, -1])) * scale, "ids": ids}

def model():
    return Model(), (torch.randint(0, 10, (2, 4)), 2.0)

def one_input():
    return Model(), torch.randint(0, 10, (2, 4))

def compiled():
    return torch.compile(nn.Sequential(gru()), backend="eager"), torch.randn(2, 1, 3)

class Transformed(nn.Sequential):
    def forward(self, x):
        return torch.func.vjp(lambda x: self[0](x)[0], x)[0]

def transformed():
    return Transformed(gru()), torch.randn(2, 1, 3)

def packed():
    return tritongru.GRU(3, 4), nn.utils.rnn.pack_sequence([torch.randn(2, 3), torch.randn(1, 3)])

def raises():
    raise ValueError("no weights\\nhere")

def five():
    return 5

def gru():
    return tritongru.GRU(3, 4)

def linear():
    return nn.Linear(2, 2)

def frozen():
    return gru().requires_grad_(False), torch.randn(2, 1, 3)

def wrong_input():
    return gru(), torch.randn(2, 1, 7)
"""


@pytest.fixture
def model_py(tmp_path):
    path = tmp_path / "model_to_profile.py"
    path.write_text(MODEL)
    return path


@pytest.mark.parametrize("function", ["model", "one_input"])
def test_a_model_of_several_layers(function, model_py, tmp_path, capsys):
    found = told(capsys, tmp_path, "--module", f"{model_py}:{function}")
    assert {name for _, name in found["by part"]} == {"projection", "recurrence", "gradient products", ATEN, ELSEWHERE}
    assert [line.split(" ")[0] for line in found["backends"]] == ["ours", "theirs", "cell"]


def test_packed_inputs_and_inference(model_py, tmp_path, capsys):
    found = told(capsys, tmp_path, "--module", f"{model_py}:packed", "--inference", "--backend", "reference")
    assert set(found["wall_us"]) == {"forward"} and ("forward", "recurrence") in found["by part"]


def test_a_backend_of_which_nothing_ran_is_said(model_py, tmp_path, capsys):
    found = told(capsys, tmp_path, "--module", f"{model_py}:transformed", "--backend", "reference")
    assert "reference" in found["backends"][0] and "nothing of backend 'reference' ran" in found["notes"][0]
    assert found["by part"]["forward", ATEN]["us"] > 0


def test_a_compiled_model_s_parts_are_told_apart(model_py, tmp_path, capsys):
    """In an operator as in an eager call."""
    found = told(capsys, tmp_path, "--module", f"{model_py}:compiled", "--backend", "reference")
    assert found["notes"] == []
    assert found["by part"]["forward", "recurrence"]["us"] > 0 and found["by part"]["backward", "recurrence"]["us"] > 0


@pytest.mark.parametrize(
    ("of_module", "more", "said"),
    [
        ("{file}", (), "file.py:function"),
        ("{file}:", (), "file.py:function"),
        ("nowhere.py:make", (), "no file 'nowhere.py'"),
        ("{file}:nothing", (), "no function 'nothing'"),
        ("{file}:raises", (), "raised ValueError: no weights"),
        ("{file}:five", (), "got int"),
        ("{file}:linear", (), "without inputs"),
        ("{file}:gru", (), "--batch and --time"),
        ("{file}:frozen", (), "--inference"),
        ("{file}:wrong_input", (), "calling the model raised RuntimeError"),
        ("{file}:packed", ("--device", "cuda"), "no CUDA device"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_bad_input_is_one_line(of_module, more, said, model_py, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert profile("--module", of_module.format(file=model_py), "--out", str(tmp_path / "out"), *more) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments",
    [("--batch", "3"), ("--module", "a.py:b", "--hidden", "3"), ("--batch", "0", "--hidden", "1", "--time", "1")],
    ids=" ".join,
)
def test_bad_options_are_a_usage_error(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        profile(*arguments)
    assert stopped.value.code == 2 and "error:" in capsys.readouterr().err
