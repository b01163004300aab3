"""The built book for readers with a keyboard, a screen reader, or other eyes."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import colorspacious
import pytest
from axe_playwright_python.sync_playwright import Axe
from matplotlib.colors import to_rgb
from playwright.sync_api import Page
from test_browser import DESK, PAGES, formula_faults, width

import gates
from ftlib import plots

Open = Callable[..., Any]  # of conftest.py, where the fixtures are
CHAPTER = "notebooks/cgm.html"

BEYOND_WCAG = (
    "empty-heading",
    "heading-order",
    "page-has-heading-one",
    "skip-link",
    "tabindex",
)
RULES = {
    "runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"],
    "resultTypes": ["violations"],
    "rules": {rule: {"enabled": True} for rule in BEYOND_WCAG},
}
CONTRAST = {"runOnly": ["color-contrast", "link-in-text-block"]}

# axe looks at every text for a long time. A formula takes the colour of its line, words
# of a kind in code have one colour, and rows of a table two: one of each is enough.
THIN = """() => {
    document.querySelectorAll("details").forEach(hidden => { hidden.open = true; });
    document.querySelectorAll(".math").forEach(math => math.replaceWith("x"));
    document.querySelectorAll("tr:nth-child(n + 3)").forEach(row => row.remove());
    const seen = new Set();
    for (const word of document.querySelectorAll(".highlight pre span")) {
        const cell = word.closest(".cell_input, .cell_output")?.className;
        const kind = `${cell} ${word.className}`;
        if (seen.has(kind)) word.replaceWith(...word.childNodes);
        seen.add(kind);
    }
}"""


def violations(page: Page, options: dict[str, Any]) -> list[str]:
    """What axe-core finds wrong: the rule, the element, and its beginning."""
    found = Axe().run(page, options=options).response["violations"]
    return [
        f"{rule['id']}: {node['target'][-1]}: {node['html'][:100]}"
        for rule in found
        for node in rule["nodes"]
    ]


@pytest.mark.parametrize("path", [*PAGES, "search.html"])
def test_axe_finds_nothing_in_light_and_in_dark(
    site: str, open_page: Open, path: str
) -> None:
    page = open_page(site, path, color_scheme="light", reduced_motion="reduce").page
    assert formula_faults(page) == []
    page.evaluate(THIN)
    assert violations(page, RULES) == []
    page.emulate_media(color_scheme="dark")
    page.wait_for_selector("html[data-theme=dark]")
    assert violations(page, CONTRAST) == []


GOOD = """<!doctype html><html lang="en"><head><title>A page</title></head>
<body><main><h1>A page</h1>{}</main></body></html>"""
FAULTS = {
    "color-contrast": "<p style='color: #999; background: #fff'>pale</p>",
    "heading-order": "<h4>too deep</h4>",
    "image-alt": "<img src='favicon.ico'>",
    "link-name": "<a href='#x'></a>",
}


@pytest.mark.parametrize("rule", FAULTS)
def test_axe_finds_a_fault(
    broken_site: str, tmp_path: Path, open_page: Open, rule: str
) -> None:
    (tmp_path / "page.html").write_text(GOOD.format(FAULTS[rule]))
    page = open_page(broken_site, "page.html").page
    assert {found.split(":")[0] for found in violations(page, RULES)} == {rule}


def test_thinning_keeps_a_pale_word_of_code(
    broken_site: str, tmp_path: Path, open_page: Open
) -> None:
    word = "<span class='k' style='color: #999'>def</span>"
    code = (
        f"<div class='highlight'><pre><span class='n'>x</span> {word * 3}</pre></div>"
    )
    hidden = f"<details><summary>Code</summary>{code}</details>"
    (tmp_path / "page.html").write_text(GOOD.format(hidden))
    page = open_page(broken_site, "page.html").page
    page.evaluate(THIN)
    (found,) = violations(page, CONTRAST)
    assert "def" in found


UNREACHABLE = """() => [...document.querySelectorAll(".bd-article *")]
    .filter(box => ["auto", "scroll"].includes(getComputedStyle(box).overflowX))
    .filter(box => box.scrollWidth > box.clientWidth + 1 && box.tabIndex < 0)
    .map(box => box.outerHTML.slice(0, 100))"""


def brief_images(page: Page) -> list[str]:
    """Images of the text that say too little, or only how their file is called."""
    images = page.eval_on_selector_all(
        ".bd-article img", "images => images.map(image => [image.src, image.alt])"
    )
    return [
        source
        for source, alt in images
        if len(alt.strip()) <= gates.MIN_ALT or alt.strip() in source
    ]


def enlarge_text(page: Page) -> None:
    """Double the size of the text, as a browser's setting does."""
    page.evaluate("document.documentElement.style.fontSize = '200%'")
    page.wait_for_timeout(500)  # the theme looks for what scrolls 300 ms after a resize
    page.set_viewport_size({"width": DESK - 1, "height": 844})
    page.wait_for_timeout(500)


