"""torch.nn's layers and ours side by side: the same parameters, inputs from seeds, and when results are the same.

Values in float32 agree within 32 * eps * sqrt(K) times the larger of 1 and the largest expected element, where
K = I + H + T * B: the longest product behind an output has max(I, H) terms, the one behind a weight gradient T * B;
rounding errors add up as a random walk, and 32 covers the few steps in sequence and the constants of tanh and sigmoid.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import tritongru

EPS = torch.finfo(torch.float32).eps
STEP = pytest.param("step", marks=pytest.mark.interpreted)
SEQUENCE = pytest.param("sequence", marks=pytest.mark.interpreted)
BACKENDS = ["aten", "reference", STEP, SEQUENCE]
OURS = ["reference", STEP, SEQUENCE]  # the backends that are not PyTorch's own path


def backends(*names: Any) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("backend", names, ids=lambda name: name or "default")


ours_only, ours_and_default, default_too = backends(*OURS), backends(None, *OURS), backends(None, *BACKENDS)


def table(names: str, cases: Mapping[str, Any]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(names, cases.values(), ids=cases)


def randn(*shape: int, seed: int = 2) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), device="cpu")


def packed(*lengths: int, input_size: int = 3, enforce_sorted: bool = False) -> PackedSequence:
    return pack_sequence([randn(n, input_size, seed=n) for n in lengths], enforce_sorted=enforce_sorted)


def pair(backend: str | None, *sizes: int, seed: int = 0, cell: bool = False, **options: Any) -> tuple[Any, Any]:
    """torch.nn.GRU, or GRUCell, and ours with the same parameters."""
    torch.manual_seed(seed)
    own = {"backend": backend} | {name: options.pop(name) for name in ("recompute",) if name in options}
    theirs = (nn.GRUCell if cell else nn.GRU)(*sizes, **options)
    ours = (tritongru.GRUCell if cell else tritongru.GRU)(*sizes, **options, **own)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def states(module: nn.GRU) -> int:
    return module.num_layers * (2 if module.bidirectional else 1)


def tensors(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    return [t.data if isinstance(t, PackedSequence) else t for t in result]


def outcome(call: Callable[[], Any]) -> Any:
    """What a call ends in: the type and message of its exception, or the shapes of what it returned."""
    try:
        return [t.shape for t in tensors(call())]
    except Exception as error:
        return type(error), str(error)


def assert_close(actual: Tensor, expected: Tensor, terms: int = 16, what: str = "") -> None:
    """Within the tolerance of this file's docstring; `terms` is its K, 16 for T 3, B 2, I 3, H up to 7."""
    assert actual.shape == expected.shape and actual.dtype == expected.dtype, what
    scale = max(1.0, expected.detach().abs().max().item()) if expected.numel() else 1.0
    torch.testing.assert_close(
        actual, expected, rtol=0, atol=32 * EPS * math.sqrt(terms) * scale, msg=lambda m: f"{what}: {m}"
    )


def assert_same(actual: Mapping[Any, Any], expected: Mapping[Any, Any], terms: int = 16) -> None:
    """What `results` gave, or tensors by number, of which some may be missing."""
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (actual[name] is None) == (tensor is None), name
        if tensor is not None:
            assert_close(actual[name], tensor, terms, f"tensor {name}")


def assert_all_close(actual: Sequence[Any], expected: Sequence[Any], terms: int = 16) -> None:
    assert_same(dict(enumerate(actual)), dict(enumerate(expected)), terms)


def same_bits(actual: Any, expected: Any) -> bool:
    """Of what `results` gave, or of a sequence of tensors, of which some may be missing."""
    if isinstance(actual, Mapping):
        return actual.keys() == expected.keys() and same_bits(list(actual.values()), list(expected.values()))
    pairs = zip(actual, expected, strict=True)
    return all((a is None and e is None) or torch.equal(a, e) for a, e in pairs)


