"""The networks that the story is about, trained on the same texts and asked the same questions, a row per answer.

Each is a language model of every next word: its answers are the likeliest of ALL words, not a choice among cuisines.
All take as many steps, and of some learning rates the one with the least loss on held-out texts.
"""

import dataclasses
import multiprocessing
import random
import signal
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import lru_cache
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.benchmark import Timer

import tritongru

from ..tools.gates import Gates
from .data import END, Vocabulary, tokenise
from .story import CUISINE, DISHES, EXPECTED, FIRST, QUESTION, SECOND, Recipe, Text, generate
from .training import MakeLayer, WordModel, descend

Row = dict[str, object]
COLUMNS = (
    "seed", "model", "cell", "input", "hidden", "parameters", "rate", "measure", "at", "right", "asked", "value",
)  # fmt: skip
WORD_COLUMNS = ("seed", "hidden", "place", "word", "r", "z", "like samosa", "like pasta", "P(indian)", "P(italian)")
_BLANK: Row = dict.fromkeys(COLUMNS, "")
TRAINED = tuple(range(7, 31))  # words between a dish and its cuisine
SHORT = tuple(range(7, 11))  # the widest mixture from 7 on that a basic RNN was seen to learn


@dataclass(frozen=True)
class Sizes:
    """What sets how long `demo --story --seeds N` takes: a seed about three minutes on two CPU cores."""

    texts: int = 32_000
    held_out: int = 200
    batch: int = 16
    steps: int = 2000
    rates: tuple[float, ...] = (0.003, 0.01)
    gaps: tuple[int, ...] = (7, 10, 12, 15, 20, 30, 40, 60, 100, 150, 200)
    switches: tuple[int, ...] = (0, 1, 2, 3)
    asked: int = 200  # texts for each gap, and for each number of switches


ONE_SEED = Sizes(texts=25_600, steps=1600)  # of `demo --story` alone, which somebody waits for
SHORTEST = Sizes(texts=11_200, steps=700, rates=(0.01,), gaps=(7, 15, 30, 60), asked=100)  # of `demo`: ten seconds
EMBEDDING = 32
# One word in twenty is a cuisine, and the others are easier: without weight they take all the learning.
WEIGHT_OF_CUISINES = 20.0
RETAIN = 2.0  # as `begin_retaining` has it


@dataclass(frozen=True)
class Network:
    """One that is trained on texts with these `gaps`, `without` which gate."""

    name: str
    cell: str
    hidden: int = 32
    without: str = ""
    gaps: Sequence[int] = TRAINED

    @property
    def recipe(self) -> Recipe:
        return Recipe(self.gaps, (0, 1, 2, 3), again=True)


RNN, LSTM, GRU = (Network(cell, cell) for cell in ("RNN", "LSTM", "GRU"))
RNN_EQUAL, LSTM_EQUAL = Network("RNN, equal parameters", "RNN", 59), Network("LSTM, equal parameters", "LSTM", 27)
# How far a memory reaches that learned to hold a dish at all: over all of TRAINED a basic RNN learns nothing.
RNN_SHORT = Network("RNN, equal parameters, trained on gaps of 7 to 10", "RNN", 59, gaps=SHORT)
GRU_SHORT = Network("GRU, trained on gaps of 7 to 10", "GRU", gaps=SHORT)
NO_RESET = Network("GRU trained with r = 1", "GRU", without="reset")
NO_UPDATE = Network("GRU trained with constant z", "GRU", without="update")
NETWORKS = (GRU, NO_RESET, NO_UPDATE, LSTM, LSTM_EQUAL, RNN_EQUAL, RNN, GRU_SHORT, RNN_SHORT)  # the slowest first
TRIGRAM = "trigram"
MODELS = (*(network.name for network in NETWORKS), TRIGRAM)

LAYERS: dict[str, MakeLayer] = {"RNN": nn.RNN, "LSTM": nn.LSTM, "GRU": tritongru.GRU}
GATES = {"RNN": 0, "LSTM": 3, "GRU": 2}  # each a product of x and one of h; the candidate takes another
STATES = {"RNN": 1, "LSTM": 2, "GRU": 1}
_ONE = 30.0  # sigmoid of it is 1 in float32
_IGNORED = -100  # cross_entropy's mark for places that carry no loss


def cost(cell: str, I: int, H: int) -> dict[str, int]:
    """Parameters; of a step of one sequence flops (two a weight) and least float32 bytes (parameters, x, states)."""
    rows = (GATES[cell] + 1) * H
    parameters = rows * (I + H + 2)
    return {"parameters": parameters, "flops": 2 * rows * (I + H), "bytes": 4 * (parameters + I + 2 * STATES[cell] * H)}


