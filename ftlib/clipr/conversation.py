r"""A short conversation: on what options differ, what to ask, and what was said.

The paper has a model hold a short conversation and draw preference dimensions from it.
How a question is chosen without a model is ours: imagine many users, and ask what tells
most about their choices in the example tasks,

.. math:: \sum_{\text{tasks } t} I(\text{answer}; \text{choice in } t).

Questions are of two kinds: about the values of a dimension in a family of tasks, and
about a task, where the answer is an option.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ftlib.clipr.rules import Vocabulary
from ftlib.clipr.settings import ConversationSettings
from ftlib.clipr.tasks import Task
from ftlib.streams import generator

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

# --- what is said -------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    """What a user is asked.

    Attributes:
        text: the question, in words.
        family: of the tasks that it is about; empty for all.
        dimension: that it is about; empty if it is about a task, or open.
        values: to choose from: values of the dimension, or names of options.
        task: that it is about, if it is about one.
    """

    text: str
    family: str = ""
    dimension: str = ""
    values: tuple[str, ...] = ()
    task: Task | None = None

    @classmethod
    def about_dimension(
        cls, family: str, dimension: str, values: Sequence[str]
    ) -> Question:
        """Ask which value of a dimension is preferred."""
        text = f"For {family}, which {dimension} do you prefer: {_listed(values)}?"
        return cls(text, family, dimension, tuple(values))

    @classmethod
    def about_task(cls, task: Task) -> Question:
        """Ask which option is preferred."""
        names = tuple(option.name for option in task.options)
        text = " ".join(filter(None, (task.scene, task.goal)))
        return cls(f"{text} Which: {_listed(names)}?", task.family, "", names, task)

    @property
    def choices(self) -> tuple[Mapping[str, str], ...]:
        """Attributes of what there is to choose from, in the order of the values."""
        if self.task is not None:
            return tuple(option.attributes for option in self.task.options)
        return tuple({self.dimension: value} for value in self.values)

    def to_json(self) -> dict[str, Any]:
        """Return the question as JSON's types."""
        task = None if self.task is None else self.task.to_json()
        return {**vars(self), "values": list(self.values), "task": task}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Question:
        """Read what :meth:`to_json` wrote."""
        task = None if data["task"] is None else Task.from_json(data["task"])
        return cls(**{**data, "values": tuple(data["values"]), "task": task})


@dataclass(frozen=True)
class Answer:
    """What a user says.

    Attributes:
        text: in words.
        value: which of the question's values it is; ``None`` if it is none of them.
        indifferent: whether the user said that it does not matter.
    """

    text: str
    value: str | None = None
    indifferent: bool = False


@dataclass(frozen=True)
class Turn:
    """A question, and an answer unless the user gave none."""

    question: Question
    answer: Answer | None


@dataclass(frozen=True)
class History:
    """What was said, from the first turn to the last."""

    turns: tuple[Turn, ...] = ()

    def __len__(self) -> int:
        return len(self.turns)

    def __iter__(self) -> Iterator[Turn]:
        return iter(self.turns)

    def add(self, question: Question, answer: Answer | None) -> History:
        """Return the history with one more turn."""
        return History((*self.turns, Turn(question, answer)))

    @property
    def answered(self) -> tuple[tuple[Question, Answer], ...]:
        """The turns that have an answer."""
        return tuple((t.question, t.answer) for t in self.turns if t.answer is not None)

    @property
    def stopped(self) -> bool:
        """Whether the user gave no answer to the last question."""
        return bool(self.turns) and self.turns[-1].answer is None

    def to_text(self) -> str:
        """Write the conversation, two lines for each turn."""
        return "\n".join(
            f"Q: {turn.question.text}\nA: {turn.answer.text if turn.answer else '…'}"
            for turn in self.turns
        )

    def to_json(self) -> list[dict[str, Any]]:
        """Return the history as JSON's types."""
        return [
            {
                "question": turn.question.to_json(),
                "answer": None if turn.answer is None else dict(vars(turn.answer)),
            }
            for turn in self.turns
        ]

    @classmethod
    def from_json(cls, data: Iterable[Mapping[str, Any]]) -> History:
        """Read what :meth:`to_json` wrote."""
        return cls(
            tuple(
                Turn(
                    Question.from_json(turn["question"]),
                    None if turn["answer"] is None else Answer(**turn["answer"]),
                )
                for turn in data
            )
        )


