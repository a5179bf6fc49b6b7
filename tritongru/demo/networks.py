"""The networks that the story is about, trained on the same texts and asked the same questions, a row per answer.

RNN, LSTM and GRU of equal hidden size, then of equal parameter count; the GRU without one of its gates; RNN and GRU
trained on short gaps alone, over which an RNN does learn; and a trigram, which remembers two words. But for the two of
short gaps everyone gets the same texts in the same order; all take as many steps, gradients clipped at norm 1, and the
learning rate of RATES with the least loss on held-out texts. That loss settled RATES, the number of steps, the order of
the texts and how a model begins too (`storytelling`), with seeds that are not those of the committed rows.
"""

from __future__ import annotations

import copy
import dataclasses
import multiprocessing
import os
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

import tritongru
from tritongru.inspection.gates import Gates

from .data import END, DemoError, Vocabulary, tokenise
from .ngram import Trigram
from .story import DISHES, EXPECTED, FIRST, QUESTION, SECOND, Recipe, Text, generate
from .storytelling import StoryModel, StorySizes, training_texts
from .training import MakeLayer

Row = dict[str, object]
COLUMNS = (
    "seed", "model", "cell", "input", "hidden", "parameters", "rate", "measure", "at", "right", "asked", "value",
)  # fmt: skip
WORD_COLUMNS = (
    "seed",
    "hidden",
    "place",
    "word",
    "r",
    "z",
    "like samosa",
    "like pasta",
    *(f"P({c})" for c in EXPECTED),
)

RATES = (0.003, 0.01)
TRAINED = tuple(range(7, 31))  # words between a dish and its cuisine
SHORT = tuple(range(7, 11))  # the widest mixture from 7 on that a basic RNN was seen to learn
STORY = StorySizes(
    embedding=32, hidden=32, texts=32_000, held_out=200, batch=16, steps=2000,
    recipe=Recipe(TRAINED, switches=(0, 1, 2, 3), again=True),
)  # fmt: skip


@dataclass(frozen=True)
class Sizes:
    """What sets how long `demo --story --seeds N` takes: a seed about three minutes on two CPU cores."""

    story: StorySizes = STORY
    rates: tuple[float, ...] = RATES
    gaps: tuple[int, ...] = (7, 10, 12, 15, 20, 30, 40, 60, 100, 150, 200)
    switches: tuple[int, ...] = (0, 1, 2, 3)
    asked: int = 200  # texts for each gap, and for each number of switches


# Of `demo --story` alone, which somebody waits for: one seed in well under three minutes.
ONE_SEED = Sizes(dataclasses.replace(STORY, texts=25_600, steps=1600))


@dataclass(frozen=True)
class Network:
    """One that is trained, on texts with these `gaps`. `equal` says in what it is the GRU's equal, `without` which gate
    it has lost."""

    name: str
    cell: str
    equal: str = "hidden size"
    without: str = ""
    gaps: Sequence[int] = TRAINED


RNN, LSTM, GRU = (Network(cell, cell) for cell in ("RNN", "LSTM", "GRU"))
RNN_EQUAL, LSTM_EQUAL = (Network(f"{cell}, equal parameters", cell, "parameters") for cell in ("RNN", "LSTM"))
# How far a memory reaches that learned to hold a dish at all: over all of TRAINED a basic RNN learns nothing.
_ON_SHORT = f"trained on gaps of {SHORT[0]} to {SHORT[-1]}"
RNN_SHORT = Network(f"RNN, equal parameters, {_ON_SHORT}", "RNN", "parameters", gaps=SHORT)
GRU_SHORT = Network(f"GRU, {_ON_SHORT}", "GRU", gaps=SHORT)
ON_SHORT = (RNN_SHORT, GRU_SHORT)
NO_RESET = Network("GRU trained with r = 1", "GRU", without="reset")
NO_UPDATE = Network("GRU trained with constant z", "GRU", without="update")
NETWORKS = (GRU, NO_RESET, NO_UPDATE, LSTM, LSTM_EQUAL, RNN_EQUAL, RNN, GRU_SHORT, RNN_SHORT)  # the slowest first
CLAMPED = "trained GRU, r set to 1"
AVERAGED = "trained GRU, z set to its mean"
TRIGRAM = "trigram"

