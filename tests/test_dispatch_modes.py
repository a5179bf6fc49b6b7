"""What a torch_dispatch mode sees of a layer, which is one operator each way, and what `FlopCounterMode` counts.

Helpers and tolerances: tests/kit/modules.py.
"""

import subprocess
import sys

import pytest
import torch
from functorch.compile import aot_function, nop
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import tritongru
from tests.kit.modules import assert_all_close, loss_of, ours_only, packed, pair, randn, states
from tests.kit.operators import Seen

FORWARD, BACKWARD = "tritongru.layer_forward.default", "tritongru.layer_backward.default"


def dense(layer):
    x = randn(2, 3, 3) if layer.batch_first else randn(3, 2, 3)
    return loss_of(*layer(x.requires_grad_()))


def of_packed(layer):
    return loss_of(*layer(packed(3, 1, 2)))


CALLS = {
    "dense": ({}, dense),
    "two-layers-bidirectional": ({"num_layers": 2, "bidirectional": True}, dense),
    "batch-first-no-bias": ({"batch_first": True, "bias": False}, dense),
    "recompute": ({"recompute": True}, dense),
    "packed": ({"bidirectional": True}, of_packed),
}
every_call = pytest.mark.parametrize(("options", "call"), CALLS.values(), ids=CALLS)


@ours_only
@every_call
def test_a_mode_sees_one_operator_each_way_and_nothing_inside_it(backend, options, call):
    _, layer = pair(backend, 3, 5, **options)
    weights = list(layer.parameters())
    expected = [loss := call(layer), *torch.autograd.grad(loss, weights)]
    with Seen() as outer, Seen() as inner:
        loss = call(layer)
        forward = len(inner.names)
        found = [loss, *torch.autograd.grad(loss, weights)]
    assert_all_close(found, expected)
    assert outer.names == inner.names
    assert inner.products() == [FORWARD] * layer.num_layers + [BACKWARD] * layer.num_layers
    assert FORWARD not in inner.names[forward:]


@ours_only
@every_call
def test_a_mode_that_is_on_in_one_pass_alone(backend, options, call):
    _, layer = pair(backend, 3, 5, **options)
    weights = list(layer.parameters())
    expected = torch.autograd.grad(call(layer), weights)
    loss = call(layer)
    with Seen() as seen:
        found = torch.autograd.grad(loss, weights)
    assert seen.products() == [BACKWARD] * layer.num_layers
    assert_all_close(found, expected)
    with Seen() as seen:
        loss = call(layer)
    assert seen.products() == [FORWARD] * layer.num_layers
    assert_all_close(torch.autograd.grad(loss, weights), expected)


@ours_only
def test_a_mode_sees_a_cell_as_one_operator(backend):
    cell = tritongru.GRUCell(3, 5, backend=backend)
    x = randn(2, 3).requires_grad_()
    expected = torch.autograd.grad(cell(x).square().sum(), [x, *cell.parameters()])
    with Seen() as seen:
        found = torch.autograd.grad(cell(x).square().sum(), [x, *cell.parameters()])
    assert seen.products() == [FORWARD, BACKWARD]
    assert_all_close(found, expected)


@ours_only
def test_under_a_mode_autocast_computes_in_its_dtype_and_second_derivatives_are_right(backend):
    _, layer = pair(backend, 3, 5)
    x = randn(3, 2, 3).requires_grad_()

    def call():
        with torch.autocast("cpu", torch.bfloat16):
            output, h_n = layer(x)
        assert output.dtype == torch.bfloat16
        (gradient,) = torch.autograd.grad(layer(x)[0].square().sum(), x, create_graph=True)
        return [output, h_n, gradient, *torch.autograd.grad(gradient.square().sum(), [x, *layer.parameters()])]

    expected = call()
    with Seen() as seen:
        found = call()
    assert FORWARD in seen.names
    assert all(torch.equal(f, e) for f, e in zip(found[:2], expected[:2], strict=True))
    assert_all_close(found[2:], expected[2:])


@ours_only
def test_debug_mode_sees_the_operators_too(backend):
    debug_mode = pytest.importorskip("torch.utils._debug_mode")
    _, layer = pair(backend, 3, 5)
    with debug_mode.DebugMode() as mode:
        dense(layer).backward()
    text = mode.debug_string()
    assert "tritongru::layer_forward" in text and "tritongru::layer_backward" in text and "mm" not in text


def test_by_default_on_the_cpu_a_mode_sees_what_it_sees_of_nn_gru(ran):
    seen = []
    for layer in pair(None, 3, 5):
        with Seen() as mode:
            dense(layer).backward()
        seen.append(mode.names)
    assert seen[0] == seen[1] and ran == []