def _listed(names: Sequence[str]) -> str:
    return " or ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))


# --- what can be asked --------------------------------------------------------


def dimension_questions(examples: Iterable[Task]) -> list[Question]:
    """Return a question for each family and dimension on which its options differ."""
    values: dict[tuple[str, str], dict[str, None]] = {}
    for task in examples:
        for dimension in task.differing():
            found = values.setdefault((task.family, dimension), {})
            found.update(dict.fromkeys(task.values(dimension)))
    return [
        Question.about_dimension(family, dimension, tuple(found))
        for (family, dimension), found in values.items()
    ]


def task_questions(examples: Iterable[Task]) -> list[Question]:
    """Return a question for each example task."""
    return [Question.about_task(task) for task in examples]


# --- what to ask --------------------------------------------------------------


class Belief:
    """Imagined users, and how likely each is after what was said.

    A user has a utility for each value of each dimension: 0 for all of a dimension that
    does not matter, standard normal otherwise, and drawn anew for a family in which the
    dimension is valued otherwise. A user takes what has the highest sum. When few users
    are left who would have answered so, new ones like them take the others' places: a
    particle filter, with the kernel of Liu and West (2001).

    Args:
        examples: tasks whose choices are to be learnt about.
        settings: how many users, and their priors.
        seed: of the users.
        utilities: of given users, (users, families, values); drawn if ``None``.
    """

    def __init__(
        self,
        examples: Sequence[Task],
        settings: ConversationSettings,
        seed: int = 0,
        utilities: Floats | None = None,
    ) -> None:
        self.settings = settings
        names = Vocabulary.of(examples)
        self.families = {name: at for at, name in enumerate(names.families)}
        self.columns: dict[tuple[str, str], int] = {}
        for dimension, values in names.values.items():
            for value in values:
                self.columns[dimension, value] = len(self.columns)
        self.utilities = self._drawn(seed) if utilities is None else utilities
        self.weights = np.full(len(self.utilities), 1 / len(self.utilities))
        self.examples = list(examples)
        self.heard: tuple[tuple[Question, Answer], ...] = ()
        self._choices = self._chosen()
        self._rng = generator(seed, "new imagined users")

    def _chosen(self) -> Floats:
        """Return whether each user takes each option, (users, options of all tasks)."""
        return np.concatenate(
            [
                _one_hot(
                    self.outcomes(task.family, [o.attributes for o in task.options])
                )
                for task in self.examples
            ],
            axis=1,
        )

    def _drawn(self, seed: int) -> Floats:
        """Draw the utilities of users, (users, families, values)."""
        rng = generator(seed, "imagined users")
        s = self.settings
        shape = (s.candidates, len(self.families))
        drawn = np.zeros((*shape, len(self.columns)))
        for dimension in dict.fromkeys(d for d, _ in self.columns):
            at = [column for (d, _), column in self.columns.items() if d == dimension]
            own = rng.random(shape) < s.deviates
            utilities = self._prior(rng, (*shape, len(at)))
            common = self._prior(rng, (s.candidates, 1, len(at)))
            drawn[:, :, at] = np.where(own[..., None], utilities, common)
        return drawn

    def _prior(self, rng: np.random.Generator, shape: tuple[int, ...]) -> Floats:
        matters = rng.random((*shape[:-1], 1)) < self.settings.matters
        return matters * rng.standard_normal(shape)

    def outcomes(self, family: str, choices: Sequence[Mapping[str, str]]) -> Integers:
        """Return what each user takes, (users,); ``len(choices)`` if all are equal.

        What no example has is worth nothing to any of them; in a family that no example
        has, they choose as in the first.
        """
        value = np.zeros((len(self.utilities), len(choices)))
        utilities = self.utilities[:, self.families.get(family, 0)]
        for at, attributes in enumerate(choices):
            for item in attributes.items():
                if item in self.columns:
                    value[:, at] += utilities[:, self.columns[item]]
        equal = value.min(axis=1) == value.max(axis=1)
        return np.where(equal, len(choices), value.argmax(axis=1))

    def update(self, question: Question, answer: Answer) -> None:
        """Make the users likelier that would have given the answer."""
        if answer.indifferent:
            given = len(question.values)
        elif answer.value in question.values:
            given = question.values.index(answer.value)
        else:
            return
        agree = self.outcomes(question.family, question.choices) == given
        error = self.settings.error
        self.weights = self.weights * np.where(
            agree, 1 - error, error / len(question.values)
        )
        self.weights /= self.weights.sum()
        effective = 1 / np.square(self.weights).sum()
        if effective < self.settings.few * len(self.weights):
            self._renew()

    def _renew(self) -> None:
        """Draw users by their weights, and move them as far as keeps their spread."""
        n = len(self.weights)
        users = self.utilities[self._rng.choice(n, n, p=self.weights)]
        mean, spread = users.mean(axis=0), users.std(axis=0)
        noise = self._rng.standard_normal((n, 1, users.shape[-1]))
        kept = self.settings.kept
        moved = kept * users + (1 - kept) * mean + np.sqrt(1 - kept**2) * spread * noise
        self.utilities = np.where(users == 0, 0.0, moved)  # what does not matter stays
        self.weights = np.full(n, 1 / n)
        self._choices = self._chosen()

    def information(self, question: Question) -> float:
        """Return the bits on a choice in an example task, the mean over tasks."""
        answers = self.outcomes(question.family, question.choices)
        bits = mutual_information(_one_hot(answers), self._choices, self.weights)
        return bits / len(self.examples)

    def began(self, examples: Sequence[Task], history: History) -> bool:
        """Return whether what was heard is how this conversation about these began."""
        begun = history.answered[: len(self.heard)] == self.heard
        return begun and list(examples) == self.examples

    def hear(self, history: History) -> None:
        """Make of a conversation what was not heard yet."""
        for question, answer in history.answered[len(self.heard) :]:
            self.update(question, answer)
        self.heard = history.answered


