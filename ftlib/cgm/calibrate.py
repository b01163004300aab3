"""Calibrate a model: the loop around the equations of ``objective.py``."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ftlib import runtime
from ftlib.cgm import objective
from ftlib.cgm.dual import Tilt, solve_dual
from ftlib.cgm.settings import CalibrationSettings
from ftlib.training import History, train

# Samples are whatever the model says they are; they must have a length and slices.
Samples = Any
Statistic = Callable[[Samples], Tensor]


@runtime_checkable
class Generative(Protocol):
    """What a ``torch.nn.Module`` must offer to be calibrated."""

    def sample(self, n: int, /) -> Samples:
        """Draw n exact samples: a tensor, or anything with ``len`` and slices."""

    def log_prob(self, samples: Samples, /) -> Tensor:
        """Log-probability [n] of samples, differentiable in the parameters."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """The parameters, as every module has them."""

    def to(self, device: torch.device, /) -> Any:
        """Move the parameters, as every module does."""


Model = TypeVar("Model", bound=Generative)


@dataclass(frozen=True)
class Calibration:
    """What came of a calibration.

    Attributes:
        base: the frozen model the calibration started from.
        history: loss, violation and KL at every step.
        tilt: the solved dual, for the losses that use one.
    """

    base: Generative
    history: History
    tilt: Tilt | None


class StatisticError(ValueError):
    """h returned something that is not a finite [n, d] tensor."""


class InconsistentModelError(ValueError):
    """log_prob does not belong to the distribution that sample draws from."""


def calibrate(
    model: Generative,
    h: Statistic,
    target: Tensor,
    settings: CalibrationSettings,
    *,
    base: Generative | None = None,
    strata: Callable[[Samples], Tensor] | None = None,
    directory: Path | None = None,
) -> Calibration:
    """Fine-tune a model in place until E[h] is the target.

    Args:
        model: a module with ``sample`` and ``log_prob`` (:class:`Generative`); it is
            moved to :func:`ftlib.runtime.device`.
        h: maps n samples to their statistics, float [n, d].
        target: float [d].
        settings: which loss, its weight, and how to train.
        base: the model to stay close to; by default the model as it is now.
        strata: maps samples to the prompt each answers, integer [n], where ``sample``
            deals prompts out in fixed numbers.
        directory: where to keep checkpoints, and the tilt if one is solved; a second
            call, with the model as it was at first, resumes from them.

    Returns:
        The base model, the history and, where one was solved, the dual.

    Raises:
        TypeError: the model does not offer the two methods.
        StatisticError: h returned the wrong shape or a value that is not finite.
        InconsistentModelError: log_prob contradicts sample.
        InfeasibleTargetError, RedundantConstraintError: see ``solve_dual``.
    """
    _require_generative(model)
    base = frozen_copy(model if base is None else base)
    for module in (model, base):
        module.to(runtime.device())
    target = target.to(runtime.device())
    if settings.check_samples:
        check_scores(model, settings.check_samples, chunk=settings.score_chunk)
    tilt = _tilt(base, h, target, settings, directory)
    loss = OnPolicyLoss(model, base, h, target, settings, tilt, strata)
    history = train(
        Scorer(model, settings.score_chunk),
        range(settings.training.batch_size),
        loss,
        settings.training,
        directory=directory,
        label=settings.loss,
    )
    return Calibration(base, history, tilt)


def _tilt(
    base: Generative,
    h: Statistic,
    target: Tensor,
    settings: CalibrationSettings,
    directory: Path | None,
) -> Tilt | None:
    """Solve the dual where the loss needs one; a run that is resumed keeps its tilt."""
    if settings.dual_samples is None:
        return None
    kept = directory / "tilt.json" if directory else None
    if kept and kept.exists():
        return Tilt.from_json(kept.read_text())
    h_base = statistics(h, base.sample(settings.dual_samples))
    tilt = solve_dual(h_base, target, kl_weight=settings.dual_ridge)
    if kept:
        kept.parent.mkdir(parents=True, exist_ok=True)
        partial = kept.with_name(f"tilt-{os.getpid()}.partial")
        partial.write_text(tilt.to_json())
        partial.replace(kept)
    return tilt


class OnPolicyLoss:
    """A loss on fresh samples of the model itself, for ``ftlib.training.train``."""

    def __init__(
        self,
        model: Generative,
        base: Generative,
        h: Statistic,
        target: Tensor,
        settings: CalibrationSettings,
        tilt: Tilt | None,
        strata: Callable[[Samples], Tensor] | None,
    ) -> None:
        self.model, self.base, self.h, self.target = model, base, h, target
        self.settings, self.tilt, self.strata = settings, tilt, strata
        self.score_base = Scorer(base, settings.score_chunk)

    def __call__(
        self, scorer: nn.Module, batch: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Draw as many samples as the batch has rows, and return loss and metrics."""
        with torch.no_grad():
            samples = self.model.sample(len(batch))
            h = statistics(self.h, samples, len(self.target))
            log_base = self.score_base(samples)
        strata = self.strata(samples) if self.strata else None
        log_prob = scorer(samples)
        metrics = {
            "violation": objective.violation(h, self.target, strata),
            "kl": (log_prob - log_base).detach().mean(),
        }
        return self._loss(log_prob, log_base, h, strata), metrics

    def _loss(
        self, log_prob: Tensor, log_base: Tensor, h: Tensor, strata: Tensor | None
    ) -> Tensor:
        if self.tilt is None:
            assert self.settings.kl_weight is not None
            return objective.relax_loss(
                log_prob,
                log_base,
                h,
                self.target,
                self.settings.kl_weight,
                strata,
                violation_baseline=self.settings.violation_baseline,
            )
        towards = {
            "reward": objective.reward_loss,
            "forward_kl": objective.forward_kl_loss,
        }[self.settings.loss]
        alpha = torch.as_tensor(self.tilt.alpha, dtype=h.dtype, device=h.device)
        return towards(log_prob, log_base, h, alpha, self.tilt.log_z)


