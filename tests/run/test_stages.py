"""Stages of a run by themselves, on stand-ins for model and data."""

import dataclasses
import sys
import types

import numpy as np
import pytest

from mlora_jax.config import resolve
from mlora_jax.run import batch as run_batch
from mlora_jax.run import evaluation
from mlora_jax.run import train as run
from mlora_jax.run.experiment import Experiment
from mlora_jax.run.sizing import plan_batches
from mlora_jax.run.stage import Stage
from mlora_jax.training.checkpoint import Restored
from mlora_jax.training.curve_records import BASE, CurveRecord, CurvesOnRecord
from mlora_jax.training.grid import TrialBatch
from mlora_jax.training.loop import LoopState
from mlora_jax.training.phases import TrialPhases
from mlora_jax.training.records import JsonLines, read_json_lines
from mlora_jax.trials import expand_trials


class Quiet:
    """Takes whatever is called."""

    def __getattr__(self, name):
        return lambda *arguments, **named: None


@pytest.fixture
def stand_in(tmp_path):
    """Makes a `Stage` of which only some parts are there."""
    with JsonLines(tmp_path / "metrics.jsonl") as metrics, JsonLines(tmp_path / "curves.jsonl") as curves:
        parts = {"progress": Quiet(), "trackers": [Quiet()], "metrics": metrics, "curves": curves}
        names = [field.name for field in dataclasses.fields(Stage)]
        yield lambda **given: Stage(**(dict.fromkeys(names) | parts | given))


class Batches:
    """A pipeline that gives nothing."""

    def __iter__(self):
        return self

    def __next__(self):
        raise StopIteration

    def set_state(self, state):
        self.state = state


@pytest.mark.parametrize("step", [0, 4])
def test_only_a_batch_s_own_records_are_taken_back(stand_in, tmp_path, step):
    """Batches may take turns, so another one's records lie before and after what comes again."""
    trials = expand_trials(resolve({"trials": {"seed": (1, 2), "learning_rate": (0.1, 0.2)}}))
    mine, other = TrialBatch("mine", tuple(trials[:2]), 2), TrialBatch("other", tuple(trials[2:]), 2)
    experiment = types.SimpleNamespace(batches=lambda trials: Batches(), steps=10)
    stages = stand_in(experiment=experiment)
    turns = (other, 2), (mine, 2), (mine, 4), (other, 4), (mine, 6), (other, 6)
    written = [(batch, at, trial.name) for batch, at in turns for trial in batch.trials]
    for _, at, name in written:
        stages.metrics.write({"trial": name, "step": at})
    memory = dataclasses.asdict(LoopState(step, [], [True, True], []))
    restored = Restored(step, "state", {"memory": memory, "data": None}) if step else None
    checkpoints = types.SimpleNamespace(restore=lambda template: restored)
    state, found, _ = run_batch._resume(stages, mine, checkpoints, "start")
    assert (state, found.step) == ("state" if step else "start", step)
    kept = [(record["step"], record["trial"]) for record in read_json_lines(tmp_path / "metrics.jsonl")]
    assert kept == [(at, name) for batch, at, name in written if batch is other or at <= step]


def test_a_run_that_does_not_fit_leaves_its_folder_open_to_what_the_error_asks_for(tmp_path, monkeypatch):
    class TooLarge(Quiet):
        steps, config = 10, resolve({})
        phases = TrialPhases(config, steps)

        def digests(self):
            return {}

    def too_large(experiment, trials, before_each):
        raise ValueError("one trial needs 9 GiB")

    def measure(stages, trial):
        stages.curves.write(*CurveRecord(None, "trec", "test", BASE, (0,), (0.5,), (0.1,), 26).to_lines())

    monkeypatch.setattr(run.Experiment, "load", lambda config: TooLarge())
    monkeypatch.setattr(run, "describe_experiment", lambda experiment: "")
    monkeypatch.setattr(run, "evaluate_base", measure)
    monkeypatch.setattr(run, "plan_batches", too_large)
    for remat in ("none", "full"):
        with pytest.raises(ValueError, match="one trial needs"):
            run.train({"train": {"remat": remat}}, tmp_path)


def test_what_records_need_is_looked_for_before_model_and_data(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr(run.Experiment, "load", lambda config: pytest.fail("model and data were loaded"))
    with pytest.raises(ModuleNotFoundError, match="needs wandb"):
        run.train({"records": {"wandb_project": "nested"}}, tmp_path)


class Signalled:
    """An evaluator during whose first pass a signal comes."""

    passes, truncated = 0, 0

    def __call__(self, adapter, p):
        self.passes += 1
        return np.ones(3, bool)

    def interrupted(self):
        return 15 if self.passes else 0


def test_a_signal_during_a_pass_ends_a_run_before_the_next_one(stand_in, tmp_path, monkeypatch):
    config, evaluator = resolve({"trials": {"rank": (4,), "method": ("lora",)}}), Signalled()
    adapted = types.SimpleNamespace(evaluators=dict.fromkeys(("test", "validation"), evaluator), adapter=0, profile=0)
    experiment = types.SimpleNamespace(
        rows={"test": [], "validation": []},
        adapted_for=lambda trial: adapted,
        data=types.SimpleNamespace(task=types.SimpleNamespace(name="trec")),
        phases=TrialPhases(config, 10),
    )
    folder = types.SimpleNamespace(
        curves=CurvesOnRecord, adapter=lambda trial: None, save_verdicts=lambda *values: None
    )
    (trial,) = expand_trials(config)
    monkeypatch.setattr(evaluation, "load_adapter", lambda *arguments: (0, trial.hierarchy(), {"finite": True}))
    stages = stand_in(config=config, experiment=experiment, folder=folder, signal_came=evaluator.interrupted)
    with pytest.raises(run.Interrupted):
        evaluation.evaluate_trial(stages, trial)  # three ranks
    assert evaluator.passes == 1 and not read_json_lines(tmp_path / "curves.jsonl")
    evaluator.passes = 0
    with pytest.raises(run.Interrupted):
        evaluation.evaluate_base(stages, trial)  # two splits
    assert evaluator.passes == 1 and len(read_json_lines(tmp_path / "curves.jsonl")) == 1


def test_a_signal_ends_planning_before_the_next_group():
    config = resolve({"trials": {"rank": (4, 8)}, "train": {"trials_at_once": 1}})
    planned = Experiment(config, None, None, None, types.SimpleNamespace(examples=[0] * 64), {})
    assert len(plan_batches(planned, expand_trials(config))) == 2

    def leave():
        raise run.Interrupted(143)

    with pytest.raises(run.Interrupted):
        plan_batches(planned, expand_trials(config), before_each=leave)
