"""JSON lines: one record a line, on disk before the next one is written."""

from __future__ import annotations

import io
import json
import math
import os
import pathlib
from collections.abc import Callable
from typing import Any

from mlora_jax.disk import naming, write_aside

SCHEMA = 1


class JsonLines:
    """Appends records to a file, each with a `schema` field; NaN and infinities become null.

    Args:
      path: of the file; records that it holds already stay, half a line at its end does not.
    """

    def __init__(self, path):
        self._path = pathlib.Path(path)
        with naming(self._path):
            self._path.touch()
        end = self._path.read_bytes().rfind(b"\n") + 1
        os.truncate(self._path, end)
        self._file = self._open()

    def _open(self) -> io.FileIO:
        # Without a buffer: what could not be written would be tried again when the file is closed.
        return self._path.open("ab", buffering=0)

    def write(self, *records: dict[str, Any]) -> None:
        """Appends records, all in one piece.

        Raises:
          DiskFullError: there is no room for them; the file is as it was.
        """
        lines = (json.dumps({"schema": SCHEMA, **_finite(record)}, allow_nan=False) for record in records)
        data = "".join(f"{line}\n" for line in lines).encode()
        before, written = os.fstat(self._file.fileno()).st_size, 0
        with naming(self._path, needed=len(data)):
            try:
                while written < len(data):  # where room ends, a part is written, and the next call is an error
                    written += self._file.write(data[written:])
            except OSError:
                os.truncate(self._path, before)
                raise

    def keep(self, wanted: Callable[[dict[str, Any]], bool]) -> None:
        """Drops the records that are not wanted; see `keep_records`."""
        self._file.close()
        keep_records(self._path, wanted)
        self._file = self._open()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self._file.close()


class NoRecords:
    """In the place of `JsonLines` in a process that writes nothing."""

    def write(self, *records: dict[str, Any]) -> None:
        """Does nothing."""

    def keep(self, wanted: Callable[[dict[str, Any]], bool]) -> None:
        """Does nothing."""

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass


def _finite(value):
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def keep_records(path, wanted: Callable[[dict[str, Any]], bool]) -> None:
    """Rewrites a file with the records that are wanted; a file that is not there stays so."""
    path = pathlib.Path(path)
    if not path.is_file():
        return
    with JsonLines(path):  # drops half a line
        pass
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line, record in zip(lines, read_json_lines(path), strict=True) if wanted(record)]
    if len(kept) < len(lines):
        with write_aside(path) as file:
            file.write_text("".join(kept), encoding="utf-8")


def read_json_lines(path) -> list[dict[str, Any]]:
    """All records of a file; half a line at its end, which a run is writing or was killed in, is none.

    Raises:
      ValueError: a line is no JSON object or of another schema; names file and line.
    """
    records = []
    data = pathlib.Path(path).read_bytes()
    whole = data[: data.rfind(b"\n") + 1].decode("utf-8")
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: {error}") from error
        if not isinstance(record, dict) or record.get("schema") != SCHEMA:
            raise ValueError(f"{path}:{number}: not a record of schema {SCHEMA}")
        records.append(record)
    return records
