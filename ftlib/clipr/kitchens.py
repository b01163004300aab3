"""Kitchens: a set of our own in which preferences carry over to new kinds of things.

CLIPR's paper reports on KitchenAmbig, of which no text, task or number of tasks could
be found. This set is ours and shares with it a kitchen, and the words *in* and *out of
distribution*. Nobody's texts are in it.

A task asks for something of a family, such as mugs or bread, and several things would
do. They differ in attributes: what a mug is made of, whether bread is of whole grain.
Out of distribution are families that never occur in training. By construction they have
the same dimensions with the same values, each found in two known families or more. Only
``kind``, the thing's own name, is new there: who has learnt to prefer rye bread knows
nothing of rice; who has learnt to prefer whole grain does.

>>> parts = draw(seed=0, train=200, validation=50, test=100, strange=100)
>>> task = parts.strange[0]
>>> print(task.goal, [option.name for option in task.options])
Bring me a plate. ['small patterned steel plate', 'small plain ceramic plate',
 'large patterned glass plate', 'small patterned plastic plate']
>>> print(preferences(seed=0))
Prefer material plastic over anything else, except for bowls. (weight 2)
For bowls, prefer material steel over anything else. (weight 2)
Prefer size large over anything else.
...
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple, TypeVar

import numpy as np

from ftlib.clipr.division import Division, choice, part_of
from ftlib.clipr.rules import Rule, RuleSet
from ftlib.clipr.tasks import Option, Task
from ftlib.streams import generator

T = TypeVar("T")

_MATERIAL = {"material": {m: m for m in ("steel", "glass", "ceramic", "plastic")}}
_SIZE = {"size": {size: size for size in ("small", "large")}}
_FINISH = {"finish": {"plain": "plain", "patterned": "patterned"}}
_WARE = {**_SIZE, **_FINISH, **_MATERIAL}
_FARMING = {"farming": {"organic": "organic", "conventional": ""}}
_SWEETNESS = {"sweetness": {"sweetened": "sweetened", "unsweetened": "unsweetened"}}

Attributes = Mapping[str, str]


class Family(NamedTuple):
    """A kind of task.

    Attributes:
        name: as rules have it: "mugs".
        goals: ways to ask for one.
        kinds: what there is, with attributes that come with it.
        varied: dimensions that vary freely: the word for each value, which may be none.
    """

    name: str
    goals: tuple[str, ...]
    kinds: Mapping[str, Attributes]
    varied: Mapping[str, Mapping[str, str]]

    def options(self) -> list[Option]:
        """Return every thing of the family, each with a name of its own."""
        dimensions = list(self.varied)
        found = []
        for kind, own in self.kinds.items():
            for values in itertools.product(*self.varied.values()):
                varied = dict(zip(dimensions, values, strict=True))
                words = [self.varied[d][value] for d, value in varied.items()]
                name = " ".join(filter(None, [*words, kind]))
                found.append(Option(name, {**varied, **own, "kind": kind}))
        return found


def _ware(name: str, noun: str, *goals: str) -> Family:
    return Family(name, goals, {noun: {}}, _WARE)


KNOWN = (
    _ware("mugs", "mug", "Bring me a mug.", "Pour the coffee into a mug."),
    _ware("bowls", "bowl", "Bring me a bowl.", "Serve the soup in a bowl."),
    _ware("boxes", "box", "Bring me a box.", "Put the leftovers into a box."),
    _ware("spoons", "spoon", "Bring me a spoon.", "Stir the sauce with a spoon."),
    Family(
        "bread",
        ("Bring me some bread.", "Make toast for breakfast."),
        {
            "white bread": {"grain": "refined"},
            "milk loaf": {"grain": "refined"},
            "potato bread": {"grain": "refined"},
            "rye bread": {"grain": "whole"},
            "oat bread": {"grain": "whole"},
            "barley bread": {"grain": "whole"},
        },
        _FARMING,
    ),
    Family(
        "cereal",
        ("Bring me some cereal.", "Fill a bowl with cereal."),
        {
            "corn flakes": {"grain": "refined"},
            "puffed rice": {"grain": "refined"},
            "muesli": {"grain": "whole"},
            "bran flakes": {"grain": "whole"},
        },
        {**_FARMING, **_SWEETNESS},
    ),
    Family(
        "milk",
        ("Bring me some milk.", "Put milk into the tea."),
        {
            "cow milk": {"origin": "dairy"},
            "goat milk": {"origin": "dairy"},
            "oat milk": {"origin": "plant"},
            "soy milk": {"origin": "plant"},
        },
        {**_FARMING, **_SWEETNESS},
    ),
    Family(
        "tea",
        ("Bring me some tea.", "Brew a pot of tea."),
        {
            "black tea": {"strength": "strong"},
            "ginger tea": {"strength": "strong"},
            "smoked tea": {"strength": "strong"},
            "white tea": {"strength": "mild"},
            "camomile tea": {"strength": "mild"},
            "rose tea": {"strength": "mild"},
        },
        _FARMING,
    ),
    Family(
        "chocolate",
        ("Bring me some chocolate.", "Melt chocolate to pour over the cake."),
        {
            "milk chocolate": {"origin": "dairy", "strength": "mild"},
            "hazelnut chocolate": {"origin": "dairy", "strength": "mild"},
            "mocha chocolate": {"origin": "dairy", "strength": "strong"},
            "rice chocolate": {"origin": "plant", "strength": "mild"},
            "dark chocolate": {"origin": "plant", "strength": "strong"},
            "chilli chocolate": {"origin": "plant", "strength": "strong"},
        },
        _FARMING,
    ),
)

STRANGE = (
    _ware("plates", "plate", "Bring me a plate.", "Serve the cake on a plate."),
    _ware("jugs", "jug", "Bring me a jug.", "Fill a jug with water."),
    Family(
        "rice",
        ("Bring me some rice.", "Boil rice as a side dish."),
        {
            "jasmine rice": {"grain": "refined"},
            "risotto rice": {"grain": "refined"},
            "sushi rice": {"grain": "refined"},
            "brown rice": {"grain": "whole"},
            "red rice": {"grain": "whole"},
            "black rice": {"grain": "whole"},
        },
        _FARMING,
    ),
    Family(
        "yoghurt",
        ("Bring me some yoghurt.", "Put yoghurt on the fruit salad."),
        {
            "Greek yoghurt": {"origin": "dairy"},
            "sheep yoghurt": {"origin": "dairy"},
            "coconut yoghurt": {"origin": "plant"},
            "almond yoghurt": {"origin": "plant"},
        },
        {**_FARMING, **_SWEETNESS},
    ),
    Family(
        "cheese",
        ("Bring me some cheese.", "Grate cheese over the noodles."),
        {
            "cream cheese": {"origin": "dairy", "strength": "mild"},
            "goat cheese": {"origin": "dairy", "strength": "strong"},
            "blue cheese": {"origin": "dairy", "strength": "strong"},
            "cashew cheese": {"origin": "plant", "strength": "mild"},
            "almond cheese": {"origin": "plant", "strength": "mild"},
            "smoked tofu cheese": {"origin": "plant", "strength": "strong"},
        },
        _FARMING,
    ),
)

_MOST_OPTIONS = 4
_OTHERS = 2  # things of other families that lie about
_PATIENCE = 1000  # draws in a row that bring nothing wanted before it is given up


# --- tasks --------------------------------------------------------------------


def draw(
    seed: int, *, train: int, validation: int, test: int, strange: int
) -> Division:
    """Draw tasks for each part, no two of which ask and offer the same.

    In each part a family has as many tasks as any other, or one more. Which tasks of
    the known families are for training, a hash decides for good: whatever the seeds, no
    training task of one draw is a test task of another. ``strange`` tasks do come again
    under another seed.

    Args:
        seed: of the draw.
        train: tasks of the known families, to learn from.
        validation: others of theirs, to choose settings with.
        test: others of theirs.
        strange: tasks of the families out of distribution.

    Returns:
        The parts, each in an order of its own by chance.

    Raises:
        ValueError: there are not that many different tasks.
    """
    rng = generator(seed, "kitchens")
    known = {"train": train, "validation": validation, "test": test}
    parts = _drawn(KNOWN, known, rng) | _drawn(STRANGE, {"strange": strange}, rng)
    division = Division(**{name: _shuffled(part, rng) for name, part in parts.items()})
    numbers = itertools.count(1)
    return Division(
        *(
            [replace(task, id=f"kitchens-{seed}-{next(numbers)}") for task in part]
            for part in division
        )
    )


def _drawn(
    families: Sequence[Family], wanted: Mapping[str, int], rng: np.random.Generator
) -> dict[str, list[Task]]:
    """Fill each part with its share of every family's tasks."""
    parts: dict[str, list[Task]] = {name: [] for name in wanted}
    for place, family in enumerate(families):
        others = [other for other in families if other is not family]
        room = {name: _share(n, place, len(families)) for name, n in wanted.items()}
        for task in _distinct(family, others, rng):
            if not any(room.values()):
                break
            part = "strange" if "strange" in room else part_of(task)
            if room[part]:
                room[part] -= 1
                parts[part].append(task)
        if any(room.values()):
            raise ValueError(f"there are too few tasks about {family.name}: draw fewer")
    return parts


