"""docs/reference.md from the docstrings of the public names: `python -m tests.kit.reference` writes it.

A section of one file for each, not a file: GRU.md and gru.md are one file on some systems.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path

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
    lines = [f"## {name}", "", "```python", signature(name), "```", ""]
    kind = ""
    for line in [*(inspect.getdoc(getattr(tritongru, name)) or "").splitlines(), ""]:
        heading = re.match(rf"({'|'.join(HEADINGS)}):(.*)", line)
        if kind == "Example" and not line.strip():
            lines.append("```")
        if heading:
            kind = heading[1]
            lines.append(f"**{kind}**:{heading[2]}")
            if kind == "Example":
                lines += ["", "```python"]
            elif kind == "Args":
                lines.append("")
        elif not line.strip():
            kind = ""
            lines.append("")
        elif kind == "Args":
            lines.append(f"- {_argument(line.strip())}" if re.match(r" {4}\S", line) else f"  {line.strip()}")
        else:
            lines.append(line[4:] if kind == "Example" else line.strip() if kind else line)
    return "\n".join(lines).rstrip() + "\n"


def _argument(text: str) -> str:
    return re.sub(r"^([\w, ]+):", lambda m: ", ".join(f"`{n}`" for n in m[1].split(", ")) + ":", text)


def page() -> str:
    """The whole file."""
    return "\n".join([INTRODUCTION, *map(section, PUBLIC)])


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)
