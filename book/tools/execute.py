"""Run the book's notebooks, each only if something it depends on has changed.

The executed copies lie in ``_build/notebooks``; ``--in-place`` also stores
their outputs in ``notebooks``.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError
from nbformat import NotebookNode

from ftlib import runtime
from notebooks import code_cells, is_skipped, normalised, read, store, write
from paths import EXECUTED, MIRROR, NOTEBOOKS, ROOT

# A bar drawn in a kernel would land in the outputs.
NO_BARS = {"TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
SOURCES = (
    "ftlib/**/*.py",
    "ftlib/**/*.toml",
    "kernels/**/*.py",
    "book/results/**/*.json",
    "book/results/**/*.toml",
)


class NotebookError(RuntimeError):
    """A notebook did not run to its end."""


def fingerprint(notebook: NotebookNode, root: Path = ROOT) -> str:
    """Hash all that a notebook's outputs follow from.

    These are its code, ftlib's sources and records, the versions of the
    libraries, the scale and the other ``FTLIB_*`` variables.
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
    }


def run(notebook: NotebookNode, name: str, directory: Path) -> NotebookNode:
    """Execute a notebook in place, in a kernel of its own, with a bar over its cells.

    There is no limit on a cell's time: a slow machine is not an error, and the
    bar shows where a run stands.

    Args:
        notebook: the notebook; it receives the outputs.
        name: what the bar and the errors call it.
        directory: the kernel's working directory.

    Raises:
        NotebookError: a cell raised, or the kernel died; names the cell.
    """
    todo = [number for number, cell in code_cells(notebook) if not is_skipped(cell)]
    current = 0

    def start(cell: NotebookNode, cell_index: int) -> None:
        nonlocal current
        current = cell_index + 1

    with runtime.progress(desc=name, total=len(todo), unit="cell") as bar:
        client = NotebookClient(
            notebook,
            kernel_name="python3",
            timeout=None,
            coalesce_streams=True,
            extra_arguments=["--log-level=ERROR"],
            resources={"metadata": {"path": str(directory)}},
            on_cell_start=start,
            on_cell_executed=lambda **_: bar.update(),
        )
        try:
            client.execute(env={**os.environ, **NO_BARS})
        except (CellExecutionError, DeadKernelError) as error:
            raise NotebookError(f"{name}.ipynb, cell {current}:\n{error}") from error
    return notebook


def with_outputs(notebook: NotebookNode, executed: NotebookNode) -> NotebookNode:
    """Give a notebook the outputs of its executed copy, which has the same code."""
    pairs = zip(code_cells(notebook), code_cells(executed), strict=True)
    for (_, cell), (_, done) in pairs:
        cell.update(outputs=done.outputs, execution_count=done.execution_count)
    return notebook


def executed(path: Path, target: Path) -> NotebookNode:
    """Return a notebook with the outputs it has today, and keep the copy in target.

    It runs only where the copy is absent or its fingerprint is an older one;
    prose is always the notebook's own.
    """
    notebook = read(path)
    wanted = fingerprint(notebook)
    copy = read(target) if target.exists() else None
    if copy is not None and copy.metadata.get("fingerprint") == wanted:
        print(f"{path.name}: unchanged since its last run")
        notebook = with_outputs(notebook, copy)
    else:
        begin = time.monotonic()
        notebook = run(notebook, path.stem, path.parent)
        print(f"{path.name}: ran in {time.monotonic() - begin:.0f} s")
    notebook = normalised(notebook)
    notebook.metadata["fingerprint"] = wanted
    write(target, notebook)
    return notebook


def execute_all(paths: Iterable[Path], in_place: bool = False) -> list[NotebookError]:
    """Bring every notebook up to date; one that fails does not stop the others.

    Returns:
        What failed.
    """
    failures = []
    for path in paths:
        try:
            notebook = executed(path, EXECUTED / path.name)
        except NotebookError as error:
            failures.append(error)
        else:
            if in_place:
                store(path, notebook, MIRROR)
    return failures


def main(
    in_place: Annotated[
        bool, typer.Option(help="Store the outputs in notebooks/ as well.")
    ] = False,
) -> None:
    """Run the notebooks whose outputs are out of date."""
    failures = execute_all(sorted(NOTEBOOKS.glob("*.ipynb")), in_place)
    for failure in failures:
        print(f"\n{failure}", file=sys.stderr)
    raise typer.Exit(code=bool(failures))


if __name__ == "__main__":
    typer.run(main)
