"""Time and memory of the vocabulary head, beside the heads of other libraries.

    python benchmarks/vocabulary_head.py [--minutes 8] [--scale cpu|gpu]

Every head is checked against a reference before it is timed, and what each is judged by
is the time of its matrix products alone, at a rate measured on the same device. Arms
run in the order of their value until the minutes are over; each leaves a record in
``book/results/kernels/<scale>.json`` as soon as it ends.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib.metadata
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import peers
import torch
import typer
from agreement import Data, Reference, Size, make_problem, make_reference
from measuring import (
    ArmError,
    ArmTimeoutError,
    Budget,
    Memory,
    Times,
    Worker,
    matmul_rate,
    memory_of,
    scale_to_time,
    time_of,
)
from peers import IMPLEMENTATIONS, LOSSES, TASKS

from ftlib import runtime
from ftlib.results import Metric, Record, append, markdown_table

# The matrix products of 2·N·D·V operations that a task cannot do without: the logits
# once; again in a backward pass that kept none of them; and one for each gradient.
MATMULS = {peers.FORWARD: 1, peers.LOG_PROB: 1, peers.AUTOGRAD: 4}
MATMULS |= dict.fromkeys(LOSSES, 3)

# Per scale: the sizes with goals (T5-base, Qwen2.5-1.5B, and D = 2048), then others.
SIZES: dict[str, tuple[list[Size], list[Size]]] = {
    "gpu": (
        [Size(8192, 768, 32128), Size(8192, 1536, 151936), Size(8192, 2048, 151936)],
        [
            Size(8192, 2048, 256000),
            Size(8192, 512, 32128),
            Size(8192, 4096, 151936),
            Size(8192, 4096, 256000),
        ],
    ),
    "cpu": ([Size(512, 256, 32128)], [Size(512, 512, 32128)]),
}

# Milliseconds on an H200, set from its limits before anything was measured.
MILLISECONDS_GOALS = {
    peers.FORWARD: (0.90, 6.5, 8.6),
    peers.WITH_ENTROPY: (2.6, 21, 28),
}
RATIO_GOALS = {
    peers.AUTOGRAD: "≤ 1.40 × floor",
    peers.CAREF: "≥ 3 × naive's speed, ≥ 1.5 × torch.compile's",
}

ARM_SECONDS = 120.0
# Taken from the minutes for what comes before and after the arms.
AROUND_SECONDS = 10.0


class Arm(NamedTuple):
    """One head at one task."""

    size: Size
    data: Data
    task: str
    head: str

    @property
    def experiment(self) -> str:
        """What the arms that are compared have in common."""
        return f"{self.task}, {self.size}, {self.data}"


def plan(scale: str, offers: Mapping[str, tuple[str, ...]]) -> list[Arm]:
    """Return the arms in the order of their value.

    First peaked data at the sizes with goals; then flat data at the first of them,
    what compiles at each size, and the rest.

    Args:
        scale: whose sizes are taken.
        offers: the tasks of each head that is there.
    """
    goals, others = SIZES[scale]
    stages: list[tuple[list[Size], Data, bool]] = [
        (goals, "peaked", False),
        (goals[:1], "flat", False),
        (goals, "peaked", True),
        (others, "peaked", False),
        (goals[1:], "flat", False),
    ]
    return [
        Arm(size, data, task, head)
        for sizes, data, slow in stages
        for size in sizes
        for task in TASKS
        for head, tasks in offers.items()
        if task in tasks and IMPLEMENTATIONS[head].slow == slow
    ]


def floor_milliseconds(arm: Arm, rate: float) -> float:
    """Return the time of a task's matrix products at a rate in operations a second."""
    return 1000 * MATMULS[arm.task] * arm.size.matmul / rate


# --- in the process that measures --------------------------------------------------


class Measurement(NamedTuple):
    """What an arm did.

    Attributes:
        times: of the whole task.
        memory: likewise, without the inputs.
        input_bytes: of the problem.
        process_bytes: peak memory of the process.
        errors: relative error of each output.
        differing: the outputs whose error rounding does not explain.
    """

    times: Times
    memory: Memory
    input_bytes: int
    process_bytes: int
    errors: dict[str, float]
    differing: list[str]


def offer(head: str) -> tuple[str, ...] | str:
    """Return the tasks of a head, or the reason of its absence."""
    try:
        return tuple(IMPLEMENTATIONS[head].load(runtime.device()))
    except peers.AbsentError as error:
        return str(error)


