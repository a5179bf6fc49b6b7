"""A call of tritongru.GRU and GRUCell in torch.nn's place: values, every gradient, layout of memory, NaN, dropout.

Every test holds a layer against torch's own with the same parameters, on each backend; forms of a call and the
tolerance: tests/kit/modules.py.
"""

from __future__ import annotations

import math
import subprocess
import sys
from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch.nn.utils.rnn import pack_sequence, pad_packed_sequence
from torch.utils.flop_counter import FlopCounterMode

import tritongru
from tests.kit.fences import with_gaps
from tests.kit.inside import default_device_elsewhere
from tests.kit.modules import (
    FORMS,
    PLAIN,
    Form,
    assert_close,
    assert_same,
    both,
    cell_pair,
    ours_by_form,
    ours_only,
    outcome,
    pair,
    randn,
    results,
    same_bits,
    some_forms,
    table,
    tensors,
)
from tests.kit.operators import Seen


@table("form", FORMS)
def test_values_and_gradients_are_torch_s(backend, form, few_rows_at_once):
    few_rows_at_once(4)  # recompute in chunks of time
    theirs, ours = form.pair(backend)
    assert_same(form.results(ours), form.results(theirs))


@table("form", {name: Form(**{**vars(form), "h_0": False}) for name, form in FORMS.items() if not form.resets})
def test_values_and_gradients_without_h_0(backend, form):
    theirs, ours = form.pair(backend)
    assert_same(form.results(ours), form.results(theirs))


# What a call is made in.


@contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)  # fills fresh memory with NaN besides
    try:
        with torch.autograd.detect_anomaly(check_nan=True):
            yield
    finally:
        torch.use_deterministic_algorithms(False)


def saved(unpack):
    """torch.autograd.graph.save_on_cpu(pin_memory=True) gives tensors back contiguous, whatever they were."""
    return lambda: torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().clone(), unpack)


BITS = {
    "again": nullcontext,
    "deterministic-algorithms-and-anomaly-mode": deterministic,
    "a-default-device-elsewhere": default_device_elsewhere,
    "saved-tensors-packed-away": saved(lambda t: t),
    "a-dispatch-mode": Seen,
    "a-flop-counter": lambda: FlopCounterMode(display=False),
}
AROUND = BITS | {
    "saved-tensors-contiguous": saved(torch.Tensor.contiguous),
    "saved-tensors-with-gaps": saved(lambda t: with_gaps(t) if t.is_floating_point() else t),
}


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@table("around", AROUND)
@ours_by_form()
def test_the_same_call_gives_the_same_bits(backend, form, around, few_rows_at_once):
    """Twice, and whatever it is made in; where saved tensors come back in another layout, up to roundings."""
    few_rows_at_once(4)  # recompute in chunks of time
    _, ours = form.pair(backend)
    call = form.prepared(ours)
    expected = call()
    with around():
        found = call()
    assert_same(found, expected)
    assert around not in BITS.values() or same_bits(found, expected)


@ours_by_form()
def test_without_gradients_the_values_are_the_same_bits(backend, form):
    _, ours = form.pair(backend)
    given, how = form.given(), form.how()
    expected = tensors(ours(*given, **how))
    assert all(r.requires_grad for r in expected)
    for around, inference in ((torch.no_grad, False), (torch.inference_mode, True)):
        with around():
            found = tensors(ours(*given, **how))
        assert same_bits(found, expected)
        assert not any(r.requires_grad for r in found) and {r.is_inference() for r in found} == {inference}


def test_backward_in_eval_mode(backend):
    """cuDNN's GRU refuses it; nothing in the equations does."""
    theirs, ours = (module.eval() for module in PLAIN.pair(backend))
    assert_same(PLAIN.results(ours), PLAIN.results(theirs))


