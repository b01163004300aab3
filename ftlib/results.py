"""Records of runs: how they are stored, selected, compared and shown.

A run leaves one :class:`Record`; the records of a method at a scale live in one
file, ``<method>/<scale>.json``. Tables, figures and the numbers in the prose are
made from these files and from nothing else.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.resources
import json
import math
import operator
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, overload

import numpy as np
from filelock import FileLock
from numpy.typing import ArrayLike, NDArray

from ftlib.files import replacing
from ftlib.runtime import SCALES

if TYPE_CHECKING:
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import ValidationError

_NAME = {"type": "string", "pattern": "^[A-Za-z0-9_-]+$"}
_TEXT = {"type": "string", "minLength": 1}
_COUNT = {"type": "integer", "minimum": 0}
_SHA256 = {"type": "string", "pattern": "^[0-9a-f]{64}$"}
_METRIC = {
    "type": "object",
    "properties": {
        "value": {"type": ["number", "null"]},
        "n": {"type": ["integer", "null"], "minimum": 0},
    },
    "required": ["value", "n"],
    "additionalProperties": False,
}
_RECORD_FIELDS = {
    "method": _NAME,
    "experiment": _TEXT,
    "arm": _TEXT,
    "seed": _COUNT,
    "scale": {"enum": list(SCALES)},
    "settings": {"type": "object"},
    "metrics": {"type": "object", "additionalProperties": _METRIC},
    "seconds": {"type": "number", "minimum": 0},
    "peak_memory_bytes": _COUNT,
    "device": _TEXT,
    "versions": {"type": "object", "additionalProperties": _TEXT},
    "data": {"type": "object", "additionalProperties": _SHA256},
    "commit": {"type": ["string", "null"]},
    "finished": {
        "type": "string",
        "pattern": r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$",
    },
}
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "schema": {"const": 1},
        "sha256": _SHA256,
        "records": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": _RECORD_FIELDS,
                "required": list(_RECORD_FIELDS),
                "additionalProperties": False,
            },
        },
    },
    "required": ["schema", "records"],
    "additionalProperties": False,
}

# Metrics called so hold the outcomes of single items, packed; no table shows them.
PACKED_PREFIX = "bits/"

RecordKey = tuple[str, str, str, int, str]


class RecordError(ValueError):
    """A record, or a file of records, is not what the schema asks for."""


class NotWrittenError(OSError):
    """Records cannot be written, most often for want of room."""


class NotRecordedError(LookupError):
    """There is no record, or no metric, of what was asked for."""


class Metric(NamedTuple):
    """A measured value and the number of items it was measured on.

    A value that is not finite (a diverged run is a result too) is stored as
    ``null`` and read back as NaN.
    """

    value: float
    n: int | None = None


@dataclass(frozen=True)
class Record:
    """One run of one arm with one seed.

    Attributes:
        settings: everything that was set, as JSON; tuples become lists.
        metrics: what was measured.
        seconds: wall time of the run.
        peak_memory_bytes: on the GPU, memory allocated during the run; on the CPU,
            resident memory of the process up to the end of the run.
        data: SHA-256 of every data file that was read.
        commit: commit of the code, ``None`` where it was installed without one.
        finished: UTC, ``2026-01-31T12:00:00Z``.
    """

    method: str
    experiment: str
    arm: str
    seed: int
    scale: str
    settings: Mapping[str, Any]
    metrics: Mapping[str, Metric]
    seconds: float
    peak_memory_bytes: int
    device: str
    versions: Mapping[str, str]
    data: Mapping[str, str]
    commit: str | None
    finished: str = field(
        default_factory=lambda: datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "settings", as_json(self.settings))

    @property
    def key(self) -> RecordKey:
        """What the record is a record of; a file holds one record per key."""
        return (self.method, self.experiment, self.arm, self.seed, self.scale)

    def to_json(self) -> dict[str, Any]:
        """Return the record as the schema describes it."""
        document = {item.name: getattr(self, item.name) for item in fields(self)}
        metrics = {name: _metric_to_json(m) for name, m in self.metrics.items()}
        return document | {"metrics": metrics}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Record:
        """Build a record from a document that satisfies the schema."""
        metrics = {
            name: Metric(math.nan if m["value"] is None else m["value"], m["n"])
            for name, m in document["metrics"].items()
        }
        return cls(**{**document, "metrics": metrics})


def _metric_to_json(metric: Metric) -> dict[str, float | int | None]:
    value = float(metric.value)
    return {
        "value": value if math.isfinite(value) else None,
        "n": None if metric.n is None else operator.index(metric.n),
    }


def as_json(value: Any) -> Any:
    """Return a value as JSON would give it back: tuples as lists, keys as strings.

    Raises:
        RecordError: JSON cannot hold the value exactly (an object, an array, NaN).
    """
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise RecordError(f"{value!r} cannot be recorded: {error}") from error


class Results(Sequence[Record]):
    """Records, in the order of their keys."""

    def __init__(self, records: Iterable[Record]):
        self._records = sorted(records, key=operator.attrgetter("key"))

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> Results: ...
    def __getitem__(self, index: int | slice) -> Record | Results:
        """Return a record, or the records of a slice."""
        if isinstance(index, slice):
            return Results(self._records[index])
        return self._records[index]

    def __len__(self) -> int:
        return len(self._records)

    def __repr__(self) -> str:
        return f"Results({len(self)} records, arms {', '.join(self.arms())})"

    def select(
        self, experiment: str | None = None, arm: str | None = None, **settings: Any
    ) -> Results:
        """Return the records of an experiment, of an arm, or with given settings.

        Raises:
            NotRecordedError: no record is left; the message lists what there is.
        """
        wanted = as_json(settings)
        found = [
            record
            for record in self
            if experiment in (None, record.experiment)
            and arm in (None, record.arm)
            and all(_has_setting(record, *setting) for setting in wanted.items())
        ]
        if not found:
            there = sorted({f"{r.experiment}/{r.arm}" for r in self})
            asked = {"experiment": experiment, "arm": arm} | settings
            raise NotRecordedError(
                f"no record with {_listed(asked)}; there are: {', '.join(there)}"
            )
        return Results(found)

    def experiments(self) -> list[str]:
        """Names of the experiments, sorted."""
        return sorted({record.experiment for record in self})

    def arms(self) -> list[str]:
        """Names of the arms, sorted."""
        return sorted({record.arm for record in self})

    def metrics(self) -> list[str]:
        """Names of all metrics, in the order in which the runs gave them."""
        return list(dict.fromkeys(name for record in self for name in record.metrics))

    def by_seed(self, metric: str) -> dict[int, float]:
        """Return a metric of one arm by seed, seeds ascending.

        Raises:
            ValueError: the records are of several arms, or repeat a seed.
            NotRecordedError: a record lacks the metric.
        """
        arms = {f"{r.method} {r.scale} {r.experiment}/{r.arm}" for r in self}
        if len(arms) > 1:
            raise ValueError(f"select one arm of: {', '.join(sorted(arms))}")
        values = {record.seed: _value(record, metric) for record in self}
        if len(values) < len(self):
            raise ValueError(f"seeds occur more than once in {self!r}")
        return values

    def values(self, metric: str) -> NDArray[np.float64]:
        """Return a metric of one arm as an array (seeds,), seeds ascending.

        Raises:
            ValueError: the records are of several arms, or repeat a seed.
            NotRecordedError: a record lacks the metric.
        """
        return np.array(list(self.by_seed(metric).values()), dtype=np.float64)


def _has_setting(record: Record, name: str, value: Any) -> bool:
    return name in record.settings and bool(record.settings[name] == value)


def _listed(asked: Mapping[str, Any]) -> str:
    return ", ".join(f"{k} {v!r}" for k, v in asked.items() if v is not None)


def _value(record: Record, metric: str) -> float:
    if metric not in record.metrics:
        raise NotRecordedError(
            f"arm {record.arm!r}, seed {record.seed} has no metric {metric!r}; "
            f"it has: {', '.join(record.metrics)}"
        )
    return record.metrics[metric].value


# --- files -------------------------------------------------------------------


def results_directory() -> Path:
    """Return the directory that records are written to and first read from.

    It is ``FTLIB_RESULTS_DIR``; else ``book/results`` of the checkout that ftlib
    runs from; else ``ftlib-results`` in the current directory.
    """
    if named := os.environ.get("FTLIB_RESULTS_DIR"):
        return Path(named)
    records = _installed_records()
    checkout = records.parents[1]
    runs_from_checkout = (
        records == checkout / "book" / "results" and (checkout / ".git").exists()
    )
    if runs_from_checkout and os.access(records, os.W_OK):
        return records
    return Path("ftlib-results")


def _installed_records() -> Path:
    return Path(str(importlib.resources.files("ftlib.records")))


def results_path(method: str, scale: str, directory: Path | None = None) -> Path:
    """Return the file of a method at a scale, by default under the directory above."""
    return (directory or results_directory()) / method / f"{scale}.json"


def load(method: str, scale: str) -> Results:
    """Return the records of a method at a scale.

    They are read from :func:`results_directory`, or, where that has none, from the
    records installed with the package.

    Raises:
        NotRecordedError: neither place has any; the message says how to make them.
        RecordError: a file is damaged.
    """
    places = [
        results_path(method, scale),
        results_path(method, scale, _installed_records()),
    ]
    for path in places:
        if path.exists() and (results := read(path)):
            return results
    raise NotRecordedError(
        f"no records of {method} at scale {scale} in "
        f"{' or '.join(dict.fromkeys(map(str, places)))}; "
        f"make them with: ftlib run {method} --scale {scale}"
    )


def recorded() -> list[str]:
    """Return the names of the methods and benchmarks with records, sorted.

    >>> recorded()
    ['caref', 'cft', 'cgm', ...]
    """
    places = (results_directory(), _installed_records())
    return sorted({path.parent.name for at in places for path in at.glob("*/*.json")})


def read(path: Path) -> Results:
    """Read one file of records.

    Raises:
        RecordError: the file is not JSON, breaks the schema, holds other records than
            were written or a key twice; the message names the file, the record and
            the field.
        FileNotFoundError: there is no such file.
    """
    try:
        document = json.loads(path.read_text("utf-8"), parse_constant=_refuse_constant)
    except ValueError as error:
        raise RecordError(f"{path} is not valid JSON: {error}") from error
    _check(document, path)
    _check_sha256(document, path)
    results = Results(map(Record.from_json, document["records"]))
    for key, times in Counter(record.key for record in results).items():
        if times > 1:
            raise RecordError(f"{path}: {times} records of {key}: keep one")
    return results


def append(records: Iterable[Record], directory: Path | None = None) -> None:
    """Add records to their files; each replaces the stored one with its key.

    Safe when several processes append at once.

    Raises:
        RecordError: a record, or the file as it is, breaks the schema; the file is
            left as it was.
        NotWrittenError: a file cannot be written; it is left as it was.
    """
    for path, group in _by_file(records, directory).items():
        with _update(path) as stored:
            stored.update({record.key: record for record in group})


def merge(paths: Iterable[Path], directory: Path | None = None) -> None:
    """Add the records of files made on other machines.

    Where a key is there more than once, the run that finished last is kept.

    Raises:
        RecordError: one of the files is damaged; nothing has then been written.
    """
    incoming = [record for path in paths for record in read(path)]
    for path, group in _by_file(incoming, directory).items():
        with _update(path) as stored:
            for record in group:
                kept = stored.setdefault(record.key, record)
                stored[record.key] = max(
                    kept, record, key=operator.attrgetter("finished")
                )


def _by_file(
    records: Iterable[Record], directory: Path | None
) -> dict[Path, list[Record]]:
    groups = defaultdict(list)
    for record in records:
        groups[results_path(record.method, record.scale, directory)].append(record)
    return groups


@contextmanager
def _update(path: Path) -> Iterator[dict[RecordKey, Record]]:
    """Hold a file's lock, give its records to be changed, and write them back."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        stored = {r.key: r for r in read(path)} if path.exists() else {}
        yield stored
        _write(path, Results(stored.values()))


