"""The demo: its text, its models, its story, what it writes and what it refuses."""

from __future__ import annotations

import csv
import dataclasses
import gc
import json
import math
import os
import random
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

import tritongru
from tests.kit.demo import HAS_MATPLOTLIB, options
from tritongru import demo
from tritongru.demo import comparison, completion, data, ngram, output, story, training
from tritongru.demo.data import DemoError
from tritongru.demo.session import Session
from tritongru.demo.storytelling import StoryModel, StorySizes, tell_the_story

CPU = torch.device("cpu")
TINY = training.Sizes(
    vocabulary=300, embedding=16, hidden=24, batch=4, window=8, steps=12, evaluations=3, check_batch=2, check_window=3,
    check_steps=2,
)  # fmt: skip
TINY_STORY = StorySizes(embedding=8, hidden=8, texts=40, held_out=10, batch=4, steps=6)


pytestmark = pytest.mark.usefixtures("one_thread")


def sentences(count: int, seed: int = 0) -> list[str]:
    """Paragraphs of a made-up language in which the next word can partly be guessed."""
    rng = random.Random(seed)
    words = [a + b for a in ["ba", "ke", "mi", "to", "ru", "sa"] for b in ["no", "li", "fe", "da"]]
    return [" ".join(rng.choice(words[i % 20 : i % 20 + 4]) for i in range(20)) + "." for _ in range(count)]


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(sentences(200)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def corpus() -> data.Corpus:
    return data.build_corpus(sentences(200), "made up", TINY.vocabulary)


# The text


def test_standard_library_is_a_text():
    passages = data.standard_library_passages()
    words = [token for passage in passages for token in data.tokenise(passage)]
    assert len(words) > 50_000
    assert len(set(passages)) == len(passages)
    assert {"the", "is", "returns"} <= set(words)
    assert sum(">>>" in passage for passage in passages) == 0


def test_docstrings_are_read_without_importing_and_in_order(tmp_path):
    sentence = "This sentence number {} is long enough to count as prose."
    (tmp_path / "b.py").write_text(f'"""{sentence.format("two")}"""\nraise SystemExit("imported")\n')
    (tmp_path / "a.py").write_text(
        f'"""{sentence.format("one")}\n\n>>> code()\n"""\ndef f():\n    """{sentence.format("one")}"""\n'
    )
    (tmp_path / "broken.py").write_text("def (:")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "c.py").write_text(f'"""{sentence.format("three")}"""')
    assert data.standard_library_passages(tmp_path) == [sentence.format("one"), sentence.format("two")]


def test_no_documentation_is_an_error(tmp_path):
    with pytest.raises(DemoError, match="--text"):
        data.standard_library_passages(tmp_path)


@pytest.mark.parametrize(
    "text, tokens",
    [
        ("The file's END, (really)!", ["the", "file's", "end", ",", "(", "really", ")", "!"]),
        ("It\u2019s 3.5 or 12 %", ["it's", "<num>", "or", "<num>"]),
        ("call os.path_join now.", ["call", "os.path_join", "now", "."]),
        ("built-in na\u00efve caf\u00e9", ["built-in", "na\u00efve", "caf\u00e9"]),
        ("<unk> + <end>", ["unk", "end"]),
    ],
)
def test_tokenise(text, tokens):
    assert data.tokenise(text) == tokens


def test_vocabulary_ranks_by_frequency_then_spelling():
    vocabulary = data.Vocabulary(["b", "a", "c", "c", "b", "a", "d"], size=6)
    assert vocabulary.words == [*data.SPECIAL, "a", "b", "c"]
    assert vocabulary.encode(["c", "d"]) == [5, vocabulary.index[data.UNKNOWN]]


def test_held_out_passages_are_not_trained_on():
    passages = sentences(500)
    train, held_out = data.split_passages(passages)
    assert set(train).isdisjoint(held_out)
    assert sorted(train + held_out) == sorted(passages)
    assert 0.04 < len(held_out) / len(passages) < 0.15
    # the same words in other spelling are the same passage
    _, held_out = data.split_passages(passages)
    with_copies = data.build_corpus([*passages, *(p.upper() for p in held_out)], "copies", 300)
    assert len(with_copies.held_out) < len(data.build_corpus(passages, "plain", 300).held_out)


def test_batches_follow_the_text():
    stream = data.lanes(list(range(23)), batch=2)
    assert stream.tolist() == [[i, 11 + i] for i in range(11)]
    pieces = list(data.windows(stream, 4))
    assert torch.equal(torch.cat([words for words, _ in pieces]), stream[:-1])
    assert torch.equal(torch.cat([following for _, following in pieces]), stream[1:])


