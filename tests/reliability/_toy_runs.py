"""A plan of short runs: a target of processes, and the `ftlib` command with it alone.

Usage: python _toy_runs.py run toy --scale cpu
"""

import json
import os
import random
import time
from pathlib import Path

from _processes import Operations

from ftlib import cli, experiments
from ftlib.experiments import Arm

experiments.METHODS["toy"] = __spec__.name if __spec__ else "_toy_runs"
SEEDS = 4
WANTED = {(arm, seed) for arm in "ab" for seed in range(SEEDS)}


def plan(scale):
    pause = float(os.environ.get("TOY_SECONDS", "0.01"))

    def measure(seed):
        time.sleep(pause)
        return {"draw": random.random()}

    return [Arm("e", name, {"layers": 2}, measure) for name in "ab"]


def run(results: Path, operation: int | None = None, report: Path | None = None):
    """Run the command; count its operations on files, and be killed before one."""
    os.environ |= {"FTLIB_RESULTS_DIR": str(results), "FTLIB_DEVICE": "cpu", "CI": "1"}
    operations, begun = Operations(results, operation), time.monotonic()
    try:
        cli.app(["run", "toy", "--scale", "cpu", "--seeds", str(SEEDS)])
    finally:
        told = {"operations": operations.count, "seconds": time.monotonic() - begun}
        if report:
            report.write_text(json.dumps(told))


if __name__ == "__main__":
    cli.app()
