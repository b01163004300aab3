r"""The equations of CGM: violation, relax loss, reward loss, forward-KL baseline.

Notation, with n samples and d constraints:

* ``h`` [n, d]: the statistics of the samples; ``target`` [d]: the value their mean
  is to take;
* ``log_ratio`` [n]: log p_θ(x_i) − log p_base(x_i), without gradient;
* ``strata`` [n] (integer, optional): which prompt each sample answers, where the
  prompts of a batch are dealt out in fixed numbers instead of drawn.

Nothing is differentiated through the sampler or through h. Every loss is estimated
by its *coefficients* c_i, the weights its gradient puts on the scores,

    ∇L ≈ Σ_i c_i ∇ log p_θ(x_i),

and :func:`surrogate` turns coefficients into a scalar with that gradient.
Where nothing else is said the equations are those of arXiv 2510.10020 or of its
reference code; what is ours is marked.
"""

from __future__ import annotations

import torch
from torch import Tensor


def violation(h: Tensor, target: Tensor, strata: Tensor | None = None) -> Tensor:
    """Estimate ‖E[h] − target‖² without bias.

    The U-statistic Σ_{i≠j} y_i·y_j / (n(n−1)) with y = h − target. It is negative in
    more than half of the batches of a calibrated model: never take its root.

    Args:
        h: statistics, float [n, d].
        target: float [d].
        strata: integer [n]; pairs are then weighted so that the estimate stays
            unbiased when every stratum has a fixed number of samples (ours).

    Returns:
        A scalar of h's dtype.

    Raises:
        ValueError: a batch, or a stratum, of fewer than two samples.
    """
    y = h - target
    return (y * companion_mean(y, strata)).sum(-1).mean()


def plug_in_violation(h: Tensor, target: Tensor) -> Tensor:
    """Return ‖mean(h) − target‖², too large by tr Cov(h)/n on average."""
    return (h.mean(0) - target).square().sum()


def companion_mean(y: Tensor, strata: Tensor | None = None) -> Tensor:
    """Estimate E[y] for every sample from the other samples alone, float [n, d].

    Without strata this is the mean of the others. With strata of m_k samples each,
    the sample's own stratum enters with its share m_k/n, estimated from its other
    m_k − 1 samples. The paper's code ignores the strata, which shrinks the violation
    by (n − K)/(n − 1) when each of K prompts has a constraint of its own.
    """
    n = len(y)
    total, size = _own_stratum(y, strata, at_least=2)
    others = y.sum(0) - total
    return (others + size / (size - 1) * (total - y)) / n


def violation_coefficients(
    h: Tensor,
    target: Tensor,
    strata: Tensor | None = None,
    *,
    baseline: bool = False,
) -> Tensor:
    """Coefficients [n] of the gradient of :func:`violation`: (2/n) y_i · companion_i.

    Args:
        h: float [n, d].
        target: float [d].
        strata: integer [n] or None.
        baseline: subtract from c_i what the other samples predict for it. That
            leaves the mean gradient as it is and lowers its variance. The paper's
            code has no such term here; its successor kCGM does.

    Raises:
        ValueError: fewer than two samples in a stratum (three with a baseline).
    """
    y = h - target
    value = (y * companion_mean(y, strata)).sum(-1)
    if baseline:
        value = value - _predicted_by_others(y, strata)
    return 2 / len(y) * value


def kl_coefficients(log_ratio: Tensor) -> Tensor:
    """Coefficients [n] of the gradient of KL(p_θ‖p_base), leave-one-out baseline.

    Raises:
        ValueError: a batch of fewer than two samples.
    """
    n = len(log_ratio)
    _require(n, 2, "the batch")
    return (log_ratio - log_ratio.mean()) / (n - 1)


