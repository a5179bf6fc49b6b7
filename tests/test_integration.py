"""The layer among the rest of PyTorch: weights that change, autograd's corners, autocast, copies, transforms,
exporters, precision switches, and the choice of a backend.

Values in float32 agree within 32 * eps * sqrt(K) times the larger of 1 and the largest expected element, where
K = I + H + T * B bounds the length of every product behind an output or a gradient; those under autocast to bfloat16
within 4 * eps(bfloat16) times the same, against float32: three roundings of half an eps on the way (input, weight,
result) and the recurrence's passing on of earlier ones.
"""

import copy
import io
import logging
import math
import pickle
import threading
from types import SimpleNamespace

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import tritongru
from tests.kit.modules import (
    BACKENDS,
    assert_all_close,
    assert_close,
    both,
    loss_of,
    ours_only,
    packed,
    pair,
    randn,
    states,
    trained,
)
from tests.kit.operators import calls
from tritongru import functional, registry
from tritongru.products import products, rnn_precision


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


@pytest.fixture
def messages(caplog):
    """caplog in a process in which nothing has been logged yet."""
    registry.log_once.cache_clear()
    caplog.set_level(logging.INFO, logger="tritongru")
    yield caplog
    registry.log_once.cache_clear()


# Weights that change between two calls. The first call may leave nothing behind that the second one believes.


class Halved(nn.Module):
    def forward(self, weight):
        return weight / 2


def replaced(old, scale=0.5):
    return nn.Parameter(old.detach() * scale + 0.1)


def to_and_back(module, x):
    module.double()
    module.float()
    with torch.no_grad():
        module.weight_hh_l0.mul_(2)


def optimiser_step(module, x):
    optimiser = torch.optim.SGD(module.parameters(), lr=0.1)
    module(x)[0].sum().backward()
    optimiser.step()


def tied(module, x):
    module.weight_hh_l1 = module.weight_hh_l0
    module.bias_hh_l1 = module.bias_ih_l0


def load_assigned(module, x):
    module.load_state_dict({n: p * 0.5 for n, p in module.state_dict().items()}, assign=True)


def load_copied(module, x):
    module.load_state_dict({n: p * 0.5 for n, p in module.state_dict().items()})


def frozen_then_swapped(module, x):
    module.weight_ih_l0 = nn.Parameter(module.weight_ih_l0.detach() * 2, requires_grad=True)
    del module.bias_ih_l1
    module.register_parameter("bias_ih_l1", nn.Parameter(torch.ones(15)))


