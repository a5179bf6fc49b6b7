"""The autocomplete: a typing session, keystrokes saved, the model's file, and what it refuses."""

from __future__ import annotations

import asyncio
import builtins
import dataclasses
import errno
import io
import os
import pickle
import random
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import tritongru
from tests.kit.demo import options
from tritongru import demo
from tritongru.demo import autocomplete, completion, data, keystrokes, model_file, ngram, run, training
from tritongru.demo.data import END, NUMBER, SPECIAL, UNKNOWN, DemoError, Vocabulary, tokenise
from tritongru.demo.keystrokes import Keystrokes
from tritongru.demo.screen import Screen
from tritongru.demo.session import Session

CPU = torch.device("cpu")
TINY = training.Sizes(
    vocabulary=300, embedding=16, hidden=24, batch=4, window=8, steps=12, evaluations=3, dropout=0.1
)  # fmt: skip
NAMES = ["embedding.weight", "layer.weight_hh_l0", "bias"]


pytestmark = pytest.mark.usefixtures("one_thread")


def passages(count: int = 300, seed: int = 0) -> list[str]:
    """A made-up language with long and short words, some of which begin others; numbers and rare words too."""
    rng = random.Random(seed)
    words = ["ba", "bano", "banoli", "keli", "kelida", "kelidaru", "mi", "minofe", "to", "torusa", "sa", "don't"]
    text = []
    for number in range(count):
        start = rng.randrange(len(words))
        said = [words[(start + rng.randrange(3) * i) % len(words)] for i in range(12)]
        text.append(" ".join(said) + f", {rng.randrange(1000)} rare{number}.")
    return text


@pytest.fixture(scope="module")
def corpus() -> data.Corpus:
    return data.build_corpus(passages(), "made up", 60, with_validation=True)


@pytest.fixture(scope="module")
def model(corpus: data.Corpus) -> training.WordModel:
    model = training.build_model(len(corpus.vocabulary), 16, 24, tritongru.GRU, seed=0)
    training.train(model, corpus, dataclasses.replace(TINY, steps=60), CPU)
    return model


@pytest.fixture
def session(model: training.WordModel, corpus: data.Corpus) -> Session:
    return Session(model, corpus.vocabulary)


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(passages()), encoding="utf-8")
    return path


# A session


