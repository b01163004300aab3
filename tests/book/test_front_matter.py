"""The pages around the chapters: their commands run, and their facts agree."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from pybtex.database import parse_string

from ftlib import cli
from ftlib.data.registry import data_sets
from ftlib.experiments import METHODS
from ftlib.models.registry import MODELS
from ftlib.results import Record, append, read
from generated import project
from pages import PAPERS
from paths import MIRROR, ROOT

BOOK = ROOT / "book"
MAKEFILE = (ROOT / "Makefile").read_text("utf-8")


def page(name: str) -> str:
    return (BOOK / f"{name}.md").read_text("utf-8")


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)


# --- commands ----------------------------------------------------------------


UsageError: Any = typer.BadParameter.__base__


def refusal(line: str) -> str | None:
    """Say why a command of make or ftlib would not be understood; None if it is."""
    program, *words = line.split()
    if program == "make":
        targets = re.findall(r"^([a-z]+):", MAKEFILE, re.M)
        return None if set(words) <= set(targets) else "no such target"
    if program != "ftlib":
        return None
    try:
        parsed = parse(words)
    except UsageError as error:
        return error.format_message()
    method, experiment = parsed.get("method"), parsed.get("experiment")
    name = parsed.get("name")
    if method and method not in METHODS:
        return "no such method"
    if experiment and not re.search(rf"--experiment {experiment}$", MAKEFILE, re.M):
        return "no such experiment"
    if name and name not in MODELS.keys() | data_sets().keys():
        return "no such name"
    return None


def parse(words: list[str]) -> dict[str, Any]:
    """Return the arguments that the command, or that of a subpackage, would get."""
    command: Any = typer.main.get_command(cli.app)
    if words[0] in ("models", "data"):
        app = importlib.import_module(f"ftlib.{words[0]}.cli").app
        command, words = typer.main.get_command(app), words[1:]
    name, command, rest = command.resolve_command(typer.Context(command), words)
    return command.make_context(name, rest).params


def commands(text: str) -> list[str]:
    lines = "".join(blocks(text, "bash")).splitlines()
    return [line for line in lines if line.startswith(("make ", "ftlib "))]


@pytest.mark.parametrize("name", ["setup", "citing"])
def test_commands_on_the_pages_are_understood(name: str) -> None:
    lines = commands(page(name))
    assert len(lines) >= 2
    assert {line: why for line in lines if (why := refusal(line))} == {}


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("make bok", "no such target"),
        ("ftlib runn cft", "No such command"),
        ("ftlib run cft --seed 3", "No such option"),
        ("ftlib run", "Missing argument"),
        ("ftlib run cfft", "no such method"),
        ("ftlib run cft --experiment gsm", "no such experiment"),
        ("ftlib models fetch smollm", "no such name"),
        ("ftlib data bring gsm8k", "No such command"),
    ],
)
def test_a_wrong_command_would_be_noticed(line: str, why: str) -> None:
    assert why in str(refusal(line))


def test_the_address_to_install_from_is_the_repository() -> None:
    assert f'pip install "git+{project()["urls"]["Repository"]}"' in page("setup")


def test_the_job_for_slurm_is_a_shell_script() -> None:
    (job,) = [block for block in blocks(page("setup"), "bash") if "#SBATCH" in block]
    assert job.startswith("#!/bin/bash\n#SBATCH")
    subprocess.run(["bash", "-n"], input=job, text=True, check=True)


def run_snippet(block: str, folder: Path) -> None:
    (folder / "snippet.py").write_text(block)
    settings = {"FTLIB_DEVICE": "cpu", "FTLIB_RESULTS_DIR": "merged"}
    done = subprocess.run(
        [sys.executable, "snippet.py"],
        cwd=folder,
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


SNIPPETS = blocks(page("setup"), "python")


@pytest.mark.parametrize("block", [s for s in SNIPPETS if "merge" not in s])
def test_the_snippets_run(block: str, tmp_path: Path) -> None:
    run_snippet(block, tmp_path)


def test_the_records_of_two_jobs_are_merged(tmp_path: Path) -> None:
    (block,) = [s for s in SNIPPETS if "merge" in s]
    for seed in (0, 1):
        recorded = Record(
            "cft", "gsm8k", "base", seed, "gpu", {}, {}, 1.0, 1, "GPU", {}, {}, None
        )
        append([recorded], tmp_path / "records" / f"job-{seed}")
    run_snippet(block, tmp_path)
    merged = read(tmp_path / "merged" / "cft" / "gpu.json")
    assert [record.seed for record in merged] == [0, 1]


# --- citing ------------------------------------------------------------------


def cited_otherwise(text: str, citation: dict[str, Any], year: str) -> dict[str, str]:
    """Return the fields of a page's BibTeX entry that CITATION.cff contradicts."""
    (block,) = blocks(text, "bibtex")
    (entry,) = parse_string(block, "bibtex").entries.values()
    (author,) = entry.persons["author"]
    stated = {**entry.fields, "author": " ".join(author.last_names)}
    wanted = {
        "title": citation["title"],
        "author": " and ".join(a["name"] for a in citation["authors"]),
        "year": year,
        "version": citation["version"],
        "license": citation["license"],
        "url": citation["repository-code"],
    }
    return {k: v for k, v in stated.items() if v.strip("{}") != wanted.get(k)}


