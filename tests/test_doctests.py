"""The examples in ftlib's docstrings do what they show."""

import doctest
import importlib
from types import ModuleType

import pytest

from ftlib import data
from paths import ROOT

FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS

# Their examples are given a model or a tokenizer, by tests of their own.
ELSEWHERE = {"ftlib.cft.data", "ftlib.ctsft.tasks"}
READS = {
    "ftlib.clipr.manipulation": ("mobile-manipulation",),
    "ftlib.clipr.tidybot": ("tidybot", "tidybot-replies"),
}


def with_examples():
    for path in sorted((ROOT / "ftlib").rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        if ">>> " in path.read_text("utf-8") and name not in ELSEWHERE:
            yield name


def failures(module):
    found = doctest.testmod(module, optionflags=FLAGS)
    assert found.attempted
    return found.failed


@pytest.mark.parametrize("name", list(with_examples()))
def test_examples_do_what_they_show(name):
    here = {row.name: row.where for row in data.catalogue()}
    for needed in READS.get(name, ()):
        if here[needed] == "not here":
            pytest.skip(f"{needed} is not here")
    assert not failures(importlib.import_module(name))


def test_an_example_that_shows_something_else_is_found():
    module = ModuleType("broken", ">>> 1 + 1\n3\n>>> 1 + 2\n3\n")
    assert failures(module) == 1
