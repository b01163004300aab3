"""Linear equations a·x + b = c with integer solutions, and two misconceptions.

A question such as ``Solve 3x + 5 = 20.`` is worked in two steps::

    3x = 20 - 5 = 15
    x = 15 / 3 = 5
    Answer: 5

Under the misconception ``sign`` b is moved to the other side with the sign it had;
under ``difference`` the factor is taken away where one should divide by it. A mistaken
answer need not be an integer: it is then an exact fraction.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Literal, NamedTuple, get_args

import numpy as np

from ftlib.cft.solutions import Solution, Step
from ftlib.splits import Split, split_of

Misconception = Literal["sign", "difference"]

_FACTORS = range(2, 10)
_SHIFTS = [*range(-20, 0), *range(1, 21)]
_ROOTS = range(-10, 11)


class Equation(NamedTuple):
    """``factor·x + shift = factor·root + shift``."""

    factor: int
    shift: int
    root: int

    @property
    def total(self) -> int:
        """The right side."""
        return self.factor * self.root + self.shift

    @property
    def question(self) -> str:
        """The text."""
        return f"Solve {self.factor}x {_signed(self.shift)} = {self.total}."


def solve(equation: Equation, misconceptions: Sequence[Misconception] = ()) -> Solution:
    """Work an equation out.

    Args:
        equation: what is solved.
        misconceptions: what the solver gets wrong; none for a right solver.

    Raises:
        ValueError: there is no such misconception.
    """
    for name in misconceptions:
        if name not in get_args(Misconception):
            raise ValueError(
                f"no misconception {name!r}: choose among {get_args(Misconception)}"
            )
    factor, total = equation.factor, equation.total
    moved = equation.shift if "sign" in misconceptions else -equation.shift
    product = total + moved
    if "difference" in misconceptions:
        sign, root = "-", Fraction(product - factor)
    else:
        sign, root = "/", Fraction(product, factor)
    steps = (
        Step(f"{factor}x = {total} {_signed(moved)} = {product}", str(product)),
        Step(f"x = {product} {sign} {factor} = {root}", str(root)),
    )
    return Solution(equation.question, steps, str(root))


def is_gap(equation: Equation, misconceptions: Sequence[Misconception]) -> bool:
    """Whether the misconceptions make the answer wrong."""
    return solve(equation, misconceptions).answer != str(equation.root)


def equations() -> Iterator[Equation]:
    """All 6,720 of them: factors 2 to 9, shifts to ±20 but 0, roots to ±10."""
    for factor in _FACTORS:
        for shift in _SHIFTS:
            for root in _ROOTS:
                yield Equation(factor, shift, root)


def sample(n: int, split: Split, seed: int) -> list[Equation]:
    """Draw different equations of one split, uniformly.

    Args:
        n: how many.
        split: as :func:`ftlib.splits.split_of` assigns questions.
        seed: of the draw.

    Raises:
        ValueError: there are not that many.
    """
    all_of_it = [e for e in equations() if split_of(e.question) == split]
    if n > len(all_of_it):
        raise ValueError(f"{split!r} has {len(all_of_it)} equations, not {n}")
    chosen = np.random.default_rng(seed).permutation(len(all_of_it))[:n]
    return [all_of_it[index] for index in chosen]


def _signed(number: int) -> str:
    return f"{'-' if number < 0 else '+'} {abs(number)}"
