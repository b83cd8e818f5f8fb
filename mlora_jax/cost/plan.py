"""What an experiment will cost, before it is run."""

from __future__ import annotations

import bisect
import collections
import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mlora_jax.compilation_cache import use_compilation_cache
from mlora_jax.config import resolve
from mlora_jax.config_type import ConfigDict
from mlora_jax.cost.estimate import Requests, task_requests
from mlora_jax.data.packing import pack_members
from mlora_jax.parallel.mesh import shards_of
from mlora_jax.run.experiment import Experiment
from mlora_jax.run.sizing import plan_batches, time_steps
from mlora_jax.training.grid import TrialBatch
from mlora_jax.training.phases import AdapterForm, PhaseShape
from mlora_jax.trials import Trial, expand_trials, readouts_of


@dataclasses.dataclass(frozen=True)
class GroupPlan:
    """Batches of trials that share executables.

    Attributes:
      rank: R.
      profiles: N, profiles a step; their mean where phases differ.
      trials: the number of trials in all batches together.
      batches: the number of batches.
      at_once: K, trials in a batch.
      compilations: executables of the training step, one per kind of phase.
      tokens: the number of tokens that are trained on, over all trials; padding is not counted.
      padded_tokens: the number of tokens that are computed, empty slots and every profile included.
      compile_seconds: for one executable, measured.
      step_seconds: for one step of one batch, measured: median.
      training_seconds: projected for all of it, compilations included.
    """

    rank: int
    profiles: float
    trials: int
    batches: int
    at_once: int
    compilations: int
    tokens: int
    padded_tokens: int
    compile_seconds: float
    step_seconds: float
    training_seconds: float


@dataclasses.dataclass(frozen=True)
class Plan:
    """The cost of an experiment.

    Attributes:
      trials: how many there are.
      steps: optimizer steps of each.
      groups: what trains together.
      adapter_bytes: the bytes of all trained adapters, float32 (or float64).
      curves: rank-accuracy curves to measure, over splits and read-outs.
      evaluation_seconds: projected for them and for the base, from one timed batch of requests for each rank and
        split; without the tasks of `config.evaluation.tasks`.
      tasks: how many curves and requests those tasks are; they are not timed.
      validations: while training, over all trials; fewer if some stop early.
      validation_seconds: projected for them.
    """

    trials: int
    steps: int
    groups: tuple[GroupPlan, ...]
    adapter_bytes: int
    curves: int
    evaluation_seconds: float
    tasks: Requests
    validations: int
    validation_seconds: float

    @property
    def seconds(self) -> float:
        """The projected seconds of training, validation and evaluation on the experiment's own rows."""
        return sum(group.training_seconds for group in self.groups) + self.validation_seconds + self.evaluation_seconds


def plan(config: ConfigDict | dict, *, timed_steps: int = 3) -> Plan:
    """Loads model and data, sizes the batches of trials, and times a few steps of each kind; trains nothing.

    Args:
      config: as `mlora_jax.train` takes it.
      timed_steps: how many steps of a group are timed, after one that is not.

    Raises:
      ValueError, FileNotFoundError: as `train`.
    """
    resolved = resolve(config)
    with use_compilation_cache(resolved.compilation.cache):
        return _plan(resolved, timed_steps)


def _plan(config: ConfigDict, timed_steps: int) -> Plan:
    trials, experiment = expand_trials(config), Experiment.load(config)
    cuts = plan_batches(experiment, trials)
    groups: dict[tuple, list[TrialBatch]] = collections.defaultdict(list)
    for number, (members, slots) in enumerate(cuts):
        kind = (experiment.form(members[0]), experiment.phases.shape(members[0]), slots)
        groups[kind].append(TrialBatch(f"batch-{number:04d}", members, slots))
    leaves = {experiment.form(trial): jax.tree.leaves(experiment.adapted_for(trial).adapter) for trial in trials}
    timed = functools.cache(functools.partial(_time_evaluation, experiment))
    curves, evaluation_seconds = evaluation_cost(experiment, trials, timed)
    validations, validation_seconds = validation_cost(experiment, trials, timed)
    return Plan(
        trials=len(trials),
        steps=experiment.steps,
        groups=tuple(
            _group(experiment, form, phases, slots, batches, timed_steps)
            for (form, phases, slots), batches in groups.items()
        ),
        adapter_bytes=sum(leaf.nbytes for trial in trials for leaf in leaves[experiment.form(trial)]),
        curves=curves,
        evaluation_seconds=evaluation_seconds,
        tasks=task_requests(config, trials),
        validations=validations,
        validation_seconds=validation_seconds,
    )


