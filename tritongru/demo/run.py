"""The demo from beginning to end: what is shown, in which order, and what makes it fail."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

import tritongru

from . import claims, model_file, networks
from .autocomplete import (
    PROMPTS,
    backend_of,
    held_out_figures,
    interact,
    show_completion,
    show_held_out,
    show_pair,
    train_pair,
)
from .comparison import COLUMNS, StepDifference, bound, compare_steps
from .completion import check_prompt
from .data import Corpus, DemoError, build_corpus, file_passages, standard_library_passages
from .output import can_draw, check_replaceable, write_rows
from .screen import Screen
from .session import Session
from .story import DISHES
from .storytelling import StorySizes, Told, tell_the_story
from .training import Sizes, WordModel, build_model, perplexity, train, within_passes

# The autocomplete alone has the time that the comparison takes for its twin, the kernels and the story: under two
# minutes on one CPU core, after which 400 steps more saved no more keystrokes. Passes bound short texts: of 4, 8, 12,
# 21 and 133 over the GPL (5,400 words) 8 left the least perplexity on its validation part.
ALONE = Sizes(vocabulary=5000, steps=1400, passes=8, evaluations=14, dropout=0.1)


def run(args: argparse.Namespace, sizes: Sizes | None = None, story_sizes: StorySizes | None = None) -> int:
    """All parts in order, or the autocomplete alone; returns the exit code. Tests give sizes, to be quick."""
    alone = _alone(args)
    _check(args)
    if alone:
        return run_autocomplete(args, sizes or ALONE)
    sizes, story_sizes = sizes or Sizes(), story_sizes or StorySizes()
    start = time.perf_counter()
    screen = Screen()
    device = _device(screen)
    with _one_thread():
        corpus = _read(screen, args.text, sizes)
        screen.title("2. A word autocomplete, on tritongru.GRU and on torch.nn.GRU")
        pair = train_pair(screen, corpus, sizes, device, args.seed)
        show_pair(screen, pair, corpus, args.out)
        session = Session(pair.model, corpus.vocabulary)
        for prompt in args.prompt or PROMPTS:
            show_completion(screen, session, prompt)
        agree = _kernels(screen, pair.model, corpus, sizes, device, args.out)
        told, story_backend = _story(screen, story_sizes, device, args.seed)
        _write_story(screen, told, story_backend, args.out)
    screen.say()
    screen.say(f"Rows and figures are in {args.out}. {time.perf_counter() - start:.0f} s in all.")
    return 0 if pair.good and agree else 1


def run_autocomplete(args: argparse.Namespace, sizes: Sizes) -> int:
    """`--interactive`, `--save` or `--load`: one model, trained or loaded, and what it suggests."""
    screen = Screen()
    device = _device(screen)
    with _one_thread():
        if args.load is not None:
            saved = model_file.read(args.load, tritongru.GRU)
            screen.title(f"A word autocomplete, loaded from {args.load}")
            screen.say(f"Trained by tritongru {saved.package} on {saved.text}.")
        else:
            saved = _train_alone(screen, args, sizes, device)
        show_held_out(screen, saved.held_out)
        screen.say(
            f"Vocabulary: {len(saved.vocabulary):,} words; {1 - saved.held_out.known_fraction:.1%} of the held-out "
            "words are outside it."
        )
        if args.save is not None:
            model_file.write(args.save, saved)
            screen.say(f"Saved in {args.save}.")
        session = Session(saved.model.to(device), saved.vocabulary)
        screen.say()
        for prompt in args.prompt or (() if args.interactive else PROMPTS):
            show_completion(screen, session, prompt)
        if args.interactive:
            interact(screen, session)
    return 0


def _train_alone(screen: Screen, args: argparse.Namespace, sizes: Sizes, device: torch.device) -> model_file.Saved:
    corpus = _read(screen, args.text, sizes, with_validation=True)
    sizes = within_passes(sizes, corpus)
    screen.title("2. A word autocomplete, on tritongru.GRU")
    shape = (len(corpus.vocabulary), sizes.embedding, sizes.hidden)
    model = build_model(*shape, tritongru.GRU, args.seed, sizes.dropout).to(device)
    backend = backend_of(model.layer, device, sizes.window, sizes.batch)
    with screen.progress(f"training (backend {backend})", sizes.steps) as advance:
        curve = train(model, corpus, sizes, device, lambda step, loss: advance(step, f"loss {loss:.3f}"))
    if curve.kept < len(curve.losses):
        screen.say(
            f"Of {len(curve.losses)} steps the first {curve.kept} are kept: more made it no better on other words."
        )
    found = held_out_figures(model, corpus, perplexity(model, corpus.held_out, device))
    return model_file.Saved(model, corpus.vocabulary, corpus.name, found)


def _device(screen: Screen) -> torch.device:
    """The GPU where there is one; says so."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    screen.say(f"Python {sys.version.split()[0]}, torch {torch.__version__}, everything runs on: {name}")
    return device


