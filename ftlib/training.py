"""One training loop for every method, on Accelerate.

A method brings a model, a sequence of examples and a loss function; the loop brings
batches, accumulation, clipping, the schedule, a bar, checkpoints, and whatever
device or number of processes Accelerate was launched with.

Three conventions make runs comparable and repeatable:

* A loss is a **mean over the examples of its batch**. One process with a batch of 8,
  two processes with 4 each, and two accumulated chunks of 4 are then one training.
* The examples of a step are a function of ``(seed, step)`` alone, so a resumed run
  finds its place in the data by its step number.
* Steps count from 1: the record, checkpoint or error of step 12 belongs to the
  twelfth update of the weights.
"""

from __future__ import annotations

import itertools
import json
import math
import operator
import os
import random
import re
import reprlib
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import numpy as np
import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import send_to_device, set_seed
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import default_collate
from transformers import get_scheduler

from ftlib import runtime

Schedule = Literal["cosine", "linear", "constant"]
Metrics = Mapping[str, float | torch.Tensor]
LossFunction = Callable[[nn.Module, Any], torch.Tensor | tuple[torch.Tensor, Metrics]]

_MINIMA = {
    "steps": 1,
    "batch_size": 1,
    "learning_rate": 0.0,
    "warmup_steps": 0,
    "weight_decay": 0.0,
    "accumulate": 1,
    "checkpoint_every": 1,
    "seed": 0,
}
# The kinds of training in which every process holds the whole model.
_WHOLE_MODEL = (
    DistributedType.NO,
    DistributedType.MULTI_CPU,
    DistributedType.MULTI_GPU,
)
_OWN_COLUMNS = ("step", "learning_rate", "loss", "grad_norm")
_KEPT_CHECKPOINTS = 2
_PARTIAL = "partial"
# What Accelerate sets on a model it prepares, and what is taken off again.
_LENT_ATTRIBUTES = ("forward", "_original_forward", "_is_accelerate_prepared")


class Examples(Protocol):
    """A map-style sequence: a list, a ``range``, a torch or ``datasets`` data set."""

    def __len__(self) -> int:
        """Return the number of examples."""

    def __getitem__(self, index: int, /) -> Any:
        """Return one example."""


@dataclass(frozen=True)
class TrainingSettings:
    """The settings of one run.

    Attributes:
        steps: updates of the weights.
        batch_size: examples in a step, over all processes and chunks together.
        learning_rate: peak learning rate of the AdamW that :func:`train` builds.
        schedule: shape of the learning rate after the warm-up, from transformers.
        warmup_steps: steps over which the learning rate rises linearly from zero.
        weight_decay: decoupled weight decay of the AdamW that :func:`train` builds.
        max_grad_norm: norm to which the gradient is clipped; ``None`` never clips.
        accumulate: chunks a process works through one after the other in a step.
        shuffle: draw a new order each epoch; otherwise keep the data set's.
        checkpoint_every: steps between checkpoints. ``None`` keeps the last step only.
        seed: seed of the example order, and of nothing else.

    Raises:
        ValueError: a value is out of its range.
    """

    steps: int
    batch_size: int
    learning_rate: float
    schedule: Schedule = "cosine"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    max_grad_norm: float | None = 1.0
    accumulate: int = 1
    shuffle: bool = True
    checkpoint_every: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, minimum in _MINIMA.items():
            value = getattr(self, name)
            if value is not None and not value >= minimum:
                raise ValueError(f"{name} must be at least {minimum}, not {value}")
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise ValueError(
                f"max_grad_norm must be above 0, or None, not {self.max_grad_norm}"
            )
        if self.schedule not in get_args(Schedule):
            raise ValueError(
                f"unknown schedule {self.schedule!r}: choose one of "
                + ", ".join(get_args(Schedule))
            )


class History(list[dict[str, float]]):
    """The records of a run, one a step.

    Each holds ``step``, ``learning_rate``, ``loss``, ``grad_norm`` (before clipping)
    and the metrics of the loss function, averaged over chunks and processes.
    """

    def column(self, name: str) -> list[float]:
        """Return one quantity, step by step."""
        return [record[name] for record in self]


class CheckpointError(RuntimeError):
    """A checkpoint cannot be resumed from: damaged, or of another run."""


