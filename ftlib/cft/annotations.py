"""Real solutions: GSM8K answers corrupted by rule through their annotations.

An answer of GSM8K annotates its calculations, one a line at most::

    Janet sells 16 - 3 - 4 = <<16-3-4=9>>9 duck eggs a day.
    She makes 9 * 2 = $<<9*2=18>>18 every day at the farmer's market.
    #### 18

:func:`corrupt` changes one calculation and lets the wrong value run on through later
calculations, the prose and the answer. A number in a text does not say where it comes
from. So an item is refused where a later number could have come from the wrong result
or from elsewhere, such as the question. :func:`worked` takes the annotations out, so
that a solution reads as the prose it is.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from decimal import Decimal
from fractions import Fraction
from functools import cached_property
from typing import Literal, NamedTuple, get_args

import numpy as np

from ftlib.cft.solutions import Solution, Step

Kind = Literal["result", "operator", "operand"]
KINDS: tuple[Kind, ...] = get_args(Kind)

MAX_EXPRESSION = 100
"""Longest arithmetic expression, in characters; this bounds its depth and values."""

_ANNOTATION = re.compile(r"<<([^<>\n]*)=([^<>=\n]*)>>")
_FINAL = re.compile(r"\n#### *(\S+)\s*\Z")
_TOKEN = re.compile(r"\s*(\d*\.\d+|\d+|[-+*/()])")
_LITERAL = re.compile(r"\d*\.\d+|\d+")
_NUMBER = re.compile(r"\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d*\.\d+|\d+")
# Ordinals and times of day, in which a number cannot simply be replaced.
_BOUND = re.compile(r"(?:st|nd|rd|th)\b|:\d")
_OPEN_EQUATION = re.compile(r"=(?!\s*\$?\s*<<)")
# How prose writes an operation.
_SIGNS = {
    "+": r"\+",
    "-": "[-–−]",
    "*": r"\*|×|(?<![A-Za-z])[xX](?![A-Za-z])",
    "/": "[/÷]",
}
# What prose puts between numbers and signs, such as units.
_UNITS = r"(?:[^\d=+*/×÷<>\n–−-]|/(?=[a-z])|(?<=[a-z])-(?=[a-z])){0,40}?"

_CARDINALS = {
    word: Fraction(value)
    for value, word in [
        *enumerate(
            "zero one two three four five six seven eight nine ten eleven twelve "
            "thirteen fourteen fifteen sixteen seventeen eighteen nineteen".split()
        ),
        *zip(
            range(20, 100, 10),
            "twenty thirty forty fifty sixty seventy eighty ninety".split(),
            strict=True,
        ),
        (100, "hundred"),
        (1000, "thousand"),
    ]
}
# Numbers that a word brings into a calculation, without saying them.
_IMPLIED = {
    r"half|halves|twice|doubl\w*|pairs?|couple|both|two": [2],
    r"thirds?|thrice|tripl\w*|three": [3],
    r"quarters?|fourths?|quadrupl\w*": [4, 25],
    r"fifths?|nickels?": [5],
    r"sixths?|sevenths?|eighths?|ninths?|tenths?": [6, 7, 8, 9, 10],
    r"dimes?|decades?": [10],
    r"dozens?|feet|foot|inch(?:es)?": [12],
    r"days?|daily|night\w*": [5, 7, 24, 30],
    r"week\w*": [4, 5, 7, 52],
    r"months?|monthly": [4, 12, 30, 31],
    r"years?|yearly|annual\w*|age|old": [12, 52, 365],
    r"hours?|hourly|minutes?|seconds?": [24, 60, 3600],
    r"yards?": [3, 36],
    r"pounds?|ounces?|cups?|quarts?|gallons?|pints?": [4, 8, 16],
    r"kilo\w*|km|kg|meters?|cm|liters?|ml": [10, 1000],
    r"cents?|pennies|penny|dollars?|percent\w*": [100],
}
_EVERYWHERE = frozenset(map(Fraction, (0, 1, 2, 100)))


class RefusedError(ValueError):
    """An answer that cannot be corrupted without guessing; the message says why."""


class Number(NamedTuple):
    """A number in a text: where it starts and ends, and its value."""

    start: int
    end: int
    value: Fraction


class Calculation(NamedTuple):
    """One annotation ``<<expression=result>>``, with positions in the answer.

    Attributes:
        line: where its line starts.
        start: of the expression.
        equals: of the ``=`` before the result.
        end: of the result.
        value: of the result.
    """

    line: int
    start: int
    equals: int
    end: int
    value: Fraction


class Corruption(NamedTuple):
    """An answer with one wrong calculation and all that follows from it.

    Attributes:
        kind: what went wrong: the ``result`` of a right expression, one ``operator`` of
            it or one ``operand``.
        annotated: the whole answer with its annotations. They all check, but for a
            wrong ``result``.
        response: the same, as prose.
        reference: the right answer, as prose.
    """

    kind: Kind
    annotated: str
    response: Solution
    reference: Solution


def evaluate(expression: str) -> Fraction:
    """Compute +, −, ·, / and parentheses over decimal numbers, exactly.

    Raises:
        ValueError: it is not such an expression, is longer than ``MAX_EXPRESSION``
            characters or divides by zero.
    """
    if len(expression) > MAX_EXPRESSION:
        raise ValueError(
            f"an expression of {len(expression)} characters, more than "
            f"{MAX_EXPRESSION}: {expression[:20]!r}…"
        )
    return _Arithmetic(expression).value()


def calculations(answer: str) -> list[Calculation]:
    """Parse the annotations of an answer.

    Raises:
        ValueError: a result is not arithmetic.
    """
    return [
        Calculation(
            line=answer.rfind("\n", 0, found.start()) + 1,
            start=found.start(1),
            equals=found.end(1),
            end=found.end(2),
            value=evaluate(found[2]),
        )
        for found in _ANNOTATION.finditer(answer)
    ]


def checks(answer: str, calculation: Calculation) -> bool:
    """Whether a result is exactly its expression's value.

    Raises:
        ValueError: the expression is not arithmetic.
    """
    expression = answer[calculation.start : calculation.equals]
    return evaluate(expression) == calculation.value


def worked(question: str, answer: str) -> Solution:
    """Read an answer: every line is a step, which claims its annotation's result.

    Raises:
        ValueError: the answer does not end with a line ``#### ANSWER``.
    """
    body, final = _divided(answer)
    steps = []
    for line in body.split("\n"):
        found = _ANNOTATION.search(line)
        steps.append(Step(_ANNOTATION.sub("", line), found[2] if found else ""))
    return Solution(question, tuple(steps), final[1])


def corrupt(
    question: str, answer: str, seed: int, kinds: Sequence[Kind] = KINDS
) -> Corruption:
    """Make one calculation of an answer wrong, and carry the wrong value on.

    Args:
        question: as GSM8K gives it.
        answer: as GSM8K gives it, with annotations.
        seed: of the choice of a kind, a calculation and a change.
        kinds: what may go wrong.

    Raises:
        RefusedError: every possible change leads to something ambiguous or strange.
    """
    item = _Item(question, answer)
    rng = np.random.default_rng(seed)
    reasons: Counter[str] = Counter()
    for kind in rng.permutation(kinds).tolist():
        changes = _changes(item, kind)
        for index in rng.permutation(len(changes)):
            try:
                annotated = _carried_on(item, *changes[index])
            except RefusedError as refusal:
                reasons[str(refusal)] += 1
                continue
            reference = worked(question, answer)
            return Corruption(kind, annotated, worked(question, annotated), reference)
    raise RefusedError(
        max(reasons, key=lambda reason: reasons[reason], default="no such change")
    )


def corrupt_all(
    rows: Iterable[Mapping[str, str]], seed: int, kinds: Sequence[Kind] = KINDS
) -> tuple[list[Corruption], Counter[str]]:
    """Corrupt what can be corrupted.

    Args:
        rows: ``question`` and ``answer``, as :func:`ftlib.data.gsm8k` loads them.
        seed: as for :func:`corrupt`; every row has one of its own that follows from it.
        kinds: what may go wrong.

    Returns:
        The corruptions, and how many rows were refused for which reason.
    """
    done, refused = [], Counter[str]()
    for index, row in enumerate(rows):
        try:
            done.append(corrupt(row["question"], row["answer"], seed + index, kinds))
        except RefusedError as refusal:
            refused[str(refusal)] += 1
    return done, refused


class _Arithmetic:
    """Recursive descent: sum → product → signed → number or parenthesis."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.tokens = _TOKEN.findall(text)
        # The tokens must cover the text: what is left out is no arithmetic.
        if "".join(self.tokens) != re.sub(r"\s", "", text):
            raise self._error("it has other signs than numbers, + - * / and ( )")
        self.position = 0

    def value(self) -> Fraction:
        value = self._sum()
        if self._next():
            raise self._error(f"it goes on with {self._next()!r}")
        return value

    def _sum(self) -> Fraction:
        value = self._product()
        while sign := self._take("+-"):
            value += self._product() if sign == "+" else -self._product()
        return value

    def _product(self) -> Fraction:
        value = self._signed()
        while sign := self._take("*/"):
            factor = self._signed()
            if sign == "/" and not factor:
                raise self._error("it divides by zero")
            value = value * factor if sign == "*" else value / factor
        return value

    def _signed(self) -> Fraction:
        sign = 1
        while taken := self._take("+-"):
            sign = -sign if taken == "-" else sign
        return sign * self._atom()

    def _atom(self) -> Fraction:
        if self._take("("):
            value = self._sum()
            if not self._take(")"):
                raise self._error("a parenthesis is not closed")
            return value
        token = self._next()
        if not _LITERAL.fullmatch(token):
            raise self._error(f"a number is missing before {token or 'its end'!r}")
        self.position += 1
        return Fraction(token)

    def _next(self) -> str:
        if self.position == len(self.tokens):
            return ""
        token: str = self.tokens[self.position]
        return token

    def _take(self, signs: str) -> str:
        token = self._next()
        if not token or token not in signs:
            return ""
        self.position += 1
        return token

    def _error(self, problem: str) -> ValueError:
        return ValueError(f"{self.text!r} is not arithmetic: {problem}")


