"""A trained autocomplete in one file: written whole or not at all, and read as data, never as code.

What is read is somebody's file: everything in it is checked before it is used, and what is wrong is said in one line.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import __version__
from .data import DemoError, Vocabulary
from .output import replacing
from .training import MakeLayer, WordModel

FORMAT = "tritongru demo autocomplete"
VERSION = 1
_ARCHIVE = b"PK\3\4"  # how what torch.save writes begins
_EXPECTED = "expected a model written by `python -m tritongru demo --save`"


@dataclass(frozen=True)
class HeldOut:
    """What a model reaches on the words that were held out, beside counting: perplexity, share of keystrokes saved."""

    words: int
    known_fraction: float
    perplexity: float
    trigram_perplexity: float
    unigram_perplexity: float
    saved: float
    trigram_saved: float
    unigram_saved: float
    perfect_saved: float  # with the right word always shown at once


@dataclass(frozen=True)
class Saved:
    """A model, the words it knows, and where it comes from."""

    model: WordModel
    vocabulary: Vocabulary
    text: str  # the name of what it was trained on
    held_out: HeldOut
    package: str = __version__  # of tritongru, which trained it


def write(path: Path, saved: Saved) -> None:
    """Write a model's file. Raises: OSError where it cannot be written; an old file is then as it was."""
    content = {
        "format": FORMAT,
        "version": VERSION,
        "package": saved.package,
        "text": _printable(saved.text),
        "vocabulary": saved.vocabulary.words,
        "sizes": {"embedding": saved.model.layer.input_size, "hidden": saved.model.layer.hidden_size},
        "parameters": {name: tensor.detach().cpu() for name, tensor in saved.model.state_dict().items()},
        "held_out": asdict(saved.held_out),
    }
    buffer = io.BytesIO()  # torch.save reports a full disk as a RuntimeError, a plain write as what it is
    torch.save(content, buffer)
    with replacing(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def read(path: Path, make_layer: MakeLayer) -> Saved:
    """Read a model's file, onto the CPU, whatever it was trained on.

    Raises: DemoError that names the file, what was expected and what came.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(len(_ARCHIVE))
            if raw == _ARCHIVE:  # anything else, of any length, need not be read
                raw += file.read()
    except OSError as error:
        raise DemoError(f"cannot read {path}: {error.strerror or error}") from error
    if not raw:
        raise DemoError(f"{path}: {_EXPECTED}, got an empty file")
    if not raw.startswith(_ARCHIVE):
        raise DemoError(f"{path}: {_EXPECTED}, got a file of another kind")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch thinks of a foreign pickle
            content = torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
    except Exception as error:  # there is no end to what a damaged or foreign file makes of a reader
        what = "a damaged, cut-off or foreign archive: torch.load(weights_only=True) refuses it"
        raise DemoError(f"{path}: {_EXPECTED}, got {what}") from error
    try:
        return _checked(content, make_layer)
    except _NotAsExpectedError as error:
        raise DemoError(f"{path}: {error}") from error


class _NotAsExpectedError(Exception):
    """What was expected and what came."""


def _checked(content: Any, make_layer: MakeLayer) -> Saved:
    if not isinstance(content, dict):
        raise _NotAsExpectedError(f"{_EXPECTED}, got a {type(content).__name__}")
    if content.get("format") != FORMAT:
        names = ", ".join(_printable(str(name))[:40] for name in list(content)[:3])
        raise _NotAsExpectedError(f"{_EXPECTED}, got a dictionary of {names or 'nothing'}")
    version = content.get("version")
    if type(version) is not int or version < 1:
        raise _NotAsExpectedError(f"expected a version from 1 to {VERSION}, got {_shown(version)}")
    if version > VERSION:
        raise _NotAsExpectedError(
            f"expected version {VERSION}, got {version}: a later tritongru wrote it ({_shown(content.get('package'))})"
        )
    missing = {"package", "text", "vocabulary", "sizes", "parameters", "held_out"} - content.keys()
    if missing:
        raise _NotAsExpectedError(f"{_EXPECTED}, got one without {', '.join(sorted(missing))}")
    for name in ("package", "text"):
        if not isinstance(content[name], str) or not content[name].isprintable():
            raise _NotAsExpectedError(f"expected a line of text as {name}, got {_shown(content[name])}")
    vocabulary = _vocabulary(content["vocabulary"])
    model = _model(content["parameters"], content["sizes"], len(vocabulary), make_layer)
    return Saved(model, vocabulary, content["text"], _held_out(content["held_out"]), content["package"])


def _vocabulary(words: Any) -> Vocabulary:
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise _NotAsExpectedError("expected a vocabulary that is a list of words, got something else")
    try:
        return Vocabulary.of(words)
    except ValueError as error:
        raise _NotAsExpectedError(str(error)) from error


def _model(parameters: Any, sizes: Any, V: int, make_layer: MakeLayer) -> WordModel:
    """The model, once every tensor of it has the name, the shape and the kind that it must have."""
    if not isinstance(sizes, dict) or not all(_is_count(sizes.get(name)) for name in ("embedding", "hidden")):
        raise _NotAsExpectedError(f"expected sizes of embedding and hidden from 1 to 2**20, got {_shown(sizes)}")
    I, H = sizes["embedding"], sizes["hidden"]
    with torch.device("meta"):  # shapes alone: sizes out of a damaged file could ask for all memory
        expected = {name: tensor.shape for name, tensor in WordModel(V, I, H, make_layer).state_dict().items()}
    if not isinstance(parameters, Mapping) or parameters.keys() != expected.keys():
        came = sorted(map(str, parameters)) if isinstance(parameters, Mapping) else [type(parameters).__name__]
        got = _printable(", ".join(came))[:200]
        raise _NotAsExpectedError(f"expected parameters {', '.join(sorted(expected))}, got {got}")
    for name, shape in expected.items():
        tensor = parameters[name]
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.device.type != "cpu":
            raise _NotAsExpectedError(f"expected {name} to be a dense tensor, got {type(tensor).__name__}")
        if tensor.shape != shape or tensor.dtype != torch.float32:
            raise _NotAsExpectedError(
                f"expected {name} to be float32 {list(shape)} for a vocabulary of {V}, embedding {I} and hidden {H}, "
                f"got {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
            )
        # A view that repeats a few numbers could have any shape in a file of any size.
        if not tensor.is_contiguous() or not tensor.isfinite().all():
            raise _NotAsExpectedError(f"expected {name} to be finite numbers, got NaN, infinity or a view")
    model = WordModel(V, I, H, make_layer)
    model.load_state_dict(dict(parameters))
    return model


def _held_out(figures: Any) -> HeldOut:
    names = [field.name for field in fields(HeldOut)]
    if not isinstance(figures, dict) or sorted(map(str, figures)) != sorted(names):
        raise _NotAsExpectedError(f"expected the held-out figures {', '.join(names)}, got {_shown(figures)}")
    for name in names:
        if type(figures[name]) not in (int, float) or not math.isfinite(figures[name]):
            raise _NotAsExpectedError(f"expected a finite number as held-out {name}, got {_shown(figures[name])}")
    return HeldOut(**figures)


def _is_count(value: Any) -> bool:
    return type(value) is int and 1 <= value <= 2**20


def _shown(value: Any) -> str:
    """Something out of a file, short and harmless to a terminal."""
    return _printable(repr(value))[:80]


def _printable(text: str) -> str:
    return "".join(letter if letter.isprintable() else "?" for letter in text)