def test_trigram_is_a_distribution_and_beats_the_unigram(corpus):
    size = len(corpus.vocabulary)
    model = ngram.Trigram(corpus.train, size)
    seen, unseen = corpus.train[:2], [0, 0]
    for u, v in (seen, unseen):
        assert sum(model.probability(u, v, w) for w in range(size)) == pytest.approx(1)
    assert model.perplexity(corpus.held_out) < ngram.unigram_perplexity(corpus.train, corpus.held_out, size)
    fair = ngram.unigram_perplexity([0, 1], [0, 1, 1], 2)
    assert fair == pytest.approx(2)


# The model


def test_same_seed_same_losses_as_nn_gru(corpus):
    ours, theirs = (
        training.build_model(len(corpus.vocabulary), 16, 24, make, seed=3) for make in (tritongru.GRU, nn.GRU)
    )
    assert training.same_parameters(ours, theirs)
    curves = [training.train(model, corpus, TINY, CPU) for model in (ours, theirs)]
    assert len(curves[0].losses) == TINY.steps
    assert training.largest_difference(curves[0].losses, curves[1].losses) == 0
    assert training.same_parameters(ours, theirs)
    other = training.train(training.build_model(len(corpus.vocabulary), 16, 24, nn.GRU, seed=4), corpus, TINY, CPU)
    assert training.largest_difference(curves[0].losses, other.losses) > 0


def test_training_learns(corpus):
    sizes = dataclasses.replace(TINY, steps=80)
    model = training.build_model(len(corpus.vocabulary), 16, 24, tritongru.GRU, seed=0)
    before = training.perplexity(model, corpus.held_out, CPU)
    curve = training.train(model, corpus, sizes, CPU)
    unigram = ngram.unigram_perplexity(corpus.train, corpus.held_out, len(corpus.vocabulary))
    assert curve.held_out[-1][0] == 80
    assert curve.held_out[-1][1] == pytest.approx(training.perplexity(model, corpus.held_out, CPU))
    assert curve.held_out[-1][1] < min(before, unigram)


@pytest.mark.parametrize("what", ["words", "story"])
def test_no_tensor_of_a_step_outlives_it(corpus, what):
    """A loss of four bytes that stays keeps the heap from giving back the logits below it: 10 MB a step."""
    alive = []

    def count(step, loss):
        gc.collect()
        alive.append(sum(type(found) is torch.Tensor for found in gc.get_objects()))

    if what == "words":
        model = training.build_model(len(corpus.vocabulary), 16, 24, nn.GRU, seed=4)
        training.train(model, corpus, dataclasses.replace(TINY, steps=40, evaluations=1), CPU, count)
    else:
        StoryModel(dataclasses.replace(TINY_STORY, steps=40), nn.GRU, CPU, 0).train(count)
    assert alive[1:] == [alive[1]] * 3


def test_completion(corpus):
    model = training.build_model(len(corpus.vocabulary), 16, 24, nn.GRU, seed=0)
    known = corpus.vocabulary.words[5]
    session = Session(model, corpus.vocabulary)
    found = completion.complete(session, f"{known} ", count=3)
    assert len(found.words) == 3 and found.unknown == [] and found.partial is None
    assert not {data.UNKNOWN, data.END} & {word for word, _ in found.words}
    values = [p for _, p in found.words]
    assert values == sorted(values, reverse=True) and 0 < sum(values) < 1

    found = completion.complete(session, f"{known} {known[:1]}")
    assert found.partial == known[:1]
    assert all(word.startswith(known[:1]) for word, _ in found.words)

    found = completion.complete(session, "xyzzy plugh ")
    assert found.unknown == ["xyzzy", "plugh"] and found.words and found.continuation


def test_join():
    assert completion.join(["a", "(", "b", ")", ",", "c", "."]) == "a (b), c."


# The kernels beside nn.GRU


class Wrong(tritongru.GRU):
    """Right in the first digits only."""

    def forward(self, input, hx=None):
        output, h_n = super().forward(input, hx)
        return output * 1.001, h_n


