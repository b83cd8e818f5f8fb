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
    methods = ("lora", "scaled_adam", "lora_rite", "sora", "sora_schedule", "maestro")
    found, compilations = run(config, tmp_path, methods)
    assert compilations["train"] == 6
    for name in methods:
        assert losses(tmp_path, name)[-1] < losses(tmp_path, name)[0], name
    assert [curve.readout for curve in found["sora"].curves["test"]] == ["ordered", "ordered_global", "squeeze"]
    assert losses(tmp_path, "maestro") != losses(tmp_path, "lora")
    whole = {curve.readout: curve.accuracies[-1] for curve in found["sora"].curves["test"]}
    assert len(set(whole.values())) == 1  # all read-outs have the function of full rank


@pytest.mark.slow
def test_starts_and_budgets_train(config, tmp_path):
    """What each method defines, read from the adapters that a run has saved; R is 6, and its scaling "sqrt"."""
    methods = ("pissa", "svfit", "eva", "adalora", "lora_squeeze_annealed")
    found, _ = run({**config, "train": config["train"] | {"epochs": 7}}, tmp_path, methods, learning_rate=(0.01,))
    files = {name: load_file(each.adapter / "adapter.safetensors") for name, each in found.items()}
    for key, a in files["pissa"].items():
        if key.endswith(".a"):  # the frozen half is what was taken out; the trained half has moved
            b = files["pissa"][key[:-1] + "b"]
            taken, trained = a[..., 3:] @ b[:, 3:], a[..., :3] @ b[:, :3]
            assert np.linalg.norm(trained + taken) > 1e-4 * np.linalg.norm(taken)
            s = np.linalg.svd(taken, compute_uv=False)
            assert np.all(s[:, 3:] < 1e-4 * s[:, :1])
    gates = [leaf for key, leaf in files["svfit"].items() if key.endswith(".gate")]
    assert all(np.any(gate[:, :3] != gate[:, 3:]) for gate in gates)
    for key, a in files["svfit"].items():
        if key.endswith(".a"):
            np.testing.assert_array_equal(a[..., :3], a[..., 3:])
    ranks = [np.any(leaf != 0, axis=1).sum(axis=1) for key, leaf in files["eva"].items() if key.endswith(".a")]
    assert sum(int(each.sum()) for each in ranks) == 3 * 4  # R/2 for each of four layers
    alive = sum(int(np.count_nonzero(leaf)) for key, leaf in files["adalora"].items() if key.endswith(".gate"))
    assert alive == 4 * 4  # 2/3 of the components
    for key, b in files["lora_squeeze_annealed"].items():
        if key.endswith(".b"):  # R/4 = 1.5, which rounds to 2
            assert np.any(b[:, 1]) and not np.any(b[:, 2:])
    assert losses(tmp_path, "pissa")[0] == pytest.approx(
        losses(tmp_path, "svfit")[0], rel=1e-3
    )  # both begin as the base