def _alone(args: argparse.Namespace) -> str | None:
    """The option that asks for the autocomplete alone."""
    return next((f"--{name}" for name in ("interactive", "save", "load") if getattr(args, name)), None)


def _check(args: argparse.Namespace) -> None:
    """Everything that can be wrong with the options, before minutes of work; fills in --seed and --out."""
    alone = _alone(args)
    given = [name for name in ("text", "prompt", "interactive", "save", "load") if getattr(args, name) is not None]
    if args.story and given:
        raise DemoError(f"--{given[0]} is of the autocomplete, which --story leaves out")
    if args.seeds is not None and not args.story:
        raise DemoError("--seeds is of --story: give both")
    if alone and args.out is not None:
        raise DemoError(f"--out is for rows and figures, of which {alone} writes none")
    for name in ("text", "save", "seed"):
        if args.load is not None and getattr(args, name) is not None:
            raise DemoError(f"--{name} is of a training, and --load takes a model that is trained: give one of them")
    args.seed, args.out = args.seed or 0, args.out or Path("out")
    if not 0 <= args.seed < 2**63 - 1:
        raise DemoError(f"--seed must lie between 0 and 2**63 - 2, got {args.seed}")
    for prompt in args.prompt or ():
        check_prompt(prompt)
    if args.load is not None:
        return  # reading it is the check
    if args.save is not None:
        _check_save(args.save, args.text)
    if alone:
        return
    if args.out.exists() and not args.out.is_dir():
        raise DemoError(f"--out must be a folder, {args.out} is a file")
    if args.seeds is not None and not 1 <= args.seeds <= 100:
        raise DemoError(f"--seeds must lie between 1 and 100, got {args.seeds}")
    if args.story and args.seed >= 10**9:  # texts are drawn with 1000 times the seed
        raise DemoError(f"--seed must lie below 10**9 with --story, got {args.seed}")
    args.out.mkdir(parents=True, exist_ok=True)
    if not os.access(args.out, os.W_OK):
        raise DemoError(f"cannot write to {args.out}")


def _check_save(path: Path, text: Path | None) -> None:
    try:
        check_replaceable(path)
    except OSError as error:
        raise DemoError(f"--save: cannot write {path}: {error.strerror or error}") from error
    if text is not None and path.exists() and text.exists() and path.samefile(text):
        raise DemoError(f"--save would put the model in the place of the text {text}")


