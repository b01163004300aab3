"""A reasoner that asks a language model, and reads what it writes.

What a model writes may be anything. It is read and never run, and where it cannot be
read there is a stated way out, which is counted in ``usage.problems``:

* a question that is empty or was asked before: the first that was not, about a
  dimension of the example tasks;
* a line that is no rule: left out, and kept in ``notes`` for those who want to look;
* no rule at all: the rules stay as they were;
* a choice that names no option: all options tie, and the first is taken;
* a played user's answer that names no value: it has none, and only its words remain.

.. code-block:: python

   from ftlib.clipr.models import LocalModel
   from ftlib.clipr.prompted import PromptedReasoner

   model = LocalModel.load("smollm2-135m")
   reasoner = PromptedReasoner(model, Vocabulary.of(tasks))
   reasoner.decide(tasks[0], rules)
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from ftlib.clipr import prompts
from ftlib.clipr.conversation import Answer, History, Question, dimension_questions
from ftlib.clipr.models import TextModel, Usage, raised, read_choice
from ftlib.clipr.prompts import By
from ftlib.clipr.rules import Rule, RuleError, RuleSet, Vocabulary, parse_rule
from ftlib.clipr.tasks import Correction, Decision, Task
from ftlib.clipr.users import SimulatedUser

_QUESTION_TOKENS = 80
_RULES_TOKENS = 400
# Before a line: bullets, numbers, bold type, and what it is.
_MARKS = re.compile(
    r"^(?:[\s*_`#>•-]|\d+[.)]|(?:rule|question|q)\s*\d*\s*[:.])+", re.IGNORECASE
)
_INDIFFERENT = re.compile(
    r"(?:does\s+not|doesn['’]t)\s+matter|no\s+preference|\beither\b", re.IGNORECASE
)


class PromptedReasoner:
    """Asks, writes rules, revises them and decides by asking a model.

    Args:
        model: that is asked.
        vocabulary: the names that rules may use, which the model is told; ``None`` for
            any, and then a misspelt name makes a rule that never speaks.
        by: whether options are chosen by letter or by name. Very small models do not
            connect a letter with what it stands for.
        calibrated: whether an option's score is by how much the rules raise its
            log-probability, log p(option | rules) − log p(option | no rules). This
            takes away what a model likes in any case, such as the first letter or
            short names, for twice the calls. It needs log-probabilities, not votes.
            Without rules nothing is subtracted.

    Attributes:
        usage: what the model used for this reasoner, and what could not be read.
        notes: lines that the model wrote in place of rules.
    """

    def __init__(
        self,
        model: TextModel,
        vocabulary: Vocabulary | None = None,
        *,
        by: By = "letter",
        calibrated: bool = False,
    ) -> None:
        self.model = model
        self.vocabulary = vocabulary
        self.by = by
        self.calibrated = calibrated
        self.usage = Usage()
        self.notes: list[str] = []

    def ask(self, examples: Sequence[Task], history: History) -> Question | None:
        """Have a question written; ``None`` if the model has none."""
        text = self._complete(prompts.question(examples, history), _QUESTION_TOKENS)
        text = read_question(text)
        if text.upper().strip(" .") == prompts.NOTHING_TO_ASK:
            return None
        asked = {turn.question.text for turn in history}
        if text and text not in asked:
            return understood(text, examples)
        self.usage.problems += 1
        left = (q for q in dimension_questions(examples) if q.text not in asked)
        return next(left, None)

    def synthesise(self, history: History, rules: RuleSet) -> RuleSet:
        """Have rules written from a conversation."""
        return self._rules(prompts.rules(history, rules, self.vocabulary), rules)

    def revise(self, rules: RuleSet, corrections: Sequence[Correction]) -> RuleSet:
        """Have the rules rewritten by corrections."""
        return self._rules(prompts.revision(rules, corrections, self.vocabulary), rules)

    def decide(self, task: Task, rules: RuleSet) -> Decision:
        """Take the likeliest option, the first of equal ones.

        Scores are log-probabilities, differences of them, or votes. A model does not
        say by which rule it chose: ``fired`` has those that speak by their structured
        form.

        Raises:
            ValueError: the task has more options than there are letters.
        """
        return self.decide_all([task], rules)[0]

    def decide_all(self, tasks: Sequence[Task], rules: RuleSet) -> list[Decision]:
        """:meth:`decide` for many tasks, which a local model reads in batches."""
        with self._counting():
            scores = self._scores(tasks, rules.to_text())
        return [
            Decision.highest(found, rules.fired(task))
            for task, found in zip(tasks, scores, strict=True)
        ]

    def _scores(self, tasks: Sequence[Task], known: str) -> list[list[float]]:
        scores = self.model.score_all(
            [
                (prompts.choice(t, known, self.by), prompts.answers(t, self.by))
                for t in tasks
            ]
        )
        if not self.calibrated or not known:
            return scores
        return raised(scores, self._scores(tasks, ""))

    def _rules(self, prompt: str, known: RuleSet) -> RuleSet:
        rules, notes = read_rules(
            self._complete(prompt, _RULES_TOKENS), self.vocabulary
        )
        self.notes += notes
        self.usage.problems += len(notes) or not rules
        counted = {rule.claim: rule for rule in known}
        return (
            RuleSet(tuple(counted.get(r.claim, r) for r in rules)) if rules else known
        )

    def _complete(self, prompt: str, max_tokens: int) -> str:
        with self._counting():
            return self.model.complete(prompt, max_tokens=max_tokens)

    @contextmanager
    def _counting(self) -> Iterator[None]:
        """Count what the model uses, even where it fails."""
        before = replace(self.model.usage)
        try:
            yield
        finally:
            self.usage.add(self.model.usage - before)


@dataclass(kw_only=True)
class PromptedUser(SimulatedUser):
    """A simulated user whose answers a model writes, from the hidden rules.

    Reactions and corrections are a :class:`ftlib.clipr.users.SimulatedUser`'s: what is
    right stays exact. So do errors: there are none in the answers but the model's own.

    Attributes:
        model: plays the user.
    """

    model: TextModel

    def answer(self, question: Question) -> Answer | None:
        """Have an answer written, and see which of the question's values it names."""
        if self.silent:
            return None
        self.turns += 1
        prompt = prompts.answer(question, self.preferences)
        text = self.model.complete(prompt, max_tokens=_QUESTION_TOKENS, stop=["\n\n"])
        text = " ".join(text.split())
        named = read_choice(text, question.values)
        if named is not None:
            return Answer(text, question.values[named])
        indifferent = bool(_INDIFFERENT.search(text))
        self.model.usage.problems += bool(question.values) and not indifferent
        return Answer(text, indifferent=indifferent)


