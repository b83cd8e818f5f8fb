"""The mesh, and the rules that say where arrays lie."""

import re

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file

from mlora_jax.adapters import adapt, split
from mlora_jax.config import resolve
from mlora_jax.core.product import path_names
from mlora_jax.models import Decoder
from mlora_jax.parallel import hosts
from mlora_jax.parallel.arrays import fetch, local_rows, on_one_device, put_rows, put_weights, split_rows
from mlora_jax.parallel.mesh import AXES, EVALUATED, make_mesh, mesh_sizes, shards_of
from mlora_jax.parallel.rules import shardings, spec_of
from mlora_jax.run.experiment import Experiment
from mlora_jax.run.inputs import run_mesh
from mlora_jax.run.needs import NEEDS, collect
from mlora_jax.run.readouts import read_out_trial
from mlora_jax.run.sizing import compile_step
from mlora_jax.run.starts import first_state
from mlora_jax.run.train import train
from mlora_jax.training.records import read_json_lines
from mlora_jax.trials import expand_trials
from tests.tiny import tiny_config

FOUR = jax.devices()[:4]
ALL = {"trial": 1, "data": 1, "fsdp": 2, "tensor": 2}
SHAPE = jax.sharding.AbstractMesh((1, 2, 2, 2), AXES)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"fsdp": 3}, "config.parallel asks for trial 1 x fsdp 3 x tensor 1 = 3 devices, and there are 8"),
        ({"data": 4}, "trial 1 x data 4 x fsdp 1 x tensor 1 = 4 devices, and there are 8"),
        ({"fsdp": 0}, "config.parallel.fsdp must be at least 1, or -1"),
        ({"fsdp": -1}, "config.parallel.data and config.parallel.fsdp are both -1"),
    ],
)
def test_sizes_that_do_not_fit(sizes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        mesh_sizes({"trial": 1, "data": -1, "fsdp": 1, "tensor": 1} | sizes, 8)


def test_neighbours_lie_along_tensor():
    mesh = make_mesh({"trial": 1, "data": 1, "fsdp": 2, "tensor": -1}, FOUR)
    assert [[device.id for device in row] for row in mesh.devices[0, 0]] == [[0, 1], [2, 3]]
    assert shards_of(mesh) == shards_of(mesh, EVALUATED) == 2 and shards_of(None) == 1


@pytest.mark.parametrize(
    ("rows", "accumulation", "axes", "expected"),
    [
        (8, 1, {}, {"data": 4}),
        (12, 2, {}, {"data": 3}),  # 6 rows on 4 devices: one is idle
        (2, 2, {}, None),  # one row
        (8, 2, {"fsdp": 2}, {"data": 2, "fsdp": 2}),
        (2, 1, {"fsdp": 2}, {"fsdp": 2}),
        (3, 1, {"tensor": 4}, {"tensor": 4}),
    ],
)
def test_data_takes_what_devices_and_rows_leave(monkeypatch, rows, accumulation, axes, expected):
    monkeypatch.setattr(jax, "devices", lambda: FOUR)
    with jax.default_device(None):
        mesh = run_mesh(resolve({"train": {"batch_size": rows, "accumulation": accumulation}, "parallel": axes}))
    assert (mesh and {axis: size for axis, size in mesh.shape.items() if size > 1}) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": 4}, "the 2 rows of a micro-batch (config.train.batch_size 4 / config.train.accumulation 2) do not"),
        ({"data": 3}, "= 3 devices, and there are 4"),
        ({"fsdp": 4}, "do not divide into 4 parts (config.parallel.data 1 x config.parallel.fsdp 4)"),
    ],
)
def test_a_mesh_that_the_run_cannot_use(monkeypatch, changes, message):
    monkeypatch.setattr(jax, "devices", lambda: FOUR)
    with jax.default_device(None), pytest.raises(ValueError, match=re.escape(message)):
        run_mesh(resolve({"train": {"batch_size": 4, "accumulation": 2}, "parallel": changes}))


