r"""The objective of SFT and CFT: cross-entropy on the tokens of the target.

With question x, response y and critique c::

    SFT:  max_θ log P(y | x; θ)
    CFT:  max_θ log P(c | [x; y]; θ) = max_θ Σ_t log P(c_t | x, y, c_<t; θ)

(arXiv 2501.17703). One equation: the two differ in what the prompt holds, and that is
decided in :mod:`ftlib.cft.data`. Labels of −100 take no part: their rows never reach
the output head, so the gradient of their logits is zero and not just small.

The paper does not say how the terms of a batch are averaged. There are two ways
(:mod:`ftlib.sequences`): over its target tokens, or over its examples, which is
the default.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ftlib import training
from ftlib.ops import TokenLoss
from ftlib.sequences import (
    IGNORED,
    Mean,
    head_and_targets,
    token_weights,
    weighted_loss,
)
from ftlib.training import Metrics


class MaskedLoss(NamedTuple):
    """A loss over the target tokens of a batch, all scalars.

    Attributes:
        loss: with gradient.
        tokens: number of target tokens, int64.
        accuracy: share of target tokens that had the largest logit, averaged as the
            loss is.
        examples: number of examples, int64.
    """

    loss: Tensor
    tokens: Tensor
    accuracy: Tensor
    examples: Tensor


def masked_loss(
    model: nn.Module,
    input_ids: Tensor,
    labels: Tensor,
    *,
    mean: Mean = "example",
    position_ids: Tensor | None = None,
    **inputs: Any,
) -> MaskedLoss:
    """Return the mean cross-entropy of the labels that are not −100.

    The logits are never stored: see :func:`ftlib.ops.vocabulary_head`. An example
    without target tokens adds 0 to the mean over examples and counts as one of them.

    Args:
        model: a decoder-only model of transformers, wrapped by PEFT or not. Under
            several processes or in mixed precision, wrap it in :class:`Learner`.
        input_ids: int64 [rows, T].
        labels: int64 [rows, T], aligned with ``input_ids``: the label of a token is
            predicted from those before it.
        mean: what the loss is a mean over.
        position_ids: int64 [rows, T], for packed rows only: an example starts wherever
            it is 0. Without it, every row is an example.
        inputs: what else the model takes, such as ``attention_mask``.

    Raises:
        ValueError: labels and input_ids, or the mean's name, do not fit.
        TypeError: see :func:`ftlib.ops.output_head`.
    """
    inputs["input_ids"] = input_ids
    if position_ids is not None:
        inputs["position_ids"] = position_ids
    head, targets = head_and_targets(model, labels, inputs)
    example = _example_of_token(labels, position_ids)
    weights = token_weights(head, targets, mean, example[:, 1:])
    out = weighted_loss(TokenLoss(), head, targets, weights, ("top1_hit",))
    assert out.loss is not None
    assert out.top1_hit is not None
    accuracy = (weights * out.top1_hit).sum()
    tokens = (targets != IGNORED).sum()
    return MaskedLoss(out.loss, tokens, accuracy, example.max() + 1)


def _example_of_token(labels: Tensor, position_ids: Tensor | None) -> Tensor:
    """Number the examples of a batch, and give every token its example's number."""
    if position_ids is None:
        rows = torch.arange(len(labels), device=labels.device)
        return rows[:, None].expand_as(labels)
    return (position_ids == 0).flatten().cumsum(0).view_as(labels) - 1


class Learner(training.Learner):
    """A model together with :func:`masked_loss`, for :func:`ftlib.training.train`.

    Args:
        model: the model, whose weights are trained.
        mean: what the loss is a mean over.
    """

    def __init__(self, model: nn.Module, mean: Mean = "example") -> None:
        super().__init__(model, partial(masked_loss, mean=mean))


def training_loss(learner: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, Metrics]:
    """Return a batch's loss with its metrics, as :func:`ftlib.training.train` takes it.

    ``target_tokens`` is their number per example, so that like every metric it is a
    mean over examples.
    """
    out: MaskedLoss = learner(**batch)
    per_example = out.tokens / out.examples
    return out.loss, {"accuracy": out.accuracy, "target_tokens": per_example}
