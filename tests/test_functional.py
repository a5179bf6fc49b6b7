"""tritongru.gru and gru_cell in torch.gru's and torch.gru_cell's place, and what is refused: by the functions, by the
modules, and of lengths and resets, which torch does not have."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import tritongru
from tests.kit.modules import (
    FORMS,
    PLAIN,
    as_function,
    assert_close,
    assert_same,
    cell_pair,
    default_too,
    outcome,
    packed,
    pair,
    randn,
    results,
    some_forms,
    states,
    table,
)

NAMES = ("hx", "params", "has_biases", "num_layers", "dropout", "train", "bidirectional", "batch_first")


@table("form", some_forms("plain", "no-bias-batch-first", "two-layers-bidirectional", "packed", "cell"))
def test_the_functions_are_torch_s(backend, form):
    """With torch's arguments, by position and by name."""
    theirs, _ = form.pair(None)
    of_torch, ours = (torch.gru_cell, tritongru.gru_cell) if form.cell else (torch.gru, tritongru.gru)

    def by_name(*args, **how):
        first = ("data", "batch_sizes") if form.lengths else ("input",)
        names = (*first, *(("hx", "w_ih", "w_hh", "b_ih", "b_hh") if form.cell else NAMES))
        return ours(**dict(zip(names, args, strict=False)), **how)

    expected = form.results(as_function(theirs, of_torch), of=theirs)
    for function in (ours, by_name):
        assert_same(form.results(as_function(theirs, function, backend=backend), of=theirs), expected)


def z(*shape, **options):
    return torch.zeros(*shape, **options)


