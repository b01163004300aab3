"""The status page: how long each chapter runs, where it ran, and what is recorded."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from execute import CHAPTERS
from ftlib.results import Record, Results, markdown_table, read, results_path
from ftlib.runtime import Scale
from paths import NOTEBOOKS

PAGE = """\
# Status

This page is written from the records each time the book is built.

## The chapters

Each chapter was run from its first cell to its last at scale `cpu`, and its outputs
were stored. Time is that of the whole run, on a machine that may have had other work;
memory is the peak of its kernel.

{chapters}

{versions}

## The recorded runs

What takes longer than a chapter may is run beforehand by `ftlib run`, at scale `cpu`
or at scale `gpu`. Results at scale `gpu` appear in the chapters as soon as they are
recorded.

{runs}
"""
RECORDED_SCALES: tuple[Scale, ...] = ("cpu", "gpu")


def status_page(results_directory: Path, notebooks: Path = NOTEBOOKS) -> str:
    """Return the page as MyST Markdown, to lie in ``book/``.

    Args:
        results_directory: the folder of the records, ``book/results``.
        notebooks: the folder of the chapters, each of which gets a row.

    Raises:
        RecordError: a file of records is damaged.
    """
    ran = {r.experiment: r for r in _records(results_directory, CHAPTERS, "cpu")}
    names = sorted(path.stem for path in notebooks.glob("*.ipynb"))
    return PAGE.format(
        chapters=_chapter_table(names, ran),
        versions=_versions([ran[name] for name in names if name in ran]),
        runs=_run_table(results_directory),
    )


def _records(directory: Path, method: str, scale: Scale) -> Results:
    path = results_path(method, scale, directory)
    return read(path) if path.exists() else Results([])


def _chapter_table(names: Iterable[str], ran: dict[str, Record]) -> str:
    rows = [["chapter", "cells", "time", "memory", "run on", "device", "commit"]]
    for name in names:
        rows.append([f"[{name}](../notebooks/{name}.ipynb)", *_chapter(ran.get(name))])
    return markdown_table(rows)


def _chapter(record: Record | None) -> list[str]:
    if record is None:
        return ["not recorded yet", "", "", "", "", ""]
    minutes, seconds = divmod(round(record.seconds), 60)
    return [
        f"{record.metrics['cells'].value:.0f}",
        f"{minutes} min {seconds:02} s",
        f"{record.peak_memory_bytes / 2**30:.1f} GiB",
        _day(record),
        record.device,
        _commit(record),
    ]


def _versions(records: Iterable[Record]) -> str:
    """List the versions, once for all chapters that ran with the same."""
    users = defaultdict(list)
    for record in records:
        text = ", ".join(f"{name} {v}" for name, v in record.versions.items())
        users[text].append(record.experiment)
    return "\n".join(f"* {', '.join(users[text])}: {text}." for text in users)


def _run_table(directory: Path) -> str:
    methods = {path.parent.name for path in directory.glob("*/*.json")} - {CHAPTERS}
    rows = [["records", "scale", "runs", "minutes", "last run", "device", "commit"]]
    for method in sorted(methods):
        for scale in RECORDED_SCALES:
            rows.append([method, scale, *_runs(_records(directory, method, scale))])
    return markdown_table(rows)


def _runs(records: Results) -> list[str]:
    if not records:
        return ["none yet", "", "", "", ""]
    last = max(records, key=lambda record: record.finished)
    minutes = sum(record.seconds for record in records) / 60
    return [
        f"{len(records):,}",
        f"{minutes:,.0f}",
        _day(last),
        last.device,
        _commit(last),
    ]


def _day(record: Record) -> str:
    return record.finished[:10]


def _commit(record: Record) -> str:
    """Shorten a commit, and keep the mark of code that was changed since."""
    if record.commit is None:
        return "–"
    commit, *dirty = record.commit.split("-")
    return "-".join([commit[:7], *dirty])
