"""What surrounds a call: torch.utils.checkpoint, selective too, and the backend of its recompute;
torch.set_default_device. Tolerance: tests/kit/modules.py."""

import functools
import subprocess
import sys
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


@interpreted
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_recompute_asks_use_backend_again(use_reentrant, ran):
    """Another backend may have saved other tensors: PyTorch says so, or the gradients are right all the same."""
    layer, found = tritongru.GRU(4, 4), []
    for at_backward in ("reference", "step", "aten"):
        x = kit.randn(2, 2, 4).requires_grad_()
        with tritongru.use_backend("reference"):
            y = checkpoint(layer, x, use_reentrant=use_reentrant)[0]
        ran.clear()
        differs = not use_reentrant and at_backward == "aten"
        with tritongru.use_backend(at_backward), pytest.raises(RuntimeError) if differs else nullcontext():
            y.sum().backward()
            found.append(x.grad)
        assert at_backward == "aten" or ran[0] == at_backward
    for gradient in found[1:]:
        kit.assert_all_close([gradient], [found[0]])


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
