"""The static gate: what must hold of every committed notebook.

nbval passes a notebook whose outputs were stripped, since it then compares
nothing. These checks read the file alone and close such gaps.
"""

from __future__ import annotations

import itertools
import json
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import nbformat
from IPython.core.inputtransformer2 import TransformerManager
from nbformat import NotebookNode

from generated import generated_cells, project
from notebooks import (
    SKIP_TAGS,
    code_cells,
    is_skipped,
    mirror_text,
    normalised,
    read,
    tags,
)
from paths import MIRROR, NOTEBOOKS, ROOT

MAX_COLUMNS = 76
MIN_CHECKED = 5
MIN_ALT = 20
CHECKED = "nbval-check-output"
HERE = (str(ROOT), f"{Path.home()}/", f"{tempfile.gettempdir()}/")
LOCAL_PATH = re.compile(
    "|".join([r"/(?:home|Users)/\w+", r"[A-Z]:\\+Users", *map(re.escape, HERE)])
)

Faults = Iterator[tuple[int | None, str]]


class Fault(NamedTuple):
    """What is wrong, in which file and in which of its cells (from 1)."""

    file: str
    cell: int | None
    what: str

    def __str__(self) -> str:
        where = self.file if self.cell is None else f"{self.file}: cell {self.cell}"
        return f"{where}: {self.what}"


def valid(notebook: NotebookNode) -> Faults:
    """The file keeps to nbformat's schema."""
    try:
        nbformat.validate(notebook)
    except nbformat.ValidationError as error:
        yield None, f"not a valid notebook: {str(error).splitlines()[0]}"


def normal(notebook: NotebookNode) -> Faults:
    """One kernel name, Colab's GPU, stable ids, no time stamps or widget state."""
    if notebook != normalised(notebook):
        yield None, "not in normal form: run `make generate`"


def parses(notebook: NotebookNode) -> Faults:
    """Every code cell is Python, magics allowed."""
    for number, cell in code_cells(notebook):
        try:
            compile(TransformerManager().transform_cell(cell.source), "cell", "exec")
        except SyntaxError as error:
            yield number, f"does not parse: {error.msg} (line {error.lineno})"


def counted(notebook: NotebookNode) -> Faults:
    """The cells were run once each, from the first to the last."""
    live = [(n, cell) for n, cell in code_cells(notebook) if not is_skipped(cell)]
    for expected, (number, cell) in enumerate(live, start=1):
        count = cell.execution_count
        if count != expected:
            yield number, f"execution count {count}, not {expected}: not run in order"


def quiet(notebook: NotebookNode) -> Faults:
    """No cell raised, and none wrote to stderr."""
    for number, cell in code_cells(notebook):
        for output in cell.outputs:
            if output.output_type == "error":
                yield number, f"raised {output.ename}: {output.evalue}"
            elif output.get("name") == "stderr":
                yield number, f"wrote to stderr: {output.text.strip()[:60]}"


def checked(notebook: NotebookNode) -> Faults:
    """Enough cells have outputs that nbval compares."""
    compared = 0
    for number, cell in code_cells(notebook):
        if CHECKED in tags(cell):
            if any(map(_is_compared, cell.outputs)):
                compared += 1
            else:
                yield number, f"tagged {CHECKED}, but has no text output to compare"
    if compared < MIN_CHECKED:
        yield None, f"{compared} cells with checked outputs, not {MIN_CHECKED} or more"


def _is_compared(output: NotebookNode) -> bool:
    text = output.get("text") or output.get("data", {}).get("text/plain", "")
    return bool(text.strip()) and not _is_figure(output)


def described(notebook: NotebookNode) -> Faults:
    """Every figure has a text for those who do not see it."""
    for number, cell in code_cells(notebook):
        if any(map(_is_figure, cell.outputs)):
            alt = cell.metadata.get("mystnb", {}).get("image", {}).get("alt", "")
            if len(alt.strip()) <= MIN_ALT:
                yield number, f"figure without alt text: mystnb.image.alt is {alt!r}"


def _is_figure(output: NotebookNode) -> bool:
    return any(kind.startswith("image/") for kind in output.get("data", {}))


def narrow(notebook: NotebookNode) -> Faults:
    """Code fits the page."""
    for number, cell in code_cells(notebook):
        for line in cell.source.splitlines():
            if len(line) > MAX_COLUMNS:
                yield number, f"{len(line)} columns, not {MAX_COLUMNS}: {line[:40]}…"


def skipped_by_all(notebook: NotebookNode) -> Faults:
    """A cell that one runner skips, all skip."""
    for number, cell in code_cells(notebook):
        present = [tag for tag in SKIP_TAGS if tag in tags(cell)]
        if len(present) == 1:
            missing = next(tag for tag in SKIP_TAGS if tag not in present)
            yield number, f"tagged {present[0]} but not {missing}"


def begun(notebook: NotebookNode) -> Faults:
    """The first two code cells are the generated ones."""
    first = list(itertools.islice(code_cells(notebook), 2))
    for wanted, found in itertools.zip_longest(generated_cells(project()), first):
        number, cell = found or (None, None)
        if cell is None or (cell.source, tags(cell)) != (wanted.source, tags(wanted)):
            yield number, "not the generated first cells: run `make generate`"


def portable(notebook: NotebookNode) -> Faults:
    """No output shows where on somebody's disk it was made."""
    for number, cell in code_cells(notebook):
        if found := LOCAL_PATH.search(json.dumps(cell.outputs, ensure_ascii=False)):
            yield number, f"output names a local path: {found.group()}"


GATES: tuple[Callable[[NotebookNode], Faults], ...] = (
    valid,
    normal,
    parses,
    counted,
    quiet,
    checked,
    described,
    narrow,
    skipped_by_all,
    begun,
    portable,
)


def faults(path: Path, mirror: Path = MIRROR) -> list[Fault]:
    """Return all that is wrong with a notebook and its mirror."""
    try:
        notebook = read(path)
    except ValueError as error:
        return [Fault(path.name, None, str(error))]
    found = [Fault(path.name, *fault) for gate in GATES for fault in gate(notebook)]
    script = mirror / f"{path.stem}.py"
    if not script.exists() or script.read_text(encoding="utf-8") != mirror_text(
        notebook
    ):
        found.append(Fault(path.name, None, f"{script} is stale: run `make generate`"))
    return found


def orphans(notebooks: Path, mirror: Path) -> list[Fault]:
    """Return the mirror's scripts that no notebook stands behind."""
    return [
        Fault(script.name, None, f"mirrors no notebook in {notebooks.name}/")
        for script in sorted(mirror.glob("*.py"))
        if not (notebooks / f"{script.stem}.ipynb").exists()
    ]


def check(notebooks: Path = NOTEBOOKS, mirror: Path = MIRROR) -> list[Fault]:
    """Return every fault of every notebook; no notebook at all is one."""
    paths = sorted(notebooks.glob("*.ipynb"))
    if not paths:
        return [Fault(str(notebooks), None, "holds no notebook")]
    found = [fault for path in paths for fault in faults(path, mirror)]
    return found + orphans(notebooks, mirror)


def main() -> None:
    """Print every fault and exit 1 if there is one."""
    found = check()
    for fault in found:
        print(fault, file=sys.stderr)
    print(f"static gate: faults found: {len(found)}")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
