"""The story in full: its texts, networks without a gate, questions, verdicts, and what a run leaves behind."""

from __future__ import annotations

import csv
import dataclasses
import math
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import tritongru
from benchmarks import results as results_files
from benchmarks import story as command
from tests.kit.demo import HAS_MATPLOTLIB, options
from tritongru import demo
from tritongru.demo import claims, networks, run, story
from tritongru.demo.data import DemoError, tokenise
from tritongru.demo.networks import GRU, NETWORKS, Sizes, StoryModel, train_and_ask
from tritongru.demo.story import CUISINE, Recipe, generate

TINY = Sizes(texts=64, held_out=10, batch=4, steps=8, rates=(0.01,), gaps=(7, 30, 40), switches=(0, 1), asked=4)
pytestmark = pytest.mark.usefixtures("one_thread")


# The texts


@pytest.mark.parametrize("gap", [7, 8, 30, 200])
def test_gaps_and_switches_are_those_asked_for(gap: int) -> None:
    for text in generate(100, 1, Recipe((gap,), (2,))):
        cuisines = [text.words[at] for at in text.answers]
        assert len(cuisines) == 3 and cuisines[0] != cuisines[1] != cuisines[2]
        for at in text.answers:
            assert CUISINE[text.words[at - gap - 1]] == text.words[at]
            assert not set(text.words[at - gap : at]) & set(CUISINE)  # the last dish, also of "dosa and idli"


def test_the_story_is_never_generated_and_the_same_food_stays_within_the_largest_gap() -> None:
    texts = generate(2000, 1, GRU.recipe)
    read = {word for text in texts for word in text.words}
    assert {"dhaval", "samosa", "pasta", "cheese", "brother"} <= read  # apart from each other
    for sentence in (story.FIRST, "Asha eats dosa. " + story.SECOND):
        assert story.tells_the_story(tokenise(sentence))
    assert not any(story.tells_the_story(text.words) for text in texts)
    again = 0
    for text in texts:
        for at in text.answers:
            dish = max(place for place in range(at) if text.words[place] in CUISINE)
            assert text.words[at] == CUISINE[text.words[dish]] and at - dish - 1 <= max(networks.TRAINED)
            again += text.words[dish:at].count(".")
    assert again > 500
    with_cheese = {CUISINE[word] for text in texts if "cheese" in text.words for word in text.words if word in CUISINE}
    assert with_cheese == set(story.DISHES)  # it says nothing


def test_training_begins_with_small_gaps_and_nobody_is_asked_what_anybody_has_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    texts = networks.training_texts(600, 3000, GRU.recipe, TINY.batch)
    assert len({text.words for text in texts}) == 600
    assert max(text.answers[0] for text in texts[:200]) < max(text.answers[0] for text in texts[200:])
    sizes = dataclasses.replace(TINY, texts=4000, steps=1, asked=1500)
    asked: set[tuple[str, ...]] = set()
    monkeypatch.setattr(StoryModel, "right", lambda model, found: asked.update(text.words for text in found) or 0)
    train_and_ask(sizes, networks.RNN_SHORT, 10)
    read = {text.words for network in (GRU, networks.RNN_SHORT)
            for text in networks.training_texts(4000, 10_000, network.recipe, TINY.batch)}  # fmt: skip
    assert len(asked) >= sizes.asked and asked.isdisjoint(read)


@pytest.mark.parametrize("gap", [7, 12, 30, 200])
def test_longer_gaps_of_the_words_of_short_ones(gap: int) -> None:
    """Networks trained on short gaps are asked over longer ones in words that they have read: memory alone is asked."""
    read = {word for text in generate(4000, 0, networks.RNN_SHORT.recipe) for word in text.words}
    texts = generate(300, 1, Recipe((gap,), (0,), words_of=networks.SHORT[-1]))
    assert {word for text in texts for word in text.words} <= read
    assert all(text.words[text.answers[0] - gap - 1] in CUISINE for text in texts)


# The networks


