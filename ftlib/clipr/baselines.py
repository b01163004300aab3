"""What CLIPR is compared with: the same user, the same number of turns.

The paper compares with these methods. They are rebuilt here from their own papers so
that they run with any :class:`ftlib.clipr.reasoners.Reasoner`, or without a model:

====================  ===================  ============================================
class                 stands for           what it does with its turns
====================  ===================  ============================================
``ZeroShot``          zero-shot            nothing
``NearestExamples``   examples in the      has example tasks decided, and does as in
                      prompt (ICL)         those most alike
``FrozenSummary``     TidyBot              has example tasks decided, writes rules once
                                           and never changes them
``AskFirst``          GATE                 asks questions; the bare answers decide
``Memory``            CIPHER               has its own decisions corrected; keeps a rule
                                           of each with its task, and uses those of the
                                           tasks most alike
``BradleyTerry``      RLHF                 has example tasks decided, and fits a reward;
                                           no policy is trained: it is a stand-in
``CorrectedReward``   RLHF, corrected      has its own decisions corrected, and fits the
                                           same reward to all of that
``CorrectedSummary``  CLIPR with examples  the same corrections, fitted together to
                                           rules
``Oracle``            the upper bound      nothing: it is given the hidden rules
====================  ===================  ============================================

A baseline learns at most once and then decides:

.. code-block:: python

   baseline = FrozenSummary(SymbolicReasoner())
   baseline.learn(user, examples, turns=6)
   accuracy(baseline.decide, user.right, tasks)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
from sklearn.linear_model import LogisticRegression

from ftlib.clipr.conversation import History, Question, task_questions
from ftlib.clipr.models import Usage
from ftlib.clipr.reasoners import Reasoner
from ftlib.clipr.refinement import lesson_guessed, lesson_said
from ftlib.clipr.rules import Rule, RuleSet
from ftlib.clipr.settings import (
    NEAREST,
    REWARD_INVERSE_PENALTY,
    RefinementSettings,
    SynthesisSettings,
)
from ftlib.clipr.synthesis import Comparison, comparisons, rules_from
from ftlib.clipr.tasks import Correction, Decision, Option, Task
from ftlib.clipr.users import SimulatedUser, User

Floats = npt.NDArray[np.float64]


class Baseline(Protocol):
    """Learns from a user in a number of turns, then decides."""

    @property
    def usage(self) -> Usage:
        """What it has used so far."""
        ...

    def learn(self, user: User, examples: Sequence[Task], turns: int) -> None:
        """Learn from at most so many turns of the user."""
        ...

    def decide(self, task: Task) -> Decision:
        """Choose an option."""
        ...

    def told(self, task: Task) -> str | None:
        """Return what a language model would read about the user before it decides.

        ``None`` if none reads anything.
        """
        ...


def ask(user: User, questions: Iterable[Question], turns: int) -> History:
    """Ask questions until the turns are used, or the user does not answer."""
    history = History()
    for question in questions:
        if len(history) >= turns or history.stopped:
            break
        history = history.add(question, user.answer(question))
    return history


def decided(history: History) -> list[tuple[Task, int]]:
    """Return the tasks that a user decided, each with the option's index.

    A task that does not matter to the user has no answer, and is left out.
    """
    return [
        (question.task, question.values.index(answer.value))
        for question, answer in history.answered
        if question.task is not None and answer.value in question.values
    ]


def alike(a: Option, b: Option) -> float:
    """Return the share of the dimensions of either on which two options agree."""
    dimensions = {*a.attributes, *b.attributes}
    same = sum(a.attributes.get(d) == b.attributes.get(d) for d in dimensions)
    return same / max(1, len(dimensions))


# --- that decide by a reasoner ------------------------------------------------


class _ByReasoner:
    """Decides as a reasoner does by rules, of which there are none before learning."""

    def __init__(self, reasoner: Reasoner) -> None:
        self.reasoner = reasoner
        self.rules = RuleSet()

    @property
    def usage(self) -> Usage:
        """What the reasoner has used so far."""
        return self.reasoner.usage

    def decide(self, task: Task) -> Decision:
        """Choose an option by the rules."""
        return self.reasoner.decide(task, self.rules)

    def told(self, task: Task) -> str | None:
        """Return the rules."""
        return self.rules.to_text()


class ZeroShot(_ByReasoner):
    """Decides without any rule: by what the reasoner knows of people in general.

    Without a model that is nothing, and the first option is taken.
    """

    def learn(self, user: User, examples: Sequence[Task], turns: int) -> None:
        """Learn nothing."""


class FrozenSummary(_ByReasoner):
    """Writes rules once from decided examples, as TidyBot does."""

    def learn(self, user: User, examples: Sequence[Task], turns: int) -> None:
        """Have examples decided, and write rules."""
        history = ask(user, task_questions(examples), turns)
        self.rules = self.reasoner.synthesise(history, RuleSet())


class AskFirst(_ByReasoner):
    """Asks first and decides by the bare answers, as GATE does.

    Each answer is taken as it is, for all families: a rule for each value over each
    other, and for a decided example one for each dimension. Answers that contradict
    one another add up.

    Args:
        reasoner: asks, and decides by the answers.
        examples: how many of the examples questions are about; ``None`` for all.
    """

    def __init__(self, reasoner: Reasoner, examples: int | None = None) -> None:
        super().__init__(reasoner)
        self.examples = examples
        self.history = History()

    def learn(self, user: User, examples: Sequence[Task], turns: int) -> None:
        """Ask the reasoner's questions."""
        history = History()
        while len(history) < turns and not history.stopped:
            question = self.reasoner.ask(examples[: self.examples], history)
            if question is None:
                break
            history = history.add(question, user.answer(question))
        self.history = history
        self.rules = RuleSet(
            tuple(rule for c in comparisons(history) for rule in _bare(c))
        )

    def told(self, task: Task) -> str | None:
        """Return the conversation."""
        return self.history.to_text()