def both(theirs: Any, ours: Any, call: Callable[[Any], Sequence[Any]]) -> Sequence[Any]:
    """`call(module)` gives tensors: those of ours are those of torch's."""
    expected, actual = call(theirs), call(ours)
    assert_all_close(actual, expected)
    return actual


def loss_of(output: Any, h_n: Tensor) -> Tensor:
    """A scalar that weighs every element of both differently."""
    data = output.data if isinstance(output, PackedSequence) else output
    return (data * randn(*data.shape, seed=5)).sum() + (h_n * randn(*h_n.shape, seed=6)).sum()


def results(call: Any, input: Any, hx: Tensor | None = None, of: Any = None, **how: Any) -> dict[str, Tensor]:
    """What a layer, a cell or a call of one returns and, for random cotangents on all of it, the gradients of input, hx
    and the parameters (of `of`), where there are any. The strides of input and hx are kept."""
    module = call if of is None else of
    module.zero_grad()
    leaf = (input.data if isinstance(input, PackedSequence) else input).detach().requires_grad_()
    h_0 = None if hx is None else hx.detach().requires_grad_()
    x = input._replace(data=leaf) if isinstance(input, PackedSequence) else leaf
    found = tensors(call(x, **how) if h_0 is None else call(x, h_0, **how))
    torch.autograd.backward(found, [randn(*t.shape, seed=5 + i).to(t) for i, t in enumerate(found)])
    every = {**dict(zip(("output", "h_n"), found, strict=False)), "d input": leaf.grad}
    every |= {"d h_0": None if h_0 is None else h_0.grad, **{f"d {n}": p.grad for n, p in module.named_parameters()}}
    return {name: tensor.detach() for name, tensor in every.items() if tensor is not None}


def by_steps(module: nn.GRU, x: Tensor, h_0: Tensor, lengths: Tensor, resets: Tensor) -> tuple[Tensor, Tensor]:
    """What nn.GRU of one layer gives of a padded batch, by torch.gru_cell of each step."""
    x, resets = (t.transpose(0, 1) if module.batch_first else t for t in (x, resets))
    runs = torch.arange(len(x), device="cpu")[:, None] < lengths
    resets, ys, h_ns = resets & runs, [], []
    for direction, weights in enumerate(module.all_weights):
        h, outputs = h_0[direction], {}
        begins = torch.cat([resets[1:], resets[:1] & False]) if direction else resets
        for t in range(len(x))[:: 1 - 2 * direction]:
            h = h.masked_fill(begins[t, :, None], 0)
            h = torch.where(runs[t, :, None], torch.gru_cell(x[t], h, *weights), h)
            outputs[t] = h * runs[t, :, None]
        ys.append(torch.stack([outputs[t] for t in range(len(x))]))
        h_ns.append(h)
    y = torch.cat(ys, -1)
    return y.transpose(0, 1) if module.batch_first else y, torch.stack(h_ns)


