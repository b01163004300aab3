"""The diffusion experiments: exact in one dimension, then many, then rare events.

``diffusion``: relax over λ and reward over N. ``diffusion-dimensions``: one constraint
a coordinate, up to a hundred and more. ``diffusion-rare``: a bump that the base hardly
ever visits, with and without annealing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from scipy.special import expit, logit

from ftlib import runtime
from ftlib.cgm import objective
from ftlib.cgm.calibrate import Statistic, calibrate, chunks, frozen_copy
from ftlib.cgm.diffusion import BumpDiffusion, bernoulli_kl, exact, right_of
from ftlib.cgm.dual import InfeasibleTargetError
from ftlib.cgm.estimates import mean_and_error
from ftlib.cgm.settings import DIFFUSION, CalibrationSettings, DiffusionSettings
from ftlib.cgm.stages import calibrate_in_stages
from ftlib.experiments import Arm
from ftlib.results import Metric
from ftlib.runtime import Scale

Metrics = Mapping[str, Metric | float]
Calibrate = Callable[[BumpDiffusion], object]
Evaluate = Callable[[BumpDiffusion, BumpDiffusion], Metrics]

right_of_zero: Statistic = partial(right_of, 0.0)


def arms(scale: Scale) -> list[Arm]:
    """Return the arms of the three experiments at a scale."""
    world = DIFFUSION[scale]
    return [*path_arms(world), *dimension_arms(world), *rare_arms(world)]


def path_arms(world: DiffusionSettings) -> list[Arm]:
    """CGM-relax over λ and CGM-reward over N, against exact answers."""
    settings = partial(
        CalibrationSettings, training=world.training, score_chunk=_chunk(world, 1)
    )
    losses = [
        settings("relax", kl_weight=weight, violation_baseline=True)
        for weight in world.kl_weights
    ]
    losses += [settings("reward", dual_samples=n) for n in world.dual_samples]
    return [
        _arm(
            "diffusion",
            f"relax λ={loss.kl_weight:g}"
            if loss.kl_weight
            else f"reward N={loss.dual_samples}",
            _one_dimension(world, loss),
            new_model=partial(BumpDiffusion, steps=world.time_steps, width=world.width),
            fine_tune=partial(_to_target, loss, world.target),
            evaluate=partial(evaluate_exactly, world.target, world.evaluation_samples),
        )
        for loss in losses
    ]


def dimension_arms(world: DiffusionSettings) -> list[Arm]:
    """Relax, reward and reward with a ridge, in ever more dimensions."""
    most = max(world.dual_samples)
    options: dict[str, dict[str, Any]] = {
        "relax": {
            "loss": "relax",
            "kl_weight": world.coordinate_kl_weight,
            "violation_baseline": True,
        },
        "reward": {"loss": "reward", "dual_samples": most},
        "ridge reward": {
            "loss": "reward",
            "dual_samples": most,
            "dual_ridge": world.coordinate_kl_weight,
        },
    }
    return [
        _dimension_arm(
            world,
            name,
            d,
            CalibrationSettings(
                training=world.coordinate_training,
                score_chunk=_chunk(world, d),
                **chosen,
            ),
        )
        for d in world.dimensions
        for name, chosen in options.items()
    ]


def _dimension_arm(
    world: DiffusionSettings, name: str, dimensions: int, loss: CalibrationSettings
) -> Arm:
    return _arm(
        "diffusion-dimensions",
        f"{name} D={dimensions}",
        {
            "dimensions": dimensions,
            "target": world.coordinate_target,
            "time_steps": world.time_steps,
            "width": world.coordinate_width,
            "evaluation_samples": world.evaluation_samples,
            **dataclasses.asdict(loss),
        },
        new_model=partial(
            BumpDiffusion,
            dimensions=dimensions,
            steps=world.time_steps,
            width=world.coordinate_width,
        ),
        fine_tune=partial(_to_target, loss, world.coordinate_target),
        evaluate=partial(
            evaluate_by_sampling,
            world.coordinate_target,
            world.evaluation_samples,
            _chunk(world, dimensions),
        ),
    )


def rare_arms(world: DiffusionSettings) -> list[Arm]:
    """Relax, twice annealed and once not, and reward, as the event becomes rarer."""
    settings = partial(
        CalibrationSettings,
        training=world.rare_training,
        score_chunk=_chunk(world, 1),
    )
    relax = settings("relax", kl_weight=world.rare_kl_weight, violation_baseline=True)
    reward = settings("reward", dual_samples=max(world.dual_samples))
    found = []
    for mass in world.rare_masses:
        ways: dict[str, Calibrate] = {
            "relax": partial(_to_target, relax, world.target),
            "annealed target": partial(_annealed_target, relax, world, mass),
            "annealed event": partial(_annealed_event, relax, world),
            "reward": partial(_to_target, reward, world.target),
        }
        found += [
            _arm(
                "diffusion-rare",
                f"{way} p={mass:g}",
                {
                    "way": way,
                    "mass": mass,
                    "stages": world.rare_levels if "annealed" in way else None,
                    **_one_dimension(world, reward if way == "reward" else relax),
                },
                new_model=partial(
                    BumpDiffusion, mass, steps=world.time_steps, width=world.width
                ),
                fine_tune=fine_tune,
                evaluate=partial(
                    evaluate_exactly, world.target, world.evaluation_samples
                ),
            )
            for way, fine_tune in ways.items()
        ]
    return found


def _one_dimension(
    world: DiffusionSettings, loss: CalibrationSettings
) -> dict[str, Any]:
    """What is set where D = 1."""
    return {
        "target": world.target,
        "time_steps": world.time_steps,
        "width": world.width,
        "evaluation_samples": world.evaluation_samples,
        **dataclasses.asdict(loss),
    }


# -- what an arm does ------------------------------------------------------------------


def _to_target(
    settings: CalibrationSettings, target: float, model: BumpDiffusion
) -> None:
    """Calibrate P(x_T > 0) of every coordinate to one target."""
    goal = torch.full((model.dimensions,), target)
    calibrate(model, right_of_zero, goal, settings)


def _annealed_target(
    settings: CalibrationSettings,
    world: DiffusionSettings,
    mass: float,
    model: BumpDiffusion,
) -> None:
    """Raise the target from the base's mass in equal steps of its log-odds."""
    stages = annealed_targets(mass, world.target, len(world.rare_levels))
    goals = [(right_of_zero, torch.tensor([target])) for target in stages]
    calibrate_in_stages(model, goals, settings)