# Of GRU(3, 4, 2), GRUCell(3, 4), and torch.gru with the parameters of GRU(3, 4).
ERRORS = {
    "GRU": {
        "input-1d": lambda m: m(z(3)),
        "input-4d": lambda m: m(z(1, 2, 2, 3)),
        "input-0d": lambda m: m(z(())),
        "input-wrong-size": lambda m: m(z(2, 2, 5)),
        "input-unbatched-wrong-size": lambda m: m(z(2, 5)),
        "input-no-features": lambda m: m(z(2, 2, 0)),
        "input-float64": lambda m: m(z(2, 2, 3, dtype=torch.float64)),
        "input-float16": lambda m: m(z(2, 2, 3, dtype=torch.float16)),
        "input-int64": lambda m: m(z(2, 2, 3, dtype=torch.int64)),
        "input-list": lambda m: m([[[1.0, 2.0, 3.0]]]),
        "input-none": lambda m: m(None),
        "input-tuple": lambda m: m((z(2, 2, 3), z(2, 2, 3))),
        "input-on-meta": lambda m: m(z(2, 2, 3, device="meta")),
        "T-is-0": lambda m: m(z(0, 2, 3)),
        "T-is-0-unbatched": lambda m: m(z(0, 3)),
        "T-and-B-are-0": lambda m: m(z(0, 0, 3)),
        "hx-2d-for-batched": lambda m: m(z(2, 2, 3), z(2, 4)),
        "hx-4d-for-batched": lambda m: m(z(2, 2, 3), z(1, 2, 2, 4)),
        "hx-3d-for-unbatched": lambda m: m(z(2, 3), z(2, 1, 4)),
        "hx-1d-for-unbatched": lambda m: m(z(2, 3), z(4)),
        "hx-wrong-layers": lambda m: m(z(2, 2, 3), z(1, 2, 4)),
        "hx-wrong-batch": lambda m: m(z(2, 2, 3), z(2, 3, 4)),
        "hx-batch-of-1": lambda m: m(z(2, 2, 3), z(2, 1, 4)),
        "hx-wrong-hidden": lambda m: m(z(2, 2, 3), z(2, 2, 5)),
        "hx-unbatched-wrong-hidden": lambda m: m(z(2, 3), z(2, 5)),
        "hx-float64": lambda m: m(z(2, 2, 3), z(2, 2, 4, dtype=torch.float64)),
        "hx-int64": lambda m: m(z(2, 2, 3), z(2, 2, 4, dtype=torch.int64)),
        "hx-tuple": lambda m: m(z(2, 2, 3), (z(2, 2, 4), z(2, 2, 4))),
        "hx-list": lambda m: m(z(2, 2, 3), [0.0]),
        "hx-on-meta": lambda m: m(z(2, 2, 3), z(2, 2, 4, device="meta")),
        "packed-wrong-size": lambda m: m(packed(2, 4, 3, input_size=5)),
        "packed-float64": lambda m: m(packed(2, 4, 3).double()),
        "packed-hx-2d": lambda m: m(packed(2, 4, 3), z(2, 4)),
        "packed-hx-1d": lambda m: m(packed(2, 4, 3), z(4)),
        "packed-hx-wrong-layers": lambda m: m(packed(2, 4, 3), z(1, 3, 4)),
        "packed-hx-wrong-hidden": lambda m: m(packed(2, 4, 3), z(2, 3, 5)),
        "packed-hx-small-batch": lambda m: m(packed(2, 4, 3), z(2, 1, 4)),
        "packed-sorted-hx-wrong-batch": lambda m: m(packed(3, 2, enforce_sorted=True), z(2, 3, 4)),
        "packed-hx-float64": lambda m: m(packed(2, 4, 3), z(2, 3, 4, dtype=torch.float64)),
        "packed-data-3d": lambda m: m(PackedSequence(z(3, 2, 3), torch.tensor([2, 1]))),
        "packed-sizes-rise": lambda m: m(PackedSequence(z(3, 3), torch.tensor([1, 2]))),
        "no-input": lambda m: m(),
        "dropout-above-1": lambda m: setattr(m, "dropout", 1.5) or m(z(2, 2, 3)),
        "dropout-negative": lambda m: setattr(m, "dropout", -0.5) or m(z(2, 2, 3)),
        "w_hh-wrong-shape": lambda m: setattr(m, "weight_hh_l0", nn.Parameter(z(12, 5))) or m(z(2, 2, 3)),
        "w_hh-float64": lambda m: setattr(m, "weight_hh_l0", nn.Parameter(m.weight_hh_l0.double())) or m(z(2, 2, 3)),
        "w_hh-1d": lambda m: setattr(m, "weight_hh_l0", nn.Parameter(z(12))) or m(z(2, 2, 3)),
    },
    "GRUCell": {
        "input-0d": lambda m: m(z(())),
        "input-3d": lambda m: m(z(2, 2, 3)),
        "input-wrong-size": lambda m: m(z(2, 5)),
        "input-unbatched-wrong-size": lambda m: m(z(5)),
        "input-float64": lambda m: m(z(2, 3, dtype=torch.float64)),
        "input-int64": lambda m: m(z(2, 3, dtype=torch.int64)),
        "input-list": lambda m: m([1.0, 2.0, 3.0]),
        "input-none": lambda m: m(None),
        "hx-3d": lambda m: m(z(2, 3), z(1, 2, 4)),
        "hx-0d": lambda m: m(z(2, 3), z(())),
        "hx-1d-for-batched": lambda m: m(z(2, 3), z(4)),
        "hx-2d-for-unbatched": lambda m: m(z(3), z(1, 4)),
        "hx-wrong-batch": lambda m: m(z(2, 3), z(3, 4)),
        "hx-batch-of-1": lambda m: m(z(2, 3), z(1, 4)),
        "hx-wrong-hidden": lambda m: m(z(2, 3), z(2, 5)),
        "hx-float64": lambda m: m(z(2, 3), z(2, 4, dtype=torch.float64)),
        "hx-list": lambda m: m(z(2, 3), [0.0]),
        "hx-on-meta": lambda m: m(z(2, 3), z(2, 4, device="meta")),
        "no-input": lambda m: m(),
    },
    "gru": {
        "too-few": lambda f, p: f(z(2, 2, 3), z(1, 2, 4), p, True, 1),
        "too-many": lambda f, p: f(z(2, 2, 3), z(1, 2, 4), p, True, 1, 0.0, False, False, False, 1),
        "unknown-name": lambda f, p: f(z(2, 2, 3), z(1, 2, 4), p, True, 1, 0.0, False, False, first=False),
        "nothing": lambda f, p: f(),
        "T-is-0": lambda f, p: f(z(0, 2, 3), z(1, 2, 4), p, True, 1, 0.0, False, False, False),
        "params-too-few": lambda f, p: f(z(2, 2, 3), z(1, 2, 4), p[:3], True, 1, 0.0, False, False, False),
        "params-of-no-bias": lambda f, p: f(z(2, 2, 3), z(1, 2, 4), p[:2], True, 1, 0.0, False, False, False),
        "hx-wrong-layers": lambda f, p: f(z(2, 2, 3), z(2, 2, 4), p, True, 1, 0.0, False, False, False),
        "hx-2d": lambda f, p: f(z(2, 2, 3), z(2, 4), p, True, 1, 0.0, False, False, False),
        "hx-none": lambda f, p: f(z(2, 2, 3), None, p, True, 1, 0.0, False, False, False),
        "input-wrong-size": lambda f, p: f(z(2, 2, 5), z(1, 2, 4), p, True, 1, 0.0, False, False, False),
        "input-list": lambda f, p: f([1.0], z(1, 2, 4), p, True, 1, 0.0, False, False, False),
    },
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("of", "name"), [(of, name) for of in ERRORS for name in ERRORS[of]])
def test_call_errors_are_torch_s(backend, of, name):
    call = ERRORS[of][name]
    if of == "gru":
        params = list(pair(None, 3, 4)[0].parameters())
        given = ((torch.gru, params), (lambda *a, **k: tritongru.gru(*a, **k, backend=backend), params))
    else:
        given = zip(pair(backend, 3, 4, num_layers=2) if of == "GRU" else cell_pair(backend, 3, 4))
    expected, found = (outcome(lambda g=each: call(*g)) for each in given)
    assert isinstance(expected, tuple), "torch takes it"
    assert found == (expected[0], expected[1].replace("GRU.forward()", f"{tritongru.GRU.__name__}.forward()"))


