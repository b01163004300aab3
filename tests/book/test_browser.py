"""The built book as a reader meets it: in a browser, wide and on a phone."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page

import build
from paths import NOTEBOOKS, ROOT

Open = Callable[..., Any]  # of conftest.py, where the fixtures are
PHONE, DESK = 390, 1280
PAGES = [f"{name}.html" for name in build.pages(ROOT)]


def image_faults(page: Page) -> list[str]:
    """Images that show nothing, or have no text or their file's name for one."""
    images = page.eval_on_selector_all(
        "img",
        """images => Promise.all(images.map(async image => {
            image.loading = 'eager';
            await image.decode().catch(() => null);
            return [image.src, image.alt, image.naturalWidth];
        }))""",
    )
    file_name = re.compile(r"\.(png|svg|jpe?g|gif)$")
    return [
        source
        for source, alt, width in images
        if width == 0 or not alt.strip() or file_name.search(alt)
    ]


def formula_faults(page: Page) -> list[str]:
    """Formulas that were not typeset, or typeset as an error."""
    if page.locator(".math").count():
        page.wait_for_function("window.MathJax?.startup?.promise !== undefined")
        page.evaluate("() => MathJax.startup.promise")
    return page.eval_on_selector_all(
        ".math",
        """formulas => formulas
            .filter(f => !f.querySelector('mjx-container')
                         || f.querySelector('mjx-merror'))
            .map(f => f.textContent)""",
    )


def width(page: Page) -> int:
    return page.evaluate("document.scrollingElement.scrollWidth")


@pytest.mark.parametrize("path", PAGES)
def test_page_shows_all_and_fetches_nothing(
    site: str, open_page: Open, path: str
) -> None:
    visit = open_page(site, path)
    assert visit.page.locator("article h1").inner_text()
    assert formula_faults(visit.page) == []
    assert image_faults(visit.page) == []
    assert visit.faults == []


@pytest.mark.parametrize("path", PAGES)
def test_page_fits_a_phone(site: str, open_page: Open, path: str) -> None:
    page = open_page(site, path, width=PHONE).page
    assert formula_faults(page) == []
    assert width(page) <= PHONE


@pytest.mark.parametrize("notebook", sorted(NOTEBOOKS.glob("*.ipynb")), ids=str)
def test_colab_opens_the_page_itself(
    site: str, open_page: Open, notebook: Path
) -> None:
    name = notebook.relative_to(ROOT)
    page = open_page(site, f"{name.with_suffix('.html').as_posix()}").page
    buttons = page.locator(".article-header-buttons a[href*='colab.research']")
    links = {link.get_attribute("href") for link in buttons.all()}
    assert len(links) == 1
    assert links.pop().endswith(f"/blob/main/{name.as_posix()}")


def test_chapters_have_formulas(site: str, open_page: Open) -> None:
    """Else the test above that formulas are typeset would pass for want of any."""
    page = open_page(site, "notebooks/cgm.html").page
    assert page.locator(".math").count() > 0


def test_search_finds(site: str, open_page: Open) -> None:
    visit = open_page(site, "search.html?q=Kullback")
    results = visit.page.locator("#search-results li a")
    results.first.wait_for()
    found = [link.get_attribute("href") for link in results.all()]
    assert any("notebooks/cgm.html" in link for link in found)
    assert visit.faults == []


BROKEN = {
    "foreign": "<script src='https://example.org/a.js'></script>",
    "failed": "<img src='absent.png' alt='absent'>",
    "console": "<script>console.error('wrong')</script>",
    "script": "<script>throw new Error('wrong')</script>",
}


@pytest.mark.parametrize("kind", BROKEN)
def test_faults_are_noted(
    broken_site: str, tmp_path: Path, open_page: Open, kind: str
) -> None:
    (tmp_path / "page.html").write_text(BROKEN[kind])
    kinds = {
        fault.split(":")[0] for fault in open_page(broken_site, "page.html").faults
    }
    assert kind in kinds


@pytest.mark.parametrize("alt", ["", "picture.svg"])
def test_image_without_text_is_noted(
    broken_site: str, tmp_path: Path, open_page: Open, alt: str
) -> None:
    shutil.copy(ROOT / "book" / "_static" / "favicon.svg", tmp_path / "picture.svg")
    (tmp_path / "page.html").write_text(f"<img src='picture.svg' alt='{alt}'>")
    assert len(image_faults(open_page(broken_site, "page.html").page)) == 1


def test_wide_page_is_noted(broken_site: str, tmp_path: Path, open_page: Open) -> None:
    (tmp_path / "page.html").write_text("<p style='width: 500px'>wide</p>")
    assert width(open_page(broken_site, "page.html", width=PHONE).page) > PHONE
