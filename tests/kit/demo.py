"""What the tests of the demo share."""

from __future__ import annotations

import argparse
import importlib.util

from tritongru import demo

HAS_MATPLOTLIB = importlib.util.find_spec("matplotlib") is not None


def options(*arguments: object) -> argparse.Namespace:
    """As the command line gives them to the demo."""
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    return parser.parse_args([str(argument) for argument in arguments])
