r"""Exact values: rationals, radicals, pi, i and symbols, in one normal form.

A value is a quotient of two sums of monomials with rational coefficients. A monomial
is a product of atoms with rational exponents. Atoms are the primes (``2^(1/2)`` is the
square root of two), ``\pi``, ``e``, ``i``, letters, and functions of a value, which
stay closed: nothing is known of ``sin`` except that equal arguments give equal values.

Two quotients are equal iff their cross products are the same sum. Products of rational
powers of primes are linearly independent over the rationals (Besicovitch 1940) and pi
is transcendental, so this decides every number built from those by arithmetic. Where
functions or roots of sums occur, equal forms are equal, but equal values may have forms
that differ.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Context, Decimal, DecimalException
from fractions import Fraction
from functools import lru_cache
from math import gcd, lcm
from typing import TypeAlias

Monomial: TypeAlias = tuple[tuple[str, Fraction], ...]  # sorted by atom, no exponent 0
Terms: TypeAlias = Mapping[Monomial, Fraction]  # no coefficient 0

PI, EULER, IMAGINARY, SIGN = r"\pi", "e", "i", r"\pm"

MAX_TERMS = 400  # of a sum
MAX_BITS = 20_000  # of a coefficient
MAX_ATOM = 4_000  # characters of a closed function
MAX_RADICAND = 10**10  # which is factored by trial division

# i^2 = -1. A plus-minus sign is an atom too, with square 1.
_SQUARES = {IMAGINARY: -1, SIGN: 1}
_DIGITS = Context(prec=60)
_PI = Decimal("3.14159265358979323846264338327950288419716939937510582097494459")


class UnreadableError(ValueError):
    """A text or a value this package does not handle; the message says why."""


@dataclass(frozen=True, eq=False)
class Value:
    """A quotient of sums; ``denominator`` is one unless it has several terms."""

    numerator: Terms
    denominator: Terms

    def __add__(self, other: Value) -> Value:
        if _same(self.denominator, other.denominator):
            return _quotient(_add(self.numerator, other.numerator), self.denominator)
        return _quotient(
            _add(
                _multiply(self.numerator, other.denominator),
                _multiply(other.numerator, self.denominator),
            ),
            _multiply(self.denominator, other.denominator),
        )

    def __neg__(self) -> Value:
        return self * rational(-1)

    def __sub__(self, other: Value) -> Value:
        return self + -other

    def __mul__(self, other: Value) -> Value:
        return _quotient(
            _multiply(self.numerator, other.numerator),
            _multiply(self.denominator, other.denominator),
        )

    def __truediv__(self, other: Value) -> Value:
        return self * other.reciprocal()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Value):
            return NotImplemented
        return _same(
            _multiply(self.numerator, other.denominator),
            _multiply(other.numerator, self.denominator),
        )

    def __str__(self) -> str:
        if _same(self.denominator, _ONE):
            return _written(self.numerator)
        return f"({_written(self.numerator)})/({_written(self.denominator)})"

    def reciprocal(self) -> Value:
        """One over the value.

        Raises:
            UnreadableError: the value is zero.
        """
        return _quotient(self.denominator, self.numerator)

    def fraction(self) -> Fraction | None:
        """The value as a fraction, ``None`` if it is not rational."""
        if not _same(self.denominator, _ONE):
            return None
        if not self.numerator:
            return Fraction(0)
        return self.numerator.get(()) if len(self.numerator) == 1 else None

    def atoms(self) -> set[str]:
        """Names of the atoms it is built from."""
        terms = (*self.numerator, *self.denominator)
        return {atom for monomial in terms for atom, _ in monomial}

    def signs(self) -> tuple[Value, ...]:
        """Both values of a value with a plus-minus sign, else the value alone."""
        if SIGN not in self.atoms():
            return (self,)
        return tuple(
            _quotient(_signed(self.numerator, s), _signed(self.denominator, s))
            for s in (1, -1)
        )

    def approximate(self) -> Fraction | None:
        """A number built from primes, pi and e, to about 50 digits, else ``None``."""
        exact = self.fraction()
        if exact is not None:
            return exact
        try:
            above, below = _decimal(self.numerator), _decimal(self.denominator)
            return None if not below else Fraction(above) / Fraction(below)
        except (KeyError, DecimalException):
            return None


def ratio(left: Value, right: Value) -> Fraction | None:
    """The rational number c with left = c right, ``None`` if there is none.

    >>> ratio(symbol("x") + symbol("x"), symbol("x"))
    Fraction(2, 1)
    """
    above = _multiply(left.numerator, right.denominator)
    below = _multiply(right.numerator, left.denominator)
    if above.keys() != below.keys():
        return None
    found = {c / below[monomial] for monomial, c in above.items()} or {Fraction(1)}
    return found.pop() if len(found) == 1 else None


def rational(number: int | Fraction) -> Value:
    """The value of a rational number."""
    return Value(_sum({(): Fraction(number)}), _ONE)


def symbol(name: str) -> Value:
    """The value of an atom: a letter, a constant, or a function in closed form.

    Raises:
        UnreadableError: the name is too long to work with.
    """
    return _atom_power(name, Fraction(1))


def call(function: str, argument: Value) -> Value:
    """A function of a value, which stays closed."""
    if SIGN in argument.atoms():
        raise UnreadableError(f"plus-minus inside {function}")
    return symbol(f"{function}({argument})")


def power(base: Value, exponent: Value) -> Value:
    """Raise a value to a power; the root of a negative number is the real one if odd.

    Raises:
        UnreadableError: the result is too large to write out, or has no meaning.
    """
    number = exponent.fraction()
    if number is None:
        return _symbolic_power(base, exponent)
    if number.denominator == 1:
        return _integer_power(base, number.numerator)
    return _root_power(base, number)


_ONE: Terms = {(): Fraction(1)}


def _same(left: Terms, right: Terms) -> bool:
    return left == right


def _sum(terms: Mapping[Monomial, Fraction]) -> Terms:
    """Drop zeros; refuse what is too large to go on with."""
    kept = {monomial: c for monomial, c in terms.items() if c}
    if len(kept) > MAX_TERMS:
        raise UnreadableError(f"a sum of more than {MAX_TERMS} terms")
    for c in kept.values():
        if max(c.numerator.bit_length(), c.denominator.bit_length()) > MAX_BITS:
            raise UnreadableError(f"a number of more than {MAX_BITS} bits")
    return kept


def _add(left: Terms, right: Terms) -> Terms:
    total = dict(left)
    for monomial, c in right.items():
        total[monomial] = total.get(monomial, Fraction(0)) + c
    return _sum(total)


def _multiply(left: Terms, right: Terms) -> Terms:
    if len(left) * len(right) > 10 * MAX_TERMS:
        raise UnreadableError("a product of sums with too many terms")
    total: dict[Monomial, Fraction] = {}
    for a, p in left.items():
        for b, q in right.items():
            monomial, factor = _join(a, b)
            total[monomial] = total.get(monomial, Fraction(0)) + p * q * factor
    return _sum(total)


def _join(left: Monomial, right: Monomial) -> tuple[Monomial, Fraction]:
    """Product of two monomials, and the rational number that splits off it."""
    exponents = dict(left)
    for atom, exponent in right:
        exponents[atom] = exponents.get(atom, Fraction(0)) + exponent
    factor = Fraction(1)
    for atom, exponent in exponents.items():
        if atom.isdecimal():  # a prime keeps an exponent in [0, 1)
            whole = exponent // 1
            factor *= _number_power(Fraction(int(atom)), whole)
            exponents[atom] = exponent - whole
        elif atom in _SQUARES:
            pairs = exponent // 2
            factor *= _SQUARES[atom] ** abs(pairs)
            exponents[atom] = exponent - 2 * pairs
    return tuple(sorted((a, e) for a, e in exponents.items() if e)), factor


def _quotient(above: Terms, below: Terms) -> Value:
    """Divide through by the denominator's first term, so that it often vanishes."""
    if not below:
        raise UnreadableError("division by zero")
    first = min(below)
    inverse = tuple((atom, -exponent) for atom, exponent in first)
    monomial, factor = _join((), inverse)
    scale = {monomial: factor / below[first]}
    return Value(_multiply(above, scale), _multiply(below, scale))


