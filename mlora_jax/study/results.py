"""What a cell of the study has found so far, and how sure its differences are."""

from __future__ import annotations

import dataclasses
import functools
import math
import pathlib
from collections.abc import Sequence

import numpy as np
from ml_collections import ConfigDict

from mlora_jax.config import further_methods
from mlora_jax.core import aurac, get_method
from mlora_jax.evaluate import Interval
from mlora_jax.run_folder import load_verdicts, read_curves
from mlora_jax.study.queue import best_rate, scores, wanted
from mlora_jax.study.rivals import Rival, rivals_of

SAMPLES = 4000  # of every bootstrap


@dataclasses.dataclass(frozen=True)
class Measured:
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
    measured: dict[Rival, Measured]
    unfinished: tuple[Rival, ...]

    def separate(self) -> dict[int, Measured]:
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
    folder, curves, rank = pathlib.Path(workdir), read_curves(workdir), config.study.rank
    methods, measured, unfinished = further_methods(config), {}, []
    for rival in rivals_of(config.study.groups, rank):
        found = _measured(folder, curves, rival, rank, config.study, methods)
        if found:
            measured[rival] = found
        if not found or not found.complete:
            unfinished.append(rival)
    base = curves.get("base", {}).get(("base", "test"), [{"accuracy": math.nan, "items": 0}])[0]
    return Cell(name, base["accuracy"], base["items"], rank, measured, tuple(unfinished))


def _measured(folder, curves, rival: Rival, rank: int, options, methods) -> Measured | None:
    tried = scores(curves, rival, rank, options)
    if all(value in (None, -math.inf) for value in tried.values()):
        return None
    best = best_rate(tried)
    verdicts, ranks = {}, ()
    for seed in options.seeds:
        trial = rival.trial(rank, best, seed)
        found = load_verdicts(folder, trial.name, rival.readout, "test")
        records = curves.get(trial.name, {}).get((rival.readout, "test"))
        if found is None or records is None:
            continue
        ranks = tuple(record["at_rank"] for record in records)
        if rival.rank is not None:
            found, ranks = found[-1:], ranks[-1:]
        verdicts[seed] = found
    if not verdicts:
        return None
    cost = get_method(rival.method, methods).cost(rival.trial(rank, best, 0).hierarchy())
    edge = best in (options.rates[0], options.rates[-1])
    complete = not wanted(curves, rival, rank, options)
    return Measured(rival, best, edge, ranks, verdicts, cost, complete)


def interval(z: np.ndarray, *, seed: int = 0, confidence: float = 0.95) -> Interval:
    """The mean of values over seeds and items, and its percentile bootstrap interval over both.

    Seeds and items are drawn anew independently of each other, so what all items of a seed or all seeds of an item
    share is kept. With few seeds the interval is rather too narrow.

    Args:
      z: [seeds, items].
      seed: of the draws.
      confidence: share of the samples within the interval.

    Source: the pigeonhole bootstrap, Owen (2007), Annals of Applied Statistics 1.
    """
    rows, columns = _shares(*z.shape, seed)
    means = np.einsum("ns,ns->n", rows, columns @ z.T)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(low), float(high), float(z.mean()))


@functools.lru_cache(maxsize=8)
def _shares(seeds: int, items: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """What share of the draws each seed has [samples, seeds], and each item [samples, items]."""
    random = np.random.default_rng(seed)
    counts = [random.multinomial(count, np.full(count, 1 / count), size=SAMPLES) for count in (seeds, items)]
    return tuple((drawn / drawn[0].sum()).astype(np.float32) for drawn in counts)


def area_interval(measured: Measured) -> Interval:
    """AURAC over log2 rank, its interval over items and seeds."""
    return interval(_areas(measured, tuple(measured.verdicts)))


def difference(first: Measured, second: Measured) -> Interval:
    """AURAC of the first less that of the second, on the same items and seeds.

    Raises:
      ValueError: they share no seed, or were measured at other ranks.
    """
    seeds = _shared_seeds(first, second)
    if first.ranks != second.ranks:
        raise ValueError(f"curves over ranks {first.ranks} and {second.ranks} cannot be compared")
    return interval(_areas(first, seeds) - _areas(second, seeds))


def regret(measured: Measured, ceiling: Measured) -> Interval:
    """How far the accuracy at the only rank of `ceiling` is above that of a curve at this rank."""
    seeds, (rank,) = _shared_seeds(measured, ceiling), ceiling.ranks[-1:]
    at, own = measured.ranks.index(rank), ceiling.ranks.index(rank)
    z = [ceiling.verdicts[seed][own].astype(float) - measured.verdicts[seed][at] for seed in seeds]
    return interval(np.stack(z))


def _shared_seeds(first: Measured, second: Measured) -> tuple[int, ...]:
    seeds = tuple(seed for seed in first.verdicts if seed in second.verdicts)
    if not seeds:
        raise ValueError(f"{first.rival.name} and {second.rival.name} share no seed")
    return seeds


def _areas(measured: Measured, seeds: Sequence[int]) -> np.ndarray:
    """AURAC is linear in the accuracies: the share of every item in it, [seeds, items]."""
    weights = np.array([aurac(unit, measured.ranks) for unit in np.eye(len(measured.ranks))])
    return np.stack([weights @ measured.verdicts[seed] for seed in seeds])
