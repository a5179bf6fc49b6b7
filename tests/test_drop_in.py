"""tritongru.GRU and GRUCell in torch.nn's place: construction, state, calls and errors.

Every test holds a layer against torch's own with the same parameters, on each backend.

Values in float32 agree within 32 * eps * sqrt(K) times the larger of 1 and the largest expected element, where
K = I + H + T * B: the longest product behind an output has max(I, H) terms, the one behind a weight gradient T * B;
rounding errors add up as a random walk, and 32 covers the few steps in sequence and the constants of tanh and sigmoid.
"""

import copy
import inspect
import math
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence, pad_packed_sequence

import tritongru

EPS = torch.finfo(torch.float32).eps
STEP = pytest.param("step", marks=pytest.mark.interpreted)
SEQUENCE = pytest.param("sequence", marks=pytest.mark.interpreted)
BACKENDS = ["aten", "reference", STEP, SEQUENCE]
OURS = ["reference", STEP, SEQUENCE]  # the backends that are not PyTorch's own path

LAYERS = {
    "plain": {},
    "no-bias": {"bias": False},
    "batch-first": {"batch_first": True},
    "bidirectional": {"bidirectional": True},
    "two-layers": {"num_layers": 2},
    "two-layers-bidirectional-batch-first": {"num_layers": 2, "bidirectional": True, "batch_first": True},
    "two-layers-bidirectional-no-bias": {"num_layers": 2, "bidirectional": True, "bias": False},
}


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


SOME = ["plain", "two-layers-bidirectional-batch-first", "two-layers-bidirectional-no-bias"]


@pytest.fixture(params=list(LAYERS))
def options(request):
    return LAYERS[request.param]


@pytest.fixture(params=SOME)
def some_options(request):
    return LAYERS[request.param]


def pair(backend, *sizes, seed=0, recompute=False, **options):
    """torch.nn.GRU and tritongru.GRU with the same parameters."""
    torch.manual_seed(seed)
    theirs = nn.GRU(*sizes, **options)
    ours = tritongru.GRU(*sizes, **options, backend=backend, recompute=recompute)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def cell_pair(backend, *sizes, seed=0, **options):
    torch.manual_seed(seed)
    theirs = nn.GRUCell(*sizes, **options)
    ours = tritongru.GRUCell(*sizes, **options, backend=backend)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def states(module):
    return module.num_layers * (2 if module.bidirectional else 1)


def tensors(result):
    """The tensors of what a layer or a cell returned."""
    if isinstance(result, torch.Tensor):
        return [result]
    output, h_n = result
    return [output.data if isinstance(output, PackedSequence) else output, h_n]


def assert_close(actual, expected, terms, what=""):
    """Within the tolerance of this file's docstring; `terms` is its K."""
    assert actual.shape == expected.shape and actual.dtype == expected.dtype, what
    scale = max(1.0, expected.detach().abs().max().item()) if expected.numel() else 1.0
    torch.testing.assert_close(
        actual, expected, rtol=0, atol=32 * EPS * math.sqrt(terms) * scale, msg=lambda m: f"{what}: {m}"
    )


def assert_same(theirs, ours, input, hx=None, seed=1):
    """Same output, h_n and, for random cotangents on both, gradients of input, h_0 and every parameter."""
    found = []
    for module in (theirs, ours):
        data = (input.data if isinstance(input, PackedSequence) else input).detach().clone().requires_grad_()
        given = PackedSequence(data, *input[1:]) if isinstance(input, PackedSequence) else data
        h_0 = None if hx is None else hx.detach().clone().requires_grad_()
        results = tensors(module(given, h_0))
        generator = torch.Generator().manual_seed(seed)
        cotangents = [torch.randn(r.shape, generator=generator) for r in results]
        leaves = {"input": data, **({} if hx is None else {"h_0": h_0}), **dict(module.named_parameters())}
        gradients = torch.autograd.grad(results, list(leaves.values()), cotangents)
        names = ["output", "h_n"] if len(results) == 2 else ["h"]
        names += [f"d{leaf}" for leaf in leaves]
        found.append(dict(zip(names, (*results, *gradients), strict=True)))
    expected, actual = found
    assert expected.keys() == actual.keys()
    rows = expected.get("output", expected.get("h")).numel() // theirs.hidden_size
    for name in expected:
        assert_close(actual[name], expected[name], theirs.input_size + theirs.hidden_size + rows, name)


def outcome(call):
    """What a call ends in: the type and message of its exception, or the shapes of what it returned."""
    try:
        result = call()
    except Exception as error:
        return type(error), str(error)
    return [t.shape for t in tensors(result)]


def randn(*shape, seed=2):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def packed(lengths=(2, 4, 3), input_size=3, enforce_sorted=False):
    return pack_sequence([randn(n, input_size, seed=n) for n in lengths], enforce_sorted=enforce_sorted)


def test_the_layers_are_torchs_own_classes():
    assert issubclass(tritongru.GRU, nn.GRU) and issubclass(tritongru.GRUCell, nn.GRUCell)
    assert isinstance(tritongru.GRU(3, 4), nn.RNNBase)


def test_positional_arguments_have_nn_gru_s_order():
    layer = tritongru.GRU(3, 4, 2, False, True, 0.25, True)
    assert (layer.input_size, layer.hidden_size, layer.num_layers, layer.bias) == (3, 4, 2, False)
    assert (layer.batch_first, layer.dropout, layer.bidirectional) == (True, 0.25, True)
    cell = tritongru.GRUCell(3, 4, False)
    assert (cell.input_size, cell.hidden_size, cell.bias) == (3, 4, False)


