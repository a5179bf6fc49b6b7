"""Suggestions while one types, on a terminal. prompt_toolkit is optional: this module is imported where it is there."""

from __future__ import annotations

from collections.abc import Iterator

from prompt_toolkit import PromptSession
from prompt_toolkit.application import get_app
from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document
from prompt_toolkit.input import Input
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import Output

from .data import typed_so_far
from .keystrokes import SHOWN
from .session import Session


class Suggestions(Completer):
    """The words that go on from what is typed: of the word begun, or the next one after a space."""

    def __init__(self, session: Session) -> None:
        self.session = session

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterator[Completion]:
        """The likeliest first, each with its probability; accepting one adds its missing letters and a space."""
        words, partial = typed_so_far(document.text_before_cursor)
        self.session.go_to(words)
        for word, probability in self.session.suggest(partial, SHOWN):
            # Letters are only added: what the user has typed stays as it is, capitals too.
            yield Completion(word[len(partial) :] + " ", display=word, display_meta=f"{probability:.2f}")


def _toolbar(session: Session) -> str:
    words, _ = typed_so_far(get_app().current_buffer.document.text_before_cursor)
    unknown = dict.fromkeys(word for word in words if word not in session.vocabulary)
    said = f"read as <unk>: {', '.join(unknown)}   " if unknown else ""  # first: a narrow terminal cuts the end off
    return f"{said}tab: take the word   enter: go on from here   ctrl-d: end"


def _keys() -> KeyBindings:
    keys = KeyBindings()

    @keys.add("tab")
    def _(event: KeyPressEvent) -> None:
        buffer, shown = event.current_buffer, event.current_buffer.complete_state
        if shown is not None and shown.completions:
            buffer.apply_completion(shown.current_completion or shown.completions[0])
        else:
            buffer.start_completion()

    @keys.add("backspace")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.delete_before_cursor()
        event.current_buffer.start_completion()  # prompt_toolkit itself suggests after insertions alone

    return keys


def prompt_session(session: Session, input: Input | None = None, output: Output | None = None) -> PromptSession[str]:
    """What reads lines with suggestions. A terminal unless another input and output are given."""
    return PromptSession(
        "> ",
        completer=Suggestions(session),
        complete_while_typing=True,
        reserve_space_for_menu=SHOWN + 1,
        bottom_toolbar=lambda: _toolbar(session),
        key_bindings=_keys(),
        input=input,
        output=output,
    )


def suggest_at_once() -> None:
    """Before the first key."""
    get_app().current_buffer.start_completion()


def read_line(prompt: PromptSession[str]) -> str:
    """One line, with suggestions from the start. Raises: EOFError at ctrl-d, KeyboardInterrupt at ctrl-c."""
    return prompt.prompt(pre_run=suggest_at_once)
