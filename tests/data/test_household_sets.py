"""The sets of the CLIPR chapter, and the two that a user has to fetch."""

import contextlib
import csv
import os
import pickle
from collections import Counter

import numpy as np
import pytest

from ftlib import data
from ftlib.data import sets
from ftlib.data.arrays import read_pickled_arrays


def skip_unless_here(name):
    where = next(row.where for row in data.catalogue() if row.name == name)
    if where == "not here":
        pytest.skip(f"{name} is not here")


# --- TidyBot ------------------------------------------------------------------


def test_tidybot_has_its_scenarios():
    skip_unless_here("tidybot")
    rows = data.tidybot()
    assert len(rows) == 96
    rooms = Counter(row["room"] for row in rows)
    assert rooms == dict.fromkeys(
        ["living room", "bedroom", "kitchen", "pantry room"], 24
    )
    assert Counter(len(row["receptacles"]) for row in rows) == dict.fromkeys(
        range(2, 6), 24
    )
    tags = Counter(tag for row in rows for tag in row["tags"])
    assert tags["category"] == 86
    assert tags["attribute"] == 27
    for part in ("seen", "unseen"):
        assert sum(len(row[part]) for row in rows) == 672
    for row in rows:
        things = [thing for part in ("seen", "unseen") for thing, _ in row[part]]
        places = [place for part in ("seen", "unseen") for _, place in row[part]]
        assert len(set(things)) == len(things)
        assert set(places) <= set(row["receptacles"])
        texts = [row["note"], row["room"], *things, *places, *row["tags"]]
        assert all(isinstance(text, str) and text for text in texts)


def test_tidybot_replies_are_by_prompt():
    skip_unless_here("tidybot-replies")
    replies = data.tidybot_replies()
    assert len(replies) == 821
    assert all(isinstance(reply, str) for reply in replies.values())


# --- Mobile Manipulation ------------------------------------------------------


def test_mobile_manipulation_has_its_tasks():
    skip_unless_here("mobile-manipulation")
    tasks, knowledge = map(data.mobile_manipulation, ("tasks", "knowledge"))
    assert (len(tasks), len(knowledge)) == (600, 200)
    rows = tasks + knowledge
    categories = Counter(row["category"] for row in rows)
    assert categories["singlelabel_task"] == 240
    assert categories["spatial_ambiguous_task"] == 167
    assert categories["winograd_task"] == 118
    several = [len(row["objects"]) * len(row["locations"]) > 1 for row in rows]
    assert sum(several) / len(rows) == pytest.approx(0.685)
    assert len({name for row in rows for name in row["present"]}) == 20
    for row in rows:
        assert set(row["intended_objects"]) <= set(row["objects"])
        assert set(row["objects"]) <= set(row["present"])
        assert set(row["intended_locations"]) <= set(row["locations"])
    assert rows[1]["request"] == "Bring me that caffeinated drink."
    assert rows[1]["intended_objects"] == ["RedBull"]
    assert rows[1]["objects"] == ["RedBull", "Coke", "Pepsi"]


def test_a_part_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="no split 'safe'"):
        data.mobile_manipulation("safe")


def test_a_block_with_other_fields_is_named(tmp_path, monkeypatch):
    path = tmp_path / "tasks.txt"
    path.write_text("7\nScene: an apple\nTask: Bring me it.\n")
    monkeypatch.setattr(sets, "fetch", lambda name: path)
    with pytest.raises(ValueError, match="task 7 has not the fields Scene, Task"):
        data.mobile_manipulation("tasks")


# --- AmbiK --------------------------------------------------------------------

AMBIK = {
    "": "1",
    "environment_short": "glass bowl, rye bread",
    "unambiguous_direct": "Bring the rye bread.",
    "ambiguity_type": "preferences",
    "ambiguous_task": "Bring some bread. ",
    "question": "Which bread?",
    "answer": "Rye bread, please.",
    "user_intent": "rye bread",
    "variants": "White bread\nRye bread\n",
}


@pytest.fixture
def ambik_file(tmp_path, monkeypatch):
    """A file of AmbiK's form, under the name of one of them."""

    def write(row):
        path = tmp_path / "ambik_calib_100.csv"
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, row)
            writer.writeheader()
            writer.writerow(row)
        files = {"ambik_dataset/ambik_calib_100.csv": path.stat().st_size}
        monkeypatch.setattr(sets, "AMBIK_FILES", files)
        return path

    return write


def test_ambik_is_read_from_the_users_file(ambik_file):
    assert data.ambik(ambik_file(AMBIK)) == [
        {
            "kitchen": ["glass bowl", "rye bread"],
            "request": "Bring some bread.",
            "clear": "Bring the rye bread.",
            "kind": "preferences",
            "question": "Which bread?",
            "answer": "Rye bread, please.",
            "choices": ["White bread", "Rye bread"],
            "intent": "rye bread",
        }
    ]


def test_ambik_without_a_column_says_which(ambik_file):
    row = {name: text for name, text in AMBIK.items() if name != "variants"}
    with pytest.raises(ValueError, match="no column 'variants'"):
        data.ambik(ambik_file(row))


