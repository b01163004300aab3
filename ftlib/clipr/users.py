"""Simulated users: hidden rules, errors, a change of mind, and an end of patience.

Who played the user in the paper's experiments is not known. These are ours, so that
what is right is known exactly: a user prefers what its hidden rules decide.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ftlib.clipr.conversation import Answer, Question
from ftlib.clipr.rules import Rule, RuleSet, Vocabulary
from ftlib.clipr.tasks import Correction, Option, Task
from ftlib.streams import generator


class User(Protocol):
    """Answers questions, reacts to decisions and corrects them.

    Attributes:
        turns: answers and corrections that were given: what is asked of a person.
        reactions: decisions that were accepted or rejected without a word.
    """

    turns: int
    reactions: int

    def answer(self, question: Question) -> Answer | None:
        """Answer a question; ``None`` if the user does not."""
        ...

    def accepts(self, task: Task, index: int) -> bool | None:
        """Say whether a decision will do; ``None`` if the user does not say."""
        ...

    def correct(self, task: Task, index: int) -> Correction | None:
        """Say what a decision should have been; ``None`` if the user does not."""
        ...


@dataclass
class SimulatedUser:
    """A user with hidden rules.

    An error depends on the user's seed and on what is asked, so that the same question
    always gets the same answer, also when a stopped run goes on.

    Attributes:
        rules: what the user prefers.
        seed: of the errors.
        noise: probability that an answer, a reaction or a correction is wrong.
        patience: turns after which the user says nothing any more; ``None`` for never.
        later: what the user prefers after a change of mind; ``None`` for no change.
        changes_after: reactions after which that happens.
        gives_reasons: whether a correction says why.
        turns: answers and corrections given so far.
        reactions: decisions accepted or rejected so far.
    """

    rules: RuleSet
    seed: int = 0
    noise: float = 0.0
    patience: int | None = None
    later: RuleSet | None = None
    changes_after: int = 0
    gives_reasons: bool = True
    turns: int = 0
    reactions: int = 0

    @property
    def preferences(self) -> RuleSet:
        """The hidden rules as they are now."""
        if self.later is not None and self.reactions >= self.changes_after:
            return self.later
        return self.rules

    @property
    def silent(self) -> bool:
        """Whether the patience has ended."""
        return self.patience is not None and self.turns >= self.patience

    def right(self, task: Task, index: int) -> bool:
        """Return whether nothing is better than an option; always without error."""
        return index in self.preferences.best(task)

    def answer(self, question: Question) -> Answer | None:
        """Say which value or option is best, or that it does not matter.

        To a question without values the user tells the rules about the dimensions that
        it names.
        """
        if self.silent:
            return None
        self.turns += 1
        if not question.values:
            return Answer(self._told(question.text))
        at = self._best(_as_task(question), question.text)
        if at is None:
            return Answer("It does not matter to me.", indifferent=True)
        value = question.values[at]
        return Answer(f"I prefer {value}.", value)

    def accepts(self, task: Task, index: int) -> bool | None:
        """Say whether nothing is better than the decision."""
        if self.silent:
            return None
        right = self.right(task, index)
        self.reactions += 1
        return right ^ self._errs(f"reaction {task.id}")

    def correct(self, task: Task, index: int) -> Correction | None:
        """Say which option was wanted, and on which dimension most."""
        if self.silent:
            return None
        self.turns += 1
        if self.right(task, index):
            return Correction(task, index, index)
        chosen = self._best(task, f"correction {task.id}")
        chosen = index if chosen is None else chosen
        return Correction(task, index, chosen, self._reason(task, chosen, index))

    def _best(self, task: Task, purpose: str) -> int | None:
        """Return the first of the best options, or by error another; None if equal."""
        best = self.preferences.best(task)
        if self._errs(purpose):
            others = [at for at in range(len(task.options)) if at != best[0]]
            return int(generator(self.seed, f"{purpose} error").choice(others))
        return None if len(best) == len(task.options) else best[0]

    def _errs(self, purpose: str) -> bool:
        return bool(generator(self.seed, purpose).random() < self.noise)

    def _reason(self, task: Task, chosen: int, index: int) -> str:
        """Say on what the strongest rule for the choice tells the two apart."""
        a, b = task.options[chosen].attributes, task.options[index].attributes
        rules = [r for r in self.preferences if r.compare(task.family, a, b) > 0]
        if not self.gives_reasons or not rules:
            return ""
        strongest = max(rules, key=lambda rule: (rule.specificity, rule.weight))
        dimension = strongest.dimension
        return Rule(dimension, a[dimension], b.get(dimension)).to_text()

    def _told(self, text: str) -> str:
        words = text.casefold()
        rules = [r for r in self.preferences if r.dimension.casefold() in words]
        told = " ".join(rule.claim.to_text() for rule in rules)
        return told or "I have no view on that."


def _as_task(question: Question) -> Task:
    """Return a task with the question's values for options."""
    if question.task is not None:
        return question.task
    options = (Option(v, {question.dimension: v}) for v in question.values)
    return Task("question", "", question.text, question.family, tuple(options))


# --- drawing users ------------------------------------------------------------


@dataclass(frozen=True)
class UserSettings:
    """What the hidden rules of users are drawn from.

    Attributes:
        dimensions: how many matter to a user.
        ranked: how many values of a dimension are told apart; the others are equal.
        exceptions: families in which a user prefers another value.
    """

    dimensions: int = 2
    ranked: int = 2
    exceptions: int = 1


def draw_rules(
    vocabulary: Vocabulary,
    seed: int,
    settings: UserSettings | None = None,
    families: Sequence[str] | None = None,
) -> RuleSet:
    """Draw hidden rules.

    The first dimension outweighs the second, and so on. A rank of values is written as
    rules over anything else, with falling weights. In an excepted family the value that
    comes last elsewhere is best.

    Args:
        vocabulary: families, dimensions and values to draw from.
        seed: of the user.
        settings: how many of each.
        families: which may be excepted; ``None`` for all of the vocabulary.

    Raises:
        ValueError: no dimension has two values.
    """
    s = settings or UserSettings()
    rng = generator(seed, "hidden rules")
    dimensions = [d for d, values in vocabulary.values.items() if len(values) > 1]
    if not dimensions:
        raise ValueError("no dimension has two values: there is nothing to prefer")
    order = [dimensions[at] for at in rng.permutation(len(dimensions))][: s.dimensions]
    places = list(vocabulary.families if families is None else families)
    places = [places[at] for at in rng.permutation(len(places))][: s.exceptions]
    on = {place: str(rng.choice(order)) for place in places}
    rules: list[Rule] = []
    for rank, dimension in enumerate(order):
        importance = float((s.ranked + 1) ** (len(order) - rank - 1))
        values = _shuffled(vocabulary.values[dimension], rng)
        there = tuple(place for place in places if on[place] == dimension)
        rules += _ranking(dimension, values, s.ranked, importance, except_for=there)
        if there:
            rules.append(Rule(dimension, values[-1], families=there, weight=importance))
    return RuleSet(tuple(rules))


def _shuffled(values: Sequence[str], rng: np.random.Generator) -> list[str]:
    return [values[at] for at in rng.permutation(len(values))]


def _ranking(
    dimension: str,
    values: Sequence[str],
    ranked: int,
    importance: float,
    except_for: tuple[str, ...],
) -> list[Rule]:
    ranked = min(ranked, len(values) - 1)
    return [
        Rule(
            dimension,
            value,
            except_families=except_for,
            weight=importance * (ranked - place),
        )
        for place, value in enumerate(values[:ranked])
    ]
