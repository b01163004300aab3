"""The plan, and that its settings are what the records and the paper say."""

import dataclasses
from collections import Counter, defaultdict

import numpy as np
import pytest
import torch

from ftlib import results
from ftlib.cgm import experiment, stories
from ftlib.cgm.settings import (
    STORIES,
    STORY_LEARNING_RATES,
    TALES,
    CalibrationSettings,
)
from ftlib.experiments import load_plan
from ftlib.training import TrainingSettings

TOY = dataclasses.replace(
    STORIES,
    width=16,
    corpus=256,
    pretraining=TrainingSettings(steps=3, batch_size=32, learning_rate=1e-3),
    steps=10,
    batch_size=64,
    dual_samples=(512,),
    evaluation_samples=32,
)


def test_arms_are_recorded_under_distinct_names():
    names = [str(arm) for arm in load_plan("cgm", "cpu")]
    assert len(names) == len(set(names))
    assert Counter(name.split("/")[0] for name in names) == {
        "mixture": 10,
        "stories": 10,
        "learning-rate": 16,
        "tales": 3,
        "digits": 7,
        "strings": 19,
        "strings-feasibility": 4,
        "strings-batch": 8,
        "strings-size": 4,
        "practice-aim": 4,
        "practice-noise": 3,
        "diffusion": 6,
        "diffusion-dimensions": 15,
        "diffusion-rare": 16,
    }


@pytest.mark.parametrize("arm", experiment.story_arms(TOY), ids=lambda arm: arm.name)
def test_every_story_arm_runs_and_reports_the_same_metrics(arm):
    torch.manual_seed(0)
    metrics = arm.run(0)
    assert set(metrics) == {
        "mean_abs_imbalance",
        "violation",
        "held_out_imbalance",
        "agreement",
        "kl",
        "smallest_kl",
        "excess_kl",
        *(f"female/{p}" for p in [*stories.TRAINED, *stories.HELD_OUT]),
    }


def test_an_infeasible_mixture_is_a_recorded_result():
    settings = CalibrationSettings(
        "reward",
        TrainingSettings(steps=1, batch_size=8, learning_rate=0.1),
        dual_samples=10,
    )
    metrics = experiment.calibrate_mixture(settings, target=1.5, seed=0)
    assert metrics["feasible"] == 0
    assert np.isnan(metrics["mass"])


def test_a_pretrained_base_depends_on_its_seed_alone():
    first = experiment.story_base(TOY, 0).state_dict()
    torch.manual_seed(123)
    experiment._pretrained.cache_clear()
    again = experiment.story_base(TOY, 0).state_dict()
    other = experiment.story_base(TOY, 1).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_learning_rates_are_the_best_of_the_records():
    """Smallest exact violation + 0.1 KL on the tuning seeds, method by method."""
    scores = defaultdict(lambda: defaultdict(list))
    for record in results.load("cgm", "cpu").select(experiment="learning-rate"):
        m = record.metrics
        score = m["violation"].value + 0.1 * m["kl"].value
        settings = record.settings
        scores[settings["method"]][settings["learning_rate"]].append(score)
    best = {
        method: min(rates, key=lambda rate: np.mean(rates[rate]))
        for method, rates in scores.items()
    }
    assert best == STORY_LEARNING_RATES


def test_five_seeds_of_every_arm_are_recorded():
    recorded = results.load("cgm", "cpu")
    for arm in load_plan("cgm", "cpu"):
        found = recorded.select(experiment=arm.experiment, arm=arm.name)
        seeds = 2 if arm.experiment == "learning-rate" else 5
        assert len({record.seed for record in found}) >= seeds, str(arm)
        assert all(record.settings == arm.settings for record in found), str(arm)


def test_the_paper_scale_is_data_with_the_papers_values():
    paper = TALES["paper"]
    assert (paper.batch_size, paper.steps, paper.learning_rate) == (512, 200, 2e-6)
    assert len(paper.trained) == 8
    assert len(paper.held_out) == 6
    assert set(TALES["gpu"].trained) == set(paper.trained)