class NonFiniteLossError(ArithmeticError):
    """A loss or gradient was not finite; the step was not taken.

    Attributes:
        step: the step that failed.
        example_ids: positions in the data set of the examples of its batch.
        checkpoint: the last good checkpoint, if there is any.
    """

    def __init__(
        self,
        step: int,
        values: Mapping[str, float],
        example_ids: Sequence[int],
        checkpoint: Path | None,
    ) -> None:
        self.step = step
        self.example_ids = list(example_ids)
        self.checkpoint = checkpoint
        shown = reprlib.Repr()
        shown.maxlist = 64
        rescue = (
            f"the last good checkpoint is {checkpoint}"
            if checkpoint
            else "no checkpoint was written: pass `directory`, and `checkpoint_every` "
            "in the settings, to keep some"
        )
        super().__init__(
            f"step {step}: loss {values['loss']}, gradient norm {values['grad_norm']}; "
            f"the weights were left as after step {step - 1}. "
            f"Examples of the batch: {shown.repr(self.example_ids)}; {rescue}"
        )


def train(
    model: nn.Module,
    dataset: Examples,
    loss_fn: LossFunction,
    settings: TrainingSettings,
    *,
    collate: Callable[[list[Any]], Any] = default_collate,
    directory: Path | None = None,
    accelerator: Accelerator | None = None,
    optimizer: Optimizer | None = None,
    label: str = "training",
) -> History:
    """Train a model in place, resuming by itself where ``directory`` has checkpoints.

    A resumed run equals the uninterrupted one bit for bit as long as randomness comes
    from the global generators of torch, NumPy and Python: their states are kept, those
    of a caller's own generators are not.

    Args:
        model: the model; parameters with ``requires_grad`` are trained, dtypes stay.
        dataset: the examples. An epoch leaves out the last
            ``len(dataset) % batch_size`` of its order, so that no batch is ragged.
        loss_fn: takes the model (wrapped, under several processes) and a batch, returns
            the scalar mean loss over the batch's examples, alone or with a mapping of
            scalar metrics.
        settings: the settings.
        collate: makes a batch of a list of examples; its tensors are then moved to the
            device.
        directory: where checkpoints are kept (the newest two), on a disk that all
            processes share.
        accelerator: by default :func:`default_accelerator`.
        optimizer: an optimiser over parameters of ``model``, with its own learning
            rates and weight decay; only the schedule's shape is then the settings'. By
            default AdamW.
        label: what the progress bar calls the run.

    Returns:
        The history from step 1, including steps before a resumption.

    Raises:
        ValueError: settings, data set, model and processes do not fit together.
        CheckpointError: the newest checkpoint is damaged or belongs to another run.
        NonFiniteLossError: a loss or a gradient was not finite.
    """
    accelerator = accelerator or default_accelerator()
    _check_data(model, dataset, settings)
    _check_processes(settings, accelerator)
    _check_directory(directory, settings, accelerator)
    optimizer = optimizer or _adamw(model, settings)
    scheduler = _scheduler(optimizer, settings)
    run = _Run(model, optimizer, scheduler, settings, accelerator)
    store = _Store(directory, _identity(run, dataset)) if directory else None
    with _lent(run) as (prepared, stepper):
        _begin(run, store)
        with _bar(run, label) as bar:
            for ids in example_ids(len(dataset), settings, after=run.step):
                stepper.zero_grad()
                batches = _batches(run, dataset, collate, ids)
                values = _backward(run, prepared, loss_fn, batches)
                if not math.isfinite(values["loss"] + values["grad_norm"]):
                    newest = store.newest() if store else None
                    raise NonFiniteLossError(run.step + 1, values, ids, newest)
                stepper.step()
                run.record(values)
                if store and run.is_checkpoint_due:
                    store.save(run)
                bar.set_postfix(loss=f"{values['loss']:.4g}", refresh=False)
                bar.update()
    return run.history


def default_accelerator() -> Accelerator:
    """Return an Accelerator on :func:`ftlib.runtime.device`, in its precision.

    Where that precision is bf16, forward passes are autocast to it and the weights keep
    their dtype; on the CPU and on older GPUs nothing is cast.

    Raises:
        RuntimeError: this Python process already trains on another kind of device.
    """
    on = runtime.device()
    if on.type == "cuda" and on.index is not None:
        torch.cuda.set_device(on)
    bf16 = runtime.precision(on).dtype is torch.bfloat16
    accelerator = Accelerator(
        cpu=on.type == "cpu", mixed_precision="bf16" if bf16 else "no"
    )
    if accelerator.device.type != on.type:
        raise RuntimeError(
            f"training was asked for on {on} (FTLIB_DEVICE), but Accelerate is already "
            f"set up on {accelerator.device}: restart Python"
        )
    return accelerator