class Scorer(nn.Module):
    """``log_prob`` as a forward pass, in chunks, so that memory is one chunk's.

    Each chunk is scored without keeping its activations and scored again in the
    backward pass. That costs what scoring once for the value and once for the
    gradient would.

    Args:
        model: a :class:`Generative` module.
        chunk: samples scored at a time; all of them if None.
    """

    def __init__(self, model: Generative, chunk: int | None = None) -> None:
        super().__init__()
        self.model: Any = model
        self.chunk = chunk

    def forward(self, samples: Samples) -> Tensor:
        """Log-probability [n] of the samples, in the precision of the weights."""
        # A log-ratio is a small difference of large numbers, and model and base must
        # be scored alike: no autocasting by whoever trains this module.
        device = next(self.parameters()).device.type
        with torch.autocast(device, enabled=False):
            if self.chunk is None or len(samples) <= self.chunk:
                return self.model.log_prob(samples)
            return torch.cat(
                [
                    checkpoint(self.model.log_prob, part, use_reentrant=False)
                    for part in chunks(samples, self.chunk)
                ]
            )

    def train(self, mode: bool = True) -> Scorer:
        """Stay in evaluation mode: dropout would score another model than sampled."""
        return super().train(False)


def chunks(samples: Samples, size: int) -> Iterator[Samples]:
    """Slice samples into pieces of at most ``size``."""
    for start in range(0, len(samples), size):
        yield samples[start : start + size]


def frozen_copy(model: Model) -> Model:
    """Copy a model, in evaluation mode and without gradients.

    Raises:
        TypeError: it lacks ``sample`` or ``log_prob``, or is no ``nn.Module``.
    """
    _require_generative(model)
    # A generative module, then: both halves of what Generative cannot say at once.
    frozen: Any = copy.deepcopy(model)
    return cast(Model, frozen.requires_grad_(False).eval())


def _require_generative(model: object) -> None:
    if not (isinstance(model, nn.Module) and isinstance(model, Generative)):
        raise TypeError(
            f"{type(model).__name__} cannot be calibrated: it must be a "
            "torch.nn.Module with the methods sample(n) and log_prob(samples)"
        )


def statistics(
    h: Statistic, samples: Samples, constraints: int | None = None
) -> Tensor:
    """Evaluate h and check it: float [n, d], finite.

    Raises:
        StatisticError: it is not; the message says where.
    """
    values = h(samples)
    expected = f"[{len(samples)}, {constraints or 'd'}]"
    if not isinstance(values, Tensor) or not values.is_floating_point():
        kind = getattr(values, "dtype", type(values).__name__)
        raise StatisticError(f"h must return a float tensor {expected}, not {kind}")
    if (
        values.ndim != 2
        or len(values) != len(samples)
        or constraints not in (None, values.shape[1])
    ):
        raise StatisticError(
            f"h must return shape {expected}, but it returned {list(values.shape)}"
        )
    if not values.isfinite().all():
        row, column = (~values.isfinite()).nonzero()[0].tolist()
        raise StatisticError(
            f"h returned {values[row, column].item()} for sample {row} of "
            f"{len(samples)}, constraint {column}: {samples[row]!r:.200}"
        )
    return values


