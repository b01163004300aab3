"""The claims of the papers, and what the book says of them."""

import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import claims
import landing
import pages
from claims import ClaimError
from ftlib import results
from notebooks import code_cells, read
from paths import NOTEBOOKS, ROOT

WANTED = {"caref": 5, "cft": 4, "cgm": 4, "clipr": 4, "ctsft": 4}
NON_BREAKING = "\N{NON-BREAKING HYPHEN}"


@pytest.fixture(scope="module")
def book() -> claims.Book:
    return claims.load()


def test_every_claim_of_every_paper_is_answered(book):
    assert WANTED.keys() == pages.PAPERS.keys()
    assert Counter(name.split("-")[0] for name in book.claims) == WANTED
    for method, count in WANTED.items():
        numbers = {f"{method}-{i}" for i in range(1, count + 1)}
        assert numbers <= book.claims.keys()


def test_every_verdict_stands_on_records(book):
    for claim in book.claims.values():
        for measured in claim.measured:
            assert np.isfinite(measured.interval.mean), measured.name


def test_every_number_is_used(book):
    used = {m.name for c in book.claims.values() for m in (*c.measured, *c.published)}
    used |= {name for panel in book.panels for name in (*panel.theirs, *panel.ours)}
    prose = "".join(path.read_text("utf-8") for path in (ROOT / "book").glob("*.md"))
    prose += claims.CLAIMS.read_text("utf-8")
    for name in book.numbers():
        assert name in used or re.search(rf"{{+ ?{name} ?}}+", prose), name


def test_chapters_answer_the_same_claims(book):
    for claim in book.claims.values():
        notebook = read(NOTEBOOKS / f"{claim.chapter}.ipynb")
        shown = "".join(
            output.get("data", {}).get("text/markdown", "")
            for _, cell in code_cells(notebook)
            for output in cell.outputs
        )
        assert claim.name.replace("-", NON_BREAKING) in shown, (
            f"{claim.chapter}.ipynb shows no {claim.name} (with U+2011) in a Markdown"
        )
        headings = [cell.source for cell in notebook.cells]
        assert any("### The verdicts" in text for text in headings), (
            f"{claim.chapter}.ipynb has no heading '### The verdicts'"
        )


# --- a file of claims and records made for the purpose -------------------------

CLAIM = """
[claim.toy-1]
says = "It helps"
chapter = "toy"
verdict = "reproduced"
why = "By {gain}."
measured = ["gain"]
published = []

[measured.gain]
says = "new minus old"
method = "toy"
experiment = "e"
arm = "new"
metric = "right"
minus = { arm = "old" }
unit = "points"

[published.hope]
says = "accuracy"
method = "caref"
table = "results"
row = ["CAREF-AQ", "accuracy"]
column = "average"
unit = "%"

[[panel]]
title = "Toy"
unit = "points"
silent = "no number"
[panel.ours]
gain = "over old"
"""


def record(arm: str, seed: int, **metrics: float) -> results.Record:
    return results.Record(
        method="toy",
        experiment="e",
        arm=arm,
        seed=seed,
        scale="cpu",
        settings={},
        metrics={name: results.Metric(value) for name, value in metrics.items()},
        seconds=1.0,
        peak_memory_bytes=1,
        device="cpu",
        versions={},
        data={},
        commit=None,
    )


@pytest.fixture
def recorded(tmp_path, monkeypatch):
    monkeypatch.setenv("FTLIB_RESULTS_DIR", str(tmp_path / "records"))
    claims._records.cache_clear()
    results.append(
        [
            record(arm, seed, right=right, wide=2.0, even=1 - seed % 2)
            for arm, values in {"new": (0.5, 0.8), "old": (0.4, 0.4)}.items()
            for seed, right in enumerate(values)
        ]
        + [record("lonely", 7, right=1.0)]
    )
    yield
    claims._records.cache_clear()


def load(tmp_path: Path, text: str) -> claims.Book:
    path = tmp_path / "claims.toml"
    path.write_text(text, "utf-8")
    return claims.load(path)


