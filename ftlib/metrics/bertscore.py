"""BERTScore, and nBERT: explanations are compared with people's, if the label is right.

BERTScore (Zhang et al. 2020) embeds the tokens of two texts in context, finds for every
token of one the most similar token of the other, and averages the similarities. This is
the plain form, without idf weights and without rescaling by a baseline, token for token
as the authors' package does it (bert-score 0.3.13):

* The tokens that begin and end a text have weight 0 in the averages. Other tokens may
  still be matched with them.
* RoBERTa's tokenizers read a text as if a space stood before it.
* An empty text has the score 0. A text longer than the encoder takes is cut.

Published numbers use :data:`PUBLISHED`, and cannot be compared with those of another
encoder, such as the small one that :func:`load_encoder` gives by default: every result
names its own. Unscaled scores are high for any two texts, by RoBERTa about 0.8 to 0.9.

It measures plausibility, likeness to what people wrote. Whether a model decided by what
it explains is another matter, for which see :mod:`ftlib.caref.faithfulness`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    RobertaTokenizer,
)

from ftlib import runtime
from ftlib.models import locate
from ftlib.results import Interval, bootstrap

Floats = npt.NDArray[np.float64]

PUBLISHED = ("roberta-large", 17)
"""Encoder and layer of published scores: those of the package for English.

