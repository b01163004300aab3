"""A browser, the built book as it serves it, and what goes wrong on a page of it."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from playwright.sync_api import Browser, Page

import build
import pdf
from paths import BUILD, HTML, NOTEBOOKS, ROOT

DESK = 1280


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@dataclass
class Visit:
    """A loaded page and what went wrong while it loaded."""

    page: Page
    faults: list[str] = field(default_factory=list)


Open = Callable[..., Visit]


@pytest.fixture(scope="session")
def chromium() -> None:
    if pdf.chromium() is None and os.environ.get("CI"):
        pytest.fail("no Chromium is installed, and under CI the pages must be seen")
    if pdf.chromium() is None:
        pytest.skip("no Chromium is installed: the rendered pages were not looked at")


@pytest.fixture(scope="module")
def browser(chromium: None) -> Iterator[Browser]:
    with pdf.launched() as browser:
        yield browser


def serve(folder: Path) -> Iterator[str]:
    handler = partial(Quiet, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture(scope="session")
def built() -> Path:
    """The folder of the built pages."""
    if not HTML.exists():
        build.build(ROOT, NOTEBOOKS, BUILD.parent)
    return HTML


@pytest.fixture(scope="module")
def site(built: Path) -> Iterator[str]:
    yield from serve(built)


@pytest.fixture
def broken_site(tmp_path: Path) -> Iterator[str]:
    """A site of the test's own folder, for pages that have a fault."""
    (tmp_path / "favicon.ico").touch()
    yield from serve(tmp_path)


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Open]:
    """Open a page and note every error, failed answer and foreign address."""
    contexts = []

    def visit(site: str, path: str, width: int = DESK, **options: object) -> Visit:
        context = browser.new_context(
            viewport={"width": width, "height": 844}, **options
        )
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
