"""The stages that measure: the base, the trained trials on the run's own rows, and the trials on further tasks."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from mlora_jax.evaluate import RankCurve, accuracy_and_error
from mlora_jax.run.harness_tasks import measure_tasks, readouts_of
from mlora_jax.run.readouts import read_out_trial
from mlora_jax.run.stage import Stage
from mlora_jax.training.adapter_file import load_adapter
from mlora_jax.trials import Trial


def evaluate_base(run: Stage, rank: int) -> None:
    measured = run.folder.curves()
    for split in run.experiment.rows:
        if ("base", split, "base") not in measured:
            adapted = run.experiment.adapted(rank)
            evaluator = adapted.evaluators[split]
            verdicts = _evaluate(run, evaluator, adapted.adapter, jnp.zeros(rank))
            accuracy, error = accuracy_and_error(verdicts)
            run.folder.save_verdicts("base", "base", split, verdicts[None])
            values = _measured(run, split, "base", 0, accuracy, error, len(verdicts), 1, evaluator.truncated)
            run.curves.write({"trial": "base", **values})
            cut = f", {evaluator.truncated} of {len(verdicts)} items cut on the left to fit"
            run.progress.say(f"base accuracy {accuracy:.3f} ({split}{cut if evaluator.truncated else ''})")


def evaluate_trial(run: Stage, trial: Trial) -> None:
    """Every curve of a trial that is not on record yet, each written in one piece."""
    measured, experiment = run.folder.curves(), run.experiment
    missing = [
        (split, readout)
        for split in experiment.rows
        for readout in readouts_of(run.config, trial)
        if (trial.name, split, readout) not in measured
    ]
    if not missing or trial.name in run.folder.failed():
        return
    adapted = experiment.adapted_for(trial)
    adapter, hierarchy, description = load_adapter(run.folder.adapter(trial), adapted.adapter)
    fields = {"trial": trial.name, **dataclasses.asdict(trial)}
    if not description["finite"]:
        run.curves.write({**fields, "failed": True})
        return
    read = functools.cache(
        lambda readout: read_out_trial(experiment, trial, adapter, hierarchy, readout, run.folder.adapter(trial))
    )
    for split, readout in missing:
        reading = read(readout)
        profiles = reading.curve()
        evaluate = functools.partial(_evaluate, run, adapted.evaluators[split])
        curve = RankCurve.of(readout, tuple(profiles), [evaluate(reading.adapter, p) for p in profiles.values()])
        run.folder.save_verdicts(trial.name, readout, split, curve.verdicts)
        values = zip(curve.ranks, curve.accuracies, curve.standard_errors, strict=True)
        shared = curve.items, len(curve.ranks), adapted.evaluators[split].truncated
        run.curves.write(*({**fields, **_measured(run, split, readout, *at, *shared)} for at in values))
        shown = " ".join(f"{accuracy:.3f}" for accuracy in curve.accuracies)
        areas = f"AURAC {curve.linear:.3f} linear, {curve.log2:.3f} log2"
        run.progress.say(f"{trial.name} {split:10} {readout:8} {shown}  {areas}")


def evaluate_on_tasks(run: Stage, trials: Sequence[Trial]) -> None:
    """Every curve on the config's further tasks that is not on record yet; a kill costs the task that is being run."""
    for measured in measure_tasks(run.experiment, run.folder, trials):
        run.curves.write(*measured.records)
        shown = " ".join(f"{accuracy:.3f}" for accuracy in measured.curve.accuracies)
        run.progress.say(f"{measured.trial} {measured.task} {measured.curve.readout:8} {shown}")
        run.leave_if_asked()


def _evaluate(run: Stage, evaluator, adapter, p) -> np.ndarray:
    """Verdicts at one rank of a curve, which a signal may cut short: it is written when all of it is there."""
    run.leave_if_asked()
    return evaluator(adapter, p)


def _measured(run: Stage, split, readout, at_rank, accuracy, error, items, of_ranks, truncated) -> dict[str, Any]:
    return dict(
        task=run.experiment.data.task.name,
        split=split,
        shots=0,
        readout=readout,
        at_rank=at_rank,
        of_ranks=of_ranks,
        accuracy=accuracy,
        stderr=error,
        items=items,
        truncated=truncated,
    )
