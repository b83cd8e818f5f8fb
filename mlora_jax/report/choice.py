"""Which learning rate stands for a method, and which differences between methods exceed the seeds' spread."""

from __future__ import annotations

import collections
import dataclasses
import statistics
from collections.abc import Iterable

from mlora_jax.report.rows import CurveRow


@dataclasses.dataclass(frozen=True)
class Choice:
    """The outcome of choosing a learning rate per (setting, method, read-out).

    Attributes:
      split: the split on which the choice was made, "validation" or "test".
      shown: the rows that represent their method: the chosen rows, the rows without an alternative, and all undecided
        rows.
      chosen: the rows that were chosen among several learning rates.
      left_out: the rows that could not be chosen, because another learning rate of the same method lacks fewer seeds.
      undecided: the rows with several learning rates but without accuracies on that split.
    """

    split: str
    shown: list[CurveRow]
    chosen: list[CurveRow]
    left_out: list[CurveRow]
    undecided: list[CurveRow]


def choose_rows(rows: Iterable[CurveRow], split: str) -> Choice:
    """Chooses per (setting, method, read-out) the learning rate with the highest mean AURAC over log2 rank.

    The mean over the seeds that survived says little about a learning rate at which other seeds diverged. Therefore
    only the learning rates that lack the fewest seeds can be chosen; a seed is lacking if it failed or if it is planned
    and not finished. The means are taken over the seeds that all these learning rates have, or over all seeds of each
    where they share none. Among equal means the smallest learning rate is chosen.

    Args:
      rows: the rows to choose among; they may belong to different settings.
      split: "validation" or "test".

    Returns:
      The rows, sorted into those that are chosen, left out or undecided.
    """
    groups: dict[tuple, list[CurveRow]] = collections.defaultdict(list)
    for row in rows:
        groups[row.group].append(row)
    choice = Choice(split, [], [], [], [])
    for rates in groups.values():
        if len(rates) == 1:
            choice.shown.extend(rates)
        elif any(split not in row.measured for row in rates):
            choice.shown.extend(rates)
            choice.undecided.extend(rates)
        else:
            fewest = min(len(row.absent) for row in rates)
            able = sorted((row for row in rates if len(row.absent) == fewest), key=lambda row: row.learning_rate)
            shared = shared_seeds(able)
            best = max(able, key=lambda row: _mean(row, split, shared or row.seeds))
            choice.shown.append(best)
            choice.chosen.append(best)
            choice.left_out.extend(row for row in rates if len(row.absent) > fewest)
    return choice


def shared_seeds(rows: Iterable[CurveRow]) -> tuple[int, ...]:
    """Returns the seeds that finished in every row, sorted."""
    return tuple(sorted(set.intersection(*(set(row.seeds) for row in rows))))


def _mean(row: CurveRow, split: str, seeds: Iterable[int]) -> float:
    by_seed = dict(zip(row.seeds, row.measured[split].areas, strict=True))
    return statistics.fmean(by_seed[seed] for seed in seeds)


@dataclasses.dataclass(frozen=True)
class Difference:
    """The AURAC (log2, test split) of one row minus that of another.

    Attributes:
      first, second: the two rows.
      value: the mean AURAC of `first` minus that of `second`.
      clear: whether the bands mean ± one standard deviation do not overlap; None if a row has only one seed, because it
        then has no spread.
    """

    first: CurveRow
    second: CurveRow
    value: float
    clear: bool | None


def compare(first: CurveRow, second: CurveRow) -> Difference:
    """Returns the difference of two rows, and whether it exceeds the spread over seeds."""
    one, other = first.test.log2, second.test.log2
    value = one.mean - other.mean
    if one.deviation is None or other.deviation is None:
        return Difference(first, second, value, None)
    return Difference(first, second, value, abs(value) > one.deviation + other.deviation)
