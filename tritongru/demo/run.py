"""The demo from beginning to end: what is shown, in which order, and what makes it fail."""

import argparse
import importlib.util
import os
import sys
import time
from pathlib import Path

import torch

import tritongru

from .. import registry
from ..tools.files import write_rows
from . import autocomplete, claims, compare, networks
from .autocomplete import Autocomplete
from .data import UNKNOWN, Corpus, DemoError, build_corpus, file_passages, standard_library_passages
from .networks import GRU, Row, StoryModel
from .training import Sizes, build_model, perplexity, train

# Passes bound short texts: of 3, 4, 6 and 8 over the GPL (5,800 words) 4 did best on its held-out words.
ALONE = Sizes(vocabulary=5000, steps=1400, passes=4)


def run(args: argparse.Namespace) -> int:
    """What the options ask for; returns the exit code."""
    start, good = time.perf_counter(), True
    alone = next((f"--{name}" for name in ("interactive", "save", "load") if getattr(args, name)), None)
    _check(args, alone)
    torch.set_num_threads(1)  # these products are so small that sharing them out costs more than it saves
    device = torch.device("cuda" if torch.cuda.is_available() and not args.story else "cpu")
    print(f"Python {sys.version.split()[0]}, torch {torch.__version__}, on {device}")
    if alone:
        run_autocomplete(args, ALONE, device)
    elif args.story:
        run_story(args, networks.Sizes() if args.seeds else networks.ONE_SEED)
    else:
        good = run_all(args, Sizes(), networks.SHORTEST, device)
    print(f"\n{'' if alone else f'Rows and figures are in {args.out}. '}{time.perf_counter() - start:.0f} s in all.")
    return 0 if good else 1


def _check(args: argparse.Namespace, alone: str | None) -> None:
    """Everything that can be wrong with the options, before minutes of work; fills in --seed and --out."""
    for when, names, why in (
        (args.story, ("text", "interactive", "save", "load"), "is of the autocomplete, which --story leaves out"),
        (not args.story, ("seeds",), "is of --story: give both"),
        (alone, ("out",), f"is for rows and figures, of which {alone} writes none"),
        (args.load, ("text", "save", "seed"), "is of a training, and --load takes a model that is trained"),
    ):
        if when and (given := [name for name in names if getattr(args, name) is not None]):
            raise DemoError(f"--{given[0]} {why}")
    args.seed, args.out = args.seed or 0, args.out or Path("out")
    if not 0 <= args.seed < 10**9:  # texts are drawn with 1000 times the seed
        raise DemoError(f"--seed must lie between 0 and 10**9 - 1, got {args.seed}")
    if args.seeds is not None and not 1 <= args.seeds <= 100:
        raise DemoError(f"--seeds must lie between 1 and 100, got {args.seeds}")
    folder = args.save.parent if args.save else None if alone else args.out
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK) or (args.save and args.save.exists() and not args.save.is_file()):
            raise DemoError(f"cannot write to {args.save or folder}")
    if args.save and args.text and args.save.resolve() == args.text.resolve():
        raise DemoError(f"--save would put the model in the place of the text {args.text}")


def run_all(args: argparse.Namespace, sizes: Sizes, story_sizes: networks.Sizes, device: torch.device) -> bool:
    """All parts in order; whether tritongru.GRU agreed with nn.GRU."""
    corpus = _read(args.text, sizes)
    print("\n2. A word autocomplete, on tritongru.GRU and on torch.nn.GRU")
    pair = compare.train_both(corpus, sizes, device, args.seed)
    good = compare.show(pair, corpus, device.type == "cpu")
    Autocomplete(pair.models[0], corpus.vocabulary).demonstrate()
    where = "on the GPU" if device.type == "cuda" else "emulated on the CPU (right numbers, no speed)"
    print(f"\n3. The trained model through the step kernels, {where}")
    if why_not := registry.ANY_SIZE.why_not(device, torch.float32):
        print(f"Skipped: {why_not}.")
    else:
        good &= compare.compare_kernels(pair.models[0], corpus, sizes, device, registry.ANY_SIZE.name)
    _story(story_sizes, args.seed, args.out)
    return good


