"""The diffusion experiments: every arm runs, and what is missing is recorded so."""

import dataclasses
import itertools
import math

import pytest
import torch

from ftlib.cgm import diffusion_experiment as experiment
from ftlib.cgm.diffusion import BumpDiffusion, bernoulli_kl
from ftlib.cgm.settings import DIFFUSION
from ftlib.training import TrainingSettings

BRIEF = TrainingSettings(steps=6, batch_size=16, learning_rate=0.01)
TOY = dataclasses.replace(
    DIFFUSION["cpu"],
    time_steps=12,
    width=8,
    kl_weights=(0.1,),
    dual_samples=(20,),
    training=BRIEF,
    dimensions=(2, 15),
    coordinate_training=BRIEF,
    rare_masses=(0.1, 1e-4),
    rare_levels=(-1.0, 0.0),
    rare_training=BRIEF,
    evaluation_samples=64,
    score_states=10_000,
)
EXACT = {
    *("mass", "violation", "path_kl", "end_kl", "base_mass", "smallest_kl"),
    *("smallest_path_kl", "log_ratio_kl", "log_ratio_kl_error"),
    *("drift_kl", "drift_kl_error", "feasible"),
}
SAMPLED = {
    *("mass", "mean_abs_error", "violation", "kl_per_coordinate"),
    *("kl_per_coordinate_error", "smallest_kl_per_coordinate", "feasible"),
}
ARMS = [
    *[(arm, EXACT) for arm in experiment.path_arms(TOY)],
    *[(arm, SAMPLED) for arm in experiment.dimension_arms(TOY)],
    *[(arm, EXACT) for arm in experiment.rare_arms(TOY)],
]


@pytest.mark.parametrize(
    ("arm", "metrics"), ARMS, ids=lambda value: getattr(value, "name", "")
)
def test_every_arm_runs_and_reports_the_same_metrics(arm, metrics):
    torch.manual_seed(1000)
    found = arm.run(1000)
    assert set(found) == metrics
    if found["feasible"]:
        assert all(math.isfinite(getattr(v, "value", v)) for v in found.values())
    else:
        assert math.isnan(getattr(found["mass"], "value", found["mass"]))


@pytest.mark.parametrize("name", ["reward D=15", "reward p=0.0001"])
def test_a_dual_without_a_solution_is_a_recorded_result(name):
    (arm,) = [arm for arm, _ in ARMS if arm.name == name]
    torch.manual_seed(1000)
    assert arm.run(1000)["feasible"] == 0


@pytest.mark.parametrize("scale", ["cpu", "gpu"])
def test_arms_have_distinct_names_and_settings(scale):
    arms = experiment.arms(scale)
    assert len({str(arm) for arm in arms}) == len(arms)
    keys = [(arm.experiment, str(sorted(arm.settings.items()))) for arm in arms]
    assert len(set(keys)) == len(arms)


def test_annealed_targets_end_at_the_target_in_equal_steps_of_log_odds():
    targets = experiment.annealed_targets(1e-3, 0.8, 4)
    odds = [math.log(t / (1 - t)) for t in [1e-3, *targets]]
    steps = [after - before for before, after in itertools.pairwise(odds)]
    assert targets[-1] == pytest.approx(0.8)
    assert steps == pytest.approx([steps[0]] * 4)


@pytest.mark.parametrize("world", [DIFFUSION["cpu"], DIFFUSION["gpu"]])
def test_settings_are_what_the_text_says(world):
    """0.2 nats a coordinate; the event is annealed from the left bump to zero."""
    assert bernoulli_kl(world.coordinate_target, 0.5) == pytest.approx(0.2, abs=1e-4)
    assert (world.rare_levels[0], world.rare_levels[-1]) == (-1, 0)
    assert max(world.dual_samples) == 10_000


def test_evaluation_of_an_untouched_model_is_the_base():
    torch.manual_seed(1000)
    model = BumpDiffusion(0.1)
    found = experiment.evaluate_exactly(0.8, 100, model, model)
    assert found["mass"] == found["base_mass"] == pytest.approx(0.104, abs=0.001)
    assert found["path_kl"] == found["drift_kl"].value == 0
    assert found["smallest_kl"] == bernoulli_kl(0.8, found["base_mass"])


def test_sampled_evaluation_is_of_the_mean_over_coordinates():
    torch.manual_seed(1000)
    base = BumpDiffusion(dimensions=4)
    model = BumpDiffusion(dimensions=4)
    torch.nn.init.constant_(model.offset.out.bias, 0.3)
    found = experiment.evaluate_by_sampling(0.5, 2000, 300, model, base)
    expected = 0.3**2 / 2 * float(model.clock.sum())  # a constant offset's
    assert found["kl_per_coordinate"].value == pytest.approx(expected, rel=1e-4)
    gap = found["mass"].value - 0.5
    assert found["mean_abs_error"].value == pytest.approx(gap, abs=1e-6)
    assert found["violation"].value == pytest.approx(4 * gap**2, rel=0.1)
