"""The demo's word autocomplete: trained twice, compared, measured against counting, and tried out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

import tritongru

from .completion import complete
from .data import Corpus, DemoError
from .ngram import Trigram, unigram_perplexity
from .output import can_draw, write_rows
from .screen import Advance, Screen
from .training import Curve, Sizes, WordModel, build_model, largest_difference, same_parameters, train

PROMPTS = ("return the number of", "if the file does not", "this method is called when the", "the name of the direc")


def backend_of(layer: nn.RNNBase, device: torch.device) -> str:
    """What runs this layer on this device, by the layer's own word."""
    if isinstance(layer, tritongru.GRU):
        return tritongru.plan(layer, torch.empty(4, 4, layer.input_size, device=device)).backend
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
        names.append(f"{label} (backend {backend_of(model.layer, device)})")
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
    unigram = unigram_perplexity(corpus.train, corpus.held_out, len(corpus.vocabulary))
    trigram = Trigram(corpus.train, len(corpus.vocabulary)).perplexity(corpus.held_out)
    final, best = first.held_out[-1][1], min(value for _, value in first.held_out)
    screen.say(
        f"Held-out perplexity (lower is better): {final:.1f}; counting words alone (unigram): {unigram:.1f}; counting "
        f"words after the two before (Kneser-Ney trigram): {trigram:.1f}. The GRU is "
        f"{'better' if final < trigram else 'not better'} than the trigram."
    )
    if final > 1.1 * best:
        screen.say(f"It was {best:.1f} earlier: the text is so short that the model has begun to learn it by heart.")
    _write_losses(out / "losses.csv", pair)
    if can_draw():
        from . import figures

        named = list(zip(pair.names, pair.curves, strict=True))
        baselines = {"unigram": unigram, "trigram": trigram}
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


def show_completion(screen: Screen, model: WordModel, corpus: Corpus, prompt: str) -> None:
    """Suggestions with their probability, the continuation, and what the model could not read."""
    completion = complete(model, corpus.vocabulary, prompt)
    words = "  ".join(f"{word} {probability:.2f}" for word, probability in completion.words)
    about = f" (words that begin with '{completion.partial}')" if completion.partial else ""
    screen.say(f'  "{prompt}" ->{about} {words}')
    screen.say(f"      going on with the likeliest: {completion.continuation}")
    if completion.unknown:
        screen.say(f"      not in the vocabulary, read as <unk>: {', '.join(completion.unknown)}")


def interact(screen: Screen, model: WordModel, corpus: Corpus) -> None:
    """Complete lines from stdin until it ends or a line is empty."""
    screen.say("Type the beginning of a sentence; an empty line ends.")
    while True:
        try:
            line = input("> ")
        except EOFError:
            return
        except UnicodeDecodeError as error:
            raise DemoError("the input is not text in the terminal's encoding") from error
        if not line.strip():
            return
        try:
            show_completion(screen, model, corpus, line.strip())
        except DemoError as error:
            screen.say(f"  {error}")