def test_every_network_begins_by_retaining() -> None:
    x = torch.randn(1, 50, 8)
    gru, lstm, rnn = nn.GRU(8, 16), nn.LSTM(8, 16), nn.RNN(8, 16)
    for layer in (gru, lstm, rnn):
        networks.begin_retaining(layer, 4.0)
    assert tritongru.gates(gru, x).z.mean() > 0.95
    _, (_, c) = lstm(x, (torch.zeros(1, 50, 16), torch.ones(1, 50, 16)))
    assert 0.9 < c.mean() < 1.05  # little forgotten, little added
    torch.testing.assert_close(rnn.weight_hh_l0 @ rnn.weight_hh_l0.T, torch.eye(16))


@pytest.mark.parametrize("gate", ["reset", "update"])
def test_a_removed_gate_stays_removed(gate: str) -> None:
    layer, x = tritongru.GRU(8, 16), torch.randn(5, 4, 8)
    networks.remove_gate(layer, gate, 30.0 if gate == "reset" else 1.0)
    optimiser = torch.optim.Adam(layer.parameters(), lr=0.1)
    for _ in range(3):
        optimiser.zero_grad()
        layer(x)[0].square().sum().backward()
        optimiser.step()
    found = tritongru.gates(layer, x)
    kept, lost = (found.z, found.r) if gate == "reset" else (found.r, found.z)
    assert torch.equal(lost, lost[:, :, :1, :1].expand_as(lost)) and kept.std(2).min() > 0
    # each unit has learned its own constant z; r is 1
    assert lost[0, 0, 0, 0].std() > 0 if gate == "update" else torch.equal(lost, torch.ones_like(lost))


def test_the_rate_of_the_least_held_out_loss_is_taken() -> None:
    rows, _ = train_and_ask(dataclasses.replace(TINY, rates=(0.01, 1e-6)), networks.RNN_SHORT, 0)
    losses = {row["at"]: row["value"] for row in rows if row["measure"] == "validation"}
    assert losses[0.01] < losses[1e-6] and {row["rate"] for row in rows} == {0.01}


def test_both_sentences_are_one_running_text(monkeypatch: pytest.MonkeyPatch) -> None:
    model, read = StoryModel(TINY, networks.RNN, 0), []

    def indian(model: StoryModel, words: list[str]) -> torch.Tensor:
        read.append(list(words))
        return torch.eye(len(model.vocabulary))[model.vocabulary.index["indian"]]

    monkeypatch.setattr(StoryModel, "next_word", indian)
    assert [top[0] == (expected, 1) for _, expected, top, _ in model.told()] == [True, False]
    assert read == [tokenise(story.FIRST), [*tokenise(story.FIRST), "indian", ".", *tokenise(story.SECOND)]]


def test_cpu_time_is_microseconds_of_a_step() -> None:
    layer, x, start = nn.RNN(8, 8), torch.randn(64, 16, 8), time.process_time()
    for _ in range(5):
        layer(x)[0].sum().backward()
    taken = (time.process_time() - start) / (5 * 64) * 1e6
    assert 0.1 < networks.cpu_time("RNN", 8, 8) / taken < 10


