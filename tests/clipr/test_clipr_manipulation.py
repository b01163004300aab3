"""Mobile Manipulation: what is left out, attributes against upstream's own words."""

import pytest

from ftlib import data
from ftlib.clipr import manipulation
from ftlib.clipr.division import choice, divide, part_of
from ftlib.clipr.manipulation import OBJECTS
from ftlib.clipr.rules import RuleSet, Vocabulary
from ftlib.clipr.users import SimulatedUser


@pytest.fixture(scope="module", autouse=True)
def here():
    holdings = {row.name: row.where for row in data.catalogue()}
    if holdings["mobile-manipulation"] == "not here":
        pytest.skip("Mobile Manipulation is not here")


@pytest.fixture(scope="module")
def objects():
    return manipulation.object_tasks()


@pytest.fixture(scope="module")
def places():
    return manipulation.place_tasks()


def both_files():
    return data.mobile_manipulation("tasks") + data.mobile_manipulation("knowledge")


# --- what is left out ---------------------------------------------------------


def test_thirteen_tuples_are_in_both_files():
    assert manipulation.overlap() == (14, 13)
    rows = manipulation.rows()
    assert len(rows) == 800 - 14
    known = {str(row) for row in data.mobile_manipulation("knowledge")}
    assert sum(str(row) in known for row in rows) == 200


def test_every_ambiguous_request_is_a_task_once(objects, places):
    """Counted anew from the rows of both files: the overlap repeats what stays."""
    for tasks, field in ((objects, "objects"), (places, "locations")):
        expected = {
            (row["scene"], row["request"], frozenset(row[field]))
            for row in both_files()
            if len(row[field]) > 1
        }
        found = {
            (
                task.scene.removeprefix("There is ").removesuffix("."),
                task.goal,
                frozenset(o.name.removeprefix("beside the ") for o in task.options),
            )
            for task in tasks
        }
        assert found == expected
        assert len(found) == len(tasks) == len({task.id for task in tasks})
    assert (len(objects), len({choice(task) for task in objects})) == (350, 147)
    assert (len(places), len({choice(task) for task in places})) == (160, 86)


def test_the_order_of_options_does_not_tell_the_intent(objects):
    """Upstream's order would: the intended object stands first in nine of ten."""
    intent = {
        (f"There is {row['scene']}.", row["request"]): row["intended_objects"][0]
        for row in both_files()
        if len(row["intended_objects"]) == 1 < len(row["objects"])
    }
    told = [task for task in objects if (task.scene, task.goal) in intent]
    first = sum(t.options[0].name == intent[t.scene, t.goal] for t in told)
    assert 0.25 < first / len(told) < 0.6
    upstream = [row for row in both_files() if len(row["objects"]) > 1]
    first = sum(row["objects"][0] == row["intended_objects"][0] for row in upstream)
    assert first / len(upstream) > 0.9


# --- attributes ---------------------------------------------------------------


def test_all_objects_have_a_kind_and_are_told_apart():
    present = {name for row in both_files() for name in row["present"]}
    assert set(OBJECTS) == present
    assert len(present) == 20
    assert all("kind" in attributes for attributes in OBJECTS.values())


@pytest.mark.parametrize(
    ("words", "dimension", "value"),
    [
        ("caffeine", "caffeine", "caffeinated"),
        ("caffeinated", "caffeine", "caffeinated"),
        ("sweet drink", "sweetness", "sweet"),
        ("crunchy", "texture", "crunchy"),
        ("bottle", "packaging", "bottle"),
        (" can, please", "packaging", "can"),
        ("bubbles", "fizz", "fizzy"),
        ("fizzy", "fizz", "fizzy"),
        ("carbonated", "fizz", "still"),
        ("fruit", "kind", "fruit"),
        ("soda", "kind", "soda"),
        ("cola.", "flavour", "cola"),
        ("chip bag", "packaging", "bag"),
        ("sponge", "kind", "sponge"),
        ("bowl", "kind", "bowl"),
    ],
)
def test_attributes_agree_with_what_upstream_says_a_request_can_mean(
    words, dimension, value
):
    """Of several objects that a request can mean, all have what it names."""
    meant = {
        name
        for row in both_files()
        if words in row["request"]
        and len(row["objects"]) > 1
        and " not a cola" not in row["request"]
        for name in row["objects"]
    }
    assert len(meant) > 1
    assert {OBJECTS[name].get(dimension) for name in meant} == {value}


