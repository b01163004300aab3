"""The exercise edition: each chapter with its solutions taken out.

``notebooks/exercises/<chapter>.ipynb`` has the code of the chapter up to its exercises,
and these with a stub in the place of each solution. A stub keeps the signatures of what
the solution defines, says what the solution prints, and raises NotImplementedError.
The chapter's text and outputs are left out: they can be read beside it.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from notebooks import normalised, tags, write
from paths import NOTEBOOKS, ROOT

EDITION = NOTEBOOKS / "exercises"
SOLUTION = "hide-cell"  # the tag of a solution
HEADING = "## Exercises"

# Where a Markdown cell of the exercises is cut: before headings and statements.
PARTS = re.compile(r"(?m)^(?=## |\*\*\d+\. )")
STATEMENT = re.compile(r"\*\*(?P<number>\d+)\. (?P<title>.+?)\*\*", re.DOTALL)
PAGE_LINK = re.compile(r"\]\((?=[\w./-]+\.(?:ipynb|md)[)#])")

SUBHEADING = re.compile(r"(?m)^#{2,4} .+$")
NOTE = re.compile(rf"(?m)^{HEADING}$(?:\n\nEach has a solution .+(?:\n.+)*)?")
LINKED = """\
{heading}

Each has a solution below it that has been run. To try first, take this chapter
[without its solutions]({page}), [on Colab]({colab}) if you like: each is a stub that
says what the solution prints."""
INTRODUCTION = """\
{title}

