"""docs/reference.md from the docstrings of the public names: `python -m tests.kit.reference` writes it.

A section of one file for each, not a file: GRU.md and gru.md are one file on some systems.
"""

import inspect
import re
from pathlib import Path
from textwrap import dedent

import tritongru

PAGE = Path(__file__).parents[2] / "docs" / "reference.md"
PUBLIC = [name for name in tritongru.__all__ if name != "__version__"]
HEADINGS = ("Args", "Shapes", "Dtypes", "Returns", "Raises", "Example")
INTRODUCTION = """# Reference

Every public name of `tritongru` (and `tritongru.__version__`, a string). T B I H L D are time, batch, input size,
hidden size, layers and directions. The examples are run by the tests. Where the layer differs from `torch.nn.GRU`:
[differences.md](differences.md).

(Written by `.venv/bin/python -m tests.kit.reference` from the docstrings.)
"""


def signature(name: str) -> str:
    """As one would type it, without annotations."""
    found = inspect.signature(getattr(tritongru, name))
    parts = [p.replace(annotation=inspect.Parameter.empty) for p in found.parameters.values() if p.name != "refused"]
    return f"tritongru.{name}{found.replace(parameters=parts, return_annotation=inspect.Signature.empty)}"


def section(name: str) -> str:
    """A heading, the signature, and the docstring with its own headings in bold."""
    blocks = [f"## {name}", f"```python\n{signature(name)}\n```"]
    for block in (inspect.getdoc(getattr(tritongru, name)) or "").split("\n\n"):
        heading = re.match(rf"({'|'.join(HEADINGS)}):(\s)", block)
        text = dedent(block[heading.end() :]) if heading else block
        if heading and heading[1] == "Example":
            text = f"\n```python\n{text}\n```"
        elif heading and heading[1] == "Args":
            text = "\n" + re.sub(r"^ +", "  ", re.sub(r"^(\w[\w, ]*):", _argument, text, flags=re.M), flags=re.M)
        blocks.append(f"**{heading[1]}**:{heading[2]}{text}" if heading else text)
    return "\n\n".join(blocks) + "\n"


def _argument(names: re.Match[str]) -> str:
    return "- " + re.sub(r"\w+", r"`\g<0>`", names[1]) + ":"


def page() -> str:
    return "\n".join([INTRODUCTION, *map(section, PUBLIC)])


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)
