"""The closed forms against autograd over whole vocabularies, and the known numbers."""

import math

import numpy as np
import pytest
import torch

from ftlib.caref import theory
from ftlib.caref.objective import CAREF, token_loss_of_logits
from ftlib.caref.theory import (
    kl_to_uniform,
    mass_below_uniform,
    pair_loss,
    pair_optima,
    sced,
    sced_shares,
    sced_slopes,
    sced_terms,
    settle,
    spike_loss,
    spike_peak,
    spike_sced,
    spike_stationary_points,
    zipf,
)
from ftlib.ops import TokenLoss
from ftlib.ops.reference import vocabulary_head_reference

V = 32128
ALPHA_BETA = [(1.0, 0.0), (1.0, 1.0), (2.0, 1.0), (1.5, 0.5), (2.5, 2.0)]
KL = TokenLoss(kl_to_uniform=0.1)
SCED = TokenLoss(sced=0.1)
HALF = TokenLoss(sced=0.05, kl_to_uniform=0.05)
EVERYTHING = TokenLoss(0.7, 0.2, -0.1, 0.0, 0.1, 0.1, 1.5, 0.5)


def draw(rows=20, columns=50, spread=3.0):
    logits = spread * np.random.default_rng(0).standard_normal((rows, columns))
    e = np.exp(logits - logits.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def of_reference(loss, probs):
    """The loss of each row of probabilities, by the specification of the head."""
    logits = torch.from_numpy(np.log(probs))
    targets = torch.zeros(len(logits), dtype=torch.long)
    identity = torch.eye(logits.shape[1], dtype=torch.float64)
    return vocabulary_head_reference(
        logits, identity, targets, loss=loss
    ).token_loss.numpy()


# --- SCED -------------------------------------------------------------------------


@pytest.mark.parametrize(("alpha", "beta"), ALPHA_BETA)
def test_values_are_those_of_the_loss(alpha, beta):
    probs = draw()
    expected = of_reference(TokenLoss(0.0, sced=1.0, alpha=alpha, beta=beta), probs)
    np.testing.assert_allclose(sced(probs, alpha, beta), expected, rtol=1e-10)
    expected = of_reference(TokenLoss(0.0, kl_to_uniform=1.0), probs)
    np.testing.assert_allclose(kl_to_uniform(probs), expected, rtol=1e-10)


@pytest.mark.parametrize(("alpha", "beta"), ALPHA_BETA)
def test_slopes_are_differences_of_values(alpha, beta):
    p = np.array([1e-6, 1e-4, 0.01, 0.3, 0.7, 0.99])
    h = 1e-6 * p
    above, below = (sced_terms(np.log(p + s), V, alpha, beta) for s in (h, -h))
    found = sced_slopes(np.log(p), V, alpha, beta)
    np.testing.assert_allclose(found, (above - below) / (2 * h), rtol=1e-6)


@pytest.mark.parametrize(("alpha", "beta"), ALPHA_BETA)
def test_the_two_zeros_of_sced(alpha, beta):
    uniform, certain = np.full(V, 1 / V), np.eye(1, V)[0]
    assert sced(uniform, alpha, beta) == pytest.approx(0, abs=1e-12)
    expected = math.log(V) ** alpha if beta == 0 else 0
    assert sced(certain, alpha, beta) == pytest.approx(expected, rel=1e-12)
    assert kl_to_uniform(certain) == pytest.approx(math.log(V), rel=1e-12)


def test_sced_1_0_is_not_the_divergence_but_has_twice_the_mass_below_uniform_more():
    probs = draw()
    below = mass_below_uniform(probs)
    np.testing.assert_allclose(
        sced(probs, 1, 0), kl_to_uniform(probs) + 2 * below, rtol=1e-12
    )
    assert (below > 0.02).all()
    assert (below < 1 / math.e).all()


def test_the_mass_below_uniform_comes_near_to_one_in_e():
    """All tokens but one, with 1/e of their uniform mass."""
    low = np.full(V, 1 / (V * math.e))
    low[0] = 1 - low[1:].sum()
    assert mass_below_uniform(low) == pytest.approx(1 / math.e, rel=1e-4)
    assert mass_below_uniform(low) < 1 / math.e


@pytest.mark.parametrize(
    ("p", "value"),
    [(0.1, 0.587), (0.5, 11.72), (0.9, 8.547), (0.99, 1.053), (0.999, 0.1075)],
)
def test_sced_of_a_spike(p, value):
    """The numbers are of the whole vector of 32,128."""
    probs = np.full(V, (1 - p) / (V - 1))
    probs[0] = p
    found = spike_sced(p, V)
    assert found == pytest.approx(sced(probs), rel=1e-10)
    assert found == pytest.approx(value, rel=1e-3)


def test_the_peak():
    peak = spike_peak(V)
    assert peak.probability == pytest.approx(0.6875, abs=1e-4)
    assert peak.sced == pytest.approx(14.779, abs=1e-3)
    grid = np.linspace(0.01, 0.99, 9801)
    values = spike_sced(grid, V)
    assert grid[values.argmax()] == pytest.approx(peak.probability, abs=1e-4)
    assert values.max() <= peak.sced


@pytest.mark.parametrize(("alpha", "beta"), [(2.0, 1.0), (1.5, 0.5), (2.5, 2.0)])
def test_the_peak_is_where_the_spikes_own_term_is_flat(alpha, beta):
    p = spike_peak(V, alpha, beta).probability
    left = alpha / p + alpha / (p * math.log(p * V))
    # The rest adds to it as V^(1−α).
    assert left == pytest.approx(beta / (1 - p), rel=1e-5 if alpha >= 2 else 1e-3)


@pytest.mark.parametrize(("top", "least"), [(0.5, 0.98), (0.9, 0.999)])
def test_the_top_token_carries_sced(top, least):
    probs = zipf(top, V)
    assert probs.sum() == pytest.approx(1, rel=1e-12)
    assert probs[1] / probs[10] == pytest.approx(10, rel=1e-12)
    shares = sced_shares(probs)
    assert shares.sum() == pytest.approx(1, rel=1e-12)
    assert shares[0] > least
    assert shares[0] == pytest.approx(
        (top * math.log(top * V)) ** 2 * (1 - top) / sced(probs), rel=1e-10
    )
    below = probs < 1 / V
    assert below.mean() > 0.9
    assert shares[below].sum() < 2e-7


# --- optima -----------------------------------------------------------------------


def losses_of_logits(loss, logits, q):
    """The expected loss and its gradient by all V logits, by autograd."""
    logits = torch.from_numpy(logits).requires_grad_()
    each = token_loss_of_logits(loss, logits.expand(2, -1), torch.tensor([0, 1]))
    value = q * each[0] + (1 - q) * each[1]
    value.backward()
    return value.item(), logits.grad.numpy()


def pair_logits(first, second, columns=V):
    logits = np.full(columns, math.log((1 - first - second) / (columns - 2)))
    logits[:2] = np.log([first, second])
    return logits


@pytest.mark.parametrize("loss", [CAREF, KL, SCED, EVERYTHING], ids=str)
@pytest.mark.parametrize("q", [0.7, 1.0])
def test_expected_losses_are_those_of_whole_distributions(loss, q):
    first, second = 0.5, 0.2
    expected, _ = losses_of_logits(loss, pair_logits(first, second), q)
    found = pair_loss(math.log(2.5), math.log(0.7 / 0.3), q, V, loss)
    assert found == pytest.approx(expected, rel=1e-10)
    spike = np.zeros(V)
    spike[0] = math.log(3 * (V - 1))
    expected, _ = losses_of_logits(loss, spike, 1.0)
    assert spike_loss(math.log(3), V, loss) == pytest.approx(expected, rel=1e-10)


def test_gradients_are_differences_of_losses():
    h = 1e-5
    for loss in (CAREF, EVERYTHING):
        for a, b in ((0.3, -1.0), (2.0, 3.0), (-4.0, 8.0)):
            found = theory._pair_gradient(np.array([a, b]), 0.7, V, loss)
            by_a = np.diff(pair_loss([a - h, a + h], b, 0.7, V, loss))
            by_b = np.diff(pair_loss(a, [b - h, b + h], 0.7, V, loss))
            expected = np.concatenate([by_a, by_b]) / (2 * h)
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-8)


