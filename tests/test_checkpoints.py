"""torch.utils.checkpoint: selective ones, which keep what some operators return, and the backend of a recompute.

Helpers and tolerances: tests/kit/modules.py.
"""

import functools
import gc
import threading
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import tritongru
from tests.kit.modules import assert_all_close, loss_of, ours_only, packed, pair, randn
from tritongru import ambient

aten, own = torch.ops.aten, torch.ops.tritongru
PRODUCTS = [aten.mm.default, aten.addmm.default, aten.bmm.default]


def save_all(context, operator, *args, **kwargs):
    return CheckpointPolicy.MUST_SAVE


KEEP = {"products": PRODUCTS, "our-operator": [own.layer_forward.default], "everything": save_all, "nothing": []}
OPTIONS = {
    "plain": {},
    "no-bias": {"bias": False},
    "two-layers-bidirectional": {"batch_first": True, "bidirectional": True, "num_layers": 2},
    "recompute": {"recompute": True},
    "packed": {"bidirectional": True},
}


def selectively(keep, run, *tensors):
    contexts = functools.partial(create_selective_checkpoint_contexts, keep)
    return checkpoint(run, *tensors, use_reentrant=False, context_fn=contexts)


@ours_only
@pytest.mark.parametrize("keep", KEEP.values(), ids=KEEP)
@pytest.mark.parametrize("options", OPTIONS.items(), ids=OPTIONS)
def test_gradients_of_a_selective_checkpoint(backend, keep, options, ran):
    """Whatever is kept, gradients are right; and the layer runs once more only where its own result is not kept."""
    name, options = options
    _, layer = pair(backend, 3, 5, **options)
    sequence = packed(3, 1, 2) if name == "packed" else None
    x = (randn(3, 2, 3) if sequence is None else sequence.data).requires_grad_()

    def call(data):
        output, h_n = layer(data if sequence is None else PackedSequence(data, *sequence[1:]))
        return loss_of(output, h_n)

    leaves = [x, *layer.parameters()]
    expected = torch.autograd.grad(call(x), leaves)
    ran.clear()
    assert_all_close(torch.autograd.grad(selectively(keep, call, x), leaves), expected)
    kept = keep is save_all or own.layer_forward.default in keep
    assert len(ran) == layer.num_layers * (1 if kept else 2)


@ours_only
def test_gradients_of_a_selective_checkpoint_over_cells_and_other_layers(backend):
    torch.manual_seed(0)
    cell, linear = tritongru.GRUCell(3, 5, backend=backend), nn.Linear(5, 5)
    x = randn(4, 2, 3).requires_grad_()

    def call(x):
        h = torch.zeros(2, 5)
        for each in x:
            h = linear(cell(each, h)).tanh()
        return h.square().sum()

    leaves = [x, *cell.parameters(), *linear.parameters()]
    expected = torch.autograd.grad(call(x), leaves)
    for keep in KEEP.values():
        assert_all_close(torch.autograd.grad(selectively(keep, call, x), leaves), expected)


# `use_backend`: a recompute runs the backend of its forward.

layers = tritongru.GRU(4, 4), tritongru.GRU(4, 4)


def plain(x):
    return layers[1](layers[0](x)[0])[0]


def with_a_block_inside(x):
    with tritongru.use_backend("step"):
        x = layers[0](x)[0]
    return layers[1](x)[0]


def with_the_choice_lifted(x):
    with tritongru.use_backend(None):
        x = layers[0](x)[0]
    return layers[1](x)[0]


def nested(x, use_reentrant=False):
    return checkpoint(plain, x.tanh(), use_reentrant=use_reentrant).tanh()


def nested_in_a_block(x, use_reentrant=False):
    with tritongru.use_backend("step"):
        x = checkpoint(plain, x.tanh(), use_reentrant=use_reentrant)
    return layers[0](x)[0]


REGIONS = [
    pytest.param(region, marks=pytest.mark.interpreted if "block" in region.__name__ else ())
    for region in (plain, with_a_block_inside, with_the_choice_lifted, nested, nested_in_a_block)
] + [
    pytest.param(functools.partial(nested, use_reentrant=True), id="reentrant-nested"),
    pytest.param(
        functools.partial(nested_in_a_block, use_reentrant=True), id="reentrant-nested-in-a-block",
        marks=pytest.mark.interpreted,
    ),
]  # fmt: skip


def block(name):
    return nullcontext() if name == "no block" else tritongru.use_backend(name)


def on_a_thread(call):
    failed = []

    def run():
        try:
            call()
        except Exception as error:
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # of a reentrant checkpoint in another one
@pytest.mark.parametrize("where", ["after the block", "another thread"])
@pytest.mark.parametrize(
    ("outside", "at_backward"),
    [
        ("reference", "no block"), ("reference", None), ("no block", "reference"),
        pytest.param("step", "reference", marks=pytest.mark.interpreted),
        pytest.param("reference", "step", marks=[pytest.mark.interpreted, pytest.mark.long]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["", "reentrant"])
@pytest.mark.parametrize("region", REGIONS)
def test_a_recompute_runs_the_backend_of_its_forward(region, use_reentrant, outside, at_backward, where, ran):
    def forward():
        x = randn(2, 2, 4).requires_grad_()
        return x, checkpoint(region, x, use_reentrant=use_reentrant)

    with block(outside):  # backward in forward's own block: nothing can be forgotten
        x, y = forward()
        ran.clear()
        y.sum().backward()
    expected, gradient = ran.copy(), x.grad

    def backward():
        with block(at_backward):
            y.sum().backward()

    with block(outside):
        x, y = forward()
        ran.clear()
        if where == "another thread":
            on_a_thread(backward)
    if where == "after the block":
        backward()
    assert ran == expected
    assert torch.equal(x.grad, gradient)


@ours_only
def test_every_backend_is_remembered_and_a_graph_may_be_kept(backend, ran):
    with tritongru.use_backend(backend):
        y = checkpoint(plain, randn(2, 2, 4).requires_grad_(), use_reentrant=False)
    ran.clear()
    y.sum().backward(retain_graph=True)
    y.sum().backward()
    assert ran == [backend] * 4


def test_cells_and_selective_checkpoints_are_remembered(ran):
    cell = tritongru.GRUCell(3, 5)
    x = randn(2, 3).requires_grad_()
    with tritongru.use_backend("reference"):
        loss = selectively([aten.addmm.default], lambda x: cell(x).sum(), x)
    with tritongru.use_backend("aten"):
        loss.backward()
    assert ran == ["reference"] * 2
    assert_all_close([x.grad], torch.autograd.grad(cell(x).sum(), [x]))


def test_a_region_is_forgotten_with_its_graph():
    gc.collect()
    before = len(ambient._at_the_start)
    with tritongru.use_backend("reference"):
        ys = [
            checkpoint(plain, randn(2, 2, 4).requires_grad_(), use_reentrant=use_reentrant)
            for use_reentrant in (False, True)
        ]
    assert len(ambient._at_the_start) == before + 2
    del ys
    gc.collect()
    assert len(ambient._at_the_start) == before


def test_a_call_in_no_checkpoint_looks_for_none(monkeypatch):
    walked = SimpleNamespace(_getframe=lambda *_: pytest.fail("the stack was walked"))
    monkeypatch.setattr(ambient, "sys", walked)
    layer = tritongru.GRU(3, 5)
    layer(randn(3, 2, 3))[0].sum().backward()
    with tritongru.use_backend("reference"):
        layer(randn(3, 2, 3))[0].sum().backward()
        with torch.no_grad():
            layer(randn(3, 2, 3))
