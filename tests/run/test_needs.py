"""What a run collects for actions, against NumPy and plain calls of the model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from mlora_jax.adapters import set_profile
from mlora_jax.config import resolve
from mlora_jax.core.rank_axes import by_parent
from mlora_jax.run.experiment import Experiment
from mlora_jax.run.needs import NEEDS, collect
from mlora_jax.run.starts import first_state
from mlora_jax.run.train import train
from mlora_jax.training.records import read_json_lines
from mlora_jax.training.trial_trees import take_trial
from mlora_jax.trials import expand_trials
from tests.tiny import trec_data, write_checkpoint


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    root = tmp_path_factory.mktemp("inputs")
    return {
        "model": {"path": str(write_checkpoint(root / "model"))},
        "data": trec_data(root),
        "adapter": {"targets": ("v_proj", "up_proj")},
        "trials": {"rank": (3,), "learning_rate": (0.03,), "seed": (1,), "method": ("lora",), "scaling": ("sqrt",)},
        "train": {"epochs": 2, "batch_size": 4, "log_every": 1, "accumulation": 2},
        "validation": {"holdout": 0.0},
        "calibration": {"batches": 2},
    }


@pytest.fixture(scope="module")
def loaded(config):
    """(experiment, trial, an adapter whose B is not zero, its profile)."""
    experiment = Experiment.load(resolve(config))
    (trial,) = expand_trials(experiment.config)
    adapter = take_trial(first_state(experiment, [trial])[0].adapter, 0)
    keys = iter(jax.random.split(jax.random.key(3), 8))
    adapter = jax.tree.map(lambda leaf: leaf + 0.1 * jax.random.normal(next(keys), leaf.shape), adapter)
    return experiment, trial, adapter, experiment.phases.trained_profile(trial)


def batches_of(experiment, trial, count):
    for _, arrays in zip(range(count), experiment.pipeline([trial]).pipelines[0], strict=False):
        yield {name: np.reshape(part, (-1, part.shape[-1])) for name, part in arrays.items()}


def test_kernels_are_those_of_the_checkpoint(config, loaded):
    experiment, trial, adapter, p = loaded
    found = by_parent(collect(("kernels",), experiment, trial, adapter, p)["kernels"])
    assert set(found) == set(by_parent(adapter))
    files = load_file(f"{config['model']['path']}/model.safetensors")
    for name, path in (("self_attn.v_proj", "v_proj"), ("mlp.up_proj", "up_proj")):
        (parent,) = [parent for parent in found if parent[-1] == path]
        for layer in range(2):
            expected = files[f"model.layers.{layer}.{name}.weight"].T
            np.testing.assert_array_equal(found[parent]["kernel"][layer], expected)


def test_kernels_of_a_quantised_base_are_those_that_its_layers_compute_with(config):
    """By what a layer makes of the rows of the identity."""
    pytest.importorskip("qwix")
    experiment = Experiment.load(resolve({**config, "model": config["model"] | {"quantization": "int8"}}))
    (trial,) = expand_trials(experiment.config)
    needed = collect(("kernels",), experiment, trial, None, experiment.phases.trained_profile(trial))["kernels"]
    found = by_parent(needed)
    layers = {parent: leaves["kernel"] for parent, leaves in found.items()}
    assert {parent[-1] for parent in layers} == {"v_proj", "up_proj"}
    for parent, kernel in layers.items():
        stacked = experiment.model
        for name in parent:
            stacked = getattr(stacked, name)
        graphdef, state = nnx.split(stacked)
        for number in range(2):
            layer = nnx.merge(graphdef, jax.tree.map(lambda leaf, number=number: leaf[number], state))
            np.testing.assert_allclose(layer(jnp.eye(kernel.shape[-2])), kernel[number], rtol=1e-5, atol=1e-6)


def test_gradients_are_those_of_the_mean_loss(loaded):
    """By the loss written out: cross-entropy of all logits at answer positions."""
    experiment, trial, adapter, p = loaded
    adapted = experiment.adapted_for(trial)
    found = collect(("gradients",), experiment, trial, adapter, p)["gradients"]
    batches = list(batches_of(experiment, trial, 2))

    def mean_loss(adapter):
        model = nnx.merge(adapted.evaluation_graphdef, adapted.base, adapter, set_profile(adapted.profile, p))
        nats, answers = 0.0, 0.0
        for batch in batches:
            rows = np.arange(len(batch["tokens"]))[:, None]
            logits = model(jnp.asarray(batch["tokens"]))[rows, batch["positions"]]
            picked = jnp.take_along_axis(jax.nn.log_softmax(logits), batch["targets"][..., None], axis=-1)[..., 0]
            nats, answers = nats - jnp.sum(picked * batch["weights"]), answers + batch["weights"].sum()
        return nats / answers

    expected = jax.grad(mean_loss)(adapter)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-6)
        assert np.any(np.asarray(other))


def test_moments_of_inputs_and_of_hidden_features_agree(loaded):
    """H = X A diag(p), so H^T H follows from X^T X: for the inputs of the first layer, which no adapter changes."""
    experiment, trial, adapter, p = loaded
    both = collect(("input_moments", "hidden_moments"), experiment, trial, adapter, p)
    inputs, hidden = (by_parent(both[name]) for name in ("input_moments", "hidden_moments"))
    for parent, leaves in by_parent(adapter).items():
        scaled = np.asarray(leaves["a"]) * np.asarray(p)  # [L, D, R]
        x = np.asarray(inputs[parent]["gram"])
        assert x.shape == (2, *leaves["a"].shape[1:2] * 2)
        np.testing.assert_allclose(hidden[parent]["gram"], np.swapaxes(scaled, 1, 2) @ x @ scaled, rtol=2e-3, atol=1e-4)
        assert np.all(np.linalg.eigvalsh(x) > -1e-3) and np.all(np.trace(x, axis1=1, axis2=2) > 0)


def test_statistics_of_inputs_are_moments_sums_and_counts(loaded):
    """Beside the moments: the sums are those of the inputs, and every layer counts the same tokens."""
    experiment, trial, adapter, p = loaded
    both = collect(("input_moments", "input_statistics"), experiment, trial, adapter, p)
    moments, statistics = (by_parent(both[name]) for name in ("input_moments", "input_statistics"))
    counts = set()
    for parent, leaves in moments.items():
        found = np.asarray(statistics[parent]["gram"])
        np.testing.assert_allclose(found[:, :-1, :-1], leaves["gram"], rtol=1e-4, atol=1e-4)
        np.testing.assert_array_equal(found[:, -1], found[:, :, -1])
        counts |= set(found[:, -1, -1].tolist())
        covariance = found[:, :-1, :-1] / found[:, -1:, -1:] - np.einsum(
            "ld,le->lde", *[found[:, :-1, -1] / found[:, -1:, -1]] * 2
        )
        assert np.all(np.linalg.eigvalsh(covariance) > -1e-3)
    answered = [
        np.max(np.where(batch["weights"] > 0, batch["positions"], -1), axis=1) + 1
        for batch in batches_of(experiment, trial, 2)
    ]
    assert counts == {float(np.sum(answered))}


def test_every_need_can_be_collected(loaded, config):
    experiment, trial, adapter, p = loaded
    names = [name for name in NEEDS if name != "peft_adapter"]  # for that one: test_key_of_the_start of a run
    assert set(collect(names, experiment, trial, adapter, p)) == set(names)
    assert collect((), experiment, trial, adapter, p) == {}


def test_a_gated_method_with_a_proximal_step_and_a_squeeze_by_inputs(config, tmp_path):
    """A method of one's own by what the tables hold: gates move, some are cut to zero, and a phase starts with data."""
    own = {
        "methods": {
            "gated": (("lora", 1.0, "", "soft_threshold"), "gate"),
            "plain": (("lora", 1.0),),
            "by_inputs": (("lora", 0.5), ("per_example", 0.5, "squeeze_inputs")),
            "tail": (("per_example", 0.5), ("lora", 0.5, "none", "upper_half")),
            "other": (("per_example", 0.5), ("dylora", 0.5, "none", "upper_half")),
        },
        "trials": config["trials"] | {"method": ("gated", "plain", "by_inputs", "tail", "other")},
        "evaluation": {"readouts": {name: ("prefix", "squeeze") for name in ("gated", "plain")}},
    }
    found = {trial.trial.method: trial for trial in train({**config, **own}, tmp_path).trials}
    files = {name: load_file(trial.adapter / "adapter.safetensors") for name, trial in found.items()}
    gates = [tensor for name, tensor in files["gated"].items() if name.endswith(".gate")]
    assert len(gates) == 2 and all(np.any(gate != 1) for gate in gates)
    assert not any(name.endswith(".gate") for name in files["plain"])
    losses = {}
    for record in read_json_lines(tmp_path / "metrics.jsonl"):
        losses.setdefault(record["trial"].split("-")[0], []).append(record["loss"])
    assert losses["gated"][0] == pytest.approx(losses["plain"][0]) and losses["gated"][-1] != losses["plain"][-1]
    for name in ("gated", "plain", "by_inputs"):
        assert losses[name][-1] < losses[name][0]
    # The curve of a gated adapter at full rank is the same by prefix and by its squeeze.
    (prefix, squeezed) = found["gated"].curves["test"]
    assert prefix.accuracies[-1] == squeezed.accuracies[-1]
    # The last phases of "tail" and "other" differ, but move only the columns above R/2: the first one stays.
    for name, tensor in files["tail"].items():
        other = files["other"][name]
        columns = (lambda at: (..., at)) if name.endswith(".a") else (lambda at: (..., at, slice(None)))
        np.testing.assert_array_equal(tensor[columns(0)], other[columns(0)])
        assert np.any(tensor[columns(1)] != other[columns(1)]), name


def test_gates_are_refused_where_a_method_has_none(config):
    with pytest.raises(ValueError, match="'soft_threshold' acts on gates, and the method has none: set gate=True"):
        resolve({**config, "methods": {"mine": (("lora", 1.0, "", "soft_threshold"),)}})
