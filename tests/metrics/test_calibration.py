"""Calibration against closed forms, scikit-learn, and plain loops."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss, log_loss

from ftlib.metrics import calibration
from ftlib.metrics.calibration import (
    brier,
    decompose,
    ece,
    ece_if_calibrated,
    ece_interval,
    fit_temperature,
    nll,
    reliability,
    temperature_scale,
)

SPACINGS = ("width", "mass")


def classifier(n, classes=3, seed=0, sharpen=1.0):
    """Random forecasts; labels are drawn from them before they are sharpened."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 1.5, (n, classes))
    p = temperature_scale(logits, 1.0)
    labels = (rng.random((n, 1)) > p.cumsum(1)[:, :-1]).sum(1)
    return temperature_scale(logits, 1 / sharpen), labels


def by_hand(confidence, right, bins):
    """ECE with bins of equal width, closed above, item by item."""
    total = 0.0
    for b in range(bins):
        low, high = b / bins, (b + 1) / bins
        inside = [
            (c, r)
            for c, r in zip(confidence, right, strict=True)
            if low < c <= high or (b == 0 and c == 0)
        ]
        if inside:
            gap = sum(r for _, r in inside) - sum(c for c, _ in inside)
            total += abs(gap) / len(confidence)
    return total


@pytest.fixture(autouse=True)
def _few_resamples(monkeypatch):
    monkeypatch.setattr(calibration, "_RESAMPLES", 200)


# --- ECE ----------------------------------------------------------------------


@pytest.mark.parametrize("bins", [1, 4, 15])
def test_top_label_and_classwise_ece_are_those_of_a_loop(bins):
    p, y = classifier(300)
    top = by_hand(p.max(1), p.argmax(1) == y, bins)
    assert ece(p, y, bins) == pytest.approx(top, abs=1e-12)
    each = [by_hand(p[:, k], y == k, bins) for k in range(3)]
    classwise = ece(p, y, bins, events="classwise")
    assert classwise == pytest.approx(np.mean(each), abs=1e-12)


@pytest.mark.parametrize(
    ("spacing", "strategy"), [("width", "uniform"), ("mass", "quantile")]
)
def test_the_curve_is_that_of_scikit_learn(spacing, strategy):
    rng = np.random.default_rng(1)
    confidence = np.concatenate([rng.beta(2, 1, 400), np.full(150, 0.5), [0.0, 1.0]])
    right = rng.random(len(confidence)) < confidence
    curve = reliability(confidence, right, 8, spacing)
    accuracy, mean = calibration_curve(right, confidence, n_bins=8, strategy=strategy)
    np.testing.assert_allclose(curve.accuracy, accuracy, rtol=1e-12)
    np.testing.assert_allclose(curve.confidence, mean, rtol=1e-12)
    assert curve.items.sum() == len(confidence)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("events", ["top", "classwise"])
def test_true_probabilities_have_an_ece_that_vanishes(spacing, events):
    small, large = (
        ece(*classifier(n, seed=2), 10, spacing, events) for n in (200, 20_000)
    )
    assert large < 0.012
    assert large < small


@pytest.mark.parametrize("spacing", SPACINGS)
def test_a_constant_classifier_has_the_ece_of_its_one_bin(spacing):
    p = np.tile([0.7, 0.2, 0.1], (50, 1))
    y = np.array([0] * 20 + [1] * 30)
    assert ece(p, y, 10, spacing) == pytest.approx(0.7 - 0.4)
    each = [0.7 - 0.4, 0.6 - 0.2, 0.1]
    assert ece(p, y, 10, spacing, "classwise") == pytest.approx(np.mean(each))


@pytest.mark.parametrize("spacing", SPACINGS)
def test_the_order_of_items_with_ties_does_not_matter(spacing):
    rng = np.random.default_rng(0)
    confidence = rng.choice([0.3, 0.6, 0.9], 100)
    right = rng.random(100) < 0.5
    again = rng.permutation(100)
    first = reliability(confidence, right, 7, spacing)
    second = reliability(confidence[again], right[again], 7, spacing)
    for a, b in zip(first, second, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)
    assert len(first.items) <= 3  # A value is in one bin, and empty bins are left out.


def test_bins_of_equal_mass_have_equal_mass():
    confidence = np.random.default_rng(0).random(1000) ** 3
    curve = reliability(confidence, confidence > 0.5, 10, "mass")
    assert set(curve.items.tolist()) == {100}
    assert len(set(reliability(confidence, confidence > 0.5, 10).items.tolist())) > 5