CHANGES = {
    "to": to_and_back,
    "setattr": lambda m, x: setattr(m, "weight_hh_l0", replaced(m.weight_hh_l0)),
    "setattr-bias": lambda m, x: setattr(m, "bias_ih_l1", replaced(m.bias_ih_l1)),
    "delete-and-register": frozen_then_swapped,
    "data-mul_": lambda m, x: m.weight_hh_l0.data.mul_(0.5),
    "data-assigned": lambda m, x: setattr(m.weight_ih_l1, "data", m.weight_ih_l1.data * 0.5),
    "data-of-all-assigned": lambda m, x: [setattr(p, "data", p.data * 0.5) for p in m.parameters()],
    "data-not-contiguous": lambda m, x: [
        setattr(p, "data", p.data.t().clone().t() * 0.5) for p in m.all_weights[0][:2]
    ],
    "no_grad-copy_": lambda m, x: torch.no_grad()(m.weight_hh_l1.copy_)(m.weight_hh_l1 * 0.5),
    "numpy-view": lambda m, x: m.weight_hh_l0.detach().numpy().__imul__(0.5),
    "load_state_dict": load_copied,
    "load_state_dict-assign": load_assigned,
    "optimiser": optimiser_step,
    "vector_to_parameters": lambda m, x: nn.utils.vector_to_parameters(
        nn.utils.parameters_to_vector(m.parameters()) * 0.5, m.parameters()
    ),
    "tied": tied,
    "parametrization": lambda m, x: parametrize.register_parametrization(m, "weight_hh_l0", Halved()),
    "parametrized-weight_norm": lambda m, x: parametrizations.weight_norm(
        m, "weight_hh_l0"
    ).parametrizations.weight_hh_l0.original0.data.mul_(2),
    "spectral_norm": lambda m, x: parametrizations.spectral_norm(m.eval(), "weight_hh_l0"),
    "weight_norm": lambda m, x: nn.utils.weight_norm(m, "weight_hh_l0").weight_hh_l0_g.data.mul_(2),
    "prune": lambda m, x: prune.l1_unstructured(m, "weight_hh_l0", 0.5),
    "prune-removed": lambda m, x: prune.remove(prune.l1_unstructured(m, "weight_ih_l1", 0.5), "weight_ih_l1"),
    "reset_parameters": lambda m, x: (torch.manual_seed(11), m.reset_parameters()),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_the_next_call_sees_changed_weights(backend, change):
    theirs, ours = pair(backend, 3, 5, num_layers=2)
    x = randn(2, 2, 3)
    before = ours(x)[0].detach()
    for module in (theirs, ours):
        torch.manual_seed(4)
        change(module, x)
    after = both(theirs, ours, lambda module: trained(module, x))[0]
    assert not torch.allclose(before, after), "the change changed nothing"


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_removed_parametrization_leaves_the_plain_weight(backend):
    theirs, ours = pair(backend, 3, 5)
    for module in (theirs, ours):
        parametrize.register_parametrization(module, "weight_hh_l0", Halved())
        module(randn(3, 2, 3))
        parametrize.remove_parametrizations(module, "weight_hh_l0")
    both(theirs, ours, lambda module: trained(module, randn(3, 2, 3)))


@pytest.mark.parametrize("plain", [True, False], ids=["tensors", "parameters"])
def test_functional_call_uses_its_weights_and_leaves_the_module_s(backend, plain):
    theirs, ours = pair(backend, 3, 5, num_layers=2)
    x = randn(3, 2, 3)
    own = ours(x)[0].detach()

    def call(module):
        weights = {n: (p.detach() * 0.5).requires_grad_() for n, p in module.named_parameters()}
        weights = weights if plain else {n: nn.Parameter(p.detach()) for n, p in weights.items()}
        output, h_n = torch.func.functional_call(module, weights, (x,))
        return [output, h_n, *torch.autograd.grad(loss_of(output, h_n), list(weights.values()))]

    assert not torch.allclose(both(theirs, ours, call)[0], own)
    assert torch.equal(ours(x)[0], own)


def test_tied_weights_gather_both_gradients(backend):
    theirs, ours = pair(backend, 5, 5, num_layers=2)
    for module in (theirs, ours):
        module.weight_hh_l1 = module.weight_hh_l0
        module.weight_ih_l1 = module.weight_ih_l0
    assert len(list(ours.parameters())) == 6
    both(theirs, ours, lambda module: trained(module, randn(3, 2, 5)))


@pytest.mark.parametrize("moved", ["weights", "input", "h_0", "everything"])
def test_unaligned_and_non_contiguous_memory(backend, moved):
    """Storage that starts one element off, and rows with a gap behind them."""

    def shifted(tensor):
        return torch.cat([torch.full((1,), math.nan), tensor.detach().flatten()])[1:].view(tensor.shape)

    def gapped(tensor):
        wide = torch.full((*tensor.shape[:-1], tensor.shape[-1] + 3), math.nan)
        wide[..., 1:-2] = tensor.detach()
        return wide[..., 1:-2]

    for move in (shifted, gapped):
        theirs, ours = pair(backend, 3, 5, bidirectional=True)
        x, hx = randn(3, 2, 3), randn(2, 2, 5, seed=3)
        expected = trained(theirs, x, hx)
        if moved in ("weights", "everything"):
            for parameter in ours.parameters():
                parameter.data = move(parameter)
        if moved in ("input", "everything"):
            x = move(x)
        if moved in ("h_0", "everything"):
            hx = move(hx)
        assert_all_close(trained(ours, x, hx), expected)


STRIDED = {
    "transposed": lambda T, B, F: randn(F, B, T).permute(2, 1, 0),
    "batch-major": lambda T, B, F: randn(B, T, F).transpose(0, 1),
    "every-other": lambda T, B, F: randn(2 * T, 2 * B, 2 * F)[::2, 1::2, ::2],
    "expanded-batch": lambda T, B, F: randn(T, 1, F).expand(T, B, F),
    "expanded-everything": lambda T, B, F: randn(1, 1, 1).expand(T, B, F),
    "flipped": lambda T, B, F: randn(T, B, F).flip(0),
}


@pytest.mark.parametrize("make", STRIDED.values(), ids=STRIDED)
@pytest.mark.parametrize("where", ["input", "h_0"])
def test_strided_and_expanded_inputs(backend, make, where):
    theirs, ours = pair(backend, 3, 5, num_layers=2 if where == "h_0" else 1)

    def call(module):
        x = (make(2, 2, 3) if where == "input" else randn(2, 2, 3)).detach().requires_grad_()
        hx = (make(2, 2, 5) if where == "h_0" else randn(states(module), 2, 5, seed=3)).detach().requires_grad_()
        output, h_n = module(x, hx)
        loss_of(output, h_n).backward()
        return [output, h_n, x.grad, hx.grad]

    both(theirs, ours, call)


@pytest.mark.parametrize("given", ["batched", "unbatched", "packed"])
def test_a_learned_h_0_that_is_expanded_over_the_batch(backend, given):
    theirs, ours = pair(backend, 3, 5)

    def call(module):
        start = randn(1, 1, 5, seed=3).requires_grad_()
        x = {"batched": randn(3, 2, 3), "unbatched": randn(3, 3), "packed": packed(2, 3)}[given]
        hx = start[0].expand(1, 5) if given == "unbatched" else start.expand(1, 2, 5)
        output, h_n = module(x, hx)
        loss_of(output, h_n).backward()
        return [h_n, start.grad]

    both(theirs, ours, call)


# Autograd.


COTANGENTS = {
    "sum": lambda o, h: o.sum() + h.sum(),
    "sum-of-output": lambda o, h: o.sum(),
    "sum-of-h_n": lambda o, h: h.sum(),
    "mean-of-h_n": lambda o, h: h.mean(),
    "last-step": lambda o, h: o[-1].square().sum(),
    "one-element": lambda o, h: o[1, 0, 2],
    "one-element-of-h_n": lambda o, h: h[0, 1, 2],
    "sum-over-the-batch": lambda o, h: (o.sum(1) * randn(*o.sum(1).shape)).sum(),
    "sum-over-time": lambda o, h: (o.sum(0) * randn(*o.sum(0).shape)).sum(),
    "transposed": lambda o, h: (o.permute(2, 1, 0) * randn(*o.permute(2, 1, 0).shape)).sum(),
    "half-of-the-features": lambda o, h: o[..., ::2].square().sum() + h[..., 1::2].sum(),
    "zero": lambda o, h: 0 * o.sum() + 0 * h.sum(),
}


@pytest.mark.parametrize("loss", COTANGENTS.values(), ids=COTANGENTS)
@pytest.mark.parametrize("batch_first", [False, True], ids=["time-first", "batch-first"])
def test_cotangents_of_every_kind(backend, loss, batch_first):
    theirs, ours = pair(backend, 3, 5, batch_first=batch_first)

    def call(module):
        module.zero_grad()
        x, hx = randn(3, 2, 3).requires_grad_(), randn(1, 3 if batch_first else 2, 5, seed=3).requires_grad_()
        loss(*module(x, hx)).backward()
        return [x.grad, hx.grad, *(p.grad for p in module.parameters())]

    both(theirs, ours, call)


@pytest.mark.parametrize("on", ["output", "h_n", "both"])
def test_cotangents_of_stride_0_given_by_hand(backend, on):
    theirs, ours = pair(backend, 3, 5)
    _, cell = torch.manual_seed(0), tritongru.GRUCell(3, 5, backend=backend)
    their_cell = nn.GRUCell(3, 5)
    their_cell.load_state_dict(cell.state_dict())
    one = torch.tensor(0.75)

    def call(module):
        results = [r for r, name in zip(module(randn(3, 2, 3)), ("output", "h_n"), strict=True) if on in (name, "both")]
        return torch.autograd.grad(results, list(module.parameters()), [one.expand(r.shape) for r in results])

    both(theirs, ours, call)
    both(their_cell, cell, lambda c: torch.autograd.grad(c(randn(2, 3)), list(c.parameters()), one.expand(2, 5)))


def test_a_loss_on_h_n_or_output_alone_of_packed_input(backend):
    theirs, ours = pair(backend, 3, 5, bidirectional=True)
    both(theirs, ours, lambda m: torch.autograd.grad(m(packed(2, 3, 1))[1].sum(), list(m.parameters())))
    both(theirs, ours, lambda m: torch.autograd.grad(m(packed(2, 3, 1))[0].data.sum(), list(m.parameters())))


TRAINED = {
    "w_ih": ["weight_ih_l0"],
    "w_hh": ["weight_hh_l1"],
    "b_ih": ["bias_ih_l0"],
    "b_hh": ["bias_hh_l0"],
    "biases": ["bias_ih_l0", "bias_hh_l0", "bias_ih_l0_reverse", "bias_hh_l0_reverse"],
    "reverse": ["weight_ih_l0_reverse", "weight_hh_l0_reverse"],
    "second-layer": ["weight_ih_l1", "weight_hh_l1", "bias_ih_l1", "bias_hh_l1"],
    "input": ["input"],
    "h_0": ["h_0"],
    "input-and-b_hh": ["input", "bias_hh_l0_reverse"],
}


@pytest.mark.parametrize(
    ("name", "recompute"),
    [*((name, False) for name in TRAINED), *((name, True) for name in ("w_ih", "w_hh", "input"))],
    ids=[*TRAINED, *(f"{name}-recompute" for name in ("w_ih", "w_hh", "input"))],
)
def test_frozen_weights_get_no_gradient_and_the_others_the_right_one(backend, name, recompute):
    trainable = TRAINED[name]
    theirs, ours = pair(backend, 3, 4, num_layers=2, bidirectional=True, recompute=recompute)

    def call(module):
        x, hx = randn(2, 2, 3), randn(4, 2, 4, seed=3)
        leaves = {"input": x, "h_0": hx, **dict(module.named_parameters())}
        for name, leaf in leaves.items():
            leaf.requires_grad_(name in trainable)
        loss_of(*module(x, hx)).backward()
        return [leaf.grad for leaf in leaves.values()]

    found = both(theirs, ours, call)
    assert sum(g is not None for g in found) == len(trainable)


def test_with_everything_frozen_there_is_no_graph(backend):
    _, ours = pair(backend, 3, 4)
    ours.requires_grad_(False)
    output, h_n = ours(randn(2, 2, 3))
    assert not output.requires_grad and not h_n.requires_grad


def test_backward_twice_through_a_retained_graph(backend):
    theirs, ours = pair(backend, 3, 5, num_layers=2)

    def call(module):
        results = module(randn(3, 2, 3))
        parameters = list(module.parameters())
        first = torch.autograd.grad(loss_of(*results), parameters, retain_graph=True)
        second = torch.autograd.grad(results[1].sum(), parameters, retain_graph=True, allow_unused=True)
        third = torch.autograd.grad(loss_of(*results), parameters)
        assert all(torch.equal(a, b) for a, b in zip(first, third, strict=True))
        return [*first, *second]

    both(theirs, ours, call)


def test_backward_twice_without_retaining_is_pytorch_s_error(backend):
    _, ours = pair(backend, 3, 4)
    loss = ours(randn(2, 2, 3))[0].sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


def test_calls_may_interleave(backend):
    """Two graphs of one layer alive at once, and a gradient that gathers over both."""
    theirs, ours = pair(backend, 3, 5)

    def call(module):
        module.zero_grad()
        first, second = module(randn(3, 2, 3)), module(randn(2, 2, 3, seed=7))
        loss_of(*first).backward()
        loss_of(*second).backward()
        return [p.grad for p in module.parameters()]

    both(theirs, ours, call)


def scale_(tensor):
    with torch.no_grad():
        tensor.mul_(3.0).add_(1.0)


IN_PLACE = {
    "h_0": lambda m, x, hx, o, h: scale_(hx),
    "input": lambda m, x, hx, o, h: scale_(x),
    "w_ih": lambda m, x, hx, o, h: scale_(m.weight_ih_l0),
    "w_hh": lambda m, x, hx, o, h: scale_(m.weight_hh_l1),
    "b_hh": lambda m, x, hx, o, h: scale_(m.bias_hh_l0),
    "output": lambda m, x, hx, o, h: scale_(o),
    "output-detached": lambda m, x, hx, o, h: o.detach().zero_(),
    "step-of-output": lambda m, x, hx, o, h: scale_(o[1]),
    "h_n": lambda m, x, hx, o, h: scale_(h),
    "h_n-detached": lambda m, x, hx, o, h: h.detach().zero_(),
}


@pytest.mark.parametrize("recompute", [False, True], ids=["saved", "recompute"])
@pytest.mark.parametrize("change", IN_PLACE.values(), ids=IN_PLACE)
def test_in_place_changes_before_backward_give_a_right_gradient_or_an_error(backend, change, recompute):
    theirs, ours = pair(backend, 3, 5, num_layers=2, recompute=recompute)
    x, hx = randn(3, 2, 3), randn(2, 2, 5, seed=3)
    expected = torch.autograd.grad(loss_of(*theirs(x, hx)), list(theirs.parameters()))
    output, h_n = ours(x, hx)
    loss = loss_of(output, h_n)
    change(ours, x, hx, output, h_n)
    try:
        found = torch.autograd.grad(loss, list(ours.parameters()))
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
    else:
        assert_all_close(found, expected)


IN_PLACE_AND_TRACKED = {
    "output-mul_": lambda o, h: (o.mul_(2), h),
    "output-relu_": lambda o, h: (torch.relu_(o), h),
    "step-of-output-zeroed": lambda o, h: (o[0].zero_(), (o, h))[1],
    "h_n-mul_": lambda o, h: (o, h.mul_(2)),
    "h_n-added-to-output": lambda o, h: (o.add_(h[-1]), h),
}


@pytest.mark.parametrize("change", IN_PLACE_AND_TRACKED.values(), ids=IN_PLACE_AND_TRACKED)
def test_in_place_operations_on_the_results_that_autograd_follows(backend, change):
    theirs, ours = pair(backend, 3, 5)
    x = randn(3, 2, 3)
    output, h_n = theirs(x)
    expected = torch.autograd.grad(loss_of(*change(output.clone(), h_n.clone())), list(theirs.parameters()))
    try:
        found = torch.autograd.grad(loss_of(*change(*ours(x))), list(ours.parameters()))
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
    else:
        assert_all_close(found, expected)


def test_detach_of_h_n_in_place_cuts_the_history_between_chunks(backend):
    theirs, ours = pair(backend, 3, 5)

    def call(module):
        module.zero_grad()
        hx = None
        for chunk in randn(4, 2, 3).split(2):
            output, hx = module(chunk, hx)
            hx.detach_()
            output.square().sum().backward()
        assert not hx.requires_grad
        return [hx, *(p.grad for p in module.parameters())]

    both(theirs, ours, call)


def test_state_carried_from_chunk_to_chunk_is_one_sequence(backend):
    _, ours = pair(backend, 3, 5, num_layers=2)
    x = randn(4, 2, 3)
    whole, h_whole = ours(x)
    first, hx = ours(x[:1])
    second, hx = ours(x[1:], hx)
    assert_all_close([torch.cat([first, second]), hx], [whole, h_whole])
    gradients = [torch.autograd.grad(loss_of(*r), list(ours.parameters())) for r in ((whole, h_whole),)]
    gradients.append(torch.autograd.grad(loss_of(torch.cat([first, second]), hx), list(ours.parameters())))
    assert_all_close(*gradients)


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_anomaly_mode_and_deterministic_algorithms(backend):
    _, ours = pair(backend, 3, 5)
    expected = trained(ours, randn(3, 2, 3))
    torch.use_deterministic_algorithms(True)
    try:
        with torch.autograd.detect_anomaly(check_nan=True):
            found = trained(ours, randn(3, 2, 3))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


# Autocast.


def within_bfloat16(actual, expected):
    scale = max(1.0, expected.detach().abs().max().item()) if expected.numel() else 1.0
    torch.testing.assert_close(
        actual.float(), expected.float(), rtol=0, atol=4 * torch.finfo(torch.bfloat16).eps * scale
    )


def test_under_autocast_aten_is_nn_gru():
    theirs, ours = pair("aten", 3, 5)
    for module in (ours, tritongru.GRU(3, 5)):
        module.load_state_dict(theirs.state_dict())
        with torch.autocast("cpu", torch.bfloat16):
            expected, found = theirs(randn(3, 2, 3)), module(randn(3, 2, 3))
        assert all(torch.equal(a, e) for a, e in zip(found, expected, strict=True))
        assert [a.dtype for a in found] == [e.dtype for e in expected]


@ours_only
@pytest.mark.parametrize(
    "options", [{}, {"num_layers": 2, "bidirectional": True, "batch_first": True}, {"recompute": True}], ids=str
)
def test_autocast_computes_in_bfloat16_and_trains_float32_parameters(backend, options):
    theirs, ours = pair(backend, 3, 5, **options)

    def call(module, autocast):
        module.zero_grad()
        x, hx = (
            randn(3, 2, 3).requires_grad_(),
            randn(states(module), 3 if module.batch_first else 2, 5).requires_grad_(),
        )
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output, h_n = module(x, hx)
        loss_of(output.float(), h_n.float()).backward()
        return [output, h_n], [x.grad, hx.grad, *(p.grad for p in module.parameters())]

    results, gradients = call(ours, True)
    expected, expected_gradients = call(theirs, False)
    assert {r.dtype for r in results} == {torch.bfloat16}
    assert {g.dtype for g in gradients} == {torch.float32}
    for actual, reference in zip(results + gradients, expected + expected_gradients, strict=True):
        within_bfloat16(actual, reference)
    assert not torch.equal(results[0].float(), expected[0])  # the products did run in bfloat16


@ours_only
def test_autocast_of_packed_input_of_a_cell_and_of_mixed_dtypes(backend):
    theirs, ours = pair(backend, 3, 5)
    cell = tritongru.GRUCell(3, 5, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        output, h_n = ours(packed(2, 3, 1), randn(1, 3, 5, seed=3))
        mixed, _ = ours(randn(3, 2, 3).bfloat16(), randn(1, 2, 5, seed=3))
        h = cell(randn(2, 3), randn(2, 5, seed=3))
        with torch.autocast("cpu", enabled=False):
            inner, _ = ours(randn(3, 2, 3))
    assert output.data.dtype == h_n.dtype == mixed.dtype == h.dtype == torch.bfloat16
    assert inner.dtype == torch.float32
    expected, h_expected = theirs(packed(2, 3, 1), randn(1, 3, 5, seed=3))
    within_bfloat16(output.data, expected.data)
    within_bfloat16(h_n, h_expected)
    within_bfloat16(mixed, theirs(randn(3, 2, 3), randn(1, 2, 5, seed=3))[0])
    within_bfloat16(h, torch.gru_cell(randn(2, 3), randn(2, 5, seed=3), *cell.parameters()))
    assert_close(inner, theirs(randn(3, 2, 3))[0])


@ours_only
def test_autocast_to_another_dtype_or_for_another_device(backend):
    _, ours = pair(backend, 3, 5)
    with torch.autocast("cpu", torch.float16):
        assert ours(randn(3, 2, 3))[0].dtype == torch.float16
    with torch.amp.autocast_mode.autocast("cpu", torch.bfloat16, enabled=False):
        assert ours(randn(3, 2, 3))[0].dtype == torch.float32


@ours_only
def test_autocast_state_is_left_as_it_was(backend):
    _, ours = pair(backend, 3, 5)
    with torch.autocast("cpu", torch.bfloat16):
        ours(randn(3, 2, 3))[0].float().sum().backward()
        assert torch.is_autocast_enabled("cpu")
        assert (randn(2, 2) @ randn(2, 2)).dtype == torch.bfloat16
    assert not torch.is_autocast_enabled("cpu")


# Copies and files.


def pickled(module):
    return pickle.loads(pickle.dumps(module))


def saved(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, copy.copy, pickled, saved], ids=["deepcopy", "copy", "pickle", "save"]
)
def test_a_copy_is_the_same_layer_with_its_own_settings(backend, copied):
    _, ours = pair(backend, 3, 5, num_layers=2, bidirectional=True, batch_first=True, recompute=True)
    expected = trained(ours, randn(3, 2, 3))
    twin = copied(ours)
    assert type(twin) is tritongru.GRU and (twin.backend, twin.recompute) == (backend, True)
    assert all(torch.equal(a, e) for a, e in zip(trained(twin, randn(3, 2, 3)), expected, strict=True))
    assert repr(twin) == repr(ours)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, saved], ids=["deepcopy", "pickle", "save"])
