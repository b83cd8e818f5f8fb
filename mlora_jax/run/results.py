"""What a run found, from its records."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from mlora_jax.core import summarize
from mlora_jax.evaluate import RankCurve
from mlora_jax.run.folder import RunFolder, task_key
from mlora_jax.run.harness_tasks import readouts_of
from mlora_jax.trials import Trial


@dataclasses.dataclass(frozen=True)
class TrialResult:
    """A finished trial: its adapter's folder and its curves by split, one per read-out.

    `failed` if its loss became infinite or NaN; then there are no curves, and the adapter is the last finite one.
    `task_curves` are those on `config.evaluation.tasks`, by task and number of examples, with per-item results.
    """

    trial: Trial
    adapter: pathlib.Path
    curves: dict[str, tuple[RankCurve, ...]]
    failed: bool
    task_curves: dict[tuple[str, int], tuple[RankCurve, ...]]


@dataclasses.dataclass(frozen=True)
class Results:
    """What a run found.

    Attributes:
      workdir: folder with config.json, metrics.jsonl, curves.jsonl, adapters/ and the report.
      base_accuracy: split -> accuracy of the model without an adapter.
      trials: one per trial of the config.
      compilations: executables compiled this time, for training steps and for evaluation; 0 if all was done before.
    """

    workdir: pathlib.Path
    base_accuracy: dict[str, float]
    trials: tuple[TrialResult, ...]
    compilations: dict[str, int]


def read_results(
    config: ConfigDict, folder: RunFolder, trials: Sequence[Trial], compilations: dict[str, int]
) -> Results:
    """What the records say."""
    measured, failed = folder.curves(), folder.failed()
    base = {split: records[0]["accuracy"] for (name, split, _), records in measured.items() if name == "base"}
    results = []
    for trial in trials:
        keys = [(trial.name, split, readout) for split in base for readout in readouts_of(config, trial)]
        found = {key: curve_of(measured[key]) for key in keys if key in measured}
        by_split = {split: tuple(curve for key, curve in found.items() if key[1] == split) for split in base}
        by_task: dict[tuple[str, int], tuple[RankCurve, ...]] = {}
        for (name, _, task, _), records in folder.harness_curves().items():
            if name == trial.name:
                key = task, records[0]["shots"]
                curve = curve_of(records)
                verdicts = folder.verdicts(trial.name, curve.readout, task_key(*key))
                curve = curve if verdicts is None else RankCurve.of(curve.readout, curve.ranks, verdicts)
                by_task[key] = (*by_task.get(key, ()), curve)
        results.append(TrialResult(trial, folder.adapter(trial), by_split, trial.name in failed, by_task))
    return Results(folder.path, base, tuple(results), compilations)


def curve_of(records: list[dict[str, Any]]) -> RankCurve:
    ranks, accuracies, errors = zip(*((r["at_rank"], r["accuracy"], r["stderr"]) for r in records), strict=True)
    areas = dataclasses.asdict(summarize(accuracies, ranks))
    return RankCurve(records[0]["readout"], ranks, accuracies, errors, records[0]["items"], **areas)
