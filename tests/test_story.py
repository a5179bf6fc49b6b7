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
from tritongru.demo.networks import Sizes, train_and_ask
from tritongru.demo.story import Recipe, generate
from tritongru.demo.storytelling import StoryModel, StorySizes, begin_retaining, training_texts

CPU = torch.device("cpu")
TINY = Sizes(
    StorySizes(
        embedding=8, hidden=8, texts=64, held_out=10, batch=4, steps=8,
        recipe=Recipe(networks.TRAINED, switches=(0, 1, 2, 3), again=True),
    ),
    rates=(0.01,), gaps=(7, 30, 40), switches=(0, 1), asked=4,
)  # fmt: skip


pytestmark = pytest.mark.usefixtures("one_thread")


# The texts


@pytest.mark.parametrize("gap", [7, 8, 30, 200])
def test_gaps_and_switches_are_those_asked_for(gap: int) -> None:
    cuisine_of = {dish: cuisine for cuisine, dishes in story.DISHES.items() for dish in dishes.split()}
    for text in generate(100, 1, recipe=Recipe((gap,), (2,))):
        assert text.gaps == (gap,) * 3 and text.kinds == ("first", "new dish", "new dish")
        cuisines = [text.words[at] for at in text.answers]
        assert cuisines[0] != cuisines[1] != cuisines[2]
        for at in text.answers:
            assert cuisine_of[text.words[at - gap - 1]] == text.words[at]
            assert not set(text.words[at - gap : at]) & set(cuisine_of)  # the last dish, also of "dosa and idli"
        assert not story.tells_the_story(text.words)


def test_the_same_food_again_stays_within_the_largest_gap() -> None:
    texts = generate(400, 1, recipe=Recipe(networks.TRAINED, (0, 1), again=True))
    gaps = [gap for text in texts for gap, kind in zip(text.gaps, text.kinds, strict=True) if kind == "same food"]
    assert len(gaps) > 50 and max(gap for text in texts for gap in text.gaps) == 30
    for text in texts:
        for i, kind in enumerate(text.kinds):
            assert kind != "same food" or text.words[text.answers[i]] == text.words[text.answers[i - 1]]


@pytest.mark.parametrize(
    ("gaps", "switches", "said"), [((6,), (0,), "gaps"), ((), (0,), "gaps"), ((7,), (-1,), "switches")]
)
def test_recipes_that_cannot_be_followed_are_refused(gaps: tuple, switches: tuple, said: str) -> None:
    with pytest.raises(ValueError, match=f"{said} must be .*got"):
        Recipe(gaps, switches)


def test_training_begins_with_small_gaps_and_never_reads_what_is_asked() -> None:
    s = TINY.story
    texts = training_texts(600, 3, s.recipe, s.batch)
    assert len({text.words for text in texts}) == 600
    first = [
        gap for text in texts[:200] for gap, kind in zip(text.gaps, text.kinds, strict=True) if kind != "same food"
    ]
    assert max(first) == 12 and max(gap for text in texts[200:] for gap in text.gaps) == 30
    asked = [text for *_, texts_ in networks.questions(TINY, 3, frozenset(t.words for t in texts)) for text in texts_]
    assert {text.words for text in asked}.isdisjoint(text.words for text in texts)
    assert len(asked) == TINY.asked * (len(TINY.gaps) + len(TINY.switches))


@pytest.mark.parametrize("gap", [7, 10, 12, 15, 30, 200])
def test_longer_gaps_of_the_words_of_short_ones(gap: int) -> None:
    """Networks trained on short gaps are asked over longer ones in words that they have read: memory alone is asked."""
    recipe = Recipe(networks.SHORT, (0, 1, 2, 3), again=True)
    read = {word for text in story.generate(4000, 0, recipe=recipe) for word in text.words}
    texts = story.generate(300, 1, recipe=Recipe((gap,), (0,), words_of=networks.SHORT[-1]))
    assert {word for text in texts for word in text.words} <= read
    assert {text.gaps for text in texts} == {(gap,)}
    for text in texts:
        dish = max(i for i, word in enumerate(text.words) if any(word in d.split() for d in story.DISHES.values()))
        assert text.answers[-1] - dish - 1 == gap
    if gap >= 30:  # without it there are other words
        others = story.generate(300, 1, recipe=Recipe((gap,), (0,)))
        assert not {word for text in others for word in text.words} <= read


