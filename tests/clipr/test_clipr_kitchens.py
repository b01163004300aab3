"""Kitchens: distinct tasks, families that share attributes, hidden preferences."""

import itertools
from collections import Counter

import pytest

from ftlib.clipr import kitchens
from ftlib.clipr.division import choice, part_of
from ftlib.clipr.rules import RuleSet
from ftlib.clipr.users import SimulatedUser

SIZES = {"train": 180, "validation": 45, "test": 90, "strange": 100}


@pytest.fixture(scope="module")
def parts():
    return kitchens.draw(0, **SIZES)


def values(families):
    """Dimension and value, with the families that have it; from the options alone."""
    found = {}
    for family in families:
        for option in family.options():
            for item in option.attributes.items():
                found.setdefault(item, set()).add(family.name)
    return found


# --- families -----------------------------------------------------------------


def test_strange_families_share_attributes_and_no_family():
    known, strange = values(kitchens.KNOWN), values(kitchens.STRANGE)
    names = [family.name for family in (*kitchens.KNOWN, *kitchens.STRANGE)]
    assert len(set(names)) == len(names)
    for dimension, value in strange:
        if dimension == "kind":
            assert (dimension, value) not in known
        else:
            assert len(known[dimension, value]) >= 2


def test_values_of_excepted_dimensions_are_in_four_known_families():
    for (dimension, _), families in values(kitchens.KNOWN).items():
        if dimension in ("material", "farming"):
            assert len(families) >= 4


@pytest.mark.parametrize("family", [*kitchens.KNOWN, *kitchens.STRANGE])
def test_things_of_a_family_have_names_and_attributes_of_their_own(family):
    options = family.options()
    assert len({option.name for option in options}) == len(options)
    assert len({tuple(sorted(o.attributes.items())) for o in options}) == len(options)
    dimensions = {tuple(sorted(option.attributes)) for option in options}
    assert len(dimensions) == 1
    for option in options:
        assert option.name.endswith(option.attributes["kind"])
        assert (option.attributes.get("farming") == "organic") == (
            "organic" in option.name
        )


# --- tasks --------------------------------------------------------------------


def test_parts_have_the_tasks_asked_for_all_different(parts):
    assert {name: len(part) for name, part in parts._asdict().items()} == SIZES
    tasks = list(itertools.chain(*parts))
    assert len({choice(task) for task in tasks}) == len(tasks)
    assert len({task.id for task in tasks}) == len(tasks)
    for name, part in parts._asdict().items():
        counts = Counter(task.family for task in part)
        families = kitchens.STRANGE if name == "strange" else kitchens.KNOWN
        assert set(counts) == {family.name for family in families}
        assert max(counts.values()) - min(counts.values()) <= 1
        if name != "strange":
            assert {part_of(task) for task in part} == {name}


def test_options_lie_in_the_scene_and_no_other_would_do(parts):
    for part in parts:
        for task in part:
            family = next(
                f for f in (*kitchens.KNOWN, *kitchens.STRANGE) if f.name == task.family
            )
            scene = task.scene.removeprefix("In the kitchen: ").removesuffix(".")
            there = set(scene.split(", "))
            offered = {option.name for option in task.options}
            assert offered == there & {option.name for option in family.options()}
            assert len(there) == len(offered) + 2
            assert 2 <= len(offered) <= 4
            assert task.goal in family.goals
            assert task.differing()


def test_a_draw_is_the_same_again_and_another_with_another_seed(parts):
    assert kitchens.draw(0, **SIZES) == parts
    other = kitchens.draw(1, **SIZES)
    assert {choice(t) for t in other.train} != {choice(t) for t in parts.train}
    for a, b in itertools.permutations(("train", "validation", "test"), 2):
        mine = {choice(task) for task in getattr(parts, a)}
        assert not mine & {choice(task) for task in getattr(other, b)}


def test_parts_may_be_empty_and_not_larger_than_there_are_tasks(monkeypatch):
    few = kitchens.draw(0, train=3, validation=0, test=0, strange=0)
    assert [len(part) for part in few] == [3, 0, 0, 0]
    assert len({task.family for task in few.train}) == 3
    monkeypatch.setattr(kitchens, "_PATIENCE", 3)
    with pytest.raises(ValueError, match="too few tasks about mugs"):
        kitchens.draw(0, train=0, validation=0, test=9 * 1000, strange=0)


# --- users --------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(10))
def test_preferences_are_rules_that_text_can_tell(seed):
    rules = kitchens.preferences(seed)
    assert RuleSet.from_text(rules.to_text()) == rules
    assert kitchens.preferences(seed) == rules
    excepted = {f for rule in rules for f in rule.except_families}
    own = {family for rule in rules for family in rule.families}
    assert excepted == own
    assert len(own) == 2
    assert own <= {family.name for family in kitchens.KNOWN}
    plain = kitchens.preferences(seed, exceptions=False)
    assert not any(rule.families or rule.except_families for rule in plain)


def test_people_differ():
    drawn = [kitchens.preferences(seed) for seed in range(40)]
    materials = Counter(
        next(r.preferred for r in rules if r.dimension == "material") for rules in drawn
    )
    assert set(materials) == {"steel", "glass", "ceramic", "plastic"}
    assert len({rules.to_text() for rules in drawn}) == 40


def test_the_more_important_outweighs_all_that_is_less(parts):
    """Lexicographic order by dimension, worked out without margins."""
    for seed in range(5):
        rules = kitchens.preferences(seed)
        user = SimulatedUser(rules)
        for task in parts.test + parts.strange:
            best = lexicographic(rules, task)
            right = {at for at in range(len(task.options)) if user.right(task, at)}
            assert right == best


def lexicographic(rules, task):
    favourites = {}
    for rule in sorted(rules, key=lambda rule: (-rule.weight, not rule.families)):
        if rule.holds_in(task.family):
            favourites.setdefault(rule.dimension, rule.preferred)
    left = set(range(len(task.options)))
    for dimension, value in favourites.items():
        liked = {
            at for at in left if task.options[at].attributes.get(dimension) == value
        }
        left = liked or left
    return left


def test_people_care_about_nearly_every_task(parts):
    for part in (parts.test, parts.strange):
        indifferent = [
            len(rules.best(task)) == len(task.options)
            for rules in map(kitchens.preferences, range(8))
            for task in part
        ]
        assert sum(indifferent) / len(indifferent) < 0.1


def test_exceptions_change_known_families_alone(parts):
    changed = {"test": 0, "strange": 0}
    for seed in range(8):
        rules = kitchens.preferences(seed)
        general = RuleSet(tuple(rule for rule in rules if not rule.families))
        for name in changed:
            for task in getattr(parts, name):
                changed[name] += rules.best(task) != general.best(task)
    assert changed["strange"] == 0
    assert changed["test"] > 20
