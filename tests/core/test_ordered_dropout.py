"""Maestro: one layer is cut at each step, and on a linear model the columns come out in the order of PCA."""

import jax
import jax.numpy as jnp
import numpy as np

from mlora_jax.core.ordered_dropout import shrink_tails, truncate_one_layer
from mlora_jax.core.transforms import AfterUpdate

D, F, R, L = 7, 6, 5, 3


def leaves(seed, *leading):
    rng = np.random.default_rng(seed)
    shapes = {"a": (*leading, D, R), "b": (*leading, R, F)}
    return {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}


def test_one_layer_is_cut_to_a_rank_that_is_drawn_uniformly():
    adapter = {"up": leaves(0, L), "down": leaves(1)}
    cut = jax.jit(truncate_one_layer)
    seen = np.zeros((L + 1, R + 1), int)
    for number in range(400):
        made = cut(adapter, jax.random.key(number))
        for path, old in adapter.items():
            np.testing.assert_array_equal(made[path]["b"], old["b"])
        columns = [*np.asarray(made["up"]["a"]), np.asarray(made["down"]["a"])]
        before = [*np.asarray(adapter["up"]["a"]), np.asarray(adapter["down"]["a"])]
        ranks = [int(np.count_nonzero(np.any(a != 0, axis=0))) for a in columns]
        for a, old, rank in zip(columns, before, ranks, strict=True):
            np.testing.assert_array_equal(a, old * (np.arange(R) < rank))
        short = [layer for layer, rank in enumerate(ranks) if rank < R]
        assert len(short) <= 1
        seen[short[0] if short else 0, ranks[short[0]] if short else R] += 1
    # 4 layers times 4 ranks below R have a share of 1/20 each, and no cut has 1/5.
    assert np.all(np.abs(seen[:, 1:R] / 400 - 1 / 20) < 0.04) and abs(seen[0, R] / 400 - 1 / 5) < 0.06


def test_on_a_linear_model_the_columns_come_out_in_the_order_of_pca():
    """Descent on |X (M - A B)|^2, white X: every prefix nears the truncated SVD of M; without cuts, none does."""
    rng = np.random.default_rng(3)
    u, v = (np.linalg.qr(rng.normal(size=(size, size)))[0][:, :R] for size in (D, F))
    target = (u * np.array([3.0, 2.2, 1.5, 0.9, 0.4])) @ v.T

    def train(perturb):
        def step(adapter, number):
            def loss(each):
                each = perturb(each, jax.random.fold_in(jax.random.key(0), number))
                return jnp.sum((target - each["x"]["a"] @ each["x"]["b"]) ** 2)

            rate = 0.03 * (1 - number / 12000)
            return jax.tree.map(lambda x, g: x - rate * g, adapter, jax.grad(loss)(adapter)), None

        start = {"x": {name: 0.3 * x.astype(jnp.float64) for name, x in leaves(4).items()}}
        return jax.jit(lambda each: jax.lax.scan(step, each, jnp.arange(12000.0))[0])(start)["x"]

    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        ordered = train(lambda each, key: truncate_one_layer(each, key))
        plain = train(lambda each, key: each)
    full_u, s, full_v = np.linalg.svd(target, full_matrices=False)
    for r in range(1, R + 1):
        best = (full_u[:, :r] * s[:r]) @ full_v[:r]
        errors = [
            np.linalg.norm(np.asarray(each["a"])[:, :r] @ np.asarray(each["b"])[:r] - best) / np.linalg.norm(best)
            for each in (ordered, plain)
        ]
        assert errors[0] < 0.1, (r, errors)
        assert r == R or errors[1] > 0.3, (r, errors)


def test_the_group_lasso_is_a_step_along_its_gradient():
    """By jax's gradient of the penalty written out; a tail whose product of norms is tiny is removed."""
    adapter = {"x": leaves(5, L)}

    def penalty(each):
        return sum(
            jnp.sum(jnp.sqrt(jnp.sum(each["x"]["a"][..., i:] ** 2, axis=(1, 2))))
            + jnp.sum(jnp.sqrt(jnp.sum(each["x"]["b"][:, i:] ** 2, axis=(1, 2))))
            for i in range(R)
        )

    made = shrink_tails(adapter, AfterUpdate(0.5, 1.0, jnp.asarray(0.02)))
    expected = jax.tree.map(lambda x, g: x - 0.01 * g, adapter, jax.grad(penalty)(adapter))
    for name in "ab":
        np.testing.assert_allclose(made["x"][name], expected["x"][name], rtol=1e-5, atol=1e-6)
    small = jax.tree.map(lambda x: x, adapter)
    small["x"]["a"] = small["x"]["a"].at[0, :, 3:].multiply(1e-6)
    small["x"]["b"] = small["x"]["b"].at[0, 3:].multiply(1e-3)
    made = shrink_tails(small, AfterUpdate(0.0, 1.0, jnp.asarray(0.02)))["x"]
    assert not np.any(made["a"][0, :, 3:]) and not np.any(made["b"][0, 3:])
    np.testing.assert_array_equal(made["a"][1:], small["x"]["a"][1:])
    np.testing.assert_array_equal(made["a"][0, :, :3], small["x"]["a"][0, :, :3])


def test_a_fresh_adapter_is_not_removed():
    fresh = {"x": {**leaves(6), "b": jnp.zeros((R, F))}}
    made = shrink_tails(fresh, AfterUpdate(0.0, 0.1, jnp.asarray(0.02)))
    np.testing.assert_array_equal(made["x"]["a"], fresh["x"]["a"])
