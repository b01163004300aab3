r"""Read an answer, in plain text or LaTeX; nothing is evaluated as code.

A recursive-descent parser of a small language: numbers, fractions, roots, powers,
letters, elementary functions, tuples, intervals, sets, lists, unions, matrices,
equations and words. What it does not know it refuses with an
:class:`~ftlib.metrics.exact.UnreadableError`, and what can be read in two ways
(``1/2x``, ``f(2)``, ``2\frac{3}{2}``) it refuses too.

The rules on what is written around a value:

* Units are dropped, neither compared nor converted: ``\text{ cm}^2`` after a value,
  and up to five plain words after a number (``18 eggs``, ``7 km per hour``). The
  degree sign, the percent sign and the currency signs are units, so ``50%`` is 50 and
  not 1/2. Words that change a number (``million``, ``dozen``, ``half``) are refused.
* A comma between groups of three digits is a thousands separator, except inside
  brackets, where it separates: ``1,234`` is a number and ``(1,234)`` a pair.
* ``7 1/2`` and ``7\frac{1}{2}`` are mixed numbers.
* Letters multiply, but three or more that are the whole answer are a word. Four small
  ones inside an expression are refused.
* A single letter after a number is a factor, never a unit: ``300 K`` is not 300, while
  ``300 \mathrm{K}`` is.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from typing import NamedTuple, TypeAlias

from ftlib.metrics.exact import (
    EULER,
    IMAGINARY,
    PI,
    SIGN,
    UnreadableError,
    Value,
    call,
    power,
    rational,
    symbol,
)

MAX_LENGTH = 2_000  # characters of an answer
MAX_DEPTH = 40  # of nested groups
MAX_EXPONENT = 2_000  # of ten, in 1e5


class Word(NamedTuple):
    """An answer in words, in lower case."""

    text: str


class Collection(NamedTuple):
    """Several answers in one: tuple, interval, set, list, union or matrix.

    Attributes:
        brackets: ``()``, ``[)``, ... for tuples and intervals; ``{}`` for sets and for
            bare lists; ``union``, ``matrix``, ``row``.
        items: the answers inside; ``{}`` and ``union`` have no order.
    """

    brackets: str
    items: tuple[Answer, ...]

    @property
    def ordered(self) -> bool:
        """Whether the order of the items matters."""
        return self.brackets not in ("{}", "union")


class Relation(NamedTuple):
    r"""An equation or an inequality.

    Attributes:
        sign: ``=``, ``<``, ``\le`` or ``\ne``; the larger side is on the right.
        difference: right side minus left side; ``None`` if a side is no single value.
        assigned: the right side of ``x = ...``, where x is a letter absent from it.
    """

    sign: str
    difference: Value | None
    assigned: Answer | None


Answer: TypeAlias = Value | Word | Collection | Relation


def read(text: str) -> Answer:
    """Read an answer.

    Raises:
        UnreadableError: the text is not of the language, is ambiguous or is too large.
    """
    if len(text) > MAX_LENGTH:
        raise UnreadableError(f"longer than {MAX_LENGTH} characters")
    tidied = tidy(text)
    if not tidied:
        raise UnreadableError("empty")
    if _is_word(tidied):
        return Word(" ".join(tidied.lower().split()))
    return _Reader(tidied).answer()


_UNICODE = str.maketrans(
    {
        "−": "-",
        "×": r"\times ",
        "·": r"\cdot ",
        "⋅": r"\cdot ",
        "÷": "/",
        "π": r"\pi ",
        "√": r"\surd ",
        "∞": r"\infty ",
        "±": r"\pm ",
        "≤": r"\le ",
        "≥": r"\ge ",
        "≠": r"\ne ",
        "∪": r"\cup ",
        "∈": r"\in ",
        "°": "",
        "²": "^2",
        "³": "^3",
        "£": "",
        "€": "",
        "\u00a0": " ",
        "\u202f": " ",
    }
)

# In this order: each sees what those before it have left.
_TIDYING = [
    (r"(?<=\d)(\{,\}|,\s*\\!\s*|\\,)(?=\d{3})", ""),  # thousands, said in LaTeX
    (r"\\[$%]|[$%]|\\!|&nbsp;", ""),
    (r"\\left\s*\.|\\right\s*\.", ""),
    (r"\\(left|right|displaystyle|[bB]igg?[lr]?)(?![A-Za-z])", ""),
    (r"(?<!\\)\\[,;: ]|\\q?quad(?![A-Za-z])|~", " "),
    (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
    (r"\^\s*(\{\s*\\circ\s*\}|\\circ(?![A-Za-z]))|\\degree(?![A-Za-z])", ""),
    (r"\\lt(?![A-Za-z])", "<"),
    (r"\\gt(?![A-Za-z])", ">"),
    (r"\bnp\.", ""),  # Minerva has a reference in NumPy's notation
    (r"(?<=\d)\s*[xX]\s*(?=10\s*(\^|\*\*))", r"\\times "),
    (r"\\(text|mbox)\s*\{\s*,?\s*(and|or)\s*\}", ","),
    (r"(,\s*|\s)(and|or)\s+(?=[-\d\\(]|[A-Za-z]\s*=)", ","),
    (r",(\s*,)+", ","),
    (r"^\s*[A-Za-z]\s*\\in(?![A-Za-z])", ""),
    (r"^\s*([A-Za-z])\s*\(\s*[A-Za-z]\s*\)\s*(?==)", r"\1"),  # f(x) = ...
]
_WRAPPER = re.compile(r"(?a)\\(?:text|mbox|textbf|mathrm|mathbf|boxed)\s*\{([^{}]*)\}")
_BEFORE = " \t\r\n:*`"
_AFTER = _BEFORE + ".,;"


def tidy(text: str) -> str:
    """Normalise spelling: alternatives, spacing, currency and percent signs.

    Texts that cannot be read are compared in this form.
    """
    text = _trim(text.translate(_UNICODE))
    for opening, closing in ((r"\(", r"\)"), (r"\[", r"\]")):
        if text.startswith(opening) and text.endswith(closing):
            text = text[2:-2]
    for pattern, by in _TIDYING:
        text = re.sub(pattern, by, text)
    text = _trim(text)
    whole = _WRAPPER.fullmatch(text)
    return _trim(whole[1]) if whole else text


def _trim(text: str) -> str:
    return text.lstrip(_BEFORE).rstrip(_AFTER)


_DIGITS, _LETTERS = string.digits, string.ascii_letters
_FUNCTIONS = (
    "arcsin arccos arctan sinh cosh tanh sin cos tan cot sec csc ln log exp"
).split()
_NAMES = {"pi": PI, "infinity": r"\infty", "inf": r"\infty"}
_SYMBOLS = {rf"\{name}": rf"\{name}" for name in (
    "alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa "
    "lambda mu nu xi pi rho sigma tau upsilon phi varphi chi psi omega Gamma Delta "
    "Theta Lambda Xi Pi Sigma Upsilon Phi Psi Omega hbar ell infty emptyset"
).split()}  # fmt: skip
_ACCENTS = (r"\dot", r"\ddot", r"\vec", r"\hat", r"\bar", r"\tilde", r"\overline")
_TEXTS = (r"\text", r"\mbox", r"\mathrm", r"\textbf", r"\mathbf")
_SHORT_UNITS = "cm mm km kg mg ml mL ft lb oz hr in m/s km/h".split()
# Words after a number that make it another number.
_CHANGING = set(
    "hundred hundreds thousand thousands million millions billion billions trillion "
    "dozen dozens half halves third thirds quarter quarters fourth fourths fifth "
    "fifths sixth sixths seventh sevenths eighth eighths ninth ninths tenth tenths "
    "hundredth hundredths thousandth thousandths choose times plus minus over divided "
    "by multiplied squared cubed factorial root power less more fewer than mod base or "
    "and to not point negative zero one two three four five six seven eight nine ten "
    "twelve twenty either but through between except".split()
)

_WORDS = re.compile(r"(?a)[A-Za-z]+(?:[ ]+[A-Za-z]+)*")
_NUMBER = re.compile(r"(?a)(\d+)?(\.\d*)?([eE][+-]?\d+)?")
_GROUPED = re.compile(r"(?a)\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d*)?")
_MIXED = re.compile(
    r"(?a)\s*\\frac\s*(?:\{\s*(\d+)\s*\}|(\d))\s*(?:\{\s*(\d+)\s*\}|(\d))"
    r"|\s+(\d+)\s*/\s*(\d+)(?![\d.])"
)
_BASE = re.compile(r"(?a)\s*_\s*(?:\{\s*(\d+)\s*\}|(\d+))")
_COMMAND = re.compile(r"(?a)\\([A-Za-z]+|.)")
_NAMED = "|".join([*_FUNCTIONS, "sqrt", *_NAMES])
_NAME = re.compile(rf"({_NAMED})(?![a-z])")
_PRIME = re.compile(r"(?a)\s*('+|\^\s*(\{(\s*\\prime)+\s*\}|\\prime))")
_SHORT_UNIT = re.compile(rf"(?a)(?:{'|'.join(_SHORT_UNITS)})(?![A-Za-z])")
_LONG_UNIT = re.compile(r"(?a)[A-Za-z]{3}")
_UNIT_WORDS = re.compile(r"(?a)(?:[A-Za-z]++(?:/[A-Za-z]++)?[ ]*+){1,5}+(?![A-Za-z])")
_UNIT_GOES_ON = re.compile(r"(?a)\s*(/|\\cdot)?\s*(?=\\(text|mbox|mathrm)\b)")
_WORD_INSIDE = re.compile(r"(?a)[a-z]{4}")
_UNIT_POWER = re.compile(r"(?a)\s*\^\s*(\{\s*-?\d\s*\}|\d)")
_RELATION = re.compile(
    r"(?a)\s*(=|<=|>=|<|>|\\leq?(?![A-Za-z])|\\geq?(?![A-Za-z])|\\neq?(?![A-Za-z]))"
)
_SIGNS = {"<=": r"\le", ">=": r"\ge", r"\leq": r"\le", r"\geq": r"\ge", r"\neq": r"\ne"}
_FLIPPED = {">": "<", r"\ge": r"\le"}
_UNION = re.compile(r"(?a)\s*\\cup(?![A-Za-z])")
_TIMES = re.compile(r"(?a)\s*(\*(?!\*)|\\cdot(?![A-Za-z])|\\times(?![A-Za-z]))")
_OVER = re.compile(r"(?a)\s*(/|\\div(?![A-Za-z]))")
_DERIVATIVE = re.compile(r"(?a)\s*\{?\s*(d|\\partial)(?![a-z]{2})")


def _is_word(text: str) -> bool:
    """Whether letters are a word, and not a product: three of them in a row, or no."""
    if not _WORDS.fullmatch(text) or _NAME.match(text):
        return False
    return text.lower() == "no" or re.search(r"[A-Za-z]{3}", text) is not None


class _Reader:
    """The parser. A method per rule of the grammar moves ``at`` past what it read."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.depth = 0
        self.brackets = 0  # in which a comma separates, even between digits

    # --- characters

    def peek(self) -> str:
        """The next character that is no space; a null character at the end."""
        while self.at < len(self.text) and self.text[self.at].isspace():
            self.at += 1
        return self.text[self.at] if self.at < len(self.text) else "\0"

    def take(self, pattern: re.Pattern[str]) -> re.Match[str] | None:
        found = pattern.match(self.text, self.at)
        if found:
            self.at = found.end()
        return found

    def skip(self, expected: str) -> bool:
        """Move past a piece of text, if it comes next."""
        self.peek()
        if not self.text.startswith(expected, self.at):
            return False
        self.at += len(expected)
        return True

    def need(self, expected: str) -> None:
        if not self.skip(expected):
            raise self.error(f"expected {expected!r}")

    def command(self) -> str:
        """The LaTeX command that comes next, not moved past; ``""`` if none does."""
        self.peek()
        found = _COMMAND.match(self.text, self.at)
        return found[0] if found else ""

    def error(self, problem: str) -> UnreadableError:
        there = self.text[self.at : self.at + 20]
        return UnreadableError(
            f"{problem}, at {there!r}" if there else f"{problem}, at end"
        )

    @contextmanager
    def nested(self, brackets: bool = False) -> Iterator[None]:
        self.depth += 1
        self.brackets += brackets
        if self.depth > MAX_DEPTH:
            raise self.error(f"more than {MAX_DEPTH} groups inside one another")
        yield
        self.depth -= 1
        self.brackets -= brackets

    # --- collections and relations

    def answer(self) -> Answer:
        items = self.items()
        self.peek()
        if self.at < len(self.text):
            raise self.error("cannot go on")
        return items[0] if len(items) == 1 else Collection("{}", items)

    def items(self) -> tuple[Answer, ...]:
        """Answers separated by commas; a plus-minus sign makes two of one."""
        found = list(self.item())
        while self.skip(",") or self.skip(";"):
            found += self.item()
        return tuple(found)

    def item(self) -> tuple[Answer, ...]:
        left = self.union()
        relation = self.take(_RELATION)
        if not relation:
            return left.signs() if isinstance(left, Value) else (left,)
        right = self.union()
        if self.take(_RELATION):
            raise self.error("a chain of relations")
        sign = _SIGNS.get(relation[1], relation[1])
        return tuple(_relations(sign, left, right))

    def union(self) -> Answer:
        parts = [self.sum()]
        while self.take(_UNION):
            parts.append(self.sum())
        return parts[0] if len(parts) == 1 else Collection("union", tuple(parts))

    # --- arithmetic

    def sum(self) -> Answer:
        sign = self.sign()
        total = self.product()
        if sign is not None:
            total = sign * self.single(total)
        while (sign := self.sign()) is not None:
            total = self.single(total) + sign * self.single(self.product())
        return total

    def sign(self) -> Value | None:
        """Signs in front of a term, multiplied."""
        found = None
        signs = {"-": rational(-1), "+": rational(1), SIGN: symbol(SIGN)}
        signs[r"\mp"] = -symbol(SIGN)
        while True:
            mark = self.command() or self.peek()
            if mark not in signs:
                return found
            self.at += len(mark)
            found = signs[mark] if found is None else found * signs[mark]

    def product(self) -> Answer:
        total = self.power()
        divided = False
        while True:
            if self.take(_TIMES):
                total = self.single(total) * self.signed_power()
            elif self.take(_OVER):
                total = self.single(total) / self.signed_power()
                divided = True
            elif self.unit():
                self.single(total)
            elif self.starts_factor():
                if divided:
                    raise self.error("a/bc can be read in two ways")
                total = self.single(total) * self.single(self.power())
            else:
                return total

    def signed_power(self) -> Value:
        sign = self.sign()
        factor = self.single(self.power())
        return factor if sign is None else sign * factor

    def single(self, answer: Answer) -> Value:
        if not isinstance(answer, Value):
            raise self.error("a tuple, set or matrix inside arithmetic")
        return answer

    def starts_factor(self) -> bool:
        """Whether what comes next multiplies what was read, without a sign."""
        character = self.peek()
        if character == "\\":
            command = self.command()
            known = (
                *_SYMBOLS,
                *_ACCENTS,
                *_TEXTS,
                r"\frac",
                r"\sqrt",
                r"\surd",
                r"\operatorname",
            )
            return command in known or command[1:] in _FUNCTIONS
        if character in _DIGITS or character == ".":
            raise self.error("two numbers side by side")
        return character in _LETTERS or character in ("(", "{", "[")

    def power(self) -> Answer:
        base = self.primary()
        if self.skip("**") or self.skip("^"):
            with self.nested():
                return power(self.single(base), self.exponent())
        return base

    def exponent(self) -> Value:
        sign = self.sign() or rational(1)
        if self.peek() in _DIGITS:
            inside = rational(self.plain_number())
        else:
            inside = self.single(self.primary())
        if self.skip("^"):
            with self.nested():
                inside = power(inside, self.exponent())
        return sign * inside

    # --- what a term is made of

    def primary(self) -> Answer:
        character = self.peek()
        if character in _DIGITS or character == ".":
            return self.number()
        if character == "\\":
            return self.from_command()
        if character in ("(", "["):
            return self.bracketed()
        if character == "{":
            return self.group()
        if character in _LETTERS:
            return self.letter()
        raise self.error("expected a value")

    def group(self) -> Value:
        with self.nested():
            self.need("{")
            inside = self.single(self.union())
            self.need("}")
        return inside

    def bracketed(self) -> Answer:
        with self.nested(brackets=True):
            left = self.text[self.at]
            self.at += 1
            inside = self.sum()
            if isinstance(inside, Value) and self.skip(")" if left == "(" else "]"):
                return inside
            items = [inside]
            while self.skip(","):
                items.append(self.sum())
            right = self.peek()
            if right not in (")", "]") or len(items) == 1:
                raise self.error("expected a closing bracket")
            self.at += 1
        return Collection(left + right, tuple(items))

    def number(self) -> Value:
        start = self.at
        grouped = None if self.brackets else self.take(_GROUPED)
        if grouped:
            value = Fraction(grouped[0].replace(",", "").rstrip("."))
        else:
            value = self.plain_number()
        digits = self.text[start : self.at]
        if digits.isdigit():
            base = self.take(_BASE)
            if base:
                return symbol(f"{digits}_{base[1] or base[2]}")
            value += self.mixed()
        self.words()
        return rational(value)

    def plain_number(self) -> Fraction:
        found = self.take(_NUMBER)
        if not found or found[0] == "." or not (found[1] or found[2]):
            raise self.error("expected a number")
        exponent = int((found[3] or "e0")[1:])
        if abs(exponent) > MAX_EXPONENT:
            raise UnreadableError(f"an exponent above {MAX_EXPONENT}")
        return Fraction((found[1] or "0") + (found[2] or ".") + "0") * (
            Fraction(10) ** exponent
        )

    def mixed(self) -> Fraction:
        """The fraction that follows a whole number; zero if none does."""
        start = self.at
        found = self.take(_MIXED)
        if not found:
            return Fraction(0)
        above, below = (int(group) for group in found.groups() if group)
        if not 0 < above < below:
            self.at = start
            raise self.error("an improper fraction after a whole number")
        return Fraction(above, below)

    def words(self) -> None:
        """Move past the unit that follows a number, in plain words."""
        spaced = self.peek() and self.text[self.at - 1].isspace()
        unit = _SHORT_UNIT.match(self.text, self.at)
        if spaced and not _NAME.match(self.text, self.at):
            unit = unit or _LONG_UNIT.match(self.text, self.at)
        if not unit:
            return
        found = self.take(_UNIT_WORDS)
        if not found:
            raise self.error("more words than a unit has")
        self.check_unit(found[0])
        self.take(_UNIT_POWER)

    def check_unit(self, words: str) -> None:
        changing = _CHANGING & set(re.findall(r"[a-z]+", words.lower()))
        if changing or re.search(r"\d", words):
            raise self.error(f"{words.strip()!r} is no unit")

    def unit(self) -> bool:
        """Move past a unit in a LaTeX text, if one comes next."""
        if self.command() not in _TEXTS:
            return False
        start = self.at
        self.at += len(self.command())
        words = self.raw()
        if words.strip() in _FUNCTIONS or words.strip() in (EULER, IMAGINARY, "d"):
            self.at = start
            return False
        self.check_unit(words)
        self.take(_UNIT_POWER)
        if self.take(_UNIT_GOES_ON):
            self.unit()
        return True

    def raw(self) -> str:
        """The text of a group, or of the one character that stands for it."""
        if self.peek() == "\0":
            raise self.error("expected a group")
        if self.peek() != "{":
            command = self.command() or self.peek()
            self.at += len(command)
            return command
        opened = 0
        for mark in re.finditer(r"\\.|[{}]", self.text[self.at :]):
            opened += {"{": 1, "}": -1}.get(mark[0], 0)
            if opened == 0:
                inside = self.text[self.at + 1 : self.at + mark.start()]
                self.at += mark.end()
                return inside
        raise self.error("a brace is never closed")

    def letter(self) -> Value:
        named = self.take(_NAME)
        if not named and _WORD_INSIDE.match(self.text, self.at):
            raise self.error("a word inside an expression")
        if not named:
            self.at += 1
            return self.named(self.text[self.at - 1])
        if named[1] == "sqrt":
            return self.plain_root()
        if named[1] in _NAMES:
            return symbol(_NAMES[named[1]])
        return self.function(named[1])

    def named(self, name: str) -> Value:
        """A letter with its primes and its subscript."""
        marked = self.take(_PRIME)
        if marked:
            name += "'" * (marked[0].count("'") + marked[0].count("prime"))
        if self.skip("_"):
            index = re.sub(r"\\(text|mathrm|mbox)|[\s{}]", "", self.raw())
            name += f"_{index}"
        called = re.compile(r"(?a)\(\s*[-+]?[\d.,/\s]+\)").match(self.text, self.at)
        if called:
            raise self.error(f"{name}{called[0]} can be read in two ways")
        return symbol(name)

    # --- LaTeX commands

    def from_command(self) -> Answer:
        command = self.command()
        start = self.at
        self.at += len(command)
        if command in _SYMBOLS:
            return self.named(command)
        if command[1:] in _FUNCTIONS:
            return self.function(command[1:])
        if command == r"\frac":
            return self.fraction()
        if command == r"\sqrt":
            return self.root()
        if command == r"\surd":
            return self.plain_root()
        if command == r"\{":
            return self.set()
        if command == r"\begin":
            return self.matrix()
        if command in _ACCENTS:
            return self.named(f"{command}({self.raw().strip()})")
        if command in (*_TEXTS, r"\operatorname"):
            return self.letters()
        self.at = start
        raise self.error(f"unknown command {command}")

    def letters(self) -> Value:
        """Upright letters: a function's name or a variable's."""
        name = self.raw().strip()
        if name in _FUNCTIONS:
            return self.function(name)
        if not name.isalnum() or not name.isascii() or name.isdigit():
            raise self.error(f"text {name!r} inside an expression")
        return self.named(name)

    def argument(self) -> Value:
        """A group, or the one character or command that stands for it."""
        character = self.peek()
        if character == "{":
            return self.group()
        if character in _DIGITS:
            self.at += 1
            return rational(int(character))
        with self.nested():
            return self.single(self.primary())

    def fraction(self) -> Value:
        start = self.at
        derivative = _DERIVATIVE.match(self.raw()) and _DERIVATIVE.match(self.raw())
        self.at = start
        if derivative:
            raise self.error("a derivative")
        above = self.argument()
        return above / self.argument()

    def root(self) -> Value:
        index = 2
        if self.peek() == "[":
            found = self.take(re.compile(r"(?a)\[\s*(\d{1,3})\s*\]"))
            if not found or not int(found[1]):
                raise self.error("the index of a root is no whole number")
            index = int(found[1])
        return power(self.argument(), rational(Fraction(1, index)))

    def plain_root(self) -> Value:
        """A root outside LaTeX, where 13 is one argument and not two."""
        if self.peek() in _DIGITS:
            inside = rational(self.plain_number())
        else:
            inside = self.argument()
        return power(inside, rational(Fraction(1, 2)))

    def function(self, name: str) -> Value:
        r"""``\sin^2 3x``: an argument without brackets runs on through products."""
        exponent = rational(1)
        if name.startswith("log") and self.skip("_"):
            name = f"log_{self.raw().strip()}"
        if self.skip("^"):
            exponent = self.single(self.exponent())
            number = exponent.fraction()
            if number is None or number < 0:
                raise self.error(f"{name} to a power that is not a positive number")
        with self.nested():
            argument = self.function_argument()
        if name == "exp":
            return power(power(symbol(EULER), argument), exponent)
        return power(call(name, argument), exponent)

    def function_argument(self) -> Value:
        if self.peek() in ("(", "{", "["):
            return self.single(self.primary())
        argument = self.signed_power()
        while self.starts_factor() and self.peek() not in ("(", "["):
            if self.command()[1:] in _FUNCTIONS or self.command() in _TEXTS:
                break
            argument = argument * self.single(self.power())
        return argument

    def set(self) -> Collection:
        with self.nested(brackets=True):
            if self.skip(r"\}"):
                return Collection("{}", ())
            items = self.items()
            self.need(r"\}")
        return Collection("{}", items)

    def matrix(self) -> Collection:
        kind = self.raw()
        if kind.strip() not in ("pmatrix", "bmatrix", "matrix"):
            raise self.error(f"unknown environment {kind!r}")
        with self.nested(brackets=True):
            rows = [self.row()]
            while self.skip("\\\\"):
                if self.command() == r"\end":
                    break
                rows.append(self.row())
            self.need(r"\end")
            if self.raw() != kind:
                raise self.error(f"expected the end of {kind}")
        return Collection("matrix", tuple(rows))

    def row(self) -> Collection:
        entries = [self.sum()]
        while self.skip("&"):
            entries.append(self.sum())
        return Collection("row", tuple(entries))


def _relations(sign: str, left: Answer, right: Answer) -> Iterator[Relation]:
    if sign in _FLIPPED:
        sign, left, right = _FLIPPED[sign], right, left
    if not isinstance(left, Value):
        raise UnreadableError("a tuple or set on the left of a relation")
    name = _bare_letter(left)
    if not isinstance(right, Value):
        yield Relation(sign, None, right if name and sign == "=" else None)
        return
    for side in right.signs():
        free = name and sign == "=" and name not in side.atoms()
        yield Relation(sign, side - left, side if free else None)


def _bare_letter(value: Value) -> str | None:
    """Name of the letter that is the whole value, if it is one."""
    atoms = value.atoms()
    if len(atoms) != 1:
        return None
    (name,) = atoms
    number = name.isdecimal() or name in (PI, EULER, IMAGINARY, SIGN)
    return None if number or value != symbol(name) else name
