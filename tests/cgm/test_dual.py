"""The dual solver against closed forms, enumeration and linear programmes."""

import math

import numpy as np
import pytest
import torch

from ftlib.cgm.dual import (
    InfeasibleTargetError,
    RedundantConstraintError,
    balanced_kl,
    choose_kl_weight,
    solve_dual,
)

BERNOULLI = np.array([[0.0], [1.0]])


@pytest.mark.parametrize("p", [0.5, 0.05, 1e-4])
def test_one_binary_constraint_has_a_closed_form(p):
    goal = 0.8
    tilt = solve_dual(BERNOULLI, np.array([goal]), weights=np.array([1 - p, p]))
    logit = math.log(goal / (1 - goal)) - math.log(p / (1 - p))
    kl = goal * math.log(goal / p) + (1 - goal) * math.log((1 - goal) / (1 - p))
    np.testing.assert_allclose(tilt.alpha, [logit], rtol=1e-8)
    np.testing.assert_allclose(tilt.kl, kl, rtol=1e-8)
    np.testing.assert_allclose(tilt.log_z, math.log((1 - p) / (1 - goal)), rtol=1e-8)


def test_the_papers_toy_is_ln_4_and_0_1927():
    tilt = solve_dual(BERNOULLI, np.array([0.8]))
    np.testing.assert_allclose(tilt.alpha, math.log(4), rtol=1e-9)
    np.testing.assert_allclose(tilt.kl, 0.19274475702, rtol=1e-9)


@pytest.mark.parametrize("kl_weight", [1, 0.3, 0.1, 0.01, 1e-3, 1e-4])
def test_relax_optimum_solves_its_fixed_point(kl_weight):
    """α_λ = (2/λ)(h* − E[h]), bisected here on one dimension."""
    low, high = 0.5, 0.8

    def gap(mean):
        return math.log(mean / (1 - mean)) - 2 / kl_weight * (0.8 - mean)

    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if gap(middle) < 0 else (low, middle)
    tilt = solve_dual(BERNOULLI, np.array([0.8]), kl_weight=kl_weight)
    np.testing.assert_allclose(tilt.mean, low, rtol=1e-7)
    np.testing.assert_allclose(0.8 - tilt.mean, kl_weight * tilt.alpha / 2, rtol=1e-5)


def test_kl_and_mean_agree_with_the_reweighted_atoms():
    rng = np.random.default_rng(0)
    h, goal = rng.normal(size=(500, 6)), rng.normal(size=6) * 0.2
    tilt = solve_dual(h, goal)
    p = np.exp(h @ tilt.alpha)
    p /= p.sum()
    np.testing.assert_allclose(p @ h, goal, atol=1e-8)
    np.testing.assert_allclose(tilt.mean, goal, atol=1e-8)
    np.testing.assert_allclose(tilt.kl, p @ np.log(p * 500), rtol=1e-7)
    np.testing.assert_allclose(tilt.effective_samples, 1 / (p @ p), rtol=1e-7)


def test_badly_scaled_constraints_are_solved_all_the_same():
    rng = np.random.default_rng(1)
    h = rng.normal(size=(400, 3))
    scale = np.array([1e-6, 1.0, 1e6])
    plain = solve_dual(h, np.full(3, 0.3))
    scaled = solve_dual(h * scale, np.full(3, 0.3) * scale)
    np.testing.assert_allclose(scaled.alpha * scale, plain.alpha, rtol=1e-6)


def test_a_hundred_constraints_are_met():
    rng = np.random.default_rng(2)
    h = (rng.random((5000, 100)) < 0.5).astype(float)
    tilt = solve_dual(h, np.full(100, 0.55))
    np.testing.assert_allclose(tilt.mean, 0.55, atol=1e-7)


def test_torch_tensors_of_any_dtype_are_taken():
    tilt = solve_dual(torch.tensor([[0], [1]]), torch.tensor([0.75]))
    np.testing.assert_allclose(tilt.alpha, math.log(3), rtol=1e-9)


def test_a_target_out_of_range_names_its_constraint():
    h = np.array([[0.0, 1.0], [1.0, 2.0], [0.0, 3.0]])
    with pytest.raises(InfeasibleTargetError, match=r"constraint 1: .*target 5"):
        solve_dual(h, np.array([0.5, 5.0]))


def test_a_rare_event_that_was_never_drawn_is_named():
    h = np.array([[0.0, 1.0]] * 3 + [[0.0, 0.0]] * 3)
    with pytest.raises(InfeasibleTargetError, match=r"constraint 0: .*draw more"):
        solve_dual(h, np.array([0.1, 0.5]))


@pytest.mark.parametrize("goal", [[0.9, 0.9], [0.5, 0.5]])
def test_a_target_outside_or_on_the_hull_is_refused(goal):
    """A triangle: (.9, .9) lies outside, (.5, .5) on its edge, where α runs away."""
    triangle = np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    with pytest.raises(InfeasibleTargetError, match=r"constraints 0, 1 .*convex hull"):
        solve_dual(triangle, np.array(goal))


def test_an_extreme_target_just_inside_the_hull_is_solved():
    goal, rare = np.array([1 - 1e-6]), np.array([1 - 1e-6, 1e-6])
    tilt = solve_dual(BERNOULLI, goal, weights=rare)
    np.testing.assert_allclose(tilt.mean, goal, rtol=1e-9)
    np.testing.assert_allclose(tilt.alpha, 2 * math.log(1e6 - 1), rtol=1e-4)


