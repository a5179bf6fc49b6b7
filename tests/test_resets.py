"""Lengths and resets of a padded batch: against nn.GRU run sequence by sequence, output and every gradient.

Of every backend by the floor of `check`'s rule; then what must not come through: NaN, infinity, gradients; what a call
may be wrapped in; and what is refused.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import tritongru
from tests.kit.plans import ShrunkenPlan, exchanging
from tests.kit.rule import assert_not_wrong, assert_right
from tritongru.batch import Visits
from tritongru.launch import sequence
from tritongru.tools.check import Case, by_segments, run
from tritongru.tools.emulator import emulating

SEQUENCE = pytest.param("sequence", marks=pytest.mark.interpreted)
SMALL = pytest.param("sequence:exchange=0", id="small", marks=pytest.mark.interpreted)
BACKENDS = ("aten", "reference", pytest.param("step", marks=pytest.mark.interpreted), SEQUENCE, SMALL)
LENGTHS_OF_18 = (3,) * 9 + (4, 1) + (2,) * 6 + (4,)

CASES = (
    Case(T=5, I=3, H=10, bidirectional=True, lengths=(5, 1, 3), padded=True),
    Case(T=4, I=3, H=9, lengths=(2, 1, 3), padded=True, batch_first=True),  # none as long as x
    Case(T=4, B=3, I=3, H=10, bidirectional=True, resets=0.4),
    Case(T=3, B=2, I=3, H=10, bidirectional=True, resets=1.0, bias=False),
    Case(T=5, I=3, H=10, layers=2, bidirectional=True, batch_first=True, lengths=(4, 5, 1), padded=True, resets=0.3),
    Case(T=5, I=3, H=10, bidirectional=True, lengths=(2, 5, 4), padded=True, resets=0.3, recompute=True),
    Case(T=4, I=3, H=10, bidirectional=True, lengths=LENGTHS_OF_18, padded=True, resets=0.3),  # two tiles of rows
    Case(T=1, B=2, I=3, H=10, bidirectional=True, resets=0.5),
    Case(T=1, B=3, I=3, H=10, resets=1.0),
    Case(T=3, I=3, H=10, lengths=(3, 2), padded=True, resets=0.0),
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("backend", BACKENDS)
def test_against_nn_gru_sequence_by_sequence(backend: str, case: Case) -> None:
    assert_not_wrong(case, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rule(backend: str) -> None:
    assert_right(Case(T=4, I=5, H=20, lengths=(4, 1, 3), padded=True, resets=0.3), backend)


@pytest.mark.parametrize("backend", ["aten", "reference"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_in_float64(backend: str, case: Case) -> None:
    assert_not_wrong(case, backend, torch.float64)


@pytest.mark.interpreted
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype: torch.dtype) -> None:
    assert_not_wrong(CASES[4], "sequence", dtype)


def drawn(case: Case, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Arguments of `run`, x finite, and a module's."""
    torch.manual_seed(seed)
    T, B, D = case.sizes
    leading = (B, T) if case.batch_first else (T, B)
    return dict(
        x=torch.randn(*leading, case.I, dtype=dtype),
        h_0=torch.randn(case.layers * D, B, case.H, dtype=dtype),
        dy=torch.randn(*leading, D * case.H, dtype=dtype),
        dh_n=torch.randn(case.layers * D, B, case.H, dtype=dtype),
        lengths=torch.tensor(case.lengths) if case.lengths else None,
        resets=None if case.resets is None else torch.rand(*leading) < case.resets,
    )


def layer_of(case: Case, backend: str | None, dtype: torch.dtype = torch.float32, **kwargs: Any) -> tritongru.GRU:
    torch.manual_seed(1)
    return tritongru.GRU(
        case.I, case.H, case.layers, case.bias, case.batch_first, bidirectional=case.bidirectional, dtype=dtype,
        backend=backend, recompute=case.recompute, **kwargs,
    )  # fmt: skip


def same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


