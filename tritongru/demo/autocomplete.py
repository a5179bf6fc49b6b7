"""The demo's word autocomplete: trained twice, compared, measured against counting, and tried out."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

import tritongru

from .completion import complete
from .data import Corpus, DemoError
from .keystrokes import SHOWN, Keystrokes, model_scores, trigram_scores
from .model_file import HeldOut
from .ngram import Trigram, unigram_perplexity
from .output import can_draw, write_rows
from .screen import Advance, Screen
from .session import Session
from .training import Curve, Sizes, WordModel, build_model, largest_difference, same_parameters, train

PROMPTS = ("return the number of", "if the file does not", "this method is called when the", "the name of the direc")


def backend_of(layer: nn.RNNBase, device: torch.device, time: int, batch: int) -> str:
    """What runs this layer on this device on [time, batch] words, by the layer's own word."""
    if isinstance(layer, tritongru.GRU):
        return tritongru.plan(layer, torch.empty(time, batch, layer.input_size, device=device)).backend
    if device.type == "cuda" and torch.backends.cudnn.enabled:
        return "MIOpen" if torch.version.hip else "cuDNN"
    return "aten"


@dataclass(frozen=True)
class Pair:
    """Both trainings. `names` say which layer and which backend, for every line and column that shows them."""

    names: tuple[str, str]
    curves: tuple[Curve, Curve]
    model: WordModel  # of tritongru.GRU
    same_start: bool

    @property
    def difference(self) -> float:
        return largest_difference(self.curves[0].losses, self.curves[1].losses)

    @property
    def aten(self) -> bool:
        """Whether both ran the same code, PyTorch's own: then losses agree to the bit."""
        return all("backend aten" in name for name in self.names)

    @property
    def good(self) -> bool:
        """Kernels add in another order than cuDNN, so only equal code can be held to equal losses."""
        return self.same_start and (self.difference == 0 or not self.aten)


def train_pair(screen: Screen, corpus: Corpus, sizes: Sizes, device: torch.device, seed: int) -> Pair:
    """The same training on tritongru.GRU and on nn.GRU."""
    shape = (len(corpus.vocabulary), sizes.embedding, sizes.hidden)
    ours, theirs = build_model(*shape, tritongru.GRU, seed), build_model(*shape, nn.GRU, seed)
    same_start = same_parameters(ours, theirs)
    names: list[str] = []
    curves: list[Curve] = []
    for label, model in (("tritongru.GRU", ours), ("torch.nn.GRU", theirs)):
        model.to(device)
        names.append(f"{label} (backend {backend_of(model.layer, device, sizes.window, sizes.batch)})")
        with screen.progress(f"training {names[-1]}", sizes.steps) as advance:

            def report(step: int, loss: float, advance: Advance = advance) -> None:
                advance(step, f"loss {loss:.3f}")

            curves.append(train(model, corpus, sizes, device, report))
    return Pair((names[0], names[1]), (curves[0], curves[1]), ours, same_start)


def show_pair(screen: Screen, pair: Pair, corpus: Corpus, out: Path) -> None:
    """Losses of both by step, held-out perplexity of both and of the baselines; rows and the figure."""
    first, second = pair.curves
    screen.table(
        ["step", "loss tritongru", "loss nn.GRU", "held-out perplexity tritongru", "nn.GRU"],
        [
            [str(step), f"{first.losses[step - 1]:.4f}", f"{second.losses[step - 1]:.4f}", f"{a:.1f}", f"{b:.1f}"]
            for (step, a), (_, b) in zip(first.held_out, second.held_out, strict=True)
        ],
    )
    screen.say(
        f"Same seed, {'identical' if pair.same_start else 'DIFFERENT'} parameters at the start; largest |loss "
        f"difference| over {len(first.losses)} steps: {pair.difference:.3g} nats."
    )
    if pair.aten:
        screen.say(
            "Both ran PyTorch's own code (aten), which is what tritongru.GRU takes on a CPU: the difference has to be "
            f"exactly 0, and it is{'' if pair.good else ' NOT: this is a fault'}."
        )
    found = held_out_figures(pair.model, corpus, first.held_out[-1][1])
    show_held_out(screen, found)
    final, best = first.held_out[-1][1], min(value for _, value in first.held_out)
    if final > 1.1 * best:
        screen.say(f"It was {best:.1f} earlier: the text is so short that the model has begun to learn it by heart.")
    _write_losses(out / "losses.csv", pair)
    if can_draw():
        from . import figures

        named = list(zip(pair.names, pair.curves, strict=True))
        baselines = {"unigram": found.unigram_perplexity, "trigram": found.trigram_perplexity}
        figures.draw_losses(out / "losses.png", named[0], named[1], baselines, pair.difference)


