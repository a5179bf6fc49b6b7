"""The demo: its text, its model, what it suggests, the file of a model, the comparison with nn.GRU, what it refuses."""

from __future__ import annotations

import builtins
import dataclasses
import gc
import io
import os
import pickle
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import tritongru
from tests.kit.demo import HAS_MATPLOTLIB, options
from tritongru import demo
from tritongru.demo import autocomplete, compare, data, run, training
from tritongru.demo.autocomplete import Autocomplete
from tritongru.demo.data import END, NUMBER, SPECIAL, DemoError
from tritongru.tools.files import write_rows

CPU = torch.device("cpu")
TINY = training.Sizes(
    vocabulary=60, embedding=16, hidden=24, batch=4, window=8, steps=12, check_batch=2, check_window=3
)
pytestmark = pytest.mark.usefixtures("one_thread")


def passages(count: int = 300) -> list[str]:
    """A made-up language whose next word can partly be guessed, in which some words begin others."""
    rng, text = random.Random(0), []
    words = ["ba", "bano", "banoli", "keli", "kelida", "kelidaru", "mi", "minofe", "to", "torusa", "sa", "don't"]
    for number in range(count):
        start = rng.randrange(len(words))
        said = [words[(start + rng.randrange(3) * i) % len(words)] for i in range(12)]
        text.append(" ".join(said) + f", {rng.randrange(1000)} rare{number}.")
    return text


@pytest.fixture(scope="module")
def corpus() -> data.Corpus:
    return data.build_corpus(passages(), "made up", TINY.vocabulary)


@pytest.fixture(scope="module")
def trained(corpus) -> training.WordModel:
    model = training.build_model(corpus.vocabulary, TINY, tritongru.GRU, seed=0)
    training.train(model, corpus, dataclasses.replace(TINY, steps=60))
    return model


@pytest.fixture
def typed(trained, corpus) -> Autocomplete:
    return Autocomplete(trained, corpus.vocabulary, "made\nup")


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
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
    assert data.tokenise("The file's END, (It\u2019s 3.5 %) os.path_join now. <unk>") == tokens
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
    assert f"{T} x step_forward, {T - 1} x step_backward" in capsys.readouterr().out
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
    """A pickle that writes a file when it is read as code."""

    def __init__(self, path: Path) -> None:
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
        buffer = io.BytesIO()
        torch.save(other, buffer)
        contents.append(buffer.getvalue())
    for found in contents:
        path.write_bytes(found)
        assert demo.main(options("--load", path)) == 2, found[:20]
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
    assert demo.main(options("--text", text_file, "--save", "model.pt")) == 0
    first = capsys.readouterr()
    assert first.err == "" and "Saved in model.pt" in first.out and "perplexity" in first.out
    assert {file.name for file in tmp_path.iterdir()} == {"text.txt", "model.pt"}  # no out/
    assert demo.main(options("--load", "model.pt")) == 0
    second = capsys.readouterr().out
    suggested = [[line for line in shown.splitlines() if "->" in line] for shown in (first.out, second)]
    assert suggested[0] == suggested[1] and len(suggested[0]) == len(autocomplete.PROMPTS)
    before = Path("model.pt").read_bytes()

    def interrupted(*_):  # ctrl-c; a worker of xdist ignores the signal itself
        raise KeyboardInterrupt

    monkeypatch.setattr(nn.utils, "clip_grad_norm_", interrupted)
    assert demo.main(options("--text", text_file, "--save", "model.pt")) == 130
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
    assert demo.main(options(*arguments.split())) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files


END_TO_END = """
import argparse, sys
from pathlib import Path
import torch
from tests.test_demo import TINY
from tritongru.demo import networks, run
story = networks.Sizes(texts=64, held_out=4, batch=4, steps=6, rates=(0.01,), gaps=(7, 15), asked=4)
args = argparse.Namespace(text=Path(sys.argv[1]), out=Path(sys.argv[2]), seed=0)
sys.exit(not run.run_all(args, TINY, story, torch.device("cuda" if torch.cuda.is_available() else "cpu")))
"""


def test_end_to_end(tmp_path, text_file):
    """In a process of its own: it wants Triton's interpreter, other tests may want the compiler."""
    gpu, triton = torch.cuda.is_available(), tritongru.registry.has_triton()
    environment = dict(os.environ) | ({} if gpu else {"TRITON_INTERPRET": "1"})
    command = [sys.executable, "-c", END_TO_END, text_file, tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert gpu or "it has to be 0, and it is." in done.stdout
    assert '"return the number of" ->' in done.stdout and "dhaval eats samosa" in done.stdout.lower()
    assert ("all within it" if triton else "Skipped: Triton is not installed") in done.stdout
    assert HAS_MATPLOTLIB or "matplotlib is not installed" in done.stdout
    assert {path.name for path in (tmp_path / "out").iterdir()} - {"story-gates.png"} == {"story-words.csv"}
