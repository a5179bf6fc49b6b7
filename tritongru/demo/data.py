"""Text for the word model: prose that every Python installation carries, its words, and batches of them.

The standard library's documentation is real English, is on every machine, and needs no network and no licence question.
Modules are read as text and parsed, never imported: importing some of them opens windows or prints poems.
"""

from __future__ import annotations

import ast
import codecs
import re
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import torch

_Passage = TypeVar("_Passage")

UNKNOWN, END, NUMBER = "<unk>", "<end>", "<num>"
SPECIAL = (UNKNOWN, END, NUMBER)

# A dotted or underscored name is one token (mostly <unk>): cut up, its pieces would pass for English words.
_TOKEN = re.compile(r"\w+(?:['’\-_.]\w+)*|[.,;:?!()]")
# What a text ends with while a word is typed: "don'" is the beginning of "don't", but a dot ends a sentence. A letter
# can be matched in one way only (_ is in \w), so that no text takes long to be refused.
_UNFINISHED = re.compile(r"(?<!\w)\w+(?:['\-.]\w+)*['\-]?\Z")
_PROSE_CHARS = re.compile(r"[A-Za-z ,.;:'’\-]")
_SKIPPED_FOLDERS = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__", "_vendor"}
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)

MIN_WORDS = 2000  # fewer cannot fill the lanes of a batch with more than a few windows
MIN_HELD_OUT = 50  # a perplexity over fewer words says nothing
MAX_BYTES = 8 * 2**20  # some 1.5 million words, more than the demo's minutes can read


class DemoError(Exception):
    """Something the user can put right: shown as one line, without a traceback."""


def spellings(text: str) -> list[str]:
    """Lower-case words, numbers and basic punctuation as they are typed; everything else is dropped."""
    return _TOKEN.findall(_lower(text))


def _lower(text: str) -> str:
    return text.lower().replace("’", "'")


def token_of(spelling: str) -> str:
    """The spelling itself, or for every number the one token that stands for all of them."""
    return NUMBER if spelling.replace(".", "").isdigit() else spelling


def tokenise(text: str) -> list[str]:
    """Lower-case words, numbers as one token, and basic punctuation; everything else is dropped."""
    return [token_of(spelling) for spelling in spellings(text)]


def typed_so_far(text: str) -> tuple[list[str], str]:
    """The tokens of the finished words, and the letters of the word at the end that is still being typed, or ""."""
    text = _lower(text)
    found = _UNFINISHED.search(text)
    return (tokenise(text), "") if found is None else (tokenise(text[: found.start()]), found[0])


def paragraphs(text: str) -> Iterator[str]:
    """The blocks between blank lines, each joined into one line."""
    for block in re.split(r"\n\s*\n", text):
        joined = " ".join(block.split())
        if joined:
            yield joined


def is_prose(paragraph: str) -> bool:
    """Whether a paragraph reads as sentences, not as code, a signature, a table or a list of names."""
    if len(paragraph.split()) < 6 or not paragraph[0].isalpha() or ">>>" in paragraph or "|" in paragraph:
        return False
    return len(_PROSE_CHARS.findall(paragraph)) >= 0.96 * len(paragraph)


def _strings(tree: ast.Module, path: Path) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, _DOCUMENTED):
            docstring = ast.get_docstring(node)
            if docstring:
                yield docstring
    if path.parts[-2:] == ("pydoc_data", "topics.py"):  # the texts behind help("..."): values of one dictionary
        for node in ast.walk(tree):
            if isinstance(node, ast.Dict):
                for value in node.values:
                    if isinstance(value, ast.Constant) and isinstance(value.value, str):
                        yield value.value


def standard_library_passages(root: Path | None = None) -> list[str]:
    """Prose paragraphs of the standard library's documentation strings, in order of module path, without repeats."""
    if root is None:
        root = Path(sysconfig.get_paths()["stdlib"])
    seen: dict[str, None] = {}
    for path in sorted(root.rglob("*.py"), key=lambda p: p.relative_to(root).as_posix()):
        if _SKIPPED_FOLDERS.intersection(path.relative_to(root).parts):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError, OSError, RecursionError):
            continue  # templates and unreadable files: the corpus does not hang on any single module
        for text in _strings(tree, path):
            seen.update(dict.fromkeys(p for p in paragraphs(text) if is_prose(p)))
    if not seen:
        raise DemoError(f"no documentation strings under {root}: give a text of your own with --text FILE")
    return list(seen)


