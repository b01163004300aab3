"""What a practitioner has to choose, tried on the strings of helix and strand.

``practice-aim``: ways to meet the target without a small λ, on one budget of samples.
``practice-noise``: the noise of every estimate of the gradient on a frozen model.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import torch
from torch import Tensor

from ftlib import runtime
from ftlib.cgm import objective
from ftlib.cgm.dual import solve_dual
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
    Metrics,
    Parts,
    Problem,
    Way,
    calibrated,
    plain,
    pose,
    relax,
)
from ftlib.experiments import Arm
from ftlib.results import Metric
from ftlib.runtime import Scale


def arms(scale: Scale) -> list[Arm]:
    """Return the arms at a scale."""
    world, practice = STRINGS[scale], PRACTICE[scale]
    return [*aim_arms(world, practice), *noise_arms(world, practice)]


# -- ways to meet the target -----------------------------------------------------------


def aim_arms(world: StringSettings, practice: PracticeSettings) -> list[Arm]:
    """Relax with a large and a small λ, and the large one aiming past the target."""
    large, small = practice.shortfalls
    ways: dict[str, tuple[float, Way]] = {
        "large λ": (large, plain),
        "small λ": (small, plain),
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
        DualError: see ``solve_dual``.
    """
    assert settings.kl_weight is not None
    pilot = problem.h(problem.base.sample(world.dual_samples))
    alpha = torch.from_numpy(solve_dual(pilot, problem.target).alpha)
    aim = problem.target + settings.kl_weight / 2 * alpha.to(problem.target)
    plain(
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
    return calibrated(world, problem, seed, settings, way)


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
    plain(problem, dataclasses.replace(settings, training=half))
    pilot = problem.h(problem.base.sample(world.dual_samples))
    tilt = solve_dual(pilot, problem.target, kl_weight=settings.kl_weight)
    alpha = torch.from_numpy(tilt.alpha).float().to(runtime.device())
    found = gradient_noise(
        problem.model,
        estimates(problem, settings.kl_weight, alpha, tilt.log_z),
        batch_size=world.batch_size,
        batches=practice.noise_batches,
    )
    return {
        f"{quantity}/{name}": Metric(getattr(noise, quantity), practice.noise_batches)
        for name, noise in found.items()
        for quantity in ("signal", "noise")
    }


def estimates(
    problem: Problem, kl_weight: float, alpha: Tensor, log_z: float
) -> Coefficients:
    """Coefficients of both losses with fewer and more baselines, all from one batch.

    ``relax, none`` has no baseline, ``relax, KL`` one on the KL (the paper's code),
    ``relax, both`` one on the violation too; ``reward, none`` and ``reward, own`` are
    CGM-reward without and with its baseline.
    """
    target = problem.target.to(runtime.device())

    @torch.no_grad()
    def coefficients(paths: Paths, log_prob: Tensor) -> dict[str, Tensor]:
        h = problem.h(paths)
        log_ratio = log_prob - problem.base.log_prob(paths)
        violation = objective.violation_coefficients(h, target)
        with_baseline = objective.violation_coefficients(h, target, baseline=True)
        kl = kl_weight * objective.kl_coefficients(log_ratio)
        to_tilt = log_ratio - h @ alpha + log_z
        return {
            "relax, none": violation + kl_weight * log_ratio / len(paths),
            "relax, KL": violation + kl,
            "relax, both": with_baseline + kl,
            "reward, none": to_tilt / len(paths),
            "reward, own": objective.kl_coefficients(to_tilt),
        }

    return coefficients
