"""The baselines to beat: counting words, and counting words after the two before them.

A recurrent model is only interesting where it knows more than such counts, so the demo prints them side by side. The
trigram is interpolated Kneser-Ney, the strongest plain count model, not a straw man.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

_DISCOUNT = 0.75  # the customary value; Kneser-Ney is flat around it


def unigram_perplexity(train: Sequence[int], held_out: Sequence[int], vocabulary_size: int) -> float:
    """Perplexity of held-out words by their frequency alone, one count added to each so that none is impossible."""
    counts = Counter(train)
    total = len(train) + vocabulary_size
    log_probability = sum(math.log((counts[word] + 1) / total) for word in held_out)
    return math.exp(-log_probability / len(held_out))


class Trigram:
    """Interpolated Kneser-Ney: P(w | u v), backed by the number of different words that precede w."""

    def __init__(self, train: Sequence[int], vocabulary_size: int) -> None:
        self.vocabulary_size = vocabulary_size
        self.trigrams = Counter(zip(train, train[1:], train[2:], strict=False))
        # Below the highest order a word counts once per different left neighbour, not once per occurrence.
        self.bigrams = Counter((v, w) for _, v, w in self.trigrams)
        pairs = set(pairwise(train))
        self.unigrams = Counter(w for _, w in pairs)
        self.pair_count = len(pairs)
        self.after_two: dict[tuple[int, int], list[int]] = defaultdict(lambda: [0, 0])  # occurrences, different words
        for (u, v, _), count in self.trigrams.items():
            self.after_two[u, v][0] += count
            self.after_two[u, v][1] += 1
        self.after_one: dict[int, list[int]] = defaultdict(lambda: [0, 0])
        for (v, _), count in self.bigrams.items():
            self.after_one[v][0] += count
            self.after_one[v][1] += 1

    def probability(self, u: int, v: int, w: int) -> float:
        """P(w | u v); sums to one over w."""
        spread = _DISCOUNT * len(self.unigrams) / self.pair_count
        p = max(self.unigrams[w] - _DISCOUNT, 0.0) / self.pair_count + spread / self.vocabulary_size
        if v in self.after_one:
            total, different = self.after_one[v]
            p = (max(self.bigrams[v, w] - _DISCOUNT, 0.0) + _DISCOUNT * different * p) / total
        if (u, v) in self.after_two:
            total, different = self.after_two[u, v]
            p = (max(self.trigrams[u, v, w] - _DISCOUNT, 0.0) + _DISCOUNT * different * p) / total
        return p

    def probabilities(self, u: int, v: int) -> NDArray[np.float64]:
        """P(w | u v) of every word w: what `probability` gives, all at once.  -> [V]"""
        words, counts = self._following[()]
        p = np.full(self.vocabulary_size, _DISCOUNT * len(words) / self.pair_count / self.vocabulary_size)
        p[words] += np.maximum(counts - _DISCOUNT, 0.0) / self.pair_count
        for context in ((v,), (u, v)):
            if context in self._following:
                words, counts = self._following[context]
                p *= _DISCOUNT * len(words) / counts.sum()
                p[words] += np.maximum(counts - _DISCOUNT, 0.0) / counts.sum()
        return p

    @cached_property
    def _following(self) -> dict[tuple[int, ...], tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """The words that were seen after each context of none, one or two words, and the count of each."""
        found: dict[tuple[int, ...], dict[int, int]] = defaultdict(dict)
        found[()] = dict(self.unigrams)
        for counts in (self.bigrams, self.trigrams):
            for (*context, w), count in counts.items():
                found[tuple(context)][w] = count
        return {
            context: (np.array(list(counts), dtype=np.int64), np.array(list(counts.values()), dtype=np.int64))
            for context, counts in found.items()
        }

    def perplexity(self, held_out: Sequence[int]) -> float:
        """Of every word that has two words before it."""
        triples = list(zip(held_out, held_out[1:], held_out[2:], strict=False))
        return math.exp(-sum(math.log(self.probability(*triple)) for triple in triples) / len(triples))
