"""The papers' claims beside our measurements: ``book/claims.toml``, with its numbers.

That file says for each claim which recorded numbers bear on it and what we conclude.
Every number is read here, from the records and from ``published.toml``.
"""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ftlib import published, results
from ftlib.clipr.runs import by_person
from paths import ROOT

CLAIMS = ROOT / "book" / "claims.toml"
VERDICTS = ("reproduced", "partly", "not reproduced", "not testable here")

Floats = NDArray[np.float64]
# How two arms are compared, by the key that names the second one.
COMPARISONS: dict[str, Callable[[Floats, Floats], Floats]] = {
    "minus": lambda ours, other: ours - other,
    "share_of": lambda ours, other: ours / other,
    "removed_from": lambda ours, other: 1 - ours / other,
}
_SCALED = {"%": 100.0, "points": 100.0}
SEEDS = "of the seeds"
# What one recorded run gives: a number, or one for each person.
PER: dict[str, Callable[[results.Record, str], Iterable[float]]] = {
    "seed": lambda record, metric: results.Results([record]).values(metric),
    "person": lambda record, metric: by_person([record], metric),
}


class ClaimError(ValueError):
    """``claims.toml`` says something that cannot be: names the entry and what."""


class Quantity(NamedTuple):
    """One metric of one arm."""

    method: str
    experiment: str
    arm: str
    metric: str
    scale: str
    per: str

    def values(self) -> dict[tuple[int, int], float]:
        """Return the recorded numbers by seed and person (else 0)."""
        records = _records(self.method, self.scale).select(self.experiment, self.arm)
        return {
            (record.seed, item): float(value)
            for record in records
            for item, value in enumerate(PER[self.per](record, self.metric))
        }


@functools.cache
def _records(method: str, scale: str) -> results.Results:
    return results.load(method, scale)


@dataclass(frozen=True)
class Measured:
    """A number of ours with its interval.

    Attributes:
        quantity: what is averaged.
        comparison: a key of :data:`COMPARISONS`, or ``None``.
        other: what it is compared with.
        unit: of the shown number: ``%``, ``points``, ``of the seeds`` or none.
    """

    name: str
    says: str
    quantity: Quantity
    comparison: str | None
    other: Quantity | None
    unit: str

    @functools.cached_property
    def interval(self) -> results.Interval:
        """The mean over seeds, or over people, in the shown unit.

        Raises:
            ClaimError: the two sides do not have the same seeds and items.
            NotRecordedError: a record or metric is missing.
        """
        ours = self.quantity.values()
        values = np.array(list(ours.values()))
        if self.comparison and self.other:
            other = self.other.values()
            if ours.keys() != other.keys():
                raise ClaimError(
                    f"measured.{self.name}: {len(ours)} values on one side and "
                    f"{len(other)} on the other do not pair"
                )
            values = COMPARISONS[self.comparison](
                values, np.array([other[key] for key in ours])
            )
        return results.bootstrap(values * _SCALED.get(self.unit, 1.0))

    @property
    def is_difference(self) -> bool:
        """Whether the number has a sign that matters."""
        return self.comparison == "minus"

    def __str__(self) -> str:
        mean, *_, n = self.interval
        if self.unit == SEEDS:
            return f"{mean * n:.0f} of {n} seeds"
        return show(self.interval, self.unit, self.is_difference)


@dataclass(frozen=True)
class Published:
    """A number of a paper's, with the version and table it comes from."""

    name: str
    says: str
    value: float
    unit: str
    source: str
    is_difference: bool

    def __str__(self) -> str:
        sign = "+" if self.is_difference else ""
        number = f"{round(self.value, 2):{sign}g}".replace("-", "−")
        return f"{number} {self.unit}".strip()


@dataclass(frozen=True)
class Claim:
    """A claim of a paper and what became of it."""

    name: str
    says: str
    chapter: str
    verdict: str
    why: str
    measured: tuple[Measured, ...]
    published: tuple[Published, ...]


@dataclass(frozen=True)
class Panel:
    """A panel of the landing page's figure: labels by number, theirs and ours."""

    title: str
    unit: str
    theirs: Mapping[str, str] = field(default_factory=dict)
    ours: Mapping[str, str] = field(default_factory=dict)
    silent: str = ""