def test_keys_of_the_mesh(tmp_path):
    """Each of them changes the program of a training step, and what it is told to be laid out on."""
    config = {
        "model": {"path": "quickstart"},
        "data": {"task": "quickstart", "cache_dir": str(tmp_path), "limit": 8},
        "adapter": {"targets": ("v_proj",)},
        "trials": {"rank": (4,), "seed": (1, 2)},
        "train": {"batch_size": 8},
        "evaluation": {"limit": 4},
    }
    meshes = (
        ({}, {"data": 4}),
        ({"data": 2, "tensor": 2}, {"data": 2, "tensor": 2}),
        ({"trial": 2}, {"trial": 2, "data": 2}),
        ({"fsdp": 2}, {"data": 2, "fsdp": 2}),
        ({"tensor": 4}, {"tensor": 4}),
        ({"engine": "pmap"}, {"data": 4}),
    )
    programs = set()
    for changes, expected in meshes:
        with jax.default_device(None):
            experiment = Experiment.load(resolve({**config, "parallel": changes}))
            program = compile_step(experiment, expand_trials(experiment.config)[0], 2, 0)
        assert {axis: size for axis, size in experiment.mesh.shape.items() if size > 1} == expected
        programs.add(program.as_text())
    assert len(programs) == len(meshes)


def test_keys_of_the_processes(monkeypatch):
    asked = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **named: asked.append(named))
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: False)
    options = {"coordinator_address": "host:1", "num_processes": 4, "process_id": 3}
    for changes in ({}, {"distributed": True}, {"distributed": True, **options}):
        hosts.join(resolve({"parallel": changes}).parallel)
    assert asked == [{}, options]
    for name in options:
        left = {key: value for key, value in options.items() if key != name}
        with pytest.raises(ValueError, match=rf"needs config\.parallel\.{name} too"):
            hosts.join(resolve({"parallel": {"distributed": True, **left}}).parallel)


def test_a_default_device_is_taken_alone():
    assert jax.config.jax_default_device == FOUR[0] and run_mesh(resolve({})) is None


def test_pmap_cuts_rows_only():
    with pytest.raises(ValueError, match=r"config\.parallel\.engine='pmap' cuts the rows only"):
        resolve({"parallel": {"engine": "pmap", "tensor": 2}})


def test_no_rule_cuts_the_layers_and_factors_follow_their_kernel():
    targets = ("q_proj", "o_proj", "up_proj", "down_proj", "lm_head", "embed_tokens")
    model = Decoder(tiny_config(vocab_size=32, tie_word_embeddings=False), rngs=nnx.Rngs(0))
    _, base, adapter, profile = split(adapt(model, 4, targets, key=jax.random.key(0), gate=True))
    found = {}
    for tree in (base, adapter, profile):
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            found[".".join(path_names(path))] = spec_of(".".join(path_names(path)), leaf.shape, SHAPE)
    assert all(spec[0] is None for path, spec in found.items() if path.startswith("layers"))
    both = ("tensor", "fsdp")
    assert found["layers.self_attn.q_proj.base.kernel"] == P(None, "fsdp", "tensor")
    assert found["layers.self_attn.q_proj.a"] == P(None, "fsdp", None)
    assert found["layers.self_attn.q_proj.b"] == P(None, None, both)
    assert found["layers.mlp.down_proj.base.kernel"] == P(None, "tensor", "fsdp")
    assert found["layers.mlp.down_proj.a"] == P(None, both, None)
    assert found["layers.mlp.down_proj.b"] == P(None, None, "fsdp")
    assert found["layers.mlp.gate_proj.kernel"] == P(None, "fsdp", "tensor")  # not adapted
    assert found["embed_tokens.base.embedding"] == P("tensor", "fsdp")
    assert found["lm_head.base.kernel"] == P("fsdp", "tensor") and found["lm_head.b"] == P(None, both)
    assert found["norm.weight"] == P(None) and found["layers.self_attn.q_proj.p"] == P(None, None)
    assert found["layers.self_attn.q_proj.gate"] == P(None, None) and found["lm_head.gate"] == P(None)


def test_a_state_follows_its_adapter_behind_the_trials():
    mesh = jax.sharding.AbstractMesh((2, 1, 2, 2), AXES)
    assert spec_of("optimizer.1.mu.layers.mlp.up_proj.a", (4, 3, 8, 6), mesh, trials=True) == P(
        "trial", None, "fsdp", None
    )
    assert spec_of("step", (4,), mesh, trials=True) == P("trial")
    # Seven outputs: nothing divides them; six: the first of two axes does.
    assert spec_of("layers.mlp.up_proj.b", (2, 6, 7), mesh) == P(None, None, None)
    assert spec_of("layers.mlp.up_proj.b", (2, 6, 6), mesh) == P(None, None, "tensor")
    assert spec_of("layers.mlp.up_proj.kernel", (8, 6), mesh, gathered=True) == P(None, "tensor")


