"""tritongru.GRU and GRUCell as modules in torch.nn's place: construction, state, copies, subclasses, and weights that
change between two calls. Tolerance: tests/kit/modules.py."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import tritongru
from tests.kit.modules import (
    FORMS,
    PLAIN,
    Form,
    assert_close,
    assert_same,
    both,
    cell_pair,
    loss_of,
    outcome,
    pair,
    randn,
    same_bits,
    table,
    tensors,
    trained,
)

LAYERS = {name: FORMS[name].options for name in ("plain", "no-bias-batch-first", "two-layers-bidirectional")}
THEIR_OWN = ((nn.GRU, tritongru.GRU), (nn.GRUCell, tritongru.GRUCell))


def test_the_layers_are_torch_s_own_classes_with_its_order_of_arguments():
    assert all(issubclass(ours, theirs) for theirs, ours in THEIR_OWN)
    layer, cell = tritongru.GRU(3, 4, 2, False, True, 0.25, True), tritongru.GRUCell(3, 4, False)
    assert (layer.input_size, layer.hidden_size, layer.num_layers, layer.bias) == (3, 4, 2, False)
    assert (layer.batch_first, layer.dropout, layer.bidirectional) == (True, 0.25, True)
    assert (cell.input_size, cell.hidden_size, cell.bias) == (3, 4, False)
    for kind in (nn.GRU, tritongru.GRU):
        for eighth in ("cpu", None, torch.device("cpu")):
            with pytest.raises(TypeError):
                kind(3, 4, 1, True, False, 0.0, False, eighth)


def test_our_own_arguments_are_keyword_only():
    for layer in (tritongru.GRU, tritongru.GRUCell):
        parameters = inspect.signature(layer).parameters
        ours = {name for name in ("backend", "recompute") if name in parameters}
        assert "backend" in ours
        assert all(parameters[name].kind is inspect.Parameter.KEYWORD_ONLY for name in ours)
        assert list(inspect.signature(layer.forward).parameters)[:3] == ["self", "input", "hx"]


def test_device_and_dtype():
    for kind, dtype in ((tritongru.GRU, torch.float64), (tritongru.GRUCell, torch.bfloat16)):
        module = kind(3, 4, device="meta", dtype=dtype)
        assert {(p.device.type, p.dtype) for p in module.parameters()} == {("meta", dtype)}
    with torch.device("meta"):
        assert tritongru.GRU(3, 4).weight_hh_l0.device.type == "meta"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kinds", THEIR_OWN, ids=("GRU", "GRUCell"))
def test_the_same_seed_gives_the_same_parameters_and_leaves_the_same_random_state(kinds, dtype):
    """And reset_parameters draws the same again."""
    for options in LAYERS.values() if kinds[0] is nn.GRU else ({}, {"bias": False}):
        found = []
        for kind in kinds:
            torch.manual_seed(7)
            module = kind(3, 4, **options, dtype=dtype)
            first = {name: p.clone() for name, p in module.state_dict().items()}
            module.reset_parameters()
            found.append((first, module.state_dict(), {"": torch.get_rng_state()}))
        assert all(same_bits(a, e) for a, e in zip(*found, strict=True))


WRONG = {
    "input_size": (3.0, 0, -3),
    "hidden_size": (4.0, 0, -1),
    "num_layers": (0, 1.5),
    "bias": (1, None),
    "batch_first": (1,),
    "dropout": (1.5, -0.1, True, "much", float("nan")),
    "proj_size": (2, 0),
    "dtype": (torch.int64, "float32"),
    "device": ("abacus",),
}
WRONG_OF_CELL = {"input_size": (3.0,), "hidden_size": (-1,), "dtype": WRONG["dtype"], "device": WRONG["device"]}
EVERY_WRONG = [
    (kinds, name, value)
    for kinds, wrong in zip(THEIR_OWN, (WRONG, WRONG_OF_CELL), strict=True)
    for name, values in wrong.items()
    for value in values
]


@pytest.mark.parametrize(("kinds", "name", "value"), EVERY_WRONG, ids=str)
def test_construction_errors_are_torch_s(kinds, name, value):
    given = {"input_size": 3, "hidden_size": 4} | {name: value}
    expected, found = (outcome(lambda kind=kind: kind(**given)) for kind in kinds)
    assert isinstance(expected, tuple), "torch takes it"
    assert found == expected


def test_arguments_that_are_missing_unknown_or_of_a_wrong_type():
    for kind in (kind for kinds in THEIR_OWN for kind in kinds):
        for wrong in ({}, {"input_size": 3}, {"input_size": 3, "hidden_size": 4, "depth": 1}):
            with pytest.raises(TypeError):
                kind(**wrong)
    with pytest.raises(TypeError, match=r"^bias should be of type bool, got: int$"):
        tritongru.GRU(3, 4, bias=1)
    for kind in (tritongru.GRU, tritongru.GRUCell):
        with pytest.raises(ValueError, match=r"aten, reference, step.*'cudnn'"):
            kind(3, 4, backend="cudnn")


def test_dropout_with_one_layer_warns_as_nn_gru_does():
    found = []
    for layer in (nn.GRU, tritongru.GRU):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            layer(3, 4, dropout=0.5)
        found.append([(w.category, str(w.message)) for w in caught])
    assert found[0] == found[1] and found[0][0][0] is UserWarning


@table("options", LAYERS)
def test_names_and_order_of_the_state_and_the_repr_are_nn_gru_s(options):
    theirs, ours = pair(None, 3, 4, **options)
    kinds = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")[: 4 if ours.bias else 2]
    suffixes = ("", "_reverse")[: 2 if ours.bidirectional else 1]
    names = [f"{kind}_l{layer}{s}" for layer in range(ours.num_layers) for s in suffixes for kind in kinds]
    assert list(ours.state_dict()) == list(theirs.state_dict()) == names == [n for n, _ in ours.named_parameters()]
    assert ours.state_dict()._metadata == theirs.state_dict()._metadata
    assert [[p.shape for p in each] for each in ours.all_weights] == [[p.shape for p in e] for e in theirs.all_weights]
    their_cell, cell = cell_pair(None, 3, 4, bias=ours.bias)
    assert list(cell.state_dict()) == list(their_cell.state_dict())
    for module, other in ((ours, theirs), (cell, their_cell)):
        assert not list(module.buffers()) and not list(module.children()) and repr(module) == repr(other)
    named = repr(tritongru.GRU(3, 4, **options, backend="reference", recompute=True))
    assert "backend='reference'" in named and "recompute=True" in named


@table("options", LAYERS)
def test_a_checkpoint_goes_both_ways(backend, options):
    """By a file, too, that is loaded with weights_only; a wrong one gives nn.GRU's error."""
    theirs, ours = pair(backend, 3, 4, **options)
    for source, target in ((theirs, ours), (ours, theirs)):
        tensors(target(randn(2, 2, 3)))
        with torch.no_grad():
            source.weight_ih_l0.mul_(0.5)
        file = io.BytesIO()
        torch.save(source.state_dict(), file)
        file.seek(0)
        state = torch.load(file, weights_only=True)
        assert str(target.load_state_dict(state, strict=True)) == "<All keys matched successfully>"
        both(theirs, ours, lambda module: module(randn(2, 2, 3)))
    wrong = nn.GRU(3, 5, 2).state_dict()
    assert outcome(lambda: ours.load_state_dict(wrong)) == outcome(lambda: theirs.load_state_dict(wrong))


