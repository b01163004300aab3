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
from ftlib.data.sets import gsm8k

__all__ = [
    "DataCorrupt",
    "DataUnavailable",
    "Holding",
    "catalogue",
    "fetch",
    "gsm8k",
    "read_csv",
    "read_jsonl",
    "sha256",
]