def test_a_deep_copy_has_weights_of_its_own(backend, copied):
    _, ours = pair(backend, 3, 5)
    x = randn(3, 2, 3)
    before = ours(x)[0]
    twin = copied(ours)
    with torch.no_grad():
        twin.weight_hh_l0.mul_(2)
    assert torch.equal(ours(x)[0], before) and not torch.allclose(twin(x)[0], before)
    cell = copied(tritongru.GRUCell(3, 5, backend=backend))
    assert type(cell) is tritongru.GRUCell and cell.backend == backend


def class_set(module):
    """What monkey-patching libraries do: torch's own object with our class."""
    module.__class__ = {nn.GRU: tritongru.GRU, nn.GRUCell: tritongru.GRUCell}[type(module)]
    return module


def of_an_older_pickle(module):
    """Ours, from a state without what only ours has."""
    ours = {nn.GRU: tritongru.GRU, nn.GRUCell: tritongru.GRUCell}[type(module)]
    found = ours.__new__(ours)
    found.__setstate__(copy.deepcopy(module).__dict__)
    return found


@pytest.mark.parametrize("made", [class_set, of_an_older_pickle])
@pytest.mark.parametrize(
    "copied", [lambda module: module, copy.copy, copy.deepcopy, pickled], ids=["itself", "copy", "deepcopy", "pickle"]
)
def test_a_layer_that_no_init_of_ours_made_has_the_defaults(backend, made, copied, monkeypatch):
    """Everything that asks for `backend` or `recompute`: calls, repr, plan, gates, profile."""
    from tritongru.tools.profile import _backend

    monkeypatch.setenv("TRITONGRU_BACKEND", backend)
    torch.manual_seed(0)
    theirs, cell = nn.GRU(3, 5, num_layers=2, batch_first=True), nn.GRUCell(3, 5)
    x = randn(3, 2, 3)
    expected, expected_h = trained(theirs, x), cell(x[0])
    expected_repr, gates = repr(theirs), tritongru.gates(theirs, x)
    ours, our_cell = copied(made(theirs)), copied(made(cell))
    assert_all_close(trained(ours, x), expected)
    assert_close(our_cell(x[0]), expected_h)
    assert repr(ours) == expected_repr and repr(our_cell) == "GRUCell(3, 5)"
    assert (ours.backend, ours.recompute, our_cell.backend) == (None, False, None)
    assert tritongru.plan(ours, x).backend == backend == _backend(ours, [x])[0] == _backend(our_cell, [x[0]])[0]
    assert all(torch.equal(a, e) for a, e in zip(tritongru.gates(ours, x), gates, strict=True))
    ours.backend, ours.recompute = "reference", True
    assert repr(ours) == expected_repr[:-1] + ", backend='reference', recompute=True)"
    assert tritongru.GRU(3, 5).backend is None