# Weights that change between two calls. The first call may leave nothing behind that the second one believes.


class Halved(nn.Module):
    def forward(self, weight):
        return weight / 2


def replaced(old):
    return nn.Parameter(old.detach() * 0.5 + 0.1)


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


def swapped(module, x):
    del module.bias_ih_l1
    module.register_parameter("bias_ih_l1", nn.Parameter(torch.ones(15)))


def parametrized_for_a_while(module, x):
    parametrize.register_parametrization(module, "weight_hh_l0", Halved())
    module(x)
    parametrize.remove_parametrizations(module, "weight_hh_l0")


CHANGES = {
    "to": to_and_back,
    "setattr": lambda m, x: setattr(m, "weight_hh_l0", replaced(m.weight_hh_l0)),
    "setattr-bias": lambda m, x: setattr(m, "bias_ih_l1", replaced(m.bias_ih_l1)),
    "delete-and-register": swapped,
    "data-mul_": lambda m, x: m.weight_hh_l0.data.mul_(0.5),
    "data-assigned": lambda m, x: setattr(m.weight_ih_l1, "data", m.weight_ih_l1.data * 0.5),
    "data-of-all-assigned": lambda m, x: [setattr(p, "data", p.data * 0.5) for p in m.parameters()],
    "data-not-contiguous": lambda m, x: [
        setattr(p, "data", p.data.t().clone().t() * 0.5) for p in m.all_weights[0][:2]
    ],
    "no_grad-copy_": lambda m, x: torch.no_grad()(m.weight_hh_l1.copy_)(m.weight_hh_l1 * 0.5),
    "numpy-view": lambda m, x: m.weight_hh_l0.detach().numpy().__imul__(0.5),
    "load_state_dict": lambda m, x: m.load_state_dict({n: p * 0.5 for n, p in m.state_dict().items()}),
    "load-assign": lambda m, x: m.load_state_dict({n: p * 0.5 for n, p in m.state_dict().items()}, assign=True),
    "optimiser": optimiser_step,
    "vector_to_parameters": lambda m, x: nn.utils.vector_to_parameters(
        nn.utils.parameters_to_vector(m.parameters()) * 0.5, m.parameters()
    ),
    "tied": tied,
    "parametrization": lambda m, x: parametrize.register_parametrization(m, "weight_hh_l0", Halved()),
    "parametrization-removed": parametrized_for_a_while,
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
@table("change", CHANGES)
def test_the_next_call_sees_changed_weights(backend, change):
    theirs, ours = pair(backend, 3, 5, num_layers=2)
    x = randn(2, 2, 3)
    before = ours(x)[0].detach()
    for module in (theirs, ours):
        torch.manual_seed(4)
        change(module, x)
    after = both(theirs, ours, lambda module: trained(module, x))[0]
    assert not torch.allclose(before, after), "the change changed nothing"


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
        module.weight_hh_l1, module.weight_ih_l1 = module.weight_hh_l0, module.weight_ih_l0
    assert len(list(ours.parameters())) == 6
    both(theirs, ours, lambda module: trained(module, randn(3, 2, 5)))


# Copies and files.


def pickled(module):
    return pickle.loads(pickle.dumps(module))


def saved(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, pickled, saved])
def test_a_copy_is_the_same_layer_with_its_own_settings_and_weights(backend, copied):
    form = Form({"num_layers": 2, "bidirectional": True, "batch_first": True}, recompute=True)
    _, ours = form.pair(backend)
    expected = form.results(ours)
    twin, cell = copied(ours), copied(tritongru.GRUCell(3, 5, backend=backend))
    assert type(twin) is tritongru.GRU and (twin.backend, twin.recompute) == (backend, True)
    assert type(cell) is tritongru.GRUCell and cell.backend == backend
    assert same_bits(form.results(twin), expected) and repr(twin) == repr(ours)
    if copied is not copy.copy:
        with torch.no_grad():
            twin.weight_hh_l0.mul_(2)
        assert same_bits(form.results(ours), expected) and not same_bits(form.results(twin), expected)


