"""Actions: what each makes of an adapter, what it needs, and where it may stand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mlora_jax.adapters import adapt, split
from mlora_jax.core import ACTIONS, ActionInput, RankHierarchy, get_action
from mlora_jax.core.actions import MOMENTS, PLACES, run_action
from mlora_jax.run.needs import NEEDS

R, D, F, L = 5, 9, 7, 3
HIERARCHY = RankHierarchy((1, 2, 5), "sqrt", (1.0, 2.0, 3.0))


@pytest.fixture
def adapter():
    rng = np.random.default_rng(0)
    a, b = (jnp.asarray(rng.normal(size=size), jnp.float32) for size in ((L, D, R), (L, R, F)))
    return {"layer": {"a": a, "b": b}, "other": {"a": a[0] + 1, "b": b[0] - 1}}


def product(adapter, p, name):
    a, b = (np.asarray(adapter[name][leaf]) for leaf in "ab")
    return a * np.asarray(p) @ b


@pytest.mark.parametrize("name", ACTIONS)
def test_a_row_says_where_it_stands_what_it_needs_and_what_becomes_of_the_moments(name):
    action = ACTIONS[name]
    assert action.summary and action.places and set(action.places) <= set(PLACES)
    assert action.moments in MOMENTS and set(action.needs) <= set(NEEDS)
    assert action.hierarchy(HIERARCHY).max_rank == R


@pytest.mark.parametrize("init", ["fan_rank", "fan_in"])
@pytest.mark.parametrize("gate", [False, True, "normal", "uniform"])
def test_a_fresh_adapter_is_the_one_that_adapt_draws(init, gate):
    """Bit for bit: a trial starts by the action what the notebook starts by `adapt`."""
    model = nnx.Sequential(nnx.Linear(D, F, rngs=nnx.Rngs(0)), nnx.Linear(F, D, rngs=nnx.Rngs(1)))
    key = jax.random.key(7)
    template, expected = (
        split(adapt(model, R, (".*",), key=each, init=init, gate=gate))[2] for each in (jax.random.key(0), key)
    )
    start = gate if isinstance(gate, str) else "ones"
    given = ActionInput(adapter=template, trained_profile=jnp.ones(R), key=key, gate_start=start)
    jax.tree.map(np.testing.assert_array_equal, run_action(ACTIONS[init], given).adapter, expected)
    other = {"fan_rank": "fan_in", "fan_in": "fan_rank"}[init]
    made = jax.tree.leaves(run_action(ACTIONS[other], given).adapter)
    assert any(np.any(x != y) for x, y in zip(made, jax.tree.leaves(expected), strict=True))


def test_none_changes_nothing(adapter):
    given = ActionInput(adapter=adapter, trained_profile=HIERARCHY.lora(), key=jax.random.key(0))
    assert run_action(ACTIONS["none"], given).adapter is adapter


@pytest.mark.parametrize("name", ["squeeze", "squeeze_rotated"])
def test_squeezes_keep_the_trained_function_and_take_its_scale_in(adapter, name):
    action, p = ACTIONS[name], HIERARCHY.matryoshka()
    made = run_action(action, ActionInput(adapter=adapter, trained_profile=p, key=jax.random.key(0)))
    for layer in adapter:
        np.testing.assert_allclose(product(made.adapter, 1.0, layer), product(adapter, p, layer), rtol=1e-4, atol=1e-4)
    assert action.hierarchy(HIERARCHY) == RankHierarchy((1, 2, 5), "none", (1.0, 2.0, 3.0))
    # The first column alone is the best approximation of rank 1.
    u, s, vt = np.linalg.svd(product(adapter, p, "other"))
    first = np.asarray(made.adapter["other"]["a"][:, :1] @ made.adapter["other"]["b"][:1])
    np.testing.assert_allclose(first, s[0] * np.outer(u[:, 0], vt[0]), rtol=1e-3, atol=1e-3)


def test_a_squeeze_by_hidden_moments_is_the_best_on_those_inputs(adapter):
    """NumPy: the truncated SVD of X A diag(p) B."""
    p, rng = np.asarray(HIERARCHY.lora()), np.random.default_rng(1)
    layer = {"layer": adapter["layer"]}
    x = rng.normal(size=(L, 40, D)) * np.logspace(0, -1.5, D)
    hidden = x @ (np.asarray(layer["layer"]["a"]) * p)
    needed = {"hidden_moments": {"layer": {"gram": jnp.asarray(np.swapaxes(hidden, 1, 2) @ hidden, jnp.float32)}}}
    given = ActionInput(adapter=layer, trained_profile=HIERARCHY.lora(), key=jax.random.key(0), needed=needed)
    made = run_action(ACTIONS["squeeze_inputs"], given).adapter["layer"]
    exact = x @ product(layer, p, "layer")
    tails = np.sqrt(np.cumsum(np.linalg.svd(exact, compute_uv=False)[:, ::-1] ** 2, axis=-1)[:, ::-1])
    for r in range(1, R):
        error = np.linalg.norm(exact - x @ np.asarray(made["a"][..., :r] @ made["b"][:, :r]), axis=(1, 2))
        np.testing.assert_allclose(error, tails[:, r], rtol=1e-2)


def test_an_unknown_action_and_a_wrong_place_are_refused():
    with pytest.raises(ValueError, match=r"unknown action 'squeezed'; did you mean 'squeeze'\? Known actions: none, "):
        get_action("squeezed")
    with pytest.raises(ValueError, match="'calibrated' cannot stand in the place 'first'; actions that can: none, fan"):
        get_action("calibrated", "first")
    assert get_action("squeeze", "end") is ACTIONS["squeeze"]