@pytest.mark.parametrize("make, good", [(tritongru.GRU, True), (Wrong, False)], ids=["right", "wrong"])
def test_comparison_judges(corpus, make, good):
    pytest.importorskip("triton")
    model = training.build_model(len(corpus.vocabulary), 16, 24, nn.GRU, seed=0)
    rows = comparison.compare_steps(model, corpus, TINY, lambda i, h: make(i, h, backend="reference"), CPU)
    limit = comparison.bound(TINY.hidden, TINY.check_window)
    assert limit < 1e-4
    assert [row.step for row in rows] == [1, 2]
    assert all(row.within(limit) for row in rows) == good
    assert rows[1].loss != rows[0].loss
    assert not dataclasses.replace(rows[0], gradient_relative=math.nan).within(limit)
    assert not dataclasses.replace(rows[0], loss=math.nan).within(limit)


@pytest.mark.interpreted
def test_step_kernel_trains_like_nn_gru(corpus):
    model = training.build_model(len(corpus.vocabulary), 16, 24, nn.GRU, seed=0)
    rows = comparison.compare_steps(model, corpus, TINY, lambda i, h: tritongru.GRU(i, h, backend="step"), CPU)
    assert all(row.within(comparison.bound(TINY.hidden, TINY.check_window)) for row in rows)
    assert all(sum(row.launches.values()) >= 2 * TINY.check_window - 1 for row in rows)


# The story


def test_story_is_never_generated():
    texts = story.generate(3000, seed=1)
    joined = [" ".join(text.words) for text in texts]
    for sentence in (story.FIRST, story.SECOND):
        assert not any(" ".join(data.tokenise(sentence)) in text for text in joined)
    # the words themselves do occur, apart from each other
    for word in ("dhaval", "samosa", "pasta", "cheese", "brother"):
        assert any(word in text.words for text in texts)
    assert story.tells_the_story(tuple(data.tokenise(story.FIRST)))
    assert story.tells_the_story(tuple(data.tokenise("Asha eats dosa. " + story.SECOND)))
    assert not any(story.tells_the_story(text.words) for text in texts)


def test_labels_follow_the_last_dish():
    cuisine_of = {dish: cuisine for cuisine, dishes in story.DISHES.items() for dish in dishes.split()}
    assert len(cuisine_of) == sum(len(dishes.split()) for dishes in story.DISHES.values())
    kinds = set()
    for text in story.generate(500, seed=2):
        for answer, gap, kind in zip(text.answers, text.gaps, text.kinds, strict=True):
            last = next(word for word in reversed(text.words[:answer]) if word in cuisine_of)
            assert text.words[answer] == cuisine_of[last]
            assert text.words[answer - gap - 1] == last
            kinds.add(kind)
        assert all(a < b for a, b in pairwise(text.answers))
    assert kinds == {"first", "new dish", "same food"}


def test_common_sides_say_nothing():
    cheesy = {c for t in story.generate(3000, seed=0) if "cheese" in t.words for c in story.DISHES if c in t.words}
    assert cheesy == set(story.DISHES)


def test_generated_texts_are_seeded_and_held_out():
    assert story.generate(50, seed=5) == story.generate(50, seed=5)
    assert story.generate(50, seed=5) != story.generate(50, seed=6)
    model = StoryModel(TINY_STORY, nn.GRU, CPU, seed=0)
    assert {t.words for t in model.texts}.isdisjoint(t.words for t in model.held_out)


def test_story_model_learns_and_tells():
    sizes = StorySizes(texts=2000, held_out=60, steps=250)
    told = tell_the_story(sizes, tritongru.GRU, CPU, seed=0)
    right, asked = told.accuracy["all"]
    assert right / asked > 0.5  # one in seven by chance
    assert told.losses[-1] < told.losses[0]
    assert [answer.expected for answer in told.answers] == ["indian", "italian"]
    assert told.words[:3] == ["dhaval", "eats", "samosa"] and told.words[-1] == told.answers[1].top[0][0]
    assert all(len(values) == len(told.words) for values in told.probabilities.values())
    assert all(len(answer.top) == 3 for answer in told.answers)


# Files


def test_files_appear_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "rows.csv"
    output.write_rows(path, ["a", "b"], [[1, 0.1], [2, 1 / 3]])
    before = path.read_bytes()
    assert list(csv.reader(before.decode().splitlines())) == [["a", "b"], ["1", "0.1"], ["2", str(1 / 3)]]

    def broken():
        yield [3, 4]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        output.write_rows(path, ["a", "b"], broken())
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]

    # who has the old file open goes on reading the old file
    with path.open("rb") as reader:
        output.write_rows(path, ["c"], [[5]])
        assert reader.read() == before
    assert path.read_text().split() == ["c", "5"]


# Bad input


