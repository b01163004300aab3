"""Mobile Manipulation: ambiguous requests to a robot, and what tells objects apart.

KnowNo's tasks in the form of Introspective Planning, most likely those of CLIPR's
paper. Each has a scene of three or four objects and a request that can mean one or more
of them.

What upstream says was meant is someone's guess each time and agrees with no steady
preference, so it is not used here. We keep the scene, the request and what it can mean.
Who is asked is a simulated user with hidden rules over attributes. The attributes are
ours too: there are only 20 objects, and ``OBJECTS`` describes them by hand.

Of the 800 rows,

* those of the 600 whose scene, request and intent also stand among the 200 of
  knowledge are dropped: 14 rows, 13 tuples (:func:`overlap`);
* so are rows that leave one thing to choose, or that ask and offer what an earlier row
  does in the same scene (:func:`object_tasks`, :func:`place_tasks`).

Options come in the order of the scene. Upstream's order would tell: the intended object
nearly always stands first.

Families are what is done to what, such as ``bringing drinks``. Of the objects, what is
brought is in distribution, and what is discarded, stored or heated out of it: objects
and attributes are the same, the families are others.

>>> from ftlib.clipr.division import divide
>>> tasks = object_tasks()
>>> tasks[0].goal, tasks[0].family
('Bring me a flavored drink.', 'bringing drinks')
>>> [option.name for option in tasks[0].options]
['Coke', 'bottled unsweetened tea', 'Sprite']
>>> parts = divide(tasks, STRANGE_OBJECT_FAMILIES)
>>> [len(part) for part in parts]
[193, 21, 24, 112]
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

from ftlib.clipr.division import choice
from ftlib.clipr.rules import RuleSet, Vocabulary
from ftlib.clipr.tasks import Option, Task
from ftlib.clipr.users import UserSettings, draw_rules
from ftlib.data.sets import PickAndPlace
from ftlib.data.sets import mobile_manipulation as load

_COLAS = ("Coke", "Pepsi")
_SODAS = (*_COLAS, "Sprite", "orange soda")
_CANS = (*_SODAS, "RedBull")
_TEA, _WATER = "bottled unsweetened tea", "bottled water"
_BOTTLES = (_TEA, _WATER)
_CHIPS = ("jalapeno chips", "kettle chips", "multigrain chips", "rice chips")
_FRUIT = ("apple", "orange")
_SPONGES = ("clean sponge", "dirty sponge with food residue")
_APPLIANCES = ("microwave", "portable induction cooktop")

# Ours, by hand: dimension, value, and what has it. What is not named has no value.
_ATTRIBUTES: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "kind": {
        "soda": _SODAS,
        "energy drink": ("RedBull",),
        "tea": (_TEA,),
        "water": (_WATER,),
        "chips": _CHIPS,
        "bar": ("energy bar",),
        "fruit": _FRUIT,
        "sponge": _SPONGES,
        "bowl": ("metal bowl", "plastic bowl"),
        "appliance": _APPLIANCES,
    },
    "packaging": {
        "can": _CANS,
        "bottle": _BOTTLES,
        "bag": _CHIPS,
        "wrapper": ("energy bar",),
        "none": _FRUIT,
    },
    "material": {  # of the packaging too
        "metal": (*_CANS, "metal bowl", *_APPLIANCES),
        "plastic": (*_BOTTLES, *_CHIPS, "energy bar", "plastic bowl"),
    },
    "caffeine": {
        "caffeinated": (*_COLAS, "RedBull", _TEA),
        "caffeine-free": ("Sprite", "orange soda", _WATER, "energy bar", *_FRUIT),
    },
    "sweetness": {
        "sweet": (*_CANS, "energy bar", *_FRUIT),
        "unsweetened": _BOTTLES,
        "savoury": _CHIPS,
    },
    "fizz": {"fizzy": _CANS, "still": _BOTTLES},
    "texture": {"crunchy": (*_CHIPS, "apple"), "soft": ("orange", "energy bar")},
    "flavour": {
        "cola": _COLAS,
        "citrus": ("Sprite", "orange soda", "orange"),
        "fruity": ("RedBull", "apple"),
        "spicy": ("jalapeno chips",),
        "grain": ("multigrain chips", "energy bar"),
        "salty": ("kettle chips",),
        "plain": (*_BOTTLES, "rice chips"),
    },
    "maker": {
        "Coca-Cola": ("Coke", "Sprite"),
        "PepsiCo": ("Pepsi",),
        "Red Bull": ("RedBull",),
        "unnamed": ("orange soda", *_BOTTLES, *_CHIPS, "energy bar"),
    },
    "state": {"clean": ("clean sponge",), "dirty": _SPONGES[1:]},
}


def _objects() -> dict[str, Mapping[str, str]]:
    found: dict[str, dict[str, str]] = {}
    for dimension, values in _ATTRIBUTES.items():
        for value, names in values.items():
            for name in names:
                if dimension in found.setdefault(name, {}):
                    raise ValueError(f"{name} has two values of {dimension}")
                found[name][dimension] = value
    return {name: MappingProxyType(own) for name, own in found.items()}


OBJECTS: Mapping[str, Mapping[str, str]] = MappingProxyType(_objects())

_ACTIONS = {
    "pick-up": "bringing",
    "recycling": "discarding",
    "landfill": "discarding",
    "compost": "discarding",
    "top drawer": "storing",
    "bottom drawer": "storing",
    "microwave": "heating",
    "cooktop": "heating",
}
_DRINKS = {"soda", "energy drink", "tea", "water"}
_GROUPS = (  # the first that has all kinds on offer
    ({"soda"}, "sodas"),
    (_DRINKS, "drinks"),
    ({"chips"}, "chips"),
    ({"fruit"}, "fruit"),
    ({"chips", "fruit", "bar"}, "snacks"),
    ({"sponge"}, "sponges"),
    ({"bowl"}, "bowls"),
    (_DRINKS | {"chips", "fruit", "bar"}, "food"),
)

STRANGE_OBJECT_FAMILIES = (
    "discarding chips",
    "discarding drinks",
    "discarding fruit",
    "discarding sodas",
    "heating bowls",
    "storing chips",
    "storing sodas",
)
STRANGE_PLACE_FAMILIES = (
    "moving drinks",
    "moving fruit",
    "storing drinks",
    "storing fruit",
    "storing snacks",
)


# --- rows ---------------------------------------------------------------------


def overlap() -> tuple[int, int]:
    """Count what stands in both files: rows of the 600, and distinct tuples.

    Raises:
        DataUnavailable, DataCorrupt: as :func:`ftlib.data.mobile_manipulation`.
    """
    known = {_tuple(row) for row in load("knowledge")}
    both = [_tuple(row) for row in load("tasks") if _tuple(row) in known]
    return len(both), len(set(both))


def rows() -> list[PickAndPlace]:
    """Return the rows of both files, those of the first without the overlap.

    Raises:
        DataUnavailable, DataCorrupt: as :func:`ftlib.data.mobile_manipulation`.
    """
    knowledge = load("knowledge")
    known = {_tuple(row) for row in knowledge}
    return [row for row in load("tasks") if _tuple(row) not in known] + knowledge


def _tuple(row: PickAndPlace) -> tuple[str, ...]:
    """Scene, request and intent."""
    intent = (*row["intended_objects"], "->", *row["intended_locations"])
    return row["scene"], row["request"], *intent


# --- tasks --------------------------------------------------------------------


def object_tasks() -> list[Task]:
    """Return the requests that can mean several objects: 350, of 147 choices.

    Of a request that leaves a drawer open too, the drawer is left open.

    Raises:
        DataUnavailable, DataCorrupt: as :func:`ftlib.data.mobile_manipulation`.
    """
    found = (
        _task(row, _family(row), _in_scene_order(row["objects"], row))
        for row in rows()
        if len(row["objects"]) > 1
    )
    return _distinct(found)


def place_tasks() -> list[Task]:
    """Return the requests that can mean several places: drawers, or beside something.

    An option such as ``beside the Coke`` has the attributes of what is there. A drawer
    has the one attribute ``drawer``.

    Raises:
        DataUnavailable, DataCorrupt: as :func:`ftlib.data.mobile_manipulation`.
    """
    found = (
        _task(row, _family(row), _places(row))
        for row in rows()
        if len(row["locations"]) > 1
    )
    return _distinct(found)


def _task(row: PickAndPlace, family: str, options: Sequence[Option]) -> Task:
    scene = row["scene"]
    return Task(
        id="",
        scene=f"There is {scene}.",
        goal=row["request"],
        family=family,
        options=tuple(options),
    )


def _distinct(tasks: Iterable[Task]) -> list[Task]:
    """Leave out tasks that ask and offer what an earlier one of the scene does."""
    kept: dict[tuple, Task] = {}
    for task in tasks:
        kept.setdefault((task.scene, *choice(task)), task)
    return [
        replace(task, id=f"manipulation-{number}")
        for number, task in enumerate(kept.values(), start=1)
    ]


def _in_scene_order(names: Sequence[str], row: PickAndPlace) -> list[Option]:
    return [Option(name, OBJECTS[name]) for name in row["present"] if name in names]


def _places(row: PickAndPlace) -> list[Option]:
    """The drawers, the top one first, or places beside objects in scene order."""
    if set(row["locations"]) == {"top drawer", "bottom drawer"}:
        return [
            Option(f"{which} drawer", {"drawer": which}) for which in ("top", "bottom")
        ]
    beside = _in_scene_order(row["locations"], row)
    return [Option(f"beside the {at.name}", at.attributes) for at in beside]


def _family(row: PickAndPlace) -> str:
    """What is done, and to what: ``bringing drinks``."""
    action = _ACTIONS.get(row["locations"][0], "moving")
    kinds = {OBJECTS[name]["kind"] for name in row["objects"]}
    return f"{action} {next(name for group, name in _GROUPS if kinds <= group)}"


# --- users --------------------------------------------------------------------

_CARED_FOR = (
    "flavour",
    "caffeine",
    "sweetness",
    "packaging",
    "maker",
    "state",
    "material",
)


def preferences(seed: int) -> RuleSet:
    """Draw the hidden rules of a person who cares about most requests.

    Seven dimensions matter, in an order of importance by chance; in each, three values
    are ranked before the others. With fewer, there are many requests about which such
    a person is indifferent, for an option may have many attributes in common with the
    next. There are no exceptions: those are in :mod:`ftlib.clipr.kitchens`.

    Args:
        seed: of the person.
    """
    values = {name: tuple(_ATTRIBUTES[name]) for name in _CARED_FOR}
    settings = UserSettings(dimensions=len(values), ranked=3, exceptions=0)
    return draw_rules(Vocabulary((), values), seed, settings)
