"""A text while it is being typed: every new word is one step of the layer from the state that is carried along."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .data import END, Vocabulary
from .training import WordModel


class Session:
    """The state after every word so far, on a stack: a word more is one step (T = 1, B = 1), a word less takes none.

    It begins where a paragraph has ended. Words outside the vocabulary are read as <unk>.
    """

    def __init__(self, model: WordModel, vocabulary: Vocabulary) -> None:
        self.model, self.vocabulary = model, vocabulary
        self.words: list[str] = []
        self._stack: list[tuple[Tensor, Tensor]] = []  # [1, 1, H] and [V] after END and after each word
        self._step(END, None)

    @property
    def state(self) -> Tensor:
        """What the layer carries after the last word.  [1, 1, H]"""
        return self._stack[-1][0]

    @property
    def probabilities(self) -> Tensor:
        """Of every word of the vocabulary, to be the next one.  [V], on the CPU"""
        return self._stack[-1][1]

    @property
    def unknown(self) -> list[str]:
        """The words so far that the model has no vector of its own for."""
        return [word for word in self.words if word not in self.vocabulary]

    def push(self, word: str) -> None:
        """Read one word."""
        self._step(word, self.state)
        self.words.append(word)

    def pop(self) -> None:
        """Take the last word back. Raises: IndexError where there is none."""
        self.words.pop()
        self._stack.pop()

    def go_to(self, words: Sequence[str]) -> None:
        """Be where these words have been read: what begins the same is kept, and steps are taken for the rest alone."""
        same = 0
        while same < min(len(words), len(self.words)) and words[same] == self.words[same]:
            same += 1
        while len(self.words) > same:
            self.pop()
        for word in words[same:]:
            self.push(word)

    def suggest(self, partial: str = "", count: int = 5) -> list[tuple[str, float]]:
        """Up to `count` words, the likeliest first, that begin with `partial` and go on from there.

        With each its probability; where something is typed already, given that the word begins so. No punctuation, and
        no token that stands for something else: what can be suggested is what one would type.
        """
        words = self.vocabulary.words
        beginning = [n for n in self.vocabulary.suggested if words[n].startswith(partial)]
        longer = [n for n in beginning if len(words[n]) > len(partial)]
        if not longer:
            return []
        p = self.probabilities[longer]
        if partial:
            p = p / self.probabilities[beginning].sum().clamp_min(1e-30)
        best = p.sort(descending=True, stable=True)
        found = zip(best.indices[:count].tolist(), best.values[:count].tolist(), strict=True)
        return [(words[longer[i]], value) for i, value in found]

    @torch.no_grad()
    def _step(self, word: str, h: Tensor | None) -> None:
        numbers = torch.tensor(self.vocabulary.encode([word]), device=self.model.embedding.weight.device)
        logits, h = self.model(numbers.view(1, 1), h)
        self._stack.append((h, logits[0, 0].float().softmax(-1).cpu()))