def write(tmp_path: Path, content: bytes) -> str:
    path = tmp_path / "input.txt"
    path.write_bytes(content)
    return str(path)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "is empty"),
        (b" \n\n ", "is empty"),
        (b"too short to learn from", "too short"),
        (b"word " * 100 + b"\0", "NUL"),
        (b"caf\xe9 " * 3000, "not UTF-8"),
        (b"\xc2\xa7\xc2\xa7 + = \n\n" * 3000, "holds no words"),
        (b"same words here. \n\n" * 3000, "repeats itself: 4 of 12,000 words without repeats, at least 2,000"),
        (b"the same words " * 3000, "repeats itself: of "),
        (b"long " * 5000 + b"\n\n" + b"".join(b"%d\n\n" % i for i in range(40)), "too few paragraphs: every twelfth"),
    ],
)
def test_bad_text(tmp_path, capsys, content, message):
    assert demo.main(options("--text", write(tmp_path, content), "--out", str(tmp_path / "out"))) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert ("too short" in error) == (content == b"too short to learn from")


def test_other_bad_options(tmp_path, capsys):
    file = write(tmp_path, b"a file")
    for arguments, message in (
        (["--text", str(tmp_path / "missing.txt")], "cannot read"),
        (["--text", str(tmp_path)], "cannot read"),
        (["--prompt", "  "], "no words"),
        (["--prompt", "\u00a7\u00a7"], "no words"),
        (["--seed", "-1"], "--seed"),
        (["--seed", str(2**64)], "--seed"),
        (["--out", file], "--out"),
        (["--out", file + "/below"], "Not a directory"),
    ):
        assert demo.main(options("--out", str(tmp_path / "out"), *arguments)) == 2, arguments
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1


def test_long_text_is_cut_inside_a_character(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "MAX_BYTES", 10)
    path = Path(write(tmp_path, "a b c d e\u00e9 f g".encode()))
    assert data.file_passages(path) == ["a b c d e"]


def test_interrupted(monkeypatch, capsys):
    from tritongru.demo import run

    def interrupt(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "run", interrupt)
    assert demo.main(options()) == 130
    assert "interrupted" in capsys.readouterr().err


def test_importing_the_demo_is_light():
    loaded = (
        "import sys, argparse, tritongru.demo as d; before = set(sys.modules); "
        "d.add_arguments(argparse.ArgumentParser()); print('tritongru.demo.run' in sys.modules, 'rich' in before)"
    )
    done = subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


# From beginning to end, in a process of its own: it wants Triton's interpreter, other tests may want the compiler

END_TO_END = """
import argparse, json, sys
from tritongru import demo
from tritongru.demo import run, storytelling, training
parser = argparse.ArgumentParser()
demo.add_arguments(parser)
sizes, story_sizes = json.loads(sys.argv[1])
sys.exit(run.run(parser.parse_args(sys.argv[2:]), training.Sizes(**sizes), storytelling.StorySizes(**story_sizes)))
"""


def test_end_to_end(tmp_path, text_file):
    sizes = json.dumps([dataclasses.asdict(TINY), dataclasses.asdict(TINY_STORY)])
    arguments = ["--text", text_file, "--out", tmp_path / "out", "--prompt", "bano [/b]", "--prompt", "keli "]
    environment = dict(os.environ) | ({} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"})
    done = subprocess.run(
        [sys.executable, "-c", END_TO_END, sizes, *arguments],
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    shown = done.stdout
    if not torch.cuda.is_available():
        assert "tritongru.GRU (backend aten)" in shown
        assert "the difference has to be exactly 0, and it is." in shown
    assert '"bano [/b]" ->' in shown and '"keli " ->' in shown
    assert "keystrokes saved" in shown and "Kneser-Ney" in shown
    assert "dhaval eats samosa" in shown.lower()
    rows = list(csv.DictReader((tmp_path / "out" / "losses.csv").open()))
    assert [int(row["step"]) for row in rows] == list(range(1, TINY.steps + 1))
    expected = {"losses.csv", "story.csv"}
    if tritongru.registry.has_triton():
        expected.add("kernels.csv")
        kernels = list(csv.DictReader((tmp_path / "out" / "kernels.csv").open()))
        assert len(kernels) == TINY.check_steps and all(row["backend tritongru.GRU"] == "step" for row in kernels)
        assert "All within it." in shown
    else:
        assert "Skipped: Triton is not installed" in shown
    if HAS_MATPLOTLIB:
        expected |= {"losses.png", "story.png"}
    else:
        assert "matplotlib is not installed" in shown
    assert {path.name for path in (tmp_path / "out").iterdir()} == expected
