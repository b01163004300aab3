"""The chapters about a method have the same rooms in the same order."""

import re

import pytest

import pages
from notebooks import read
from paths import NOTEBOOKS

ROOMS = (
    "What you will be able to do",
    "The idea in one picture",
    "What the paper claims",
    "The equations",
    "Build it in forty lines",
    "Use ftlib's",
    "Train it against fair baselines",
    "Evaluate it",
    "Turn one knob",
    "Paper beside ours",
    "The verdicts",
    "What did not reproduce, and why",
    "Exercises",
    "Run it at scale gpu",
    "References",
)


def missing_rooms(headings):
    """The rooms that a chapter lacks or has in another place."""
    rest = iter(headings)
    return [room for room in ROOMS if not any(h.startswith(room) for h in rest)]


def headings(name):
    text = "\n".join(
        c.source for c in read(NOTEBOOKS / f"{name}.ipynb").cells if c.cell_type == "markdown"
    ).replace("`", "")
    return re.findall(r"^###? (.+)$", text, re.M)


@pytest.mark.parametrize("name", sorted(pages.PAPERS))
def test_a_chapter_has_its_rooms_in_order(name):
    assert missing_rooms(headings(name)) == []


def test_a_room_that_is_missing_is_noticed():
    assert missing_rooms([r for r in ROOMS if r != "Exercises"])[0] == "Exercises"