@torch.no_grad()
def begin_retaining(layer: nn.RNNBase, retain: float = RETAIN) -> None:
    """Let z begin at sigmoid(retain), so an LSTM's forget gate, and its input gate at the rest (Tallec and Ollivier,
    2018: "Can recurrent neural networks warp time?"). An RNN's orthogonal matrix keeps the length of h."""
    H, bias = layer.hidden_size, cast(Tensor, layer.bias_hh_l0)
    if layer.mode == "RNN_TANH":
        nn.init.orthogonal_(cast(Tensor, layer.weight_hh_l0))
    else:
        bias[H : 2 * H] += retain  # the second block of rows is z of r z n, and f of i f g o
    if layer.mode == "LSTM":
        bias[:H] -= retain


def remove_gate(layer: nn.RNNBase, gate: str, bias: float) -> None:
    """Make a gate of a GRU a constant, sigmoid(bias), now and in training; z may still learn one for each unit."""
    H = layer.hidden_size
    rows = slice(0, H) if gate == "reset" else slice(H, 2 * H)
    for name, value in (("weight_ih_l0", 0.0), ("weight_hh_l0", 0.0), ("bias_ih_l0", 0.0), ("bias_hh_l0", bias)):
        parameter = cast(Tensor, getattr(layer, name))
        with torch.no_grad():
            parameter[rows] = value
        if gate == "reset" or name != "bias_hh_l0":
            mask = torch.ones_like(parameter)
            mask[rows] = 0
            parameter.register_hook(lambda gradient, mask=mask: gradient * mask)