def example_ids(
    examples: int, settings: TrainingSettings, after: int = 0
) -> Iterator[list[int]]:
    """Yield the example ids of the global batch of every step.

    An epoch is a permutation drawn from ``(seed, epoch)``, cut into whole batches.

    Args:
        examples: length of the data set, at least ``settings.batch_size``.
        settings: gives steps, batch size, seed, and whether to shuffle.
        after: steps that are done already and left out.
    """
    size = settings.batch_size
    order: list[int] = []
    for step in range(after, settings.steps):
        epoch, batch = divmod(step, examples // size)
        if batch == 0 or not order:
            order = _epoch_order(examples, settings, epoch)
        yield order[batch * size : (batch + 1) * size]


def _epoch_order(examples: int, settings: TrainingSettings, epoch: int) -> list[int]:
    if not settings.shuffle:
        return list(range(examples))
    # A seed sequence keeps neighbouring seeds and epochs independent.
    generator = np.random.default_rng((settings.seed, epoch))
    return generator.permutation(examples).tolist()


def _check_data(
    model: nn.Module, dataset: Examples, settings: TrainingSettings
) -> None:
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("the model has no parameter with requires_grad to train")
    if len(dataset) < settings.batch_size:
        raise ValueError(
            f"the data set has {len(dataset)} examples, fewer than batch_size "
            f"{settings.batch_size}: take a smaller batch"
        )


def _check_processes(settings: TrainingSettings, accelerator: Accelerator) -> None:
    parts = accelerator.num_processes * settings.accumulate
    if settings.batch_size % parts:
        raise ValueError(
            f"batch_size {settings.batch_size} does not divide into {parts} equal "
            f"parts ({accelerator.num_processes} processes × accumulate "
            f"{settings.accumulate})"
        )
    if accelerator.gradient_accumulation_steps != 1:
        raise ValueError(
            "the accelerator would scale gradients a second time: leave its "
            "gradient_accumulation_steps at 1 and set `accumulate` in the settings"
        )


def _check_directory(
    directory: Path | None, settings: TrainingSettings, accelerator: Accelerator
) -> None:
    if directory is None:
        if settings.checkpoint_every is not None:
            raise ValueError(
                "checkpoint_every is set, but there is no directory to write to: "
                "pass `directory`"
            )
    elif accelerator.distributed_type not in _WHOLE_MODEL:
        raise ValueError(
            f"checkpoints hold whole weights, which {accelerator.distributed_type} "
            "spreads over processes: train without a directory"
        )


def _adamw(model: nn.Module, settings: TrainingSettings) -> Optimizer:
    return torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=settings.learning_rate,
        weight_decay=settings.weight_decay,
    )


def _scheduler(optimizer: Optimizer, settings: TrainingSettings) -> LRScheduler:
    # transformers' own "constant" would ignore the warm-up without a word.
    is_constant = settings.schedule == "constant"
    return get_scheduler(
        "constant_with_warmup" if is_constant else settings.schedule,
        optimizer,
        num_warmup_steps=settings.warmup_steps,
        num_training_steps=settings.steps,
    )


@dataclass
class _Run:
    """A run: what a step changes, and so what a checkpoint holds, and its terms."""

    model: nn.Module
    optimizer: Optimizer
    scheduler: LRScheduler
    settings: TrainingSettings
    accelerator: Accelerator
    history: History = field(default_factory=History)

    @property
    def step(self) -> int:
        """Steps taken."""
        return len(self.history)

    @property
    def is_checkpoint_due(self) -> bool:
        """Whether the step just taken ends the run or a stretch between checkpoints."""
        every = self.settings.checkpoint_every or self.settings.steps
        return self.step % every == 0 or self.step == self.settings.steps

    def record(self, values: Mapping[str, float]) -> None:
        """Note a step just taken, and move on to the next learning rate."""
        rate = float(self.scheduler.get_last_lr()[0])
        self.history.append({"step": self.step + 1, "learning_rate": rate, **values})
        self.scheduler.step()


@contextmanager
def _lent(run: _Run) -> Iterator[tuple[nn.Module, Optimizer]]:
    """Lend model and optimiser to the accelerator; give the model back as it came."""
    attributes = vars(run.model)
    was_training = run.model.training
    before = {n: attributes[n] for n in _LENT_ATTRIBUTES if n in attributes}
    try:
        yield run.accelerator.prepare(run.model.train(), run.optimizer)
    finally:
        run.model.train(was_training)
        for name in _LENT_ATTRIBUTES:
            attributes.pop(name, None)
        attributes.update(before)


