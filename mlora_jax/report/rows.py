"""Curves of single trials, from one run or many, gathered into one row per method, read-out and learning rate."""

from __future__ import annotations

import collections
import dataclasses
import os
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from mlora_jax.core import METHODS, READOUTS, summarize
from mlora_jax.core.readouts import readout_label
from mlora_jax.report.folders import RunRecords
from mlora_jax.trials import Trial, describe_axes


@dataclasses.dataclass(frozen=True)
class Spread:
    """The mean and the sample standard deviation over seeds.

    Attributes:
      mean: the mean.
      deviation: the sample standard deviation; None for a single seed.
    """

    mean: float
    deviation: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Returns the spread of one value per seed."""
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)


# The axes of trials in which the rows of one table differ, or over which a row is averaged.
WITHIN_A_TABLE = ("method", "learning_rate", "seed")


@dataclasses.dataclass(frozen=True, order=True)
class Setting:
    """The values that all rows of one table share.

    Attributes:
      axes: the names and values of the trials' axes, except those of `WITHIN_A_TABLE`.
      ranks: the ranks S of the read-outs.
    """

    axes: tuple[tuple[str, Any], ...]
    ranks: tuple[int, ...]

    @classmethod
    def of(cls, trial: Trial, ranks: Iterable[int]) -> Setting:
        """Returns the setting of a trial that was read out at some ranks."""
        return cls(trial.without(*WITHIN_A_TABLE), tuple(ranks))

    @property
    def values(self) -> dict[str, Any]:
        """The name of each axis -> its value."""
        return dict(self.axes)

    def without(self, axis: str) -> Setting:
        """Returns the setting with one axis removed; settings that differ in that axis alone become equal."""
        return dataclasses.replace(self, axes=tuple(each for each in self.axes if each[0] != axis))

    def __str__(self) -> str:
        return describe_axes(self.values)


@dataclasses.dataclass(frozen=True)
class CurveOverSeeds:
    """A rank-accuracy curve over seeds.

    Attributes:
      accuracies: rank -> accuracy in 0..1.
      linear: the AURAC over rank.
      log2: the AURAC over log2 rank.
      mean: the mean of the accuracies over the ranks.
      areas: [seeds], the AURAC over log2 rank for every seed.
    """

    accuracies: dict[int, Spread]
    linear: Spread
    log2: Spread
    mean: Spread
    areas: tuple[float, ...]

    @classmethod
    def of(cls, curves: Sequence[dict[int, float]]) -> CurveOverSeeds:
        """Returns the statistics of one curve per seed.

        Args:
          curves: [seeds], each rank -> accuracy; all curves have the same increasing ranks.
        """
        ranks = list(curves[0])
        areas = [summarize(list(curve.values()), ranks) for curve in curves]
        return cls(
            accuracies={rank: Spread.of([curve[rank] for curve in curves]) for rank in ranks},
            linear=Spread.of([area.linear for area in areas]),
            log2=Spread.of([area.log2 for area in areas]),
            mean=Spread.of([area.mean for area in areas]),
            areas=tuple(area.log2 for area in areas),
        )


@dataclasses.dataclass(frozen=True)
class CurveRow:
    """The results of one method, read-out and learning rate, over seeds.

    Attributes:
      setting: the values that all rows of the same table share.
      method: the name of a method, of `METHODS` or of `config.methods`.
      readout: a key of `READOUTS`.
      learning_rate: the peak learning rate.
      seeds: the seeds that finished.
      failed: the seeds whose loss became infinite or NaN.
      unfinished: the other seeds that the config of a run plans.
      measured: split -> the curve on it; "validation" is present only if every seed has it.
    """

    setting: Setting
    method: str
    readout: str
    learning_rate: float
    seeds: tuple[int, ...]
    failed: tuple[int, ...]
    unfinished: tuple[int, ...]
    measured: dict[str, CurveOverSeeds]

    @property
    def test(self) -> CurveOverSeeds:
        """The curve on the test split."""
        return self.measured["test"]

    @property
    def absent(self) -> tuple[int, ...]:
        """The seeds that are planned but have no curve: those that failed and those that are not finished."""
        return *self.failed, *self.unfinished

    @property
    def label(self) -> str:
        """The name of the row in tables and figures."""
        return readout_label(self.method, self.readout)

    @property
    def group(self) -> tuple[Setting, str, str]:
        """The setting, the method and the read-out: rows that differ in the learning rate alone have the same group."""
        return self.setting, self.method, self.readout


@dataclasses.dataclass(frozen=True)
class MergedRuns:
    """The merged measurements of one or more runs of the same base model on one task.

    Attributes:
      folders: the records of each run.
      rows: one row per (setting, method, read-out, learning rate), in the order of the table.
      failed: the names of the trials whose loss became infinite or NaN.
      number: a number from 1 that distinguishes merged runs with the same title; 0 if no other has this title.
    """

    folders: tuple[RunRecords, ...]
    rows: list[CurveRow]
    failed: list[str]
    number: int = 0

    @property
    def task(self) -> str:
        """The name of the task."""
        return self.folders[0].task

    @property
    def base_model(self) -> str:
        """The last part of the base model's path."""
        return self.folders[0].base_model

    @property
    def title(self) -> str:
        """The task and the base model in words, with the number if there is one."""
        return f"{self.task} on {self.base_model}" + (f" ({self.number})" if self.number else "")

    @property
    def base(self) -> dict[str, float]:
        """Split -> accuracy of the model without an adapter, from the first run that measured it."""
        return {split: value for folder in reversed(self.folders) for split, value in folder.base.items()}


