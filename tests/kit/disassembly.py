"""Disassemblies are kept in Triton's cache: starting nvdisasm takes a third of a compile, and several tests, or the
same ones in the next run, read the same binary. The key is all that the text depends on: the binary and the tool."""

from __future__ import annotations

import hashlib
from pathlib import Path

from triton import knobs
from triton.runtime.cache import get_cache_manager

from tritongru.tools import compile_report

disassemble = compile_report._disassemble


def kept(cubin: bytes) -> str:
    """In place of compile_report.py's `_disassemble`."""
    try:
        tool = f"{knobs.nvidia.nvdisasm.version} -c -ndf"
    except RuntimeError:  # there is none: said there
        return disassemble(cubin)
    cache = get_cache_manager(hashlib.sha256(tool.encode() + cubin).hexdigest())
    path = cache.get_file("kernel.sass") or cache.put(disassemble(cubin), "kernel.sass", binary=False)
    return Path(path).read_text(encoding="utf-8")


def keep() -> None:
    """From now on, in this process."""
    compile_report._disassemble = kept