@table("form", some_forms("plain", "packed", "cell"))
@ours_only
def test_recompute_changes_nothing_but_what_is_kept(backend, form):
    kept = []
    for recompute in (False, True):
        theirs, ours = Form(**{**vars(form), "recompute": recompute}).pair(backend)
        shapes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=shapes: s.append(t.shape) or t, lambda t: t):
            ours(*form.given())
        kept.append(shapes)
        assert_same(form.results(ours), form.results(theirs))
    if not form.cell:
        assert len(kept[1]) == len(kept[0]) - 2 and not [s for s in kept[1] if s[-1] == 15 and len(s) > 2]  # r, z, n; q


# Packed batches.


def test_packed_input_is_in_the_order_of_the_user_s_batch(backend):
    """Each sequence of an unsorted batch against the same sequence alone; indices are passed on."""
    _, ours = pair(backend, 3, 4, bidirectional=True, batch_first=True)
    lengths, hx = (2, 1, 4), randn(2, 3, 4, seed=9)  # an order that is not its own inverse
    sequences = [randn(n, 3, seed=n) for n in lengths]
    given = pack_sequence(sequences, enforce_sorted=False)
    output, h_n = ours(given, hx)
    assert output.batch_sizes is given.batch_sizes
    assert output.sorted_indices is given.sorted_indices and output.unsorted_indices is given.unsorted_indices
    padded, _ = pad_packed_sequence(output)
    for b, sequence in enumerate(sequences):
        alone, h_alone = ours(sequence[None], hx[:, b : b + 1])
        assert_close(padded[: lengths[b], b], alone[0], what=f"output of sequence {b}")
        assert_close(h_n[:, b : b + 1], h_alone, what=f"h_n of sequence {b}")
        assert not padded[lengths[b] :, b].any()
    ours.batch_first = False  # ignored
    assert torch.equal(ours(given, hx)[0].data, output.data)


def test_state_carried_from_chunk_to_chunk(backend):
    """Is one sequence; and h_n.detach_() cuts the history."""
    theirs, ours = pair(backend, 3, 5, num_layers=2)
    whole = results(ours, randn(4, 2, 3))

    def chunks(x, hx):
        first, hx = ours(x[:1])
        second, hx = ours(x[1:], hx)
        return torch.cat([first, second]), hx

    assert_same(results(chunks, randn(4, 2, 3), of=ours), whole)

    def cut(module):
        module.zero_grad()
        hx = None
        for chunk in randn(4, 2, 3).split(2):
            output, hx = module(chunk, hx)
            hx.detach_()
            output.square().sum().backward()
        assert not hx.requires_grad
        return [hx, *(p.grad for p in module.parameters())]

    both(theirs, ours, cut)


# Memory: what comes in, and what comes out.


def gapped(tensor):
    wide = torch.full((*tensor.shape[:-1], tensor.shape[-1] + 3), math.nan)
    wide[..., 1:-2] = tensor.detach()
    return wide[..., 1:-2]


def shifted(tensor):
    return torch.cat([torch.full((1,), math.nan), tensor.detach().flatten()])[1:].view(tensor.shape)


LAID = {
    "unaligned": shifted,
    "rows-with-gaps": gapped,
    "gaps-everywhere": with_gaps,
    "transposed": lambda t: t.permute(*range(t.dim())[::-1]).contiguous().permute(*range(t.dim())[::-1]),
    "flipped": lambda t: t.flip(0).contiguous().flip(0),
    "expanded": lambda t: t[..., :1, :].expand_as(t),
    "expanded-everywhere": lambda t: t.flatten()[0].expand_as(t),
    "negated-lazily": lambda t: torch.complex(t, -t).conj().imag,  # memory holds the other sign
}
OF_WEIGHTS = ("unaligned", "rows-with-gaps", "gaps-everywhere")
LAYOUTS = [
    pytest.param(FORMS[form], moved, laid, id=f"{form}-{moved}-{laid}")
    for form, moves in (
        ("two-layers-bidirectional", ("input", "h_0", "weights", "everything")), ("one-step", ("everything",))
    )
    for moved in moves for laid in (OF_WEIGHTS if moved == "weights" else LAID)
]  # fmt: skip