def measure(arm: Arm) -> Measurement:
    """Check an arm's outputs, then measure its memory and its time."""
    gc.collect()
    if runtime.device().type == "cuda":
        torch.cuda.empty_cache()
    problem = make_problem(arm.size, arm.data)
    task = IMPLEMENTATIONS[arm.head].load(runtime.device())[arm.task]
    run = functools.partial(task, problem)
    reference, outputs = _reference(arm.task, arm.size, arm.data), run()
    errors, differing = reference.errors(outputs), reference.differing(outputs)
    del outputs
    memory, times = memory_of(run), time_of(run)
    input_bytes = sum(tensor.nbytes for tensor in problem)
    process_bytes = runtime.peak_memory()
    return Measurement(times, memory, input_bytes, process_bytes, errors, differing)


@functools.lru_cache(maxsize=1)
def _reference(task: str, size: Size, data: Data) -> Reference:
    return make_reference(task, make_problem(size, data))


# --- records -----------------------------------------------------------------------


class Context(NamedTuple):
    """What all records of a run share.

    Attributes:
        scale: where they are stored.
        rate: of a plain matmul, operations per second.
        absent: the heads that are not there, and why.
    """

    scale: str
    rate: float
    absent: dict[str, str]


def recorded(
    arm: Arm, seconds: float, worker: Worker, context: Context
) -> Record | None:
    """Measure an arm and append its record; an arm that failed leaves one too.

    ``None``, and no record, if the seconds that were left did not suffice.
    """
    start = time.perf_counter()
    limit = min(seconds, ARM_SECONDS)
    found: Measurement | str
    try:
        found = worker(measure, arm, seconds=limit)
    except ArmTimeoutError as error:
        if limit < ARM_SECONDS:
            return None
        found = str(error)
    except ArmError as error:
        found = str(error)
    record = make_record(arm, found, time.perf_counter() - start, context)
    append([record])
    return record


