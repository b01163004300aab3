"""Records as runs leave them, for the tests that spoil them: also in a process."""

import math
from pathlib import Path

from ftlib.results import Metric, Record, append


def record(seed: int = 0, arm: str = "relax", **changes) -> Record:
    known = {
        "method": "toy",
        "experiment": "mixture",
        "arm": arm,
        "seed": seed,
        "scale": "cpu",
        "settings": {"steps": 10, "rate": 1e-4, "what": "λ → 0", "layers": [1, 2]},
        "metrics": {"kl0": Metric(1 / 3, 7), "kl1": Metric(math.nan), "kl2": Metric(5)},
        "seconds": 1.5,
        "peak_memory_bytes": 2**20,
        "device": "cpu, 2 cores",
        "versions": {"torch": "2.13.0"},
        "data": {"gsm8k/test.jsonl": "0f" * 32},
        "commit": None,
        "finished": "2026-01-31T12:00:00Z",
    }
    return Record(**(known | changes))


def append_one_by_one(directory: Path, arm: str, seeds: int) -> None:
    for seed in range(seeds):
        append([record(seed, arm)], directory)
