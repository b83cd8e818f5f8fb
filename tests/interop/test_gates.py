"""Exports of an adapter with gates: every format has the gate in B and computes what our model computes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from mlora_jax.adapters import adapt, split
from mlora_jax.core import RankHierarchy, read_out
from mlora_jax.core.importance import used_ranks
from mlora_jax.interop import export_adapter, export_merged, export_peft, start_from_peft
from mlora_jax.models import load_decoder
from mlora_jax.training.adapter_file import load_adapted
from tests.interop.models import PATHS, RANK, TOKENS, decoder_logits, our_logits, pairs
from tests.oracles.numpy_reference import best_approximation, profile_matryoshka, readouts
from tests.oracles.peft_logits import save_random_peft, with_deltas, with_peft

# PEFT 0.21 reads a property that transformers 5.23 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
S = (1, 2, 4, RANK)
HIERARCHY = RankHierarchy(S, "sqrt")
CLOSE = dict(rtol=0, atol=1e-4)
TARGETS = ("q_proj", "v_proj", "down_proj", "lm_head")


@pytest.fixture(scope="module")
def gated(base):
    """(adapted model, adapter with random leaves)."""
    model = adapt(load_decoder(base, dtype=jnp.float32), RANK, TARGETS, key=jax.random.key(1), gate="normal")
    keys = iter(jax.random.split(jax.random.key(2), 99))
    adapter = jax.tree.map(lambda leaf: leaf + 0.3 * jax.random.normal(next(keys), leaf.shape), split(model)[2])
    return model, adapter


def gates(adapter):
    """{module's name in torch: gate [R]}."""
    found = {}
    for path, name in PATHS.items():
        node = adapter
        for part in path.split("."):
            node = node[part]
        gate = np.asarray(node["gate"][...])
        found |= {name.format(layer): row for layer, row in enumerate(gate)} if gate.ndim == 2 else {name: gate}
    return found


def deltas(adapter, p):
    found = gates(adapter)
    return {name: (a * (p * found[name])) @ b for name, (a, b) in pairs(adapter).items()}


@pytest.mark.parametrize(("readout", "rank"), [("prefix", 3), ("nested", RANK)])
def test_peft_and_transformers_compute_the_gated_function(base, gated, tmp_path, readout, rank):
    model, adapter = gated
    p = readouts(S, rank, "sqrt")[readout]
    expected = with_deltas(base, deltas(adapter, p), TOKENS)
    np.testing.assert_allclose(our_logits(model, adapter, p), expected, **CLOSE)
    options = dict(readout=readout, base_model=str(base))
    folder = export_peft(tmp_path / "peft", adapter, HIERARCHY, rank, **options)
    np.testing.assert_allclose(with_peft(base, folder, TOKENS)[0], expected, **CLOSE)
    merged = export_merged(tmp_path / "merged", adapter, HIERARCHY, rank, **options)
    np.testing.assert_allclose(decoder_logits(merged), expected, **CLOSE)
    own = export_adapter(tmp_path / "own", adapter, HIERARCHY, rank, **options)
    loaded = load_adapted(own, load_decoder(base))
    assert not any(name.endswith(".gate") for name in load_file(own / "adapter.safetensors"))
    again = np.asarray(loaded.hierarchy.prefix(rank))
    added = {name: (a * again) @ b for name, (a, b) in pairs(loaded.adapter).items()}
    for name, delta in deltas(adapter, p).items():
        np.testing.assert_allclose(added[name], delta, rtol=0, atol=1e-5, err_msg=name)


def test_squeeze_exports_the_best_approximation_of_the_gated_function(base, gated, tmp_path):
    _, adapter = gated
    p, found = profile_matryoshka(S, "sqrt"), gates(adapter)
    folder = export_peft(
        tmp_path / "out", adapter, HIERARCHY, 3, readout="squeeze", trained_profile=p, base_model=str(base)
    )
    tensors = load_file(folder / "adapter_model.safetensors")
    for name, (a, b) in pairs(adapter).items():
        best = best_approximation(a, b, p * found[name], 3)
        left, right = (tensors[f"base_model.model.{name}.lora_{factor}.weight"] for factor in "AB")
        np.testing.assert_allclose((right @ left).T, best, rtol=0, atol=1e-4, err_msg=name)


def test_a_gated_adapter_can_start_from_a_peft_adapter(base, gated, tmp_path):
    """B is divided by the gate that the model starts with, so that the function is the file's."""
    model, _ = gated
    theirs = save_random_peft(base, tmp_path / "theirs", r=3, target_modules=["q_proj", "down_proj"])
    p = np.asarray(HIERARCHY.lora())
    adapter = start_from_peft(theirs, model, jnp.asarray(p))
    np.testing.assert_array_equal(adapter["lm_head"]["gate"], split(model)[2]["lm_head"]["gate"])
    np.testing.assert_allclose(our_logits(model, adapter, p), with_peft(base, theirs, TOKENS)[0], **CLOSE)


def test_zero_gates_are_left_out_of_an_export_layer_by_layer(base, gated, tmp_path):
    """PEFT has as many ranks as gates that are not zero, or those of a budget over all layers."""
    model, adapter = gated
    random = np.random.default_rng(3)

    def cut(path, leaf):  # about half of the gates, another number in every layer
        return leaf * (random.random(leaf.shape) < 0.5) if "gate" in str(path) else leaf

    adapter = jax.tree_util.tree_map_with_path(cut, adapter)
    p, options = readouts(S, RANK, "sqrt")["prefix"], dict(base_model=str(base))
    reading = read_out(adapter, HIERARCHY, "ordered")
    folder = export_peft(tmp_path / "all", reading.adapter, reading.hierarchy, used_ranks(reading.adapter), **options)
    logits, ranks = with_peft(base, folder, TOKENS)
    np.testing.assert_allclose(logits, with_deltas(base, deltas(adapter, p), TOKENS), **CLOSE)
    assert ranks == {name: count for name, gate in gates(adapter).items() if (count := np.count_nonzero(gate))}
    # The largest components of all layers, two per layer in the mean.
    parts = {}
    for name, (a, b) in pairs(adapter).items():
        for i, scale in enumerate(p * gates(adapter)[name]):
            part = scale * np.outer(a[:, i], b[i])
            parts[name, i] = np.linalg.norm(part), part
    kept = sorted(parts, key=lambda key: -parts[key][0])[: 2 * len(pairs(adapter))]
    expected = {name: sum(parts[key][1] for key in kept if key[0] == name) for name in {name for name, _ in kept}}
    folder = export_peft(tmp_path / "two", adapter, HIERARCHY, 2, readout="ordered_global", **options)
    logits, ranks = with_peft(base, folder, TOKENS)
    np.testing.assert_allclose(logits, with_deltas(base, expected, TOKENS), **CLOSE)
    assert sum(ranks.values()) == len(kept) and len(set(ranks.values())) > 1
    reading = read_out(adapter, HIERARCHY, "ordered_global")
    np.testing.assert_allclose(our_logits(model, reading.adapter, reading.profile(2)), logits, **CLOSE)
