"""Normal form, mirror and storage of notebooks."""

from pathlib import Path

import jupytext
import pytest
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

import notebooks


@pytest.fixture
def notebook() -> NotebookNode:
    noted = {"outputId": "2"}
    outputs = [
        new_output("display_data", data={"text/plain": "7"}, metadata=noted),
        new_output("display_data", data={notebooks.WIDGET: {}, "text/plain": "0%|"}),
    ]
    alt = {"mystnb": {"image": {"alt": "a line"}}}
    return new_notebook(
        cells=[
            new_markdown_cell("# Title"),
            new_code_cell("1", execution_count=1, metadata={"tags": ["a"], "id": "3"}),
            new_code_cell("1", execution_count=2),
            new_code_cell("p()", execution_count=3, metadata=alt, outputs=outputs),
        ],
        metadata={"widgets": {}, "kernelspec": {"name": "x", "display_name": "X"}},
    )


def test_normal_form_keeps_results_and_drops_the_rest(notebook: NotebookNode) -> None:
    normal = notebooks.normalised(notebook)
    assert normal.metadata == notebooks.METADATA
    assert [cell.execution_count for cell in normal.cells[1:]] == [1, 2, 3]
    assert normal.cells[1].metadata == {"tags": ["a"]}
    assert normal.cells[3].metadata.mystnb.image.alt == "a line"
    (output,) = normal.cells[3].outputs
    assert output.data == {"text/plain": "7"}
    assert output.metadata == {}


def test_normal_form_is_stable(notebook: NotebookNode) -> None:
    normal = notebooks.normalised(notebook)
    assert notebooks.normalised(normal) == normal


def test_ids_are_unique_and_follow_the_source(notebook: NotebookNode) -> None:
    ids = [cell.id for cell in notebooks.normalised(notebook).cells]
    assert len(set(ids)) == len(ids)
    notebook.cells.insert(1, new_markdown_cell("A new paragraph"))
    moved = [cell.id for cell in notebooks.normalised(notebook).cells]
    assert moved[:1] + moved[2:] == ids


def test_mirror_holds_sources_tags_and_alt_texts(notebook: NotebookNode) -> None:
    back = jupytext.reads(notebooks.mirror_text(notebook), fmt="py:percent")
    for ours, theirs in zip(notebook.cells, back.cells, strict=True):
        assert (ours.cell_type, ours.source) == (theirs.cell_type, theirs.source)
        assert notebooks.tags(ours) == notebooks.tags(theirs)
    assert back.cells[3].metadata["mystnb"] == {"image": {"alt": "a line"}}


def test_mirror_does_not_depend_on_outputs(notebook: NotebookNode) -> None:
    before = notebooks.mirror_text(notebook)
    notebook.cells[3].outputs, notebook.cells[3].execution_count = [], None
    assert notebooks.mirror_text(notebook) == before


def test_store_leaves_the_old_file_when_the_new_one_is_invalid(
    notebook: NotebookNode, tmp_path: Path
) -> None:
    path = tmp_path / "chapter.ipynb"
    notebooks.store(path, notebook, tmp_path)
    before = path.read_bytes()
    notebook.cells[3].outputs[0]["output_type"] = "nonsense"
    with pytest.raises(Exception, match="nonsense"):
        notebooks.store(path, notebook, tmp_path)
    assert path.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["chapter.ipynb", "chapter.py"]
