"""A call of tritongru.GRU and GRUCell in torch.nn's place: values, every gradient, layout of memory, NaN, dropout.

Every test holds a layer against torch's own with the same parameters, on each backend; forms of a call and the
tolerance: tests/kit/modules.py.
"""

import math
import subprocess
import sys
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import PackedSequence
from torch.utils.flop_counter import FlopCounterMode

from tests.kit import modules as kit
from tests.kit.fences import with_gaps
from tests.kit.inside import default_device_elsewhere
from tests.kit.operators import Seen


@kit.table("form", kit.FORMS)
def test_values_and_gradients_are_torch_s(backend, form, few_rows_at_once):
    """And without h_0 in eval mode, in which cuDNN's GRU refuses backward; nothing in the equations does."""
    few_rows_at_once(4)  # recompute in chunks of time
    theirs, ours = form.pair(backend)
    kit.assert_same(form.results(ours), form.results(theirs))
    if not form.resets:
        form = replace(form, h_0=False)
        kit.assert_same(form.results(ours.eval()), form.results(theirs.eval()))


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
@kit.table("around", AROUND)
@kit.ours_by_form()
def test_the_same_call_gives_the_same_bits(backend, form, around, few_rows_at_once):
    """Twice, and whatever it is made in; where saved tensors come back in another layout, up to roundings."""
    few_rows_at_once(4)  # recompute in chunks of time
    _, ours = form.pair(backend)
    call = form.prepared(ours)
    expected = call()
    with around():
        found = call()
    kit.assert_same(found, expected)
    assert around not in BITS.values() or kit.same_bits(found, expected)


@kit.ours_by_form()
def test_without_gradients_the_values_are_the_same_bits(backend, form):
    _, ours = form.pair(backend)
    given, how = form.given(), form.how()
    expected = kit.tensors(ours(*given, **how))
    assert all(r.requires_grad for r in expected)
    for around, inference in ((torch.no_grad, False), (torch.inference_mode, True)):
        with around():
            found = kit.tensors(ours(*given, **how))
        assert kit.same_bits(found, expected)
        assert not any(r.requires_grad for r in found) and {r.is_inference() for r in found} == {inference}


@kit.table("form", kit.some_forms("plain", "packed"))
@kit.ours_only
def test_recompute_keeps_no_gates(backend, form):
    kept = []
    for recompute in (False, True):
        kept.append(shapes := [])
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=shapes: s.append(t.shape) or t, lambda t: t):
            replace(form, recompute=recompute).pair(backend)[1](*form.given())
    assert len(kept[1]) == len(kept[0]) - 2 and not [s for s in kept[1] if s[-1] == 15 and len(s) > 2]  # r, z, n; q


def test_packed_results_have_the_input_s_indices_and_batch_first_is_ignored(backend):
    _, ours = kit.FORMS["packed"].pair(backend)
    x, hx = kit.FORMS["packed"].given()
    result = output, _ = ours(x, hx)
    assert type(result) is tuple and type(output) is PackedSequence
    assert all(ours_of is theirs for ours_of, theirs in zip(output[1:], x[1:], strict=True))
    ours.batch_first = True
    assert torch.equal(ours(input=x, hx=hx)[0].data, output.data)


LAID = {
    "unaligned": lambda t: torch.cat([torch.full((1,), math.nan), t.detach().flatten()])[1:].view(t.shape),
    "rows-with-gaps": lambda t: F.pad(t.detach(), (1, 2), value=math.nan)[..., 1:-2],
    "gaps-everywhere": with_gaps,
    "transposed": lambda t: t.permute(*range(t.dim())[::-1]).contiguous().permute(*range(t.dim())[::-1]),
    "flipped": lambda t: t.flip(0).contiguous().flip(0),
    "expanded": lambda t: t[..., :1, :].expand_as(t),
    "expanded-everywhere": lambda t: t.flatten()[0].expand_as(t),
    "negated-lazily": lambda t: torch.complex(t, -t).conj().imag,  # memory holds the other sign
}
OF_WEIGHTS = [LAID[name] for name in ("unaligned", "rows-with-gaps", "gaps-everywhere")]


@pytest.mark.parametrize("moved", ["input", "h_0", "everything"])
@kit.table("laid", LAID)
def test_memory_of_any_layout(backend, laid, moved):
    for form in kit.some_forms("two-layers-bidirectional", "one-step").values():
        theirs, ours = form.pair(backend)
        given = dict(zip(("input", "h_0"), form.given(), strict=True))
        given = [laid(t) if moved in (name, "everything") else t for name, t in given.items()]
        expected = kit.results(theirs, *(t.contiguous().resolve_neg() for t in given))
        if moved == "everything" and laid in OF_WEIGHTS:
            for parameter in ours.parameters():
                parameter.data = laid(parameter)
        kit.assert_same(kit.results(ours, *given), expected)


