"""The story in full: its texts, networks without a gate, questions, verdicts, and what a run leaves behind."""

from __future__ import annotations

import csv
import dataclasses
import math

import pytest
import torch
from torch import nn

import tritongru
from benchmarks import results as results_files
from benchmarks import story as command
from tests.kit.demo import HAS_MATPLOTLIB, options
from tritongru import demo
from tritongru.demo import claims, networks, run, story
from tritongru.demo.data import tokenise
from tritongru.demo.networks import GRU, NETWORKS, Sizes, StoryModel, train_and_ask
from tritongru.demo.story import CUISINE, Recipe, generate

TINY = Sizes(texts=64, held_out=10, batch=4, steps=8, rates=(0.01,), gaps=(7, 30, 40), switches=(0, 1), asked=4)
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("words_of", [None, 10])
@pytest.mark.parametrize("gap", [7, 8, 30, 200])
def test_gaps_and_switches_are_those_asked_for(gap, words_of):
    for text in generate(100, 1, Recipe((gap,), (2,), words_of=words_of)):
        cuisines = [text.words[at] for at in text.answers]
        assert len(cuisines) == 3 and cuisines[0] != cuisines[1] != cuisines[2]
        for at in text.answers:
            assert CUISINE[text.words[at - gap - 1]] == text.words[at]
            assert not set(text.words[at - gap : at]) & set(CUISINE)  # the last dish, also of "dosa and idli"


def test_the_story_is_never_generated_and_the_same_food_stays_within_the_largest_gap():
    texts = generate(2000, 1, GRU.recipe)
    read = {word for text in texts for word in text.words}
    assert {"dhaval", "samosa", "pasta", "cheese", "brother"} <= read  # apart from each other
    assert all(story.tells_the_story(tokenise(told)) for told in (story.FIRST, "Asha eats dosa. " + story.SECOND))
    assert not any(story.tells_the_story(text.words) for text in texts)
    for text in texts:
        for at in text.answers:
            dish = max(place for place in range(at) if text.words[place] in CUISINE)
            assert text.words[at] == CUISINE[text.words[dish]] and at - dish - 1 <= max(networks.TRAINED)


def test_training_begins_with_small_gaps_and_nobody_is_asked_what_anybody_has_read(monkeypatch):
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
    short = {
        word for text in networks.training_texts(4000, 10_000, networks.RNN_SHORT.recipe, 4) for word in text.words
    }
    assert {word for words in asked for word in words} <= short  # in words that it has read: memory alone is asked


def test_every_network_begins_by_retaining():
    gru, lstm, rnn = nn.GRU(8, 16), nn.LSTM(8, 16), nn.RNN(8, 16)
    for layer in (gru, lstm, rnn):
        networks.begin_retaining(layer, 4.0)
    assert tritongru.gates(gru, torch.randn(1, 50, 8)).z.mean() > 0.95
    _, (_, c) = lstm(torch.randn(1, 50, 8), (torch.zeros(1, 50, 16), torch.ones(1, 50, 16)))
    assert 0.9 < c.mean() < 1.05  # little forgotten, little added
    torch.testing.assert_close(rnn.weight_hh_l0 @ rnn.weight_hh_l0.T, torch.eye(16))


@pytest.mark.parametrize("gate", ["reset", "update"])
def test_a_removed_gate_stays_removed(gate):
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
    assert lost[0, 0, 0, 0].std() > 0 if gate == "update" else torch.equal(lost, torch.ones_like(lost))
    rows, _ = train_and_ask(dataclasses.replace(TINY, rates=(0.01, 1e-6)), networks.RNN_SHORT, 0)
    losses = {row["at"]: row["value"] for row in rows if row["measure"] == "validation"}
    assert losses[0.01] < losses[1e-6] and {row["rate"] for row in rows} == {0.01}


def test_both_sentences_are_one_running_text(monkeypatch):
    model, read = StoryModel(TINY, networks.RNN, 0), []

    def indian(model: StoryModel, words: list[str]) -> torch.Tensor:
        read.append(list(words))
        return torch.eye(len(model.vocabulary.words))[model.vocabulary.index["indian"]]

    monkeypatch.setattr(StoryModel, "next_word", indian)
    assert [top[0] == (expected, 1) for _, expected, top, _ in model.told()] == [True, False]
    assert read == [tokenise(story.FIRST), [*tokenise(story.FIRST), "indian", ".", *tokenise(story.SECOND)]]


@pytest.mark.parametrize("network", NETWORKS, ids=lambda network: network.name)
def test_rows_are_of_the_layer_that_they_name(network):
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
    V = len(StoryModel(TINY, network, 0).vocabulary.words)
    lost = {"": 0, "reset": H * (32 + H + 2), "update": H * (32 + H + 1)}[network.without]
    assert {row["parameters"] for row in rows} == {counted["parameters"] - lost + 32 * H + 32 + 33 * V}
    if "equal" in network.name:
        assert abs((counted["parameters"] + 32 * H) / (networks.cost("GRU", 32, 32)["parameters"] + 32 * 32) - 1) < 0.03
    expected = {("gap", gap) for gap in TINY.gaps}
    if network.gaps == networks.TRAINED:
        expected |= {("switches", 0), ("switches", 1), ("story", 1), ("story", 2)}
    assert {(row["measure"], row["at"]) for row in rows if row["asked"]} == expected and bool(words) == (network == GRU)


def test_answers_are_the_likeliest_word():
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