@pytest.mark.parametrize("eighth", ["cpu", None, torch.device("cpu")], ids=["cpu-string", "None", "device"])
def test_an_eighth_positional_argument_is_a_type_error(eighth):
    for layer in (nn.GRU, tritongru.GRU):
        with pytest.raises(TypeError):
            layer(3, 4, 1, True, False, 0.0, False, eighth)


def test_our_own_arguments_are_keyword_only():
    for layer in (tritongru.GRU, tritongru.GRUCell):
        parameters = inspect.signature(layer).parameters
        ours = {name for name in ("backend", "recompute") if name in parameters}
        assert "backend" in ours
        assert all(parameters[name].kind is inspect.Parameter.KEYWORD_ONLY for name in ours)


def test_device_and_dtype():
    layer = tritongru.GRU(3, 4, device="meta", dtype=torch.float64)
    cell = tritongru.GRUCell(3, 4, device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in layer.parameters()} == {("meta", torch.float64)}
    assert {(p.device.type, p.dtype) for p in cell.parameters()} == {("meta", torch.bfloat16)}
    with torch.device("meta"):
        assert tritongru.GRU(3, 4).weight_hh_l0.device.type == "meta"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_the_same_seed_gives_the_same_parameters_and_leaves_the_same_random_state(options, dtype):
    found = []
    for layer in (nn.GRU, tritongru.GRU):
        torch.manual_seed(7)
        module = layer(3, 4, **options, dtype=dtype)
        found.append((module.state_dict(), torch.get_rng_state()))
    (expected, state), (actual, our_state) = found
    assert list(expected) == list(actual)
    assert all(torch.equal(expected[name], actual[name]) for name in expected)
    assert torch.equal(state, our_state)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_the_same_seed_gives_the_same_cell_and_reset_draws_the_same_again(bias):
    found = []
    for cell in (nn.GRUCell, tritongru.GRUCell):
        torch.manual_seed(7)
        module = cell(3, 4, bias)
        module.reset_parameters()
        found.append([*module.parameters(), torch.get_rng_state()])
    assert len(found[0]) == len(found[1]) == (5 if bias else 3)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


CONSTRUCTION_ERRORS = {
    "bias-int": {"bias": 1},
    "bias-none": {"bias": None},
    "batch_first-int": {"batch_first": 1},
    "input_size-float": {"input_size": 3.0},
    "input_size-zero": {"input_size": 0},
    "input_size-negative": {"input_size": -3},
    "hidden_size-float": {"hidden_size": 4.0},
    "hidden_size-zero": {"hidden_size": 0},
    "hidden_size-negative": {"hidden_size": -1},
    "num_layers-zero": {"num_layers": 0},
    "num_layers-float": {"num_layers": 1.5},
    "dropout-above-1": {"dropout": 1.5, "num_layers": 2},
    "dropout-negative": {"dropout": -0.1},
    "dropout-bool": {"dropout": True},
    "dropout-string": {"dropout": "much"},
    "dropout-nan": {"dropout": float("nan")},
    "proj_size": {"proj_size": 2},
    "proj_size-zero": {"proj_size": 0},
    "dtype-integer": {"dtype": torch.int64},
    "dtype-string": {"dtype": "float32"},
    "device-unknown": {"device": "abacus"},
}


@pytest.mark.parametrize("wrong", CONSTRUCTION_ERRORS.values(), ids=CONSTRUCTION_ERRORS)
def test_construction_errors_are_nn_gru_s(wrong):
    arguments = {"input_size": 3, "hidden_size": 4} | wrong
    expected = outcome(lambda: nn.GRU(**arguments))
    assert isinstance(expected, tuple), "nn.GRU takes it"
    assert outcome(lambda: tritongru.GRU(**arguments)) == expected


@pytest.mark.parametrize("wrong", [{}, {"input_size": 3}, {"input_size": 3, "hidden_size": 4, "depth": 1}], ids=str)
def test_missing_and_unknown_arguments_are_type_errors(wrong):
    for layer in (nn.GRU, tritongru.GRU, nn.GRUCell, tritongru.GRUCell):
        with pytest.raises(TypeError):
            layer(**wrong)


CELL_CONSTRUCTION_ERRORS = {
    "input_size-float": {"input_size": 3.0},
    "hidden_size-negative": {"hidden_size": -4},
    "dtype-integer": {"dtype": torch.int64},
}


@pytest.mark.parametrize("wrong", CELL_CONSTRUCTION_ERRORS.values(), ids=CELL_CONSTRUCTION_ERRORS)
def test_construction_errors_are_nn_gru_cell_s(wrong):
    arguments = {"input_size": 3, "hidden_size": 4} | wrong
    expected = outcome(lambda: nn.GRUCell(**arguments))
    assert isinstance(expected, tuple), "nn.GRUCell takes it"
    assert outcome(lambda: tritongru.GRUCell(**arguments)) == expected


def test_bias_has_nn_gru_s_words():
    with pytest.raises(TypeError, match=r"^bias should be of type bool, got: int$"):
        tritongru.GRU(3, 4, bias=1)


def test_dropout_with_one_layer_warns_as_nn_gru_does():
    found = []
    for layer in (nn.GRU, tritongru.GRU):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            layer(3, 4, dropout=0.5)
        found.append([(w.category, str(w.message)) for w in caught])
    assert found[0] == found[1] and found[0][0][0] is UserWarning


@pytest.mark.parametrize("layer", [tritongru.GRU, tritongru.GRUCell])
def test_an_unknown_backend_is_refused_with_the_names_of_the_others(layer):
    with pytest.raises(ValueError, match="aten, reference, step") as caught:
        layer(3, 4, backend="cudnn")
    assert "'cudnn'" in str(caught.value)