def test_every_word_is_one_step_and_all_steps_are_the_whole_prefix(session: Session) -> None:
    model, vocabulary = session.model, session.vocabulary
    words = ["ba", "keli", "xyzzy", ",", "torusa", NUMBER, "."]
    shapes = []
    handle = model.layer.register_forward_pre_hook(lambda layer, args: shapes.append(tuple(args[0].shape)))
    for n, word in enumerate(words, 1):
        session.push(word)
        assert shapes == [(1, 1, 16)] * n
    handle.remove()
    for n in range(len(words), -1, -1):
        whole = torch.tensor(vocabulary.encode([END, *words[:n]])).view(-1, 1)
        with torch.no_grad():
            logits, h = model(whole)
        # A product over H terms and n steps of it in another order: some roundings, of numbers below 1.
        torch.testing.assert_close(session.probabilities, logits[-1, 0].softmax(-1), rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(session.state, h, rtol=1e-5, atol=1e-6)
        if n:
            session.pop()
    assert session.words == []
    with pytest.raises(IndexError):
        session.pop()
    assert session.state.shape == (1, 1, 24)  # and still there


def test_going_back_takes_no_step_and_restores_the_state(session: Session) -> None:
    session.go_to(["ba", "keli"])
    before = session.state
    steps = []
    handle = session.model.layer.register_forward_hook(lambda *_: steps.append(1))
    session.go_to(["ba", "keli", "mi", "to"])
    assert len(steps) == 2
    session.go_to(["ba", "keli"])
    assert session.state is before and len(steps) == 2
    session.go_to(["ba", "sa", "to"])  # from the word that differs
    assert session.words == ["ba", "sa", "to"] and len(steps) == 4
    handle.remove()


def test_suggestions(session: Session) -> None:
    session.go_to(["ba", "xyzzy"])
    assert session.unknown == ["xyzzy"]
    p = {word: float(session.probabilities[n]) for word, n in session.vocabulary.index.items()}
    found = session.suggest()
    assert len(found) == 5 and found == sorted(found, key=lambda item: -item[1])
    able = [word for word in p if word not in SPECIAL and word[0].isalpha()]
    assert [word for word, _ in found] == sorted(able, key=lambda word: -p[word])[:5]
    assert all(value == pytest.approx(p[word]) for word, value in found)
    assert {word for word, _ in session.suggest("keli")} == {"kelida", "kelidaru"}  # not what stands there already
    beginning = p["keli"] + p["kelida"] + p["kelidaru"]
    assert dict(session.suggest("keli"))["kelida"] == pytest.approx(p["kelida"] / beginning, rel=1e-4)
    assert session.suggest("q") == [] == session.suggest("kelidaru")


@pytest.mark.parametrize(
    ("text", "words", "partial"),
    [
        ("", [], ""),
        ("The na", ["the"], "na"),
        ("the name ", ["the", "name"], ""),
        ("it don\u2019", ["it"], "don'"),
        ("it don't", ["it"], "don't"),
        ("end.", ["end", "."], ""),
        ("(os.pa", ["("], "os.pa"),
        ("3 of 12", [NUMBER, "of"], "12"),
    ],
)
def test_typed_so_far(text: str, words: list[str], partial: str) -> None:
    assert data.typed_so_far(text) == (words, partial)


@pytest.mark.parametrize("text", ["_" * 60 + "!", "a_" * 60 + "!", "a" * 50_000 + "!", "word " * 20_000 + "!"])
def test_no_text_takes_long(text: str) -> None:
    start = time.perf_counter()
    assert data.typed_so_far(text)[1] == ""
    assert time.perf_counter() - start < 10  # in vain, "_" * 60 would have 2**59 ways to be read


def test_completing_uses_the_session_and_leaves_it_at_the_prompt(session: Session) -> None:
    found = completion.complete(session, "Ba kel")
    assert found.partial == "kel" and session.words == ["ba"]
    assert {word for word, _ in found.words} == {"keli", "kelida", "kelidaru"}
    assert sum(p for _, p in found.words) == pytest.approx(1)
    found = completion.complete(session, "ba keli")
    assert found.partial is None and session.words == ["ba", "keli"] and found.continuation
    assert completion.complete(session, "ba 12").words and session.words == ["ba", NUMBER]


# Keystrokes


def by_brute_force(corpus: data.Corpus, scores: torch.Tensor, shown: int) -> int:
    """The rule, letter by letter."""
    words, keys = corpus.vocabulary.words, 0
    able = [word for word in words if word not in SPECIAL and any(map(str.isalpha, word))]
    for row, spelling in zip(scores.tolist(), corpus.held_out_spellings, strict=True):
        score = dict(zip(words, row, strict=True))
        cost = 0 if spelling == END else 1 if spelling in ".,;:?!()" else len(spelling) + 1
        if spelling in able:
            for c in range(len(spelling)):
                list_of = [w for w in able if w.startswith(spelling[:c]) and len(w) > c]
                if spelling in sorted(list_of, key=lambda w: -score[w])[:shown]:
                    cost = c + 1
                    break
        keys += cost
    return keys


@pytest.mark.parametrize("shown", [1, 3])
def test_keystrokes_by_brute_force(corpus: data.Corpus, model: training.WordModel, shown: int) -> None:
    counted = Keystrokes(corpus.held_out_spellings, corpus.vocabulary, shown)
    trigram = ngram.Trigram(corpus.train, len(corpus.vocabulary))
    rng = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 4, (len(corpus.held_out), len(corpus.vocabulary)), generator=rng)  # many ties
    for blocks in (
        list(keystrokes.model_scores(model, corpus.vocabulary, corpus.held_out)),
        list(keystrokes.trigram_scores(trigram, corpus.vocabulary, corpus.held_out)),
        [noise],
    ):
        assert counted.using(blocks) == by_brute_force(corpus, torch.cat(blocks), shown)
        assert counted.perfect() <= counted.using(blocks) <= counted.by_hand
    with pytest.raises(ValueError, match="rows of scores"):
        counted.using([noise[1:]])
    with pytest.raises(ValueError, match="rows of scores"):
        counted.using([noise, noise])