def file_passages(path: Path) -> list[str]:
    """The paragraphs of a UTF-8 text file (of its first MAX_BYTES)."""
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise DemoError(f"cannot read {path}: {error.strerror or error}") from error
    if not raw.strip():
        raise DemoError(f"{path} is empty")
    if b"\0" in raw:
        raise DemoError(f"{path} holds NUL bytes: a binary file, not a text")
    whole = len(raw) <= MAX_BYTES
    try:  # a cut may fall inside a character: only a whole file has to end with a complete one
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(raw[:MAX_BYTES], final=whole)
    except UnicodeDecodeError as error:
        raise DemoError(f"{path} is not UTF-8 text (byte {error.start} does not decode)") from error
    return list(paragraphs(text))


class Vocabulary:
    """The most frequent words and their numbers; every other word is <unk>."""

    def __init__(self, tokens: Iterable[str], size: int) -> None:
        counts = Counter(tokens)
        for word in SPECIAL:
            counts.pop(word, None)
        # Ties in frequency are broken by spelling, so that the same text always gives the same numbers.
        ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        self._set([*SPECIAL, *(word for word, _ in ranked[: max(0, size - len(SPECIAL))])])

    @classmethod
    def of(cls, words: Sequence[str]) -> Vocabulary:
        """The vocabulary of these words, in this order.

        Raises: ValueError where they do not begin with `SPECIAL`, repeat, or are no words that `tokenise` gives.
        """
        if tuple(words[: len(SPECIAL)]) != SPECIAL:
            raise ValueError(f"expected a vocabulary that begins with {', '.join(SPECIAL)}")
        if len(set(words)) < len(words):
            twice = next(word for word, count in Counter(words).items() if count > 1)
            raise ValueError(f"expected every word once, got {twice!r} again")
        for word in words[len(SPECIAL) :]:
            if tokenise(word) != [word]:  # nothing that could steer a terminal either
                raise ValueError(f"expected words, got {word!r}")
        vocabulary = cls((), 0)
        vocabulary._set(words)
        return vocabulary

    def _set(self, words: Sequence[str]) -> None:
        self.words: list[str] = list(words)
        self.index: dict[str, int] = {word: number for number, word in enumerate(self.words)}
        # What is worth suggesting: not punctuation, which is one key anyway, nor a token that nobody types.
        self.suggested: list[int] = [
            number
            for number, word in enumerate(self.words)
            if word not in SPECIAL and any(letter.isalpha() for letter in word)
        ]

    def __len__(self) -> int:
        return len(self.words)

    def __contains__(self, word: str) -> bool:
        return word in self.index

    def encode(self, tokens: Iterable[str]) -> list[int]:
        unknown = self.index[UNKNOWN]
        return [self.index.get(token, unknown) for token in tokens]


@dataclass(frozen=True)
class Corpus:
    """A text cut in two: numbers of the words that train the model, and of those it never sees."""

    name: str
    vocabulary: Vocabulary
    train: list[int]
    held_out: list[int]
    held_out_spellings: list[str]  # the same words as they are typed, END where a paragraph ends
    validation: list[int]  # neither trained on nor held out: by which a training chooses, empty where none does

    @property
    def known_fraction(self) -> float:
        """Of the held-out words, how many are in the vocabulary."""
        return 1 - self.held_out.count(self.vocabulary.index[UNKNOWN]) / len(self.held_out)


