"""The status page: what it shows of each chapter and of the recorded runs."""

from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from execute import CHAPTERS
from ftlib import cli, experiments
from ftlib.results import Metric, Record, RecordError, append, results_path
from status import status_page

RUN = Record(
    method=CHAPTERS,
    experiment="first",
    arm="run",
    seed=0,
    scale="cpu",
    settings={},
    metrics={"cells": Metric(41)},
    seconds=125.4,
    peak_memory_bytes=3 * 2**29,
    device="cpu, 2 cores",
    versions={"python": "3.11.7", "torch": "2.13.0"},
    data={},
    commit="0123456789abcdef-dirty",
    finished="2026-01-31T12:00:00Z",
)
ON_GPU = replace(RUN, method="cgm", scale="gpu", device="A GPU", seconds=3600)


@pytest.fixture
def notebooks(tmp_path: Path) -> Path:
    """Two chapters; a page does not read what is in them."""
    folder = tmp_path / "notebooks"
    folder.mkdir()
    for name in ("first", "second"):
        (folder / f"{name}.ipynb").touch()
    return folder


def rows(page: str, start: str) -> list[list[str]]:
    lines = [line for line in page.splitlines() if line.startswith(f"| {start}")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_a_chapter_shows_its_last_run(notebooks: Path, tmp_path: Path) -> None:
    append([RUN], tmp_path)
    (row,) = rows(status_page(tmp_path, notebooks), "[first]")
    link, *rest = row
    assert link == "[first](../notebooks/first.ipynb)"
    assert rest == [
        "41", "2 min 05 s", "1.5 GiB", "2026-01-31", "cpu, 2 cores", "0123456-dirty"
    ]  # fmt: skip


def test_a_chapter_without_a_record_says_so(notebooks: Path, tmp_path: Path) -> None:
    append([RUN], tmp_path)
    (row,) = rows(status_page(tmp_path, notebooks), "[second]")
    assert row[1] == "not recorded yet"


def test_a_record_of_a_chapter_that_is_gone_is_not_shown(
    notebooks: Path, tmp_path: Path
) -> None:
    append([replace(RUN, experiment="gone")], tmp_path)
    assert "gone" not in status_page(tmp_path, notebooks)


def test_versions_are_told_once_for_chapters_that_share_them(
    notebooks: Path, tmp_path: Path
) -> None:
    append([RUN, replace(RUN, experiment="second")], tmp_path)
    shared = "* first, second: python 3.11.7, torch 2.13.0."
    assert shared in status_page(tmp_path, notebooks)
    other = replace(RUN, experiment="second", versions={"python": "3.13.0"})
    append([other], tmp_path)
    page = status_page(tmp_path, notebooks)
    assert shared not in page
    assert "* first: python 3.11.7, torch 2.13.0.\n* second: python 3.13.0." in page


def test_runs_are_counted_and_the_last_one_is_named(
    notebooks: Path, tmp_path: Path
) -> None:
    later = replace(ON_GPU, seed=1, commit="fedcba987", finished="2026-02-01T00:00:00Z")
    append([ON_GPU, later], tmp_path)
    cpu, gpu = rows(status_page(tmp_path, notebooks), "cgm")
    assert cpu[:3] == ["cgm", "cpu", "none yet"]
    assert gpu == ["cgm", "gpu", "2", "120", "2026-02-01", "A GPU", "fedcba9"]


def test_the_chapters_are_not_counted_as_runs(notebooks: Path, tmp_path: Path) -> None:
    append([RUN, ON_GPU], tmp_path)
    assert rows(status_page(tmp_path, notebooks), CHAPTERS) == []


def test_a_run_without_a_commit_shows_a_dash(notebooks: Path, tmp_path: Path) -> None:
    append([replace(ON_GPU, commit=None)], tmp_path)
    assert rows(status_page(tmp_path, notebooks), "cgm")[1][-1] == "–"


def test_a_damaged_file_is_an_error(notebooks: Path, tmp_path: Path) -> None:
    append([RUN], tmp_path)
    results_path(CHAPTERS, "cpu", tmp_path).write_text("{")
    with pytest.raises(RecordError, match=r"cpu\.json is not valid JSON"):
        status_page(tmp_path, notebooks)


def test_ftlib_results_prints_the_records_of_chapters_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    append([replace(RUN, scale="gpu"), ON_GPU], tmp_path)
    monkeypatch.setenv("FTLIB_RESULTS_DIR", str(tmp_path))
    monkeypatch.setattr(experiments, "METHODS", {"cgm": ""})
    shown = CliRunner().invoke(cli.app, ["results", "--scale", "gpu"])
    assert shown.exit_code == 0, shown.output
    for printed in ("cgm, scale gpu", f"{CHAPTERS}, scale gpu, experiment first"):
        assert printed in shown.stdout
