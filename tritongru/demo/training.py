"""The word model and its training: the same code for `tritongru.GRU` and `torch.nn.GRU`, which is the point."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .data import Corpus, Vocabulary, lanes, windows

MakeLayer = Callable[[int, int], nn.RNNBase]  # (input size, hidden size) -> the layer under comparison


@dataclass(frozen=True)
class Sizes:
    """Everything that sets how long the autocomplete takes. The defaults train for half a minute on one CPU core."""

    vocabulary: int = 3000
    embedding: int = 128  # I of the layer
    hidden: int = 192  # H of the layer
    batch: int = 16
    window: int = 32  # words between which gradients flow; h is carried from window to window
    steps: int = 700
    passes: int = 1000  # over the text, at most: a short text would be learned by heart
    learning_rate: float = 6e-3
    check_batch: int = 4  # in the emulator, which runs a kernel's programs in numpy
    check_window: int = 16


class WordModel(nn.Module):
    """Next-word model: embedding, one recurrent layer, and the embedding again as output weights."""

    def __init__(self, vocabulary: int, embedding: int, hidden: int, make: MakeLayer) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, embedding)
        self.layer = make(embedding, hidden)
        self.project = nn.Linear(hidden, embedding)
        self.bias = nn.Parameter(torch.zeros(vocabulary))
        # As output weights the rows want length 1; as input the layer wants unit variance. One table serves both.
        nn.init.normal_(self.embedding.weight, std=embedding**-0.5)

    def embed(self, words: Tensor) -> Tensor:
        """What the layer gets.  words [T, B] -> [T, B, I]"""
        return self.embedding(words) * self.embedding.embedding_dim**0.5

    def forward(self, words: Tensor, h: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits of the next word after each, and the state (an LSTM's are two).  [T, B] -> [T, B, V], [1, B, H]"""
        y, h_n = self.layer(self.embed(words), h)
        return F.linear(self.project(y), self.embedding.weight, self.bias), h_n


def build_model(vocabulary: Vocabulary, sizes: Sizes, make: MakeLayer, seed: int) -> WordModel:
    """A model whose parameters the seed alone decides: drawn on the CPU, wherever it goes later."""
    torch.manual_seed(seed)
    return WordModel(len(vocabulary.words), sizes.embedding, sizes.hidden, make)


def descend(model: nn.Module, batches: Iterator[Tensor], steps: int, peak: float, what: str = "") -> list[float]:
    """So many steps of Adam on losses that `batches` computes as it is asked; the rate rises shortly, then falls."""
    optimiser = torch.optim.Adam(model.parameters(), lr=peak)
    # In one piece: small tensors that stay, between large ones that go, make the heap grow by the large ones.
    losses, start = torch.zeros(steps, device=next(model.parameters()).device), time.perf_counter()
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = peak * min(1.0, (step + 1) / 20) * max(0.05, 1 - step / steps)
        loss = next(batches)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        losses[step] = loss.detach()
        if step == 0 and loss.is_cuda:  # which compiles kernels, and wakes the GPU, for whoever comes first
            torch.cuda.synchronize()
            start = time.perf_counter()
        if what and (step + 1) * 4 // steps > step * 4 // steps:
            said = f"{step + 1} of {steps} steps, loss {loss.item():.3f}, {time.perf_counter() - start:.0f} s"
            print(f"  {what}: {said}", flush=True)
    return losses.tolist()


def train(model: WordModel, corpus: Corpus, sizes: Sizes, what: str = "") -> list[float]:
    """Train in reading order, carrying h along; the batches depend on the corpus and the sizes alone. -> losses"""
    stream = lanes(corpus.train, sizes.batch).to(model.bias.device)
    steps = min(sizes.steps, sizes.passes * max(1, len(stream) // sizes.window))

    def batches() -> Iterator[Tensor]:
        while True:
            h = None
            for words, following in windows(stream, sizes.window):
                logits, h = model(words, h)
                h = h.detach()
                yield F.cross_entropy(logits.flatten(0, 1), following.flatten())

    return descend(model, batches(), steps, sizes.learning_rate, what)


@torch.no_grad()
def perplexity(model: WordModel, numbers: Sequence[int]) -> float:
    """exp of the mean loss over these words, read in a few lanes with h carried along."""
    stream = lanes(numbers, max(1, min(16, len(numbers) // 16))).to(model.bias.device)
    total, h = 0.0, None
    for words, following in windows(stream, 64):
        logits, h = model(words, h)
        total += float(F.cross_entropy(logits.flatten(0, 1), following.flatten(), reduction="sum"))
    return math.exp(total / stream[1:].numel())
