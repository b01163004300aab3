"""Means over samples, recorded with their standard errors."""

from __future__ import annotations

from torch import Tensor

from ftlib.results import Metric


def mean_and_error(
    name: str, values: Tensor, error: str = "error"
) -> dict[str, Metric | float]:
    """Return a mean over samples and its standard error, as metrics.

    Args:
        name: of the mean.
        values: one of each sample, float [n].
        error: what is added to the name for the standard error.
    """
    n = len(values)
    return {
        name: Metric(float(values.mean()), n),
        f"{name}_{error}": Metric(float(values.std()) / n**0.5, n),
    }
