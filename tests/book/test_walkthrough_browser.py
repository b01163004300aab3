"""The walk through a conversation, in the book's theme: with a script and without."""

from collections.abc import Callable, Iterator

import pytest
import test_browser
from playwright.sync_api import Browser, Locator, Page, expect

from ftlib.clipr import kitchens
from ftlib.clipr.loop import learn
from ftlib.clipr.reasoners import SymbolicReasoner
from ftlib.clipr.settings import ConversationSettings, Settings
from ftlib.clipr.users import SimulatedUser
from ftlib.clipr.walkthrough import Note, Step, Walkthrough, walkthrough
from paths import HTML

PHONE = 360
SETTINGS = Settings(conversation=ConversationSettings(candidates=200))
BEFORE = "<p><button>Before</button></p>"
ARTICLE = '<article class="bd-article">'


def held(seed: int) -> Walkthrough:
    parts = kitchens.draw(seed=seed, train=48, validation=20, test=0, strange=0)
    examples, tasks = parts.train[:8], parts.train[8:]
    user, states = SimulatedUser(kitchens.preferences(seed)), []
    reasoner = SymbolicReasoner(SETTINGS)
    learn(reasoner, user, examples, tasks, SETTINGS, save=states.append)
    return walkthrough(states, tasks, SETTINGS, parts.validation[:3], user.right)


@pytest.fixture(scope="module")
def walk() -> Walkthrough:
    return held(1002)


@pytest.fixture(scope="module")
def html(walk: Walkthrough) -> str:
    return walk._repr_html_()


Show = Callable[..., Page]


@pytest.fixture
def show(browser: Browser, site: str) -> Iterator[Show]:
    """Show outputs of cells atop a page of the built book; nothing may go wrong."""
    contexts, faults = [], []

    def shown(*outputs: str, width: int = 1280, **options: object) -> Page:
        context = browser.new_context(
            viewport={"width": width, "height": 844}, **options
        )
        contexts.append(context)
        context.route(
            lambda url: not url.startswith((site, "data:", "blob:")),
            lambda route: (faults.append(route.request.url), route.abort()),
        )
        cells = "".join(
            '<div class="cell docutils container">'
            '<div class="cell_output docutils container">'
            f'<div class="output text_html">{output}</div></div></div>'
            for output in outputs
        )
        source = (HTML / "book" / "contributing.html").read_text(encoding="utf-8")
        head, rest = source.split(ARTICLE)
        body = f"{head}{ARTICLE}{cells}{rest}"
        context.route(f"{site}/book/walk.html", lambda route: route.fulfill(body=body))
        page = context.new_page()
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.goto(f"{site}/book/walk.html", wait_until="load")
        return page

    yield shown
    for context in contexts:
        context.close()
    assert faults == []


def rows(page: Page) -> Locator:
    return page.locator(".clipr-walk tbody tr")


def visible(page: Page, walk: int = 0) -> list[int]:
    """Return the numbers of the steps that are seen."""
    return (
        page.locator(".clipr-walk")
        .nth(walk)
        .evaluate(
            """walk => [...walk.querySelectorAll("tbody tr")]
            .map((row, at) => row.getClientRects().length ? at + 1 : 0)
            .filter(Boolean)"""
        )
    )


def press(page: Page, name: str) -> None:
    page.get_by_role("button", name=name, exact=True).click(force=True)


def said(page: Page) -> str:
    return page.locator(".clipr-walk output").inner_text()


# --- without a script ---------------------------------------------------------


def test_without_a_script_every_step_is_there_and_nothing_to_press(
    show: Show, html: str, walk: Walkthrough
) -> None:
    page = show(html, java_script_enabled=False)
    # With scripts off the page cannot be asked by one either.
    assert rows(page).count() == len(walk.steps)
    for at, step in enumerate(walk.steps):
        assert rows(page).nth(at).is_visible()
        text = rows(page).nth(at).inner_text()
        assert step.title in text
        assert all(note.text in text for note in step.notes)
        assert all(line.text in text for line in step.rules)
    inside = page.locator(".clipr-walk")
    assert inside.locator("button, input, output").count() == 0
    assert inside.locator("caption").is_visible()


def test_in_print_every_step_is_there_and_no_buttons(
    show: Show, html: str, walk: Walkthrough
) -> None:
    page = show(html)
    press(page, "Next")
    assert visible(page) == [2]
    page.emulate_media(media="print")
    assert visible(page) == list(range(1, len(walk.steps) + 1))
    assert not page.locator(".clipr-walk button").first.is_visible()
    page.emulate_media(media="screen")
    assert visible(page) == [2]


# --- step by step -------------------------------------------------------------