@pytest.fixture(scope="module")
def citation() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))


@pytest.fixture(scope="module")
def year() -> str:
    return yaml.safe_load((ROOT / "_config.yml").read_text("utf-8"))["copyright"]


def test_the_entry_to_cite_agrees_with_citation_cff(
    citation: dict[str, Any], year: str
) -> None:
    assert cited_otherwise(page("citing"), citation, year) == {}
    assert citation["version"] == project()["version"]


@pytest.mark.parametrize("field", ["title", "version", "license", "repository-code"])
def test_a_change_in_citation_cff_would_be_noticed(
    citation: dict[str, Any], year: str, field: str
) -> None:
    changed = {**citation, field: "changed"}
    assert len(cited_otherwise(page("citing"), changed, year)) == 1


@pytest.mark.parametrize("name", ["citing", "choosing"])
def test_every_paper_is_on_the_page(name: str) -> None:
    for method in PAPERS:
        assert f"../notebooks/{method}.ipynb" in page(name)


# --- numbers and symbols -----------------------------------------------------


def typed_numbers(text: str) -> list[str]:
    """Return what looks like a result and is no substitution from the records."""
    return re.findall(r"\d[\d.,]*\s?(?:%|points)|\d+\.\d+", text)


def test_no_result_is_typed_on_the_page_about_choosing() -> None:
    assert typed_numbers(page("choosing")) == ["95 %"]
    assert page("choosing").count("{{") > 20


@pytest.mark.parametrize("result", ["63.8", "12 %", "−4.7 points", "7 points", "91%"])
def test_a_typed_result_would_be_noticed(result: str) -> None:
    assert typed_numbers(f"It changes by {result} here.")


def symbols(text: str) -> dict[str, list[str]]:
    """Return the formulas in the first column of the tables, by chapter."""
    found = {}
    for section in re.split(r"^## ", text, flags=re.M):
        if chapter := re.search(r"notebooks/(\w+)\.ipynb", section):
            cells = re.findall(r"^\| (\$.*?) \|", section, re.M)
            found[chapter[1]] = re.findall(r"\$(.*?)\$", " ".join(cells))
    return found


def unknown(formulas: list[str], mirror: str) -> list[str]:
    """Return the formulas that do not occur in a chapter's prose."""
    prose = " ".join(line for line in mirror.splitlines() if line.startswith("#"))
    return [formula for formula in formulas if formula not in prose]


SYMBOLS = symbols(page("notation"))


@pytest.mark.parametrize("chapter", SYMBOLS)
def test_the_chapter_uses_every_symbol_of_its_table(chapter: str) -> None:
    mirror = (MIRROR / f"{chapter}.py").read_text("utf-8")
    assert len(SYMBOLS[chapter]) >= 5
    assert unknown(SYMBOLS[chapter], mirror) == []


def test_every_paper_has_a_table_of_symbols() -> None:
    assert SYMBOLS.keys() >= PAPERS.keys()


def test_a_symbol_that_a_chapter_does_not_use_would_be_noticed() -> None:
    text = "## Toy\n[toy](../notebooks/toy.ipynb)\n| $a$, $b_1$ | two |\n"
    assert symbols(text) == {"toy": ["a", "b_1"]}
    assert unknown(["a", "b_1"], "# The first is $a$.\nb_1 = 2") == ["b_1"]