@pytest.mark.parametrize(
    ("change", "mean", "shown"),
    [
        ('minus = { arm = "old" }', 25.0, "+25.0 [+10.0, +40.0] points"),
        ('share_of = { arm = "old" }', 162.5, "162.5 [125.0, 200.0] points"),
        ('removed_from = { metric = "wide" }', 67.5, "67.5 [60.0, 75.0] points"),
        ("", 65.0, "65.0 [50.0, 80.0] points"),
    ],
)
def test_numbers_are_what_one_would_work_out(tmp_path, recorded, change, mean, shown):
    text = CLAIM.replace('minus = { arm = "old" }', change)
    gain = load(tmp_path, text).measured["gain"]
    assert gain.interval.mean == pytest.approx(mean)
    assert str(gain) == shown


def test_seeds_are_counted(tmp_path, recorded):
    text = CLAIM.replace('minus = { arm = "old" }\n', "").replace(
        'metric = "right"\nunit = "points"', 'metric = "even"\nunit = "of the seeds"'
    )
    assert str(load(tmp_path, text).measured["gain"]) == "1 of 2 seeds"


def test_a_difference_of_published_numbers():
    theirs = claims.load().published["caref_over_lora_published"]
    assert theirs.value == pytest.approx(89.04 - 88.92)
    assert str(theirs) == "+0.12 points"
    assert ";" in theirs.source


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('verdict = "reproduced"\n', "", "verdict None"),
        ('"reproduced"', '"splendid"', "splendid"),
        ('measured = ["gain"]', "measured = []", "nothing measured"),
        ('measured = ["gain"]', 'measured = ["loss"]', "loss, which is not defined"),
        ("{gain}", "{loss}", "loss"),
        ('arm = "new"\n', "", "measured.gain: 'arm'"),
        ('minus = { arm = "old" }', 'minus = { a = "old" }', "measured.gain"),
        ('arm = "old" }', 'arm = "old" }\nshare_of = { arm = "old" }', "keep one"),
        ('arm = "old"', 'arm = "lonely"', "do not pair"),
        ('column = "average"', 'column = "sum"', "published.hope"),
        ('gain = "over old"', 'loss = "over old"', "Toy names loss"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path, recorded, old, new, message):
    assert old in CLAIM
    with pytest.raises(ClaimError, match=re.escape(message)):
        load(tmp_path, CLAIM.replace(old, new))


@pytest.mark.parametrize(
    ("old", "new"), [('arm = "new"', 'arm = "none"'), ('"right"', '"left"')]
)
def test_a_verdict_without_a_record_is_refused(tmp_path, recorded, old, new):
    with pytest.raises(results.NotRecordedError):
        load(tmp_path, CLAIM.replace(old, new))


# --- the pages -----------------------------------------------------------------


def test_the_report_shows_every_claim_with_its_numbers(book):
    text = pages.report(book)
    for claim in book.claims.values():
        name = claim.name.replace("-", NON_BREAKING)
        assert f"### {name}: {claim.verdict}" in text
        assert claim.says in text
        for number in (*claim.measured, *claim.published):
            assert str(number) in text


def test_the_report_links_to_files_that_are_there(book):
    records = re.findall(r"/blob/main/([^)]+)", pages.report(book))
    assert records
    assert all((ROOT / path).exists() for path in records)


def test_the_figure_says_in_words_what_it_shows(book, tmp_path):
    shown = landing.write(book, tmp_path)
    for panel in book.panels:
        assert panel.title in shown
        for name in (*panel.theirs, *panel.ours):
            assert str({**book.measured, **book.published}[name]) in shown
    drawn = {path.name for path in tmp_path.iterdir()}
    assert drawn == {"landing-light.svg", "landing-dark.svg"}


def test_the_figure_draws_every_number(book):
    figure = landing.draw(book, "black")
    for ax, panel in zip(figure.axes, book.panels, strict=True):
        rows = len(panel.theirs) + len(panel.ours) + bool(panel.silent)
        assert len(ax.get_yticks()) == rows
        low, high = ax.get_xlim()
        for name in panel.ours:
            interval = book.measured[name].interval
            assert low < interval.low
            assert interval.high < high
