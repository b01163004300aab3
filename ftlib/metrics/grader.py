"""Grade models' texts against reference answers, exactly, and never hang on one."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from multiprocessing.connection import Connection
from typing import Literal, NamedTuple

from ftlib.metrics.answers import Rule, equal, find_answer
from ftlib.metrics.exact import UnreadableError
from ftlib.metrics.notation import read, tidy
from ftlib.runtime import progress

Reason = Literal[
    "equal",
    "same text",
    "different",
    "no answer",
    "unreadable answer",
    "unreadable reference",
    "timed out",
    "crashed",
]
Judge = Callable[[str, str], "Grade"]

START_SECONDS = 120  # a new Python on a busy machine


class Grade(NamedTuple):
    """What the grader decided.

    Attributes:
        correct: whether the answer is the reference.
        extracted: the answer as it stands in the text; ``None`` if there is none.
        reason: ``equal`` or ``different`` for two answers that could be read;
            ``same text`` for two that could not but are spelled the same. The others
            say why nothing could be compared, and then ``correct`` is false.
        rule: how the answer was found; ``None`` if none was.
    """

    correct: bool
    extracted: str | None
    reason: Reason
    rule: Rule | None = None


def grade(text: str, reference: str, relative_tolerance: float | Fraction = 0) -> Grade:
    """Find the answer in a text and compare it with the reference.

    Args:
        text: what a model wrote.
        reference: the right answer alone, as the loaders of :mod:`ftlib.data` give it
            in ``reference``.
        relative_tolerance: see :func:`ftlib.metrics.equal`; zero is exact.

    Returns:
        The grade. No text makes this raise.

    >>> grade("x = 2 + 3, so the answer is 5.", "5").correct
    True
    >>> grade("The answer is 50%.", "0.05")
    Grade(correct=False, extracted='50%', reason='different', rule='phrase')
    """
    found = find_answer(text)
    if found is None:
        return Grade(False, None, "no answer")
    correct, reason = _compare(found.text, reference, relative_tolerance)
    return Grade(correct, found.text, reason, found.rule)


def _compare(
    answer: str, reference: str, tolerance: float | Fraction
) -> tuple[bool, Reason]:
    try:
        right = read(reference)
    except UnreadableError:
        if _spelling(answer) == _spelling(reference):
            return True, "same text"
        return False, "unreadable reference"
    try:
        same = equal(read(answer), right, tolerance)
    except UnreadableError:
        return False, "unreadable answer"
    return same, "equal" if same else "different"


def _spelling(text: str) -> str:
    return "".join(tidy(text).split())


def published_rounding_rule(a: float, b: float) -> bool:
    """A pitfall, kept to show it: numbers are equal if they agree to one decimal.

    The grader published with CFT accepts this in a function that says two decimals
    (TIGER-AI-Lab/CritiqueFineTuning at 44b83b8, ``tools/evaluate_math``). It makes
    0.12 equal to 0.14 and 1.6e-5 to 1.9e-5. Nothing in ftlib grades with it.
    """
    return round(a, 1) == round(b, 1)


def grade_all(
    texts: Sequence[str],
    references: Sequence[str],
    *,
    seconds: float = 5.0,
    judge: Judge = grade,
) -> list[Grade]:
    """Grade many texts in a process of their own, each within a time limit.

    An item that runs out of time, or takes its process down, is graded ``timed out`` or
    ``crashed``; a new process goes on with the next. The process is spawned, so a
    script that calls this must do so under ``if __name__ == "__main__":``. Notebooks
    need nothing.

    Args:
        texts: what a model wrote, one text per problem.
        references: the right answers, in the same order.
        seconds: time limit for one item.
        judge: what grades one pair. It must be importable:
            ``functools.partial(grade, relative_tolerance=...)`` or a module's function,
            not a lambda and not a notebook's.

    Raises:
        ValueError: there are not as many texts as references, or no time is given.
        RuntimeError: the process did not start, or could not import the judge.
    """
    if seconds <= 0:
        raise ValueError(f"seconds is {seconds}: give each item some time")
    grades: list[Grade] = []
    pairs = list(zip(texts, references, strict=True))
    with progress(total=len(pairs), desc="grading", unit="answer") as bar:
        while len(grades) < len(pairs):
            with _worker(judge) as connection:
                for pair in pairs[len(grades) :]:
                    outcome = _ask(connection, pair, seconds)
                    grades.append(outcome)
                    bar.update()
                    if outcome.reason in ("timed out", "crashed"):
                        break  # that process is of no more use
    return grades


def _ask(connection: Connection, pair: tuple[str, str], seconds: float) -> Grade:
    try:
        connection.send(pair)
        if connection.poll(seconds):
            answer: Grade = connection.recv()
            return answer
    except (EOFError, OSError):
        return Grade(False, None, "crashed")
    return Grade(False, None, "timed out")


@contextmanager
def _worker(judge: Judge) -> Iterator[Connection]:
    """A process that grades the pairs sent to it; killed at the end."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, judge), daemon=True)
    process.start()
    theirs.close()  # so that the end of the process ends what is read from ours
    try:
        if not (ours.poll(START_SECONDS) and _ready(ours)):
            raise RuntimeError(
                "the grading process did not start: a script must call grade_all under "
                'if __name__ == "__main__":, and judge must be importable'
            )
        yield ours
    finally:
        process.kill()
        process.join()
        process.close()
        ours.close()


def _ready(connection: Connection) -> bool:
    try:
        return connection.recv() == "ready"
    except EOFError:
        return False


def _serve(connection: Connection, judge: Judge) -> None:
    connection.send("ready")
    while True:
        connection.send(judge(*connection.recv()))
