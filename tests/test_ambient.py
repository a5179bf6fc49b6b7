"""What surrounds a call: torch.utils.checkpoint, selective too, and the backend that its recompute runs;
torch.set_default_device. Tolerance: tests/kit/modules.py."""

import functools
import gc
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import tritongru
from tests.kit import inside
from tests.kit import modules as kit
from tritongru.tools import check

aten, own = torch.ops.aten, torch.ops.tritongru
interpreted = pytest.mark.interpreted


def save_all(context, operator, *args, **kwargs):
    return CheckpointPolicy.MUST_SAVE


KEEP = {
    "products": [aten.mm.default, aten.addmm.default, aten.bmm.default],
    "our-operator": [own.layer_forward.default],
    "everything": save_all,
    "nothing": [],
    "nothing, and nobody is asked": None,
}


def selectively(keep, run, *tensors):
    policy = {} if keep is None else {"context_fn": functools.partial(create_selective_checkpoint_contexts, keep)}
    return checkpoint(functools.partial(run, *tensors), use_reentrant=False, **policy)


FORMS = kit.some_forms("two-layers-bidirectional", "recompute-batch-first-bidirectional", "packed", "padded", "cell")


@kit.ours_only
@kit.table("keep", KEEP)
@kit.table("form", FORMS)
def test_gradients_of_a_selective_checkpoint(backend, keep, form, ran):
    """Whatever is kept, gradients are right; and the layer runs once more only where its own result is not kept."""
    _, layer = form.pair(backend)
    found = []
    for run in (layer, lambda *given, **how: selectively(keep, functools.partial(layer, **how), *given)):
        ran.clear()
        found.append(form.results(run, of=layer))
    kit.assert_same(*found)
    kept = keep is save_all or own.layer_forward.default in (keep or ())
    assert len(ran) == getattr(layer, "num_layers", 1) * (1 if kept else 2)


layers = tritongru.GRU(4, 4), tritongru.GRU(4, 4)


def plain(x):
    return layers[1](layers[0](x)[0])[0]


def with_a_block_inside(x, name="step"):
    with tritongru.use_backend(name):
        x = layers[0](x)[0]
    return layers[1](x)[0]


def nested(x, use_reentrant=False):
    return checkpoint(plain, x.tanh(), use_reentrant=use_reentrant).tanh()


def nested_in_a_block(x, use_reentrant=False):
    with tritongru.use_backend("step"):
        x = nested(x, use_reentrant)
    return layers[0](x)[0]


REGIONS = {
    "plain": plain,
    "with-a-block-inside": with_a_block_inside,
    "with-the-choice-lifted": functools.partial(with_a_block_inside, name=None),
    "nested": nested,
    "nested-in-a-block": nested_in_a_block,
    "reentrant-nested": functools.partial(nested, use_reentrant=True),
    "reentrant-nested-in-a-block": functools.partial(nested_in_a_block, use_reentrant=True),
}


def block(name):
    return nullcontext() if name == "no block" else tritongru.use_backend(name)


LONG_WAY = pytest.param("reference", "step", marks=pytest.mark.long)


@interpreted
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # of a reentrant checkpoint in another one
@pytest.mark.parametrize("where", ["after the block", "another thread"])
@pytest.mark.parametrize(
    ("outside", "at_backward"),
    [("reference", "no block"), ("reference", None), ("no block", "reference"), ("step", "reference"), LONG_WAY],
)
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["", "reentrant"])
@kit.table("region", REGIONS)
def test_a_recompute_runs_the_backend_of_its_forward(region, use_reentrant, outside, at_backward, where, ran):
    def forward():
        x = kit.randn(2, 2, 4).requires_grad_()
        y = checkpoint(region, x, use_reentrant=use_reentrant)
        ran.clear()
        return x, y

    def backward():
        with block(at_backward):
            y.sum().backward()

    with block(outside):  # backward in forward's own block: nothing can be forgotten
        x, y = forward()
        y.sum().backward()
    expected, gradient = ran.copy(), x.grad
    with block(outside):
        x, y = forward()
        if where == "another thread":
            with ThreadPoolExecutor(1) as pool:
                pool.submit(backward).result()
    if where == "after the block":
        backward()
    assert ran == expected
    assert torch.equal(x.grad, gradient)


@interpreted
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_block_inside_a_region_ends_there(use_reentrant, ran):
    with tritongru.use_backend("reference"):
        checkpoint(with_a_block_inside, kit.randn(2, 2, 4).requires_grad_(), use_reentrant=use_reentrant)
    assert ran == ["step", "reference"]


def test_cells_selective_checkpoints_and_graphs_that_are_kept_are_remembered(ran):
    cell = tritongru.GRUCell(3, 5)
    x = kit.randn(2, 3).requires_grad_()
    with tritongru.use_backend("reference"):
        loss = selectively([aten.addmm.default], lambda x: cell(x).sum(), x)
    with tritongru.use_backend("aten"):
        loss.backward(retain_graph=True)
        loss.backward()
    assert ran == ["reference"] * 3
    kit.assert_all_close([x.grad / 2], torch.autograd.grad(cell(x).sum(), [x]))


def test_a_region_is_forgotten_with_its_graph():
    gc.collect()
    before = inside.checkpoints_remembered()
    with tritongru.use_backend("reference"):
        ys = [checkpoint(plain, kit.randn(2, 2, 4).requires_grad_(), use_reentrant=kind) for kind in (False, True)]
    assert inside.checkpoints_remembered() == before + 2
    del ys
    gc.collect()
    assert inside.checkpoints_remembered() == before


def test_a_call_in_no_checkpoint_looks_for_none(monkeypatch):
    inside.without_walking_the_stack(monkeypatch)
    layer = tritongru.GRU(3, 5)
    layer(kit.randn(3, 2, 3))[0].sum().backward()
    with tritongru.use_backend("reference"):
        layer(kit.randn(3, 2, 3))[0].sum().backward()
        with torch.no_grad():
            layer(kit.randn(3, 2, 3))


# torch.set_default_device says where the user's tensors go, never where ours do: those follow the input. Of calls
# and of gates: test_drop_in.py, test_gates.py.


@pytest.mark.parametrize("case", [check.Case(), check.Case(lengths=(2, 3))], ids=["dense", "packed"])
def test_check_and_plan_with_a_default_device_elsewhere(case):
    def found():
        figures = check.measure(case, "reference", torch.float32, torch.device("cpu"), draws=1)
        return figures, tritongru.plan(layer, x, "h200")

    layer, x = tritongru.GRU(3, 5, bidirectional=True), kit.FORMS["packed" if case.lengths else "plain"].given()[0]
    expected = found()
    with inside.default_device_elsewhere():
        assert found() == expected


def test_profile_of_a_module_whose_file_sets_the_default_device(tmp_path):
    model = tmp_path / "model.py"
    model.write_text(
        "import torch, tritongru\n"
        "torch.set_default_device('meta')\n"
        "def make(): return tritongru.GRU(8, 16, device='cpu'), torch.ones(5, 2, 8, device='cpu')\n"
    )
    command = ["-m", "tritongru", "profile", "--module", f"{model}:make", "--device", "cpu", "--out", str(tmp_path)]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
