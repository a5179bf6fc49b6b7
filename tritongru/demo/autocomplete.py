"""The demo's word autocomplete: what it suggests, word by word, and the file in which a trained one is kept."""

import io
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

import tritongru

from ..tools.files import replacing
from .data import END, SPECIAL, DemoError, Vocabulary, tokenise
from .training import WordModel

PROMPTS = ("return the number of", "if the file does not", "this method is called when the", "the name of the direc")


class Autocomplete:
    """A text as it is typed: every word is one step of the layer (T = 1, B = 1) from the state that is carried on."""

    def __init__(self, model: WordModel, vocabulary: Vocabulary, about: str = "") -> None:
        self.model, self.vocabulary, self.about = model, vocabulary, about
        # Worth suggesting: not punctuation, which is one key anyway, nor a token that nobody types.
        self.able = [w for w in vocabulary.words if w not in SPECIAL and any(map(str.isalpha, w))]
        self.begin()

    def begin(self) -> None:
        """Be where a paragraph has ended."""
        self.h: Tensor | None = None
        self.read([END])

    @torch.no_grad()
    def read(self, words: Sequence[str]) -> None:
        """Go on by these words."""
        for number in self.vocabulary.encode(words):
            word = torch.tensor([[number]], device=self.model.bias.device)
            logits, self.h = self.model(word, self.h)
            self.probabilities = logits[0, 0].softmax(-1).cpu()  # of every word to be the next one  [V]

    def suggest(self, beginning: str = "", count: int = 5) -> list[tuple[str, float]]:
        """The likeliest words that begin so and go on from there, each with its probability among those that do."""
        words = [word for word in self.able if word.startswith(beginning) and word != beginning]
        p = self.probabilities[self.vocabulary.encode(words)]
        best = (p / p.sum().clamp_min(1e-30) if beginning else p).topk(min(count, len(words)))
        return [(words[i], value) for i, value in zip(best.indices.tolist(), best.values.tolist(), strict=True)]

    def complete(self, text: str) -> str:
        """Read a text and say what is suggested. Raises: DemoError for one without words.

        A last word outside the vocabulary that begins some of its words is taken as unfinished, and not read.
        """
        tokens, known = tokenise(text), self.vocabulary.index
        if not tokens:
            raise DemoError(f"nothing to complete in {text!r}: it has no words")
        unfinished = text[-1].isalnum() and tokens[-1] not in known and any(w.startswith(tokens[-1]) for w in self.able)
        beginning = tokens.pop() if unfinished else ""
        self.read(tokens)
        words = "  ".join(f"{word} {p:.2f}" for word, p in self.suggest(beginning))
        about = f"words that begin with '{beginning}': " if beginning else ""
        unknown = ", ".join(word for word in tokens if word not in known)
        return f'  "{text}" -> {about}{words}' + (f"  (read as <unk>: {unknown})" if unknown else "")

    def demonstrate(self) -> None:
        """Print what is suggested after some beginnings."""
        for prompt in PROMPTS:
            print(self.complete(prompt))
            self.begin()

    def interact(self) -> None:
        """Complete what is typed, line after line: a text that goes on, until an empty line begins another one."""
        print("Type the beginning of a sentence. The next line goes on from it; an empty one begins anew; ctrl-d ends.")
        line = ""
        while True:
            try:
                line = input("... " if line else "> ").strip()
                print(self.complete(line)) if line else self.begin()
            except (DemoError, UnicodeDecodeError) as error:
                print(f"  {error}")
            except EOFError:
                return


def save(path: Path, typed: Autocomplete) -> None:
    """Write a model's file. Raises: OSError where it cannot be written; an old file is then as it was."""
    content = {
        "model": {name: tensor.cpu() for name, tensor in typed.model.state_dict().items()},
        "sizes": (typed.model.layer.input_size, typed.model.layer.hidden_size),
        "vocabulary": typed.vocabulary.words,
        "about": "".join(letter if letter.isprintable() else "?" for letter in typed.about),
    }
    buffer = io.BytesIO()  # torch.save reports a full disk as a RuntimeError, a plain write as what it is
    torch.save(content, buffer)
    with replacing(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def load(path: Path, device: torch.device) -> Autocomplete:
    """Read a model's file as data, never as code. Raises: OSError; DemoError for another kind of file."""
    with path.open("rb") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what torch thinks of a foreign pickle
        try:
            content = torch.load(file, map_location="cpu", weights_only=True)
            words, about, (embedding, hidden) = content["vocabulary"], content["about"], content["sizes"]
            if tuple(words[: len(SPECIAL)]) != SPECIAL or not "".join([*words, about]).isprintable():
                raise ValueError("another vocabulary, or one that steers a terminal")
            with torch.device("meta"):  # sizes out of a damaged file could ask for all memory
                model = WordModel(len(words), embedding, hidden, tritongru.GRU)
            model.load_state_dict({name: tensor.float() for name, tensor in content["model"].items()}, assign=True)
            return Autocomplete(model.to(device), Vocabulary(words), about)
        except Exception as error:  # there is no end to what a damaged or foreign file makes of a reader
            kind = f"another or a damaged one ({type(error).__name__})"
            raise DemoError(f"{path}: expected a file of `demo --save`, got {kind}") from error
