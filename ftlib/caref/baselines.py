"""Losses to compare CAREF with: what else is done about overconfidence.

Two of them are token losses like CAREF's: label smoothing (Szegedy et al. 2016) and the
confidence penalty (Pereyra et al. 2017), whose −H is CAREF's divergence from uniform
less the constant log V. The others have no terms in :class:`ftlib.ops.TokenLoss`:

* The focal loss, −(1 − p_y)^γ log p_y (Lin et al. 2017), weighs a token less the surer
  the model already is of it.
* Sparsemax and 1.5-entmax train another map from logits to probabilities, one that
  reaches 0. Their losses are the Fenchel–Young losses of these maps (Blondel, Martins
  and Niculae 2020): with p the map of the logits z and H the Tsallis entropy whose
  regulariser defines it, L = p·z + H(p) − z_y, and its gradient is p − e_y.

All of them go where a :class:`ftlib.ops.TokenLoss` goes in
:mod:`ftlib.caref.objective`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ftlib.caref.objective import CHUNK_LOGITS, STATISTICS, in_chunk
from ftlib.ops import (
    HeadOutput,
    OutputHead,
    TokenLoss,
    entmax15,
    sparsemax,
    vocabulary_head,
)
from ftlib.ops.rows import to_logits
from ftlib.sequences import IGNORED

CROSS_ENTROPY = TokenLoss()
LABEL_SMOOTHING = TokenLoss(label_smoothing=0.1)
"""ε as in Szegedy et al."""
CONFIDENCE_PENALTY = TokenLoss(kl_to_uniform=0.1)
"""CAREF without SCED, at CAREF's weight."""


# --- focal loss --------------------------------------------------------------------


@dataclass(frozen=True)
class FocalLoss:
    """−(1 − p_y)^γ log p_y.

    Attributes:
        gamma: γ, at least 0, where the loss is the cross-entropy. Lin et al. take 2.

    Raises:
        ValueError: γ is negative.
    """

    gamma: float = 2.0

    def __post_init__(self) -> None:
        if self.gamma < 0:
            raise ValueError(f"gamma is {self.gamma}: it must be 0 or more")

    def of_logits(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of each row, (n,), of logits (n, V)."""
        log_p = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
        return self._of_log_prob(log_p)

    def of_head(self, head: OutputHead, targets: Tensor, weights: Tensor) -> HeadOutput:
        """Return Σ weight · loss with the statistics of the distributions."""
        out = vocabulary_head(
            head.hidden,
            head.weight,
            targets,
            statistics=STATISTICS,
            logit_scale=head.logit_scale,
            softcap=head.softcap,
            ignore_index=IGNORED,
        )
        assert out.log_prob is not None
        total = (weights * self._of_log_prob(out.log_prob)).sum()
        found = {name: getattr(out, name).detach() for name in STATISTICS}
        return HeadOutput(loss=total, **found)

    def _of_log_prob(self, log_p: Tensor) -> Tensor:
        # Where 1 − p is 0 its power may have an infinite slope, times a log p of 0.
        complement = -torch.expm1(log_p)
        held = complement.clamp(min=torch.finfo(log_p.dtype).tiny)
        return -(held**self.gamma) * log_p


# --- Fenchel–Young losses ----------------------------------------------------------

_MAPS = {2.0: sparsemax, 1.5: entmax15}


@dataclass(frozen=True)
class FenchelYoungLoss:
    """The loss of α-entmax.

    Attributes:
        alpha: 2 (sparsemax) or 1.5.

    Raises:
        ValueError: another α.
    """

    alpha: float

    def __post_init__(self) -> None:
        if self.alpha not in _MAPS:
            raise ValueError(
                f"alpha is {self.alpha}: choose 2 (sparsemax) or 1.5; the loss of"
                " alpha 1 is the cross-entropy"
            )

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return the distributions that the loss trains, in shape and dtype of logits.

        A model trained with it is calibrated, and sampled from, in these.
        """
        return _MAPS[self.alpha](logits)

    def of_logits(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of each row, (n,), of logits (n, V)."""
        return self._values(logits, self.probabilities(logits.detach()), targets)

    def of_head(self, head: OutputHead, targets: Tensor, weights: Tensor) -> HeadOutput:
        """Return Σ weight · loss with statistics of the distributions that it trains.

        The log-probability of a target that they leave out is −∞.
        """
        kept = targets != IGNORED
        rows = (head.hidden[kept], targets[kept], weights[kept])
        step = max(1, CHUNK_LOGITS // len(head.weight))
        chunks = zip(*(row.split(step) for row in rows), strict=True)
        parts = [in_chunk(self._of_chunk, head, *chunk) for chunk in chunks]
        totals, *statistics = zip(*parts, strict=True)
        found = {
            name: _spread(torch.cat(values), kept)
            for name, values in zip(STATISTICS, statistics, strict=True)
        }
        return HeadOutput(loss=torch.stack(totals).sum(), **found)

    def _of_chunk(
        self, head: OutputHead, hidden: Tensor, targets: Tensor, weights: Tensor
    ) -> tuple[Tensor, ...]:
        """Return Σ weight · loss, and :data:`STATISTICS` of each row."""
        logits = to_logits(hidden @ head.weight.T, head.transform)
        p = self.probabilities(logits.detach())
        total = (weights * self._values(logits, p, targets)).sum()
        return (
            total,
            p.gather(1, targets[:, None])[:, 0].log(),
            torch.special.entr(p).sum(-1),
            p.square().sum(-1),
            logits.argmax(-1) == targets,
        )

    def _values(self, logits: Tensor, p: Tensor, targets: Tensor) -> Tensor:
        """Return p·z + H(p) − z_y of each row, (n,), at the constant p.

        The p of a map maximises p·z + H(p), so that its own change adds nothing to the
        gradient, which is p − e_y without any rounding.
        """
        # The loss does not change with an offset, but large logits lose digits.
        z = logits - logits.detach().amax(-1, keepdim=True)
        alpha = self.alpha
        entropy = (1 - (p**alpha).sum(-1)) / (alpha * (alpha - 1))
        return (p * z).sum(-1) + entropy - z.gather(1, targets[:, None])[:, 0]


def _spread(values: Tensor, kept: Tensor) -> Tensor:
    """Put the values of the kept positions back in their places, among zeros."""
    return values.new_zeros(kept.shape).masked_scatter(kept, values)


SPARSEMAX = FenchelYoungLoss(2.0)
ENTMAX15 = FenchelYoungLoss(1.5)