def test_bytes_of_a_device_fall_and_values_stay():
    mesh = make_mesh(ALL, FOUR)
    tree = {"layers": {"mlp": {"up_proj": {"kernel": np.arange(2 * 8 * 12.0).reshape(2, 8, 12)}}}}
    placed = put_weights(tree, mesh)["layers"]["mlp"]["up_proj"]["kernel"]
    assert {part.data.shape for part in placed.addressable_shards} == {(2, 4, 6)}
    assert put_weights({"kernel": placed}, None)["kernel"] is placed
    whole = on_one_device({"x": placed, "key": jax.random.key(3)})
    assert len(whole["x"].devices()) == 1 and whole["key"] == jax.random.key(3)
    np.testing.assert_array_equal(fetch(whole["x"]), tree["layers"]["mlp"]["up_proj"]["kernel"])
    assert jax.tree.leaves(shardings(tree, mesh))[0] == placed.sharding


def test_rows_in_parts():
    mesh = make_mesh({"trial": 1, "data": 2, "fsdp": 2, "tensor": 1}, FOUR)
    x = np.arange(2 * 8 * 3).reshape(2, 8, 3)
    parts = split_rows(x, 1, 4)
    assert parts.shape == (4, 2, 2, 3)
    np.testing.assert_array_equal(parts[1], x[:, 2:4])
    placed = put_rows(x, mesh, 1)
    for number, part in enumerate(sorted(placed.addressable_shards, key=lambda part: part.device.id)):
        np.testing.assert_array_equal(part.data, parts[number])
    assert local_rows(mesh, 8) == (0, 8)


def test_readouts_that_run_the_model_are_the_same_on_a_mesh(tmp_path):
    config = {
        "model": {"path": "quickstart"},
        "data": {"task": "quickstart", "cache_dir": str(tmp_path), "limit": 16, "pad_multiple": 16},
        "adapter": {"targets": ("v_proj", "o_proj")},
        "trials": {"method": ("lora",), "rank": (3,), "scaling": ("rank",)},
        "train": {"batch_size": 8, "accumulation": 2},
        "calibration": {"steps": 3, "batches": 2},
        "evaluation": {"limit": 4},
    }
    (trial,) = expand_trials(resolve(config))
    found = {}

    def drawn(stacked):
        random = np.random.default_rng(0)
        return jax.tree.map(lambda x: random.normal(size=x.shape[1:], scale=0.2).astype("f"), stacked)

    meshes = {"one": {}, "data": {}, "mixed": {"data": 2, "fsdp": 2}}
    for name, axes in meshes.items():
        with jax.default_device(FOUR[0] if name == "one" else None):
            experiment = Experiment.load(resolve({**config, "parallel": axes}))
            assert (experiment.mesh is None) == (name == "one")
            state, _ = first_state(experiment, [trial])
            adapter = drawn(state.adapter)
            hierarchy = trial.hierarchy(experiment.config.adapter.ranks)
            for readout in ("calibrated", "squeeze_inputs"):
                (folder := tmp_path / name / readout).mkdir(parents=True)
                made = read_out_trial(experiment, trial, adapter, hierarchy, readout, folder)
                profiles = np.stack([np.asarray(p) for p in made.curve().values()])
                if readout == "calibrated":
                    assert not np.allclose(profiles[-1], profiles[-1, 0])
                a, b = (np.asarray(fetch(x)) for x in jax.tree.leaves(made.adapter)[:2])
                found[name, readout] = profiles, [a[..., :r] @ b[..., :r, :] for r in (1, 2, 3)]
    for (name, readout), (profiles, products) in found.items():
        expected = found["one", readout]
        np.testing.assert_allclose(profiles, expected[0], rtol=1e-4, atol=1e-5, err_msg=f"{name} {readout}")
        for product, other in zip(products, expected[1], strict=True):
            np.testing.assert_allclose(product, other, rtol=1e-3, atol=1e-5, err_msg=f"{name} {readout}")