@lru_cache(2)  # several networks of a seed read the same
def training_texts(count: int, seed: int, recipe: Recipe, batch: int) -> tuple[Text, ...]:
    """In the order of training: a third with a quarter of the gaps, the smaller ones, and one switch at most comes
    first, since what is learned there stretches to large gaps. Texts of like length go together."""
    gaps = sorted(recipe.gaps)
    easy = dataclasses.replace(recipe, gaps=tuple(gaps[: -(-len(gaps) // 4)]), switches=(0, 1))
    texts: list[Text] = []
    for part, (size, own) in enumerate(((count // 3, easy), (count - count // 3, recipe))):
        drawn = generate(size, seed + 2 + part, own, frozenset(text.words for text in texts))
        drawn.sort(key=lambda text: len(text.words))
        batches = [drawn[i : i + batch] for i in range(0, size, batch)]
        random.Random(seed).shuffle(batches)
        texts += [text for together in batches for text in together]
    return tuple(texts)


class StoryModel:
    """One network with its texts, its vocabulary and its training."""

    def __init__(self, sizes: Sizes, network: Network, seed: int) -> None:
        self.sizes = sizes
        self.texts = training_texts(sizes.texts, 1000 * seed, network.recipe, sizes.batch)
        self.trained_on = frozenset(text.words for text in self.texts)
        self.held_out = generate(sizes.held_out, 1000 * seed + 1, network.recipe, self.trained_on)
        self.vocabulary = Vocabulary.of((word for text in self.texts for word in text.words), 10_000)
        torch.manual_seed(1000 * seed)
        self.model = WordModel(len(self.vocabulary.words), EMBEDDING, network.hidden, LAYERS[network.cell])
        begin_retaining(self.model.layer)
        if network.without:
            remove_gate(self.model.layer, network.without, _ONE if network.without == "reset" else RETAIN)

    def padded(self, texts: Sequence[Text]) -> tuple[Tensor, Tensor]:
        """Words and the words that follow, time first; shorter texts end in places without loss.  [T, B] each"""
        rows = [torch.tensor(self.vocabulary.encode([END, *text.words])) for text in texts]
        full = pad_sequence(rows, padding_value=_IGNORED)
        return full[:-1].clamp_min(0), full[1:]

    def train(self, rate: float, what: str = "") -> list[float]:
        """The loss of every step. Says how far it is, where `what` names it."""
        weight = torch.ones(len(self.vocabulary.words))
        weight[self.vocabulary.encode(DISHES)] = WEIGHT_OF_CUISINES

        def batches() -> Iterator[Tensor]:
            for start in range(0, self.sizes.steps * self.sizes.batch, self.sizes.batch):
                together = [self.texts[(start + i) % len(self.texts)] for i in range(self.sizes.batch)]
                words, following = self.padded(together)
                logits = self.model(words)[0].flatten(0, 1)
                yield F.cross_entropy(logits, following.flatten(), weight, ignore_index=_IGNORED)

        return descend(self.model, batches(), self.sizes.steps, rate, what)

    @torch.no_grad()
    def at_cuisines(self, texts: Sequence[Text], last: bool = False) -> tuple[Tensor, Tensor]:
        """Logits where the cuisines (the last of each text alone) are to come, and their numbers.  -> [N, V], [N]"""
        found: list[tuple[Tensor, Tensor]] = []
        for batch in (texts[start : start + 100] for start in range(0, len(texts), 100)):
            words, following = self.padded(batch)
            where = [(at, column) for column, text in enumerate(batch) for at in text.answers[-1 if last else 0 :]]
            places = tuple(torch.tensor(where).t())
            found.append((self.model(words)[0][places], following[places]))
        logits, numbers = zip(*found, strict=True)
        return torch.cat(logits), torch.cat(numbers)

    def cuisine_loss(self) -> float:
        """Mean cross-entropy of the cuisine words of the held-out texts, in nats."""
        losses = F.cross_entropy(*self.at_cuisines(self.held_out), reduction="none").tolist()
        return sum(losses) / len(losses)

    def right(self, texts: Sequence[Text]) -> int:
        """In how many the likeliest of all words is the last cuisine."""
        logits, numbers = self.at_cuisines(texts, last=True)
        return int((logits.argmax(-1) == numbers).sum())

    def _numbers(self, words: Sequence[str]) -> Tensor:
        return torch.tensor(self.vocabulary.encode([END, *words])).view(-1, 1)

    @torch.no_grad()
    def next_word(self, words: Sequence[str]) -> Tensor:
        """Probabilities of the word after `words`.  -> [V]"""
        return self.model(self._numbers(words))[0][-1, 0].softmax(-1)

    @torch.no_grad()
    def states(self, words: Sequence[str]) -> Gates:
        """Gates and states at END and at each of the words.  -> [1 + words, H] each"""
        found = tritongru.gates(cast(nn.GRU, self.model.layer), self.model.embed(self._numbers(words)))
        return Gates(*(part[0, 0, :, 0] for part in found))

    def told(self) -> Iterator[tuple[str, str, list[tuple[str, float]], float]]:
        """Both sentences, one running text: how it begins, the right word, the likeliest with P, P(the right word)."""
        text: list[str] = []
        for prefix, expected in zip((FIRST, SECOND), EXPECTED, strict=True):
            text += tokenise(prefix)
            found = self.next_word(text)
            p, numbers = (part.tolist() for part in found.topk(3))
            top = [(self.vocabulary.words[n], value) for n, value in zip(numbers, p, strict=True)]
            yield prefix, expected, top, float(found[self.vocabulary.index[expected]])
            text += [top[0][0], "."]


def questions(
    sizes: Sizes, seed: int, exclude: frozenset[tuple[str, ...]], on_short: bool = False
) -> Iterator[tuple[str, int, list[Text]]]:
    """The last cuisine of texts of one sentence by gap (all that is asked of one trained on SHORT, in the words that it
    has read), and of trained gaps by number of switches."""
    recipes = [("gap", gap, Recipe((gap,), (0,), words_of=SHORT[-1] if on_short else None)) for gap in sizes.gaps]
    recipes += [("switches", n, Recipe(TRAINED, (n,))) for n in sizes.switches if not on_short]
    for number, (measure, at, recipe) in enumerate(recipes):
        yield measure, at, generate(sizes.asked, 1000 * seed + 500 + number, recipe, exclude)


def ask_trigram(sizes: Sizes, seed: int) -> list[Row]:
    """The rows of counting: the cuisine that most often followed the two words before it, always "cuisine is"."""
    texts = training_texts(sizes.texts, 1000 * seed, GRU.recipe, sizes.batch)
    guess = Counter(text.words[at] for text in texts for at in text.answers).most_common(1)[0][0]
    about = _BLANK | {"seed": seed, "model": TRIGRAM, "cell": TRIGRAM}
    rows: list[Row] = []
    for measure, at, asked in questions(sizes, seed, frozenset(text.words for text in texts)):
        right = sum(guess == text.words[text.answers[-1]] for text in asked)
        rows.append(about | {"measure": measure, "at": at, "right": right, "asked": len(asked)})
    story = about | {"measure": "story", "asked": 1}
    return rows + [story | {"at": at, "right": int(guess == expected)} for at, expected in enumerate(EXPECTED, 1)]


def ask(sizes: Sizes, seed: int, model: StoryModel, on_short: bool) -> Iterator[Row]:
    """A model's answers, to questions that nobody has read: those trained on SHORT have read other texts."""
    texts = training_texts(sizes.texts, 1000 * seed, GRU.recipe, sizes.batch)
    read = frozenset(text.words for text in texts) | model.trained_on
    for measure, at, asked in questions(sizes, seed, read, on_short):
        yield {"measure": measure, "at": at, "right": model.right(asked), "asked": len(asked)}
    for at, (_, expected, top, value) in enumerate(() if on_short else model.told(), 1):
        yield {"measure": "story", "at": at, "right": int(top[0][0] == expected), "asked": 1, "value": value}


def cpu_time(cell: str, I: int, H: int, T: int = 64, B: int = 16) -> float:
    """CPU microseconds per timestep of forward and backward, one thread; a clock would count others' turns."""
    layer, x = LAYERS[cell](I, H), torch.randn(T, B, I)
    timer = Timer("layer(x)[0].sum().backward()", globals={"layer": layer, "x": x}, timer=time.process_time)
    return timer.blocked_autorange().median / T * 1e6


def train_and_ask(sizes: Sizes, network: Network, seed: int) -> tuple[list[Row], list[Row]]:
    """A network's rows, and of the GRU those of the story's words."""
    torch.set_num_threads(1)
    tried: list[tuple[float, float, StoryModel]] = []
    for rate in sizes.rates:
        model = StoryModel(sizes, network, seed)
        model.train(rate)
        tried.append((model.cuisine_loss(), rate, model))
    _, rate, model = min(tried, key=lambda found: found[:2])
    I, H = EMBEDDING, network.hidden
    lost = {"": 0, "reset": H * (I + H + 2), "update": H * (I + H + 1)}[network.without]  # training cannot change
    learned = sum(parameter.numel() for parameter in model.model.parameters()) - lost
    about = _BLANK | {"seed": seed, "model": network.name, "cell": network.cell, "rate": rate}
    about |= {"input": I, "hidden": H, "parameters": learned}
    rows = [about | {"measure": "validation", "at": tried_rate, "value": loss} for loss, tried_rate, _ in tried]
    rows += [about | row for row in ask(sizes, seed, model, network.gaps == SHORT)]
    if not network.without and network.gaps == TRAINED:
        rows.append(about | {"measure": "time", "value": cpu_time(network.cell, I, H)})
    return rows, story_words(model, seed) if network == GRU else []


def story_words(model: StoryModel, seed: int) -> list[Row]:
    """Gates (means over all units), memory and answers after every word of the story, its right answers included.

    `like samosa` is what that word left in the state and is still there: the state minus the mean state of the same
    story told with every dish in its place (and its cuisine in the answer), projected on what that was right after the
    word, in parts of it. 1: all of it; 0: none, or none that points the same way.
    """
    words = _told("samosa", "pasta")
    r, z, _, _, h = (part[1:] for part in model.states(words))
    likeness = {}
    for dish in ("samosa", "pasta"):
        others = [_told(*((other, "pasta") if dish == "samosa" else ("samosa", other))) for other in CUISINE]
        left = h - torch.stack([model.states(other).h[1:] for other in others]).mean(0)
        mark = left[words.index(dish)]
        likeness[f"like {dish}"] = (left @ mark / mark.square().sum()).tolist()
    rows: list[Row] = []
    for place, word in enumerate(words):
        asked = model.next_word([*words[: place + 1], *tokenise(QUESTION)])
        row: Row = {"seed": seed, "hidden": h.shape[-1], "place": place, "word": word}
        row |= {"r": float(r[place].mean()), "z": float(z[place].mean())}
        row |= {name: values[place] for name, values in likeness.items()}
        rows.append(row | {f"P({cuisine})": float(asked[model.vocabulary.index[cuisine]]) for cuisine in EXPECTED})
    return rows


def _told(first: str, second: str) -> list[str]:
    """The story with these dishes and their cuisines."""
    words = []
    for prefix, usual, dish in ((FIRST, "samosa", first), (SECOND, "pasta", second)):
        words += [dish if word == usual else word for word in tokenise(prefix)] + [CUISINE[dish], "."]
    return words


def results(
    sizes: Sizes, seeds: Sequence[int], processes: int | None = None
) -> Iterator[tuple[str, list[Row], list[Row]]]:
    """Every network of every seed, `processes` at once (as many as CPUs). Of each as it ends: its name and
    seed in words, its rows, and those of the story's words."""
    for seed in seeds:
        yield f"{TRIGRAM}, seed {seed}", ask_trigram(sizes, seed), []
    jobs = {f"{network.name}, seed {seed}": (sizes, network, seed) for seed in seeds for network in NETWORKS}
    quiet = signal.SIGINT, signal.SIG_IGN  # the first process hears it and ends the others
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), signal.signal, quiet) as pool:
        futures = {pool.submit(train_and_ask, *job): name for name, job in jobs.items()}
        try:
            for future in as_completed(futures):
                yield futures[future], *future.result()
        finally:  # an interruption too
            pool.shutdown(wait=False, cancel_futures=True)
            for child in multiprocessing.active_children():
                child.terminate()
