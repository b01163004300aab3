r"""Watching decisions batch by batch, and a gate that asks the user when it must.

That performance is watched per batch and that an adaptive gate decides when to ask is
the paper's; both tests are ours. With :math:`a` of :math:`n` decisions of the last
batches accepted, the share that would be is :math:`\mathrm{Beta}(\alpha + a, \beta + n
- a)`, and the gate opens if it is probably below the target. It also opens if the share
fell far below its best.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from scipy.stats import beta

from ftlib.clipr.settings import GateSettings


@dataclass(frozen=True)
class Batch:
    """What became of a batch of decisions.

    Attributes:
        decided: how many there were.
        observed: how many the user accepted or rejected.
        accepted: how many of these were accepted.
    """

    decided: int
    observed: int
    accepted: int

    @property
    def share(self) -> float | None:
        """Accepted of the observed; ``None`` if nothing was observed."""
        return self.accepted / self.observed if self.observed else None


class Gate(NamedTuple):
    """Whether to ask, and why.

    Attributes:
        open: whether to ask.
        reason: in words; empty if closed.
        risk: P(share of accepted decisions < target).
    """

    open: bool
    reason: str
    risk: float


def risk(batches: Iterable[Batch], settings: GateSettings) -> float:
    """Return P(share < target) after the last batches: a Beta's distribution function.

    Args:
        batches: all of them; the last ``settings.window`` count.
        settings: prior, target and window.
    """
    recent = list(batches)[-settings.window :]
    accepted = sum(batch.accepted for batch in recent)
    rejected = sum(batch.observed for batch in recent) - accepted
    a, b = settings.prior
    return float(beta.cdf(settings.target, a + accepted, b + rejected))


def gate(batches: Sequence[Batch], settings: GateSettings) -> Gate:
    """Decide whether to ask after the last of the batches.

    A batch that nobody reacted to opens nothing: nobody would answer either.
    """
    low = risk(batches, settings)
    shares = [batch.share for batch in batches if batch.share is not None]
    if not batches or batches[-1].share is None:
        return Gate(False, "", low)
    if low >= settings.certainty:
        return Gate(
            True, f"below {settings.target:.0%} with probability {low:.0%}", low
        )
    if max(shares) - shares[-1] > settings.drop:
        return Gate(True, f"fell from {max(shares):.0%} to {shares[-1]:.0%}", low)
    return Gate(False, "", low)


def settled(batches: Sequence[Batch], settings: GateSettings) -> bool:
    """Return whether the last K batches all had the target share."""
    if settings.patience is None:
        return False
    last = [batch.share for batch in batches[-settings.patience :]]
    return len(last) == settings.patience and all(
        share is not None and share >= settings.target for share in last
    )
