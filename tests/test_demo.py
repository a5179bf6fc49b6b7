"""The demo: its text, its model, what it suggests, the file of a model, the comparison with nn.GRU, what it refuses;
and the story: its texts, networks without a gate, questions, verdicts, and what a run leaves behind."""

import argparse
import builtins
import csv
import dataclasses
import gc
import io
import math
import pickle
import random
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import tritongru
from benchmarks import results as results_files
from benchmarks import story as command
from tritongru.__main__ import main
from tritongru.demo import autocomplete, claims, compare, data, networks, run, story, training
from tritongru.demo.autocomplete import Autocomplete
from tritongru.demo.data import END, NUMBER, SPECIAL, DemoError, tokenise
from tritongru.demo.networks import GRU, NETWORKS, Sizes, StoryModel, train_and_ask
from tritongru.demo.story import CUISINE, Recipe, generate
from tritongru.tools.files import write_rows

CPU = torch.device("cpu")
TINY = training.Sizes(60, embedding=16, hidden=24, batch=4, window=8, steps=12, check_batch=2, check_window=3)
STORY = Sizes(texts=64, held_out=10, batch=4, steps=8, rates=(0.01,), gaps=(7, 30, 40), switches=(0, 1), asked=4)
pytestmark = pytest.mark.usefixtures("one_thread")


def passages(count=300):
    """A made-up language whose next word can partly be guessed, in which some words begin others."""
    rng, text = random.Random(0), []
    words = ["ba", "bano", "banoli", "keli", "kelida", "kelidaru", "mi", "minofe", "to", "torusa", "sa", "don't"]
    for number in range(count):
        start = rng.randrange(len(words))
        said = [words[(start + rng.randrange(3) * i) % len(words)] for i in range(12)]
        text.append(" ".join(said) + f", {rng.randrange(1000)} rare{number}.")
    return text


@pytest.fixture(scope="module")
def corpus():
    return data.build_corpus(passages(), "made up", TINY.vocabulary)


@pytest.fixture(scope="module")
def trained(corpus):
    model = training.build_model(corpus.vocabulary, TINY, tritongru.GRU, seed=0)
    training.train(model, corpus, dataclasses.replace(TINY, steps=60))
    return model


@pytest.fixture
def typed(trained, corpus):
    return Autocomplete(trained, corpus.vocabulary, "made\nup")


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(passages()), encoding="utf-8")
    return path


def test_docstrings_are_read_without_importing_and_in_order(tmp_path):
    sentence = "This sentence number {} is long enough to count as prose."
    (tmp_path / "b.py").write_text(f'"""{sentence.format("two")}"""\nraise SystemExit("imported")\n')
    (tmp_path / "a.py").write_text(f'"""{sentence.format("one")}\n\n>>> code()\n"""\n')
    (tmp_path / "broken.py").write_text("def (:")
    assert data.standard_library_passages(tmp_path) == [sentence.format("one"), sentence.format("two")]


def test_words_their_numbers_and_those_held_out():
    tokens = ["the", "file's", "end", ",", "(", "it's", NUMBER, ")", "os.path_join", "now", ".", "unk"]
    assert tokenise("The file's END, (It\u2019s 3.5 %) os.path_join now. <unk>") == tokens
    vocabulary = data.Vocabulary.of(["b", "a", "c", "c", "b", "a", "d"], size=6)
    assert vocabulary.words == [*SPECIAL, "a", "b", "c"]  # by frequency, then spelling
    assert vocabulary.encode(["c", "d"]) == [5, vocabulary.index["<unk>"]]
    stream = data.lanes(list(range(23)), batch=2)
    assert stream.tolist() == [[i, 11 + i] for i in range(11)]
    words, following = (torch.cat(part) for part in zip(*data.windows(stream, 4), strict=True))
    assert torch.equal(words, stream[:-1]) and torch.equal(following, stream[1:])
    plain = data.build_corpus(passages(500), "plain", 10**6)
    assert 0.04 < len(plain.held_out) / len(plain.train) < 0.15
    rare = [word.startswith("rare") for word in plain.vocabulary.words]  # of each passage one
    assert not any(rare[number] for number in plain.held_out) and sum(rare) > 400
    spelled_otherwise = [*passages(500), *(passage.upper() for passage in passages(500)[48:56])]
    assert len(data.build_corpus(spelled_otherwise, "copies", 300).held_out) < len(plain.held_out)


