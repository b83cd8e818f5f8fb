"""Reads the data sets of the harness's tasks from local files, and says what is missing from them.

A file in the published schema is used as it is; other forms are converted. If a file lacks something that the harness
needs, the task is not compared: no data are made up.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence

from mlora_jax.data.load import load_task
from mlora_jax.data.published import SCHEMAS, Row, find_split, read_split


@dataclasses.dataclass(frozen=True)
class LocalTask:
    """A task whose data are complete in local files.

    Attributes:
      name: the harness's name of the task.
      splits: split -> its rows in the published schema.
    """

    name: str
    splits: Mapping[str, Sequence[Row]]


def local_tasks(
    raw_dir: str | pathlib.Path, names: Sequence[str] | None = None, *, cache_dir: str = ""
) -> dict[str, LocalTask | str]:
    """The tasks of a folder of raw files, and why each of the others cannot be compared.

    Args:
      raw_dir: the folder that holds one folder for every task, named like the task, or the folder of the only task.
        A task's folder has one file per split: `{split}.json` (a list of rows), `{split}.jsonl` or `{split}.parquet`.
        trec and sst2 are in the forms that their builders read.
      names: the names of the tasks; None stands for all of `SCHEMAS` and `OWN_TASKS`.
      cache_dir: the folder for builds of our own tasks, see `load_task`.

    Returns:
      name -> the `LocalTask`, or the reason (str) why the task cannot be compared.

    Raises:
      ValueError: an unknown name, or a file that cannot be read; the message names it.
    """
    names = (*SCHEMAS, *OWN_TASKS) if names is None else names
    for name in names:
        if name not in SCHEMAS and name not in OWN_TASKS:
            raise ValueError(f"no local form is known of the task {name!r}; known: {', '.join((*SCHEMAS, *OWN_TASKS))}")
    return {name: _find(pathlib.Path(raw_dir).expanduser(), name, cache_dir) for name in names}


def own_task(name: str, *, raw_dir: str = "", cache_dir: str = "") -> LocalTask:
    """Builds trec, sst2 or the task of the quickstart; without `raw_dir` the published files are downloaded."""
    data = load_task(name, raw_dir=raw_dir, cache_dir=cache_dir)
    splits = {"train": data.train, "validation": data.validation, "test": data.test}
    return LocalTask(name, {split: [*map(rows.stored, range(len(rows)))] for split, rows in splits.items() if rows})


# These tasks are in the project's own table of tasks; all other names are tasks of the harness.
OWN_TASKS = ("trec", "sst2", "quickstart")


def _find(raw_dir: pathlib.Path, name: str, cache_dir: str) -> LocalTask | str:
    if name in OWN_TASKS:
        try:
            return own_task(name, raw_dir=str(raw_dir), cache_dir=cache_dir)
        except FileNotFoundError as error:
            return str(error)
    folder = raw_dir / name
    if not folder.is_dir() and raw_dir.name == name:
        folder = raw_dir
    if not folder.is_dir():
        return f"{name}: no folder {name} in {raw_dir}"
    schema = SCHEMAS[name]
    splits, reasons = {}, []
    for split in dict.fromkeys((schema.evaluated, schema.shots, "validation")):
        path = find_split(folder, split, schema)
        if path is not None:
            splits[split] = read_split(path, split, schema)
    for split, use in ((schema.evaluated, "which is scored"), (schema.shots, "which few-shot examples come from")):
        if not splits.get(split):
            reasons.append(f"no split {split}, {use}")
    for split, rows in splits.items():
        missing = [field for field in schema.fields if any(field not in row for row in rows)]
        if missing:
            reasons.append(f"the split {split} lacks the field{'s' * (len(missing) > 1)} {', '.join(missing)}")
    return f"{name}: {'; '.join(reasons)} (in {folder})" if reasons else LocalTask(name, splits)
