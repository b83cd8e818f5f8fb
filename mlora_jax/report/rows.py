"""Curves of single trials, from one run or many, gathered into one row per method, read-out and learning rate."""

from __future__ import annotations

import collections
import dataclasses
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from mlora_jax.core import METHODS, READOUTS, summarize
from mlora_jax.core.readouts import readout_label
from mlora_jax.report.folders import RunRecords
from mlora_jax.trials import Trial, describe_axes


@dataclasses.dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation over seeds; the deviation of one seed is None."""

    mean: float
    deviation: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)


# The axes of trials that tell the rows of one table apart, or over which a row is averaged.
WITHIN_A_TABLE = ("method", "learning_rate", "seed")


@dataclasses.dataclass(frozen=True, order=True)
class Setting:
    """What the rows of one table share.

    Attributes:
      axes: the names and values of the trials' axes but those of `WITHIN_A_TABLE`.
      ranks: the ranks S of the read-outs.
    """

    axes: tuple[tuple[str, Any], ...]
    ranks: tuple[int, ...]

    @classmethod
    def of(cls, trial: Trial, ranks: Iterable[int]) -> Setting:
        """The setting of a trial that was read out at some ranks."""
        return cls(trial.without(*WITHIN_A_TABLE), tuple(ranks))

    @property
    def values(self) -> dict[str, Any]:
        """Axis -> value."""
        return dict(self.axes)

    def without(self, axis: str) -> Setting:
        """What it has in common with settings that differ in one axis alone."""
        return dataclasses.replace(self, axes=tuple(each for each in self.axes if each[0] != axis))

    def __str__(self) -> str:
        return describe_axes(self.values)


@dataclasses.dataclass(frozen=True)
class CurveOverSeeds:
    """A rank-accuracy curve over seeds.

    Attributes:
      accuracies: rank -> accuracy in 0..1.
      linear, log2, mean: AURAC over either axis, and the plain mean.
      areas: AURAC over log2 rank, of every seed.
    """

    accuracies: dict[int, Spread]
    linear: Spread
    log2: Spread
    mean: Spread
    areas: tuple[float, ...]

    @classmethod
    def of(cls, curves: Sequence[dict[int, float]]) -> CurveOverSeeds:
        """Of the curves [seeds], all over the same increasing ranks."""
        ranks = list(curves[0])
        areas = [summarize(list(curve.values()), ranks) for curve in curves]
        return cls(
            {rank: Spread.of([curve[rank] for curve in curves]) for rank in ranks},
            *(Spread.of([getattr(area, name) for area in areas]) for name in ("linear", "log2", "mean")),
            tuple(area.log2 for area in areas),
        )


@dataclasses.dataclass(frozen=True)
class CurveRow:
    """One learning rate of one method and read-out, over seeds.

    Attributes:
      setting: what the rows of one table share.
      method: a key of `METHODS`.
      readout: a key of `READOUTS`.
      learning_rate: peak.
      seeds: the seeds that finished.
      failed: the seeds whose loss became infinite or NaN.
      unfinished: the other seeds that a run's config plans.
      measured: split -> what was measured on it; "validation" only if every seed has it.
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
        return self.measured["test"]

    @property
    def absent(self) -> tuple[int, ...]:
        """The seeds that there should be and are not."""
        return *self.failed, *self.unfinished

    @property
    def label(self) -> str:
        """How tables and figures call the row."""
        return readout_label(self.method, self.readout)

    @property
    def group(self) -> tuple[Setting, str, str]:
        """What the learning rates of one method and read-out share."""
        return self.setting, self.method, self.readout


@dataclasses.dataclass(frozen=True)
class MergedRuns:
    """What runs of one base model measured on one task, taken together.

    Attributes:
      folders: of the runs.
      rows: one per (setting, method, read-out, learning rate), in the table's order.
      failed: names of the trials whose loss became infinite or NaN.
      number: tells it from others of the same title; 0 if there are none.
    """

    folders: tuple[RunRecords, ...]
    rows: list[CurveRow]
    failed: list[str]
    number: int = 0

    @property
    def task(self) -> str:
        return self.folders[0].task

    @property
    def base_model(self) -> str:
        return self.folders[0].base_model

    @property
    def title(self) -> str:
        return f"{self.task} on {self.base_model}" + (f" ({self.number})" if self.number else "")

    @property
    def base(self) -> dict[str, float]:
        """Split -> accuracy of the model without an adapter, of the first run that measured it."""
        return {split: value for folder in reversed(self.folders) for split, value in folder.base.items()}


def read_runs(folders: Iterable) -> list[MergedRuns]:
    """Reads runs, and merges those of one task and base model; what they measured on other tasks follows.

    Runs of other paths that end in the same names are merged if the base has the same accuracy in them.

    Args:
      folders: paths of run folders.

    Raises:
      FileNotFoundError, ValueError: a folder without records, unreadable ones, or a trial that two folders hold.
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
    # (setting, read-out, all of a trial but its seed) -> seed -> split -> curve
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
    """The seeds of the trials that have all else in common."""
    found: dict[tuple, set[int]] = collections.defaultdict(set)
    for trial in trials:
        found[trial.without("seed")].add(trial.seed)
    return found


def _order(row: CurveRow) -> tuple:
    methods = [*METHODS, row.method]
    readouts = [*READOUTS, row.readout]
    return row.setting, methods.index(row.method), row.method, readouts.index(row.readout), row.learning_rate