def test_a_state_dict_file_loads_with_weights_only(backend):
    theirs, ours = pair(backend, 3, 5, num_layers=2)
    for source, target in ((theirs, ours), (ours, theirs)):
        with torch.no_grad():
            source.weight_ih_l1.mul_(0.5)
        file = io.BytesIO()
        torch.save(source.state_dict(), file)
        file.seek(0)
        target.load_state_dict(torch.load(file, weights_only=True))
        both(theirs, ours, lambda module: module(randn(3, 2, 3)))


def test_activation_checkpointing(backend):
    from torch.utils.checkpoint import checkpoint

    _, ours = pair(backend, 3, 5, num_layers=2, dropout=0.5)

    def call(run):
        ours.zero_grad()
        x = randn(3, 2, 3).requires_grad_()
        torch.manual_seed(3)
        output, h_n = run(x)
        loss_of(output, h_n).backward()
        return [output, x.grad, *(p.grad for p in ours.parameters())]

    found, expected = call(lambda x: checkpoint(ours, x, use_reentrant=False)), call(ours)
    assert all(torch.equal(a, e) for a, e in zip(found, expected, strict=True))


def test_saved_tensors_may_be_packed_away(backend):
    theirs, ours = pair(backend, 3, 5)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().clone(), lambda t: t):
        results = ours(randn(3, 2, 3))
    found = torch.autograd.grad(loss_of(*results), list(ours.parameters()))
    assert_all_close(found, torch.autograd.grad(loss_of(*theirs(randn(3, 2, 3))), list(theirs.parameters())))


