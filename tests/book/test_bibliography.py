"""book/references.bib: what is cited is there, once and whole, and nothing else is."""

import re
from collections import Counter

import pytest
from pybtex.database import (
    BibliographyData,
    BibliographyDataError,
    parse_file,
    parse_string,
)

import notebooks
from paths import NOTEBOOKS, ROOT

BIBLIOGRAPHY = ROOT / "book" / "references.bib"
CITATION = re.compile(r"\{cite(?::\w+)?\}`([^`]+)`")
CODE = re.compile(r"(`{2,}) .+? \1")  # how a role is written is shown as code
NEEDED = {
    "article": {"author", "title", "journal", "year"},
    "book": {"author", "title", "publisher", "year"},
    "incollection": {"author", "title", "booktitle", "publisher", "year"},
    "inproceedings": {"author", "title", "booktitle", "year"},
    "misc": {"author", "title", "year"},
}
PLACES = {"eprint", "url", "doi", "pages", "publisher"}  # where a reader finds it


def cited(text: str) -> set[str]:
    """Return the keys that a page cites."""
    lists = CITATION.findall(CODE.sub("", text))
    return {key.strip() for keys in lists for key in keys.split(",")}


def prose() -> str:
    pages = [path.read_text() for path in sorted((ROOT / "book").rglob("*.md"))]
    cells = [
        cell
        for path in NOTEBOOKS.glob("*.ipynb")
        for cell in notebooks.read(path).cells
    ]
    return "\n".join([*pages, *(c.source for c in cells if c.cell_type == "markdown")])


def missing_and_unused(entries: BibliographyData, text: str) -> tuple[set, set]:
    keys = cited(text)
    return keys - set(entries.entries), set(entries.entries) - keys


def plain(value: str) -> str:
    """Return what two spellings of a title, a DOI or an address have in common."""
    value = re.sub(r"^https?://(dx\.)?(doi\.org|arxiv\.org/abs)/", "", value.lower())
    return re.sub(r"[^a-z0-9]", "", value)


def duplicates(entries: BibliographyData) -> list[str]:
    """Return the titles and the identifiers that two entries share.

    An arXiv number is one identifier, as ``eprint`` and as an address.
    """
    found: Counter[str] = Counter()
    for entry in entries.entries.values():
        names = ("title", "doi", "eprint", "url")
        found.update({plain(entry.fields[n]) for n in names if n in entry.fields})
    return [value for value, times in found.items() if times > 1]


def incomplete(entries: BibliographyData) -> list[str]:
    """Return each entry that lacks what its type needs, with what it lacks."""
    faults = []
    for key, entry in entries.entries.items():
        fields = {*entry.fields, *entry.persons}
        lacking = NEEDED[entry.type] - fields
        if not PLACES & fields:
            lacking = {*lacking, f"one of {', '.join(sorted(PLACES))}"}
        if "eprint" in fields and "archiveprefix" not in fields:
            lacking = {*lacking, "archiveprefix"}
        faults += [f"{key}: {name}" for name in sorted(lacking)]
    return faults


# --- the book's own -----------------------------------------------------------------


@pytest.fixture(scope="module")
def ours() -> BibliographyData:
    """The parser itself refuses a key that is there twice."""
    return parse_file(BIBLIOGRAPHY)


def test_every_citation_has_an_entry_and_every_entry_is_cited(ours) -> None:
    assert missing_and_unused(ours, prose()) == (set(), set())


def test_no_work_has_two_entries(ours) -> None:
    assert duplicates(ours) == []


def test_every_entry_is_whole(ours) -> None:
    assert incomplete(ours) == []


# --- what is wrong is seen ----------------------------------------------------------

GOOD = """@misc{a2020, author={A}, title={On {A}}, year=2020, eprint={2001.00001},
archiveprefix={arXiv}}"""


def broken(extra: str) -> BibliographyData:
    return parse_string(GOOD + extra, "bibtex")


def test_missing_and_unused_keys_are_seen() -> None:
    text = "As in {cite:t}`b2021, c2022` and {cite}`d2023`, not `` {cite:p}`key` ``."
    assert cited(text) == {"b2021", "c2022", "d2023"}
    entries = broken("@misc{b2021, title={B}}")
    assert missing_and_unused(entries, text) == ({"c2022", "d2023"}, {"a2020"})


def test_a_key_that_is_there_twice_is_refused() -> None:
    with pytest.raises(BibliographyDataError, match="a2020"):
        broken(GOOD)


@pytest.mark.parametrize(
    "field",
    ["title={On A.}", "url={https://arxiv.org/abs/2001.00001}", "eprint={2001.00001}"],
)
def test_a_work_with_two_entries_is_seen(field: str) -> None:
    assert len(duplicates(broken(f"@misc{{b2021, {field}}}"))) == 1


@pytest.mark.parametrize(
    ("entry", "lacking"),
    [
        ("@article{b, author={B}, title={B}, year=2021, doi={1}}", "journal"),
        ("@book{b, title={B}, year=2021, publisher={P}}", "author"),
        ("@misc{b, author={B}, title={B}, year=2021, eprint={1}}", "archiveprefix"),
        (
            "@misc{b, author={B}, title={B}, year=2021}",
            "one of doi, eprint, pages, publisher, url",
        ),
    ],
)
def test_an_entry_that_is_not_whole_is_seen(entry: str, lacking: str) -> None:
    assert incomplete(broken(entry)) == [f"b: {lacking}"]