_Span = tuple[int, int]
_Edits = dict[_Span, str]
"""What replaces the text between two positions of an answer."""


class _Item:
    """An answer with all that is known about its numbers."""

    def __init__(self, question: str, answer: str) -> None:
        self.question, self.answer = question, answer
        self.body, self.final = _divided(answer)
        try:
            self.calculations = calculations(answer)
            right = all(checks(answer, each) for each in self.calculations)
        except ValueError as error:
            raise RefusedError("an annotation is not arithmetic") from error
        if not right:
            raise RefusedError("an annotation does not check")
        if not self.calculations:
            raise RefusedError("there are no annotations")
        if not _NUMBER.fullmatch(self.final[1].removeprefix("-")):
            raise RefusedError("the answer is not a number")
        self.results = {each.value for each in self.calculations}

    @cached_property
    def given(self) -> set[Fraction]:
        """Numbers that may stand in a solution with no calculation before."""
        numbers = {number.value for number in _numbers(self.question)}
        return numbers | _cardinals(self.question) | _implied(self.question)

    @cached_property
    def prose(self) -> list[Number]:
        """The numbers outside the annotations and the last line."""
        return _numbers(_blanked(self.body))

    @cached_property
    def shown(self) -> list[Number | None]:
        """Each calculation's result, as the prose repeats it right after."""
        numbers = {number.start: number for number in self.prose}
        found = []
        for each in self.calculations:
            after = self.answer[each.end + len(">>") :].lstrip(" $")
            number = numbers.get(len(self.answer) - len(after))
            found.append(number if number and number.value == each.value else None)
        return found

    def text(self, span: _Span) -> str:
        """What the answer has there."""
        return self.answer[span[0] : span[1]]

    def literals(self, index: int) -> list[Number]:
        """The numbers of an expression."""
        each = self.calculations[index]
        return _numbers(self.answer, _LITERAL, each.start, each.equals)

    def mentions(self, index: int) -> list[Number]:
        """Where the prose has a result's value, from its line on, but no result."""
        each = self.calculations[index]
        return [
            number
            for number in self.prose
            if number.value == each.value
            and number.start >= each.line
            and number not in self.shown
        ]

    def in_open_equation(self, number: Number) -> bool:
        """Whether a number's line has an equation that no annotation covers."""
        start = self.answer.rfind("\n", 0, number.start) + 1
        line = self.answer[start : self.answer.index("\n", number.end)]
        _, _, line = line.rpartition(">>") if number in self.shown else ("", "", line)
        return bool(_OPEN_EQUATION.search(_ANNOTATION.sub("<<", line)))

    def is_used(self, index: int) -> bool:
        """Whether a later calculation has a result's value as an operand."""
        return any(
            literal.value == self.calculations[index].value
            for later in range(index + 1, len(self.calculations))
            for literal in self.literals(later)
        )

    def known(self, index: int) -> set[Fraction]:
        """Numbers with a source that is no unseen calculation after some result."""
        line = self.calculations[index].line
        before = {number.value for number in self.prose if number.start < line}
        return self.given | self.results | before

    def stood_before(self, index: int) -> bool:
        """Whether a result's value was there before it: given, mentioned or used."""
        each = self.calculations[index]
        before = [number for number in self.prose if number.start < each.line]
        for earlier in range(index + 1):
            before += self.literals(earlier)
        return each.value in self.given.union(number.value for number in before)


