r"""What CAREF's terms do to one distribution, in closed form: the chapter's figures.

One position, V tokens, p over them, U = 1/V. Everything is float64 and works with
log p, so that probabilities of 1 − e⁻¹⁰⁰, which SCED does lead to, can be told from 1.

Three things follow from SCED's definition, ``f(p) = |p log(pV)|^α (1−p)^β`` summed over
the tokens, that are easily taken for something else:

* (1, 0) is not the divergence from uniform but KL + 2N,
  ``N = Σ_{p<U} |p log(pV)| ≤ 1/e`` (:func:`mass_below_uniform`): what lies below U
  counts with the other sign.
* With β > 0 it is 0 at the uniform distribution and at every one-hot one. Between them
  lies a ridge (:func:`spike_peak`): on this side SCED makes a model less sure, beyond
  it surer.
* The factor (1−p)^β does not turn it to the tail, where ``|p log(pV)|^α`` has
  vanished already: nearly all of it is the top token's (:func:`sced_shares`).

What a model trained to convergence on many examples predicts is the minimum over p of
the expected loss (the *population optimum*). It is sought among distributions in which
one token (a *spike*) or two (a *pair*) stand out, and the others share the rest
equally. With a divergence from uniform in the loss, a local minimum among these is one
among all distributions, because p log p bends more at a small p than SCED does. With
SCED alone the rest is held equal by assumption.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.integrate import solve_ivp
from scipy.optimize import brentq, minimize, minimize_scalar
from scipy.special import expit, log_expit, logsumexp

from ftlib.ops import TokenLoss

Array = NDArray[np.float64]

# Log-odds at which optima are sought. CAREF's saturated one is at 107; from 700 on,
# 1 − p would underflow.
_LARGEST_LOG_ODDS = 600.0
_GRID_STEP = 0.05
# The pair's log-odds against the rest: beyond this nothing is left that float64 could
# see in a loss of order one.
_LARGEST_PAIR_LOG_ODDS = 30.0
_PAIR_GRID_STEP = 0.25
# Of gradient flow: by then it has settled, but for what CE alone takes from the rest.
_LONG = 1e6


# --- SCED -----------------------------------------------------------------------------


def sced_terms(
    log_p: ArrayLike, vocabulary: int, alpha: float = 2.0, beta: float = 1.0
) -> Array:
    """Return ``f(p) = |p log(pV)|^α (1−p)^β`` of each token, shaped as ``log_p``."""
    u = np.asarray(log_p, dtype=np.float64)
    distance = np.exp(u) * (u + math.log(vocabulary))
    return np.abs(distance) ** alpha * (-np.expm1(u)) ** beta


def sced_slopes(
    log_p: ArrayLike, vocabulary: int, alpha: float = 2.0, beta: float = 1.0
) -> Array:
    """Return f'(p) of each token, shaped as ``log_p``, which must be below 0."""
    u = np.asarray(log_p, dtype=np.float64)
    stretch = u + math.log(vocabulary)
    distance, complement = np.exp(u) * stretch, -np.expm1(u)
    size = np.abs(distance)
    growth = alpha * size ** (alpha - 1) * np.sign(distance) * (stretch + 1)
    decay = beta * size**alpha * complement ** (beta - 1)
    return growth * complement**beta - decay


def sced(probs: ArrayLike, alpha: float = 2.0, beta: float = 1.0) -> Array:
    """Return Σ f(p) over the last dimension of probabilities (..., V)."""
    probs = np.asarray(probs, dtype=np.float64)
    return sced_terms(_log(probs), probs.shape[-1], alpha, beta).sum(-1)


def kl_to_uniform(probs: ArrayLike) -> Array:
    """Return Σ p log(pV) over the last dimension of probabilities (..., V)."""
    probs = np.asarray(probs, dtype=np.float64)
    return (probs * (_log(probs) + math.log(probs.shape[-1]))).sum(-1)


def mass_below_uniform(probs: ArrayLike) -> Array:
    """Return ``N = Σ_{p<1/V} |p log(pV)|`` of probabilities (..., V).

    SCED at (1, 0) is KL + 2N. N is less than 1/e: n tokens that share the mass m below
    their n/V have N = m log(n/(Vm)), which is largest at m = n/(Ve).
    """
    probs = np.asarray(probs, dtype=np.float64)
    terms = probs * (_log(probs) + math.log(probs.shape[-1]))
    return -np.minimum(terms, 0).sum(-1)


