"""Optimizers of factors: what they do does not depend on which pair of factors represents a product."""

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from peft.optimizers import create_riemannian_optimizer

from mlora_jax.core.optimizers import OPTIMIZERS, get_optimizer
from mlora_jax.core.preconditioners import block_mask, lora_rite, scaled_gradients
from mlora_jax.core.transforms import Numbers

D, F, R, L = 12, 9, 6, 2
S = (1, 2, 4)  # columns 5 and 6 are a block of their own
NUMBERS = Numbers(0.9, 0.99, 1e-8, 0.5, S)


def factors(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return {"up": {"a": scale * rng.normal(size=(L, D, R)), "b": scale * rng.normal(size=(L, R, F))}}


def represented_by(pair, matrix):
    """The pair with A T and T^-1 B in the place of A and B."""
    return {"up": {"a": pair["up"]["a"] @ matrix, "b": np.linalg.solve(matrix, pair["up"]["b"])}}


def blocks_of_s(seed):
    """NumPy: an invertible matrix [R, R] with the blocks of S."""
    rng, matrix = np.random.default_rng(seed), np.zeros((R, R))
    for start, end in ((0, 1), (1, 2), (2, 4), (4, R)):
        matrix[start:end, start:end] = rng.normal(size=(end - start, end - start)) + 2 * np.eye(end - start)
    return matrix


def any_matrix(seed):
    return np.random.default_rng(seed).normal(size=(R, R)) + 2 * np.eye(R)


def descend(transform, pair, *, steps=4, rate=0.05, cut=0):
    """The pairs after each step on a quadratic function of A B and of its prefix of rank `cut`."""
    target = np.random.default_rng(9).normal(size=(L, D, F))

    def loss(adapter):
        a, b = adapter["up"]["a"], adapter["up"]["b"]
        whole = jnp.mean((a @ b - target) ** 2) * (1 + jnp.arange(L)).mean()
        return 10 * whole + 10 * jnp.mean((a[..., :cut] @ b[:, :cut] - 0.5 * target) ** 2)

    adapter = jax.tree.map(jnp.asarray, pair)
    state, found = transform.init(adapter), []
    for _ in range(steps):
        updates, state = jax.jit(transform.update)(jax.grad(loss)(adapter), state, adapter)
        adapter = jax.tree.map(lambda x, update: x - rate * update, adapter, updates)
        found.append(jax.tree.map(np.asarray, adapter))
    return found


def prefix_of(pair, r):
    return pair["up"]["a"][..., :r] @ pair["up"]["b"][:, :r]


@pytest.mark.parametrize("make", [lambda: lora_rite(NUMBERS), lambda: scaled_gradients(NUMBERS, damping=0.0)])
def test_the_update_of_the_product_does_not_depend_on_the_pair(make):
    """With any invertible T. Adam's, which is the control, does depend on it."""
    with jax.enable_x64(True):
        pair, matrix = factors(0), any_matrix(1)
        one, other = (descend(make(), each) for each in (pair, represented_by(pair, matrix)))
        for mine, theirs in zip(one, other, strict=True):
            np.testing.assert_allclose(prefix_of(mine, R), prefix_of(theirs, R), rtol=1e-6, atol=1e-8)
            np.testing.assert_allclose(mine["up"]["a"] @ matrix, theirs["up"]["a"], rtol=1e-6, atol=1e-8)
        assert np.max(np.abs(prefix_of(one[-1], R) - prefix_of(pair, R))) > 1e-2


@pytest.mark.parametrize(
    "make", [lambda b: lora_rite(NUMBERS, blocks=b), lambda b: scaled_gradients(NUMBERS, blocks=b, damping=0.0)]
)
def test_with_the_blocks_of_s_every_prefix_keeps_its_update(make):
    """The loss is of the prefix of rank 2 and of the product. A full Gram matrix would mix the prefix with the rest."""
    with jax.enable_x64(True):
        pair = factors(2)
        other = represented_by(pair, blocks_of_s(3))
        mine, theirs = (descend(make(True), each, cut=2) for each in (pair, other))
        for r in (1, 2, 4, R):
            np.testing.assert_allclose(prefix_of(mine[-1], r), prefix_of(theirs[-1], r), rtol=1e-6, atol=1e-8)
        full = descend(make(False), pair, cut=2)
        assert not np.allclose(prefix_of(full[-1], 2), prefix_of(mine[-1], 2), atol=1e-3)


def test_scaled_adam_is_the_riemannian_optimizer_of_peft():
    """Five steps with the same gradients, by torch's AdamW on PEFT's preconditioned gradients."""
    from mlora_jax.training.step import make_optimizer

    linear = torch.nn.Sequential(torch.nn.Linear(D, F, bias=False).double())
    model = peft.get_peft_model(linear, peft.LoraConfig(r=R, target_modules=["0"]), autocast_adapter_dtype=False)
    tuned = {"a": model.base_model.model[0].lora_A.default.weight, "b": model.base_model.model[0].lora_B.default.weight}
    pair = {name: leaf[0] for name, leaf in factors(4)["up"].items()}
    with torch.no_grad():
        for name, parameter in tuned.items():
            parameter.data = torch.tensor(pair[name].T.copy())
    theirs = create_riemannian_optimizer(
        model, torch.optim.AdamW, lr=0.01, reg=1e-6, weight_decay=0.1, betas=(0.9, 0.99), eps=1e-8
    )
    with jax.enable_x64(True):
        options = dict(beta1=0.9, beta2=0.99, epsilon=1e-8, weight_decay=0.1, clip=0.0, kind="scaled_adam")
        ours, adapter = make_optimizer(**options), {"up": jax.tree.map(jnp.asarray, pair)}
        state = ours.init(adapter)
        for step in range(5):
            gradient = {name: leaf[0] for name, leaf in factors(10 + step)["up"].items()}
            for name, parameter in tuned.items():
                parameter.grad = torch.tensor(gradient[name].T.copy())
            theirs.step()
            with jax.numpy_dtype_promotion("standard"):  # optax's bias correction
                updates, state = ours.update({"up": jax.tree.map(jnp.asarray, gradient)}, state, adapter)
            adapter = jax.tree.map(lambda x, update: x - 0.01 * update, adapter, updates)
    for name, parameter in tuned.items():
        np.testing.assert_allclose(adapter["up"][name], parameter.detach().numpy().T, rtol=1e-7, atol=1e-9)


def test_lora_rite_is_its_algorithm_with_a_qr():
    """NumPy: the same algorithm with the triangular factor of a QR for the root and an eigenvalue decomposition."""

    def qr_steps(pair, gradients, rate, beta1=0.9, beta2=0.99):
        pair = {name: leaf.copy() for name, leaf in pair.items()}
        moments = {name: (0.0, np.zeros((R, R)), None) for name in "ab"}
        for count, gradient in enumerate(gradients, 1):
            tall = {"a": (gradient["a"], pair["b"].T), "b": (gradient["b"].T, pair["a"])}
            parts = {name: np.linalg.qr(other) for name, (_, other) in tall.items()}
            plain = {name: tall[name][0] @ np.linalg.inv(r) for name, (_, r) in parts.items()}
            norm = np.sqrt(sum(np.sum(each**2) for each in plain.values()))
            clipped = {name: each * min(1.0, 0.5 / norm) for name, each in plain.items()}
            for name, (basis, r) in parts.items():
                first, second, old = moments[name]
                turn = np.zeros((R, R)) if old is None else basis.T @ old
                b1, b2 = (b * (1 - b ** (count - 1)) / (1 - b**count) for b in (beta1, beta2))
                second = b2 * turn @ second @ turn.T + (1 - b2) * clipped[name].T @ clipped[name] / len(clipped[name])
                values, vectors = np.linalg.eigh(second)
                scaled = clipped[name] @ (vectors / (np.sqrt(values) + 1e-8)) @ vectors.T
                first = (b1 * first @ turn.T if count > 1 else 0.0) + (1 - b1) * scaled
                moments[name] = first, second, basis
                step = rate * first @ np.linalg.inv(r).T
                pair[name] = pair[name] - (step if name == "a" else step.T)
        return pair

    with jax.enable_x64(True):
        pair = {name: leaf[0] for name, leaf in factors(5)["up"].items()}
        gradients = [{name: 0.1 * leaf[0] for name, leaf in factors(20 + step)["up"].items()} for step in range(4)]
        transform, adapter = lora_rite(NUMBERS), {"up": jax.tree.map(jnp.asarray, pair)}
        state = transform.init(adapter)
        for gradient in gradients:
            updates, state = transform.update({"up": jax.tree.map(jnp.asarray, gradient)}, state, adapter)
            adapter = jax.tree.map(lambda x, update: x - 0.05 * update, adapter, updates)
        expected = qr_steps(pair, gradients, 0.05)
    for name in "ab":
        np.testing.assert_allclose(adapter["up"][name], expected[name], rtol=1e-6, atol=1e-8)


def test_lora_rite_begins_where_b_is_zero():
    """A rests until B has moved, in float32, and a gradient that is far too large moves nothing."""
    pair = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), factors(6))
    pair["up"]["b"] = jnp.zeros_like(pair["up"]["b"])
    transform, gradient = lora_rite(NUMBERS), jax.tree.map(lambda x: 0.1 * jnp.ones_like(x), pair)
    updates, state = transform.update(gradient, transform.init(pair), pair)
    assert not np.any(updates["up"]["a"]) and np.all(np.isfinite(updates["up"]["b"])) and np.any(updates["up"]["b"])
    pair["up"]["b"] -= 0.1 * updates["up"]["b"]
    updates, state = transform.update(gradient, state, pair)
    assert np.any(updates["up"]["a"]) and all(np.all(np.isfinite(x)) for x in jax.tree.leaves((updates, state)))
    huge = jax.tree.map(lambda x: 1e4 * x, gradient)
    assert not any(np.any(x) for x in jax.tree.leaves(transform.update(huge, transform.init(pair), pair)[0]))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_row_is_whole(name):
    row = get_optimizer(name)
    assert row.summary and not (row.before and row.instead)


def test_blocks_and_names():
    assert block_mask((), 3).all() and block_mask((2,), 3).astype(int).tolist() == [[1, 1, 0], [1, 1, 0], [0, 0, 1]]
    with pytest.raises(ValueError, match="unknown optimizer 'lora_rita'; did you mean 'lora_rite'"):
        get_optimizer("lora_rita")


def test_several_trials_are_what_each_would_be_alone():
    pairs = [jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), factors(seed)) for seed in (7, 8)]
    stacked, transform = jax.tree.map(lambda *x: jnp.stack(x), *pairs), lora_rite(NUMBERS)
    states = jax.vmap(transform.init)(stacked)
    gradients = jax.tree.map(lambda x: 0.1 * x, stacked)
    together, _ = jax.jit(jax.vmap(transform.update))(gradients, states, stacked)
    for number, pair in enumerate(pairs):
        alone, _ = jax.jit(transform.update)(jax.tree.map(lambda x: 0.1 * x, pair), transform.init(pair), pair)
        for one, other in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
            np.testing.assert_allclose(one[number], other, rtol=1e-4, atol=1e-5)
