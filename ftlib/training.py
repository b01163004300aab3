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

import math
import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import numpy as np
import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import send_to_device, set_seed
from numpy.typing import NDArray
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import default_collate
from transformers import get_scheduler

from ftlib import runtime
from ftlib.checkpoints import Checkpoints, TrainingState

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

    @classmethod
    def fine_tuning(
        cls,
        steps: int,
        batch_size: int,
        learning_rate: float,
        seed: int,
        schedule: Schedule = "cosine",
    ) -> TrainingSettings:
        """Return settings whose warm-up takes a tenth of the steps."""
        return cls(
            steps,
            batch_size,
            learning_rate,
            schedule,
            warmup_steps=steps // 10,
            seed=seed,
        )


class History(list[dict[str, float]]):
    """The records of a run, one a step.

    Each holds ``step``, ``learning_rate``, ``loss``, ``grad_norm`` (before clipping)
    and the metrics of the loss function, averaged over chunks and processes.
    """

    def column(self, name: str) -> list[float]:
        """Return one quantity, step by step."""
        return [record[name] for record in self]


class Learner(nn.Module):
    """A model together with its loss, for :func:`train`.

    What Accelerate wraps, for several processes or for mixed precision, has to contain
    the loss where the loss calls the model's parts one by one.

    Args:
        model: the model, whose weights are trained.
        loss: takes the model and, by name, what a collator's batch holds.

    Attributes:
        model: the model.
    """

    def __init__(self, model: nn.Module, loss: Callable[..., Any]) -> None:
        super().__init__()
        self.model = model
        self._loss = loss

    def forward(self, **batch: Any) -> Any:
        """Return the loss of a batch."""
        return self._loss(self.model, **batch)


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
        ftlib.checkpoints.CheckpointError: the newest checkpoint is damaged or belongs
            to another run.
        NonFiniteLossError: a loss or a gradient was not finite.
    """
    accelerator = accelerator or default_accelerator()
    _check_data(model, dataset, settings)
    _check_processes(settings, accelerator)
    _check_directory(directory, settings, accelerator)
    optimizer = optimizer or _adamw(model, settings)
    scheduler = _scheduler(optimizer, settings)
    run = _Run(model, optimizer, scheduler, History(), settings, accelerator)
    checkpoints = _checkpoints(directory, run, dataset)
    with _lent(run) as (prepared, stepper), _telling_where(run, checkpoints):
        _begin(run, checkpoints)
        with _bar(run, label) as bar:
            for ids in example_ids(len(dataset), settings, after=run.step):
                stepper.zero_grad()
                batches = _batches(run, dataset, collate, ids)
                values = _backward(run, prepared, loss_fn, batches)
                if not math.isfinite(values["loss"] + values["grad_norm"]):
                    newest = checkpoints.newest() if checkpoints else None
                    raise NonFiniteLossError(run.step + 1, values, ids, newest)
                stepper.step()
                run.record(values)
                if checkpoints and run.is_checkpoint_due:
                    checkpoints.save(run)
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
    order = np.empty(0, dtype=np.int64)
    for step in range(after, settings.steps):
        epoch, batch = divmod(step, examples // size)
        if batch == 0 or not order.size:
            order = _epoch_order(examples, settings, epoch)
        yield order[batch * size : (batch + 1) * size].tolist()


def _epoch_order(
    examples: int, settings: TrainingSettings, epoch: int
) -> NDArray[np.int64]:
    """Return the order of an epoch: 8 bytes an example, a fifth of a list's."""
    if not settings.shuffle:
        return np.arange(examples)
    # A seed sequence keeps neighbouring seeds and epochs independent.
    generator = np.random.default_rng((settings.seed, epoch))
    return generator.permutation(examples)


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
class _Run(TrainingState):
    """A run: what its steps change, and its terms."""

    history: History
    settings: TrainingSettings
    accelerator: Accelerator

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


def _checkpoints(
    directory: Path | None, run: _Run, dataset: Examples
) -> Checkpoints | None:
    """Return the checkpoints of a run, if it has a directory for them."""
    if directory is None:
        return None
    identity = asdict(run.settings)
    del identity["checkpoint_every"]  # changes what is kept, not what is computed
    identity["examples"] = len(dataset)
    identity["processes"] = run.accelerator.num_processes
    return Checkpoints(directory, identity, run.accelerator)


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


def _begin(run: _Run, checkpoints: Checkpoints | None) -> None:
    """Take up the newest checkpoint; without one, part the processes' random streams.

    Processes usually start from one seed, and would then draw the same samples.
    """
    if checkpoints and (newest := checkpoints.newest()):
        checkpoints.load(newest, run)
    elif run.accelerator.process_index > 0:
        set_seed(torch.initial_seed() % 2**32, device_specific=True)


@contextmanager
def _telling_where(run: _Run, checkpoints: Checkpoints | None) -> Iterator[None]:
    """Add to a stop from the keyboard from where the run can go on."""
    try:
        yield
    except KeyboardInterrupt as stop:
        newest = checkpoints.newest() if checkpoints else None
        stop.add_note(
            f"stopped after step {run.step}: the same call goes on from {newest}"
            if newest
            else f"stopped after step {run.step}: no checkpoint was written, pass "
            "`directory`, and `checkpoint_every` in the settings, to keep some"
        )
        raise


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
    if isinstance(norm, DTensor):  # FSDP2 leaves a part of it in every process
        norm = norm.full_tensor()
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