def _write(path: Path, results: Results) -> None:
    records = [record.to_json() for record in results]
    document = {"schema": 1, "sha256": _sha256(records), "records": records}
    _check(document, path)
    text = json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False)
    try:
        with replacing(path) as temporary:  # by the lock's holder alone
            temporary.write_text(text + "\n", "utf-8")
    except OSError as error:
        raise NotWrittenError(
            f"{path} cannot be written: {error.strerror or error}. The file is as it "
            "was: make room there, and run it again to go on"
        ) from error


def _sha256(records: list[dict[str, Any]]) -> str:
    """Return the SHA-256 of what the records say, however they are laid out."""
    return hashlib.sha256(json.dumps(records, sort_keys=True).encode()).hexdigest()


def _check_sha256(document: Mapping[str, Any], path: Path) -> None:
    """Refuse records that are not the written ones; files of old have no SHA-256."""
    found = _sha256(document["records"])
    if document.get("sha256", found) != found:
        raise RecordError(
            f"{path} is damaged or altered: its records have the SHA-256 {found}, "
            f"those written had {document['sha256']}. Take the file from a copy; if "
            'the change is meant, remove the line "sha256"'
        )


def _check(document: Any, path: Path) -> None:
    """Refuse a document that breaks the schema."""
    from jsonschema.exceptions import best_match

    if error := best_match(_validator().iter_errors(document)):
        raise RecordError(f"{path}: {_where(error, document)}{error.message}")


