"""An experiment from config to report, in named stages; whatever is done already is not done again."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import pathlib
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from rich.console import Console

from mlora_jax.config import Trial, expand_trials, resolve
from mlora_jax.core import summarize
from mlora_jax.evaluate import RankCurve, accuracy_and_error, rank_curve
from mlora_jax.experiment import Experiment
from mlora_jax.parallel import hosts
from mlora_jax.parallel.arrays import fetch
from mlora_jax.readouts import read_out_trial
from mlora_jax.report import write_report
from mlora_jax.run_folder import CURVES, METRICS, RunFolder, only_one_run, task_key
from mlora_jax.run_tasks import measure_tasks, readouts_of, unavailable_tasks, wanted_curves
from mlora_jax.train.adapter_file import load_adapter, save_adapter
from mlora_jax.train.checkpoint import Checkpoints, saying_what_stands
from mlora_jax.train.grid import TrialBatch
from mlora_jax.train.loop import Cadence, Interrupted, Memory, State, TrialKeys, select_trials, take_trial, train_trials
from mlora_jax.train.progress import RunProgress
from mlora_jax.train.records import JsonLines, NoRecords
from mlora_jax.train.trackers import Tracker, make_trackers

__all__ = ["Interrupted", "Results", "TrialResult", "train"]


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


@dataclasses.dataclass(frozen=True)
class _Run:
    """What the stages of a run share."""

    config: ConfigDict
    folder: RunFolder
    experiment: Experiment
    metrics: JsonLines
    curves: JsonLines
    progress: RunProgress
    trackers: list[Tracker]
    signal_came: Callable[[], int]

    def leave_if_asked(self) -> None:
        """Raises Interrupted if a signal came to any process; only where everything is saved."""
        if signal_number := hosts.largest(self.signal_came()):
            raise Interrupted(128 + signal_number)

    def record(self, **values: Any) -> None:
        self.metrics.write(values)
        for tracker in self.trackers:
            tracker.write(values)


def train(config: ConfigDict | dict, workdir) -> Results:
    """Runs an experiment: data, training, evaluation, report. A run that was cut short goes on where it was.

    Args:
      config: see `mlora_jax.config.DEFAULTS` for the keys; those not set take their defaults.
      workdir: folder for the results. What an earlier run of the same config has finished in it is kept, and trials
        that the config has in addition are trained.

    Raises:
      ValueError: a config, data row, checkpoint or target that cannot be used, or a workdir of another config or
        of other data; the message names it.
      FileNotFoundError: a file of the model or the data is missing.
      ModuleNotFoundError: the config asks for Weights & Biases, which is not installed.
      OSError: a checkpoint could not be written.
      DiskFullError: there is no room for a file of the run; everything before it is safe.
      Interrupted: SIGTERM or SIGINT came; everything is saved.
    """
    config = resolve(config)
    hosts.join(config.parallel)
    trials = expand_trials(config)
    with saying_what_stands(workdir), hosts.leaving_together(), contextlib.ExitStack() as stack:
        hosts.together(lambda: stack.enter_context(only_one_run(workdir)))
        hosts.check_shared(workdir)
        folder = RunFolder(workdir, config)
        folder.list_not_compared(hosts.first_then_others(lambda: unavailable_tasks(config)))
        compilations = {"train": 0, "evaluation": 0}
        if not _all_done(config, folder, trials):
            compilations = _run_what_is_missing(config, folder, trials)
        hosts.together(lambda: write_report(folder.path))
        return _results(config, folder, trials, compilations)


def _all_done(config, folder: RunFolder, trials: Sequence[Trial]) -> bool:
    measured, failed = folder.curves(), folder.failed()
    splits = [split for name, split, _ in measured if name == "base"]
    wanted = [(t.name, s, r) for t in trials if t.name not in failed for s in splits for r in readouts_of(config, t)]
    trained = {trial for batch in folder.batches if folder.trained(batch) for trial in batch.trials}
    whole = all(key in measured for key in wanted) and not wanted_curves(config, folder, trials)
    return bool(splits) and set(trials) <= trained and whole


def _run_what_is_missing(config, folder: RunFolder, trials: Sequence[Trial]) -> dict[str, int]:
    with contextlib.ExitStack() as stack:
        records = JsonLines if hosts.is_first() else lambda path: NoRecords()
        metrics = stack.enter_context(records(folder.path / METRICS))
        curves = stack.enter_context(records(folder.path / CURVES))
        trackers: list[Tracker] = []
        hosts.together(lambda: trackers.extend(make_trackers(folder.path, **config.records)))
        for tracker in trackers:
            stack.callback(tracker.close)
        experiment = Experiment.load(config)  # the slow part comes when nothing else can be wrong
        folder.check_inputs(experiment.digests())
        signal_came = stack.enter_context(_until_asked_to_stop())
        progress = stack.enter_context(RunProgress(console=None if hosts.is_first() else Console(quiet=True)))
        run = _Run(config, folder, experiment, metrics, curves, progress, trackers, signal_came)
        progress.say(_describe(experiment))
        try:
            if new := folder.unplanned(trials):  # first, because its errors ask for another config
                folder.add(experiment.plan(new, before_each=run.leave_if_asked))
            _evaluate_base(run, trials[0].rank)
            wanted = [batch for batch in folder.batches if set(batch.trials) & set(trials)]
            to_train = [trial.name for batch in wanted if not folder.trained(batch) for trial in batch.trials]
            progress.expect(dict.fromkeys(to_train, experiment.steps))
            for batch in wanted:
                if not folder.trained(batch):
                    _train_batch(run, batch)
                for trial in batch.trials:
                    _evaluate_trial(run, trial)
            _evaluate_on_tasks(run, trials)
            run.leave_if_asked()
        except Interrupted:
            progress.say(f"stopped by a signal, all is saved in {folder.path}: run the same command to go on")
            raise
    return experiment.compilations


@contextlib.contextmanager
def _until_asked_to_stop() -> Iterator[Callable[[], int]]:
    """The number of the signal to stop that has come to this process, or 0; a second one has its usual effect."""
    came = [0]
    if threading.current_thread() is not threading.main_thread():
        yield lambda: 0  # only the main thread may listen
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def note(number, frame):
        del frame
        came[0] = number
        signal.signal(number, before[number])

    for number in before:
        signal.signal(number, note)
    try:
        yield lambda: came[0]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _describe(experiment: Experiment) -> str:
    config, data, examples = experiment.config, experiment.data, experiment.examples
    held = str(len(experiment.rows.get("validation", ())))
    if experiment.validates_by_loss and (dropped := experiment.validation.dropped):
        held += f" ({dropped} too long for their loss)"
    quantization = getattr(experiment.model, "quantization", None)
    return (f"{quantization}\n" if quantization else "") + (
        f"{config.model.path} on {_devices(experiment)}; "
        f"task {data.task.name}: {examples.kept} examples to train on ({examples.dropped} dropped, "
        f"{examples.truncated} truncated), "
        f"{held} to validate on, {len(experiment.rows['test'])} to test on; {experiment.steps} steps a trial"
    )


def _devices(experiment: Experiment) -> str:
    mesh, there, kind = experiment.mesh, jax.device_count(), jax.devices()[0].device_kind
    if mesh is None:
        return f"1 x {kind}" + (f" (of {there})" if there > 1 else "")
    axes = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1)
    idle = f", {there - mesh.size} idle" if there > mesh.size else ""
    return f"{mesh.size} x {kind} ({axes}{idle}{f', {hosts.count()} processes' if hosts.count() > 1 else ''})"


def _evaluate_base(run: _Run, rank: int) -> None:
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


def _train_batch(run: _Run, batch: TrialBatch) -> None:
    config, experiment, trials = run.config, run.experiment, batch.slotted
    adapted = experiment.adapted(trials[0].rank)
    run.progress.say(f"{batch.name}: {len(batch.trials)} trials at once")
    if experiment.mesh is not None and batch.slots % (side_by_side := experiment.mesh.shape["trial"]):
        raise ValueError(
            f"{batch.name} was planned for {batch.slots} trials at a time, which config.parallel.trial {side_by_side} "
            "does not divide: go on with one that does, such as config.parallel.trial=1"
        )
    with Checkpoints(run.folder.checkpoints(batch), keep=config.checkpoint.keep) as checkpoints:
        state, keys = _start(run, batch)
        state, memory, batches = _resume(run, batch, checkpoints, state)
        schedules = experiment.phases.schedules(trials)
        state = train_trials(
            lambda at, arrays, draw: adapted.step(
                adapted.base, adapted.profile, at, arrays, draw, schedules(memory.step), keys.dropout
            ),
            batches,
            experiment.phases.draws(trials, keys),
            state,
            memory,
            steps=experiment.steps,
            cadence=Cadence(
                config.train.log_every, config.validation.every, config.checkpoint.every, config.validation.patience
            ),
            log=lambda step, slot, values: _log(run, batch, step, slot, values),
            validate=lambda step, adapters, slots: _validate(run, batch, step, adapters, slots),
            save=lambda state, memory: checkpoints.save(memory.step, state, _values(memory, batches)),
            interrupted=hosts.polled(run.signal_came),
            turns=experiment.turns(trials, keys),
        )
        checkpoints.wait()
        _save_adapters(run, batch, state, memory)
    hosts.wait("checkpoints are closed")
    for tracker in run.trackers:
        tracker.finish([trial.name for trial in batch.trials])
    run.folder.finish(batch)
    run.progress.expect({trial.name: 0 for trial in batch.trials})


def _start(run: _Run, batch: TrialBatch) -> tuple[State, TrialKeys]:
    """State and keys of a batch before its first step."""
    start, keys = run.experiment.start(batch.slotted)
    best = jax.tree.map(jnp.copy, start.adapter) if run.config.validation.keep == "best" else None
    return State(start, best), keys


def _values(memory: Memory, batches) -> dict[str, Any]:
    """What a checkpoint holds besides arrays."""
    return {"memory": dataclasses.asdict(memory), "data": batches.get_state()}


def _resume(run: _Run, batch: TrialBatch, checkpoints: Checkpoints, start: State):
    """State, memory and data of the newest sound checkpoint, records cut back to it; or the beginning."""
    batches = run.experiment.batches(batch.slotted)
    names = [trial.name for trial in batch.trials]
    restored = checkpoints.restore(start)
    if restored is None:
        state, memory = start, Memory.of(batch.slots)
    else:
        state, memory = restored.state, Memory(**restored.values["memory"])
        batches.set_state(restored.values["data"])
        run.progress.say(f"{batch.name} goes on from step {memory.step}")
        run.progress.expect(dict.fromkeys(names, run.experiment.steps - memory.step))
    # Other batches may have written in between; curves are written when a batch is trained, never before.
    run.metrics.keep(lambda record: record["trial"] not in names or record["step"] <= memory.step)
    for tracker in run.trackers:
        tracker.go_back(names, memory.step)
    return state, memory, batches


def _log(run: _Run, batch: TrialBatch, step: int, slot: int, values: dict[str, Any]) -> None:
    if slot >= len(batch.trials):
        return
    trial = batch.trials[slot]
    run.record(trial=trial.name, step=step, time=time.time(), **values)
    shown = {name: values[name] for name in ("loss", "tokens_per_second")}
    run.progress.advance(trial.name, run.experiment.steps - step, step=step, **shown)
    if not values["finite"]:
        run.progress.say(f"{trial.name}: FAILED before step {step}, the loss is not finite; the others go on")


def _validate(run: _Run, batch: TrialBatch, step: int, adapters, slots: Sequence[bool]) -> list[float | None]:
    """Scores [K] of the trials that are still trained, higher is better."""
    scores: list[float | None] = [None] * batch.slots
    for slot, trial in enumerate(batch.trials):
        if slots[slot]:
            score = _score(run, trial, step, take_trial(adapters, slot))
            scores[slot] = -score if run.config.validation.measure == "loss" else score
            measured = {f"validation_{run.config.validation.measure}": score}
            run.record(trial=trial.name, step=step, time=time.time(), **measured)
    return hosts.agree(scores)


def _score(run: _Run, trial: Trial, step: int, adapter) -> float:
    adapted, hierarchy = run.experiment.adapted(trial.rank), run.experiment.phases.hierarchy_at(trial, step)
    if run.config.validation.measure == "loss":
        loss = adapted.validation_loss()
        return float(np.mean([loss(adapter, hierarchy.prefix(rank)) for rank in hierarchy.ranks]))
    return rank_curve(adapted.evaluators["validation"], adapter, adapted.profile, hierarchy).log2


def _save_adapters(run: _Run, batch: TrialBatch, state: State, memory: Memory) -> None:
    adapters, finite = state.trials.adapter, np.asarray(fetch(state.trials.finite))
    steps = np.asarray(fetch(state.trials.step))
    scored = np.array([memory.best(slot)[0] >= 0 for slot in range(batch.slots)])
    if state.best is not None:
        adapters = select_trials(scored, state.best, adapters)
    for slot, trial in enumerate(batch.trials):
        description = {
            "trial": dataclasses.asdict(trial),
            "phases": run.experiment.phases.begun(trial, memory.step),
            "base_model": run.config.model.path,
            "task": run.experiment.data.task.name,
            "targets": list(run.config.adapter.targets),
            "steps": int(steps[slot]),
            "finite": bool(finite[slot]),
        }
        if state.best is not None and scored[slot]:
            at, score = memory.best(slot)
            description["best"] = {"step": min((at + 1) * run.config.validation.every, memory.step), "score": score}
        # Where all trials of a batch failed before a squeeze, there was none.
        hierarchy = run.experiment.phases.hierarchy_at(trial, memory.step)
        adapter = fetch(take_trial(adapters, slot))
        hosts.together(functools.partial(save_adapter, run.folder.adapter(trial), adapter, hierarchy, description))


def _evaluate_trial(run: _Run, trial: Trial) -> None:
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
    adapted = experiment.adapted(trial.rank)
    adapter, hierarchy, description = load_adapter(run.folder.adapter(trial), adapted.adapter)
    fields = {"trial": trial.name, **dataclasses.asdict(trial)}
    if not description["finite"]:
        run.curves.write({**fields, "failed": True})
        return
    read = functools.cache(
        lambda readout: read_out_trial(experiment, trial, adapter, hierarchy, readout, run.folder.adapter(trial))
    )
    for split, readout in missing:
        factors, profiles = read(readout)
        evaluate = functools.partial(_evaluate, run, adapted.evaluators[split])
        curve = RankCurve.of(readout, tuple(profiles), [evaluate(factors, p) for p in profiles.values()])
        run.folder.save_verdicts(trial.name, readout, split, curve.verdicts)
        values = zip(curve.ranks, curve.accuracies, curve.standard_errors, strict=True)
        shared = curve.items, len(curve.ranks), adapted.evaluators[split].truncated
        run.curves.write(*({**fields, **_measured(run, split, readout, *at, *shared)} for at in values))
        shown = " ".join(f"{accuracy:.3f}" for accuracy in curve.accuracies)
        areas = f"AURAC {curve.linear:.3f} linear, {curve.log2:.3f} log2"
        run.progress.say(f"{trial.name} {split:10} {readout:8} {shown}  {areas}")


def _evaluate_on_tasks(run: _Run, trials: Sequence[Trial]) -> None:
    """Every curve on the config's further tasks that is not on record yet; a kill costs the task that is being run."""
    for measured in measure_tasks(run.experiment, run.folder, trials):
        run.curves.write(*measured.records)
        shown = " ".join(f"{accuracy:.3f}" for accuracy in measured.curve.accuracies)
        run.progress.say(f"{measured.trial} {measured.task} {measured.curve.readout:8} {shown}")
        run.leave_if_asked()


