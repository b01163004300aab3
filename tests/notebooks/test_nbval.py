"""nbval, run as `make test` runs it, fails on a notebook that is broken."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_notebook, new_output

import notebooks
from paths import ROOT


def nbval_options() -> list[str]:
    """The options in the Makefile, so that the test cannot drift from the gate."""
    makefile = (ROOT / "Makefile").read_text().replace("\\\n", " ")
    (line,) = re.findall(r"-m pytest tests notebooks (.*)", makefile)
    return shlex.split(line)


def cell(source: str, prints: str, checked: bool = True) -> NotebookNode:
    tags = ["nbval-check-output"] if checked else []
    output = new_output("stream", name="stdout", text=prints)
    return new_code_cell(
        source, execution_count=1, metadata={"tags": tags}, outputs=[output]
    )


def nbval(folder: Path, *cells: NotebookNode) -> subprocess.CompletedProcess[str]:
    metadata = {"kernelspec": {"name": "absent", "display_name": "absent"}}
    notebook = new_notebook(cells=list(cells), metadata=metadata)
    notebooks.write(folder / "a.ipynb", notebook)
    options = [*nbval_options(), "-p", "no:cacheprovider", f"--rootdir={folder}"]
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-c", os.devnull, str(folder), *options],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )


def test_a_sound_notebook_passes(tmp_path: Path) -> None:
    """Equal, or equal but for what the sanitizer covers, or not checked."""
    equal = cell("print(1 + 1)", "2\n")
    sanitized = cell("print('took 3.1 s at 0x7f')", "took 2 s at 0x1\n")
    unchecked = cell("print(1 + 1)", "3\n", checked=False)
    done = nbval(tmp_path, equal, sanitized, unchecked)
    assert done.returncode == 0, done.stdout
    assert "3 passed" in done.stdout


def test_a_broken_notebook_fails(tmp_path: Path) -> None:
    """Another output in a checked cell, and an exception in any."""
    differs = cell("print(1 + 1)", "3\n")
    raises = cell("1 / 0", "", checked=False)
    done = nbval(tmp_path, differs, raises)
    assert done.returncode == 1, done.stdout
    assert "2 failed" in done.stdout
