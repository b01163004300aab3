"""What follows from pyproject.toml: environment.yml and the notebooks' first cells.

Run as a script it writes them all, and each notebook's normal form, mirror and
exercise edition.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from nbformat import NotebookNode
from nbformat.v4 import new_code_cell

import exercises
from notebooks import SKIP_TAGS, read, store, tags, write_text
from paths import ENVIRONMENT, MIRROR, NOTEBOOKS, PYPROJECT

TAG = "generated"

INSTALL = """\
# Written by `make generate`. On Colab this installs ftlib and what is not
# there yet; torch, triton and numpy stay as they are. Colab's torchao is
# older than peft accepts, and ftlib does not use it.
import sys

if "google.colab" in sys.modules:
    source = "git+{repository}@v{version}"
    !pip list --format=freeze | grep -E "^(numpy|torch|triton)=" > kept.txt
    !pip install -q -c kept.txt "{name}[models] @ {{source}}"
    !pip uninstall -q -y torchao"""

REPORT = """\
# Written by `make generate`: where this runs, at which scale, with what.
from ftlib import runtime

print(runtime.report())"""

CONDA = """\
# Written by `make generate` from pyproject.toml, which holds the version bounds.
name: {name}
channels:
  - conda-forge
dependencies:
  - python {python}
  - pip
  - pip:
      - -c requirements.lock
      - -e .[{extras}]
"""


def project(pyproject: Path = PYPROJECT) -> dict[str, Any]:
    """Return the ``[project]`` table."""
    return tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]


def book_extras(about: dict[str, Any]) -> dict[str, list[str]]:
    """Return the extras that make and check the book: all but the timed peers."""
    extras = about["optional-dependencies"]
    return {name: bounds for name, bounds in extras.items() if name != "bench"}


def environment(about: dict[str, Any]) -> str:
    """Return environment.yml: Python from conda, the rest as pip resolves it."""
    return CONDA.format(
        name=about["name"],
        python=about["requires-python"],
        extras=",".join(sorted(book_extras(about))),
    )


def generated_cells(about: dict[str, Any]) -> list[NotebookNode]:
    """Return every notebook's first two code cells: install, and report."""
    install = INSTALL.format(
        name=about["name"],
        repository=about["urls"]["Repository"],
        version=about["version"],
    )
    skipped = {"tags": [TAG, "hide-cell", *SKIP_TAGS]}
    return [
        new_code_cell(install, metadata=skipped),
        new_code_cell(REPORT, metadata={"tags": [TAG]}),
    ]


def with_generated_cells(notebook: NotebookNode, about: dict[str, Any]) -> NotebookNode:
    """Put the generated cells before a notebook's first code cell.

    Cells that are there and current keep their outputs.
    """
    present = {cell.source: cell for cell in notebook.cells if TAG in tags(cell)}
    wanted = generated_cells(about)
    for cell in wanted:
        if old := present.get(cell.source):
            cell.update(outputs=old.outputs, execution_count=old.execution_count)
    others = [cell for cell in notebook.cells if TAG not in tags(cell)]
    kinds = [cell.cell_type for cell in others]
    start = kinds.index("code") if "code" in kinds else len(kinds)
    notebook.cells = [*others[:start], *wanted, *others[start:]]
    return notebook


def main() -> None:
    """Write environment.yml, every notebook with its generated cells, its edition."""
    about = project()
    write_text(ENVIRONMENT, environment(about))
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        notebook = with_generated_cells(read(path), about)
        notebook = exercises.linked(notebook, path.name, about["urls"]["Repository"])
        store(path, notebook, MIRROR)
        exercises.store_edition(notebook, path.name)


if __name__ == "__main__":
    main()
