"""Exercises: numbered, solved, and taken out of their editions without a rest."""

import ast
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from test_nbval import nbval_options

import exercises
import notebooks
from generated import project
from notebooks import read
from pages import PAPERS
from paths import NOTEBOOKS

METHODS = {*PAPERS, "cgm_beyond"}
CHAPTERS = sorted(NOTEBOOKS.glob("*.ipynb"))
Definition = ast.FunctionDef | ast.ClassDef


def fewest(name: str) -> int:
    """How many exercises a chapter has at least."""
    return 4 if name in METHODS else 2


def chapter_faults(notebook: NotebookNode, at_least: int) -> Iterator[str]:
    """What is wrong with a chapter's exercises."""
    found = exercises.exercises_of(notebook)
    if len(found) < at_least:
        yield f"{len(found)} exercises, not {at_least} or more"
    for expected, exercise in enumerate(found, start=1):
        if exercise.number != expected:
            yield f"exercise {exercise.number} stands where {expected} should"
        if not exercise.solutions:
            yield f"exercise {exercise.number} has no solution"
        for cell in exercise.solutions:
            if cell.execution_count is None:
                yield f"the solution of exercise {exercise.number} was not run"
            if not exercises.printed(cell).strip():
                yield f"the solution of exercise {exercise.number} shows nothing"


def definitions(tree: ast.Module | ast.ClassDef) -> list[Definition]:
    return [node for node in tree.body if isinstance(node, Definition)]