def test_keystrokes_are_what_a_user_of_a_session_types(corpus: data.Corpus, session: Session) -> None:
    spellings = corpus.held_out_spellings[:150]
    scores = keystrokes.model_scores(session.model, corpus.vocabulary, corpus.held_out[:150])
    keys = 0
    for spelling in spellings:
        letters = len(spelling)
        offered = (c for c in range(letters) if spelling in dict(session.suggest(spelling[:c], keystrokes.SHOWN)))
        keys += 0 if spelling == END else 1 if spelling in ".,;:?!()" else next(offered, letters) + 1
        session.push(data.token_of(spelling))
    assert keys == Keystrokes(spellings, corpus.vocabulary).using(scores)


def test_keystrokes_by_hand() -> None:
    vocabulary = Vocabulary(["to"] * 6 + ["the"] * 5 + ["then"] * 4 + ["them"] * 3 + ["a"] * 2, 9)
    spellings = ["them", ",", "zebra", "12", "to", END]
    counted = Keystrokes(spellings, vocabulary)
    assert counted.by_hand == 5 + 1 + 6 + 3 + 3 + 0
    scores = torch.tensor([[0.0, 0.0, 0.0, 5.0, 4.0, 3.0, 2.0, 1.0]]).expand(6, -1)
    # to, the, then are shown: "t" brings nothing new, nor does "th"; but at "the" the word itself is no suggestion
    assert vocabulary.words[3:] == ["to", "the", "then", "them", "a"]
    assert counted.using([scores]) == (2 + 1) + 1 + 6 + 3 + 1 + 0
    assert counted.perfect() == 1 + 1 + 6 + 3 + 1
    assert counted.saved(9) == pytest.approx(0.5)


def test_figures_are_of_the_same_words_and_all_that_was_seen(
    corpus: data.Corpus, model: training.WordModel, capsys: pytest.CaptureFixture[str]
) -> None:
    found = autocomplete.held_out_figures(model, corpus, 12.5)
    counted = Keystrokes(corpus.held_out_spellings, corpus.vocabulary)
    trigram = ngram.Trigram([*corpus.train, *corpus.validation], len(corpus.vocabulary))
    rows = {
        "saved": keystrokes.model_scores(model, corpus.vocabulary, corpus.held_out),
        "trigram_saved": keystrokes.trigram_scores(trigram, corpus.vocabulary, corpus.held_out),
    }
    for name, scores in rows.items():
        assert getattr(found, name) == counted.saved(counted.using(scores))
    assert (found.words, found.perplexity) == (len(corpus.held_out), 12.5)
    assert found.trigram_perplexity == trigram.perplexity(corpus.held_out)
    assert max(found.saved, found.trigram_saved, found.unigram_saved) < found.perfect_saved < 1
    for perplexity, saved, said in (
        (99.0, 0.2, "NOT better than the trigram in perplexity and NOT better in keystrokes"),
        (11.0, 0.4, "is better than the trigram in perplexity and better in keystrokes"),
        (11.0, 0.3, "is better than the trigram in perplexity and NOT better in keystrokes"),
    ):
        figures = dataclasses.replace(
            found, perplexity=perplexity, trigram_perplexity=12.0, saved=saved, trigram_saved=0.3
        )
        autocomplete.show_held_out(Screen(), figures)
        shown = " ".join(capsys.readouterr().out.split())
        assert said in shown and f"{saved:.1%}" in shown and "12.0 30.0%" in shown


def test_trigram_of_all_words_at_once(corpus: data.Corpus) -> None:
    size = len(corpus.vocabulary)
    trigram = ngram.Trigram(corpus.train, size)
    seen = list(zip(corpus.train, corpus.train[1:], strict=False))[:40]
    for u, v in [*seen, (0, 0), (corpus.train[0], 0), (0, corpus.train[0]), (size - 1, size - 2)]:
        together = trigram.probabilities(u, v)
        assert together.sum() == pytest.approx(1)
        assert together.tolist() == pytest.approx([trigram.probability(u, v, w) for w in range(size)], rel=1e-12)


# The corpus and the training


