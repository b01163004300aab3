"""The answer in a model's text: where it stands, what it says, what it equals."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Literal, NamedTuple

from ftlib.metrics.exact import UnreadableError, Value, ratio
from ftlib.metrics.notation import Answer, Collection, Relation, Word, read

Rule = Literal["boxed", "hashes", "phrase", "number"]

MAX_MATCHED = 200  # items of a set or a list, which are compared pair by pair

_BRACES = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)
_HASHES = re.compile(r"####[ \t]*(\S[^\n]*)")
_PHRASE = re.compile(r"\banswer(?:\s+is\b|\s*:|\s*=)(?:\*\*)?\s*:?\s*", re.IGNORECASE)
_SENTENCE_END = re.compile(r"[.!?](?=\s|\*|$)|,\s+(?:because|since|so|as|which)\b")
_MATH = re.compile(r"(?:\*\*)?\$([^$\n]+)\$(?!\d)")
_NUMBER = re.compile(
    r"""(?a)
    (?:(?<![\w)\]}.])[-−])?                                # a sign, not a minus
    (?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<!\d)\.\d+  # 1,234.5 or .5
    """,
    re.VERBOSE,
)
_NUMBER_TAIL = re.compile(
    r"""(?a)
    (?:[eE][-+]?\d{1,9}(?!\w)
    |\s{0,3}(?:\\times|×|\\cdot)\s{0,3}10\s{0,3}\^\s{0,3}(?:\{\s{0,3}[-−]?\d{1,9}\s{0,3}\}|[-−]?\d{1,9})
    |/\d+(?:\.\d+)?(?![/\d]))
    """,
    re.VERBOSE,
)


class Found(NamedTuple):
    """An answer as it stands in a text, and the rule that found it."""

    text: str
    rule: Rule


def find_answer(text: str) -> Found | None:
    r"""Find the final answer in a text.

    The first rule that finds anything decides, whether or not what it finds can be
    read:

    1. ``boxed``: the inside of the last ``\boxed{...}`` that closes, matched by braces;
    2. ``hashes``: the rest of the line after the last ``####``;
    3. ``phrase``: what follows the last "answer is", "answer:" or "answer =", up to the
       end of the formula or the sentence;
    4. ``number``: the last number, with its sign, fraction or power of ten. The weakest
       rule: in "x^2" it finds 2.

    An empty box, line or phrase is none. Takes time linear in the text's length.

    Returns:
        What was found; ``None`` if there is no answer.

    >>> find_answer(r"Half of them, so \boxed{\frac{1}{2}}.")
    Found(text='\\frac{1}{2}', rule='boxed')
    """
    boxed = last_boxed(text)
    if boxed is not None:
        return Found(boxed, "boxed")
    hashes = _last(_HASHES, text)
    if hashes:
        return Found(hashes[1].strip(), "hashes")
    phrase = _last_phrase(text)
    if phrase:
        return Found(phrase, "phrase")
    number = _last_number(text)
    return None if number is None else Found(number, "number")


def last_boxed(text: str) -> str | None:
    r"""The inside of the last ``\boxed{...}`` that closes and is not empty."""
    opened: list[tuple[int, bool]] = []
    best: tuple[int, int] | None = None
    for mark in _BRACES.finditer(text):
        if mark[0].endswith("{") and mark[0] != r"\{":
            opened.append((mark.end(), mark[0] != "{"))
        elif mark[0] == "}" and opened:
            start, box = opened.pop()
            later = best is None or start > best[0]
            if box and later and text[start : mark.start()].strip():
                best = (start, mark.start())
    return None if best is None else text[best[0] : best[1]].strip()


def _last(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    found = None
    for found in pattern.finditer(text):  # noqa: B007  # the last one is wanted
        pass
    return found


def _last_phrase(text: str) -> str | None:
    lead = _last(_PHRASE, text)
    if lead is None:
        return None
    formula = _MATH.match(text, lead.end())
    if formula:
        return formula[1].strip()
    line = text[lead.end() :].partition("\n")[0]
    return _SENTENCE_END.split(line, maxsplit=1)[0].strip()


def _last_number(text: str) -> str | None:
    number, at = None, 0
    while found := _NUMBER.search(text, at):
        tail = _NUMBER_TAIL.match(text, found.end())
        at = tail.end() if tail else found.end()
        number = text[found.start() : at]
    return number


def parse_answer(text: str) -> Answer | None:
    """Read an answer as an exact value; ``None`` if it cannot be read.

    The rules are those of :mod:`ftlib.metrics.notation`, whose :func:`~.notation.read`
    says why a text cannot be read.
    """
    try:
        return read(text)
    except UnreadableError:
        return None


def equal(
    answer: Answer, reference: Answer, relative_tolerance: float | Fraction = 0
) -> bool:
    """Whether an answer is the reference.

    Brackets and order count, except that sets and bare lists have no order. ``x = 5``
    is ``5``, and two equations are equal if one is a multiple of the other.

    Args:
        answer: what was given.
        reference: what is right.
        relative_tolerance: how far a number may be from the reference, as a share of
            the reference. For references that are rounded measurements only; a
            reference of zero is always exact.

    Raises:
        UnreadableError: the two are too large to compare.

    >>> equal(parse_answer("0.5"), parse_answer("1/2"))
    True
    """
    if isinstance(answer, Relation) or isinstance(reference, Relation):
        return _equal_relations(answer, reference, relative_tolerance)
    if isinstance(answer, Value) and isinstance(reference, Value):
        return answer == reference or _near(answer, reference, relative_tolerance)
    if isinstance(answer, Collection) and isinstance(reference, Collection):
        return _equal_collections(answer, reference, relative_tolerance)
    both_words = isinstance(answer, Word) and isinstance(reference, Word)
    return both_words and answer == reference


def _near(answer: Value, reference: Value, tolerance: float | Fraction) -> bool:
    if not tolerance:
        return False
    given, right = answer.approximate(), reference.approximate()
    if given is None or right is None:
        return False
    return abs(given - right) <= Fraction(tolerance) * abs(right)


def _equal_relations(
    answer: Answer, reference: Answer, tolerance: float | Fraction
) -> bool:
    if isinstance(answer, Relation) and isinstance(reference, Relation):
        if answer.sign != reference.sign:
            return False
        if answer.difference is not None and reference.difference is not None:
            factor = ratio(answer.difference, reference.difference)
            directed = answer.sign in ("<", r"\le")
            return factor is not None and (factor > 0 or not directed)
    left = answer.assigned if isinstance(answer, Relation) else answer
    right = reference.assigned if isinstance(reference, Relation) else reference
    return left is not None and right is not None and equal(left, right, tolerance)


def _equal_collections(
    answer: Collection, reference: Collection, tolerance: float | Fraction
) -> bool:
    if answer.brackets != reference.brackets:
        return False
    if len(answer.items) != len(reference.items):
        return False
    if answer.ordered:
        pairs = zip(answer.items, reference.items, strict=True)
        return all(equal(a, b, tolerance) for a, b in pairs)
    if len(answer.items) > MAX_MATCHED:
        raise UnreadableError(f"more than {MAX_MATCHED} items without order")
    left = list(reference.items)
    for item in answer.items:
        match = next((b for b in left if equal(item, b, tolerance)), None)
        if match is None:
            return False
        left = [b for b in left if b is not match]
    return True