def test_one_bin_leaves_the_difference_of_the_means():
    p, y = classifier(100)
    expected = abs(p.max(1).mean() - (p.argmax(1) == y).mean())
    for spacing in SPACINGS:
        assert ece(p, y, 1, spacing) == pytest.approx(expected)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_one_item_is_enough(spacing):
    p, y = [[0.8, 0.2]], [1]
    assert ece(p, y, 15, spacing) == pytest.approx(0.8)
    interval = ece_interval(p, y, 15, spacing)
    assert interval.mean == pytest.approx(0.8)
    assert np.isnan([interval.low, interval.high]).all()
    assert interval.n == 1
    assert brier(p, y).mean == pytest.approx(2 * 0.8**2)
    assert nll(p, y).mean == pytest.approx(-np.log(0.2))


# --- intervals ----------------------------------------------------------------


def test_the_interval_of_an_overconfident_model_is_around_its_ece():
    p, y = classifier(800, sharpen=3.0)
    interval = ece_interval(p, y)
    assert interval.mean == ece(p, y)
    assert interval.low < interval.mean < interval.high
    assert 0.01 < interval.high - interval.low < 0.12
    assert ece_interval(p, y) == interval
    assert ece_interval(p, y, seed=1) != interval


@pytest.mark.parametrize("events", ["top", "classwise"])
def test_chance_explains_the_ece_of_true_probabilities_and_no_other(events):
    for n in (100, 1000):
        p, y = classifier(n, seed=5)
        chance = ece_if_calibrated(p, events=events)
        assert chance.low < ece(p, y, events=events) < chance.high
        assert chance.low < chance.mean < chance.high
        assert chance.n == n
    p, y = classifier(1000, sharpen=3.0)
    assert ece(p, y, events=events) > 2 * ece_if_calibrated(p, events=events).high


def test_the_expected_ece_of_a_fair_coin_is_known():
    """One bin with n coins: E|heads/n − 1/2|, by the binomial distribution."""
    n = 16
    heads = np.arange(n + 1)
    odds = np.array([1.0])
    for _ in range(n):
        odds = (np.append(odds, 0) + np.insert(odds, 0, 0)) / 2
    expected = odds @ np.abs(heads / n - 0.5)
    drawn = [
        ece_if_calibrated(np.full((n, 2), 0.5), seed=seed).mean for seed in range(10)
    ]
    deviation = np.sqrt(odds @ (np.abs(heads / n - 0.5) - expected) ** 2 / 2000)
    assert abs(np.mean(drawn) - expected) < 5 * deviation


# --- proper scores ------------------------------------------------------------


def test_brier_and_nll_are_those_of_scikit_learn():
    p, y = classifier(300)
    right, near = brier(p, y), nll(p, y)
    assert near.mean == pytest.approx(log_loss(y, p, labels=[0, 1, 2]), rel=1e-12)
    assert right.low < right.mean < right.high
    assert near.low < near.mean < near.high
    one_hot = np.eye(3)[y]
    assert right.mean == pytest.approx(((p - one_hot) ** 2).sum() / 300, rel=1e-12)
    two, side = classifier(300, classes=2)
    expected = brier_score_loss(side, two[:, 1])
    assert brier(two, side).mean == pytest.approx(2 * expected, rel=1e-12)


def test_perfect_and_hopeless_forecasts():
    p = np.eye(3)[[0, 1, 2, 1]]
    assert brier(p, [0, 1, 2, 1]).mean == 0
    assert brier(p, [1, 0, 0, 0]).mean == 2
    assert nll(p, [0, 1, 2, 1]).mean == 0
    assert np.isnan(nll(p, [1, 0, 0, 0]).mean)
    assert ece(p, [0, 1, 2, 1]) == 0
    assert ece(p, [1, 0, 0, 0]) == 1


@pytest.mark.parametrize("spacing", SPACINGS)
def test_the_decomposition_adds_up_and_is_murphys_for_few_forecasts(spacing):
    rng = np.random.default_rng(3)
    confidence = rng.choice([0.15, 0.45, 0.95], 500)
    right = rng.random(500) < confidence**2
    parts = decompose(confidence, right, 10, spacing)
    groups = [confidence == value for value in (0.15, 0.45, 0.95)]
    rate = right.mean()
    resolution = sum(g.mean() * (right[g].mean() - rate) ** 2 for g in groups)
    gap = sum(g.mean() * (right[g].mean() - confidence[g][0]) ** 2 for g in groups)
    assert parts.reliability == pytest.approx(gap)
    assert parts.resolution == pytest.approx(resolution)
    assert parts.uncertainty == pytest.approx(right.var())
    assert parts.within == pytest.approx(0, abs=1e-12)