def test_parts_of_the_text() -> None:
    plain = data.build_corpus(passages(), "plain", 60)
    chosen = data.build_corpus(passages(), "chosen", 60, with_validation=True)
    assert plain.validation == [] and chosen.validation
    assert (chosen.held_out, chosen.held_out_spellings) == (plain.held_out, plain.held_out_spellings)
    assert len(chosen.train) + len(chosen.validation) == len(plain.train)
    assert chosen.vocabulary.words == plain.vocabulary.words
    # as typed: numbers and rare words too
    assert any(spelling.isdigit() for spelling in plain.held_out_spellings)
    assert plain.vocabulary.encode(map(data.token_of, plain.held_out_spellings)) == plain.held_out
    unknown = plain.held_out.count(plain.vocabulary.index[UNKNOWN]) / len(plain.held_out)
    assert plain.known_fraction == pytest.approx(1 - unknown) and unknown > 0


def test_training_keeps_the_best_of_validation_and_ends(corpus: data.Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    looked, states = [], []
    values = iter([9.0, 5.0, 7.0, 6.0, 5.5, 1.0])

    def perplexity(model: training.WordModel, numbers: list[int], device: torch.device) -> float:
        looked.append(numbers)
        states.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return next(values)

    monkeypatch.setattr(training, "perplexity", perplexity)
    model = training.build_model(len(corpus.vocabulary), 16, 24, nn.GRU, seed=0, dropout=0.1)
    curve = training.train(model, corpus, dataclasses.replace(TINY, steps=60, evaluations=6), CPU)
    assert all(numbers is corpus.validation for numbers in looked)
    assert curve.kept == 20 and len(curve.losses) == 50  # the fifth look is the third that is no better
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in model.state_dict().items())
    assert not model.training


def test_a_short_text_is_not_read_too_often(corpus: data.Corpus) -> None:
    one_pass = len(corpus.train) // (TINY.batch * TINY.window)
    assert one_pass > 20
    for steps, passes, expected in ((10**6, 3, 3 * one_pass), (20, 3, 20), (10**6, None, 10**6)):
        sizes = dataclasses.replace(TINY, steps=steps, passes=passes)
        assert training.within_passes(sizes, corpus) == dataclasses.replace(sizes, steps=expected)


@given(st.text())
def test_a_token_is_a_token(text: str) -> None:
    words = [token for token in tokenise(text) if token not in SPECIAL]
    assert all(tokenise(word) == [word] for word in words)
    assert Vocabulary.of(Vocabulary(words, 10**6).words).index == Vocabulary(words, 10**6).index


# The model's file


@pytest.fixture
def saved(model: training.WordModel, corpus: data.Corpus) -> model_file.Saved:
    found = autocomplete.held_out_figures(model, corpus, training.perplexity(model, corpus.held_out, CPU))
    return model_file.Saved(model, corpus.vocabulary, "made\nup", found)


@pytest.mark.parametrize("make_layer", [tritongru.GRU, nn.GRU])
def test_a_file_comes_back(tmp_path: Path, saved: model_file.Saved, make_layer: training.MakeLayer) -> None:
    path = tmp_path / "new" / "model.pt"
    model_file.write(path, saved)
    assert [file.name for file in path.parent.iterdir()] == ["model.pt"]
    found = model_file.read(path, make_layer)
    assert type(found.model.layer) is make_layer
    assert training.same_parameters(found.model, saved.model)
    assert found.vocabulary.words == saved.vocabulary.words
    assert (found.text, found.held_out, found.package) == ("made?up", saved.held_out, tritongru.__version__)
    ours, theirs = Session(saved.model, saved.vocabulary), Session(found.model, found.vocabulary)
    ours.push("ba"), theirs.push("ba")
    torch.testing.assert_close(ours.probabilities, theirs.probabilities)
    # the layer's part is a state_dict of nn.GRU
    content = torch.load(path, weights_only=True)["parameters"]
    layer = {name.removeprefix("layer."): t for name, t in content.items() if name.startswith("layer.")}
    nn.GRU(16, 24).load_state_dict(layer)


