"""Files that are there whole or not at all, and folders that tell if they were altered.

A process can be killed, or the disk be full, between any two bytes. What is written
through this module is then either the new content or the old one. A bit that flips
afterwards is found by the SHA-256 that lies beside the content.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SEAL = "sha256.json"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a path to write to; what was written there then takes the place of ``path``.

    If the block raises, ``path`` stays as it was and nothing is left of the other
    file. Only a killed process leaves it behind, for the next to overwrite. Whoever
    writes to one path from several processes must hold a lock.

    Args:
        path: of the file; its folder exists.

    Raises:
        OSError: the file cannot be written; the error names it.
    """
    partial = path.with_name(f"{path.name}.tmp")
    try:
        yield partial
        flush(partial)
        os.replace(partial, path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno and error.filename is None:
            error.filename = str(path)  # a full disk is told without a name
        raise


def flush(path: Path) -> None:
    """Force a file to the disk, so that a power cut cannot empty it."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def seal(folder: Path) -> None:
    """Write beside the files of a folder what their SHA-256 are.

    Raises:
        OSError: a file cannot be read, or the list cannot be written.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    digests = {path.relative_to(folder).as_posix(): _sha256(path) for path in files}
    with replacing(folder / SEAL) as partial:
        partial.write_text(json.dumps(digests, indent=1), encoding="utf-8")


def damaged(folder: Path) -> list[str]:
    """Return which files of a sealed folder are altered, cut short or gone.

    Files that came later are not looked at.
    """
    try:
        digests = json.loads((folder / SEAL).read_text(encoding="utf-8"))
        return [n for n, digest in digests.items() if not _has(folder / n, digest)]
    except (OSError, ValueError, AttributeError):  # the list itself is damaged
        return [SEAL]


def _has(path: Path, digest: str) -> bool:
    return path.is_file() and _sha256(path) == digest


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
