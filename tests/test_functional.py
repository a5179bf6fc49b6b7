"""tritongru.gru and gru_cell in torch.gru's and torch.gru_cell's place, and what is refused: by the functions, by the
modules, and of lengths and resets, which torch does not have."""

from itertools import product

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

import tritongru
from tests.kit import modules as kit

NAMES = ("hx", "params", "has_biases", "num_layers", "dropout", "train", "bidirectional", "batch_first")


@kit.table("form", kit.some_forms("plain", "no-bias-batch-first", "two-layers-bidirectional", "packed", "cell"))
def test_the_functions_are_torch_s(backend, form):
    """With torch's arguments, by position and by name."""
    theirs, _ = form.pair(None)
    of_torch, ours = (torch.gru_cell, tritongru.gru_cell) if form.cell else (torch.gru, tritongru.gru)

    def by_name(*args, **how):
        first = ("data", "batch_sizes") if form.lengths else ("input",)
        names = (*first, *(("hx", "w_ih", "w_hh", "b_ih", "b_hh") if form.cell else NAMES))
        return ours(**dict(zip(names, args, strict=False)), **how)

    expected = form.results(kit.as_function(theirs, of_torch), of=theirs)
    for function in (ours, by_name):
        kit.assert_same(form.results(kit.as_function(theirs, function, backend=backend), of=theirs), expected)


# What torch refuses is refused in its words, and what it takes, sizes of nothing among it, has its shapes.


def z(*shape, **options):
    return torch.zeros(*shape, **options)


def all_end_alike(calls, theirs, ours):
    """`calls` by torch's module or function and by ours; how many are refused."""
    expected, found = ([kit.outcome(lambda call=call, of=of: call(of)) for call in calls] for of in (theirs, ours))
    assert found == expected
    return sum(isinstance(end, tuple) for end in found)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("cell", [False, True], ids=["GRU", "GRUCell"])
def test_inputs_and_states_of_any_shape_end_as_torch_s(backend, cell):
    """Of GRU(3, 4, 2) and GRUCell(3, 4)."""
    theirs, ours = kit.cell_pair(backend, 3, 4) if cell else kit.pair(backend, 3, 4, 2)
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
def test_an_empty_batch_has_nn_gru_s_gradients(backend, form):
    theirs, ours = kit.pair(backend, 3, 4, **form.options)
    x = z(*((0, 3, 3) if theirs.batch_first else (3, 0, 3)))
    for hx in (None, z(kit.states(theirs), 0, 4)):
        kit.assert_same(kit.results(ours, x, hx), kit.results(theirs, x, hx))
    lengths, resets = torch.ones(0, dtype=torch.int64), torch.ones(x.shape[:2], dtype=torch.bool)
    assert [t.shape for t in ours(x, lengths=lengths, resets=resets)] == [t.shape for t in theirs(x)]


def test_a_cell_without_input_features_works(backend):
    theirs, ours = kit.cell_pair(backend, 0, 4)
    kit.both(theirs, ours, lambda cell: [cell(z(2, 0), kit.randn(2, 4, seed=3))])


@kit.default_too
def test_on_the_meta_device_a_layer_tells_shapes_or_says_that_it_cannot(backend):
    layer = tritongru.GRU(3, 4, 2, bidirectional=True, device="meta", backend=backend)
    found = kit.outcome(lambda: layer(z(5, 2, 3, device="meta")))
    if backend in ("reference", "step", "sequence") and isinstance(found, tuple):
        assert found[0] is RuntimeError and backend in found[1]
    else:
        assert found == [(5, 2, 8), (4, 2, 4)]


# Lengths and resets.


def ones(*shape, dtype=torch.int64, **options):
    return torch.ones(*shape, dtype=dtype, **options)


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
    for call, hx, what in ((layer, None, "a PackedSequence"), (function, z(1, 3, 4), "packed input")):
        with pytest.raises(RuntimeError, match=f"{name} must be None with {what}.*got a tensor"):
            call(kit.packed(2, 4, 3), hx, **{name: ones(3)})


@kit.default_too
def test_what_nn_gru_refuses_is_refused_in_its_words_with_resets_too(backend):
    theirs, layer, resets = nn.GRU(2, 3), tritongru.GRU(2, 3, backend=backend), z(4, 3, dtype=BOOL)
    for x, h_0 in ((kit.randn(4, 3, 5), None), (kit.randn(4, 3, 2), z(1, 2, 3)), (kit.randn(4), None)):
        expected = kit.outcome(lambda x=x, h_0=h_0: theirs(x, h_0))
        assert isinstance(expected, tuple)
        assert kit.outcome(lambda x=x, h_0=h_0: layer(x, h_0, resets=resets)) == expected
