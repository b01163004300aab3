r"""Rules of preference, for programs and for people.

A rule says which of two options is better, on one dimension, in some families of tasks,
with exceptions. It has a structured form, :class:`Rule`, and a readable one, a line of
text that a person can edit:

>>> text = '''
... Prefer material glass over plastic, except for children. (3 for, 0 against)
... For children, prefer material plastic over glass.
... Prefer kind tea over anything else, except with brand "Old & Co". (weight 2)
... '''
>>> rules = RuleSet.from_text(text)
>>> rules[0]
Rule(dimension='material', preferred='glass', over='plastic', families=(),
     except_families=('children',), except_values=(), weight=1.0, support=3, against=0)
>>> RuleSet.from_text(rules.to_text()) == rules
True

The paper says that the rules are natural language, that they decide actions and that
they carry over to other tasks. The form of a rule and how rules decide are ours:

* A rule compares two options if one has the preferred value and the other the value
  that it is preferred over; "anything else" is every other value, and none. It is
  silent in its excepted families, and about options with an excepted value.
* Of the rules that compare two options on one dimension only the most specific count:
  those with families before those without, then those over a named value before those
  over anything else. Their weights are added, and so are the dimensions. This is the
  **margin** of an option over another.
* An option's score is its worst margin. So what no other option beats is taken; it is
  Simpson's rule for elections. Equal scores are told apart by the mean margin, and
  then the first option is taken.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ftlib.clipr.tasks import Decision, Option, Task

Floats = npt.NDArray[np.float64]

_EQUAL = 1e-9  # margins nearer than this are the same: weights are sums of decimals


class RuleError(ValueError):
    """A rule that cannot be understood; the message names its line."""


# --- one rule -----------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """In these families, prefer one value of a dimension over another.

    Attributes:
        dimension: of the options' attributes.
        preferred: value of the dimension.
        over: value that it is preferred over; ``None`` for anything else.
        families: where it holds, sorted; empty for everywhere.
        except_families: where it does not, sorted.
        except_values: (dimension, value) of options about which it is silent, sorted.
        weight: against other rules; more than 0.
        support: how many answers or choices agreed with it.
        against: how many did not.

    Raises:
        ValueError: a name is empty, a value is preferred over itself, the weight is
            not a positive number, or a count is negative.
    """

    dimension: str
    preferred: str
    over: str | None = None
    families: tuple[str, ...] = ()
    except_families: tuple[str, ...] = ()
    except_values: tuple[tuple[str, str], ...] = ()
    weight: float = 1.0
    support: int = 0
    against: int = 0

    def __post_init__(self) -> None:
        for name in ("families", "except_families"):
            object.__setattr__(self, name, tuple(sorted(set(getattr(self, name)))))
        pairs = tuple(sorted({(d, v) for d, v in self.except_values}))
        object.__setattr__(self, "except_values", pairs)
        object.__setattr__(self, "weight", float(self.weight))
        self._check()

    def _check(self) -> None:
        names = [self.dimension, self.preferred, *self.families, *self.except_families]
        names += [name for pair in self.except_values for name in pair]
        names += [] if self.over is None else [self.over]
        if not all(names):
            raise ValueError(f"a rule has an empty name: {names}")
        if self.over == self.preferred:
            raise ValueError(f"a rule prefers {self.preferred!r} over itself")
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise ValueError(f"a rule's weight is {self.weight}: it must be above 0")
        if min(self.support, self.against) < 0:
            raise ValueError(
                f"a rule has {self.support} for and {self.against} against: counts"
                " cannot be negative"
            )

    @property
    def claim(self) -> Rule:
        """The rule without weight and support: what it says."""
        return replace(self, weight=1.0, support=0, against=0)

    @property
    def specificity(self) -> tuple[bool, bool]:
        """Whether it names families, and what it prefers its value over."""
        return bool(self.families), self.over is not None

    def holds_in(self, family: str) -> bool:
        """Whether the rule speaks in a family."""
        named = not self.families or family in self.families
        return named and family not in self.except_families

    def compare(self, family: str, a: Mapping[str, str], b: Mapping[str, str]) -> int:
        """Return 1 if attributes ``a`` are better than ``b``, −1 if worse, else 0."""
        if not self.holds_in(family) or self._excepts(a) or self._excepts(b):
            return 0
        return self._beats(a, b) - self._beats(b, a)

    def _excepts(self, attributes: Mapping[str, str]) -> bool:
        return any(attributes.get(d) == value for d, value in self.except_values)

    def _beats(self, a: Mapping[str, str], b: Mapping[str, str]) -> bool:
        other = b.get(self.dimension)
        beaten = other != self.preferred if self.over is None else other == self.over
        return a.get(self.dimension) == self.preferred and beaten

    def to_text(self) -> str:
        """Write the rule as a line that :func:`parse_rule` reads back."""
        words = f"prefer {_name(self.dimension, one_word=True)} {_name(self.preferred)}"
        over = "anything else" if self.over is None else _name(self.over)
        words += f" over {over}"
        if self.families:
            words = f"for {' or '.join(map(_name, self.families))}, {words}"
        exceptions = [f"for {_name(family)}" for family in self.except_families]
        exceptions += [
            f"with {_name(d, one_word=True)} {_name(value)}"
            for d, value in self.except_values
        ]
        if exceptions:
            words += f", except {' or '.join(exceptions)}"
        return words[0].upper() + words[1:] + "." + self._notes()

    def _notes(self) -> str:
        notes = [] if self.weight == 1 else [f"weight {_number(self.weight)}"]
        if self.support or self.against:
            notes += [f"{self.support} for", f"{self.against} against"]
        return f" ({', '.join(notes)})" if notes else ""

    def to_json(self) -> dict[str, Any]:
        """Return the rule as JSON's types."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Rule:
        """Read what :meth:`to_json` wrote.

        Raises:
            RuleError: it is something else.
        """
        try:
            fields = dict(data)
            for name in ("families", "except_families"):
                fields[name] = tuple(map(_text, fields.get(name, ())))
            fields["except_values"] = tuple(
                (_text(d), _text(v)) for d, v in fields.get("except_values", ())
            )
            for name in ("dimension", "preferred"):
                _text(fields[name])
            if fields.get("over") is not None:
                _text(fields["over"])
            return cls(**fields)
        except (TypeError, ValueError, KeyError) as error:
            raise RuleError(f"not a rule: {data!r}: {error}") from error


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not text")
    return value


