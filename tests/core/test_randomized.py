"""The randomised SVD beside NumPy's exact one, on factors with the spectrum of trained ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlora_jax.core import ACTIONS, ActionInput, RankHierarchy
from mlora_jax.core.actions import run_action

D, F, R, L = 64, 48, 22, 2
HIERARCHY = RankHierarchy((1, 2, 4, 8, 16, R), "sqrt")


def trained(seed):
    """Factors whose product has singular values that fall as those of a trained adapter do: by a power law."""
    rng = np.random.default_rng(seed)
    left, right = (np.linalg.qr(rng.normal(size=(L, size, R)))[0] for size in (D, F))
    root = np.sqrt(1.0 / np.arange(1, R + 1) ** 1.5)
    mix = rng.normal(size=(R, R)) + 3 * np.eye(R)
    a, b = (left * root) @ mix, np.linalg.solve(mix, np.swapaxes(right * root, -1, -2))
    return {"up": {"a": jnp.asarray(a, jnp.float32), "b": jnp.asarray(b, jnp.float32)}}


def function(adapter, p=1.0, r=R):
    a, b = (np.asarray(adapter["up"][name], np.float64) for name in "ab")
    return (a * np.asarray(p, np.float64))[..., :r] @ b[:, :r]


def act(name, adapter, p, seed=0):
    given = ActionInput(adapter=adapter, trained_profile=p, key=jax.random.key(seed))
    return run_action(ACTIONS[name], given).adapter


def test_the_function_at_full_rank_stays_and_every_prefix_is_the_best():
    adapter, p = trained(0), HIERARCHY.lora()
    made, exact = act("squeeze_randomized", adapter, p), function(adapter, p)
    np.testing.assert_allclose(function(made), exact, atol=1e-5 * np.abs(exact).max())
    s = np.linalg.svd(exact, compute_uv=False)
    for r in HIERARCHY.ranks[:-1]:
        error = np.linalg.norm(exact - function(made, r=r), axis=(1, 2))
        np.testing.assert_allclose(error, np.sqrt((s[:, r:] ** 2).sum(axis=1)), rtol=1e-3)


@pytest.mark.parametrize(("name", "target"), [("squeeze_to_half", R // 2), ("squeeze_to_quarter", 6)])
def test_a_cut_is_within_a_thousandth_of_the_exact_svd_and_leaves_zeros(name, target):
    """R / 4 = 5.5, which rounds to 6. The difference is relative to the norm of the exact truncation."""
    adapter, p = trained(1), HIERARCHY.lora()
    made, exact = act(name, adapter, p), function(adapter, p)
    u, s, vt = np.linalg.svd(exact)
    best = (u[:, :, :target] * s[:, None, :target]) @ vt[:, :target]
    difference = np.linalg.norm(function(made) - best, axis=(1, 2)) / np.linalg.norm(best, axis=(1, 2))
    assert np.all(difference < 1e-3), difference
    assert not np.any(made["up"]["a"][..., target:]) and not np.any(made["up"]["b"][:, target:])
    assert ACTIONS[name].hierarchy(HIERARCHY).scaling == "none"


def test_directions_that_the_function_lacks_can_grow_again_but_cut_ones_cannot():
    adapter = trained(2)
    adapter["up"]["b"] = adapter["up"]["b"].at[:, 3:].set(0.0)
    made = act("squeeze_to_half", adapter, HIERARCHY.lora())["up"]
    assert not np.any(made["b"][:, 3:]) and np.all(np.any(np.asarray(made["a"])[..., : R // 2] != 0, axis=1))
    assert not np.any(np.asarray(made["a"])[..., R // 2 :])
    np.testing.assert_allclose(made["a"] @ made["b"], function(adapter, HIERARCHY.lora()), atol=1e-5)


def test_a_gate_is_taken_in_and_trials_do_not_mix():
    gate = np.random.default_rng(3).uniform(0.5, 2, (L, R)).astype(np.float32)
    gated = {"up": {**trained(3)["up"], "gate": jnp.asarray(gate)}}
    both = jax.tree.map(lambda *x: jnp.stack(x), gated, jax.tree.map(lambda x: 2 * x, gated))
    keys, profiles = jnp.stack([jax.random.key(0), jax.random.key(1)]), jnp.stack([HIERARCHY.lora(), jnp.ones(R)])
    given = ActionInput(adapter=both, trained_profile=profiles, key=keys)
    made = run_action(ACTIONS["squeeze_randomized"], given).adapter["up"]
    assert np.all(np.asarray(made["gate"]) == 1)
    for number, (times, p) in enumerate(((1.0, HIERARCHY.lora()), (8.0, jnp.ones(R)))):
        expected = times * function(gated, np.asarray(p) * gate[:, None])
        np.testing.assert_allclose(made["a"][number] @ made["b"][number], expected, atol=1e-4)
