"""Which Triton the tests run on, as (major, minor); (0, 0) where there is none."""

from __future__ import annotations

from importlib import metadata


def _triton() -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in metadata.version("triton").split(".")[:2])
    except metadata.PackageNotFoundError:
        return 0, 0


TRITON = _triton()
