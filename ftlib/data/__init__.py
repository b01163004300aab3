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
    ExplainedQuestion,
    Inference,
    MathProblem,
    Problem,
    SensePair,
    amc23,
    comve,
    cose,
    ecqa,
    esnli,
    gsm8k,
    math500,
    minerva,
    svamp,
)

__all__ = [
    "DataCorrupt",
    "DataUnavailable",
    "ExplainedQuestion",
    "Holding",
    "Inference",
    "MathProblem",
    "Problem",
    "SensePair",
    "amc23",
    "catalogue",
    "comve",
    "cose",
    "ecqa",
    "esnli",
    "fetch",
    "gsm8k",
    "math500",
    "minerva",
    "read_csv",
    "read_jsonl",
    "sha256",
    "svamp",
]
