"""A few training steps of the word model through the Triton kernels, beside `torch.nn.GRU` on the same batches.

Without a GPU the kernels run in Triton's interpreter, which shows that they compute the right numbers and nothing about
their speed. The two models start from the same trained weights and then train on their own.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .data import Corpus, lanes, windows
from .training import MakeLayer, Sizes, WordModel

# Plain gradient descent: Adam divides by the gradient's own size, which makes 1e-7 of a tiny gradient a large step.
LEARNING_RATE = 0.1

COLUMNS = (
    "step", "loss tritongru.GRU", "loss torch.nn.GRU", "loss difference", "largest absolute gradient difference",
    "largest relative RMS gradient difference", "of parameter",
)  # fmt: skip


@dataclass(frozen=True)
class StepDifference:
    """One training step of both models; differences are ours minus theirs."""

    step: int
    loss: float  # of tritongru.GRU
    loss_nn: float  # of torch.nn.GRU
    gradient_absolute: float  # largest of any element of any parameter
    gradient_relative: float  # relative RMS, of the worst parameter
    worst_parameter: str
    launches: dict[str, int]  # kernel launches that were counted, by kernel

    @property
    def loss_difference(self) -> float:
        return self.loss - self.loss_nn

    @property
    def row(self) -> list[object]:
        """In the order of `COLUMNS`."""
        losses = [self.loss, self.loss_nn, self.loss_difference]
        return [self.step, *losses, self.gradient_absolute, self.gradient_relative, self.worst_parameter]

    def within(self, bound: float) -> bool:
        """False for NaN too."""
        return self.gradient_relative <= bound and abs(self.loss_difference) <= bound * abs(self.loss_nn)


def bound(hidden: int, window: int) -> float:
    """What float32 rounding can explain as relative RMS of a gradient.

    A product over H terms is off by about u * sqrt(H), u = 2**-24 the unit roundoff, errors being random. A gradient
    has T such products behind it forward and T backward; where z is near one nothing damps them, so they add up: 2T.
    Each of the two implementations has its own error: twice that.
    """
    return 2 * 2 * window * math.sqrt(hidden) * 2.0**-24


@contextmanager
def float32_products() -> Iterator[None]:
    """On NVIDIA GPUs nn.GRU's float32 products are TF32 by default, 13 bits coarser: inside, both sides use float32."""
    rnn: Any = torch.backends.cudnn.rnn  # its attributes are made at run time
    saved = rnn.fp32_precision
    rnn.fp32_precision = "ieee"
    try:
        yield
    finally:
        rnn.fp32_precision = saved


def compare_steps(
    trained: WordModel,
    corpus: Corpus,
    sizes: Sizes,
    make_layer: MakeLayer,
    device: torch.device,
    report: Callable[[StepDifference], None] | None = None,
) -> list[StepDifference]:
    """Train two copies of `trained` a few steps, one on `make_layer`'s layer and one on `torch.nn.GRU`."""
    from ..launch.runtime import observe

    ours, theirs = (_copy(trained, make, device) for make in (make_layer, nn.GRU))
    batches = windows(lanes(corpus.train, sizes.check_batch).to(device), sizes.check_window)
    rows: list[StepDifference] = []
    with float32_products():
        for step, (words, following) in zip(range(1, sizes.check_steps + 1), batches, strict=False):
            launches: Counter[str] = Counter()
            with observe(lambda name, grid, launches=launches: launches.update([name])):  # type: ignore[misc]
                loss = _gradients(ours, words, following)
            loss_nn = _gradients(theirs, words, following)
            rows.append(_difference(step, loss, loss_nn, ours, theirs, dict(launches)))
            for model in (ours, theirs):
                _descend(model)
            if report is not None:
                report(rows[-1])
    return rows


def _copy(trained: WordModel, make_layer: MakeLayer, device: torch.device) -> WordModel:
    vocabulary, embedding = trained.embedding.weight.shape
    copy = WordModel(vocabulary, embedding, trained.layer.hidden_size, make_layer)
    copy.load_state_dict(trained.state_dict())
    return copy.to(device)


def _gradients(model: WordModel, words: Tensor, following: Tensor) -> float:
    model.zero_grad()
    logits, _ = model(words)
    loss = F.cross_entropy(logits.flatten(0, 1), following.flatten())
    loss.backward()
    return float(loss.detach())


@torch.no_grad()
def _descend(model: nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.sub_(parameter.grad, alpha=LEARNING_RATE)


def _difference(
    step: int, loss: float, loss_nn: float, ours: nn.Module, theirs: nn.Module, launches: dict[str, int]
) -> StepDifference:
    absolute, relative, worst = 0.0, -1.0, ""
    reference = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        ours_grad, theirs_grad = parameter.grad, reference[name].grad
        assert ours_grad is not None and theirs_grad is not None
        difference = (ours_grad - theirs_grad).double()
        largest = float(difference.abs().max())
        rms = float(difference.norm() / theirs_grad.double().norm().clamp_min(1e-30))
        # `not <=` instead of `>`, so that a NaN is not passed over
        if not largest <= absolute:
            absolute = largest
        if not rms <= relative:
            relative, worst = rms, name
    return StepDifference(step, loss, loss_nn, absolute, relative, worst, launches)