def _bare(comparison: Comparison) -> list[Rule]:
    better, worse = comparison.better, comparison.worse
    if comparison.equal:
        return []
    return [
        Rule(dimension, value, worse[dimension], support=1)
        for dimension, value in better.items()
        if worse.get(dimension, value) != value
    ]


class Memory(_ByReasoner):
    """Keeps a rule of each correction, and uses those of similar tasks, as CIPHER does.

    Args:
        reasoner: decides by the rules that are found.
        nearest: how many corrections are looked up.
    """

    def __init__(self, reasoner: Reasoner, nearest: int = NEAREST) -> None:
        super().__init__(reasoner)
        self.nearest = nearest
        self.memory: list[tuple[Task, Rule]] = []

    def learn(self, user: User, examples: Sequence[Task], turns: int) -> None:
        """Decide examples and have those corrected that the user rejects."""
        for correction in corrections(user, self.decide, examples, turns):
            self.usage.calls += 1  # a model infers the preference behind an edit
            lesson = lesson_said(correction)
            if lesson is None:
                self.usage.problems += bool(correction.reason)
                lesson = lesson_guessed(RuleSet(), correction, RefinementSettings())
            if lesson is not None:
                self.memory.append((correction.task, lesson))

    def decide(self, task: Task) -> Decision:
        """Merge the rules of the most similar tasks, and choose by them."""
        self.usage.calls += 1  # a model merges what was looked up
        return self.reasoner.decide(task, self._looked_up(task))

    def told(self, task: Task) -> str | None:
        """Return the rules of the most similar tasks."""
        return self._looked_up(task).to_text()

    def _looked_up(self, task: Task) -> RuleSet:
        near = sorted(self.memory, key=lambda kept: -_tasks_alike(task, kept[0]))
        return RuleSet(tuple(rule for _, rule in near[: self.nearest]))


def _tasks_alike(a: Task, b: Task) -> float:
    """Return the mean likeness of each option to the most similar one; +1 in family."""
    likeness = np.array([[alike(p, q) for q in b.options] for p in a.options])
    return float(likeness.max(axis=1).mean()) + (a.family == b.family)


# --- that decide by themselves ------------------------------------------------


class NearestExamples:
    """Does as in the decided examples that are most alike.

    Each option gets, from each of its nearest examples, its likeness to what was chosen
    less its mean likeness to what was not.

    Args:
        nearest: how many examples count.
        likeness: of two options.
    """

    def __init__(
        self,
        nearest: int = NEAREST,
        likeness: Callable[[Option, Option], float] = alike,
    ) -> None:
        self.nearest = nearest
        self.likeness = likeness
        self.usage = Usage()
        self.history = History()
        self.examples: list[tuple[Task, int]] = []

    def learn(self, user: User, examples: Sequence[Task], turns: int) -> None:
        """Have examples decided."""
        self.history = ask(user, task_questions(examples), turns)
        self.examples = decided(self.history)

    def decide(self, task: Task) -> Decision:
        """Choose an option."""
        self.usage.calls += 1
        with self.usage.timed():
            near = sorted(self.examples, key=lambda kept: -_tasks_alike(task, kept[0]))
            return Decision.highest(
                [
                    sum(self._vote(option, *kept) for kept in near[: self.nearest])
                    for option in task.options
                ]
            )

    def told(self, task: Task) -> str | None:
        """Return all decided examples, as they would stand in a prompt."""
        return self.history.to_text()

    def _vote(self, option: Option, example: Task, chosen: int) -> float:
        likeness = [self.likeness(option, other) for other in example.options]
        others = likeness[:chosen] + likeness[chosen + 1 :]
        return likeness[chosen] - sum(others) / len(others)