@pytest.mark.parametrize(
    ("load", "name", "commit"),
    [
        (data.ambik, "ambik_test_900.csv", "9d4f60d4224b"),
        (data.housekeep, "data.npy", "ff57c791412e"),
    ],
)
def test_what_the_user_has_to_fetch_is_named(load, name, commit, tmp_path):
    with pytest.raises(data.DataUnavailable, match=commit) as error:
        load(tmp_path / name)
    assert "Fetch https://raw.githubusercontent.com/" in str(error.value)
    assert name in str(error.value)
    (tmp_path / name).write_bytes(b"half")
    with pytest.raises(data.DataCorrupt, match="has 4 bytes"):
        load(tmp_path / name)
    with pytest.raises(ValueError, match="keep upstream's name"):
        load(tmp_path / "other.csv")


# --- Housekeep ----------------------------------------------------------------


@pytest.fixture
def housekeep_file(tmp_path, monkeypatch):
    """A file of Housekeep's form with any object in it."""

    def write(content):
        path = tmp_path / "data.npy"
        np.save(path, content, allow_pickle=True)
        monkeypatch.setattr(sets, "HOUSEKEEP_FILES", {path.name: path.stat().st_size})
        return path

    return write


RANKS = np.arange(-12, 12).reshape(2, 3, 4)


def housekeep(ranks=RANKS):
    return {
        "ranks": ranks,
        "objects": ["apple", "bleach", "book"],
        "room_receptacles": ["kitchen|fridge", "bathroom|lower cabinet"],
    }


@pytest.mark.parametrize("order", ["C", "F"])
def test_housekeep_is_read_without_unpickling(housekeep_file, order, monkeypatch):
    path = housekeep_file(housekeep(np.array(RANKS, order=order)))
    monkeypatch.setattr(pickle, "load", None)
    monkeypatch.setattr(pickle, "loads", None)
    placings = data.housekeep(path)
    np.testing.assert_array_equal(placings.ranks, RANKS)
    assert placings.ranks.dtype == np.int64
    assert placings.places == [("kitchen", "fridge"), ("bathroom", "lower cabinet")]
    assert placings.objects == ["apple", "bleach", "book"]


@pytest.mark.parametrize(
    "content",
    [
        {"ranks": RANKS},
        housekeep(RANKS[:1]),
        housekeep(RANKS[0]),
        housekeep() | {"room_receptacles": ["kitchen", "bathroom"]},
        [1, 2],
    ],
    ids=["no names", "a place less", "two axes", "no receptacle", "a list"],
)
def test_housekeep_with_other_contents_is_refused(housekeep_file, content):
    box = np.empty((), dtype=object)
    box[()] = content
    with pytest.raises(data.DataCorrupt, match=r"data\.npy"):
        data.housekeep(housekeep_file(box))


def test_arrays_are_what_numpy_reads(tmp_path):
    """What numpy wrote is the oracle."""
    content = {
        "big": np.arange(3, dtype=">i4"),
        "text": np.array(["ab", "c"]),
        "flags": np.array([True, False]),
        "empty": np.zeros((0, 2)),
        "number": np.float32(0.5),
        "name": np.str_("kitchen|shelf"),
    }
    np.save(tmp_path / "a.npy", content, allow_pickle=True)
    ours = read_pickled_arrays(tmp_path / "a.npy")
    assert list(ours) == list(content)
    for name, value in content.items():
        np.testing.assert_array_equal(ours[name], value)
        assert np.asarray(ours[name]).shape == np.shape(value)


class Calls:
    """Pickled, this asks for a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    ("function", "argument"),
    [
        (os.system, "touch {}"),
        (eval, "open({!r}, 'w')"),
        (np.fromfile, "{}"),
        (np.load, "{}"),
    ],
    ids=["system", "eval", "fromfile", "load"],
)
def test_a_pickle_that_asks_for_more_than_arrays_is_refused(
    housekeep_file, tmp_path, function, argument
):
    mark = tmp_path / "mark"
    path = housekeep_file(housekeep() | {"x": Calls(function, argument.format(mark))})
    with pytest.raises(ValueError, match="it is refused"):
        data.housekeep(path)
    assert not mark.exists()


def test_arrays_of_records_and_stray_states_are_refused(tmp_path):
    """Only plain numbers and texts are made from the pickle's bytes."""
    path = tmp_path / "a.npy"
    for content in (np.zeros(2, dtype="i4,f4"), np.zeros(2, dtype="M8[s]")):
        np.save(path, {"x": content}, allow_pickle=True)
        with pytest.raises(ValueError, match="cannot be read"):
            read_pickled_arrays(path)
    np.save(path, np.arange(3))
    with pytest.raises(ValueError, match="not one object"):
        read_pickled_arrays(path)


def test_a_broken_pickle_is_a_value_error(tmp_path):
    path = tmp_path / "a.npy"
    np.save(path, housekeep(), allow_pickle=True)
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    unharmed = 0
    for _ in range(200):
        damaged = bytearray(whole)
        for at in rng.integers(0, len(whole), size=3):
            damaged[at] = rng.integers(256)
        path.write_bytes(damaged[: rng.integers(len(whole) // 2, len(whole) + 1)])
        with contextlib.suppress(ValueError):  # any other would fail the test
            read_pickled_arrays(path)
            unharmed += 1
    assert unharmed < 50
    path.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=r"a\.npy cannot be read"):
        read_pickled_arrays(path)
