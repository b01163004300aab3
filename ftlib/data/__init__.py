"""Pinned data files: found in a folder, the cache or the network, and verified."""

from ftlib.data.checksum import sha256
from ftlib.data.reading import read_csv, read_jsonl
from ftlib.data.registry import (
    DataCorrupt,
    DataUnavailable,
    Holding,
    catalogue,
    fetch,
)
from ftlib.data.sets import (
    MathProblem,
    Problem,
    amc23,
    gsm8k,
    math500,
    minerva,
    svamp,
)

__all__ = [
    "DataCorrupt",
    "DataUnavailable",
    "Holding",
    "MathProblem",
    "Problem",
    "amc23",
    "catalogue",
    "fetch",
    "gsm8k",
    "math500",
    "minerva",
    "read_csv",
    "read_jsonl",
    "sha256",
    "svamp",
]