class BradleyTerry:
    """Fits a reward of the attributes to decided examples: the stand-in for RLHF.

    P(a over b) = σ(r(a) − r(b)), with r linear in the attributes, for all families and
    for each, and an L2 penalty.

    Args:
        inverse_penalty: scikit-learn's C.
    """

    def __init__(self, inverse_penalty: float = REWARD_INVERSE_PENALTY) -> None:
        self.inverse_penalty = inverse_penalty
        self.usage = Usage()
        self.columns: dict[tuple[str | None, str, str], int] = {}
        self.reward: Floats = np.zeros(0)

    def learn(self, user: User, examples: Sequence[Task], turns: int) -> None:
        """Have examples decided, and fit the reward."""
        self._fit(comparisons(ask(user, task_questions(examples), turns)))

    def _fit(self, said: Iterable[Comparison]) -> None:
        observed = [c for c in said if not c.equal]
        if not observed:
            return
        for family, better, worse, _ in observed:
            for item in (*better.items(), *worse.items()):
                for whose in (None, family):
                    self.columns.setdefault((whose, *item), len(self.columns))
        x = np.array(
            [
                self._features(c.family, c.better) - self._features(c.family, c.worse)
                for c in observed
            ]
        )
        model = LogisticRegression(C=self.inverse_penalty, fit_intercept=False)
        # scikit-learn wants both labels: b lost to a as a won over b, each at half.
        labels = np.repeat([1, 0], len(x))
        model.fit(np.concatenate([x, -x]), labels, np.full(2 * len(x), 0.5))
        self.reward = model.coef_[0]

    def decide(self, task: Task) -> Decision:
        """Choose the option with the highest reward."""
        self.usage.calls += 1
        with self.usage.timed():
            return Decision.highest(
                [
                    float(self._features(task.family, o.attributes) @ self.reward)
                    for o in task.options
                ]
            )

    def told(self, task: Task) -> str | None:
        """Return ``None``: a reward reads no words."""
        return None

    def _features(self, family: str, attributes: Mapping[str, str]) -> Floats:
        """Return 1 for each attribute, for all families and for this; (columns,)."""
        features = np.zeros(len(self.columns))
        for item in attributes.items():
            for whose in (None, family):
                if (whose, *item) in self.columns:
                    features[self.columns[whose, *item]] = 1
        return features


class CorrectedReward(BradleyTerry):
    """The same reward, from corrections: what Adaptive-CLIPR is told, without rules."""

    def learn(self, user: User, examples: Sequence[Task], turns: int) -> None:
        """Decide examples and have those corrected that the user rejects."""
        for said in _all_said(corrections(user, self.decide, examples, turns)):
            self._fit(said)


class CorrectedSummary(_ByReasoner):
    """Rules from the same corrections, all of which are kept and fitted together.

    Adaptive-CLIPR has only its rules to remember corrections by.

    Args:
        reasoner: decides by the rules.
        settings: how comparisons become rules.
    """

    def __init__(self, reasoner: Reasoner, settings: SynthesisSettings) -> None:
        super().__init__(reasoner)
        self.settings = settings

    def learn(self, user: User, examples: Sequence[Task], turns: int) -> None:
        """Decide examples and have those corrected that the user rejects."""
        for said in _all_said(corrections(user, self.decide, examples, turns)):
            self.usage.calls += 1
            self.rules = rules_from(said, RuleSet(), self.settings)


def corrections(
    user: User,
    decide: Callable[[Task], Decision],
    examples: Sequence[Task],
    turns: int,
) -> Iterator[Correction]:
    """Decide examples, and have those corrected that the user rejects.

    What is wanted is better than what was decided, and so is, by itself, the value that
    the user's reason names (:func:`ftlib.clipr.refinement.lesson_said`).

    Args:
        user: reacts and corrects.
        decide: as it is when a task comes, with what was learnt from those before.
        examples: in this order.
        turns: the most corrections.
    """
    spent = 0
    for task in examples:
        if spent >= turns:
            return
        decision = decide(task)
        if user.accepts(task, decision.index) is not False:
            continue
        correction = user.correct(task, decision.index)
        if correction is None:
            return
        spent += 1
        yield correction


def _all_said(corrections: Iterable[Correction]) -> Iterator[list[Comparison]]:
    """Give, after each correction, what it and those before it compare."""
    said: list[Comparison] = []
    for correction in corrections:
        said += _said(correction)
        yield said


def _said(correction: Correction) -> list[Comparison]:
    """Return what a correction and its reason compare."""
    task, lesson = correction.task, lesson_said(correction)
    chosen, decided = (
        task.options[at].attributes for at in (correction.chosen, correction.decided)
    )
    whole = Comparison(task.family, chosen, decided)
    if lesson is None:
        return [whole]
    better, worse = (
        {d: value for d, value in attributes.items() if d == lesson.dimension}
        for attributes in (chosen, decided)
    )
    return [whole, Comparison(task.family, better, worse)]


class Oracle:
    """Decides by a user's hidden rules.

    Args:
        user: whose rules they are.
    """

    def __init__(self, user: SimulatedUser) -> None:
        self.user = user
        self.usage = Usage()

    def learn(self, user: User, examples: Sequence[Task], turns: int) -> None:
        """Learn nothing."""

    def decide(self, task: Task) -> Decision:
        """Choose what the user prefers."""
        self.usage.calls += 1
        return self.user.preferences.decide(task)

    def told(self, task: Task) -> str | None:
        """Return the hidden rules."""
        return self.user.preferences.to_text()
