"""The demo: its text, its model, what it suggests, the file of a model, the comparison with nn.GRU, what it refuses."""

from __future__ import annotations

import builtins
import dataclasses
import gc
import io
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tritongru
from tests.kit.demo import HAS_MATPLOTLIB, options
from tritongru import demo
from tritongru.demo import autocomplete, compare, data, networks, run, training
from tritongru.demo.autocomplete import Autocomplete
from tritongru.demo.data import END, NUMBER, SPECIAL, DemoError
from tritongru.inspection.files import write_rows

CPU = torch.device("cpu")
TINY = training.Sizes(
    vocabulary=60, embedding=16, hidden=24, batch=4, window=8, steps=12, check_batch=2, check_window=3
)  # fmt: skip
pytestmark = pytest.mark.usefixtures("one_thread")


def passages(count: int = 300, seed: int = 0) -> list[str]:
    """A made-up language whose next word can partly be guessed, in which some words begin others."""
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
    return data.build_corpus(passages(), "made up", TINY.vocabulary)


@pytest.fixture(scope="module")
def trained(corpus: data.Corpus) -> training.WordModel:
    model = training.build_model(len(corpus.vocabulary), TINY, tritongru.GRU, seed=0)
    training.train(model, corpus, dataclasses.replace(TINY, steps=60))
    return model


@pytest.fixture
def typed(trained: training.WordModel, corpus: data.Corpus) -> Autocomplete:
    return Autocomplete(trained, corpus.vocabulary, "made\nup")


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(passages()), encoding="utf-8")
    return path


# The text


def test_docstrings_are_read_without_importing_and_in_order(tmp_path: Path) -> None:
    sentence = "This sentence number {} is long enough to count as prose."
    (tmp_path / "b.py").write_text(f'"""{sentence.format("two")}"""\nraise SystemExit("imported")\n')
    (tmp_path / "a.py").write_text(f'"""{sentence.format("one")}\n\n>>> code()\n"""\n')
    (tmp_path / "broken.py").write_text("def (:")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "c.py").write_text(f'"""{sentence.format("three")}"""')
    assert data.standard_library_passages(tmp_path) == [sentence.format("one"), sentence.format("two")]
    assert sum(len(data.tokenise(passage)) for passage in data.standard_library_passages()) > 50_000


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("The file's END, (really)!", ["the", "file's", "end", ",", "(", "really", ")", "!"]),
        ("It\u2019s 3.5 or 12 %", ["it's", NUMBER, "or", NUMBER]),
        ("call os.path_join now.", ["call", "os.path_join", "now", "."]),
        ("<unk> + <end>", ["unk", "end"]),
    ],
)
def test_tokenise(text: str, tokens: list[str]) -> None:
    assert data.tokenise(text) == tokens


def test_vocabulary_ranks_by_frequency_then_spelling() -> None:
    vocabulary = data.Vocabulary.of(["b", "a", "c", "c", "b", "a", "d"], size=6)
    assert vocabulary.words == [*SPECIAL, "a", "b", "c"]
    assert vocabulary.encode(["c", "d"]) == [5, vocabulary.index["<unk>"]]


def test_held_out_passages_are_not_trained_on(monkeypatch: pytest.MonkeyPatch) -> None:
    found = passages(500)
    plain = data.build_corpus(found, "plain", 10**6)
    assert 0.04 < len(plain.held_out) / len(plain.train) < 0.15
    rare = [{word for word in part if plain.vocabulary.words[word].startswith("rare")} for part in
            (plain.train, plain.held_out)]  # fmt: skip
    assert len(rare[0]) > 400 and not rare[1]  # each passage has its own: of held-out ones none is known
    copies = [*found, *(passage.upper() for passage in found[48:56])]  # the same words in other spelling
    assert len(data.build_corpus(copies, "copies", 300).held_out) < len(plain.held_out)


def test_batches_follow_the_text() -> None:
    stream = data.lanes(list(range(23)), batch=2)
    assert stream.tolist() == [[i, 11 + i] for i in range(11)]
    pieces = list(data.windows(stream, 4))
    assert torch.equal(torch.cat([words for words, _ in pieces]), stream[:-1])
    assert torch.equal(torch.cat([following for _, following in pieces]), stream[1:])


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "too short"), (b"too short to learn from", "too short"), (b"caf\xe9 " * 3000, "not UTF-8"),
     (b"same words here. \n\n" * 3000, "without repeats"), (b"the same words " * 3000, "without repeats")],
)  # fmt: skip
def test_bad_text(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, message: str) -> None:
    path = tmp_path / "input.txt"
    path.write_bytes(content)
    assert demo.main(options("--text", path, "--out", tmp_path / "out")) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


