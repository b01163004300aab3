"""Run a method's experiments: every arm with every seed, each recorded at once.

A method's ``experiment.py`` defines ``plan(scale)``, which lists its arms. What is
recorded already is not run again, so that a stopped run is resumed by repeating it.
"""

from __future__ import annotations

import importlib
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ftlib import runtime
from ftlib.results import (
    Metric,
    NotWrittenError,
    Record,
    RecordKey,
    Results,
    append,
    as_json,
    read,
    results_path,
)

METHODS = {
    "caref": "ftlib.caref.experiment",
    "cft": "ftlib.cft.experiment",
    "cgm": "ftlib.cgm.experiment",
    "clipr": "ftlib.clipr.experiment",
    "combination": "ftlib.combination.experiment",
    "ctsft": "ftlib.ctsft.experiment",
}


class PlanError(ValueError):
    """What was asked to run is not in the plan, or cannot be run."""


class RunsFailedError(RuntimeError):
    """Some runs raised; the others are recorded."""


class RunsInterrupted(KeyboardInterrupt):  # a request, not an error
    """The runs were stopped from the keyboard; the finished ones are recorded."""


@dataclass(frozen=True)
class Arm:
    """One condition of an experiment.

    Attributes:
        experiment: the experiment's name.
        name: the arm's name, unique within the experiment.
        settings: everything that is set, as JSON; a change makes the arm run anew.
        run: takes a seed and returns metrics by name. All random number generators
            have been seeded with it.
        data: SHA-256 by name of every data file that is read.
        requires: short names of the models that are needed.

    Raises:
        RecordError: the settings cannot be written as JSON.
    """

    experiment: str
    name: str
    settings: Mapping[str, Any]
    run: Callable[[int], Mapping[str, Metric | float]]
    data: Mapping[str, str] = field(default_factory=dict)
    requires: Sequence[str] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "settings", as_json(self.settings))

    def __str__(self) -> str:
        return f"{self.experiment}/{self.name}"


def check_method(method: str) -> None:
    """Refuse a method that ftlib does not have.

    Raises:
        PlanError: there is no such method; the message lists those there are.
    """
    if method not in METHODS:
        raise PlanError(f"unknown method {method!r}: choose from {', '.join(METHODS)}")


def load_plan(method: str, scale: runtime.Scale) -> list[Arm]:
    """Return the arms of a method at a scale.

    Raises:
        PlanError: there is no such method, the scale is ``paper``, or two arms of an
            experiment have one name.
    """
    check_method(method)
    if scale == "paper":
        raise PlanError(
            "scale 'paper' holds the paper's settings for comparison and is never run: "
            "choose cpu or gpu"
        )
    arms: list[Arm] = importlib.import_module(METHODS[method]).plan(scale)
    for name, times in Counter(map(str, arms)).items():
        if times > 1:
            raise PlanError(f"the plan of {method} has {times} arms called {name}")
    return arms


def run_plan(
    method: str,
    scale: runtime.Scale,
    seeds: Iterable[int],
    *,
    experiment: str | None = None,
    arms: Collection[str] | None = None,
    directory: Path | None = None,
    force: bool = False,
) -> Results:
    """Run every arm with every seed that is not recorded yet with the same settings.

    An arm whose models cannot be had is skipped, and said to be. An arm that raises
    does not stop the others.

    Args:
        method: the method's short name.
        scale: ``cpu`` or ``gpu``.
        seeds: the seeds of every arm.
        experiment: run only this experiment.
        arms: run only the arms with these names.
        directory: where the records go; by default
            :func:`ftlib.results.results_directory`.
        force: run again what is recorded.

    Returns:
        The records of these arms and seeds, old and new.

    Raises:
        PlanError: there is no such method, experiment or arm, or nothing to run at
            this scale.
        RunsFailedError: some runs raised; their tracebacks went to stderr.
        RunsInterrupted: stopped from the keyboard.
        ftlib.results.NotWrittenError: a record cannot be written; no further run is
            begun, for its record could not be either.
    """
    chosen = _choose(load_plan(method, scale), experiment, arms)
    wanted = [
        _Run(method, scale, arm, seed)
        for seed in dict.fromkeys(seeds)
        for arm in chosen
    ]
    path = results_path(method, scale, directory)
    path.parent.mkdir(parents=True, exist_ok=True)
    done = set() if force else {record.key for record in _recorded(path, wanted)}
    pending = [run for run in wanted if run.key not in done]
    try:
        failures = _execute(_without_missing_models(pending), directory)
    except KeyboardInterrupt:
        raise RunsInterrupted(
            f"stopped: {len(_recorded(path, wanted))} of {len(wanted)} runs are "
            f"recorded in {path}; repeat it, without force, to go on with the rest"
        ) from None
    if failures:
        raise RunsFailedError(
            f"{len(failures)} of {len(wanted)} runs failed; the finished ones are "
            f"recorded in {path}. Failed:\n  " + "\n  ".join(failures)
        )
    return _recorded(path, wanted)