@contextmanager
def _one_thread() -> Iterator[None]:
    """One thread for CPU work: these products are so small that sharing them out costs more than it saves."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _read(screen: Screen, path: Path | None, sizes: Sizes, with_validation: bool = False) -> Corpus:
    start = time.perf_counter()
    if path is None:
        passages = standard_library_passages()
        name = "the documentation strings of Python {}.{}'s standard library".format(*sys.version_info[:2])
    else:
        passages, name = file_passages(path), str(path)
    corpus = build_corpus(passages, name, sizes.vocabulary, with_validation)
    screen.title("1. The text")
    screen.say(
        f"{name}: {len(corpus.train):,} words to train on, {len(corpus.held_out):,} held out "
        f"(runs of paragraphs that are never trained on)"
        + (f", {len(corpus.validation):,} more by which the training chooses" if with_validation else "")
        + f"; {time.perf_counter() - start:.1f} s."
    )
    screen.say(
        f"Vocabulary: the {len(corpus.vocabulary):,} most frequent; {1 - corpus.known_fraction:.1%} of the held-out "
        "words are outside it and count as the word <unk>."
    )
    return corpus


def _kernels(screen: Screen, model: WordModel, corpus: Corpus, sizes: Sizes, device: torch.device, out: Path) -> bool:
    """The same model through the Triton kernels; False where they differ from nn.GRU by more than rounding."""
    gpu = device.type == "cuda"
    where = "on the GPU" if gpu else "in Triton's interpreter on the CPU (right numbers, no speed)"
    screen.title(f"3. The trained model through the step kernels, {where}")
    step = next(backend for backend in tritongru.backends() if backend.name == "step")
    if step.why_not is not None:
        screen.say(f"Skipped: {step.why_not}.")
        return True
    limit = bound(sizes.hidden, sizes.check_window)
    backends = ("step", backend_of(nn.GRU(1, 1), device, sizes.check_window, sizes.check_batch))
    names = (f"tritongru.GRU (backend {backends[0]})", f"torch.nn.GRU (backend {backends[1]})")

    def make(input_size: int, hidden_size: int) -> nn.GRU:
        return tritongru.GRU(input_size, hidden_size, backend="step")

    with screen.progress(names[0], sizes.check_steps) as advance:
        rows = compare_steps(model, corpus, sizes, make, device, lambda row: advance(row.step, f"loss {row.loss:.4f}"))
    for row in rows:
        _show_difference(screen, row, names)
    good = bool(rows) and all(row.within(limit) for row in rows)
    screen.say(
        f"Bound from float32 rounding, 2 x 2T sqrt(H) 2^-24 with T {sizes.check_window}, H {sizes.hidden}: {limit:.1e} "
        f"relative RMS, and as much of the loss. {'All within it.' if good else 'NOT within it: a fault.'}"
    )
    header = [*COLUMNS, "bound", "backend tritongru.GRU", "backend torch.nn.GRU"]
    write_rows(out / "kernels.csv", header, ([*row.row, limit, *backends] for row in rows))
    return good


def _show_difference(screen: Screen, row: StepDifference, names: tuple[str, str]) -> None:
    launches = ", ".join(f"{count} x {kernel}" for kernel, count in row.launches.items())
    screen.say(f"  step {row.step}, {names[0]}: loss {row.loss:.7f}; launches: {launches or 'none'}")
    screen.say(
        f"  step {row.step}, {names[1]}: loss {row.loss_nn:.7f}, difference {row.loss_difference:+.1e}; gradients "
        f"differ by {row.gradient_absolute:.1e} at most, {row.gradient_relative:.1e} relative RMS "
        f"({row.worst_parameter})"
    )


def _story(screen: Screen, sizes: StorySizes, device: torch.device, seed: int) -> tuple[Told, str]:
    screen.title("4. The story: what a GRU remembers and forgets")
    probe = tritongru.GRU(sizes.embedding, sizes.hidden, device=device)
    backend = backend_of(probe, device, 40, sizes.batch)  # texts have about so many words
    screen.say(
        f"A language model of generated sentences of the kind, on tritongru.GRU (backend {backend}). The two sentences "
        "below are not among them, nor is any that has Dhaval with samosa, or pasta with cheese."
    )
    with screen.progress(f"training on {sizes.texts} texts", sizes.steps) as advance:
        told = tell_the_story(sizes, tritongru.GRU, device, seed, lambda n, loss: advance(n, f"loss {loss:.3f}"))
    for answer in told.answers:
        top = ", ".join(f"{word.title()} {probability:.4f}" for word, probability in answer.top)
        screen.say(f"  {answer.prefix} -> {top}")
        if not answer.right:
            screen.say(f"      WRONG: it should be {answer.expected.title()}.", style="bold")
    right = sum(answer.right for answer in told.answers)
    screen.say(f"{right} of {len(told.answers)} completions are right (the likeliest of all words, trained just now).")
    screen.table(
        ["held-out generated sentences", "right", "of", "share"],
        [[kind, str(good), str(asked), f"{good / asked:.1%}"] for kind, (good, asked) in told.accuracy.items()],
    )
    return told, backend


def _write_story(screen: Screen, told: Told, backend: str, out: Path) -> None:
    cuisines = list(told.probabilities)
    write_rows(
        out / "story.csv",
        ["place", "word", *(f"P({cuisine})" for cuisine in cuisines)],
        ([i, word, *(told.probabilities[c][i] for c in cuisines)] for i, word in enumerate(told.words)),
    )
    if can_draw():
        from . import figures

        figures.draw_story(out / "story.png", told, f"backend {backend}")
    else:
        _say_not_drawn(screen)


def _say_not_drawn(screen: Screen) -> None:
    screen.say("The figures were not drawn: matplotlib is not installed (pip install 'tritongru[plots]').")


def run_story(args: argparse.Namespace, sizes: networks.Sizes | None = None, processes: int | None = None) -> int:
    """`--story`: every network of every seed, its rows and figures, and which claims held; returns the exit code."""
    sizes = sizes or (networks.Sizes() if args.seeds else networks.ONE_SEED)
    start = time.perf_counter()
    _check(args)
    screen = Screen()
    seeds = range(args.seed, args.seed + (args.seeds or 1))
    screen.title("What a GRU remembers: RNN, LSTM, GRU and a trigram learn the story and are asked about it")
    screen.say(
        f"{sizes.story.texts:,} texts of its kind, gaps of {networks.TRAINED[0]} to {networks.TRAINED[-1]} words, none "
        f"of the story's own sentences; {sizes.story.steps} steps for each network, at the learning rate of "
        f"{', '.join(map(str, sizes.rates))} with the least held-out loss; gradients clipped at norm 1. On the CPU."
    )
    rows: list[networks.Row] = []
    words: list[networks.Row] = []
    ended = 0
    with screen.progress("trained and asked", len(seeds) * (len(networks.NETWORKS) + 1)) as advance:

        def done(name: str, found: list[networks.Row], of_words: list[networks.Row]) -> None:
            nonlocal ended
            ended += 1
            rows.extend(found)
            words.extend(of_words)
            for file, columns, every in (
                ("answers", networks.COLUMNS, rows), ("words", networks.WORD_COLUMNS, words),
            ):  # fmt: skip
                write_rows(args.out / f"story-{file}.csv", columns, ([row[c] for c in columns] for row in every))
            advance(ended, name)

        networks.results(sizes, seeds, done, processes)
    show_claims(screen, rows)
    if can_draw():
        from . import figures
        from .style import save, settings

        for name, draw in figures.STORY.items():
            with settings():
                drawn = draw(words if name == figures.WORDS else rows)
            if drawn is not None:
                save(drawn, args.out, name)
    else:
        _say_not_drawn(screen)
    screen.say()
    screen.say(f"Rows and figures are in {args.out}. {time.perf_counter() - start:.0f} s in all.")
    return 0


SHOWN = (7, 15, 60, 100)  # of the gaps, beside the longest trained one and the longest


def show_claims(screen: Screen, rows: claims.Rows) -> None:
    """The networks side by side, their accuracy, and every claim with its numbers."""
    cells = (networks.RNN, networks.LSTM, networks.GRU)
    far, within = max(claims.gaps_of(rows)), max(gap for gap in claims.gaps_of(rows) if gap <= claims.LONGEST)
    table = []
    for name in (cell.name for cell in cells):
        size = claims.size_of(rows, name)
        I, H = size["input"], size["hidden"]
        counted = (
            networks.gates_of(name), networks.STATES[name], size["parameters"], networks.flops(name, I, H),
            networks.step_bytes(name, I, H),
        )  # fmt: skip
        table.append([name, *(f"{n:,}" for n in counted), f"{claims.measured_time(rows, name).mean:.0f}"])
    screen.say()
    screen.table(["network", "gates", "states", "parameters", "flops", "bytes", "CPU µs here"], table)
    screen.say("Flops and bytes of one step of one sequence; time forward and backward, 16 sequences at once.")
    screen.say()
    models = dict.fromkeys(str(row["model"]) for row in rows)
    order = [*(n.name for n in networks.NETWORKS), networks.CLAMPED, networks.AVERAGED, networks.TRIGRAM]
    gaps = [gap for gap in claims.gaps_of(rows) if gap in (within, far) or gap in SHOWN]
    most = max(claims.gaps_of(rows, "switches"))
    on_short = {network.name for network in networks.ON_SHORT}
    screen.table(
        ["right, %", *(f"gap {gap}" for gap in gaps), f"{most} switches"],
        [
            [
                model,
                *(claims.accuracy(rows, model, "gap", gap).short for gap in gaps),
                "" if model in on_short else claims.accuracy(rows, model, "switches", most).short,
            ]
            for model in sorted(models, key=order.index)
        ],
    )
    screen.say(
        f"By chance: one in {len(DISHES)}. Those trained on {networks.SHORT[0]} to {networks.SHORT[-1]} are asked over "
        "texts of the words that they have read."
    )
    screen.title("Which claims of the story held")
    luck = " One seed has no spread: what sets networks apart here may be luck, and --seeds 5 would tell."
    screen.say(claims.RULE + ("" if len({row["seed"] for row in rows}) > 1 else luck))
    for claim in claims.judge(rows):
        screen.say(f"{'held  ' if claim.held else 'FAILED'} {claim.text}.", style=None if claim.held else "bold")
        screen.say(f"       {claim.numbers}.")
