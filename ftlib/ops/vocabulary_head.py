"""From the last hidden state to a loss, without the logits in between."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from ftlib.ops.rows import accumulator
from ftlib.ops.statistics import Statistic, Statistics, moments_for
from ftlib.ops.tiles import Backend, loss_pass, statistics_pass
from ftlib.ops.token_loss import TokenLoss

Reduction = Literal["mean", "sum"]


class HeadOutput(NamedTuple):
    """What :func:`vocabulary_head` was asked for; ``None`` in the other fields.

    Attributes:
        loss: the reduced loss, shape ().
        token_loss: each token's weighted loss, detached.
        log_prob: log p_y of the target.
        entropy: H = −Σ p log p, in nats.
        log_sum_exp: log Σ exp z.
        collision_prob: Σ p².
        mean_logit: Σ z / V.
        varentropy: Σ p (log p)² − H².
        argmax: the first column of the largest logit; −1 in ignored rows.
        top1_hit: whether that is the target; false in ignored rows.
    """

    loss: Tensor | None = None
    token_loss: Tensor | None = None
    log_prob: Tensor | None = None
    entropy: Tensor | None = None
    log_sum_exp: Tensor | None = None
    collision_prob: Tensor | None = None
    mean_logit: Tensor | None = None
    varentropy: Tensor | None = None
    argmax: Tensor | None = None
    top1_hit: Tensor | None = None


def vocabulary_head(
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
    backend: Backend | None = None,
) -> HeadOutput:
    """Return statistics of softmax(hidden · weightᵀ), or a loss made from them.

    The N × V logits are never stored: they exist for a tile of rows at a time, in a
    workspace of at most 512 MiB. The gradient by ``weight`` is summed in float32
    (V × D × 4 bytes, beside the workspace) where the inputs are narrower than that.

    Without ``loss`` every float statistic is differentiable. The forward pass costs
    one matmul and the backward pass three, the first of which makes the tile again.
    With ``loss`` the gradients are formed while the tile exists, three matmuls in all;
    that needs the loss before the call, so what it returns beside ``loss`` is detached.

    Nothing is shifted: ``targets[i]`` is the token that ``hidden[i]`` predicts. Under
    autocast ``hidden`` and ``weight`` are cast as a linear layer's would be.

    Args:
        hidden: last hidden states, shape (..., D), float.
        weight: of the output layer, shape (V, D), dtype of ``hidden``.
        targets: int64, shape (...), each in [0, V) or ``ignore_index``.
        statistics: the fields of :class:`HeadOutput` that are wanted; by default
            ``log_prob`` without a loss, and none with one.
        loss: the terms of a per-token loss.
        weights: factors of the tokens' losses, shape (...), constants of any
            dtype. −c makes the default loss Σ c·log p_y.
        reduction: whether the summed loss is divided by the number of tokens that are
            not ignored (0 if there are none).
        logit_scale: multiplies hidden·w: ``d_model**-0.5`` for the last hidden states
            of a T5 with tied embeddings. :func:`ftlib.ops.output_head` finds it.
        softcap: c in z ← c·tanh(z / c), as in Gemma 2.
        ignore_index: the target of rows that take no part: their statistics and
            losses are exactly 0, and their hidden states get a gradient of exactly 0.
        backend: ``torch``, ``chunked`` (tiles, with Triton kernels for their rows) or
            ``fused`` (statistics in a Triton matmul, no tile); by default chosen by
            device, dtype and D. A loss needs tiles.

    Returns:
        A :class:`HeadOutput`, its tensors shaped as ``targets``, float32 (float64 for
        float64 inputs).

    Raises:
        ValueError: shapes, dtypes or names do not fit; the message says which.

    >>> hidden, weight = torch.zeros(2, 8), torch.ones(4, 8)
    >>> vocabulary_head(hidden, weight, torch.tensor([0, 3])).log_prob.exp()
    tensor([0.2500, 0.2500])
    """
    asked = _statistics_asked(statistics, loss)
    hidden, weight = _autocast(hidden, weight)
    _check(hidden, weight, targets, weights, loss, reduction, softcap, backend)
    shape, flags = targets.shape, list(moments_for(asked))
    settings = (float(logit_scale), softcap, ignore_index, backend or "")
    flat = (hidden.flatten(0, -2), weight, targets.flatten())
    if loss is None:
        values, argmax = statistics_pass(*flat, flags, *settings)
        return _output(asked, values, argmax, targets)
    factors = torch.ones_like(targets) if weights is None else weights
    factors = factors.flatten().to(accumulator(hidden.dtype))
    grad = torch.is_grad_enabled()
    needed = (grad and hidden.requires_grad, grad and weight.requires_grad)
    total, token_loss, values, argmax, *_ = loss_pass(
        *flat, factors, list(astuple(loss)), flags, *settings, *needed
    )
    if reduction == "mean":
        total = total / (targets != ignore_index).sum().clamp(min=1)
    output = _output(asked, values.detach(), argmax, targets)
    return output._replace(loss=total, token_loss=token_loss.detach().view(shape))


def _statistics_asked(
    statistics: Sequence[Statistic] | None, loss: TokenLoss | None
) -> tuple[Statistic, ...]:
    if statistics is None:
        return () if loss else ("log_prob",)
    if unknown := sorted(set(statistics) - set(get_args(Statistic))):
        raise ValueError(
            f"unknown statistics {', '.join(unknown)}: choose from "
            f"{', '.join(get_args(Statistic))}"
        )
    return tuple(statistics)


def _autocast(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    kind = hidden.device.type
    if not torch.is_autocast_enabled(kind):
        return hidden, weight
    dtype = torch.get_autocast_dtype(kind)
    return hidden.to(dtype), weight.to(dtype)


def _output(
    asked: tuple[Statistic, ...], values: Tensor, argmax: Tensor, targets: Tensor
) -> HeadOutput:
    found = Statistics(*values.unbind(0))._asdict() | {
        "argmax": argmax,
        "top1_hit": (argmax == targets.flatten()) & (argmax >= 0),
    }
    return HeadOutput(**{name: found[name].view(targets.shape) for name in asked})


def _check(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    weights: Tensor | None,
    loss: TokenLoss | None,
    reduction: str,
    softcap: float | None,
    backend: str | None,
) -> None:
    """Refuse what does not fit together, naming it."""
    if weight.dim() != 2 or hidden.dim() < 2 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"hidden has shape {tuple(hidden.shape)} and weight {tuple(weight.shape)}: "
            "expected (..., D) and (V, D)"
        )
    if hidden.dtype != weight.dtype or not hidden.is_floating_point():
        raise ValueError(
            f"hidden is {hidden.dtype} and weight {weight.dtype}: cast one, or call "
            "under torch.autocast"
        )
    if targets.shape != hidden.shape[:-1] or targets.dtype != torch.int64:
        raise ValueError(
            f"targets are {targets.dtype} of shape {tuple(targets.shape)}: expected "
            f"int64 of shape {tuple(hidden.shape[:-1])}"
        )
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap is {softcap}: give a positive number, or None")
    if reduction not in get_args(Reduction):
        raise ValueError(f"reduction is {reduction!r}: choose mean or sum")
    if backend is not None and backend not in get_args(Backend):
        raise ValueError(
            f"backend is {backend!r}: choose from {', '.join(get_args(Backend))}"
        )
    if loss is None:
        if weights is not None:
            raise ValueError("weights are factors of a loss: give a loss too")
        return
    if backend == "fused":
        raise ValueError(
            "a loss forms its gradients from tiles, which the fused backend never "
            "stores: use backend='chunked', or leave it to be chosen"
        )
    if weights is not None and weights.shape != targets.shape:
        raise ValueError(
            f"weights have shape {tuple(weights.shape)}, targets {tuple(targets.shape)}"
        )
    if weights is not None and weights.requires_grad:
        raise ValueError(
            "weights are constants of the loss: detach them, or differentiate "
            "log_prob without a loss"
        )