# Exporters and torch.func's derivatives take PyTorch's own path; compilers and vmap: test_operators.py.


@pytest.mark.filterwarnings("ignore:The tensor attributes")
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True, "batch_first": True}], ids=str)
def test_export_holds_aten_gru(backend, ran, options):
    theirs, ours = pair(backend, 3, 5, **options)
    x = randn(3, 2, 3)
    program = torch.export.export(ours, (x,))
    assert "aten.gru.input" in calls(program.graph)
    assert calls(program.graph) == calls(torch.export.export(theirs, (x,)).graph)
    assert all(torch.equal(a, e) for a, e in zip(program.module()(x), theirs(x), strict=True))
    assert ran == []


def test_strict_export_holds_aten_gru(backend, ran):
    theirs, ours = pair(backend, 3, 5)
    program = torch.export.export(ours, (randn(3, 2, 3), randn(1, 2, 5, seed=3)), strict=True)
    assert "aten.gru.input" in calls(program.graph)
    assert torch.equal(program.module()(randn(3, 2, 3), randn(1, 2, 5))[0], theirs(randn(3, 2, 3), randn(1, 2, 5))[0])
    assert ran == []


def onnx_graph(module, **options):
    onnx = pytest.importorskip("onnx")
    file = io.BytesIO()
    torch.onnx.export(module, (randn(3, 2, 3),), file, **options)
    model = onnx.load_from_string(file.getvalue())
    onnx.checker.check_model(model)
    return model.graph


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True, "batch_first": True}], ids=str)
def test_onnx_export_gives_the_gru_node(backend, ran, options):
    theirs, ours = pair(backend, 3, 5, **options)
    graph, expected = onnx_graph(ours.eval(), dynamo=False), onnx_graph(theirs.eval(), dynamo=False)
    nodes = [node for node in graph.node if node.op_type == "GRU"]
    assert len(nodes) == ours.num_layers
    assert {a.name: a.i for a in nodes[0].attribute}["linear_before_reset"] == 1
    assert [node.op_type for node in graph.node] == [node.op_type for node in expected.node]
    assert [i.dims for i in graph.initializer] == [i.dims for i in expected.initializer]
    assert [i.raw_data for i in graph.initializer] == [i.raw_data for i in expected.initializer]
    assert ran == []


