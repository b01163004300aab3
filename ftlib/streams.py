"""Random numbers for one purpose each, so that none depends on how others are used."""

from __future__ import annotations

from zlib import crc32

import numpy as np


def stream(seed: int, purpose: str) -> int:
    """A seed of its own for each purpose.

    >>> stream(0, "order"), stream(0, "adapters")
    (1428798525, 2492358481)
    """
    sequence = np.random.SeedSequence((seed, crc32(purpose.encode())))
    return int(sequence.generate_state(1)[0])


def generator(seed: int, purpose: str) -> np.random.Generator:
    """A generator of its own for each purpose."""
    return np.random.default_rng(stream(seed, purpose))