def _changes(item: _Item, kind: Kind) -> list[tuple[int, _Edits, Fraction]]:
    """List all first mistakes: in which calculation, by which edits, its value."""
    found: list[tuple[int, _Edits, Fraction]] = []
    for index, each in enumerate(item.calculations):
        if kind == "result":
            found += [(index, {}, value) for value in _slips(each.value)]
            continue
        for edits in _other_operations(item, index, kind):
            try:
                value = _recalculated(item, index, edits)
            except RefusedError:
                continue
            if value != each.value:
                found.append((index, edits, value))
    return found


def _slips(value: Fraction) -> list[Fraction]:
    """Values near a result: off by one or two in its last digits that are not zeros."""
    unit = Fraction(1)
    while value and value % (10 * unit) == 0:
        unit *= 10
    return [value + shift * unit for shift in (-10, -2, -1, 1, 2, 10)]


def _other_operations(item: _Item, index: int, kind: Kind) -> Iterator[_Edits]:
    """Replace one sign or one number of an expression, in the prose before it too."""
    known = [number.value for number in _numbers(item.question)]
    known += [each.value for each in item.calculations[:index]]
    numbers = [text for value in dict.fromkeys(known) if (text := _plain(value))]
    for here, there in _shown_expression(item, index):
        old = item.text(here)
        if kind == "operator" and old in _SIGNS:
            yield from ({here: sign, there: sign} for sign in _SIGNS if sign != old)
        if kind == "operand" and _LITERAL.fullmatch(old):
            for text in numbers:
                shown = _like(item.text(there), Fraction(text))
                yield {here: text, there: shown}