def _signed(terms: Terms, sign: int) -> Terms:
    total: dict[Monomial, Fraction] = {}
    for monomial, c in terms.items():
        rest = tuple(pair for pair in monomial if pair[0] != SIGN)
        total[rest] = total.get(rest, Fraction(0)) + c * (
            sign if rest != monomial else 1
        )
    return _sum(total)


def _number_power(base: Fraction, exponent: int) -> Fraction:
    bits = max(base.numerator.bit_length(), base.denominator.bit_length())
    if abs(base) != 1 and bits * abs(exponent) > MAX_BITS:
        raise UnreadableError(f"a number of more than {MAX_BITS} bits")
    if not base and exponent < 0:
        raise UnreadableError("division by zero")
    # Powers of one do not grow, whatever the exponent.
    return base ** (exponent % 2 if abs(base) == 1 else exponent)


def _integer_power(base: Value, exponent: int) -> Value:
    number = base.fraction()
    if number is not None:
        if not number and not exponent:
            raise UnreadableError("zero to the power of zero")
        return rational(_number_power(number, exponent))
    if exponent < 0:
        return _integer_power(base.reciprocal(), -exponent)
    if exponent > MAX_TERMS:
        raise UnreadableError(f"a power above {MAX_TERMS}")
    result = rational(1)
    for bit in f"{exponent:b}":
        result = result * result
        if bit == "1":
            result = result * base
    return result