LAYERS: dict[str, MakeLayer] = {"RNN": nn.RNN, "LSTM": nn.LSTM, "GRU": tritongru.GRU}
PRODUCTS = {"RNN": 1, "LSTM": 4, "GRU": 3}  # of x and of h with a weight matrix each: the gates' and the candidate's
STATES = {"RNN": 1, "LSTM": 2, "GRU": 1}
_ONE = 30.0  # sigmoid of it is 1 in float32


def gates_of(cell: str) -> int:
    """All products but the candidate's make a gate."""
    return PRODUCTS[cell] - 1


def flops(cell: str, I: int, H: int) -> int:
    """Of one step of one sequence: two for each weight."""
    return 2 * PRODUCTS[cell] * H * (I + H)


def step_bytes(cell: str, I: int, H: int) -> int:
    """Least bytes of one float32 step of one sequence: weights and biases, x, and each state read and written."""
    return 4 * (PRODUCTS[cell] * H * (I + H + 2) + I + 2 * STATES[cell] * H)


def hidden_size(network: Network, I: int, H: int) -> int:
    """H, or the size that comes nearest to the parameters of a GRU of H, its projection to I included."""
    if network.equal == "hidden size":
        return H

    def count(cell: str, size: int) -> int:
        return PRODUCTS[cell] * size * (I + size + 2) + size * I

    return min(range(1, 4 * H), key=lambda size: abs(count(network.cell, size) - count("GRU", H)))


def remove_gate(layer: nn.RNNBase, gate: str, bias: Tensor | float) -> None:
    """Make a gate of a GRU a constant, sigmoid(bias) per unit, now and in training; z may still learn its constant."""
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


def learned(network: Network, model: nn.Module, H: int) -> int:
    """Parameters that training may change."""
    I = cast(nn.Embedding, model.get_submodule("embedding")).embedding_dim
    lost = {"": 0, "reset": H * (I + H + 2), "update": H * (I + H + 1)}[network.without]
    return sum(parameter.numel() for parameter in model.parameters()) - lost


def train_and_ask(sizes: Sizes, network: Network, seed: int) -> tuple[list[Row], list[Row]]:
    """A network's rows, and of the GRU those of the story's words."""
    torch.set_num_threads(1)
    story = sizes.story
    assert story.recipe is not None
    H = hidden_size(network, story.embedding, story.hidden)
    recipe = dataclasses.replace(story.recipe, gaps=tuple(network.gaps))
    tried: list[tuple[float, float, StoryModel]] = []
    for rate in sizes.rates:
        model = StoryModel(
            dataclasses.replace(story, hidden=H, learning_rate=rate, recipe=recipe),
            LAYERS[network.cell], torch.device("cpu"), 1000 * seed,
        )  # fmt: skip
        if network.without:
            remove_gate(model.model.layer, network.without, _ONE if network.without == "reset" else story.retain)
        model.train()
        tried.append((model.cuisine_loss(model.held_out), rate, model))
    _, rate, model = min(tried, key=lambda found: found[:2])
    about: Row = {
        "seed": seed, "model": network.name, "cell": network.cell, "input": story.embedding, "hidden": H,
        "parameters": learned(network, model.model, H), "rate": rate,
    }  # fmt: skip
    rows = [about | {"measure": "validation", "at": tried_rate, "value": loss} for loss, tried_rate, _ in tried]
    if network in ON_SHORT:  # of other words than it has read nothing could be said
        return _full(about | row for row in (*rows, *_asked(sizes, seed, model, words_of=SHORT[-1]))), []
    rows += [about | row for row in (*_asked(sizes, seed, model), *_story(model))]
    words: list[Row] = []
    if not network.without:
        rows.append(about | {"measure": "time", "at": "", "value": cpu_time(network.cell, story.embedding, H)})
    if network == GRU:
        for name, gate in ((CLAMPED, "reset"), (AVERAGED, "update")):
            changed = robbed(model, gate)
            rows += [about | row | {"model": name} for row in (*_asked(sizes, seed, changed), *_story(changed))]
        words = [{"seed": seed, "hidden": H, **row} for row in story_words(model)]
    return _full(rows), words


def _full(rows: Iterable[Row]) -> list[Row]:
    return [dict.fromkeys(COLUMNS, "") | row for row in rows]