def sced_shares(probs: ArrayLike, alpha: float = 2.0, beta: float = 1.0) -> Array:
    """Return the share of each token, shape (V,), in the SCED of probabilities (V,)."""
    probs = np.asarray(probs, dtype=np.float64)
    terms = sced_terms(_log(probs), len(probs), alpha, beta)
    return terms / terms.sum()


def zipf(top: float, vocabulary: int, exponent: float = 1.0) -> Array:
    """Return V probabilities: one of ``top``, and a Zipf tail.

    Args:
        top: probability of the first token.
        vocabulary: V.
        exponent: the tail's k-th token has a probability in proportion to 1/k^exponent.
    """
    tail = np.arange(1, vocabulary, dtype=np.float64) ** -exponent
    return np.concatenate([[top], (1 - top) * tail / tail.sum()])


def _log(probs: Array) -> Array:
    """Return log p, and the smallest number where p is 0: p log p is 0 then too."""
    with np.errstate(divide="ignore"):
        return np.maximum(np.log(probs), np.finfo(np.float64).min)


# --- one token stands out --------------------------------------------------------


class Peak(NamedTuple):
    """Where SCED of a spike is largest.

    Attributes:
        probability: of the spike.
        sced: there.
    """

    probability: float
    sced: float


def spike_sced(
    probability: ArrayLike, vocabulary: int, alpha: float = 2.0, beta: float = 1.0
) -> Array:
    """Return SCED of one token's probability and a uniform rest."""
    p = np.asarray(probability, dtype=np.float64)
    rest = _log((1 - p) / (vocabulary - 1))
    terms = sced_terms(_log(p), vocabulary, alpha, beta)
    return terms + (vocabulary - 1) * sced_terms(rest, vocabulary, alpha, beta)


def spike_peak(vocabulary: int, alpha: float = 2.0, beta: float = 1.0) -> Peak:
    """Return the ridge of :func:`spike_sced` above 1/V.

    Near it, α/p + α/(p log pV) = β/(1−p): that is f'(p) = 0, and the rest adds to it
    only as V^(1−α).
    """
    found = minimize_scalar(
        lambda p: -spike_sced(p, vocabulary, alpha, beta),
        bounds=(1 / vocabulary, 1),
        method="bounded",
        options={"xatol": 1e-10},
    )
    return Peak(float(found.x), float(-found.fun))


def spike_loss(log_odds: ArrayLike, vocabulary: int, loss: TokenLoss) -> Array:
    """Return the loss of a spike whose token is always the target.

    Args:
        log_odds: log(p/(1−p)) of the spike.
        vocabulary: V.
        loss: of a token; without a z-loss, which is not a function of p.
    """
    z = np.asarray(log_odds, dtype=np.float64)
    counts = np.array([1.0, vocabulary - 1.0])
    return _loss(_spike(z, vocabulary), counts, np.array([1.0]), loss)


class Stationary(NamedTuple):
    """Where the loss of a spike is flat.

    Attributes:
        log_odds: log(p/(1−p)).
        loss: there.
        is_minimum: whether it is a minimum, or the barrier between two.
    """

    log_odds: float
    loss: float
    is_minimum: bool

    @property
    def probability(self) -> float:
        """The spike's p."""
        return float(expit(self.log_odds))


def spike_stationary_points(vocabulary: int, loss: TokenLoss) -> list[Stationary]:
    """Return the minima of :func:`spike_loss` and the barriers between them.

    They alternate, in the order of p. A loss that falls all the way to p = 1, as the
    cross-entropy does, has none there: one in which the last point is no minimum has
    its optimum at p = 1.
    """
    grid = np.arange(-math.log(vocabulary), _LARGEST_LOG_ODDS, _GRID_STEP)
    slopes = _spike_slope(grid, vocabulary, loss)
    points = []
    for i in np.flatnonzero(np.sign(slopes[:-1]) * np.sign(slopes[1:]) < 0):
        root = brentq(
            lambda z: float(_spike_slope(z, vocabulary, loss)), grid[i], grid[i + 1]
        )
        value = float(spike_loss(root, vocabulary, loss))
        points.append(Stationary(float(root), value, bool(slopes[i] < 0)))
    return points


def _spike(log_odds: Array, vocabulary: int) -> Array:
    """Return log p of the spike and of a token of the rest, (..., 2)."""
    rest = log_expit(-log_odds) - math.log(vocabulary - 1)
    return np.stack([log_expit(log_odds), rest], axis=-1)