def read_runs(folders: Iterable[str | os.PathLike[str]]) -> list[MergedRuns]:
    """Reads runs and merges those that share the task and the base model.

    Models or data at different paths count as the same if the paths end in the same name and the base has the same
    accuracy.

    Args:
      folders: the paths of the run folders.

    Returns:
      One entry per task and base model; for each run its own task comes before the other tasks.

    Raises:
      FileNotFoundError: a folder has no records.
      ValueError: records are unreadable, or two folders hold the same trial.
    """
    groups: list[list[RunRecords]] = []
    for records in (records for path in folders for records in RunRecords.read(path)):
        alike = next((group for group in groups if records.is_like(group[0])), None)
        if alike is None:
            groups.append([records])
        else:
            alike.append(records)
    by_title: dict[str, list[MergedRuns]] = collections.defaultdict(list)
    for merged in map(_merge, groups):
        by_title[merged.title].append(merged)
    return [
        dataclasses.replace(merged, number=number if len(same) > 1 else 0)
        for same in by_title.values()
        for number, merged in enumerate(same, start=1)
    ]


def _merge(folders: list[RunRecords]) -> MergedRuns:
    holders: dict = {}
    for folder in folders:
        for trial in (*folder.curves, *(trial for trial in folder.failed if trial not in folder.curves)):
            if trial in holders:
                raise ValueError(
                    f"the trial {trial.in_words} is in {holders[trial]} and in {folder.path}; a table can hold it "
                    "once: leave one of the folders out, or write a table for each"
                )
            holders[trial] = folder.path
    done = {trial for folder in folders for trial in folder.done}
    failed = _seeds(trial for folder in folders for trial in folder.failed)
    unfinished = _seeds(trial for folder in folders for trial in folder.planned if trial not in done)
    # (setting, read-out, the values of a trial except its seed) -> seed -> split -> curve
    curves: dict = collections.defaultdict(lambda: collections.defaultdict(dict))
    for folder in folders:
        for trial, of_trial in folder.curves.items():
            for (split, readout), curve in of_trial.items():
                curves[Setting.of(trial, curve), readout, trial.without("seed")][trial.seed][split] = curve
    rows = []
    for (setting, readout, alike), by_seed in curves.items():
        finished = {seed: by_seed[seed] for seed in sorted(by_seed) if "test" in by_seed[seed]}
        if not finished:
            continue
        splits = [split for split in ("test", "validation") if all(split in each for each in finished.values())]
        measured = {split: CurveOverSeeds.of([each[split] for each in finished.values()]) for split in splits}
        seeds = tuple(finished), tuple(sorted(failed[alike])), tuple(sorted(unfinished[alike]))
        values = dict(alike)
        rows.append(CurveRow(setting, values["method"], readout, values["learning_rate"], *seeds, measured))
    rows.sort(key=_order)
    return MergedRuns(tuple(folders), rows, [name for folder in folders for name in folder.failed.values()])


def _seeds(trials: Iterable[Trial]) -> dict[tuple, set[int]]:
    """Returns the values of a trial except its seed -> the seeds of the trials with these values."""
    found: dict[tuple, set[int]] = collections.defaultdict(set)
    for trial in trials:
        found[trial.without("seed")].add(trial.seed)
    return found


def _order(row: CurveRow) -> tuple:
    methods = [*METHODS, row.method]
    readouts = [*READOUTS, row.readout]
    return row.setting, methods.index(row.method), row.method, readouts.index(row.readout), row.learning_rate
