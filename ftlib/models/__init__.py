"""Models by short name, wherever they are found, and tiny ones made on the spot."""

from ftlib.models.loading import load_causal_lm, load_seq2seq_lm
from ftlib.models.sources import (
    Holding,
    ModelCorrupt,
    ModelUnavailable,
    available,
    catalogue,
    locate,
)

__all__ = [
    "Holding",
    "ModelCorrupt",
    "ModelUnavailable",
    "available",
    "catalogue",
    "load_causal_lm",
    "load_seq2seq_lm",
    "locate",
]