def functions(source: str) -> dict[str, ast.FunctionDef]:
    """Functions and methods of a cell's top level by qualified name."""
    found = {}
    for node in definitions(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            found[node.name] = node
        else:
            methods = [m for m in definitions(node) if isinstance(m, ast.FunctionDef)]
            found |= {f"{node.name}.{method.name}": method for method in methods}
    return found


def raises_only(statements: list[ast.stmt]) -> bool:
    """Whether statements do nothing but raise NotImplementedError once."""
    return len(statements) == 1 and ast.unparse(statements[0]).startswith(
        "raise NotImplementedError("
    )


def stub_faults(stub: str, solution: NotebookNode) -> Iterator[str]:
    """What is wrong with a stub: a body, another signature, an older result."""
    stubs, solved = functions(stub), functions(solution.source)
    if list(stubs) != list(solved):
        yield f"defines {list(stubs)}, not {list(solved)}"
    for name in stubs.keys() & solved.keys():
        if ast.dump(stubs[name].args) != ast.dump(solved[name].args):
            yield f"another signature: {name}"
        documented = ast.get_docstring(stubs[name]) is not None
        if not raises_only(stubs[name].body[documented:]):
            yield f"has a body: {name}"
    statements = ast.parse(stub).body
    if not raises_only([s for s in statements if not isinstance(s, Definition)]):
        yield "does more than raise NotImplementedError"
    for line in exercises.printed(solution).splitlines():
        if f"#     {line}\n" not in stub:
            yield f"does not say that the solution prints {line!r}"


def edition_faults(chapter: NotebookNode, edition: NotebookNode) -> Iterator[str]:
    """What is wrong with a chapter's exercise edition."""
    sources = [cell.source for cell in edition.cells]
    start = sources.index(exercises.HEADING)
    stubs = [c.source for c in edition.cells[start:] if c.cell_type == "code"]
    solutions = [
        cell for one in exercises.exercises_of(chapter) for cell in one.solutions
    ]
    if len(stubs) != len(solutions):
        yield f"{len(stubs)} stubs for {len(solutions)} solutions"
    for stub, solution in zip(stubs, solutions, strict=False):
        yield from stub_faults(stub, solution)
    for cell in edition.cells:
        if cell.cell_type == "code" and (cell.outputs or cell.execution_count):
            yield "keeps outputs"


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_exercises_are_numbered_and_solved(path: Path) -> None:
    assert list(chapter_faults(read(path), fewest(path.stem))) == []


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_editions_are_current_and_hold_no_solution(path: Path) -> None:
    """Else run `make generate`."""
    chapter, edition = read(path), read(exercises.EDITION / path.name)
    assert edition == exercises.edition(chapter, f"../{path.name}")
    assert list(edition_faults(chapter, edition)) == []


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_chapters_link_to_their_editions(path: Path) -> None:
    """Else run `make generate`."""
    chapter = read(path)
    (head,) = [c for c in chapter.cells if exercises.HEADING in c.source]
    assert f"/blob/main/notebooks/exercises/{path.name})" in head.source
    assert exercises.linked(chapter, path.name, project()["urls"]["Repository"]) == (
        read(path)
    )


def test_every_edition_has_a_chapter() -> None:
    editions = {path.name for path in exercises.EDITION.iterdir()}
    assert editions == {path.name for path in CHAPTERS}


def collected(folder: Path) -> str:
    """What pytest finds in a folder with the options of `make test`."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q"]
    done = subprocess.run(
        [*command, "notebooks", *nbval_options(), "-p", "no:cacheprovider"],
        capture_output=True,
        text=True,
        cwd=folder,
    )
    return done.stdout


def test_editions_are_not_run(tmp_path: Path) -> None:
    """They would fail: that is what stubs are for."""
    cell = new_code_cell("1")
    for name in ("notebooks/one.ipynb", "notebooks/exercises/one.ipynb"):
        notebooks.write(tmp_path / name, new_notebook(cells=[cell]))
    shutil.copy(NOTEBOOKS / "sanitize.cfg", tmp_path / "notebooks")
    found = collected(tmp_path)
    assert "notebooks/one.ipynb::" in found
    assert "exercises" not in found


SOLVED = '''\
@cache
def twice(
    x: int, *, λ=2  # the factor
) -> int:
    """Return 2x."""
    def inner():
        return λ * x
    return inner()

def half(x): return x / 2

class Pair(tuple):
    """Two numbers."""
    size = 2

    def swapped(self):
        return self[::-1]

class Empty: pass

secret = twice(21)
print(secret)
'''
STUB = '''\
# Exercise 1. Once and twice.


@cache
def twice(
    x: int, *, λ=2  # the factor
) -> int:
    """Return 2x."""
    raise NotImplementedError("exercise 1")


def half(x):
    raise NotImplementedError("exercise 1")


class Pair(tuple):
    """Two numbers."""

    def swapped(self):
        raise NotImplementedError("exercise 1")


class Empty:
    ...


# The solution prints:
#
#     42
raise NotImplementedError("exercise 1")'''


def solution(source: str, prints: str) -> NotebookNode:
    output = new_output("stream", name="stdout", text=prints)
    tags = {"tags": [exercises.SOLUTION]}
    return new_code_cell(source, outputs=[output], execution_count=3, metadata=tags)


def chapter() -> NotebookNode:
    cells = [
        new_markdown_cell("# A chapter\n\nIts text.\n\n## One\n\nMore."),
        new_code_cell("n = 1", execution_count=1, metadata={"tags": ["hide-input"]}),
        new_markdown_cell(
            "Text.\n\n## Exercises\n\n**1. Once\nand twice.** See [b](b.md)."
        ),
        new_code_cell("given = 21", execution_count=2),
        solution(SOLVED, "42\n"),
        new_markdown_cell("It is 42.\n\n**2. Add.** What is $n + 1$?"),
        solution("print(n + 1)", "2\n"),
        new_markdown_cell("Two.\n\n## References"),
    ]
    return new_notebook(cells=cells)


def test_an_edition_has_code_statements_and_stubs() -> None:
    made = exercises.edition(chapter(), "../a.ipynb")
    assert made == notebooks.normalised(made)
    introduction, scale, *rest = [cell.source for cell in made.cells]
    assert introduction.startswith(
        "# A chapter\n\nThe exercises of [this chapter](../a"
    )
    assert "FTLIB_SCALE=cpu" in scale
    assert rest == [
        "## One",
        "n = 1",
        "## Exercises",
        "**1. Once\nand twice.** See [b](../b.md).",
        "given = 21",
        STUB,
        "**2. Add.** What is $n + 1$?",
        "# Exercise 2. Add.\n#\n# The solution prints:\n#\n#     2\n"
        'raise NotImplementedError("exercise 2")',
    ]


def test_a_stub_raises_where_it_is_to_be_filled_in(tmp_path: Path) -> None:
    path = tmp_path / "stub.py"
    stub = exercises.stub(1, "Once.", solution(SOLVED, "42"))
    path.write_text(stub)
    given = {"cache": lambda function: function}
    with pytest.raises(NotImplementedError, match="exercise 1"):
        runpy.run_path(str(path), given)
    path.write_text(stub.replace("\nraise", "\n# raise"))
    found = runpy.run_path(str(path), given)
    with pytest.raises(NotImplementedError, match="exercise 1"):
        found["twice"](3)


def test_a_figure_is_told_by_its_text() -> None:
    figure = new_output("display_data", data={"image/png": "", "text/plain": "<F>"})
    text = new_output("display_data", data={"text/markdown": "Half.", "text/plain": ""})
    cell = new_code_cell("plot()", outputs=[figure, text])
    cell.metadata.mystnb = {"image": {"alt": "A line."}}
    assert exercises.printed(cell) == "(a figure) A line.\nHalf."


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("x: int, *", "x: float, *", "another signature: twice"),
        (
            '2x."""\n    raise NotImplementedError("exercise 1")',
            '2x."""\n    return 2',
            "has a body: twice",
        ),
        ("def half", "def third", "defines "),
        ("# The sol", "secret = twice(21)\n# The sol", "does more than raise"),
        ("#     42", "#     41", "does not say that the solution prints '42'"),
    ],
)
def test_a_faulty_stub_is_noticed(old: str, new: str, fault: str) -> None:
    cell = solution(SOLVED, "42\n")
    assert list(stub_faults(STUB, cell)) == []
    assert STUB.count(old) == 1
    assert fault in " ".join(stub_faults(STUB.replace(old, new), cell))