@dataclass(frozen=True)
class Form:
    """One way to call a layer of I 3 and H 5, and the layer's options."""

    options: Mapping[str, Any] = field(default_factory=dict)
    sizes: tuple[int, ...] = (3, 2)  # T, B; T of an unbatched call; B of a cell, or nothing
    lengths: tuple[int, ...] = ()  # of a packed batch
    recompute: bool = False
    cell: bool = False
    resets: bool = False  # and lengths, of a padded batch
    h_0: bool = True

    def pair(self, backend: str | None) -> tuple[Any, Any]:
        own = {"cell": True} if self.cell else {"recompute": self.recompute}
        return pair(backend, 3, 5, **own, **self.options)

    def given(self, seed: int = 2) -> tuple[Any, Tensor | None]:
        if self.cell:
            return randn(*self.sizes, 3, seed=seed), randn(*self.sizes, 5, seed=seed + 1) if self.h_0 else None
        if self.lengths:
            sequences = [randn(n, 3, seed=seed + n) for n in self.lengths]
            x, of_batch = pack_sequence(sequences, enforce_sorted=False), (len(self.lengths),)
        else:
            sizes = self.sizes[::-1] if self.options.get("batch_first") else self.sizes
            x, of_batch = randn(*sizes, 3, seed=seed), self.sizes[1:]
        layers = self.options.get("num_layers", 1) * (1 + self.options.get("bidirectional", False))
        return x, randn(layers, *of_batch, 5, seed=seed + 1) if self.h_0 else None

    def how(self) -> dict[str, Tensor]:
        if not self.resets:
            return {}
        T, B = self.sizes
        resets = randn(T, B, seed=9) > 0.5
        lengths = T - torch.arange(B, device="cpu") % T
        return {"lengths": lengths, "resets": resets.T if self.options.get("batch_first") else resets}

    def of(self, module: Any) -> Any:
        return partial(partial(by_steps, module) if self.resets and type(module) is nn.GRU else module, **self.how())

    def results(self, call: Any, of: Any = None) -> dict[str, Tensor]:
        return self.prepared(call, of)()

    def prepared(self, call: Any, of: Any = None) -> Callable[[], dict[str, Tensor]]:
        call, of, given = self.of(call), call if of is None else of, self.given()
        return lambda: results(call, *given, of=of)


PLAIN = Form()
FORMS = {
    "plain": PLAIN,
    "no-bias-batch-first": Form({"bias": False, "batch_first": True}),
    "two-layers-bidirectional": Form({"num_layers": 2, "bidirectional": True}),
    "recompute-batch-first-bidirectional": Form({"batch_first": True, "bidirectional": True}, recompute=True),
    "one-step": Form(sizes=(1, 2)),
    "unbatched": Form({"bidirectional": True, "batch_first": True}, sizes=(3,)),
    "packed": Form({"bidirectional": True}, lengths=(2, 1, 3)),  # an order that is not its own inverse
    "packed-two-layers-recompute": Form({"num_layers": 2, "bias": False}, lengths=(2, 1), recompute=True),
    "padded": Form({"bidirectional": True}, sizes=(4, 3), resets=True),
    "padded-batch-first-recompute": Form({"batch_first": True}, sizes=(4, 2), resets=True, recompute=True),
    "cell": Form(sizes=(2,), cell=True),
    "cell-unbatched-no-bias": Form({"bias": False}, sizes=(), cell=True),
}


def some_forms(*names: str) -> dict[str, Form]:
    return {name: FORMS[name] for name in names}


FEW = ("recompute-batch-first-bidirectional", "packed", "padded", "cell")


def ours_by_form(forms: Mapping[str, Form] = FORMS) -> pytest.MarkDecorator:
    """Our backends and forms; of the kernels, which are interpreted, all but few in `make long`."""
    found = []
    for backend in OURS:
        name, *marks = [backend] if isinstance(backend, str) else [*backend.values, *backend.marks]
        for of, form in forms.items():
            slow = [pytest.mark.long] * (name != "reference" and of not in FEW)
            found.append(pytest.param(name, form, marks=[*marks, *slow], id=f"{of}-{name}"))
    return pytest.mark.parametrize(("backend", "form"), found)


def as_function(module: Any, gru: Any, **how: Any) -> Callable[..., Any]:
    """A call of torch.gru, of ours, or of either gru_cell with a module's weights."""
    weights = [p for _, p in module.named_parameters()]
    if isinstance(module, nn.GRUCell):
        return lambda x, h: gru(x, h, *weights, **how)
    given, batch_first = (module.bias, module.num_layers, 0.0, True, module.bidirectional), module.batch_first

    def call(x: Any, h_0: Tensor, **more: Any) -> Any:
        if isinstance(x, PackedSequence):  # h_0 is in the order of its rows
            return gru(x.data, x.batch_sizes, h_0, weights, *given, **how, **more)
        return gru(x, h_0, weights, *given, batch_first, **how, **more)

    return call