def _annealed_event(
    settings: CalibrationSettings, world: DiffusionSettings, model: BumpDiffusion
) -> None:
    """Ask for the target's share right of a threshold that moves to zero."""
    goal = torch.tensor([world.target])
    goals = [(partial(right_of, level), goal) for level in world.rare_levels]
    calibrate_in_stages(model, goals, settings)


def annealed_targets(mass: float, target: float, stages: int) -> list[float]:
    """Targets from ``mass`` (left out) to ``target``: one tilt growing in equal steps.

    The multiplier of a binary h is logit h* − logit p, so equal steps of log-odds are
    equal steps of α.
    """
    start, end = logit(mass), logit(target)
    return [
        float(expit(start + (end - start) * k / stages)) for k in range(1, stages + 1)
    ]


def evaluate_exactly(
    target: float, samples: int, model: BumpDiffusion, base: BumpDiffusion
) -> Metrics:
    """Evaluate a one-dimensional model by quadrature, and its KL by sampling too.

    ``smallest_kl`` is the closed form for end points, ``smallest_path_kl`` that for
    paths from a fixed start. ``log_ratio_kl`` and ``drift_kl`` are two estimates of
    ``path_kl`` from the same paths, each with its standard error.
    """
    found = exact(model)
    paths = model.sample(samples)
    with torch.no_grad():
        log_ratio = model.log_prob(paths) - base.log_prob(paths)
        drift = model.path_kl(base, paths)
    return {
        "mass": found.mass,
        "violation": (found.mass - target) ** 2,
        "path_kl": found.path_kl,
        "end_kl": found.end_kl,
        "base_mass": found.base_mass,
        "smallest_kl": bernoulli_kl(target, found.base_mass),
        "smallest_path_kl": found.smallest_path_kl(target),
        **mean_and_error("log_ratio_kl", log_ratio.double()),
        **mean_and_error("drift_kl", drift.double()),
    }


@torch.no_grad()
def evaluate_by_sampling(
    target: float, samples: int, chunk: int, model: BumpDiffusion, base: BumpDiffusion
) -> Metrics:
    """Evaluate a model of many coordinates from fresh paths.

    ``mean_abs_error``, over coordinates, is not zero for a perfect model but has its
    sampling noise; the U-statistic ``violation`` has none on average.
    """
    paths = model.sample(samples)
    h = right_of_zero(paths)
    kl = torch.cat([model.path_kl(base, part) for part in chunks(paths, chunk)])
    kl /= model.dimensions
    goal = torch.full((model.dimensions,), target, device=h.device)
    violation = float(objective.violation(h, goal))
    return {
        "mass": Metric(float(h.mean()), samples),
        "mean_abs_error": Metric(float((h.mean(0) - goal).abs().mean()), samples),
        "violation": Metric(violation, samples),
        **mean_and_error("kl_per_coordinate", kl.double()),
        "smallest_kl_per_coordinate": bernoulli_kl(target, base.right),
    }


# -- shared ----------------------------------------------------------------------------


def _arm(
    experiment: str,
    name: str,
    settings: Mapping[str, Any],
    *,
    new_model: Callable[[], BumpDiffusion],
    fine_tune: Calibrate,
    evaluate: Evaluate,
) -> Arm:
    return Arm(
        experiment, name, settings, partial(_run, new_model, fine_tune, evaluate)
    )


def _run(
    new_model: Callable[[], BumpDiffusion],
    fine_tune: Calibrate,
    evaluate: Evaluate,
    seed: int,
) -> Metrics:
    """Fine-tune and evaluate; a dual without a solution is a result, of NaNs."""
    model = new_model().to(runtime.device())
    base = frozen_copy(model)
    try:
        fine_tune(model)
    except InfeasibleTargetError:
        missing = dict.fromkeys(evaluate(base, base), float("nan"))
        return {"feasible": 0.0, **missing}
    return {"feasible": 1.0, **evaluate(model, base)}


def _chunk(world: DiffusionSettings, dimensions: int) -> int:
    """Paths scored at a time."""
    return max(1, world.score_states // (world.time_steps * dimensions))
