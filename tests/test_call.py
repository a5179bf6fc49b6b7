"""A call resolved once: what it costs the host, and that one known by its key is what it would be without."""

import cProfile
import gc
import pstats
import sys
import traceback
import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence

import tritongru
from benchmarks.hostcost import as_on_a_gpu
from tests.kit import modules as kit
from tests.kit.counting import launched
from tritongru import call
from tritongru import layer as layers
from tritongru.latest import Latest
from tritongru.launch import runtime
from tritongru.launch.protocol import LayerCall
from tritongru.planning import describe
from tritongru.planning.choose import fastest_backend
from tritongru.planning.problem import Recurrence

T, B, I, H = 5, 3, 4, 6
PACKAGE = Path(tritongru.__file__).parent
compiled = pytest.mark.compiled


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> dict[call.Key, call.Call]:
    """What is kept, where calls on the CPU are kept as those on CUDA are."""
    monkeypatch.setattr(call, "DEVICES", ("cpu",))
    monkeypatch.setattr(call, "_known", Latest(1024))
    return call._known


@pytest.fixture
def handed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Any, ...]]]:
    """A GPU's host without a GPU: tensors of the CPU go the way of a GPU's, down to the driver; what it is handed."""
    with monkeypatch.context() as patch, as_on_a_gpu() as stand_in:
        patch.setattr(runtime, "_observers", [])  # who is told of launches goes the long way
        launches: list[tuple[Any, ...]] = []

        def launch(*given: Any) -> None:
            launches.append((*given[:-1], *given[-1]) if isinstance(given[-1], tuple) else given)

        stand_in.run.launch = launch
        yield launches


@compiled
def test_six_frames_in_five_files_lie_between_a_layer_and_its_launch(handed: object, monkeypatch) -> None:
    callers: list[Any] = []

    def launch(self: object, steps: object) -> None:
        callers[:] = [frame.f_code for frame, _ in traceback.walk_stack(sys._getframe(1))]

    monkeypatch.setattr(runtime.Launch, "__call__", launch)
    layer = tritongru.GRU(I, 512, dtype=torch.bfloat16, backend="sequence")
    for _ in range(2):
        layer(torch.randn(T, B, I, dtype=torch.bfloat16))
    ours = [code for code in callers if PACKAGE in Path(code.co_filename).parents]
    assert ours[-1].co_name == "forward" and ours[-1].co_filename.endswith("module.py")
    assert 1 + len(ours) <= 6 and len({"launch/runtime.py", *(code.co_filename for code in ours)}) <= 5


def calls(function: Callable[[], Any]) -> int:
    with cProfile.Profile() as profile:
        function()
    return pstats.Stats(profile).total_calls - 2  # the function and the profiler's end


