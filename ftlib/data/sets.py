"""One loader for each data set."""

from __future__ import annotations

from typing import Literal, get_args

from ftlib.data.reading import read_jsonl
from ftlib.data.registry import fetch

Gsm8kSplit = Literal["train", "test"]


def gsm8k(split: Gsm8kSplit) -> list[dict[str, str]]:
    """Load GSM8K: 7,473 questions to train on, 1,319 to test with.

    Returns:
        Rows of ``question`` and ``answer``; an answer's last line is ``#### NUMBER``,
        and its calculations are annotated as ``<<3*4=12>>``.

    Raises:
        ValueError: there is no such split.
        DataUnavailable: the file is nowhere to be found.
        DataCorrupt: the file is damaged or altered.
    """
    if split not in get_args(Gsm8kSplit):
        raise ValueError(f"GSM8K has no split {split!r}: choose train or test")
    return read_jsonl(fetch(f"math/gsm8k/{split}.jsonl"))