def test_words_show_what_the_layer_computes():
    model = StoryModel(TINY, GRU, 0)
    words = networks.story_words(model, 0)
    told = [str(row["word"]) for row in words]
    assert told[:3] == ["dhaval", "eats", "samosa"] and told[-2:] == ["italian", "."]
    for dish, answer in zip(("samosa", "pasta"), story.EXPECTED, strict=True):
        states = {}
        for other, cuisine in CUISINE.items():
            retold = [other if word == dish else cuisine if word == answer else word for word in told]
            numbers = torch.tensor(model.vocabulary.encode(["<end>", *retold])).view(-1, 1)
            states[other] = model.model.layer(model.model.embed(numbers).detach())[0][1:, 0].detach().double()
        # That the dish is not among the others here changes no ratio.
        left = states[dish] - torch.stack([state for other, state in states.items() if other != dish]).mean(0)
        mark = left[told.index(dish)]
        assert [row[f"like {dish}"] for row in words] == pytest.approx((left @ mark / (mark @ mark)).tolist(), abs=1e-5)
    z = tritongru.gates(model.model.layer, model.model.embed(numbers[:3])).z
    assert words[1]["z"] == pytest.approx(float(z[0, 0, 2].mean()))
    asked = model.next_word([*told[:3], *tokenise(story.QUESTION)])
    assert words[2]["P(indian)"] == pytest.approx(float(asked[model.vocabulary.index["indian"]]))


def made_up(right: dict[str, list[float]]) -> list[networks.Row]:
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
HOLDS = {"GRU": GOOD, networks.GRU_SHORT.name: GOOD, "trigram": BAD, "RNN": BAD, networks.RNN_EQUAL.name: BAD}


def held(rows: list[networks.Row]) -> set[str]:
    judged = claims.judge(rows)
    assert len(judged) == len(CLAIMS)
    return {key for key in CLAIMS if next(claim.held for claim in judged if key in claim.text)}


def test_claims_hold_by_numbers_alone_and_each_part_counts():
    rows = made_up(HOLDS)
    assert held(rows) == set(CLAIMS) - {"less time", "At times"}
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
    for mine, theirs, beats in (
        ([0.9, 0.9], [0.8, 0.8], True), ([0.9, 0.9], [0.89, 0.89], False), ([0.7, 1.0], [0.6, 0.8], False),
        ([0.8, 1.0], [0.6, 0.8], False), ([0.9], [0.8], True), ([0.8], [0.9], False),
    ):  # fmt: skip
        assert claims.spread(mine).beats(claims.spread(theirs)) == beats


def test_a_run_leaves_rows_figures_and_verdicts(tmp_path, capsys):
    run.run_story(options("--story", "--seed", "4", "--out", tmp_path), TINY, processes=2)
    drawn = {"story-gaps.png", "story-gates.png"} if HAS_MATPLOTLIB else set()
    assert {path.name for path in tmp_path.iterdir()} == {"story-answers.csv", "story-words.csv"} | drawn
    rows = list(csv.DictReader((tmp_path / "story-answers.csv").open(encoding="utf-8")))
    assert tuple(rows[0]) == networks.COLUMNS and {row["seed"] for row in rows} == {"4"}
    assert {row["model"] for row in rows} == set(networks.MODELS)
    shown = capsys.readouterr().out
    for claim in claims.judge(rows):  # from the file alone, as printed
        assert f"{'held  ' if claim.held else 'FAILED'} {claim.text}.\n       {claim.numbers}." in shown
    assert "One seed has no spread" in shown and "±" not in shown


def test_an_interruption_keeps_what_had_ended(tmp_path, monkeypatch, capsys):
    taken = []

    def results(sizes, *_):
        taken.append(sizes)
        yield "GRU", *train_and_ask(TINY, GRU, 0)
        raise KeyboardInterrupt

    monkeypatch.setattr(networks, "results", results)
    assert demo.main(options("--story", "--out", tmp_path)) == 130
    assert demo.main(options("--story", "--seeds", "1", "--out", tmp_path)) == 130
    assert taken == [networks.ONE_SEED, Sizes()]  # who asks for no seeds waits less
    assert command.main(tmp_path, TINY) == 130 and "interrupted" in capsys.readouterr().err
    assert "GRU," in (tmp_path / "story-answers.csv").read_text()
    assert "GRU," in (tmp_path / "story" / command.ANSWERS).read_text()
    with pytest.raises(FileExistsError, match="move it away"):
        command.main(tmp_path, TINY)


def test_committed_rows_are_a_whole_run_of_these_sizes():
    folder = results_files.RESULTS / command.FOLDER
    rows = results_files.read(folder / command.ANSWERS, command.COLUMNS)
    words = results_files.read(folder / command.WORDS, command.WORD_COLUMNS)
    sizes, seeds = Sizes(), {str(seed) for seed in command.SEEDS}
    asked = {(row["seed"], row["model"], row["at"]) for row in rows if row["measure"] == "gap"}
    assert asked >= {(seed, model, str(gap)) for seed in seeds for model in networks.MODELS for gap in sizes.gaps}
    assert {row["rate"] for row in rows if row["rate"]} <= set(map(str, sizes.rates))
    assert {row["asked"] for row in rows if row["measure"] == "gap"} == {str(sizes.asked)}
    assert len({row["commit"] for row in rows}) == 1 and {row["dirty"] for row in rows} == {"no"}
    assert len(seeds) >= 5 and {row["seed"] for row in words} == seeds
    counted = [{name: str(value) for name, value in row.items()} for row in networks.ask_trigram(sizes, 10)]  # again
    of_trigram = [row for row in rows if (row["seed"], row["model"]) == ("10", networks.TRIGRAM)]
    assert counted == [{name: row[name] for name in networks.COLUMNS} for row in of_trigram]
