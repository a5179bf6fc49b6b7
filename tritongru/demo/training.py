"""The word model and its training: the same code for `tritongru.GRU` and `torch.nn.GRU`, which is the point.

Nothing here knows which GRU it trains. A model gets it from `make_layer`, and from one seed both
get the same parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .data import Corpus, lanes, windows

MakeLayer = Callable[[int, int], nn.RNNBase]  # (input size, hidden size) -> the layer under comparison
Report = Callable[[int, float], None]  # (steps done, loss of the last)


@dataclass(frozen=True)
class Sizes:
    """Everything that sets how long the demo takes. The defaults train for half a minute on one CPU core."""

    vocabulary: int = 3000
    embedding: int = 128  # I of the layer
    hidden: int = 192  # H of the layer
    batch: int = 16
    window: int = 32  # words between which gradients flow; h is carried from window to window
    steps: int = 700
    learning_rate: float = 6e-3
    evaluations: int = 7
    check_batch: int = 4  # the interpreter runs a kernel's programs one by one in numpy: few rows, few steps
    check_window: int = 16
    check_steps: int = 3


class WordModel(nn.Module):
    """Next-word model: embedding, one recurrent layer, and the embedding again as output weights."""

    def __init__(self, vocabulary: int, embedding: int, hidden: int, make_layer: MakeLayer) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, embedding)
        self.layer = make_layer(embedding, hidden)
        self.project = nn.Linear(hidden, embedding)
        self.bias = nn.Parameter(torch.zeros(vocabulary))
        # As output weights the rows want length 1; as input the layer wants unit variance. One table serves both.
        nn.init.normal_(self.embedding.weight, std=embedding**-0.5)
        self.input_scale = embedding**0.5

    def embed(self, words: Tensor) -> Tensor:
        """What the layer gets.  words [T, B] -> [T, B, I]"""
        return self.embedding(words) * self.input_scale

    def forward(self, words: Tensor, h: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits of the next word after each word, and the state (an LSTM's are two).

        words [T, B] -> [T, B, V], [1, B, H]
        """
        y, h_n = self.layer(self.embed(words), h)
        return F.linear(self.project(y), self.embedding.weight, self.bias), h_n


@dataclass
class Curve:
    """What one training left behind."""

    losses: list[float] = field(default_factory=list)  # of every step, nats per word
    held_out: list[tuple[int, float]] = field(default_factory=list)  # (step, perplexity)


def build_model(vocabulary: int, embedding: int, hidden: int, make_layer: MakeLayer, seed: int) -> WordModel:
    """A model whose parameters the seed alone decides: drawn on the CPU, whatever device it goes to later."""
    torch.manual_seed(seed)
    return WordModel(vocabulary, embedding, hidden, make_layer)


def same_parameters(a: nn.Module, b: nn.Module) -> bool:
    """Whether two modules have the same parameters, name by name and bit by bit."""
    theirs = b.state_dict()
    ours = a.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def learning_rate_at(step: int, steps: int, peak: float) -> float:
    """A short rise, then a straight fall to nearly nothing: lets a short training take large steps early."""
    return peak * min(1.0, (step + 1) / 20) * max(0.05, 1 - step / steps)


def train(model: WordModel, corpus: Corpus, sizes: Sizes, device: torch.device, report: Report | None = None) -> Curve:
    """Train in reading order, carrying h along; the batches depend on the corpus and the sizes alone."""
    optimiser = torch.optim.Adam(model.parameters(), lr=sizes.learning_rate)
    stream = lanes(corpus.train, sizes.batch).to(device)
    pause = max(1, sizes.steps // sizes.evaluations)
    losses: list[Tensor] = []
    curve = Curve()
    while len(losses) < sizes.steps:
        h = None
        for words, following in windows(stream, sizes.window):
            for group in optimiser.param_groups:
                group["lr"] = learning_rate_at(len(losses), sizes.steps, sizes.learning_rate)
            logits, h = model(words, h)
            h = h.detach()
            loss = F.cross_entropy(logits.flatten(0, 1), following.flatten())
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            losses.append(loss.detach())
            if report is not None and len(losses) % 10 == 0:
                report(len(losses), loss.item())
            if len(losses) % pause == 0 or len(losses) == sizes.steps:
                curve.held_out.append((len(losses), perplexity(model, corpus, device)))
            if len(losses) == sizes.steps:
                break
    curve.losses = torch.stack(losses).tolist()
    return curve


@torch.no_grad()
def perplexity(model: WordModel, corpus: Corpus, device: torch.device) -> float:
    """exp of the mean loss over the held-out words, read in a few lanes with h carried along."""
    stream = lanes(corpus.held_out, max(1, min(16, len(corpus.held_out) // 16))).to(device)
    total, count, h = 0.0, 0, None
    for words, following in windows(stream, 64):
        logits, h = model(words, h)
        total += float(F.cross_entropy(logits.flatten(0, 1), following.flatten(), reduction="sum"))
        count += following.numel()
    return math.exp(total / count)


def largest_difference(a: list[float], b: list[float]) -> float:
    """Of two runs' losses, step by step."""
    return max(abs(x - y) for x, y in zip(a, b, strict=True))