def operators(function: Callable[[], Any]) -> int:
    """PyTorch's own that are dispatched, views too, but for those that others call."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function()

    def outermost(event: Any) -> bool:
        return event is None or (not event.name.startswith("aten::") and outermost(event.cpu_parent))

    return sum(event.name.startswith("aten::") and outermost(event.cpu_parent) for event in profile.events())


def costs(of: Callable[[Callable[[], Any]], int], module: Any, x: Tensor, *h_0: Tensor) -> tuple[int, int, int]:
    """Forward, with the backward of y, inference."""
    wanted, found = [t for t in (x, *module.parameters()) if t.requires_grad], {}

    def forward() -> None:
        found["results"] = module(x, *h_0)

    for _ in range(3):
        of_forward = of(forward)
        y = found["results"] if h_0 else found["results"][0]
        given = y, wanted, torch.ones_like(y)
        of_both = of_forward + of(lambda given=given: torch.autograd.grad(*given))
        with torch.no_grad():
            of_inference = of(forward)
    return of_forward, of_both, of_inference


@compiled
def test_the_host_makes_few_calls(handed: object, monkeypatch) -> None:
    monkeypatch.setattr(runtime.Launch, "__call__", lambda self, steps: None)
    layer = tritongru.GRU(I, 512, dtype=torch.bfloat16, backend="sequence")
    found = costs(calls, layer, torch.randn(T, B, I, dtype=torch.bfloat16))
    assert all(cost <= most for cost, most in zip(found, (137, 333, 107), strict=True)), found


@compiled
def test_another_number_of_steps_costs_the_host_little(handed: object, monkeypatch) -> None:
    """As where the lengths of sequences vary: nothing but T is looked at anew, and no row of what was measured."""
    layer, x = tritongru.GRU(I, 512, dtype=torch.bfloat16, backend="sequence"), torch.randn(9, B, I).bfloat16()
    for steps in range(2, 9):
        layer(x[:steps])[0].sum().backward()
        fastest_backend(of := Recurrence(B, 512, 1, "bf16", "tf32", describe("h200")), steps, True)
    assert calls(lambda: layer(x)[0].sum().backward()) <= 885
    assert calls(lambda: fastest_backend(of, 9, True)) <= 45


@kit.ours_by_form(kit.FORMS | {"dropout": kit.Form({"num_layers": 2, "dropout": 0.5})})
def test_a_known_call_is_the_call_it_would_be(backend: str, form: kit.Form, known: dict[Any, Any], monkeypatch) -> None:
    """Bit for bit, with other values in input, h_0 and the parameters, gradients too."""
    _, ours = form.pair(backend)

    def results(seed: int) -> dict[str, Tensor]:
        torch.manual_seed(1)
        return kit.results(form.of(ours), *form.given(seed), of=ours)

    results(2)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.mul_(-0.5)
    kept = len(known)
    found = results(9)
    assert kept == len(known) == 1
    monkeypatch.setattr(call, "DEVICES", ())
    assert kit.same_bits(found, results(9))


@kit.table(
    "change",
    {
        "T": lambda layer, x: layer(torch.cat([x, x])),
        "B": lambda layer, x: layer(torch.cat([x, x], 1)),
        "strides": lambda layer, x: layer(x.transpose(0, 1).contiguous().transpose(0, 1)),
        "a gradient of x": lambda layer, x: layer(x.clone().requires_grad_()),
        "a gradient of h_0": lambda layer, x: layer(x, torch.randn(1, B, H, requires_grad=True)),
        "a negated view": lambda layer, x: layer(torch._neg_view(x)),
        "dtype": lambda layer, x: layer.double()(x.double()),
        "eval": lambda layer, x: layer.eval()(x),
        "recompute": lambda layer, x: setattr(layer, "recompute", True) or layer(x),
        "batch_first": lambda layer, x: setattr(layer, "batch_first", True) or layer(x),
        "frozen": lambda layer, x: layer.weight_hh_l0.requires_grad_(False) is None or layer(x),
        "bias": lambda layer, x: tritongru.GRU(I, H, bias=False, backend="reference")(x),
        "directions": lambda layer, x: tritongru.GRU(I, H, bidirectional=True, backend="reference")(x),
        "lengths": lambda layer, x: layer(x, lengths=torch.full((B,), T)),
        "no_grad": lambda layer, x: torch.no_grad()(layer)(x),
        "autocast": lambda layer, x: torch.autocast("cpu", torch.bfloat16)(layer)(x),
    },
)
def test_another_call_is_resolved_anew(change: Callable[..., Any], known: dict[Any, Any]) -> None:
    layer, x = tritongru.GRU(I, H, backend="reference"), torch.randn(T, B, I)
    for _ in range(2):
        layer(x)
    assert len(known) == 1
    change(layer, x)
    assert len(known) == 2


def test_another_backend_is_resolved_anew(known: dict[Any, Any], ran: list[str], monkeypatch) -> None:
    layer, x = tritongru.GRU(I, H), torch.randn(T, B, I)
    for around in (tritongru.use_backend("reference"), nullcontext(), tritongru.use_backend("reference")):
        with around:
            layer(x)
    monkeypatch.setenv("TRITONGRU_BACKEND", "reference")
    layer(x)
    assert ran == ["reference"] * 3


@kit.table(
    "around",
    {
        "vmap": lambda call, x: torch.vmap(call)(x[None]),
        "jvp": lambda call, x: torch.func.jvp(call, (x,), (x,)),
        "jit": lambda call, x: torch.jit.trace(call, x, check_trace=False),
        "make_fx": lambda call, x: torch.fx.experimental.proxy_tensor.make_fx(call)(x),
        "a subclass": lambda call, x: call(x.as_subclass(type("Own", (Tensor,), {}))),
    },
)
def test_nothing_is_kept_of_what_is_traced(around: Callable[..., Any], known: dict[Any, Any]) -> None:
    layer = tritongru.GRU(I, H).requires_grad_(False)
    around(lambda x: layer(x)[0], torch.randn(T, B, I))
    assert not known


def test_the_weights_of_a_known_call_are_those_of_now(known: dict[Any, Any]) -> None:
    layer, x = tritongru.GRU(I, H, backend="reference"), torch.randn(T, B, I)
    first, _ = layer(x)
    others = {name: torch.nn.Parameter(-p.detach()) for name, p in layer.named_parameters()}
    swapped, _ = torch.func.functional_call(layer, others, (x,))
    layer.weight_ih_l0 = others["weight_ih_l0"]
    (replaced, _), (again, _) = layer(x), layer(x)
    assert len(known) == 1 and torch.equal(replaced, again)
    assert not any(torch.equal(a, b) for a, b in ((first, swapped), (replaced, first), (replaced, swapped)))


def test_no_tensor_is_kept(known: dict[Any, Any]) -> None:
    """But for those of a device's status: a kept call holds no memory of a batch or of a module."""
    for form in kit.FORMS.values():
        _, module = form.pair("reference")
        (x, h_0), how = form.given(), form.how()
        module(x, h_0, **how)
        gone = [weakref.ref(t) for t in (*kit.tensors((x, h_0)), *how.values(), *module.parameters())]
        del module, x, h_0, how
        gc.collect()
        assert [ref() for ref in gone] == [None] * len(gone)
    assert known


