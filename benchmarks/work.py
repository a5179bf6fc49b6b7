"""One case made concrete: weights, inputs and cotangents, the passes over them, and how wrong a module is."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from tritongru.registry import DTYPES
from tritongru.tools import check

from .cases import BASELINE, Case
from .providers import find
from .timing import Call

TORCH_DTYPES = {name: dtype for dtype, name in DTYPES.items()}
RULE = 2.0  # how many times nn.GRU's error one of tritongru's may have, of a single draw
SANE = 0.5  # of nn.GRU's own: beyond it something is broken. Sums over T in half precision reach 0.1


@dataclass(frozen=True)
class Inputs:
    """What a module of a case is called with. h_0 is given and, in what is timed, needs no gradient; x needs one."""

    input: Any  # x itself, or packed
    x: Tensor  # [T, B, I], packed [N, I], or a cell's [B, I]
    h_0: Tensor  # [layers * D, B, H], or a cell's [B, H]
    cotangents: tuple[Tensor, ...]  # of output and h_n, or of a cell's h

    @classmethod
    def draw(cls, case: Case, device: torch.device) -> "Inputs":
        """Normal values in the case's dtype."""
        where = torch.device("cpu") if device.type == "meta" else device
        generator = torch.Generator(where).manual_seed(0)
        own = TORCH_DTYPES[case.dtype]

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=where).to(device, own)

        B, D = case.B, case.directions
        I, H = case.I * case.blocks, case.H * case.blocks
        if case.cell:
            x = normal(B, I).requires_grad_()
            return cls(x, x, normal(B, H), (normal(B, H),))
        leading = (sum(case.lengths),) if case.packed else (case.T, B)
        x = normal(*leading, I).requires_grad_()
        input = PackedSequence(x, torch.tensor(case.batch_sizes)) if case.packed else x
        states = (case.layers * D, B, H)
        return cls(input, x, normal(*states), (normal(*leading, D * H), normal(*states)))

    def double(self) -> "Inputs":
        """The same values in float64."""
        x = self.x.detach().double().requires_grad_()
        input = self.input._replace(data=x) if isinstance(self.input, PackedSequence) else x
        return Inputs(input, x, self.h_0.double(), tuple(c.double() for c in self.cotangents))

    def through(self, module: nn.Module, h_0: Tensor | None = None) -> tuple[Tensor, ...]:
        """Output and h_n, or a cell's h."""
        found = module(self.input, self.h_0 if h_0 is None else h_0)
        if isinstance(found, Tensor):
            return (found,)
        output, h_n = found
        return (output.data if isinstance(output, PackedSequence) else output), h_n


def weights(case: Case, device: torch.device) -> dict[str, Tensor]:
    """nn.GRU's state_dict, with PyTorch's own scale of weights, in the case's dtype."""
    module = find(BASELINE).make(case, device="meta", dtype=torch.float32)
    generator = torch.Generator(device).manual_seed(1)
    bound = 1 / math.sqrt(case.H)
    drawn = {name: torch.rand(p.shape, generator=generator, device=device) for name, p in module.state_dict().items()}
    return {name: ((2 * p - 1) * bound).to(TORCH_DTYPES[case.dtype]) for name, p in drawn.items()}


def inference(module: nn.Module, inputs: Inputs) -> Call:
    module.eval()
    return torch.no_grad()(lambda: inputs.through(module))


def forward(module: nn.Module, inputs: Inputs) -> Call:
    module.train()
    return lambda: inputs.through(module)


def forward_backward(module: nn.Module, inputs: Inputs) -> Call:
    module.train()
    wanted = [inputs.x, *module.parameters()]
    return lambda: torch.autograd.grad(inputs.through(module), wanted, inputs.cotangents)


@dataclass(frozen=True)
class Pass:
    """What is timed of a module: `make(module, inputs)` puts the module in its mode and gives the call."""

    make: Callable[[nn.Module, Inputs], Call]
    trains: bool = False  # with backward
    rounds: int = 0  # at least
    one_by_one: bool = False  # a sample is one call, from an idle device to its end; p99 is of interest


PASSES = {
    "inference": Pass(inference),
    "forward": Pass(forward),
    "forward+backward": Pass(forward_backward, trains=True),
    "streaming": Pass(inference, rounds=2000, one_by_one=True),
}


def outcome(module: nn.Module, inputs: Inputs, trains: bool = True) -> dict[str, Tensor]:
    """Output and h_n, and with `trains` every gradient, h_0's included."""
    module.train(trains)
    h_0 = inputs.h_0.detach().clone().requires_grad_(trains)
    with torch.set_grad_enabled(trains):
        results = inputs.through(module, h_0)
    found = dict(zip(("output", "h_n"), (r.detach() for r in results), strict=False))
    if not trains:
        return found
    parameters = dict(module.named_parameters())
    gradients = torch.autograd.grad(results, [inputs.x, h_0, *parameters.values()], inputs.cotangents)
    return {**found, **dict(zip(("x", "h_0", *parameters), gradients, strict=True))}


def errors(found: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    """||found - truth|| / ||truth|| by tensor, the worst over layers and directions; NaN wherever one is."""
    worst: dict[str, float] = {}
    for name, true in truth.items():
        error = ((found[name].double() - true).norm() / true.norm().clamp_min(1e-300)).item()
        before = worst.get(_kind(name), 0.0)
        worst[_kind(name)] = before if math.isnan(before) or before > error else error
    return worst


def _kind(name: str) -> str:
    """weight_ih_l0_reverse and blocks.3.weight_ih_l0 are w_ih; output, h_n, x and h_0 are themselves."""
    name = name.rpartition(".")[2]
    for long, short in (("weight_", "w_"), ("bias_", "b_")):
        if name.startswith(long):
            return short + name[len(long) :][:2]
    return name


def verdict(case: Case, found: dict[str, float], of_baseline: dict[str, float] | None, tf32: bool) -> str:
    """What is wrong, or nothing: for tritongru the rule of `python -m tritongru check` with RULE, of a single draw.

    nn.GRU itself (`of_baseline` None) need only be sane: how PyTorch sums is not ours to judge.
    """
    shape = check.Case(case.T, case.B, case.I, case.H, case.layers, case.bidirectional, lengths=case.lengths)
    wrong = []
    for name, error in found.items():
        limit = SANE
        if of_baseline is not None:
            theirs = of_baseline.get(name, 0.0)
            rule = RULE * theirs if math.isfinite(theirs) else 0.0
            limit = max(rule, check.floor(name, shape, TORCH_DTYPES[case.dtype], tf32))
        if not error <= limit:  # NaN is wrong too
            wrong.append(f"{name} {error:.1e} > {limit:.1e}")
    return ", ".join(wrong)
