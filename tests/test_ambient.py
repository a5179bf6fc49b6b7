"""What surrounds a call: torch.utils.checkpoint, selective too, and the backend that its recompute runs;
torch.set_default_device; mixed precision with a scaler; other processes, data parallel. Tolerance:
tests/kit/modules.py."""

import functools
import gc
import hashlib
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import tritongru
from tests.kit import inside
from tests.kit import modules as kit
from tritongru.tools import check

aten, own = torch.ops.aten, torch.ops.tritongru
ROOT = Path(__file__).parents[1]


KEEP = {
    "products": [aten.mm.default, aten.addmm.default, aten.bmm.default],
    "our-operator": [own.layer_forward.default],
    "everything": lambda *_, **__: CheckpointPolicy.MUST_SAVE,
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
    kept = callable(keep) or own.layer_forward.default in (keep or ())
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


BLOCKS = [("reference", "no block"), ("reference", None), ("no block", "reference"), ("step", "reference")]
BLOCKS.append(pytest.param("reference", "step", marks=pytest.mark.long))


@pytest.mark.interpreted
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # of a reentrant checkpoint in another one
@pytest.mark.parametrize("where", ["after the block", "another thread"])
@pytest.mark.parametrize(("outside", "at_backward"), BLOCKS)
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["", "reentrant"])
@kit.table("region", REGIONS)
def test_a_recompute_runs_the_backend_of_its_forward(region, use_reentrant, outside, at_backward, where, ran):
    def forward():
        ran.clear()
        x = kit.randn(2, 2, 4).requires_grad_()
        y = checkpoint(region, x, use_reentrant=use_reentrant)
        assert region is not with_a_block_inside or ran == ["step", *{outside} - {"no block"}]  # it ends there
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


@pytest.mark.parametrize("case", [check.Case(), check.Case(lengths=(2, 3))], ids=["dense", "packed"])
def test_check_and_plan_with_a_default_device_elsewhere(case):
    """It says where the user's tensors go, never where ours do. Of calls and gates: test_drop_in.py, test_gates.py."""

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
    subprocess.run([sys.executable, *command], check=True)


@kit.ours_only
def test_a_scaler_skips_an_overflow_as_with_nn_gru(backend):
    scales = []
    for layer in kit.PLAIN.pair(backend):
        optimiser, scaler = torch.optim.SGD(layer.parameters(), lr=0.1), torch.amp.GradScaler("cpu", init_scale=1024.0)
        for size in (1.0, float("inf"), 1.0):
            before = [p.detach().clone() for p in layer.parameters()]
            optimiser.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                scaler.scale(size * kit.loss_of(*layer(kit.randn(3, 2, 3)))).backward()
            scaler.step(optimiser)
            scaler.update()
            scales.append(scaler.get_scale())
            moved = [not torch.equal(p, b) for p, b in zip(layer.parameters(), before, strict=True)]
            assert all(moved) if size == 1.0 else not any(moved)
    assert scales == [1024.0, 512.0, 512.0] * 2


def digest(backend):
    every = [t for form in kit.FORMS.values() for t in form.results(form.pair(backend)[1]).values()]
    return hashlib.sha256(b"".join(t.numpy().tobytes() for t in every)).hexdigest()


@pytest.mark.interpreted
def test_another_process_has_the_same_bits():
    names = ("reference", "step", "sequence")
    code = f"from tests.test_ambient import digest; print(*map(digest, {names}))"
    how = {"cwd": ROOT, "env": os.environ | {"PYTHONHASHSEED": "7"}}
    assert subprocess.check_output([sys.executable, "-c", code], text=True, **how).split() == [*map(digest, names)]


def test_nothing_is_tuned_by_timing():
    sources = [*(ROOT / "kernels").rglob("*.py"), *(ROOT / "tritongru").rglob("*.py")]
    assert len(sources) > 20
    assert [path for path in sources if re.search(r"\b(autotune\(|do_bench)", path.read_text())] == []


class Model(nn.Module):
    def __init__(self, backend):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.head = tritongru.GRU(3, 5, 2, backend=backend), nn.Linear(5, 2)
        self.unused = tritongru.GRU(2, 2, backend=backend)

    def forward(self, x):
        return self.head(self.layer(x)[0][-1])


OPTIONS = [{}, {"static_graph": True}, {"find_unused_parameters": True}]


def gradients(backend, options, rows, distributed=True):
    """After two calls; those of the first are kept back where they may be, and the second adds to them."""
    model = Model(backend)
    if "find_unused_parameters" not in options:
        del model.unused
    wrapped = DistributedDataParallel(model, **options) if distributed else model
    for seed in (2, 3):
        with wrapped.no_sync() if distributed and seed == 2 and not options else nullcontext():
            wrapped(kit.randn(6, 4, 3, seed=seed)[:, rows]).square().sum().backward()
    return [p.grad for p in model.parameters()]


def of_a_rank(rank, store, backends):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    rows = slice(2 * rank, 2 * rank + 2)
    found = [gradients(backend, options, rows) for backend in backends for options in OPTIONS]
    if rank == 0:
        torch.save(found, f"{store}.gradients")
    dist.barrier()
    os._exit(0)  # gloo's destructor aborts in one run of five: "terminate called without an active exception"


@pytest.mark.interpreted
def test_two_processes_have_the_gradients_of_one(tmp_path):
    """DistributedDataParallel over gloo: the mean over the ranks is half the gradient of the sum over all rows."""
    backends, store = ["aten", "reference", "step", "sequence"], tmp_path / "store"
    multiprocessing.spawn(of_a_rank, (str(store), backends), nprocs=2)
    found = iter(torch.load(f"{store}.gradients"))
    for backend in backends:
        for options in OPTIONS:
            expected = gradients(backend, options, slice(4), distributed=False)
            kit.assert_all_close(next(found), [None if g is None else g / 2 for g in expected])
