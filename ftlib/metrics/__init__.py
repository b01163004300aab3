"""Measures of what models write: an exact grader of mathematical answers."""

from ftlib.metrics.answers import (
    Found,
    equal,
    find_answer,
    last_boxed,
    parse_answer,
)
from ftlib.metrics.grader import Grade, grade, grade_all, published_rounding_rule

__all__ = [
    "Found",
    "Grade",
    "equal",
    "find_answer",
    "grade",
    "grade_all",
    "last_boxed",
    "parse_answer",
    "published_rounding_rule",
]