def _spike_slope(log_odds: ArrayLike, vocabulary: int, loss: TokenLoss) -> Array:
    """Return the derivative of :func:`spike_loss` by p."""
    log_p = _spike(np.asarray(log_odds, dtype=np.float64), vocabulary)
    slopes = _slopes(log_p, vocabulary, np.array([1.0]), loss)
    return slopes[..., 0] - slopes[..., 1]


# --- two tokens stand out --------------------------------------------------------


class Optimum(NamedTuple):
    """A local minimum of the expected loss over pairs.

    Attributes:
        first: probability of the token that is the target with probability q.
        second: of the token that is it otherwise.
        loss: the expected loss.
    """

    first: float
    second: float
    loss: float

    @property
    def rest(self) -> float:
        """Probability of all other tokens together."""
        return max(0.0, 1 - self.first - self.second)

    @property
    def confidence(self) -> float:
        """The share of the first token in the pair, to be compared with q."""
        return self.first / (self.first + self.second)


def pair_loss(
    log_odds: ArrayLike,
    pair_log_odds: ArrayLike,
    q: float,
    vocabulary: int,
    loss: TokenLoss,
) -> Array:
    """Return the expected loss of a pair, one of which is the target.

    Args:
        log_odds: log(p₁/p₂).
        pair_log_odds: log((p₁+p₂)/(1−p₁−p₂)).
        q: probability that the first token is the target.
        vocabulary: V.
        loss: of a token; without a z-loss.
    """
    a, b = np.broadcast_arrays(
        np.asarray(log_odds, dtype=np.float64),
        np.asarray(pair_log_odds, dtype=np.float64),
    )
    counts = np.array([1.0, 1.0, vocabulary - 2.0])
    return _loss(_pair(a, b, vocabulary), counts, np.array([q, 1 - q]), loss)


def pair_optima(q: float, vocabulary: int, loss: TokenLoss) -> list[Optimum]:
    """Return the local minima of :func:`pair_loss`, the lowest first.

    They are sought on a grid and then followed down. Where the rest has less than
    1e-13, it is taken as gone.

    Args:
        q: probability that the first token is the target, in (0, 1).
        vocabulary: V.
        loss: of a token; without a z-loss.
    """
    if not 0 < q < 1:
        raise ValueError(f"q is {q}: give a probability between 0 and 1")
    ratios = np.arange(-15, 15 + _PAIR_GRID_STEP, _PAIR_GRID_STEP)
    pairs = np.arange(
        -math.log(vocabulary), _LARGEST_PAIR_LOG_ODDS + 0.01, _PAIR_GRID_STEP
    )
    values = pair_loss(ratios[:, None], pairs[None, :], q, vocabulary, loss)
    bounds = [(ratios[0], ratios[-1]), (pairs[0], pairs[-1])]
    found: list[Optimum] = []
    for i, j in zip(*np.nonzero(_is_local_minimum(values)), strict=True):
        result = minimize(
            lambda at: float(pair_loss(at[0], at[1], q, vocabulary, loss)),
            [ratios[i], pairs[j]],
            jac=lambda at: _pair_gradient(at, q, vocabulary, loss),
            bounds=bounds,
            method="L-BFGS-B",
            options={"ftol": 0, "gtol": 1e-10},
        )
        first, second, _ = np.exp(_pair(result.x[0], result.x[1], vocabulary))
        found.append(Optimum(float(first), float(second), float(result.fun)))
    return _distinct(sorted(found, key=lambda optimum: optimum.loss))


def _pair(log_odds: Array, pair_log_odds: Array, vocabulary: int) -> Array:
    """Return log p of both tokens and of one of the rest, (..., 3)."""
    pair, rest = log_expit(pair_log_odds), log_expit(-pair_log_odds)
    return np.stack(
        [
            log_expit(log_odds) + pair,
            log_expit(-log_odds) + pair,
            rest - math.log(vocabulary - 2),
        ],
        axis=-1,
    )


def _pair_gradient(at: Array, q: float, vocabulary: int, loss: TokenLoss) -> Array:
    """Return the gradient of :func:`pair_loss` by the two log-odds, shape (2,)."""
    log_p = _pair(at[0], at[1], vocabulary)
    first, second, rest = _slopes(log_p, vocabulary, np.array([q, 1 - q]), loss)
    share, other = expit(at[0]), expit(-at[0])
    pair, gone = expit(at[1]), expit(-at[1])
    return np.array(
        [
            pair * share * other * (first - second),
            pair * gone * (share * first + other * second - rest),
        ]
    )