@pytest.mark.parametrize(("form", "moved", "laid"), LAYOUTS)
def test_memory_of_any_layout(backend, form, moved, laid):
    theirs, ours = form.pair(backend)
    x, h_0 = form.given()
    given = [LAID[laid](t) if moved in (of, "everything") else t for of, t in (("input", x), ("h_0", h_0))]
    expected = results(theirs, *(t.contiguous().resolve_neg() for t in given))
    if moved in ("weights", "everything") and laid in OF_WEIGHTS:
        for parameter in ours.parameters():
            parameter.data = LAID[laid](parameter)
    assert_same(results(ours, *given), expected)


UNBATCHED = FORMS["unbatched"], FORMS["cell-unbatched-no-bias"]  # which are views


def storage(tensor):
    return tensor.untyped_storage().data_ptr()


@pytest.mark.parametrize("gradients", [False, True], ids=["inference", "training"])
@table("form", {**FORMS, "one-step-batch-first": Form({"batch_first": True}, sizes=(1, 2))})
def test_results_have_nn_gru_s_strides_and_are_no_views_of_anything(backend, form, gradients):
    theirs, ours = form.pair(backend)
    x, h_0 = form.given()
    kept = tensors([x, h_0])
    before = [t.clone() for t in kept]
    with torch.set_grad_enabled(gradients):
        found, again = tensors(ours(x, h_0, **form.how())), tensors(ours(x, h_0, **form.how()))
        expected = found if form.resets else tensors(theirs(x, h_0))
    assert [r.stride() for r in found] == [r.stride() for r in expected]
    assert len({storage(t) for t in (*kept, *found, *again)}) == 2 + 2 * len(found)
    if backend != "aten" and len(form.sizes) > 1:
        assert not any(r._is_view() for r in found)
    with torch.no_grad():
        h_n = found[-1].detach() if form in UNBATCHED else found[-1].detach_()  # a common idiom
        h_n.zero_()
    assert same_bits(kept, before) and torch.equal(found[0], again[0]) == (not form.cell)


def test_the_reverse_direction_s_h_n_comes_from_its_own_last_step(backend):
    _, ours = pair(backend, 3, 4, bidirectional=True)
    for lengths in ((4, 4), (4, 2)):
        rows, h_n = ours(pack_sequence([randn(n, 3, seed=n) for n in lengths]))
        padded, _ = pad_packed_sequence(rows)
        for b, length in enumerate(lengths):
            assert torch.equal(h_n[0, b], padded[length - 1, b, :4])
            assert torch.equal(h_n[1, b], padded[0, b, 4:])
    output, h_n = ours(randn(4, 2, 3))
    assert torch.equal(h_n[0], output[-1, :, :4]) and torch.equal(h_n[1], output[0, :, 4:])


# NaN, infinity, and gates at their ends.

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
    "saturated": lambda m, x, h: x.mul_(1e4),
    "saturated-much": lambda m, x, h: x.mul_(1e30),
}


def kind_of_value(tensor):
    """0 finite, 1 NaN, 2 inf, 3 -inf."""
    return tensor.isnan() * 1 + tensor.isposinf() * 2 + tensor.isneginf() * 3


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@table("poison", POISONED)
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
        assert_close(actual[finite], expected[finite])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("value", [math.nan, math.inf], ids=["nan", "inf"])
def test_nan_and_infinity_in_a_cell(backend, value):
    theirs, ours = cell_pair(backend, 3, 5)
    x, h = randn(3, 3), randn(3, 5, seed=3)
    x[0, 1] = h[1, 1] = value
    expected, found = theirs(x, h), ours(x, h)
    assert kind_of_value(expected).any()
    assert torch.equal(kind_of_value(found), kind_of_value(expected))


# Dropout, and what else is read at call time.


