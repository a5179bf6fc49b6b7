"""torch.set_default_device says where the user's tensors go, never where ours do: those follow the input.

"meta" stands for any other device than the layer's: what is made there has no values, and mixes with nothing.
"""

import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence

import tritongru
from tritongru import batch, cli, demo
from tritongru.tools import check

BACKENDS = [
    "aten", "reference", *(pytest.param(name, marks=pytest.mark.interpreted) for name in ("step", "sequence"))
]  # fmt: skip
FORMS = {
    "dense": check.Case(T=4, B=3, I=3, H=5),
    "batch-first-bidirectional": check.Case(T=4, B=3, I=3, H=5, bidirectional=True, batch_first=True),
    "packed": check.Case(I=3, H=5, lengths=(2, 4, 3)),
    "packed-bidirectional-recompute": check.Case(I=3, H=5, bidirectional=True, lengths=(2, 4, 3), recompute=True),
    "one-step": check.Case(T=1, B=3, I=3, H=5),
}


@contextmanager
def elsewhere():
    torch.set_default_device("meta")
    batch.kept.clear()  # a packed batch's tables that another test has made
    try:
        yield
    finally:
        torch.set_default_device(None)


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), device="cpu")


def trained(layer, x, h_0, again=False):
    """Output, h_n, and every gradient; with `again` those of the gradients' squares, through double backward."""
    output, h_n = layer(x, h_0)
    output = output.data if isinstance(output, torch.nn.utils.rnn.PackedSequence) else output
    parameters = list(layer.parameters())
    gradients = torch.autograd.grad(output.square().sum() + h_n.sum(), parameters, create_graph=again)
    if again:
        gradients += torch.autograd.grad(sum(g.square().sum() for g in gradients), parameters)
    return [output, h_n, *gradients]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("again", [False, True], ids=["backward", "double-backward"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_layer(backend, again, form):
    """Zeros of its own for h_0 and a given h_0."""
    case = FORMS[form]
    T, B, D = case.sizes
    layer = tritongru.GRU(
        case.I, case.H, batch_first=case.batch_first, bidirectional=case.bidirectional, backend=backend,
        recompute=case.recompute,
    )  # fmt: skip
    x = drawn(B, T, case.I) if case.batch_first else drawn(T, B, case.I)
    if case.lengths:
        x = pack_padded_sequence(x, torch.tensor(case.lengths), enforce_sorted=False)
    for h_0 in (None, drawn(D, B, case.H, seed=1)):
        expected = trained(layer, x, h_0, again)
        with elsewhere():
            found = trained(layer, x, h_0, again)
        assert all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_cell(backend):
    cell, x = tritongru.GRUCell(3, 5, backend=backend), drawn(2, 3)
    for h in (None, drawn(2, 5, seed=1)):
        expected = torch.autograd.grad(cell(x, h).square().sum(), list(cell.parameters()))
        with elsewhere():
            found = torch.autograd.grad(cell(x, h).square().sum(), list(cell.parameters()))
        assert all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_gates_and_plan(packed):
    layer, x = tritongru.GRU(3, 5, bidirectional=True), drawn(4, 3, 3)
    if packed:
        x = pack_padded_sequence(x, torch.tensor([2, 4, 3]), enforce_sorted=False)
    expected, plan = tritongru.gates(layer, x), tritongru.plan(layer, x, "h200")
    with elsewhere():
        found = tritongru.gates(layer, x)
        assert tritongru.plan(layer, x, "h200") == plan
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("case", [check.Case(), check.Case(lengths=(2, 3))], ids=["dense", "packed"])
def test_check(case):
    expected = check.measure(case, "reference", torch.float32, torch.device("cpu"), draws=1)
    with elsewhere():
        assert check.measure(case, "reference", torch.float32, torch.device("cpu"), draws=1) == expected


@pytest.mark.parametrize("made", ["model", "gru"])
def test_profile_of_a_module_whose_file_sets_it(made, tmp_path):
    """With its inputs, and of a GRU whose input is drawn."""
    model = tmp_path / "model.py"
    inputs = {"model": ", torch.ones(5, 2, 8, device='cpu')", "gru": ""}[made]
    model.write_text(
        "import torch, tritongru\n"
        "torch.set_default_device('meta')\n"
        f"def make(): return tritongru.GRU(8, 16, device='cpu'){inputs}\n"
    )
    command = ["-m", "tritongru", "profile", "--module", f"{model}:make", "--device", "cpu", "--out", str(tmp_path)]
    if made == "gru":
        command += ["--batch", "2", "--time", "5"]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("command", ["check", "demo"])
def test_the_other_commands_work_on_the_cpu(command, monkeypatch):
    found = []
    monkeypatch.setattr(check, "main", lambda: found.append(torch.ones(1).device.type) or 0)
    monkeypatch.setattr(demo, "main", lambda arguments: found.append(torch.ones(1).device.type) or 0)
    with elsewhere():
        assert cli.main([command]) == 0
    assert found == ["cpu"]
