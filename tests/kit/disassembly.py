"""Disassemblies are kept in Triton's cache: cuobjdump takes a third of a compile, and several tests, or the
same ones in the next run, read the same binary."""

import hashlib
from pathlib import Path

from triton import knobs
from triton.runtime.cache import get_cache_manager

from tritongru.tools import compile_report


def keep() -> None:
    """From now on, in this process: by the binary and the tool."""
    disassembled = compile_report.disassembled

    def kept(cubin: bytes) -> str:
        tool = f"{knobs.nvidia.cuobjdump.version} -res-usage -sass"
        cache = get_cache_manager(hashlib.sha256(tool.encode() + cubin).hexdigest())
        path = cache.get_file("kernel.sass") or cache.put(disassembled(cubin), "kernel.sass", binary=False)
        return Path(path).read_text(encoding="utf-8")

    compile_report.disassembled = kept