def relax_loss(
    log_prob: Tensor,
    log_base: Tensor,
    h: Tensor,
    target: Tensor,
    kl_weight: float,
    strata: Tensor | None = None,
    *,
    violation_baseline: bool = False,
) -> Tensor:
    """CGM-relax: ‖E[h] − target‖² + λ KL(p_θ‖p_base).

    Args:
        log_prob: log p_θ(x_i), float [n], with gradient.
        log_base: log p_base(x_i), float [n].
        h: float [n, d].
        target: float [d].
        kl_weight: λ.
        strata: integer [n] or None.
        violation_baseline: see :func:`violation_coefficients`.

    Returns:
        A scalar, the loss's unbiased estimate, with its unbiased gradient.
    """
    log_ratio = (log_prob - log_base).detach()
    constraint = violation_coefficients(h, target, strata, baseline=violation_baseline)
    coefficients = constraint + kl_weight * kl_coefficients(log_ratio)
    value = violation(h, target, strata) + kl_weight * log_ratio.mean()
    return surrogate(log_prob, coefficients, value)


def reward_loss(
    log_prob: Tensor, log_base: Tensor, h: Tensor, alpha: Tensor, log_z: float
) -> Tensor:
    """CGM-reward: KL(p_θ‖p_α) with p_α = p_base exp(α·h)/Z, a scalar as above.

    Args:
        log_prob: float [n], with gradient.
        log_base: float [n].
        h: float [n, d].
        alpha: float [d], from :func:`ftlib.cgm.dual.solve_dual`.
        log_z: log Z(α); the paper's code leaves it out, so its loss ends at −log Z.
    """
    to_tilt = (log_prob - log_base).detach() - h @ alpha + log_z
    return surrogate(log_prob, kl_coefficients(to_tilt), to_tilt.mean())


def forward_kl_loss(
    log_prob: Tensor, log_base: Tensor, h: Tensor, alpha: Tensor, log_z: float
) -> Tensor:
    """KL(p_α‖p_θ), the baseline of Khalifa et al. (2021), a scalar as above.

    The importance weight ρ_i = p_α(x_i)/p_θ(x_i) has mean one under p_θ, so one is
    subtracted from it: the mean gradient stays as it is (the paper's code neither
    subtracts it nor divides by Z).
    """
    log_weight = h @ alpha - log_z - (log_prob - log_base).detach()
    weight = log_weight.exp()
    value = (weight * log_weight).mean()
    return surrogate(log_prob, -(weight - 1) / len(weight), value)


def surrogate(log_prob: Tensor, coefficients: Tensor, value: Tensor) -> Tensor:
    """Return a scalar that equals ``value`` and has the gradient Σ_i c_i ∇log p_θ(x_i).

    Args:
        log_prob: float [n], with gradient.
        coefficients: float [n]; no gradient flows into them.
        value: the scalar to report.
    """
    weighted = (coefficients.detach() * log_prob).sum()
    return weighted - weighted.detach() + value.detach()


def _own_stratum(
    y: Tensor, strata: Tensor | None, at_least: int
) -> tuple[Tensor, Tensor]:
    """Sum [n, d] and size [n, 1] of every sample's own stratum."""
    if strata is None:
        _require(len(y), at_least, "the batch")
        return y.sum(0).expand_as(y), torch.full_like(y[:, :1], len(y))
    _, index, sizes = torch.unique(strata, return_inverse=True, return_counts=True)
    _require(int(sizes.min()), at_least, "every stratum (prompt)")
    total = y.new_zeros(len(sizes), y.shape[1]).index_add_(0, index, y)
    return total[index], sizes[index, None].to(y.dtype)


def _predicted_by_others(y: Tensor, strata: Tensor | None) -> Tensor:
    """Mean of y·companion over the other samples of the stratum, i left out of both."""
    n = len(y)
    total, size = _own_stratum(y, strata, at_least=3)
    square = y.square().sum(-1, keepdim=True)
    squares, _ = _own_stratum(square, strata, at_least=3)
    rest = total - y
    pairs = rest.square().sum(-1, keepdim=True) - (squares - square)
    across = (rest * (y.sum(0) - total)).sum(-1, keepdim=True) / (size - 1)
    within = size * pairs / ((size - 1) * (size - 2))
    return ((across + within) / n).squeeze(-1)


def _require(samples: int, at_least: int, place: str) -> None:
    if samples < at_least:
        raise ValueError(
            f"{samples} samples in {place} where the estimate needs {at_least}: "
            "use a larger batch"
        )
