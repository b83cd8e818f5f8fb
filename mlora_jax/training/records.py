"""JSON lines: every line is one record, which is on disk before the next one is written."""

from __future__ import annotations

import io
import json
import math
import os
import pathlib
from collections.abc import Callable
from typing import Any, Self

from mlora_jax.disk import naming, write_aside

SCHEMA = 1


class JsonLines:
    """Appends records to a file, each with a `schema` field; NaN and infinities become null.

    Args:
      path: the file. Records that it already holds stay; an incomplete line at its end is removed.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self._path = pathlib.Path(path)
        with naming(self._path):
            self._path.touch()
        end = self._path.read_bytes().rfind(b"\n") + 1
        os.truncate(self._path, end)
        self._file = self._open()

    def _open(self) -> io.FileIO:
        # There is no buffer: it would try again to write what could not be written when the file is closed.
        return self._path.open("ab", buffering=0)

    def write(self, *records: dict[str, Any]) -> None:
        """Appends records: either all of them or none.

        Raises:
          DiskFullError: there is no room for them. The file is left as it was.
        """
        lines = (json.dumps({"schema": SCHEMA, **_finite(record)}, allow_nan=False) for record in records)
        data = "".join(f"{line}\n" for line in lines).encode()
        before, written = os.fstat(self._file.fileno()).st_size, 0
        with naming(self._path, needed=len(data)):
            try:
                while written < len(data):  # on a full disk a part is written, and the next call is an error
                    written += self._file.write(data[written:])
            except OSError:
                os.truncate(self._path, before)
                raise

    def keep(self, wanted: Callable[[dict[str, Any]], bool]) -> None:
        """Drops the records that are not wanted, as `keep_records` does."""
        self._file.close()
        keep_records(self._path, wanted)
        self._file = self._open()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()


class NoRecords:
    """Takes the place of `JsonLines` in a process that writes nothing."""

    def write(self, *records: dict[str, Any]) -> None:
        """Does nothing."""

    def keep(self, wanted: Callable[[dict[str, Any]], bool]) -> None:
        """Does nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        pass


def _finite(value: Any) -> Any:
    """Returns JSON values with null in place of NaN and infinities."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def keep_records(path: str | os.PathLike, wanted: Callable[[dict[str, Any]], bool]) -> None:
    """Rewrites a file with only the records that are wanted; does nothing if there is no file.

    Args:
      path: the file.
      wanted: a function of a record that returns whether to keep it.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        return
    with JsonLines(path):  # opening the file drops an incomplete line
        pass
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line, record in zip(lines, read_json_lines(path), strict=True) if wanted(record)]
    if len(kept) < len(lines):
        with write_aside(path) as file:
            file.write_text("".join(kept), encoding="utf-8")


def read_json_lines(path: str | os.PathLike) -> list[dict[str, Any]]:
    """Reads all records of a file.

    An incomplete line at the end is skipped: a run is still writing it, or was killed while it wrote it.

    Args:
      path: the file.

    Raises:
      ValueError: a line is not a JSON object or has another schema. The message names the file and the line.
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
