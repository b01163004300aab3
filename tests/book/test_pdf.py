"""The printed book: what is on its sheets, where its links lead, what is refused."""

import re
import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import typer
from playwright.sync_api import Browser
from pypdf import PdfReader
from pypdf.generic import Destination

import pdf

NAMES = ["book/intro", "notebooks/cgm", "book/references"]
A4 = (595, 842)  # points
LAUNCHED = pdf.launched


@pytest.fixture(scope="module", autouse=True)
def one_browser(browser: Browser) -> Iterator[None]:
    """Playwright starts once in a thread."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pdf, "launched", lambda: nullcontext(browser))
        yield


@pytest.fixture(scope="module")
def book(built: Path, tmp_path_factory: pytest.TempPathFactory) -> PdfReader:
    output = tmp_path_factory.mktemp("printed") / "book.pdf"
    sheets = pdf.print_book(built, NAMES, output)
    reader = PdfReader(output)
    assert sheets == len(reader.pages)
    return reader


@pytest.fixture(scope="module")
def texts(book: PdfReader) -> list[str]:
    return [" ".join(page.extract_text().split()) for page in book.pages]


def bookmarks(book: PdfReader, level: int = 1) -> Iterator[tuple[int, str, int]]:
    """Yield each bookmark: its level, its words, and its sheet from 0."""

    def walk(items: list, level: int) -> Iterator[tuple[int, str, int]]:
        for item in items:
            if isinstance(item, Destination):
                yield level, item.title, book.get_destination_page_number(item)
            else:
                yield from walk(item, level + 1)

    return walk(book.outline, level)


def test_every_sheet_is_a4(book: PdfReader) -> None:
    sizes = {(round(p.mediabox.width), round(p.mediabox.height)) for p in book.pages}
    assert sizes == {A4}


def test_the_front_has_roman_numbers_and_the_rest_its_own_at_the_foot(
    book: PdfReader, texts: list[str]
) -> None:
    labels = book.page_labels
    front = labels.index("1")
    assert labels[:front] == ["i", "ii", "iii", "iv", "v", "vi"][:front]
    assert labels[front:] == [str(n + 1) for n in range(len(labels) - front)]
    for label, text in zip(labels[front:], texts[front:], strict=True):
        assert re.search(rf"(^|\D){label}(\D|$)", text)


def test_bookmarks_lead_to_their_headings(book: PdfReader, texts: list[str]) -> None:
    found = list(bookmarks(book))
    chapters = [title for level, title, _ in found if level == 1]
    assert [chapters[1], chapters[-1]] == ["Contents", "References"]
    assert any(level == 3 for level, _, _ in found)
    for _, title, sheet in found:
        assert "".join(title.split()) in texts[sheet].replace(" ", "")


def test_the_table_of_contents_names_the_sheets(
    book: PdfReader, texts: list[str]
) -> None:
    front = book.page_labels.index("1")
    table = " ".join(texts[1:front])
    for level, title, sheet in bookmarks(book):
        if level < 3 and sheet >= front:
            assert f"{title} {sheet - front + 1}" in table


def test_links_lead_inside(book: PdfReader) -> None:
    """A citation leads to its entry; none is left that names somebody's disk."""
    links = [
        (sheet, annotation.get_object())
        for sheet, page in enumerate(book.pages)
        for annotation in page.get("/Annots", [])
    ]
    addresses = [str(link["/A"].get("/URI")) for _, link in links if "/A" in link]
    assert addresses
    assert {address.split(":")[0] for address in addresses} <= {"http", "https"}
    numbers = {page.indirect_reference.idnum: n for n, page in enumerate(book.pages)}
    leads = [
        (sheet, numbers[link.raw_get("/Dest")[0].idnum])
        for sheet, link in links
        if "/Dest" in link
    ]
    chapter, references = (
        next(s for _, title, s in bookmarks(book) if title.startswith(start))
        for start in ("CGM", "References")
    )
    last = max(s for level, _, s in bookmarks(book) if level == 1)
    assert references < last  # the chapter has a section of this name too
    assert any(chapter <= sheet < last <= to for sheet, to in leads)


def test_solutions_are_open_and_nothing_asks_to_be_pressed(texts: list[str]) -> None:
    text = " ".join(texts)
    assert "def gradients(right, baseline" in text
    for unwanted in ("Show code", "Hide code", "google.colab", "Skip to main"):
        assert unwanted not in text


PAGE = """<!doctype html><html lang="en"><body><article class="bd-article">
<section id="one"><h1>One</h1><p>{}</p></section></article></body></html>"""
REFUSED = {
    "missing.png": "<img src='missing.png' alt=''>",
    "missing.js": "<script src='missing.js'></script>",
    "no such thing": "<script>throw new Error('no such thing')</script>",
    "wider than the paper": "<b style='padding-right: 999px'>b</b>",
}


def written(folder: Path, body: str) -> Path:
    (folder / "one.html").write_text(PAGE.format(body))
    return folder


def test_a_sound_page_is_printed(browser: Browser, tmp_path: Path) -> None:
    part = pdf.printed(browser, written(tmp_path, "text"), "one", before=6)
    assert part.headings == [pdf.Heading(1, "One", "one")]
    assert part.pdf.pages[0].extract_text().split() == ["One", "7", "One", "text"]


@pytest.mark.parametrize("what", REFUSED)
def test_a_broken_page_is_refused(browser: Browser, tmp_path: Path, what: str) -> None:
    folder = written(tmp_path, REFUSED[what])
    with pytest.raises(pdf.PrintError, match=re.escape(what)):
        pdf.printed(browser, folder, "one", before=0)


def test_a_wide_table_is_shrunk_and_a_wider_one_refused(
    browser: Browser, tmp_path: Path
) -> None:
    table = (
        "<div class='pst-scrollable-table-container' style='overflow-x: auto'>"
        "<div style='width: {}px'>wide</div></div>"
    )
    fits = written(tmp_path, table.format(900))
    assert "wide" in pdf.printed(browser, fits, "one", 0).pdf.pages[0].extract_text()
    with pytest.raises(pdf.PrintError, match="table or formula"):
        pdf.printed(browser, written(tmp_path, table.format(2000)), "one", 0)


def test_pages_that_were_not_built_are_an_error_of_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(typer.Exit) as stopped:
        pdf.main(html=tmp_path, output=tmp_path / "book.pdf")
    assert stopped.value.exit_code == 1
    shown = capsys.readouterr().err
    assert "intro.html cannot be loaded" in shown
    assert "make html" in shown
    assert not (tmp_path / "book.pdf").exists()


def test_without_chromium_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with (
        pytest.raises(pdf.PrintError, match="apt-get install chromium"),
        LAUNCHED(),
    ):
        pass
