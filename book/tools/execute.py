"""Run the book's notebooks, each only if something it depends on has changed.

The executed copies lie in ``_build/notebooks``, each with a record of its run.
``--in-place`` also stores the outputs in ``notebooks`` and the records in
``book/results/chapters``, which the status page shows.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError
from nbformat import NotebookNode

from ftlib import results, runtime
from ftlib.results import Metric, Record
from notebooks import code_cells, is_skipped, normalised, read, store, write
from paths import EXECUTED, MIRROR, NOTEBOOKS, ROOT

RESULTS = ROOT / "book" / "results"
CHAPTERS = "chapters"  # the folder of the notebooks' own records

# A bar drawn in a kernel would land in the outputs.
NO_BARS = {"TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
SOURCES = (
    "ftlib/**/*.py",
    "ftlib/**/*.toml",
    "kernels/**/*.py",
    "book/results/**/*.json",
    "book/results/**/*.toml",
)
# Asked of a notebook's kernel after its last cell.
PEAK_MEMORY = "__import__('ftlib.runtime').runtime.peak_memory()"


class NotebookError(RuntimeError):
    """A notebook did not run to its end."""


def fingerprint(notebook: NotebookNode, root: Path = ROOT) -> str:
    """Hash all that a notebook's outputs follow from.

    These are its code, ftlib's sources and records, the versions of the
    libraries, the scale and the other ``FTLIB_*`` variables. The notebooks' own
    records are left out: one run would make the next one necessary.
    """
    context = {
        "code": [cell.source for _, cell in code_cells(notebook)],
        "sources": _digests(root),
        "versions": runtime.versions(),
        "scale": runtime.scale(),
        "environment": {k: v for k, v in os.environ.items() if k.startswith("FTLIB_")},
    }
    return hashlib.sha256(json.dumps(context, sort_keys=True).encode()).hexdigest()


def _digests(root: Path) -> dict[str, str]:
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for pattern in SOURCES
        for path in sorted(root.glob(pattern))
        if path.parent.name != CHAPTERS
    }


def run(notebook: NotebookNode, name: str, directory: Path) -> Record:
    """Execute a notebook in place, in a kernel of its own, with a bar over its cells.

    There is no limit on a cell's time: a slow machine is not an error, and the
    bar shows where a run stands.

    Args:
        notebook: the notebook; it receives the outputs.
        name: what the bar, the errors and the record call it.
        directory: the kernel's working directory.

    Returns:
        The record of the run, with the number of cells as its metric.

    Raises:
        NotebookError: a cell raised, or the kernel died; names the cell.
    """
    todo = [number for number, cell in code_cells(notebook) if not is_skipped(cell)]
    current, memory = 0, 0
    begin = time.monotonic()

    def start(cell: NotebookNode, cell_index: int) -> None:
        nonlocal current
        current = cell_index + 1

    async def finish(cell: NotebookNode, cell_index: int, **_: Any) -> None:
        nonlocal memory
        bar.update()
        if current == todo[-1]:
            memory = await _peak_memory(client)

    with runtime.progress(desc=name, total=len(todo), unit="cell") as bar:
        client = NotebookClient(
            notebook,
            kernel_name="python3",
            timeout=None,
            coalesce_streams=True,
            extra_arguments=["--log-level=ERROR"],
            resources={"metadata": {"path": str(directory)}},
            on_cell_start=start,
            on_cell_executed=finish,
        )
        try:
            client.execute(env={**os.environ, **NO_BARS})
        except (CellExecutionError, DeadKernelError) as error:
            raise NotebookError(f"{name}.ipynb, cell {current}:\n{error}") from error
    return _record(name, len(todo), time.monotonic() - begin, memory)


async def _peak_memory(client: NotebookClient) -> int:
    """Ask a running kernel for the peak of its memory in bytes."""
    request = client.kc.execute("", silent=True, user_expressions={"peak": PEAK_MEMORY})
    reply = await client.async_wait_for_reply(request)
    return int(reply["content"]["user_expressions"]["peak"]["data"]["text/plain"])


def _record(name: str, cells: int, seconds: float, memory: int) -> Record:
    return Record(
        method=CHAPTERS,
        experiment=name,
        arm="run",
        seed=0,
        scale=runtime.scale(),
        settings={},
        metrics={"cells": Metric(cells)},
        seconds=seconds,
        peak_memory_bytes=memory,
        device=runtime.describe_device(),
        versions=runtime.versions(),
        data={},
        commit=runtime.git_commit(),
    )


def with_outputs(notebook: NotebookNode, executed: NotebookNode) -> NotebookNode:
    """Give a notebook the outputs of its executed copy, which has the same code."""
    pairs = zip(code_cells(notebook), code_cells(executed), strict=True)
    for (_, cell), (_, done) in pairs:
        cell.update(outputs=done.outputs, execution_count=done.execution_count)
    return notebook


def _copy(target: Path) -> NotebookNode | None:
    """Return the executed copy, if there is one that can be read."""
    with suppress(ValueError):
        return read(target)
    return None


def executed(path: Path, target: Path) -> tuple[NotebookNode, Record]:
    """Return a notebook with the outputs it has today, and the record of their run.

    It runs only where the copy in target is absent or damaged, or its fingerprint is an
    older one, and leaves a new copy there; prose is always the notebook's own.
    """
    notebook = read(path)
    wanted = fingerprint(notebook)
    copy = _copy(target)
    last = copy.metadata.get("run", {}) if copy is not None else {}
    if last.get("fingerprint") == wanted:
        print(f"{path.name}: unchanged since its last run")
        notebook = with_outputs(notebook, copy)
        record = Record.from_json(last["record"])
    else:
        record = run(notebook, path.stem, path.parent)
        print(f"{path.name}: ran in {record.seconds:.0f} s")
    notebook = normalised(notebook)
    notebook.metadata["run"] = {"fingerprint": wanted, "record": record.to_json()}
    write(target, notebook)
    return notebook, record


def execute_all(paths: Iterable[Path], in_place: bool = False) -> list[NotebookError]:
    """Bring every notebook up to date; one that fails does not stop the others.

    Returns:
        What failed.
    """
    failures = []
    for path in paths:
        try:
            notebook, record = executed(path, EXECUTED / path.name)
        except NotebookError as error:
            failures.append(error)
        else:
            if in_place:
                store(path, notebook, MIRROR)
                results.append([record], RESULTS)
    return failures


def main(
    names: Annotated[
        list[str] | None, typer.Argument(help="Chapters, such as cft; default: all.")
    ] = None,
    in_place: Annotated[
        bool, typer.Option(help="Store outputs and records in the repository.")
    ] = False,
) -> None:
    """Run the notebooks whose outputs are out of date."""
    paths = sorted(NOTEBOOKS.glob("*.ipynb"))
    if unknown := set(names or ()) - {path.stem for path in paths}:
        raise typer.BadParameter(f"no notebook called {', '.join(sorted(unknown))}")
    chosen = [path for path in paths if not names or path.stem in names]
    failures = execute_all(chosen, in_place)
    for failure in failures:
        print(f"\n{failure}", file=sys.stderr)
    raise typer.Exit(code=bool(failures))


if __name__ == "__main__":
    typer.run(main)