def test_batch_first_is_read_at_call_time(backend):
    theirs, ours = PLAIN.pair(backend)
    for module in (theirs, ours):
        module(randn(2, 4, 3))
        module.batch_first = True
    given = randn(2, 4, 3), randn(1, 2, 5, seed=3)
    assert_same(results(ours, *given), results(theirs, *given))


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

    def run(seed=0):
        torch.manual_seed(seed)
        output, h_n = layer(torch.zeros(T, B, H), torch.ones(2, B, H))
        return torch.atanh(output.detach()) * 16 / decay, h_n.detach()

    return layer, run


@pytest.mark.parametrize("p", [0.25, 0.5])
def test_dropout_between_layers_is_scaled_drawn_per_step_and_spares_h_n(backend, p):
    _, run = dropout_probe(backend, p)
    mask, h_n = run()
    kept = mask > 0.5
    torch.testing.assert_close(mask, torch.where(kept, 1 / (1 - p), 0.0), rtol=1e-4, atol=1e-4)  # atanh is good to 1e-5
    share = kept.float().mean().item()
    assert abs(share - (1 - p)) < 4 * math.sqrt(p * (1 - p) / mask.numel())  # 4 standard deviations
    assert all((kept[t] != kept[0]).any() for t in range(1, len(kept)))  # a mask of its own at each step
    assert all((kept[:, b] != kept[:, 0]).any() for b in range(1, kept.shape[1]))  # and of each sequence
    assert torch.equal(h_n[0], torch.full_like(h_n[0], 0.5**5))  # h_n of the first layer: before dropout
    assert torch.equal(mask, run()[0]) and not torch.equal(mask, run(seed=1)[0])


def test_dropout_and_training_are_read_at_call_time(backend):
    layer, run = dropout_probe(backend, 0.5)
    theirs = torch.nn.GRU(20, 20, 2)
    for training, p, expected in ((False, 0.5, 1.0), (True, 0.0, 1.0), (True, 1.0, 0.0)):
        layer.train(training).dropout = p
        torch.testing.assert_close(run()[0], torch.full((5, 4, 20), expected), rtol=1e-4, atol=1e-4)
    layer.dropout = 0.5
    assert (run()[0] < 0.5).any()
    for wrong in (1.5, -0.5):
        for module in (theirs, layer):
            module.train(False).dropout = wrong
        assert outcome(lambda: layer(torch.zeros(5, 4, 20))) == outcome(lambda: theirs(torch.zeros(5, 4, 20)))


@pytest.mark.parametrize("form", ["packed", "padded"])
def test_dropout_of_rows_of_several_lengths(backend, form):
    layer, _ = dropout_probe(backend, 0.5)
    lengths = (4, 3, 1)
    torch.manual_seed(0)
    if form == "packed":
        output, h_n = layer(pack_sequence([torch.zeros(n, 20) for n in lengths]), torch.ones(2, 3, 20))
        output = output.data
    else:
        output, h_n = layer(torch.zeros(4, 3, 20), torch.ones(2, 3, 20), lengths=torch.tensor(lengths))
        output = output[torch.arange(4)[:, None] < torch.tensor(lengths)]
    share = (output.abs() > 1e-6).float().mean().item()
    assert abs(share - 0.5) < 4 * math.sqrt(0.25 / output.numel())
    assert torch.equal(h_n[0], 0.5 ** torch.tensor([4.0, 3.0, 1.0])[:, None].expand(3, 20))


def test_dropout_touches_neither_one_layer_nor_the_last_nor_gradients_of_what_it_kept(backend):
    with pytest.warns(UserWarning):
        one = tritongru.GRU(3, 4, dropout=0.9, backend=backend)
    state = torch.get_rng_state()
    first = one(randn(3, 2, 3))[0]
    assert torch.equal(one.eval()(randn(3, 2, 3))[0], first) and torch.equal(torch.get_rng_state(), state)
    layer, _ = dropout_probe(backend, 0.5)
    with torch.no_grad():
        layer.weight_ih_l0[40:] = torch.eye(20)
    x = torch.zeros(1, 4, 20, requires_grad=True)
    output, _ = layer(x, torch.ones(2, 4, 20))
    output.sum().backward()
    assert torch.equal(x.grad != 0, output.abs() > 1e-6)


# Processes.


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
