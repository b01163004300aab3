"""Worked solutions, right or wrong, and how each task writes them."""

from __future__ import annotations

from typing import NamedTuple


class Style(NamedTuple):
    """How a task writes a solution.

    Attributes:
        separator: stands between two steps, and before the answer.
        answer_mark: announces the answer.
    """

    separator: str
    answer_mark: str


CHAIN = Style(" ", "A ")
EQUATION = Style("\n", "Answer: ")
GSM8K = Style("\n", "#### ")


class Step(NamedTuple):
    """One step of a solution.

    Attributes:
        text: as written, such as ``3*8=24``.
        claim: what it says it gives, such as ``24``; steps are compared by it.
    """

    text: str
    claim: str


class Solution(NamedTuple):
    """A question worked by anyone, right or wrong; without steps it may be empty."""

    question: str
    steps: tuple[Step, ...]
    answer: str

    def text(self, style: Style) -> str:
        """The steps and the answer as a task writes them; an empty one gives ``""``."""
        lines = [step.text for step in self.steps]
        if self.answer:
            lines.append(style.answer_mark + self.answer)
        return style.separator.join(lines)
