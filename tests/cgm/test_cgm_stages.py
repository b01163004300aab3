"""Moving targets, against the dual's prediction of every round."""

import dataclasses

import pytest
import torch

from ftlib.cgm import mixture, stages
from ftlib.cgm.dual import solve_dual
from ftlib.cgm.settings import CalibrationSettings
from ftlib.training import TrainingSettings

COIN = torch.tensor([[0.0], [1.0]])
TARGET = torch.tensor([0.8])
KL_WEIGHT = 1.0


def relax(steps):
    training = TrainingSettings(
        steps=steps, batch_size=256, learning_rate=0.02, max_grad_norm=None
    )
    return CalibrationSettings("relax", training, kl_weight=KL_WEIGHT)


def exact_rounds(rounds):
    """Targets and masses of the augmented Lagrangian where every round is exact."""
    aims, masses = [TARGET.double()], []
    for _ in range(rounds):
        reached = solve_dual(COIN, aims[-1], kl_weight=KL_WEIGHT).mean
        masses.append(float(reached[0]))
        aims.append(aims[-1] + TARGET - torch.from_numpy(reached))
    return torch.cat(aims[:-1]), masses


def test_the_augmented_lagrangian_follows_its_exact_rounds():
    torch.manual_seed(0)
    model = mixture.two_bumps()
    aims = stages.augmented_lagrangian(
        model, mixture.right_of_zero, TARGET, relax(600), rounds=4, samples=4096
    )
    exact_aims, masses = exact_rounds(4)
    torch.testing.assert_close(
        torch.cat(aims).double(), exact_aims, rtol=0, atol=0.05, check_dtype=False
    )
    assert float(model.mass_right_of_zero()) == pytest.approx(masses[-1], abs=0.02)
    assert masses[0] < 0.62 < 0.72 < masses[-1]  # the first is where relax ends


def test_exact_rounds_end_at_the_target_with_the_multipliers_of_the_dual():
    aims, masses = exact_rounds(60)
    alpha = solve_dual(COIN, TARGET).alpha[0]
    assert masses[-1] == pytest.approx(0.8, abs=1e-6)
    assert float(aims[-1] - TARGET) == pytest.approx(KL_WEIGHT * alpha / 2, abs=1e-5)


def test_one_round_is_relax():
    ends = []
    for run in (
        lambda model: stages.augmented_lagrangian(
            model, mixture.right_of_zero, TARGET, relax(20), rounds=1, samples=1
        ),
        lambda model: stages.calibrate_in_stages(
            model, [(mixture.right_of_zero, TARGET)], relax(20)
        ),
        lambda model: stages.calibrate(model, mixture.right_of_zero, TARGET, relax(20)),
    ):
        torch.manual_seed(0)
        model = mixture.two_bumps()
        run(model)
        ends.append(model.logits.detach().clone())
    assert torch.equal(ends[0], ends[1])
    assert torch.equal(ends[0], ends[2])


def test_stages_stay_close_to_the_first_model():
    torch.manual_seed(0)
    model = mixture.two_bumps()
    goals = [torch.tensor([0.6]), torch.tensor([0.7]), TARGET]
    found = stages.calibrate_in_stages(
        model, [(mixture.right_of_zero, goal) for goal in goals], relax(60)
    )
    assert [len(stage.history) for stage in found] == [20, 20, 20]
    for stage in found:
        assert float(stage.base.mass_right_of_zero()) == pytest.approx(0.5, abs=1e-4)


def test_a_second_call_goes_on_where_the_first_was_stopped(tmp_path, monkeypatch):
    def run(directory):
        torch.manual_seed(0)
        model = mixture.two_bumps()
        aims = stages.augmented_lagrangian(
            model,
            mixture.right_of_zero,
            TARGET,
            relax(30),
            rounds=3,
            samples=64,
            directory=directory,
        )
        return model.logits.detach().clone(), torch.cat(aims)

    whole = run(tmp_path / "whole")
    calls, calibrate = [], stages.calibrate

    def stopped(*args, **kwargs):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return calibrate(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(stages, "calibrate", stopped)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "stopped")
    again = run(tmp_path / "stopped")
    assert torch.equal(again[0], whole[0])
    assert torch.equal(again[1], whole[1])


def test_what_cannot_be_shared_out_is_refused():
    with pytest.raises(ValueError, match="3 steps cannot be shared out among 4"):
        stages.augmented_lagrangian(
            mixture.two_bumps(),
            mixture.right_of_zero,
            TARGET,
            relax(3),
            rounds=4,
            samples=8,
        )
    reward = dataclasses.replace(
        relax(4), loss="reward", kl_weight=None, dual_samples=100
    )
    with pytest.raises(ValueError, match="is of relax, not reward"):
        stages.augmented_lagrangian(
            mixture.two_bumps(),
            mixture.right_of_zero,
            TARGET,
            reward,
            rounds=2,
            samples=8,
        )
