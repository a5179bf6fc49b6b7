"""The word model and its training: the same code for `tritongru.GRU` and `torch.nn.GRU`, which is the point.

Nothing here knows which GRU it trains. A model gets it from `make_layer`, and from one seed both
get the same parameters.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .data import Corpus, lanes, windows

MakeLayer = Callable[[int, int], nn.RNNBase]  # (input size, hidden size) -> the layer under comparison
Report = Callable[[int, float], None]  # (steps done, loss of the last)

PATIENCE = 3  # looks at the validation part


@dataclass(frozen=True)
class Sizes:
    """Everything that sets how long the demo takes. The defaults train for half a minute on one CPU core."""

    vocabulary: int = 3000
    embedding: int = 128  # I of the layer
    hidden: int = 192  # H of the layer
    batch: int = 16
    window: int = 32  # words between which gradients flow; h is carried from window to window
    steps: int = 700
    passes: int | None = None  # over the text, at most; then there are fewer steps
    learning_rate: float = 6e-3
    evaluations: int = 7
    dropout: float = 0.0  # of what goes into the layer and of what comes out
    check_batch: int = 4  # the interpreter runs a kernel's programs one by one in numpy: few rows, few steps
    check_window: int = 16
    check_steps: int = 3


def within_passes(sizes: Sizes, corpus: Corpus) -> Sizes:
    """The sizes with no more steps than the passes allow: over a short text the learning rate has to fall sooner."""
    if sizes.passes is None:
        return sizes
    one_pass = max(1, len(corpus.train) // (sizes.batch * sizes.window))
    return dataclasses.replace(sizes, steps=min(sizes.steps, sizes.passes * one_pass))


class WordModel(nn.Module):
    """Next-word model: embedding, one recurrent layer, and the embedding again as output weights."""

    def __init__(
        self, vocabulary: int, embedding: int, hidden: int, make_layer: MakeLayer, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, embedding)
        self.layer = make_layer(embedding, hidden)
        self.project = nn.Linear(hidden, embedding)
        self.bias = nn.Parameter(torch.zeros(vocabulary))
        self.drop: nn.Module = nn.Dropout(dropout) if dropout else nn.Identity()
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
        y, h_n = self.layer(self.drop(self.embed(words)), h)
        return F.linear(self.project(self.drop(y)), self.embedding.weight, self.bias), h_n


@dataclass
class Curve:
    """What one training left behind."""

    losses: list[float] = field(default_factory=list)  # of every step, nats per word
    held_out: list[tuple[int, float]] = field(default_factory=list)  # (step, perplexity)
    validation: list[tuple[int, float]] = field(default_factory=list)  # instead, where the corpus has such a part
    kept: int = 0  # the step whose parameters the model has at the end


def build_model(
    vocabulary: int, embedding: int, hidden: int, make_layer: MakeLayer, seed: int, dropout: float = 0.0
) -> WordModel:
    """A model whose parameters the seed alone decides: drawn on the CPU, whatever device it goes to later."""
    torch.manual_seed(seed)
    return WordModel(vocabulary, embedding, hidden, make_layer, dropout)


def same_parameters(a: nn.Module, b: nn.Module) -> bool:
    """Whether two modules have the same parameters, name by name and bit by bit."""
    theirs = b.state_dict()
    ours = a.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def learning_rate_at(step: int, steps: int, peak: float) -> float:
    """A short rise, then a straight fall to nearly nothing: lets a short training take large steps early."""
    return peak * min(1.0, (step + 1) / 20) * max(0.05, 1 - step / steps)


def train(model: WordModel, corpus: Corpus, sizes: Sizes, device: torch.device, report: Report | None = None) -> Curve:
    """Train in reading order, carrying h along; the batches depend on the corpus and the sizes alone.

    Where the corpus has a validation part, the model is left with the parameters that did best on it, and the training
    ends when it has not done better `PATIENCE` times: a short text is soon learned by heart.
    """
    optimiser = torch.optim.Adam(model.parameters(), lr=sizes.learning_rate)
    stream = lanes(corpus.train, sizes.batch).to(device)
    pause = max(1, sizes.steps // sizes.evaluations)
    # In one piece: small tensors that stay, between large ones that go, make the heap grow by the large ones.
    losses, done = torch.zeros(sizes.steps, device=device), 0
    curve, best = Curve(), _Best()
    model.train()
    while done < sizes.steps and best.waited < PATIENCE:
        h = None
        for words, following in windows(stream, sizes.window):
            for group in optimiser.param_groups:
                group["lr"] = learning_rate_at(done, sizes.steps, sizes.learning_rate)
            logits, h = model(words, h)
            h = h.detach()
            loss = F.cross_entropy(logits.flatten(0, 1), following.flatten())
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            losses[done] = loss.detach()
            done += 1
            if report is not None and done % 10 == 0:
                report(done, loss.item())
            if done % pause == 0 or done == sizes.steps:
                if corpus.validation:
                    curve.validation.append((done, perplexity(model, corpus.validation, device)))
                    best.look_at(model, *curve.validation[-1])
                else:
                    curve.held_out.append((done, perplexity(model, corpus.held_out, device)))
            if done == sizes.steps or best.waited == PATIENCE:
                break
    if best.parameters is not None:
        model.load_state_dict(best.parameters)
    model.eval()
    curve.losses = losses[:done].tolist()
    curve.kept = best.step or done
    return curve


@dataclass
class _Best:
    """The parameters that did best so far, and how many looks ago that was."""

    step: int = 0
    perplexity: float = math.inf
    parameters: dict[str, Tensor] | None = None
    waited: int = 0

    def look_at(self, model: nn.Module, step: int, perplexity: float) -> None:
        if perplexity < self.perplexity:
            self.step, self.perplexity, self.waited = step, perplexity, 0
            self.parameters = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        else:
            self.waited += 1


@torch.no_grad()
def perplexity(model: WordModel, numbers: Sequence[int], device: torch.device) -> float:
    """exp of the mean loss over these words, read in a few lanes with h carried along."""
    training = model.training
    model.eval()
    stream = lanes(numbers, max(1, min(16, len(numbers) // 16))).to(device)
    total, count, h = 0.0, 0, None
    for words, following in windows(stream, 64):
        logits, h = model(words, h)
        total += float(F.cross_entropy(logits.flatten(0, 1), following.flatten(), reduction="sum"))
        count += following.numel()
    model.train(training)
    return math.exp(total / count)


def largest_difference(a: list[float], b: list[float]) -> float:
    """Of two runs' losses, step by step."""
    return max(abs(x - y) for x, y in zip(a, b, strict=True))
