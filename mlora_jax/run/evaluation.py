"""The stages that measure: the base, the trained trials on the run's own rows, and the trials on further tasks."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from mlora_jax.evaluate import RankCurve, accuracy_and_error
from mlora_jax.run.harness_tasks import measure_tasks
from mlora_jax.run.readouts import read_out_trial
from mlora_jax.run.stage import Stage
from mlora_jax.training.adapter_file import load_adapter
from mlora_jax.training.curve_records import BASE, CurveKey, CurveRecord, failed_line
from mlora_jax.trials import Trial, readouts_of


def evaluate_base(run: Stage, trial: Trial) -> None:
    """Measures the base on every split on which it is not on record yet.

    Args:
      run: the run.
      trial: the trial whose untrained adapter is switched off for this.
    """
    measured = run.folder.curves().base()
    for split in run.experiment.rows:
        if split not in measured:
            adapted = run.experiment.adapted_for(trial)
            evaluator = adapted.evaluators[split]
            verdicts = _evaluate(run, evaluator, adapted.adapter, jnp.zeros(trial.rank))
            accuracy, error = accuracy_and_error(verdicts)
            run.folder.save_verdicts(BASE, BASE, split, verdicts[None])
            task, items, truncated = run.experiment.data.task.name, len(verdicts), evaluator.truncated
            record = CurveRecord(None, task, split, BASE, (0,), (accuracy,), (error,), items, truncated=truncated)
            run.curves.write(*record.to_lines())
            cut = f", {evaluator.truncated} of {len(verdicts)} items cut on the left to fit"
            run.progress.say(f"base accuracy {accuracy:.3f} ({split}{cut if evaluator.truncated else ''})")


def evaluate_trial(run: Stage, trial: Trial) -> None:
    """Every curve of a trial that is not on record yet, each written in one piece."""
    curves, experiment = run.folder.curves(), run.experiment
    missing = [
        (split, readout)
        for split in experiment.rows
        for readout in readouts_of(run.config, trial)
        if CurveKey(trial.name, split, readout) not in curves
    ]
    if not missing or trial.name in curves.failed:
        return
    adapted = experiment.adapted_for(trial)
    adapter, hierarchy, description = load_adapter(run.folder.adapter(trial), adapted.adapter)
    if not description["finite"]:
        run.curves.write(failed_line(trial))
        return
    read = functools.cache(
        lambda readout: read_out_trial(experiment, trial, adapter, hierarchy, readout, run.folder.adapter(trial))
    )
    for split, readout in missing:
        reading = read(readout)
        profiles = reading.curve()
        evaluate = functools.partial(_evaluate, run, adapted.evaluators[split])
        curve = RankCurve.of(readout, tuple(profiles), [evaluate(reading.adapter, p) for p in profiles.values()])
        run.folder.save_verdicts(trial.name, readout, split, np.asarray(curve.verdicts))
        record = CurveRecord(
            trial=trial,
            task=experiment.data.task.name,
            split=split,
            readout=readout,
            ranks=curve.ranks,
            accuracies=curve.accuracies,
            standard_errors=curve.standard_errors,
            items=curve.items,
            truncated=adapted.evaluators[split].truncated,
        )
        run.curves.write(*record.to_lines())
        shown = " ".join(f"{accuracy:.3f}" for accuracy in curve.accuracies)
        areas = f"AURAC {curve.linear:.3f} linear, {curve.log2:.3f} log2"
        run.progress.say(f"{trial.name} {split:10} {readout:8} {shown}  {areas}")


def evaluate_on_tasks(run: Stage, trials: Sequence[Trial]) -> None:
    """Every curve on the config's further tasks that is not on record yet; a kill costs the task that is being run."""
    for measured in measure_tasks(run.experiment, run.folder, trials):
        run.curves.write(*measured.to_lines())
        shown = " ".join(f"{accuracy:.3f}" for accuracy in measured.accuracies)
        run.progress.say(f"{measured.name} {measured.task} {measured.readout:8} {shown}")
        run.leave_if_asked()


def _evaluate(run: Stage, evaluator, adapter, p) -> np.ndarray:
    """Verdicts at one rank of a curve, which a signal may cut short: it is written when all of it is there."""
    run.leave_if_asked()
    return evaluator(adapter, p)