def test_a_missing_stub_and_a_kept_output_are_noticed() -> None:
    notebook = chapter()
    del notebook.cells[3]  # what is given is no stub
    made = exercises.edition(notebook, "../a.ipynb")
    assert list(edition_faults(notebook, made)) == []
    made.cells[3].execution_count = 1
    del made.cells[-1]
    assert list(edition_faults(notebook, made)) == [
        "1 stubs for 2 solutions",
        "keeps outputs",
    ]


def renumbered(notebook: NotebookNode) -> None:
    notebook.cells[5].source = "**3. Add.** What is $n + 1$?"


def untagged(notebook: NotebookNode) -> None:
    notebook.cells[6].metadata.tags = []


def silent(notebook: NotebookNode) -> None:
    notebook.cells[6].outputs = []


def not_run(notebook: NotebookNode) -> None:
    notebook.cells[6].execution_count = None


def too_few(notebook: NotebookNode) -> None:
    del notebook.cells[5:7]


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (renumbered, "exercise 3 stands where 2 should"),
        (untagged, "exercise 2 has no solution"),
        (silent, "the solution of exercise 2 shows nothing"),
        (not_run, "the solution of exercise 2 was not run"),
        (too_few, "1 exercises, not 2 or more"),
    ],
)
def test_a_faulty_chapter_is_noticed(
    damage: Callable[[NotebookNode], None], fault: str
) -> None:
    notebook = chapter()
    assert list(chapter_faults(notebook, 2)) == []
    damage(notebook)
    assert list(chapter_faults(notebook, 2)) == [fault]


def test_a_chapter_without_exercises_is_refused() -> None:
    with pytest.raises(ValueError, match="no section '## Exercises'"):
        exercises.edition(new_notebook(cells=[new_markdown_cell("# One")]), "a.ipynb")


@pytest.mark.parametrize(
    "source",
    [
        "## Exercises",
        "## Exercises\n\n**1. Add.** What?",
        "Text.\n\n## Exercises\n\nEach has a solution of\nold.\n\n**1. Add.** What?",
    ],
)
def test_the_link_is_put_in_once(source: str) -> None:
    notebook = new_notebook(cells=[new_markdown_cell(source)])
    for _ in range(2):
        notebook = exercises.linked(notebook, "a.ipynb", "https://github.com/a/b")
    (cell,) = notebook.cells
    assert cell.source.count("https://github.com/a/b/blob/main/notebooks/exer") == 1
    assert "research.google.com/github/a/b/blob/main/notebooks/exer" in cell.source
    assert "of\nold" not in cell.source
    assert cell.source.endswith("**1. Add.** What?") == ("1." in source)
