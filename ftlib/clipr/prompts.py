"""What models are asked, in our own words; the paper's prompts were not released.

Six prompts: one question to the user, rules from a conversation, better rules from
corrections, a choice between options, the options one by one, and the answer of a
simulated user. Each takes what is known and returns the whole text, so that a prompt
can be printed and read.

>>> mugs = tuple(Option(f"{m} mug", {"material": m}) for m in ("steel", "glass"))
>>> task = Task("t", "Two mugs on a shelf.", "Bring me something.", "mugs", mugs)
>>> print(choice(task, "Prefer material glass over plastic."))
A person asks for something, and several options would do. Choose the one that this
person likes best.
<BLANKLINE>
What is known of the person:
Prefer material glass over plastic.
<BLANKLINE>
Scene: Two mugs on a shelf.
Request: Bring me something. (mugs)
<BLANKLINE>
Options:
A. steel mug (material steel)
B. glass mug (material glass)
<BLANKLINE>
Answer with one option's letter alone.
Answer:
"""

from __future__ import annotations

import string
from collections.abc import Iterable, Mapping, Sequence
from itertools import repeat
from typing import Literal

from ftlib.clipr.conversation import History, Question
from ftlib.clipr.rules import RuleSet, Vocabulary
from ftlib.clipr.tasks import Correction, Option, Task

NOTHING_TO_ASK = "NONE"
"""What a model writes that has no question."""

YES = "yes"
"""The answer to :func:`offers` by whose probability options are told apart."""

By = Literal["letter", "name"]

_FORMS = """\
Write one rule on each line, in one of these forms:
Prefer DIMENSION VALUE over OTHER.
Prefer DIMENSION VALUE over anything else, except for FAMILY.
For FAMILY, prefer DIMENSION VALUE over OTHER.
A rule without a family holds for all of them. Write the rules and nothing else."""


def answers(task: Task, by: By = "letter") -> tuple[str, ...]:
    """Return what a model may answer to :func:`choice`, one for each option.

    Raises:
        ValueError: there are more options than letters.
    """
    if by == "name":
        return tuple(_line(option.name) for option in task.options)
    if len(task.options) > len(string.ascii_uppercase):
        raise ValueError(
            f"task {task.id!r} has {len(task.options)} options, and there are"
            f" {len(string.ascii_uppercase)} letters: leave some out, or ask by name"
        )
    return tuple(string.ascii_uppercase[: len(task.options)])


def choice(task: Task, known: str = "", by: By = "letter") -> str:
    """Ask for the option that a person would like best.

    Args:
        task: with at most 26 options, if letters stand for them.
        known: of the person, in words: rules, a conversation, examples.
        by: whether the answer is an option's letter or its name.

    Raises:
        ValueError: there are more options than letters.
    """
    marks = [f"{x}." for x in answers(task)] if by == "letter" else repeat("-")
    return _paragraphs(
        "A person asks for something, and several options would do. Choose the one"
        " that this person likes best.",
        _headed("What is known of the person:", known, "Nothing yet."),
        f"Scene: {_line(task.scene)}\nRequest: {_line(task.goal)} ({task.family})",
        "Options:\n"
        + "\n".join(
            f"{mark} {_described(option)}"
            for mark, option in zip(marks, task.options, strict=False)
        ),
        f"Answer with one option's {by} alone.\nAnswer:",
    )


def offers(task: Task, known: str = "") -> tuple[str, ...]:
    """Ask of each option whether a person would take it, in few words.

    The answer that counts is :data:`YES`. Here no option is compared with another: it
    is for a model that is trained to answer, or too small to read a list.

    Args:
        task: of which request, family and options are told, and not the scene.
        known: of the person, in words.
    """
    head = f"Request: {_line(task.goal)} ({task.family})"
    return tuple(
        _paragraphs(
            known.strip(),
            f"{head}\nWould this person take: {_described(option)}? Answer:",
        )
        for option in task.options
    )