@pytest.mark.parametrize("path", PAGES)
def test_text_of_twice_the_size_fits(site: str, open_page: Open, path: str) -> None:
    """And the keyboard reaches what scrolls then, as on a phone."""
    page = open_page(site, path).page
    assert formula_faults(page) == []
    assert brief_images(page) == []
    enlarge_text(page)
    assert width(page) <= DESK
    assert page.evaluate(UNREACHABLE) == []


@pytest.mark.parametrize("alt", ["", "favicon.ico", "A figure of it"])
def test_an_image_that_says_too_little_is_noted(
    broken_site: str, tmp_path: Path, open_page: Open, alt: str
) -> None:
    image = f"<p class='bd-article'><img src='favicon.ico' alt='{alt}'>"
    (tmp_path / "page.html").write_text(image)
    assert len(brief_images(open_page(broken_site, "page.html").page)) == 1


def test_a_box_that_only_a_mouse_scrolls_is_noted(
    broken_site: str, tmp_path: Path, open_page: Open
) -> None:
    box = "<div style='overflow-x: auto; width: 9em' {}><p style='width: 99em'>x</div>"
    both = box.format("") + box.format("tabindex=0")
    (tmp_path / "page.html").write_text(f"<div class='bd-article'>{both}</div>")
    page = open_page(broken_site, "page.html").page
    assert len(page.evaluate(UNREACHABLE)) == 1


def test_text_that_does_not_wrap_is_noted(
    broken_site: str, tmp_path: Path, open_page: Open
) -> None:
    (tmp_path / "page.html").write_text("<p style='width: 50rem'>wide</p>")
    page = open_page(broken_site, "page.html").page
    assert width(page) <= DESK
    enlarge_text(page)
    assert width(page) > DESK


# A stop of the Tab key: its beginning, and whether one sees that it has the focus.
STOP = """() => {
    const stop = document.activeElement;
    if (stop === document.body) return null;
    // Where a toggle is an arrow, the arrow inside it shows the focus.
    const parts = [stop, ...stop.querySelectorAll(":scope > .toctree-toggle")];
    const look = () => parts.map((part) => {
        const { outline, boxShadow, border, opacity } = getComputedStyle(part);
        return `${outline} ${boxShadow} ${border} ${opacity}`;
    }).join();
    const focused = look(), shown = getComputedStyle(stop).opacity > 0.5;
    stop.blur();
    const plain = look();
    stop.focus({ focusVisible: true });
    return [stop.outerHTML.slice(0, 160), shown && focused !== plain];
}"""
Stops = list[tuple[str, bool]]


def stops(page: Page, limit: int = 500) -> Stops:
    """Press Tab from the beginning of a page until the page is left."""
    found: Stops = []
    for _ in range(limit):
        page.keyboard.press("Tab")
        stop = page.evaluate(STOP)
        if stop is None:
            return found
        found.append(tuple(stop))
    raise AssertionError(f"{limit} times Tab do not leave the page: {found[-2:]}")


def test_tab_reaches_all_and_shows_where_it_is(site: str, open_page: Open) -> None:
    page = open_page(site, CHAPTER, reduced_motion="reduce").page
    assert formula_faults(page) == []
    found = stops(page)
    assert [stop for stop, seen in found if not seen] == []
    assert "Skip to main content" in found[0][0]
    walked = " ".join(stop for stop, _ in found)
    for part in (
        "search-button-field",
        "cft.html",
        "theme-switch-button",
        "right-next",
    ):
        assert part in walked
    for kind, start in {
        ".bd-article summary, .bd-sidenav summary": "<summary",
        ".bd-article button.copybtn:visible": '<button class="copybtn',
    }.items():
        reached = sum(stop.startswith(start) for stop, _ in found)
        assert reached == page.locator(kind).count() > 0


