"""tritongru.GRU, GRUCell, gru and gru_cell in torch's place: construction, state, copies, subclasses, weights that
change between two calls; and what is refused, of lengths and resets too. Tolerance: tests/kit/modules.py."""

import copy
import inspect
import io
import pickle
from functools import partial
from itertools import product

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils.rnn import PackedSequence

import tritongru
from tests.kit import modules as kit

LAYERS = {name: kit.FORMS[name].options for name in ("plain", "no-bias-batch-first", "two-layers-bidirectional")}
THEIR_OWN = ((nn.GRU, tritongru.GRU), (nn.GRUCell, tritongru.GRUCell))


def test_our_own_arguments_are_keyword_only():
    of_gru = ["input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional"]
    for theirs, ours in THEIR_OWN:
        assert issubclass(ours, theirs)
        positional = [n for n, p in inspect.signature(ours).parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
        assert positional == (of_gru if theirs is nn.GRU else list(inspect.signature(theirs).parameters))
        assert list(inspect.signature(ours.forward).parameters)[:3] == ["self", "input", "hx"]
    assert repr(tritongru.GRU(3, 4, 2, False, True, 0.25, True)) == repr(nn.GRU(3, 4, 2, False, True, 0.25, True))
    assert repr(tritongru.GRUCell(3, 4, False)) == repr(nn.GRUCell(3, 4, False))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kinds", THEIR_OWN, ids=("GRU", "GRUCell"))
def test_the_same_seed_gives_the_same_parameters_and_leaves_the_same_random_state(kinds, dtype):
    for options in LAYERS.values() if kinds[0] is nn.GRU else ({}, {"bias": False}):
        found = []
        for kind in kinds:
            torch.manual_seed(7)
            module = kind(3, 4, **options, dtype=dtype)
            first = {name: p.clone() for name, p in module.state_dict().items()}
            module.reset_parameters()
            found.append((first, module.state_dict(), {"": torch.get_rng_state()}))
        assert all(kit.same_bits(a, e) for a, e in zip(*found, strict=True))
    with torch.device("meta"):
        assert {(p.device.type, p.dtype) for p in kinds[1](3, 4, dtype=dtype).parameters()} == {("meta", dtype)}


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


@pytest.mark.parametrize(("name", "value"), [(name, value) for name in WRONG for value in WRONG[name]], ids=str)
@pytest.mark.parametrize("kinds", THEIR_OWN, ids=("GRU", "GRUCell"))
def test_construction_ends_as_torch_s(kinds, name, value):
    given = {"input_size": 3, "hidden_size": 4} | {name: value}
    expected, found = (kit.outcome(lambda kind=kind: list(kind(**given).parameters())) for kind in kinds)
    assert found == expected


@kit.table("options", LAYERS)
def test_names_and_order_of_the_state_and_the_repr_are_torch_s(options):
    named = repr(tritongru.GRU(3, 4, **options, backend="reference", recompute=True))
    assert "backend='reference'" in named and "recompute=True" in named
    of_cell = {"cell": True, "bias": options.get("bias", True)}
    for theirs, ours in (kit.pair(None, 3, 4, **options), kit.pair(None, 3, 4, **of_cell)):
        assert list(ours.state_dict()) == list(theirs.state_dict()) == [n for n, _ in ours.named_parameters()]
        assert ours.state_dict()._metadata == theirs.state_dict()._metadata
        assert not list(ours.buffers()) and not list(ours.children()) and repr(ours) == repr(theirs)


def through_a_file(what, *trusted):
    torch.save(what, file := io.BytesIO())
    with torch.serialization.safe_globals(list(trusted)):
        return torch.load(io.BytesIO(file.getvalue()), weights_only=True)


@kit.table("options", LAYERS)
def test_a_checkpoint_goes_both_ways(backend, options):
    theirs, ours = kit.pair(backend, 3, 4, **options)
    for source, target in ((theirs, ours), (ours, theirs)):
        target(kit.randn(2, 2, 3))
        with torch.no_grad():
            source.weight_ih_l0.mul_(0.5)
        state = through_a_file(source.state_dict())
        assert str(target.load_state_dict(state, strict=True)) == "<All keys matched successfully>"
        kit.both(theirs, ours, lambda module: module(kit.randn(2, 2, 3)))
    wrong = nn.GRU(3, 5, 2).state_dict()
    assert kit.outcome(lambda: ours.load_state_dict(wrong)) == kit.outcome(lambda: theirs.load_state_dict(wrong))


# Weights that change between two calls. The first call may leave nothing behind that the second one believes.


class Halved(nn.Module):
    def forward(self, weight):
        return weight / 2


def swapped(module, x):
    del module.bias_ih_l1
    module.register_parameter("bias_ih_l1", nn.Parameter(torch.ones(15)))


def parametrized_for_a_while(module, x):
    parametrize.register_parametrization(module, "weight_hh_l0", Halved())
    module(x)
    parametrize.remove_parametrizations(module, "weight_hh_l0")


CHANGES = {
    "to-and-back": lambda m, x: m.double().float().weight_hh_l0.data.mul_(2),
    "setattr": lambda m, x: setattr(m, "weight_hh_l0", nn.Parameter(m.weight_hh_l0.detach() * 0.5)),
    "delete-and-register": swapped,
    "data-mul_": lambda m, x: m.weight_hh_l0.data.mul_(0.5),
    "data-of-all-assigned": lambda m, x: [setattr(p, "data", p.data * 0.5) for p in m.parameters()],
    "data-not-contiguous": lambda m, x: setattr(m.weight_hh_l0, "data", m.weight_hh_l0.data.t().clone().t() * 0.5),
    "load-assign": lambda m, x: m.load_state_dict({n: p * 0.5 for n, p in m.state_dict().items()}, assign=True),
    "tied": lambda m, x: [setattr(m, "weight_hh_l1", m.weight_hh_l0), setattr(m, "bias_hh_l1", m.bias_ih_l0)],
    "parametrization": lambda m, x: parametrize.register_parametrization(m, "weight_hh_l0", Halved()),
    "parametrization-removed": parametrized_for_a_while,
    "spectral_norm": lambda m, x: parametrizations.spectral_norm(m.eval(), "weight_hh_l0"),
    "weight_norm": lambda m, x: nn.utils.weight_norm(m, "weight_hh_l0").weight_hh_l0_g.data.mul_(2),
    "prune": lambda m, x: prune.l1_unstructured(m, "weight_hh_l0", 0.5),
    "reset_parameters": lambda m, x: (torch.manual_seed(11), m.reset_parameters()),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@kit.table("change", CHANGES)
def test_the_next_call_sees_changed_weights(backend, change):
    theirs, ours = kit.pair(backend, 3, 5, num_layers=2)
    x = kit.randn(2, 2, 3)
    before = ours(x)[0].detach()
    for module in (theirs, ours):
        torch.manual_seed(4)
        change(module, x)
    after = kit.results(ours, x)
    kit.assert_same(after, kit.results(theirs, x))
    assert not torch.allclose(before, after["output"]), "the change changed nothing"


def pickled(module):
    return pickle.loads(pickle.dumps(module))


COPIES = {"deepcopy": copy.deepcopy, "copy": copy.copy, "pickle": pickled}


@kit.table("copied", COPIES | {"file": lambda module: through_a_file(module, type(module))})
def test_a_copy_is_the_same_layer_with_its_own_settings_and_weights(backend, copied):
    form = kit.Form({"num_layers": 2, "bidirectional": True, "batch_first": True}, recompute=True)
    _, ours = form.pair(backend)
    expected = form.results(ours)
    twin, cell = copied(ours), copied(tritongru.GRUCell(3, 5, backend=backend))
    assert type(twin) is tritongru.GRU and (twin.backend, twin.recompute) == (backend, True)
    assert type(cell) is tritongru.GRUCell and cell.backend == backend
    assert kit.same_bits(form.results(twin), expected) and repr(twin) == repr(ours)
    if copied is not copy.copy:
        with torch.no_grad():
            twin.weight_hh_l0.mul_(2)
        assert kit.same_bits(form.results(ours), expected) and not kit.same_bits(form.results(twin), expected)


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
@kit.table("copied", COPIES | {"itself": lambda module: module})
def test_a_layer_that_no_init_of_ours_made_has_the_defaults(backend, made, copied, monkeypatch):
    """Everything that asks for `backend` or `recompute`: calls, repr, plan, gates."""
    monkeypatch.setenv("TRITONGRU_BACKEND", backend)
    theirs, cell, x = nn.GRU(3, 5, num_layers=2, batch_first=True), nn.GRUCell(3, 5), kit.randn(3, 2, 3)
    expected, expected_h = kit.results(theirs, x), cell(x[0])
    expected_repr, gates = repr(theirs), tritongru.gates(theirs, x)
    ours, our_cell = copied(made(theirs)), copied(made(cell))
    kit.assert_same(kit.results(ours, x) | {"cell": our_cell(x[0])}, expected | {"cell": expected_h})
    assert repr(ours) == expected_repr and repr(our_cell) == "GRUCell(3, 5)"
    assert (ours.backend, ours.recompute, our_cell.backend) == (None, False, None)
    assert tritongru.plan(ours, x).backend == backend
    assert kit.same_bits(tritongru.gates(ours, x), gates)
    ours.backend, ours.recompute = "reference", True
    assert repr(ours) == expected_repr[:-1] + ", backend='reference', recompute=True)"
    assert tritongru.GRU(3, 5).backend is None


def test_a_subclass_may_add_arguments_and_wrap_forward_and_hooks_run(backend):
    class Doubled(tritongru.GRU):
        def __init__(self, size, factor=2.0):
            super().__init__(3, size, backend=backend)
            self.factor = factor

        def forward(self, input, hx=None):
            output, h_n = super().forward(input, hx)
            return output * self.factor, h_n

    layer, plain, seen = Doubled(5), kit.PLAIN.pair(backend)[1], []
    plain.load_state_dict(layer.state_dict())
    layer.register_forward_hook(lambda module, args, result: seen.append("forward"))
    layer.register_full_backward_hook(lambda module, grad_input, grad_output: seen.append("backward"))
    output, _ = layer(kit.randn(2, 2, 3).requires_grad_())
    assert torch.equal(output, plain(kit.randn(2, 2, 3))[0] * 2)
    output.sum().backward()
    assert seen == ["forward", "backward"]


@pytest.mark.filterwarnings("ignore")
def test_what_does_not_know_the_subclass():
    """By type and not by isinstance: a scripting compiler, a tracer's leaves, a table of what to quantise."""
    theirs, ours = kit.pair(None, 3, 5)
    torch.jit.script(theirs)
    with pytest.raises(Exception, match=r"(?i)compil|unknown|not supported|Unsupported|keyword"):
        torch.jit.script(ours)
    torch.fx.symbolic_trace(nn.Sequential(theirs))
    with pytest.raises(Exception, match=r"Proxy|control flow|iterated|bool|trace"):
        torch.fx.symbolic_trace(nn.Sequential(ours))
    both = (torch.ao.quantization.quantize_dynamic(nn.Sequential(m), {nn.GRU})[0] for m in (theirs, ours))
    assert [type(m) is not kind for m, kind in zip(both, (nn.GRU, tritongru.GRU), strict=True)] == [True, False]


# The functions, and what is refused: in torch's words; and what torch takes, sizes of nothing among it, has its shapes.

z, ones = torch.zeros, partial(torch.ones, dtype=torch.int64)
NAMES = ("hx", "params", "has_biases", "num_layers", "dropout", "train", "bidirectional", "batch_first")


@kit.table("form", kit.some_forms("plain", "no-bias-batch-first", "two-layers-bidirectional", "packed", "cell"))
def test_the_functions_are_torch_s(backend, form):
    theirs, _ = form.pair(None)
    of_torch, ours = (torch.gru_cell, tritongru.gru_cell) if form.cell else (torch.gru, tritongru.gru)

    def by_name(*args, **how):
        first = ("data", "batch_sizes") if form.lengths else ("input",)
        names = (*first, *(("hx", "w_ih", "w_hh", "b_ih", "b_hh") if form.cell else NAMES))
        return ours(**dict(zip(names, args, strict=False)), **how)

    expected = form.results(kit.as_function(theirs, of_torch), of=theirs)
    for function in (ours, by_name):
        kit.assert_same(form.results(kit.as_function(theirs, function, backend=backend), of=theirs), expected)


def all_end_alike(calls, theirs, ours):
    """`calls` by torch's module or function and by ours; how many are refused."""
    expected, found = ([kit.outcome(lambda call=call, of=of: call(of)) for call in calls] for of in (theirs, ours))
    assert found == expected
    return sum(isinstance(end, tuple) for end in found)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("cell", [False, True], ids=["GRU", "GRUCell"])
def test_inputs_and_states_of_any_shape_end_as_torch_s(backend, cell):
    theirs, ours = kit.pair(backend, 3, 4, cell=True) if cell else kit.pair(backend, 3, 4, 2)
    sizes = [(), (0,), (3,), (5,), (0, 3), (2, 3), (2, 5), (2, 0), (0, 2, 3), (2, 0, 3), (0, 0, 3), (2, 2, 3)]
    inputs = [*map(z, (*sizes, (2, 2, 5), (2, 2, 0), (1, 2, 2, 3))), None, [1.0], z(2, 2, 3, device="meta")]
    inputs += [z(2, 3, dtype=torch.int64), z(2, 3, dtype=torch.float64), z(2, 2, 3, dtype=torch.float16), (z(2, 2, 3),)]
    inputs += [kit.packed(2, 4, 3), kit.packed(3, 2, enforce_sorted=True), kit.packed(2, 4, 3, input_size=5)]
    inputs += [kit.packed(2, 4, 3).double(), PackedSequence(z(3, 2, 3), torch.tensor([2, 1]))]
    inputs += [PackedSequence(z(3, 3), torch.tensor([1, 2]))]
    sizes = [(), (4,), (2, 4), (2, 5), (1, 4), (0, 4), (2, 0, 4), (2, 2, 4), (2, 1, 4), (1, 2, 4), (2, 2, 5)]
    states = [None, *map(z, (*sizes, (2, 3, 4), (1, 2, 2, 4))), z(2, 2, 4, device="meta"), [0.0]]
    states += [z(2, 4, dtype=torch.float64), z(2, 2, 4, dtype=torch.int64), z(1, 3, 4), (z(2, 2, 4), z(2, 2, 4))]
    calls = [lambda m, x=x, h=h: m(x, h) for x, h in product(inputs, states)]
    assert all_end_alike(calls, theirs, ours) > 300


OTHERS = {
    "no-input": lambda m: m(),
    "dropout-above-1": lambda m: setattr(m, "dropout", 1.5) or m(z(2, 2, 3)),
    "dropout-negative": lambda m: setattr(m, "dropout", -0.5) or m(z(2, 2, 3)),
    "w_hh-wrong-shape": lambda m: setattr(m, "weight_hh_l0", nn.Parameter(z(12, 5))) or m(z(2, 2, 3)),
    "w_hh-float64": lambda m: setattr(m, "weight_hh_l0", nn.Parameter(z(12, 4).double())) or m(z(2, 2, 3)),
    "w_hh-1d": lambda m: setattr(m, "weight_hh_l0", nn.Parameter(z(12))) or m(z(2, 2, 3)),
}


@pytest.mark.filterwarnings("ignore")
@kit.table("call", OTHERS)
def test_other_errors_of_a_call_are_torch_s(backend, call):
    assert all_end_alike([call], *kit.pair(backend, 3, 4, num_layers=2)) == 1


def test_errors_of_the_function_are_torch_s(backend):
    x, h, p = z(2, 2, 3), z(1, 2, 4), list(nn.GRU(3, 4).parameters())
    flags = (True, 1, 0.0, False, False, False)
    given = [(x, h, p, True, 1), (x, h, p, *flags, 1), (), (z(0, 2, 3), h, p, *flags), ([1.0], h, p, *flags)]
    given += [(x, h, some, *flags) for some in (p[:3], p[:2])] + [(z(2, 2, 5), h, p, *flags)]
    given += [(x, wrong, p, *flags) for wrong in (z(2, 2, 4), z(2, 4), None)]
    given += [(x, h, p, *flags[:i], wrong, *flags[i + 1 :]) for i in range(6) for wrong in ([0.0], None, "a")]
    calls = [lambda gru, args=args: gru(*args) for args in given]
    calls.append(lambda gru: gru(x, h, p, True, 1, 0.0, False, False, first=False))
    assert all_end_alike(calls, torch.gru, lambda *a, **k: tritongru.gru(*a, **k, backend=backend)) == len(calls)


@kit.table("form", kit.some_forms("plain", "no-bias-batch-first", "two-layers-bidirectional"))
def test_an_empty_batch_and_a_cell_without_input_features_are_torch_s(backend, form):
    theirs, ours = kit.pair(backend, 3, 4, **form.options)
    x = z(*((0, 3, 3) if theirs.batch_first else (3, 0, 3)))
    for hx in (None, z(kit.states(theirs), 0, 4)):
        kit.assert_same(kit.results(ours, x, hx), kit.results(theirs, x, hx))
    lengths, resets = torch.ones(0, dtype=torch.int64), torch.ones(x.shape[:2], dtype=torch.bool)
    assert [t.shape for t in ours(x, lengths=lengths, resets=resets)] == [t.shape for t in theirs(x)]
    assert torch.vmap(lambda x: ours(x, resets=resets)[0])(x[None]).shape == (1, *theirs(x)[0].shape)
    kit.both(*kit.pair(backend, 0, 4, cell=True), lambda cell: [cell(z(2, 0), kit.randn(2, 4, seed=3))])


@kit.default_too
def test_on_the_meta_device_a_layer_tells_shapes_or_says_that_it_cannot(backend):
    layer = tritongru.GRU(3, 4, 2, bidirectional=True, device="meta", backend=backend)
    found = kit.outcome(lambda: layer(z(5, 2, 3, device="meta")))
    if backend in ("reference", "step", "sequence") and isinstance(found, tuple):
        assert found[0] is RuntimeError and backend in found[1]
    else:
        assert found == [(5, 2, 8), (4, 2, 4)]


# Lengths and resets.

BOOL = torch.bool
OUTSIDE = "larger than 0 in RNN, .*: got {} where input has 4 steps"
LENGTHS = r"lengths must be a tensor \[3\] of integers on cpu, got "
RESETS = r"resets must be a tensor \[4, 3\] of bool on cpu, got "
PADDED_ERRORS = {
    "length-of-0": ({"lengths": torch.tensor([1, 0, 2])}, RuntimeError, OUTSIDE.format(0)),
    "length-below-0": ({"lengths": torch.tensor([1, -3, 2])}, RuntimeError, OUTSIDE.format(-3)),
    "length-above-T": ({"lengths": torch.tensor([1, 5, 2])}, RuntimeError, OUTSIDE.format(5)),
    "lengths-of-another-batch": ({"lengths": ones(2)}, RuntimeError, LENGTHS + r"\[2\]"),
    "lengths-of-reals": ({"lengths": ones(3, dtype=torch.float32)}, RuntimeError, LENGTHS + r"\[3\] of torch.float32"),
    "lengths-in-a-list": ({"lengths": [1, 2, 3]}, TypeError, LENGTHS + "list"),
    "resets-of-another-time": ({"resets": ones(3, 3, dtype=BOOL)}, RuntimeError, RESETS + r"\[3, 3\]"),
    "resets-of-integers": ({"resets": ones(4, 3)}, RuntimeError, RESETS + r"\[4, 3\] of torch.int64"),
    "resets-elsewhere": ({"resets": ones(4, 3, dtype=BOOL, device="meta")}, RuntimeError, RESETS + ".* on meta"),
}


@kit.default_too
@kit.table("given, error, message", PADDED_ERRORS)
def test_errors_name_the_argument(backend, given, error, message):
    with pytest.raises(error, match=message):
        kit.PLAIN.pair(backend)[1](kit.randn(4, 3, 3), **given)


@kit.default_too
def test_lengths_and_resets_are_keyword_only_and_shapes_in_errors_are_the_caller_s(backend):
    with pytest.raises(TypeError, match="takes from 2 to 3 positional arguments but 4 were given"):
        tritongru.GRU(2, 3, backend=backend)(kit.randn(4, 3, 2), None, ones(3))
    layer = tritongru.GRU(2, 3, batch_first=True, backend=backend)
    with pytest.raises(RuntimeError, match=r"resets must be a tensor \[3, 4\] of bool on cpu, got \[4, 3\]"):
        layer(kit.randn(3, 4, 2), resets=ones(4, 3, dtype=BOOL))


@kit.default_too
@pytest.mark.parametrize("name", ["lengths", "resets"])
def test_packed_input_has_lengths_of_its_own(backend, name):
    layer = tritongru.GRU(3, 4, backend=backend)
    function = kit.as_function(layer, tritongru.gru, backend=backend)
    for call, hx in ((layer, None), (function, z(1, 3, 4))):
        with pytest.raises(RuntimeError, match=f"{name} must be None with packed input.*got a tensor"):
            call(kit.packed(2, 4, 3), hx, **{name: ones(3)})


@kit.default_too
def test_what_nn_gru_refuses_is_refused_in_its_words_with_resets_too(backend):
    theirs, layer, resets = nn.GRU(2, 3), tritongru.GRU(2, 3, backend=backend), z(4, 3, dtype=BOOL)
    for x, h_0 in ((kit.randn(4, 3, 5), None), (kit.randn(4, 3, 2), z(1, 2, 3)), (kit.randn(4), None)):
        expected = kit.outcome(lambda x=x, h_0=h_0: theirs(x, h_0))
        assert isinstance(expected, tuple)
        assert kit.outcome(lambda x=x, h_0=h_0: layer(x, h_0, resets=resets)) == expected