@pytest.fixture(scope="module")
def quickstart_config(tmp_path_factory):
    """A small run, off the narrow path: R 3, a scaling, two micro-batches."""
    return {
        "model": {"path": "quickstart"},
        "data": {
            "task": "quickstart",
            "cache_dir": str(tmp_path_factory.mktemp("cache")),
            "limit": 32,
            "pad_multiple": 16,
        },
        "adapter": {"targets": ("v_proj", "o_proj")},
        "trials": {"method": ("lora",), "rank": (3,), "scaling": ("rank",), "learning_rate": (0.02,)},
        "train": {"batch_size": 8, "accumulation": 2, "log_every": 1, "epochs": 1, "trials_at_once": 2},
        "validation": {"holdout": 0.0},
        "calibration": {"steps": 3, "batches": 2},
        "evaluation": {"limit": 4},
    }


@pytest.mark.parametrize("axes", [{}, {"data": 2, "fsdp": 2}, {"fsdp": 2, "tensor": 2}])
def test_what_actions_need_is_the_same_on_a_mesh(quickstart_config, axes):
    names = [name for name in NEEDS if name not in ("peft_adapter", "fitted_profiles")]
    (trial,) = expand_trials(resolve(quickstart_config))
    found = []
    for own_axes, device in ((None, FOUR[0]), (axes, None)):
        with jax.default_device(device):
            experiment = Experiment.load(resolve({**quickstart_config, "parallel": own_axes or {}}))
            assert (experiment.mesh is None) == (own_axes is None)
            random = np.random.default_rng(0)
            adapter = jax.tree.map(
                lambda x, random=random: random.normal(size=x.shape[1:], scale=0.2).astype("f"),
                first_state(experiment, [trial])[0].adapter,
            )
            needed = collect(names, experiment, trial, adapter, experiment.phases.trained_profile(trial))
            # An action is run with what was collected for it, so all of it lies on one device.
            assert own_axes is None or all(len(leaf.devices()) == 1 for leaf in jax.tree.leaves(needed))
            found.append(jax.tree.map(np.asarray, needed))
    for (path, one), other in zip(
        jax.tree_util.tree_leaves_with_path(found[0]), jax.tree.leaves(found[1]), strict=True
    ):
        scale = np.abs(one).max()
        np.testing.assert_allclose(other / scale, one / scale, rtol=1e-3, atol=1e-4, err_msg=str(path))


@pytest.mark.slow
@pytest.mark.parametrize("axes", [{"trial": 2, "fsdp": 2}, {"data": 4}])
def test_gates_updates_and_starts_from_data_train_the_same_on_a_mesh(quickstart_config, axes, tmp_path):
    methods = {
        "gated": (("lora", 0.5), ("per_example", 0.5, "none", "soft_threshold"), "gate"),
        "by_inputs": (("lora", 0.5), ("per_example", 0.5, "squeeze_inputs", "first_column_3")),
        "rite": (("lora", 1.0, "", "ordered_dropout"), "lora_rite_blocks"),
    }
    trials = quickstart_config["trials"] | {"method": tuple(methods), "seed": (1, 2)}
    config = {**quickstart_config, "methods": methods, "trials": trials}
    factors, losses = [], []
    for own_axes, device in ((None, FOUR[0]), (axes, None)):
        with jax.default_device(device):
            folder = tmp_path / ("one" if own_axes is None else "many")
            results = train({**config, "parallel": own_axes or {}}, folder)
            factors.append(
                {each.trial.name: load_file(each.adapter / "adapter.safetensors") for each in results.trials}
            )
            records = read_json_lines(folder / "metrics.jsonl")
            losses.append({(record["trial"], record["step"]): record["loss"] for record in records})
    assert losses[0].keys() == losses[1].keys() and len(losses[0]) == 6 * 4
    for key, loss in losses[0].items():
        assert losses[1][key] == pytest.approx(loss, rel=1e-4), key
    for trial, tensors in factors[0].items():
        assert any(name.endswith(".gate") for name in tensors) == trial.startswith("gated")
        for name, tensor in tensors.items():
            if name.endswith(".a"):  # a truncated SVD leaves the sign of a column open
                other = factors[1][trial]
                pairs = [(each[name], each[name[:-1] + "b"]) for each in (tensors, other)]
                one, two = (np.einsum("...dr,...rf->...rdf", *pair) for pair in pairs)
                np.testing.assert_allclose(one, two, atol=2e-3 * np.abs(one).max(), err_msg=f"{trial} {name}")
            elif name.endswith(".gate"):
                np.testing.assert_allclose(tensor, factors[1][trial][name], atol=1e-4, err_msg=f"{trial} {name}")
