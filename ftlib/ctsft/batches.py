"""Batches of labelled examples, and means in which each label counts the same."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Inputs = Mapping[str, Tensor]
"""What a model takes: ``input_ids`` (B, T), and perhaps ``attention_mask`` etc."""

LabelledBatch = tuple[Inputs, Tensor]
"""Inputs, and the class of each example, int64 (B,)."""


def complete(model: Any, inputs: Inputs) -> dict[str, Tensor]:
    """Return the inputs on the model's device, with a mask and positions of tokens.

    Positions count the tokens of the mask. Left-padded examples then get the positions
    that they would get right-padded, as in transformers' ``generate``, but not in a
    plain call of a model.

    Args:
        model: says whether it takes positions.
        inputs: at least ``input_ids``, (B, T).

    Raises:
        ValueError: there are no token ids, or an example has no token.
    """
    if "input_ids" not in inputs:
        raise ValueError(f"the batch has {', '.join(inputs)}: it needs input_ids")
    completed = {name: value.to(model.device) for name, value in inputs.items()}
    mask = completed.setdefault(
        "attention_mask", torch.ones_like(completed["input_ids"])
    )
    if not mask.any(-1).all():
        raise ValueError(
            "an example of the batch has no token: its attention_mask is all zeros"
        )
    takes_positions = inspect.signature(model.base_model.forward).parameters
    if "position_ids" in takes_positions and "position_ids" not in completed:
        completed["position_ids"] = (mask.long().cumsum(-1) - 1).clamp(min=0)
    return completed


def last_positions(mask: Tensor) -> Tensor:
    """Return where each row of a mask (B, T) is last 1, int64 (B,)."""
    places = torch.arange(mask.shape[-1], device=mask.device)
    return (places * mask.bool()).amax(-1)


def last_logits(model: Any, inputs: Inputs) -> Tensor:
    """Return the logits where each example's answer is read, (B, V).

    Args:
        model: with a head; in the mode it is in, and with gradients if they are on.
        inputs: with ``attention_mask``. The last token is read, unless the model gives
            one row of logits for each example.
    """
    positions = last_positions(inputs["attention_mask"])
    options: dict[str, Any] = {}
    # A large vocabulary times all positions would be most of the memory and work.
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        kept, positions = positions.unique(return_inverse=True)
        options["logits_to_keep"] = kept
    logits: Tensor = model(**inputs, **options).logits
    if logits.dim() == 3:
        logits = logits[torch.arange(len(logits), device=logits.device), positions]
    return logits


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch dropout off, without gradients; then put every module's mode back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def margins(logits: Tensor, labels: Tensor) -> Tensor:
    """Return each example's logit of its label minus the mean of the other labels'.

    Args:
        logits: of the labels alone, (..., B, C), C ≥ 2.
        labels: int64 (B,), each in [0, C).

    Returns:
        Shape (..., B). Linear in the logits, so it applies to parts of them as well.

    Raises:
        ValueError: there is one label only, or a label is out of range.
    """
    classes = logits.shape[-1]
    if classes < 2:
        raise ValueError("a margin is between labels: give two or more token ids")
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(
            f"labels run from {int(labels.min())} to {int(labels.max())}, but there"
            f" are {classes} token ids: label c means the c-th of them"
        )
    index = labels.to(logits.device).expand(logits.shape[:-1])[..., None]
    own = logits.gather(-1, index)[..., 0]
    return own - (logits.sum(-1) - own) / (classes - 1)


class BalancedMean:
    """A mean of which every label has the same share, whatever its number of examples.

    Attributes:
        classes: number of labels.
    """

    def __init__(self, classes: int) -> None:
        self.classes = classes
        self._sums: list[Tensor | None] = [None] * classes
        self._counts: list[Tensor | None] = [None] * classes

    def add(self, sums: Tensor, counts: Tensor, labels: Tensor) -> None:
        """Add a batch.

        Args:
            sums: of each example, (B, ...).
            counts: what each example's sum is a sum over, (B,).
            labels: int64 (B,), each in [0, classes).
        """
        for label in labels.unique().tolist():
            if not 0 <= label < self.classes:
                raise ValueError(
                    f"a batch has label {label}, but there are {self.classes} labels"
                )
            chosen = labels == label
            # bf16 sums stop growing after a few hundred terms.
            wide = torch.promote_types(sums.dtype, torch.float32)
            total, count = sums[chosen].to(wide).sum(0), counts[chosen].sum()
            before, counted = self._sums[label], self._counts[label]
            self._sums[label] = total if before is None else before + total
            self._counts[label] = count if counted is None else counted + count

    def mean(self) -> Tensor:
        """Return the mean over labels of the means within them.

        Raises:
            ValueError: a label has no example.
        """
        means = [
            total / count
            for total, count in zip(self._sums, self._counts, strict=True)
            if total is not None and count is not None
        ]
        if len(means) < self.classes:
            missing = [c for c, total in enumerate(self._sums) if total is None]
            raise ValueError(
                f"no example has label {', '.join(map(str, missing))}: a mean in which"
                " each label counts the same needs one of each"
            )
        return torch.stack(means).mean(0)