# --- what is made of a reply ----------------------------------------------------------


def read_question(reply: str) -> str:
    """Return the first line of a reply that has words, without marks around it."""
    lines = (_MARKS.sub("", line).strip(' \t*_`"') for line in reply.splitlines())
    return next((line for line in lines if re.search(r"\w", line)), "")


def understood(text: str, examples: Sequence[Task]) -> Question:
    """Find out what a question is about.

    A dimension is meant if its name is in the text, or two of its values. If that is
    one dimension, the question has the values that are named, or all of them, and a
    family if one is named. Otherwise it is open.

    Args:
        text: the question.
        examples: tasks whose names may be in it.
    """
    names = Vocabulary.of(examples)
    values = {d: _named(found, text) for d, found in names.values.items()}
    meant = [d for d in values if _named([d], text) or len(values[d]) > 1]
    if len(meant) != 1 or len(names.values[meant[0]]) < 2:
        return Question(text)
    dimension = meant[0]
    families = _named(names.families, text)
    family = families[0] if len(families) == 1 else ""
    chosen = (
        values[dimension] if len(values[dimension]) > 1 else names.values[dimension]
    )
    return Question(text, family, dimension, tuple(chosen))


def _named(names: Iterable[str], text: str) -> list[str]:
    """Return the names that are in a text as words, in either case."""
    return [
        name
        for name in names
        if re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text, re.IGNORECASE)
    ]


def read_rules(
    reply: str, vocabulary: Vocabulary | None = None
) -> tuple[list[Rule], list[str]]:
    """Read the rules in a reply, line by line.

    Args:
        reply: text of a model. Empty lines and marks around lines are left out.
        vocabulary: the names that may occur; ``None`` for any.

    Returns:
        The rules, each once, and the lines that are none.
    """
    rules: dict[Rule, None] = {}
    notes = []
    for line in reply.splitlines():
        words = _MARKS.sub("", line).rstrip(" \t*_`")
        if not re.search(r"\w", words):
            continue
        try:
            rules[parse_rule(words, vocabulary)] = None
        except RuleError:
            notes.append(line)
    return list(rules), notes
