"""Print the built book as one PDF: page numbers, a table of contents, an outline.

Chromium prints each page of the book by itself, once its formulas are set. It would
shrink a whole page for one thing that is too wide, so that thing is shrunk first. What
would become too small to read, and what cannot be loaded, is refused.
"""

from __future__ import annotations

import html as markup
import io
import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NamedTuple
from urllib.parse import unquote, urldefrag

import typer
from playwright.sync_api import Browser, Page, sync_playwright
from playwright.sync_api import Error as BrowserError
from pypdf import PdfReader, PdfWriter
from pypdf.constants import PageLabelStyle
from pypdf.generic import (
    Destination,
    DictionaryObject,
    Fit,
    NameObject,
    TextStringObject,
)

import build
from ftlib import runtime
from paths import BUILD, HTML, ROOT

CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
OPTIONS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",  # too small in many containers for a long page
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
WIDTH = 657  # CSS pixels between the margins of A4: 174 mm, 96 px an inch
SMALLEST = 0.6  # of its size; what is smaller on paper cannot be read
CONTENTS = "contents"

PAPER = """
@page {{
  size: A4;
  margin: 20mm 18mm;
  @top-right {{ content: {title}; font: 9px sans-serif; }}
  @bottom-center {{ content: {number}; font: 10px sans-serif; }}
}}
html {{ counter-reset: page {before}; }}
"""
CONTENTS_STYLE = """
body { font: 12px/1.7 sans-serif; }
h1 { font-size: 26px; font-weight: 500; }
a { color: inherit; display: flex; text-decoration: none; }
a.level-1 { break-after: avoid; font-weight: bold; margin-top: 0.6em; }
a.level-2 { margin-left: 1.5em; }
a > span { margin-left: auto; padding-left: 1em; }
"""

SETTLE = """async () => {
    await window.MathJax?.startup?.promise;
    await document.fonts.ready;
    await Promise.all([...document.images].map(image => {
        image.loading = "eager";
        return image.decode();
    }));
}"""
# Chromium notes where on paper an anchor lies if something on the page links to it.
ANCHOR = """() => {
    const links = document.createElement("nav");
    links.hidden = true;
    for (const { id } of document.querySelectorAll(".bd-article [id]")) {
        links.append(Object.assign(document.createElement("a"), { href: "#" + id }));
    }
    document.body.append(links);
}"""
SHRINK = """() => {
    const boxes = ".math, .pst-scrollable-table-container, .cell_output > .output";
    const width = box =>
        box.querySelector("mjx-math")?.getBoundingClientRect().width ?? box.scrollWidth;
    const all = [...document.querySelectorAll(`.bd-article :is(${boxes})`)];
    const shares = all.map(box => Math.min(1, box.clientWidth / width(box)) || 1);
    all.forEach((box, i) => shares[i] < 1 && (box.style.zoom = shares[i]));
    return Math.min(1, ...shares);
}"""
# MathJax hides MathML inside each formula, so only what is seen of it is measured.
CUT_OFF = """() => {
    const cut = element =>
        element.getBoundingClientRect().right > innerWidth + 1 ||
        (getComputedStyle(element).overflowX !== "visible" &&
            element.scrollWidth > element.clientWidth + 1);
    const measured = ".bd-article :is(mjx-math, :not(.math, mjx-container, .math *))";
    return [...document.querySelectorAll(measured)]
        .filter(element => element.checkVisibility() && cut(element))
        .map(element => `<${element.localName}> ${element.textContent.slice(0, 40)}`);
}"""
HEADINGS = """() =>
    [...document.querySelectorAll(".bd-article :is(h1, h2, h3)")].map(heading => [
        Number(heading.localName[1]),
        heading.innerText.trim(),
        heading.closest("section").id,
    ])"""


class PrintError(RuntimeError):
    """The book was not printed."""


class Heading(NamedTuple):
    """A heading: its level from 1, its words, and its section's anchor."""

    level: int
    text: str
    anchor: str


class Part(NamedTuple):
    """One page of the book, as printed."""

    name: str
    pdf: PdfReader
    headings: list[Heading]

    def place(self, anchor: str) -> tuple[int, float | None]:
        """Return the sheet (from 0) that holds an anchor, and its height in points.

        What is not on this page of the book lies at its beginning.
        """
        found = self.pdf.named_destinations.get(f"/{anchor}")
        if found is None or found.top is None:
            return 0, None
        return self.pdf.get_destination_page_number(found) or 0, float(found.top)


