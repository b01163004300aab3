"""Which tasks are learnt from, and which tell how well it went.

How the paper divides its tasks is not known. Here, families that are held back are out
of distribution, all of them. The other families' tasks are divided by a hash of what is
asked and what can be chosen, so that the same choice in another scene is never on both
sides.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Literal, NamedTuple

from ftlib.clipr.tasks import Task
from ftlib.splits import split_of


class Division(NamedTuple):
    """Tasks by what they are for.

    Attributes:
        train: to ask about, to decide and to be corrected on.
        validation: to choose settings with.
        test: new tasks of families that ``train`` has too: in distribution.
        strange: tasks of families that are nowhere else: out of distribution.
    """

    train: list[Task]
    validation: list[Task]
    test: list[Task]
    strange: list[Task]


def choice(task: Task) -> tuple[str, frozenset[str]]:
    """Return what a task asks and offers, whatever else is in the scene."""
    return task.goal, frozenset(option.name for option in task.options)


def part_of(task: Task) -> Literal["train", "validation", "test"]:
    """Assign a task to a part for good, by a hash of its :func:`choice`.

    Three quarters of all choices are for training: ftlib's pretrain and train splits.
    """
    goal, names = choice(task)
    split = split_of("\n".join([goal, *sorted(names)]))
    return "train" if split == "pretrain" else split


def divide(tasks: Iterable[Task], strange: Collection[str]) -> Division:
    """Divide tasks.

    Args:
        tasks: in any order, which is kept.
        strange: the families out of distribution.
    """
    division = Division([], [], [], [])
    for task in tasks:
        part = "strange" if task.family in strange else part_of(task)
        getattr(division, part).append(task)
    return division
