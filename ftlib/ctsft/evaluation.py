"""What a model of labels in tokens gets right."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ftlib.ctsft.ablation import label_logits
from ftlib.ctsft.batches import LabelledBatch
from ftlib.ctsft.tasks import Collator, Item, Tokenizer, encode, label_tokens
from ftlib.outcomes import Booleans

_BATCH = 128


class Questions(NamedTuple):
    """Items of one task, as a model reads them.

    Attributes:
        batches: inputs, and the label of each.
        token_ids: the token of each label, int64 (C,).
    """

    batches: list[LabelledBatch]
    token_ids: Tensor


def questions(
    items: Sequence[Item],
    tokenizer: Tokenizer,
    words: Sequence[str],
    *,
    max_length: int,
    batch_size: int = _BATCH,
) -> Questions:
    """Turn items into batches.

    Args:
        items: at least one.
        tokenizer: turns text into ids.
        words: the label words.
        max_length: of a prompt, in tokens.
        batch_size: items in a batch.

    Raises:
        ValueError: as :func:`ftlib.ctsft.tasks.encode` and
            :func:`ftlib.ctsft.tasks.label_tokens`.
    """
    examples = encode(items, tokenizer, words, max_length).examples
    collate = Collator()
    batches = [
        collate(examples[start : start + batch_size])
        for start in range(0, len(examples), batch_size)
    ]
    tokens = label_tokens(tokenizer, words, items[0].prompt)
    return Questions(batches, torch.tensor(tokens))


def is_right(model: Any, asked: Questions) -> Booleans:
    """Say which questions a model answers rightly, [n].

    Its answer is the label of the highest logit; what it would say of other words does
    not count.
    """
    found: Iterable[Tensor] = (
        label_logits(model, inputs, asked.token_ids).argmax(-1).cpu() == labels
        for inputs, labels in asked.batches
    )
    return np.concatenate([right.numpy() for right in found])
