"""The queue of a cell of the study: which trials to train until the best learning rate of every rival has its seeds."""

from __future__ import annotations

import math
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from mlora_jax.config_type import ConfigDict
from mlora_jax.core import aurac
from mlora_jax.run.train import train
from mlora_jax.study.keys import without_study
from mlora_jax.study.records import append_new, read_measured
from mlora_jax.study.rivals import Rival, rivals_of
from mlora_jax.training.curve_records import CurveKey, CurvesOnRecord
from mlora_jax.trials import Trial


def score(curves: CurvesOnRecord, rival: Rival, trial: Trial) -> float | None:
    """Returns the score by which a learning rate is chosen, measured on the validation rows.

    Args:
      curves: the curves on record.
      rival: the rival that the trial belongs to.
      trial: a trial of this rival.

    Returns:
      The AURAC over log2 rank, or the accuracy at the only rank of a rival that is trained at a rank by itself. None if
      the trial is not measured yet, and -inf if it failed.
    """
    if trial.name in curves.failed:
        return -math.inf
    record = curves.get(CurveKey(trial.name, "validation", rival.readout))
    if record is None:
        return None
    return record.accuracies[-1] if rival.rank is not None else aurac(record.accuracies, record.ranks)


def wanted(curves: CurvesOnRecord, rival: Rival, rank: int, options: Mapping[str, Any]) -> list[Trial]:
    """Returns the trials that a rival needs next, none if it is finished.

    Learning rates are screened with the first seed until the best one is not at the edge of those tried. Then the other
    seeds follow at the best learning rate.

    Args:
      curves: the curves on record so far.
      rival: a rival of the study.
      rank: the rank R of the study.
      options: the values of `config.study`.
    """
    ladder, seed = options["rates"], options["seeds"][0]
    tried = scores(curves, rival, rank, options)
    missing = [rate for rate in options["start"] if tried[rate] is None]
    if missing:
        return [rival.trial(rank, rate, seed) for rate in missing]
    best = best_rate(tried)
    at = ladder.index(best)
    missing = [rate for rate in ladder[max(at - 1, 0) : at + 2] if tried[rate] is None]
    if missing:
        return [rival.trial(rank, rate, seed) for rate in missing]
    if tried[best] == -math.inf:
        return []  # Every learning rate has failed.
    trials = [rival.trial(rank, best, seed) for seed in options["seeds"][1:]]
    return [trial for trial in trials if score(curves, rival, trial) is None]


def scores(curves: CurvesOnRecord, rival: Rival, rank: int, options: Mapping[str, Any]) -> dict[float, float | None]:
    """Returns learning rate -> its score with the first seed, or -inf where any seed failed."""
    first, *others = options["seeds"]
    found = {rate: score(curves, rival, rival.trial(rank, rate, first)) for rate in options["rates"]}
    for rate in found:
        if any(score(curves, rival, rival.trial(rank, rate, seed)) == -math.inf for seed in others):
            found[rate] = -math.inf
    return found


def best_rate(tried: Mapping[float, float | None]) -> float:
    """Returns the learning rate with the best score; among equal scores the smallest learning rate."""
    measured = [(value, -rate) for rate, value in tried.items() if value is not None]
    return -max(measured)[1]


def run_cell(
    config: ConfigDict,
    workdir: str | os.PathLike[str],
    *,
    groups: Sequence[str],
    before_each: Callable[[], None] = lambda: None,
    records: str | os.PathLike[str] | None = None,
    origin: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Trains all trials of a cell; it does not train again what an earlier call has finished.

    Args:
      config: the config of the cell. `config.study` says what is compared, and its trials replace `config.trials`.
      workdir: the folder of the cell.
      groups: the groups of `config.study.groups` to train.
      before_each: a function that is called before each round of trials. It may raise an exception to stop.
      records: the cell's file of records, see `mlora_jax.study.records`. Trials that it holds are not trained again,
        and every trial is appended when it is finished. None: there is none.
      origin: what each new line of the records says about the code.

    Raises:
      ValueError: the records belong to another config, base or data.
      Interrupted: a signal asked to stop. Everything is saved, and another call continues.
    """
    rivals = rivals_of(groups, rank := config.study.rank)
    readouts: dict[str, list[str]] = {}
    for rival in rivals:
        known = readouts.setdefault(rival.method, [])
        known += [rival.readout] if rival.readout not in known else []

    def save(trial: Trial) -> None:
        if records is not None:
            append_new(workdir, records, config, origin=origin)

    values = without_study(config).to_dict()
    values["evaluation"]["readouts"] |= {method: tuple(known) for method, known in readouts.items()}
    while True:
        curves = read_measured(workdir, records, config).curves
        trials = list(dict.fromkeys(trial for rival in rivals for trial in wanted(curves, rival, rank, config.study)))
        if not trials:
            return
        before_each()
        values["trials"]["list"] = tuple(as_entry(trial) for trial in trials)
        train(values, pathlib.Path(workdir), after_trial=save)


def as_entry(trial: Trial) -> dict[str, Any]:
    """Returns a trial as an entry of `config.trials.list`."""
    return {axis: (value,) for axis, value in trial.to_json().items()}
