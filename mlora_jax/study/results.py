"""What a cell of the study has found so far, and how sure its differences are."""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Sequence

import numpy as np
from scipy.special import stdtrit

from mlora_jax.config import further_methods
from mlora_jax.config_type import ConfigDict
from mlora_jax.core import aurac, get_method
from mlora_jax.evaluate import Interval
from mlora_jax.run.folder import load_verdicts
from mlora_jax.study.queue import best_rate, scores, wanted
from mlora_jax.study.rivals import Rival, rivals_of
from mlora_jax.training.curve_records import CURVES, CurveKey, read_curves


@dataclasses.dataclass(frozen=True)
class MeasuredRival:
    """A rival at its chosen learning rate.

    Attributes:
      rival: which.
      learning_rate: the best on the validation rows.
      at_edge: whether it is the smallest or the largest there is, so that a better one may lie beyond.
      ranks: of the curve.
      verdicts: seed -> [ranks, items] bool on the test rows.
      cost: forward and backward passes relative to one LoRA's.
      complete: whether nothing of it is left to train.
    """

    rival: Rival
    learning_rate: float
    at_edge: bool
    ranks: tuple[int, ...]
    verdicts: dict[int, np.ndarray]
    cost: float
    complete: bool

    def accuracies(self) -> np.ndarray:
        """[seeds, ranks]."""
        return np.stack([verdicts.mean(axis=1) for verdicts in self.verdicts.values()])

    def areas(self) -> np.ndarray:
        """AURAC over log2 rank [seeds]."""
        return np.array([aurac(row, self.ranks) for row in self.accuracies()])


@dataclasses.dataclass(frozen=True)
class Cell:
    """One model and one task.

    Attributes:
      name: of its config.
      base: accuracy without an adapter on the test rows; NaN before it is measured.
      items: test rows.
      rank: R.
      measured: the rivals that have at least one test curve at their chosen learning rate, in the order of the study.
      unfinished: the others.
    """

    name: str
    base: float
    items: int
    rank: int
    measured: dict[Rival, MeasuredRival]
    unfinished: tuple[Rival, ...]

    def separate(self) -> dict[int, MeasuredRival]:
        """Rank -> LoRA trained at that rank by itself, where that is finished."""
        finished = [found for found in self.measured.values() if found.complete and found.rival.rank is not None]
        return {found.rival.rank: found for found in finished}


def read_cell(name: str, config: ConfigDict, workdir) -> Cell:
    """A cell as far as it has come.

    Args:
      name: of the cell.
      config: of it.
      workdir: of the cell; it may not exist yet.
    """
    folder, rank = pathlib.Path(workdir), config.study.rank
    curves = read_curves(folder / CURVES)
    methods, measured, unfinished = further_methods(config), {}, []
    for rival in rivals_of(config.study.groups, rank):
        found = _measured(folder, curves, rival, rank, config.study, methods)
        if found:
            measured[rival] = found
        if not found or not found.complete:
            unfinished.append(rival)
    base = curves.base().get("test")
    accuracy, items = (base.accuracies[0], base.items) if base else (math.nan, 0)
    return Cell(name, accuracy, items, rank, measured, tuple(unfinished))


def _measured(folder, curves, rival: Rival, rank: int, options, methods) -> MeasuredRival | None:
    tried = scores(curves, rival, rank, options)
    if all(value in (None, -math.inf) for value in tried.values()):
        return None
    best = best_rate(tried)
    verdicts, ranks = {}, ()
    for seed in options.seeds:
        trial = rival.trial(rank, best, seed)
        found = load_verdicts(folder, trial.name, rival.readout, "test")
        record = curves.get(CurveKey(trial.name, "test", rival.readout))
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
    """The mean of values over seeds and items, and its interval for other seeds and other items.

    Two-way random effects: the variance of the mean is that of the seeds' means and that of the items' means less what
    both share, and Student's t has as many degrees of freedom as that sum of mean squares. With three seeds it covers
    its share to within .025 (tested), where a percentile bootstrap over seeds and items covers .77 to .93. Of one seed
    it is over the items alone.

    Args:
      z: [seeds, items].
      confidence: share of such intervals that hold the true mean.

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
    """AURAC over log2 rank, its interval over items and seeds."""
    return interval(_areas(measured, tuple(measured.verdicts)))


def difference(first: MeasuredRival, second: MeasuredRival) -> Interval:
    """AURAC of the first less that of the second, on the same items and seeds.

    Raises:
      ValueError: they share no seed, or were measured at other ranks.
    """
    seeds = _shared_seeds(first, second)
    if first.ranks != second.ranks:
        raise ValueError(f"curves over ranks {first.ranks} and {second.ranks} cannot be compared")
    return interval(_areas(first, seeds) - _areas(second, seeds))


def regret(measured: MeasuredRival, ceiling: MeasuredRival) -> Interval:
    """How far the accuracy at the only rank of `ceiling` is above that of a curve at this rank."""
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
    """AURAC is linear in the accuracies: the share of every item in it, [seeds, items]."""
    weights = np.array([aurac(unit, measured.ranks) for unit in np.eye(len(measured.ranks))])
    return np.stack([weights @ measured.verdicts[seed] for seed in seeds])