def _share(n: int, place: int, of: int) -> int:
    """The n of all that fall to one place when they are dealt in turn."""
    return len(range(place, n, of))


def _distinct(
    family: Family, others: Sequence[Family], rng: np.random.Generator
) -> Iterator[Task]:
    """Draw tasks of a family until nothing new has come for long."""
    seen: set[tuple] = set()
    misses = 0
    options = family.options()
    lying_about = [option for other in others for option in other.options()]
    while misses < _PATIENCE:
        task = _task(family, options, lying_about, rng)
        if choice(task) in seen:
            misses += 1
            continue
        misses = 0
        seen.add(choice(task))
        yield task


def _task(
    family: Family,
    options: Sequence[Option],
    lying_about: Sequence[Option],
    rng: np.random.Generator,
) -> Task:
    offered = _sample(options, int(rng.integers(2, _MOST_OPTIONS + 1)), rng)
    names = [option.name for option in [*offered, *_sample(lying_about, _OTHERS, rng)]]
    return Task(
        id="",
        scene=f"In the kitchen: {', '.join(_shuffled(names, rng))}.",
        goal=family.goals[rng.integers(len(family.goals))],
        family=family.name,
        options=tuple(offered),
    )


def _sample(items: Sequence[T], n: int, rng: np.random.Generator) -> list[T]:
    return [items[at] for at in rng.choice(len(items), n, replace=False)]


