"""The statistics of a next-token distribution, and the gradient they all share."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ftlib.kernels.types import MomentFlags, Moments

Statistic = Literal[
    "log_prob",
    "entropy",
    "log_sum_exp",
    "collision_prob",
    "mean_logit",
    "varentropy",
    "argmax",
    "top1_hit",
]


class Statistics(NamedTuple):
    """The differentiable statistics of each row, or the gradient by each of them.

    Attributes:
        log_prob: u_y, the target's log-probability.
        entropy: H = −Σ p log p, in nats.
        log_sum_exp: log Σ exp z.
        collision_prob: q = Σ p².
        mean_logit: Σ z / V.
        varentropy: v = Σ p (log p)² − H², the variance of the surprise.
    """

    log_prob: Tensor
    entropy: Tensor
    log_sum_exp: Tensor
    collision_prob: Tensor
    mean_logit: Tensor
    varentropy: Tensor


class Gradient(NamedTuple):
    """A row's gradient with respect to its logits, as numbers instead of V columns.

    ``dz_j = p_j (A + B u_j + C p_j + E u_j²) + F + g·1[j = y]`` with u = log p.

    Attributes:
        coefficients: A, B, C, E, F, shape (5, N).
        target: g, shape (N,).
    """

    coefficients: Tensor
    target: Tensor


def moments_for(statistics: tuple[Statistic, ...]) -> MomentFlags:
    """Return the moments that statistics are made from, beyond those always there."""
    return MomentFlags(
        second="varentropy" in statistics,
        squares="collision_prob" in statistics,
        total="mean_logit" in statistics,
        argmax="argmax" in statistics or "top1_hit" in statistics,
    )


def from_moments(moments: Moments, target_logit: Tensor, columns: int) -> Statistics:
    """Return the statistics of rows from their moments; zeros where a moment is absent.

    The entropy is log s − t/s with t = Σe·(z−m): nothing large is subtracted, whatever
    the offset of the logits. The textbook's log Σ exp z − Σ p z loses the digits that
    the offset takes.

    Args:
        moments: of the rows, shapes (N,).
        target_logit: z_y, shape (N,).
        columns: V.
    """
    s = moments.sum_exp
    log_sum, shift = moments.log_sum, moments.first / s
    zero = torch.zeros_like(s)
    second, squares, total = moments.second, moments.squares, moments.total
    # Matmuls that sum in different orders may put the target's logit a rounding
    # error above the row's maximum.
    log_prob = (target_logit - moments.maximum - log_sum).clamp(max=0)
    return Statistics(
        log_prob=log_prob,
        entropy=log_sum - shift,
        log_sum_exp=moments.maximum + log_sum,
        collision_prob=zero if squares is None else squares / s.square(),
        mean_logit=zero if total is None else total / columns,
        varentropy=zero
        if second is None
        else (second / s - shift.square()).clamp(min=0),
    )


def logit_gradient(at: Statistics, upstream: Statistics, columns: int) -> Gradient:
    """Return the gradient by the logits of Σ upstream · statistic.

    Each statistic's own gradient is p_j times a polynomial in u_j and p_j, plus a
    constant: that of H is −p_j(u_j + H), of Σp² it is 2p_j(p_j − q), of v it is
    p_j(u_j² + 2(1+H)u_j + 2H + H² − v). Their sum keeps the form.

    Args:
        at: the values of the statistics.
        upstream: the gradient of the loss by each of them.
        columns: V.
    """
    H, q, v = at.entropy, at.collision_prob, at.varentropy
    g = upstream
    A = (
        g.log_sum_exp
        - g.log_prob
        - H * g.entropy
        - 2 * q * g.collision_prob
        + (2 * H + H.square() - v) * g.varentropy
    )
    B = 2 * (1 + H) * g.varentropy - g.entropy
    C = 2 * g.collision_prob
    E = g.varentropy
    F = g.mean_logit / columns
    return Gradient(torch.stack((A, B, C, E, F)), g.log_prob)
