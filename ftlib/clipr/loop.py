"""CLIPR and Adaptive-CLIPR, out of the pieces.

That a conversation gives rules, that rules decide, and that the adaptive variant
watches batches and asks when a gate opens is the paper's; what comes between is ours:

1. converse about the example tasks, a question at a time;
2. write rules;
3. decide a batch of tasks by the rules, and see which decisions are accepted;
4. adaptive only: if the gate opens, have a few rejected decisions corrected, and revise
   the rules; freeze them after enough good batches;
5. go on with 3.

Each step asks the reasoner or the user at most for one thing and leads from a
:class:`State` to the next. A state holds all that was learnt and is written as JSON, so
that whatever fails, nothing is lost:

.. code-block:: python

   try:
       state = learn(reasoner, user, examples, tasks, settings)
   except LearningInterrupted as interrupted:
       state = interrupted.state
   state = learn(reasoner, user, examples, tasks, settings, state)
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from ftlib.clipr.conversation import History
from ftlib.clipr.models import Usage
from ftlib.clipr.monitoring import Batch, gate, settled
from ftlib.clipr.reasoners import Reasoner
from ftlib.clipr.refinement import confirm
from ftlib.clipr.rules import RuleSet
from ftlib.clipr.settings import Settings
from ftlib.clipr.tasks import Correction, Decision, Task
from ftlib.clipr.users import User

Phase = Literal["converse", "write", "decide", "review", "correct", "revise", "done"]


class LearningInterrupted(RuntimeError):  # noqa: N818  # resumed rather than handled
    """A reasoner or a user failed; what was learnt until then is in ``state``.

    Attributes:
        state: to go on with.
    """

    def __init__(self, state: State) -> None:
        super().__init__(
            f"failed at {state.phase!r}, after {len(state.history)} questions and"
            f" {len(state.decisions)} decisions; go on with this error's state"
        )
        self.state = state


@dataclass(frozen=True)
class Made:
    """A decision that was made.

    Attributes:
        task: its id.
        index: of the option.
        accepted: the user's reaction; ``None`` if there was none.
        fired: places of the rules that had something to say.
    """

    task: str
    index: int
    accepted: bool | None
    fired: tuple[int, ...]


@dataclass(frozen=True)
class State:
    """All that was learnt, and where to go on.

    Attributes:
        rules: as they are now; those to begin with may be given.
        history: the conversation.
        decisions: made so far, in the order of the tasks.
        batches: reviewed so far.
        to_correct: places in ``decisions`` about which the user will be asked.
        corrections: got, and not learnt from yet.
        corrected: corrections got in all.
        frozen: whether the rules stay as they are.
        phase: what comes next.
        usage: what the reasoner used.
    """

    rules: RuleSet = field(default_factory=RuleSet)
    history: History = field(default_factory=History)
    decisions: tuple[Made, ...] = ()
    batches: tuple[Batch, ...] = ()
    to_correct: tuple[int, ...] = ()
    corrections: tuple[Correction, ...] = ()
    corrected: int = 0
    frozen: bool = False
    phase: Phase = "converse"
    usage: Usage = field(default_factory=Usage)

    @property
    def turns(self) -> int:
        """What the user was asked and answered: answers and corrections."""
        return len(self.history.answered) + self.corrected

    @property
    def reactions(self) -> int:
        """Decisions that the user accepted or rejected without a word."""
        return sum(made.accepted is not None for made in self.decisions)

    def to_json(self) -> dict[str, Any]:
        """Return the state as JSON's types."""
        return {
            **vars(self),
            "rules": self.rules.to_json(),
            "history": self.history.to_json(),
            "decisions": [dict(vars(made)) for made in self.decisions],
            "batches": [asdict(batch) for batch in self.batches],
            "to_correct": list(self.to_correct),
            "corrections": [correction.to_json() for correction in self.corrections],
            "usage": asdict(self.usage),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> State:
        """Read what :meth:`to_json` wrote."""
        return cls(
            **{
                **data,
                "rules": RuleSet.from_json(data["rules"]),
                "history": History.from_json(data["history"]),
                "decisions": tuple(
                    Made(**{**made, "fired": tuple(made["fired"])})
                    for made in data["decisions"]
                ),
                "batches": tuple(Batch(**batch) for batch in data["batches"]),
                "to_correct": tuple(data["to_correct"]),
                "corrections": tuple(map(Correction.from_json, data["corrections"])),
                "usage": Usage(**data["usage"]),
            }
        )

    def save(self, path: Path) -> None:
        """Write the state to a file, which is replaced in one go."""
        part = path.with_name(path.name + ".part")
        part.write_text(json.dumps(self.to_json()), encoding="utf-8")
        os.replace(part, path)

    @classmethod
    def load(cls, path: Path) -> State:
        """Read what :meth:`save` wrote."""
        return cls.from_json(json.loads(path.read_text(encoding="utf-8")))


def learn(
    reasoner: Reasoner,
    user: User,
    examples: Sequence[Task],
    tasks: Sequence[Task],
    settings: Settings,
    state: State | None = None,
    save: Callable[[State], object] = lambda state: None,
) -> State:
    """Learn the rules of a user, and decide tasks by them.

    Args:
        reasoner: asks, writes, revises and decides.
        user: answers, accepts and corrects.
        examples: to talk about before anything is decided.
        tasks: to decide, in this order.
        settings: ``adaptive`` or not, batches, budgets and thresholds.
        state: to go on from, or with rules to begin with.
        save: is called with each new state.

    Returns:
        The last state, whose phase is ``done``.

    Raises:
        LearningInterrupted: the reasoner or the user raised; its cause is the error.
        ValueError: the state has decisions about other tasks.
    """
    state = state or State()
    decided = [made.task for made in state.decisions]
    if decided != [task.id for task in tasks[: len(decided)]]:
        raise ValueError(
            "the state has decisions about other tasks: go on with the same tasks in"
            " the same order, or begin with State(rules=state.rules)"
        )
    loop = _Loop(reasoner, user, examples, tasks, settings)
    while state.phase != "done":
        state = loop.step(state)
        save(state)
    return state


def accuracy(
    decide: Callable[[Task], Decision],
    right: Callable[[Task, int], bool],
    tasks: Sequence[Task],
) -> float:
    """Return the share of tasks that are decided right.

    Args:
        decide: as ``reasoner.decide`` with rules.
        right: whether an option is, as
            :meth:`ftlib.clipr.users.SimulatedUser.right`.
        tasks: at least one.
    """
    return sum(right(task, decide(task).index) for task in tasks) / len(tasks)


@dataclass(frozen=True)
class _Loop:
    """The steps; each is named as the phase that it carries out."""

    reasoner: Reasoner
    user: User
    examples: Sequence[Task]
    tasks: Sequence[Task]
    settings: Settings

    def step(self, state: State) -> State:
        """Return the next state, with what the reasoner used for it."""
        before = replace(self.reasoner.usage)
        try:
            new: State = getattr(self, state.phase)(state)
        except Exception as error:
            spent = self.reasoner.usage - before
            raise LearningInterrupted(
                replace(state, usage=state.usage + spent)
            ) from error
        return replace(new, usage=state.usage + (self.reasoner.usage - before))

    def converse(self, state: State) -> State:
        asked = len(state.history) >= self.settings.conversation.questions
        if asked or state.history.stopped or not self._turns_left(state):
            return replace(state, phase="write")
        question = self.reasoner.ask(self.examples, state.history)
        if question is None:
            return replace(state, phase="write")
        answer = self.user.answer(question)
        return replace(state, history=state.history.add(question, answer))

    def write(self, state: State) -> State:
        rules = state.rules
        if state.history.answered:
            rules = self.reasoner.synthesise(state.history, rules)
        return replace(state, rules=rules, phase="decide")

    def decide(self, state: State) -> State:
        at = len(state.decisions)
        if at < len(self.tasks):
            task = self.tasks[at]
            decision = self.reasoner.decide(task, state.rules)
            accepted = self.user.accepts(task, decision.index)
            made = Made(task.id, decision.index, accepted, decision.fired)
            state = replace(state, decisions=(*state.decisions, made))
        full = len(self._open(state)) == self.settings.batch
        at_end = len(state.decisions) == len(self.tasks)
        return replace(state, phase="review" if full or at_end else "decide")

    def review(self, state: State) -> State:
        made = self._open(state)
        if not made:
            return replace(state, phase="done")
        batch = Batch(
            decided=len(made),
            observed=sum(one.accepted is not None for one in made),
            accepted=sum(one.accepted is True for one in made),
        )
        first = len(state.decisions) - len(made)
        state = replace(state, batches=(*state.batches, batch), phase="decide")
        if not self.settings.adaptive or state.frozen:
            return state
        if settled(state.batches, self.settings.gate):
            return replace(state, frozen=True)
        state = replace(state, rules=self._confirmed(state.rules, first, made))
        if not gate(state.batches, self.settings.gate).open:
            return state
        wrong = [first + at for at, one in enumerate(made) if one.accepted is False]
        wrong = wrong[: self.settings.corrections]
        return replace(state, to_correct=tuple(wrong), phase="correct")

    def correct(self, state: State) -> State:
        if not state.to_correct or not self._turns_left(state):
            phase: Phase = "revise" if state.corrections else "decide"
            return replace(state, to_correct=(), phase=phase)
        at, *left = state.to_correct
        correction = self.user.correct(self.tasks[at], state.decisions[at].index)
        if correction is None:  # a user who has stopped is not asked again
            return replace(state, to_correct=())
        return replace(
            state,
            to_correct=tuple(left),
            corrections=(*state.corrections, correction),
            corrected=state.corrected + 1,
        )

    def revise(self, state: State) -> State:
        rules = self.reasoner.revise(state.rules, state.corrections)
        return replace(state, rules=rules, corrections=(), phase="decide")

    def _turns_left(self, state: State) -> bool:
        return self.settings.turns is None or state.turns < self.settings.turns

    def _open(self, state: State) -> tuple[Made, ...]:
        """Return the decisions since the last review."""
        return state.decisions[sum(batch.decided for batch in state.batches) :]

    def _confirmed(self, rules: RuleSet, first: int, made: Sequence[Made]) -> RuleSet:
        for task, one in zip(self.tasks[first:], made, strict=False):
            if one.accepted:
                rules = confirm(rules, task, one.index, self.settings.refinement)
        return rules
