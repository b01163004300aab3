"""What is done to a tile of logits, row by row: the PyTorch twins of the kernels.

These functions are the specification of ``ftlib.kernels.vocabulary_head``, the path
on the CPU, and the path on GPUs below compute capability 8.0. They compute in float32,
or in float64 where the tile is float64.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ftlib.kernels.types import (
    SMALLEST_COMPLEMENT,
    Logits,
    MomentFlags,
    Moments,
    Sced,
)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that sums over the vocabulary are kept in."""
    return torch.promote_types(dtype, torch.float32)


def to_logits(products: Tensor, transform: Logits) -> Tensor:
    """Turn products ``x·w`` (any shape) into logits, in the accumulator's dtype."""
    z = products.to(accumulator(products.dtype))
    if transform.scale != 1:
        z = transform.scale * z
    if transform.softcap is None:
        return z
    return transform.softcap * torch.tanh(z / transform.softcap)


def slope(logits: Tensor, transform: Logits) -> Tensor | float:
    """Return dz / d(x·w) at logits z."""
    if transform.softcap is None:
        return transform.scale
    return transform.scale * (1 - (logits / transform.softcap).square())


def row_moments(tile: Tensor, transform: Logits, flags: MomentFlags) -> Moments:
    """Sum over each row of a tile.

    Args:
        tile: products x·w, shape (N, V).
        transform: how they become logits.
        flags: the optional moments that are wanted.
    """
    z = to_logits(tile, transform)
    maximum, argmax = z.max(dim=-1)  # the first of equal maxima
    shifted = z - maximum[:, None]
    e = shifted.exp()
    first = e * shifted
    return Moments(
        maximum=maximum,
        sum_exp=e.sum(-1),
        first=first.sum(-1),
        second=(first * shifted).sum(-1) if flags.second else None,
        squares=e.square().sum(-1) if flags.squares else None,
        total=z.sum(-1) if flags.total else None,
        argmax=argmax if flags.argmax else None,
    )


def merge_moments(parts: Moments) -> Moments:
    """Merge the moments (S, N) of S parts of the vocabulary, in order, into (N,).

    A part whose maximum lies d ≤ 0 below the row's is moved to the row's:
    Σe ← eᵈΣe, Σe(z−m) ← eᵈ(Σe(z−m) + dΣe), and so on.
    """
    maximum, part = parts.maximum.max(dim=0)
    d = parts.maximum - maximum
    factor = d.exp()
    s, t, t2 = parts.sum_exp, parts.first, parts.second
    first = (factor * (t + d * s)).sum(0)
    second = squares = total = argmax = None
    if t2 is not None:
        second = (factor * (t2 + d * (2 * t + d * s))).sum(0)
    if parts.squares is not None:
        squares = (factor.square() * parts.squares).sum(0)
    if parts.total is not None:
        total = parts.total.sum(0)
    if parts.argmax is not None:
        argmax = parts.argmax.gather(0, part[None])[0]
    return Moments(maximum, (factor * s).sum(0), first, second, squares, total, argmax)


def row_gradient_(
    tile: Tensor,
    maximum: Tensor,
    log_sum: Tensor,
    coefficients: Tensor,
    transform: Logits,
    sced: Sced | None = None,
) -> None:
    """Overwrite a tile of products x·w with a gradient with respect to them.

    With u = log p, every column gets ``p(A + Bu + Cp + Eu²) + F``, and with SCED also
    ``λp(f'(p) − R)``; then the slope of the logit transform.

    Args:
        tile: products, shape (N, V).
        maximum: m of each row, shape (N,).
        log_sum: log Σ exp(z − m), shape (N,). Apart from m, so that u is exact for
            logits far from zero.
        coefficients: A, B, C, E, F, shape (5, N).
        transform: how products become logits.
        sced: the term of :class:`ftlib.kernels.types.Sced`, where the loss has one.
    """
    z = to_logits(tile, transform)
    u = (z - maximum[:, None]).sub_(log_sum[:, None])
    gradient = smooth_gradient(u, coefficients[:, :, None])
    if sced is not None:
        f_slope = sced_slope(u, tile.shape[-1], sced.alpha, sced.beta)
        f_slope.sub_(sced.mean_slope[:, None]).mul_(u.exp())
        gradient.addcmul_(f_slope, sced.weight[:, None])
    tile.copy_(gradient.mul_(slope(z, transform)))


def smooth_gradient(log_p: Tensor, coefficients: Tensor) -> Tensor:
    """Return ``p(A + Bu + Cp + Eu²) + F`` at u = log p."""
    A, B, C, E, F = coefficients
    p = log_p.exp()
    inner = torch.addcmul(B, E, log_p).mul_(log_p).addcmul_(C, p).add_(A)
    return inner.mul_(p).add_(F)


def row_sced(
    tile: Tensor,
    maximum: Tensor,
    log_sum: Tensor,
    argmax: Tensor,
    alpha: float,
    beta: float,
    transform: Logits,
) -> tuple[Tensor, Tensor]:
    """Return Σ f(p) over a row, and Σ p·f'(p) over all of it but the argmax.

    ``f(p) = |p log(pV)|^α (1−p)^β``. For β < 1 the slope at the argmax has no bound as
    p → 1, which is why that column is left to the caller.
    """
    columns = tile.shape[-1]
    u = to_logits(tile, transform) - maximum[:, None] - log_sum[:, None]
    weighted_slope = u.exp() * sced_slope(u, columns, alpha, beta)
    weighted_slope.scatter_(1, argmax[:, None], 0.0)
    return sced_value(u, columns, alpha, beta).sum(-1), weighted_slope.sum(-1)


def sced_value(log_p: Tensor, columns: int, alpha: float, beta: float) -> Tensor:
    """Return ``f(p) = |p log(pV)|^α (1−p)^β`` at log p."""
    distance = log_p.exp() * (log_p + math.log(columns))
    return distance.abs() ** alpha * (-torch.expm1(log_p)) ** beta


def sced_slope(log_p: Tensor, columns: int, alpha: float, beta: float) -> Tensor:
    """Return f'(p), with 1 − p held above 0 where it is divided by."""
    growth, decay, complement = _sced_terms(log_p, columns, alpha, beta)
    held = complement.clamp(min=SMALLEST_COMPLEMENT)
    return growth * complement**beta - decay * held ** (beta - 1)


def sced_slope_by_complement(
    log_p: Tensor, columns: int, alpha: float, beta: float
) -> Tensor:
    """Return (1−p)·f'(p), which is finite as p → 1 where f' is not."""
    growth, decay, complement = _sced_terms(log_p, columns, alpha, beta)
    return growth * complement ** (beta + 1) - decay * complement**beta


def _sced_terms(
    log_p: Tensor, columns: int, alpha: float, beta: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the G, K and 1−p of f' = G(1−p)^β − K(1−p)^(β−1).

    With L = log(pV) and a = pL: G = α|a|^(α−1) sign(a) (L+1) and K = β|a|^α.
    """
    L = log_p + math.log(columns)
    a = log_p.exp() * L
    growth = alpha * a.abs() ** (alpha - 1) * a.sign() * (L + 1)
    return growth, beta * a.abs() ** alpha, -torch.expm1(log_p)
