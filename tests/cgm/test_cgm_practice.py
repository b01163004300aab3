"""The practitioner's choices at toy size, against the dual and against one another."""

import dataclasses
from functools import partial

import numpy as np
import pytest
import torch
from cgm_toys import SHORT_STRINGS

from ftlib.cgm import practice_experiment as practice
from ftlib.cgm.dual import solve_dual
from ftlib.cgm.noise import gradient_noise
from ftlib.cgm.settings import PRACTICE
from ftlib.cgm.strings_experiment import MEASURED, pose, relax, theory
from ftlib.training import TrainingSettings

pytestmark = pytest.mark.usefixtures("base_cache")

WORLD = dataclasses.replace(
    SHORT_STRINGS,
    unmasking_steps=3,
    pretraining=TrainingSettings(steps=60, batch_size=64, learning_rate=1e-2),
    strand_limits=(1, 3),
    steps=12,
    batch_size=64,
    dual_samples=512,
    evaluation_samples=256,
    base_samples=4096,
)
TOY = dataclasses.replace(
    PRACTICE["cpu"],
    aim_grid=(2, 2),
    rounds=2,
    round_samples=64,
    noise_grids=((2, 2),),
    noise_batches=4,
)


@pytest.mark.parametrize("arm", practice.aim_arms(WORLD, TOY), ids=lambda a: a.name)
def test_every_way_reports_the_same_metrics(arm):
    torch.manual_seed(0)
    metrics = arm.run(0)
    assert {"feasible", "kl_weight", "predicted_error", *MEASURED} <= set(metrics)
    assert metrics["feasible"] == 1
    assert np.isfinite(metrics["kl"].value)


def test_a_pilot_without_a_solution_is_a_recorded_result():
    way = partial(practice.pilot_aim, dataclasses.replace(WORLD, dual_samples=2))
    metrics = practice._run_way(WORLD, TOY, 0.02, way, seed=0)
    assert metrics["feasible"] == 0
    assert np.isnan(metrics["kl"])


def test_aiming_past_the_target_by_half_lambda_alpha_meets_it():
    """The identity behind the pilot aim and the augmented Lagrangian."""
    rng = np.random.default_rng(0)
    h, weights = rng.random((40, 5)), rng.dirichlet(np.ones(40))
    target = weights @ h + 0.05
    alpha = solve_dual(h, target, weights=weights).alpha
    aimed = solve_dual(h, target + 0.3 / 2 * alpha, weights=weights, kl_weight=0.3)
    np.testing.assert_allclose(aimed.mean, target, rtol=1e-7)
    assert (
        np.abs(
            solve_dual(h, target, weights=weights, kl_weight=0.3).mean - target
        ).max()
        > 0.01
    )


def test_the_rounds_of_the_lagrangian_pay_for_their_samples(monkeypatch):
    problem, seen = pose(WORLD, 0, (2, 2)), []
    monkeypatch.setattr(
        practice,
        "augmented_lagrangian",
        lambda *args, **options: seen.append((args[3].training.steps, options)),
    )
    torch.manual_seed(0)
    settings = relax(WORLD, problem, WORLD.batch_size)
    practice.in_rounds(TOY, problem, settings)
    assert seen == [(WORLD.steps - 1, {"rounds": 2, "samples": 64})]


def test_baselines_leave_the_mean_gradient_as_it_is():
    torch.manual_seed(0)
    problem = pose(WORLD, 0, (2, 2))
    for parameter in problem.model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)  # off the base
    alpha = torch.tensor([3.0, 3.0, 3.0])  # a reward far from zero on average
    batches = 400
    found = gradient_noise(
        problem.model,
        practice.estimates(problem, 0.5, alpha, log_z=0.0),
        batch_size=32,
        batches=batches,
    )
    for none, others in {
        "relax, none": ("relax, KL", "relax, both"),
        "reward, none": ("reward, own",),
    }.items():
        for other in others:
            gap = (found[none].mean - found[other].mean).square().sum()
            assert gap < 4 * (found[none].noise + found[other].noise) / batches
            assert found[none].signal > 4 * gap  # there is something to agree on
    assert found["reward, own"].noise < found["reward, none"].noise


def test_noise_arms_report_signal_and_noise_of_each_estimate():
    (arm,) = practice.noise_arms(WORLD, TOY)
    torch.manual_seed(0)
    metrics = arm.run(0)
    names = ("relax, none", "relax, KL", "relax, both", "reward, none", "reward, own")
    assert set(metrics) == {
        f"{q}/{name}" for q in ("signal", "noise") for name in names
    }
    assert all(metrics[f"noise/{name}"].value > 0 for name in names)


def test_theory_of_the_chosen_weight_is_near_the_shortfall():
    torch.manual_seed(0)
    problem = pose(WORLD, 0, (2, 2))
    asked = dataclasses.replace(WORLD, shortfall=0.03)
    settings = relax(asked, problem, WORLD.batch_size)
    expected = theory(WORLD, 0, problem, settings.kl_weight)
    assert expected["predicted_error"].value == pytest.approx(0.03, abs=0.015)