UNBATCHED = kit.FORMS["unbatched"], kit.FORMS["cell-unbatched-no-bias"]  # which are views


@pytest.mark.parametrize("gradients", [False, True], ids=["inference", "training"])
@kit.table("form", {**kit.FORMS, "one-step-batch-first": kit.Form({"batch_first": True}, sizes=(1, 2))})
def test_results_have_nn_gru_s_strides_and_are_no_views_of_anything(backend, form, gradients):
    theirs, ours = form.pair(backend)
    x, h_0 = form.given()
    kept = kit.tensors([x, h_0])
    before = [t.clone() for t in kept]
    with torch.set_grad_enabled(gradients):
        found, again = kit.tensors(ours(x, h_0, **form.how())), kit.tensors(ours(x, h_0, **form.how()))
        expected = found if form.resets else kit.tensors(theirs(x, h_0))
    assert [r.stride() for r in found] == [r.stride() for r in expected]
    assert len({t.untyped_storage().data_ptr() for t in (*kept, *found, *again)}) == 2 + 2 * len(found)
    if backend != "aten" and len(form.sizes) > 1:
        assert not any(r._is_view() for r in found)
    with torch.no_grad():
        h_n = found[-1].detach() if form in UNBATCHED else found[-1].detach_()  # a common idiom
        h_n.zero_()
    assert kit.same_bits(kept, before) and torch.equal(found[0], again[0]) == (not form.cell)


PLACES = {"input": (-1, 0, 1), "h_0": (1, 0, 1), "weight_ih_l0": (4, 1), "weight_hh_l0": (11, 1)}
PLACES |= {"bias_ih_l0": (0,), "bias_hh_l0_reverse": (6,)}


def kind_of_value(tensor):
    """0 finite, 1 NaN, 2 inf, 3 -inf."""
    return tensor.isnan() * 1 + tensor.isposinf() * 2 + tensor.isneginf() * 3


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e6, 1e30])
@pytest.mark.parametrize("place", PLACES)
def test_nan_and_infinity_go_where_they_go_in_nn_gru(backend, place, value, T):
    theirs, ours = kit.pair(backend, 3, 5, bidirectional=True)
    found = []
    for module in (theirs, ours):
        given = {"input": kit.randn(T, 2, 3), "h_0": kit.randn(2, 2, 5, seed=3)}
        (given | dict(module.named_parameters()))[place].data[PLACES[place]] = value
        found.append(kit.tensors(module(*given.values())))
    for expected, actual in zip(*found, strict=True):
        assert torch.equal(kind_of_value(actual), kind_of_value(expected))
        finite = expected.isfinite()
        kit.assert_close(actual[finite], expected[finite])


DROPPED = {
    "dense": kit.Form({"num_layers": 3}),
    "batch-first": kit.Form({"num_layers": 2, "bidirectional": True, "batch_first": True}),
    "packed": kit.Form({"num_layers": 2}, lengths=(4, 1, 2)),
    "one-layer": kit.PLAIN,
}


@kit.table("form", DROPPED)
def test_dropout_is_nn_gru_s(backend, form):
    """The same draws on the CPU: between layers, scaled, of each step and sequence; p and training are the call's."""
    theirs, ours = form.pair(backend)
    for training, p in ((True, 0.25), (False, 0.5), (True, 1.0)):
        found = []
        for module in (theirs, ours):
            module.train(training).dropout = p
            torch.manual_seed(1)
            found.append({**form.results(module), "state": torch.get_rng_state()})
        assert torch.equal(*(each.pop("state") for each in found))
        kit.assert_same(found[1], found[0])


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch, tritongru
layer, x, found = tritongru.GRU(3, 4), torch.randn(3, 2, 3), []
for layer.backend in (None, "aten", "reference"):
    found.append(layer(x)[0])
    found[-1].sum().backward()
    assert torch.allclose(found[-1], found[0], atol=1e-6)
status = {s.name: s.why_not for s in tritongru.backends()}
assert status["aten"] is None and status["reference"] is None and "not installed" in status["step"], status
"""

LIGHT = """
import sys, torch, tritongru
layer = tritongru.GRU(3, 5, backend="reference")
# Neither Triton, which settles at its import whether kernels are interpreted, nor Dynamo, which imports it
assert not {"triton", "torch._dynamo", "sympy", "torch.utils.flop_counter"} & set(sys.modules)
from torch.utils.flop_counter import FlopCounterMode  # one that is imported later counts the first call
with FlopCounterMode(display=False) as counter:
    layer(torch.randn(4, 2, 3))
assert counter.get_total_flops() == 2 * 8 * 15 * (3 + 5), counter.get_total_flops()
"""


@pytest.mark.parametrize("code", [LIGHT, WITHOUT_TRITON], ids=["light", "without-triton"])
def test_importing_is_light_and_without_triton_aten_and_reference_run(code):
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
