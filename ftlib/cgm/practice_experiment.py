"""What a practitioner has to choose, tried on the strings of helix and strand.

``practice-aim``: ways to meet the target without a small λ, on one budget of samples.
``practice-noise``: the noise of every estimate of the gradient on a frozen model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from ftlib import runtime
from ftlib.cgm import objective
from ftlib.cgm.calibrate import calibrate
from ftlib.cgm.dual import InfeasibleTargetError, RedundantConstraintError, solve_dual
from ftlib.cgm.noise import Coefficients, gradient_noise
from ftlib.cgm.settings import (
    PRACTICE,
    STRINGS,
    CalibrationSettings,
    PracticeSettings,
    StringSettings,
)
from ftlib.cgm.stages import augmented_lagrangian
from ftlib.cgm.strings import Paths
from ftlib.cgm.strings_experiment import (
    MEASURED,
    Parts,
    Problem,
    evaluate,
    pose,
    relax,
    theory,
)
from ftlib.experiments import Arm
from ftlib.results import Metric
from ftlib.runtime import Scale

Metrics = dict[str, Metric | float]
Way = Callable[[Problem, CalibrationSettings], None]


def arms(scale: Scale) -> list[Arm]:
    """Return the arms at a scale."""
    world, practice = STRINGS[scale], PRACTICE[scale]
    return [*aim_arms(world, practice), *noise_arms(world, practice)]


# -- ways to meet the target -----------------------------------------------------------


def aim_arms(world: StringSettings, practice: PracticeSettings) -> list[Arm]:
    """Relax with a large and a small λ, and the large one aiming past the target."""
    large, small = practice.shortfalls
    ways: dict[str, tuple[float, Way]] = {
        "large λ": (large, plain_relax),
        "small λ": (small, plain_relax),
        "augmented Lagrangian": (large, partial(in_rounds, practice)),
        "pilot aim": (large, partial(pilot_aim, world)),
    }
    settings = {**dataclasses.asdict(world), **dataclasses.asdict(practice)}
    return [
        Arm(
            "practice-aim",
            name,
            {**settings, "arm": name, "shortfall": shortfall},
            partial(_run_way, world, practice, shortfall, way),
        )
        for name, (shortfall, way) in ways.items()
    ]


def plain_relax(problem: Problem, settings: CalibrationSettings) -> None:
    """CGM-relax, which falls short by λα/2."""
    calibrate(problem.model, problem.h, problem.target, settings)


def in_rounds(
    practice: PracticeSettings, problem: Problem, settings: CalibrationSettings
) -> None:
    """The augmented Lagrangian; what it draws between its rounds it saves in steps."""
    drawn = (practice.rounds - 1) * practice.round_samples
    augmented_lagrangian(
        problem.model,
        problem.h,
        problem.target,
        _saving(drawn, settings),
        rounds=practice.rounds,
        samples=practice.round_samples,
    )


def pilot_aim(
    world: StringSettings, problem: Problem, settings: CalibrationSettings
) -> None:
    """Relax towards h* + λα̂/2 from the start, with α̂ from a pilot sample (ours).

    The pilot sample is saved in steps.

    Raises:
        InfeasibleTargetError, RedundantConstraintError: see ``solve_dual``.
    """
    assert settings.kl_weight is not None
    pilot = problem.h(problem.base.sample(world.dual_samples))
    alpha = torch.from_numpy(solve_dual(pilot, problem.target).alpha)
    aim = problem.target + settings.kl_weight / 2 * alpha.to(problem.target)
    plain_relax(
        dataclasses.replace(problem, target=aim), _saving(world.dual_samples, settings)
    )


def _saving(samples: int, settings: CalibrationSettings) -> CalibrationSettings:
    """Take off as many steps as draw so many samples."""
    training = settings.training
    steps = training.steps - samples // training.batch_size
    return dataclasses.replace(
        settings, training=dataclasses.replace(training, steps=steps)
    )


def _run_way(
    world: StringSettings,
    practice: PracticeSettings,
    shortfall: float,
    way: Way,
    seed: int,
) -> Metrics:
    problem = pose(world, seed, practice.aim_grid)
    asked = dataclasses.replace(world, shortfall=shortfall)
    settings = relax(asked, problem, world.batch_size)
    assert settings.kl_weight is not None
    expected = theory(world, seed, problem, settings.kl_weight)
    try:
        way(problem, settings)
    except (InfeasibleTargetError, RedundantConstraintError):
        return {"feasible": 0.0, **expected, **dict.fromkeys(MEASURED, float("nan"))}
    return {"feasible": 1.0, **expected, **evaluate(problem, world, seed)}


# -- noise of the gradient -------------------------------------------------------------


def noise_arms(world: StringSettings, practice: PracticeSettings) -> list[Arm]:
    """One arm for each grid of constraints; its metrics hold every estimate."""
    settings = {**dataclasses.asdict(world), **dataclasses.asdict(practice)}
    return [
        Arm(
            "practice-noise",
            f"d={p * q - 1}",
            {**settings, "constraints": p * q - 1},
            partial(_run_noise, world, practice, (p, q)),
        )
        for p, q in practice.noise_grids
    ]


def _run_noise(
    world: StringSettings, practice: PracticeSettings, parts: Parts, seed: int
) -> Metrics:
    """Freeze the model half-way through a relax training, and measure there.

    At the base the log-ratio is zero and no estimate of the KL has any noise.
    """
    problem = pose(world, seed, parts)
    settings = relax(world, problem, world.batch_size)
    assert settings.kl_weight is not None
    half = dataclasses.replace(settings.training, steps=settings.training.steps // 2)
    plain_relax(problem, dataclasses.replace(settings, training=half))
    pilot = problem.h(problem.base.sample(world.dual_samples))
    tilt = solve_dual(pilot, problem.target, kl_weight=settings.kl_weight)
    alpha = torch.from_numpy(tilt.alpha).float().to(runtime.device())
    found = gradient_noise(
        problem.model,
        {
            **relax_estimates(problem, settings.kl_weight),
            **reward_estimates(problem, alpha, tilt.log_z),
        },
        batch_size=world.batch_size,
        batches=practice.noise_batches,
    )
    return {
        f"{quantity}/{name}": Metric(getattr(noise, quantity), practice.noise_batches)
        for name, noise in found.items()
        for quantity in ("signal", "noise")
    }


def relax_estimates(problem: Problem, kl_weight: float) -> Mapping[str, Coefficients]:
    """Coefficients of CGM-relax with fewer and more baselines.

    ``relax, none``: no baseline; ``relax, KL``: on the KL, as in the paper's code;
    ``relax, both``: on the violation too.
    """
    target = problem.target.to(runtime.device())

    def none(paths: Paths, log_prob: Tensor) -> Tensor:
        log_ratio = _log_ratio(problem, paths, log_prob)
        constraint = objective.violation_coefficients(problem.h(paths), target)
        return constraint + kl_weight * log_ratio / len(log_ratio)

    def with_baselines(violation: bool, paths: Paths, log_prob: Tensor) -> Tensor:
        log_ratio = _log_ratio(problem, paths, log_prob)
        constraint = objective.violation_coefficients(
            problem.h(paths), target, baseline=violation
        )
        return constraint + kl_weight * objective.kl_coefficients(log_ratio)

    return {
        "relax, none": none,
        "relax, KL": partial(with_baselines, False),
        "relax, both": partial(with_baselines, True),
    }


def reward_estimates(
    problem: Problem, alpha: Tensor, log_z: float
) -> Mapping[str, Coefficients]:
    """Coefficients of CGM-reward without and with its baseline."""

    def to_tilt(paths: Paths, log_prob: Tensor) -> Tensor:
        return _log_ratio(problem, paths, log_prob) - problem.h(paths) @ alpha + log_z

    return {
        "reward, none": lambda paths, log_prob: (
            to_tilt(paths, log_prob) / len(log_prob)
        ),
        "reward, own": lambda paths, log_prob: objective.kl_coefficients(
            to_tilt(paths, log_prob)
        ),
    }


@torch.no_grad()
def _log_ratio(problem: Problem, paths: Paths, log_prob: Tensor) -> Tensor:
    return log_prob - problem.base.log_prob(paths)