def test_options_differ_in_some_attribute(objects, places):
    for task in objects + places:
        attributes = [tuple(sorted(o.attributes.items())) for o in task.options]
        assert len(set(attributes)) == len(attributes), task


# --- families -----------------------------------------------------------------


@pytest.mark.parametrize("which", ["objects", "places"])
def test_strange_families_are_nowhere_else_and_share_attributes(which, request):
    tasks = request.getfixturevalue(which)
    strange = getattr(manipulation, f"STRANGE_{which[:-1].upper()}_FAMILIES")
    parts = divide(tasks, strange)
    assert sum(map(len, parts)) == len(tasks)
    assert {task.family for task in parts.strange} == set(strange)
    known = {t.family for part in parts[:3] for t in part}
    assert not known & set(strange)
    assert not {choice(t) for t in parts.train} & {choice(t) for t in parts.test}
    there, here = Vocabulary.of(parts.strange).values, Vocabulary.of(parts.train).values
    assert set(there) <= set(here)
    for dimension, values in there.items():
        if dimension not in ("kind", "flavour"):
            assert set(values) <= set(here[dimension]), dimension


def test_families_are_what_is_done_to_what(objects, places):
    family = {(task.goal, task.options[0].name): task.family for task in objects}
    assert family["Bring me that chips.", "rice chips"] == "bringing chips"
    assert family["Put the soda in the drawer.", "Pepsi"] == "storing sodas"
    assert family["Place the bowl in the microwave, please.", "metal bowl"] == (
        "heating bowls"
    )
    assert {task.family.split()[0] for task in places} == {"storing", "moving"}
    beside = next(task for task in places if "near the can" in task.goal)
    assert all(o.attributes["packaging"] == "can" for o in beside.options)


def test_a_part_is_for_good(objects):
    """Of the same choice in another scene too, whatever the order of options."""
    parts = {}
    for task in objects:
        assert parts.setdefault(choice(task), part_of(task)) == part_of(task)
    assert set(parts.values()) == {"train", "validation", "test"}


# --- users --------------------------------------------------------------------


def test_a_declared_user_chooses_by_hidden_rules(objects):
    rules = RuleSet.from_text(
        "Prefer caffeine caffeine-free over caffeinated.\n"
        "For bringing chips, prefer flavour spicy over anything else."
    )
    user = SimulatedUser(rules)
    for task in objects:
        values = [o.attributes.get("caffeine") for o in task.options]
        if set(values) == {"caffeinated", "caffeine-free"}:
            for at, value in enumerate(values):
                assert user.right(task, at) == (value == "caffeine-free")
        names = [o.name for o in task.options]
        if task.family == "bringing chips" and "jalapeno chips" in names:
            assert user.right(task, names.index("jalapeno chips"))
            assert sum(user.right(task, at) for at in range(len(names))) == 1


def test_people_care_about_most_tasks(objects):
    parts = divide(objects, manipulation.STRANGE_OBJECT_FAMILIES)
    people = [manipulation.preferences(seed) for seed in range(10)]
    assert len({rules.to_text() for rules in people}) == 10
    for part in (parts.train, parts.test, parts.strange):
        indifferent = [
            len(rules.best(task)) == len(task.options)
            for rules in people
            for task in part
        ]
        assert sum(indifferent) / len(indifferent) < 0.15