# --- many rules ---------------------------------------------------------------


@dataclass(frozen=True)
class RuleSet(Sequence[Rule]):
    """Rules that decide together.

    Attributes:
        rules: in the order in which they were learnt, which decides nothing.
    """

    rules: tuple[Rule, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "rules", tuple(self.rules))

    def __len__(self) -> int:
        return len(self.rules)

    def __iter__(self) -> Iterator[Rule]:
        return iter(self.rules)

    def __getitem__(self, at: Any) -> Any:
        return self.rules[at]

    def __str__(self) -> str:
        return self.to_text()

    def to_text(self) -> str:
        """Write a line for each rule."""
        return "\n".join(rule.to_text() for rule in self.rules)

    @classmethod
    def from_text(cls, text: str, vocabulary: Vocabulary | None = None) -> RuleSet:
        """Read a line for each rule; empty lines and those beginning with # are left.

        Args:
            text: as :meth:`to_text` writes it, or a person.
            vocabulary: the names that may occur; ``None`` for any.

        Raises:
            RuleError: a line is no rule, or has an unknown name.
        """
        rules = []
        for number, line in enumerate(text.split("\n"), start=1):
            if not line.strip() or line.lstrip().startswith("#"):
                continue
            try:
                rules.append(parse_rule(line, vocabulary))
            except RuleError as error:
                raise RuleError(f"line {number}: {error}") from None
        return cls(tuple(rules))

    def to_json(self) -> list[dict[str, Any]]:
        """Return the rules as JSON's types."""
        return [rule.to_json() for rule in self.rules]

    @classmethod
    def from_json(cls, data: Iterable[Mapping[str, Any]]) -> RuleSet:
        """Read what :meth:`to_json` wrote.

        Raises:
            RuleError: it is something else.
        """
        return cls(tuple(Rule.from_json(rule) for rule in data))

    def margins(self, task: Task) -> Floats:
        """Return the margin of each option over each other, (n, n), antisymmetric."""
        n = len(task.options)
        margins = np.zeros((n, n))
        for i in range(n):
            for j in range(i):
                margin = self.margin(task.family, task.options[i], task.options[j])
                margins[i, j], margins[j, i] = margin, -margin
        return margins

    def margin(self, family: str, a: Option, b: Option) -> float:
        """Return by how much an option is better than another; 0 if rules are silent.

        The sum over dimensions of the weights of the most specific rules.
        """
        opinions: dict[str, dict[tuple[bool, bool], float]] = {}
        for rule in self.rules:
            opinion = rule.compare(family, a.attributes, b.attributes)
            if opinion:
                level = opinions.setdefault(rule.dimension, {})
                level.setdefault(rule.specificity, 0.0)
                level[rule.specificity] += opinion * rule.weight
        return sum(level[max(level)] for level in opinions.values())

    def fired(self, task: Task) -> tuple[int, ...]:
        """Return the places of the rules that compare any two of the options."""
        attributes = [option.attributes for option in task.options]
        return tuple(
            at
            for at, rule in enumerate(self.rules)
            if any(
                rule.compare(task.family, a, b) > 0
                for a in attributes
                for b in attributes
            )
        )

    def best(self, task: Task) -> tuple[int, ...]:
        """Return the options that nothing tells apart at the top."""
        worst, mean = self._scores(task)
        top = worst >= worst.max() - _EQUAL
        top &= mean >= mean[top].max() - _EQUAL
        return tuple(np.flatnonzero(top).tolist())

    def decide(self, task: Task) -> Decision:
        """Take the first of the best options; scores are worst margins."""
        scores = tuple(self._scores(task)[0].tolist())
        return Decision(self.best(task)[0], scores, self.fired(task))

    def _scores(self, task: Task) -> tuple[Floats, Floats]:
        """Return each option's worst and mean margin over the others."""
        margins = self.margins(task)
        others = ~np.eye(len(margins), dtype=bool)
        margins = margins[others].reshape(len(margins), -1)
        return margins.min(axis=1), margins.mean(axis=1)