def check_scores(
    model: Generative, n: int, *, chunk: int | None = None, threshold: float = 4.5
) -> float:
    """Test whether ``log_prob`` belongs to the distribution that ``sample`` draws.

    For samples of p_θ and any other parameters θ', the ratio p_θ'(x)/p_θ(x) has mean
    one: exactly, whatever the model (ours). The parameters are moved a little, along
    themselves and along the mean score of one half of the samples, which is where a
    contradiction would show most; on the other half the mean ratio is held against its
    standard error. Top-k sampling, a temperature, a forgotten end token, a mean over
    tokens, or samples of an older model show; a constant factor on log_prob does not.

    Args:
        model: a :class:`Generative` module; its parameters are put back exactly.
        n: samples to draw, at least 32.
        chunk: samples scored at a time; all of them if None.
        threshold: largest z-score allowed.

    Returns:
        The largest z-score seen.

    Raises:
        InconsistentModelError: it exceeds the threshold, or log_prob is not [n].
        ValueError: fewer than 32 samples, too few to judge by.
    """
    if n < 32:
        raise ValueError(f"{n} samples are too few to check the scores by: use 32 up")
    samples = model.sample(n)
    first, second = samples[: n // 2], samples[n // 2 :]
    parameters = [p for p in model.parameters() if p.requires_grad]
    scorer = Scorer(model, chunk)
    score = scorer(first)
    if score.shape != (n // 2,) or not score.isfinite().all():
        raise InconsistentModelError(
            f"log_prob must return {n // 2} finite numbers for as many samples; it "
            f"returned shape {list(score.shape)}, {int((~score.isfinite()).sum())} of "
            "them not finite"
        )
    gradient = torch.autograd.grad(score.mean(), parameters, materialize_grads=True)
    worst = max(
        abs(_ratio_z_score(scorer, parameters, direction, second))
        for direction in (list(gradient), [p.detach().clone() for p in parameters])
    )
    if not worst <= threshold:
        raise InconsistentModelError(
            f"log_prob contradicts sample (z = {worst:.1f} over {n} samples): is "
            "anything but temperature 1 without top-k or top-p sampled, a token left "
            "out of the sum, or dropout on?"
        )
    return worst


@torch.no_grad()
def _ratio_z_score(
    scorer: Scorer,
    parameters: list[nn.Parameter],
    direction: list[Tensor],
    samples: Samples,
) -> float:
    """z-score of mean(p_θ'(x)/p_θ(x)) − 1 along a direction.

    The step is shortened until the log-ratio's standard deviation is 0.05 at most:
    longer ones make the ratio skewed, and a z-score of it misleading.
    """
    before: Tensor = scorer(samples).double()
    size = float(_norm(parameters) / _norm(direction).clamp(min=1e-30)) / 100
    log_ratio = _moved_log_prob(scorer, parameters, direction, size, samples) - before
    spread = float(log_ratio.std())
    if spread > 0.05:
        size *= 0.05 / spread
        log_ratio = (
            _moved_log_prob(scorer, parameters, direction, size, samples) - before
        )
    ratio = log_ratio.exp()
    error = ratio.std() / len(ratio) ** 0.5
    return float((ratio.mean() - 1) / error) if error > 0 else 0.0


def _moved_log_prob(
    scorer: Scorer,
    parameters: list[nn.Parameter],
    direction: list[Tensor],
    size: float,
    samples: Samples,
) -> Tensor:
    """Score with the parameters moved, and put them back exactly, float64 [n]."""
    saved = [p.clone() for p in parameters]
    try:
        for p, change in zip(parameters, direction, strict=True):
            p.add_(size * change)
        moved: Tensor = scorer(samples).double()
        return moved
    finally:
        for p, value in zip(parameters, saved, strict=True):
            p.copy_(value)


def _norm(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([t.detach().float().norm() for t in tensors]).norm()
