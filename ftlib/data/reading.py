"""Readers for the formats of the data files; what they read is never executed."""

from __future__ import annotations

import codecs
import csv
import json
import zipfile
from pathlib import Path
from typing import Any


def read_jsonl(path: Path | zipfile.Path) -> list[dict[str, Any]]:
    """Read a UTF-8 file of one JSON object a line, which may lie in an archive.

    Raises:
        ValueError: a line is not a JSON object; the message has its number.
    """
    rows = []
    # Lines are split as bytes, for text may hold U+2028, which is no line's end here.
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from error
            if not isinstance(row, dict):
                raise ValueError(
                    f"{path}, line {number}: expected a JSON object, "
                    f"found {type(row).__name__}"
                )
            rows.append(row)
    return rows


def read_csv(path: Path, delimiter: str = ",") -> list[dict[str, str]]:
    """Read a UTF-8 table whose first line names the columns.

    Raises:
        ValueError: a row has too many or too few fields, a quote is never closed or
            the text is not UTF-8; the message has the line's number.
    """
    with path.open("rb") as file:
        lines = codecs.iterdecode(file, "utf-8-sig")
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
        try:
            header = next(reader, [])
            return [dict(zip(header, row, strict=True)) for row in reader]
        except (ValueError, csv.Error) as error:
            # The reader has not counted a line that could not be decoded.
            number = reader.line_num + isinstance(error, UnicodeDecodeError)
            raise ValueError(f"{path}, line {number}: {error}") from error
