"""The built book as a reader meets it: in a browser, wide and on a phone."""

import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

import build
from paths import BUILD, HTML, NOTEBOOKS, ROOT

PHONE, DESK = 390, 1280
OPTIONS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PAGES = [f"{name}.html" for name in build.pages(ROOT)]


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@dataclass
class Visit:
    """A loaded page and what went wrong while it loaded."""

    page: Page
    faults: list[str] = field(default_factory=list)


Open = Callable[..., Visit]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    names = ("chromium", "chromium-browser", "google-chrome")
    program = next(filter(None, map(shutil.which, names)), None)
    if program is None and os.environ.get("CI"):
        pytest.fail("no Chromium is installed, and under CI the pages must be seen")
    if program is None:
        pytest.skip("no Chromium is installed: the rendered pages were not looked at")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=OPTIONS)
        yield browser
        browser.close()


def serve(folder: Path) -> Iterator[str]:
    handler = partial(Quiet, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    if not HTML.exists():
        build.build(ROOT, NOTEBOOKS, BUILD.parent)
    yield from serve(HTML)


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Open]:
    """Open a page and note every error, failed answer and foreign address."""
    contexts = []

    def visit(site: str, path: str, width: int = DESK) -> Visit:
        context = browser.new_context(viewport={"width": width, "height": 844})
        contexts.append(context)
        page = context.new_page()
        seen = Visit(page)
        note = seen.faults.append
        context.route(
            lambda url: not url.startswith((site, "data:", "blob:")),
            lambda route: (note(f"foreign: {route.request.url}"), route.abort()),
        )
        page.on("pageerror", lambda error: note(f"script: {error}"))
        page.on("console", lambda m: m.type == "error" and note(f"console: {m.text}"))
        page.on("response", lambda r: r.status >= 400 and note(f"failed: {r.url}"))
        page.goto(f"{site}/{path}", wait_until="networkidle")
        return seen

    yield visit
    for context in contexts:
        context.close()


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
    buttons = page.locator("a[href*='colab.research.google.com']")
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


@pytest.fixture
def broken_site(tmp_path: Path) -> Iterator[str]:
    (tmp_path / "favicon.ico").touch()
    yield from serve(tmp_path)


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