# The model, and nn.GRU beside it


def test_same_seed_same_losses_as_nn_gru(corpus: data.Corpus) -> None:
    pair = compare.train_both(corpus, TINY, CPU, seed=3)
    assert len(pair.losses[0]) == TINY.steps and pair.difference == 0 and pair.backend == "aten"
    assert compare.show(pair, corpus, on_cpu=True)
    wrong = dataclasses.replace(pair, losses=[pair.losses[0], [loss + 1e-9 for loss in pair.losses[1]]])
    assert not compare.show(wrong, corpus, on_cpu=True)
    assert compare.show(dataclasses.replace(wrong, backend="step"), corpus, on_cpu=True)


def test_training_learns_within_its_passes(corpus: data.Corpus) -> None:
    model = training.build_model(len(corpus.vocabulary), TINY, tritongru.GRU, seed=0)
    before = training.perplexity(model, corpus.held_out)
    training.train(model, corpus, dataclasses.replace(TINY, steps=80))
    assert training.perplexity(model, corpus.held_out) < 0.5 * before
    one_pass = len(corpus.train) // (TINY.batch * TINY.window)
    short = training.train(model, corpus, dataclasses.replace(TINY, steps=10**6, passes=1))
    assert len(short) == one_pass > 20


@pytest.mark.parametrize("what", ["words", "story"])
def test_no_tensor_of_a_step_outlives_it(
    corpus: data.Corpus, what: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A loss of four bytes that stays keeps the heap from giving back the logits below it: 10 MB a step."""
    alive = []

    def count(*_: object, **__: object) -> None:  # a line of progress, after each quarter
        gc.collect()
        alive.append(sum(type(found) is torch.Tensor for found in gc.get_objects()))

    monkeypatch.setattr(builtins, "print", count)
    if what == "words":
        model = training.build_model(len(corpus.vocabulary), TINY, nn.GRU, seed=4)
        training.train(model, corpus, dataclasses.replace(TINY, steps=40), "training")
    else:
        networks.StoryModel(networks.Sizes(texts=64, held_out=4, batch=4, steps=40), networks.RNN, 0).train(
            0.01, "story"
        )
    assert len(alive) == 4 and alive[1:] == [alive[1]] * 3


class Wrong(tritongru.GRU):
    """Right in the first digits only, where a kernel is asked for."""

    def forward(self, input, hx=None):
        output, h_n = super().forward(input, hx)
        return output * (1 if tritongru.plan(self, input).backend == "aten" else 1.001), h_n


@pytest.mark.parametrize(("make", "good"), [(tritongru.GRU, True), (Wrong, False)], ids=["right", "wrong"])
def test_comparison_judges(corpus: data.Corpus, make: training.MakeLayer, good: bool) -> None:
    pytest.importorskip("triton")
    model = training.build_model(len(corpus.vocabulary), TINY, make, seed=0)
    assert compare.rounding(TINY.hidden, TINY.check_window, 2.0**-24) < 1e-4
    assert compare.compare_kernels(model, corpus, TINY, CPU, "reference") == good
    with torch.no_grad():
        model.project.weight[0, 0] = float("nan")
    assert not compare.compare_kernels(model, corpus, TINY, CPU, "reference")


@pytest.mark.interpreted
def test_step_kernel_trains_like_nn_gru(
    corpus: data.Corpus, trained: training.WordModel, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare.compare_kernels(trained, corpus, TINY, CPU, "step")
    T = TINY.check_window
    assert f"{T} x step_forward, {T - 1} x step_backward" in capsys.readouterr().out


# Suggestions


def test_every_word_is_one_step_and_all_steps_are_the_whole_prefix(typed: Autocomplete) -> None:
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


def test_suggestions(typed: Autocomplete) -> None:
    p = {word: float(typed.probabilities[n]) for word, n in typed.vocabulary.index.items()}
    able = [word for word in p if word not in SPECIAL and word[0].isalpha()]
    found = typed.suggest()
    assert [word for word, _ in found] == sorted(able, key=lambda word: -p[word])[:5]
    assert all(value == pytest.approx(p[word]) for word, value in found)
    assert dict(typed.suggest("keli")) == pytest.approx(
        {word: p[word] / (p["kelida"] + p["kelidaru"]) for word in ("kelida", "kelidaru")}
    )
    assert typed.suggest("q") == [] == typed.suggest("kelidaru")


def test_completing_reads_whole_words_and_says_what_it_cannot(typed: Autocomplete) -> None:
    said = typed.complete("Ba kel")
    assert "words that begin with 'kel': keli" in said or "words that begin with 'kel': kelida" in said
    state = typed.h
    typed.begin()
    typed.complete("ba")
    assert torch.equal(typed.h, state)  # "kel" was not read
    assert "read as <unk>: xyzzy" in typed.complete("xyzzy ba") and "begin" not in typed.complete("ba keli")
    with pytest.raises(DemoError, match="no words"):
        typed.complete("%")


def test_lines_go_on_until_an_empty_one(
    typed: Autocomplete, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("ba\nkeli\n%\n\nba keli\n"))
    autocomplete.interact(typed)
    shown = [line.split("->")[-1] for line in capsys.readouterr().out.splitlines() if "->" in line]
    assert len(shown) == 3 and shown[1] == shown[2] != shown[0]


# The model's file


def test_a_file_comes_back(tmp_path: Path, typed: Autocomplete) -> None:
    link, path = tmp_path / "link.pt", tmp_path / "new" / "model.pt"
    link.symlink_to(path)
    autocomplete.save(link, typed)
    assert link.is_symlink() and [file.name for file in path.parent.iterdir()] == ["model.pt"]
    found = autocomplete.load(path, CPU)
    assert found.vocabulary.words == typed.vocabulary.words and found.about == "made?up"
    ours, theirs = typed.model.state_dict(), found.model.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert found.complete("ba ke") == typed.complete("ba ke")
    # the layer's part is a state_dict of nn.GRU
    layer = {name.removeprefix("layer."): t for name, t in theirs.items() if name.startswith("layer.")}
    nn.GRU(16, 24).load_state_dict(layer)


class Dangerous:
    """A pickle that writes a file when it is read as code."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (builtins.open, (str(self.path), "w"))


CHANGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "state_dict of nn.GRU": lambda _: nn.GRU(16, 24).state_dict(),
    "list": lambda content: [content],
    "without sizes": lambda content: {name: value for name, value in content.items() if name != "sizes"},
    "size of all memory": lambda content: content | {"sizes": (2**30, 2**30)},
    "size text": lambda content: content | {"sizes": "ab"},
    "other sizes": lambda content: content | {"sizes": (16, 25)},
    "vocabulary too short": lambda content: content | {"vocabulary": content["vocabulary"][:-1]},
    "vocabulary steers the terminal": lambda content: (
        content | {"vocabulary": [*content["vocabulary"][:-1], "\x1b[2J"]}
    ),
    "about steers the terminal": lambda content: content | {"about": "a\x1b[2J"},
    "no tensor": lambda content: content | {"model": content["model"] | {"bias": [1.0]}},
    "parameter missing": lambda content: content | {"model": {"bias": content["model"]["bias"]}},
}


