r"""The objective of SFT and CFT: cross-entropy on the tokens of the target.

With question x, response y and critique c,

    SFT:  max_θ log P(y | x; θ)
    CFT:  max_θ log P(c | [x; y]; θ) = max_θ Σ_t log P(c_t | x, y, c_<t; θ)

(arXiv 2501.17703). One equation: the two differ in what the prompt holds, and that is
decided in :mod:`ftlib.cft.data`. Labels of −100 take no part: their rows never reach
the output head, so the gradient of their logits is zero and not just small.

The paper does not say how the terms of a batch are averaged, and there are two ways
(:data:`Mean`). With n examples of T_i target tokens, token t of example i weighs

* ``token``: 1 / Σ_j T_j. This is transformers' own loss. A long target weighs more
  than a short one, and since the denominator belongs to the batch, a batch worked
  through in two chunks is another training than the whole.
* ``example``: 1 / (n T_i). Every example weighs the same, and the loss is a mean over
  examples, as :mod:`ftlib.training` asks: accumulation and several processes then
  change nothing. It is the default. Where all targets have one length, the two agree.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from ftlib.cft.data import IGNORED
from ftlib.ops import TokenLoss, output_head, vocabulary_head
from ftlib.training import Metrics

Mean = Literal["example", "token"]


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
    if labels.shape != input_ids.shape:
        raise ValueError(
            f"labels have shape {tuple(labels.shape)}, input_ids"
            f" {tuple(input_ids.shape)}: give one label for each token"
        )
    if mean not in get_args(Mean):
        raise ValueError(f"mean is {mean!r}: choose example or token")
    if position_ids is not None:
        inputs["position_ids"] = position_ids
    # With a cache, transformers would not tell packed examples apart.
    head = output_head(model, input_ids=input_ids, **inputs | {"use_cache": False})
    targets = labels[:, 1:]
    example = _example_of_token(labels, position_ids)[:, 1:]
    weights, tokens, examples = _weights(targets, example, mean)
    # Soft prompts of PEFT stand before the tokens and have no labels.
    hidden = head.hidden[:, -labels.shape[1] : -1]
    out = vocabulary_head(
        hidden,
        head.weight,
        targets,
        loss=TokenLoss(),
        weights=weights,
        reduction="sum",
        statistics=("top1_hit",),
        logit_scale=head.logit_scale,
        softcap=head.softcap,
    )
    assert out.loss is not None
    assert out.top1_hit is not None
    accuracy = (weights * out.top1_hit).sum()
    return MaskedLoss(out.loss, tokens, accuracy, examples)


def _example_of_token(labels: Tensor, position_ids: Tensor | None) -> Tensor:
    """Number the examples of a batch, and give every token its example's number."""
    if position_ids is None:
        rows = torch.arange(len(labels), device=labels.device)
        return rows[:, None].expand_as(labels)
    return (position_ids == 0).flatten().cumsum(0).view_as(labels) - 1


def _weights(
    targets: Tensor, example: Tensor, mean: Mean
) -> tuple[Tensor, Tensor, Tensor]:
    """Return each target's weight in the mean, and the counts of targets, examples."""
    is_target = targets != IGNORED
    tokens, examples = is_target.sum(), example.max() + 1
    if mean == "token":
        return is_target / tokens.clamp(min=1), tokens, examples
    lengths = torch.zeros_like(example.flatten(), dtype=torch.float32)
    lengths = lengths.index_add(0, example.flatten(), is_target.flatten().float())
    weights = is_target / (examples * lengths[example].clamp(min=1))
    return weights, tokens, examples


class Learner(nn.Module):
    """A model together with its loss, for :func:`ftlib.training.train`.

    What Accelerate wraps, for several processes or for mixed precision, has to contain
    the loss, because the loss calls the model's parts one by one.

    Attributes:
        model: the model, whose weights are trained.
        mean: what the loss is a mean over.
    """

    def __init__(self, model: nn.Module, mean: Mean = "example") -> None:
        super().__init__()
        self.model = model
        self.mean: Mean = mean

    def forward(self, **batch: Any) -> MaskedLoss:
        """Return :func:`masked_loss` of a collator's batch."""
        return masked_loss(self.model, **batch, mean=self.mean)


def training_loss(learner: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, Metrics]:
    """Return a batch's loss with its metrics, as :func:`ftlib.training.train` takes it.

    ``target_tokens`` is their number per example, so that like every metric it is a
    mean over examples.
    """
    out: MaskedLoss = learner(**batch)
    per_example = out.tokens / out.examples
    return out.loss, {"accuracy": out.accuracy, "target_tokens": per_example}
