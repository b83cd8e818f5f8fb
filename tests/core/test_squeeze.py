"""squeeze: the same function, and every prefix as good as NumPy's best approximation of that rank."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlora_jax.core import POLICIES, SCALINGS, RankHierarchy, p_scaled_product, squeeze, truncate
from mlora_jax.core.squeeze import squeeze_factors
from tests.oracles import numpy_reference as reference

PRECISIONS = {"float32": (False, 1e-5), "float64": (True, 1e-10)}  # tolerance relative to the norm of A diag(p) B
# (D, F, R): the usual; R over F; R over D; R over both; as wide as high.
SHAPES = {"usual": (12, 10, 6), "R>F": (12, 4, 6), "R>D": (5, 10, 6), "R>both": (4, 5, 9), "square": (8, 8, 8)}


compiled = jax.jit(lambda adapter, profile, key=None: squeeze(adapter, profile, key=key)[0])


def new_hierarchy(adapter, profile, ranks=None):
    """The second value of squeeze; nothing is computed."""
    found = []
    jax.eval_shape(lambda: found.append(squeeze(adapter, profile, ranks=ranks)[1]))
    return found[0]


def squeezed_pair(a, b, p):
    """A', B' in the dtype of A and B, as float64 NumPy arrays."""
    new = jax.block_until_ready(compiled({"layer": {"a": a, "b": b}}, {"layer": {"p": p}}))
    assert new["layer"]["a"].dtype == a.dtype and new["layer"]["b"].dtype == b.dtype
    assert new["layer"]["a"].shape == a.shape and new["layer"]["b"].shape == b.shape
    return np.asarray(new["layer"]["a"], np.float64), np.asarray(new["layer"]["b"], np.float64)


def factors(shape, seed=0):
    """A, B, p in float64; p of a Matryoshka kind: positive and falling."""
    D, F, R = shape
    rng = np.random.default_rng([seed, *shape])
    p = np.sort(rng.uniform(0.2, 3.0, R))[::-1].copy()
    return rng.uniform(-1, 1, (D, R)) / math.sqrt(R), rng.normal(size=(R, F)), p


def product(a, b, p=None):
    a = np.asarray(a, np.float64)
    return (a if p is None else a * np.asarray(p, np.float64)) @ np.asarray(b, np.float64)


def check_best_prefixes(new_a, new_b, a, b, p, tolerance):
    """Every prefix is at the distance of the tail of the singular values; at full rank it is the same function."""
    exact, R = product(a, b, p), new_a.shape[-1]
    bound = tolerance * np.linalg.norm(exact)
    for r in range(R + 1):
        error = np.linalg.norm(exact - new_a[:, :r] @ new_b[:r])
        assert abs(error - reference.best_approximation_error(a, b, p, r)) <= bound, r
    assert np.linalg.norm(exact - new_a @ new_b) <= bound


@pytest.mark.parametrize(("x64", "tolerance"), PRECISIONS.values(), ids=PRECISIONS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_every_prefix_is_the_best_of_its_rank(shape, x64, tolerance):
    with jax.enable_x64(x64):
        a, b, p = (jnp.asarray(v, float) for v in factors(shape))
        new_a, new_b = squeezed_pair(a, b, p)
    check_best_prefixes(new_a, new_b, a, b, p, tolerance)
    for r in range(1, min(shape) + 1):  # the singular values differ, so the matrix is unique too
        best = reference.best_approximation(a, b, p, r)
        np.testing.assert_allclose(new_a[:, :r] @ new_b[:r], best, rtol=0, atol=10 * tolerance * np.abs(best).max())


@pytest.mark.parametrize(("x64", "tolerance"), PRECISIONS.values(), ids=PRECISIONS)
def test_the_factors_share_the_singular_values_evenly_and_are_orthogonal(x64, tolerance):
    with jax.enable_x64(x64):
        a, b, p = (jnp.asarray(v, float) for v in factors(SHAPES["usual"]))
        new_a, new_b = squeezed_pair(a, b, p)
    singular = np.diag(np.linalg.svd(product(a, b, p), compute_uv=False)[:6])
    np.testing.assert_allclose(new_a.T @ new_a, singular, rtol=0, atol=tolerance * singular.max())
    np.testing.assert_allclose(new_b @ new_b.T, singular, rtol=0, atol=tolerance * singular.max())


@pytest.mark.parametrize(("x64", "tolerance"), PRECISIONS.values(), ids=PRECISIONS)
def test_stacked_layers_are_squeezed_one_by_one(x64, tolerance):
    layers = [factors((9, 7, 5), seed) for seed in range(3)]
    layers[1] = (layers[1][0], np.zeros((5, 7)), layers[1][2])  # a fresh layer among trained ones
    layers[2][1][3:] = 0.0
    with jax.enable_x64(x64):
        a, b, p = (jnp.asarray(np.stack(v), float) for v in zip(*layers, strict=True))
        new_a, new_b = squeezed_pair(a, b, p)
    for layer in range(3):
        check_best_prefixes(new_a[layer], new_b[layer], a[layer], b[layer], p[layer], tolerance)
    assert [int(np.count_nonzero(np.any(rows, axis=-1))) for rows in new_b] == [5, 0, 3]
    assert len(np.unique(new_a[1])) > 40 and not np.any(np.isin(new_a[1], new_a[2]))


@pytest.mark.parametrize("spectrum", ["flat", "steep"])
@pytest.mark.parametrize("shape", [(64, 64, 64), (96, 80, 64), (64, 64, 96)], ids=str)
def test_small_directions_of_a_large_rank_are_kept(shape, spectrum):
    a, b, p = factors(shape)
    if spectrum == "steep":
        left, singular, right = np.linalg.svd(b, full_matrices=False)
        b = (left * np.logspace(0, -4, len(singular))) @ right
    a, b, p = (jnp.asarray(v, jnp.float32) for v in (a, b, p))
    new_a, new_b = squeezed_pair(a, b, p)
    exact = product(a, b, p)
    assert np.linalg.norm(new_a @ new_b - exact) <= 4e-6 * np.linalg.norm(exact)
    singular = np.linalg.svd(exact, compute_uv=False)
    assert np.count_nonzero(np.any(new_b != 0, axis=1)) >= np.count_nonzero(singular > 1e-5 * singular[0])


def _zero_rows(a, b, p, k):
    b[np.random.default_rng(1).permutation(len(b))[k:]] = 0.0


def _zero_profile(a, b, p, k):
    p[k:] = 0.0


def _duplicated_columns(a, b, p, k):
    a[:, k:] = a[:, np.arange(a.shape[1] - k) % k]


def _dependent_rows(a, b, p, k):
    b[k:] = b[np.arange(len(b) - k) % k] * 2.0


DEFICIENCIES = [_zero_rows, _zero_profile, _duplicated_columns, _dependent_rows]


@pytest.mark.parametrize(("x64", "tolerance"), PRECISIONS.values(), ids=PRECISIONS)
@pytest.mark.parametrize("make_deficient", DEFICIENCIES)
@pytest.mark.parametrize(("shape", "k"), [((12, 10, 6), 2), ((64, 48, 32), 5)], ids=["small", "large"])
def test_what_the_product_lacks_becomes_fresh_columns_and_zero_rows(shape, k, make_deficient, x64, tolerance):
    a, b, p = factors(shape)
    make_deficient(a, b, p, k)
    with jax.enable_x64(x64):
        a, b, p = (jnp.asarray(v, float) for v in (a, b, p))
        new_a, new_b = squeezed_pair(a, b, p)
    check_best_prefixes(new_a, new_b, a, b, p, tolerance)
    assert np.all(np.any(new_b[:k] != 0, axis=1)) and not np.any(new_b[k:])  # no rounding noise in the rows
    fresh, bound = new_a[:, k:], shape[2] ** -0.5
    assert np.all(np.abs(fresh) <= bound) and np.all(np.max(np.abs(fresh), axis=0) > 0.5 * bound)
    assert len(np.unique(fresh)) > 0.99 * fresh.size


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_an_untrained_adapter_stays_nothing_and_can_learn(shape):
    a, b, p = (jnp.asarray(v, jnp.float32) for v in factors(shape))
    new_a, new_b = squeezed_pair(a, jnp.zeros_like(b), p)
    assert not np.any(new_b) and np.all(np.any(new_a != 0, axis=0)) and np.all(np.isfinite(new_a))
    x, new_a = jnp.tile(jnp.arange(1.0, shape[0] + 1), (2, 1)), jnp.asarray(new_a, jnp.float32)
    gradient = jax.grad(lambda b: jnp.sum(p_scaled_product(x, new_a, b, jnp.ones(shape[2]))))(jnp.zeros_like(b))
    assert np.all(np.any(np.asarray(gradient) != 0, axis=1))


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_what_is_noise_does_not_depend_on_the_size_of_the_factors(scale):
    a, b, p = factors((12, 10, 6))
    _duplicated_columns(a, b, p, 3)
    a, b, p = (jnp.asarray(v, jnp.float32) for v in (a, b * scale, p))
    new_a, new_b = squeezed_pair(a, b, p)
    check_best_prefixes(new_a, new_b, a, b, p, 1e-5)
    assert np.count_nonzero(np.any(new_b != 0, axis=1)) == 3


@settings(max_examples=15, deadline=None, derandomize=True, database=None)
@given(
    shape=st.sampled_from([(5, 4, 3), (3, 5, 4), (6, 6, 6)]),
    seed=st.integers(0, 10_000),
    lost=st.integers(0, 6),
    exponents=st.tuples(st.integers(-6, 6), st.integers(-6, 6)),
)
def test_best_prefixes_for_any_factors(shape, seed, lost, exponents):
    a, b, p = factors(shape, seed)
    b[max(0, len(b) - lost) :] = 0.0
    a, b, p = (jnp.asarray(v, jnp.float32) for v in (a * 2.0 ** exponents[0], b * 2.0 ** exponents[1], p))
    new_a, new_b = squeezed_pair(a, b, p)
    check_best_prefixes(new_a, new_b, a, b, p, 1e-5)
    kept = np.count_nonzero(np.any(new_b != 0, axis=1))
    assert kept <= min(*shape, max(0, shape[2] - lost))


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("name", ["lora", "matryoshka"])
def test_the_scale_is_baked_in(name, scaling):
    R = 6
    hierarchy = RankHierarchy((1, 2, 6), scaling, weights=(1.0, 0.5, 2.0))
    p = POLICIES[name].trained_profile(hierarchy)
    a, b, _ = (jnp.asarray(v, jnp.float32) for v in factors((12, 10, R)))
    adapter, profile = {"l": {"a": a, "b": b}}, {"l": {"p": p}}
    new, squeezed = compiled(adapter, profile), new_hierarchy(adapter, profile, hierarchy.ranks)
    assert squeezed == RankHierarchy((1, 2, 6)) and squeezed.scaling == "none"
    full = (np.asarray(new["l"]["a"]) * np.asarray(squeezed.prefix(R))) @ np.asarray(new["l"]["b"])
    np.testing.assert_allclose(full, product(a, b, p), rtol=0, atol=1e-5 * np.abs(full).max())
    again = truncate(new, 2)["l"]
    best = reference.best_approximation(a, b, p, 2)
    np.testing.assert_allclose(product(**again), best, rtol=0, atol=1e-5 * np.abs(best).max())


def test_the_new_hierarchy_and_its_ranks():
    a, b, p = (jnp.asarray(v, jnp.float32) for v in factors((4, 5, 12)))
    adapter, profile = {"a": a, "b": b}, {"p": p}
    assert new_hierarchy(adapter, profile) == RankHierarchy((1, 2, 4, 8, 12))
    assert new_hierarchy(adapter, profile, (3, 5)) == RankHierarchy((3, 5), max_rank=12)
    for ranks, message in (((1, 16), "rank 16 of S is above"), ((2, 1), "strictly increasing")):
        with pytest.raises(ValueError, match=message):
            new_hierarchy(adapter, profile, ranks)


def test_fresh_columns_depend_on_the_key_and_the_path_and_nothing_else():
    pair, profile = {"a": jnp.ones((5, 3)), "b": jnp.zeros((3, 4))}, {"p": jnp.ones(3)}
    alone = compiled({"up": pair}, {"up": profile})
    both = compiled({"up": pair, "down": pair}, {"up": profile, "down": profile})
    other = compiled({"up": pair}, {"up": profile}, jax.random.key(1))
    np.testing.assert_array_equal(alone["up"]["a"], both["up"]["a"])
    assert np.all(np.asarray(both["up"]["a"]) != np.asarray(both["down"]["a"]))
    assert np.all(np.asarray(alone["up"]["a"]) != np.asarray(other["up"]["a"]))


@pytest.mark.parametrize(("init", "bound"), [("fan_rank", 3**-0.5), ("fan_in", 400**-0.5)])
def test_fresh_columns_are_as_long_as_those_of_a_new_adapter(init, bound):
    pair, profile = {"a": jnp.ones((400, 3)), "b": jnp.zeros((3, 4))}, {"p": jnp.ones(3)}
    fresh = squeeze_factors({"up": pair}, {"up": profile}, key=jax.random.key(0), init=init).adapter["up"]["a"]
    assert 0.95 * bound < np.max(np.abs(fresh)) <= bound


def test_dtypes_are_kept_and_the_work_is_done_in_float32():
    a, b, p = (jnp.asarray(v, jnp.bfloat16) for v in factors((12, 10, 6)))
    new_a, new_b = squeezed_pair(a, b, p.astype(jnp.float32))
    exact = product(a, b, p)
    # The factors are rounded once, to 8 bits.
    assert np.linalg.norm(new_a @ new_b - exact) <= 2.0**-7 * np.linalg.norm(exact)


def test_eager_jit_and_vmap_over_trials_agree():
    trials = [factors((12, 10, 6), seed) for seed in range(2)]
    a, b, p = (jnp.asarray(np.stack(v), jnp.float32) for v in zip(*trials, strict=True))
    together = jax.jit(jax.vmap(lambda a, b, p: squeeze({"a": a, "b": b}, {"p": p})[0]))(a, b, p)
    jax.block_until_ready(together)
    for k in range(2):
        alone, _ = jax.block_until_ready(squeeze({"a": a[k], "b": b[k]}, {"p": p[k]}))
        got, expected = product(together["a"][k], together["b"][k]), product(alone["a"], alone["b"])
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-6 * np.abs(expected).max())


def test_trees_that_cannot_be_squeezed_are_refused():
    pair = {"a": jnp.ones((5, 3)), "b": jnp.ones((3, 4))}
    wide = {"a": jnp.ones((5, 2)), "b": jnp.ones((2, 4))}
    cases = [
        ({"up": pair}, {"up": {"p": jnp.ones((7, 3))}}, r"profile of up has shape \(7, 3\).*\(3,\).* per example"),
        ({"up": pair, "down": wide}, {"up": {"p": jnp.ones(3)}, "down": {"p": jnp.ones(2)}}, r"one R .*\[2, 3\]"),
        ({"up": pair}, {}, "up lacks p"),
        ({"up": {"b": pair["b"]}}, {"up": {"p": jnp.ones(3)}}, "up lacks a"),
    ]
    for adapter, profile, message in cases:
        with pytest.raises(ValueError, match=message):
            new_hierarchy(adapter, profile)
