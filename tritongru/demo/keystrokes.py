"""Keystrokes that suggestions save on a text nobody trained on: what an autocomplete is for, in one figure.

The measure is that of word prediction (Trnka and McCoy 2008, "Evaluating word prediction: framing keystroke savings"),
with a user who never misses a suggestion:

- three suggestions are shown, the likeliest words that begin with the letters typed so far and go on from there;
- a word of L letters typed by hand costs L + 1 keys, its space with it; accepted after c letters it costs c + 1, the
  space then being put in; the user accepts as soon as the word is there;
- words outside the vocabulary and numbers cost L + 1, punctuation costs its one key (the space is that of the word
  before it), the end of a paragraph is the space of its last word.

Share saved = 1 - keys with suggestions / keys without. Reading suggestions, or overlooking one, costs no key and is not
in this figure: a person saves less.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from .data import END, Vocabulary
from .ngram import Trigram
from .training import WordModel

SHOWN = 3
_ROWS = 64  # words looked at together


def keys_by_hand(spelling: str) -> int:
    """What this costs without suggestions."""
    if spelling == END:
        return 0
    return len(spelling) + 1 if any(letter.isalnum() for letter in spelling) else len(spelling)


class Keystrokes:
    """The keys of one text by the rule above, for whatever suggests."""

    def __init__(self, spellings: Sequence[str], vocabulary: Vocabulary, shown: int = SHOWN) -> None:
        self.spellings, self.shown = spellings, shown
        self.by_hand = sum(map(keys_by_hand, spellings))
        self.numbers = vocabulary.encode(spellings)
        suggested = set(vocabulary.suggested)
        self.can_be_shown = [number in suggested for number in self.numbers]
        self._columns = torch.tensor(vocabulary.suggested, dtype=torch.long)  # S of the V words
        self._lengths = torch.tensor([len(word) for word in vocabulary.words])
        self._beginnings = _beginnings(vocabulary.words)

    def saved(self, keys: int) -> float:
        """The share of keys that is saved where the text costs so many."""
        return 1 - keys / self.by_hand

    def perfect(self) -> int:
        """Keys with the right word always shown at once, which no suggestions can beat."""
        return sum(
            1 if can else keys_by_hand(spelling)
            for can, spelling in zip(self.can_be_shown, self.spellings, strict=True)
        )

    def using(self, scores: Iterable[Tensor]) -> int:
        """Keys with suggestions by these scores: how likely each word is at each place, in any increasing measure.

        scores: blocks of rows [n, V], in the order of the text.

        Raises: ValueError where there are not as many rows as words.
        """
        keys, place = 0, 0
        for block in scores:
            for rows in block.cpu().split(_ROWS):
                here = slice(place, place + len(rows))
                place += len(rows)
                if place <= len(self.numbers):
                    typed = self._typed(rows, torch.tensor(self.numbers[here])).tolist()
                    for c, can, spelling in zip(typed, self.can_be_shown[here], self.spellings[here], strict=True):
                        keys += c + 1 if can else keys_by_hand(spelling)
        if place != len(self.numbers):
            raise ValueError(f"expected {len(self.numbers)} rows of scores, one for each word, got {place}")
        return keys

    def _typed(self, scores: Tensor, words: Tensor) -> Tensor:
        """How many letters of each word are typed when it is among the suggestions, its length if it never is.

        scores [n, V], words [n] -> [n]
        """
        own, others = scores.gather(1, words[:, None]), scores[:, self._columns]
        # Equal scores go by number, as in a stable sort.
        ahead = (others > own) | ((others == own) & (self._columns < words[:, None]))  # [n, S]
        typed = self._lengths[words].clone()
        waiting = torch.arange(len(words))
        for c, beginning in enumerate(self._beginnings):
            # Likelier words that begin with the same c letters, and are not these letters alone.
            same = beginning[self._columns] == beginning[words[waiting], None]
            rivals = (ahead[waiting] & same & (self._lengths[self._columns] > c)).sum(1)
            found = (rivals < self.shown) & (c < self._lengths[words[waiting]])
            typed[waiting[found]] = c
            waiting = waiting[~found & (c + 1 < self._lengths[words[waiting]])]
            if not len(waiting):
                break
        return typed


def _beginnings(words: Sequence[str]) -> list[Tensor]:
    """For c = 0, 1, 2 ...: a number for each word's first c letters, the same for the same letters.  -> [V] each"""
    found = []
    for c in range(max(map(len, words))):
        numbers: dict[str, int] = {}
        found.append(torch.tensor([numbers.setdefault(word[:c], len(numbers)) for word in words]))
    return found


@torch.no_grad()
def model_scores(model: WordModel, vocabulary: Vocabulary, numbers: Sequence[int]) -> Iterator[Tensor]:
    """Logits of every word of a text after all before it, from the end of a paragraph on.  -> blocks [n, V]"""
    device = model.embedding.weight.device
    before = torch.tensor([*vocabulary.encode([END]), *numbers[:-1]], device=device).view(-1, 1)
    h = None
    for words in before.split(_ROWS):
        logits, h = model(words, h)
        yield logits[:, 0].float()


def trigram_scores(trigram: Trigram, vocabulary: Vocabulary, numbers: Sequence[int]) -> Iterator[Tensor]:
    """The trigram's probabilities of every word of a text, from the end of a paragraph on.  -> blocks [n, V]"""
    end = vocabulary.index[END]
    before = [end, end, *numbers]
    for start in range(0, len(numbers), _ROWS):
        yield torch.stack([
            torch.from_numpy(trigram.probabilities(before[i], before[i + 1]))
            for i in range(start, min(start + _ROWS, len(numbers)))
        ])  # fmt: skip
