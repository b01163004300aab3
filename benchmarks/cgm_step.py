"""Time and memory of a CGM-relax step, over batch sizes and numbers of constraints.

    python benchmarks/cgm_step.py [--out results.json]

Every size runs in a process of its own, so that its peak memory is its own. The first
table is the tiny story model at batch 64–4096; the second the mixture with 1–1000
coordinates, a constraint each, at batch 1000, with the time to solve its dual.
"""

from __future__ import annotations

import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import typer

from ftlib import runtime
from ftlib.cgm.calibrate import Generative, OnPolicyLoss, Scorer, frozen_copy
from ftlib.cgm.dual import solve_dual
from ftlib.cgm.experiment import asked_about, story_constraints
from ftlib.cgm.mixture import right_of_zero, two_bumps
from ftlib.cgm.settings import CalibrationSettings
from ftlib.cgm.stories import TRAINED, VOCABULARY
from ftlib.models.tiny import tiny_gpt
from ftlib.training import TrainingSettings

BATCHES = (64, 256, 1024, 4096)
CONSTRAINTS = (1, 10, 100, 1000)
MIXTURE_BATCH = 1000
WARMUP, REPEATS = 3, 10


def story_step(batch: int, chunk: int | None) -> dict[str, float]:
    """A relax step of the story model (8 constraints)."""
    model = asked_about(tiny_gpt(len(VOCABULARY)).eval(), list(TRAINED))
    model = model.to(runtime.device())
    loss = _loss(model, story_constraints, torch.zeros(8), batch, chunk)
    return _measure(lambda: _step(loss, batch))


def mixture_step(constraints: int) -> dict[str, float]:
    """A relax step of a product of mixtures, and its dual from ten batches."""
    model = two_bumps(dimensions=constraints).to(runtime.device())
    target = torch.full((constraints,), 0.51, device=runtime.device())
    loss = _loss(model, right_of_zero, target, MIXTURE_BATCH, None)
    h = right_of_zero(model.sample(10 * MIXTURE_BATCH))
    start = time.perf_counter()
    solve_dual(h, target)
    dual = time.perf_counter() - start
    return _measure(lambda: _step(loss, MIXTURE_BATCH)) | {"dual_seconds": dual}


def _loss(
    model: Generative,
    h: Callable[[Any], torch.Tensor],
    target: torch.Tensor,
    batch: int,
    chunk: int | None,
) -> OnPolicyLoss:
    settings = CalibrationSettings(
        "relax",
        TrainingSettings(steps=1, batch_size=batch, learning_rate=1e-3),
        kl_weight=0.1,
        score_chunk=chunk,
    )
    return OnPolicyLoss(model, frozen_copy(model), h, target, settings, None, None)


def _step(loss: OnPolicyLoss, batch: int) -> None:
    scorer = Scorer(loss.model, loss.settings.score_chunk)
    scorer.zero_grad()
    loss(scorer, torch.arange(batch))[0].backward()


def _measure(step: Callable[[], None]) -> dict[str, float]:
    for _ in range(WARMUP):
        step()
    runtime.reset_peak_memory()
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        step()
        if runtime.device().type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return {
        "steps_per_second": 1 / statistics.median(seconds),
        "peak_mebibytes": runtime.peak_memory() / 2**20,
    }


def _apart(function: Callable[..., dict[str, float]], *args: Any) -> dict[str, float]:
    """Call a function in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, args)


def main(out: Path | None = None) -> None:
    """Run both tables, print them, and write them to a JSON file if one is named."""
    rows = []
    for batch in BATCHES:
        for chunk in (None, 256):
            if chunk is None or chunk < batch:
                row = {"batch": batch, "chunk": chunk, "constraints": 8}
                rows.append(row | _apart(story_step, batch, chunk))
                print(rows[-1], flush=True)
    for constraints in CONSTRAINTS:
        row = {"batch": MIXTURE_BATCH, "chunk": None, "constraints": constraints}
        rows.append(row | _apart(mixture_step, constraints))
        print(rows[-1], flush=True)
    if out:
        document = {"report": runtime.report(), "rows": rows}
        out.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