@pytest.mark.parametrize("backend", ["reference", "step", "sequence"])
def test_zeros_for_a_gradient_that_is_absent_are_kept_and_stay_zero(backend: str, monkeypatch) -> None:
    """No more of them than so many, and none that is large."""
    zeros: dict[Any, Tensor] = {}
    monkeypatch.setattr(layers, "_zeros", zeros)
    layer = tritongru.GRU(I, H, backend=backend)
    for T in (1, 2):
        for y_or_h_n in (0, 1, 0, 1):
            layer(torch.randn(T, B, I))[y_or_h_n].sum().backward()
    assert len(zeros) == 2 and not any(t.any() for t in zeros.values())
    for sizes, kept in (([1 << 17], 2), (range(100), 64)):
        assert not any(layers.zeros_like(torch.ones(1), (size,), "h_0").any() for size in sizes)
        assert len(zeros) == kept


@pytest.mark.parametrize("batch_first", [False, True])
def test_a_known_call_without_h_0_is_one_of_zeros(batch_first: bool, known: dict[Any, Any], monkeypatch) -> None:
    zeros: dict[Any, Tensor] = {}
    monkeypatch.setattr(layers, "_zeros", zeros)
    layer = tritongru.GRU(I, H, 2, batch_first=batch_first, bidirectional=True, backend="reference")
    x = torch.randn(T, B, I)
    for _ in range(3):
        found = layer(x)
    assert len(zeros) == 1 and kit.same_bits(found, layer(x, torch.zeros(4, *x.shape[not batch_first :][:1], H)))
    assert len(known) == 1 and not any(t.any() for t in zeros.values())


