"""Chain arithmetic modulo 11, and solvers who are mistaken in a systematic way.

A question such as ``3 * 8 + 5 - 2 * 7`` is worked from left to right, modulo 11, with
operands from 1 to 10. Its solution lists the value after every operation, and the last
once more as the answer: ``2 7 5 2 A 2``. A misconception replaces some results of one
operation by wrong ones. A question is a *gap* where that makes the answer wrong, and
*no gap* where no step meets the misconception; the few that meet it unharmed are
neither.

All texts are words between spaces and line ends, one word for every token of a tiny
model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt

from ftlib.cft.critiques import WORDS
from ftlib.cft.solutions import CHAIN, Solution, Step
from ftlib.splits import Split, split_of
from ftlib.words import WordVocabulary, words_in

Kind = Literal["gap", "no-gap", "any"]
Integers = npt.NDArray[np.int64]
Booleans = npt.NDArray[np.bool_]

MODULUS = 11
LENGTH = 4
OPERATIONS = "+-*"
QUESTIONS = MODULUS * (len(OPERATIONS) * (MODULUS - 1)) ** LENGTH
"""How many questions there are: 8,910,000."""

_BATCH = 8192
_PATIENCE = 50


class Misconception(NamedTuple):
    """One operation done wrongly in some cases.

    Attributes:
        operation: ``+``, ``-`` or ``*``.
        meets: whether it concerns a value and an operand.
        result: what it gives for them, before the modulus.
    """

    operation: str
    meets: Callable[[int, int], bool]
    result: Callable[[int, int], int]


MISCONCEPTIONS: Mapping[str, Misconception] = MappingProxyType(
    {
        "short factor": Misconception(
            "*", lambda value, a: a >= 7, lambda value, a: value * (a - 1)
        ),
        "turned difference": Misconception(
            "-", lambda value, a: a >= 7, lambda value, a: a - value
        ),
        "carry of ten": Misconception(
            "+", lambda value, a: value + a >= MODULUS, lambda value, a: value + a - 10
        ),
    }
)
"""By name. Several given to a function hold together, the first that meets a case."""

SHORT_FACTOR = ("short factor",)
"""The chapter's misconception: multiplying by a ≥ 7 is done as by a − 1."""


@dataclass(frozen=True)
class Chains:
    """Questions as integers.

    Attributes:
        start: first values [n], from 0 to 10.
        operations: indices into ``OPERATIONS`` [n, 4].
        operands: [n, 4], from 1 to 10.
    """

    start: Integers
    operations: Integers
    operands: Integers

    def __len__(self) -> int:
        return len(self.start)

    def __getitem__(self, rows: Integers | Booleans | slice) -> Chains:
        return Chains(self.start[rows], self.operations[rows], self.operands[rows])

    def questions(self) -> list[str]:
        """Their texts."""
        signs = [
            [f" {sign} {operand}" for operand in range(MODULUS)] for sign in OPERATIONS
        ]
        rows = zip(
            self.start.tolist(),
            self.operations.tolist(),
            self.operands.tolist(),
            strict=True,
        )
        return [
            str(start)
            + "".join(signs[o][a] for o, a in zip(ops, operands, strict=True))
            for start, ops, operands in rows
        ]


def numbered(codes: Integers) -> Chains:
    """Return the questions with some numbers [n], from 0 to ``QUESTIONS`` − 1."""
    bases = (MODULUS, *[len(OPERATIONS)] * LENGTH, *[MODULUS - 1] * LENGTH)
    digits = np.stack(np.unravel_index(codes, bases), axis=1)
    return Chains(digits[:, 0], digits[:, 1 : LENGTH + 1], digits[:, LENGTH + 1 :] + 1)


def solve(chains: Chains, misconceptions: Sequence[str] = ()) -> Integers:
    """Work questions out.

    Args:
        chains: n questions.
        misconceptions: names of what the solver gets wrong; none for a right solver.

    Returns:
        The value after every operation, [n, 4].

    Raises:
        ValueError: there is no such misconception.
    """
    return _work(chains, _results(misconceptions))


def slip(chains: Chains, seed: int) -> Integers:
    """Work questions out with one accident each, at a random step by a random amount.

    The rest is right, so that the answer is always wrong.

    Returns:
        The value after every operation, [n, 4].
    """
    rng = np.random.default_rng(seed)
    accident = np.zeros(chains.operands.shape, np.int64)
    step = rng.integers(LENGTH, size=len(chains))
    accident[np.arange(len(chains)), step] = rng.integers(1, MODULUS, size=len(chains))
    return _work(chains, _results(()), accident)


def attempt(
    chains: Chains,
    mistaken: float,
    seed: int,
    misconceptions: Sequence[str] = SHORT_FACTOR,
) -> Integers:
    """Work each question out by a solver who is mistaken with some probability.

    Args:
        chains: n questions.
        mistaken: probability that a question's solver has the misconceptions; another
            one is right.
        seed: of the choice.
        misconceptions: their names.

    Returns:
        The value after every operation, [n, 4].

    Raises:
        ValueError: no probability, or no such misconception.
    """
    if not 0 <= mistaken <= 1:
        raise ValueError(f"mistaken must be a probability, not {mistaken}")
    chosen = np.random.default_rng(seed).random(len(chains)) < mistaken
    return np.where(chosen[:, None], solve(chains, misconceptions), solve(chains))