# ---- what must not come through --------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_past_a_length_is_seen(backend: str) -> None:
    """The same bits, whatever lies there in x, dy and resets; zeros in output and the gradient of x."""
    case = CASES[4]
    given, layer = drawn(case), layer_of(case, backend)
    past = torch.arange(case.T) >= given["lengths"][:, None]
    found = run(layer, **given)
    given["x"][past], given["resets"][past] = math.inf, True
    given["dy"][past] = math.nan
    assert same_bits(found, run(layer, **given))
    assert not found["output"][past].any() and not found["x"][past].any() and found["x"][~past].all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_nothing_comes_through_a_reset(backend: str, value: float) -> None:
    """The state of another sequence, not even one that is not finite, nor its gradient."""
    case = Case(T=4, B=2, I=3, H=9, bidirectional=True)
    given, layer = drawn(case), layer_of(case, backend)
    given["resets"] = torch.zeros(4, 2, dtype=torch.bool)
    given["resets"][2] = True
    first, second = slice(0, 2), slice(2, 4)
    for spoilt, other, of_h_0 in ((first, second, 0), (second, first, 1)):
        x, h_0, dy, dh_n = (given[name].clone() for name in ("x", "h_0", "dy", "dh_n"))
        x[spoilt], h_0[of_h_0], dy[spoilt], dh_n[1 - of_h_0] = value, value, value, value
        found = run(layer, x, h_0, dy, dh_n, None, given["resets"])
        true = run(layer, **given)
        assert found["output"][spoilt].isnan().all() or found["x"][spoilt].isnan().all()
        for name, part in (("output", other), ("x", other), ("h_n", of_h_0)):
            assert torch.equal(found[name][part], true[name][part]), name
        assert torch.equal(found["h_0"][1 - of_h_0], true["h_0"][1 - of_h_0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_changed_after_the_call_changes_no_gradient(backend: str) -> None:
    case = CASES[5]
    given, layer = drawn(case), layer_of(case, backend)
    expected = run(layer, **given)
    x = given["x"].requires_grad_()
    output, h_n = layer(x, given["h_0"], lengths=given["lengths"], resets=given["resets"])
    given["resets"].fill_(True)
    given["lengths"].fill_(1)
    torch.autograd.backward([output, h_n], [given["dy"], given["dh_n"]])
    assert torch.equal(x.grad, expected["x"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_to_packing_and_unpacking(backend: str) -> None:
    """To a few roundings: a product of other rows may sum in another order."""
    case = CASES[0]
    given, layer = drawn(case), layer_of(case, backend)
    output, h_n = layer(given["x"], given["h_0"], lengths=given["lengths"])
    packed, h_n_of_packed = layer(
        pack_padded_sequence(given["x"], given["lengths"], enforce_sorted=False), given["h_0"]
    )
    of_packed, _ = pad_packed_sequence(packed, total_length=case.T)
    for ours, theirs in ((output, of_packed), (h_n, h_n_of_packed)):
        assert (ours - theirs).abs().max() <= 16 * 2**-24


@pytest.mark.parametrize("backend", BACKENDS)
def test_fresh_results(backend: str) -> None:
    """h_n may be detached in place, as after nn.GRU."""
    case = CASES[4]
    given, layer = drawn(case), layer_of(case, backend)
    output, h_n = layer(given["x"], given["h_0"], lengths=given["lengths"], resets=given["resets"])
    assert h_n.is_contiguous() and not h_n._is_view()
    h_n.detach_()
    output.sum().backward()


# ---- programs that exchange ------------------------------------------------------------------------------------------

EXCHANGING = {
    "two-tiles": (ShrunkenPlan(tiles=2, waits=3), replace(CASES[6], H=20), torch.float16),
    "two-groups": (ShrunkenPlan(groups=2, together=False), replace(CASES[6], H=20), torch.float32),
    "three-tensors": (
        ShrunkenPlan(num_k=3),
        Case(T=4, I=3, H=70, lengths=(4, 1, 2), padded=True, resets=0.3),
        torch.bfloat16,
    ),
}


@pytest.mark.interpreted
@pytest.mark.parametrize(("plan", "case", "dtype"), EXCHANGING.values(), ids=EXCHANGING)
def test_programs_that_exchange(plan: ShrunkenPlan, case: Case, dtype: torch.dtype, monkeypatch) -> None:
    """Right, and the same bits under every seed and in several launches over time."""
    given, layer = drawn(case, dtype=dtype), layer_of(case, "sequence", dtype)
    with exchanging(monkeypatch, plan):
        assert_not_wrong(case, "sequence", dtype)
        found = run(layer, **given)
        for seed, visits in ((1, 4), (2, 1), (3, 3)):
            monkeypatch.setattr(sequence, "_visits_per_launch", lambda *_, visits=visits: visits)
            with emulating(seed):
                assert same_bits(found, run(layer, **given)), (seed, visits)


def test_h_prev_is_the_state_that_enters_a_step() -> None:
    """Of y's rows, numbered from 1, and h_0's, below 0."""
    lengths, resets = torch.tensor([4, 2], dtype=torch.int32), torch.zeros(4, 2, dtype=torch.bool)
    resets[0, 1] = resets[2, 0] = resets[3, 1] = True  # the last past its row's length
    y, h_0 = torch.arange(1, 9).view(8, 1), torch.tensor([[-1], [-2]])
    visits = Visits(4, 2, None, lengths, resets)
    runs = visits.runs()
    expected = {0: [[-1, 0], [1, 2], [0, 0], [5, 0]], 1: [[3, 4], [0, -2], [7, 0], [-1, 0]]}
    for direction, values in expected.items():
        [(_, found)] = visits.h_prev(y, h_0, direction)
        assert found.view(4, 2).masked_fill(~runs, 0).tolist() == values


# ---- what a call may be wrapped in -----------------------------------------------------------------------------------

EVERY = pytest.mark.parametrize("backend", [None, *BACKENDS], ids=lambda backend: backend or "default")
OPERATORS = pytest.mark.parametrize("backend", [None, "reference", SEQUENCE], ids=lambda backend: backend or "default")


def called(layer: tritongru.GRU, given: dict[str, Any]) -> tuple[Tensor, Tensor]:
    return layer(given["x"], given["h_0"], lengths=given["lengths"], resets=given["resets"])


def close(found: Any, expected: Any, dtype: torch.dtype = torch.float32) -> bool:
    """To a few roundings: products of other rows together may sum in another order."""
    pairs = zip(found, expected, strict=True)
    return all((f - e).abs().max() <= 64 * torch.finfo(dtype).eps * (1 + e.abs().max()) for f, e in pairs)


@EVERY
def test_unbatched(backend: str | None) -> None:
    case = Case(T=5, B=1, I=3, H=9, bidirectional=True, resets=0.5)
    given, layer = drawn(case), layer_of(case, backend)
    given["lengths"] = torch.tensor([3])
    expected = called(layer, given)
    found = called(
        layer, {name: None if t is None else t.squeeze(0 if name == "lengths" else 1) for name, t in given.items()}
    )
    assert found[0].shape == (5, 18) and found[1].shape == (2, 9)
    assert torch.equal(found[0], expected[0][:, 0]) and torch.equal(found[1], expected[1][:, 0])


@EVERY
def test_an_empty_batch(backend: str | None) -> None:
    layer = tritongru.GRU(3, 4, backend=backend)
    lengths, resets = torch.ones(0, dtype=torch.int64), torch.ones(2, 0, dtype=torch.bool)
    output, h_n = layer(torch.randn(2, 0, 3), lengths=lengths, resets=resets)
    assert output.shape == (2, 0, 4) and h_n.shape == (1, 0, 4)


@EVERY
def test_lengths_of_any_integers(backend: str | None) -> None:
    case = CASES[4]
    given, layer = drawn(case), layer_of(case, backend)
    expected = called(layer, given)
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32):
        found = called(layer, {**given, "lengths": given["lengths"].to(dtype)})
        assert all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))


@OPERATORS
def test_one_graph_for_all_lengths_and_resets(backend: str | None, dynamo) -> None:
    """Of `gru` by a module, with gradients; values are what the graph is run with."""
    case = CASES[4]
    layer = layer_of(case, backend)
    dynamo.utils.counters.clear()
    graph = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for seed, lengths in enumerate(((4, 5, 1), (1, 2, 5), (5, 5, 5))):
        given = drawn(case, seed)
        given["lengths"], x = torch.tensor(lengths), given["x"].requires_grad_()
        results = []
        for module in (graph, layer):
            results.append([*called(module, given)])
            results[-1] += torch.autograd.grad(results[-1], [x, *layer.parameters()], [given["dy"], given["dh_n"]])
        assert close(*results)
    assert dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_a_bad_length_in_a_graph_is_an_error_when_it_runs(dynamo) -> None:
    layer = tritongru.GRU(3, 4)
    graph = torch.compile(lambda x, lengths: layer(x, lengths=lengths)[0], backend="eager", fullgraph=True)
    x = torch.randn(5, 2, 3)
    graph(x, torch.tensor([5, 1]))
    with pytest.raises(RuntimeError, match="got 6 where input has 5 steps"):
        graph(x, torch.tensor([5, 6]))


@OPERATORS
@pytest.mark.parametrize("mapped", ["values", "weights"])
def test_vmap(backend: str | None, mapped: str) -> None:
    """Over rows, lengths and resets, which join the batch; over weights a layer for each."""
    case = Case(T=4, B=3, I=3, H=6, bidirectional=True)
    layers = [layer_of(case, backend) for _ in range(2)]
    with torch.no_grad():
        for p in layers[1].parameters():
            p.mul_(-1)
    x, h_0 = torch.randn(2, 4, 3, 3), torch.randn(2, 2, 3, 6)
    lengths, resets = torch.tensor([[4, 1, 2], [3, 3, 4]]), torch.rand(2, 4, 3) < 0.4

    def call(x, h_0, lengths, resets, weights):
        params = [weights[name] for name, _ in layers[0].named_parameters()]
        return tritongru.gru(
            x, h_0, params, True, 1, 0.0, False, True, False, backend=backend, lengths=lengths, resets=resets
        )

    weights = [dict(layer.named_parameters()) for layer in layers]
    stacked = {name: torch.stack([w[name] for w in weights]) for name in weights[0]}
    if mapped == "values":
        found = torch.vmap(call, in_dims=(0, 0, 0, 0, None))(x, h_0, lengths, resets, weights[0])
        each = [call(x[i], h_0[i], lengths[i], resets[i], weights[0]) for i in range(2)]
    else:
        found = torch.vmap(call, in_dims=(0, 0, None, 0, 0))(x, h_0, lengths[0], resets, stacked)
        each = [call(x[i], h_0[i], lengths[0], resets[i], weights[i]) for i in range(2)]
    assert close(found, [torch.stack(parts) for parts in zip(*each, strict=True)])


@pytest.mark.parametrize("transform", ["grad", "jvp", "vmap of grad", "export"])
def test_under_what_takes_pytorch_s_own_path(transform: str) -> None:
    """The equations there: of how many sequences there are only values tell."""
    case = Case(T=4, B=3, I=3, H=5, bidirectional=True, resets=0.4)
    layer = layer_of(case, None, torch.float64)
    given = drawn(case, dtype=torch.float64)
    given["lengths"] = torch.tensor([4, 1, 2])

    def loss(x, lengths, resets=given["resets"]):
        return called(layer, {**given, "x": x, "lengths": lengths, "resets": resets})[0].square().sum()

    x, lengths = given["x"], given["lengths"]
    expected = torch.autograd.grad(loss(leaf := x.clone().requires_grad_(), lengths), leaf)[0]
    if transform == "grad":
        assert torch.allclose(torch.func.grad(loss)(x, lengths), expected)
    elif transform == "jvp":
        tangent = torch.randn_like(x)
        _, found = torch.func.jvp(lambda x: loss(x, lengths), (x,), (tangent,))
        assert torch.allclose(found, (expected * tangent).sum())
    elif transform == "vmap of grad":
        other = torch.tensor([2, 4, 3])
        found = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(x, torch.stack([lengths, other]))
        assert torch.allclose(found[0], expected) and not torch.allclose(found[1], expected)
    else:
        program = torch.export.export(_Loss(loss), (x, lengths, given["resets"])).module()
        for lengths in (torch.tensor([4, 1, 2]), torch.tensor([1, 3, 4])):
            assert torch.allclose(program(x, lengths, ~given["resets"]), loss(x, lengths, ~given["resets"]))


class _Loss(torch.nn.Module):
    def __init__(self, loss: Any):
        super().__init__()
        self.forward = loss


@EVERY
def test_double_backward(backend: str | None) -> None:
    """Against autograd through nn.GRU run sequence by sequence, x NaN past the lengths."""
    case = replace(CASES[4], layers=1)
    given, layer = drawn(case), layer_of(case, backend)
    truth = torch.nn.GRU(case.I, case.H, batch_first=True, bidirectional=True, dtype=torch.float64)
    truth.load_state_dict(layer.state_dict())
    past = torch.arange(case.T) >= given["lengths"][:, None]
    results = []
    for module, dtype in ((layer, torch.float32), (truth, torch.float64)):
        x, h_0, dy, dh_n = (given[name].to(dtype, copy=True) for name in ("x", "h_0", "dy", "dh_n"))
        if module is layer:
            x[past] = math.nan
        leaves = [x.requires_grad_(), h_0.requires_grad_(), dy.requires_grad_(), *module.parameters()]
        if module is layer:
            outputs = layer(x, h_0, lengths=given["lengths"], resets=given["resets"])
        else:
            outputs = by_segments(truth, x, h_0, given["lengths"], given["resets"])
        first = torch.autograd.grad(outputs, [x, h_0, *module.parameters()], [dy, dh_n], create_graph=True)
        results.append(torch.autograd.grad(sum(g.square().sum() for g in first), leaves))
    for found, expected in zip(*results, strict=True):
        assert (found - expected).norm() <= 1e3 * 2**-24 * expected.norm()  # sums of sums: some hundred roundings


@OPERATORS
@pytest.mark.parametrize("recompute", [False, True])
def test_autocast(backend: str | None, recompute: bool) -> None:
    case = replace(CASES[4], recompute=recompute)
    given, layer = drawn(case), layer_of(case, backend)
    with torch.autocast("cpu", torch.bfloat16):
        found = run(layer, **given)
    expected = run(layer, **given)

    assert all((found[n].float() - e).norm() <= 0.1 * e.norm() for n, e in expected.items())


@EVERY
def test_dropout_between_layers(backend: str | None) -> None:
    """Of everything: what the second layer gets is 0, whatever the first gave."""
    case = replace(CASES[4], bidirectional=False)
    given = drawn(case)
    layer = layer_of(case, backend, dropout=1.0)
    output, h_n = called(layer, given)
    layer.eval()
    with torch.no_grad():
        layer.weight_ih_l1.zero_()
    expected, h_n_expected = called(layer, given)
    assert close((output, h_n), (expected, h_n_expected))


@EVERY
def test_checkpoint(backend: str | None) -> None:
    from torch.utils.checkpoint import checkpoint

    case = CASES[4]
    given, layer = drawn(case), layer_of(case, backend)
    expected = run(layer, **given)
    x = given["x"].requires_grad_()
    output, _ = checkpoint(lambda x: called(layer, {**given, "x": x}), x, use_reentrant=False)
    _, h_n = called(layer, given)
    torch.autograd.backward([output, h_n], [given["dy"], given["dh_n"]])
    assert torch.allclose(x.grad, expected["x"], atol=1e-6)


@OPERATORS
def test_batched_gradients(backend: str | None) -> None:
    case = CASES[4]
    given, layer = drawn(case), layer_of(case, backend)
    x = given["x"].requires_grad_()
    output, _ = called(layer, given)
    cotangents = torch.randn(2, *output.shape)
    found = torch.autograd.grad(output, [x, *layer.parameters()], cotangents, is_grads_batched=True, retain_graph=True)
    each = [torch.autograd.grad(output, [x, *layer.parameters()], c, retain_graph=True) for c in cotangents]
    assert close(found, [torch.stack(parts) for parts in zip(*each, strict=True)])


@OPERATORS
def test_compiled_autograd(backend: str | None, dynamo) -> None:
    case = CASES[4]
    given, layer = drawn(case), layer_of(case, backend)
    expected = run(layer, **given)
    with dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")):
        found = run(layer, **given)
    assert close([found[name] for name in expected], expected.values())


@OPERATORS
def test_graphs_for_other_sizes(backend: str | None, dynamo) -> None:
    """Once T and B have each changed no graph is made anew."""
    layer = tritongru.GRU(3, 6, backend=backend)
    graph = torch.compile(layer, backend="eager", fullgraph=True)
    dynamo.utils.counters.clear()
    for T, B in ((5, 3), (6, 3), (6, 4), (3, 9), (7, 2)):
        x, lengths, resets = torch.randn(T, B, 3), torch.randint(1, T + 1, (B,)), torch.rand(T, B) < 0.3
        found, expected = (module(x, lengths=lengths, resets=resets) for module in (graph, layer))
        assert close(found, expected)
    assert dynamo.utils.counters["stats"]["unique_graphs"] <= 3


@OPERATORS
def test_under_a_dispatch_mode(backend: str | None) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    case = CASES[4]
    given, layer = drawn(case), layer_of(case, backend)
    expected = run(layer, **given)
    with FlopCounterMode(display=False) as counter:
        found = run(layer, **given)
    assert counter.get_total_flops() > 0 and same_bits(expected, found)


# ---- bad input -------------------------------------------------------------------------------------------------------

BOOL, INT = torch.bool, torch.int64
WRONG = {
    "a length of 0": (dict(lengths=torch.tensor([1, 0, 2])), RuntimeError, "larger than 0 in RNN, .*: got 0 where"),
    "a length below 0": (dict(lengths=torch.tensor([1, -3, 2])), RuntimeError, "got -3 where input has 4 steps"),
    "a length above T": (dict(lengths=torch.tensor([1, 5, 2])), RuntimeError, "got 5 where input has 4 steps"),
    "lengths of another batch": (
        dict(lengths=torch.ones(2, dtype=INT)), RuntimeError, r"lengths must be a tensor \[3\] of integers .*got \[2\]"
    ),
    "lengths of reals": (dict(lengths=torch.ones(3)), RuntimeError, r"of integers on cpu, got \[3\] of torch.float32"),
    "lengths in a list": (dict(lengths=[1, 2, 3]), TypeError, r"lengths must be a tensor \[3\] of integers.*got list"),
    "resets of another time": (
        dict(resets=torch.ones(3, 3, dtype=BOOL)), RuntimeError, r"resets must be a tensor \[4, 3\] .*got \[3, 3\]"
    ),
    "resets of integers": (
        dict(resets=torch.ones(4, 3, dtype=INT)), RuntimeError, r"of bool on cpu, got \[4, 3\] of torch.int64"
    ),
    "resets elsewhere": (
        dict(resets=torch.ones(4, 3, dtype=BOOL, device="meta")), RuntimeError, "of bool on cpu, got .* on meta"
    ),
}  # fmt: skip


@EVERY
@pytest.mark.parametrize(("given", "error", "message"), WRONG.values(), ids=WRONG)
def test_errors_name_the_argument(backend: str | None, given: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        tritongru.GRU(2, 3, backend=backend)(torch.randn(4, 3, 2), **given)


@EVERY
def test_both_are_keyword_only(backend: str | None) -> None:
    with pytest.raises(TypeError, match="takes from 2 to 3 positional arguments but 4 were given"):
        tritongru.GRU(2, 3, backend=backend)(torch.randn(4, 3, 2), None, torch.ones(3, dtype=INT))


@EVERY
def test_shapes_in_errors_are_the_caller_s(backend: str | None) -> None:
    with pytest.raises(RuntimeError, match=r"resets must be a tensor \[3, 4\] of bool on cpu, got \[4, 3\]"):
        tritongru.GRU(2, 3, batch_first=True, backend=backend)(
            torch.randn(3, 4, 2), resets=torch.ones(4, 3, dtype=BOOL)
        )


@EVERY
@pytest.mark.parametrize("name", ["lengths", "resets"])
def test_packed_input_has_lengths_of_its_own(backend: str | None, name: str) -> None:
    layer = tritongru.GRU(2, 3, backend=backend)
    packed = pack_padded_sequence(torch.randn(4, 2, 2), [4, 2])
    with pytest.raises(RuntimeError, match=f"{name} must be None with a PackedSequence.*got a tensor"):
        layer(packed, **{name: torch.ones(2)})
    params = list(layer.parameters())
    with pytest.raises(RuntimeError, match=f"{name} must be None with packed input.*got a tensor"):
        tritongru.gru(
            packed.data, packed.batch_sizes, torch.zeros(1, 2, 3), params, True, 1, 0.0, False, False,
            backend=backend, **{name: torch.ones(2)},
        )  # fmt: skip


@EVERY
def test_what_nn_gru_refuses_is_refused_in_its_words(backend: str | None) -> None:
    layer, resets = tritongru.GRU(2, 3, backend=backend), torch.zeros(4, 3, dtype=BOOL)
    for x, h_0 in ((torch.randn(4, 3, 5), None), (torch.randn(4, 3, 2), torch.zeros(1, 2, 3)), (torch.randn(4), None)):
        raised = []
        for call in (
            lambda x=x, h_0=h_0: torch.nn.GRU(2, 3)(x, h_0),
            lambda x=x, h_0=h_0: layer(x, h_0, resets=resets),
        ):
            with pytest.raises(Exception) as caught:
                call()
            raised.append((type(caught.value), str(caught.value)))
        assert raised[0] == raised[1]