BOTH_WAYS = partial(tritongru.GRU, bidirectional=True)
LAYERS: dict[str, Any] = {"cell": tritongru.GRUCell, "one-way": tritongru.GRU, "both-ways": BOTH_WAYS}


def passes(module: Any, T: int, dtype: torch.dtype, of_y: Callable[[Tensor], Tensor] = torch.randn_like) -> None:
    """Forward and backward over new tensors, and inference."""
    cell = isinstance(module, tritongru.GRUCell)
    x = torch.randn(T, B, 8, dtype=dtype)[0 if cell else ...].requires_grad_()
    h_0 = torch.randn(1 if cell or not module.bidirectional else 2, B, 16, dtype=dtype)[0 if cell else ...]
    results = kit.tensors(module(x, h_0))
    torch.autograd.grad(results, [x, *module.parameters()], [of_y(results[0]), *map(torch.randn_like, results[1:])])
    with torch.no_grad():
        module(x, h_0)


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("backend", "layer", "T"),
    [("step", "cell", 1), ("step", "both-ways", 1)]
    + [(backend, "one-way", T) for backend in ("step", "sequence") for T in (1, 2, 4)]
    + [(backend, "both-ways", 4) for backend in ("step", "sequence")],
)
def test_a_known_pass_hands_over_what_the_long_way_does(backend, layer, T, dtype, handed, monkeypatch) -> None:
    """Both are gone: in training and inference, with biases and without, of a transposed and an expanded dy too."""
    short: list[Any] = []
    same: list[bool] = []

    def both(*given: Any, again: Any = LayerCall.again) -> bool:
        handed.clear()
        short.append(handed.copy() if again(*given) else None)
        handed.clear()
        return False

    def long(given: Any, launches: Any) -> Any:
        if (found := short.pop()) is not None:
            same.append(found == handed)
        return runtime.once_more(given, launches)

    monkeypatch.setattr(LayerCall, "again", both)
    for launcher in ("step", "sequence"):
        monkeypatch.setattr(f"tritongru.launch.{launcher}.once_more", long)
    for bias in (True, False):
        module = LAYERS[layer](8, 16, bias=bias, dtype=dtype, backend=backend)
        for of_y in (
            torch.randn_like,
            lambda y: torch.randn_like(y.transpose(-1, -2)).transpose(-1, -2),
            lambda y: torch.randn_like(y[:1, ..., :1]).expand_as(y),
        ):
            for _ in range(3):
                passes(module, T, dtype, of_y)
    assert len(same) >= 2 * 3 * 3 * 2 and all(same)


@compiled
def test_each_launch_but_the_first_begins_while_the_one_before_it_runs(handed: list[tuple[Any, ...]]) -> None:
    """By what the JIT compiled, and of a call like one before."""
    module, x = tritongru.GRU(8, 16, backend="step").requires_grad_(False), torch.randn(4, B, 8)
    module(x)
    for _ in range(2):
        handed.clear()
        module(x)
        beside = [bool(given[6]) for given in handed]  # of Triton's launcher: grid, stream, function, cooperative, pdl
        assert beside == [False, True, True, True]


@compiled
@pytest.mark.parametrize(
    ("layer", "T", "most_calls", "most_operators"),
    [
        ("cell", 1, (123, 298, 95), (7, 29, 5)),
        ("one-way", 1, (123, 302, 95), (4, 24, 2)),
        ("one-way", 2, (160, 394, 137), (7, 32, 6)),  # two launches of backward
    ],
)
def test_a_step_costs_the_host_little(layer: str, T: int, most_calls: Any, most_operators: Any, handed: object) -> None:
    """Down to the driver. On a GPU's host an operator weighs as much as dozens of calls."""
    module = LAYERS[layer](8, 16, backend="step")
    given = (torch.randn(B, 8), torch.randn(B, 16)) if layer == "cell" else (torch.randn(T, B, 8),)
    given[0].requires_grad_()
    for of, most in ((operators, most_operators), (calls, most_calls)):
        found = costs(of, module, *given)
        assert all(cost <= limit for cost, limit in zip(found, most, strict=True)), found


