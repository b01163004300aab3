"""One loader for each data set.

The loaders of mathematical problems agree on two fields: ``question``, and
``reference``, the right answer alone, which is what :func:`ftlib.metrics.grade` takes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal, TypedDict, get_args

from ftlib.data.reading import read_jsonl
from ftlib.data.registry import fetch
from ftlib.metrics.answers import last_boxed

Gsm8kSplit = Literal["train", "test"]


class Problem(TypedDict):
    """A mathematical problem.

    Attributes:
        question: the problem's text.
        solution: a worked solution; empty where the set has none.
        reference: the right answer alone.
        topic: the field, course or kind of problem; empty where the set has none.
    """

    question: str
    solution: str
    reference: str
    topic: str


class MathProblem(Problem):
    """A problem of MATH-500, with its ``level`` from 1 (easiest) to 5."""

    level: int


def gsm8k(split: Gsm8kSplit) -> list[dict[str, str]]:
    """Load GSM8K: 7,473 questions to train on, 1,319 to test with.

    Returns:
        Rows of ``question``, ``answer`` and ``reference``; an answer's last line is
        ``#### NUMBER``, its calculations are annotated as ``<<3*4=12>>``, and the
        reference is that number.

    Raises:
        ValueError: there is no such split.
        DataUnavailable: the file is nowhere to be found.
        DataCorrupt: the file is damaged or altered.
    """
    if split not in get_args(Gsm8kSplit):
        raise ValueError(f"GSM8K has no split {split!r}: choose train or test")
    rows = read_jsonl(fetch(f"math/gsm8k/{split}.jsonl"))
    return [
        {**row, "reference": row["answer"].rpartition("#### ")[2].strip()}
        for row in rows
    ]


def math500() -> list[MathProblem]:
    """Load MATH-500: 500 test problems of MATH, the competition mathematics set.

    References are LaTeX: numbers, expressions, intervals, matrices, words.

    Raises:
        DataUnavailable: the file is nowhere to be found.
        DataCorrupt: the file is damaged or altered.
    """
    return [
        {
            "question": row["problem"],
            "solution": row["solution"],
            "reference": row["answer"],
            "topic": row["subject"],
            "level": row["level"],
        }
        for row in read_jsonl(fetch("math/math-500/test.jsonl"))
    ]


def minerva() -> list[Problem]:
    r"""Load Minerva's 272 university problems, from MIT OpenCourseWare courses.

    The reference is the content of the solution's one ``\boxed{...}``. Many are
    measurements rounded to two or three figures: grade this set with a stated
    ``relative_tolerance``. For evaluation only.

    Raises:
        DataUnavailable: the file is nowhere to be found.
        DataCorrupt: the file is damaged or altered.
    """
    return [
        {
            "question": row["problem"],
            "solution": row["solution"],
            "reference": last_boxed(row["solution"]) or "",
            "topic": row["type"],
        }
        for row in read_jsonl(fetch("math/minerva_math/test.jsonl"))
    ]


def amc23() -> list[Problem]:
    """Load AMC 2023: 40 competition problems, all with whole answers.

    For evaluation only. With 40 problems, one is 2.5 points.

    Raises:
        DataUnavailable: the file is nowhere to be found.
        DataCorrupt: the file is damaged or altered.
    """
    return [
        {
            "question": row["problem"],
            "solution": "",
            "reference": _number(row["answer"]),
            "topic": "",
        }
        for row in read_jsonl(fetch("math/amc23/test.jsonl"))
    ]


def svamp() -> list[Problem]:
    """Load SVAMP: 1,000 word problems of one or two steps.

    The solution is an expression such as ``( 76.0 - 25.0 )``. One reference is not what
    its expression gives (Rachel's apples: 1 for 5); it is left as published. The file
    has no split of its own.

    Raises:
        DataUnavailable: the file is nowhere to be found.
        DataCorrupt: the file is damaged or altered.
    """
    return [
        {
            "question": f"{row['Body'].rstrip(' .')}. {row['Question']}",
            "solution": row["Equation"],
            "reference": _number(row["Answer"]),
            "topic": row["Type"],
        }
        for row in _read_array(fetch("svamp/SVAMP.json"))
    ]


def _read_array(path: Path) -> list[dict]:
    """Rows of a file that is one JSON array."""
    rows: list[dict] = json.loads(path.read_text(encoding="utf-8"))
    return rows


def _number(number: float) -> str:
    """A number as people write it: 27.0 is 27."""
    return str(int(number)) if number == int(number) else repr(number)