@ours_only
def test_without_a_mode_no_operator_is_dispatched(backend):
    """An eager call does not pay for an operator, whose dispatch in Python costs the host more than a launch."""
    _, layer = pair(backend, 3, 5)
    with torch.profiler.profile() as profile:
        dense(layer).backward()
    names = {event.name for event in profile.events()}
    assert "aten::empty" in names and not [name for name in names if "tritongru::" in name]
    with torch.profiler.profile() as profile:
        x = randn(3, 2, 3).requires_grad_()
        torch.autograd.grad(loss_of(*layer(x)), x, create_graph=True)
    assert "tritongru::layer_backward" in {event.name for event in profile.events()}


# Floating-point operations.


def counted(call, *arguments):
    with FlopCounterMode(display=False) as counter:
        result = call(*arguments)
    return result, counter.get_total_flops()


def both_passes(layer, call):
    """Operations of forward and of backward."""
    layer.zero_grad()
    loss, forward = counted(call, layer)
    return forward, counted(loss.backward)[1]


def with_h_0(layer, sequence=None):
    h_0 = randn(states(layer), 3 if sequence else 2, 5, seed=3).requires_grad_()
    return loss_of(*layer(randn(4, 2, 3) if sequence is None else sequence, h_0))


COUNTED = {
    **CALLS,
    "packed-two-layers": ({"num_layers": 2, "bidirectional": True}, of_packed),
    "packed-h_0": ({"bidirectional": True}, lambda layer: with_h_0(layer, packed(4, 1, 2))),
    "h_0": ({"num_layers": 2}, with_h_0),
    "input-without-gradient": ({}, lambda layer: loss_of(*layer(randn(4, 2, 3)))),
    "h_n-alone": ({"bidirectional": True}, lambda layer: layer(randn(4, 2, 3))[1].sum()),
    "one-step": ({}, lambda layer: loss_of(*layer(randn(1, 2, 3)))),
}


@ours_only
@pytest.mark.parametrize(("options", "call"), COUNTED.values(), ids=COUNTED)
def test_flops_are_those_of_nn_gru(backend, options, call):
    theirs, ours = pair(backend, 3, 5, **{k: v for k, v in options.items() if k != "recompute"})
    ours.recompute = options.get("recompute", False)

    # What recompute computes again is a forward, as where a checkpoint computes it again.
    def again(m):
        return loss_of(*checkpoint(m, randn(3, 2, 3).requires_grad_(), use_reentrant=False))

    expected = both_passes(theirs, again if ours.recompute else call)
    assert both_passes(ours, call) == expected and min(expected) > 0


@pytest.mark.parametrize(
    "names", [["weight_ih_l0"], ["weight_hh_l0"], ["bias_hh_l0"], ["weight_ih_l0", "weight_hh_l0"]], ids=str
)
def test_flops_of_frozen_weights(names):
    theirs, ours = pair("reference", 3, 5)
    for layer in (theirs, ours):
        for name in names:
            layer.get_parameter(name).requires_grad_(False)
    assert both_passes(ours, dense) == both_passes(theirs, dense)


@ours_only
def test_flops_of_a_cell(backend):
    torch.manual_seed(0)
    cells = nn.GRUCell(3, 5), tritongru.GRUCell(3, 5, backend=backend)
    expected, found = (both_passes(cell, lambda c: c(randn(2, 3)).sum()) for cell in cells)
    assert found == expected and min(expected) > 0


@ours_only
def test_flops_of_a_graph(backend):
    """Forward before the counter is on, and in it; backward in it."""
    theirs, ours = pair(backend, 3, 5, num_layers=2)
    weights = list(ours.parameters())

    def call(x, hx, *weights):
        return tritongru.gru(x, hx, list(weights), True, 2, 0.0, True, False, False, backend=backend)

    graph = aot_function(call, fw_compiler=nop)
    given = randn(4, 2, 3), torch.zeros(2, 2, 5), *weights
    graph(*given)
    results, forward = counted(graph, *given)
    _, backward = counted(loss_of(*results).backward)
    assert (forward, backward) == both_passes(theirs, lambda layer: loss_of(*layer(randn(4, 2, 3))))


@ours_only
def test_flops_of_a_compiled_layer(backend):
    theirs, ours = pair(backend, 3, 5, num_layers=2)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(allow_rnn=True):
        loss = loss_of(*torch.compile(ours, backend="aot_eager", fullgraph=True)(randn(4, 2, 3)))
        _, found = counted(loss.backward)
    torch._dynamo.reset()
    assert found == both_passes(theirs, lambda layer: loss_of(*layer(randn(4, 2, 3))))[1]


FIRST_OF_ALL = """
import sys, torch, tritongru
layer = tritongru.GRU(3, 5, backend="reference")
assert not {"triton", "torch.utils.flop_counter"} & set(sys.modules)
from torch.utils.flop_counter import FlopCounterMode
with FlopCounterMode(display=False) as counter:
    layer(torch.randn(4, 2, 3))
assert counter.get_total_flops() == 2 * 8 * 15 * (3 + 5), counter.get_total_flops()
"""


def test_a_counter_that_is_imported_later_counts_the_first_call():
    subprocess.run([sys.executable, "-c", FIRST_OF_ALL], check=True)