def test_what_is_deterministic_has_two_optima_under_caref():
    diffuse, barrier, certain = spike_stationary_points(V, CAREF)
    assert [p.is_minimum for p in (diffuse, barrier, certain)] == [True, False, True]
    assert diffuse.probability == pytest.approx(0.259, abs=1e-3)
    assert barrier.probability == pytest.approx(0.670, abs=1e-3)
    # 1 − p = e⁻¹⁰⁷: where the divergence's log-odds equal CE's and SCED's slope.
    slope = 1 / 0.1 + math.log(V) ** 2
    assert certain.log_odds == pytest.approx(slope - math.log(V - 1), rel=1e-6)
    assert certain.loss < diffuse.loss < barrier.loss


def test_and_one_under_half_of_it():
    (only,) = spike_stationary_points(V, HALF)
    assert only.is_minimum
    assert only.log_odds > 100


def test_what_is_deterministic_without_the_divergence():
    diffuse, barrier = spike_stationary_points(V, SCED)
    assert diffuse.probability == pytest.approx(0.311, abs=1e-3)
    assert barrier.probability == pytest.approx(0.598, abs=1e-3)
    assert not barrier.is_minimum  # the loss falls from here to p = 1
    assert spike_stationary_points(V, TokenLoss()) == []


def test_optima_with_a_closed_form():
    (only,) = spike_stationary_points(V, KL)
    p = only.probability
    assert 0.1 * math.log((V - 1) * p / (1 - p)) == pytest.approx(1 / p, rel=1e-9)
    assert p == pytest.approx(0.834, abs=1e-3)
    smoothing = TokenLoss(label_smoothing=0.1)
    (only,) = spike_stationary_points(V, smoothing)
    assert only.probability == pytest.approx(0.9 + 0.1 / V, rel=1e-9)
    (only,) = pair_optima(0.7, V, smoothing)
    assert only.first == pytest.approx(0.63 + 0.1 / V, rel=1e-5)
    assert only.rest == pytest.approx(0.1 * (V - 2) / V, rel=1e-5)
    for q in (0.6, 0.9):
        (only,) = pair_optima(q, V, TokenLoss())
        assert only.first == pytest.approx(q, rel=1e-5)
        assert only.rest == pytest.approx(0, abs=1e-12)


