"""A mixture of Gaussians whose every quantity is known exactly.

The chapter's first model: two bumps at −1 and +1, and a calibration target for the
mass to the right of zero.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class GaussianMixture(nn.Module):
    """Independent coordinates, each a mixture of Gaussians.

    Args:
        weights: mixture weights of one coordinate [K], positive.
        means: [K].
        scales: standard deviations [K], positive.
        dimensions: number of coordinates D, equal at first, each with parameters of
            its own.
    """

    def __init__(
        self,
        weights: Tensor,
        means: Tensor,
        scales: Tensor,
        dimensions: int = 1,
    ) -> None:
        super().__init__()
        self.logits = nn.Parameter(weights.log().repeat(dimensions, 1))
        self.means = nn.Parameter(means.repeat(dimensions, 1))
        self.log_scales = nn.Parameter(scales.log().repeat(dimensions, 1))

    @torch.no_grad()
    def sample(self, n: int) -> Tensor:
        """Draw samples, float [n, D]."""
        component = torch.distributions.Categorical(logits=self.logits).sample((n,))
        column = torch.arange(len(self.logits), device=component.device)
        mean = self.means[column, component]
        scale = self.log_scales[column, component].exp()
        return mean + scale * torch.randn_like(mean)

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density [n] of points [n, D]."""
        return self._log_density(x).sum(-1)

    @torch.no_grad()
    def mass_right_of_zero(self) -> Tensor:
        """P(x_d > 0) for every coordinate, [D], exactly."""
        z = self.means * (-self.log_scales).exp()
        right = 0.5 * (1 + torch.erf(z / math.sqrt(2)))
        return (self.logits.softmax(-1) * right).sum(-1)

    def _log_density(self, x: Tensor) -> Tensor:
        z = (x.unsqueeze(-1) - self.means) * (-self.log_scales).exp()
        log_normal = -0.5 * (z.square() + math.log(2 * math.pi)) - self.log_scales
        return torch.logsumexp(self.logits.log_softmax(-1) + log_normal, -1)

    @torch.no_grad()
    def kl_from(self, base: GaussianMixture) -> float:
        """KL(self‖base) in nats by quadrature: exact to about 1e-9 in float64."""
        reach = float((self.means.abs() + 12 * self.log_scales.exp()).max())
        x = torch.linspace(-reach, reach, 20_001, dtype=torch.float64)
        grid = x[:, None].expand(-1, len(self.logits))
        here = self.double_copy()._log_density(grid)
        there = base.double_copy()._log_density(grid)
        return float(torch.trapezoid(here.exp() * (here - there), grid, dim=0).sum())

    def double_copy(self) -> GaussianMixture:
        """A float64 copy on the CPU, for exact evaluation."""
        copy = GaussianMixture(
            torch.ones(self.logits.shape[1]),
            torch.zeros(self.logits.shape[1]),
            torch.ones(self.logits.shape[1]),
            len(self.logits),
        ).double()
        copy.load_state_dict(self.state_dict())
        return copy


def two_bumps(
    right: float = 0.5, dimensions: int = 1, scale: float = 0.25
) -> GaussianMixture:
    """The paper's toy: N(−1, 0.25²), and N(+1, 0.25²) with the mass ``right``."""
    return GaussianMixture(
        torch.tensor([1 - right, right]),
        torch.tensor([-1.0, 1.0]),
        torch.tensor([scale, scale]),
        dimensions,
    )


def right_of_zero(x: Tensor) -> Tensor:
    """The statistic h(x) = 1[x > 0], one constraint for every coordinate, [n, D]."""
    return (x > 0).to(x.dtype)