def split_passages(
    passages: Sequence[_Passage], block: int = 8, every: int = 12
) -> tuple[list[_Passage], list[_Passage]]:
    """Keep every `every`-th run of `block` neighbouring passages for the held-out part.

    Neighbours go together: a paragraph's continuation says much about it, so single paragraphs would leak.
    """
    # A short text still gets several runs to choose from.
    block = max(1, min(block, len(passages) // (2 * every)))
    train: list[_Passage] = []
    held_out: list[_Passage] = []
    for number, passage in enumerate(passages):
        (held_out if (number // block) % every == every // 2 else train).append(passage)
    return train, held_out


def _with_ends(passages: Iterable[str]) -> list[list[str]]:
    return [[*spellings(passage), END] for passage in passages]


def _tokens(passages: Iterable[Sequence[str]]) -> list[str]:
    return [token_of(spelling) for passage in passages for spelling in passage]


def _too_little(
    given: Iterable[list[str]], left: Iterable[list[str]], put_aside: Iterable[list[str]], held_out: Iterable[list[str]]
) -> str:
    """Why what is left of a text is not enough."""
    words, words_left, words_aside, words_held_out = (
        sum(len(passage) - 1 for passage in part) for part in (given, left, put_aside, held_out)
    )
    if not words:
        return "holds no words, only other characters"
    if words < MIN_WORDS:
        return f"is too short: {words:,} words, at least {MIN_WORDS:,} are needed"
    if words_left < MIN_WORDS:
        return f"repeats itself: {words_left:,} of {words:,} words without repeats, at least {MIN_WORDS:,} are needed"
    if words_aside < MIN_HELD_OUT:
        return (
            f"has its words in too few paragraphs: every twelfth is held out, {words_aside:,} words in all, at least "
            f"{MIN_HELD_OUT} are needed"
        )
    return (
        f"repeats itself: of {words_aside:,} words to hold out all but {words_held_out:,} are trained on as well, at "
        f"least {MIN_HELD_OUT} are needed"
    )


def build_corpus(passages: Sequence[str], name: str, vocabulary_size: int, with_validation: bool = False) -> Corpus:
    """Drop repeated passages, split, and number by the training part's frequencies.

    The held-out part does not depend on `with_validation`, which takes its part from what is trained on.

    Raises: DemoError for a text of which too little is left to train on, or to hold out.
    """
    given, passages = passages, list(dict.fromkeys(passages))
    if len(passages) < 24:  # few blank lines (or none): cut by length instead, so that there is something to hold out
        words = " ".join(passages).split()
        passages = [" ".join(words[i : i + 50]) for i in range(0, len(words), 50)]
    train, held_out = (_with_ends(part) for part in split_passages(passages))
    # Two paragraphs can differ in case or symbols alone and be the same words: those would not be held out at all.
    known = {tuple(_tokens([passage])) for passage in train}
    put_aside, held_out = held_out, [passage for passage in held_out if tuple(_tokens([passage])) not in known]
    held_out_words, words_of_all = _tokens(held_out), _tokens(train)
    if len(words_of_all) + len(held_out_words) < MIN_WORDS or len(held_out_words) < MIN_HELD_OUT:
        raise DemoError(f"{name} {_too_little(_with_ends(given), [*train, *held_out], put_aside, held_out)}")
    vocabulary = Vocabulary(words_of_all, vocabulary_size)
    validation: list[str] = []
    if with_validation:
        kept, put_aside = split_passages(train, block=4, every=16)
        words_of_all, validation = _tokens(kept), _tokens(put_aside)
    return Corpus(
        name,
        vocabulary,
        vocabulary.encode(words_of_all),
        vocabulary.encode(held_out_words),
        [spelling for passage in held_out for spelling in passage],
        vocabulary.encode(validation),
    )


def lanes(numbers: Sequence[int], batch: int) -> torch.Tensor:
    """One long text as `batch` parallel ones, time first.  # [words // batch, B]"""
    import torch

    length = len(numbers) // batch
    return torch.tensor(numbers[: length * batch], dtype=torch.long).view(batch, length).t().contiguous()


def windows(stream: torch.Tensor, window: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Words and the words that follow them, `window` at a time, in reading order, so that h can be carried on."""
    for start in range(0, stream.shape[0] - 1, window):
        stop = min(start + window, stream.shape[0] - 1)
        yield stream[start:stop], stream[start + 1 : stop + 1]
