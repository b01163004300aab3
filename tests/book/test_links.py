"""Links: within the book they lead somewhere; to other sites, exceptions have reasons.

Other sites are asked once a week (.github/workflows/drift.yml), and not here.
"""

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

import pytest
import yaml

from paths import HTML, ROOT

CONFIG = ROOT / "_config.yml"
ADDRESSES = {"a": "href", "img": "src", "link": "href", "script": "src"}


# --- within the book ----------------------------------------------------------------


class Page(HTMLParser):
    """The places on a page that can be linked to, and where its own links lead."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.places: set[str] = set()
        self.links: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.places |= {found[name] for name in ("id", "name") if found.get(name)}
        if address := found.get(ADDRESSES.get(tag, "")):
            self.links.add(address)


class Broken(NamedTuple):
    page: str
    link: str


def broken_links(html: Path) -> list[Broken]:
    """Return the links of a built book that lead to no file, or to no place in it."""
    html = html.resolve()
    templates = html / "_static"  # of the theme's, not pages
    paths = [p for p in sorted(html.rglob("*.html")) if templates not in p.parents]
    pages = {path: Page(path.read_text(encoding="utf-8")) for path in paths}
    found = []
    for path, page in pages.items():
        for link in sorted(page.links):
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = path
            if parts.path:
                target = (path.parent / unquote(parts.path)).resolve()
            place = unquote(parts.fragment)
            unknown = place and target in pages and place not in pages[target].places
            if not target.exists() or unknown:
                found.append(Broken(str(path.relative_to(html)), link))
    return found


def test_links_within_the_book_lead_somewhere() -> None:
    assert (HTML / "index.html").exists(), "build the book first: make html"
    assert broken_links(HTML) == []


@pytest.mark.parametrize(
    "link",
    [
        '<a href="absent.html">',
        '<a href="two.html#absent">',
        '<a href="#absent">',
        '<img src="absent.png">',
        '<script src="absent.js">',
    ],
)
def test_a_broken_link_is_seen(tmp_path: Path, link: str) -> None:
    good = '<a href="sub/two.html?q=1#a%20place"><a href="#here"><p id="here">'
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "two.html").write_text('<p id="a place"><a href="../one.html">')
    one = tmp_path / "one.html"
    one.write_text(
        f'{good}<a href="https://example.org/absent"><a href="mailto:a@b.c">'
    )
    assert broken_links(tmp_path) == []
    one.write_text(good + link.replace("two.html", "sub/two.html"))
    assert [found.page for found in broken_links(tmp_path)] == ["one.html"]


# --- to other sites -----------------------------------------------------------------


def ignored(config: str) -> dict[str, str]:
    """Return each pattern of linkcheck_ignore, with the comment that follows it."""
    settings = yaml.safe_load(config)["sphinx"]["config"]
    patterns = settings.get("linkcheck_ignore", [])
    reasons = dict.fromkeys(patterns, "")
    for item, reason in re.findall(r"^ *- (\S+)(?: +# *(.*))?$", config, re.MULTILINE):
        if item in reasons:
            reasons[item] = reason
    return reasons


def addresses() -> str:
    """Return all text that can hold an address, a DOI as the address it becomes."""
    book = [*(ROOT / "book").glob("*.md"), *(ROOT / "book" / "mirror").glob("*.py")]
    entries = (ROOT / "book" / "references.bib").read_text(encoding="utf-8")
    texts = [path.read_text(encoding="utf-8") for path in book]
    dois = re.findall(r"doi *= *\{(.+?)\}", entries)
    return "\n".join([*texts, entries, *(f"https://doi.org/{doi}" for doi in dois)])


def test_every_exception_has_a_reason_and_is_needed() -> None:
    exceptions, text = ignored(CONFIG.read_text(encoding="utf-8")), addresses()
    assert [pattern for pattern, reason in exceptions.items() if len(reason) < 20] == []
    assert [pattern for pattern in exceptions if not re.search(pattern, text)] == []


def test_an_exception_without_a_reason_is_seen() -> None:
    config = """
sphinx:
  config:
    linkcheck_ignore:
      - https://a\\.org/.*  # answers programs with 403
      - https://b\\.org/.*
"""
    assert ignored(config) == {
        r"https://a\.org/.*": "answers programs with 403",
        r"https://b\.org/.*": "",
    }
