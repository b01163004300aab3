"""Tasks in which several options do what is asked, and a decision between them.

The paper's problem: a request states a goal, several actions satisfy it, and which of
them is right depends on a preference that the user has not stated. Names, types and
attributes are ours.

>>> mugs = (
...     Option("steel mug", {"material": "steel", "kind": "mug"}),
...     Option("glass mug", {"material": "glass", "kind": "mug"}),
... )
>>> task = Task("t1", "Two mugs on a shelf.", "Bring me something to drink from.",
...             "drink", mugs)
>>> task.values("material")
('steel', 'glass')
>>> task.differing()
('material',)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True)
class Option:
    """Something that does what is asked.

    Attributes:
        name: unique in its task.
        attributes: value by dimension, as in ``{"material": "steel"}``.
    """

    name: str
    attributes: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "attributes", MappingProxyType(dict(self.attributes)))

    def __hash__(self) -> int:
        return hash((self.name, frozenset(self.attributes.items())))

    def __reduce__(self) -> tuple[type[Option], tuple[str, dict[str, str]]]:
        return type(self), (self.name, dict(self.attributes))

    def to_json(self) -> dict[str, Any]:
        """Return the option as JSON's types."""
        return {"name": self.name, "attributes": dict(self.attributes)}


@dataclass(frozen=True)
class Task:
    """A goal and the options that satisfy it.

    Attributes:
        id: unique among tasks.
        scene: what is there, in words.
        goal: what is asked, in words.
        family: kind of task: what rules are conditioned on, and what tells tasks in
            distribution from those out of it.
        options: at least two, with distinct names.

    Raises:
        ValueError: fewer than two options, or two of one name.
    """

    id: str
    scene: str
    goal: str
    family: str
    options: tuple[Option, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "options", tuple(self.options))
        names = [option.name for option in self.options]
        if len(names) < 2:
            raise ValueError(
                f"task {self.id!r} has {len(names)} options: it takes two to choose"
            )
        if len(set(names)) < len(names):
            raise ValueError(f"task {self.id!r} has two options of one name: {names}")

    def values(self, dimension: str) -> tuple[str, ...]:
        """Return the distinct values of a dimension, in order of appearance."""
        found = (option.attributes.get(dimension) for option in self.options)
        return tuple(dict.fromkeys(value for value in found if value is not None))

    def differing(self) -> tuple[str, ...]:
        """Return the dimensions of which the options have more than one value."""
        dimensions = dict.fromkeys(
            d for option in self.options for d in option.attributes
        )
        return tuple(d for d in dimensions if len(self.values(d)) > 1)

    def index(self, name: str) -> int:
        """Return where the option of a name is.

        Raises:
            ValueError: there is none.
        """
        names = [option.name for option in self.options]
        if name not in names:
            raise ValueError(f"task {self.id!r} has no option {name!r}: {names}")
        return names.index(name)

    def to_json(self) -> dict[str, Any]:
        """Return the task as JSON's types."""
        options = [option.to_json() for option in self.options]
        return {**vars(self), "options": options}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Task:
        """Read what :meth:`to_json` wrote."""
        options = tuple(Option(**option) for option in data["options"])
        return cls(**{**data, "options": options})


@dataclass(frozen=True)
class Decision:
    """The option that was taken.

    Attributes:
        index: of the option.
        scores: of every option, the higher, the better: votes or log-probabilities.
        fired: places in the rule set of the rules that had something to say.
    """

    index: int
    scores: tuple[float, ...]
    fired: tuple[int, ...] = ()

    @classmethod
    def highest(cls, scores: Sequence[float], fired: tuple[int, ...] = ()) -> Decision:
        """Take the option with the highest score, the first of equal ones."""
        found = tuple(map(float, scores))
        return cls(found.index(max(found)), found, fired)

    @property
    def margin(self) -> float:
        """How far the decided option's score is above the best of the others."""
        others = self.scores[: self.index] + self.scores[self.index + 1 :]
        return self.scores[self.index] - max(others)


@dataclass(frozen=True)
class Correction:
    """What a user says to a decision.

    Attributes:
        task: that was decided.
        decided: index of the option that was taken.
        chosen: index of the option that the user wanted.
        reason: why, in the user's words; empty if none was given.
    """

    task: Task
    decided: int
    chosen: int
    reason: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return the correction as JSON's types."""
        return {**vars(self), "task": self.task.to_json()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Correction:
        """Read what :meth:`to_json` wrote."""
        return cls(**{**data, "task": Task.from_json(data["task"])})