def test_forward_takes_torch_s_names_and_returns_a_plain_tuple(backend):
    _, ours = pair(backend, 3, 4)
    _, cell = cell_pair(backend, 3, 4)
    x, hx = randn(2, 2, 3), randn(1, 2, 4, seed=3)
    assert torch.equal(ours(input=x, hx=hx)[0], ours(x, hx)[0])
    assert torch.equal(ours(x, hx=None)[0], ours(x)[0])
    assert torch.equal(cell(input=x[0], hx=hx[0]), cell(x[0], hx[0]))
    assert type(ours(x)) is tuple
    output, h_n = ours(packed(2, 4, 3))
    assert type(output) is PackedSequence and type(h_n) is torch.Tensor


# Sizes of nothing.


@table("options", {name: FORMS[name].options for name in ("plain", "no-bias-batch-first", "two-layers-bidirectional")})
def test_an_empty_batch_works_and_gives_nn_gru_s_gradients(backend, options):
    theirs, ours = pair(backend, 3, 4, **options)
    x = z(*((0, 3, 3) if theirs.batch_first else (3, 0, 3)))
    for hx in (None, z(states(theirs), 0, 4)):
        assert_same(results(ours, x, hx), results(theirs, x, hx))
    lengths, resets = torch.ones(0, dtype=torch.int64), torch.ones(x.shape[:2], dtype=torch.bool)
    assert [t.shape for t in ours(x, lengths=lengths, resets=resets)] == [t.shape for t in theirs(x)]
    _, cell = cell_pair(backend, 3, 4)
    assert cell(z(0, 3)).shape == cell(z(0, 3), z(0, 4)).shape == (0, 4)


def test_a_cell_without_input_features_works(backend):
    theirs, ours = cell_pair(backend, 0, 4)
    x, h = z(2, 0), randn(2, 4, seed=3)
    assert_close(ours(x, h), theirs(x, h))


@default_too
def test_on_the_meta_device_a_layer_tells_shapes_or_says_that_it_cannot(backend):
    layer = tritongru.GRU(3, 4, 2, bidirectional=True, device="meta", backend=backend)
    found = outcome(lambda: layer(torch.empty(5, 2, 3, device="meta")))
    if backend in ("reference", "step", "sequence") and isinstance(found, tuple):
        assert found[0] is RuntimeError and backend in found[1]
    else:
        assert found == [(5, 2, 8), (4, 2, 4)]


