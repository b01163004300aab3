"""The registry of pinned data files, and where they are found.

``registry.toml`` beside this module holds the files. Each is looked for in the folder
``FTLIB_DATA_DIR``, then in the user's cache, then in ``bundled`` beside this module,
then at its pinned address, and is handed out only if its SHA-256 is the registered one.
Bundled is what is small, free to pass on, and not published in the form it is read in.
"""

from __future__ import annotations

import functools
import os
import tomllib
from collections import Counter
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import pooch

from ftlib.checksum import sha256

_BUNDLED = Path(__file__).parent / "bundled"
_TIMEOUT = 15  # seconds without a byte from the network


class DataUnavailable(FileNotFoundError):  # noqa: N818  # a state, told as one
    """A registered file is neither here nor to be had."""


class DataCorrupt(ValueError):  # noqa: N818
    """A file has a registered name and other contents."""


class DataFile(NamedTuple):
    """A pinned file: its place under a data folder, its address, size and SHA-256."""

    path: str
    url: str | None
    bytes: int
    sha256: str


class DataSet(NamedTuple):
    """Files under one licence; ``how`` tells of those which have no address."""

    name: str
    what: str
    licence: str
    files: tuple[DataFile, ...]
    how: str | None


class Holding(NamedTuple):
    """What there is of a data set: count and total size of its files, and where."""

    name: str
    what: str
    files: int
    bytes: int
    licence: str
    where: str


@functools.cache
def data_sets() -> dict[str, DataSet]:
    """Return the registered data sets by name."""
    text = resources.files("ftlib.data").joinpath("registry.toml").read_text("utf-8")
    return {name: _data_set(name, table) for name, table in tomllib.loads(text).items()}


def _data_set(name: str, table: dict) -> DataSet:
    source = table.get("source")
    files = tuple(
        DataFile(
            path=f"{table['folder']}/{file}",
            url=source and quote(f"{source}/{file}", safe=":/"),
            **pins,
        )
        for file, pins in table["files"].items()
    )
    return DataSet(name, table["what"], table["licence"], files, table.get("how"))


def checksums(
    *names: str, read: Callable[[str], bool] = lambda path: True
) -> dict[str, str]:
    """Return the SHA-256 of the files of data sets, by their registered names.

    Args:
        names: of the data sets.
        read: whether a file of them, by its registered name, is read.

    >>> list(checksums("comve", read=lambda path: "test" not in path))
    ['comve/dev.csv', 'comve/train.csv']
    """
    files = (file for name in names for file in data_sets()[name].files)
    return {file.path: file.sha256 for file in files if read(file.path)}


def fetch(path: str) -> Path:
    """Return where a registered file lies, downloading it if need be.

    Args:
        path: the file's registered name, such as ``math/gsm8k/test.jsonl``.

    Raises:
        ValueError: no file is registered under the name.
        DataUnavailable: the file is in none of the places, or the cache cannot hold it.
        DataCorrupt: the first place that has the file has a damaged or altered one.
    """
    data_set, file = _find(path)
    for folder in _folders().values():
        candidate = folder / path
        if candidate.is_file():
            return _verified(candidate, file)
    return _download(data_set, file)


def catalogue() -> list[Holding]:
    """Tell of every data set what is here, without reading or fetching the files."""
    return [
        Holding(
            name=data_set.name,
            what=data_set.what,
            files=len(data_set.files),
            bytes=sum(file.bytes for file in data_set.files),
            licence=data_set.licence,
            where=_where(data_set),
        )
        for data_set in data_sets().values()
    ]


def _where(data_set: DataSet) -> str:
    places = Counter(_place(file) for file in data_set.files)
    if len(places) == 1:
        return next(iter(places))
    return ", ".join(f"{count} {place}" for place, count in places.items())


def _place(file: DataFile) -> str:
    folders = _folders().items()
    return next(
        (name for name, folder in folders if (folder / file.path).is_file()), "not here"
    )


def _find(path: str) -> tuple[DataSet, DataFile]:
    for data_set in data_sets().values():
        for file in data_set.files:
            if file.path == path:
                return data_set, file
    raise ValueError(
        f"no data file is registered as {path!r}: `ftlib data` lists the data sets"
    )


def _cache() -> Path:
    return Path(pooch.os_cache("ftlib")) / "data"


def _folders() -> dict[str, Path]:
    """The folders to look in, by the name they are spoken of."""
    folder = os.environ.get("FTLIB_DATA_DIR")
    named = {"FTLIB_DATA_DIR": Path(folder).expanduser()} if folder else {}
    return named | {"cache": _cache(), "ftlib": _BUNDLED}


def _verified(path: Path, file: DataFile) -> Path:
    found = sha256(path)
    if found != file.sha256:
        raise DataCorrupt(
            f"{path} is damaged or altered:\n"
            f"  expected {file.bytes} bytes, SHA-256 {file.sha256}\n"
            f"  found    {path.stat().st_size} bytes, SHA-256 {found}\n"
            f"Remove or replace it, and run the command again."
        )
    return path


def _download(data_set: DataSet, file: DataFile) -> Path:
    """Download into the cache; pooch gives a file its name only once it is verified."""
    if file.url is None:
        raise _unavailable(data_set, file, f"it is not published: it is {data_set.how}")
    try:
        name = pooch.retrieve(
            file.url,
            known_hash=f"sha256:{file.sha256}",
            fname=file.path,
            path=_cache(),
            downloader=pooch.HTTPDownloader(timeout=_TIMEOUT),
        )
    except OSError as error:  # every failure of requests is one, without a number
        if error.errno:
            raise DataUnavailable(
                f"data file {file.path} ({data_set.name}) cannot be written to "
                f"{_cache()}: {error.strerror}. Make room there, or set FTLIB_DATA_DIR "
                "to a folder which holds it under that name"
            ) from error
        raise _unavailable(data_set, file, f"{file.url}: {error}") from error
    except ValueError as error:
        raise DataCorrupt(
            f"{file.url} does not hold the registered {file.path}: {error}"
        ) from error
    return Path(name)


def _unavailable(data_set: DataSet, file: DataFile, reason: str) -> DataUnavailable:
    folders = _folders()
    named = folders.get("FTLIB_DATA_DIR")
    fix = "" if file.url is None else f"run `ftlib data fetch {data_set.name}`, or "
    return DataUnavailable(
        f"data file {file.path} ({data_set.name}) is not available: {fix}"
        f"set FTLIB_DATA_DIR to a folder which holds it under that name. Looked in\n"
        f"  FTLIB_DATA_DIR: {_absent(named) if named else 'not set'}\n"
        f"  cache: {_absent(folders['cache'])}\n"
        f"  network: {reason}"
    )


def _absent(folder: Path) -> str:
    return f"{folder} {'has no such file' if folder.is_dir() else 'does not exist'}"