def make_record(
    arm: Arm, found: Measurement | str, seconds: float, context: Context
) -> Record:
    """Return the record of an arm, from what was measured or why nothing was."""
    settings = {
        "task": arm.task,
        **arm.size._asdict(),
        "data": arm.data,
        "dtype": str(runtime.precision().dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "peak_tflops": context.rate / 1e12,
        "absent": context.absent,
    }
    if isinstance(found, str):
        settings["failed"] = found
        metrics = {"milliseconds": Metric(math.nan, 0)}
    else:
        settings |= {"outputs": list(found.errors), "differing": found.differing}
        metrics = metrics_of(found, floor_milliseconds(arm, context.rate))
    return Record(
        method="kernels",
        experiment=arm.experiment,
        arm=arm.head,
        seed=0,
        scale=context.scale,
        settings=settings,
        metrics=metrics,
        seconds=seconds,
        peak_memory_bytes=0 if isinstance(found, str) else found.process_bytes,
        device=runtime.describe_device(),
        versions=versions(arm.head),
        data={},
        commit=runtime.git_commit(),
    )


def metrics_of(found: Measurement, floor: float) -> dict[str, Metric]:
    """Return a measurement as metrics; ``floor`` is in milliseconds."""
    median, low, high, repeats = found.times
    return {
        "milliseconds": Metric(median, repeats),
        "low": Metric(low, repeats),
        "high": Metric(high, repeats),
        "floor_fraction": Metric(floor / median, repeats),
        "extra_bytes": Metric(found.memory.extra, 1),
        "peak_bytes": Metric(found.memory.peak + found.input_bytes, 1),
        "max_error": Metric(max(found.errors.values()), len(found.errors)),
    }


def versions(head: str) -> dict[str, str]:
    """Return the versions that decide an arm's numbers."""
    name, found = IMPLEMENTATIONS[head].distribution, runtime.versions()
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        found[name] = importlib.metadata.version(name)
    return found


# --- tables ------------------------------------------------------------------------

HEADING = (
    "head|outputs|ms [20 %, 80 %]|× floor|× best peer|extra MiB|peak MiB|error|goal"
)


def tables(records: Iterable[Record]) -> str:
    """Return a Markdown table for each experiment, fastest first."""
    grouped: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        grouped[record.experiment].append(record)
    return "\n\n".join(
        f"### {experiment}\n\n{_table(group)}" for experiment, group in grouped.items()
    )


def _table(records: list[Record]) -> str:
    """Lay out one experiment. A head that differs is no peer to be measured by."""
    peer_times = [
        _milliseconds(record)
        for record in records
        if not record.arm.startswith("ours") and not _fault(record)
    ]
    best = min(peer_times, default=math.nan)
    ordered = sorted(records, key=lambda r: ("failed" in r.settings, _milliseconds(r)))
    rows = (_row(record, best) for record in ordered)
    return markdown_table([HEADING.split("|"), *rows])


def _row(record: Record, best: float) -> list[str]:
    label = f"{record.arm} {_fault(record)}".strip()
    if "failed" in record.settings:
        return [label, *[""] * 7, goal(record)]
    value = {name: metric.value for name, metric in record.metrics.items()}
    milliseconds = value["milliseconds"]
    return [
        label,
        str(len(record.settings["outputs"])),
        f"{milliseconds:#.4g} [{value['low']:#.4g}, {value['high']:#.4g}]",
        f"{1 / value['floor_fraction']:.2f}",
        f"{milliseconds / best:.2f}",
        f"{value['extra_bytes'] / 2**20:.0f}",
        f"{value['peak_bytes'] / 2**20:.0f}",
        f"{value['max_error']:.1g}",
        goal(record),
    ]


def _milliseconds(record: Record) -> float:
    return record.metrics["milliseconds"].value


def _fault(record: Record) -> str:
    """Say that an arm failed, or which of its outputs differ from the reference."""
    if "failed" in record.settings:
        return f"(failed: {record.settings['failed']})"
    differing = record.settings["differing"]
    return f"(differs: {', '.join(differing)})" if differing else ""


def goal(record: Record) -> str:
    """Return what one of our arms is meant to reach on a GPU, if anything."""
    settings, sizes = record.settings, SIZES["gpu"][0]
    size = Size(*(settings[name] for name in Size._fields))
    if not record.arm.startswith("ours") or size not in sizes:
        return ""
    if settings["task"] in MILLISECONDS_GOALS:
        return f"≤ {MILLISECONDS_GOALS[settings['task']][sizes.index(size)]} ms"
    return RATIO_GOALS.get(settings["task"], "")


# --- the run -----------------------------------------------------------------------


def inquire(worker: Worker) -> tuple[dict[str, tuple[str, ...]], dict[str, str]]:
    """Return the tasks of each head that is there, and why the others are not."""
    offers, absent = {}, {}
    for head in IMPLEMENTATIONS:
        try:
            found = worker(offer, head, seconds=ARM_SECONDS)
        except ArmError as error:
            found = str(error)
        if isinstance(found, str):
            absent[head] = found
        else:
            offers[head] = found
    return offers, absent


def run_arms(
    arms: Iterable[Arm], budget: Budget, run: Callable[[Arm, float], Record | None]
) -> tuple[list[Record], list[Arm]]:
    """Run what fits in the budget; return the records, and the arms without one.

    Args:
        arms: in the order of their value.
        budget: asked before each arm.
        run: takes an arm and the seconds that are left.
    """
    records: list[Record] = []
    skipped: list[Arm] = []
    for arm in arms:
        record = None
        if budget.fits(arm.head):
            with budget.spend(arm.head):
                record = run(arm, budget.left())
        if record is None:
            skipped.append(arm)
        else:
            records.append(record)
    return records, skipped


def report(
    records: Iterable[Record], skipped: Iterable[Arm], context: Context
) -> Iterable[str]:
    """Give the lines to print at the end."""
    yield runtime.report()
    yield f"plain matmul: {context.rate / 1e12:.3g} TFLOP/s\n"
    yield tables(records) + "\n"
    for head, reason in context.absent.items():
        yield f"absent: {head}: {reason}"
    late: dict[str, list[str]] = defaultdict(list)
    for arm in skipped:
        late[arm.experiment].append(arm.head)
    for experiment, heads in late.items():
        yield f"out of time: {experiment}: {', '.join(heads)}"


def main(minutes: float = 8.0, scale: str | None = None) -> None:
    """Measure every head that is there, record it, and print the tables."""
    budget = Budget(60 * minutes - AROUND_SECONDS)
    chosen = scale_to_time(scale)
    with Worker() as worker:
        rate = worker(matmul_rate, seconds=ARM_SECONDS)
        offers, absent = inquire(worker)
        context = Context(chosen, rate, absent)
        run = functools.partial(recorded, worker=worker, context=context)
        arms = runtime.progress(plan(chosen, offers), unit="arm")
        records, skipped = run_arms(arms, budget, run)
    print("\n".join(report(records, skipped, context)))


if __name__ == "__main__":
    typer.run(main)
