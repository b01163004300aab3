"""The static gate passes a sound notebook and names the fault of every other."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

import gates
import notebooks
from generated import project, with_generated_cells
from paths import ROOT

FIGURE = {"image/png": "iVBORw0KGgo=", "text/plain": "<Figure>"}
ALT = "A straight line that rises from zero to two."


def stream(text: str, name: str = "stdout") -> NotebookNode:
    return new_output("stream", name=name, text=text)


def sound_notebook() -> NotebookNode:
    """Five checked cells and a figure, in the normal form, as if it had been run."""
    cells = [new_markdown_cell("# A chapter")]
    for number in range(5):
        source = f"print({number})"
        cells.append(new_code_cell(source, outputs=[stream(f"{number}\n")]))
        cells[-1].metadata.tags = [gates.CHECKED]
    cells.append(
        new_code_cell("plot()", outputs=[new_output("display_data", data=FIGURE)])
    )
    cells[-1].metadata.mystnb = {"image": {"alt": ALT}}
    notebook = with_generated_cells(new_notebook(cells=cells), project())
    live = [c for _, c in notebooks.code_cells(notebook) if not notebooks.is_skipped(c)]
    for count, cell in enumerate(live, start=1):
        cell.execution_count = count
    return notebook


def found(notebook: NotebookNode, folder: Path, normal: bool = True) -> str:
    """Store a notebook, its mirror too, and return what the gate says of it."""
    path = folder / "chapter.ipynb"
    notebooks.store(path, notebook, folder / "mirror")
    if not normal:
        nbformat.write(notebook, path)
    return "\n".join(map(str, gates.faults(path, folder / "mirror")))


def test_a_sound_notebook_has_no_fault(tmp_path: Path) -> None:
    assert found(sound_notebook(), tmp_path) == ""


# Cells of the sound notebook: 0 title, 1 install, 2 report, 3–7 checked, 8 figure.
def strip_counts(notebook: NotebookNode) -> None:
    for _, cell in notebooks.code_cells(notebook):
        cell.execution_count = None


def swap_counts(notebook: NotebookNode) -> None:
    notebook.cells[3].execution_count, notebook.cells[4].execution_count = 3, 2


def strip_outputs(notebook: NotebookNode) -> None:
    for _, cell in notebooks.code_cells(notebook):
        cell.outputs = []


def one_untagged(notebook: NotebookNode) -> None:
    notebook.cells[3].metadata.tags = []


def checked_figure(notebook: NotebookNode) -> None:
    notebook.cells[8].metadata.tags = [gates.CHECKED]


def raised(notebook: NotebookNode) -> None:
    error = new_output("error", ename="KeyError", evalue="'a'", traceback=[])
    notebook.cells[3].outputs.append(error)


def warned(notebook: NotebookNode) -> None:
    notebook.cells[3].outputs.append(stream("UserWarning: hm", name="stderr"))


def no_alt(notebook: NotebookNode) -> None:
    del notebook.cells[8].metadata["mystnb"]


def short_alt(notebook: NotebookNode) -> None:
    notebook.cells[8].metadata.mystnb = {"image": {"alt": "figure 1"}}


def long_line(notebook: NotebookNode) -> None:
    notebook.cells[3].source = f"x = {'1' * 73}"


def bad_syntax(notebook: NotebookNode) -> None:
    notebook.cells[3].source = "print(0"


def skipped_by_nbval_only(notebook: NotebookNode) -> None:
    notebook.cells[8].metadata.tags = ["nbval-skip"]


def skipped_by_nbclient_only(notebook: NotebookNode) -> None:
    notebook.cells[8].metadata.tags = ["skip-execution"]


def edited_install(notebook: NotebookNode) -> None:
    notebook.cells[1].source += "\nimport torch"


def no_generated_cells(notebook: NotebookNode) -> None:
    del notebook.cells[1:3]


def home_path(notebook: NotebookNode) -> None:
    notebook.cells[3].outputs = [stream("/home/someone/model.pt\n")]


def checkout_path(notebook: NotebookNode) -> None:
    data = {"text/html": f"<pre>{ROOT}/ftlib/data.py</pre>"}
    notebook.cells[3].outputs.append(new_output("display_data", data=data))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (strip_counts, "cell 4: execution count None"),
        (swap_counts, "cell 4: execution count 3, not 2"),
        (strip_outputs, "cell 4: tagged nbval-check-output, but has no text"),
        (one_untagged, "4 cells with checked outputs"),
        (checked_figure, "cell 9: tagged nbval-check-output, but has no text"),
        (raised, "cell 4: raised KeyError: 'a'"),
        (warned, "cell 4: wrote to stderr: UserWarning: hm"),
        (no_alt, "cell 9: figure without alt text"),
        (short_alt, "cell 9: figure without alt text"),
        (long_line, "cell 4: 77 columns, not 76"),
        (bad_syntax, "cell 4: does not parse"),
        (skipped_by_nbval_only, "cell 9: tagged nbval-skip but not skip-execution"),
        (skipped_by_nbclient_only, "cell 9: tagged skip-execution but not nbval-skip"),
        (edited_install, "cell 2: not the generated first cells"),
        (no_generated_cells, "cell 2: not the generated first cells"),
        (home_path, "cell 4: output names a local path: /home/someone"),
        (checkout_path, "cell 4: output names a local path"),
    ],
)
def test_a_fault_is_named_with_its_cell(
    tmp_path: Path, damage: Callable[[NotebookNode], None], message: str
) -> None:
    notebook = sound_notebook()
    damage(notebook)
    assert f"chapter.ipynb: {message}" in found(notebook, tmp_path)


def other_kernel(notebook: NotebookNode) -> None:
    notebook.metadata.kernelspec = {"name": "my-env", "display_name": "My env"}


def timestamps(notebook: NotebookNode) -> None:
    notebook.cells[3].metadata.execution = {"iopub.execute_input": "2026-01-01"}


def widget_state(notebook: NotebookNode) -> None:
    notebook.metadata.widgets = {notebooks.WIDGET: {}}


def random_ids(notebook: NotebookNode) -> None:
    notebook.cells[3].id = "0badc0de"


@pytest.mark.parametrize("damage", [other_kernel, timestamps, widget_state, random_ids])
def test_what_varies_between_machines_is_refused(
    tmp_path: Path, damage: Callable[[NotebookNode], None]
) -> None:
    notebook = notebooks.normalised(sound_notebook())
    damage(notebook)
    assert "not in normal form" in found(notebook, tmp_path, normal=False)


def test_a_stale_mirror_is_refused(tmp_path: Path) -> None:
    notebook = sound_notebook()
    found(notebook, tmp_path)
    notebook.cells[0].source = "# Another title"
    nbformat.write(notebooks.normalised(notebook), tmp_path / "chapter.ipynb")
    (fault,) = gates.faults(tmp_path / "chapter.ipynb", tmp_path / "mirror")
    assert "is stale" in fault.what


def test_a_mirror_without_notebook_is_refused(tmp_path: Path) -> None:
    found(sound_notebook(), tmp_path)
    (tmp_path / "mirror" / "gone.py").touch()
    (fault,) = gates.check(tmp_path, tmp_path / "mirror")
    assert fault.file == "gone.py"


def test_a_file_that_is_no_notebook_is_named(tmp_path: Path) -> None:
    (tmp_path / "chapter.ipynb").write_text('{"cells": [')
    (fault,) = gates.check(tmp_path, tmp_path)
    assert "chapter.ipynb: not a readable notebook" in str(fault)


def test_an_invalid_cell_is_refused(tmp_path: Path) -> None:
    notebook = notebooks.normalised(sound_notebook())
    notebook.cells[3].outputs[0]["name"] = 7
    assert list(gates.valid(notebook))


def test_no_notebook_is_a_fault(tmp_path: Path) -> None:
    assert gates.check(tmp_path, tmp_path)


def test_the_command_exits_1_on_a_fault(tmp_path: Path) -> None:
    """As `make lint` runs it: a copy of the tools, over an empty notebooks folder."""
    for name in ("book/tools", "notebooks"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    for source in (ROOT / "book" / "tools").glob("*.py"):
        (tmp_path / "book" / "tools" / source.name).write_text(source.read_text())
    command = [sys.executable, str(tmp_path / "book" / "tools" / "gates.py")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert "holds no notebook" in done.stderr