def _evaluate(run: _Run, evaluator, adapter, p) -> np.ndarray:
    """Verdicts at one rank of a curve, which a signal may cut short: it is written when all of it is there."""
    run.leave_if_asked()
    return evaluator(adapter, p)


def _measured(run: _Run, split, readout, at_rank, accuracy, error, items, of_ranks, truncated) -> dict[str, Any]:
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


def _results(config, folder: RunFolder, trials: Sequence[Trial], compilations: dict[str, int]) -> Results:
    """What the records say."""
    measured, failed = folder.curves(), folder.failed()
    base = {split: records[0]["accuracy"] for (name, split, _), records in measured.items() if name == "base"}
    results = []
    for trial in trials:
        keys = [(trial.name, split, readout) for split in base for readout in readouts_of(config, trial)]
        found = {key: _curve(measured[key]) for key in keys if key in measured}
        by_split = {split: tuple(curve for key, curve in found.items() if key[1] == split) for split in base}
        by_task: dict[tuple[str, int], tuple[RankCurve, ...]] = {}
        for (name, _, task, _), records in folder.harness_curves().items():
            if name == trial.name:
                key = task, records[0]["shots"]
                curve = _curve(records)
                verdicts = folder.verdicts(trial.name, curve.readout, task_key(*key))
                curve = curve if verdicts is None else RankCurve.of(curve.readout, curve.ranks, verdicts)
                by_task[key] = (*by_task.get(key, ()), curve)
        results.append(TrialResult(trial, folder.adapter(trial), by_split, trial.name in failed, by_task))
    return Results(folder.path, base, tuple(results), compilations)


def _curve(records: list[dict[str, Any]]) -> RankCurve:
    ranks, accuracies, errors = zip(*((r["at_rank"], r["accuracy"], r["stderr"]) for r in records), strict=True)
    areas = dataclasses.asdict(summarize(accuracies, ranks))
    return RankCurve(records[0]["readout"], ranks, accuracies, errors, records[0]["items"], **areas)
