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
      split: where the choice was made, "validation" or "test".
      shown: the rows that stand for their method: the chosen ones, those without an alternative, and all of the
        undecided.
      chosen: those of several learning rates that were chosen.
      left_out: rows that could not be chosen, since another learning rate of theirs lacks fewer seeds.
      undecided: rows of several learning rates without accuracies on that split.
    """

    split: str
    shown: list[CurveRow]
    chosen: list[CurveRow]
    left_out: list[CurveRow]
    undecided: list[CurveRow]


def choose_rows(rows: Iterable[CurveRow], split: str) -> Choice:
    """Per (setting, method, read-out) the learning rate with the highest mean AURAC over log2 rank.

    A mean over the seeds that survived says little of a learning rate at which others diverged: only the learning
    rates that lack the fewest seeds, failed or planned and not finished, can be chosen. Their means are over the seeds
    that all of them have, or over all seeds where they share none. Of equal ones the smallest is chosen.

    Args:
      rows: of any settings.
      split: "validation" or "test".
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
    """The seeds that finished in every row, sorted."""
    return tuple(sorted(set.intersection(*(set(row.seeds) for row in rows))))


def _mean(row: CurveRow, split: str, seeds: Iterable[int]) -> float:
    by_seed = dict(zip(row.seeds, row.measured[split].areas, strict=True))
    return statistics.fmean(by_seed[seed] for seed in seeds)


@dataclasses.dataclass(frozen=True)
class Difference:
    """AURAC (log2, test split) of one row less that of another.

    Attributes:
      first, second: the rows.
      value: the difference of the means.
      clear: the bands mean ± one standard deviation do not overlap; None if a row has one seed, so no spread.
    """

    first: CurveRow
    second: CurveRow
    value: float
    clear: bool | None


def compare(first: CurveRow, second: CurveRow) -> Difference:
    """The difference of two rows, and whether it exceeds the spread over seeds."""
    one, other = first.test.log2, second.test.log2
    value = one.mean - other.mean
    if one.deviation is None or other.deviation is None:
        return Difference(first, second, value, None)
    return Difference(first, second, value, abs(value) > one.deviation + other.deviation)
