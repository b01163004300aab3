"""The pages and numbers that are made from records when the book is built."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import yaml

import claims
import landing
from claims import Book, Claim, Measured, Quantity
from ftlib.results import markdown_table
from generated import project
from status import status_page

REPORT = """\
# What held up

{counts}. Each is listed below with the paper's number and its source, ours with a
95 % interval, and the reason for the verdict.

*Reproduced* means that the claim held in our setting, which is small: models that two
CPU cores can train, on problems whose answer is known, mostly with five seeds. It does
not mean that the paper's number came out; where one could be compared, it stands beside
ours. *Not testable here* means that the model, the data or the outputs were out of
reach; the measurement beside it is the nearest we have.

Intervals are over seeds, which means over whole trainings, or over simulated people. A
chapter that pairs single questions shows narrower ones.

{summary}

{sections}
"""

SAMPLES = {"seed": "seeds", "person": "people"}
PAPERS = {
    "caref": "CAREF",
    "cft": "CFT",
    "cgm": "CGM",
    "clipr": "CLIPR",
    "ctsft": "CT-SFT",
}


def verdict_counts(book: Book) -> str:
    """Say how many claims have which verdict."""
    found = Counter(claim.verdict for claim in book.claims.values())
    parts = [f"{found[verdict]} {verdict}" for verdict in claims.VERDICTS]
    return f"Of {len(book.claims)} claims: {', '.join(parts)}"


def report(book: Book) -> str:
    """Return the reproduction report in MyST Markdown."""
    rows = [["claim", "what it says", "verdict"]]
    sections = []
    for method, title in PAPERS.items():
        of_method = [c for c in book.claims.values() if c.name.startswith(f"{method}-")]
        rows += [
            [f"[{_whole(c.name)}](#{_anchor(c)})", c.says, c.verdict] for c in of_method
        ]
        sections.append(f"## {title}")
        sections += [_section(claim) for claim in of_method]
    return REPORT.format(
        counts=verdict_counts(book),
        summary=markdown_table(rows),
        sections="\n\n".join(sections),
    )


def _anchor(claim: Claim) -> str:
    return f"claim-{claim.name}"


def _whole(name: str) -> str:
    """Keep a name from being broken at its hyphen."""
    return name.replace("-", "\N{NON-BREAKING HYPHEN}")


def _section(claim: Claim) -> str:
    rows = [["", "what", "value", "from"]]
    rows += [["paper", p.says, str(p), p.source] for p in claim.published]
    rows += [["here", m.says, str(m), _record(m)] for m in claim.measured]
    chapter = f"../notebooks/{claim.chapter}.ipynb"
    return (
        f"({_anchor(claim)})=\n### {_whole(claim.name)}: {claim.verdict}\n\n"
        f"> {claim.says}.\n\n{claim.why}\n\n{markdown_table(rows)}\n\n"
        f"[The verdict in the chapter]({chapter}#the-verdicts)"
    )


def _record(measured: Measured) -> str:
    """Link to the file of records, and name the arms in it."""
    one = measured.quantity
    link = (
        f"{project()['urls']['Repository']}/blob/main/book/results/"
        f"{one.method}/{one.scale}.json"
    )
    arms = f"{one.experiment}, {one.arm}{_against(one, measured.other)}"
    sample = f"{measured.interval.n} {SAMPLES[one.per]}"
    return f"[records]({link}) of {arms}; {sample}"


def _against(one: Quantity, other: Quantity | None) -> str:
    if other is None or other.arm == one.arm:
        return ""
    return f" and {other.arm}"


def substitutions(book: Book, static: Path) -> dict[str, str]:
    """Return what ``{{ name }}`` stands for on the book's pages."""
    return {
        **book.numbers(),
        "landing_figure": landing.write(book, static),
        "verdict_counts": verdict_counts(book),
    }


def write(root: Path, source: Path) -> None:
    """Add the generated pages, the figure and the numbers to a staged book.

    Args:
        root: the repository, with the claims and records.
        source: the staged copy, with ``_config.yml`` and ``book/``.
    """
    book = claims.load(root / "book" / "claims.toml")
    pages = source / "book"
    (pages / "reproduction.md").write_text(report(book), "utf-8")
    status = status_page(root / "book" / "results", root / "notebooks")
    (pages / "status.md").write_text(status, "utf-8")
    path = source / "_config.yml"
    config: dict[str, Any] = yaml.safe_load(path.read_text("utf-8"))
    config["parse"]["myst_substitutions"] = substitutions(book, pages / "_static")
    path.write_text(yaml.safe_dump(config, allow_unicode=True), "utf-8")
