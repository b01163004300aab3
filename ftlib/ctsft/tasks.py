r"""Texts with labels as questions that a decoder answers with one token.

A prompt is a text and what is asked of it; the answer is a label word, which the model
reads off its logits after the prompt's last token. The words and the prompts are ours:
of the paper's it is only known that each label is a single token.

=============  ===================================  =================================
data           prompt                               label words
=============  ===================================  =================================
NusaX          ``…\nSentiment:``                    positive, neutral, negative
IndoNLI, XNLI  ``…\nQuestion: … Yes, maybe or       yes (entailment), maybe (neutral),
               no?\nAnswer:``                       no (contradiction)
=============  ===================================  =================================

They are English in every language, so that nothing but the text changes between proxy
and target. From rows to a batch:

>>> from ftlib.ctsft import tasks
>>> words = tasks.SENTIMENT_WORDS
>>> items = tasks.few_shot(tasks.nusax("javanese", "train"), words, 32, seed=0)
>>> encoding = tasks.encode(items, tokenizer, words, max_length=128)
>>> encoding.truncated
0
>>> inputs, labels = tasks.Collator(pad=0)(encoding.examples)
>>> label_tokens = tasks.label_tokens(tokenizer, words, items[0].prompt)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple, Protocol

import torch
from torch.nn.utils.rnn import pad_sequence

from ftlib.ctsft.batches import LabelledBatch
from ftlib.data.sets import (
    IndonliSplit,
    InferencePair,
    NusaxSplit,
    XnliSplit,
)
from ftlib.data.sets import indonli as load_indonli
from ftlib.data.sets import nusax as load_nusax
from ftlib.data.sets import xnli as load_xnli
from ftlib.streams import generator

SENTIMENT_WORDS = ("positive", "neutral", "negative")
INFERENCE_WORDS = ("yes", "maybe", "no")
_INFERENCE: Mapping[str, str] = MappingProxyType(
    dict(zip(("entailment", "neutral", "contradiction"), INFERENCE_WORDS, strict=True))
)


class Item(NamedTuple):
    """A prompt and the right answer.

    Attributes:
        text: what is read; the part that may be shortened.
        question: what follows it, up to where the answer stands.
        label: the answer, a label word.
    """

    text: str
    question: str
    label: str

    @property
    def prompt(self) -> str:
        """Text and question."""
        return self.text + self.question


class Tokenizer(Protocol):
    """A tokenizer of transformers, or a :class:`ftlib.words.WordVocabulary`."""

    def encode(self, text: str) -> list[int]:
        """Turn a text into token ids."""


# --- items --------------------------------------------------------------------


def nusax(language: str, split: NusaxSplit) -> list[Item]:
    """Return NusaX as items; labels are ``SENTIMENT_WORDS``.

    Raises:
        ValueError, DataUnavailable, DataCorrupt: as :func:`ftlib.data.nusax`.
    """
    return [
        Item(row["text"], "\nSentiment:", row["label"])
        for row in load_nusax(language, split)
    ]


def indonli(split: IndonliSplit) -> list[Item]:
    """Return IndoNLI as items; labels are ``INFERENCE_WORDS``.

    Raises:
        ValueError, DataUnavailable, DataCorrupt: as :func:`ftlib.data.indonli`.
    """
    return [_inference(row) for row in load_indonli(split)]


def xnli(language: str, split: XnliSplit) -> list[Item]:
    """Return XNLI as items; labels are ``INFERENCE_WORDS``.

    Raises:
        ValueError, DataUnavailable, DataCorrupt: as :func:`ftlib.data.xnli`.
    """
    return [_inference(row) for row in load_xnli(language, split)]


def _inference(row: InferencePair) -> Item:
    return Item(
        row["premise"],
        f"\nQuestion: {row['hypothesis']} Yes, maybe or no?\nAnswer:",
        _INFERENCE[row["label"]],
    )


# --- draws --------------------------------------------------------------------


def few_shot(
    items: Sequence[Item], words: Sequence[str], n: int, seed: int
) -> list[Item]:
    """Draw n items to train on, of every label as many, or one more.

    A larger draw of the same seed contains the smaller one. Draws from two languages of
    a parallel corpus, with the same seed, are translations of one another.

    Args:
        items: to draw from.
        words: the task's label words.
        n: how many, at least one of each label.
        seed: of the draw.

    Raises:
        ValueError: a label has too few items, or n is too small.
    """
    if n < len(words):
        raise ValueError(f"{n} items cannot have {len(words)} labels: draw more")
    return _draw(items, words, n, seed, "few-shot")


def balanced(
    items: Sequence[Item], words: Sequence[str], per_label: int, seed: int
) -> list[Item]:
    """Draw the same number of items of each label, to discover a circuit with.

    Args:
        items: to draw from.
        words: the task's label words.
        per_label: items of each, at least 1.
        seed: of the draw, which is another than that of :func:`few_shot`.

    Raises:
        ValueError: a label has too few items, or ``per_label`` is too small.
    """
    if per_label < 1:
        raise ValueError(f"per_label must be at least 1, not {per_label}")
    return _draw(items, words, per_label * len(words), seed, "discovery")


def _draw(
    items: Sequence[Item], words: Sequence[str], n: int, seed: int, purpose: str
) -> list[Item]:
    """Take one item of each label in turn; the seed decides who is first."""
    rng = generator(seed, purpose)
    order = [words[at] for at in rng.permutation(len(words))]
    drawn: list[list[Item]] = []
    for at, word in enumerate(order):
        having = [item for item in items if item.label == word]
        share = len(range(at, n, len(order)))
        if len(having) < share:
            raise ValueError(
                f"asked for {share} items with the label {word!r}, found "
                f"{len(having)} among {len(items)}: draw fewer, or give more items"
            )
        drawn.append([having[i] for i in rng.permutation(len(having))])
    return [drawn[k % len(order)][k // len(order)] for k in range(n)]


def divide(labels: Sequence[str], parts: int, seed: int) -> list[list[int]]:
    """Deal the places of a list into parts that have equally many of each label.

    The languages of a parallel corpus have translations at equal places. What is drawn
    from different parts, in whatever languages, has no text in common.

    Args:
        labels: of the items.
        parts: how many.
        seed: of the deal.

    Returns:
        The places of each part, ascending. Parts differ by at most one item in all,
        and one of each label.
    """
    rng = generator(seed, "division")
    deck: list[int] = []
    for label in sorted(set(labels)):
        places = [at for at, own in enumerate(labels) if own == label]
        deck += rng.permutation(places).tolist()
    return [sorted(deck[part::parts]) for part in range(parts)]


# --- tokens -------------------------------------------------------------------


class Encoded(NamedTuple):
    """A prompt as token ids, and the index of its label among the task's words."""

    ids: list[int]
    label: int


