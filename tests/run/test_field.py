"""Methods of other papers through a whole run: their executables, their records and what their adapters are."""

import numpy as np
import pytest
from safetensors.numpy import load_file

from mlora_jax.run.train import train
from mlora_jax.training.records import read_json_lines
from tests.tiny import trec_data, write_checkpoint


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    root = tmp_path_factory.mktemp("inputs")
    return {
        "model": {"path": str(write_checkpoint(root / "model"))},
        "data": trec_data(root),
        "adapter": {"targets": ("v_proj", "up_proj")},
        "train": {"epochs": 2, "batch_size": 4, "log_every": 1, "accumulation": 2, "trials_at_once": 6},
        "validation": {"holdout": 0.0},
        "calibration": {"batches": 2},
    }


def run(config, workdir, methods, **trials):
    """{method: TrialResult} and the executables of a run of R = 6 with the scaling "sqrt", two seeds."""
    values = {"rank": (6,), "learning_rate": (0.03,), "seed": (1, 2), "scaling": ("sqrt",), **trials}
    results = train({**config, "trials": {**values, "method": tuple(methods)}}, workdir)
    first = {found.trial.method: found for found in results.trials if found.trial.seed == 1}
    return first, results.compilations


def losses(workdir, method):
    records = read_json_lines(workdir / "metrics.jsonl")
    return [record["loss"] for record in records if record["trial"].startswith(f"{method}-r6")]


def test_rules_that_are_data_share_the_executable_of_lora(config, tmp_path):
    found, compilations = run(config, tmp_path, ("lora", "lora_plus", "matryoshka"))
    assert compilations["train"] == 1
    assert losses(tmp_path, "lora")[0] == pytest.approx(losses(tmp_path, "lora_plus")[0], rel=1e-5)
    files = {name: load_file(each.adapter / "adapter.safetensors") for name, each in found.items()}
    far = {
        name: sum(np.linalg.norm(x) for key, x in file.items() if key.endswith(".b")) for name, file in files.items()
    }
    assert far["lora_plus"] > 4 * far["lora"]


@pytest.mark.slow
def test_optimizers_and_gates_train(config, tmp_path):
    """Two trials at once of each, one executable each, and the loss falls."""
    methods = ("lora", "scaled_adam", "lora_rite", "sora", "sora_schedule")
    found, compilations = run(config, tmp_path, methods)
    assert compilations["train"] == 5
    for name in methods:
        assert losses(tmp_path, name)[-1] < losses(tmp_path, name)[0], name
    assert [curve.readout for curve in found["sora"].curves["test"]] == ["ordered", "ordered_global", "squeeze"]
    whole = {curve.readout: curve.accuracies[-1] for curve in found["sora"].curves["test"]}
    assert len(set(whole.values())) == 1  # all read-outs have the function of full rank