def test_enter_opens_and_closes_hidden_code(site: str, open_page: Open) -> None:
    page = open_page(site, CHAPTER).page
    hidden = page.locator("details.hide").first
    summary, code = hidden.locator("summary"), hidden.locator("pre").first
    assert summary.get_attribute("aria-label") is None
    summary.focus()
    for seen in (True, False):
        page.keyboard.press("Enter")
        assert code.is_visible() == seen


TRAP = "<a id='a' href='#a'>in</a><script>a.onblur = () => a.focus()</script>"
UNSEEN = "<style>a { outline: none }</style><a id='a' href='#a'>unseen</a>"


def test_a_keyboard_trap_is_noted(
    broken_site: str, tmp_path: Path, open_page: Open
) -> None:
    (tmp_path / "page.html").write_text(TRAP)
    with pytest.raises(AssertionError, match="do not leave the page"):
        stops(open_page(broken_site, "page.html").page, limit=9)


def test_a_focus_that_is_not_seen_is_noted(
    broken_site: str, tmp_path: Path, open_page: Open
) -> None:
    (tmp_path / "page.html").write_text(UNSEEN)
    assert stops(open_page(broken_site, "page.html").page)[0][1] is False


MOVING = """() => [...document.querySelectorAll("*")]
    .filter(element => {
        const style = getComputedStyle(element);
        return style.animationName !== "none" || style.scrollBehavior === "smooth"
            || parseFloat(style.transitionDuration) > 0;
    }).length"""


def test_nothing_moves_for_who_asks_for_that(site: str, open_page: Open) -> None:
    """Who does not ask sees some of the theme's transitions."""
    assert open_page(site, "book/references.html").page.evaluate(MOVING) > 0
    still = open_page(site, "book/references.html", reduced_motion="reduce").page
    assert still.evaluate(MOVING) == 0


# The share of white that a colour behind a figure has at least.
GROUND = """figures => figures.map(figure => Math.min(
    ...getComputedStyle(figure).backgroundColor.match(/[\\d.]+/g).map(Number)) / 255)"""


def test_figures_keep_a_light_ground_in_the_dark(site: str, open_page: Open) -> None:
    """Their ink is black, and where they are transparent the page would show."""
    page = open_page(site, CHAPTER, color_scheme="dark").page
    grounds = page.eval_on_selector_all(".cell_output img", GROUND)
    assert grounds
    assert min(grounds) > 0.75


def test_a_figure_on_a_dark_ground_is_noted(
    broken_site: str, tmp_path: Path, open_page: Open
) -> None:
    for colour in ("transparent", "#123"):
        image = f"<img src='favicon.ico' style='background: {colour}'>"
        (tmp_path / "page.html").write_text(image)
        page = open_page(broken_site, "page.html").page
        assert page.eval_on_selector_all("img", GROUND)[0] < 0.75


# Perceived distances, in CAM02-UCS. Two colours side by side differ from 1 on; for thin
# lines apart from one another, ten times that is asked for. The simulation is that of
# Machado, Oliveira and Fernandes (2009), for the complete lack of one kind of cone.
LEAST_DISTANCE = 10
SIGHTS = ["sRGB1"] + [
    {"name": "sRGB1+CVD", "cvd_type": kind, "severity": 100}
    for kind in ("protanomaly", "deuteranomaly", "tritanomaly")
]
PALETTE = list(dict.fromkeys(map(plots.colour, range(20))))


def least_distance(colours: list[str], sight: str | dict[str, Any]) -> float:
    return min(
        colorspacious.deltaE(to_rgb(one), to_rgb(other), input_space=sight)
        for one, other in itertools.combinations(colours, 2)
    )


@pytest.mark.parametrize("sight", SIGHTS, ids=str)
def test_lines_differ_in_colour_whatever_cones_one_has(
    sight: str | dict[str, Any],
) -> None:
    assert least_distance(PALETTE, sight) >= LEAST_DISTANCE


def test_a_red_and_a_green_alike_are_noted() -> None:
    pair = ["#2CA02C", "#D62728"]
    assert least_distance(pair, "sRGB1") >= LEAST_DISTANCE
    assert min(least_distance(pair, sight) for sight in SIGHTS) < LEAST_DISTANCE


def test_lines_of_one_figure_differ_without_colour() -> None:
    styles = [plots.arm_style(index) for index in range(8)]
    assert len({style["marker"] for style in styles}) == 8
    looks = {(style["linestyle"], style["marker"]) for style in styles}
    assert len(looks) == 8
    assert len({style["linestyle"] for style in styles[:4]}) == 4
