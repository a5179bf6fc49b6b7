"""Files for the user: written beside their place and moved into it, so that nobody ever reads half of one."""

from __future__ import annotations

import csv
import errno
import importlib.util
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


def can_draw() -> bool:
    """Whether matplotlib is here."""
    return importlib.util.find_spec("matplotlib") is not None


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path in the same folder; it takes the place of `path` at the end, or vanishes on an error.

    A link stays, and what it points to is replaced. Raises: OSError where that folder takes no files.
    """
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path, path.parent)
    try:
        yield temporary
        temporary.chmod(0o666 & ~_umask())  # mkstemp gives nobody else the right to read
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _temporary(path: Path, folder: Path) -> Path:
    """A new empty file, named after `path`."""
    handle, name = tempfile.mkstemp(dir=folder, prefix=f".{path.stem}-", suffix=path.suffix)
    os.close(handle)
    return Path(name)


def check_replaceable(path: Path) -> None:
    """Whether `replacing(path)` can work, found out before minutes of work; leaves nothing behind.

    Raises: OSError with the reason.
    """
    path = Path(os.path.realpath(path))
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if path.exists() and not path.is_file():  # a device would be replaced by a file
        raise OSError(errno.EINVAL, "Not a regular file", str(path))
    if path.exists() and not os.access(path, os.W_OK):  # replacing would not ask, its owner has said no
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
    folder = next(folder for folder in path.parents if folder.exists())
    _temporary(path, folder).unlink()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_rows(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A CSV file; floats keep every digit that tells them apart."""
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