def run_autocomplete(args: argparse.Namespace, sizes: Sizes, device: torch.device) -> None:
    """`--interactive`, `--save` or `--load`: one model, trained or loaded, and what it suggests."""
    if args.load is not None:
        typed = autocomplete.load(args.load, device)
    else:
        corpus = _read(args.text, sizes)
        print("\n2. A word autocomplete, on tritongru.GRU")
        model = build_model(corpus.vocabulary, sizes, tritongru.GRU, args.seed).to(device)
        train(model, corpus, sizes, "training")
        found = perplexity(model, corpus.held_out)
        about = f"Trained on {corpus.name}; perplexity {found:.1f} on {len(corpus.held_out):,} held-out words."
        typed = Autocomplete(model, corpus.vocabulary, about)
    print(typed.about)
    if args.save is not None:
        autocomplete.save(args.save, typed)
        print(f"Saved in {args.save}.")
    typed.interact() if args.interactive else typed.demonstrate()


def _read(path: Path | None, sizes: Sizes) -> Corpus:
    name = str(path or "the documentation strings of Python {}.{}'s standard library".format(*sys.version_info))
    corpus = build_corpus(file_passages(path) if path else standard_library_passages(), name, sizes.vocabulary)
    unknown = corpus.held_out.count(corpus.vocabulary.index[UNKNOWN]) / len(corpus.held_out)
    print(
        f"\n1. The text: {corpus.name}\n{len(corpus.train):,} words to train on, {len(corpus.held_out):,} held out "
        f"(runs of paragraphs that are never trained on). Vocabulary: {len(corpus.vocabulary.words):,} words; "
        f"{unknown:.1%} of the held-out words are outside it and count as the word <unk>."
    )
    return corpus


def _story(sizes: networks.Sizes, seed: int, out: Path) -> None:
    """The GRU alone, trained briefly: both completions, how far it remembers, and the story word by word."""
    print(
        "\n4. The story: what a GRU remembers and forgets\nA language model of generated sentences of the kind, on "
        "tritongru.GRU, on the CPU. None of them is the story's, nor has Dhaval with samosa, or pasta with cheese."
    )
    model = StoryModel(sizes, GRU, seed)
    model.train(sizes.rates[0], "training")
    for prefix, expected, top, _ in model.told():
        print(f"  {prefix} -> {', '.join(f'{word.title()} {p:.4f}' for word, p in top)}")
        if top[0][0] != expected:
            print(f"      WRONG: it should be {expected.title()}.")
    asked = networks.questions(sizes, seed, model.trained_on)
    right = ", ".join(f"{model.right(texts)} at {at}" for measure, at, texts in asked if measure == "gap")
    print(f"Right of {sizes.asked} other texts, by words between dish and cuisine (trained on 7 to 30): {right}.")
    words = networks.story_words(model, seed)
    _write(out, "words", networks.WORD_COLUMNS, words)
    _draw("story-gates", words, out)


def run_story(args: argparse.Namespace, sizes: networks.Sizes, processes: int | None = None) -> None:
    """`--story`: every network of every seed, its rows and figures, and which claims held."""
    seeds = range(args.seed, args.seed + (args.seeds or 1))
    print(
        f"The story: RNN, LSTM, GRU and a trigram learn {sizes.texts:,} texts of its kind, gaps of 7 to "
        f"30 words, none of its own sentences; {sizes.steps} steps each, at the better of the rates {sizes.rates}."
    )
    rows, words = list[Row](), list[Row]()
    for name, found, of_words in networks.results(sizes, seeds, processes):
        rows += found
        words += of_words
        _write(args.out, "answers", networks.COLUMNS, rows)  # whatever comes next, this is kept
        _write(args.out, "words", networks.WORD_COLUMNS, words)
        print(f"  trained and asked: {name}", flush=True)
    claims.show(rows)
    _draw("story-gaps", rows, args.out)
    _draw("story-gates", words, args.out)


def _write(out: Path, name: str, columns: tuple[str, ...], rows: list[Row]) -> None:
    write_rows(out / f"story-{name}.csv", columns, ([row[c] for c in columns] for row in rows))


def _draw(name: str, rows: list[Row], out: Path) -> None:
    """One of the figures, where matplotlib is there to draw it."""
    if importlib.util.find_spec("matplotlib") is None:
        print(f"{name} was not drawn: matplotlib is not installed (pip install 'tritongru[plots]').")
        return
    from ..tools import style
    from . import figures

    with style.settings():
        if (drawn := figures.STORY[name](rows)) is not None:
            style.save(drawn, out, name)