def _is_local_minimum(values: Array) -> NDArray[np.bool_]:
    """Say which entries of a matrix no neighbour is below."""
    walled = np.pad(values, 1, constant_values=np.inf)
    rows, columns = values.shape
    neighbours = [
        walled[i : i + rows, j : j + columns]
        for i in range(3)
        for j in range(3)
        if (i, j) != (1, 1)
    ]
    return (values <= np.min(neighbours, axis=0)).astype(np.bool_)


def _distinct(optima: list[Optimum]) -> list[Optimum]:
    """Keep the first of those whose probabilities agree to 1e-4."""
    kept: list[Optimum] = []
    for one in optima:
        if all(
            abs(one.first - other.first) + abs(one.second - other.second) > 1e-4
            for other in kept
        ):
            kept.append(one)
    return kept


def settle(target: ArrayLike, vocabulary: int, loss: TokenLoss) -> Array:
    """Return where gradient descent on the logits leads from the right distribution.

    It starts at ``target``, but for one percent that the rest shares equally. Its steps
    are infinitely small (gradient flow), since large ones may jump over a barrier.

    Args:
        target: how often each of the first K tokens is right, (K,); sums to 1.
        vocabulary: V.
        loss: of a token; without a z-loss.

    Returns:
        Probabilities of the K tokens and of one of the rest, (K + 1,).

    Raises:
        ValueError: the target is not a distribution over fewer than V tokens.
    """
    chances = np.asarray(target, dtype=np.float64)
    others = vocabulary - len(chances)
    if others < 1 or chances.min() <= 0 or not math.isclose(chances.sum(), 1):
        raise ValueError(
            f"target is {chances}: give positive chances of fewer than {vocabulary}"
            " tokens that sum to 1"
        )
    counts = np.append(np.ones_like(chances), others)

    def descent(_: float, z: Array) -> Array:
        log_p = z - logsumexp(z, b=counts)
        p, slopes = np.exp(log_p), _slopes(log_p, vocabulary, chances, loss)
        return np.asarray(-p * (slopes - (counts * p * slopes).sum()))

    start = np.log(np.append(0.99 * chances, 0.01 / others))
    path = solve_ivp(descent, (0, _LONG), start, "LSODA", rtol=1e-8, atol=1e-8)
    z = path.y[:, -1]
    return np.asarray(np.exp(z - logsumexp(z, b=counts)))


# --- the expected loss, and its slope ----------------------------------------------


def _targets(target: Array, loss: TokenLoss, vocabulary: int) -> Array:
    """Return each listed token's expected target, and a rest token's, smoothed."""
    if loss.z_loss:
        raise ValueError("a z-loss is a function of logits, not of probabilities")
    smoothing = loss.label_smoothing
    return (1 - smoothing) * np.append(target, 0.0) + smoothing / vocabulary


def _loss(log_p: Array, counts: Array, target: Array, loss: TokenLoss) -> Array:
    """Return the expected loss of distributions given by groups of equal tokens.

    Args:
        log_p: of a token of each group, (..., K + 1); the last group is the rest.
        counts: tokens in each group, (K + 1,).
        target: probability of each of the first K groups to hold the target.
        loss: of a token.
    """
    vocabulary = int(counts.sum())
    expected = _targets(target, loss, vocabulary)
    entropy = -np.exp(log_p) * log_p
    each = (
        -loss.cross_entropy * expected * log_p
        + (loss.entropy - loss.kl_to_uniform) * entropy
        + loss.sced * sced_terms(log_p, vocabulary, loss.alpha, loss.beta)
    )
    return (counts * each).sum(-1) + loss.kl_to_uniform * math.log(vocabulary)


def _slopes(log_p: Array, vocabulary: int, target: Array, loss: TokenLoss) -> Array:
    """Return the derivative of the loss by the probability of one token, each group."""
    expected = _targets(target, loss, vocabulary)
    # Of a token that is never the target, 0/p; its p may be too small to divide by.
    with np.errstate(over="ignore"):
        pull = np.where(expected > 0, expected * np.exp(-log_p), 0.0)
    return (
        -loss.cross_entropy * pull
        + (loss.kl_to_uniform - loss.entropy) * (log_p + 1)
        + loss.sced * sced_slopes(log_p, vocabulary, loss.alpha, loss.beta)
    )