def class_set(module):
    """What monkey-patching libraries do: torch's own object with our class."""
    module.__class__ = dict(THEIR_OWN)[type(module)]
    return module


def of_an_older_pickle(module):
    """Ours, from a state without what only ours has."""
    found = (ours := dict(THEIR_OWN)[type(module)]).__new__(ours)
    found.__setstate__(copy.deepcopy(module).__dict__)
    return found


@pytest.mark.parametrize("made", [class_set, of_an_older_pickle])
@pytest.mark.parametrize("copied", [lambda module: module, copy.copy, copy.deepcopy, pickled], ids=lambda c: c.__name__)
def test_a_layer_that_no_init_of_ours_made_has_the_defaults(backend, made, copied, monkeypatch):
    """Everything that asks for `backend` or `recompute`: calls, repr, plan, gates."""
    monkeypatch.setenv("TRITONGRU_BACKEND", backend)
    torch.manual_seed(0)
    theirs, cell = nn.GRU(3, 5, num_layers=2, batch_first=True), nn.GRUCell(3, 5)
    x = randn(3, 2, 3)
    expected, expected_h = trained(theirs, x), cell(x[0])
    expected_repr, gates = repr(theirs), tritongru.gates(theirs, x)
    ours, our_cell = copied(made(theirs)), copied(made(cell))
    assert_same(dict(enumerate(trained(ours, x))), dict(enumerate(expected)))
    assert_close(our_cell(x[0]), expected_h)
    assert repr(ours) == expected_repr and repr(our_cell) == "GRUCell(3, 5)"
    assert (ours.backend, ours.recompute, our_cell.backend) == (None, False, None)
    assert tritongru.plan(ours, x).backend == backend
    assert same_bits(tritongru.gates(ours, x), gates)
    ours.backend, ours.recompute = "reference", True
    assert repr(ours) == expected_repr[:-1] + ", backend='reference', recompute=True)"
    assert tritongru.GRU(3, 5).backend is None


def test_a_whole_module_loads_with_weights_only():
    _, layer = pair("reference", 3, 5, num_layers=2)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    assert torch.serialization.get_unsafe_globals_in_checkpoint(file) == ["tritongru.module.GRU"]  # to be trusted
    file.seek(0)
    with torch.serialization.safe_globals([tritongru.GRU]):
        loaded = torch.load(file, weights_only=True)
    assert loaded.backend == "reference" and torch.equal(loaded(randn(3, 2, 3))[0], layer(randn(3, 2, 3))[0])


# As others use a module.


def test_a_subclass_may_add_arguments_and_wrap_forward(backend):
    class Doubled(tritongru.GRU):
        def __init__(self, size, factor=2.0):
            super().__init__(3, size, backend=backend)
            self.factor = factor

        def forward(self, input, hx=None):
            output, h_n = super().forward(input, hx)
            return output * self.factor, h_n

    layer, plain = Doubled(5), PLAIN.pair(backend)[1]
    plain.load_state_dict(layer.state_dict())
    assert torch.equal(layer(randn(2, 2, 3))[0], plain(randn(2, 2, 3))[0] * 2)


def test_hooks_run(backend):
    _, ours = pair(backend, 3, 4)
    seen = []
    ours.register_forward_pre_hook(lambda module, args: seen.append("before"))
    ours.register_forward_hook(lambda module, args, result: seen.append("after"))
    ours.register_full_backward_hook(lambda module, grad_input, grad_output: seen.append("backward"))
    ours(randn(2, 2, 3).requires_grad_())[0].sum().backward()
    assert seen == ["before", "after", "backward"]


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