@pytest.mark.filterwarnings("ignore")
def test_onnx_export_by_dynamo(backend, ran):
    pytest.importorskip("onnxscript")
    theirs, ours = pair(backend, 3, 5)
    program, expected = (torch.onnx.export(m.eval(), (randn(3, 2, 3),), dynamo=True) for m in (ours, theirs))
    assert [n.op_type for n in program.model.graph] == [n.op_type for n in expected.model.graph]
    assert ran == []


@pytest.mark.filterwarnings("ignore")
def test_jit_trace(backend, ran):
    theirs, ours = pair(backend, 3, 5, num_layers=2)
    traced = torch.jit.trace(ours, (randn(3, 2, 3),))
    x = randn(4, 1, 3, seed=9)
    assert all(torch.equal(a, e) for a, e in zip(traced(x), theirs(x), strict=True))
    assert "aten::gru" in str(traced.inlined_graph)
    assert set(ran) <= {backend}  # by the tracer's check of its trace against a plain call


@pytest.mark.parametrize(
    "transform", [torch.func.jacrev, torch.func.jacfwd, torch.func.hessian], ids=lambda t: t.__name__
)
def test_func_transforms(backend, ran, transform):
    theirs, ours = pair(backend, 3, 4)
    both(theirs, ours, lambda m: [transform(lambda x: m(x)[0].square().sum((0, 1)))(randn(2, 1, 3))])
    assert ran == []


def test_func_grad_by_weights(backend, ran):
    theirs, ours = pair(backend, 3, 5)

    def call(module):
        def loss(weights):
            return loss_of(*torch.func.functional_call(module, weights, (randn(3, 2, 3),)))

        return list(torch.func.grad(loss)({n: p.detach() for n, p in module.named_parameters()}).values())

    both(theirs, ours, call)
    assert ran == []


def test_forward_mode_derivatives(backend, ran):
    theirs, ours = pair(backend, 3, 5)
    x, tangent = randn(3, 2, 3), randn(3, 2, 3, seed=8)
    both(theirs, ours, lambda m: torch.func.jvp(lambda x: m(x)[0], (x,), (tangent,)))

    def dual(module):
        with forward_ad.dual_level():
            output, h_n = module(forward_ad.make_dual(x, tangent))
            return [forward_ad.unpack_dual(output).tangent, forward_ad.unpack_dual(h_n).tangent]

    both(theirs, ours, dual)
    assert ran == []
    ours(x)
    assert ran == ([] if backend == "aten" else [backend])  # and the level is left behind


@pytest.mark.filterwarnings("ignore")
def test_what_does_not_know_the_subclass():
    """By type and not by isinstance: a scripting compiler, a tracer's leaves, a table of what to quantise."""
    theirs, ours = pair(None, 3, 5)
    torch.jit.script(theirs)
    with pytest.raises(Exception, match=r"(?i)compil|unknown|not supported|Unsupported|keyword"):
        torch.jit.script(ours)
    torch.fx.symbolic_trace(nn.Sequential(theirs))
    with pytest.raises(Exception, match=r"Proxy|control flow|iterated|bool|trace"):
        torch.fx.symbolic_trace(nn.Sequential(ours))
    both = (torch.ao.quantization.quantize_dynamic(nn.Sequential(m), {nn.GRU})[0] for m in (theirs, ours))
    assert [type(m) is not kind for m, kind in zip(both, (nn.GRU, tritongru.GRU), strict=True)] == [True, False]


# TF32 follows the switch of PyTorch's RNNs.


@pytest.fixture
def switches():
    """torch's float32 precision switches, put back afterwards."""
    backends = torch.backends
    places = (backends, backends.cudnn, backends.cudnn.conv, backends.cudnn.rnn, backends.cuda.matmul)
    before = [place.fp32_precision for place in places]
    yield backends
    for place, value in zip(places, before, strict=True):
        place.fp32_precision = value


def test_tf32_is_the_default_on_nvidia_alone(switches):
    assert rnn_precision(True) == "tf32"
    assert rnn_precision(False) == "ieee"


def test_tf32_follows_the_rnn_switch_and_not_matmul_s(switches):
    for ours, expected in (("ieee", "ieee"), ("tf32", "tf32")):
        switches.cudnn.rnn.fp32_precision = ours
        for matmul in ("tf32", "ieee"):
            switches.cuda.matmul.fp32_precision = matmul
            assert rnn_precision(True) == expected
            assert rnn_precision(False) == "ieee"


def test_tf32_follows_allow_tf32_and_the_general_switches(switches):
    switches.cudnn.allow_tf32 = False
    assert rnn_precision(True) == "ieee"
    switches.cudnn.allow_tf32 = True
    assert rnn_precision(True) == "tf32"
    switches.cudnn.rnn.fp32_precision = "none"
    switches.fp32_precision = "ieee"
    assert rnn_precision(True) == "ieee"
    switches.fp32_precision = "tf32"
    assert rnn_precision(True) == "tf32"


def on(device, dtype):
    """Stands for a tensor, of which `products` reads device and dtype."""
    return SimpleNamespace(device=torch.device(device), dtype=dtype)


@pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda'")
@pytest.mark.parametrize("precision", ["tf32", "ieee"])
@pytest.mark.parametrize("matmul", ["tf32", "ieee"])
def test_products_run_in_the_given_precision_and_restore_matmul_s(switches, precision, matmul):
    switches.cuda.matmul.fp32_precision = matmul
    with products(on("cuda", torch.float32), precision):
        assert switches.cuda.matmul.fp32_precision == precision
    assert switches.cuda.matmul.fp32_precision == matmul
    with pytest.raises(ZeroDivisionError), products(on("cuda", torch.float32), precision):
        raise ZeroDivisionError
    assert switches.cuda.matmul.fp32_precision == matmul


@pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda'")
@pytest.mark.parametrize(
    "tensor", [on("cuda", torch.bfloat16), on("cpu", torch.float32)], ids=["cuda-bfloat16", "cpu-float32"]
)
def test_products_leave_the_switch_alone_where_it_says_nothing(switches, tensor):
    switches.cuda.matmul.fp32_precision = "ieee"
    with products(tensor, "tf32"):
        assert switches.cuda.matmul.fp32_precision == "ieee"


@pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda'")
@pytest.mark.parametrize("precision", ["tf32", "ieee"])
def test_products_do_not_pin_a_switch_that_follows_a_general_one(switches, precision):
    switches.cuda.matmul.fp32_precision = "none"
    switches.fp32_precision = "tf32"
    assert switches.cuda.matmul.fp32_precision == "tf32"
    with products(on("cuda", torch.float32), precision):
        pass
    switches.fp32_precision = "ieee"
    assert switches.cuda.matmul.fp32_precision == "ieee"


def test_products_switch_autocast_off():
    with torch.autocast("cpu", torch.bfloat16), products(randn(2, 2), "ieee"):
        assert (randn(2, 2) @ randn(2, 2)).dtype == torch.float32


# Which backend runs.


@pytest.fixture(autouse=True)
def no_choice_by_environment(monkeypatch):
    monkeypatch.delenv("TRITONGRU_BACKEND", raising=False)


def test_cpu_tensors_take_aten_by_default(ran):
    theirs, ours = pair(None, 3, 5)
    assert all(torch.equal(a, e) for a, e in zip(ours(randn(3, 2, 3)), theirs(randn(3, 2, 3)), strict=True))
    tritongru.GRUCell(3, 5)(randn(2, 3))
    assert ran == []


@ours_only
def test_an_argument_names_the_backend(backend, ran):
    pair(backend, 3, 5, num_layers=2)[1](randn(3, 2, 3))
    assert ran == [backend, backend]  # once per layer
    tritongru.GRUCell(3, 5, backend=backend)(randn(2, 3))
    weights = list(nn.GRU(3, 5).parameters())
    tritongru.gru(randn(3, 2, 3), torch.zeros(1, 2, 5), weights, True, 1, 0.0, False, False, False, backend=backend)
    tritongru.gru_cell(randn(2, 3), torch.zeros(2, 5), *weights, backend=backend)
    assert ran == [backend] * 5


@ours_only
def test_use_backend_and_the_environment_name_the_backend(backend, ran, monkeypatch):
    layer = tritongru.GRU(3, 5)
    with tritongru.use_backend(backend):
        layer(randn(3, 2, 3))
    assert ran == [backend]
    layer(randn(3, 2, 3))
    assert ran == [backend]
    monkeypatch.setenv("TRITONGRU_BACKEND", backend)
    layer(randn(3, 2, 3))
    tritongru.GRUCell(3, 5)(randn(2, 3))
    assert ran == [backend] * 3
    monkeypatch.setenv("TRITONGRU_BACKEND", "")
    layer(randn(3, 2, 3))
    assert ran == [backend] * 3


def test_the_argument_wins_over_use_backend_which_wins_over_the_environment(ran, monkeypatch):
    free, bound = tritongru.GRU(3, 5), tritongru.GRU(3, 5, backend="reference")
    monkeypatch.setenv("TRITONGRU_BACKEND", "reference")
    with tritongru.use_backend("aten"):
        free(randn(3, 2, 3))
        assert ran == []
        bound(randn(3, 2, 3))
        assert ran == ["reference"]
        with tritongru.use_backend("reference"):
            free(randn(3, 2, 3))
            assert ran == ["reference"] * 2
        free(randn(3, 2, 3))
        assert ran == ["reference"] * 2
    free(randn(3, 2, 3))
    assert ran == ["reference"] * 3


def test_use_backend_none_lifts_an_outer_choice(ran):
    layer = tritongru.GRU(3, 5)
    with tritongru.use_backend("reference"), tritongru.use_backend(None):
        layer(randn(3, 2, 3))
    assert ran == []


def test_use_backend_ends_with_its_block_even_by_an_error(ran):
    layer = tritongru.GRU(3, 5)
    with pytest.raises(ZeroDivisionError), tritongru.use_backend("reference"):
        raise ZeroDivisionError
    layer(randn(3, 2, 3))
    assert ran == []


@ours_only
def test_backward_after_the_block_stays_with_the_backend_of_forward(backend):
    theirs, ours = pair(None, 3, 5)
    with tritongru.use_backend(backend):
        output, h_n = ours(randn(3, 2, 3))
    loss_of(output, h_n).backward()
    assert "GRULayer" in type(output.grad_fn).__name__
    assert_all_close([p.grad for p in ours.parameters()], trained(theirs, randn(3, 2, 3))[2:])


def test_unknown_names_are_refused_with_the_valid_ones(monkeypatch):
    layer = tritongru.GRU(3, 5)
    words = r"backend must be one of aten, reference, step.*, got 'cudnn'"
    with pytest.raises(ValueError, match=words), tritongru.use_backend("cudnn"):
        pass
    monkeypatch.setenv("TRITONGRU_BACKEND", "cudnn")
    with pytest.raises(ValueError, match=words):
        layer(randn(3, 2, 3))
    with pytest.raises(ValueError, match=words):
        tritongru.GRUCell(3, 5)(randn(2, 3))
    monkeypatch.delenv("TRITONGRU_BACKEND")
    layer.backend = "cudnn"
    with pytest.raises(ValueError, match=words):
        layer(randn(3, 2, 3))


def refused(call, name, reason):
    with pytest.raises(RuntimeError) as caught:
        call()
    words = str(caught.value)
    _, _, able = words.partition("; these can: ")
    assert f"backend {name!r} cannot run here" in words and reason in words
    assert "aten" in able.split(", ") and name not in able.split(", ")


@pytest.mark.interpreted
def test_step_refuses_float64_in_words():
    refused(lambda: tritongru.GRU(3, 5, backend="step").double()(randn(3, 2, 3).double()), "step", "fp32, fp16, bf16")
    refused(lambda: tritongru.GRUCell(3, 5, backend="step").double()(randn(2, 3).double()), "step", "fp32, fp16, bf16")


def test_step_on_the_cpu_refuses_without_the_interpreter(monkeypatch):
    monkeypatch.setattr(registry, "has_triton", lambda: True)
    monkeypatch.setattr(registry, "interpreting", lambda: False)
    refused(lambda: tritongru.GRU(3, 5, backend="step")(randn(3, 2, 3)), "step", "TRITON_INTERPRET=1")
    with tritongru.use_backend("step"):
        refused(lambda: tritongru.GRUCell(3, 5)(randn(2, 3)), "step", "TRITON_INTERPRET=1")