def robbed(model: StoryModel, gate: str) -> StoryModel:
    """A copy of a trained GRU whose reset gate is 1, or whose update gate is the mean that it had, unit by unit."""
    changed = copy.copy(model)
    changed.model = copy.deepcopy(model.model)
    remove_gate(changed.model.layer, gate, _ONE if gate == "reset" else mean_update(model).logit())
    return changed


def ask_trigram(sizes: Sizes, seed: int) -> list[Row]:
    """The rows of counting: what two words before the cuisine say about it."""
    story = sizes.story
    texts = training_texts(story.texts, 1000 * seed, story.recipe, story.batch)
    vocabulary = Vocabulary((word for text in texts for word in text.words), 10_000)
    stream = [number for text in texts for number in vocabulary.encode([END, *text.words])]
    model = Trigram(stream, len(vocabulary))
    likeliest: dict[tuple[int, int], str] = {}

    def guess(words: Sequence[str]) -> str:
        pair = cast("tuple[int, int]", tuple(vocabulary.encode(words[-2:])))
        if pair not in likeliest:
            best = max(range(len(vocabulary)), key=lambda w: model.probability(*pair, w))
            likeliest[pair] = vocabulary.words[best]
        return likeliest[pair]

    trained_on = frozenset(text.words for text in texts)
    rows: list[Row] = []
    for measure, at, asked in questions(sizes, seed, trained_on):
        right = sum(guess(text.words[: text.answers[-1]]) == text.words[text.answers[-1]] for text in asked)
        rows.append({"measure": measure, "at": at, "right": right, "asked": len(asked)})
    for at, (prefix, expected) in enumerate(zip((FIRST, SECOND), EXPECTED, strict=True), 1):
        rows.append({"measure": "story", "at": at, "right": int(guess(tokenise(prefix)) == expected), "asked": 1})
    about = {"seed": seed, "model": TRIGRAM, "cell": TRIGRAM}
    return _full(about | row for row in rows)


def questions(
    sizes: Sizes, seed: int, trained_on: frozenset[tuple[str, ...]], words_of: int | None = None
) -> Iterator[tuple[str, int, list[Text]]]:
    """What is asked: the last cuisine of texts of one sentence by gap, and of trained gaps by number of switches.

    With `words_of`, as Recipe has it: by gap alone.
    """
    assert sizes.story.recipe is not None
    recipes = [("gap", gap, Recipe((gap,), (0,), words_of=words_of)) for gap in sizes.gaps]
    if words_of is None:
        recipes += [("switches", n, Recipe(sizes.story.recipe.gaps, (n,))) for n in sizes.switches]
    for number, (measure, at, recipe) in enumerate(recipes):
        yield measure, at, generate(sizes.asked, 1000 * seed + 500 + number, trained_on, recipe)


def _asked(sizes: Sizes, seed: int, model: StoryModel, words_of: int | None = None) -> Iterator[Row]:
    # Those of ON_SHORT have read other texts than the rest. Nobody is asked what anybody of them has read.
    story = sizes.story
    texts = training_texts(story.texts, 1000 * seed, story.recipe, story.batch)
    trained_on = frozenset(text.words for text in texts) | model.trained_on
    for measure, at, asked in questions(sizes, seed, trained_on, words_of):
        right = sum(found[-1] for _, found in model.answered(asked))
        yield {"measure": measure, "at": at, "right": right, "asked": len(asked)}


def _story(model: StoryModel) -> Iterator[Row]:
    """Both completions of the running text, the model's own first one in it; `value` is P(the right word)."""
    text: list[str] = []
    for at, (prefix, expected) in enumerate(zip((FIRST, SECOND), EXPECTED, strict=True), 1):
        text += tokenise(prefix)
        found = model.next_word(text)
        best = model.vocabulary.words[int(found.argmax())]
        value = float(found[model.vocabulary.index[expected]])
        yield {"measure": "story", "at": at, "right": int(best == expected), "asked": 1, "value": value}
        text += [best, "."]


def cpu_time(cell: str, I: int, H: int, T: int = 64, B: int = 16) -> float:
    """CPU microseconds per timestep of forward and backward, one thread; the median of 15 calls.

    CPU time, not the wall clock: on a shared machine, waiting for one's turn varies far more.
    """
    layer, x = LAYERS[cell](I, H), torch.randn(T, B, I)
    times = []
    for _ in range(20):
        start = time.process_time()
        layer(x)[0].sum().backward()
        times.append(time.process_time() - start)
    return statistics.median(times[5:]) / T * 1e6


