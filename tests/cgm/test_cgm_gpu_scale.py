"""What only scale gpu has (pixels for tokens, longer strings), at toy size."""

import dataclasses

import numpy as np
import pytest
import torch

from ftlib.cgm import (
    diffusion_experiment,
    digits_experiment,
    practice_experiment,
    strings_experiment,
)
from ftlib.cgm.settings import DIFFUSION, DIGITS, PRACTICE, STRINGS
from ftlib.training import TrainingSettings

pytestmark = pytest.mark.usefixtures("base_cache")

FEW_STEPS = TrainingSettings(
    steps=2, batch_size=32, learning_rate=1e-3, max_grad_norm=None
)


def toy(world, **sizes):
    return dataclasses.replace(world, **sizes)


def digit_arms():
    world = toy(
        DIGITS["gpu"],
        copies=2,
        width=16,
        layers=1,
        pretraining=FEW_STEPS,
        pilot_samples=512,
        dual_samples=(512,),
        steps=2,
        batch_size=32,
        sizes=((8, 1),),
        evaluation_samples=64,
        base_samples=64,
    )
    chosen = digits_experiment.size_arms(world)
    return [arm for arm in chosen if not arm.name.startswith("reward")]


def string_arms():
    world = toy(
        STRINGS["gpu"],
        width=16,
        corpus=2048,
        pretraining=TrainingSettings(steps=100, batch_size=64, learning_rate=1e-2),
        shortfall=0.05,
        dual_samples=1024,
        steps=8,
        batch_size=32,
        batches=(64,),
        widths=(8,),
        feasibility_samples=(64,),
        feasibility_draws=1,
        evaluation_samples=64,
        base_samples=4096,
    )
    practice = toy(
        PRACTICE["gpu"], shortfalls=(0.1, 0.05), round_samples=32, noise_batches=2
    )
    every = [
        *strings_experiment.batch_arms(world),
        *strings_experiment.size_arms(world),
        *practice_experiment.aim_arms(world, practice),
        *practice_experiment.noise_arms(world, practice),
    ]
    # So small a base leaves cells empty: what needs the dual has no solution.
    return [arm for arm in every if arm.name != "pilot aim"]


def diffusion_arms():
    world = toy(
        DIFFUSION["gpu"],
        width=8,
        dual_samples=(64,),
        training=FEW_STEPS,
        dimensions=(30,),
        coordinate_width=4,
        coordinate_training=FEW_STEPS,
        rare_masses=(0.1,),
        rare_levels=(-1.0, 0.0),
        rare_training=FEW_STEPS,
        evaluation_samples=64,
    )
    return [
        *diffusion_experiment.path_arms(world)[:1],
        *diffusion_experiment.dimension_arms(world)[:1],
        *diffusion_experiment.rare_arms(world)[:3],
    ]


ARMS = [*digit_arms(), *string_arms(), *diffusion_arms()]


@pytest.mark.parametrize("arm", ARMS, ids=str)
def test_every_kind_of_arm_runs(arm):
    torch.manual_seed(0)
    metrics = arm.run(0)
    values = [getattr(metric, "value", metric) for metric in metrics.values()]
    assert np.isfinite(values).any()
    assert metrics.get("feasible", 1.0) == 1.0
