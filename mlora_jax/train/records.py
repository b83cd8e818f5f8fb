"""JSON lines: one record a line, on disk before the next one is written."""

from __future__ import annotations

import json
import pathlib
from typing import Any

SCHEMA = 1


class JsonLines:
    """Appends records to a file, each with a `schema` field.

    Args:
      path: of the file; an old one is replaced.
    """

    def __init__(self, path):
        self._file = pathlib.Path(path).open("w", encoding="utf-8")

    def write(self, **record: Any) -> None:
        """Appends one record."""
        self._file.write(json.dumps({"schema": SCHEMA, **record}) + "\n")
        self._file.flush()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self._file.close()


def read_json_lines(path) -> list[dict[str, Any]]:
    """All records of a file.

    Raises:
      ValueError: a line is no JSON object or of another schema; names file and line.
    """
    records = []
    for number, line in enumerate(pathlib.Path(path).read_text(encoding="utf-8").splitlines(), start=1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: {error}") from error
        if not isinstance(record, dict) or record.get("schema") != SCHEMA:
            raise ValueError(f"{path}:{number}: not a record of schema {SCHEMA}")
        records.append(record)
    return records
