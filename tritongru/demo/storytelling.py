"""A small GRU language model of the story's sentences, and what it answers as it reads.

It is trained on every next word like any language model; the cuisine words are the only ones whose right value depends
on something said long before. Its answers are the likeliest of ALL its words, not a choice among cuisines.
"""

from __future__ import annotations

import dataclasses
import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .data import END, Vocabulary, tokenise
from .story import DISHES, EXPECTED, FIRST, QUESTION, SECOND, Recipe, Text, generate
from .training import MakeLayer, Report, WordModel, build_model, learning_rate_at

_IGNORED = -100  # cross_entropy's mark for places that carry no loss


@dataclass(frozen=True)
class StorySizes:
    """What sets how long this part takes: about ten seconds on a CPU core."""

    embedding: int = 32
    hidden: int = 64
    texts: int = 4000
    held_out: int = 500
    batch: int = 16
    steps: int = 700
    learning_rate: float = 8e-3
    # One word in twenty is a cuisine, and the others are easier: without weight they take all the learning.
    cuisine_weight: float = 20.0
    retain: float = 2.0  # as `begin_retaining` has it
    recipe: Recipe | None = None


@dataclass(frozen=True)
class Answer:
    """The model's last word for one sentence."""

    prefix: str
    expected: str
    top: list[tuple[str, float]]

    @property
    def right(self) -> bool:
        return self.top[0][0] == self.expected


@dataclass(frozen=True)
class Told:
    """The trained model's account: both completions, accuracy on held-out texts, and probabilities by word."""

    answers: list[Answer]
    accuracy: dict[str, tuple[int, int]]  # kind or gap -> (right, asked)
    words: list[str]  # the running text, the model's own completions in it
    probabilities: dict[str, list[float]]  # cuisine -> P of it, asked after each of these words
    losses: list[float]


@torch.no_grad()
def begin_retaining(layer: nn.RNNBase, retain: float) -> None:
    """Let the layer start by keeping most of its past, of which the training would else find nothing 20 words later.

    A GRU's z begins at sigmoid(retain), 9 parts in 10 at 2, instead of at half. So does an LSTM's forget gate, and its
    input gate at the rest, 1 in 10, which the GRU has by construction (Tallec and Ollivier 2018, "Can recurrent neural
    networks warp time?"). An RNN, which has no gate, gets an orthogonal matrix, which neither shrinks nor stretches h.
    """
    H = layer.hidden_size
    if layer.mode in ("GRU", "LSTM"):  # the second block of rows is z of r z n, and f of i f g o
        cast(Tensor, layer.bias_hh_l0)[H : 2 * H] += retain
        if layer.mode == "LSTM":
            cast(Tensor, layer.bias_hh_l0)[:H] -= retain
    else:
        nn.init.orthogonal_(cast(Tensor, layer.weight_hh_l0))


