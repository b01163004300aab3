"""The build of the book fails when the book is broken, and only then."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

import build
import notebooks
from paths import ROOT

CONFIG = """\
title: A tiny book
author: nobody
execute: {execute_notebooks: "off"}
only_build_toc_files: true
"""
TOC = """\
format: jb-book
root: book/intro
chapters:
  - file: notebooks/one
"""


@pytest.fixture
def book(tmp_path: Path) -> Path:
    (tmp_path / "book").mkdir()
    (tmp_path / "_config.yml").write_text(CONFIG)
    (tmp_path / "_toc.yml").write_text(TOC)
    (tmp_path / "book" / "intro.md").write_text("# Hello\n\n(a-place)=\n## A place\n")
    output = new_output("stream", name="stdout", text="stored output")
    cells = [
        new_markdown_cell("# One"),
        new_code_cell("raise SystemExit", outputs=[output], execution_count=1),
    ]
    notebooks.store(
        tmp_path / "notebooks" / "one.ipynb", new_notebook(cells=cells), tmp_path
    )
    return tmp_path


def built(book: Path) -> Path:
    return build.build(book, book / "notebooks", book)


def test_a_sound_book_is_built_from_stored_outputs(book: Path) -> None:
    html = built(book)
    assert "stored output" in (html / "notebooks" / "one.html").read_text()
    assert (html / "index.html").exists()


BROKEN = """\
# Hello

{ref}`no-such-place` and [there](absent.md)

![A figure](absent.png)
"""


def test_a_broken_page_stops_the_build_each_time(book: Path) -> None:
    """As `make html` runs it, and also when the page has been read before."""
    shutil.copytree(ROOT / "book" / "tools", book / "book" / "tools")
    (book / "book" / "intro.md").write_text(BROKEN)
    command = [sys.executable, str(book / "book" / "tools" / "build.py")]
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 1
        for shown in ("no-such-place", "absent.md", "absent.png", "was not built"):
            assert shown in done.stderr


def leave_pages(book: Path) -> Path:
    """Leave the pages of an earlier build."""
    html = book / "_build" / "html"
    for name in ("book/intro.html", "notebooks/one.html"):
        (html / name).parent.mkdir(parents=True)
        (html / name).write_text("<article><h1>Old</h1></article>")
    return html


def test_a_page_missing_from_the_sources_stops_the_build(book: Path) -> None:
    leave_pages(book)
    (book / "notebooks" / "one.ipynb").unlink()
    with pytest.raises(build.BuildError):
        built(book)


def test_a_build_that_writes_no_pages_is_refused(
    book: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Jupyter Book 2 prints a hint, builds nothing and exits 0."""
    leave_pages(book)
    monkeypatch.setattr(build, "run_jupyter_book", lambda source, output: None)
    with pytest.raises(build.BuildError, match="book/intro, notebooks/one"):
        built(book)


def test_an_empty_page_counts_as_missing(book: Path) -> None:
    html = leave_pages(book)
    assert build.missing_pages(book, html) == []
    (html / "notebooks" / "one.html").write_text("<html></html>")
    assert build.missing_pages(book, html) == ["notebooks/one"]


@pytest.mark.parametrize(
    ("name", "found"),
    [("jupyter-book", "2.1.7"), ("jupyter-book", "10.0"), ("sphinx", "8.2.3")],
)
def test_another_generation_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, found: str
) -> None:
    real = build.version
    monkeypatch.setattr(build, "version", lambda n: found if n == name else real(n))
    with pytest.raises(build.BuildError, match=f"{name} {found} is installed"):
        build.check_versions()


def test_the_real_table_of_contents_lists_every_notebook() -> None:
    listed = {name for name in build.pages(ROOT) if name.startswith("notebooks/")}
    there = {f"notebooks/{path.stem}" for path in ROOT.glob("notebooks/*.ipynb")}
    assert listed == there