def _shown_expression(item: _Item, index: int) -> list[tuple[_Span, _Span]]:
    """Match an expression's numbers and signs with the prose right before it.

    Returns:
        Their places in the annotation and in the prose; nothing where the prose shows
        the calculation in another way.
    """
    each = item.calculations[index]
    parts = list(_TOKEN.finditer(item.answer, each.start, each.equals))
    patterns = [
        f"({_NUMBER.pattern if _LITERAL.fullmatch(part[1]) else _sign(part[1])})"
        for part in parts
    ]
    line = item.answer[each.line : each.start - len("<<")]
    found = re.search(_UNITS.join(patterns) + _UNITS + r"=\s*\$?\s*$", line)
    if not found:
        return []
    pairs = []
    for group, part in enumerate(parts, start=1):
        if _LITERAL.fullmatch(part[1]) and _value(found[group]) != _value(part[1]):
            return []
        first, last = found.span(group)
        pairs.append((part.span(1), (each.line + first, each.line + last)))
    return pairs


def _sign(text: str) -> str:
    return _SIGNS.get(text, re.escape(text))


def _carried_on(item: _Item, index: int, first: _Edits, value: Fraction) -> str:
    """Put a wrong calculation into an answer, with all that follows from it.

    Raises:
        RefusedError: what follows is not clear, is strange, or is nothing.
    """
    changed = {index: _writable(item, index, value)}
    edits = dict(first)
    for later in range(index + 1, len(item.calculations)):
        _use(item, later, edits, changed)
    final = _value(item.final[1])
    sources = [i for i, each in enumerate(item.calculations) if each.value == final]
    if not sources:
        raise RefusedError("the answer is no annotation's result")
    if sources[-1] not in changed:
        raise RefusedError("the answer does not follow from the wrong value")
    for each in changed:
        _rewrite(item, each, edits, changed)
    edits[item.final.span(1)] = _like(item.final[1], changed[sources[-1]])
    return _edited(item.answer, edits, 0, len(item.answer))


