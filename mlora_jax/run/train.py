"""An experiment from config to report, in named stages; whatever is done already is not done again."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console

from mlora_jax.compilation_cache import use_compilation_cache
from mlora_jax.config import resolve
from mlora_jax.config_type import ConfigDict
from mlora_jax.parallel import hosts
from mlora_jax.report import write_report
from mlora_jax.run.batch import train_batch
from mlora_jax.run.describe import describe_experiment
from mlora_jax.run.evaluation import evaluate_base, evaluate_on_tasks, evaluate_trial
from mlora_jax.run.experiment import Experiment
from mlora_jax.run.folder import METRICS, RunFolder, only_one_run
from mlora_jax.run.harness_tasks import unavailable_tasks, wanted_curves
from mlora_jax.run.results import Results, TrialResult, read_results
from mlora_jax.run.signals import until_asked_to_stop
from mlora_jax.run.sizing import plan_batches
from mlora_jax.run.stage import Stage
from mlora_jax.run.starts import check_first_adapters
from mlora_jax.training.checkpoint import saying_what_stands
from mlora_jax.training.curve_records import CURVES, CurveKey
from mlora_jax.training.loop import Interrupted
from mlora_jax.training.progress import RunProgress
from mlora_jax.training.records import JsonLines, NoRecords
from mlora_jax.training.trackers import Tracker, make_trackers
from mlora_jax.trials import Trial, expand_trials, readouts_of

__all__ = ["Interrupted", "Results", "TrialResult", "train"]


def train(
    config: ConfigDict | Mapping[str, Any],
    workdir: str | os.PathLike[str],
    *,
    after_trial: Callable[[Trial], None] = lambda trial: None,
) -> Results:
    """Runs an experiment: data, training, evaluation, report. A run that was cut short goes on where it was.

    Args:
      config: see `mlora_jax.config.DEFAULTS` for the keys; those not set take their defaults.
      workdir: folder for the results. What an earlier run of the same config has finished in it is kept, and trials
        that the config has in addition are trained.
      after_trial: a function of a trial that is called when the trial's curves on the run's own rows are on disk.

    Raises:
      ValueError: a config, data row, checkpoint or target that cannot be used, or a workdir of another config or
        of other data; the message names it.
      FileNotFoundError: a file of the model or the data is missing.
      ModuleNotFoundError: the config asks for Weights & Biases, which is not installed.
      OSError: a checkpoint could not be written.
      DiskFullError: there is no room for a file of the run; everything before it is safe.
      Interrupted: SIGTERM or SIGINT came; everything is saved.
    """
    resolved = resolve(config)
    hosts.join(resolved.parallel)
    trials = expand_trials(resolved)
    with saying_what_stands(workdir), hosts.leaving_together(), contextlib.ExitStack() as stack:
        stack.enter_context(use_compilation_cache(resolved.compilation.cache))
        hosts.on_first_process(lambda: stack.enter_context(only_one_run(workdir)))
        hosts.check_shared(workdir)
        folder = RunFolder(workdir, resolved)
        folder.list_not_compared(hosts.first_then_others(lambda: unavailable_tasks(resolved)))
        compilations = {"train": 0, "evaluation": 0}
        if not _all_done(resolved, folder, trials):
            compilations = _run_what_is_missing(resolved, folder, trials, after_trial)
        hosts.on_first_process(lambda: write_report(folder.path))
        return read_results(resolved, folder, trials, compilations)


def _all_done(config, folder: RunFolder, trials: Sequence[Trial]) -> bool:
    curves = folder.curves()
    splits = list(curves.base())
    unfailed = [trial for trial in trials if trial.name not in curves.failed]
    wanted = [
        CurveKey(t.name, split, readout) for t in unfailed for split in splits for readout in readouts_of(config, t)
    ]
    trained = {trial for batch in folder.batches if folder.trained(batch) for trial in batch.trials}
    whole = all(key in curves for key in wanted) and not wanted_curves(config, folder, trials)
    return bool(splits) and set(trials) <= trained and whole


def _run_what_is_missing(
    config, folder: RunFolder, trials: Sequence[Trial], after_trial: Callable[[Trial], None]
) -> dict[str, int]:
    with contextlib.ExitStack() as stack:
        records = JsonLines if hosts.is_first() else lambda path: NoRecords()
        metrics = stack.enter_context(records(folder.path / METRICS))
        curves = stack.enter_context(records(folder.path / CURVES))
        trackers: list[Tracker] = []
        hosts.on_first_process(lambda: trackers.extend(make_trackers(folder.path, **config.records)))
        for tracker in trackers:
            stack.callback(tracker.close)
        experiment = Experiment.load(config)  # the slow part comes when nothing else can be wrong
        folder.check_inputs(experiment.digests())
        check_first_adapters(experiment, trials)
        signal_came = stack.enter_context(until_asked_to_stop())
        progress = stack.enter_context(RunProgress(console=None if hosts.is_first() else Console(quiet=True)))
        run = Stage(config, folder, experiment, metrics, curves, progress, trackers, signal_came)
        progress.say(describe_experiment(experiment))
        try:
            if new := folder.unplanned(trials):  # first, because its errors ask for another config
                folder.add(plan_batches(experiment, new, before_each=run.leave_if_asked))
            wanted = [batch for batch in folder.batches if set(batch.trials) & set(trials)]
            to_train = [trial.name for batch in wanted if not folder.trained(batch) for trial in batch.trials]
            progress.expect(dict.fromkeys(to_train, experiment.steps))
            for batch in wanted:
                if not folder.trained(batch):
                    train_batch(run, batch)
                # Not before the first training, which begins some seconds earlier for that.
                evaluate_base(run, trials[0])
                for trial in batch.trials:
                    evaluate_trial(run, trial)
                    hosts.on_first_process(functools.partial(after_trial, trial))
            evaluate_on_tasks(run, trials)
            run.leave_if_asked()
        except Interrupted:
            progress.say(f"stopped by a signal, all is saved in {folder.path}: run the same command to go on")
            raise
    return experiment.compilations