def chromium() -> str | None:
    """Return the path of an installed Chromium."""
    return next(filter(None, map(shutil.which, CHROMIUM)), None)


@contextmanager
def launched() -> Iterator[Browser]:
    """Run Chromium without a window.

    Raises:
        PrintError: none is installed.
    """
    program = chromium()
    if program is None:
        raise PrintError(
            f"none of {', '.join(CHROMIUM)} is installed: "
            "install Chromium, for example with `apt-get install chromium`"
        )
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=program, args=list(OPTIONS)
        )
        yield browser
        browser.close()


def load(page: Page, address: str) -> None:
    """Open a page, and wait for its formulas, fonts and figures.

    Raises:
        PrintError: the page, or something that it shows, cannot be loaded.
    """
    missing: list[str] = []
    page.on("requestfailed", lambda request: missing.append(request.url))
    page.on("pageerror", lambda error: missing.append(str(error)))
    try:
        page.goto(address, wait_until="load")
        page.evaluate(SETTLE)
    except BrowserError as error:
        missing.append(error.message.splitlines()[0])
    if missing:
        raise PrintError(
            f"{address} cannot be loaded whole: {'; '.join(missing)}. "
            "Build the pages again with `make html`"
        )


def fit(page: Page) -> None:
    """Shrink what is wider than the paper.

    Raises:
        PrintError: something would be too small to read, or would still be cut off.
    """
    smallest = page.evaluate(SHRINK)
    if smallest < SMALLEST:
        raise PrintError(
            f"{page.url}: a table or formula would be printed at {smallest:.0%} of its "
            "size: make it narrower"
        )
    if cut := page.evaluate(CUT_OFF):
        raise PrintError(f"{page.url}: wider than the paper: {'; '.join(cut)}")


def on_paper(page: Page, title: str, before: int | None) -> PdfReader:
    """Print the page that is open.

    Args:
        page: it is settled and fits.
        title: stands at the top of every sheet.
        before: how many numbered sheets come before; None prints no number.
    """
    number = "none" if before is None else "counter(page)"
    quoted = json.dumps(title, ensure_ascii=False)
    style = PAPER.format(title=quoted, number=number, before=before or 0)
    page.add_style_tag(content=style)
    return PdfReader(
        io.BytesIO(page.pdf(prefer_css_page_size=True, print_background=True))
    )


def printed(browser: Browser, html: Path, name: str, before: int | None) -> Part:
    """Print one page of the book; see :func:`on_paper` for ``before``.

    Raises:
        PrintError: it cannot be loaded, or does not fit the paper.
    """
    page = browser.new_page(viewport={"width": WIDTH, "height": 900})
    try:
        page.emulate_media(media="print", color_scheme="light")
        load(page, (html / f"{name}.html").as_uri())
        fit(page)
        headings = [Heading(*found) for found in page.evaluate(HEADINGS)]
        page.evaluate(ANCHOR)
        title = "" if before is None else headings[0].text
        return Part(name, on_paper(page, title, before), headings)
    finally:
        page.close()


def contents(browser: Browser, html: Path, parts: list[Part]) -> Part:
    """Print the table of contents: chapters and their sections, with page numbers."""
    lines, before = [], 0
    for part in parts:
        address = (html / f"{part.name}.html").as_uri()
        for level, text, anchor in part.headings:
            if level < 3:
                number = before + part.place(anchor)[0] + 1
                lines.append(
                    f'<a class="level-{level}" href="{address}#{anchor}">'
                    f"{markup.escape(text)} <span>{number}</span></a>"
                )
        before += len(part.pdf.pages)
    page = browser.new_page()
    body = "".join(lines)
    page.set_content(f"<style>{CONTENTS_STYLE}</style><h1>Contents</h1>{body}")
    pdf = on_paper(page, "", None)
    page.close()
    return Part(CONTENTS, pdf, [Heading(1, "Contents", "")])