class _Run(NamedTuple):
    """One arm with one seed."""

    method: str
    scale: str
    arm: Arm
    seed: int

    @property
    def key(self) -> RecordKey:
        return (
            self.method,
            self.arm.experiment,
            self.arm.name,
            self.seed,
            self.scale,
        )

    def __str__(self) -> str:
        return f"{self.arm} seed {self.seed}"

    def is_recorded_by(self, record: Record) -> bool:
        """Whether a record with this run's key is of the run as it is now."""
        return record.settings == self.arm.settings and record.data == self.arm.data

    def measure(self, provenance: Mapping[str, Any]) -> Record:
        """Run the arm and return its record."""
        runtime.seed_everything(self.seed)
        runtime.reset_peak_memory()
        start = time.perf_counter()
        metrics = self.arm.run(self.seed)
        seconds = time.perf_counter() - start
        return Record(
            method=self.method,
            experiment=self.arm.experiment,
            arm=self.arm.name,
            seed=self.seed,
            scale=self.scale,
            settings=self.arm.settings,
            metrics={name: _as_metric(value) for name, value in metrics.items()},
            seconds=seconds,
            peak_memory_bytes=runtime.peak_memory(),
            data=dict(self.arm.data),
            **provenance,
        )


def _as_metric(value: Metric | float) -> Metric:
    return value if isinstance(value, Metric) else Metric(float(value))


def _choose(
    plan: list[Arm], experiment: str | None, names: Collection[str] | None
) -> list[Arm]:
    """Return the arms of an experiment with the given names; a name must be there."""
    chosen = [arm for arm in plan if experiment in (None, arm.experiment)]
    there = {arm.name for arm in chosen}
    unknown = set() if names is None else set(names) - there
    if unknown or not chosen:
        raise PlanError(
            f"the plan has no {'arm' if unknown else 'experiment'} called "
            f"{', '.join(sorted(unknown)) or experiment}; it has: "
            f"{', '.join(map(str, plan))}"
        )
    return [arm for arm in chosen if names is None or arm.name in names]


def _recorded(path: Path, wanted: Iterable[_Run]) -> Results:
    """Return those records of a file that are of the wanted runs."""
    stored = {record.key: record for record in read(path)} if path.exists() else {}
    return Results(
        record
        for run in wanted
        if (record := stored.get(run.key)) and run.is_recorded_by(record)
    )


def _without_missing_models(runs: Sequence[_Run]) -> list[_Run]:
    """Leave out the runs whose models cannot be had, and say so once an arm."""
    required = {name for run in runs for name in run.arm.requires}
    missing = {name for name in required if not _available(name)}
    skipped = {str(run.arm): missing.intersection(run.arm.requires) for run in runs}
    for arm, names in skipped.items():
        for name in sorted(names):
            print(
                f"skipped {arm}: no model {name}; get it with: "
                f"ftlib models fetch {name}",
                file=sys.stderr,
            )
    return [run for run in runs if not skipped[str(run.arm)]]


def _available(model: str) -> bool:
    from ftlib import models

    return models.available(model, fetch=True)


def _execute(runs: Sequence[_Run], directory: Path | None) -> list[str]:
    """Run and record; return a line for every run that raised."""
    if not runs:
        return []
    provenance = {
        "device": runtime.describe_device(),
        "versions": runtime.versions(),
        "commit": runtime.git_commit(),
    }
    failures = []
    with runtime.progress(total=len(runs), unit="run") as bar:
        for run in runs:
            bar.set_description(str(run))
            try:
                append([run.measure(provenance)], directory)
            except NotWrittenError:
                raise
            except Exception as error:
                bar.write(traceback.format_exc(), file=sys.stderr)
                failures.append(f"{run}: {type(error).__name__}: {error}")
            bar.update()
    return failures
