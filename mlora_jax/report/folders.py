"""The records in the folder of one run: its config, and the rank-accuracy curves of its trials."""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from mlora_jax.config import CHANGEABLE, KEYS, resolve_stored
from mlora_jax.training.curve_records import CURVES, CurveRecord, CurvesOnRecord, read_curves
from mlora_jax.trials import Trial, expand_trials

SPLITS = ("validation", "test")
# Captions do not mention differences in these config keys: tables show them anyway, or they do not change results.
UNTOLD = (*CHANGEABLE, "train.log_every")
SOURCES = ("model.path", "data.file", "data.evaluation_file")


@dataclasses.dataclass(frozen=True)
class RunRecords:
    """The records of one run for one task: the task it trains on, or another on which its adapters were measured.

    Attributes:
      path: the folder of the run.
      config: the contents of config.json.
      task: the name of the task. For a task that the run does not train on, the name includes the number of examples in
        its prompts, as in "arc_challenge, 25 shots".
      base: split -> accuracy of the model without an adapter; "test" is always present.
      items: split -> number of items; None if the records do not say.
      curves: trial -> (split, read-out) -> rank -> accuracy. Only complete curves are included.
      failed: trial whose loss became infinite or NaN -> the trial's name.
      truncated: split -> number of items whose prompt was cut to fit; splits without such items are left out.
      not_compared: task of the config that could not be measured because its local data are missing -> the reason.
    """

    path: pathlib.Path
    config: dict[str, Any]
    task: str
    base: dict[str, float]
    items: dict[str, int | None]
    curves: dict[Trial, dict[tuple[str, str], dict[int, float]]]
    failed: dict[Trial, str]
    truncated: dict[str, int]
    not_compared: dict[str, str]

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> list[RunRecords]:
        """Reads a folder.

        The curves of every other task include those of the run's own validation split, because learning rates are
        chosen on it.

        Args:
          path: the folder of a run, finished or not.

        Returns:
          The records of each task; those of the task that the run trains on come first.

        Raises:
          FileNotFoundError: config.json or curves.jsonl is missing.
          ValueError: the records are unreadable, or there is no accuracy of the base model on the test split.
        """
        path = pathlib.Path(path)
        if not (path / "config.json").is_file():
            raise FileNotFoundError(f"{path} is not the folder of a run: it has no config.json")
        if not (path / CURVES).is_file():
            raise FileNotFoundError(f"{path} has no {CURVES}: the run has not measured anything yet")
        try:
            config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path / 'config.json'}: {error}") from error
        own = config["data"]["task"]
        on_record = read_curves(path / CURVES)
        by_task: dict[str, list[CurveRecord]] = {own: []}
        for record in on_record:
            by_task.setdefault(_task_of(record, own), []).append(record)
        shared = [record for record in by_task[own] if record.split != "test"]
        return [
            cls._of(path, config, task, records if task == own else [*records, *shared], on_record)
            for task, records in by_task.items()
        ]

    @classmethod
    def _of(
        cls,
        path: pathlib.Path,
        config: dict[str, Any],
        task: str,
        records: Iterable[CurveRecord],
        on_record: CurvesOnRecord,
    ) -> RunRecords:
        base: dict[str, CurveRecord] = {}
        curves: dict[Trial, dict] = collections.defaultdict(dict)
        for record in records:
            if record.trial is None:
                base[record.split] = record
            else:
                curve = dict(zip(record.ranks, record.accuracies, strict=True))
                curves[record.trial][record.split, record.readout] = curve
        if "test" not in base:
            raise ValueError(f"{path} holds no accuracy of the base model on the test split of {task}")
        not_compared = path / "not_compared.json"
        return cls(
            path=path,
            config=config,
            task=task,
            base={split: record.accuracies[0] for split, record in base.items()},
            items={split: record.items for split, record in base.items()},
            curves=dict(curves),
            failed={trial: name for name, trial in on_record.failed.items()},
            truncated={split: record.truncated for split, record in base.items() if record.truncated},
            not_compared=json.loads(not_compared.read_text(encoding="utf-8")) if not_compared.is_file() else {},
        )

    @property
    def base_model(self) -> str:
        """The last part of the base model's path."""
        return pathlib.PurePath(self.config["model"]["path"]).name

    @property
    def sources(self) -> dict[str, pathlib.PurePath]:
        """Dotted config key -> path, for the base model and own data; keys that are not set are left out."""
        values = dict(_flat(self.config))
        return {name: pathlib.PurePath(values[name]) for name in SOURCES if values.get(name)}

    def is_like(self, other: RunRecords) -> bool:
        """Returns whether both runs measured the same task on the same base.

        Their sources are the same if the paths are equal, or if the names and the base's accuracy are equal.
        """
        names = [{key: path.name for key, path in each.sources.items()} for each in (self, other)]
        bases = [(each.base["test"], each.items["test"]) for each in (self, other)]
        same = self.sources == other.sources or (names[0] == names[1] and bases[0] == bases[1])
        return self.task == other.task and same

    @property
    def planned(self) -> list[Trial]:
        """The trials that the config plans; empty if the config has no trials."""
        if not self.config.get("trials"):
            return []
        return expand_trials(resolve_stored(self.config))

    @property
    def done(self) -> set[Trial]:
        """The trials that have failed or have a curve on the test split."""
        measured = {trial for trial, curves in self.curves.items() if any(split == "test" for split, _ in curves)}
        return measured | set(self.failed)

    @property
    def unfinished(self) -> list[Trial]:
        """The planned trials that are not done."""
        done = self.done
        return [trial for trial in self.planned if trial not in done]

    def told_values(self) -> dict[str, Any]:
        """Returns dotted config key -> value, without the keys in `UNTOLD`."""
        told, declared = {}, dict(KEYS.leaves())
        for name, value in _flat(self.config):
            if not any(name == key or name.startswith(f"{key}.") for key in UNTOLD):
                told[name] = declared[name].renewed(value) if name in declared else value
        return told


def _task_of(record: CurveRecord, own: str) -> str:
    """Returns the run's own task, or a task of the harness with the number of examples in its prompts."""
    if not record.harness:
        return own
    return f"{record.task}, {record.shots} shot{'' if record.shots == 1 else 's'}"


def config_differences(folders: Iterable[RunRecords]) -> dict[str, list[str]]:
    """Returns dotted config key -> its distinct values as text, for the keys in which the folders differ."""
    configs = [folder.told_values() for folder in folders]
    found = {}
    for name in dict.fromkeys(name for config in configs for name in config):
        values = list(dict.fromkeys(_text(config[name]) if name in config else "not set" for config in configs))
        if len(values) > 1:
            found[name] = values
    return found


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _text(value: Any) -> str:
    return value if isinstance(value, str) and value else json.dumps(value)
