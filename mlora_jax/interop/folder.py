"""Writes export folders that appear whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mlora_jax.core import RankHierarchy
from mlora_jax.disk import DiskFullError, write_aside
from mlora_jax.models.json_file import read_json_object

# The record of an export; it also marks its folder as an export, which a later export may replace.
RECORD_FILE = "mlora_jax.json"
RECORD_FORMAT = 1


def write_json(file: pathlib.Path, values: Mapping[str, Any]) -> None:
    """Writes a JSON object with indentation.

    Args:
      file: the file to write.
      values: the fields of the object.
    """
    with write_aside(file) as aside:
        aside.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def write_record(
    folder: pathlib.Path,
    hierarchy: RankHierarchy,
    rank: int | Mapping[str, Sequence[int]],
    readout: str,
    description: Mapping[str, Any] | None,
) -> None:
    """Records which read-out of which hierarchy a folder holds.

    Args:
      folder: the folder of the export.
      hierarchy: the S, scales, weights and R of the whole adapter.
      rank: one rank, or path -> ranks per layer.
      readout: the name of the read-out.
      description: further JSON values for the record.
    """
    values = {
        "format": RECORD_FORMAT,
        "readout": readout,
        "rank": {path: list(ranks) for path, ranks in rank.items()} if isinstance(rank, Mapping) else rank,
        "hierarchy": {
            "ranks": list(hierarchy.ranks),
            "scaling": hierarchy.scaling,
            "weights": None if hierarchy.weights is None else list(hierarchy.weights),
            "max_rank": hierarchy.max_rank,
        },
    }
    write_json(folder / RECORD_FILE, {**(description or {}), **values})


def read_record(folder: pathlib.Path) -> dict[str, Any] | None:
    """Reads the values that `write_record` wrote, with the hierarchy as a `RankHierarchy`.

    Args:
      folder: the folder of the export.

    Returns:
      The values, or None if the folder has no record.

    Raises:
      ValueError: the file is damaged, or another version wrote it.
    """
    file = folder / RECORD_FILE
    if not file.is_file():
        return None
    values = read_json_object(file)
    if values.get("format") != RECORD_FORMAT:
        raise ValueError(f"{file} has format {values.get('format')!r}; this version reads {RECORD_FORMAT}")
    try:
        return {**values, "hierarchy": RankHierarchy(**values["hierarchy"])}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} is damaged: {error}") from None


def check_free(path: str | os.PathLike) -> pathlib.Path:
    """Returns the absolute path of a folder that may be written.

    Args:
      path: the folder; it may exist if it is empty or holds an earlier export.

    Raises:
      FileExistsError: the path is a file, or a folder that holds something other than an earlier export.
    """
    target = pathlib.Path(path).expanduser().resolve()
    if target.is_dir():
        if any(target.iterdir()) and not (target / RECORD_FILE).is_file():
            raise FileExistsError(f"{target} holds other files: give another folder, or empty this one")
    elif target.exists():
        raise FileExistsError(f"{target} is a file: give the name of a folder")
    return target


@contextlib.contextmanager
def new_folder(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Yields a new folder beside `path`, which is renamed to `path` on success and removed on failure.

    An earlier export at `path` is replaced as a whole.

    Args:
      path: the folder to write.

    Raises:
      FileExistsError: as `check_free`.
    """
    target = check_free(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f".{target.name}.{os.getpid()}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        yield aside
        _put(aside, target)
    except DiskFullError as error:
        raise error.renamed(aside, target) from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _put(aside: pathlib.Path, target: pathlib.Path) -> None:
    if not target.is_dir():
        os.rename(aside, target)
        return
    # No rename replaces a folder that holds files.
    old = target.with_name(f".{target.name}.{os.getpid()}.replaced")
    os.rename(target, old)
    try:
        os.rename(aside, target)
    except OSError:
        os.rename(old, target)
        raise
    shutil.rmtree(old)