def question(examples: Sequence[Task], history: History) -> str:
    """Ask for the next question to a person."""
    return _paragraphs(
        "You will choose for a person whose likes you do not know. In each of these"
        " tasks several options would do, and which is right depends on the person.",
        "\n".join(map(_listed, examples)),
        _headed("You have talked already:", _talk(history), "Not yet."),
        "Ask the one question whose answer helps most, in these tasks and in others."
        " Say what it is about in the words above. Write the question alone, or"
        f" {NOTHING_TO_ASK} if there is nothing left to ask.\nQuestion:",
    )


def rules(history: History, known: RuleSet, vocabulary: Vocabulary | None) -> str:
    """Ask for rules that follow from a conversation.

    Args:
        history: the conversation.
        known: rules that there are already.
        vocabulary: the names that rules may use; ``None`` for any.
    """
    return _paragraphs(
        "Here is a conversation with a person about what they like. Write what it"
        " tells as rules that also help in other tasks.",
        _headed("Conversation:", _talk(history), "None."),
        _headed("Rules so far:", known.to_text(), "None."),
        _names(vocabulary),
        f"{_FORMS} Repeat those of the rules so far that still hold.\nRules:",
    )


def revision(
    known: RuleSet, corrections: Iterable[Correction], vocabulary: Vocabulary | None
) -> str:
    """Ask for rules by which corrected choices come out right.

    Args:
        known: rules by which was chosen.
        corrections: to learn from; in some the choice may have been right.
        vocabulary: the names that rules may use; ``None`` for any.
    """
    return _paragraphs(
        "By these rules was chosen for a person, who then said what was wanted. Change"
        " the rules so that all of it comes out right, and as little as that takes.",
        _headed("Rules so far:", known.to_text(), "None."),
        "\n".join(map(_corrected, corrections)),
        _names(vocabulary),
        f"{_FORMS} Repeat those of the rules so far that still hold.\nRules:",
    )


def answer(asked: Question, likes: RuleSet) -> str:
    """Ask for the answer of a person with given rules.

    Args:
        asked: of the person.
        likes: the person's rules.
    """
    listed = " or ".join(asked.values)
    return _paragraphs(
        "Play a person, who likes things by these rules:",
        likes.to_text() or "Everything is as good as anything else.",
        f"You are asked: {_line(asked.text)}",
        "Answer in one short sentence, by the rules alone."
        + (f" Name one of these: {listed}." if listed else "")
        + " If they do not tell, say that it does not matter.\nAnswer:",
    )


def _paragraphs(*texts: str) -> str:
    return "\n\n".join(filter(None, texts))


def _headed(heading: str, text: str, otherwise: str) -> str:
    return f"{heading}\n{text.strip() or otherwise}"


def _line(text: str) -> str:
    """Return a text on one line, so that it cannot be taken for what is around it."""
    return " ".join(text.split())


def _talk(history: History) -> str:
    return "\n".join(
        f"Q: {_line(asked.text)}\nA: {_line(given.text)}"
        for asked, given in history.answered
    )


def _described(option: Option) -> str:
    return f"{_line(option.name)}{_attributes(option.attributes)}"


def _attributes(attributes: Mapping[str, str]) -> str:
    told = ", ".join(f"{name} {value}" for name, value in attributes.items())
    return f" ({_line(told)})" if told else ""


def _listed(task: Task) -> str:
    options = "; ".join(map(_described, task.options))
    return f"- {task.family}: {_line(f'{task.scene} {task.goal}')} Options: {options}."


def _corrected(correction: Correction) -> str:
    options = correction.task.options
    reason = _line(correction.reason)
    return (
        f"- {correction.task.family}: {_line(correction.task.goal)}"
        f" Chosen: {_described(options[correction.decided])}."
        f" Wanted: {_described(options[correction.chosen])}."
        + (f" Why: {reason}" if reason else "")
    )


def _names(vocabulary: Vocabulary | None) -> str:
    if vocabulary is None:
        return ""
    values = (f"{d} ({', '.join(names)})" for d, names in vocabulary.values.items())
    return (
        f"Families: {', '.join(vocabulary.families)}.\n"
        f"Dimensions and their values: {'; '.join(values)}."
    )
