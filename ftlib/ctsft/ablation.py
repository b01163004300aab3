"""What heads do in the model itself: it is run with some replaced by their means.

This is the truth that the decomposition (:mod:`ftlib.ctsft.decomposition`) estimates.
It shares no equation with it: hooks replace what a head gathers, z, before the output
projection, and everything behind that is the model's own.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ftlib.ctsft.architectures import describe
from ftlib.ctsft.batches import (
    BalancedMean,
    Inputs,
    LabelledBatch,
    complete,
    evaluating,
    last_logits,
    margins,
)
from ftlib.ctsft.heads import Head, all_heads, check_heads


@contextmanager
def mean_ablated(model: Any, heads: Iterable[Head], means: Tensor) -> Iterator[None]:
    """Let a model run with heads replaced by their means, at all positions.

    Args:
        model: see :func:`ftlib.ctsft.architectures.describe`. Also what contains it,
            and what shares its modules, is ablated.
        heads: may be empty.
        means: μ of every head, (layers, heads, head_dim).

    Raises:
        ValueError: the model does not have the heads, or the means do not fit.
    """
    parts, heads = describe(model), set(heads)
    check_heads(parts, heads)
    expected = (parts.layers, parts.heads, parts.head_dim)
    if means.shape != expected:
        raise ValueError(f"means have shape {tuple(means.shape)}, not {expected}")
    with ExitStack() as hooks:
        for layer in sorted({head.layer for head in heads}):
            chosen = sorted(head.index for head in heads if head.layer == layer)
            output = parts.blocks[layer].attention.o.module
            hook = _Replacement(chosen, means[layer])
            hooks.callback(output.register_forward_pre_hook(hook).remove)
        yield


class _Replacement:
    """A hook that puts means in the place of heads.

    Attributes:
        heads: their indices.
        means: of all heads of the layer, (heads, head_dim).
    """

    def __init__(self, heads: Sequence[int], means: Tensor) -> None:
        self.heads = list(heads)
        self.means = means

    def __call__(self, module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        """Return z, (B, T, heads · head_dim), with the heads replaced."""
        (z,) = args
        replaced = z.unflatten(-1, self.means.shape).clone()
        replaced[..., self.heads, :] = self.means[self.heads].to(z)
        return (replaced.flatten(-2),)


def label_logits(model: Any, inputs: Inputs, token_ids: Tensor) -> Tensor:
    """Return the logits of the labels where each example's answer is read, (B, C).

    Args:
        model: with a head; whatever hooks it has act.
        inputs: as in :func:`ftlib.ctsft.decomposition.trace`. The last token is read,
            unless the model gives one row of logits for each example.
        token_ids: the token of each label, or 0, 1, … for a classifier; int64 (C,).
    """
    with evaluating(model):
        logits = last_logits(model, complete(model, inputs))
    return logits[:, token_ids]


def mean_margin(
    model: Any, batches: Iterable[LabelledBatch], token_ids: Tensor
) -> float:
    """Return m: the mean margin of the right label, with each label counting the same.

    The margin is the label's logit minus the mean of the other labels'.

    Args:
        model: with a head; whatever hooks it has act.
        batches: inputs, and the label of each example, int64 (B,): c for the c-th of
            ``token_ids``.
        token_ids: the token of each label, or 0, 1, … for a classifier; int64 (C,).

    Raises:
        ValueError: a label has no example.
    """
    balanced = BalancedMean(len(token_ids))
    for inputs, labels in batches:
        margin = margins(label_logits(model, inputs, token_ids), labels)
        balanced.add(margin, torch.ones_like(labels), labels)
    return balanced.mean().item()


def ablation_effects(
    model: Any,
    batches: Iterable[LabelledBatch],
    means: Tensor,
    token_ids: Tensor,
    *,
    heads: Sequence[Head] | None = None,
) -> Tensor:
    """Return what the margin loses when each head alone is replaced by its mean.

    It is what :func:`ftlib.ctsft.decomposition.scores` estimates, for one forward pass
    per head and batch.

    Args:
        model: with a head.
        batches: as in :func:`mean_margin`.
        means: μ of every head, (layers, heads, head_dim).
        token_ids: as in :func:`mean_margin`.
        heads: by default all, layer by layer.

    Returns:
        m(model) − m(model without the head), (heads,).
    """
    batches = list(batches)
    whole = mean_margin(model, batches, token_ids)
    effects = []
    for head in all_heads(model) if heads is None else heads:
        with mean_ablated(model, [head], means):
            effects.append(whole - mean_margin(model, batches, token_ids))
    return torch.tensor(effects)


def faithfulness(
    model: Any,
    circuit: Collection[Head],
    batches: Iterable[LabelledBatch],
    means: Tensor,
    token_ids: Tensor,
) -> float:
    """Return how much of the model's margin a circuit has by itself.

    F(C) = (m(C) − m(∅)) / (m(all) − m(∅)), where m(C) is the mean margin with every
    head outside C replaced by its mean: 1 for all heads, 0 for none. A circuit can have
    more than 1.

    Args:
        model: with a head.
        circuit: C.
        batches: as in :func:`mean_margin`.
        means: μ of every head, (layers, heads, head_dim).
        token_ids: as in :func:`mean_margin`.

    Raises:
        ValueError: the heads make no difference together, so that nothing is a share
            of it.
    """
    return faithfulnesses(model, [circuit], batches, means, token_ids)[0]


def faithfulnesses(
    model: Any,
    circuits: Sequence[Collection[Head]],
    batches: Iterable[LabelledBatch],
    means: Tensor,
    token_ids: Tensor,
) -> list[float]:
    """Return :func:`faithfulness` of several circuits.

    The margins of all heads and of none are measured only once.
    """
    batches, heads = list(batches), set(all_heads(model))
    kept: list[Collection[Head]] = [(), heads, *circuits]
    margin = []
    for inside in kept:
        with mean_ablated(model, heads - set(inside), means):
            margin.append(mean_margin(model, batches, token_ids))
    none, everything, *others = margin
    if everything == none:
        raise ValueError(
            "the margin is the same with all heads and with none, so a circuit's share"
            " of the difference does not exist"
        )
    return [(m - none) / (everything - none) for m in others]
