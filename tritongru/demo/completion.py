"""Completing what a user has typed: the next word, the rest of a word, and a continuation."""

from __future__ import annotations

from dataclasses import dataclass

from .data import END, NUMBER, UNKNOWN, DemoError, tokenise, typed_so_far
from .session import Session

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


def complete(session: Session, prompt: str, count: int = 5, length: int = 12) -> Completion:
    """The likeliest next words after a prompt, where the session then is, and the greedy continuation from there.

    A last word that the vocabulary lacks, but that begins some of its words, is taken as unfinished: then those words
    compete, and the probabilities are among them.

    Raises: DemoError for a prompt without words.
    """
    check_prompt(prompt)
    vocabulary = session.vocabulary
    tokens, letters = typed_so_far(prompt)
    session.go_to(tokens)
    words = session.suggest(letters, count) if letters not in vocabulary else []
    partial = letters if letters and words else None
    if letters and partial is None:
        session.go_to([*tokens, *tokenise(letters)])
    words = words or session.suggest(count=count)
    at_prompt, unknown = list(session.words), session.unknown

    going_on = [word for word, _ in words[:1]]
    while going_on and len(going_on) < length:
        session.push(going_on[-1])
        probabilities = session.probabilities.clone()
        probabilities[vocabulary.index[UNKNOWN]] = -1  # greedy, but never through a word it cannot name
        following = vocabulary.words[int(probabilities.argmax())]
        if following == END:
            break
        going_on.append(following)
    session.go_to(at_prompt)
    return Completion(prompt, unknown, partial, words, join(going_on).replace(NUMBER, "0"))
