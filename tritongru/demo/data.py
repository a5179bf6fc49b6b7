"""Text for the word model: real English that every Python installation carries, its words, and batches of them."""

import ast
import re
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

UNKNOWN, END, NUMBER = SPECIAL = "<unk>", "<end>", "<num>"

# A dotted or underscored name is one token (mostly <unk>): cut up, its pieces would pass for English words.
_TOKEN = re.compile(r"\w+(?:['’\-_.]\w+)*|[.,;:?!()]")
_PROSE_CHARS = re.compile(r"[A-Za-z ,.;:'’\-]")
_SKIPPED_FOLDERS = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__", "_vendor"}
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)

MIN_WORDS = 2000  # fewer cannot fill the lanes of a batch with more than a few windows
MIN_HELD_OUT = 50  # a perplexity over fewer words says nothing
MAX_CHARACTERS = 8 * 2**20  # some 1.5 million words, more than the demo's minutes can read


class DemoError(Exception):
    """Something the user can put right: shown as one line, without a traceback."""


def tokenise(text: str) -> list[str]:
    """Lower-case words, numbers as one token, and basic punctuation; everything else is dropped."""
    found = _TOKEN.findall(text.lower().replace("’", "'"))
    return [NUMBER if token.replace(".", "").isdigit() else token for token in found]


def paragraphs(text: str) -> list[str]:
    """The blocks between blank lines, each joined into one line."""
    return [joined for block in re.split(r"\n\s*\n", text) if (joined := " ".join(block.split()))]


def is_prose(paragraph: str) -> bool:
    """Whether a paragraph reads as sentences, not as code, a signature, a table or a list of names."""
    if len(paragraph.split()) < 6 or not paragraph[0].isalpha() or ">>>" in paragraph or "|" in paragraph:
        return False
    return len(_PROSE_CHARS.findall(paragraph)) >= 0.96 * len(paragraph)


def standard_library_passages(root: Path | None = None) -> list[str]:
    """Prose of the standard library's documentation strings, in order of path. Modules are parsed, never imported."""
    root = root or Path(sysconfig.get_paths()["stdlib"])
    found: list[str] = []
    for path in sorted(root.rglob("*.py"), key=lambda p: p.relative_to(root).as_posix()):
        if _SKIPPED_FOLDERS.intersection(path.relative_to(root).parts):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError, OSError, RecursionError):
            continue  # templates and unreadable files: the corpus does not hang on any single module
        for node in ast.walk(tree):
            if isinstance(node, _DOCUMENTED):
                found += filter(is_prose, paragraphs(ast.get_docstring(node) or ""))
    return found


def file_passages(path: Path) -> list[str]:
    """The paragraphs of a UTF-8 text file (of its first MAX_CHARACTERS)."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            return paragraphs(file.read(MAX_CHARACTERS))
    except UnicodeDecodeError as error:
        raise DemoError(f"{path} is not UTF-8 text (byte {error.start} does not decode)") from error


class Vocabulary:
    """Words and their numbers; every other word is <unk>."""

    def __init__(self, words: Iterable[str]) -> None:
        self.words = list(words)
        self.index = {word: number for number, word in enumerate(self.words)}

    @classmethod
    def of(cls, tokens: Iterable[str], size: int) -> "Vocabulary":
        """The most frequent, ties in order of spelling, so that the same text always gives the same numbers."""
        counts = Counter(token for token in tokens if token not in SPECIAL)
        ranked = sorted(counts, key=lambda word: (-counts[word], word))
        return cls([*SPECIAL, *ranked[: size - len(SPECIAL)]])

    def encode(self, tokens: Iterable[str]) -> list[int]:
        return [self.index.get(token, self.index[UNKNOWN]) for token in tokens]


class Corpus(NamedTuple):
    """A text cut in two: numbers of the words that train the model, and of those it never sees."""

    name: str
    vocabulary: Vocabulary
    train: list[int]
    held_out: list[int]


def build_corpus(passages: Sequence[str], name: str, vocabulary_size: int) -> Corpus:
    """Drop repeated passages, hold out every twelfth run of neighbours, and number by the other words' frequencies.

    Single paragraphs would leak: a neighbour says much about each. Raises: DemoError where too little is left.
    """
    if len(passages) < 24:  # few blank lines (or none): cut by length instead, so that there is something to hold out
        words = " ".join(passages).split()
        passages = [" ".join(words[i : i + 50]) for i in range(0, len(words), 50)]
    passages = list(dict.fromkeys(passages))
    run = max(1, min(8, len(passages) // 24))
    parts: tuple[list[list[str]], list[list[str]]] = ([], [])
    for number, passage in enumerate(passages):
        parts[number // run % 12 == 6].append([*tokenise(passage), END])
    known = set(map(tuple, parts[0]))  # two paragraphs can differ in case or symbols alone
    train = [token for passage in parts[0] for token in passage]
    held_out = [token for passage in parts[1] if tuple(passage) not in known for token in passage]
    if len(train) < MIN_WORDS or len(held_out) < MIN_HELD_OUT:
        raise DemoError(
            f"{name} is too short: without repeats {len(train):,} words to train on and {len(held_out):,} to hold out "
            f"(every twelfth run of paragraphs), at least {MIN_WORDS:,} and {MIN_HELD_OUT} are needed"
        )
    vocabulary = Vocabulary.of(train, vocabulary_size)
    return Corpus(name, vocabulary, vocabulary.encode(train), vocabulary.encode(held_out))


def lanes(numbers: Sequence[int], batch: int) -> Tensor:
    """One long text as `batch` parallel ones, time first.  # [words // batch, B]"""
    length = len(numbers) // batch
    return torch.tensor(numbers[: length * batch]).view(batch, length).t().contiguous()


def windows(stream: Tensor, window: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Words and the words that follow them, `window` at a time, in reading order, so that h can be carried on."""
    yield from zip(stream[:-1].split(window), stream[1:].split(window), strict=True)
