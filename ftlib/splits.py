"""Which questions are for training and which for tests, on any machine, for good."""

from __future__ import annotations

import hashlib
from typing import Literal

Split = Literal["pretrain", "train", "validation", "test"]


def split_of(question: str) -> Split:
    """Assign a question to one split for good, by a hash of its text.

    The first byte of the SHA-256 decides, so that the splits share no question on any
    machine and with any seed: half of all questions are for pre-training, a quarter for
    training, an eighth each for validation and test.

    >>> [split_of(f"What is {n} + 3?") for n in (2, 3)]
    ['pretrain', 'test']
    """
    byte = hashlib.sha256(question.encode()).digest()[0]
    if byte < 128:
        return "pretrain"
    if byte < 192:
        return "train"
    return "validation" if byte < 224 else "test"