def _begin(run: _Run, store: _Store | None) -> None:
    """Take up the newest checkpoint; without one, part the processes' random streams.

    Processes usually start from one seed, and would then draw the same samples.
    """
    if store and (newest := store.newest()):
        store.load(newest, run)
    elif run.accelerator.process_index > 0:
        set_seed(torch.initial_seed() % 2**32, device_specific=True)


def _bar(run: _Run, label: str) -> Any:
    """Return the progress bar; only the main process ever comes to draw its own."""
    delay = 0.0 if run.accelerator.is_main_process else math.inf
    steps = run.settings.steps
    return runtime.progress(total=steps, initial=run.step, desc=label, delay=delay)


def _batches(
    run: _Run,
    dataset: Examples,
    collate: Callable[[list[Any]], Any],
    ids: Sequence[int],
) -> Iterator[Any]:
    """Yield the chunks of this process's contiguous share of a global batch."""
    accumulate = run.settings.accumulate
    size = len(ids) // (run.accelerator.num_processes * accumulate)
    first = run.accelerator.process_index * accumulate
    for chunk in range(first, first + accumulate):
        examples = [dataset[i] for i in ids[chunk * size : (chunk + 1) * size]]
        yield send_to_device(collate(examples), run.accelerator.device)


def _backward(
    run: _Run, prepared: nn.Module, loss_fn: LossFunction, batches: Iterator[Any]
) -> dict[str, float]:
    """Leave the clipped gradient of the mean loss in the parameters.

    Returns:
        ``loss``, ``grad_norm`` and the metrics, over all chunks and processes. They
        leave the device together, in the step's one synchronisation.
    """
    names: list[str] = []
    rows: list[torch.Tensor] = []
    for chunk, batch in enumerate(batches, start=1):
        # Processes exchange gradients once a step, with the last chunk's.
        is_last = chunk == run.settings.accumulate
        with nullcontext() if is_last else run.accelerator.no_sync(prepared):
            loss, metrics = _evaluate(loss_fn, prepared, batch)
            run.accelerator.backward(loss / run.settings.accumulate)
        if rows and names != ["loss", *metrics]:
            raise ValueError(
                f"the loss function returned the metrics {', '.join(metrics)} after "
                f"{', '.join(names[1:])}: return the same ones for every batch"
            )
        names = ["loss", *metrics]
        rows.append(_row([loss, *metrics.values()]))
    means = run.accelerator.reduce(torch.stack(rows).mean(dim=0), "mean")
    # Clipping to an infinite norm multiplies by exactly 1.
    limit = run.settings.max_grad_norm or math.inf
    norm = run.accelerator.clip_grad_norm_(prepared.parameters(), limit)
    values = torch.cat([means, _row([norm])]).tolist()
    return dict(zip([*names, "grad_norm"], values, strict=True))


def _evaluate(
    loss_fn: LossFunction, model: nn.Module, batch: Any
) -> tuple[torch.Tensor, Metrics]:
    """Return loss and metrics in one shape, whichever the loss function chose."""
    result = loss_fn(model, batch)
    loss, metrics = result if isinstance(result, tuple) else (result, {})
    if loss.ndim:
        raise ValueError(
            f"the loss function returned a loss of shape {tuple(loss.shape)}: return "
            "the mean over the batch's examples, a scalar"
        )
    if taken := metrics.keys() & set(_OWN_COLUMNS):
        raise ValueError(
            f"metrics named {', '.join(sorted(taken))}: the history has a column of "
            "that name already, choose another"
        )
    return loss, metrics


def _row(values: Sequence[float | torch.Tensor]) -> torch.Tensor:
    """Stack scalars as float64 without waiting for the device."""
    device = next(v.device for v in values if isinstance(v, torch.Tensor))
    return torch.stack(
        [
            value.detach().double()
            if isinstance(value, torch.Tensor)
            else torch.full((), value, dtype=torch.float64, device=device)
            for value in values
        ]
    )


def _identity(run: _Run, dataset: Examples) -> dict[str, Any]:
    """Return what must not differ between a checkpoint and the run that resumes it."""
    identity = asdict(run.settings)
    del identity["checkpoint_every"]  # changes what is kept, not what is computed
    processes = run.accelerator.num_processes
    return identity | {"examples": len(dataset), "processes": processes}