@lru_cache(2)  # several networks of a seed read the same
def training_texts(count: int, seed: int, recipe: Recipe | None, batch: int) -> tuple[Text, ...]:
    """In the order of training: short texts first, since what is learned over small gaps then stretches.

    By a recipe: the first third has its smaller gaps alone, a quarter of them, and one switch at most; then come all.
    Texts of like length go together, so that a batch has little padding.
    """
    if recipe is None:
        return tuple(sorted(generate(count, seed), key=lambda text: len(text.words)))
    gaps = sorted(recipe.gaps)
    easy = dataclasses.replace(recipe, gaps=tuple(gaps[: -(-len(gaps) // 4)]), switches=(0, 1))
    texts: list[Text] = []
    for part, (size, own) in enumerate(((count // 3, easy), (count - count // 3, recipe))):
        drawn = generate(size, seed + 2 + part, frozenset(text.words for text in texts), own)
        drawn.sort(key=lambda text: len(text.words))
        batches = [drawn[i : i + batch] for i in range(0, size, batch)]
        random.Random(seed).shuffle(batches)
        texts += [text for together in batches for text in together]
    return tuple(texts)


class StoryModel:
    """The word model with its vocabulary and training."""

    def __init__(self, sizes: StorySizes, make_layer: MakeLayer, device: torch.device, seed: int) -> None:
        self.sizes, self.device = sizes, device
        self.texts = training_texts(sizes.texts, seed, sizes.recipe, sizes.batch)
        self.trained_on = frozenset(text.words for text in self.texts)
        self.held_out = generate(sizes.held_out, seed + 1, self.trained_on, sizes.recipe)
        self.vocabulary = Vocabulary((word for text in self.texts for word in text.words), 10_000)
        shape = len(self.vocabulary), sizes.embedding, sizes.hidden
        self.model: WordModel = build_model(*shape, make_layer, seed).to(device)
        begin_retaining(self.model.layer, sizes.retain)

    def padded(self, texts: Sequence[Text]) -> tuple[Tensor, Tensor]:
        """Words and the words that follow, time first; shorter texts end in places without loss.  [T, B] each"""
        rows = [self.vocabulary.encode([END, *text.words]) for text in texts]
        longest = max(map(len, rows))
        full = torch.tensor([row + [_IGNORED] * (longest - len(row)) for row in rows], device=self.device).t()
        return full[:-1].clamp_min(0), full[1:]

    def train(self, report: Report | None = None) -> list[float]:
        weight = torch.ones(len(self.vocabulary), device=self.device)
        for cuisine in DISHES:
            weight[self.vocabulary.encode([cuisine])] = self.sizes.cuisine_weight
        optimiser = torch.optim.Adam(self.model.parameters(), lr=self.sizes.learning_rate)
        losses = torch.zeros(self.sizes.steps, device=self.device)  # in one piece, as in training.py
        for step in range(self.sizes.steps):
            for group in optimiser.param_groups:
                group["lr"] = learning_rate_at(step, self.sizes.steps, self.sizes.learning_rate)
            start = step * self.sizes.batch
            words, following = self.padded([self.texts[(start + i) % len(self.texts)] for i in range(self.sizes.batch)])
            logits, _ = self.model(words)
            loss = F.cross_entropy(logits.flatten(0, 1), following.flatten(), weight, ignore_index=_IGNORED)
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            optimiser.step()
            losses[step] = loss.detach()
            if report is not None and (step + 1) % 10 == 0:
                report(step + 1, loss.item())
        return losses.tolist()

    def accuracy(self) -> dict[str, tuple[int, int]]:
        """How often the likeliest word of all is the right cuisine, by kind of sentence and by length of the gap."""
        counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
        for text, found in self.answered(self.held_out):
            for right, kind, gap in zip(found, text.kinds, text.gaps, strict=True):
                for key in (kind, "gap of 20 words or more" if gap >= 20 else "gap under 20 words", "all"):
                    counts[key][0] += right
                    counts[key][1] += 1
        return {key: (right, asked) for key, (right, asked) in sorted(counts.items())}

    def answered(self, texts: Sequence[Text]) -> Iterator[tuple[Text, list[bool]]]:
        """Each text with whether the likeliest word of all is the right cuisine, at each of its questions."""
        for batch, logits in self._read(texts):
            guesses = logits.argmax(-1).cpu()  # after END and words[:i], position i guesses words[i]
            for column, text in enumerate(batch):
                yield text, [self.vocabulary.words[int(guesses[at, column])] == text.words[at] for at in text.answers]

    def cuisine_loss(self, texts: Sequence[Text]) -> float:
        """Mean cross-entropy of the cuisine words, in nats."""
        losses = [
            float(F.cross_entropy(logits[at, column], logits.new_tensor(word, dtype=torch.long)))
            for batch, logits in self._read(texts)
            for column, text in enumerate(batch)
            for at, word in zip(text.answers, self.vocabulary.encode(text.words[i] for i in text.answers), strict=True)
        ]
        return sum(losses) / len(losses)

    def _read(self, texts: Sequence[Text]) -> Iterator[tuple[Sequence[Text], Tensor]]:
        """A hundred texts at a time with the model's logits.  [T, B, V]"""
        for start in range(0, len(texts), 100):
            batch = texts[start : start + 100]
            with torch.no_grad():
                yield batch, self.model(self.padded(batch)[0])[0]

    @torch.no_grad()
    def next_word(self, words: Sequence[str]) -> Tensor:
        """Probabilities of the word after `words`.  -> [V]"""
        numbers = torch.tensor(self.vocabulary.encode([END, *words]), device=self.device).view(-1, 1)
        logits, _ = self.model(numbers)
        return logits[-1, 0].float().softmax(-1).cpu()

    def tell(self) -> tuple[list[Answer], list[str], dict[str, list[float]]]:
        """Both completions, the running text with the model's own words in it, and P(cuisine) asked after each word.

        Asking means: the words so far, then "; his favourite cuisine is". The text itself is not disturbed by it.
        """
        text: list[str] = []
        answers: list[Answer] = []
        for prefix, expected in zip((FIRST, SECOND), EXPECTED, strict=True):
            text += tokenise(prefix)
            best = self.next_word(text).topk(3)
            top = [
                (self.vocabulary.words[i], p) for i, p in zip(best.indices.tolist(), best.values.tolist(), strict=True)
            ]
            answers.append(Answer(prefix, expected, top))
            text += [top[0][0], "."]
        probabilities: dict[str, list[float]] = {cuisine: [] for cuisine in sorted(DISHES)}
        text.pop()  # after the last answer there is nothing left to ask
        for end in range(1, len(text) + 1):
            asked = self.next_word([*text[:end], *tokenise(QUESTION)])
            for cuisine, values in probabilities.items():
                values.append(float(asked[self.vocabulary.index[cuisine]]))
        return answers, text, probabilities


def tell_the_story(
    sizes: StorySizes, make_layer: MakeLayer, device: torch.device, seed: int, report: Report | None = None
) -> Told:
    """Train, ask, count."""
    model = StoryModel(sizes, make_layer, device, seed)
    losses = model.train(report)
    answers, words, probabilities = model.tell()
    return Told(answers, model.accuracy(), words, probabilities, losses)
