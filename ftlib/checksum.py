"""SHA-256 of files, computed once for each state of a file."""

from __future__ import annotations

import functools
from pathlib import Path

import pooch


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal.

    Within a process it is computed again only if the file's size or time of
    modification has changed.

    Raises:
        OSError: the file cannot be read.
    """
    state = path.stat()
    return _sha256(str(path.resolve()), state.st_mtime_ns, state.st_size)


@functools.cache
def _sha256(path: str, mtime_ns: int, size: int) -> str:
    return pooch.file_hash(path, alg="sha256")