It is not among ftlib's models. Where it is at hand, make an :class:`Encoder` of it.
"""
STAND_IN = ("minilm-l6", 4)
"""A small encoder of the package index; its layer lies about as deep, at two thirds."""

_BATCH = 64


@dataclass(frozen=True)
class Encoder:
    """What embeds the tokens.

    Attributes:
        model: an encoder of transformers, in evaluation mode.
        tokenizer: the encoder's.
        layer: whose output is taken, from 1 to the number of layers.
        name: for the results.
    """

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    layer: int
    name: str

    def __str__(self) -> str:
        return f"{self.name}, layer {self.layer}"


class Scores(NamedTuple):
    """BERTScores of n pairs, from −1 to 1, mostly far above 0.

    Attributes:
        precision: mean over the candidate's tokens, [n].
        recall: mean over the reference's tokens, [n].
        f1: their harmonic mean, [n].
        truncated: different texts that had to be cut.
    """

    precision: Floats
    recall: Floats
    f1: Floats
    truncated: int


@dataclass(frozen=True)
class NBert:
    """Scores of n explanations, from 0 to 100.

    Attributes:
        scores: best F1 over the gold explanations, whatever the label, [n].
        correct: whether the label is right, [n].
        truncated: different texts that had to be cut.
        encoder: what they were measured with.
    """

    scores: Floats
    correct: npt.NDArray[np.bool_]
    truncated: int
    encoder: str

    @property
    def accuracy(self) -> Interval:
        """Share of right labels, times 100."""
        return bootstrap(100.0 * self.correct)

    @property
    def gated(self) -> Interval:
        """NBERT: the mean score, with 0 where the label is wrong."""
        return bootstrap(np.where(self.correct, self.scores, 0.0))

    @property
    def ungated(self) -> Interval:
        """The mean score of all explanations: right or wrong, the label is ignored."""
        return bootstrap(self.scores)


def load_encoder(
    name: str = STAND_IN[0],
    layer: int = STAND_IN[1],
    *,
    device: torch.device | None = None,
) -> Encoder:
    """Load an encoder by its short name in :mod:`ftlib.models`, in float32.

    Args:
        name: short name of the model.
        layer: whose output is taken, from 1.
        device: where to put it; by default :func:`ftlib.runtime.device`.

    Raises:
        ValueError: no model has the name, or it has no such layer.
        ModelUnavailable: the model is neither here nor to be had.
        ModelCorrupt: the weights are damaged or altered.
    """
    folder = locate(name)
    model = AutoModel.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, use_safetensors=True
    )
    if not 1 <= layer <= model.config.num_hidden_layers:
        raise ValueError(
            f"{name} has layers 1 to {model.config.num_hidden_layers}, not {layer}"
        )
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return Encoder(model.to(device or runtime.device()).eval(), tokenizer, layer, name)


def bert_score(
    candidates: Sequence[str], references: Sequence[str], encoder: Encoder
) -> Scores:
    """Compare n texts with one reference each.

    Args:
        candidates: n texts.
        references: n texts.
        encoder: what embeds them.

    Raises:
        ValueError: there are not as many candidates as references.
    """
    if len(candidates) != len(references):
        raise ValueError(
            f"expected as many references as candidates, got {len(references)} "
            f"and {len(candidates)}"
        )
    texts, truncated = _embed([*candidates, *references], encoder)
    matches = [
        greedy_match(texts[candidate.strip()], texts[reference.strip()])
        for candidate, reference in zip(candidates, references, strict=True)
    ]
    precision, recall = np.array(matches, np.float64).reshape(-1, 2).T
    total = precision + recall
    f1 = np.divide(
        2 * precision * recall, total, out=np.zeros_like(total), where=total != 0
    )
    return Scores(precision, recall, f1, truncated)


class Embedded(NamedTuple):
    """A text of t tokens.

    Attributes:
        vectors: of length 1, [t, d].
        weights: 1, or 0 for tokens that only begin or end the text, [t].
    """

    vectors: Tensor
    weights: Tensor


def greedy_match(candidate: Embedded, reference: Embedded) -> tuple[float, float]:
    """Match every token with the most similar one of the other text.

    Returns:
        Precision and recall, the weighted means of the similarities, from the
        candidate's side and from the reference's. Both are 0 if a text is empty.
    """
    if not (candidate.weights.any() and reference.weights.any()):
        return 0.0, 0.0
    similarity = candidate.vectors @ reference.vectors.T
    precision = similarity.amax(1) @ candidate.weights / candidate.weights.sum()
    recall = similarity.amax(0) @ reference.weights / reference.weights.sum()
    return precision.item(), recall.item()


def nbert(
    labels: Sequence[str],
    gold_labels: Sequence[str],
    explanations: Sequence[str],
    gold_explanations: Sequence[Sequence[str]],
    encoder: Encoder,
) -> NBert:
    """Score explanations as FEB does (Marasović et al. 2022).

    An explanation's score is its best BERTScore F1 among the gold ones, all in lower
    case, times 100. nBERT is the mean over all items with 0 for those whose label is
    wrong, so it cannot exceed the accuracy.

    Args:
        labels: n labels; right if they are the gold ones, case and outer spaces aside.
        gold_labels: n labels.
        explanations: n texts; ``UNK`` for an output that had none, as
            :func:`ftlib.caref.tasks.read` gives it.
        gold_explanations: n times one text or more.
        encoder: what embeds them.

    Raises:
        ValueError: the lengths differ, there are no items, or one has no gold
            explanation.
    """
    lengths = {len(labels), len(gold_labels), len(explanations), len(gold_explanations)}
    if len(lengths) > 1 or 0 in lengths:
        raise ValueError(
            "expected n ≥ 1 labels, gold labels, explanations and lists of gold "
            f"explanations, got {len(labels)}, {len(gold_labels)}, "
            f"{len(explanations)} and {len(gold_explanations)}"
        )
    empty = [i for i, gold in enumerate(gold_explanations) if not gold]
    if empty:
        raise ValueError(f"item {empty[0]} has no gold explanation")
    counts = [len(golds) for golds in gold_explanations]
    repeated = np.repeat(np.arange(len(counts)), counts)
    scores = bert_score(
        [explanations[i].lower() for i in repeated.tolist()],
        [gold.lower() for golds in gold_explanations for gold in golds],
        encoder,
    )
    starts = np.cumsum([0, *counts[:-1]])
    correct = [
        label.strip().lower() == gold.strip().lower()
        for label, gold in zip(labels, gold_labels, strict=True)
    ]
    return NBert(
        scores=100 * np.maximum.reduceat(scores.f1, starts),
        correct=np.array(correct),
        truncated=scores.truncated,
        encoder=str(encoder),
    )


@torch.no_grad()
def _embed(texts: Iterable[str], encoder: Encoder) -> tuple[dict[str, Embedded], int]:
    """Embed different texts, longest first; count those that were cut."""
    model: Any = encoder.model
    device = next(model.parameters()).device
    rows, truncated = _tokenize(dict.fromkeys(t.strip() for t in texts), encoder)
    order = sorted(rows, key=lambda text: -len(rows[text]))
    embedded = {}
    for start in range(0, len(order), _BATCH):
        batch = order[start : start + _BATCH]
        inputs = encoder.tokenizer.pad(
            {"input_ids": [rows[text] for text in batch]}, return_tensors="pt"
        ).to(device)
        states = model(**inputs, output_hidden_states=True).hidden_states[encoder.layer]
        vectors = nn.functional.normalize(states.float(), dim=-1)
        for text, row in zip(batch, vectors, strict=True):
            weights = _weights(rows[text], encoder.tokenizer)
            embedded[text] = Embedded(row[: len(weights)].cpu(), weights)
    return embedded, truncated


def _tokenize(
    texts: Iterable[str], encoder: Encoder
) -> tuple[dict[str, list[int]], int]:
    tokenizer = encoder.tokenizer
    # It tells a word that follows a space from one that does not.
    space = " " if isinstance(tokenizer, RobertaTokenizer) else ""
    rows, truncated = {}, 0
    for text in texts:
        spaced = space + text if text else ""
        rows[text] = tokenizer(spaced, truncation=True).input_ids
        whole = tokenizer(spaced, verbose=False).input_ids
        truncated += len(whole) > len(rows[text])
    return rows, truncated


def _weights(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> Tensor:
    outer = {tokenizer.cls_token_id, tokenizer.sep_token_id}
    return torch.tensor([float(index not in outer) for index in ids])