def _states(model: StoryModel, words: Sequence[str]) -> Gates:
    numbers = torch.tensor(model.vocabulary.encode([END, *words])).view(-1, 1)
    with torch.no_grad():
        return tritongru.gates(cast(nn.GRU, model.model.layer), model.model.embed(numbers))


def mean_update(model: StoryModel) -> Tensor:
    """The mean of z over the words of the held-out texts.  -> [H]"""
    return torch.cat([_states(model, text.words).z[0, 0, :, 0] for text in model.held_out]).mean(0)


def story_words(model: StoryModel) -> Iterator[Row]:
    """Gates, memory and answers after every word of the story told in full, its right answers included.

    r and z are means over all units. `like samosa` is what that word left in the state and is still there: the state
    minus the mean state of the same story told with every dish in its place (and its cuisine in the answer), projected
    on what that was right after the word, in parts of it. 1: all of it; 0: none, or none that points the same way. All
    units count. (That the mean has the word's own telling in it scales both alike.)

    (The cosine of h with itself at the dish shows nothing: most of h follows the form of the sentence, word by word.)
    """
    words = _told("samosa", "pasta")
    found = _states(model, words)
    r, z, h = (part[0, 0, 1:, 0] for part in (found.r, found.z, found.h))  # without END's
    dishes = [dish for group in DISHES.values() for dish in group.split()]
    told = {"samosa": [_told(dish, "pasta") for dish in dishes], "pasta": [_told("samosa", dish) for dish in dishes]}
    likeness = {}
    for dish, others in told.items():
        left = h - torch.stack([_states(model, other).h[0, 0, 1:, 0] for other in others]).mean(0)
        mark = left[words.index(dish)]
        likeness[dish] = left @ mark / mark.square().sum()
    for place, word in enumerate(words):
        row: Row = {"place": place, "word": word, "r": float(r[place].mean()), "z": float(z[place].mean())}
        row |= {f"like {dish}": float(values[place]) for dish, values in likeness.items()}
        asked = model.next_word([*words[: place + 1], *tokenise(QUESTION)])
        yield row | {f"P({cuisine})": float(asked[model.vocabulary.index[cuisine]]) for cuisine in EXPECTED}


def _told(first: str, second: str) -> list[str]:
    """The story with these dishes and their cuisines."""
    cuisine_of = {dish: cuisine for cuisine, dishes in DISHES.items() for dish in dishes.split()}
    words = []
    for prefix, usual, dish in ((FIRST, "samosa", first), (SECOND, "pasta", second)):
        words += [dish if word == usual else word for word in tokenise(prefix)] + [cuisine_of[dish], "."]
    return words


def _begin() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process hears it and ends the others
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)


def _end_with_parent() -> None:
    """However it ends: a killed one cannot end the others."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def results(
    sizes: Sizes,
    seeds: Sequence[int],
    done: Callable[[str, list[Row], list[Row]], None],
    processes: int | None = None,
) -> None:
    """Train and ask every network of every seed, a process per CPU (`processes`: so many; 1 is this one).

    done: called as each has ended, with its name and seed in words, its rows and those of the story's words.

    Raises: DemoError where a process was killed.
    """
    for seed in seeds:
        done(f"{TRIGRAM}, seed {seed}", ask_trigram(sizes, seed), [])
    jobs = [(network, seed) for seed in seeds for network in NETWORKS]
    count = min(processes or os.cpu_count() or 1, len(jobs))
    if count == 1:
        for network, seed in jobs:
            done(f"{network.name}, seed {seed}", *train_and_ask(sizes, network, seed))
        return
    with ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), initializer=_begin) as pool:
        futures = {
            pool.submit(train_and_ask, sizes, network, seed): f"{network.name}, seed {seed}" for network, seed in jobs
        }
        try:
            for future in as_completed(futures):
                done(futures[future], *future.result())
        except BrokenProcessPool as error:
            raise DemoError("a training was ended from outside (is there enough memory?)") from error
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for child in multiprocessing.active_children():
                child.terminate()
            raise