# Lengths and resets.


BOOL, INT = torch.bool, torch.int64
PADDED_ERRORS = {
    "length-of-0": (dict(lengths=torch.tensor([1, 0, 2])), RuntimeError, "larger than 0 in RNN, .*: got 0 where"),
    "length-below-0": (dict(lengths=torch.tensor([1, -3, 2])), RuntimeError, "got -3 where input has 4 steps"),
    "length-above-T": (dict(lengths=torch.tensor([1, 5, 2])), RuntimeError, "got 5 where input has 4 steps"),
    "lengths-of-another-batch": (
        dict(lengths=torch.ones(2, dtype=INT)), RuntimeError, r"lengths must be a tensor \[3\] of integers .*got \[2\]"
    ),
    "lengths-of-reals": (dict(lengths=torch.ones(3)), RuntimeError, r"of integers on cpu, got \[3\] of torch.float32"),
    "lengths-in-a-list": (dict(lengths=[1, 2, 3]), TypeError, r"lengths must be a tensor \[3\] of integers.*got list"),
    "resets-of-another-time": (
        dict(resets=torch.ones(3, 3, dtype=BOOL)), RuntimeError, r"resets must be a tensor \[4, 3\] .*got \[3, 3\]"
    ),
    "resets-of-integers": (
        dict(resets=torch.ones(4, 3, dtype=INT)), RuntimeError, r"of bool on cpu, got \[4, 3\] of torch.int64"
    ),
    "resets-elsewhere": (
        dict(resets=torch.ones(4, 3, dtype=BOOL, device="meta")), RuntimeError, "of bool on cpu, got .* on meta"
    ),
}  # fmt: skip


@default_too
@table("given, error, message", PADDED_ERRORS)
def test_errors_name_the_argument(backend, given, error, message):
    with pytest.raises(error, match=message):
        PLAIN.pair(backend)[1](randn(4, 3, 3), **given)


@default_too
def test_lengths_and_resets_are_keyword_only_and_shapes_in_errors_are_the_caller_s(backend):
    with pytest.raises(TypeError, match="takes from 2 to 3 positional arguments but 4 were given"):
        tritongru.GRU(2, 3, backend=backend)(randn(4, 3, 2), None, torch.ones(3, dtype=INT))
    layer = tritongru.GRU(2, 3, batch_first=True, backend=backend)
    with pytest.raises(RuntimeError, match=r"resets must be a tensor \[3, 4\] of bool on cpu, got \[4, 3\]"):
        layer(randn(3, 4, 2), resets=torch.ones(4, 3, dtype=BOOL))


@default_too
@pytest.mark.parametrize("name", ["lengths", "resets"])
def test_packed_input_has_lengths_of_its_own(backend, name):
    layer = tritongru.GRU(2, 3, backend=backend)
    given = pack_padded_sequence(randn(4, 2, 2), [4, 2])
    with pytest.raises(RuntimeError, match=f"{name} must be None with a PackedSequence.*got a tensor"):
        layer(given, **{name: torch.ones(2)})
    with pytest.raises(RuntimeError, match=f"{name} must be None with packed input.*got a tensor"):
        as_function(layer, tritongru.gru, backend=backend)(given, z(1, 2, 3), **{name: torch.ones(2)})


@default_too
def test_what_nn_gru_refuses_is_refused_in_its_words_with_resets_too(backend):
    theirs, layer, resets = nn.GRU(2, 3), tritongru.GRU(2, 3, backend=backend), torch.zeros(4, 3, dtype=BOOL)
    for x, h_0 in ((randn(4, 3, 5), None), (randn(4, 3, 2), z(1, 2, 3)), (randn(4), None)):
        expected = outcome(lambda x=x, h_0=h_0: theirs(x, h_0))
        assert isinstance(expected, tuple)
        assert outcome(lambda x=x, h_0=h_0: layer(x, h_0, resets=resets)) == expected
