"""The vocabulary head written as it is defined: all logits, and autograd."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ftlib.ops.statistics import Statistic
from ftlib.ops.token_loss import TokenLoss
from ftlib.ops.vocabulary_head import HeadOutput, Reduction


def vocabulary_head_reference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    statistics: Sequence[Statistic] | None = None,
    loss: TokenLoss | None = None,
    weights: Tensor | None = None,
    reduction: Reduction = "mean",
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
) -> HeadOutput:
    """Return what :func:`ftlib.ops.vocabulary_head` returns, from N × V logits.

    The specification: every statistic from its definition, every gradient from
    autograd, computed in float64. Its losses are differentiable as a whole.
    """
    kept = targets != ignore_index
    z = logit_scale * (hidden.double() @ weight.double().T)
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    log_p = z.log_softmax(-1)
    y = targets.where(kept, 0)[..., None]
    found = _statistics(z, log_p, y)
    found = {name: value.where(kept, 0) for name, value in found.items()}
    found["argmax"] = z.argmax(-1).where(kept, -1)
    found["top1_hit"] = (z.argmax(-1) == targets) & kept
    default: tuple[Statistic, ...] = () if loss else ("log_prob",)
    asked = {name: found[name] for name in statistics or default}
    if loss is None:
        return HeadOutput(**asked)
    each = _token_loss(loss, found, log_p).where(kept, 0)
    each = each if weights is None else weights.double() * each
    total = each.sum() / (kept.sum().clamp(min=1) if reduction == "mean" else 1)
    return HeadOutput(loss=total, token_loss=each.detach(), **asked)


def _statistics(z: Tensor, log_p: Tensor, y: Tensor) -> dict[str, Tensor]:
    p = log_p.exp()
    entropy = -(p * log_p).sum(-1)
    return {
        "log_prob": log_p.gather(-1, y)[..., 0],
        "entropy": entropy,
        "log_sum_exp": z.logsumexp(-1),
        "collision_prob": p.square().sum(-1),
        "mean_logit": z.mean(-1),
        "varentropy": (p * log_p.square()).sum(-1) - entropy.square(),
    }


def _token_loss(loss: TokenLoss, at: dict[str, Tensor], log_p: Tensor) -> Tensor:
    smooth = (1 - loss.label_smoothing) * -at["log_prob"]
    smooth = smooth - loss.label_smoothing * log_p.mean(-1)
    total = loss.cross_entropy * smooth
    log_columns, p = math.log(log_p.shape[-1]), log_p.exp()
    total = total + loss.entropy * at["entropy"]
    total = total + loss.z_loss * at["log_sum_exp"].square()
    total = total + loss.kl_to_uniform * (log_columns - at["entropy"])
    if loss.sced:
        distance = (p * (log_p + log_columns)).abs()
        sced = distance**loss.alpha * (-torch.expm1(log_p)) ** loss.beta
        total = total + loss.sced * sced.sum(-1)
    return total