def is_gap(chains: Chains, misconceptions: Sequence[str] = SHORT_FACTOR) -> Booleans:
    """Where the misconceptions make the answer wrong, [n]."""
    differs: Booleans = solve(chains, misconceptions)[:, -1] != solve(chains)[:, -1]
    return differs


def is_no_gap(chains: Chains, misconceptions: Sequence[str] = SHORT_FACTOR) -> Booleans:
    """Where no step meets a misconception, [n]."""
    values = solve(chains)
    before = np.column_stack([chains.start, values[:, :-1]])
    met = _met(misconceptions)[chains.operations, before, chains.operands]
    return np.logical_not(met.any(axis=1, keepdims=True))[:, 0]


def sample(
    n: int,
    split: Split,
    kind: Kind,
    seed: int,
    misconceptions: Sequence[str] = SHORT_FACTOR,
) -> Chains:
    """Draw different questions of one split and kind, uniformly.

    Args:
        n: how many.
        split: as :func:`ftlib.splits.split_of` assigns questions.
        kind: with or without a gap, or any question at all.
        seed: of the draw.
        misconceptions: what makes a gap.

    Raises:
        ValueError: there are not that many, or no such kind or misconception.
    """
    rng = np.random.default_rng(seed)
    chosen: dict[int, None] = {}
    in_vain = 0
    while len(chosen) < n:
        before = len(chosen)
        codes = rng.integers(QUESTIONS, size=_BATCH)
        codes = codes[_is_kind(numbered(codes), kind, misconceptions)]
        texts = numbered(codes).questions()
        pairs = zip(codes.tolist(), texts, strict=True)
        chosen |= {code: None for code, text in pairs if split_of(text) == split}
        in_vain = in_vain + 1 if len(chosen) == before else 0
        if in_vain == _PATIENCE:
            raise ValueError(
                f"found {before} of {n} {kind!r} questions in {split!r} "
                f"for {misconceptions}"
            )
    return numbered(np.array(list(chosen)[:n], np.int64))


def solutions(chains: Chains, values: Integers) -> list[Solution]:
    """Write out n solutions.

    Args:
        chains: n questions.
        values: the value after every operation [n, 4], right or wrong.
    """
    steps = [Step(str(value), str(value)) for value in range(MODULUS)]
    return [
        Solution(question, tuple(steps[value] for value in row), str(row[-1]))
        for question, row in zip(chains.questions(), values.tolist(), strict=True)
    ]


def _is_kind(chains: Chains, kind: Kind, misconceptions: Sequence[str]) -> Booleans:
    if kind == "gap":
        return is_gap(chains, misconceptions)
    if kind == "no-gap":
        return is_no_gap(chains, misconceptions)
    if kind == "any":
        return np.ones(len(chains), bool)
    raise ValueError(f"no kind {kind!r}: choose one of {get_args(Kind)}")


_ANSWER = re.compile(r"((?:\d+ )+)" + re.escape(CHAIN.answer_mark) + r"(\d+)")


def read(question: str, text: str) -> Solution:
    """Read what a model wrote; another form gives an empty solution, which is wrong."""
    found = _ANSWER.fullmatch(text.strip())
    if not found:
        return Solution(question, (), "")
    steps = tuple(Step(value, value) for value in found[1].split())
    return Solution(question, steps, found[2])


class Vocabulary(WordVocabulary):
    """The tokens of a tiny model: numbers, signs, critiques' words, and a prompt's.

    Args:
        prompts: texts whose words get tokens of their own.
    """

    def __init__(self, prompts: Iterable[str] = ()) -> None:
        numbers = [str(value) for value in range(MODULUS)]
        own = ["\n", *numbers, *OPERATIONS, CHAIN.answer_mark.strip(), *WORDS]
        super().__init__(own + [word for text in prompts for word in words_in(text)])


def _work(
    chains: Chains, results: Integers, accident: Integers | None = None
) -> Integers:
    """Look every step up in a table of results, and add its accident, if any."""
    value, values = chains.start, []
    for step in range(LENGTH):
        value = results[chains.operations[:, step], value, chains.operands[:, step]]
        if accident is not None:
            value = (value + accident[:, step]) % MODULUS
        values.append(value)
    return np.stack(values, axis=1)


def _results(names: Sequence[str]) -> Integers:
    """A solver as a table: operation × value × operand → result, [3, 11, 11]."""
    value, operand = np.ogrid[:MODULUS, :MODULUS]
    results = np.stack([value + operand, value - operand, value * operand]) % MODULUS
    for name in reversed(names):
        rule = _rule(name)
        for case in np.argwhere(_met([name])).tolist():
            results[tuple(case)] = rule.result(*case[1:]) % MODULUS
    return results


def _met(names: Sequence[str]) -> Booleans:
    """Which cases some misconception concerns: operation × value × operand."""
    met = np.zeros((len(OPERATIONS), MODULUS, MODULUS), bool)
    for rule in map(_rule, names):
        operation = OPERATIONS.index(rule.operation)
        for value, operand in np.ndindex(MODULUS, MODULUS):
            met[operation, value, operand] |= rule.meets(value, operand)
    return met


def _rule(name: str) -> Misconception:
    if name not in MISCONCEPTIONS:
        raise ValueError(
            f"no misconception {name!r}: choose among {', '.join(MISCONCEPTIONS)}"
        )
    return MISCONCEPTIONS[name]