def test_step_refuses_without_triton(monkeypatch):
    monkeypatch.setattr(registry, "has_triton", lambda: False)
    refused(lambda: tritongru.GRU(3, 5, backend="step")(randn(3, 2, 3)), "step", "Triton is not installed")


@pytest.mark.filterwarnings("ignore:Complex modules")
@ours_only
def test_a_forced_backend_serves_a_dtype_as_nn_gru_does_or_refuses_it_in_words(backend):
    theirs, ours = pair(backend, 3, 5)
    for dtype in (torch.float64, torch.complex64):
        x = randn(3, 2, 3).to(dtype)
        expected = theirs.to(dtype)(x)[0]
        try:
            found = ours.to(dtype)(x)[0]
        except RuntimeError as error:
            assert f"backend {backend!r} cannot run here" in str(error)
        else:
            torch.testing.assert_close(found, expected)


@ours_only
def test_a_forced_backend_refuses_a_tensor_subclass_in_words(backend):
    class Marked(torch.Tensor):
        pass

    layer = tritongru.GRU(3, 5, backend=backend)
    refused(lambda: layer(randn(3, 2, 3).as_subclass(Marked)), backend, "tensor subclass")


def test_backends_lists_what_exists_and_why_not(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(registry, "has_triton", lambda: False)
    found = {status.name: status for status in tritongru.backends()}
    assert list(found)[:3] == ["aten", "reference", "step"]
    assert found["aten"].why_not is None and found["reference"].why_not is None
    assert "not installed" in found["step"].why_not and found["step"].device == "cpu"


def test_the_path_is_logged_once(messages):
    layer = tritongru.GRU(3, 5)
    for _ in range(3):
        layer(randn(3, 2, 3))
        layer(randn(2, 2, 3))
    (record,) = messages.records
    assert record.name == "tritongru" and record.levelno == logging.INFO and "aten" in record.getMessage()


@ours_only
def test_a_forced_backend_is_logged_once(messages, backend):
    layer = tritongru.GRU(3, 5, 2, backend=backend)
    for _ in range(3):
        layer(randn(3, 2, 3))
    (record,) = messages.records
    assert record.levelno == logging.INFO and repr(backend) in record.getMessage()


def test_pytorch_s_path_under_a_transform_is_logged_once(messages):
    layer = tritongru.GRU(3, 5, backend="reference")
    for _ in range(2):
        torch.func.jacrev(lambda x: layer(x)[1])(randn(2, 1, 3))
    (record,) = messages.records
    assert record.levelno == logging.INFO and "aten" in record.getMessage()


def test_a_fallback_is_logged_once_as_a_warning_with_its_reason(messages):
    for _ in range(2):
        assert functional._or_refuse(None, "a tensor subclass", randn(3, 2, 3), "result") == "result"
    (record,) = messages.records
    assert record.levelno == logging.WARNING and "a tensor subclass" in record.getMessage()


def test_nothing_is_printed_or_warned_by_default(backend, capfd, recwarn):
    trained(tritongru.GRU(3, 5, backend=backend), randn(3, 2, 3))
    assert capfd.readouterr() == ("", "")
    assert not recwarn.list


# -- what a kernel reads from memory ---------------------------------------------------------------------------------


def every_other(tensor):
    """The same values, no dimension of which is dense."""
    found = torch.full([2 * size for size in tensor.shape], float("nan"), dtype=tensor.dtype)
    return found[tuple(slice(None, None, 2) for _ in tensor.shape)].copy_(tensor)


@pytest.mark.parametrize("relaid", [torch.Tensor.contiguous, every_other])
@pytest.mark.parametrize("options", [{}, {"batch_first": True}, {"bidirectional": True}], ids=str)
@ours_only
def test_saved_tensors_that_come_back_in_another_layout(backend, options, relaid):
    """torch.autograd.graph.save_on_cpu(pin_memory=True) gives them contiguous, whatever they were."""
    theirs, ours = pair(backend, 3, 5, **options)
    x = randn(4, 2, 3)
    found = []
    for module in (theirs, ours):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().clone(), relaid):
            output, h_n = module(x)
        found.append(torch.autograd.grad(loss_of(output, h_n), list(module.parameters())))
    assert_all_close(found[1], found[0])


@ours_only
@pytest.mark.parametrize("T", [1, 3])
def test_lazily_negated_tensors(backend, T):
    """With the negative bit memory holds the other sign: in x, in h_0, and in the gradient that conj() sends back."""
    theirs, ours = pair(backend, 3, 5)
    x, h_0 = (torch.complex(randn(*size), randn(*size)).conj().imag for size in ((T, 2, 3), (1, 2, 5)))
    assert x.is_neg() and h_0.is_neg()
    found = []
    for module in (theirs, ours):
        output, h_n = module(x, h_0)
        loss = torch.complex(output, output.square()).conj().imag.sum() + h_n.sum()
        found.append([output, h_n, *torch.autograd.grad(loss, list(module.parameters()))])
    assert_all_close(found[1], found[0])


def test_matmuls_switch_survives_two_threads(monkeypatch):
    """The first call inside turns it, the last one turns it back, whichever order they leave in."""
    from tritongru import products

    class Matmul:
        fp32_precision = "none"

    monkeypatch.setattr(torch.backends.cuda, "matmul", Matmul)
    first, second = products._matmul_precision("tf32"), products._matmul_precision("tf32")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert Matmul.fp32_precision == "tf32"
    second.__exit__(None, None, None)
    assert Matmul.fp32_precision == "none"


@ours_only
def test_threads_compute_what_one_does(backend):
    """At once, without a lock of the caller's: Triton's interpreter is one for the whole process."""
    from concurrent.futures import ThreadPoolExecutor

    _, layer = pair(backend, 3, 5)
    inputs = [randn(2 + index % 2, 2, 3, seed=index) for index in range(4)]
    start = threading.Barrier(len(inputs))

    def gradients(x):
        x = x.clone().requires_grad_()
        output, h_n = layer(x)
        return [output, *torch.autograd.grad(output.square().sum() + h_n.sum(), [x, *layer.parameters()])]

    expected = [gradients(x) for x in inputs]

    def work(index):
        start.wait(60)
        found = [gradients(inputs[index]) for _ in range(3)]
        return all(torch.equal(a, e) for each in found for a, e in zip(each, expected[index], strict=True))

    with ThreadPoolExecutor(len(inputs)) as pool:
        assert all(pool.map(work, range(len(inputs)), timeout=120))
