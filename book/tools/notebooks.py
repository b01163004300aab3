"""Reading, normalising and writing the book's notebooks, and their mirror."""

from __future__ import annotations

import copy
import hashlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jupytext
import nbformat
from nbformat import NotebookNode

from ftlib.files import replacing

SKIP_TAGS = ("nbval-skip", "skip-execution")  # what nbval and nbclient obey
WIDGET = "application/vnd.jupyter.widget-view+json"

METADATA: dict[str, Any] = {
    "accelerator": "GPU",
    "colab": {"gpuType": "T4", "provenance": []},
    "kernelspec": {
        "display_name": "Python 3",
        "language": "python",
        "name": "python3",
    },
    "language_info": {"name": "python", "pygments_lexer": "ipython3"},
}


def tags(cell: NotebookNode) -> list[str]:
    """Return a cell's tags."""
    return list(cell.metadata.get("tags", []))


def is_skipped(cell: NotebookNode) -> bool:
    """Whether a cell is one that no runner executes."""
    return bool(set(SKIP_TAGS) & set(tags(cell)))


def code_cells(notebook: NotebookNode) -> Iterator[tuple[int, NotebookNode]]:
    """Yield each code cell with its position among all cells, counted from 1."""
    for number, cell in enumerate(notebook.cells, start=1):
        if cell.cell_type == "code":
            yield number, cell


def read(path: Path) -> NotebookNode:
    """Read a notebook as nbformat 4.

    Raises:
        ValueError: the file is not a notebook; the message names it.
    """
    try:
        return nbformat.read(path, as_version=4)
    except Exception as error:  # nbformat raises many kinds for a malformed file
        raise ValueError(f"{path}: not a readable notebook: {error}") from error


def write_text(path: Path, text: str) -> None:
    """Write a text file so that a stop half-way leaves the earlier one whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write(path: Path, notebook: NotebookNode) -> None:
    """Validate a notebook and write it."""
    nbformat.validate(notebook)
    write_text(path, nbformat.writes(notebook) + "\n")


def normalised(notebook: NotebookNode) -> NotebookNode:
    """Return a copy without what changes between machines and runs.

    Outputs, execution counts, tags and alternative texts stay. Time stamps,
    widgets and Colab's marks go, and cell ids follow from the sources.
    """
    notebook = copy.deepcopy(notebook)
    notebook.metadata = nbformat.from_dict(METADATA)
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    seen: Counter[str] = Counter()
    for cell in notebook.cells:
        cell.id = _stable_id(cell, seen)
        cell.metadata = _kept(cell.metadata, "mystnb", "tags")
        if cell.cell_type == "code":
            cell.outputs = [_kept_output(o) for o in cell.outputs if not _is_widget(o)]
    return notebook


def _stable_id(cell: NotebookNode, seen: Counter[str]) -> str:
    digest = hashlib.sha256(f"{cell.cell_type}\n{cell.source}".encode()).hexdigest()
    seen[digest] += 1
    return digest[:12] if seen[digest] == 1 else f"{digest[:12]}-{seen[digest]}"


def _kept(mapping: NotebookNode, *names: str) -> NotebookNode:
    return nbformat.from_dict({k: mapping[k] for k in names if k in mapping})


def _is_widget(output: NotebookNode) -> bool:
    return WIDGET in output.get("data", {})


def _kept_output(output: NotebookNode) -> NotebookNode:
    if "metadata" in output:
        output.metadata = NotebookNode()
    return output


def mirror_text(notebook: NotebookNode) -> str:
    """Return a notebook's percent script: sources, tags and alternative texts."""
    mirror = copy.deepcopy(notebook)
    mirror.metadata = nbformat.from_dict(
        {
            "jupytext": {
                "notebook_metadata_filter": "-all",
                "cell_metadata_filter": "mystnb,tags,-all",
            }
        }
    )
    return jupytext.writes(mirror, fmt="py:percent")


def store(path: Path, notebook: NotebookNode, mirror: Path) -> None:
    """Write a notebook in its normal form, and its percent script beside the book."""
    notebook = normalised(notebook)
    write(path, notebook)
    write_text(mirror / f"{path.stem}.py", mirror_text(notebook))
