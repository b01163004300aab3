"""What the kernels and their PyTorch twins exchange, free of Triton."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

# Half a unit in the last place below 1: the smallest 1 − p that float32 can tell from
# 0. Only where 1 − p is divided by does it matter.
SMALLEST_COMPLEMENT = 2.0**-24


class Logits(NamedTuple):
    """How a product ``x·w`` becomes a logit: ``z = scale·x·w``, then the softcap.

    Attributes:
        scale: multiplies the product.
        softcap: c in ``z = c·tanh(z / c)``; ``None`` leaves z as it is.
    """

    scale: float = 1.0
    softcap: float | None = None


class MomentFlags(NamedTuple):
    """Which moments are wanted besides the maximum, Σe and Σe·(z−m)."""

    second: bool = False
    squares: bool = False
    total: bool = False
    argmax: bool = False


class Moments(NamedTuple):
    """Sums over the vocabulary of one row of logits z, with ``e = exp(z − m)``.

    Every tensor is (N,), or (S, N) where the vocabulary was taken in S parts.

    Attributes:
        maximum: m.
        sum_exp: Σe.
        first: Σe·(z−m).
        second: Σe·(z−m)².
        squares: Σe².
        total: Σz.
        argmax: the first column that holds the maximum, int64.
    """

    maximum: Tensor
    sum_exp: Tensor
    first: Tensor
    second: Tensor | None = None
    squares: Tensor | None = None
    total: Tensor | None = None
    argmax: Tensor | None = None

    @property
    def log_sum(self) -> Tensor:
        """Log Σe. With m apart from it, log p = (z − m) − log Σe is exact for any m."""
        return self.sum_exp.log()


class Sced(NamedTuple):
    """The sparsity-calibrated term of a row's gradient, λ·p·(f'(p) − R).

    Attributes:
        weight: λ, shape (N,), float32.
        mean_slope: R = Σ p·f'(p), shape (N,), float32.
        alpha: exponent of ``|p·log(pV)|``, at least 1.
        beta: exponent of 1 − p, at least 0.
    """

    weight: Tensor
    mean_slope: Tensor
    alpha: float
    beta: float