@pytest.mark.parametrize("network", networks.ON_SHORT, ids=lambda network: network.cell)
def test_the_controls_are_not_asked_what_they_have_read(
    network: networks.Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They read other texts than those that nobody is asked."""
    sizes = dataclasses.replace(TINY, story=dataclasses.replace(TINY.story, texts=4000, steps=1), asked=1500)
    read, asked = set(), set()
    answered = StoryModel.answered

    def spy(model: StoryModel, texts: list[story.Text]) -> Iterator[tuple[story.Text, list[bool]]]:
        read.update(model.trained_on)
        asked.update(text.words for text in texts)
        return answered(model, texts)

    monkeypatch.setattr(StoryModel, "answered", spy)
    train_and_ask(sizes, network, 10)
    assert len(asked) >= sizes.asked and asked.isdisjoint(read)


# The networks


def test_every_network_begins_by_retaining() -> None:
    x = torch.randn(1, 50, 8)
    gru = nn.GRU(8, 16)
    begin_retaining(gru, 4.0)
    assert tritongru.gates(gru, x).z.mean() > 0.95
    lstm = nn.LSTM(8, 16)
    begin_retaining(lstm, 4.0)
    state = torch.zeros(1, 50, 16), torch.ones(1, 50, 16)
    _, (_, c) = lstm(x, state)
    assert 0.9 < c.mean() < 1.05  # little forgotten, little added
    rnn = nn.RNN(8, 16)
    begin_retaining(rnn, 4.0)
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
    assert torch.equal(lost, lost[:, :, :1, :1].expand_as(lost))
    assert kept.std(2).min() > 0
    if gate == "reset":
        assert torch.equal(lost, torch.ones_like(lost))
    else:
        assert lost[0, 0, 0, 0].std() > 0  # each unit has learned its own constant


def test_a_gate_taken_away_is_one_or_the_mean_it_had() -> None:
    model = StoryModel(TINY.story, tritongru.GRU, CPU, 0)
    text = model.held_out[0].words
    before, mean = networks._states(model, text), networks.mean_update(model)
    without_z, without_r = networks.robbed(model, "update"), networks.robbed(model, "reset")
    torch.testing.assert_close(networks._states(without_z, text).z, mean.expand_as(before.z))
    assert networks._states(without_z, text).r.std(2).min() > 0
    torch.testing.assert_close(networks.mean_update(without_z), mean)  # of z: r was another then
    assert (networks._states(without_r, text).r == 1).all() and networks._states(without_r, text).z.std(2).min() > 0
    for found, had in zip(networks._states(model, text), before, strict=True):
        assert torch.equal(found, had)  # the model itself keeps both


def test_the_rate_of_the_least_held_out_loss_is_taken() -> None:
    rows, _ = train_and_ask(dataclasses.replace(TINY, rates=(0.01, 1e-6)), networks.RNN_SHORT, 0)
    losses = {row["at"]: row["value"] for row in rows if row["measure"] == "validation"}
    assert losses[0.01] < losses[1e-6] and {row["rate"] for row in rows} == {0.01}


def test_the_last_cuisine_is_what_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    model = StoryModel(TINY.story, nn.RNN, CPU, 0)

    def only_the_last(model: StoryModel, texts: list[story.Text]) -> Iterator[tuple[story.Text, list[bool]]]:
        for text in texts:
            yield text, [False] * (len(text.answers) - 1) + [True]

    monkeypatch.setattr(StoryModel, "answered", only_the_last)
    rows = list(networks._asked(dataclasses.replace(TINY, switches=(0, 2)), 0, model))
    assert len(rows) == 5 and all(row["right"] == row["asked"] == TINY.asked for row in rows)


def test_both_sentences_are_one_running_text(monkeypatch: pytest.MonkeyPatch) -> None:
    model = StoryModel(TINY.story, nn.RNN, CPU, 0)
    read: list[list[str]] = []

    def indian(model: StoryModel, words: list[str]) -> torch.Tensor:
        read.append(list(words))
        return torch.eye(len(model.vocabulary))[model.vocabulary.index["indian"]]

    monkeypatch.setattr(StoryModel, "next_word", indian)
    assert [row["right"] for row in networks._story(model)] == [1, 0]
    assert read == [tokenise(story.FIRST), [*tokenise(story.FIRST), "indian", ".", *tokenise(story.SECOND)]]


def test_cpu_time_is_microseconds_of_a_step() -> None:
    start = time.process_time()
    found = networks.cpu_time("RNN", 8, 8, T=50)
    assert 0.2 * found < (time.process_time() - start) / (20 * 50) * 1e6 < 50 * found


@pytest.mark.parametrize("network", [networks.RNN_EQUAL, networks.LSTM_EQUAL], ids=lambda network: network.cell)
def test_equal_parameters(network: networks.Network) -> None:
    H = networks.hidden_size(network, 32, 32)
    assert networks.hidden_size(networks.LSTM, 32, 32) == 32 != H

    def count(cell: str, size: int) -> int:
        return sum(p.numel() for p in networks.LAYERS[cell](32, size).parameters()) + size * 32

    assert abs(count(network.cell, H) / count("GRU", 32) - 1) < 0.03


@pytest.mark.parametrize("cell", networks.LAYERS)
def test_counts_are_those_of_the_layers(cell: str) -> None:
    layer = networks.LAYERS[cell](24, 40)
    weights = layer.weight_ih_l0.numel() + layer.weight_hh_l0.numel()
    biases = layer.bias_ih_l0.numel() + layer.bias_hh_l0.numel()
    _, state = layer(torch.zeros(1, 1, 24))
    states = len(state) if isinstance(state, tuple) else 1
    assert networks.flops(cell, 24, 40) == 2 * weights
    assert networks.STATES[cell] == states
    assert networks.step_bytes(cell, 24, 40) == 4 * (weights + biases + 24 + 2 * states * 40)
    assert networks.gates_of(cell) == layer.weight_hh_l0.shape[0] // 40 - 1


@pytest.mark.parametrize("network", networks.NETWORKS, ids=lambda network: network.name)
def test_parameters_that_change_are_those_counted(network: networks.Network) -> None:
    """Row by row: what a removed gate has lost does not count."""
    rows, words = train_and_ask(TINY, network, 0)
    (parameters,) = {row["parameters"] for row in rows}
    H, I = networks.hidden_size(network, 8, 8), 8
    vocabulary = (int(str(parameters)) - H * I - I - networks.PRODUCTS[network.cell] * H * (I + H + 2)) / (I + 1)
    lost = {"": 0, "reset": H * (I + H + 2), "update": H * (I + H + 1)}[network.without]
    assert (vocabulary + lost / (I + 1)).is_integer()
    assert bool(words) == (network == networks.GRU)
    asked = {(row["measure"], row["at"]) for row in rows if row["model"] == network.name and row["asked"]}
    expected = {("gap", gap) for gap in TINY.gaps}
    if network not in networks.ON_SHORT:
        expected |= {("switches", 0), ("switches", 1), ("story", 1), ("story", 2)}
    assert asked == expected
    assert all(0 <= int(str(row["right"])) <= int(str(row["asked"])) for row in rows if row["asked"])


def test_a_training_takes_its_steps_and_learns() -> None:
    model = StoryModel(dataclasses.replace(TINY.story, steps=60, learning_rate=0.02), nn.GRU, CPU, 0)
    reported: list[int] = []
    before = model.cuisine_loss(model.held_out)
    losses = model.train(lambda step, loss: reported.append(step))
    assert len(losses) == 60 and reported == [10, 20, 30, 40, 50, 60]
    assert model.cuisine_loss(model.held_out) < before - 0.5


def test_answers_are_the_likeliest_word() -> None:
    """By another way: word after word, one text at a time."""
    model = StoryModel(TINY.story, nn.LSTM, CPU, 0)
    model.train()
    texts = generate(12, 99, recipe=Recipe((7,), (1,)))
    for text, found in model.answered(texts):
        slow = [
            model.vocabulary.words[int(model.next_word(text.words[:at]).argmax())] == text.words[at]
            for at in text.answers
        ]
        assert found == slow
    losses = [
        -model.next_word(t.words[:at])[model.vocabulary.index[t.words[at]]].log() for t in texts for at in t.answers
    ]
    assert model.cuisine_loss(texts) == pytest.approx(float(torch.stack(losses).mean()), rel=1e-4)


def test_a_trigram_knows_two_words() -> None:
    """They are always "cuisine is": its one guess is right as often as that cuisine comes."""
    rows = [row for row in networks.ask_trigram(TINY, 0) if row["measure"] == "gap"]
    texts = training_texts(TINY.story.texts, 0, TINY.story.recipe, TINY.story.batch)
    for row, (_, gap, asked) in zip(rows, networks.questions(TINY, 0, frozenset(t.words for t in texts)), strict=False):
        counts = [sum(text.words[text.answers[-1]] == cuisine for text in asked) for cuisine in story.DISHES]
        assert row["at"] == gap and row["right"] in counts


def test_words_show_what_the_layer_computes() -> None:
    model = StoryModel(TINY.story, tritongru.GRU, CPU, 0)
    words = list(networks.story_words(model))
    told = [str(row["word"]) for row in words]
    assert told[:3] == ["dhaval", "eats", "samosa"] and told[-2:] == ["italian", "."]
    for dish in ("samosa", "pasta"):
        at = told.index(dish)
        values = [float(str(row[f"like {dish}"])) for row in words]
        assert values[:at] == pytest.approx([0] * at, abs=1e-5)
        assert values[at] == pytest.approx(1)
        assert values == pytest.approx(likeness_by_hand(model, told, dish), abs=1e-5)
    numbers = torch.tensor(model.vocabulary.encode(["<end>", *told])).view(-1, 1)
    x = model.model.embed(numbers)
    found = tritongru.gates(model.model.layer, x)
    assert [row["z"] for row in words] == pytest.approx(found.z[0, 0, 1:, 0].mean(-1).tolist())
    assert [row["r"] for row in words] == pytest.approx(found.r[0, 0, 1:, 0].mean(-1).tolist())
    torch.testing.assert_close(found.h[0, 0], model.model.layer(x)[0], atol=1e-5, rtol=1e-5)
    asked = model.next_word([*told[:3], *tokenise(story.QUESTION)])
    assert words[2]["P(indian)"] == pytest.approx(float(asked[model.vocabulary.index["indian"]]))


def likeness_by_hand(model: StoryModel, told: list[str], dish: str) -> list[float]:
    """From the states of the story with each dish and the cuisine that goes with it, one word of which differs."""
    place, answer = told.index(dish), story.EXPECTED[("samosa", "pasta").index(dish)]
    states = {}
    for cuisine, dishes in story.DISHES.items():
        for other in dishes.split():
            words = [other if i == place else cuisine if word == answer else word for i, word in enumerate(told)]
            numbers = torch.tensor(model.vocabulary.encode(["<end>", *words])).view(-1, 1)
            with torch.no_grad():
                states[other] = model.model.layer(model.model.embed(numbers))[0][1:, 0].double()
    others = torch.stack([state for other, state in states.items() if other != dish]).mean(0)
    left = states[dish] - others  # that the dish is not among the others changes no ratio
    return [float(here @ left[place] / (left[place] @ left[place])) for here in left]


# The verdicts


def made_up(right: dict[str, list[float]], told: tuple[int, int] = (1, 1)) -> list[networks.Row]:
    """Rows of every model with these shares by seed, everywhere; what is not given is 0.5 in every seed."""
    rows: list[networks.Row] = []
    models = [*(network.name for network in networks.NETWORKS), networks.CLAMPED, networks.AVERAGED, networks.TRIGRAM]
    seeds = len(next(iter(right.values())))
    for model in models:
        for seed, share in enumerate(right.get(model, [0.5] * seeds)):
            about = {"seed": seed, "model": model, "input": 32, "hidden": 32, "parameters": 9 if "GRU" in model else 10}
            places = [("gap", 7), ("gap", 30), ("gap", 200), ("switches", 0), ("switches", 3)]
            rows += [about | {"measure": m, "at": at, "right": round(1000 * share), "asked": 1000} for m, at in places]
            rows += [about | {"measure": "story", "at": at, "right": told[at - 1], "asked": 1} for at in (1, 2)]
            rows.append(about | {"measure": "time", "at": "", "value": 10.0})
    return [dict.fromkeys(networks.COLUMNS, "") | row for row in rows]


def verdicts(rows: list[networks.Row]) -> dict[str, bool]:
    keys = ("samosa is kept", "samosa is let go", "trigram", "basic RNN", "lets go as often", "three gates", "lighter",
            "less time", "At times", "reset gate", "update gate")  # fmt: skip
    judged = claims.judge(rows)
    assert len(judged) == len(keys)
    return {key: next(claim.held for claim in judged if key in claim.text) for key in keys}


def test_claims_hold_by_numbers_alone() -> None:
    good = [0.95, 0.96, 0.97]
    bad = [0.2, 0.21, 0.22]
    names = networks.GRU.name, networks.GRU_SHORT.name, networks.TRIGRAM, networks.RNN.name
    found = verdicts(made_up(dict(zip(names, (good, good, bad, bad), strict=True))))
    assert found == {
        "samosa is kept": True, "samosa is let go": True, "trigram": True, "basic RNN": True, "lets go as often": True,
        "three gates": True, "lighter": True, "less time": False, "At times": False, "reset gate": True,
        "update gate": True,
    }  # fmt: skip
    found = verdicts(made_up({networks.GRU.name: bad, networks.TRIGRAM: bad}, told=(1, 0)))
    assert found == {
        "samosa is kept": True, "samosa is let go": False, "trigram": False, "basic RNN": False,
        "lets go as often": False, "three gates": True, "lighter": True, "less time": False, "At times": True,
        "reset gate": False, "update gate": False,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("mine", "theirs", "beats"),
    [
        ([0.9, 0.9], [0.8, 0.8], True),
        ([0.9, 0.9], [0.89, 0.89], False),  # nobody would care
        ([0.7, 1.0], [0.6, 0.8], False),  # within the spread
        ([0.8, 1.0], [0.6, 0.8], False),  # beyond each, within both together
        ([0.9], [0.8], True),
        ([0.8], [0.9], False),
    ],
    ids=["clear", "tiny", "overlapping", "touching", "one-seed", "worse"],
)
def test_better_means_beyond_the_spread(mine: list[float], theirs: list[float], beats: bool) -> None:
    assert claims.spread(mine).beats(claims.spread(theirs)) == beats


def claim(rows: list[networks.Row], text: str) -> claims.Claim:
    """The one that has these words in it."""
    (found,) = (claim for claim in claims.judge(rows) if text in claim.text)
    return found


def only(rows: list[networks.Row], model: str, measure: str, at: object, **cells: object) -> list[networks.Row]:
    """The rows with other cells where a model was asked this."""
    return [row | cells if (row["model"], row["measure"], row["at"]) == (model, measure, at) else row for row in rows]


def test_each_part_of_a_claim_counts() -> None:
    good, bad = [0.95, 0.96, 0.95], [0.2, 0.21, 0.2]
    rows = made_up({networks.GRU.name: good, networks.RNN.name: bad, networks.RNN_EQUAL.name: good})
    assert not claim(rows, "basic RNN").held  # at equal parameters no worse
    alike = {networks.GRU_SHORT.name: good, networks.TRIGRAM: bad}
    rows = made_up({networks.GRU.name: good, networks.RNN.name: bad, networks.RNN_EQUAL.name: bad, **alike})
    assert claim(rows, "basic RNN").held
    assert not claim(only(rows, networks.GRU_SHORT.name, "gap", 30, right=500), "basic RNN").held  # not trained alike
    assert not claim(only(rows, networks.RNN_SHORT.name, "gap", 7, right=200), "basic RNN").held  # it learned nothing
    rows = made_up({networks.GRU.name: good, networks.TRIGRAM: bad})
    assert claim(rows, "lets go as often").held
    assert not claim(only(rows, networks.GRU.name, "switches", 3, right=600), "lets go as often").held
    rows = made_up({networks.GRU.name: good, networks.NO_RESET.name: good, networks.NO_UPDATE.name: good})
    assert not claim(rows, "reset gate").held and not claim(rows, "update gate").held
    for measure, at in (("gap", 30), ("gap", 200), ("switches", 3)):
        assert claim(only(rows, networks.NO_RESET.name, measure, at, right=200), "reset gate").held
        assert claim(only(rows, networks.NO_UPDATE.name, measure, at, right=200), "update gate").held
    wrong_once = [row | {"right": 0} if (row["measure"], row["seed"]) == ("story", 1) else row for row in rows]
    assert not claim(wrong_once, "samosa is kept").held
    assert "flops 12,288 to 16,384, bytes 25,728 to 34,432" in claim(rows, "lighter").numbers


@pytest.mark.parametrize(("time_of_gru", "held"), [(8.0, True), (9.5, False), (12.0, False)])
def test_quicker_is_by_a_tenth(time_of_gru: float, held: bool) -> None:
    rows = only(made_up({networks.GRU.name: [0.5, 0.5]}), networks.GRU.name, "time", "", value=time_of_gru)
    assert claim(rows, "less time").held == held


def test_the_lstm_s_best_case_says_in_how_many_seeds() -> None:
    """Seeds differ so much far out that their spreads overlap even where every one of them says the same."""
    rows = made_up({networks.GRU.name: [0.1, 0.4, 0.9], networks.LSTM.name: [0.6, 0.9, 0.95]})
    found = claim(rows, "At times")
    assert not found.held and "LSTM 81.7 ± 18.9 %, GRU 46.7 ± 40.4 % at 200 words" in found.numbers
    assert found.numbers.endswith("it has more right than the GRU in 3 of 3 seeds")


@pytest.mark.parametrize("share", [0.2, 0.9], ids=["at chance", "learned"])
def test_an_rnn_that_has_learned_nothing_is_said_to_have_learned_nothing(share: float) -> None:
    names = networks.RNN.name, networks.RNN_EQUAL.name, networks.TRIGRAM
    rows = made_up(dict(zip(names, ([share, share], [share, share], [0.2, 0.2]), strict=True)))
    numbers = claim(rows, "basic RNN").numbers
    assert ("it learns to hold no dish" in numbers) == (share == 0.2)


def test_missing_rows_are_an_error_not_a_verdict() -> None:
    rows = [row for row in made_up({networks.GRU.name: [0.9]}) if row["model"] != networks.TRIGRAM]
    with pytest.raises(ValueError, match="trigram"):
        claims.judge(rows)


# A run


FILES = {"story-answers.csv", "story-words.csv"}
FIGURES = {f"story-{name}.{suffix}" for name in ("gaps", "gates", "networks", "worth") for suffix in ("png", "svg")}


def test_a_run_leaves_rows_figures_and_verdicts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = options("--story", "--seeds", "2", "--seed", "4", "--out", str(tmp_path / "out"))
    assert run.run_story(arguments, TINY, processes=1) == 0
    expected = FILES | FIGURES if HAS_MATPLOTLIB else FILES
    assert {path.name for path in (tmp_path / "out").iterdir()} == expected
    rows = list(csv.DictReader((tmp_path / "out" / "story-answers.csv").open(encoding="utf-8")))
    assert tuple(rows[0]) == networks.COLUMNS
    assert {row["seed"] for row in rows} == {"4", "5"}
    trained = {network.name for network in networks.NETWORKS}
    assert {row["model"] for row in rows} == trained | {networks.CLAMPED, networks.AVERAGED, networks.TRIGRAM}
    shown = " ".join(capsys.readouterr().out.split())
    for claim in claims.judge(rows):  # from the file alone, as printed
        assert f"{'held' if claim.held else 'FAILED'} {claim.text}. {claim.numbers}." in shown


def test_a_single_seed_says_that_it_has_no_spread(capsys: pytest.CaptureFixture[str]) -> None:
    from tritongru.demo.screen import Screen

    run.show_claims(Screen(), made_up({networks.GRU.name: [0.9]}))
    shown = " ".join(capsys.readouterr().out.split())
    assert "One seed has no spread" in shown and "--seeds 5" in shown and "±" not in shown


@pytest.mark.parametrize(("given", "size"), [((), networks.ONE_SEED), (("--seeds", "1"), Sizes())], ids=["one", "many"])
def test_who_asks_for_no_seeds_waits_less(
    given: tuple[str, ...], size: Sizes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def stop(sizes: Sizes, *_: object) -> None:
        asked.append(sizes)
        raise KeyboardInterrupt

    monkeypatch.setattr(networks, "results", stop)
    assert demo.main(options("--story", *given, "--out", str(tmp_path))) == 130
    assert asked == [size] and networks.ONE_SEED.story.steps < Sizes().story.steps


@pytest.mark.parametrize("which", ["demo", "benchmarks"])
def test_an_interruption_keeps_what_had_ended(
    which: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(sizes: Sizes, network: networks.Network, seed: int) -> tuple[list, list]:
        if network != networks.NETWORKS[0]:
            raise KeyboardInterrupt
        return train_and_ask(TINY, network, seed)

    monkeypatch.setattr(networks, "train_and_ask", interrupt)
    monkeypatch.setattr(networks.os, "cpu_count", lambda: 1)
    monkeypatch.setattr(networks, "ask_trigram", lambda sizes, seed: [])
    if which == "demo":
        assert demo.main(options("--story", "--out", str(tmp_path))) == 130
        found = list(csv.DictReader((tmp_path / "story-answers.csv").open(encoding="utf-8")))
        assert {path.name for path in tmp_path.iterdir()} == FILES
    else:
        assert command.main(tmp_path, TINY) == 130
        found = results_files.read(tmp_path / "story" / command.ANSWERS, command.COLUMNS)
        with pytest.raises(FileExistsError, match="move it away"):
            command.main(tmp_path, TINY)
    assert networks.GRU.name in {row["model"] for row in found}
    assert "interrupted" in capsys.readouterr().err


def test_processes_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(networks, "NETWORKS", (networks.RNN_SHORT,))
    found = []
    for processes in (1, 2):
        rows: dict[str, list[networks.Row]] = {}
        networks.results(TINY, (0, 1), lambda name, answers, _, rows=rows: rows.update({name: answers}), processes)
        found.append(rows)
    assert found[0] == found[1] and len(found[0]) == 4


def test_a_killed_training_is_an_error_in_words(tmp_path: Path) -> None:
    broken = dataclasses.replace(TINY, rates=_Ends())
    with pytest.raises(DemoError, match="ended from outside"):
        run.run_story(options("--story", "--out", str(tmp_path)), broken, processes=2)


class _Ends(tuple):
    """Ends the process that asks for it, as a system without memory would."""

    def __iter__(self):
        import multiprocessing
        import os

        if multiprocessing.parent_process() is not None:
            os._exit(9)
        return super().__iter__()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--story", "--text", "a.txt"], "--text"),
        (["--story", "--prompt", "a word"], "--prompt"),
        (["--story", "--interactive"], "--interactive"),
        (["--story", "--seeds", "0"], "--seeds"),
        (["--seeds", "3"], "--story"),
        (["--story", "--seed", str(10**12)], "--seed"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options_that_do_not_go_together(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert demo.main(options(*arguments, "--out", str(tmp_path / "out"))) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


# The committed run


def committed() -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    folder = results_files.RESULTS / command.FOLDER
    return (
        results_files.read(folder / command.ANSWERS, command.COLUMNS),
        results_files.read(folder / command.WORDS, command.WORD_COLUMNS),
    )


def test_of_an_interrupted_run_whole_seeds_alone_are_drawn() -> None:
    """Else a figure would say "5 seeds" of a network that has two."""
    figures = pytest.importorskip("tritongru.demo.figures")
    rows, words = committed()
    partly = [row for row in rows if (row["seed"], row["model"]) < ("12", networks.LSTM.name)]
    assert {row["seed"] for row in partly} == {"10", "11", "12"}
    assert {row["seed"] for row in claims.whole(partly)} == {"10", "11"}
    trigrams = [row for row in rows if row["model"] == networks.TRIGRAM]
    for name, draw in figures.STORY.items():
        if name != figures.WORDS:
            assert "2 seeds" in " ".join(text.get_text() for text in draw(partly).texts)
            assert draw(trigrams) is None
    drawn = figures.draw_gates(words[: 33 + 10])
    assert "One seed" in " ".join(text.get_text() for text in drawn.texts)
    assert figures.draw_gates([]) is None


def test_committed_rows_are_a_whole_run_of_these_sizes() -> None:
    rows, words = committed()
    sizes, seeds = Sizes(), {str(seed) for seed in command.SEEDS}
    asked = {(row["seed"], row["model"], row["measure"], row["at"]) for row in rows if row["asked"]}
    places = [("gap", str(gap)) for gap in sizes.gaps] + [("switches", str(n)) for n in sizes.switches]
    gaps = [place for place in places if place[0] == "gap"]
    assert asked >= {(seed, network.name, *gap) for seed in seeds for network in networks.ON_SHORT for gap in gaps}
    models = [n.name for n in networks.NETWORKS if n not in networks.ON_SHORT]
    models += [networks.CLAMPED, networks.AVERAGED, networks.TRIGRAM]
    assert asked >= {(seed, model, *place) for seed in seeds for model in models for place in places}
    assert {row["rate"] for row in rows if row["rate"]} <= set(map(str, sizes.rates))
    assert {row["asked"] for row in rows if row["measure"] == "gap"} == {str(sizes.asked)}
    assert len({row["commit"] for row in rows}) == 1 and {row["dirty"] for row in rows} == {"no"}
    assert len(seeds) >= 5 and {row["seed"] for row in words} == seeds
    assert all(math.isfinite(float(row["z"])) for row in words)