@dataclass
class _Store:
    """The checkpoints of a run: ``step-000123/`` of safetensors and JSON files.

    Each is written under another name and renamed when whole, so a directory of that
    name is complete. Nothing is pickled.
    """

    directory: Path
    identity: dict[str, Any]

    def newest(self) -> Path | None:
        """Return the newest checkpoint."""
        return next(reversed(self._all()), None)

    def _all(self) -> list[Path]:
        """Return the checkpoints, oldest first."""
        found = {
            int(match[1]): path
            for path in self.directory.glob("step-*")
            if (match := re.fullmatch(r"step-(\d+)", path.name))
        }
        return [found[step] for step in sorted(found)]

    def save(self, run: _Run) -> None:
        """Write a checkpoint and drop all but the newest ones."""
        main = run.accelerator.is_main_process
        partial = self.directory / _PARTIAL
        if main:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        run.accelerator.wait_for_everyone()
        _write_json(_rng_path(partial, run), _rng_state(run.accelerator.device))
        if main:
            self._write(partial, run)
        run.accelerator.wait_for_everyone()
        if main:
            _flush(partial)
            partial.rename(self.directory / f"step-{run.step:06d}")
            self._prune()
        run.accelerator.wait_for_everyone()

    def _write(self, path: Path, run: _Run) -> None:
        tensors, scalars = _flatten(run.optimizer.state_dict())
        save_file(_copies(_live_tensors(run.model)), path / "model.safetensors")
        save_file(_copies(tensors), path / "optimizer.safetensors")
        _write_json(
            path / "training.json",
            {
                "identity": self.identity,
                "optimizer": scalars,
                "scheduler": run.scheduler.state_dict(),
                "history": run.history,
            },
        )

    def _prune(self) -> None:
        partial = self.directory / _PARTIAL
        for path in self._all()[:-_KEPT_CHECKPOINTS]:
            path.rename(partial)  # half of a checkpoint must not look like a whole one
            shutil.rmtree(partial)

    def load(self, path: Path, run: _Run) -> None:
        """Bring a run to the state that a checkpoint holds.

        Raises:
            CheckpointError: the checkpoint is damaged or belongs to another run.
        """
        try:
            training = json.loads((path / "training.json").read_text())
            self._compare(path, training["identity"])
            _load_model(run.model, load_file(path / "model.safetensors"))
            # Copies, since the file they are mapped from will be pruned.
            tensors = _copies(load_file(path / "optimizer.safetensors"))
            run.optimizer.load_state_dict(_unflatten(tensors, training["optimizer"]))
            run.scheduler.load_state_dict(training["scheduler"])
            run.history.extend(training["history"])
            rng = json.loads(_rng_path(path, run).read_text())
            _set_rng_state(rng, run.accelerator.device)
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            raise CheckpointError(
                f"{path} cannot be resumed from ({type(error).__name__}: {error}). "
                "Delete it to fall back on the checkpoint before it, or train in "
                "another directory"
            ) from error

    def _compare(self, path: Path, saved: dict[str, Any]) -> None:
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
    shapes = {name: tensor.shape for name, tensor in live.items()}
    found = {name: tensor.shape for name, tensor in saved.items()}
    if wrong := sorted(
        name for name in shapes.keys() | found if shapes.get(name) != found.get(name)
    ):
        raise ValueError(
            f"{len(wrong)} tensors differ in name or shape from the model's, the first "
            f"being {wrong[0]}"
        )
    with torch.no_grad():
        for name, tensor in live.items():
            tensor.copy_(saved[name])


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
    tensors: Mapping[str, torch.Tensor], scalars: Mapping[str, Any]
) -> dict[str, Any]:
    """Undo :func:`_flatten`."""
    state: dict[int, dict[str, Any]] = defaultdict(dict)
    for key, value in itertools.chain(tensors.items(), scalars["state"].items()):
        parameter, name = key.split(".", maxsplit=1)
        state[int(parameter)][name] = value
    return {"state": dict(state), "param_groups": scalars["param_groups"]}


def _rng_path(directory: Path, run: _Run) -> Path:
    return directory / f"rng-{run.accelerator.process_index}.json"


def _rng_state(device: torch.device) -> dict[str, Any]:
    """Return the states of the global generators, as JSON holds them."""
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(legacy=False),  # noqa: NPY002  # libraries' own
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _set_rng_state(state: Mapping[str, Any], device: torch.device) -> None:
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


def _flush(directory: Path) -> None:
    """Force a directory's files to the disk, so that a power cut cannot empty them."""
    for path in directory.iterdir():
        with path.open("rb+") as file:
            os.fsync(file.fileno())