def _use(item: _Item, index: int, edits: _Edits, changed: dict[int, Fraction]) -> None:
    """Do a later calculation with the wrong values, and note it if it becomes wrong."""
    wrong = {item.calculations[i].value: value for i, value in changed.items()}
    literals = item.literals(index)
    unknown = {literal.value for literal in literals} - item.known(min(changed))
    if unknown & _relatives(wrong):
        raise RefusedError("a later number may be the wrong value in another form")
    if any(value.denominator == 1 for value in unknown):
        raise RefusedError("a later number has no known source")
    own = [literal for literal in literals if literal.value in wrong]
    for start, end, value in own:
        edits[start, end] = _like(item.text((start, end)), wrong[value])
    if own:
        value = _writable(item, index, _recalculated(item, index, edits))
        if value != item.calculations[index].value:
            changed[index] = value


def _recalculated(item: _Item, index: int, edits: _Edits) -> Fraction:
    """The value of an expression after some edits."""
    each = item.calculations[index]
    try:
        return evaluate(_edited(item.answer, edits, each.start, each.equals))
    except ValueError as error:
        raise RefusedError("the wrong value cannot be calculated with") from error


def _writable(item: _Item, index: int, value: Fraction) -> Fraction:
    """A value that can stand in place of a result without looking strange."""
    each = item.calculations[index]
    if value <= 0:
        raise RefusedError("a wrong value would not be positive")
    if each.value.denominator == 1 != value.denominator:
        raise RefusedError("a whole number would become a fraction")
    decimals = max(2, _decimals(item.text((each.equals + 1, each.end))))
    if (value * 10**decimals).denominator != 1:
        raise RefusedError("a wrong value would have to be rounded")
    return value


