"""`python -m tritongru demo`: a word autocomplete, the kernels beside nn.GRU, and the story of samosa and pasta.

Imports nothing heavy: the command line asks for the options of this command before it knows which one will run.
"""

import argparse
import io
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The demo's options; no defaults, so that one that was given and would have no effect can be refused."""
    add = parser.add_argument
    alone = "the autocomplete alone, in two minutes, better trained, without nn.GRU, kernels and story"
    add("--text", type=Path, metavar="FILE", help="UTF-8 text to learn from (default: Python's documentation strings)")
    add("--story", action="store_true", help="instead: RNN, LSTM, GRU and the story; its claims; three minutes")
    add("--seeds", type=int, metavar="N", help="of --story: so many longer trainings of each, three minutes a seed")
    add("--interactive", action="store_true", default=None, help=f"complete what you type; {alone}")
    add("--save", type=Path, metavar="FILE", help=f"keep the trained model in a file; {alone}")
    add("--load", type=Path, metavar="FILE", help="the autocomplete alone, of a model of --save; trains nothing")
    add("--out", type=Path, metavar="DIR", help="where figures and rows go (default: ./out)")
    add("--seed", type=int, help="of parameters and generated sentences (default: 0)")


def main(args: argparse.Namespace) -> int:
    """Run the demo: 0 done, 1 a comparison failed, 2 bad input, 130 interrupted."""
    from .data import DemoError

    if isinstance(sys.stdout, io.TextIOWrapper):  # a word of the user's that the terminal cannot show is no error
        sys.stdout.reconfigure(errors="replace")
    try:
        from .run import run

        return run(args)
    except DemoError as error:
        print(f"demo: {error}", file=sys.stderr)
    except OSError as error:
        print(f"demo: {error.strerror or error}: {error.filename or 'file'}", file=sys.stderr)
    except KeyboardInterrupt:
        print("\ndemo: interrupted", file=sys.stderr)
        return 130
    return 2
