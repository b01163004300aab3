"""Base models that an experiment pre-trains itself: once per seed, kept on disk."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pooch
import torch
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import nn

from ftlib import runtime
from ftlib.files import replacing
from ftlib.models import ModelCorrupt

Model = TypeVar("Model", bound=nn.Module)


def base_path(method: str, seed: int, identity: Any) -> Path:
    """Where a base is kept, in the user's cache.

    Args:
        method: short name of the method.
        seed: the base's.
        identity: all that its weights depend on, as JSON.
    """
    key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
    name = f"{method}-{seed}-{key}.safetensors"
    return Path(pooch.os_cache("ftlib")) / "bases" / name


def kept_base(model: Model, path: Path, pretrain: Callable[[Path], nn.Module]) -> Model:
    """Load a base's weights, pre-trained now or before, so that all arms share them.

    Args:
        model: takes the weights, and goes to :func:`ftlib.runtime.device`.
        path: see :func:`base_path`.
        pretrain: returns a model like it, trained; called where there is no file. Its
            argument is a directory for checkpoints, from which it goes on where an
            interrupted process stopped.

    Raises:
        ModelCorrupt: the file is damaged.
        OSError: the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        if not path.exists():
            _keep(path, pretrain)
    model.load_state_dict(_weights(path))
    return model.to(runtime.device())


def _keep(path: Path, pretrain: Callable[[Path], nn.Module]) -> None:
    # The caller's random numbers must not depend on whether the base was in the cache.
    with torch.random.fork_rng():
        trained = pretrain(path.with_suffix(".partial"))
    weights = {name: w.cpu().clone() for name, w in trained.state_dict().items()}
    with replacing(path) as temporary:
        temporary.write_bytes(save(weights, {"sha256": _sha256(weights)}))
    shutil.rmtree(path.with_suffix(".partial"))


def _weights(path: Path) -> dict[str, torch.Tensor]:
    """Read a base's weights, which must be those that were written."""
    try:
        with safe_open(path, "pt") as file:
            written = file.metadata()  # a file of old has none
        weights = load_file(path)
        if written is not None and written != {"sha256": _sha256(weights)}:
            raise ValueError("it does not hold the weights that were written")
    except (SafetensorError, ValueError) as error:
        raise ModelCorrupt(
            f"{path} is damaged: {error}. Remove it, and run the command again: the "
            "base is then trained anew"
        ) from error
    return weights


def _sha256(weights: dict[str, torch.Tensor]) -> str:
    return hashlib.sha256(save(weights)).hexdigest()