class Dangerous:
    """A pickle that writes a file when it is read as code."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (builtins.open, (str(self.path), "w"))


def changed(**values: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda content: content | values


def parameters(name: str, change: Callable[[torch.Tensor], Any]) -> Callable[[dict[str, Any]], Any]:
    def apply(content: dict[str, Any]) -> Any:
        return content | {"parameters": content["parameters"] | {name: change(content["parameters"][name])}}

    return apply


def vocabulary(change: Callable[[list[str]], Any]) -> Callable[[dict[str, Any]], Any]:
    return lambda content: content | {"vocabulary": change(content["vocabulary"])}


def without(name: str) -> Callable[[dict[str, Any]], Any]:
    return lambda content: {key: value for key, value in content.items() if key != name}


def spoiled(tensor: torch.Tensor, value: float) -> torch.Tensor:
    tensor = tensor.clone()
    tensor.view(-1)[3] = value
    return tensor


def figures(**values: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda content: content | {"held_out": content["held_out"] | values}


OTHER_FILES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "state_dict of nn.GRU": (lambda _: nn.GRU(16, 24).state_dict(), "weight_ih_l0"),
    "list": (lambda content: [content], "got a list"),
    "nothing": (lambda _: {}, "dictionary of nothing"),
    "later": (changed(version=2, package="9.0"), "expected version 1, got 2"),
    "no version": (changed(version="1"), "got '1'"),
    "version true": (changed(version=True), "got True"),
    "without sizes": (without("sizes"), "without sizes"),
    "without parameters": (without("parameters"), "without parameters"),
    "size 0": (changed(sizes={"embedding": 16, "hidden": 0}), "expected sizes"),
    "size of all memory": (changed(sizes={"embedding": 2**20, "hidden": 2**20}), "float32 [60, 1048576]"),
    "size absurd": (changed(sizes={"embedding": 10**30, "hidden": 24}), "expected sizes"),
    "size text": (changed(sizes="large"), "expected sizes"),
    "other sizes": (changed(sizes={"embedding": 16, "hidden": 25}), "layer.weight_ih_l0 to be float32 [75, 16]"),
    "parameters a list": (changed(parameters=[1]), "got list"),
    "parameters named otherwise": (changed(parameters={"weight": torch.ones(1)}), "got weight"),
    "wrong shape": (parameters("bias", lambda t: t[1:].clone()), "expected bias to be float32"),
    "wrong kind": (parameters("bias", lambda t: t.double()), "got float64"),
    "no tensor": (parameters("bias", lambda t: t.tolist()), "dense tensor, got list"),
    "sparse": (parameters("embedding.weight", lambda t: t.to_sparse()), "dense tensor"),
    "meta": (parameters("bias", lambda t: t.to("meta")), "bias"),
    "NaN": (parameters("layer.weight_hh_l0", lambda t: spoiled(t, float("nan"))), "finite"),
    "infinity": (parameters("embedding.weight", lambda t: spoiled(t, float("inf"))), "finite"),
    "a view of one number": (parameters("bias", lambda t: torch.zeros(1).expand(len(t))), "a view"),
    "vocabulary too short": (vocabulary(lambda words: words[:-1]), "for a vocabulary of 59"),
    "vocabulary too long": (vocabulary(lambda words: [*words, "more"]), "for a vocabulary of 61"),
    "vocabulary twice": (vocabulary(lambda words: [*words[:-1], words[5]]), "again"),
    "vocabulary empty": (vocabulary(lambda words: []), "begins with"),
    "vocabulary of numbers": (vocabulary(lambda words: list(range(len(words)))), "list of words"),
    "vocabulary a text": (vocabulary(lambda words: "words"), "list of words"),
    "vocabulary steers the terminal": (vocabulary(lambda words: [*words[:-1], "a\x1b[2J"]), "expected words"),
    "text no line": (changed(text="a\x1b[2J"), "line of text"),
    "package none": (changed(package=None), "line of text"),
    "figures missing": (changed(held_out={"words": 3}), "held-out figures"),
    "figures of text keys": (changed(held_out=[]), "held-out figures"),
    "figures NaN": (figures(perplexity=float("nan")), "finite number"),
    "figures text": (figures(saved="much"), "finite number"),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHER_FILES)
def test_other_archives_are_refused(
    name: str, tmp_path: Path, saved: model_file.Saved, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "model.pt"
    model_file.write(path, saved)
    change, said = OTHER_FILES[name]
    torch.save(change(torch.load(path, weights_only=True)), path)
    assert demo.main(options("--load", path)) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith(f"demo: {path}: expected") and said in shown.err and shown.err.count("\n") == 1
    assert shown.err.rstrip("\n").isprintable() and "Traceback" not in shown.out


def test_other_files_are_refused(tmp_path: Path, saved: model_file.Saved, capsys: pytest.CaptureFixture[str]) -> None:
    path, mark = tmp_path / "model.pt", tmp_path / "mark"
    model_file.write(path, saved)
    whole = path.read_bytes()
    spread_out = io.BytesIO()
    torch.save(Dangerous(mark), spread_out)
    old = io.BytesIO()
    torch.save({"format": model_file.FORMAT}, old, _use_new_zipfile_serialization=False)
    contents = [b"", whole[: len(whole) // 2], whole[:-1], whole[:100], b"PK\3\4", b"a line of text\n"]
    contents += [random.Random(seed).randbytes(5000) for seed in range(5)]
    contents += [pickle.dumps({"a": 1}), pickle.dumps(Dangerous(mark)), spread_out.getvalue(), old.getvalue()]
    damaged = bytearray(whole)
    damaged[len(whole) - 40 : len(whole) - 20] = b"\xff" * 20
    contents.append(bytes(damaged))
    for content in contents:
        path.write_bytes(content)
        assert demo.main(options("--load", path)) == 2, content[:20]
        error = capsys.readouterr().err
        assert error.startswith(f"demo: {path}: expected") and "got" in error and error.count("\n") == 1
    assert not mark.exists()
    if os.path.exists("/dev/zero"):  # has no end
        assert demo.main(options("--load", "/dev/zero")) == 2
        assert "another kind" in capsys.readouterr().err
    for missing in (tmp_path / "missing", tmp_path):
        assert demo.main(options("--load", missing)) == 2
        error = capsys.readouterr().err
        assert f"cannot read {missing}" in error and error.count("\n") == 1


def test_any_damage_is_one_line_or_harmless(tmp_path: Path, saved: model_file.Saved) -> None:
    path = tmp_path / "model.pt"
    model_file.write(path, saved)
    whole = path.read_bytes()
    rng = random.Random(0)
    for _ in range(60):
        damaged = bytearray(whole)
        for _ in range(rng.choice((1, 20))):
            damaged[rng.randrange(len(whole))] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            model_file.read(path, nn.GRU)
        except DemoError as error:
            assert str(path) in str(error) and "\n" not in str(error)


# The commands


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "ALONE", TINY)


def line_by_line(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))


@pytest.mark.usefixtures("quick")
def test_save_load_and_complete(
    tmp_path: Path, text_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.pt"
    monkeypatch.chdir(tmp_path)
    prompts = ("--prompt", "ba kel", "--prompt", "xyzzy ba")
    assert demo.main(options("--text", text_file, "--save", path, *prompts)) == 0
    first = capsys.readouterr()
    assert first.err == "" and f"Saved in {path}" in first.out
    for left_out in ("nn.GRU", "kernels", "story", "samosa"):
        assert left_out not in first.out
    assert {file.name for file in tmp_path.iterdir()} == {"text.txt", "model.pt"}  # no out/
    assert demo.main(options("--load", path, *prompts)) == 0
    second = capsys.readouterr()
    assert str(text_file) in second.out

    def part(shown: str) -> list[str]:
        return shown[shown.index("keystrokes saved") :].replace(f"Saved in {path}.\n", "").splitlines()[1:]

    assert part(first.out) == part(second.out)
    assert "xyzzy" in second.out and "read as <unk>" in second.out
    # without a prompt some are tried, and lines are read where there is no terminal
    assert demo.main(options("--load", path)) == 0
    assert f'"{autocomplete.PROMPTS[0]}" ->' in capsys.readouterr().out
    line_by_line(monkeypatch, "keli \n%\nqqq\n\nnot read")
    assert demo.main(options("--load", path, "--interactive")) == 0
    shown = capsys.readouterr()
    assert '"keli" ->' in shown.out and "no words" in shown.out and "not in the vocabulary" in shown.out
    assert "prompt_toolkit" not in shown.out and "not read" not in shown.out and shown.err == ""


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--load", "m", "--text", "t"], "--text is of a training"),
        (["--load", "m", "--save", "n"], "--save is of a training"),
        (["--load", "m", "--seed", "0"], "--seed is of a training"),
        (["--load", "m", "--out", "o"], "--out is for rows"),
        (["--save", "m", "--out", "o"], "--out is for rows"),
        (["--interactive", "--out", "o"], "--out is for rows"),
        (["--load", "m", "--prompt", "%"], "no words"),
        (["--load", "m", "--seeds", "2"], "--seeds is of --story"),
        (["--load", "m", "--story"], "--load is of the autocomplete"),
        (["--save", "m", "--story"], "--save is of the autocomplete"),
        (["--save", "."], "Is a directory"),
        (["--save", "file/model.pt"], "Not a directory"),
        (["--save", "file/below/model.pt"], "Not a directory"),
        (["--save", "/dev/null"], "Not a regular file"),
        (["--save", "x" * 300], "File name too long"),
        (["--save", "file", "--text", "file"], "in the place of the text"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_what_makes_no_sense_is_said_before_any_training(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("a text")

    def reads(*_: object) -> None:
        raise AssertionError("it began")

    monkeypatch.setattr(run, "_read", reads)
    assert demo.main(options(*arguments)) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"] and Path("file").read_text() == "a text"


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), KeyboardInterrupt()])
def test_a_file_that_cannot_be_finished_leaves_the_old_one(
    error: BaseException, tmp_path: Path, text_file: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    path = tmp_path / "model.pt"
    path.write_bytes(b"the old one")

    def half(self: Path, content: memoryview) -> None:
        with self.open("wb") as file:
            file.write(content[: len(content) // 2])
        raise error

    monkeypatch.setattr(Path, "write_bytes", half)
    assert demo.main(options("--text", text_file, "--save", path)) == (2 if isinstance(error, OSError) else 130)
    assert capsys.readouterr().err.strip().count("\n") == 0
    assert path.read_bytes() == b"the old one"
    assert {file.name for file in tmp_path.iterdir()} == {"text.txt", "model.pt"}


def test_a_link_stays_a_link(tmp_path: Path, saved: model_file.Saved) -> None:
    link, target = tmp_path / "link.pt", tmp_path / "elsewhere" / "model.pt"
    link.symlink_to(target)
    model_file.write(link, saved)
    assert link.is_symlink() and target.is_file()


SLOW = """
import argparse, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs begin with it ignored
from tritongru import demo
from tritongru.demo import run, training
run.ALONE = training.Sizes(vocabulary=300, embedding=16, hidden=24, batch=4, window=8, steps=10**6, evaluations=1)
parser = argparse.ArgumentParser()
demo.add_arguments(parser)
sys.exit(demo.main(parser.parse_args(sys.argv[1:])))
"""


def test_an_interrupted_training_leaves_nothing(tmp_path: Path, text_file: Path) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(b"the old one")
    command = [sys.executable, "-u", "-c", SLOW, "--text", str(text_file), "--save", str(path), "--interactive"]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    shown = ""
    try:
        while "A word autocomplete" not in shown:  # what comes next is the training, which would take an hour
            line = process.stdout.readline()
            assert line, shown
            shown += line
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert error.strip() == "demo: interrupted"
    assert path.read_bytes() == b"the old one"
    assert {file.name for file in tmp_path.iterdir()} == {"text.txt", "model.pt"}


# As one types


def drive(session: Session, script: Callable[[Any, Any], Any]) -> str:
    """The line that comes of a script of keys, each batch sent when what is awaited of the buffer has come."""
    from prompt_toolkit.input import create_pipe_input
    from prompt_toolkit.output import DummyOutput

    from tritongru.demo import typing_aid

    async def main() -> str:
        with create_pipe_input() as pipe:
            prompt = typing_aid.prompt_session(session, pipe, DummyOutput())
            line = asyncio.ensure_future(prompt.prompt_async(pre_run=typing_aid.suggest_at_once))
            await script(pipe, prompt)
            return await asyncio.wait_for(line, 10)

    return asyncio.run(main())


async def shown(prompt: Any, expected: Callable[[list[str]], bool]) -> list[str]:
    """The menu once it is as expected."""
    found: list[str] = []
    for _ in range(500):
        state = prompt.default_buffer.complete_state
        found = [item.display_text for item in state.completions] if state else []
        if expected(found):
            return found
        await asyncio.sleep(0.01)
    raise AssertionError(f"the menu shows {found}")


def test_suggestions_come_as_one_types(session: Session) -> None:
    pytest.importorskip("prompt_toolkit")
    steps = []
    handle = session.model.layer.register_forward_hook(lambda layer, args, _: steps.append(tuple(args[0].shape)))

    async def script(pipe: Any, prompt: Any) -> None:
        first = [word for word, _ in session.suggest(count=3)]
        assert await shown(prompt, bool) == first  # before any key
        pipe.send_text("Ke")
        assert set(await shown(prompt, lambda menu: menu != first)) == {"keli", "kelida", "kelidaru"}
        best = session.suggest("ke", 3)[0][0]
        assert steps == []  # a word begun is no word yet
        pipe.send_text("\t")
        after = await shown(prompt, lambda menu: bool(menu) and prompt.default_buffer.text.endswith(" "))
        assert prompt.default_buffer.text == "Ke" + best[2:] + " "  # capitals stay, the space comes
        assert session.words == [best] and steps == [(1, 1, 16)]
        assert after == [word for word, _ in session.suggest(count=3)]
        pipe.send_text("\x7f" * (len(best) - 1))  # back over the word: its step is taken back, none is made
        back = await shown(prompt, lambda menu: bool(menu) and prompt.default_buffer.text == "Ke")
        assert set(back) == {"keli", "kelida", "kelidaru"} and session.words == [] and len(steps) == 1
        pipe.send_text("zzz ")
        await shown(prompt, lambda menu: bool(menu) and session.words == ["kezzz"])
        pipe.send_text("\r")

    assert drive(session, script) == "Kezzz "
    handle.remove()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_without_the_library_lines_are_read(
    session: Session, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "prompt_toolkit", None)
    monkeypatch.delitem(sys.modules, "tritongru.demo.typing_aid", raising=False)
    monkeypatch.delattr(demo, "typing_aid", raising=False)
    monkeypatch.setattr(sys, "stdin", Terminal("ba \n\n"))
    screen_output = Terminal()
    monkeypatch.setattr(sys, "stdout", screen_output)
    autocomplete.interact(Screen(), session)
    text = screen_output.getvalue()
    assert text.count("prompt_toolkit") == 1 and '"ba" ->' in text


def test_on_a_terminal(tmp_path: Path, saved: model_file.Saved) -> None:
    pytest.importorskip("prompt_toolkit")
    pty = pytest.importorskip("pty")
    path = tmp_path / "model.pt"
    model_file.write(path, saved)
    ours, theirs = pty.openpty()
    environment = dict(os.environ, TERM="xterm", COLUMNS="100", LINES="30")
    process = subprocess.Popen(
        [sys.executable, "-m", "tritongru", "demo", "--load", str(path), "--interactive"],
        stdin=theirs, stdout=theirs, stderr=theirs, env=environment, start_new_session=True,
    )  # fmt: skip
    os.close(theirs)
    seen = b""

    def until(*expected: bytes) -> None:
        nonlocal seen
        end = time.monotonic() + 60
        while not all(text in seen for text in expected):
            ready, _, _ = select.select([ours], [], [], max(0.0, end - time.monotonic()))
            assert ready, seen[-2000:]
            try:
                seen += os.read(ours, 4096)
            except OSError:  # the other side has closed
                raise AssertionError(seen[-2000:]) from None
            if b"\x1b[6n" in seen:  # where is the cursor?
                seen = seen.replace(b"\x1b[6n", b"")
                os.write(ours, b"\x1b[1;1R")
        seen = seen[max(seen.index(text) + len(text) for text in expected) :]  # what is awaited next comes after

    until(b"ctrl-d: end")
    os.write(ours, b"qqq keli")
    until(b"kelidaru", b"<unk>: qqq")  # nobody has typed that
    os.write(ours, b"\r")
    until(b"going on with the likeliest")
    until(b"ctrl-d: end")
    os.write(ours, b"\x03")
    until(b"demo: interrupted")
    assert process.wait(timeout=60) == 130
    os.close(ours)