@pytest.mark.parametrize("network", NETWORKS, ids=lambda network: network.name)
def test_rows_are_of_the_layer_that_they_name(network: networks.Network) -> None:
    """Its counts, without what a removed gate has lost, and all that was asked."""
    layer = networks.LAYERS[network.cell](32, network.hidden)
    weights = layer.weight_ih_l0.numel() + layer.weight_hh_l0.numel()
    biases = layer.bias_ih_l0.numel() + layer.bias_hh_l0.numel()
    _, state = layer(torch.zeros(1, 1, 32))
    states, H = len(state) if isinstance(state, tuple) else 1, network.hidden
    counted = networks.cost(network.cell, 32, H)
    assert (networks.STATES[network.cell], networks.GATES[network.cell]) == (states, len(layer.weight_hh_l0) // H - 1)
    assert counted == {"parameters": weights + biases, "flops": 2 * weights,
                       "bytes": 4 * (weights + biases + 32 + 2 * states * H)}  # fmt: skip
    rows, words = train_and_ask(TINY, network, 0)
    V = len(StoryModel(TINY, network, 0).vocabulary)
    lost = {"": 0, "reset": H * (32 + H + 2), "update": H * (32 + H + 1)}[network.without]
    assert {row["parameters"] for row in rows} == {counted["parameters"] - lost + 32 * H + 32 + 33 * V}
    if "equal" in network.name:
        assert abs((counted["parameters"] + 32 * H) / (networks.cost("GRU", 32, 32)["parameters"] + 32 * 32) - 1) < 0.03
    expected = {("gap", gap) for gap in TINY.gaps}
    if network.gaps == networks.TRAINED:
        expected |= {("switches", 0), ("switches", 1), ("story", 1), ("story", 2)}
    assert {(row["measure"], row["at"]) for row in rows if row["asked"]} == expected and bool(words) == (network == GRU)


def test_answers_are_the_likeliest_word() -> None:
    """By another way: word after word, one text at a time."""
    model = StoryModel(dataclasses.replace(TINY, steps=60), networks.LSTM, 0)
    before = model.cuisine_loss()
    assert len(model.train(0.02)) == 60 and model.cuisine_loss() < before - 0.5
    texts = generate(12, 99, Recipe((7,), (1,)))
    p = [model.next_word(text.words[: text.answers[-1]]) for text in texts]
    numbers = [model.vocabulary.index[text.words[text.answers[-1]]] for text in texts]
    assert model.right(texts) == sum(int(found.argmax()) == n for found, n in zip(p, numbers, strict=True))
    model.held_out = [story.Text(text.words, text.answers[-1:]) for text in texts]
    assert model.cuisine_loss() == pytest.approx(-sum(math.log(f[n]) for f, n in zip(p, numbers, strict=True)) / 12)


def test_words_show_what_the_layer_computes() -> None:
    model = StoryModel(TINY, GRU, 0)
    words = networks.story_words(model, 0)
    told = [str(row["word"]) for row in words]
    assert told[:3] == ["dhaval", "eats", "samosa"] and told[-2:] == ["italian", "."]
    for dish, answer in zip(("samosa", "pasta"), story.EXPECTED, strict=True):
        states = {}
        for other, cuisine in CUISINE.items():
            retold = [other if word == dish else cuisine if word == answer else word for word in told]
            numbers = torch.tensor(model.vocabulary.encode(["<end>", *retold])).view(-1, 1)
            with torch.no_grad():
                states[other] = model.model.layer(model.model.embed(numbers))[0][1:, 0].double()
        # That the dish is not among the others here changes no ratio.
        left = states[dish] - torch.stack([state for other, state in states.items() if other != dish]).mean(0)
        mark = left[told.index(dish)]
        assert [row[f"like {dish}"] for row in words] == pytest.approx((left @ mark / (mark @ mark)).tolist(), abs=1e-5)
    z = tritongru.gates(model.model.layer, model.model.embed(numbers[:3])).z
    assert words[1]["z"] == pytest.approx(float(z[0, 0, 2].mean()))
    asked = model.next_word([*told[:3], *tokenise(story.QUESTION)])
    assert words[2]["P(indian)"] == pytest.approx(float(asked[model.vocabulary.index["indian"]]))


# The verdicts


def made_up(right: dict[str, list[float]], **cells: object) -> list[networks.Row]:
    """Rows of every model with these shares by seed, everywhere; what is not given is 0.5 in every seed."""
    rows: list[networks.Row] = []
    seeds = len(next(iter(right.values())))
    for model in networks.MODELS:
        for seed, share in enumerate(right.get(model, [0.5] * seeds)):
            about = {"seed": seed, "model": model, "input": 32, "hidden": 32, "parameters": 9 if "GRU" in model else 10}
            places = [("gap", 7), ("gap", 30), ("gap", 200), ("switches", 0), ("switches", 3)]
            rows += [about | {"measure": m, "at": at, "right": round(1000 * share), "asked": 1000} for m, at in places]
            rows += [about | {"measure": "story", "at": at, "right": 1, "asked": 1} for at in (1, 2)]
            rows.append(about | {"measure": "time", "at": "", "value": 10.0})
    return rows


def only(rows: list[networks.Row], model: str, measure: str, at: object, **cells: object) -> list[networks.Row]:
    """The rows with other cells where a model was asked this."""
    return [row | cells if (row["model"], row["measure"], row["at"]) == (model, measure, at) else row for row in rows]


CLAIMS = ("samosa is kept", "samosa is let go", "trigram", "basic RNN", "lets go as often", "three gates", "lighter",
          "less time", "At times", "reset gate", "update gate")  # fmt: skip
GOOD, BAD = [0.95, 0.96, 0.97], [0.2, 0.21, 0.22]
HOLDS = {GRU.name: GOOD, networks.GRU_SHORT.name: GOOD, networks.TRIGRAM: BAD, networks.RNN.name: BAD,
         networks.RNN_EQUAL.name: BAD}  # fmt: skip


def held(rows: list[networks.Row]) -> set[str]:
    judged = claims.judge(rows)
    assert len(judged) == len(CLAIMS)
    return {key for key in CLAIMS if next(claim.held for claim in judged if key in claim.text)}


def test_claims_hold_by_numbers_alone_and_each_part_counts() -> None:
    rows = made_up(HOLDS)
    found = held(rows)
    assert found == set(CLAIMS) - {"less time", "At times"}
    for claim, *change in (
        ("samosa is let go", GRU.name, "story", 2, {"right": 0}),
        ("lets go as often", GRU.name, "switches", 3, {"right": 600}),
        ("basic RNN", networks.RNN_EQUAL.name, "gap", 30, {"right": 950}),
        ("basic RNN", networks.GRU_SHORT.name, "gap", 30, {"right": 500}),  # trained alike: no better
        ("basic RNN", networks.RNN_SHORT.name, "gap", 7, {"right": 200}),  # it learned nothing
        ("trigram", networks.TRIGRAM, "gap", 30, {"right": 950}),
    ):  # fmt: skip
        assert claim not in held(only(rows, *change[:3], **change[3])), change
    for name, gate in ((networks.NO_RESET.name, "reset gate"), (networks.NO_UPDATE.name, "update gate")):
        same = made_up(HOLDS | {name: GOOD})
        assert gate not in held(same)
        for measure, at in (("gap", 30), ("gap", 200), ("switches", 3)):
            assert gate in held(only(same, name, measure, at, right=200))
    for microseconds, quicker in ((8.0, True), (9.5, False)):  # by a tenth
        assert ("less time" in held(only(rows, GRU.name, "time", "", value=microseconds))) == quicker
    lstm = made_up(HOLDS | {GRU.name: [0.1, 0.4, 0.9], networks.LSTM.name: [0.6, 0.9, 0.95]})
    assert "At times" not in held(lstm) and "At times" in held(made_up({GRU.name: BAD}))
    assert any("it has more right than the GRU in 3 of 3 seeds" in claim.numbers for claim in claims.judge(lstm))
    with pytest.raises(ValueError, match="trigram"):
        claims.judge([row for row in rows if row["model"] != networks.TRIGRAM])


@pytest.mark.parametrize(
    ("mine", "theirs", "beats"),
    [
        ([0.9, 0.9], [0.8, 0.8], True), ([0.9, 0.9], [0.89, 0.89], False),  # nobody would care
        ([0.7, 1.0], [0.6, 0.8], False), ([0.8, 1.0], [0.6, 0.8], False),  # within both spreads together
        ([0.9], [0.8], True), ([0.8], [0.9], False),
    ],
)  # fmt: skip
def test_better_means_beyond_the_spread(mine: list[float], theirs: list[float], beats: bool) -> None:
    assert claims.spread(mine).beats(claims.spread(theirs)) == beats


# A run


def test_a_run_leaves_rows_figures_and_verdicts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = options("--story", "--seeds", "2", "--seed", "4", "--out", tmp_path)
    run.run_story(arguments, TINY, processes=2)
    expected = {"story-answers.csv", "story-words.csv"}
    expected |= {"story-gaps.png", "story-gates.png"} if HAS_MATPLOTLIB else set()
    assert {path.name for path in tmp_path.iterdir()} == expected
    rows = list(csv.DictReader((tmp_path / "story-answers.csv").open(encoding="utf-8")))
    assert tuple(rows[0]) == networks.COLUMNS and {row["seed"] for row in rows} == {"4", "5"}
    assert {row["model"] for row in rows} == set(networks.MODELS)
    shown = capsys.readouterr().out
    for claim in claims.judge(rows):  # from the file alone, as printed
        assert f"{'held  ' if claim.held else 'FAILED'} {claim.text}.\n       {claim.numbers}." in shown
    here = [
        row for _, found, _ in networks.results(TINY, (4,), processes=1) for row in found if row["measure"] != "time"
    ]
    theirs = [row for row in rows if row["seed"] == "4" and row["measure"] != "time"]
    assert sorted(str({k: str(v) for k, v in row.items()}) for row in here) == sorted(map(str, theirs))
    claims.show(made_up({GRU.name: [0.9]}))
    assert "One seed has no spread" in capsys.readouterr().out


@pytest.mark.parametrize("which", ["demo", "benchmarks"])
def test_an_interruption_keeps_what_had_ended(
    which: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    taken = []

    def results(sizes: Sizes, *_: object) -> Iterator[tuple[str, list[networks.Row], list[networks.Row]]]:
        taken.append(sizes)
        yield "GRU", *train_and_ask(TINY, GRU, 0)
        raise KeyboardInterrupt

    monkeypatch.setattr(networks, "results", results)
    if which == "demo":
        assert demo.main(options("--story", "--out", tmp_path)) == 130
        found = list(csv.DictReader((tmp_path / "story-answers.csv").open(encoding="utf-8")))
        assert demo.main(options("--story", "--seeds", "1", "--out", tmp_path)) == 130
        assert taken == [networks.ONE_SEED, Sizes()]  # who asks for no seeds waits less
    else:
        assert command.main(tmp_path, TINY) == 130
        found = results_files.read(tmp_path / "story" / command.ANSWERS, command.COLUMNS)
        with pytest.raises(FileExistsError, match="move it away"):
            command.main(tmp_path, TINY)
    assert GRU.name in {row["model"] for row in found} and "interrupted" in capsys.readouterr().err


def test_a_killed_training_is_an_error_in_words(tmp_path: Path) -> None:
    with pytest.raises(DemoError, match="ended from outside"):
        list(networks.results(dataclasses.replace(TINY, rates=_Ends()), (0,), processes=2))


class _Ends(tuple):
    """Ends the process that asks for it, as a system without memory would."""

    def __iter__(self):
        import multiprocessing
        import os

        if multiprocessing.parent_process() is not None:
            os._exit(9)
        return super().__iter__()


def test_committed_rows_are_a_whole_run_of_these_sizes() -> None:
    folder = results_files.RESULTS / command.FOLDER
    rows = results_files.read(folder / command.ANSWERS, command.COLUMNS)
    words = results_files.read(folder / command.WORDS, command.WORD_COLUMNS)
    sizes, seeds = Sizes(), {str(seed) for seed in command.SEEDS}
    asked = {(row["seed"], row["model"], row["measure"], row["at"]) for row in rows if row["asked"]}
    assert asked >= {
        (seed, model, "gap", str(gap)) for seed in seeds for model in networks.MODELS for gap in sizes.gaps
    }
    assert {row["rate"] for row in rows if row["rate"]} <= set(map(str, sizes.rates))
    assert {row["asked"] for row in rows if row["measure"] == "gap"} == {str(sizes.asked)}
    assert len({row["commit"] for row in rows}) == 1 and {row["dirty"] for row in rows} == {"no"}
    assert len(seeds) >= 5 and {row["seed"] for row in words} == seeds
    for seed in seeds:  # counting is quick: the rows again
        counted = [{k: str(v) for k, v in row.items()} for row in networks.ask_trigram(sizes, int(seed))]
        assert counted == [{k: row[k] for k in networks.COLUMNS} for row in rows
                           if (row["seed"], row["model"]) == (seed, networks.TRIGRAM)]  # fmt: skip
