"""What a plan says before a run is what the run then does."""

import json
import subprocess
import sys
import types

import numpy as np
import pytest
from safetensors.numpy import load_file

from mlora_jax.cli.plan import duration
from mlora_jax.config import resolve
from mlora_jax.cost.plan import Plan, evaluation_cost, plan, time_loss, validation_cost
from mlora_jax.run.experiment import Experiment
from mlora_jax.run.train import train
from mlora_jax.training.phases import AdapterForm, TrialPhases
from mlora_jax.training.records import read_json_lines
from mlora_jax.trials import expand_trials
from tests.tiny import trec_data, write_checkpoint


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    root = tmp_path_factory.mktemp("inputs")
    return {
        "model": {"path": str(write_checkpoint(root / "model"))},
        "data": trec_data(root, pad_multiple=2),
        "adapter": {"targets": ("v_proj",)},
        "trials": {"rank": (6,), "method": ("lora", "dylora", "sandwich"), "learning_rate": (0.01, 0.03)},
        "train": {"epochs": 2, "batch_size": 6, "trials_at_once": 3},
        "validation": {"holdout": 0.25},
    }


def test_a_plan_is_what_the_run_does(config, tmp_path):
    found = plan(config, timed_steps=1)
    results = train(config, tmp_path)
    assert (found.trials, found.steps) == (6, 3)
    batches = json.loads((tmp_path / "batches.json").read_text())["batches"]
    planned = [(group.trials // group.batches, group.at_once) for group in found.groups for _ in range(group.batches)]
    assert planned == [(len(batch["trials"]), batch["slots"]) for batch in batches] == [(2, 2), (2, 2), (2, 2)]
    assert [(group.rank, group.profiles) for group in found.groups] == [(6, 1), (6, 3)]
    assert sum(group.compilations for group in found.groups) == results.compilations["train"] == 2

    experiment = Experiment.load(resolve(config))
    tokens = 2 * sum(len(example.tokens) for example in experiment.examples.examples)
    assert [group.tokens for group in found.groups] == [4 * tokens, 2 * tokens]
    assert time_loss(experiment, AdapterForm(6)) > 0
    for group in found.groups:
        assert group.tokens <= group.padded_tokens / group.profiles < 1.2 * group.tokens
        assert group.training_seconds > 3 * group.batches * group.step_seconds * 0.3 > 0
        assert group.compile_seconds > 0

    files = [load_file(path) for path in tmp_path.glob("adapters/*/adapter.safetensors")]
    assert found.adapter_bytes == sum(np.asarray(array).nbytes for file in files for array in file.values())
    curves = {(r["trial"], r["split"], r["readout"]) for r in read_json_lines(tmp_path / "curves.jsonl")}
    assert found.curves == len([key for key in curves if key[0] != "base"]) == 2 * (2 * 2 + 2 + 2)
    assert found.validations == found.validation_seconds == 0
    assert found.seconds == pytest.approx(sum(g.training_seconds for g in found.groups) + found.evaluation_seconds)


def test_a_gated_run_makes_one_form_of_adapter(config, tmp_path):
    """The base, too, is measured and timed with it: no executable is made for a model without gates."""
    methods = {"gated": (("lora", 1.0, "", "soft_threshold"), "gate")}
    trials = {"rank": (6,), "method": ("gated",), "learning_rate": (0.01,)}
    data = {**config["data"], "pad_multiple": 40}
    gated = {**config, "methods": methods, "trials": trials, "data": data}
    found, results = plan(gated, timed_steps=1), train(gated, tmp_path)
    plain = train({**gated, "trials": {**trials, "method": ("lora",)}}, tmp_path / "plain")
    assert results.compilations["evaluation"] == plain.compilations["evaluation"]
    assert [group.compilations for group in found.groups] == [results.compilations["train"]]
    (trial,) = results.trials
    assert found.adapter_bytes == sum(
        array.nbytes for array in load_file(trial.adapter / "adapter.safetensors").values()
    )


@pytest.mark.parametrize(("every", "measure", "one"), [(0, "aurac", 0), (4, "aurac", 10), (4, "loss", 1000)])
def test_validations_and_the_base_are_counted(monkeypatch, every, measure, one):
    """10 steps, S = (1, 2, 4), read-outs by prefix and squeeze; seconds for one rank are given."""
    config = resolve(
        {
            "trials": {"method": ("lora",), "rank": (4,), "learning_rate": (0.1, 0.2)},
            "validation": {"every": every, "measure": measure},
        }
    )
    trials = expand_trials(config)
    experiment = types.SimpleNamespace(
        config=config,
        steps=10,
        rows={"test": [], "validation": []},
        hierarchy=lambda trial: trial.hierarchy(()),
        form=TrialPhases(config, 10).form,
    )
    monkeypatch.setattr("mlora_jax.cost.plan.time_loss", lambda experiment, form: 1000)
    timed = {(AdapterForm(4), "test"): 1, (AdapterForm(4), "validation"): 10}
    curves = 2 * 2 * 2
    assert evaluation_cost(experiment, trials, lambda *key: timed[key]) == (curves, 11 + 2 * 2 * 3 * 11)
    validations = 2 * 3 if every else 0  # after 4, 8 and 10 steps
    assert validation_cost(experiment, trials, lambda *key: timed[key]) == (validations, validations * 3 * one)


def test_the_seconds_of_a_plan_are_those_of_its_parts():
    assert Plan(1, 1, (), 0, 1, 20.0, None, 1, 3.0).seconds == 23.0


def test_the_command(config, tmp_path, request):
    (tmp_path / "planned.py").write_text(
        f"from ml_collections import ConfigDict\n\ndef get_config():\n    return ConfigDict({config!r})\n"
    )
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "experiments.plan",
            "--config",
            tmp_path / "planned.py",
            "--timed_steps=1",
            "--config.validation.every=2",
            "--config.trials.method=('lora',)",
            "--config.data.pad_multiple=40",
        ],
        cwd=request.config.rootpath,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "2 trials of 3 steps; adapters: " in done.stdout and "projected in all: " in done.stdout
    assert "4 validations while training: " in done.stdout
    assert not list(tmp_path.glob("*/"))  # nothing is left behind


def test_durations():
    assert [duration(seconds) for seconds in (0.4, 59, 90, 3661, 36000)] == [
        "0 s",
        "59 s",
        "2 min",
        "1 h 01 min",
        "10 h 00 min",
    ]