class Book(NamedTuple):
    """All that ``claims.toml`` holds, by name."""

    claims: dict[str, Claim]
    measured: dict[str, Measured]
    published: dict[str, Published]
    panels: list[Panel]

    def numbers(self) -> dict[str, str]:
        """Return every number as text, by name, for the prose."""
        return _texts(self.measured, self.published)


def _texts(
    measured: Mapping[str, Measured], theirs: Mapping[str, Published]
) -> dict[str, str]:
    return {name: str(entry) for name, entry in {**measured, **theirs}.items()}


def show(interval: results.Interval, unit: str, signed: bool) -> str:
    """Write a mean, its interval where it has a width, and the unit.

    Args:
        interval: in the shown unit.
        unit: ``%`` and ``points`` take one decimal, else three significant digits.
        signed: write a plus too.
    """
    style = f"{'+' if signed else ''}{'.1f' if unit else '#.3g'}"
    mean, low, high = (
        f"{x:{style}}".rstrip(".").replace("-", "−") for x in interval[:3]
    )
    has_width = interval.low < interval.high
    text = f"{mean} [{low}, {high}]" if has_width else mean
    return f"{text} {unit}".strip()


def load(path: Path = CLAIMS) -> Book:
    """Read the claims, and check that names and verdicts are known.

    Raises:
        ClaimError: an entry lacks a key or names something that is not there.
    """
    document = tomllib.loads(path.read_text("utf-8"))
    measured = {
        name: _measured(name, entry) for name, entry in document["measured"].items()
    }
    theirs = {
        name: _published(name, entry) for name, entry in document["published"].items()
    }
    texts = _texts(measured, theirs)
    claims = {
        name: _claim(name, entry, measured, theirs, texts)
        for name, entry in document["claim"].items()
    }
    panels = [Panel(**entry) for entry in document["panel"]]
    for panel in panels:
        _pick(panel.title, panel.theirs, theirs)
        _pick(panel.title, panel.ours, measured)
    return Book(claims, measured, theirs, panels)


def _measured(name: str, entry: dict[str, Any]) -> Measured:
    keys = [key for key in COMPARISONS if key in entry]
    if len(keys) > 1:
        raise ClaimError(f"measured.{name} has {' and '.join(keys)}: keep one")
    comparison = keys[0] if keys else None
    try:
        first = {"scale": "cpu", "per": "seed"} | entry
        quantity = Quantity(*(first[key] for key in Quantity._fields))
        other = quantity._replace(**entry[comparison]) if comparison else None
        return Measured(name, entry["says"], quantity, comparison, other, entry["unit"])
    except (KeyError, ValueError) as error:
        raise ClaimError(f"measured.{name}: {error}") from error


def _published(name: str, entry: dict[str, Any]) -> Published:
    try:
        value, source = _cell(entry)
        if "minus" in entry:
            other, other_source = _cell(entry | entry["minus"])
            value = value - other
            if other_source != source:
                source = f"{source}; {other_source}"
        return Published(
            name, entry["says"], value, entry["unit"], source, "minus" in entry
        )
    except KeyError as error:
        raise ClaimError(f"published.{name}: {error}") from error


def _cell(entry: dict[str, Any]) -> tuple[float, str]:
    table = published.load(entry["method"])[entry["table"]]
    return table.value(*entry["row"], column=entry["column"]), table.source


def _claim(
    name: str,
    entry: dict[str, Any],
    measured: Mapping[str, Measured],
    theirs: Mapping[str, Published],
    texts: Mapping[str, str],
) -> Claim:
    if entry.get("verdict") not in VERDICTS:
        raise ClaimError(
            f"claim.{name} has the verdict {entry.get('verdict')!r}: "
            f"choose one of {', '.join(VERDICTS)}"
        )
    ours = _pick(f"claim.{name}", entry["measured"], measured)
    if not ours:
        raise ClaimError(f"claim.{name} has a verdict, but nothing measured behind it")
    try:
        why = entry["why"].format_map(texts)
    except KeyError as error:
        raise ClaimError(f"claim.{name}: `why` names no number {error}") from error
    return Claim(
        name,
        entry["says"],
        entry["chapter"],
        entry["verdict"],
        " ".join(why.split()),
        ours,
        _pick(f"claim.{name}", entry["published"], theirs),
    )


def _pick(where: str, names: Any, there: Mapping[str, Any]) -> tuple[Any, ...]:
    if unknown := [name for name in names if name not in there]:
        raise ClaimError(f"{where} names {', '.join(unknown)}, which is not defined")
    return tuple(there[name] for name in names)