@compiled
@torch.no_grad()
def test_a_step_that_is_not_aligned_or_watched_is_launched_too(handed: list[tuple[Any, ...]]) -> None:
    module, hook = tritongru.GRUCell(8, 16, backend="step"), triton.knobs.runtime.launch_enter_hook
    shifted = torch.randn(B * 8 + 1)[1:].view(B, 8)
    for x in (torch.randn(B, 8), torch.randn(B, 8), shifted):
        module(x, torch.randn(B, 16))
    # by the JIT, of another alignment
    assert shifted.data_ptr() in [t.data_ptr() for t in handed[-1] if isinstance(t, Tensor)]
    with launched() as names:
        module(torch.randn(B, 8), torch.randn(B, 16))
    hook.add(print)
    try:
        module(torch.randn(B, 8), torch.randn(B, 16))
    finally:
        hook.remove(print)
    assert names == ["step_forward"] and len(handed) == 5 and hook in handed[-1]


@compiled
def test_a_state_that_is_its_own_input_is_told_from_one_that_is_not(handed: list[tuple[Any, ...]]) -> None:
    """By one tensor in two places nobody could tell which of them a later call's is."""
    module, same = tritongru.GRUCell(16, 16, backend="step").requires_grad_(False), torch.randn(B, 16)
    for h_0 in (same, same, torch.randn(B, 16)):
        module(same, h_0)
    assert {same.data_ptr(), h_0.data_ptr()} < set(handed[-1])


@compiled
def test_launches_of_a_packed_batch_follow_from_its_rows(handed: list[tuple[Any, ...]]) -> None:
    """Not from those of a batch before, whose exchange buffer may be as large as that batch needs."""

    def launches_of(lengths: list[int], layer: Any) -> int:
        handed.clear()
        with torch.no_grad():
            layer(pack_sequence([torch.randn(n, 4, dtype=torch.bfloat16) for n in lengths]))
        return len(handed)

    full, short = [300] * 64, [300, *[1] * 63]
    layer, other = (tritongru.GRU(4, 512, dtype=torch.bfloat16, backend="sequence") for _ in range(2))
    expected = [launches_of(lengths, layer) for lengths in (full, short)]
    assert [launches_of(lengths, other) for lengths in (short, full)] == expected[::-1] and expected[0] != expected[1]


@pytest.mark.parametrize("backend", ["aten", "reference"])
def test_a_parametrization_is_evaluated_as_often_as_nn_gru_does(backend: str, known: dict[Any, Any]) -> None:
    class Counted(torch.nn.Module):
        count = 0

        def forward(self, weight: Tensor) -> Tensor:
            Counted.count += 1
            return 2 * weight

    counts = []
    for layer in (torch.nn.GRU(I, H), tritongru.GRU(I, H, backend=backend)):
        torch.nn.utils.parametrize.register_parametrization(layer, "weight_hh_l0", Counted())
        Counted.count = 0
        for _ in range(3):
            layer(torch.randn(T, B, I))
        counts.append(Counted.count)
    assert counts[0] == counts[1]


def test_weights_and_checks_are_nn_gru_s(known: dict[Any, Any]) -> None:
    """Somebody's own `_flat_weights`, and a subclass's check, count in every call."""
    checked = []

    class Checking(tritongru.GRU):
        def check_forward_args(self, input: Tensor, hidden: Tensor, batch_sizes: Tensor | None) -> None:
            checked.append(input)

    layer, x = Checking(I, H, backend="reference"), torch.randn(T, B, I)
    for _ in range(3):
        layer(x)
    assert len(checked) == 3
    layer = tritongru.GRU(I, H, backend="reference")
    layer._flat_weights = [torch.nn.Parameter(torch.zeros_like(w)) for w in layer._flat_weights]
    for _ in range(3):
        assert not layer(x)[0].any()
