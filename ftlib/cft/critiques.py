"""Critiques written by rule, in four forms, for any task's solutions.

Every critique ends with one line that gives the verdict, in one wording for all tasks:
``Conclusion: right`` or ``Conclusion: wrong``. It is the wording that the paper asks
its teacher for, without the ``[END]`` that the end-of-sequence token makes needless.
Before that line stands

=============  ==================================================================
``verdict``    nothing
``locate``     the first wrong step
``fix``        the first wrong step, and that step corrected
``rederive``   the whole solution once more, right, as the task writes an answer
=============  ==================================================================

A response is compared with the reference step by step, so it must take the reference's
route. It is right if all its steps and its answer are. A response without steps is
wrong, even one that guessed the answer.
"""

from __future__ import annotations

from itertools import zip_longest
from typing import Literal, get_args

from ftlib.cft.solutions import Solution, Step, Style

Form = Literal["verdict", "locate", "fix", "rederive"]
Verdict = Literal["right", "wrong"]

_VERDICT = "Conclusion: {}"
_ALL_RIGHT = "Every step is right."
_NO_STEPS = "There are no steps."
_MISSING = "Step {} is missing."
_WRONG_STEP = "Step {} is wrong: {}"
_WRONG_ANSWER = "The answer is wrong: {}"
_NO_ANSWER = "The answer is missing."
_CORRECTION = "It should be: {}"

WORDS = tuple(
    " ".join(
        [
            _VERDICT.format("right wrong"),
            _ALL_RIGHT,
            _NO_STEPS,
            _MISSING.format(""),
            _WRONG_STEP.format("", ""),
            _WRONG_ANSWER.format(""),
            _NO_ANSWER,
            _CORRECTION.format(""),
        ]
    ).split()
)
"""Every word of these sentences, some more than once, for a tiny model's vocabulary."""


def write_critique(
    form: Form, response: Solution, reference: Solution, style: Style
) -> str:
    """Criticise a response by rule.

    Args:
        form: how much the critique says before its verdict.
        response: what is criticised.
        reference: a right solution of the same question.
        style: how the task writes solutions.

    Returns:
        One line or several, the last of them the verdict.

    Raises:
        ValueError: the two solve different questions, the reference has no steps, or
            there is no such form.
    """
    if form not in get_args(Form):
        raise ValueError(f"no form {form!r}: choose one of {get_args(Form)}")
    verdict = _VERDICT.format("right" if is_right(response, reference) else "wrong")
    if form == "verdict":
        return verdict
    if form == "rederive":
        return f"{reference.text(style)}\n{verdict}"
    lines = [_location(response, reference, style)]
    if form == "fix" and not is_right(response, reference):
        lines.append(_correction(response, reference, style))
    return "\n".join([*lines, verdict])


def write_wrong_critique(
    form: Form,
    response: Solution,
    reference: Solution,
    mistaken: Solution,
    style: Style,
) -> str:
    """Write the critique of a teacher who would have solved the question wrongly.

    Such a teacher calls a response with the same mistake right, and a right response
    wrong; the re-derivation repeats the mistake.

    Args:
        form: as for :func:`write_critique`.
        response: what is criticised.
        reference: a right solution.
        mistaken: the teacher's own.
        style: how the task writes solutions.

    Raises:
        ValueError: as for :func:`write_critique`, or the critique would not be wrong: a
            mistaken teacher can still say the right thing, such as the verdict on
            another mistake.
    """
    critique = write_critique(form, response, mistaken, style)
    if critique == write_critique(form, response, reference, style):
        raise ValueError(
            f"this teacher's {form!r} critique of the response to "
            f"{response.question!r} is right: give another mistaken solution"
        )
    return critique


def is_right(response: Solution, reference: Solution) -> bool:
    """Whether every step and the answer of a response are the reference's.

    Raises:
        ValueError: the two solve different questions, or the reference has no steps.
    """
    same_answer = response.answer == reference.answer
    return first_wrong_step(response, reference) is None and same_answer


def first_wrong_step(response: Solution, reference: Solution) -> int | None:
    """Find the first step that claims something else than the reference's.

    Returns:
        Its index from 0. A missing step counts where it should stand, and so does one
        too many. None if all are right.

    Raises:
        ValueError: the two solve different questions, or the reference has no steps.
    """
    if response.question != reference.question:
        raise ValueError(
            f"the response is to {response.question!r}, "
            f"but the reference to {reference.question!r}"
        )
    if not reference.steps:
        raise ValueError(f"the reference to {reference.question!r} has no steps")
    claims = zip_longest(_claims(response), _claims(reference))
    return next((i for i, (ours, theirs) in enumerate(claims) if ours != theirs), None)


def read_verdict(critique: str) -> Verdict | None:
    """Read the last line; None where it is no verdict, as in a truncated critique."""
    last = critique.rstrip().rpartition("\n")[2]
    if last == _VERDICT.format("right"):
        return "right"
    return "wrong" if last == _VERDICT.format("wrong") else None


def _claims(solution: Solution) -> list[str]:
    return [step.claim for step in solution.steps]


def _location(response: Solution, reference: Solution, style: Style) -> str:
    """Say where a response first goes wrong, or that it does not."""
    index = first_wrong_step(response, reference)
    if index is not None:
        return _wrong_step(response.steps, index)
    if response.answer == reference.answer:
        return _ALL_RIGHT
    if not response.answer:
        return _NO_ANSWER
    return _WRONG_ANSWER.format(style.answer_mark + response.answer)


def _wrong_step(steps: tuple[Step, ...], index: int) -> str:
    if not steps:
        return _NO_STEPS
    if index == len(steps):
        return _MISSING.format(index + 1)
    return _WRONG_STEP.format(index + 1, steps[index].text)


def _correction(response: Solution, reference: Solution, style: Style) -> str:
    """Say what belongs where a response first goes wrong."""
    index = first_wrong_step(response, reference)
    if index is None or index == len(reference.steps):
        return _CORRECTION.format(style.answer_mark + reference.answer)
    return _CORRECTION.format(reference.steps[index].text)