def _root_power(base: Value, exponent: Fraction) -> Value:
    """A power with an exponent that is not whole.

    Rational factors come out of the root; so do pi and e, which are positive. Of
    letters, only a bare one does: the root of x^2 is not x where x is negative.
    """
    if not base.numerator:
        if exponent < 0:
            raise UnreadableError("division by zero")
        return base
    if SIGN in base.atoms():
        raise UnreadableError("plus-minus inside a root")
    content = _content(base)
    inside = base * rational(1 / content)
    outside = _number_root(content, exponent)
    if not _same(inside.denominator, _ONE) or len(inside.numerator) != 1:
        return outside * symbol(f"({inside})^({exponent})")
    ((monomial, unit),) = inside.numerator.items()  # unit is 1 or -1
    letters = tuple(pair for pair in monomial if not _positive(pair[0]))
    for atom, old in monomial:
        if _positive(atom):
            outside = outside * _atom_power(atom, old * exponent)
    if not letters:
        return outside * _number_root(unit, exponent)
    if unit == 1 and len(letters) == 1 and letters[0][1] == 1:
        return outside * _atom_power(letters[0][0], exponent)
    rest = Value({letters: unit}, _ONE)
    return outside * symbol(f"({rest})^({exponent})")


def _positive(atom: str) -> bool:
    return atom.isdecimal() or atom in (PI, EULER)


def _atom_power(atom: str, exponent: Fraction) -> Value:
    if len(atom) > MAX_ATOM:
        raise UnreadableError("a function's argument is too large")
    monomial, factor = _join(((atom, exponent),), ())
    return Value({monomial: factor}, _ONE)


def _content(value: Value) -> Fraction:
    """The positive rational factor common to all terms."""
    coefficients = list(value.numerator.values())
    above = gcd(*(c.numerator for c in coefficients))
    return Fraction(above, lcm(*(c.denominator for c in coefficients)))


def _number_root(number: Fraction, exponent: Fraction) -> Value:
    result = rational(1)
    if number < 0:
        if exponent.denominator == 2:
            result = _integer_power(symbol(IMAGINARY), exponent.numerator % 4)
        elif exponent.denominator % 2:
            result = rational((-1) ** (exponent.numerator % 2))
        else:
            raise UnreadableError("a fourth or higher even root of a negative number")
    for part, sign in ((abs(number.numerator), 1), (number.denominator, -1)):
        for prime, count in _factors(part).items():
            result = result * _atom_power(str(prime), sign * count * exponent)
    return result


@lru_cache(maxsize=1024)
def _factors(number: int) -> Mapping[int, int]:
    """Prime factors with their multiplicity.

    Raises:
        UnreadableError: the number is above ``MAX_RADICAND``.
    """
    if number > MAX_RADICAND:
        raise UnreadableError(f"a root of a number above {MAX_RADICAND:.0e}")
    found: dict[int, int] = {}
    divisor = 2
    while divisor * divisor <= number:
        while number % divisor == 0:
            found[divisor] = found.get(divisor, 0) + 1
            number //= divisor
        divisor += 1
    if number > 1:
        found[number] = found.get(number, 0) + 1
    return found


def _symbolic_power(base: Value, exponent: Value) -> Value:
    """Split ``b^(m + 2n)`` into ``b^m (b^n)^2``, so that powers of b multiply."""
    if SIGN in base.atoms() | exponent.atoms():
        raise UnreadableError("plus-minus in a power")
    if not _same(exponent.denominator, _ONE):
        return symbol(f"({base})^({exponent})")
    result = rational(1)
    for monomial, c in exponent.numerator.items():
        if not monomial:
            result = result * power(base, rational(c))
            continue
        unit = Value({monomial: Fraction(1)}, _ONE)
        result = result * _atom_power(f"({base})^({unit})", c)
    return result


def _decimal(terms: Terms) -> Decimal:
    """Sum of terms as a decimal.

    Raises:
        KeyError: an atom is no known number.
    """
    known = {PI: _PI, EULER: _DIGITS.exp(Decimal(1))}
    total = Decimal(0)
    for monomial, c in terms.items():
        term = _DIGITS.divide(Decimal(c.numerator), Decimal(c.denominator))
        for atom, exponent in monomial:
            base = Decimal(atom) if atom.isdecimal() else known[atom]
            size = _DIGITS.divide(
                Decimal(exponent.numerator), Decimal(exponent.denominator)
            )
            term = _DIGITS.multiply(term, _DIGITS.power(base, size))
        total = _DIGITS.add(total, term)
    return total


def _written(terms: Terms) -> str:
    """A text that is the same for the same sum."""
    if not terms:
        return "0"
    return "+".join(
        "*".join((f"{terms[m]}", *(f"{atom}^({e})" for atom, e in m)))
        for m in sorted(terms)
    )