def _write_losses(path: Path, pair: Pair) -> None:
    held_out = [dict(curve.held_out) for curve in pair.curves]
    write_rows(
        path,
        ["step", *(f"loss {name}" for name in pair.names), *(f"held-out perplexity {name}" for name in pair.names)],
        (
            [step, *losses, *(values.get(step, "") for values in held_out)]
            for step, losses in enumerate(zip(*(curve.losses for curve in pair.curves), strict=True), 1)
        ),
    )


def held_out_figures(model: WordModel, corpus: Corpus, perplexity: float) -> HeldOut:
    """Perplexity and keystrokes saved on the held-out words: of the model, and of counting all the other words."""
    vocabulary, numbers = corpus.vocabulary, corpus.held_out
    seen = [*corpus.train, *corpus.validation]
    trigram = Trigram(seen, len(vocabulary))
    frequency = torch.bincount(torch.tensor(seen), minlength=len(vocabulary)).expand(len(numbers), -1)
    keystrokes = Keystrokes(corpus.held_out_spellings, vocabulary)
    scores = {
        "saved": model_scores(model, vocabulary, numbers),
        "trigram_saved": trigram_scores(trigram, vocabulary, numbers),
        "unigram_saved": [frequency],
    }
    return HeldOut(
        words=len(numbers),
        known_fraction=corpus.known_fraction,
        perplexity=perplexity,
        trigram_perplexity=trigram.perplexity(numbers),
        unigram_perplexity=unigram_perplexity(seen, numbers, len(vocabulary)),
        perfect_saved=keystrokes.saved(keystrokes.perfect()),
        **{name: keystrokes.saved(keystrokes.using(of)) for name, of in scores.items()},
    )


def show_held_out(screen: Screen, found: HeldOut) -> None:
    """The model beside counting, and where it is not better."""
    rows = (
        ("GRU", f"{found.perplexity:.1f}", found.saved),
        ("words after the two before (Kneser-Ney trigram)", f"{found.trigram_perplexity:.1f}", found.trigram_saved),
        ("frequent words (unigram)", f"{found.unigram_perplexity:.1f}", found.unigram_saved),
        ("the right word always shown", "", found.perfect_saved),
    )
    screen.table(
        [f"on {found.words:,} held-out words", "perplexity", "keystrokes saved"],
        [[name, perplexity, f"{saved:.1%}"] for name, perplexity, saved in rows],
    )
    in_perplexity, in_keystrokes = (
        "better" if better else "NOT better"
        for better in (found.perplexity < found.trigram_perplexity, found.saved > found.trigram_saved)
    )
    screen.say(
        f"Lower perplexity is better. Keystrokes: {SHOWN} words shown, the right one taken as soon as it is there. "
        f"The GRU is {in_perplexity} than the trigram in perplexity and {in_keystrokes} in keystrokes."
    )


def show_completion(screen: Screen, session: Session, prompt: str) -> None:
    """Suggestions with their probability, the continuation, and what the model could not read."""
    completion = complete(session, prompt)
    words = "  ".join(f"{word} {probability:.2f}" for word, probability in completion.words)
    about = f" (words that begin with '{completion.partial}')" if completion.partial else ""
    screen.say(f'  "{prompt}" ->{about} {words}')
    screen.say(f"      going on with the likeliest: {completion.continuation}")
    if completion.unknown:
        screen.say(f"      not in the vocabulary, read as <unk>: {', '.join(completion.unknown)}")


def interact(screen: Screen, session: Session) -> None:
    """Complete what is typed until it ends or a line is empty: as one types on a terminal, else line by line."""
    read: Callable[[], str] = partial(input, "> ")
    if sys.stdin.isatty() and sys.stdout.isatty():
        try:
            from . import typing_aid
        except ModuleNotFoundError as error:
            if error.name != "prompt_toolkit":
                raise
            screen.say("Line by line: suggestions as you type need prompt_toolkit (pip install 'tritongru[demo]').")
        else:
            read = partial(typing_aid.read_line, typing_aid.prompt_session(session))
    screen.say("Type the beginning of a sentence; an empty line ends.")
    while True:
        try:
            line = read()
        except EOFError:
            return
        except UnicodeDecodeError as error:
            raise DemoError("the input is not text in the terminal's encoding") from error
        if not line.strip():
            return
        try:
            show_completion(screen, session, line.strip())
        except DemoError as error:
            screen.say(f"  {error}")
