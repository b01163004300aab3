"""The losses of a token that the vocabulary head differentiates as it goes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ftlib.kernels.types import MomentFlags
from ftlib.ops.statistics import Statistics


@dataclass(frozen=True)
class TokenLoss:
    """A sum of terms, each a function of one token's distribution and target.

    With p the distribution over V tokens, H its entropy, y the target and U = 1/V,
    the loss is the sum of these, each times its weight:

    * ``cross_entropy``: −log p_y. With ``label_smoothing`` ε the target becomes
      (1−ε)·1[y] + ε·U, as in :func:`torch.nn.functional.cross_entropy`.
    * ``entropy``: H. A negative weight rewards spread.
    * ``z_loss``: (log Σ exp z)², which holds the scale of the logits.
    * ``kl_to_uniform``: KL(p‖U) = log V − H, the confidence penalty.
    * ``sced``: ``Σ |p log(p/U)|^α (1−p)^β``, which CAREF adds.

    A loss weighted by log-probability, as of policy gradients, is the default with
    ``weights`` given to the head: each token's loss is −weight · log p_y.

    Attributes:
        alpha: exponent of ``|p log(p/U)|`` in SCED, at least 1.
        beta: exponent of 1 − p in SCED, at least 0.

    Raises:
        ValueError: a number is out of its range.
    """

    cross_entropy: float = 1.0
    label_smoothing: float = 0.0
    entropy: float = 0.0
    z_loss: float = 0.0
    kl_to_uniform: float = 0.0
    sced: float = 0.0
    alpha: float = 2.0
    beta: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(
                f"label_smoothing is {self.label_smoothing}: it must be in [0, 1)"
            )
        if self.alpha < 1 or self.beta < 0:
            raise ValueError(
                f"SCED has alpha {self.alpha} and beta {self.beta}: it has a gradient "
                "for alpha ≥ 1 and beta ≥ 0"
            )

    def moments(self, flags: MomentFlags) -> MomentFlags:
        """Return the flags with the moments added that the loss itself takes."""
        return flags._replace(
            total=flags.total or self.label_smoothing > 0,
            argmax=flags.argmax or self.sced != 0,
        )

    def value(self, at: Statistics, sced: Tensor | float, columns: int) -> Tensor:
        """Return the loss of each row, shape (N,), from its statistics and its SCED."""
        smoothing = self.label_smoothing
        hard, soft = -at.log_prob, at.log_sum_exp - at.mean_logit
        return (
            self.cross_entropy * ((1 - smoothing) * hard + smoothing * soft)
            + (self.entropy - self.kl_to_uniform) * at.entropy
            + self.kl_to_uniform * math.log(columns)
            + self.z_loss * at.log_sum_exp.square()
            + self.sced * sced
        )

    def partials(self, at: Statistics) -> Statistics:
        """Return the derivative of :meth:`value` by each statistic, SCED apart."""
        one, zero = torch.ones_like(at.entropy), torch.zeros_like(at.entropy)
        smoothing = self.label_smoothing
        return Statistics(
            log_prob=-self.cross_entropy * (1 - smoothing) * one,
            entropy=(self.entropy - self.kl_to_uniform) * one,
            log_sum_exp=self.cross_entropy * smoothing
            + 2 * self.z_loss * at.log_sum_exp,
            collision_prob=zero,
            mean_logit=-self.cross_entropy * smoothing * one,
            varentropy=zero,
        )
