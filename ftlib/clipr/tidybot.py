r"""TidyBot: real rules that a real model wrote, and how well they carry over.

Wu et al., *TidyBot*, arXiv 2305.05658. A person shows where some things of a room
go. A model writes the rule behind it, and other things are then placed by the rule.
There are 96 such scenarios, and what text-davinci-003 replied to each prompt is
recorded: rules learnt by a real language model, without asking one. CLIPR names TidyBot
as a baseline: a summary of examples, frozen.

The things to place are in a notation of calls, which is never run::

    # Summary: Put clothes in the basket and toys in the drawer.
    objects = ["sweater", "khakis"]
    receptacles = ["basket", "drawer"]
    pick_and_place("sweater",

The reply goes on from there. It is read line by line up to the first empty one; a line
must be one whole call, or it is skipped and counted. See :func:`read_placements`.

A recorded reply is found by its whole prompt. Before the lines above, a prompt has
worked examples, which are TidyBot's and are taken from the recorded prompts themselves
(:class:`Prompts`); from there on we write it.

>>> from ftlib import data
>>> from ftlib.clipr.models import RecordedReplies
>>> replies = data.tidybot_replies()
>>> prompts, model = Prompts.recorded(replies), RecordedReplies(replies)
>>> rooms = scenarios()
>>> trial = run(rooms[0], "llm-rule", prompts, model)
>>> print(trial)
Scenario 1, living room: storage box, coffee table
...
>>> accuracy(run(room, "llm-rule", prompts, model) for room in rooms)
Fraction(10507, 11520)
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, NamedTuple, get_args

from ftlib.clipr.models import TextModel
from ftlib.clipr.tasks import Option, Task
from ftlib.data.sets import tidybot as load_tidybot

Placement = tuple[str, str]
Condition = Literal["zero-shot", "examples", "llm-rule", "human-rule"]
Part = Literal["seen", "unseen"]
CONDITIONS: tuple[Condition, ...] = get_args(Condition)

_CALL = re.compile(r'pick_and_place\("([^"]*)", *"([^"]*)"\)')
_RULE = "# Summary:"
_BETWEEN = "    \n"  # the seen and the unseen: upstream's line of four spaces
_MAX_TOKENS = 512  # of a reply that is written now, not replayed


@dataclass(frozen=True)
class Scenario:
    """A room, a person, and where that person puts things.

    Attributes:
        number: from 1, in upstream's order.
        room: ``living room``, ``bedroom``, ``kitchen`` or ``pantry room``.
        receptacles: the places.
        seen: things with their places, to learn from.
        unseen: things with theirs, to be tested with.
        note: the person's own rule.
        tags: what the rule goes by.
    """

    number: int
    room: str
    receptacles: tuple[str, ...]
    seen: tuple[Placement, ...]
    unseen: tuple[Placement, ...]
    note: str
    tags: tuple[str, ...]

    def placements(self, part: Part) -> tuple[Placement, ...]:
        """Return the placements of one half."""
        return self.seen if part == "seen" else self.unseen


def scenarios() -> list[Scenario]:
    """Return the 96 scenarios.

    Raises:
        DataUnavailable, DataCorrupt: as :func:`ftlib.data.tidybot`.
    """
    return [
        Scenario(
            number=number,
            room=row["room"],
            receptacles=tuple(row["receptacles"]),
            seen=tuple(row["seen"]),
            unseen=tuple(row["unseen"]),
            note=row["note"],
            tags=tuple(row["tags"]),
        )
        for number, row in enumerate(load_tidybot(), start=1)
    ]


# --- prompts ------------------------------------------------------------------


@dataclass(frozen=True)
class Prompts:
    """TidyBot's prompts: worked examples, and a scenario after them.

    Attributes:
        writing: the worked examples of writing a rule.
        placing: the worked example of placing by a rule.
        guessing: the worked example of placing without one; its first line says to.
    """

    writing: str
    placing: str
    guessing: str

    @classmethod
    def recorded(cls, prompts: Iterable[str]) -> Prompts:
        """Take the worked examples from recorded prompts, in the recorded order.

        They are what stands before the last block of the first prompt of each kind.

        Raises:
            ValueError: there is no prompt of a kind.
        """
        prompts = list(prompts)
        return cls(
            writing=_before_last(prompts, "objects = [", _RULE),
            placing=_before_last(prompts, f"{_RULE} Put ", ","),
            guessing=_before_last(prompts, "# Put ", ","),
        )

    def to_write(self, scenario: Scenario) -> str:
        """Ask for the rule behind what is seen."""
        return f"{self.writing}{_shown(scenario)}{_RULE}"

    def to_place(
        self, scenario: Scenario, part: Part, condition: Condition, rule: str
    ) -> str:
        """Ask where the things of a half go; ``rule`` is read under a rule only."""
        things = [thing for thing, _ in scenario.placements(part)]
        asked = f'{_lists(things, scenario)}pick_and_place("{things[0]}",'
        if condition == "examples":
            return f"{_shown(scenario)}{_BETWEEN}{asked}"
        if condition == "zero-shot":
            line = self.guessing.partition("\n")[0]
            return f"{self.guessing}{line}\n{asked}"
        return f"{self.placing}{_RULE} {rule}\n{asked}"


def _before_last(prompts: Iterable[str], start: str, end: str) -> str:
    for prompt in prompts:
        head, blank, last = prompt.rpartition("\n\n")
        if prompt.startswith(start) and prompt.endswith(end) and "receptacles" in last:
            return head + blank
    raise ValueError(
        f"no recorded prompt begins with {start!r} and ends with {end!r}: these are "
        "not TidyBot's"
    )


def _lists(things: Sequence[str], scenario: Scenario) -> str:
    return (
        f"objects = {_quoted(things)}\nreceptacles = {_quoted(scenario.receptacles)}\n"
    )


def _shown(scenario: Scenario) -> str:
    calls = (f'pick_and_place("{thing}", "{at}")\n' for thing, at in scenario.seen)
    return _lists([thing for thing, _ in scenario.seen], scenario) + "".join(calls)


def _quoted(names: Sequence[str]) -> str:
    return "[" + ", ".join(f'"{name}"' for name in names) + "]"


# --- replies ------------------------------------------------------------------


def read_rule(reply: str) -> str:
    """Return the first line of a reply that is not empty, or an empty rule."""
    return next((line.strip() for line in reply.splitlines() if line.strip()), "")


class Reading(NamedTuple):
    """Placements as read, and how many lines of the reply were no placement."""

    placements: tuple[Placement, ...]
    skipped: int


def read_placements(first: str, reply: str) -> Reading:
    """Read a reply that goes on where a prompt has stopped.

    The prompt ends in an open call for the first thing. Each line up to the first empty
    one must be a whole call with two texts in quotes. Others are skipped and counted.
    Of several calls for one thing, the first counts.

    Args:
        first: the thing whose call the reply closes.
        reply: as the model wrote it. It is matched against a pattern, never run.
    """
    placed: dict[str, str] = {}
    skipped = 0
    for line in f'pick_and_place("{first}", {reply.strip()}'.splitlines():
        if not line.strip():
            break
        call = _CALL.fullmatch(line.strip())
        if call:
            placed.setdefault(*call.groups())
        else:
            skipped += 1
    return Reading(tuple(placed.items()), skipped)


# --- trials -------------------------------------------------------------------


@dataclass(frozen=True)
class Trial:
    """What a model did with one half of a scenario.

    Attributes:
        scenario: which.
        part: which half was placed.
        condition: what the model was told.
        rule: that it went by; empty without one.
        placements: of the things that were asked for.
        skipped: lines of the reply that were no placement.
    """

    scenario: Scenario
    part: Part
    condition: Condition
    rule: str
    placements: Mapping[str, str]
    skipped: int

    @property
    def right(self) -> int:
        """How many things went where the person puts them."""
        truth = self.scenario.placements(self.part)
        return sum(self.placements.get(thing) == place for thing, place in truth)

    @property
    def asked(self) -> int:
        """How many things were to be placed; one that was not placed is wrong."""
        return len(self.scenario.placements(self.part))

    @property
    def accuracy(self) -> Fraction:
        """The share of things that went where the person puts them."""
        return Fraction(self.right, self.asked)

    def __str__(self) -> str:
        at = self.scenario
        lines = [f"Scenario {at.number}, {at.room}: {', '.join(at.receptacles)}"]
        lines.append(f"Rule ({self.condition}): {self.rule or 'none'}")
        for thing, place in at.placements(self.part):
            put = self.placements.get(thing, "not placed")
            note = "" if put == place else f"  (the person: {place})"
            lines.append(f"  {thing} -> {put}{note}")
        return "\n".join([*lines, f"{self.right} of {self.asked} right"])


def run(
    scenario: Scenario,
    condition: Condition,
    prompts: Prompts,
    model: TextModel,
    part: Part = "unseen",
) -> Trial:
    """Let a model place one half of a scenario's things.

    Args:
        scenario: which.
        condition: ``zero-shot`` (common sense alone), ``examples`` (the seen placements
            stand in the prompt), ``llm-rule`` (the model first writes a rule) or
            ``human-rule`` (the person's note).
        prompts: how to ask.
        model: whom.
        part: which half. Of examples, ``seen`` is not recorded.

    Raises:
        ReplyNotRecordedError: the model replays, and was never asked just this.
    """
    rule = ""
    if condition == "human-rule":
        rule = scenario.note
    elif condition == "llm-rule":
        written = model.complete(prompts.to_write(scenario), max_tokens=_MAX_TOKENS)
        rule = read_rule(written)
    prompt = prompts.to_place(scenario, part, condition, rule)
    things = [thing for thing, _ in scenario.placements(part)]
    reply = model.complete(prompt, max_tokens=_MAX_TOKENS, stop=("\n\n",))
    placements, skipped = read_placements(things[0], reply)
    placed = {thing: place for thing, place in placements if thing in things}
    return Trial(scenario, part, condition, rule, placed, skipped)


def accuracy(trials: Iterable[Trial]) -> Fraction:
    """Return the mean over scenarios of the share that is right, as TidyBot has it.

    A scenario of ten things counts as much as one of four.

    Raises:
        ValueError: there are no trials.
    """
    shares = [trial.accuracy for trial in trials]
    if not shares:
        raise ValueError("no trials, no accuracy")
    return sum(shares, Fraction(0)) / len(shares)


# --- choices ------------------------------------------------------------------


def tasks(scenario: Scenario, part: Part) -> list[Task]:
    """Return one task for each thing of a half: in which receptacle it goes.

    A scenario is a family of its own, for each has a person of its own. Options have
    the one attribute ``place``; what the thing is stands in the goal alone. So these
    are for reasoners that read words; one that compares attributes has nothing to learn
    from here but the most frequent place.
    """
    options = tuple(Option(place, {"place": place}) for place in scenario.receptacles)
    return [
        Task(
            id=f"tidybot-{scenario.number}-{part}-{number}",
            scene=f"A {scenario.room} with {_spoken(scenario.receptacles)}.",
            goal=f"Put away: {thing}.",
            family=f"scenario {scenario.number}",
            options=options,
        )
        for number, (thing, _) in enumerate(scenario.placements(part), start=1)
    ]


def _spoken(names: Sequence[str]) -> str:
    return ", ".join(names[:-1]) + f" and {names[-1]}"
