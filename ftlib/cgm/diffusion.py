r"""A neural SDE whose end points are bumps at −1 and +1, scored by Girsanov's theorem.

Noising shrinks data and adds noise, dx = −κx/2 dt + √κ dw with κ(t) = 1/(1 − t + 0.01)
(the paper's code), so that x_t given x_0 is N(a x_0, 1 − a²). The sampler runs the
other way in time, from N(0, I), by Euler–Maruyama in T equal steps. In the clock
s = ∫κ dt, where noise has unit speed, one step is

    x_{k+1} = x_k + Δs_k (x_k/2 + ∇log p_k(x_k)) + Δs_k f_θ(x_k, k) + √Δs_k ε_k.

The score ∇log p_k is analytic; the offset f_θ is a network that starts at zero.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import logit, rel_entr
from scipy.stats import norm
from torch import Tensor, nn
from torch.nn import functional as F

_EARLIEST = 0.01  # the paper's: keeps κ finite where the data are pure noise
_WAVES = 16  # cosines of time that the network sees


@dataclass(frozen=True)
class Paths:
    """Sampled trajectories.

    Attributes:
        states: float [n, T + 1, D], from pure noise to data.
        noise: float [n, T, D], increments standardised under the analytic drift:
            x_{k+1} = x_k + Δs_k (x_k/2 + score) + √Δs_k noise_k.
    """

    states: Tensor
    noise: Tensor

    def __len__(self) -> int:
        return len(self.states)

    def __getitem__(self, rows: slice | Tensor | int) -> Paths:
        return Paths(self.states[rows], self.noise[rows])

    @property
    def ends(self) -> Tensor:
        """Where the paths end, float [n, D]."""
        return self.states[..., -1, :]


class Offset(nn.Module):
    """Drift added to the analytic one: one MLP for all coordinates.

    It sees the coordinate's own state, cosines of time, and an embedding of which
    coordinate it is.

    Args:
        times: [T, 1], where in [0, 1] each step begins.
        dimensions: D.
        width: units in each of two hidden layers.
    """

    waves: Tensor

    def __init__(self, times: Tensor, dimensions: int, width: int) -> None:
        super().__init__()
        waves = torch.cos(math.pi * times * torch.arange(_WAVES))
        self.register_buffer("waves", waves, persistent=False)
        self.state = nn.Linear(1, width)
        self.time = nn.Linear(_WAVES, width, bias=False)
        self.coordinate = nn.Parameter(0.1 * torch.randn(dimensions, width))
        self.hidden = nn.Linear(width, width)
        self.out = nn.Linear(width, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor, steps: slice) -> Tensor:
        """Offset of the drift at states [n, K, D] of K steps, in the same shape."""
        where = self.time(self.waves[steps])[:, None] + self.coordinate
        hidden = F.silu(self.state(x[..., None]) + where)
        drift: Tensor = self.out(F.silu(self.hidden(hidden)))
        return drift[..., 0]


class BumpDiffusion(nn.Module):
    """Independent coordinates, each ending at two bumps: N(−1, 0.25²), N(1, 0.25²).

    At first it is the analytic model; what is trained is the offset of its drift.

    Args:
        right: mass of the bump at +1.
        dimensions: D.
        steps: T.
        width: of the network.
        scale: standard deviation of each bump.
    """

    clock: Tensor  # [T, 1], length of each step
    signal: Tensor  # [T, 1], a: what is left of the data when the step begins
    variance: Tensor  # [T, 1], of each noised bump

    def __init__(
        self,
        right: float = 0.5,
        dimensions: int = 1,
        steps: int = 50,
        width: int = 16,
        scale: float = 0.25,
    ) -> None:
        super().__init__()
        self.right, self.dimensions, self.scale = right, dimensions, scale
        times = torch.arange(steps)[:, None] / steps
        kept = (times + _EARLIEST) / (1 + _EARLIEST)  # of the data's variance
        self.register_buffer("clock", 1 / (times + _EARLIEST) / steps)
        self.register_buffer("signal", kept.sqrt())
        self.register_buffer("variance", kept * scale**2 + 1 - kept)
        self.offset = Offset(times, dimensions, width)

    @torch.no_grad()
    def sample(self, n: int) -> Paths:
        """Draw n paths."""
        x = self.clock.new_empty(n, self.dimensions).normal_()
        states, noises = [x], []
        for k, ds in enumerate(self.clock):
            step = slice(k, k + 1)
            noise = torch.randn_like(x) + self.push(x[:, None], step)[:, 0]
            x = self.step_mean(x[:, None], step)[:, 0] + ds.sqrt() * noise
            states.append(x)
            noises.append(noise)
        return Paths(torch.stack(states, 1), torch.stack(noises, 1))

    def log_prob(self, paths: Paths) -> Tensor:
        """Log-density [n] of paths relative to the analytic model's (Girsanov).

        It is exact for the discrete chain, whose steps are Gaussian, and exactly zero
        where the offset is. Leaving out what all offsets have in common keeps it
        precise in float32 in any number of dimensions.
        """
        push = self.push(paths.states[:, :-1])
        return (push * (paths.noise - push / 2)).sum((1, 2))

    def path_kl(self, base: BumpDiffusion, paths: Paths) -> Tensor:
        """Estimate KL(self‖base) from paths of self, unbiased, one value each [n].

        Half the squared difference of the two drifts, summed over the path (the
        paper's code): the log-ratio without its stochastic integral, which has mean
        zero and most of the variance.
        """
        states = paths.states[:, :-1]
        gap = self.push(states) - base.push(states)
        return gap.square().sum((1, 2)) / 2

    def score(self, x: Tensor, steps: slice = slice(None)) -> Tensor:
        """∇log p_k of the noised bumps at states [n, K, D] of K steps."""
        a, variance = self.signal[steps], self.variance[steps]
        return (a * torch.tanh(self._log_odds(x, steps) / 2) - x) / variance

    def step_mean(self, x: Tensor, steps: slice = slice(None)) -> Tensor:
        """Where the analytic model expects the next state, [n, K, D]."""
        return x + self.clock[steps] * (x / 2 + self.score(x, steps))

    def end_right(self, x: Tensor) -> Tensor:
        """P(x_T > 0 | x_k) of the base in continuous time, at states [n, T, D].

        Given the bump, data and noised state are jointly Gaussian.
        """
        gain = self.signal * self.scale**2 / self.variance
        spread = self.scale * ((1 - self.signal**2) / self.variance).sqrt()
        right = self._log_odds(x, slice(None)).sigmoid()
        from_right = torch.special.ndtr((gain * (x - self.signal) + 1) / spread)
        from_left = torch.special.ndtr((gain * (x + self.signal) - 1) / spread)
        return right * from_right + (1 - right) * from_left

    def doob_offset(self, x: Tensor, alpha: float) -> Tensor:
        """Best offset towards the tilt exp(α 1[x_T > 0]): Doob's h-transform.

        ∇ log E[exp(α 1[x_T > 0]) | x_k] for every coordinate, at states [n, T, D].
        """
        x = x.detach().requires_grad_()
        value = torch.log1p(math.expm1(alpha) * self.end_right(x))
        (gradient,) = torch.autograd.grad(value.sum(), x)
        return gradient

    def push(self, x: Tensor, steps: slice = slice(None)) -> Tensor:
        """Shift of the standardised increments by the offset, [n, K, D]."""
        push: Tensor = self.offset(x, steps) * self.clock[steps].sqrt()
        return push

    def _log_odds(self, x: Tensor, steps: slice) -> Tensor:
        """Log-odds of the bump at +1 given the states [n, K, D] of K steps."""
        prior = math.log(self.right / (1 - self.right))
        return prior + 2 * self.signal[steps] * x / self.variance[steps]


def right_of(threshold: float, paths: Paths) -> Tensor:
    """Constrain every coordinate: h = 1[x_T > threshold], float [n, D]."""
    return (paths.ends > threshold).to(paths.ends.dtype)


# -- exact answers in one dimension ----------------------------------------------------

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Exact:
    """A one-dimensional diffusion by quadrature, exact for its discrete chain.

    "Base" is the analytic model, without the offset.

    Attributes:
        grid: float64 [G], from −8 to 8.
        density: of the end points of the model, [G].
        base_density: likewise of the base.
        path_kl: KL of paths, model from base.
        right_given_start: P(x_T > 0 | x_0) of the base at each grid point, [G].
    """

    grid: Array
    density: Array
    base_density: Array
    path_kl: float
    right_given_start: Array

    @property
    def mass(self) -> float:
        """P(x_T > 0) of the model."""
        return float(self.density @ _right(self.grid)) * _spacing(self.grid)

    @property
    def base_mass(self) -> float:
        """P(x_T > 0) of the base."""
        return float(self.base_density @ _right(self.grid)) * _spacing(self.grid)

    @property
    def end_kl(self) -> float:
        """KL of end points, model from base; never above that of paths."""
        return float(rel_entr(self.density, self.base_density).sum()) * _spacing(
            self.grid
        )

    def smallest_path_kl(self, target: float) -> float:
        """Smallest KL of paths with P(x_T > 0) = target, the law of x_0 being fixed.

        Given x_0 the best law of paths is the tilt exp(α 1[x_T > 0]), with one α for
        all x_0 (ours). The closed form for end points is exceeded by as much as x_0
        tells about x_T.
        """
        start = norm.pdf(self.grid) * _spacing(self.grid)
        right = self.right_given_start

        def tilted(alpha: float) -> Array:
            return right * np.exp(alpha) / (1 + right * np.expm1(alpha))

        centre = logit(target) - logit(self.base_mass)
        alpha = brentq(
            lambda a: start @ tilted(a) - target, centre - 5, centre + 5, xtol=1e-12
        )
        log_z = np.log1p(right * np.expm1(alpha))
        return float(start @ (alpha * tilted(alpha) - log_z))


@torch.no_grad()
def exact(model: BumpDiffusion, points: int = 641) -> Exact:
    """Carry the law of a one-dimensional model through its steps by quadrature.

    Args:
        model: D = 1.
        points: G, odd, so that zero is a grid point.
    """
    chain = copy.deepcopy(model).double().cpu()
    half = points // 2
    grid = torch.arange(-half, half + 1, dtype=torch.float64) * 8 / half
    x = grid[:, None, None].expand(-1, len(chain.clock), 1)
    push = chain.push(x)[..., 0].T.numpy()  # [T, G]
    mean = chain.step_mean(x)[..., 0].T.numpy()
    sd = chain.clock[:, 0].sqrt().numpy()
    at = grid.numpy()
    density, base_density, path_kl = norm.pdf(at), norm.pdf(at), 0.0
    for k in range(len(sd)):
        path_kl += float(density @ push[k] ** 2) * _spacing(at) / 2
        density = density @ _transition(at, mean[k] + sd[k] * push[k], sd[k])
        base_density = base_density @ _transition(at, mean[k], sd[k])
    right_given_start = _right(at)
    for k in reversed(range(len(sd))):
        right_given_start = _transition(at, mean[k], sd[k]) @ right_given_start
    return Exact(at, density, base_density, path_kl, right_given_start)


def _transition(grid: Array, mean: Array, sd: float) -> Array:
    """Probability of moving from each grid point to each, [G, G]."""
    z = (grid - mean[:, None]) / sd
    scale = _spacing(grid) / (sd * math.sqrt(2 * math.pi))
    moved: Array = scale * np.exp(-0.5 * z * z)
    return moved


def _right(grid: Array) -> Array:
    """1[x > 0] for the trapezoidal rule, which halves a jump at a grid point."""
    return np.heaviside(grid, 0.5)


def _spacing(grid: Array) -> float:
    return float(grid[1] - grid[0])


def bernoulli_kl(q: float, p: float) -> float:
    """Smallest KL in nats that turns the probability p of an event into q."""
    return float(rel_entr(q, p) + rel_entr(1 - q, 1 - p))
