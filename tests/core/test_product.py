"""The scaled product against loops, its gradients, and that prefix, truncate and fold are one function."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from mlora_jax.core import (
    READOUTS,
    RankHierarchy,
    fold,
    initialize_factors,
    p_scaled_product,
    readout_profile,
    truncate,
)
from mlora_jax.core.product import path_hash, scale_ranks
from tests.oracles import numpy_reference as reference

# The read-outs that are a profile of the adapter itself.
PROFILES = tuple(name for name, row in READOUTS.items() if row.action == "none")

B, T, D, F, R, L = 4, 3, 5, 6, 7, 2
HIERARCHY = RankHierarchy((1, 2, 5), "sqrt", max_rank=R)


def draw(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).normal(size=shape)


def close(got, expected, dtype):
    """To rounding: relative to the largest entry."""
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    eps = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(got, expected, rtol=0, atol=8 * eps * np.max(np.abs(expected)))


def looped_product(x, a, b, p):
    """((x A) * p) B for every row of x on its own; `p` lacks inner axes of `x`."""
    result = np.zeros((*x.shape[:-1], b.shape[1]))
    for index in np.ndindex(*x.shape[:-1]):
        result[index] = reference.product(x[index], a, b, p[index[: p.ndim - 1]])
    return result


SHAPES = {
    "one profile": ((B, T, D), (R,)),
    "per example": ((B, T, D), (B, R)),
    "per token": ((B, T, D), (B, T, R)),
    "per example, no time": ((B, D), (B, R)),
    "one vector": ((D,), (R,)),
    "four axes": ((B, 2, T, D), (B, R)),
}
DTYPES = {"float32": False, "bfloat16": False, "float16": False, "float64": True}


@pytest.mark.parametrize(("dtype", "x64"), DTYPES.items())
@pytest.mark.parametrize(("x_shape", "p_shape"), SHAPES.values(), ids=SHAPES)
def test_the_product_equals_the_loops_and_keeps_the_dtype(x_shape, p_shape, dtype, x64):
    with jax.enable_x64(x64):
        dtype = jnp.dtype(dtype)
        # Rounded first: the reference sees the same numbers.
        x, a, b = (jnp.asarray(draw(*shape), dtype) for shape in (x_shape, (D, R), (R, F)))
        p = jnp.asarray(draw(*p_shape), dtype)
        product = p_scaled_product(x, a.astype(jnp.float64 if x64 else jnp.float32), b.astype(float), p.astype(float))
        assert product.dtype == dtype and product.shape == (*x_shape[:-1], F)
        close(product, looped_product(*(np.asarray(v, np.float64) for v in (x, a, b, p))), dtype)


def test_in_bfloat16_the_profile_is_applied_before_rounding():
    # x A = 1 + 2^-8 rounds to 1 in bfloat16; times 3 first, it rounds to 3 + 2^-6.
    x = jnp.array([[1.0, 2.0**-8]], jnp.bfloat16)
    product = p_scaled_product(x, jnp.ones((2, 1)), jnp.ones((1, 1)), jnp.array([3.0]))
    assert float(product[0, 0]) == 3.0 + 2.0**-6


@pytest.mark.parametrize(
    ("x_shape", "p_shape"),
    [((B, D), (B, T, R)), ((B, T, D), (R + 1,)), ((B, T, D), (B, 1)), ((B, T, D), (T, R)), ((1, T, D), (B, R))],
)
def test_a_profile_that_does_not_fit_is_refused(x_shape, p_shape):
    with pytest.raises(ValueError, match=r"profile of shape .* does not fit x .* and A \(5, 7\)"):
        p_scaled_product(jnp.ones(x_shape), jnp.ones((D, R)), jnp.ones((R, F)), jnp.ones(p_shape))


def _jit(x, a, b, p):
    return jax.jit(p_scaled_product)(x, a, b, p)


def _vmap_over_trials(x, a, b, p):
    pair = jax.vmap(p_scaled_product, in_axes=(None, 0, 0, 0))
    return pair(x, jnp.stack([jnp.zeros_like(a), a]), jnp.stack([b, b]), jnp.stack([p, p]))[1]


def _vmap_over_examples(x, a, b, p):
    return jax.vmap(p_scaled_product, in_axes=(0, None, None, None if p.ndim == 1 else 0))(x, a, b, p)


def _scan_over_layers(x, a, b, p):
    layers = (jnp.stack([jnp.zeros_like(a), a]), jnp.stack([b, b]), jnp.stack([p, p]))
    return jax.lax.scan(lambda _, layer: (None, p_scaled_product(x, *layer)), None, layers)[1][1]


def _mesh(x, a, b, p):
    mesh = jax.make_mesh((4,), ("data",))
    rows, whole = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
    placed = jax.device_put((x, a, b, p), (rows, whole, whole, whole if p.ndim == 1 else rows))
    product = jax.jit(p_scaled_product)(*placed)
    assert len(product.sharding.device_set) == 4
    return product


@pytest.mark.parametrize("transform", [_jit, _vmap_over_trials, _vmap_over_examples, _scan_over_layers, _mesh])
@pytest.mark.parametrize("p_shape", [(R,), (B, R), (B, T, R)], ids=["one", "example", "token"])
def test_the_same_function_under_every_transform(p_shape, transform):
    arrays = [jnp.asarray(draw(*shape), jnp.float32) for shape in ((B, T, D), (D, R), (R, F), p_shape)]
    close(transform(*arrays), p_scaled_product(*arrays), jnp.float32)


@pytest.mark.parametrize("readout", PROFILES)
def test_columns_that_no_rank_uses_get_no_gradient_and_the_others_do(readout):
    x, a, b = (jnp.asarray(draw(*shape), jnp.float32) for shape in ((B, T, D), (D, R), (R, F)))
    loss = jax.jit(jax.grad(lambda pair, p: jnp.sum(jnp.sin(p_scaled_product(x, *pair, p))), argnums=0))
    for r in range(R + 1):
        p = readout_profile(HIERARCHY, readout, r)
        a_gradient, b_gradient = (np.asarray(g) for g in loss((a, b), p))
        used = np.asarray(p) != 0
        np.testing.assert_array_equal(np.any(a_gradient != 0, axis=0), used)
        np.testing.assert_array_equal(np.any(b_gradient != 0, axis=1), used)
        assert not np.any(a_gradient[:, ~used]) and not np.any(b_gradient[~used])
    assert loss._cache_size() == 1


@pytest.mark.parametrize(
    ("init", "bound", "leading"), [("fan_rank", R**-0.5, (2, 3)), ("fan_rank", R**-0.5, ()), ("fan_in", 0.125, (6,))]
)
def test_factors_start_uniform_within_the_bound_and_at_zero(init, bound, leading):
    a, b = initialize_factors(jax.random.key(0), 64, F, R, leading=leading, init=init)
    assert a.shape == (*leading, 64, R) and b.shape == (*leading, R, F) and not np.any(b)
    values = np.asarray(a).ravel()
    assert np.all(np.abs(values) <= bound) and np.max(np.abs(values)) > 0.97 * bound
    spread = bound / np.sqrt(3)
    assert abs(np.mean(values)) < 4 * spread / np.sqrt(values.size)
    assert np.std(values) == pytest.approx(spread, rel=0.08)
    assert len(np.unique(values)) > 0.99 * values.size  # stacked layers do not share a draw


def test_the_dtype_of_fresh_factors():
    assert all(f.dtype == jnp.float32 for f in initialize_factors(jax.random.key(0), 2, 2, 1))
    assert all(f.dtype == jnp.bfloat16 for f in initialize_factors(jax.random.key(0), 2, 2, 1, dtype=jnp.bfloat16))
    with jax.enable_x64(True):
        assert all(f.dtype == jnp.float64 for f in initialize_factors(jax.random.key(0), 2, 2, 1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 0}, r"rank must be an integer in 1\.\., got 0"),
        ({"rank": 2, "init": "xavier"}, "unknown init 'xavier'; known: fan_rank, fan_in"),
    ],
)
def test_bad_factors_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        initialize_factors(jax.random.key(0), 4, 4, **arguments)


def trees(leading=(), kernel_dtype=jnp.float32, seed=0):
    """(base, adapter) of two layers, of which the second is wider, and a frozen kernel without an adapter."""
    base, adapter = {"embedding": jnp.ones((3, 3))}, {"block": {}}
    for name, width in (("up", F), ("down", F + 2)):
        kernel = jnp.asarray(draw(*leading, D, width, seed=seed), kernel_dtype)
        base[name] = {"base": {"kernel": kernel, "bias": jnp.ones(width)}}
        a, b = draw(*leading, D, R, seed=seed + 1), draw(*leading, R, width, seed=seed + 2)
        adapter[name] = {"a": jnp.asarray(a, float), "b": jnp.asarray(b, float)}
    del adapter["block"]
    return base, adapter


def profiles(adapter, p):
    return {name: {"p": jnp.broadcast_to(p, (*pair["a"].shape[:-2], p.shape[-1]))} for name, pair in adapter.items()}


def apply(base, adapter, profile, x):
    """{name: y} of every layer, stacked layers one after another."""
    one = lambda w, a, b, p: x @ w + p_scaled_product(x, a, b, p)  # noqa: E731
    return {
        name: (jax.vmap(one) if pair["a"].ndim == 3 else one)(
            base[name]["base"]["kernel"], pair["a"], pair["b"], profile[name]["p"]
        )
        for name, pair in adapter.items()
    }


@pytest.mark.parametrize("x64", [False, True], ids=["float32", "float64"])
@pytest.mark.parametrize("leading", [(), (L,)], ids=["plain", "stacked"])
def test_prefix_and_truncate_and_fold_are_one_function(leading, x64):
    with jax.enable_x64(x64):
        base, adapter = trees(leading, float)
        dtype = adapter["up"]["a"].dtype
        x = jnp.asarray(draw(B, D), float)
        run, zero = jax.jit(apply), profiles(adapter, HIERARCHY.prefix(0))
        bare = run(base, adapter, zero, x)
        for r in (1, 3, R):
            full = profiles(adapter, HIERARCHY.prefix(r))
            short = truncate(adapter, r)
            assert short["down"]["a"].shape == (*leading, D, r) and short["down"]["b"].shape == (*leading, r, F + 2)
            expected = run(base, adapter, full, x)
            cut = run(base, short, profiles(short, HIERARCHY.prefix(r)[:r]), x)
            folded = run(jax.jit(fold)(base, adapter, full), adapter, zero, x)
            for name in expected:
                assert np.any(np.abs(expected[name] - bare[name]) > 0.1)
                close(cut[name], expected[name], dtype)
                close(folded[name], expected[name], dtype)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("leading", [(), (L,)], ids=["plain", "stacked"])
def test_fold_rounds_once_into_the_dtype_of_the_kernel_and_changes_nothing_else(leading, dtype):
    base, adapter = trees(leading, jnp.dtype(dtype))
    profile = profiles(adapter, HIERARCHY.matryoshka())
    folded = jax.jit(fold)(base, adapter, profile)
    assert jax.tree.structure(folded) == jax.tree.structure(base)
    np.testing.assert_array_equal(folded["embedding"], base["embedding"])
    for name, pair in adapter.items():
        kernel = np.asarray(base[name]["base"]["kernel"], np.float64)
        a, b, p = (np.asarray(v, np.float64) for v in (pair["a"], pair["b"], profile[name]["p"]))
        new = folded[name]["base"]["kernel"]
        assert new.dtype == jnp.dtype(dtype)
        exact = kernel + (a * p[..., None, :]) @ b
        # Half a unit in the last place of every single entry, and float32's own rounding.
        half = 0.5 * float(jnp.finfo(dtype).eps) * np.abs(exact) + 1e-5
        assert np.all(np.abs(np.asarray(new, np.float64) - exact) <= half)
        np.testing.assert_array_equal(folded[name]["base"]["bias"], base[name]["base"]["bias"])


def test_fold_at_rank_zero_is_the_base_bit_for_bit():
    base, adapter = trees((L,), jnp.bfloat16)
    folded = fold(base, adapter, profiles(adapter, HIERARCHY.prefix(0)))
    jax.tree.map(np.testing.assert_array_equal, folded, base)


@pytest.mark.parametrize("rank", [0, R + 1, -1, 2.0])
def test_truncating_outside_one_to_full_rank_is_refused(rank):
    with pytest.raises(ValueError, match=rf"rank to truncate down to must be an integer in 1\.\.7, got {rank}"):
        truncate(trees()[1], rank)


def test_trees_that_do_not_belong_together_are_refused():
    base, adapter = trees()
    profile = profiles(adapter, HIERARCHY.prefix(R))
    per_example = {name: {"p": jnp.ones((B, R))} for name in adapter}
    cases = [
        (lambda: fold({"up": base["up"]}, adapter, profile), "no base/kernel beside the factors of down"),
        (lambda: fold(base, adapter, per_example), r"profile of (up|down) has shape \(4, 7\).* per example"),
        (lambda: fold(base, adapter, {"up": profile["up"]}), "down lacks p"),
        (lambda: fold(base, {"up": {"a": adapter["up"]["a"]}}, profile), "up lacks b"),
        (
            lambda: truncate({"up": {"kernel": jnp.ones((2, 2))}}, 1),
            r"up\.kernel is no leaf of .* named a, b, gate",
        ),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("leading", [(), (L,)], ids=["plain", "stacked"])
def test_scale_ranks_scales_columns_of_a_and_rows_of_b(leading):
    _, adapter = trees(leading)
    factor = jnp.arange(R, dtype=float)
    scaled = jax.jit(scale_ranks)(adapter, factor)
    for name, pair in adapter.items():
        np.testing.assert_array_equal(scaled[name]["a"], np.asarray(pair["a"]) * np.arange(R, dtype=np.float32))
        rows = np.arange(R, dtype=np.float32)[:, None]
        np.testing.assert_array_equal(scaled[name]["b"], np.asarray(pair["b"]) * rows)


def test_a_path_has_the_same_number_on_every_machine():
    assert path_hash("layers.self_attn.q_proj") == 2802629427
    assert len({path_hash(f"layers.{i}.q_proj") for i in range(500)}) == 500


def test_one_executable_serves_every_rank():
    run = jax.jit(functools.partial(p_scaled_product, jnp.ones((B, D)), jnp.ones((D, R)), jnp.ones((R, F))))
    sums = [float(run(HIERARCHY.prefix(r))[0, 0]) for r in range(R + 1)]
    np.testing.assert_allclose(sums, [D * np.sqrt(r) for r in range(R + 1)], rtol=1e-6)
    assert run._cache_size() == 1
