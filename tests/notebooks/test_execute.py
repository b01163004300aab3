"""Running notebooks: what is reused, what is not, and how a failure is told."""

from pathlib import Path

import pytest
import typer
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

import execute
import notebooks
from ftlib.results import Record, Results
from ftlib.results import read as read_records

PEAK_MEMORY = execute.PEAK_MEMORY


@pytest.fixture(autouse=True)
def at_scale_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FTLIB_SCALE", "cpu")
    monkeypatch.setattr(execute, "EXECUTED", tmp_path / "executed")
    monkeypatch.setattr(execute, "MIRROR", tmp_path / "mirror")
    monkeypatch.setattr(execute, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(execute, "PEAK_MEMORY", "7")  # the kernel needs no torch


def chapter(folder: Path, *sources: str, name: str = "chapter") -> Path:
    cells = [new_markdown_cell("# Title"), *map(new_code_cell, sources)]
    path = folder / f"{name}.ipynb"
    notebooks.write(path, new_notebook(cells=cells))
    return path


def text(cell: NotebookNode) -> str:
    return "".join(output.text for output in cell.outputs)


def test_outputs_counts_folder_and_no_bars(tmp_path: Path) -> None:
    where = "import os; print(os.getcwd())"
    bar = "from tqdm.auto import tqdm; print(len(list(tqdm(range(3)))))"
    path = chapter(tmp_path, where, bar)
    assert execute.execute_all([path]) == []
    done = notebooks.read(tmp_path / "executed" / "chapter.ipynb")
    assert [cell.execution_count for cell in done.cells[1:]] == [1, 2]
    assert text(done.cells[1]) == f"{tmp_path}\n"
    assert text(done.cells[2]) == "3\n"


def test_skipped_cells_are_not_run(tmp_path: Path) -> None:
    path = chapter(tmp_path, "raise SystemError", "print(1)")
    notebook = notebooks.read(path)
    notebook.cells[1].metadata.tags = list(notebooks.SKIP_TAGS)
    notebooks.write(path, notebook)
    assert execute.execute_all([path]) == []
    done = notebooks.read(tmp_path / "executed" / "chapter.ipynb")
    assert [cell.execution_count for cell in done.cells[1:]] == [None, 1]


def test_a_failure_names_notebook_cell_and_cause_and_stops_no_other(
    tmp_path: Path,
) -> None:
    bad = chapter(tmp_path, "x = 1", "x / 0", "print('after')", name="bad")
    dead = chapter(tmp_path, "import os; os._exit(3)", name="dead")
    good = chapter(tmp_path, "print('fine')", name="good")
    failures = [str(f) for f in execute.execute_all([bad, dead, good])]
    assert len(failures) == 2
    assert failures[0].startswith("bad.ipynb, cell 3:")
    assert "ZeroDivisionError" in failures[0]
    assert "x / 0" in failures[0]
    assert failures[1].startswith("dead.ipynb, cell 2:")
    written = [p.name for p in (tmp_path / "executed").iterdir()]
    assert written == ["good.ipynb"]


def test_the_command_exits_1_on_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chapter(tmp_path, "raise KeyError('lost')")
    monkeypatch.setattr(execute, "NOTEBOOKS", tmp_path)
    with pytest.raises(execute.typer.Exit) as stop:
        execute.main()
    assert stop.value.exit_code == 1
    assert "KeyError" in capsys.readouterr().err


@pytest.fixture
def counted(tmp_path: Path) -> Path:
    """A notebook that leaves one more line in a file each time it runs."""
    return chapter(tmp_path, "with open('runs', 'a') as f: print('run', file=f)")


def runs(folder: Path) -> int:
    return len((folder / "runs").read_text().splitlines())


def test_a_second_run_reuses_the_first(counted: Path, tmp_path: Path) -> None:
    execute.execute_all([counted])
    execute.execute_all([counted])
    assert runs(tmp_path) == 1


def test_prose_is_always_current_and_needs_no_run(
    counted: Path, tmp_path: Path
) -> None:
    execute.execute_all([counted])
    notebook = notebooks.read(counted)
    notebook.cells[0].source = "# Another title"
    notebook.cells.append(new_markdown_cell("The end."))
    notebooks.write(counted, notebook)
    execute.execute_all([counted])
    done = notebooks.read(tmp_path / "executed" / "chapter.ipynb")
    assert [cell.source for cell in done.cells][::2] == ["# Another title", "The end."]
    assert done.cells[1].execution_count == 1
    assert runs(tmp_path) == 1


def test_changed_code_runs_again(counted: Path, tmp_path: Path) -> None:
    execute.execute_all([counted])
    notebook = notebooks.read(counted)
    notebook.cells[1].source += "  # changed"
    notebooks.write(counted, notebook)
    execute.execute_all([counted])
    assert runs(tmp_path) == 2


@pytest.mark.parametrize(
    "name",
    [
        "ftlib/a.py",
        "ftlib/cgm/a.py",
        "ftlib/data/a.toml",
        "kernels/a.py",
        "book/results/cgm/cpu.json",
        "book/results/cft/published.toml",
    ],
)
def test_fingerprint_follows_sources_and_records(tmp_path: Path, name: str) -> None:
    notebook = new_notebook(cells=[new_code_cell("1")])
    before = execute.fingerprint(notebook, tmp_path)
    (tmp_path / name).parent.mkdir(parents=True)
    (tmp_path / name).write_text("1")
    added = execute.fingerprint(notebook, tmp_path)
    (tmp_path / name).write_text("2")
    assert len({before, added, execute.fingerprint(notebook, tmp_path)}) == 3


def test_fingerprint_leaves_out_the_records_of_the_chapters(tmp_path: Path) -> None:
    notebook = new_notebook(cells=[new_code_cell("1")])
    before = execute.fingerprint(notebook, tmp_path)
    (tmp_path / "book" / "results" / execute.CHAPTERS).mkdir(parents=True)
    (tmp_path / "book/results" / execute.CHAPTERS / "cpu.json").write_text("1")
    assert execute.fingerprint(notebook, tmp_path) == before


@pytest.mark.parametrize("name", ["FTLIB_SCALE", "FTLIB_DATA_DIR"])
def test_fingerprint_follows_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    notebook = new_notebook(cells=[new_code_cell("1")])
    before = execute.fingerprint(notebook, tmp_path)
    monkeypatch.setenv(name, "gpu")
    assert execute.fingerprint(notebook, tmp_path) != before


def test_in_place_stores_outputs_and_mirror(counted: Path, tmp_path: Path) -> None:
    execute.execute_all([counted], in_place=True)
    stored = notebooks.read(counted)
    assert stored.cells[1].execution_count == 1
    assert stored == notebooks.normalised(stored)
    assert (tmp_path / "mirror" / "chapter.py").exists()
    execute.execute_all([counted], in_place=True)
    assert runs(tmp_path) == 1


def test_the_kernel_sees_the_environment_of_the_caller(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FTLIB_MODEL_DIR", "models")
    path = chapter(tmp_path, "import os; print(os.environ['FTLIB_MODEL_DIR'])")
    execute.execute_all([path])
    done = notebooks.read(tmp_path / "executed" / "chapter.ipynb")
    assert text(done.cells[1]) == "models\n"


def recorded(folder: Path) -> Results:
    return read_records(folder / "results" / execute.CHAPTERS / "cpu.json")


def test_in_place_records_the_run(tmp_path: Path) -> None:
    path = chapter(tmp_path, "import time; time.sleep(0.2)", "1")
    execute.execute_all([path], in_place=True)
    (record,) = recorded(tmp_path)
    assert record.key == ("chapters", "chapter", "run", 0, "cpu")
    assert record.metrics["cells"].value == 2
    assert record.seconds > 0.2
    assert record.peak_memory_bytes == 7
    assert "python" in record.versions


def test_a_run_that_is_stored_later_keeps_its_record(
    counted: Path, tmp_path: Path
) -> None:
    execute.execute_all([counted])
    assert not (tmp_path / "results").exists()
    copy = notebooks.read(tmp_path / "executed" / "chapter.ipynb")
    execute.execute_all([counted], in_place=True)
    assert list(recorded(tmp_path)) == [
        Record.from_json(copy.metadata["run"]["record"])
    ]
    assert runs(tmp_path) == 1


def test_a_failed_run_is_not_recorded(tmp_path: Path) -> None:
    execute.execute_all([chapter(tmp_path, "1 / 0")], in_place=True)
    assert not (tmp_path / "results").exists()


def test_the_record_has_the_memory_of_the_kernel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(execute, "PEAK_MEMORY", PEAK_MEMORY)
    chapters = {
        "large": chapter(tmp_path, "x = b'x' * 2**29", "del x", name="large"),
        "small": chapter(tmp_path, "x = 1", name="small"),
    }
    execute.execute_all(chapters.values(), in_place=True)
    peak = {r.experiment: r.peak_memory_bytes for r in recorded(tmp_path)}
    assert peak["small"] < 2**29 < peak["large"] < 2**30


def test_a_chapter_that_is_not_there_is_refused() -> None:
    with pytest.raises(typer.BadParameter, match="no notebook called cfd"):
        execute.main(["cfd"])