def _group(
    experiment: Experiment, form: AdapterForm, phases: tuple[PhaseShape, ...], slots: int, batches, timed_steps: int
) -> GroupPlan:
    shapes: set[tuple] = set()
    tokens, positions = 0, np.zeros(len(phases), int)
    for batch in batches:
        found, real, computed = _shapes(experiment, batch, phases)
        shapes |= found
        tokens, positions = tokens + real, positions + computed
    timings = [time_steps(experiment, batches[0].slotted, timed_steps, phase) for phase in range(len(phases))]
    compile_seconds = experiment.adapted(*form).step.compile_seconds
    steps = np.diff([0, *(phase.end for phase in phases)])
    profiles = [phase.profiles for phase in phases]
    seconds = [timing.seconds for timing in timings]
    training = sum(many / timing.tokens * timing.seconds for many, timing in zip(positions, timings, strict=True))
    return GroupPlan(
        rank=form.rank,
        profiles=float(np.average(profiles, weights=steps)),
        trials=sum(len(batch.trials) for batch in batches),
        batches=len(batches),
        at_once=slots,
        compilations=len(shapes),
        tokens=tokens,
        padded_tokens=int(positions @ profiles),
        compile_seconds=compile_seconds,
        step_seconds=float(np.average(seconds, weights=steps)),
        training_seconds=len(shapes) * compile_seconds + float(training),
    )


def _shapes(
    experiment: Experiment, batch: TrialBatch, phases: tuple[PhaseShape, ...]
) -> tuple[set[tuple], int, np.ndarray]:
    """Programs that are compiled, tokens of the trials, and tokens [phases] computed with padding and empty slots."""
    pipeline, shards = experiment.pipeline(batch.slotted), shards_of(experiment.mesh)
    programs, real, positions = set(), 0, np.zeros(len(phases), int)
    for step in range(pipeline.steps):
        parts = [each.examples_at(step) for each in pipeline.pipelines]
        at = bisect.bisect_right([phase.end for phase in phases], step)
        programs.add((phases[at].profiles, phases[at].per_example, phases[at].rule))
        counts = [sum(len(example.tokens) for example in part) for part in parts]
        real += sum(counts[member] for member in pipeline.members[: len(batch.trials)])
        members = [[len(example.tokens) for example in own] for own in pipeline.shared_out(parts)[0]]
        widths = pack_members(members, pipeline.shape).widths
        positions[at] += batch.slots * shards * pipeline.shape.tokens(pipeline.shape.counts(widths))
    return programs, real, positions


def evaluation_cost(
    experiment: Experiment, trials: list[Trial], timed: Callable[[AdapterForm, str], float]
) -> tuple[int, float]:
    """Returns the number of curves at the end, and the seconds to measure them and the base."""
    curves, seconds = 0, sum(timed(experiment.form(trials[0]), split) for split in experiment.rows)
    for trial in trials:
        readouts = readouts_of(experiment.config, trial)
        for split in experiment.rows:
            curves += len(readouts)
            seconds += len(readouts) * len(experiment.hierarchy(trial).ranks) * timed(experiment.form(trial), split)
    return curves, seconds


def validation_cost(
    experiment: Experiment, trials: list[Trial], timed: Callable[[AdapterForm, str], float]
) -> tuple[int, float]:
    """Returns the number of validations while training, and the seconds that they take."""
    options = experiment.config.validation
    if not options.every:
        return 0, 0.0
    each = -(-experiment.steps // options.every)
    if options.measure == "loss":
        loss = functools.cache(functools.partial(time_loss, experiment))
        one_rank = lambda trial: loss(experiment.form(trial))  # noqa: E731
    else:
        one_rank = lambda trial: timed(experiment.form(trial), "validation")  # noqa: E731
    seconds = sum(each * len(experiment.hierarchy(trial).ranks) * one_rank(trial) for trial in trials)
    return each * len(trials), seconds


def _time_evaluation(experiment: Experiment, form: AdapterForm, split: str) -> float:
    """Seconds for one rank on one split, from its middle batch of requests."""
    adapted = experiment.adapted(*form)
    evaluator = adapted.evaluators[split]
    middle = len(evaluator) // 2
    return _time_second(lambda: evaluator.run_batch(middle, adapted.adapter, jnp.zeros(form.rank))) * len(evaluator)


def time_loss(experiment: Experiment, form: AdapterForm) -> float:
    """Seconds for the loss at one rank on the validation split."""
    adapted = experiment.adapted(*form)
    loss = adapted.validation_loss()
    return _time_second(lambda: loss(adapted.adapter, jnp.zeros(form.rank)))


def _time_second(run: Callable[[], Any]) -> float:
    """Returns the seconds of a second call, since the first call compiles."""
    run()
    start = time.monotonic()
    run()
    return time.monotonic() - start
