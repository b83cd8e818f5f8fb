"""The results of a cell of the study so far, and confidence intervals of its differences."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence

import numpy as np
from scipy.special import stdtrit

from mlora_jax.config import further_methods
from mlora_jax.config_type import ConfigDict
from mlora_jax.core import Method, aurac, get_method
from mlora_jax.evaluate import Interval
from mlora_jax.study.queue import best_rate, scores, wanted
from mlora_jax.study.records import CellRecords, read_measured
from mlora_jax.study.rivals import Rival, rivals_of
from mlora_jax.training.curve_records import CurveKey


@dataclasses.dataclass(frozen=True)
class MeasuredRival:
    """The measurements of a rival at its chosen learning rate.

    Attributes:
      rival: the rival.
      learning_rate: the best learning rate on the validation rows.
      at_edge: whether this is the smallest or the largest learning rate of the study, so that a better one may lie
        outside of the range.
      ranks: the ranks of the curve.
      verdicts: seed -> [ranks, items] bool, whether each test item is answered correctly.
      cost: the number of forward and backward passes relative to LoRA.
      complete: whether all its trials are finished.
    """

    rival: Rival
    learning_rate: float
    at_edge: bool
    ranks: tuple[int, ...]
    verdicts: dict[int, np.ndarray]
    cost: float
    complete: bool

    def accuracies(self) -> np.ndarray:
        """Returns the accuracy for every seed and rank, [seeds, ranks]."""
        return np.stack([verdicts.mean(axis=1) for verdicts in self.verdicts.values()])

    def areas(self) -> np.ndarray:
        """Returns the AURAC over log2 rank for every seed, [seeds]."""
        return np.array([aurac(row, self.ranks) for row in self.accuracies()])


@dataclasses.dataclass(frozen=True)
class Cell:
    """The results of one cell: one model on one task.

    Attributes:
      name: the name of the cell's config without the leading "study_".
      base: the accuracy without an adapter on the test rows; NaN before it is measured.
      items: the number of test rows; 0 before the base is measured, and None if the records do not say.
      rank: the rank R of the nested adapters.
      measured: the rivals that have at least one test curve at their chosen learning rate, in the order of the study.
      unfinished: the rivals that have trials left to train, in the order of the study.
    """

    name: str
    base: float
    items: int | None
    rank: int
    measured: dict[Rival, MeasuredRival]
    unfinished: tuple[Rival, ...]

    def separate(self) -> dict[int, MeasuredRival]:
        """Returns rank -> LoRA trained at that rank by itself, for the ranks that are finished."""
        finished = [found for found in self.measured.values() if found.complete]
        return {found.rival.rank: found for found in finished if found.rival.rank is not None}


def read_cell(
    name: str,
    config: ConfigDict,
    workdir: str | os.PathLike[str],
    records: str | os.PathLike[str] | None = None,
) -> Cell:
    """Reads the results that a cell has so far.

    Args:
      name: the name of the cell.
      config: the config of the cell.
      workdir: the folder of the cell; it may not exist.
      records: the cell's file of records, which may not exist; None: there is none.
    """
    rank, found_all = config.study.rank, read_measured(workdir, records, config)
    methods, measured, unfinished = further_methods(config), {}, []
    for rival in rivals_of(config.study.groups, rank):
        found = _measured(found_all, rival, rank, config.study, methods)
        if found:
            measured[rival] = found
        if not found or not found.complete:
            unfinished.append(rival)
    base = found_all.curves.base().get("test")
    accuracy, items = (base.accuracies[0], base.items) if base else (math.nan, 0)
    return Cell(name, accuracy, items, rank, measured, tuple(unfinished))


def _measured(
    on_record: CellRecords,
    rival: Rival,
    rank: int,
    options: ConfigDict,
    methods: Mapping[str, Method],
) -> MeasuredRival | None:
    curves = on_record.curves
    tried = scores(curves, rival, rank, options)
    if all(value in (None, -math.inf) for value in tried.values()):
        return None
    best = best_rate(tried)
    verdicts, ranks = {}, ()
    for seed in options.seeds:
        trial = rival.trial(rank, best, seed)
        key = CurveKey(trial.name, "test", rival.readout)
        found, record = on_record.verdicts.get(key), curves.get(key)
        if found is None or record is None:
            continue
        ranks = record.ranks
        if rival.rank is not None:
            found, ranks = found[-1:], ranks[-1:]
        verdicts[seed] = found
    if not verdicts:
        return None
    cost = get_method(rival.method, methods).cost(rival.trial(rank, best, 0).hierarchy())
    edge = best in (options.rates[0], options.rates[-1])
    complete = not wanted(curves, rival, rank, options)
    return MeasuredRival(rival, best, edge, ranks, verdicts, cost, complete)


def interval(z: np.ndarray, *, confidence: float = 0.95) -> Interval:
    """Returns the mean of values over seeds and items, and its confidence interval over new seeds and new items.

    The model has two-way random effects. The variance of the mean is the variance of the seeds' means plus that of the
    items' means minus the part that both contain. Student's t has as many degrees of freedom as this sum of mean
    squares. With three seeds the coverage is within .025 of `confidence` (tested); a percentile bootstrap over seeds
    and items covers only .77 to .93. With one seed the interval is over the items alone.

    Args:
      z: [seeds, items], the values.
      confidence: the share of such intervals that contain the true mean.

    Source: Hillis (2007), Statistics in Medicine 26, equation 17, for readers and cases.
    """
    seeds, items = z.shape
    mean, of_seeds, of_items = z.mean(), z.mean(axis=1), z.mean(axis=0)
    if seeds == 1:
        variance, freedom = of_items.var(ddof=1) / items, items - 1.0
    else:
        by_seed, by_item = items * of_seeds.var(ddof=1), seeds * of_items.var(ddof=1)
        rest = np.sum((z - of_seeds[:, None] - of_items + mean) ** 2) / ((seeds - 1) * (items - 1))
        both = by_seed + max(by_item - rest, 0.0)
        variance, freedom = both / z.size, (both / by_seed) ** 2 * (seeds - 1) if by_seed else np.inf
    half = stdtrit(freedom, (1 + confidence) / 2) * np.sqrt(variance)
    return Interval(float(mean - half), float(mean + half), float(mean))


def area_interval(measured: MeasuredRival) -> Interval:
    """Returns the AURAC over log2 rank with its confidence interval over items and seeds."""
    return interval(_areas(measured, tuple(measured.verdicts)))


def difference(first: MeasuredRival, second: MeasuredRival) -> Interval:
    """Returns the AURAC of the first rival minus that of the second, paired on items and seeds.

    Raises:
      ValueError: the rivals share no seed, or were measured at different ranks.
    """
    seeds = _shared_seeds(first, second)
    if first.ranks != second.ranks:
        raise ValueError(f"curves over ranks {first.ranks} and {second.ranks} cannot be compared")
    return interval(_areas(first, seeds) - _areas(second, seeds))


def regret(measured: MeasuredRival, ceiling: MeasuredRival) -> Interval:
    """Returns the accuracy at the only rank of `ceiling` minus that of `measured` at the same rank, paired."""
    seeds, (rank,) = _shared_seeds(measured, ceiling), ceiling.ranks[-1:]
    at, own = measured.ranks.index(rank), ceiling.ranks.index(rank)
    z = [ceiling.verdicts[seed][own].astype(float) - measured.verdicts[seed][at] for seed in seeds]
    return interval(np.stack(z))


def _shared_seeds(first: MeasuredRival, second: MeasuredRival) -> tuple[int, ...]:
    seeds = tuple(seed for seed in first.verdicts if seed in second.verdicts)
    if not seeds:
        raise ValueError(f"{first.rival.name} and {second.rival.name} share no seed")
    return seeds


def _areas(measured: MeasuredRival, seeds: Sequence[int]) -> np.ndarray:
    """Returns the contribution of every item to the AURAC, [seeds, items]; the AURAC is linear in the accuracies."""
    weights = np.array([aurac(unit, measured.ranks) for unit in np.eye(len(measured.ranks)).tolist()])
    return np.stack([weights @ measured.verdicts[seed] for seed in seeds])