PAIRS = {  # by loss and q: (first, second) of the optima, the lowest first
    (KL, 0.6): [(0.512, 0.353)],
    (KL, 0.9): [(0.750, 0.100)],
    (CAREF, 0.6): [(0.187, 0.146), (0.959, 0.041), (0.069, 0.931)],
    (CAREF, 0.7): [(0.206, 0.123), (0.970, 0.030), (0.086, 0.914)],
    (CAREF, 0.8): [(0.981, 0.019), (0.224, 0.097), (0.105, 0.895)],
    (CAREF, 0.9): [(0.991, 0.009), (0.241, 0.064), (0.131, 0.869)],
    (HALF, 0.7): [(0.940, 0.060), (0.328, 0.186)],
}


@pytest.mark.parametrize(("loss", "q"), PAIRS, ids=str)
def test_what_is_ambiguous(loss, q):
    """CE's optimum is q; SCED has one above it, and one that is sure of the wrong."""
    found = pair_optima(q, V, loss)
    assert [(o.first, o.second) for o in found] == [
        pytest.approx(pair, abs=6e-4) for pair in PAIRS[loss, q]
    ]
    assert [o.loss for o in found] == sorted(o.loss for o in found)


def test_optima_of_pairs_are_optima_of_whole_distributions():
    """Flat by all 32,128 logits, and lower than what lies around."""
    generator = np.random.default_rng(0)
    for optimum in pair_optima(0.7, V, CAREF):
        # A rest that is gone has no logits.
        first, second = ((1 - 1e-12) * p for p in optimum[:2])
        logits = pair_logits(first, second)
        value, gradient = losses_of_logits(CAREF, logits, 0.7)
        assert value == pytest.approx(optimum.loss, rel=1e-6)
        assert np.abs(gradient).max() < 1e-5
        for _ in range(5):
            moved = logits + 0.05 * generator.standard_normal(V)
            assert losses_of_logits(CAREF, moved, 0.7)[0] > value


def test_equal_tokens_have_mirrored_optima():
    found = pair_optima(0.5, V, CAREF)
    assert len(found) == 3
    mirrored = sorted((o.second, o.first) for o in found)
    assert sorted((o.first, o.second) for o in found) == [
        pytest.approx(pair, abs=1e-4) for pair in mirrored
    ]
    assert found[0].confidence == pytest.approx(0.5, abs=1e-4)


def test_what_has_no_optimum_is_refused():
    with pytest.raises(ValueError, match="z-loss"):
        spike_loss(0.0, V, TokenLoss(z_loss=1e-4))
    with pytest.raises(ValueError, match=r"q is 1\.0"):
        pair_optima(1.0, V, CAREF)


# --- descent ----------------------------------------------------------------------


@pytest.mark.parametrize("q", [0.6, 0.9])
def test_descent_ends_in_a_minimum(q):
    *pair, _ = settle([q, 1 - q], V, CAREF)
    optima = [(o.first, o.second) for o in pair_optima(q, V, CAREF)]
    distances = [np.abs(np.subtract(pair, o)).max() for o in optima]
    assert min(distances) < 1e-5


@pytest.mark.parametrize("loss", [KL, SCED, CAREF])
def test_descent_is_that_of_whole_logits(loss):
    """In small steps, and with every token of the rest on its own."""
    target, size = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), 40
    probs = torch.cat([0.99 * target, torch.full((size - 3,), 0.01 / (size - 3))])
    logits = probs.double().log()
    for _ in range(2500):
        logits = logits.detach().requires_grad_()
        rows = token_loss_of_logits(loss, logits.expand(3, -1), torch.arange(3))
        (gradient,) = torch.autograd.grad((target * rows).sum(), logits)
        logits = logits - 0.5 * gradient
    reached = logits.detach().softmax(-1).numpy()
    found = settle(target, size, loss)
    np.testing.assert_allclose(found[:3], reached[:3], atol=2e-3)
    np.testing.assert_allclose(found[3], reached[3:], atol=2e-3)


@pytest.mark.parametrize("target", [[0.5, 0.4], [1.0, 0.0], [0.25] * 4])
def test_descent_refuses_what_is_no_choice_among_few(target):
    with pytest.raises(ValueError, match="fewer than 4 tokens"):
        settle(target, 4, CAREF)