def test_other_files_are_refused(tmp_path: Path, typed: Autocomplete, capsys: pytest.CaptureFixture[str]) -> None:
    path, mark = tmp_path / "model.pt", tmp_path / "mark"
    autocomplete.save(path, typed)
    whole = path.read_bytes()
    content = torch.load(path, weights_only=True)
    contents = [b"", whole[: len(whole) // 2], b"PK\3\4", b"a line of text\n", pickle.dumps(Dangerous(mark))]
    for change in (*CHANGES.values(), lambda _: Dangerous(mark)):
        buffer = io.BytesIO()
        torch.save(change(content), buffer)
        contents.append(buffer.getvalue())
    for found in contents:
        path.write_bytes(found)
        assert demo.main(options("--load", path)) == 2, found[:20]
        error = capsys.readouterr().err
        assert error.startswith(f"demo: {path}: expected") and "got" in error and error.count("\n") == 1
    assert not mark.exists()
    assert demo.main(options("--load", tmp_path / "missing")) == 2
    assert "No such file" in capsys.readouterr().err


def test_files_appear_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "new" / "rows.csv"
    write_rows(path, ["a", "b"], [[1, 0.1], [2, 1 / 3]])
    before = path.read_text()
    assert before.split() == ["a,b", "1,0.1", f"2,{1 / 3}"]

    def broken():
        yield [3, 4]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_rows(path, ["a", "b"], broken())
    assert path.read_text() == before and list(path.parent.iterdir()) == [path]


# The command


def test_save_load_and_complete(
    tmp_path: Path, text_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
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


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--load", "m", "--text", "t"], "--text is of a training"), (["--load", "m", "--save", "n"], "--save is of"),
        (["--load", "m", "--seed", "0"], "--seed is of a training"), (["--interactive", "--out", "o"], "--out is for"),
        (["--seeds", "2"], "--seeds is of --story"), (["--story", "--seeds", "0"], "--seeds"),
        (["--story", "--text", "t"], "--text is of the autocomplete"), (["--save", "m", "--story"], "--save is of the"),
        (["--seed", "-1"], "--seed"), (["--story", "--seed", str(10**12)], "--seed"), (["--save", "."], "cannot write"),
        (["--save", "file/model.pt"], "File exists"), (["--save", "/dev/null"], "cannot write"),
        (["--save", "file", "--text", "file"], "in the place of the text"), (["--out", "file"], "File exists"),
        (["--text", "missing", "--out", "."], "No such file"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)  # fmt: skip
def test_what_makes_no_sense_is_said_before_any_training(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("a text")
    assert demo.main(options(*arguments)) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"] and Path("file").read_text() == "a text"


SLOW = """
import argparse, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs begin with it ignored
from tritongru import demo
from tritongru.demo import run, training
run.ALONE = training.Sizes(vocabulary=300, embedding=16, hidden=24, batch=4, window=8, steps=10**6)
parser = argparse.ArgumentParser()
demo.add_arguments(parser)
sys.exit(demo.main(parser.parse_args(sys.argv[1:])))
"""


def test_an_interrupted_training_leaves_nothing(tmp_path: Path, text_file: Path) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(b"the old one")
    command = [sys.executable, "-u", "-c", SLOW, "--text", str(text_file), "--save", str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "A word autocomplete" in line:  # what comes next is the training, which would take an hour
                break
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and error.strip() == "demo: interrupted"
    assert path.read_bytes() == b"the old one"
    assert {file.name for file in tmp_path.iterdir()} == {"text.txt", "model.pt"}


def test_importing_the_demo_is_light() -> None:
    code = "import sys, tritongru.demo; print('tritongru.demo.data' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# From beginning to end, in a process of its own: it wants Triton's interpreter, other tests may want the compiler

END_TO_END = """
import argparse, sys
from pathlib import Path
import torch
from tritongru.demo import networks, run, training
sizes = training.Sizes(vocabulary=60, embedding=16, hidden=24, batch=4, window=8, steps=12, check_batch=2, check_window=3)
story = networks.Sizes(texts=64, held_out=4, batch=4, steps=6, rates=(0.01,), gaps=(7, 15), asked=4)
args = argparse.Namespace(text=Path(sys.argv[1]), out=Path(sys.argv[2]), seed=0)
sys.exit(0 if run.run_all(args, sizes, story, torch.device("cuda" if torch.cuda.is_available() else "cpu")) else 1)
"""


def test_end_to_end(tmp_path: Path, text_file: Path) -> None:
    environment = dict(os.environ) | ({} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"})
    done = subprocess.run(
        [sys.executable, "-c", END_TO_END, text_file, tmp_path / "out"], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    if not torch.cuda.is_available():
        assert "it has to be exactly 0, and it is." in done.stdout
    assert '"return the number of" ->' in done.stdout and "dhaval eats samosa" in done.stdout.lower()
    triton = tritongru.registry.has_triton()
    assert ("all within it" if triton else "Skipped: Triton is not installed") in done.stdout
    assert HAS_MATPLOTLIB or "matplotlib is not installed" in done.stdout
    expected = {"story-words.csv"} | ({"losses.png", "story-gates.png"} if HAS_MATPLOTLIB else set())
    assert {path.name for path in (tmp_path / "out").iterdir()} == expected
