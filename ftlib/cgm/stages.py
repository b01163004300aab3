r"""Calibrations that move their target: annealing, and the augmented Lagrangian.

The augmented Lagrangian of min KL(p_θ‖p_base) subject to E[h] = h*, with multipliers μ
and penalty 1/λ, is

    KL − μ·(E[h] − h*) + ‖E[h] − h*‖²/λ.

Complete the square: times λ it is ‖E[h] − t‖² + λ KL with t = h* + λμ/2, up to a
constant. That is CGM-relax with a *shifted target*, and the textbook's step
μ ← μ + (2/λ)(h* − E[h]) is t ← t + (h* − E[h]): aim past the target by as much as the
last round fell short. (The idea is a reviewer's of the paper; this form is ours.)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from ftlib.cgm.calibrate import (
    Calibration,
    Generative,
    Statistic,
    calibrate,
    frozen_copy,
    statistics,
)
from ftlib.cgm.settings import CalibrationSettings


def calibrate_in_stages(
    model: Generative,
    stages: Sequence[tuple[Statistic, Tensor]],
    settings: CalibrationSettings,
    *,
    directory: Path | None = None,
) -> list[Calibration]:
    """Calibrate towards one (h, target) after the other, close to the first model.

    Args:
        model: calibrated in place.
        stages: h and target of each stage.
        settings: its steps are shared out equally among the stages, each with the
            whole schedule of the learning rate.
        directory: see :func:`~ftlib.cgm.calibrate.calibrate`.

    Returns:
        What came of each stage.

    Raises:
        ValueError: fewer steps than stages.
    """
    base = frozen_copy(model)
    parts = _shared_out(settings, len(stages))
    return [
        calibrate(
            model,
            h,
            target,
            part,
            base=base,
            directory=_stage_directory(directory, number),
        )
        for number, ((h, target), part) in enumerate(zip(stages, parts, strict=True))
    ]


def augmented_lagrangian(
    model: Generative,
    h: Statistic,
    target: Tensor,
    settings: CalibrationSettings,
    *,
    rounds: int,
    samples: int,
    directory: Path | None = None,
) -> list[Tensor]:
    """Calibrate by CGM-relax in rounds, each aiming past the target by the last's miss.

    Args:
        model: calibrated in place.
        h: maps n samples to float [n, d].
        target: float [d].
        settings: of CGM-relax; its steps are shared out equally among the rounds.
        rounds: number of rounds; 1 is CGM-relax.
        samples: drawn after each round but the last, to see how far it fell short.
        directory: see :func:`~ftlib.cgm.calibrate.calibrate`.

    Returns:
        The target [d] that each round aimed at. 2/λ times its distance from
        ``target`` are the multipliers.

    Raises:
        ValueError: fewer steps than rounds, or settings of another loss.
    """
    if settings.loss != "relax":
        raise ValueError(f"the augmented Lagrangian is of relax, not {settings.loss}")
    base, aims = frozen_copy(model), [target]
    for number, part in enumerate(_shared_out(settings, rounds)):
        if number:
            mean = statistics(h, model.sample(samples), len(target)).mean(0)
            aims.append(aims[-1] + target - mean.to(target.device))
        where = _stage_directory(directory, number)
        calibrate(model, h, aims[-1], part, base=base, directory=where)
    return aims


def _shared_out(settings: CalibrationSettings, parts: int) -> list[CalibrationSettings]:
    """Share the steps out equally; scores are checked before the first part only."""
    steps = settings.training.steps // parts
    if steps == 0:
        raise ValueError(
            f"{settings.training.steps} steps cannot be shared out among {parts} stages"
        )
    training = dataclasses.replace(settings.training, steps=steps)
    first = dataclasses.replace(settings, training=training)
    return [first, *[dataclasses.replace(first, check_samples=0)] * (parts - 1)]


def _stage_directory(directory: Path | None, number: int) -> Path | None:
    return directory / f"stage-{number}" if directory else None