def test_a_repeated_constraint_is_named():
    rng = np.random.default_rng(3)
    h = rng.normal(size=(50, 2))
    doubled = np.column_stack([h, h.sum(1)])
    with pytest.raises(RedundantConstraintError, match=r"constraint \d follows"):
        solve_dual(doubled, np.zeros(3))


def test_one_hot_indicators_are_redundant():
    h = np.eye(3)[[0, 1, 2, 1, 0, 2]]
    with pytest.raises(RedundantConstraintError, match="2 of 3"):
        solve_dual(h, np.full(3, 1 / 3))


def test_a_constant_statistic_already_on_target_is_redundant():
    h = np.array([[1.0, 0.0], [1.0, 1.0]])
    with pytest.raises(RedundantConstraintError, match="constraint 0"):
        solve_dual(h, np.array([1.0, 0.5]))


def test_relax_is_feasible_where_the_constrained_problem_is_not():
    tilt = solve_dual(np.array([[0.0], [0.5]]), np.array([0.8]), kl_weight=0.1)
    assert 0.25 < tilt.mean[0] < 0.5


@pytest.mark.parametrize(
    ("h", "goal", "weights", "message"),
    [
        (np.zeros(3), np.zeros(1), None, r"\[N, d\]"),
        (np.zeros((3, 2)), np.zeros(3), None, r"\[N, d\]"),
        (np.full((2, 1), np.nan), np.zeros(1), None, "finite"),
        (BERNOULLI, np.array([0.5]), np.array([0.5, 0.6]), "sum to one"),
        (BERNOULLI, np.array([0.5]), np.array([-0.5, 1.5]), "probabilities"),
    ],
)
def test_malformed_input_is_refused(h, goal, weights, message):
    with pytest.raises(ValueError, match=message):
        solve_dual(h, goal, weights=weights)


def test_balanced_kl_is_the_dual_of_each_prompt():
    shares = np.array([[0.2, 0.7, 0.1], [0.9, 0.1, 0], [0.02, 0.9, 0.08]])
    atoms = np.array([[1.0], [-1.0], [0.0]])
    kls = [
        solve_dual(atoms, np.zeros(1), weights=np.array([f, m, s])).kl
        for f, m, s in shares
    ]
    np.testing.assert_allclose(balanced_kl(*shares.T[:2]), kls, rtol=1e-8, atol=1e-12)


def test_a_joint_tilt_of_prompts_and_answers_has_a_smaller_kl():
    """Why the smallest KL of a prompted model is a mean over its prompts."""
    female, male = np.array([0.2, 0.9]), np.array([0.2, 0.05])
    atoms = np.array([[2.0, 0], [0, 2], [-2, 0], [0, -2], [0, 0], [0, 0]])
    weights = np.concatenate([female, male, 1 - female - male]) / 2
    joint = solve_dual(atoms, np.zeros(2), weights=weights).kl
    assert joint < balanced_kl(female, male).mean() - 0.01


def test_the_chosen_weight_is_the_largest_with_the_shortfall():
    """On a coin the fixed point is known: λα_λ = 2·shortfall, α_λ = logit 0.79."""
    h = np.array([[0.0]] * 500 + [[1.0]] * 500)
    weight = choose_kl_weight(h, np.array([0.8]), 0.01)
    assert weight == pytest.approx(0.02 / math.log(0.79 / 0.21), rel=2e-3)


def test_the_chosen_weight_keeps_the_root_mean_square_of_many_constraints():
    rng = np.random.default_rng(0)
    h = (rng.random((2000, 12)) < rng.uniform(0.2, 0.8, 12)).astype(float)
    target = np.clip(h.mean(0) + rng.normal(0, 0.1, 12), 0.05, 0.95)
    weight = choose_kl_weight(h, target, 0.02)

    def shortfall(kl_weight):
        miss = target - solve_dual(h, target, kl_weight=kl_weight).mean
        return np.sqrt(np.mean(miss**2))

    assert shortfall(weight) == pytest.approx(0.02, rel=5e-3)
    assert shortfall(1.1 * weight) > 0.02 > shortfall(0.9 * weight)


def test_a_shortfall_out_of_reach_or_already_kept_is_refused():
    h = np.array([[0.0]] * 90 + [[1.0]] * 10)
    with pytest.raises(ValueError, match="without training"):
        choose_kl_weight(h, np.array([0.11]), 0.05)
    with pytest.raises(InfeasibleTargetError, match="no λ brings these 100 samples"):
        choose_kl_weight(h, np.array([1.2]), 0.1)


def test_a_ridge_solves_what_has_no_solution():
    h = np.zeros((50, 2))
    h[:25, 0] = 1
    target = np.array([0.8, 0.0])  # the second never varies and is met
    assert solve_dual(h, target, kl_weight=0.1).mean == pytest.approx(
        [0.746, 0], abs=1e-3
    )


def test_a_dependent_constraint_is_redundant_or_contradicts_the_others():
    rng = np.random.default_rng(0)
    h = rng.random((100, 4))
    h[:, 3] = 2 * h[:, 0] - h[:, 1] + 1
    target = np.array([0.5, 0.5, 0.5, 1.5])
    with pytest.raises(RedundantConstraintError, match="follows from the others"):
        solve_dual(h, target)
    with pytest.raises(InfeasibleTargetError, match="its target contradicts theirs"):
        solve_dual(h, np.array([0.5, 0.5, 0.5, 1.6]))


def test_equal_indicators_with_unequal_targets_cannot_be_met():
    """A cell that no sample fell into, of cumulative indicators."""
    h = np.array([[1.0, 1.0], [0.0, 0.0]] * 10)
    with pytest.raises(InfeasibleTargetError, match="its target contradicts theirs"):
        solve_dual(h, np.array([0.4, 0.6]))