def test_repr_is_nn_gru_s_and_adds_what_is_ours(options):
    assert repr(tritongru.GRU(3, 4, **options)) == repr(nn.GRU(3, 4, **options))
    assert repr(tritongru.GRUCell(3, 4, bias=False)) == repr(nn.GRUCell(3, 4, bias=False))
    named = repr(tritongru.GRU(3, 4, backend="reference", recompute=True))
    assert "backend='reference'" in named and "recompute=True" in named


def test_names_and_order_of_the_state_are_nn_gru_s(options):
    theirs, ours = pair(None, 3, 4, **options)
    kinds = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")[: 4 if ours.bias else 2]
    suffixes = ("", "_reverse")[: 2 if ours.bidirectional else 1]
    names = [f"{kind}_l{layer}{s}" for layer in range(ours.num_layers) for s in suffixes for kind in kinds]
    assert list(ours.state_dict()) == list(theirs.state_dict()) == names
    assert [n for n, _ in ours.named_parameters()] == names
    assert not list(ours.buffers()) and not list(ours.children())
    assert ours.state_dict()._metadata == theirs.state_dict()._metadata
    assert [[p.shape for p in each] for each in ours.all_weights] == [[p.shape for p in e] for e in theirs.all_weights]


def test_names_and_order_of_a_cell_s_state():
    for bias in (True, False):
        theirs, ours = cell_pair(None, 3, 4, bias=bias)
        assert list(ours.state_dict()) == list(theirs.state_dict())
        assert not list(ours.buffers()) and not list(ours.children())


def test_a_checkpoint_goes_both_ways(backend, some_options):
    x = randn(2, 2, 3)
    for source, target in ((nn.GRU, tritongru.GRU), (tritongru.GRU, nn.GRU)):
        torch.manual_seed(3)
        extra = [{"backend": backend} if layer is tritongru.GRU else {} for layer in (source, target)]
        a, b = source(3, 4, **some_options, **extra[0]), target(3, 4, **some_options, **extra[1])
        b(x)
        assert str(b.load_state_dict(a.state_dict(), strict=True)) == "<All keys matched successfully>"
        for expected, actual in zip(tensors(a(x)), tensors(b(x)), strict=True):
            assert_close(actual, expected, 3 + 4 + 4)


def test_a_wrong_checkpoint_gives_nn_gru_s_error():
    theirs, ours = pair(None, 3, 4)
    wrong = nn.GRU(3, 5, 2).state_dict()
    assert outcome(lambda: ours.load_state_dict(wrong)) == outcome(lambda: theirs.load_state_dict(wrong))


def test_values_and_gradients_are_nn_gru_s(backend, options):
    theirs, ours = pair(backend, 3, 5, **options)
    x = randn(*((2, 3, 3) if theirs.batch_first else (3, 2, 3)))
    assert_same(theirs, ours, x, randn(states(theirs), 2, 5, seed=3))


def test_values_and_gradients_without_h_0_are_nn_gru_s(backend, some_options):
    theirs, ours = pair(backend, 3, 5, **some_options)
    assert_same(theirs, ours, randn(2, 2, 3))


@pytest.mark.parametrize(
    ("T", "B", "I", "H"), [(1, 1, 1, 1), (1, 4, 3, 7), (5, 1, 2, 17), (3, 3, 19, 20), (2, 4, 1, 16)], ids=str
)
def test_odd_sizes(backend, T, B, I, H):
    theirs, ours = pair(backend, I, H, bidirectional=True)
    assert_same(theirs, ours, randn(T, B, I), randn(2, B, H, seed=3))


def test_recompute_changes_nothing_but_what_is_kept(backend, some_options):
    theirs, ours = pair(backend, 3, 5, recompute=True, **some_options)
    assert_same(theirs, ours, randn(2, 2, 3), randn(states(theirs), 2, 5, seed=3))
    assert_same(theirs, ours, packed((2, 3, 1)))


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("B", [1, 4])
@pytest.mark.parametrize("with_h", [False, True], ids=["zeros", "h"])
def test_a_cell_s_values_and_gradients_are_nn_gru_cell_s(backend, bias, B, with_h):
    theirs, ours = cell_pair(backend, 3, 7, bias=bias)
    assert_same(theirs, ours, randn(B, 3), randn(B, 7, seed=3) if with_h else None)


@pytest.mark.parametrize("backend", OURS)
def test_without_gradients_the_values_are_the_same_bits(backend):
    _, ours = pair(backend, 3, 5, num_layers=2, bidirectional=True)
    x = randn(3, 2, 3)
    expected = tensors(ours(x))
    with torch.no_grad():
        found = tensors(ours(x))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert all(r.requires_grad for r in expected) and not any(r.requires_grad for r in found)
    with torch.inference_mode():
        found = tensors(ours(x))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert all(r.is_inference() for r in found)