def _one_hot(labels: Integers) -> Floats:
    """Return a column for each label from 0 up, (n, labels)."""
    return np.eye(int(labels.max()) + 1)[labels]


def mutual_information(a: Floats, b: Floats, weights: Floats) -> float:
    """Return I(a; b) in bits, summed if ``b`` is several labels side by side.

    Args:
        a: a label, one-hot, (n, labels).
        b: one or several, one-hot each, (n, labels of all).
        weights: of the n, in any scale.
    """
    weighted = a * (weights / weights.sum())[:, None]
    joint = weighted.T @ b
    independent = np.outer(weighted.sum(axis=0), joint.sum(axis=0))
    seen = joint > 0
    return float((joint[seen] * np.log2(joint[seen] / independent[seen])).sum())


def next_question(
    belief: Belief, questions: Sequence[Question], history: History
) -> Question | None:
    """Return the question that tells most, or ``None`` if none tells enough.

    Args:
        belief: about the user, after the conversation.
        questions: to choose from; what was asked before is not asked again.
        history: the conversation.
    """
    asked = {turn.question.text for turn in history}
    left = [question for question in questions if question.text not in asked]
    if not left:
        return None
    told = [belief.information(question) for question in left]
    best = int(np.argmax(told))
    return left[best] if told[best] >= belief.settings.enough else None