def test_same_seed_same_losses_as_nn_gru_and_training_learns(corpus):
    pair = compare.train_both(corpus, TINY, CPU, seed=3)
    assert len(pair.losses[0]) == TINY.steps and pair.difference == 0 and pair.backend == "aten"
    wrong = pair._replace(losses=[pair.losses[0], [loss + 1e-9 for loss in pair.losses[1]]])
    found = [compare.show(p, corpus, on_cpu=True) for p in (pair, wrong, wrong._replace(backend="step"))]
    assert found == [True, False, True]
    model = pair.models[0]
    before = training.perplexity(model, corpus.held_out)
    training.train(model, corpus, dataclasses.replace(TINY, steps=80))
    assert training.perplexity(model, corpus.held_out) < 0.5 * before
    short = training.train(model, corpus, dataclasses.replace(TINY, steps=10**6, passes=1))
    assert len(short) == len(corpus.train) // (TINY.batch * TINY.window) > 20


def test_no_tensor_of_a_step_outlives_it(corpus, monkeypatch):
    """A loss of four bytes that stays keeps the heap from giving back the logits below it: 10 MB a step."""
    alive = []

    def count(*_, **__):  # in the place of a line of progress, after each quarter
        gc.collect()
        alive.append(sum(type(found) is torch.Tensor for found in gc.get_objects()))

    monkeypatch.setattr(builtins, "print", count)
    model = training.build_model(corpus.vocabulary, TINY, nn.GRU, seed=4)
    training.train(model, corpus, dataclasses.replace(TINY, steps=40), "training")
    assert len(alive) == 4 and alive[1:] == [alive[1]] * 3


@pytest.mark.interpreted
def test_kernels_are_compared_and_judged(corpus, trained, capsys, monkeypatch):
    from tritongru.launch import step

    assert compare.compare_kernels(trained, corpus, TINY, CPU, "step")
    T, kernel = TINY.check_window, step.forward
    assert f"{T} x step_forward, {T} x step_backward" in capsys.readouterr().out
    for wrong in (1.001, float("nan")):
        monkeypatch.setattr(step, "forward", lambda *a, w=wrong: (lambda y, *rest: (y * w, *rest))(*kernel(*a)))
        assert not compare.compare_kernels(trained, corpus, TINY, CPU, "step")