class Binding:
    """The parts bound together: their sheets follow one another.

    Args:
        parts: in the order of the book.
        html: the folder of the pages, which their links name.
    """

    def __init__(self, parts: list[Part], html: Path) -> None:
        self.parts = {part.name: part for part in parts}
        self.base = f"{html.as_uri()}/"
        self.writer = PdfWriter()
        self.start: dict[str, int] = {}
        for part in parts:
            self.start[part.name] = len(self.writer.pages)
            self.writer.append(part.pdf, import_outline=False)

    def place(self, part: Part, anchor: str) -> tuple[int, Fit]:
        """Return the sheet and the place on it of an anchor."""
        sheet, top = part.place(anchor)
        return self.start[part.name] + sheet, Fit.xyz(top=top)

    def outline(self) -> None:
        """Give the PDF an outline: a bookmark for each heading, nested as they are."""
        for part in self.parts.values():
            parents: list[Any] = [None]
            for level, text, anchor in part.headings:
                del parents[level:]
                sheet, place = self.place(part, anchor)
                item = self.writer.add_outline_item(
                    title=text, page_number=sheet, parent=parents[-1], fit=place
                )
                parents.append(item)

    def relink(self) -> None:
        """Let links between the pages of the book lead inside the PDF.

        Links to what is not printed, such as a download, are taken away.
        """
        for part in self.parts.values():
            first = self.start[part.name]
            for page in self.writer.pages[first : first + len(part.pdf.pages)]:
                for annotation in page.annotations or ():
                    self._relink(part, annotation.get_object())

    def _relink(self, part: Part, link: DictionaryObject) -> None:
        target: Part | None = part
        if "/Dest" in link:
            anchor = str(link["/Dest"]).removeprefix("/")
        else:
            action = link["/A"].get_object()
            assert isinstance(action, DictionaryObject)  # as the PDF standard says
            address = str(action.get("/URI", ""))
            if not address.startswith("file:"):
                return
            file, anchor = urldefrag(address)
            name = file.removeprefix(self.base).removesuffix(".html")
            target = self.parts.get(unquote(name))
            link.pop("/A")
        if target is not None:
            sheet, place = self.place(target, anchor)
            to = self.writer.pages[sheet]
            link[NameObject("/Dest")] = Destination(
                anchor, to.indirect_reference or to, place
            ).dest_array

    def bound(self) -> PdfWriter:
        """Return the PDF, its first parts numbered i, ii and the others 1, 2, 3."""
        self.relink()
        self.outline()
        root = self.writer.root_object
        root.pop("/Dests", None)
        root[NameObject("/Lang")] = TextStringObject("en-GB")
        title, second, *others = self.parts.values()
        self.writer.add_metadata({"/Title": title.headings[0].text})
        self.writer.page_mode = "/UseOutlines"
        front = len(title.pdf.pages) + len(second.pdf.pages)
        roman, decimal = PageLabelStyle.LOWERCASE_ROMAN, PageLabelStyle.DECIMAL
        self.writer.set_page_label(0, front - 1, roman)
        if others:
            self.writer.set_page_label(front, len(self.writer.pages) - 1, decimal)
        return self.writer


def print_book(html: Path, names: list[str], output: Path) -> int:
    """Print pages of the built book, the first as the title page, into one PDF.

    Args:
        html: the folder of the built pages.
        names: the pages in order, without ``.html``.
        output: the PDF.

    Returns:
        How many sheets it has.

    Raises:
        PrintError: there is no Chromium, or a page cannot be loaded or does not fit.
    """
    first, *others = names
    html = html.resolve()
    with launched() as browser:
        title = printed(browser, html, first, None)
        parts: list[Part] = []
        for name in runtime.progress(others, desc="print", unit="page"):
            before = sum(len(part.pdf.pages) for part in parts)
            parts.append(printed(browser, html, name, before))
        table = contents(browser, html, parts)
    writer = Binding([title, table, *parts], html).bound()
    output.parent.mkdir(parents=True, exist_ok=True)
    writer.write(output)
    return len(writer.pages)


def main(
    html: Annotated[Path, typer.Option(help="Folder of the built pages.")] = HTML,
    output: Annotated[Path, typer.Option(help="The PDF.")] = BUILD / "book.pdf",
) -> None:
    """Print the built book and print where to open it.

    The reference is left out: it is as long as the book, and nobody looks things up
    on paper.
    """
    names = [name for name in build.pages(ROOT) if not name.startswith("book/api/")]
    try:
        sheets = print_book(html, names, output)
    except PrintError as error:
        print(f"The book was not printed: {error}", file=sys.stderr)
        raise typer.Exit(code=1) from None
    print(f"The book is printed: open {output} ({sheets} pages)")


if __name__ == "__main__":
    typer.run(main)