# --- names --------------------------------------------------------------------


class Vocabulary(NamedTuple):
    """The names that rules may use.

    Attributes:
        families: of tasks.
        values: of each dimension.
    """

    families: tuple[str, ...]
    values: Mapping[str, tuple[str, ...]]

    @classmethod
    def of(cls, tasks: Iterable[Task]) -> Vocabulary:
        """Collect the names that occur in tasks."""
        families: dict[str, None] = {}
        values: dict[str, dict[str, None]] = {}
        for task in tasks:
            families[task.family] = None
            for option in task.options:
                for dimension, value in option.attributes.items():
                    values.setdefault(dimension, {})[value] = None
        return cls(tuple(families), {d: tuple(found) for d, found in values.items()})

    def spelled(self, rule: Rule) -> Rule:
        """Return the rule with names spelled as they are here, whatever their case.

        Raises:
            RuleError: a name is unknown.
        """
        dimension = _known("dimension", rule.dimension, self.values)
        return replace(
            rule,
            dimension=dimension,
            preferred=self._value(dimension, rule.preferred),
            over=None if rule.over is None else self._value(dimension, rule.over),
            families=tuple(map(self._family, rule.families)),
            except_families=tuple(map(self._family, rule.except_families)),
            except_values=tuple(
                (d, self._value(d, value))
                for d, value in (
                    (_known("dimension", d, self.values), value)
                    for d, value in rule.except_values
                )
            ),
        )

    def _family(self, name: str) -> str:
        return _known("family", name, self.families)

    def _value(self, dimension: str, name: str) -> str:
        return _known(dimension, name, self.values[dimension])


def _known(what: str, name: str, names: Iterable[str]) -> str:
    names = list(names)
    if name in names:
        return name
    folded = {known.casefold(): known for known in names}
    if name.casefold() in folded:
        return folded[name.casefold()]
    close = difflib.get_close_matches(name.casefold(), folded, n=1)
    meant = f"did you mean {folded[close[0]]!r}?" if close else f"known: {names}"
    raise RuleError(f"unknown {what} {name!r}; {meant}")


# --- text ---------------------------------------------------------------------

_OVER = (("over",), ("rather", "than"), ("instead", "of"))
_ANYTHING = ("anything", "else")
_RESERVED = frozenset(
    "for when if always prefer over rather than instead of anything except unless or"
    " with".split()
)
_WORD = r'[^\s"(),.;:]+'
_TOKEN = re.compile(rf'\s*("(?:[^"\\]|\\.)*"|[(),.;:]|{_WORD})', re.DOTALL)
_BULLET = re.compile(r"^\s*(?:[-*•]|\d+[.)])\s+")
_NOTES = re.compile(r"\(([^()\"]*)\)\s*\.?\s*$")
_NOTE = re.compile(
    r"weight\s+(?P<weight>[\d.eE+-]+)|(?P<support>\d+)\s+for|(?P<against>\d+)\s+against"
)
_SHAPE = (
    "write it as: For FAMILY, prefer DIMENSION VALUE over VALUE, except for FAMILY or"
    " with DIMENSION VALUE."
)


