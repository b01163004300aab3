"""Calibration of class probabilities: does what is given 70 % happen 70 % of the time?

All functions take probabilities [n, K] and labels [n], or confidences [n] and whether
each was right [n], and compute in float64.

The expected calibration error (ECE) is not a mean over items, and it is never zero on a
finite sample, however good the model. Compare it with :func:`ece_if_calibrated` of the
same probabilities. The Brier score and the NLL are means over items, and proper: the
true probabilities minimise them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from ftlib.results import Interval, bootstrap

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
Spacing = Literal["width", "mass"]
Events = Literal["top", "classwise"]

_RESAMPLES = 1000
_MARGIN = 1e-4  # what a row's sum may miss 1 by: float32 makes less, bf16 more
_TEMPERATURES = (1e-2, 1e2)


class Reliability(NamedTuple):
    """A reliability curve: its bins that are not empty, in ascending order.

    Attributes:
        confidence: mean confidence, [b].
        accuracy: share that was right, [b].
        items: how many, [b].
    """

    confidence: Floats
    accuracy: Floats
    items: Integers


class Decomposition(NamedTuple):
    """A binary Brier score: reliability − resolution + uncertainty + within.

    Attributes:
        reliability: mean squared distance of confidence and accuracy of the bins;
            0 if calibrated.
        resolution: variance of the bins' accuracy; the higher, the better.
        uncertainty: variance of the outcomes, which no model can change.
        within: what confidences that differ within a bin add; 0 if none do.
    """

    reliability: float
    resolution: float
    uncertainty: float
    within: float


def reliability(
    confidence: npt.ArrayLike,
    right: npt.ArrayLike,
    bins: int = 15,
    spacing: Spacing = "width",
) -> Reliability:
    """Bin confidences, and compare their mean with the share that was right.

    Bins are closed at their upper end, as in Guo et al. (2017). Equal confidences fall
    into one bin, also with bins of equal mass, whose edges are quantiles.

    Args:
        confidence: from 0 to 1, [n].
        right: true or false, [n].
        bins: their number, 1 or more.
        spacing: bins of equal ``width``, or of equal ``mass``.

    Raises:
        ValueError: the arrays or the options are not as above.
    """
    confidence, right = _binary(confidence, right)
    inner = _inner_edges(confidence, bins, spacing)
    index = np.searchsorted(inner, confidence)
    items = np.bincount(index, minlength=bins)
    filled = items > 0
    items = items[filled]
    return Reliability(
        np.bincount(index, confidence, minlength=bins)[filled] / items,
        np.bincount(index, right, minlength=bins)[filled] / items,
        items,
    )


def ece(
    probabilities: npt.ArrayLike,
    labels: npt.ArrayLike,
    bins: int = 15,
    spacing: Spacing = "width",
    events: Events = "top",
) -> float:
    """Return the expected calibration error, ``Σ n_b/n · |accuracy − confidence|``.

    The sum goes over the bins.

    Args:
        probabilities: [n, K]; rows sum to 1.
        labels: classes from 0 to K − 1, [n].
        bins: number of bins.
        spacing: bins of equal ``width``, or of equal ``mass``.
        events: ``top`` asks whether the most probable class is right; ``classwise``
            asks it of every class, with bins of its own, and takes the mean (Kumar et
            al. 2019).

    Raises:
        ValueError: the arrays or the options are not as above.

    >>> round(ece([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7]], [0, 1, 1]), 3)
    0.4
    """
    return _ece(*_checked(probabilities, labels), bins, spacing, events)


def ece_interval(
    probabilities: npt.ArrayLike,
    labels: npt.ArrayLike,
    bins: int = 15,
    spacing: Spacing = "width",
    events: Events = "top",
    seed: int = 0,
) -> Interval:
    """Return the ECE with the 95 % percentile interval over resampled items.

    A resample repeats items, which makes its ECE larger on average: where the ECE is
    small, it may lie below its own interval. One item has no interval, see
    :func:`ftlib.results.bootstrap`.

    Args:
        probabilities: [n, K].
        labels: [n].
        bins: number of bins.
        spacing: see :func:`ece`.
        events: see :func:`ece`.
        seed: of the resampling.

    Raises:
        ValueError: as :func:`ece`.
    """
    p, y = _checked(probabilities, labels)
    rng = np.random.default_rng(seed)

    def resampled() -> float:
        rows = rng.integers(len(y), size=len(y))
        return _ece(p[rows], y[rows], bins, spacing, events)

    value = _ece(p, y, bins, spacing, events)
    if len(y) == 1:
        return Interval(value, float("nan"), float("nan"), 1)
    return _interval(value, _draw(resampled), len(y))


def ece_if_calibrated(
    probabilities: npt.ArrayLike,
    bins: int = 15,
    spacing: Spacing = "width",
    events: Events = "top",
    seed: int = 0,
) -> Interval:
    """Return the ECE that these probabilities would have if all of them were true.

    Labels are drawn from the probabilities (consistency resampling, Bröcker and Smith
    2007). An ECE within the interval is no evidence of miscalibration.

    Args:
        probabilities: [n, K].
        bins: number of bins.
        spacing: see :func:`ece`.
        events: see :func:`ece`.
        seed: of the labels.

    Returns:
        The mean, and the middle 95 %, over 1000 drawn labellings.

    Raises:
        ValueError: as :func:`ece`.
    """
    p = _rows(probabilities)
    rng = np.random.default_rng(seed)
    cumulated = p.cumsum(1)
    cumulated /= cumulated[:, -1:]

    def drawn() -> float:
        labels = (rng.random((len(p), 1)) >= cumulated).sum(1)
        return _ece(p, labels, bins, spacing, events)

    values = _draw(drawn)
    return _interval(float(values.mean()), values, len(p))


def brier(
    probabilities: npt.ArrayLike, labels: npt.ArrayLike, seed: int = 0
) -> Interval:
    """Return the Brier score of K classes, from 0 to 2, with its bootstrap interval.

    It is the mean over items of Σ_k (p_k − 1[k = y])². With two classes it is twice
    the binary score.

    Args:
        probabilities: [n, K]; rows sum to 1.
        labels: classes from 0 to K − 1, [n].
        seed: of the resampling.

    Raises:
        ValueError: the arrays are not as above.
    """
    p, y = _checked(probabilities, labels)
    return bootstrap(np.square(p - np.eye(p.shape[1])[y]).sum(1), seed=seed)


def nll(probabilities: npt.ArrayLike, labels: npt.ArrayLike, seed: int = 0) -> Interval:
    """Return the mean negative log-likelihood in nats, with its bootstrap interval.

    A label of probability 0 makes it infinite, which
    :func:`ftlib.results.bootstrap` turns into NaN.

    Args:
        probabilities: [n, K]; rows sum to 1.
        labels: classes from 0 to K − 1, [n].
        seed: of the resampling.

    Raises:
        ValueError: the arrays are not as above.
    """
    p, y = _checked(probabilities, labels)
    with np.errstate(divide="ignore"):
        return bootstrap(-np.log(p[np.arange(len(y)), y]), seed=seed)


def decompose(
    confidence: npt.ArrayLike,
    right: npt.ArrayLike,
    bins: int = 15,
    spacing: Spacing = "width",
) -> Decomposition:
    """Split the binary Brier score, mean (confidence − right)², into its parts.

    The first three are Murphy's (1973), over bins in place of single confidences; the
    fourth makes the sum exact (Stephenson et al. 2008).

    Args:
        confidence: from 0 to 1, [n].
        right: true or false, [n].
        bins: number of bins.
        spacing: see :func:`reliability`.

    Raises:
        ValueError: as :func:`reliability`.
    """
    c, r = _binary(confidence, right)
    curve = reliability(c, r, bins, spacing)
    share = curve.items / len(c)
    rate = r.mean()
    calibration = float(share @ np.square(curve.confidence - curve.accuracy))
    resolution = float(share @ np.square(curve.accuracy - rate))
    uncertainty = float(rate * (1 - rate))
    score = float(np.square(c - r).mean())
    within = score - (calibration - resolution + uncertainty)
    return Decomposition(calibration, resolution, uncertainty, within)


def fit_temperature(logits: npt.ArrayLike, labels: npt.ArrayLike) -> float:
    """Fit the temperature that minimises the NLL of validation data.

    The NLL is convex in 1/T, so its minimum is the only one. It is looked for between
    0.01 and 100, and where it lies outside (all labels right, say, whose best T is 0),
    the nearer end is returned.

    Args:
        logits: or logarithms of probabilities, finite, [n, K].
        labels: classes from 0 to K − 1, [n].

    Raises:
        ValueError: the arrays are not as above.
    """
    from scipy.optimize import brentq

    z = _logits(logits)
    y = _labels(labels, z.shape)
    chosen = z[np.arange(len(y)), y]

    def slope(log_temperature: float) -> float:
        """Derivative of the NLL by 1/T: expected minus observed logit."""
        p = temperature_scale(z, float(np.exp(log_temperature)))
        return float((p * z).sum(1).mean() - chosen.mean())

    cold, hot = np.log(_TEMPERATURES)
    if slope(cold) <= 0:
        return _TEMPERATURES[0]
    if slope(hot) >= 0:
        return _TEMPERATURES[1]
    return float(np.exp(brentq(slope, cold, hot, xtol=1e-10)))


def temperature_scale(logits: npt.ArrayLike, temperature: float) -> Floats:
    """Return softmax(logits / T), [n, K].

    Args:
        logits: or logarithms of probabilities, finite, [n, K].
        temperature: T; above 1 it lowers confidence. The order of the classes stays.

    Raises:
        ValueError: the logits are not as above, or the temperature is not positive.
    """
    if not 0 < temperature < np.inf:
        raise ValueError(f"the temperature must be positive, not {temperature}")
    z = _logits(logits)
    weights = np.exp((z - z.max(1, keepdims=True)) / temperature)
    scaled: Floats = weights / weights.sum(1, keepdims=True)
    return scaled


def _ece(p: Floats, y: Integers, bins: int, spacing: Spacing, events: Events) -> float:
    if events == "top":
        top = p.argmax(1)
        return _gap(p[np.arange(len(y)), top], top == y, bins, spacing)
    if events == "classwise":
        columns = range(p.shape[1])
        gaps = [_gap(p[:, k], y == k, bins, spacing) for k in columns]
        return float(np.mean(gaps))
    raise ValueError(f"no events {events!r}: choose top or classwise")


def _gap(
    confidence: Floats, right: npt.NDArray[np.bool_], bins: int, spacing: Spacing
) -> float:
    curve = reliability(confidence, right, bins, spacing)
    gaps = np.abs(curve.accuracy - curve.confidence)
    return float(curve.items @ gaps / len(confidence))


def _inner_edges(confidence: Floats, bins: int, spacing: Spacing) -> Floats:
    """Edges between neighbouring bins, [bins − 1]."""
    if bins < 1:
        raise ValueError(f"bins is {bins}: give 1 or more")
    levels = np.linspace(0, 1, bins + 1)[1:-1]
    if spacing == "width":
        return levels
    if spacing == "mass":
        edges: Floats = np.quantile(confidence, levels)
        return edges
    raise ValueError(f"no spacing {spacing!r}: choose width or mass")


def _draw(statistic: Callable[[], float]) -> Floats:
    return np.array([statistic() for _ in range(_RESAMPLES)])


def _interval(value: float, draws: Floats, n: int) -> Interval:
    low, high = np.quantile(draws, (0.025, 0.975)).tolist()
    return Interval(value, low, high, n)


def _checked(
    probabilities: npt.ArrayLike, labels: npt.ArrayLike
) -> tuple[Floats, Integers]:
    p = _rows(probabilities)
    return p, _labels(labels, p.shape)


def _rows(probabilities: npt.ArrayLike) -> Floats:
    p = np.asarray(probabilities, np.float64)
    if p.ndim != 2 or 0 in p.shape:
        raise ValueError(f"expected probabilities of shape (n, K), got {p.shape}")
    sums = p.sum(1)
    wrong = ~((p >= 0).all(1) & (np.abs(sums - 1) <= _MARGIN))  # NaN is wrong too
    if wrong.any():
        row = int(wrong.argmax())
        raise ValueError(
            f"row {row} is no distribution: its least value is {p[row].min()} and its "
            f"sum {sums[row]}; give probabilities, computed in float32 or wider"
        )
    return p


def _logits(logits: npt.ArrayLike) -> Floats:
    z = np.asarray(logits, np.float64)
    if z.ndim != 2 or 0 in z.shape or not np.isfinite(z).all():
        raise ValueError(f"expected finite logits of shape (n, K), got {z.shape}")
    return z


def _labels(labels: npt.ArrayLike, shape: tuple[int, ...]) -> Integers:
    y = np.asarray(labels)
    if y.shape != shape[:1] or y.dtype.kind not in "iu":
        raise ValueError(
            f"expected {shape[0]} whole numbers as labels, got {y.dtype} {y.shape}"
        )
    if y.min() < 0 or y.max() >= shape[1]:
        raise ValueError(
            f"labels go from {y.min()} to {y.max()}, but there are {shape[1]} classes"
        )
    return y.astype(np.int64)


def _binary(confidence: npt.ArrayLike, right: npt.ArrayLike) -> tuple[Floats, Floats]:
    c, r = np.asarray(confidence, np.float64), np.asarray(right, np.float64)
    if c.ndim != 1 or c.shape != r.shape or not c.size:
        raise ValueError(
            f"expected confidences and outcomes of one shape (n,), n ≥ 1; got "
            f"{c.shape} and {r.shape}"
        )
    if not ((c >= 0) & (c <= 1)).all():
        raise ValueError(f"confidences go from {c.min()} to {c.max()}, not 0 to 1")
    if not np.isin(r, (0, 1)).all():
        raise ValueError("the outcomes must be true or false, or 1 or 0")
    return c, r
