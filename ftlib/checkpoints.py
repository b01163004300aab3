"""The checkpoints of a training run, as safetensors and JSON; nothing is pickled.

A checkpoint is a directory ``step-000123/``, written under another name and renamed
when whole: one that is found under this name is complete. It holds the SHA-256 of its
files, so that one which was damaged later is refused, not resumed from.
"""

from __future__ import annotations

import json
import operator
import random
import re
import shutil
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ftlib import files

_KEPT = 2


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, or is damaged, or belongs to another run."""


@dataclass
class TrainingState:
    """What the steps of a run change.

    Attributes:
        model: its trainable parameters and its buffers.
        optimizer: its state and parameter groups.
        scheduler: its position.
        history: the records, one a step.
    """

    model: nn.Module
    optimizer: Optimizer
    scheduler: LRScheduler
    history: list[dict[str, float]]

    @property
    def step(self) -> int:
        """Steps taken."""
        return len(self.history)


@dataclass
class Checkpoints:
    """The checkpoints of one run.

    Attributes:
        directory: where they are kept, on a disk that all processes share.
        identity: what must be equal for a run to resume from them, as JSON holds it.
        accelerator: the processes that write and read them together.
    """

    directory: Path
    identity: dict[str, Any]
    accelerator: Accelerator

    def newest(self) -> Path | None:
        """Return the newest checkpoint."""
        return next(reversed(self._all()), None)

    def save(self, state: TrainingState) -> None:
        """Write a checkpoint and drop all but the newest two.

        Raises:
            CheckpointError: it cannot be written; nothing is left of it.
        """
        path = self.directory / f"step-{state.step:06d}"
        try:
            self._save(state, path)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(self._partial, ignore_errors=True)
            raise CheckpointError(
                f"{path} cannot be written ({error}). The checkpoints before it are "
                "whole: make room there, and run it again to go on from the newest"
            ) from error

    def _save(self, state: TrainingState, path: Path) -> None:
        main = self.accelerator.is_main_process
        if main:
            shutil.rmtree(self._partial, ignore_errors=True)
            self._partial.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        _write_json(self._rng_path(self._partial), _rng_state(self.accelerator.device))
        if main:
            self._write(state)
        self.accelerator.wait_for_everyone()
        if main:
            files.seal(self._partial)
            for file in self._partial.iterdir():
                files.flush(file)
            self._partial.rename(path)
            self._prune()
        self.accelerator.wait_for_everyone()

    def load(self, path: Path, state: TrainingState) -> None:
        """Bring a run that has taken no step to the state a checkpoint holds.

        Raises:
            CheckpointError: the checkpoint is damaged or belongs to another run.
        """
        try:
            if damaged := files.damaged(path):
                raise ValueError(f"damaged: {', '.join(damaged)}")
            training = json.loads((path / "training.json").read_text())
            self._check_identity(path, training["identity"])
            _load_model(state.model, load_file(path / "model.safetensors"))
            # Copies, since the file they are mapped from will be pruned.
            tensors = _copies(load_file(path / "optimizer.safetensors"))
            state.optimizer.load_state_dict(_unflatten(tensors, training["optimizer"]))
            state.scheduler.load_state_dict(training["scheduler"])
            state.history.extend(training["history"])
            rng = json.loads(self._rng_path(path).read_text())
            _set_rng_state(rng, self.accelerator.device)
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            raise CheckpointError(
                f"{path} cannot be resumed from ({type(error).__name__}: {error}). "
                "Delete it to fall back on the checkpoint before it, or train in "
                "another directory"
            ) from error

    @property
    def _partial(self) -> Path:
        """The directory of what is not, or no longer, a whole checkpoint."""
        return self.directory / "partial"

    def _all(self) -> list[Path]:
        """Return the checkpoints, oldest first."""
        found = {
            int(match[1]): path
            for path in self.directory.glob("step-*")
            if (match := re.fullmatch(r"step-(\d+)", path.name))
        }
        return [found[step] for step in sorted(found)]

    def _rng_path(self, path: Path) -> Path:
        """Return the file of this process's random states."""
        return path / f"rng-{self.accelerator.process_index}.json"

    def _write(self, state: TrainingState) -> None:
        """Write what all processes have in common."""
        path = self._partial
        tensors, scalars = _flatten(state.optimizer.state_dict())
        save_file(_copies(_live_tensors(state.model)), path / "model.safetensors")
        save_file(_copies(tensors), path / "optimizer.safetensors")
        _write_json(
            path / "training.json",
            {
                "identity": self.identity,
                "optimizer": scalars,
                "scheduler": state.scheduler.state_dict(),
                "history": state.history,
            },
        )

    def _prune(self) -> None:
        for path in self._all()[:-_KEPT]:
            # Half of a checkpoint must not look like a whole one.
            path.rename(self._partial)
            shutil.rmtree(self._partial)

    def _check_identity(self, path: Path, saved: Mapping[str, Any]) -> None:
        changed = [
            f"{name} was {saved.get(name)!r} and is {value!r}"
            for name, value in self.identity.items()
            if saved.get(name) != value
        ]
        if changed:
            raise CheckpointError(
                f"{path} belongs to a run with other settings: {'; '.join(changed)}. "
                "Put them back to resume it, or train in another directory"
            )


