"""Components in the order of their norms: the function stays, and zeros can be left out. The oracle is NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlora_jax.core import ACTIONS, ActionInput, RankHierarchy, read_out
from mlora_jax.core.actions import run_action
from mlora_jax.core.importance import spread_ranks, used_ranks

D, F, R, L = 9, 7, 5, 3
HIERARCHY = RankHierarchy((1, 2, R), "sqrt")


def integers(seed, *shape):
    """Small integers, with which every sum of products is exact in float32, whatever its order."""
    return np.random.default_rng(seed).integers(-4, 5, shape).astype(np.float32)


@pytest.fixture
def adapter():
    """A stacked layer and a plain one, with gates of which some are zero."""
    layers = {"up": {"a": integers(0, L, D, R), "b": integers(1, L, R, F), "gate": integers(2, L, R)}}
    layers["down"] = {"a": integers(3, D, R), "b": integers(4, R, F), "gate": integers(5, R)}
    layers["up"]["gate"][0, 1] = layers["up"]["gate"][2, 3:] = layers["down"]["gate"][[0, 2]] = 0
    return jax.tree.map(jnp.asarray, layers)


def components(leaves, p):
    """NumPy: [..., R, D, F], the parts of a layer's function."""
    a, b, gate = (np.asarray(leaves[name], np.float64) for name in ("a", "b", "gate"))
    return np.einsum("...dr,...rf,...r->...rdf", a, b, gate * np.asarray(p, np.float64))


def test_removing_the_zero_gates_leaves_the_function_exactly(adapter):
    reading = read_out(adapter, RankHierarchy((1, 2, R)), "ordered")
    ranks = used_ranks(reading.adapter)
    assert ranks == used_ranks(adapter)
    for path, leaves in reading.adapter.items():
        a, b = (np.asarray(leaves[name]).reshape(-1, *leaves[name].shape[-2:]) for name in "ab")
        cut = np.stack([one[:, :r] @ other[:r] for one, other, r in zip(a, b, ranks[path], strict=True)])
        whole = components(adapter[path], np.ones(R)).sum(axis=-3).reshape(cut.shape)
        np.testing.assert_array_equal(cut, whole)
        gates = np.asarray(adapter[path]["gate"]).reshape(-1, R)
        assert max(ranks[path]) < R or np.any(gates == 0)
        assert list(ranks[path]) == [np.count_nonzero(gate) for gate in gates]


def test_every_prefix_holds_the_largest_components(adapter):
    reading = read_out(adapter, HIERARCHY, "ordered")
    assert reading.hierarchy == RankHierarchy((1, 2, R), "none") and reading.name == "prefix"
    for path, leaves in reading.adapter.items():
        parts = components(adapter[path], HIERARCHY.lora())
        parts = parts.reshape(-1, *parts.shape[-3:])
        a, b = (np.asarray(leaves[name]).reshape(-1, *leaves[name].shape[-2:]) for name in "ab")
        assert np.all(np.asarray(leaves["gate"]) == 1)
        for layer, part in enumerate(parts):
            order = np.argsort(-np.linalg.norm(part, axis=(1, 2)), kind="stable")
            for r in range(1, R + 1):
                expected = part[order[:r]].sum(axis=0)
                np.testing.assert_allclose(a[layer, :, :r] @ b[layer, :r], expected, rtol=1e-5, atol=1e-4)


def test_the_global_read_out_holds_the_largest_components_of_all_layers(adapter):
    reading = read_out(adapter, HIERARCHY, "ordered_global")
    parts = {path: components(leaves, HIERARCHY.lora()) for path, leaves in adapter.items()}
    norms = np.concatenate([np.linalg.norm(each, axis=(-2, -1)).ravel() for each in parts.values()])
    for rank, profiles in reading.curve().items():
        kept, total = 0.0, 0
        for path, mask in profiles.items():
            leaves = reading.adapter[path]
            part = np.einsum("...dr,...rf,...r->...rdf", *(np.asarray(x) for x in (leaves["a"], leaves["b"], mask)))
            kept, total = kept + np.sum(np.linalg.norm(part, axis=(-2, -1))), total + int(np.sum(mask))
        assert total == rank * (L + 1)
        assert kept == pytest.approx(np.sort(norms)[::-1][:total].sum(), rel=1e-5)
    assert len({tuple(np.ravel(each)) for each in reading.layer_ranks(2).values()}) > 1  # not the same everywhere
    assert not any(np.any(each) for each in reading.profile(0).values())
    with pytest.raises(ValueError, match=r"rank of a read-out must be an integer in 0..5, got 6"):
        reading.profile(6)


@pytest.mark.parametrize("rank", [0, 1, 3, R])
def test_a_budget_is_kept_whatever_the_ties(rank):
    norms = {"one": np.array([[2.0, 1.0, 1.0, 1.0, 0.0], [1.0, 1.0, 1.0, 1.0, 1.0]]), "two": np.ones(R)}
    ranks = spread_ranks(norms, rank)
    assert sum(int(np.sum(each)) for each in ranks.values()) == rank * 3
    for path, each in ranks.items():  # of equal norms the first ones, so that a profile is a prefix
        assert np.all((each >= 0) & (each <= R)), path


def test_several_trials_are_ordered_as_each_alone(adapter):
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), adapter, jax.tree.map(lambda x: x * 2, adapter))
    profiles = jnp.stack([HIERARCHY.lora(), HIERARCHY.lora()[::-1] * jnp.arange(1.0, R + 1)])
    keys = jnp.stack([jax.random.key(0)] * 2)
    together = run_action(ACTIONS["ordered"], ActionInput(adapter=stacked, trained_profile=profiles, key=keys)).adapter
    for number in range(2):
        own = jax.tree.map(lambda x, number=number: x[number], stacked)
        given = ActionInput(adapter=own, trained_profile=profiles[number], key=keys[number])
        alone = run_action(ACTIONS["ordered"], given).adapter
        jax.tree.map(np.testing.assert_array_equal, jax.tree.map(lambda x, n=number: x[n], together), alone)