def test_buttons_lead_from_step_to_step(
    show: Show, html: str, walk: Walkthrough
) -> None:
    page, n = show(html), len(walk.steps)
    assert visible(page) == [1]
    seen = []
    for name in ("Next", "Next", "Back", "Last", "Next", "Back", "First", "Back"):
        press(page, name)
        seen += visible(page)
    assert seen == [2, 3, 2, n, n, n - 1, 1, 1]


def test_each_step_shows_what_the_walk_says_of_it(
    show: Show, html: str, walk: Walkthrough
) -> None:
    page, n = show(html), len(walk.steps)
    for number, step in enumerate(walk.steps, start=1):
        text = rows(page).nth(number - 1).inner_text()
        assert all(note.text in text for note in step.notes)
        assert all(line.text in text for line in step.rules)
        assert said(page) == (
            f"Step {number} of {n}: {step.title}. {step.rules_in_words}."
            f" {step.choices_in_words}."
        )
        press(page, "Next")
    live = page.locator(".clipr-walk output")
    assert live.get_attribute("aria-live") == "polite"


def test_a_button_at_its_end_says_so_and_keeps_the_focus(show: Show, html: str) -> None:
    page = show(html)
    expect(page.get_by_role("button", name="Back")).to_be_disabled()  # aria-disabled
    expect(page.get_by_role("button", name="First")).to_be_disabled()
    expect(page.get_by_role("button", name="Next")).to_be_enabled()
    press(page, "Last")
    expect(page.get_by_role("button", name="Last")).to_be_disabled()
    expect(page.get_by_role("button", name="Next")).to_be_disabled()
    expect(page.get_by_role("button", name="Last")).to_be_focused()
    page.keyboard.press("ArrowLeft")
    expect(page.get_by_role("button", name="Last")).to_be_enabled()


def test_keys_lead_while_the_focus_is_inside(
    show: Show, html: str, walk: Walkthrough
) -> None:
    page, n = show(BEFORE + html), len(walk.steps)
    page.get_by_role("button", name="Before").focus()
    page.keyboard.press("ArrowRight")
    assert visible(page) == [1]
    page.locator(".cw-box").focus()
    seen = []
    for key in ("ArrowRight", "ArrowRight", "ArrowLeft", "End", "ArrowRight", "Home"):
        page.keyboard.press(key)
        seen += visible(page)
    assert seen == [2, 3, 2, n, n, 1]
    for key in ("Control+ArrowRight", "Shift+ArrowRight", "Control+End", "a"):
        page.keyboard.press(key)
    assert visible(page) == [1]


def test_the_slider_leads_too_one_step_for_a_key(
    show: Show, html: str, walk: Walkthrough
) -> None:
    page = show(html)
    slider = page.get_by_role("slider", name="Step")
    slider.fill("7")
    assert visible(page) == [7]
    slider.focus()
    page.keyboard.press("ArrowRight")
    assert visible(page) == [8]
    assert slider.get_attribute("aria-valuetext") == f"8 of {len(walk.steps)}"
    page.keyboard.press("End")
    assert visible(page) == [len(walk.steps)]
    press(page, "First")
    assert slider.input_value() == "1"


def test_the_whole_table_can_be_shown_and_left_again(
    show: Show, html: str, walk: Walkthrough
) -> None:
    page, n = show(html), len(walk.steps)
    press(page, "Next")
    every = page.get_by_label("Show all steps as a table")
    every.check()
    assert visible(page) == list(range(1, n + 1))
    assert page.locator(".clipr-walk caption").is_visible()
    assert not page.get_by_role("button", name="Next").is_visible()
    assert said(page) == f"All {n} steps."
    page.locator(".cw-box").focus()
    page.keyboard.press("ArrowRight")  # scrolls
    every.focus()
    page.keyboard.press("Space")
    assert visible(page) == [2]


def test_every_control_is_reached_by_tab_and_seen_to_be(show: Show, html: str) -> None:
    page = show(BEFORE + html)
    page.get_by_role("button", name="Before").focus()
    reached = []
    for _ in range(7):
        page.keyboard.press("Tab")
        name, line, width = page.evaluate(
            """() => {
                const now = document.activeElement, style = getComputedStyle(now);
                return [now.textContent.trim().slice(0, 5) || now.type,
                        style.outlineStyle, parseFloat(style.outlineWidth)];
            }"""
        )
        reached.append(name)
        assert line == "solid"
        assert width >= 2
    assert reached[:6] == ["First", "Back", "Next", "Last", "range", "checkbox"]
    assert page.evaluate("document.activeElement.className") == "cw-box"


# --- beside others ------------------------------------------------------------


