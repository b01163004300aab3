"""What losses over target tokens share: where they are, and what each weighs.

The terms of a batch can be averaged in two ways (``Mean``). With n examples of T_i
target tokens, token t of example i weighs

* ``token``: 1 / Σ_j T_j. This is transformers' own loss. A long target weighs more
  than a short one, and since the denominator belongs to the batch, a batch worked
  through in two chunks is another training than the whole.
* ``example``: 1 / (n T_i). Every example weighs the same, and the loss is a mean over
  examples, as :mod:`ftlib.training` asks: accumulation and several processes then
  change nothing. Where all targets have one length, the two agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ftlib.ops import HeadOutput, OutputHead, TokenLoss, output_head, vocabulary_head
from ftlib.ops.rows import accumulator
from ftlib.ops.statistics import Statistic

Mean = Literal["example", "token"]

IGNORED = -100
"""The label of a token that is no target."""


def head_and_targets(
    model: Any, labels: Tensor, inputs: dict[str, Any]
) -> tuple[OutputHead, Tensor]:
    """Run a model up to its head, and put hidden states beside their targets.

    Args:
        model: an encoder-decoder or a decoder-only model of transformers, wrapped by
            PEFT or not.
        labels: int64 (rows, T). For an encoder-decoder, what its decoder should write,
            from the first token on. For a decoder-only model, aligned with
            ``input_ids``: the label of a token is predicted from those before it.
        inputs: what else the model takes. An encoder-decoder's ``decoder_input_ids``
            are made from the labels, as the model does it, unless they are given.

    Returns:
        The head's factors and the targets, of as many positions, T, or T − 1 in a
        decoder-only model.

    Raises:
        ValueError: labels and token ids do not fit, or the decoder's inputs are neither
            given nor to be made.
        TypeError: see :func:`ftlib.ops.output_head`.
    """
    ids, length = "input_ids", labels.shape[1]
    if model.config.is_encoder_decoder:
        ids = "decoder_input_ids"
        if inputs.get(ids) is None:
            inputs = {**inputs, ids: _decoder_inputs(model, labels)}
    if inputs[ids].shape != labels.shape:
        raise ValueError(
            f"labels have shape {tuple(labels.shape)}, {ids} {tuple(inputs[ids].shape)}"
            ": give one label for each token"
        )
    # With a cache, transformers would not tell packed examples apart.
    head = output_head(model, **inputs | {"use_cache": False})
    # Soft prompts of PEFT stand before the tokens and have no labels.
    hidden = head.hidden[:, -length:]
    if not model.config.is_encoder_decoder:
        hidden, labels = hidden[:, :-1], labels[:, 1:]
    return head._replace(hidden=hidden), labels


def _decoder_inputs(model: Any, labels: Tensor) -> Tensor:
    if not hasattr(model, "prepare_decoder_input_ids_from_labels"):
        raise ValueError(
            f"{type(model).__name__} does not say how its decoder's inputs follow from"
            " the labels: pass decoder_input_ids, the labels shifted right"
        )
    return model.prepare_decoder_input_ids_from_labels(labels)


def token_weights(
    head: OutputHead, targets: Tensor, mean: Mean, example: Tensor | None = None
) -> Tensor:
    """Return each target's weight in the mean, zero where there is no target.

    Args:
        head: what the loss is computed from; float64 if its hidden states are that,
            otherwise float32, is the dtype of the weights.
        targets: int64 (rows, T), −100 where there is none.
        mean: what the loss is a mean over.
        example: int64 (rows, T), the number, from 0, of the example that each position
            is of; by default every row is an example.

    Raises:
        ValueError: there is no such mean.
    """
    if mean not in get_args(Mean):
        raise ValueError(f"mean is {mean!r}: choose example or token")
    is_target = targets != IGNORED
    if mean == "token":
        count = is_target.sum().clamp(min=1)
    elif example is None:
        count = len(targets) * is_target.sum(dim=1, keepdim=True).clamp(min=1)
    else:
        numbers = example.flatten()
        ones = is_target.flatten().to(numbers.dtype)
        lengths = torch.zeros_like(numbers).index_add(0, numbers, ones)
        count = (numbers.max() + 1) * lengths[example].clamp(min=1)
    return is_target.to(accumulator(head.hidden.dtype)) / count


def weighted_loss(
    loss: TokenLoss,
    head: OutputHead,
    targets: Tensor,
    weights: Tensor,
    statistics: Sequence[Statistic],
) -> HeadOutput:
    """Return Σ weight · loss with statistics of the distributions.

    The logits are never stored: see :func:`ftlib.ops.vocabulary_head`.
    """
    return vocabulary_head(
        head.hidden,
        head.weight,
        targets,
        loss=loss,
        weights=weights,
        reduction="sum",
        statistics=statistics,
        logit_scale=head.logit_scale,
        softcap=head.softcap,
        ignore_index=IGNORED,
    )


def left_padded(
    prompts: Sequence[Sequence[int]], padding: int
) -> tuple[Tensor, Tensor]:
    """Put prompts into one tensor so that all end together, to be continued.

    Args:
        prompts: token ids, of one prompt or more.
        padding: the token before the shorter ones.

    Returns:
        Token ids, and 1 where they are real or 0, both int64 (n, longest).

    >>> left_padded([[5, 6, 7], [8]], padding=0)
    (tensor([[5, 6, 7], [0, 0, 8]]), tensor([[1, 1, 1], [0, 0, 1]]))
    """
    width = max(map(len, prompts))
    ids = [[padding] * (width - len(p)) + list(p) for p in prompts]
    real = [[0] * (width - len(p)) + [1] * len(p) for p in prompts]
    return torch.tensor(ids), torch.tensor(real)
