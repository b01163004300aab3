r"""The tilt p_α ∝ p_base exp(α·h) that meets the constraints, found from its dual.

Maximise α·h* − log Σ_n w_n exp(α·h_n) over α. Samples of the base model stand for
p_base, with equal weights, or an enumeration with exact ones.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from math import exp
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import qr, solve_triangular
from scipy.optimize import brentq, linprog, minimize
from scipy.special import logsumexp
from torch import Tensor

Array = NDArray[np.float64]

# Beyond this tilt (in nats, across the range of α·h) an optimum may be one that has
# run off to infinity: worth a look with a linear programme.
_STRONG = 20.0
# A λ below e⁻¹⁶ ≈ 1e-7 is no penalty on the KL that any training would notice.
_SMALLEST_LOG_WEIGHT = -16.0


class DualError(ValueError):
    """The dual has no solution, or more than one."""


class InfeasibleTargetError(DualError):
    """No tilt of the samples meets the target."""


class RedundantConstraintError(DualError):
    """Some constraints follow from the others, so the tilt is not unique."""


@dataclass(frozen=True)
class Tilt:
    """A solution of the dual.

    Attributes:
        alpha: float64 [d], the multipliers.
        log_z: log E_base[exp(α·h)].
        mean: float64 [d], E[h] under the tilt.
        kl: KL(p_α‖p_base) in nats: the smallest any model with this mean can have.
        effective_samples: 1/Σ p_n², how many atoms the tilt rests on.
    """

    alpha: Array
    log_z: float
    mean: Array
    kl: float
    effective_samples: float

    def to_json(self) -> str:
        """Write the tilt as JSON, without loss of digits."""
        values = dataclasses.asdict(self)
        return json.dumps(values, default=lambda array: array.tolist())

    @classmethod
    def from_json(cls, text: str) -> Tilt:
        """Undo :meth:`to_json`."""
        values = json.loads(text)
        arrays = {name: np.array(values[name]) for name in ("alpha", "mean")}
        return cls(**{**values, **arrays})


def solve_dual(
    h: Tensor | Array,
    target: Tensor | Array,
    *,
    weights: Tensor | Array | None = None,
    kl_weight: float = 0.0,
) -> Tilt:
    """Find the exponential tilt with E[h] = target, the closest to the base in KL.

    With ``kl_weight`` λ > 0 the optimum of CGM-relax is found instead: its tilt solves
    the same dual with the ridge −(λ/4)‖α‖² added (ours), which exists for any target
    and misses it by λα/2.

    Args:
        h: statistics of N atoms, [N, d].
        target: [d].
        weights: base probabilities of the atoms [N], summing to one; equal if None.
        kl_weight: λ of CGM-relax; 0 for the constrained problem.

    Raises:
        InfeasibleTargetError: the target lies outside, or on the boundary of, the
            convex hull of the atoms' statistics. It says which constraints conflict.
        RedundantConstraintError: the constraints are linearly dependent; it says which.
        ValueError: shapes do not agree, or a value is not finite.

    >>> tilt = solve_dual(np.array([[1.0], [0.0], [0.0], [0.0]]), np.array([0.5]))
    >>> tilt.alpha.round(4), round(tilt.kl, 4)  # the odds 1 : 3 become even
    (array([1.0986]), 0.1438)
    """
    h, target, weights = _checked(h, target, weights)
    h, weights = h[weights > 0], weights[weights > 0]
    if kl_weight == 0:
        _check_ranges(h, target)
        _check_rank(h, target)
    y = h - target
    dual = _Dual(y, np.log(weights), kl_weight)
    alpha = _maximised(dual)
    log_z, p = dual.tilted(alpha)
    return Tilt(
        alpha=alpha,
        log_z=log_z + float(alpha @ target),
        mean=p @ h,
        kl=float(p @ (y @ alpha)) - log_z,
        effective_samples=1 / float(p @ p),
    )


class _Dual(NamedTuple):
    """The negative dual, which is convex, with its derivatives.

    Attributes:
        y: statistics of the atoms less the target, [N, d].
        log_w: logarithms of their base probabilities, [N].
        kl_weight: λ of the ridge, or 0.
    """

    y: Array
    log_w: Array
    kl_weight: float

    def tilted(self, alpha: Array) -> tuple[float, Array]:
        """Return log Σ w exp(α·y), and the probabilities of the atoms, [N]."""
        logits = self.log_w + self.y @ alpha
        log_z = logsumexp(logits)
        return float(log_z), np.exp(logits - log_z)

    def value(self, alpha: Array) -> float:
        log_z, _ = self.tilted(alpha)
        return log_z + self.kl_weight / 4 * float(alpha @ alpha)

    def gradient(self, alpha: Array) -> Array:
        _, p = self.tilted(alpha)
        return p @ self.y + self.kl_weight / 2 * alpha

    def hessian(self, alpha: Array) -> Array:
        _, p = self.tilted(alpha)
        centred = self.y - p @ self.y
        ridge = self.kl_weight / 2 * np.eye(len(alpha))
        return (centred * p[:, None]).T @ centred + ridge


def _maximised(dual: _Dual) -> Array:
    """Return the α that maximises the dual, searched in units of each statistic."""

    def watch(scaled: Array) -> None:
        # Look once, as soon as the tilt is suspiciously strong.
        strength = np.ptp(dual.y @ (scaled / spread))
        if dual.kl_weight == 0 and not looked and strength > _STRONG:
            looked.append(True)
            _check_hull(dual.y)

    looked: list[bool] = []
    spread = np.abs(dual.y).max(0)
    spread[spread == 0] = 1  # met by every atom; allowed with a ridge
    solution = minimize(
        lambda a: dual.value(a / spread),
        np.zeros(len(spread)),
        jac=lambda a: dual.gradient(a / spread) / spread,
        hess=lambda a: dual.hessian(a / spread) / np.outer(spread, spread),
        method="trust-exact",
        callback=watch,
        options={"gtol": 1e-10, "maxiter": 500, "max_trust_radius": 1e9},
    )
    alpha = solution.x / spread
    gap = np.abs(dual.gradient(alpha) / spread).max()
    if gap > 1e-6:
        raise RuntimeError(
            f"the dual did not converge (relative gap {gap:.1e}: {solution.message})"
        )
    return alpha


def choose_kl_weight(
    h: Tensor | Array, target: Tensor | Array, shortfall: float
) -> float:
    """Choose λ of CGM-relax before training, from a pilot sample of the base (ours).

    Relax falls short of the target by λα_λ/2, which the dual with a ridge predicts.
    This is the largest λ that keeps the root of its mean square over the constraints,
    √(violation/d), at ``shortfall``; its KL is the smallest that does.

    Args:
        h: statistics of N base samples, [N, d].
        target: [d].
        shortfall: in units of h, positive.

    Raises:
        InfeasibleTargetError: no λ brings the pilot sample as close as that.
        ValueError: the base is as close as that already.
    """
    h, target, _ = _checked(h, target, None)
    atoms, counts = np.unique(h, axis=0, return_counts=True)

    def excess(log_weight: float) -> float:
        weights = counts / len(h)
        tilt = solve_dual(atoms, target, weights=weights, kl_weight=exp(log_weight))
        return _root_mean_square(target - tilt.mean) - shortfall

    if _root_mean_square(target - h.mean(0)) <= shortfall:
        raise ValueError(
            f"the pilot sample is within {shortfall:g} of the target without training: "
            "ask for a smaller shortfall"
        )
    low, high = 0.0, 1.0
    while excess(high) < 0:
        high += 2
    while excess(low) > 0:
        low -= 2
        if low < _SMALLEST_LOG_WEIGHT:
            raise InfeasibleTargetError(
                f"no λ brings these {len(h)} samples within {shortfall:g} of the "
                "target: draw more samples, or allow a larger shortfall"
            )
    return exp(brentq(excess, low, high, xtol=1e-3))


def balanced_kl(female: Tensor | Array, male: Tensor | Array) -> Array:
    """Smallest KL in nats of a distribution in which two outcomes are equally likely.

    Everything else keeps its odds, so the closed form of the dual with h = ±1 is
    −log(1 − f − m + 2√(fm)). A model that answers K given prompts cannot change their
    mix: its smallest KL is the mean of this over the prompts, and not the (smaller) KL
    of one tilt of prompts and answers together.

    Args:
        female: probability of the first outcome, any shape.
        male: probability of the second.

    >>> float(balanced_kl(np.array(0.3), np.array(0.1)).round(4))
    0.0551
    """
    f, m = _float64(female), _float64(male)
    return -np.log(1 - f - m + 2 * np.sqrt(f * m))


def _checked(
    h: Tensor | Array, target: Tensor | Array, weights: Tensor | Array | None
) -> tuple[Array, Array, Array]:
    h, target = _float64(h), _float64(target)
    if h.ndim != 2 or target.shape != h.shape[1:]:
        raise ValueError(
            f"h has shape {h.shape} and the target {target.shape}: "
            "they must be [N, d] and [d]"
        )
    w = np.full(len(h), 1 / len(h)) if weights is None else _float64(weights)
    if w.shape != h.shape[:1] or (w < 0).any() or not np.isclose(w.sum(), 1):
        raise ValueError("weights must be N probabilities that sum to one")
    if not (np.isfinite(h).all() and np.isfinite(target).all()):
        raise ValueError("h and the target must be finite")
    return h, target, w / w.sum()


def _root_mean_square(x: Array) -> float:
    return float(np.sqrt(np.mean(np.square(x))))


def _float64(x: Tensor | Array) -> Array:
    if isinstance(x, Tensor):
        x = x.detach().cpu().numpy()
    return np.asarray(x, dtype=np.float64)


def _check_ranges(h: Array, target: Array) -> None:
    low, high = h.min(0), h.max(0)
    constant = np.flatnonzero((low == high) & (low == target))
    if len(constant):
        raise RedundantConstraintError(
            f"constraint {_names(constant)}: h never varies and the target is met "
            "already; leave it out"
        )
    outside = np.flatnonzero((target <= low) | (target >= high))
    if len(outside):
        k = outside[0]
        raise InfeasibleTargetError(
            f"constraint {_names(outside)}: the target is not strictly between the "
            f"smallest and the largest h among {len(h)} samples (constraint {k}: "
            f"target {target[k]:g}, h from {low[k]:g} to {high[k]:g}); draw more "
            "samples, or use CGM-relax, which needs none"
        )


def _check_rank(h: Array, target: Array) -> None:
    """Look for constraints that follow from others, and whether the targets agree."""
    centre, spread = h.mean(0), h.std(0)
    _, r, order = qr((h - centre) / spread, mode="economic", pivoting=True)
    diagonal = np.abs(np.diag(r))
    rank = int((diagonal > diagonal[0] * 1e-10).sum())
    if rank == h.shape[1]:
        return
    free, bound = order[:rank], order[rank:]
    goal = (target - centre) / spread
    implied = goal[free] @ solve_triangular(r[:rank, :rank], r[:rank, rank:])
    missed = np.abs(implied - goal[bound]) > 1e-6 * (1 + np.abs(goal[bound]))
    if missed.any():
        raise InfeasibleTargetError(
            f"constraint {_names(np.sort(bound[missed]))} follows from the others on "
            f"these {len(h)} samples, and its target contradicts theirs; draw more "
            "samples, or use CGM-relax, which needs none"
        )
    raise RedundantConstraintError(
        f"constraint {_names(np.sort(bound))} follows from the others on "
        f"these {len(h)} samples ({rank} of {h.shape[1]} are independent); "
        "leave it out"
    )


def _check_hull(y: Array) -> None:
    """Look for a direction u with u·y ≤ 0 for all atoms: α grows along −u for ever.

    The linear programme's own tolerance, 1e-7 of the scaled h, is the closest to the
    boundary that a target can be told to lie inside.
    """
    atoms = np.unique(y / np.abs(y).max(0), axis=0)
    found = linprog(atoms.sum(0), A_ub=atoms, b_ub=np.zeros(len(atoms)), bounds=(-1, 1))
    if found.status == 0 and found.fun < -1e-9 * np.abs(atoms).sum():
        blocking = np.flatnonzero(np.abs(found.x) > 1e-6)
        raise InfeasibleTargetError(
            f"constraints {_names(blocking)} cannot be met together: the target is not "
            f"inside the convex hull of the {len(y)} samples' h; draw more samples, or "
            "use CGM-relax, which needs none"
        )


def _names(indices: NDArray[np.intp]) -> str:
    shown = ", ".join(map(str, indices[:8]))
    return shown + (f" and {len(indices) - 8} more" if len(indices) > 8 else "")
