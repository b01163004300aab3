"""Build the book's HTML from executed notebooks; any warning is an error.

Jupyter Book 2 reads neither ``_config.yml`` nor ``_toc.yml``: it would build
nothing and exit 0. So the versions and the pages are checked here.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer
from sphinx_external_toc.parsing import parse_toc_yaml

import pages as generated_pages
from paths import BUILD, NOTEBOOKS, ROOT

NEEDED = {"jupyter-book": "1.", "sphinx": "7.4."}
NOT_PAGES = shutil.ignore_patterns(
    "mirror", "results", "tools", "claims.toml", "__pycache__", ".*"
)


class BuildError(RuntimeError):
    """The book was not built."""


def check_versions() -> None:
    """Refuse a generation of Jupyter Book or Sphinx that builds something else.

    Raises:
        BuildError: names what is installed and what is needed.
    """
    for name, prefix in NEEDED.items():
        found = version(name)
        if not found.startswith(prefix):
            raise BuildError(
                f"{name} {found} is installed, but this book needs {prefix}x: "
                "install it with `pip install -c requirements.lock -e .[book]`"
            )


def stage(root: Path, notebooks: Path, source: Path) -> None:
    """Gather the pages of the book and the given notebooks in one folder."""
    shutil.rmtree(source, ignore_errors=True)
    shutil.copytree(root / "book", source / "book", ignore=NOT_PAGES)
    shutil.copytree(notebooks, source / "notebooks", ignore=NOT_PAGES)
    for name in ("_config.yml", "_toc.yml"):
        shutil.copy2(root / name, source / name)


def run_jupyter_book(source: Path, output: Path) -> None:
    """Build ``output/_build/html``, every page anew, and keep going to the end.

    A page that is not read again does not warn again, so that a second build
    would pass where the first one failed.

    Raises:
        BuildError: there was an error or a warning; both are on stderr above.
    """
    program = Path(sys.executable).with_name("jupyter-book")
    options = ["--all", "-W", "-n", "--keep-going", "-q"]
    paths = [str(source), "--path-output", str(output)]
    done = subprocess.run([str(program), "build", *options, *paths])
    if done.returncode != 0:
        raise BuildError("jupyter-book reported errors or warnings: see above")


def pages(root: Path) -> list[str]:
    """Return the table of contents as page names, the first page first."""
    toc = parse_toc_yaml(root / "_toc.yml")
    return [toc.root.docname, *(name for name in toc if name != toc.root.docname)]


def missing_pages(root: Path, html: Path) -> list[str]:
    """Return the pages of the table of contents without an HTML file and heading."""

    def is_page(path: Path) -> bool:
        return path.exists() and "<h1" in path.read_text(encoding="utf-8")

    return [name for name in pages(root) if not is_page(html / f"{name}.html")]


def build(root: Path, notebooks: Path, output: Path) -> Path:
    """Build the book under ``root`` and return the folder of its pages.

    Args:
        root: holds ``_config.yml``, ``_toc.yml`` and ``book/``.
        notebooks: the executed notebooks, which become ``notebooks/`` of the book.
        output: the folder that receives ``_build``.

    Raises:
        BuildError: wrong versions, a warning or an error, or a page is not there.
    """
    check_versions()
    html = output / "_build" / "html"
    shutil.rmtree(html, ignore_errors=True)
    source = output / "_build" / "source"
    stage(root, notebooks, source)
    if (root / "book" / "claims.toml").exists():
        generated_pages.write(root, source)
    run_jupyter_book(source, output)
    if missing := missing_pages(root, html):
        raise BuildError(f"pages of _toc.yml were not built: {', '.join(missing)}")
    return html


def main(
    notebooks: Annotated[
        Path, typer.Option(help="Folder of the executed notebooks.")
    ] = NOTEBOOKS,
) -> None:
    """Build the book and print where to open it."""
    try:
        html = build(ROOT, notebooks, BUILD.parent)
    except BuildError as error:
        print(f"The book was not built: {error}", file=sys.stderr)
        raise typer.Exit(code=1) from None
    print(f"The book is built: open {html / 'index.html'}")


if __name__ == "__main__":
    typer.run(main)
