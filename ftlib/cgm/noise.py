"""How noisy a gradient from samples is, measured on a model that stays as it is."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ftlib import runtime
from ftlib.cgm.calibrate import Generative, Samples, Scorer

Coefficients = Callable[[Samples, Tensor], Mapping[str, Tensor]]


@dataclass(frozen=True)
class GradientNoise:
    """Moments of the gradient g of one batch.

    Attributes:
        signal: ‖E[g]‖², without bias (so that it can be negative where there is none).
        noise: tr Cov(g).
        mean: E[g], float [parameters].
    """

    signal: float
    noise: float
    mean: Tensor


def gradient_noise(
    model: Generative,
    coefficients: Coefficients,
    *,
    batch_size: int,
    batches: int,
) -> dict[str, GradientNoise]:
    """Compare estimators of a gradient on the same batches of a frozen model.

    Args:
        model: a :class:`~ftlib.cgm.calibrate.Generative` module; it is not changed.
        coefficients: maps samples and their log-probabilities (float [n], without
            gradient) to the weights c_i, float [n], of Σ c_i ∇log p_θ(x_i), by the name
            of the estimator.
        batch_size: n.
        batches: at least 2.

    Raises:
        ValueError: fewer than two batches.
    """
    if batches < 2:
        raise ValueError(f"{batches} batch has no variance: draw 2 or more")
    found: dict[str, list[Tensor]] = defaultdict(list)
    for _ in runtime.progress(range(batches), desc="gradient noise"):
        for name, gradient in _gradients(model, coefficients, batch_size).items():
            found[name].append(gradient)
    return {name: _moments(torch.stack(each)) for name, each in found.items()}


def _gradients(
    model: Generative, coefficients: Coefficients, batch_size: int
) -> dict[str, Tensor]:
    """One gradient an estimator, [parameters], all from the same fresh samples."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    samples = model.sample(batch_size)
    log_prob = Scorer(model)(samples)
    gradients = {}
    for name, weights in coefficients(samples, log_prob.detach()).items():
        weighted = (weights * log_prob).sum()
        parts = torch.autograd.grad(
            weighted, parameters, retain_graph=True, materialize_grads=True
        )
        gradients[name] = torch.cat([part.flatten() for part in parts])
    return gradients


def _moments(gradients: Tensor) -> GradientNoise:
    """Moments of gradients [batches, parameters]."""
    batches, mean = len(gradients), gradients.mean(0)
    noise = float(gradients.var(0).sum())
    return GradientNoise(float(mean.square().sum()) - noise / batches, noise, mean)