def test_several_on_a_page_do_not_disturb_each_other(show: Show, html: str) -> None:
    """The same one twice, and another."""
    page = show(html, html, held(1003)._repr_html_())
    second = page.locator(".clipr-walk").nth(1)
    second.get_by_role("button", name="Next").click()
    page.keyboard.press("ArrowRight")
    assert [visible(page, at) for at in range(3)] == [[1], [3], [1]]
    page.get_by_label("Show all steps as a table").nth(2).check()
    assert [len(visible(page, at)) for at in range(2)] == [1, 1]
    assert len(visible(page, 2)) > 10
    assert page.locator(".cw-bar").count() == 3


def test_the_page_gets_no_globals(show: Show, html: str) -> None:
    names = "Object.keys(window).sort()"
    assert show(html).evaluate(names) == show(BEFORE).evaluate(names)


def test_it_works_when_a_notebook_runs_its_script_later(show: Show, html: str) -> None:
    """As JupyterLab does: the text is set, and then each script is made anew."""
    page = show("<div class=host></div>")
    page.evaluate(
        """html => {
            const host = document.querySelector(".host");
            host.innerHTML = html;
            for (const old of host.querySelectorAll("script")) {
                const script = document.createElement("script");
                script.textContent = old.textContent;
                old.replaceWith(script);
            }
        }""",
        html,
    )
    press(page, "Next")
    assert visible(page) == [2]


def test_no_text_is_run(show: Show) -> None:
    texts = (
        "<script>window.hacked = 1</script>",
        "</script></table><img src=x onerror='window.hacked = 1'>",
        '" onmouseover="window.hacked = 1" style=\'',
    )
    steps = tuple(Step(text, (Note(text, text),), (), ()) for text in texts)
    page = show(Walkthrough(steps)._repr_html_())
    for text in texts:
        assert text in rows(page).locator("visible=true").first.inner_text()
        assert text in said(page)
        press(page, "Next")
    page.mouse.move(300, 300)
    assert page.evaluate("window.hacked") is None
    assert page.locator(".clipr-walk img").count() == 0


# --- as it looks --------------------------------------------------------------


@pytest.mark.parametrize("mode", ["no script", "step", "table"])
def test_a_phone_is_wide_enough(show: Show, html: str, mode: str) -> None:
    page = show(html, width=PHONE, java_script_enabled=mode != "no script")
    if mode == "table":
        page.get_by_label("Show all steps as a table").check()
    if mode == "step":
        press(page, "Last")
    box = page.locator(".cw-box").bounding_box()
    table = page.locator(".cw-box table").bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= PHONE
    if mode == "step":
        assert table["width"] <= box["width"]
    else:
        assert table["width"] > box["width"]  # and scrolls in its box
    if mode != "no script":
        assert test_browser.width(page) <= PHONE


CONTRASTS = """walk => {
    const rgb = text => text.match(/[\\d.]+/g).map(Number);
    const light = text => {
        const [r, g, b] = rgb(text).slice(0, 3).map(c => c / 255).map(
            c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const behind = element => {
        for (let e = element; e; e = e.parentElement) {
            const colour = getComputedStyle(e).backgroundColor;
            const [, , , alpha = 1] = rgb(colour);
            if (alpha === 1) return colour;
            if (alpha > 0) throw new Error(`half transparent: ${colour}`);
        }
    };
    const texts = [...walk.querySelectorAll("*")].filter(element =>
        element.getClientRects().length
        && [...element.childNodes].some(n => n.nodeType === 3 && n.data.trim()));
    return texts.map(element => {
        const style = getComputedStyle(element);
        if ((rgb(style.color)[3] ?? 1) < 1 || style.opacity < 1)
            throw new Error(`half transparent: ${element.tagName}`);
        const [a, b] = [light(style.color), light(behind(element))];
        return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    });
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("mode", ["step", "table"])
def test_all_text_can_be_read(show: Show, html: str, scheme: str, mode: str) -> None:
    page = show(html, color_scheme=scheme)
    assert page.locator("html").get_attribute("data-theme") == scheme
    page.get_by_label("Show all steps as a table").set_checked(mode == "table")
    walk = page.locator(".clipr-walk")
    contrasts = walk.evaluate(CONTRASTS)
    assert len(contrasts) > 10
    assert min(contrasts) >= 4.5
    walk.evaluate("walk => { walk.style.color = 'rgb(120, 120, 120)' }")
    assert min(walk.evaluate(CONTRASTS)) < 4.5  # it would be noticed


def test_nothing_moves(show: Show, html: str) -> None:
    """Whatever the reader prefers."""
    page = show(html)
    press(page, "Next")
    moving = "walk => walk.getAnimations({subtree: true}).length"
    assert page.locator(".clipr-walk").evaluate(moving) == 0