The exercises of [this chapter]({chapter}), without their solutions. Run the chapter's
code up to the exercises. Then write your own in the place of each
`NotImplementedError`."""
SCALE = """\
# What the solutions print was computed at this scale.
%env FTLIB_SCALE=cpu"""


class Exercise(NamedTuple):
    """What one exercise asks, and the cells that answer it.

    Attributes:
        number: as the statement has it.
        title: in bold in the statement.
        solutions: cells tagged as solution, in the chapter's order.
    """

    number: int
    title: str
    solutions: list[NotebookNode]


def section(notebook: NotebookNode) -> tuple[list[NotebookNode], list[NotebookNode]]:
    """Return the cells before the exercises, and the cells of the exercises.

    Markdown cells of the exercises are cut so that each statement has its own and
    nothing of the section behind them is left.

    Raises:
        ValueError: there is no such section.
    """
    before: list[NotebookNode] = []
    inside: list[NotebookNode] = []
    for cell in notebook.cells:
        is_text = cell.cell_type == "markdown"
        for text in PARTS.split(cell.source) if is_text else [cell.source]:
            if inside and text.startswith("## "):
                return before, inside
            part = cell.copy()
            part.source = text.strip()
            (inside if inside or text.startswith(HEADING) else before).append(part)
    if not inside:
        raise ValueError(f"no section {HEADING!r}")
    return before, inside


def exercises_of(notebook: NotebookNode) -> list[Exercise]:
    """Return a chapter's exercises with their solutions.

    Raises:
        ValueError: there is no section of exercises.
    """
    found: list[Exercise] = []
    for cell in section(notebook)[1]:
        if statement := STATEMENT.match(cell.source):
            title = " ".join(statement["title"].split())
            found.append(Exercise(int(statement["number"]), title, []))
        elif found and is_solution(cell):
            found[-1].solutions.append(cell)
    return found


def is_solution(cell: NotebookNode) -> bool:
    """Whether a cell of the exercises is a solution."""
    return cell.cell_type == "code" and SOLUTION in tags(cell)


def printed(cell: NotebookNode) -> str:
    """Return what a cell printed or showed as text, and the texts of its figures."""
    texts = []
    for output in cell.outputs:
        data = output.get("data", {})
        if any(kind.startswith("image/") for kind in data):
            texts.append(f"(a figure) {cell.metadata.mystnb.image.alt}")
        else:
            text = data.get("text/markdown") or data.get("text/plain")
            texts.append(text or output.get("text", ""))
    return "\n".join(text.strip("\n") for text in texts)


def stub(number: int, title: str, cell: NotebookNode) -> str:
    """Return what stands in an exercise edition in the place of a solution."""
    definitions = [
        f"\n\n{_without_body(node, cell.source, number)}\n"
        for node in ast.parse(cell.source).body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
    ]
    pause = "\n\n" if definitions else "#\n"
    prints = "".join(f"#     {line}\n" for line in printed(cell).splitlines())
    return (
        f"# Exercise {number}. {title}\n"
        f"{''.join(definitions)}{pause}"
        f"# The solution prints:\n#\n{prints}"
        f'raise NotImplementedError("exercise {number}")'
    )


def _without_body(
    node: ast.FunctionDef | ast.ClassDef, source: str, number: int
) -> str:
    """Return a definition's header and docstring; of a class, its methods' too."""
    text = _header(node, source)
    if isinstance(node, ast.ClassDef):
        methods = [part for part in node.body if isinstance(part, ast.FunctionDef)]
        parts = [_without_body(method, source, number) for method in methods]
        return "\n\n".join([text, *parts]) if parts else f"{text}\n    ..."
    indent = " " * (node.col_offset + 4)
    return f'{text}\n{indent}raise NotImplementedError("exercise {number}")'


def _header(node: ast.FunctionDef | ast.ClassDef, source: str) -> str:
    """Return a definition as it is written, up to the end of its docstring."""
    lines = source.splitlines()
    first = min([node.lineno, *(mark.lineno for mark in node.decorator_list)]) - 1
    body = node.body[0]
    if ast.get_docstring(node) is not None:
        return "\n".join(lines[first : body.end_lineno])
    last = body.lineno - 1
    start = len(lines[last].encode()[: body.col_offset].decode())
    return "\n".join([*lines[first:last], lines[last][:start]]).rstrip()


def edition(chapter: NotebookNode, name: str) -> NotebookNode:
    """Return a chapter's exercise edition, in normal form.

    What explains a solution is left out: all text between it and the next statement.

    Args:
        chapter: with its outputs, of which the stubs tell.
        name: the chapter's file name, which the edition links to.

    Raises:
        ValueError: the chapter has no section of exercises.
    """
    before, inside = section(chapter)
    title = before[0].source.partition("\n")[0]
    cells = [
        new_markdown_cell(INTRODUCTION.format(title=title, chapter=name)),
        new_code_cell(SCALE),
        *_code_and_headings(before),
        *map(_bare, _stubbed(inside)),
    ]
    return normalised(new_notebook(cells=cells))


def _code_and_headings(cells: list[NotebookNode]) -> Iterator[NotebookNode]:
    for cell in cells:
        if cell.cell_type == "code":
            yield _bare(cell)
        elif headings := SUBHEADING.findall(cell.source):
            yield new_markdown_cell("\n\n".join(headings))


def _stubbed(cells: list[NotebookNode]) -> Iterator[NotebookNode]:
    """Yield the exercises' cells, with stubs for solutions and no explanation."""
    yield new_markdown_cell(HEADING)
    exercise = None
    for cell in cells[1:]:
        if statement := STATEMENT.match(cell.source):
            exercise, solved = statement, False
            yield cell
        elif exercise and is_solution(cell):
            solved = True
            number, title = int(exercise["number"]), exercise["title"]
            yield new_code_cell(stub(number, " ".join(title.split()), cell))
        elif exercise and not solved:
            yield cell


def _bare(cell: NotebookNode) -> NotebookNode:
    """Return a cell without outputs, whose links hold one folder further down."""
    if cell.cell_type == "code":
        return new_code_cell(cell.source)
    return new_markdown_cell(PAGE_LINK.sub("](../", cell.source))


def linked(chapter: NotebookNode, name: str, repository: str) -> NotebookNode:
    """Say at the head of a chapter's exercises where its edition is."""
    path = f"blob/main/{(EDITION / name).relative_to(ROOT).as_posix()}"
    text = LINKED.format(
        heading=HEADING,
        page=f"{repository}/{path}",
        colab=f"{repository}/{path}".replace(
            "https://github.com", "https://colab.research.google.com/github"
        ),
    )
    for cell in chapter.cells:
        if cell.cell_type == "markdown":
            cell.source = NOTE.sub(lambda _: text, cell.source)
    return chapter


def store_edition(chapter: NotebookNode, name: str, folder: Path = EDITION) -> None:
    """Write a chapter's exercise edition."""
    write(folder / name, edition(chapter, f"../{name}"))
