"""Reasoners: what asks, writes rules, revises them and decides by them.

In the paper a language model does all of it. Here anything may that has four methods:
a model that is prompted (:mod:`ftlib.clipr.prompted`), or no model at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from ftlib.clipr.conversation import (
    Belief,
    History,
    Question,
    dimension_questions,
    next_question,
    task_questions,
)
from ftlib.clipr.models import Usage
from ftlib.clipr.refinement import lesson_said, revise
from ftlib.clipr.rules import RuleSet
from ftlib.clipr.settings import Settings
from ftlib.clipr.synthesis import synthesise
from ftlib.clipr.tasks import Correction, Decision, Task


class Reasoner(Protocol):
    """Asks, writes rules, revises them, and decides by them.

    It keeps nothing between calls but what it used, so that any of them can go on where
    another stopped.

    Attributes:
        usage: what it has used so far.
    """

    usage: Usage

    def ask(self, examples: Sequence[Task], history: History) -> Question | None:
        """Return the next question, or ``None`` if there is nothing to ask."""
        ...

    def synthesise(self, history: History, rules: RuleSet) -> RuleSet:
        """Return rules that follow from what was said, and from those there are."""
        ...

    def revise(self, rules: RuleSet, corrections: Sequence[Correction]) -> RuleSet:
        """Return the rules, changed so that the corrected decisions come out right."""
        ...

    def decide(self, task: Task, rules: RuleSet) -> Decision:
        """Choose an option of a task by the rules."""
        ...


class SymbolicReasoner:
    """Reasons with structured rules and no language model.

    Args:
        settings: of the conversation, of synthesis and of refinement.
        seed: of the users that it imagines.

    Attributes:
        usage: what it has used so far. Problems are reasons that were no rule for the
            choice, in place of which a rule was guessed.
    """

    def __init__(self, settings: Settings | None = None, seed: int = 0) -> None:
        self.settings = settings or Settings()
        self.seed = seed
        self.usage = Usage()
        self._belief: Belief | None = None  # of the last ask, to save time only

    def ask(self, examples: Sequence[Task], history: History) -> Question | None:
        """Return the question, about a dimension or an example, that tells most."""
        self.usage.calls += 1
        with self.usage.timed():
            questions = [*dimension_questions(examples), *task_questions(examples)]
            return next_question(self._believed(examples, history), questions, history)

    def _believed(self, examples: Sequence[Task], history: History) -> Belief:
        """Return the belief after a conversation; what was heard is not heard again."""
        if self._belief is None or not self._belief.began(examples, history):
            self._belief = Belief(examples, self.settings.conversation, self.seed)
        self._belief.hear(history)
        return self._belief

    def synthesise(self, history: History, rules: RuleSet) -> RuleSet:
        """Fit utilities to the answers and round them to rules."""
        self.usage.calls += 1
        with self.usage.timed():
            return synthesise(history, rules, self.settings.synthesis)

    def revise(self, rules: RuleSet, corrections: Sequence[Correction]) -> RuleSet:
        """Change the rules by the corrections, one after the other."""
        self.usage.calls += 1
        self.usage.problems += sum(
            bool(c.reason) and lesson_said(c) is None for c in corrections
        )
        with self.usage.timed():
            return revise(rules, corrections, self.settings.refinement)

    def decide(self, task: Task, rules: RuleSet) -> Decision:
        """Decide as :meth:`ftlib.clipr.rules.RuleSet.decide`."""
        self.usage.calls += 1
        with self.usage.timed():
            return rules.decide(task)