def _rewrite(
    item: _Item, index: int, edits: _Edits, changed: Mapping[int, Fraction]
) -> None:
    """Write a wrong result wherever the answer has the right one."""
    each, new = item.calculations[index], changed[index]
    shown, mentions = item.shown[index], item.mentions(index)
    if shown is None:
        raise RefusedError("the prose does not show a result")
    if each.value in _cardinals(_blanked(item.body)[each.line :]):
        raise RefusedError("a result is mentioned in words")
    if mentions or item.is_used(index):
        twins = (
            i for i, other in enumerate(item.calculations) if other.value == each.value
        )
        if item.stood_before(index) or any(changed.get(i) != new for i in twins):
            raise RefusedError("a later number may have another source")
    if any(item.in_open_equation(number) for number in (shown, *mentions)):
        raise RefusedError("a result enters a calculation without annotation")
    if any(_BOUND.match(item.answer, number.end) for number in mentions):
        raise RefusedError("a result is mentioned in an ordinal or a time")
    places = [(number.start, number.end) for number in (shown, *mentions)]
    for place in ((each.equals + 1, each.end), *places):
        edits[place] = _like(item.text(place), new)


def _divided(answer: str) -> tuple[str, re.Match[str]]:
    """An answer up to its last line, and that line, whose group 1 is the number."""
    found = _FINAL.search(answer)
    if not found:
        raise ValueError(f"an answer ends with a line '#### …', not {answer[-20:]!r}")
    return answer[: found.start()], found


def _blanked(body: str) -> str:
    """The prose alone, every character in its place."""
    return _ANNOTATION.sub(lambda found: " " * len(found[0]), body)


def _edited(text: str, edits: Mapping[_Span, str], start: int, end: int) -> str:
    """A part of a text, after those edits that lie in it."""
    pieces, position = [], start
    for (first, last), new in sorted(edits.items()):
        if start <= first and last <= end:
            pieces += [text[position:first], new]
            position = last
    return "".join([*pieces, text[position:end]])


def _numbers(
    text: str,
    pattern: re.Pattern[str] = _NUMBER,
    start: int = 0,
    end: int | None = None,
) -> list[Number]:
    found = pattern.finditer(text, start, len(text) if end is None else end)
    return [Number(*number.span(), _value(number[0])) for number in found]


def _cardinals(text: str) -> set[Fraction]:
    """The numbers that a text names in words: ``twenty-five`` is 20, 5 and 25."""
    found: set[Fraction] = set()
    tens = Fraction(0)
    for word in re.findall("[a-z]+", text.lower()):
        value = _CARDINALS.get(word)
        if value is not None:
            found |= {value, tens + value}
        tens = value if value and 20 <= value <= 90 else Fraction(0)
    return found


def _implied(text: str) -> set[Fraction]:
    """The numbers that a text's words may bring into a calculation."""
    numbers = set(_EVERYWHERE)
    for words, values in _IMPLIED.items():
        if re.search(rf"\b(?:{words})\b", text, re.IGNORECASE):
            numbers |= set(map(Fraction, values))
    return numbers


def _relatives(values: Iterable[Fraction]) -> set[Fraction]:
    """What a value becomes as a percentage, in cents, or as what is left of a whole."""
    found: set[Fraction] = set()
    for value in values:
        share = value / 100
        found |= {share, 100 * value, 1 - share, 1 + share, 100 - value, 100 + value}
    return found


def _value(text: str) -> Fraction:
    return Fraction(text.replace(",", ""))


def _decimals(text: str) -> int:
    return len(text.partition(".")[2])


def _plain(value: Fraction) -> str:
    """A number as GSM8K's annotations write it; empty without a finite decimal."""
    decimals = next((d for d in range(9) if (value * 10**d).denominator == 1), None)
    return "" if decimals is None else f"{_decimal(value):.{decimals}f}"


def _like(text: str, value: Fraction) -> str:
    """A number in the manner of another: with its commas, and its cents if it has."""
    cents = 2 if _decimals(text) == 2 else 0
    decimals = max(cents, _decimals(_plain(value)))
    commas = "," if "," in text else ""
    return f"{_decimal(value):{commas}.{decimals}f}"


def _decimal(value: Fraction) -> Decimal:
    # Python 3.11 cannot format fractions.
    return Decimal(value.numerator) / value.denominator
