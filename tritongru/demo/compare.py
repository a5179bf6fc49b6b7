"""`tritongru.GRU` beside `torch.nn.GRU`: the same training on both, and a batch through the Triton kernels."""

import math
from collections import Counter
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tritongru

from .data import Corpus, lanes
from .training import Sizes, WordModel, build_model, perplexity, train


class Pair(NamedTuple):
    """Both models and the losses of their trainings, tritongru.GRU's first, and what ran that: "aten" is PyTorch's."""

    models: list[WordModel]
    losses: list[list[float]]
    backend: str

    @property
    def difference(self) -> float:
        """Of the losses, step by step: the largest."""
        return max(abs(a - b) for a, b in zip(*self.losses, strict=True))


def train_both(corpus: Corpus, sizes: Sizes, device: torch.device, seed: int) -> Pair:
    """The same training on both, from the same parameters."""
    models = [build_model(corpus.vocabulary, sizes, make, seed).to(device) for make in (tritongru.GRU, nn.GRU)]
    losses = [train(model, corpus, sizes, type(model.layer).__module__.split(".")[0]) for model in models]
    input = torch.empty(sizes.window, sizes.batch, sizes.embedding, device=device)
    return Pair(models, losses, tritongru.plan(models[0].layer, input).backend)


def show(pair: Pair, corpus: Corpus, on_cpu: bool) -> bool:
    """Print what both reached; False where they had to agree and do not."""
    ours, theirs = (perplexity(model, corpus.held_out) for model in pair.models)
    print(f"Held-out perplexity: tritongru.GRU {ours:.2f} (backend {pair.backend}), torch.nn.GRU {theirs:.2f}.")
    must = on_cpu and pair.backend == "aten"  # the same code; other code adds in another order
    good = pair.difference == 0 or not must
    has_to = (
        f" Both ran PyTorch's own code: it has to be 0, and it is{'' if good else ' NOT, a fault'}." if must else ""
    )
    print(f"From the same seed the losses differ by {pair.difference:g} at most.{has_to}")
    return good


def rounding(hidden: int, window: int, unit: float) -> float:
    """What rounding can explain as relative RMS of a gradient, `unit` being the unit roundoff of the products.

    A product over H terms is off by about unit * sqrt(H), errors being random. A gradient has T of them behind it
    forward and T backward; where z is near one nothing damps them: they add up. Two implementations: twice that.
    """
    return 2 * 2 * window * math.sqrt(hidden) * unit


def compare_kernels(model: WordModel, corpus: Corpus, sizes: Sizes, device: torch.device, backend: str) -> bool:
    """Loss and gradients of a batch through a backend beside nn.GRU's path; False where more than rounding differs."""
    from ..launch.runtime import observe

    words = lanes(corpus.train, sizes.check_batch)[: sizes.check_window + 1].to(device)
    found: list[list[Tensor]] = []
    launches: Counter[str] = Counter()
    for name in (backend, "aten"):
        with tritongru.use_backend(name), observe(lambda kernel, grid: launches.update([kernel])):
            loss = F.cross_entropy(model(words[:-1])[0].flatten(0, 1), words[1:].flatten())
            found.append([loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))])
    apart = [float((ours - theirs).norm() / theirs.norm()) for ours, theirs in zip(*found, strict=True)]
    # On NVIDIA GPUs float32 products are TF32 by default, with 11 bits.
    limit = rounding(sizes.hidden, sizes.check_window, 2.0**-11 if device.type == "cuda" else 2.0**-24)
    good = all(difference <= limit for difference in apart)  # not of NaN
    print(
        f"A batch of {sizes.check_batch} texts of {sizes.check_window} words: loss {found[0][0]:.7f}, nn.GRU's "
        f"{found[1][0]:.7f}; gradients differ by {max(apart[1:]):.1e} relative RMS at most.\n"
        f"Launches: {', '.join(f'{count} x {kernel}' for kernel, count in launches.items())}.\n"
        f"Rounding explains {limit:.1e}: {'all within it' if good else 'NOT within it, a fault'}."
    )
    return good
