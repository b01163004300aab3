r"""From answers to rules: a Bradley–Terry model of few attributes, rounded.

The paper has a language model turn the conversation into rules. This is what does it
without one, and is ours. Every answer says that something is better than something
else. With :math:`x` the attributes of the better less those of the worse one, each
twice, for all families and for the answer's own, the utilities :math:`\beta` minimise

.. math:: \lVert\beta\rVert_1 + C \sum_i \log(1 + e^{-x_i \cdot \beta}),

so a preference is one for all families unless a family speaks against it, and an
attribute that explains nothing has none. Values that differ by enough become rules.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.special import expit

from ftlib.clipr.conversation import Answer, History, Question
from ftlib.clipr.rules import Rule, RuleSet
from ftlib.clipr.settings import SynthesisSettings

Floats = npt.NDArray[np.float64]
Utilities = Mapping[str, float]  # of the values of a dimension

_STEPS = 5000
_TOLERANCE = 1e-9


class Comparison(NamedTuple):
    """Something was preferred over something else.

    Attributes:
        family: of the task or the question.
        better: attributes of what was preferred.
        worse: attributes of what was not.
        equal: neither is better: it does not matter.
    """

    family: str
    better: Mapping[str, str]
    worse: Mapping[str, str]
    equal: bool = False


def comparisons(history: History) -> list[Comparison]:
    """Return what the answers of a conversation say."""
    return [c for turn in history.answered for c in compared(*turn)]


def compared(question: Question, answer: Answer) -> list[Comparison]:
    """Return what an answer says: the preferred value is better than each other."""
    family, choices = question.family, question.choices
    if answer.indifferent:
        pairs = combinations(choices, 2)
        return [Comparison(family, *pair, equal=True) for pair in pairs]
    if answer.value not in question.values:
        return []
    at = question.values.index(answer.value)
    others = choices[:at] + choices[at + 1 :]
    return [Comparison(family, choices[at], other) for other in others]


# --- utilities ----------------------------------------------------------------


class Preferences(NamedTuple):
    """Utilities of values, for all families and for each.

    Attributes:
        common: utility by value, by dimension.
        own: the same in a family, with what is common, by dimension, by family; only
            of values that were compared there.
    """

    common: Mapping[str, Utilities]
    own: Mapping[str, Mapping[str, Utilities]]


def fit(observed: Sequence[Comparison], settings: SynthesisSettings) -> Preferences:
    """Fit utilities to comparisons.

    A family in which something does not matter, and nothing else was said of it, has
    equal utilities there, whatever is common.
    """
    decided = [c for c in observed if not c.equal]
    columns: dict[tuple[str | None, str, str], int] = {}
    for family, dimension, value in _compared_values(decided):
        for whose in (None, family):
            columns.setdefault((whose, dimension, value), len(columns))
    x = np.zeros((len(decided), len(columns)))
    for row, c in enumerate(decided):
        for side, sign in ((c.better, 1.0), (c.worse, -1.0)):
            for item in side.items():
                for whose, scale in ((None, 1.0), (c.family, settings.family_scale)):
                    if (whose, *item) in columns:
                        x[row, columns[whose, *item]] += sign * scale
    beta = lasso_bradley_terry(x, settings.inverse_penalty)
    common: dict[str, dict[str, float]] = {}
    own: dict[str, dict[str, dict[str, float]]] = {}
    for family, dimension, value in _compared_values(decided):
        shared = float(beta[columns[None, dimension, value]])
        deviation = settings.family_scale * beta[columns[family, dimension, value]]
        common.setdefault(dimension, {})[value] = shared
        there = own.setdefault(dimension, {}).setdefault(family, {})
        there[value] = shared + float(deviation)
    said = {(dimension, family) for dimension in own for family in own[dimension]}
    for family, dimension, value in _compared_values([c for c in observed if c.equal]):
        if (dimension, family) not in said:
            common.setdefault(dimension, {}).setdefault(value, 0.0)
            own.setdefault(dimension, {}).setdefault(family, {})[value] = 0.0
    return Preferences(common, own)


def _compared_values(observed: Iterable[Comparison]) -> list[tuple[str, str, str]]:
    """Return family, dimension and value of what comparisons tell apart, once each."""
    found: dict[tuple[str, str, str], None] = {}
    for c in observed:
        for dimension, value in (*c.better.items(), *c.worse.items()):
            if c.better.get(dimension) != c.worse.get(dimension):
                found[c.family, dimension, value] = None
    return list(found)


def lasso_bradley_terry(x: Floats, c: float) -> Floats:
    """Minimise ‖β‖₁ + C Σ log(1 + exp(−x·β)) by accelerated proximal gradient.

    Args:
        x: features of the better less those of the worse, (n, features).
        c: C, more than 0.

    Returns:
        β, (features,).
    """
    beta = ahead = np.zeros(x.shape[1])
    if not x.any():
        return beta
    curvature = c * np.linalg.norm(x, 2) ** 2 / 4
    momentum = 1.0
    for _ in range(_STEPS):
        slope = -c * x.T @ expit(-x @ ahead)
        moved = ahead - slope / curvature
        new = np.sign(moved) * np.maximum(np.abs(moved) - 1 / curvature, 0)
        faster = (1 + np.sqrt(1 + 4 * momentum**2)) / 2
        ahead = new + (momentum - 1) / faster * (new - beta)
        change, beta, momentum = np.abs(new - beta).max(), new, faster
        if change < _TOLERANCE:
            break
    return beta


# --- rules --------------------------------------------------------------------


def synthesise(
    history: History, rules: RuleSet, settings: SynthesisSettings
) -> RuleSet:
    """Return rules that follow from the answers, with those of before that may stay.

    Args:
        history: the conversation.
        rules: those there are; one with more answers against it than for it goes.
        settings: of the model and its rounding.
    """
    return rules_from(comparisons(history), rules, settings)


def rules_from(
    observed: Sequence[Comparison], rules: RuleSet, settings: SynthesisSettings
) -> RuleSet:
    """:func:`synthesise` from comparisons, wherever they come from."""
    found = rounded(fit(observed, settings), settings.threshold)
    claims = {rule.claim for rule in found}
    kept = [rule for rule in rules if rule.claim not in claims]
    counted = [counts(rule, observed) for rule in (*found, *kept)]
    return RuleSet(
        tuple(
            replace(rule, support=rule.support + agree, against=rule.against + differ)
            for rule, (agree, differ) in zip((*found, *kept), counted, strict=True)
            if agree >= differ
        )
    )


def counts(rule: Rule, observed: Iterable[Comparison]) -> tuple[int, int]:
    """Return how many comparisons agree with a rule and how many do not."""
    opinions = [
        rule.compare(c.family, c.better, c.worse) for c in observed if not c.equal
    ]
    return opinions.count(1), opinions.count(-1)


def rounded(preferences: Preferences, threshold: float) -> list[Rule]:
    """Turn utilities into rules.

    Args:
        preferences: for all families and for each.
        threshold: differences below it are none.
    """
    return [
        rule
        for dimension, utilities in preferences.common.items()
        for rule in _of_dimension(
            dimension, utilities, preferences.own[dimension], threshold
        )
    ]


def _of_dimension(
    dimension: str,
    common: Utilities,
    own: Mapping[str, Utilities],
    threshold: float,
) -> list[Rule]:
    """Return rules for all families, with exceptions, and rules for those."""
    otherwise = {
        family: utilities
        for family, utilities in own.items()
        if _order(utilities, threshold)
        != _order({value: common[value] for value in utilities}, threshold)
    }
    if len(otherwise) == len(own):  # nobody agrees with what is common to all
        common = {}
    rules = [
        replace(rule, except_families=tuple(otherwise))
        for rule in _ranked(dimension, common, threshold)
    ]
    specific: dict[Rule, list[str]] = {}
    for family, utilities in otherwise.items():
        for rule in _ranked(dimension, utilities, threshold):
            specific.setdefault(rule, []).append(family)
    rules += [
        replace(rule, families=tuple(families)) for rule, families in specific.items()
    ]
    return rules


def _order(utilities: Utilities, threshold: float) -> set[tuple[str, str]]:
    """Return which value is better than which."""
    return {
        (a, b)
        for a in utilities
        for b in utilities
        if utilities[a] - utilities[b] >= threshold
    }


def _ranked(dimension: str, utilities: Utilities, threshold: float) -> list[Rule]:
    """Write utilities as rules, the strongest first: of two values as one over other.

    The weights of two rules over anything else differ by what the utilities do.
    """
    if not _order(utilities, threshold):
        return []
    falling = sorted(utilities, key=lambda value: -utilities[value])
    lowest = utilities[falling[-1]]
    over = falling[-1] if len(falling) == 2 else None
    return [
        Rule(dimension, value, over, weight=round(utilities[value] - lowest, 1))
        for value in falling
        if utilities[value] - lowest >= threshold
    ]