class Encoding(NamedTuple):
    """Encoded items in their order, and how many of them lost the end of their text."""

    examples: list[Encoded]
    truncated: int


def label_tokens(
    tokenizer: Tokenizer, words: Sequence[str], prompt: str
) -> tuple[int, ...]:
    """Return the token of each label word, as it is after the prompt.

    A word and the same word after a space are different tokens to most tokenizers, so
    each is encoded where it will stand: after the prompt and a space.

    Args:
        tokenizer: turns text into ids, and puts nothing after them.
        words: the label words.
        prompt: any prompt of the task.

    Raises:
        ValueError: a word is not exactly one token there, or two words have one token.
    """
    before = tokenizer.encode(prompt)
    tokens: list[int] = []
    for word in words:
        after = tokenizer.encode(f"{prompt} {word}")
        if after[: len(before)] != before or len(after) != len(before) + 1:
            raise ValueError(
                f"{word!r} is not one token after {prompt[-20:]!r}: the prompt ends in "
                f"the tokens {before[-3:]}, with the word in {after[-4:]}. Choose "
                "another label word, or let the tokenizer add no token at the end"
            )
        tokens.append(after[-1])
    if len(set(tokens)) < len(tokens):
        raise ValueError(
            f"the label words {', '.join(words)} have the tokens {tokens}: each needs "
            "one of its own"
        )
    return tuple(tokens)


def encode(
    items: Iterable[Item], tokenizer: Tokenizer, words: Sequence[str], max_length: int
) -> Encoding:
    """Turn items into token ids; a prompt that is too long loses the end of its text.

    Args:
        items: prompts and labels.
        tokenizer: turns text into ids.
        words: the task's label words; an example's label is an index into them.
        max_length: of a prompt, in tokens.

    Raises:
        ValueError: a label is not among the words, or a question alone is too long.
    """
    examples, truncated = [], 0
    for item in items:
        if item.label not in words:
            raise ValueError(
                f"an item has the label {item.label!r}, the words are "
                f"{', '.join(words)}: {item.prompt!r}"
            )
        ids = tokenizer.encode(item.prompt)
        if len(ids) > max_length:
            ids = _shortened(ids, tokenizer.encode(item.text), max_length, item)
            truncated += 1
        examples.append(Encoded(ids, words.index(item.label)))
    return Encoding(examples, truncated)


def _shortened(
    ids: list[int], text: list[int], max_length: int, item: Item
) -> list[int]:
    """Take tokens out before the question, which starts where the text's own end."""
    pairs = enumerate(zip(ids, text, strict=False))
    start = next((at for at, (a, b) in pairs if a != b), min(len(ids), len(text)))
    question = ids[start:]
    if len(question) >= max_length:
        raise ValueError(
            f"a question has {len(question)} tokens and leaves no room for its text in "
            f"max_length {max_length}: {item.question!r}"
        )
    return ids[: max_length - len(question)] + question


@dataclass(frozen=True)
class Collator:
    """Makes a batch of encoded items, padded on the right.

    The answer is read after the last token of a prompt, where the mask is last 1.

    Attributes:
        pad: id of the padding; any will do, for the mask says where it is.
    """

    pad: int = 0

    def __call__(self, examples: Sequence[Encoded]) -> LabelledBatch:
        """Return ids and mask, and labels.

        Returns:
            ``input_ids`` and ``attention_mask``, int64 (B, T); labels, int64 (B,).
        """
        rows = [torch.tensor(example.ids) for example in examples]
        masks = [torch.ones_like(row) for row in rows]
        inputs = {
            "input_ids": pad_sequence(rows, True, self.pad),
            "attention_mask": pad_sequence(masks, True, 0),
        }
        return inputs, torch.tensor([example.label for example in examples])
