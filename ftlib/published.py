"""What the papers report, as data with sources: to show beside our records.

Each method's tables are in ``published.toml`` beside its records. Nothing here was
measured by us.
"""

from __future__ import annotations

import importlib.resources
import tomllib
from collections.abc import Iterable
from typing import Any, NamedTuple

from ftlib.results import markdown_table


class PublishedTable(NamedTuple):
    """One table of a paper, or the part of it that the book uses.

    Attributes:
        source: version and number of the table.
        labels: headings of the columns that name a row.
        columns: headings of the numbers.
        rows: the numbers by the row's labels; NaN where the paper has none.
    """

    source: str
    labels: tuple[str, ...]
    columns: tuple[str, ...]
    rows: dict[tuple[str, ...], tuple[float, ...]]

    def value(self, *labels: str, column: str) -> float:
        """Return one number.

        Raises:
            KeyError: there is no such row or column; the message lists those there are.
        """
        if labels not in self.rows:
            raise KeyError(f"no row {labels}: choose among {list(self.rows)}")
        if column not in self.columns:
            raise KeyError(f"no column {column!r}: choose among {self.columns}")
        return self.rows[labels][self.columns.index(column)]

    def column(self, name: str) -> list[float]:
        """Return one column, from the first row to the last."""
        return [self.value(*labels, column=name) for labels in self.rows]

    def markdown(self, where: Iterable[str] = ()) -> str:
        """Return a Markdown table of the rows that have all of these labels.

        A column in which every shown row has one of them is left out.
        """
        wanted = set(where)
        shown = [labels for labels in self.rows if wanted <= set(labels)]
        varying = [
            i
            for i in range(len(self.labels))
            if not all(labels[i] in wanted for labels in shown)
        ]
        heading = [*(self.labels[i] for i in varying), *self.columns]
        lines = [
            [*(row[i] for i in varying), *(f"{number:g}" for number in self.rows[row])]
            for row in shown
        ]
        return markdown_table([heading, *lines])


def load(method: str) -> dict[str, PublishedTable]:
    """Return a method's published tables by name.

    Args:
        method: the method's short name.

    Raises:
        FileNotFoundError: none are kept for this method.
        ValueError: a row does not have a label or a number for each column.

    >>> table = load("cft")["sft-and-cft"]
    >>> table.source
    'version 4, Table 2'
    >>> table.value("Qwen2.5-7B", "CFT", column="MATH")
    71.1
    """
    path = importlib.resources.files("ftlib.records") / method / "published.toml"
    document = tomllib.loads(path.read_text("utf-8"))
    return {name: _table(name, content) for name, content in document.items()}


def _table(name: str, content: dict[str, Any]) -> PublishedTable:
    labels, columns = tuple(content["labels"]), tuple(content["columns"])
    rows = {}
    for row in content["rows"]:
        if len(row) != len(labels) + len(columns):
            raise ValueError(
                f"{name}: the row {row} has {len(row)} entries, not "
                f"{len(labels) + len(columns)}"
            )
        rows[tuple(row[: len(labels)])] = tuple(map(float, row[len(labels) :]))
    return PublishedTable(content["source"], labels, columns, rows)