@functools.cache
def _validator() -> Draft202012Validator:
    from jsonschema import Draft202012Validator  # slow to import

    return Draft202012Validator(SCHEMA)


def _where(error: ValidationError, document: Any) -> str:
    """Name the record and the field that a schema error is about."""
    path = list(error.absolute_path)
    place = []
    if path[:1] == ["records"] and len(path) > 1:
        place.append(_record_name(document["records"], path[1]))
        path = path[2:]
    if path:
        place.append(f"field {'.'.join(map(str, path))}")
    return ", ".join(place) + ": " if place else ""


def _record_name(records: Any, index: Any) -> str:
    record = records[index]
    known = record if isinstance(record, dict) else {}
    which = _listed({name: known.get(name) for name in ("arm", "seed")})
    return f"record {index} ({which})" if which else f"record {index}"


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON: a value that is not finite is null")


# --- statistics --------------------------------------------------------------


class Interval(NamedTuple):
    """A mean with a confidence interval over ``n`` values."""

    mean: float
    low: float
    high: float
    n: int


class Comparison(NamedTuple):
    """The mean paired difference, and the p-value of there being none."""

    difference: Interval
    p_value: float
    n: int


_RESAMPLES = 9999
_BATCH_BYTES = 64 * 2**20


def bootstrap(values: ArrayLike, confidence: float = 0.95, seed: int = 0) -> Interval:
    """Return the mean with its percentile bootstrap interval.

    With as few values as five seeds the interval is too narrow: of normal values,
    it covers the true mean 84 times in 100 rather than 95. Read it as the spread
    of the seeds, and leave decisions to the paired tests.

    Equal values give an interval of no width. One value has no interval: ``low``
    and ``high`` are NaN. A value that is not finite makes all three NaN, since a
    mean without the diverged runs would flatter.

    Args:
        values: one number per seed or item, shape (n,).
        confidence: between 0 and 1.
        seed: of the resampling, so that a table is the same each time.

    Raises:
        ValueError: there are no values, or they are not one-dimensional.

    >>> bootstrap([0.20, 0.30, 0.25, 0.10])
    Interval(mean=0.2125, low=0.1375, high=0.275, n=4)
    """
    from scipy import stats

    sample = np.asarray(values, dtype=np.float64)
    if sample.ndim != 1 or sample.size == 0:
        raise ValueError(f"expected values of shape (n,), n ≥ 1; got {sample.shape}")
    if not np.isfinite(sample).all():
        return Interval(math.nan, math.nan, math.nan, sample.size)
    mean = float(sample.mean())
    if sample.size == 1:
        return Interval(mean, math.nan, math.nan, 1)
    low, high = stats.bootstrap(
        (sample,),
        np.mean,
        n_resamples=_RESAMPLES,
        batch=_batch(sample),
        confidence_level=confidence,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(mean, float(low), float(high), sample.size)


def paired_by_seed(a: Results, b: Results, metric: str) -> Comparison:
    """Compare a metric of two arms, ``a - b``, seed by seed.

    The smallest p-value that n seeds can give is 2 / 2ⁿ: 0.0625 with five.

    Raises:
        ValueError: the arms have different seeds, or are not one arm each.
        NotRecordedError: a record lacks the metric.

    >>> mixture = load("cgm", "cpu").select("mixture")
    >>> relax, reward = (mixture.select(arm=a) for a in ("relax λ=0.1", "reward N=100"))
    >>> paired_by_seed(relax, reward, "kl").n
    5
    """
    left, right = a.by_seed(metric), b.by_seed(metric)
    if unmatched := sorted(left.keys() ^ right.keys()):
        raise ValueError(
            f"cannot pair {metric!r} by seed: only one of the two has seeds "
            f"{', '.join(map(str, unmatched))}"
        )
    return paired_by_item(list(left.values()), list(right.values()))


def paired_by_item(a: ArrayLike, b: ArrayLike) -> Comparison:
    """Compare two measurements of the same items, ``a - b``.

    The p-value is two-sided, of the test that flips the signs of the differences:
    exact up to 13 pairs, from 9999 random flips above. One pair gives 1, and
    values that are not finite give NaN.

    Args:
        a: one number per item, shape (n,).
        b: the same items in the same order, shape (n,).

    Raises:
        ValueError: the shapes differ, or there are no values.

    >>> ours, theirs = [5, 6, 7, 8], [4, 4, 6, 6]
    >>> paired_by_item(ours, theirs).p_value
    0.125
    """
    left, right = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if left.shape != right.shape:
        raise ValueError(f"cannot pair shapes {left.shape} and {right.shape}")
    difference = left - right
    return Comparison(bootstrap(difference), _sign_flip(difference), difference.size)


def _sign_flip(difference: NDArray[np.float64]) -> float:
    from scipy import stats

    if not np.isfinite(difference).all():
        return math.nan
    if difference.size == 1:
        return 1.0
    test = stats.permutation_test(
        (difference,),
        np.mean,
        permutation_type="samples",
        n_resamples=_RESAMPLES,
        batch=_batch(difference),
        rng=np.random.default_rng(0),
    )
    return float(test.pvalue)


def _batch(sample: NDArray[np.float64]) -> int:
    """How many resamples of a sample fit in the memory set aside for them."""
    return max(1, _BATCH_BYTES // sample.nbytes)


# --- showing -----------------------------------------------------------------


def format_interval(interval: Interval, digits: int = 3) -> str:
    """Write a mean and its interval, with so many significant digits.

    >>> format_interval(Interval(0.19304, 0.18991, 0.19613, n=5))
    '0.193 [0.190, 0.196]'
    """
    mean, low, high = (f"{x:#.{digits}g}".rstrip(".") for x in interval[:3])
    if math.isnan(interval.mean):
        return "not finite"
    return mean if math.isnan(interval.low) else f"{mean} [{low}, {high}]"


def as_labels(names: Mapping[str, str] | Iterable[str]) -> dict[str, str]:
    """Return a mapping of names to labels; plain names label themselves."""
    return dict(names) if isinstance(names, Mapping) else {n: n for n in names}


def table(
    results: Results,
    metrics: Mapping[str, str] | Iterable[str],
    arms: Mapping[str, str] | Iterable[str] | None = None,
) -> str:
    """Return a Markdown table, one row an arm: mean [95 % interval] over its seeds.

    Args:
        results: of one experiment.
        metrics: the columns, or a mapping of metrics to their headings.
        arms: the rows in order, or a mapping of arms to their labels; default: all.

    Raises:
        ValueError: the results are of several experiments.
        NotRecordedError: there is no such arm, or only some of its seeds have a metric.
    """
    columns = as_labels(metrics)
    rows = [["arm", "seeds", *columns.values()]]
    for arm, label in as_labels(results.arms() if arms is None else arms).items():
        of_arm = results.select(arm=arm)
        cells = [_cell(of_arm, metric) for metric in columns]
        rows.append([label, str(len(of_arm)), *cells])
    return markdown_table(rows)


def _cell(results: Results, metric: str) -> str:
    if metric not in results.metrics():
        return "–"
    return format_interval(bootstrap(results.values(metric)))


def markdown_table(rows: Iterable[Sequence[str]]) -> str:
    """Lay out rows, the first of them the heading, padded so that they read as text.

    >>> print(markdown_table([["arm", "KL"], ["relax", "0.19"], ["reward", "0.2"]]))
    | arm    | KL   |
    | ------ | ---- |
    | relax  | 0.19 |
    | reward | 0.2  |
    """
    cells = [[cell.replace("|", r"\|") for cell in row] for row in rows]
    widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * width for width in widths])
    lines = (
        " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in cells
    )
    return "\n".join(f"| {line} |" for line in lines)
