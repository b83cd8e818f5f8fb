"""What a run found, from its records."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence

from mlora_jax.config_type import ConfigDict
from mlora_jax.core import summarize
from mlora_jax.evaluate import RankCurve
from mlora_jax.run.folder import RunFolder, task_key
from mlora_jax.training.curve_records import CurveKey, CurveRecord
from mlora_jax.trials import Trial, readouts_of


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
    """The results of a run.

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
    """Returns the results that the records hold."""
    records = folder.curves()
    base = {split: record.accuracies[0] for split, record in records.base().items()}
    results = []
    for trial in trials:
        by_split = {}
        for split in base:
            keys = [CurveKey(trial.name, split, readout) for readout in readouts_of(config, trial)]
            by_split[split] = tuple(curve_of(record) for key in keys if (record := records.get(key)))
        by_task: dict[tuple[str, int], tuple[RankCurve, ...]] = {}
        for record in records:
            if record.name != trial.name or record.harness is None:
                continue
            key = record.task, record.shots
            curve = curve_of(record)
            verdicts = folder.verdicts(trial.name, curve.readout, task_key(*key))
            curve = curve if verdicts is None else RankCurve.of(curve.readout, curve.ranks, verdicts)
            by_task[key] = (*by_task.get(key, ()), curve)
        results.append(TrialResult(trial, folder.adapter(trial), by_split, trial.name in records.failed, by_task))
    return Results(folder.path, base, tuple(results), compilations)


def curve_of(record: CurveRecord) -> RankCurve:
    """The rank-accuracy curve of a record, with its areas and without per-item results."""
    areas = dataclasses.asdict(summarize(record.accuracies, record.ranks))
    return RankCurve(record.readout, record.ranks, record.accuracies, record.standard_errors, record.items, **areas)
