"""The arms on the digits, small; their metrics against closed forms."""

import dataclasses

import numpy as np
import pytest
import torch

from ftlib import bases
from ftlib.cgm import digits, digits_experiment
from ftlib.cgm.settings import DIGITS
from ftlib.experiments import Arm
from ftlib.training import TrainingSettings

SEED = 1000
TOY = dataclasses.replace(
    DIGITS["cpu"],
    images=(10, 12, 9, 8, 10, 7, 9, 10, 6, 8),
    copies=2,
    codes=64,
    width=16,
    pretraining=TrainingSettings(steps=120, batch_size=64, learning_rate=1e-2),
    kl_weights=(0.1,),
    pilot_samples=512,
    dual_samples=(512,),
    steps=3,
    batch_size=256,
    sizes=((8, 1),),
    evaluation_samples=256,
    base_samples=512,
)
LOOKED_AT = {
    *("kl", "kl_error", "smallest_kl", "feasible"),
    *(
        f"{who}{what}"
        for who in ("", "examiner_")
        for what in ("mean_abs_error", "violation")
    ),
    *(f"{who}share/{k}" for who in ("", "examiner_") for k in range(10)),
    *("disagreement", "distance", "within_distance", "diversity", "ink", "nearest"),
    *(f"disagreement/{k}" for k in range(10)),
}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    where = tmp_path_factory.getbasetemp()
    monkeypatch.setattr(bases.pooch, "os_cache", lambda name: str(where / name))


def all_arms(world) -> list[Arm]:
    return [
        *digits_experiment.method_arms(world),
        *digits_experiment.size_arms(world),
    ]


@pytest.mark.parametrize("arm", all_arms(TOY), ids=str)
def test_every_arm_runs_and_reports_the_same_metrics(arm):
    torch.manual_seed(0)
    metrics = arm.run(SEED)
    assert set(metrics) - {"kl_weight", "kept"} == LOOKED_AT
    assert metrics["feasible"] == 1
    assert ("kl_weight" in metrics) == ("relax" in arm.name)
    assert ("kept" in metrics) == ("SFT" in arm.name)


@pytest.mark.parametrize("scale", ["cpu", "gpu"])
def test_arms_have_distinct_names(scale):
    names = [str(arm) for arm in digits_experiment.arms(scale)]
    assert len(set(names)) == len(names) > 5


def test_a_base_does_not_depend_on_the_callers_random_numbers(tmp_path, monkeypatch):
    first = digits_experiment.base_model(TOY, SEED).state_dict()
    monkeypatch.setattr(bases.pooch, "os_cache", lambda name: str(tmp_path / name))
    torch.manual_seed(123)
    again = digits_experiment.base_model(TOY, SEED).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    other = digits_experiment.base_model(TOY, SEED + 1).state_dict()
    assert not torch.equal(first["codebook"], other["codebook"])


def test_the_base_has_no_kl_and_what_it_paints_is_counted():
    torch.manual_seed(0)
    problem = digits_experiment.pose(TOY, SEED)
    metrics = digits_experiment.evaluate(TOY, problem)
    assert metrics["kl"].value == pytest.approx(0, abs=1e-6)
    shares = np.array([metrics[f"share/{k}"].value for k in range(10)])
    assert shares.sum() == pytest.approx(1)
    assert metrics["mean_abs_error"].value == pytest.approx(np.abs(shares - 0.1).mean())
    n = TOY.evaluation_samples
    plug_in = ((shares[:9] - 0.1) ** 2).sum()
    spread = (shares[:9] * (1 - shares[:9])).sum() / (n - 1)
    assert metrics["violation"].value == pytest.approx(plug_in - spread, abs=1e-6)
    weighted = sum(
        shares[k] * metrics[f"disagreement/{k}"].value for k in range(10) if shares[k]
    )
    assert metrics["disagreement"].value == pytest.approx(weighted)


def test_h_is_the_judges_opinion_of_the_painted_images():
    problem = digits_experiment.pose(TOY, SEED)
    samples, images = digits_experiment.paint(problem.model, 50)
    h = problem.h(samples)
    judged = problem.viewers.judged(images)
    assert h.shape == (50, 9)
    assert np.array_equal(np.where(h.sum(1) == 0, 9, h.argmax(1)), judged)


def test_relax_moves_the_judges_shares_towards_equal_ones():
    world = dataclasses.replace(TOY, steps=25, evaluation_samples=2048)
    problem = digits_experiment.pose(world, SEED)
    torch.manual_seed(0)
    before = digits_experiment.evaluate(world, problem)
    digits_experiment.relax(world, 0.003, problem)
    after = digits_experiment.evaluate(world, problem)
    assert after["violation"].value < 0.6 * before["violation"].value
    assert after["kl"].value > 5 * after["kl_error"].value


def test_an_infeasible_dual_is_a_recorded_result():
    """One sample cannot hold every digit."""
    world = dataclasses.replace(TOY, dual_samples=(2,))
    (arm,) = [a for a in digits_experiment.method_arms(world) if a.name == "reward N=2"]
    metrics = arm.run(SEED)
    assert set(metrics) == LOOKED_AT
    assert metrics["feasible"] == 0
    assert np.isnan(metrics["mean_abs_error"])
    assert metrics["smallest_kl"] > 0


def test_real_images_are_at_the_floor():
    problem = digits_experiment.pose(TOY, SEED)
    real = digits_experiment.real_images(problem)
    painted = digits_experiment.evaluate(TOY, problem)
    assert real["distance"].value < 0.1 < painted["distance"].value
    assert real["disagreement"].value < 0.12 < painted["disagreement"].value


def test_the_training_images_are_as_unequal_as_stated():
    for world in DIGITS.values():
        shares = np.array(world.images) / sum(world.images)
        assert (shares.max().round(2), shares.min().round(2)) == (0.26, 0.02)
        part = digits.split(SEED).generator
        assert len(digits.unequal(part, world.images)) == sum(world.images)