def test_the_same_call_gives_the_same_bits(backend):
    _, ours = pair(backend, 3, 5, num_layers=2, bidirectional=True)
    runs = []
    for _ in range(2):
        ours.zero_grad()
        output, h_n = ours(randn(3, 2, 3))
        (output.square().sum() + h_n.sum()).backward()
        runs.append([output, h_n, *(p.grad.clone() for p in ours.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_forward_takes_nn_gru_s_names(backend):
    _, ours = pair(backend, 3, 4)
    _, cell = cell_pair(backend, 3, 4)
    x, hx = randn(2, 2, 3), randn(1, 2, 4, seed=3)
    assert torch.equal(ours(input=x, hx=hx)[0], ours(x, hx)[0])
    assert torch.equal(ours(x, hx=None)[0], ours(x)[0])
    assert torch.equal(cell(input=x[0], hx=hx[0]), cell(x[0], hx[0]))
    for layer in (tritongru.GRU, tritongru.GRUCell):
        assert list(inspect.signature(layer.forward).parameters)[:3] == ["self", "input", "hx"]


def test_a_result_is_a_plain_tuple(backend):
    _, ours = pair(backend, 3, 4)
    assert type(ours(randn(2, 2, 3))) is tuple
    output, h_n = ours(packed())
    assert type(output) is PackedSequence and type(h_n) is torch.Tensor


@pytest.mark.parametrize("with_h_0", [False, True], ids=["zeros", "h_0"])
@pytest.mark.parametrize("batch_first", [False, True], ids=["time-first", "batch-first"])
def test_unbatched_input_takes_a_2d_h_0_and_ignores_batch_first(backend, batch_first, with_h_0):
    theirs, ours = pair(backend, 3, 5, bidirectional=True, batch_first=batch_first)
    hx = randn(2, 5, seed=3) if with_h_0 else None
    assert_same(theirs, ours, randn(3, 3), hx)
    output, h_n = ours(randn(3, 3), hx)
    assert output.shape == (3, 10) and h_n.shape == (2, 5)


def test_an_unbatched_cell(backend):
    theirs, ours = cell_pair(backend, 3, 5)
    assert_same(theirs, ours, randn(3))
    assert_same(theirs, ours, randn(3), randn(5, seed=3))
    assert ours(randn(3)).shape == (5,)


def test_an_empty_batch_works(backend, options):
    theirs, ours = pair(backend, 3, 4, **options)
    x = torch.zeros(*((0, 3, 3) if theirs.batch_first else (3, 0, 3)))
    for hx in (None, torch.zeros(states(theirs), 0, 4)):
        expected, found = theirs(x, hx), ours(x, hx)
        assert [t.shape for t in found] == [t.shape for t in expected]
        assert [t.dtype for t in found] == [t.dtype for t in expected]


def test_an_empty_batch_gives_zero_gradients(backend):
    theirs, ours = pair(backend, 3, 4)
    for module in (theirs, ours):
        output, h_n = module(torch.zeros(3, 0, 3))
        (output.sum() + h_n.sum()).backward()
    for a, b in zip(theirs.parameters(), ours.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None)
        assert a.grad is None or torch.equal(a.grad, b.grad)


def test_an_empty_batch_works_in_a_cell(backend):
    _, ours = cell_pair(backend, 3, 4)
    assert ours(torch.zeros(0, 3)).shape == (0, 4)
    assert ours(torch.zeros(0, 3), torch.zeros(0, 4)).shape == (0, 4)


def test_a_cell_without_input_features_works(backend):
    theirs, ours = cell_pair(backend, 0, 4)
    x, h = torch.zeros(2, 0), randn(2, 4, seed=3)
    assert_close(ours(x, h), theirs(x, h), 4 + 2)


def test_a_layer_on_the_meta_device_tells_shapes():
    for given in (None, "aten"):
        layer = tritongru.GRU(3, 4, 2, bidirectional=True, device="meta", backend=given)
        output, h_n = layer(torch.empty(5, 2, 3, device="meta"))
        assert output.shape == (5, 2, 8) and h_n.shape == (4, 2, 4) and output.is_meta


@pytest.mark.parametrize("backend", OURS)
def test_a_forced_backend_on_the_meta_device_tells_shapes_or_says_that_it_cannot(backend):
    layer = tritongru.GRU(3, 4, device="meta", backend=backend)
    found = outcome(lambda: layer(torch.empty(5, 2, 3, device="meta")))
    if isinstance(found, tuple):
        assert found[0] is RuntimeError and backend in found[1]
    else:
        assert found == [(5, 2, 4), (1, 2, 4)]


def test_packed_values_and_gradients_are_nn_gru_s(backend, options):
    theirs, ours = pair(backend, 3, 5, **options)
    assert_same(theirs, ours, packed((2, 3, 1)), randn(states(theirs), 3, 5, seed=3))


@pytest.mark.parametrize("with_h_0", [False, True], ids=["zeros", "h_0"])
@pytest.mark.parametrize(
    ("lengths", "enforce_sorted"),
    [((3, 2, 1), True), ((3, 3), True), ((1, 4, 1, 2), False), ((2,), False), ((1, 1, 1), False)],
    ids=["sorted", "equal", "ragged", "single", "one-step"],
)
def test_packed_lengths(backend, lengths, enforce_sorted, with_h_0):
    theirs, ours = pair(backend, 3, 5, bidirectional=True)
    hx = randn(2, len(lengths), 5, seed=3) if with_h_0 else None
    assert_same(theirs, ours, packed(lengths, enforce_sorted=enforce_sorted), hx)


@pytest.mark.parametrize("backend", OURS)
@pytest.mark.parametrize("with_h_0", [False, True], ids=["zeros", "h_0"])
@pytest.mark.parametrize("form", ["dense", "packed"])
def test_the_gates_shown_are_those_that_a_backend_saves(backend, options, form, with_h_0):
    """`tritongru.gates` has its own equations: r, z, n, q of every layer, direction and step, and h in the output."""
    theirs, ours = pair(backend, 3, 5, **options)
    D, H = (2 if ours.bidirectional else 1), ours.hidden_size
    x = packed() if form == "packed" else randn(3, 4, 3)
    B = 3 if form == "packed" or ours.batch_first else 4
    hx = randn(states(ours), B, H, seed=3) if with_h_0 else None
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        output, _ = ours(x, hx)

    def in_time(rows):
        """[T, B, ...] in the order of the user's batch, NaN where a packed row has no such step."""
        if form == "packed":
            return pad_packed_sequence(x._replace(data=rows), padding_value=math.nan)[0]
        return rows

    rzn = [in_time(t) for t in saved if t.shape[-2:] == (D, 3 * H) and t.dim() == (3 if form == "packed" else 4)]
    q = [in_time(t) for t in saved if t.shape[-2:] == (D, H) and t.dim() == (3 if form == "packed" else 4)]
    assert len(rzn) == len(q) == ours.num_layers
    h = output.data if form == "packed" else output.transpose(0, 1) if ours.batch_first else output
    for module in (theirs, ours):
        found = tritongru.gates(module, x, hx)
        for layer in range(ours.num_layers):
            for direction in range(D):
                kept = [*rzn[layer][:, :, direction].chunk(3, -1), q[layer][:, :, direction]]
                for name, actual in zip("rznq", kept, strict=True):
                    shown = getattr(found, name)[layer, direction]
                    torch.testing.assert_close(shown.isnan(), actual.isnan())
                    assert_close(actual.nan_to_num(), shown.nan_to_num(), 3 + D * H, f"{name} of layer {layer}")
        last = torch.cat(list(found.h[-1]), -1)
        assert_close(in_time(h.detach()).nan_to_num(), last.nan_to_num(), 3 + D * H, "h")


def test_packed_indices_are_passed_on(backend):
    _, ours = pair(backend, 3, 4)
    given = packed()
    output, _ = ours(given)
    assert output.batch_sizes is given.batch_sizes
    assert output.sorted_indices is given.sorted_indices and output.unsorted_indices is given.unsorted_indices


def test_packed_h_0_and_h_n_are_in_the_order_of_the_user_s_batch(backend):
    """Each sequence of an unsorted batch against the same sequence alone."""
    _, ours = pair(backend, 3, 4, bidirectional=True)
    lengths = (2, 4, 1)
    sequences = [randn(n, 3, seed=n) for n in lengths]
    hx = randn(2, 3, 4, seed=9)
    output, h_n = ours(pack_sequence(sequences, enforce_sorted=False), hx)
    padded, _ = pad_packed_sequence(output)
    for b, sequence in enumerate(sequences):
        alone, h_alone = ours(sequence[:, None], hx[:, b : b + 1])
        assert_close(padded[: lengths[b], b : b + 1], alone, 7 + 8, f"output of sequence {b}")
        assert_close(h_n[:, b : b + 1], h_alone, 7 + 8, f"h_n of sequence {b}")
        assert not padded[lengths[b] :, b].any()


def test_batch_first_is_ignored_for_packed_input(backend):
    _, ours = pair(backend, 3, 4, batch_first=True)
    first, h_first = ours(packed())
    ours.batch_first = False
    second, h_second = ours(packed())
    assert torch.equal(first.data, second.data) and torch.equal(h_first, h_second)


def test_packing_a_padded_batch(backend):
    """The usual way in and out: pack_padded_sequence of a batch-first batch, pad_packed_sequence of the output."""
    theirs, ours = pair(backend, 3, 4, batch_first=True)
    x, lengths = randn(3, 5, 3), torch.tensor([5, 2, 4])
    found = []
    for module in (theirs, ours):
        output, _ = module(pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False))
        found.append(pad_packed_sequence(output, batch_first=True, total_length=6))
    assert torch.equal(found[0][1], found[1][1])
    assert_close(found[1][0], found[0][0], 7 + 15)


def z(*shape, **options):
    return torch.zeros(*shape, **options)


CALL_ERRORS = {
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
    "packed-wrong-size": lambda m: m(packed(input_size=5)),
    "packed-float64": lambda m: m(packed().double()),
    "packed-hx-2d": lambda m: m(packed(), z(2, 4)),
    "packed-hx-1d": lambda m: m(packed(), z(4)),
    "packed-hx-wrong-layers": lambda m: m(packed(), z(1, 3, 4)),
    "packed-hx-wrong-hidden": lambda m: m(packed(), z(2, 3, 5)),
    "packed-hx-small-batch": lambda m: m(packed(), z(2, 1, 4)),
    "packed-sorted-hx-wrong-batch": lambda m: m(packed((3, 2), enforce_sorted=True), z(2, 3, 4)),
    "packed-hx-float64": lambda m: m(packed(), z(2, 3, 4, dtype=torch.float64)),
    "packed-data-3d": lambda m: m(PackedSequence(z(3, 2, 3), torch.tensor([2, 1]))),
    "packed-sizes-rise": lambda m: m(PackedSequence(z(3, 3), torch.tensor([1, 2]))),
    "no-input": lambda m: m(),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("call", CALL_ERRORS.values(), ids=CALL_ERRORS)
def test_call_errors_are_nn_gru_s(backend, call):
    theirs, ours = pair(backend, 3, 4, num_layers=2)
    expected = outcome(lambda: call(theirs))
    assert isinstance(expected, tuple), "nn.GRU takes it"
    found = outcome(lambda: call(ours))
    assert found == (expected[0], expected[1].replace("GRU.forward()", f"{type(ours).__name__}.forward()"))


@pytest.mark.parametrize("wrong", [1.5, -0.5], ids=["above-1", "negative"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_dropout_set_out_of_range_gives_nn_gru_s_error(backend, wrong, training):
    theirs, ours = pair(backend, 3, 4, num_layers=2)
    for module in (theirs, ours):
        module.dropout = wrong
        module.train(training)
    assert outcome(lambda: ours(z(2, 2, 3))) == outcome(lambda: theirs(z(2, 2, 3)))


@pytest.mark.parametrize(
    "wrong", [z(12, 5), z(12, 4, dtype=torch.float64), z(12)], ids=["wrong-shape", "wrong-dtype", "wrong-dimensions"]
)
def test_a_weight_that_does_not_fit_gives_nn_gru_s_error(backend, wrong):
    theirs, ours = pair(backend, 3, 4)
    for module in (theirs, ours):
        module.weight_hh_l0 = nn.Parameter(wrong.clone())
    expected = outcome(lambda: theirs(z(2, 2, 3)))
    assert isinstance(expected, tuple)
    assert outcome(lambda: ours(z(2, 2, 3))) == expected


CELL_ERRORS = {
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
}


@pytest.mark.parametrize("call", CELL_ERRORS.values(), ids=CELL_ERRORS)
def test_call_errors_are_nn_gru_cell_s(backend, call):
    theirs, ours = cell_pair(backend, 3, 4)
    expected = outcome(lambda: call(theirs))
    assert isinstance(expected, tuple), "nn.GRUCell takes it"
    assert outcome(lambda: call(ours)) == expected


def test_batch_first_is_read_at_call_time(backend):
    theirs, ours = pair(backend, 3, 4)
    for module in (theirs, ours):
        module(randn(2, 4, 3))
        module.batch_first = True
    assert_same(theirs, ours, randn(2, 4, 3), randn(1, 2, 4, seed=3))


def dropout_probe(backend, p, T=5, B=4, H=20):
    """A two-layer GRU whose second layer shows the mask that its input went through.

    First layer: all parameters 0, so z = 1/2, n = 0 and h_t = 2^-t from h_0 = 1. Second layer: z = 0 (by a bias of -40)
    and n = tanh(x / 16), so its output is tanh(mask * 2^-t / 16) at step t (from 1).
    """
    layer = tritongru.GRU(H, H, 2, dropout=p, backend=backend)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
        layer.weight_ih_l1[2 * H :] = torch.eye(H) / 16
        layer.bias_ih_l1[H : 2 * H] = -40.0
    decay = 0.5 ** torch.arange(1.0, T + 1)[:, None, None]

    def run():
        output, h_n = layer(torch.zeros(T, B, H), torch.ones(2, B, H))
        return torch.atanh(output.detach()) * 16 / decay, h_n.detach()

    return layer, run


@pytest.mark.parametrize("p", [0.25, 0.5])
def test_dropout_between_layers_is_scaled_drawn_per_step_and_spares_h_n(backend, p):
    _, run = dropout_probe(backend, p)
    torch.manual_seed(0)
    mask, h_n = run()
    kept = mask > 0.5
    scaled = torch.where(kept, 1 / (1 - p), 0.0)
    torch.testing.assert_close(mask, scaled, rtol=1e-4, atol=1e-4)  # atanh of the output is good to 1e-5
    share = kept.float().mean().item()
    assert abs(share - (1 - p)) < 4 * math.sqrt(p * (1 - p) / mask.numel())  # 4 standard deviations
    assert all((kept[t] != kept[0]).any() for t in range(1, len(kept)))  # a mask of its own at each step
    assert all((kept[:, b] != kept[:, 0]).any() for b in range(1, kept.shape[1]))  # and of each sequence
    assert torch.equal(h_n[0], torch.full_like(h_n[0], 0.5**5))  # h_n of the first layer: before dropout


def test_dropout_follows_the_seed(backend):
    _, run = dropout_probe(backend, 0.5)
    masks = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        masks.append(run()[0])
    assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])


def test_dropout_and_training_are_read_at_call_time(backend):
    layer, run = dropout_probe(backend, 0.5)
    ones = torch.ones(5, 4, 20)
    layer.eval()
    torch.testing.assert_close(run()[0], ones, rtol=1e-4, atol=1e-4)
    layer.train()
    assert (run()[0] < 0.5).any()
    layer.dropout = 0.0
    torch.testing.assert_close(run()[0], ones, rtol=1e-4, atol=1e-4)
    layer.dropout = 1.0
    torch.testing.assert_close(run()[0], 0 * ones, rtol=0, atol=1e-4)


def test_dropout_of_packed_input(backend):
    layer, _ = dropout_probe(backend, 0.5)
    given = pack_sequence([torch.zeros(n, 20) for n in (4, 3, 1)])
    torch.manual_seed(0)
    output, h_n = layer(given, torch.ones(2, 3, 20))
    share = (output.data.abs() > 1e-6).float().mean().item()
    assert abs(share - 0.5) < 4 * math.sqrt(0.25 / output.data.numel())
    assert torch.equal(h_n[0], 0.5 ** torch.tensor([4.0, 3.0, 1.0])[:, None].expand(3, 20))


def test_dropout_does_not_touch_one_layer_nor_the_last(backend):
    with pytest.warns(UserWarning):
        layer = tritongru.GRU(3, 4, dropout=0.9, backend=backend)
    state = torch.get_rng_state()
    first = layer(randn(3, 2, 3))[0]
    assert torch.equal(layer.eval()(randn(3, 2, 3))[0], first)
    assert torch.equal(torch.get_rng_state(), state)


def test_dropout_s_gradient_goes_through_the_kept_elements_alone(backend):
    layer, _ = dropout_probe(backend, 0.5)
    with torch.no_grad():
        layer.weight_ih_l0[40:] = torch.eye(20)
    x = torch.zeros(1, 4, 20, requires_grad=True)
    torch.manual_seed(0)
    output, _ = layer(x, torch.ones(2, 4, 20))
    output.sum().backward()
    assert torch.equal(x.grad != 0, output.abs() > 1e-6)


def test_backward_in_eval_mode(backend):
    """cuDNN's GRU refuses it; nothing in the equations does."""
    theirs, ours = pair(backend, 3, 5)
    theirs.eval(), ours.eval()
    for module in (theirs, ours):
        module(randn(3, 2, 3))[0].square().sum().backward()
    for name, parameter in ours.named_parameters():
        assert_close(parameter.grad, getattr(theirs, name).grad, terms=16)


@pytest.mark.parametrize(("T", "gradients"), [(1, False), (2, True)], ids=["one-step-no-grad", "training"])
def test_results_have_nn_gru_s_strides_and_ours_are_no_views(backend, options, T, gradients):
    theirs, ours = pair(backend, 3, 5, **options)
    x = randn(*((2, T, 3) if theirs.batch_first else (T, 2, 3)))
    with torch.set_grad_enabled(gradients):
        expected, found = theirs(x), ours(x)
    assert [r.stride() for r in found] == [r.stride() for r in expected]
    if backend != "aten":
        assert not any(r._is_view() for r in found)


def storage(tensor):
    return tensor.untyped_storage().data_ptr()


@pytest.mark.parametrize(("T", "gradients"), [(1, False), (2, True)], ids=["one-step-no-grad", "training"])
def test_h_n_never_aliases_output_h_0_or_input(backend, some_options, T, gradients):
    _, ours = pair(backend, 5, 5, **some_options)
    x, h_0 = randn(*((2, T, 5) if ours.batch_first else (T, 2, 5))), randn(states(ours), 2, 5, seed=3)
    before = x.clone(), h_0.clone()
    with torch.set_grad_enabled(gradients):
        output, h_n = ours(x, h_0)
        rows, h_packed = ours(packed((2, 1), input_size=5))
    assert len({storage(t) for t in (output, h_n, x, h_0)}) == 4
    assert storage(rows.data) != storage(h_packed)
    kept = output.detach().clone()
    with torch.no_grad():
        h_n.zero_()
    assert torch.equal(output, kept)
    assert torch.equal(x, before[0]) and torch.equal(h_0, before[1])


def test_the_reverse_direction_s_h_n_comes_from_its_own_last_step(backend):
    _, ours = pair(backend, 3, 4, bidirectional=True)
    output, h_n = ours(randn(4, 2, 3))
    assert torch.equal(h_n[0], output[-1, :, :4])
    assert torch.equal(h_n[1], output[0, :, 4:])
    lengths = (4, 2)
    rows, h_n = ours(pack_sequence([randn(n, 3, seed=n) for n in lengths]))
    padded, _ = pad_packed_sequence(rows)
    for b, length in enumerate(lengths):
        assert torch.equal(h_n[0, b], padded[length - 1, b, :4])
        assert torch.equal(h_n[1, b], padded[0, b, 4:])


POISONED = {
    "nan-in-input": lambda m, x, h: x[1, 0].fill_(math.nan),
    "one-nan-in-input": lambda m, x, h: x[1, 0, 0].fill_(math.nan),
    "nan-in-h_0": lambda m, x, h: h[0, 1, 2].fill_(math.nan),
    "inf-in-input": lambda m, x, h: x[1, 0, 1].fill_(math.inf),
    "minus-inf-in-input": lambda m, x, h: x[1, 0, 1].fill_(-math.inf),
    "inf-in-h_0": lambda m, x, h: h[1, 0, 1].fill_(math.inf),
    "minus-inf-in-h_0": lambda m, x, h: h[0, 0, 1].fill_(-math.inf),
    "nan-in-w_ih": lambda m, x, h: m.weight_ih_l0[4, 1].fill_(math.nan),
    "nan-in-w_hh": lambda m, x, h: m.weight_hh_l0[7, 1].fill_(math.nan),
    "inf-in-w_hh": lambda m, x, h: m.weight_hh_l0[11, 1].fill_(math.inf),
    "nan-in-b_ih": lambda m, x, h: m.bias_ih_l0[0].fill_(math.nan),
    "inf-in-b_hh": lambda m, x, h: m.bias_hh_l0[6].fill_(math.inf),
    "minus-inf-in-reverse-b_hh": lambda m, x, h: m.bias_hh_l0_reverse[2].fill_(-math.inf),
}


def kind_of_value(tensor):
    """0 finite, 1 NaN, 2 inf, 3 -inf."""
    return tensor.isnan() * 1 + tensor.isposinf() * 2 + tensor.isneginf() * 3


@pytest.mark.parametrize("poison", POISONED.values(), ids=POISONED)
def test_nan_and_infinity_go_where_they_go_in_nn_gru(backend, poison):
    theirs, ours = pair(backend, 3, 5, bidirectional=True)
    found = []
    for module in (theirs, ours):
        x, h_0 = randn(3, 2, 3), randn(2, 2, 5, seed=3)
        with torch.no_grad():
            poison(module, x, h_0)
        found.append(tensors(module(x, h_0)))
    for expected, actual in zip(*found, strict=True):
        assert torch.equal(kind_of_value(actual), kind_of_value(expected))
        finite = expected.isfinite()
        assert_close(actual[finite], expected[finite], 3 + 5 + 6)


@pytest.mark.parametrize("where", ["input", "h_0", "cotangent"])
def test_a_nan_spoils_the_gradients_that_it_spoils_in_nn_gru(backend, where):
    theirs, ours = pair(backend, 3, 5)
    found = []
    for module in (theirs, ours):
        x, h_0, dy = randn(3, 2, 3), randn(1, 2, 5, seed=3), randn(3, 2, 5, seed=4)
        {"input": x, "h_0": h_0, "cotangent": dy}[where][0, 1, 1] = math.nan
        x.requires_grad_()
        h_0.requires_grad_()
        module(x, h_0)[0].backward(dy)
        found.append([x.grad, h_0.grad, *(p.grad for p in module.parameters())])
    for expected, actual in zip(*found, strict=True):
        assert torch.equal(actual.isnan(), expected.isnan())


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=["nan", "inf"])
def test_nan_and_infinity_in_a_cell(backend, value):
    theirs, ours = cell_pair(backend, 3, 5)
    x, h = randn(3, 3), randn(3, 5, seed=3)
    x[0, 1] = value
    h[1, 1] = value
    expected, found = theirs(x, h), ours(x, h)
    assert kind_of_value(expected).any()
    assert torch.equal(kind_of_value(found), kind_of_value(expected))


@pytest.mark.parametrize("large", [1e4, 1e30], ids=["1e4", "1e30"])
def test_saturated_gates_stay_finite(backend, large):
    theirs, ours = pair(backend, 3, 5)
    x = randn(3, 2, 3) * large
    expected, found = theirs(x)[0], ours(x)[0]
    assert found.isfinite().all()
    assert_close(found, expected, 3 + 5 + 6)


def arguments(module, hx, *last):
    """What torch.gru takes after its input (and batch_sizes)."""
    weights = list(module._flat_weights)
    return (hx, weights, module.bias, module.num_layers, 0.0, False, module.bidirectional, *last)


NAMES = ("hx", "params", "has_biases", "num_layers", "dropout", "train", "bidirectional", "batch_first")


def test_gru_is_torch_gru(backend, some_options):
    theirs, _ = pair(None, 3, 4, **some_options)
    x = randn(3, 2, 3)
    hx = randn(states(theirs), 3 if theirs.batch_first else 2, 4, seed=3)
    given = arguments(theirs, hx, theirs.batch_first)
    expected = torch.gru(x, *given)
    by_name = dict(zip(NAMES, given, strict=True))
    for found in (tritongru.gru(x, *given, backend=backend), tritongru.gru(input=x, **by_name, backend=backend)):
        for a, e in zip(found, expected, strict=True):
            assert_close(a, e, 3 + 4 + 6)


def test_gru_of_packed_data_is_torch_gru(backend, some_options):
    theirs, _ = pair(None, 3, 4, **some_options)
    sequence = packed((2, 3, 1))
    given = arguments(theirs, randn(states(theirs), 3, 4, seed=3))
    expected = torch.gru(sequence.data, sequence.batch_sizes, *given)
    by_name = dict(zip(NAMES, given, strict=False))
    for found in (
        tritongru.gru(sequence.data, sequence.batch_sizes, *given, backend=backend),
        tritongru.gru(data=sequence.data, batch_sizes=sequence.batch_sizes, **by_name, backend=backend),
    ):
        for a, e in zip(found, expected, strict=True):
            assert_close(a, e, 3 + 4 + 9)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_gru_cell_is_torch_gru_cell(backend, bias):
    theirs, _ = cell_pair(None, 3, 4, bias=bias)
    given = (randn(2, 3), randn(2, 4, seed=3), *theirs.parameters())
    assert_close(tritongru.gru_cell(*given, backend=backend), torch.gru_cell(*given), 3 + 4 + 2)


FUNCTIONAL_ERRORS = {
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
}


@pytest.mark.parametrize("call", FUNCTIONAL_ERRORS.values(), ids=FUNCTIONAL_ERRORS)
def test_gru_s_errors_are_torch_gru_s(backend, call):
    params = list(pair(None, 3, 4)[0].parameters())
    expected = outcome(lambda: call(torch.gru, params))
    assert isinstance(expected, tuple), "torch.gru takes it"
    assert outcome(lambda: call(lambda *a, **k: tritongru.gru(*a, **k, backend=backend), params)) == expected


def test_a_subclass_may_add_arguments_and_wrap_forward(backend):
    class Doubled(tritongru.GRU):
        def __init__(self, size, factor=2.0):
            super().__init__(3, size, backend=backend)
            self.factor = factor

        def forward(self, input, hx=None):
            output, h_n = super().forward(input, hx)
            return output * self.factor, h_n

    layer = Doubled(4)
    plain = tritongru.GRU(3, 4, backend=backend)
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


def test_initialisers_that_look_for_nn_gru_find_ours():
    model = nn.Sequential(tritongru.GRU(3, 4), nn.Linear(4, 2))

    def initialise(module):
        if isinstance(module, nn.GRU):
            for name, parameter in module.named_parameters():
                nn.init.orthogonal_(parameter) if "weight" in name else nn.init.zeros_(parameter)

    model.apply(initialise)
    assert not model[0].bias_hh_l0.any()
    copied = copy.deepcopy(model)
    assert torch.equal(copied[0].weight_hh_l0, model[0].weight_hh_l0)


def test_importing_is_light():
    """Neither Triton, which settles at its import whether kernels are interpreted, nor Dynamo, which imports it."""
    code = "import sys, torch, tritongru; print([m for m in ('triton', 'torch._dynamo', 'sympy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "[]"


def test_without_triton_everything_imports_and_aten_and_reference_run():
    code = """
import sys
sys.modules["triton"] = None
import torch, tritongru
x = torch.randn(3, 2, 3)
expected = None
for backend in (None, "aten", "reference"):
    torch.manual_seed(0)
    layer = tritongru.GRU(3, 4, backend=backend)
    output, _ = layer(x)
    output.sum().backward()
    expected = output if expected is None else expected
    assert torch.allclose(output, expected, atol=1e-6)
status = {s.name: s.why_not for s in tritongru.backends()}
assert status["aten"] is None and status["reference"] is None and "not installed" in status["step"], status
try:
    tritongru.GRU(3, 4, backend="step")(x)
except RuntimeError as error:
    assert "not installed" in str(error), error
else:
    raise AssertionError("step ran without Triton")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
