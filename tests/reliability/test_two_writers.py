"""Two processes write one file of records, and one of them is killed."""

import _records
import pytest
from _processes import Operations, begin, finish

from ftlib.results import read

SEEDS = 8


def killed_while_it_appends(directory, arm, operation):
    """Operations take turns: lock, file, its copy, the renaming of the copy."""
    Operations(directory, operation)
    _records.append_one_by_one(directory, arm, SEEDS)


def appended(directory, arm):
    return [r.seed for r in read(directory / "toy" / "cpu.json") if r.arm == arm]


def assert_nothing_is_lost(directory):
    kept = appended(directory, "killed")
    assert appended(directory, "other") == list(range(SEEDS))
    assert kept == list(range(len(kept)))
    assert len(kept) < SEEDS
    finish(begin(_records.append_one_by_one, directory, "killed", SEEDS))
    assert appended(directory, "killed") == list(range(SEEDS))
    assert not list(directory.rglob("*.tmp"))


@pytest.mark.parametrize("operation", range(9, 25, 3))
def test_one_killed_while_it_holds_the_lock_stops_no_other(operation, tmp_path):
    killed = begin(killed_while_it_appends, tmp_path, "killed", operation)
    other = begin(_records.append_one_by_one, tmp_path, "other", SEEDS)
    finish(killed, -9)
    finish(other)
    assert_nothing_is_lost(tmp_path)


def test_two_at_once_lose_nothing(tmp_path):
    both = [
        begin(_records.append_one_by_one, tmp_path, arm, SEEDS)
        for arm in ("one", "other")
    ]
    for process in both:
        finish(process)
    assert appended(tmp_path, "one") == appended(tmp_path, "other") == [*range(SEEDS)]