def _live_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return what training changes in a model: trainable parameters and buffers.

    Tied weights appear once, under their first name.
    """
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    return trainable | dict(model.named_buffers())


def _load_model(model: nn.Module, saved: Mapping[str, torch.Tensor]) -> None:
    live = _live_tensors(model)
    if wrong := sorted({name for name, _ in _shapes(live) ^ _shapes(saved)}):
        raise ValueError(
            f"{len(wrong)} tensors differ in name or shape from the model's, the first "
            f"being {wrong[0]}"
        )
    with torch.no_grad():
        for name, tensor in live.items():
            tensor.copy_(saved[name])


def _shapes(tensors: Mapping[str, torch.Tensor]) -> set[tuple[str, torch.Size]]:
    return {(name, tensor.shape) for name, tensor in tensors.items()}


def _copies(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return CPU copies that share no memory, which safetensors insists on."""
    return {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }


def _flatten(
    state: Mapping[str, Any],
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Part an optimiser's state into named tensors and what JSON can hold."""
    tensors: dict[str, torch.Tensor] = {}
    scalars: dict[str, Any] = {}
    for parameter, entries in state["state"].items():
        for name, value in entries.items():
            kind = tensors if isinstance(value, torch.Tensor) else scalars
            kind[f"{parameter}.{name}"] = value
    return tensors, {"state": scalars, "param_groups": state["param_groups"]}


def _unflatten(
    tensors: dict[str, torch.Tensor], scalars: Mapping[str, Any]
) -> dict[str, Any]:
    """Undo :func:`_flatten`."""
    state: dict[int, dict[str, Any]] = defaultdict(dict)
    for key, value in (tensors | scalars["state"]).items():
        parameter, name = key.split(".", maxsplit=1)
        state[int(parameter)][name] = value
    return {"state": dict(state), "param_groups": scalars["param_groups"]}


def _rng_state(device: torch.device) -> dict[str, Any]:
    """Return the states of the global generators."""
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(legacy=False),  # noqa: NPY002  # libraries' own
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _set_rng_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Undo :func:`_rng_state`, from what JSON made of it."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state(state["numpy"])  # noqa: NPY002  # libraries' own
    torch.set_rng_state(torch.tensor(state["torch"], dtype=torch.uint8))
    if device.type == "cuda":
        cuda = torch.tensor(state["cuda"], dtype=torch.uint8)
        torch.cuda.set_rng_state(cuda, device)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON; arrays and tensors become lists."""
    path.write_text(json.dumps(content, default=operator.methodcaller("tolist")))
