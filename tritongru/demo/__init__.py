"""`python -m tritongru demo`: a word autocomplete, the kernels beside nn.GRU, and the story of samosa and pasta.

With `--interactive`, `--save` or `--load` the autocomplete alone. With `--story` the story alone, in full: RNN, LSTM,
GRU and a trigram, and which claims about them hold.

Imports nothing heavy: the command line asks for the options of this command before it knows which one will run.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The demo's options."""
    parser.add_argument(
        "--text", type=Path, metavar="FILE",
        help="UTF-8 text to learn from (default: the documentation strings of Python's standard library)",
    )  # fmt: skip
    parser.add_argument(
        "--prompt", action="append", metavar="TEXT", help="the beginning of a sentence to complete; may be repeated"
    )
    parser.add_argument(
        "--story", action="store_true",
        help="instead: RNN, LSTM and GRU learn the story of samosa and pasta; which of its claims hold; three minutes",
    )  # fmt: skip
    parser.add_argument(
        "--seeds",
        type=int,
        metavar="N",
        help="of --story: so many trainings of each, longer ones, three minutes a seed (default: 1, shorter)",
    )
    alone = "the autocomplete alone, in two minutes, without the comparison with nn.GRU, the kernels and the story"
    parser.add_argument(
        "--interactive", action="store_true", default=None, help=f"complete what you type; {alone}, better trained"
    )
    parser.add_argument("--save", type=Path, metavar="FILE", help=f"keep the trained model in a file; {alone}")
    parser.add_argument("--load", type=Path, metavar="FILE", help=f"take the model of --save, train nothing; {alone}")
    # No defaults: what was given and would have no effect is refused, which run.py can only tell from None.
    parser.add_argument("--out", type=Path, metavar="DIR", help="where figures and rows go (default: ./out)")
    parser.add_argument("--seed", type=int, help="of parameters and generated sentences (default: 0)")


def main(args: argparse.Namespace) -> int:
    """Run the demo: 0 done, 1 a comparison failed, 2 bad input, 130 interrupted."""
    from .data import DemoError

    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a word of the user's text that the terminal cannot show is no error
    try:
        from .run import run, run_story

        return run_story(args) if args.story else run(args)
    except DemoError as error:
        print(f"demo: {error}", file=sys.stderr)
    except OSError as error:
        print(f"demo: {error.strerror or error}: {error.filename or 'file'}", file=sys.stderr)
    except KeyboardInterrupt:
        print("\ndemo: interrupted", file=sys.stderr)
        return 130
    return 2
