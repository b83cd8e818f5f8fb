"""A cell of the study: which trials to train next, until the best learning rate of every rival has its seeds."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mlora_jax.config_type import ConfigDict
from mlora_jax.core import aurac
from mlora_jax.run.train import train
from mlora_jax.study.keys import without_study
from mlora_jax.study.rivals import Rival, rivals_of
from mlora_jax.training.curve_records import CURVES, CurveKey, CurvesOnRecord, read_curves
from mlora_jax.trials import Trial


def score(curves: CurvesOnRecord, rival: Rival, trial: Trial) -> float | None:
    """What a learning rate is chosen by, on the validation rows: AURAC over log2 rank, or accuracy at the only rank.

    None if it is not measured yet, -inf if the trial failed.
    """
    if trial.name in curves.failed:
        return -math.inf
    record = curves.get(CurveKey(trial.name, "validation", rival.readout))
    if record is None:
        return None
    return record.accuracies[-1] if rival.rank is not None else aurac(record.accuracies, record.ranks)


def wanted(curves: CurvesOnRecord, rival: Rival, rank: int, options: Mapping[str, Any]) -> list[Trial]:
    """The trials that a rival needs next: none if it is done.

    Learning rates are screened with one seed until the best is not at the edge of those tried; then the others seeds
    follow at the best.

    Args:
      curves: what is on record so far.
      rival: one of the study.
      rank: R of the study.
      options: `config.study`.
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
        return []  # all have failed
    trials = [rival.trial(rank, best, seed) for seed in options["seeds"][1:]]
    return [trial for trial in trials if score(curves, rival, trial) is None]


def scores(curves: CurvesOnRecord, rival: Rival, rank: int, options: Mapping[str, Any]) -> dict[float, float | None]:
    """The score of every learning rate by the first seed; -inf where any seed failed."""
    first, *others = options["seeds"]
    found = {rate: score(curves, rival, rival.trial(rank, rate, first)) for rate in options["rates"]}
    for rate in found:
        if any(score(curves, rival, rival.trial(rank, rate, seed)) == -math.inf for seed in others):
            found[rate] = -math.inf
    return found


def best_rate(tried: Mapping[float, float | None]) -> float:
    """The learning rate of the best score; of equal ones the smallest."""
    return max((rate for rate in tried if tried[rate] is not None), key=lambda rate: (tried[rate], -rate))


def run_cell(
    config: ConfigDict, workdir, *, groups: Sequence[str], before_each: Callable[[], None] = lambda: None
) -> None:
    """Trains a cell to its end; what an earlier call has finished is kept.

    Args:
      config: of the experiment, whose `study` says what is compared; its trials are replaced.
      workdir: of the cell.
      groups: those of `config.study.groups` to train.
      before_each: called before each round of trials; may raise to leave.

    Raises:
      Interrupted: a signal came; all is saved, and another call goes on.
    """
    rivals = rivals_of(groups, rank := config.study.rank)
    readouts: dict[str, list[str]] = {}
    for rival in rivals:
        known = readouts.setdefault(rival.method, [])
        known += [rival.readout] if rival.readout not in known else []
    values = without_study(config).to_dict()
    values["evaluation"]["readouts"] |= {method: tuple(known) for method, known in readouts.items()}
    while True:
        curves = read_curves(pathlib.Path(workdir) / CURVES)
        trials = list(dict.fromkeys(trial for rival in rivals for trial in wanted(curves, rival, rank, config.study)))
        if not trials:
            return
        before_each()
        values["trials"]["list"] = tuple(as_entry(trial) for trial in trials)
        train(values, pathlib.Path(workdir))


def as_entry(trial: Trial) -> dict[str, Any]:
    """A trial as an entry of `config.trials.list`."""
    return {axis: (value,) for axis, value in trial.to_json().items()}