def parse_rule(line: str, vocabulary: Vocabulary | None = None) -> Rule:
    """Read a rule from a line of text.

    Keywords are read in either case, a bullet or number before the line is left out,
    and a name with a keyword or punctuation in it stands in double quotes.

    Args:
        line: as :meth:`Rule.to_text` writes it, or a person.
        vocabulary: the names that may occur; ``None`` for any.

    Raises:
        RuleError: it is no rule, or has an unknown name.
    """
    line = _BULLET.sub("", line.strip())
    notes = _NOTES.search(line)
    fields = _read_notes(notes[1]) if notes else {}
    body = line[: notes.start()] if notes else line
    try:
        rule = Rule(**_Reader(body).rule(), **fields)
    except RuleError:
        raise
    except ValueError as error:
        raise RuleError(str(error)) from None
    return rule if vocabulary is None else vocabulary.spelled(rule)


class _Reader:
    """Reads the tokens of a rule from left to right."""

    def __init__(self, text: str) -> None:
        self.text = text.strip()
        self.tokens: list[str] = []
        at = 0
        while at < len(self.text):
            found = _TOKEN.match(self.text, at)
            if found is None:
                raise RuleError(f"a quote is not closed in {self.text!r}")
            self.tokens.append(found[1])
            at = found.end()
        while self.tokens and self.tokens[-1] in (".", ";"):
            self.tokens.pop()

    def rule(self) -> dict[str, Any]:
        fields: dict[str, Any] = {}
        if self.take("for") or self.take("when") or self.take("if"):
            fields["families"] = self.names()
            self.take(",")
        self.take("always")
        if not self.take("prefer"):
            raise self.error("'prefer'")
        fields["dimension"] = self.name(one_word=True)
        self.take(":")
        fields["preferred"] = self.name()
        if any(self.take(*words) for words in _OVER):
            fields["over"] = None if self.take(*_ANYTHING) else self.name()
        self.take(",")
        if self.take("except") or self.take("unless"):
            fields |= self.exceptions()
        if self.tokens:
            raise self.error("the end")
        return fields

    def names(self) -> tuple[str, ...]:
        found = [self.name()]
        while self.take("or"):
            found.append(self.name())
        return tuple(found)

    def exceptions(self) -> dict[str, Any]:
        families, values = [], []
        while True:
            if self.take("with"):
                dimension = self.name(one_word=True)
                values.append((dimension, self.name()))
            else:
                self.take("for")
                families.append(self.name())
            if not self.take("or"):
                return {
                    "except_families": tuple(families),
                    "except_values": tuple(values),
                }

    def take(self, *words: str) -> bool:
        """Step over the words if they come next."""
        if [token.lower() for token in self.tokens[: len(words)]] != list(words):
            return False
        del self.tokens[: len(words)]
        return True

    def name(self, *, one_word: bool = False) -> str:
        """Read a quoted name, or words up to a keyword or punctuation."""
        if self.tokens and self.tokens[0].startswith('"'):
            return self.unquoted(self.tokens.pop(0))
        words: list[str] = []
        while self.tokens and _is_word(self.tokens[0]) and not (one_word and words):
            words.append(self.tokens.pop(0))
        if not words:
            raise self.error("a name")
        return " ".join(words)

    def unquoted(self, token: str) -> str:
        try:
            return _text(json.loads(token, strict=False))
        except ValueError:
            raise RuleError(f"{token} is not well quoted in {self.text!r}") from None

    def error(self, expected: str) -> RuleError:
        found = repr(self.tokens[0]) if self.tokens else "the end"
        return RuleError(
            f"expected {expected}, found {found} in {self.text!r}; {_SHAPE}"
        )


def _is_word(token: str) -> bool:
    return re.fullmatch(_WORD, token) is not None and token.lower() not in _RESERVED


def _read_notes(text: str) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for note in filter(None, (part.strip() for part in text.split(","))):
        found = _NOTE.fullmatch(note)
        if found is None:
            raise RuleError(
                f"cannot read the note {note!r}: write (weight 2, 3 for, 0 against)"
            )
        name = str(found.lastgroup)
        try:
            fields[name] = float(found[name]) if name == "weight" else int(found[name])
        except ValueError:
            raise RuleError(f"the weight in {note!r} is not a number") from None
    return fields


def _name(name: str, *, one_word: bool = False) -> str:
    """Write a name so that it is read back, in quotes if need be."""
    words = name.split(" ")
    plain = all(map(_is_word, words)) and not (one_word and len(words) > 1)
    return name if plain else json.dumps(name, ensure_ascii=False)


def _number(value: float) -> str:
    return str(int(value)) if value.is_integer() else repr(value)