def test_every_word_is_one_step_and_all_steps_are_the_whole_prefix(typed):
    words, shapes = ["ba", "keli", "xyzzy", ",", "torusa", NUMBER, "."], []
    handle = typed.model.layer.register_forward_pre_hook(lambda layer, args: shapes.append(tuple(args[0].shape)))
    typed.read(words[:3])
    typed.read(words[3:])
    handle.remove()
    assert shapes == [(1, 1, 16)] * len(words)
    with torch.no_grad():
        logits, h = typed.model(torch.tensor(typed.vocabulary.encode([END, *words])).view(-1, 1))
    # A product over H terms and n steps of it in another order: some roundings, of numbers below 1.
    torch.testing.assert_close(typed.probabilities, logits[-1, 0].softmax(-1), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(typed.h, h, rtol=1e-5, atol=1e-6)
    typed.begin()
    assert typed.suggest() == Autocomplete(typed.model, typed.vocabulary).suggest()


def test_suggestions(typed, monkeypatch, capsys):
    p = {word: float(typed.probabilities[n]) for word, n in typed.vocabulary.index.items()}
    able = [word for word in p if word not in SPECIAL and word[0].isalpha()]
    found = typed.suggest()
    assert [word for word, _ in found] == sorted(able, key=lambda word: -p[word])[:5]
    assert all(value == pytest.approx(p[word]) for word, value in found)
    longer = {word: p[word] / (p["kelida"] + p["kelidaru"]) for word in ("kelida", "kelidaru")}
    assert dict(typed.suggest("keli")) == pytest.approx(longer)
    assert typed.suggest("q") == [] == typed.suggest("kelidaru")
    assert "words that begin with 'kel': kel" in typed.complete("Ba kel")
    state = typed.h
    typed.begin()
    typed.complete("ba")
    assert torch.equal(typed.h, state)  # "kel" was not read
    assert "read as <unk>: xyzzy" in typed.complete("xyzzy ba") and "begin" not in typed.complete("ba keli")
    with pytest.raises(DemoError, match="no words"):
        typed.complete("%")
    typed.begin()
    monkeypatch.setattr(sys, "stdin", io.StringIO("ba\nkeli\n%\n\nba keli\n"))  # lines go on until an empty one
    typed.interact()
    shown = [line.split("->")[-1] for line in capsys.readouterr().out.splitlines() if "->" in line]
    assert len(shown) == 3 and shown[1] == shown[2] != shown[0]


def test_a_file_comes_back(tmp_path, typed):
    link, path = tmp_path / "link.pt", tmp_path / "new" / "model.pt"
    link.symlink_to(path)
    autocomplete.save(link, typed)
    assert link.is_symlink() and [file.name for file in path.parent.iterdir()] == ["model.pt"]
    found = autocomplete.load(path, CPU)
    assert found.vocabulary.words == typed.vocabulary.words and found.about == "made?up"
    assert all(map(torch.equal, typed.model.parameters(), found.model.parameters()))
    assert found.complete("ba ke") == typed.complete("ba ke")
    nn.GRU(16, 24).load_state_dict(found.model.layer.state_dict())  # the layer's part is one of nn.GRU


class Dangerous:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (builtins.open, (str(self.path), "w"))


def test_other_files_are_refused(tmp_path, typed, capsys):
    path, mark = tmp_path / "model.pt", tmp_path / "mark"
    autocomplete.save(path, typed)
    whole, content = path.read_bytes(), torch.load(path, weights_only=True)
    words, model = content["vocabulary"], content["model"]
    changed = [content | change for change in (
        {"sizes": (2**30, 2**30)}, {"sizes": "ab"}, {"sizes": (16, 25)}, {"about": "\x1b[2J"}, {"model": {}},
        {"vocabulary": words[:-1]}, {"vocabulary": [*words[:-1], "\x1b[2J"]}, {"model": model | {"bias": [1.0]}},
    )]  # fmt: skip
    contents = [b"", whole[: len(whole) // 2], b"PK\3\4", b"a line of text\n", pickle.dumps(Dangerous(mark))]
    for other in (*changed, nn.GRU(16, 24).state_dict(), [content], {"sizes": (16, 24)}, Dangerous(mark)):
        torch.save(other, buffer := io.BytesIO())
        contents.append(buffer.getvalue())
    for found in contents:
        path.write_bytes(found)
        assert main(["demo", "--load", str(path)]) == 2, found[:20]
        error = capsys.readouterr().err
        assert error.startswith(f"demo: {path}: expected") and "got" in error and error.count("\n") == 1
    assert not mark.exists()


def test_files_appear_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "rows.csv"
    write_rows(path, ["a", "b"], [[1, 0.1], [2, 1 / 3]])
    before = path.read_text()
    assert before.split() == ["a,b", "1,0.1", f"2,{1 / 3}"]
    with pytest.raises(ZeroDivisionError):
        write_rows(path, ["a", "b"], ([1, 1 / (2 - i)] for i in range(3)))
    assert path.read_text() == before and list(path.parent.iterdir()) == [path]


def test_save_load_and_complete(tmp_path, text_file, capsys, monkeypatch):
    monkeypatch.setattr(run, "ALONE", TINY)
    monkeypatch.chdir(tmp_path)
    command = ["demo", "--text", str(text_file), "--save", "model.pt"]
    assert main(command) == 0
    first = capsys.readouterr()
    assert first.err == "" and "Saved in model.pt" in first.out and "perplexity" in first.out
    assert {file.name for file in tmp_path.iterdir()} == {"text.txt", "model.pt"}  # no out/
    assert main(["demo", "--load", "model.pt"]) == 0
    second = capsys.readouterr().out
    suggested = [[line for line in shown.splitlines() if "->" in line] for shown in (first.out, second)]
    assert suggested[0] == suggested[1] and len(suggested[0]) == len(autocomplete.PROMPTS)
    before = Path("model.pt").read_bytes()

    def interrupted(*_):  # ctrl-c; a worker of xdist ignores the signal itself
        raise KeyboardInterrupt

    monkeypatch.setattr(nn.utils, "clip_grad_norm_", interrupted)
    assert main(command) == 130
    assert capsys.readouterr().err.strip() == "demo: interrupted" and Path("model.pt").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--load m --text t", "--text is of a training"), ("--load m --save n", "--save is of a training"),
        ("--load m --seed 0", "--seed is of a training"), ("--interactive --out o", "--out is for rows"),
        ("--seeds 2", "--seeds is of --story"), ("--story --seeds 0", "--seeds must lie"), ("--seed -1", "--seed must"),
        ("--story --text t", "--text is of the autocomplete"), ("--save m --story", "--save is of the autocomplete"),
        ("--story --seed 1000000000", "--seed must lie"), ("--save .", "cannot write"), ("--out file", "File exists"),
        ("--save file/model.pt", "File exists"), ("--save /dev/null", "cannot write"), ("--load missing", "No such"),
        ("--save file --text file", "in the place of the text"), ("--text missing --out .", "No such file"),
        ("--text file --out .", "is too short"), ("--text latin --out .", "is not UTF-8 text"),
        ("--text again --out .", "without repeats 3 words"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_said_before_any_training(arguments, said, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = {"file": b"a text", "latin": b"caf\xe9 " * 3000, "again": b"twice the \n\n" * 3000}
    for name, content in files.items():
        Path(name).write_bytes(content)
    assert main(["demo", *arguments.split()]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files


@pytest.mark.interpreted
def test_end_to_end(tmp_path, text_file, capsys):
    options = argparse.Namespace(text=text_file, out=tmp_path / "out", seed=0)
    assert run.run_all(options, TINY, STORY, CPU)
    shown, errors = capsys.readouterr()
    assert errors == "" and "it has to be 0, and it is." in shown and "all within it" in shown
    assert '"return the number of" ->' in shown and "dhaval eats samosa" in shown.lower()
    assert "matplotlib is not installed" in shown or (tmp_path / "out" / "story-gates.png").exists()
    assert (tmp_path / "out" / "story-words.csv").exists()


# The story.


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
    texts = networks.training_texts(600, 3000, GRU.recipe, STORY.batch)
    assert len({text.words for text in texts}) == 600
    assert max(text.answers[0] for text in texts[:200]) < max(text.answers[0] for text in texts[200:])
    sizes = dataclasses.replace(STORY, texts=4000, steps=1, asked=1500)
    asked = set()
    monkeypatch.setattr(StoryModel, "right", lambda model, found: asked.update(text.words for text in found) or 0)
    train_and_ask(sizes, networks.RNN_SHORT, 10)
    recipes = (GRU.recipe, networks.RNN_SHORT.recipe)
    read, short = ({t.words for t in networks.training_texts(4000, 10_000, of, STORY.batch)} for of in recipes)
    assert len(asked) >= sizes.asked and asked.isdisjoint(read | short)
    assert set().union(*asked) <= set().union(*short)  # in words that it has read: memory alone is asked


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
    rows, _ = train_and_ask(dataclasses.replace(STORY, rates=(0.01, 1e-6)), networks.RNN_SHORT, 0)
    losses = {row["at"]: row["value"] for row in rows if row["measure"] == "validation"}
    assert losses[0.01] < losses[1e-6] and {row["rate"] for row in rows} == {0.01}


def test_both_sentences_are_one_running_text(monkeypatch):
    model, read = StoryModel(STORY, networks.RNN, 0), []

    def indian(model, words):
        read.append(list(words))
        return torch.eye(len(model.vocabulary.words))[model.vocabulary.index["indian"]]

    monkeypatch.setattr(StoryModel, "next_word", indian)
    assert [top[0] == (expected, 1) for _, expected, top, _ in model.told()] == [True, False]
    assert read == [tokenise(story.FIRST), [*tokenise(story.FIRST), "indian", ".", *tokenise(story.SECOND)]]


@pytest.mark.parametrize("network", NETWORKS, ids=lambda network: network.name)
def test_rows_are_of_the_layer_that_they_name(network):
    layer, model = networks.LAYERS[network.cell](32, network.hidden), StoryModel(STORY, network, 0).model
    weights, biases = (sum(p.numel() for name, p in layer.named_parameters() if kind in name) for kind in ("w", "b"))
    _, state = layer(torch.zeros(1, 1, 32))
    states, H = len(state) if isinstance(state, tuple) else 1, network.hidden
    counted = networks.cost(network.cell, 32, H)
    assert (networks.STATES[network.cell], networks.GATES[network.cell]) == (states, len(layer.weight_hh_l0) // H - 1)
    moved = 4 * (weights + biases + 32 + 2 * states * H)
    assert counted == {"parameters": weights + biases, "flops": 2 * weights, "bytes": moved}
    rows, words = train_and_ask(STORY, network, 0)
    lost = {"": 0, "reset": H * (32 + H + 2), "update": H * (32 + H + 1)}[network.without]
    assert {row["parameters"] for row in rows} == {sum(p.numel() for p in model.parameters()) - lost}
    if "equal" in network.name:
        assert abs((counted["parameters"] + 32 * H) / (networks.cost("GRU", 32, 32)["parameters"] + 32 * 32) - 1) < 0.03
    expected = {("gap", gap) for gap in STORY.gaps}
    if network.gaps == networks.TRAINED:
        expected |= {("switches", 0), ("switches", 1), ("story", 1), ("story", 2)}
    assert {(row["measure"], row["at"]) for row in rows if row["asked"]} == expected and bool(words) == (network == GRU)


def test_answers_are_the_likeliest_word():
    model = StoryModel(dataclasses.replace(STORY, steps=60), networks.LSTM, 0)
    before = model.cuisine_loss()
    assert len(model.train(0.02)) == 60 and model.cuisine_loss() < before - 0.5
    texts = generate(12, 99, Recipe((7,), (1,)))
    p = [model.next_word(text.words[: text.answers[-1]]) for text in texts]
    numbers = [model.vocabulary.index[text.words[text.answers[-1]]] for text in texts]
    assert model.right(texts) == sum(int(found.argmax()) == n for found, n in zip(p, numbers, strict=True))
    model.held_out = [story.Text(text.words, text.answers[-1:]) for text in texts]
    assert model.cuisine_loss() == pytest.approx(-sum(math.log(f[n]) for f, n in zip(p, numbers, strict=True)) / 12)


def test_words_show_what_the_layer_computes():
    model = StoryModel(STORY, GRU, 0)
    words = networks.story_words(model, 0)
    told = [str(row["word"]) for row in words]
    assert told[:3] == ["dhaval", "eats", "samosa"] and told[-2:] == ["italian", "."]
    for dish in ("samosa", "pasta"):  # all of it right after the word, nothing before
        place = told.index(dish)
        like = [row[f"like {dish}"] for row in words]
        assert like[: place + 1] == pytest.approx([0] * place + [1], abs=1e-5) and min(map(abs, like[place:])) > 1e-5
    numbers = torch.tensor(model.vocabulary.encode(["<end>", *told[:2]])).view(-1, 1)
    z = tritongru.gates(model.model.layer, model.model.embed(numbers)).z
    assert words[1]["z"] == pytest.approx(float(z[0, 0, 2].mean()))
    asked = model.next_word([*told[:3], *tokenise(story.QUESTION)])
    assert words[2]["P(indian)"] == pytest.approx(float(asked[model.vocabulary.index["indian"]]))


def made_up(right):
    """Rows of every model with these shares by seed, everywhere; what is not given is 0.5 in every seed."""
    rows, places = [], [("gap", 7), ("gap", 30), ("gap", 200), ("switches", 0), ("switches", 3)]
    for model in networks.MODELS:
        for seed, share in enumerate(right.get(model, [0.5] * 3)):
            about = {"seed": seed, "model": model, "input": 32, "hidden": 32, "parameters": 9 if "GRU" in model else 10}
            rows += [about | {"measure": m, "at": at, "right": round(1000 * share), "asked": 1000} for m, at in places]
            rows += [about | {"measure": "story", "at": at, "right": 1, "asked": 1} for at in (1, 2)]
            rows.append(about | {"measure": "time", "at": "", "value": 10.0})
    return rows


def only(rows, model, measure, at, **cells):
    return [row | cells if (row["model"], row["measure"], row["at"]) == (model, measure, at) else row for row in rows]


CLAIMS = ("samosa is kept", "samosa is let go", "trigram", "basic RNN", "lets go as often", "three gates", "lighter",
          "less time", "At times", "reset gate", "update gate")  # fmt: skip
GOOD, BAD = [0.95, 0.96, 0.97], [0.2, 0.21, 0.22]
HOLDS = {"GRU": GOOD, networks.GRU_SHORT.name: GOOD, "trigram": BAD, "RNN": BAD, networks.RNN_EQUAL.name: BAD}


def held(rows):
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
        ([0.9, 0.9], [0.8, 0.8], True), ([0.9, 0.9], [0.89, 0.89], False), ([0.8, 1.0], [0.6, 0.8], False),
        ([0.9], [0.8], True), ([0.8], [0.9], False),
    ):  # fmt: skip
        assert claims.spread(mine).beats(claims.spread(theirs)) == beats


def test_a_run_leaves_rows_figures_and_verdicts(tmp_path, capsys):
    run.run_story(argparse.Namespace(seeds=None, seed=4, out=tmp_path), STORY, processes=2)
    rows = list(csv.DictReader((tmp_path / "story-answers.csv").open(encoding="utf-8")))
    assert tuple(rows[0]) == networks.COLUMNS and {row["seed"] for row in rows} == {"4"}
    assert {row["model"] for row in rows} == set(networks.MODELS)
    shown = capsys.readouterr().out
    drawn = set() if "matplotlib is not installed" in shown else {"story-gaps.png", "story-gates.png"}
    assert {path.name for path in tmp_path.iterdir()} == {"story-answers.csv", "story-words.csv"} | drawn
    for claim in claims.judge(rows):  # from the file alone, as printed
        assert f"{'held  ' if claim.held else 'FAILED'} {claim.text}.\n       {claim.numbers}." in shown
    assert "One seed has no spread" in shown and "±" not in shown


def test_an_interruption_keeps_what_had_ended(tmp_path, monkeypatch, capsys):
    taken = []

    def results(sizes, *_):
        taken.append(sizes)
        yield "GRU", *train_and_ask(STORY, GRU, 0)
        raise KeyboardInterrupt

    monkeypatch.setattr(networks, "results", results)
    assert main(["demo", "--story", "--out", str(tmp_path)]) == 130
    assert main(["demo", "--story", "--seeds", "1", "--out", str(tmp_path)]) == 130
    assert taken == [networks.ONE_SEED, Sizes()]  # who asks for no seeds waits less
    assert command.main(tmp_path, STORY) == 130 and "interrupted" in capsys.readouterr().err
    assert "GRU," in (tmp_path / "story-answers.csv").read_text()
    assert "GRU," in (tmp_path / "story" / command.ANSWERS).read_text()
    with pytest.raises(FileExistsError, match="move it away"):
        command.main(tmp_path, STORY)


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