def test_forecasts_that_differ_within_a_bin_add_to_the_score():
    """Closed form: within-bin variance of c minus twice its covariance with r."""
    confidence = np.array([0.0, 1.0, 0.5, 0.5])
    right = np.array([0, 1, 0, 1])
    parts = decompose(confidence, right, 1)
    covariance = np.mean((confidence - 0.5) * (right - 0.5))
    assert parts.within == pytest.approx(confidence.var() - 2 * covariance)
    assert parts[0] - parts[1] + parts[2] + parts[3] == pytest.approx(
        brier_score_loss(right, confidence)
    )


# --- temperature --------------------------------------------------------------


@pytest.mark.parametrize("factor", [0.4, 1.0, 4.0])
def test_the_temperature_undoes_a_factor_on_calibrated_logits(factor):
    p, y = classifier(20_000, seed=4)
    temperature = fit_temperature(factor * np.log(p), y)
    assert temperature == pytest.approx(factor, rel=0.05)
    scaled = temperature_scale(factor * np.log(p), temperature)
    np.testing.assert_allclose(scaled, p, atol=0.02)


def test_no_other_temperature_has_a_lower_nll():
    p, y = classifier(200, sharpen=2.5)
    best = fit_temperature(np.log(p), y)
    lowest = nll(temperature_scale(np.log(p), best), y).mean
    for other in (0.5 * best, 0.99 * best, 1.01 * best, 2 * best):
        assert nll(temperature_scale(np.log(p), other), y).mean > lowest


def test_where_the_best_temperature_lies_outside_the_nearer_end_is_given():
    logits = np.array([[2.0, 0.0], [0.0, 1.0]])
    assert fit_temperature(logits, [0, 1]) == 0.01
    assert fit_temperature(logits, [1, 0]) == 100
    assert fit_temperature(np.zeros((4, 2)), [0, 1, 0, 1]) == 0.01  # All are as good.


@settings(max_examples=30, deadline=None)
@given(st.floats(0.01, 50), st.floats(-1e4, 1e4))
def test_scaling_keeps_the_order_and_takes_large_logits(temperature, offset):
    logits = np.array([[3.0, 1.0, 2.0], [-5.0, 40.0, 0.0]]) + offset
    p = temperature_scale(logits, temperature)
    np.testing.assert_allclose(p.sum(1), 1)
    assert (p.argmax(1) == [0, 1]).all()
    exact = np.exp((logits[0] - logits[0, 0]) / temperature)
    np.testing.assert_allclose(p[0], exact / exact.sum(), rtol=1e-9)


# --- what is no input ---------------------------------------------------------


@pytest.mark.parametrize(
    ("p", "y", "message"),
    [
        ([0.5, 0.5], [0], r"of shape \(n, K\), got \(2,\)"),
        (np.zeros((0, 2)), [], r"of shape \(n, K\), got \(0, 2\)"),
        ([[0.5, 0.5], [0.5, 0.4]], [0, 1], "row 1 is no distribution"),
        ([[1.5, -0.5]], [0], "row 0 is no distribution"),
        ([[np.nan, 1.0]], [0], "row 0 is no distribution"),
        ([[0.5, 0.5]], [0, 1], "expected 1 whole numbers as labels"),
        ([[0.5, 0.5]], [0.0], "whole numbers as labels, got float64"),
        ([[0.5, 0.5]], [2], "labels go from 2 to 2, but there are 2 classes"),
        ([[0.5, 0.5]], [-1], "labels go from -1 to -1"),
    ],
)
def test_bad_probabilities_and_labels_are_errors(p, y, message):
    for function in (ece, brier, nll, ece_interval):
        with pytest.raises(ValueError, match=message):
            function(p, y)


@pytest.mark.parametrize(
    ("confidence", "right", "message"),
    [
        ([], [], r"n ≥ 1; got \(0,\)"),
        ([0.5, 0.5], [1], "of one shape"),
        ([1.2], [1], r"go from 1\.2 to 1\.2, not 0 to 1"),
        ([np.nan], [1], "not 0 to 1"),
        ([0.5], [2], "true or false"),
    ],
)
def test_bad_confidences_and_outcomes_are_errors(confidence, right, message):
    for function in (reliability, decompose):
        with pytest.raises(ValueError, match=message):
            function(confidence, right)


def test_bad_options_are_errors():
    p, y = classifier(5)
    with pytest.raises(ValueError, match="bins is 0"):
        ece(p, y, 0)
    with pytest.raises(ValueError, match="no spacing 'quantile'"):
        ece(p, y, spacing="quantile")
    with pytest.raises(ValueError, match="no events 'all'"):
        ece(p, y, events="all")
    with pytest.raises(ValueError, match="must be positive, not 0"):
        temperature_scale(np.log(p), 0)
    with pytest.raises(ValueError, match="finite logits"):
        fit_temperature([[-np.inf, 0.0]], [1])