def _shuffled(items: Sequence[T], rng: np.random.Generator) -> list[T]:
    return _sample(items, len(items), rng)


# --- users --------------------------------------------------------------------

_WARES = ("material", "size", "finish")
_FOODS = ("grain", "origin", "strength", "sweetness", "farming")


def preferences(seed: int, exceptions: bool = True) -> RuleSet:
    """Draw the hidden rules of a person who cares about every family.

    Of wares, a material comes first, a size or a finish second. Of foods, a favourite
    in each dimension, in an order of importance by chance. What is more important
    outweighs everything less important together.

    An exception is a known family in which another material is preferred, or the other
    farming. These two dimensions are found in four known families or more, so that
    which is the rule and which the exception can be told. Strange families have none:
    there the rule itself is right, and who has learnt only families is at a loss.

    Args:
        seed: of the person.
        exceptions: whether there are these two, or none.
    """
    rng = generator(seed, "preferences in kitchens")
    second = _WARES[1 + rng.integers(2)]
    wares, foods = ["material", second], _shuffled(_FOODS, rng)
    excepted = ("material", "farming") if exceptions else ()
    rules: list[Rule] = []
    for dimensions in (wares, foods):
        for rank, dimension in enumerate(dimensions, start=1):
            weight = 2.0 ** (len(dimensions) - rank)
            rules += _favourite(dimension, weight, dimension in excepted, rng)
    return RuleSet(tuple(rules))


def _favourite(
    dimension: str, weight: float, excepted: bool, rng: np.random.Generator
) -> list[Rule]:
    """A rule for a value drawn, and one for another value in an excepted family."""
    values, families = _known(dimension)
    best, other = _shuffled(values, rng)[:2]
    if not excepted:
        return [Rule(dimension, best, weight=weight)]
    there = (_shuffled(families, rng)[0],)
    return [
        Rule(dimension, best, except_families=there, weight=weight),
        Rule(dimension, other, families=there, weight=weight),
    ]


@functools.cache
def _known(dimension: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The values of a dimension, and the known families that have it."""
    found = [
        (option.attributes[dimension], family.name)
        for family in KNOWN
        for option in family.options()
        if dimension in option.attributes
    ]
    values, families = zip(*found, strict=True)
    return tuple(dict.fromkeys(values)), tuple(dict.fromkeys(families))
