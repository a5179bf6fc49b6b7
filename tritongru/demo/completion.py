"""Completing what a user has typed: the next word, the rest of a word, and a continuation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .data import END, NUMBER, UNKNOWN, DemoError, Vocabulary, tokenise
from .training import WordModel

_NO_SPACE_BEFORE = {".", ",", ";", ":", "?", "!", ")"}


@dataclass(frozen=True)
class Completion:
    """What the model makes of a prompt."""

    prompt: str
    unknown: list[str]  # words of the prompt that the model has no vector of its own for
    partial: str | None  # the unfinished last word, if its end is what is suggested
    words: list[tuple[str, float]]  # suggestions with their probability
    continuation: str


def check_prompt(prompt: str) -> None:
    """Refuse a prompt before minutes of training, not after."""
    if not tokenise(prompt):
        raise DemoError(f"nothing to complete in the prompt {prompt!r}: it has no words")


def join(tokens: list[str]) -> str:
    """Tokens as one would type them."""
    text = ""
    for token in tokens:
        glued = token in _NO_SPACE_BEFORE or text.endswith("(") or not text
        text += token if glued else " " + token
    return text


@torch.no_grad()
def complete(model: WordModel, vocabulary: Vocabulary, prompt: str, count: int = 5, length: int = 12) -> Completion:
    """The likeliest next words after a prompt, and the greedy continuation from there.

    A last word that the vocabulary lacks, but that begins some of its words, is taken as unfinished: then those words
    compete, and the probabilities are among them.
    """
    check_prompt(prompt)
    tokens = tokenise(prompt)
    partial = None
    # <unk> and the end of a paragraph are no words one could type
    shown = [n for n in range(len(vocabulary)) if vocabulary.words[n] not in (UNKNOWN, END)]
    if prompt[-1:].isalnum() and tokens[-1] not in vocabulary:
        beginning = [number for number in shown if vocabulary.words[number].startswith(tokens[-1])]
        if beginning:
            partial, shown, tokens = tokens[-1], beginning, tokens[:-1]
    unknown = [token for token in tokens if token not in vocabulary]

    probabilities, h = _next(model, vocabulary.encode([END, *tokens]), None)
    candidates = probabilities[torch.tensor(shown, device=probabilities.device)]
    if partial is not None:
        candidates = candidates / candidates.sum().clamp_min(1e-30)
    best = candidates.topk(min(count, len(shown)))
    chosen = [shown[i] for i in best.indices.tolist()]
    words = [(vocabulary.words[n], p) for n, p in zip(chosen, best.values.tolist(), strict=True)]

    going_on = chosen[:1]
    while len(going_on) < length:
        probabilities, h = _next(model, going_on[-1:], h)
        probabilities[vocabulary.index[UNKNOWN]] = -1  # greedy, but never through a word it cannot name
        following = int(probabilities.argmax())
        if vocabulary.words[following] == END:
            break
        going_on.append(following)
    continuation = join([vocabulary.words[n] for n in going_on])
    return Completion(prompt, unknown, partial, words, continuation.replace(NUMBER, "0"))


def _next(model: WordModel, words: list[int], h: Tensor | None) -> tuple[Tensor, Tensor]:
    """Probabilities of the word after `words`, and the state there.  -> [V], [1, 1, H]"""
    device = model.embedding.weight.device
    logits, h = model(torch.tensor(words, device=device).view(-1, 1), h)
    return logits[-1, 0].float().softmax(-1), h
