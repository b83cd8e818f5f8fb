"""RankHierarchy: every profile against NumPy loops, for every scaling and awkward S."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlora_jax.core import READOUTS, SCALINGS, RankHierarchy, p_scaled_product, powers_of_two, readout_profile
from tests.oracles import numpy_reference as reference

# The read-outs that are a profile of the adapter itself.
PROFILES = tuple(name for name, row in READOUTS.items() if row.action == "none")

# (S, R): R a power of two; R = 12; S that stops short of R; one rank; ranks without a pattern.
RANKS = {
    "powers": ((1, 2, 4, 8), 8),
    "twelve": ((1, 2, 4, 8, 12), 12),
    "short": ((1, 3), 6),
    "single": ((5,), 5),
    "odd": ((2, 3, 7), 7),
}
CASES = [
    pytest.param(ranks, R, scaling, weighted, id=f"{name}-{scaling}{'-weighted' if weighted else ''}")
    for (name, (ranks, R)), scaling, weighted in itertools.product(RANKS.items(), SCALINGS, (False, True))
]
# In float32 the float64 formula is rounded once.
PRECISIONS = {"float32": (False, np.float32), "float64": (True, np.float64)}
FAST = {"xla_backend_optimization_level": 0}  # random bits take XLA long to compile


def make(ranks, R, scaling="none", weighted=False):
    weights = tuple(0.5 * (k + 1) for k in range(len(ranks))) if weighted else None
    return RankHierarchy(ranks, scaling, weights, max_rank=R), weights


def widen(profile, R):
    """The reference stops at the largest rank of S."""
    return np.pad(profile, (0, R - len(profile)))


def expected_profiles(ranks, R, scaling, weights):
    """{name: [R] float64} of every profile that a hierarchy can give."""
    table = {
        "lora": reference.profile_lora((R,), scaling),
        "matryoshka": widen(reference.profile_matryoshka(ranks, scaling, weights), R),
    }
    for r in range(R + 1):
        table[f"prefix {r}"] = reference.prefix((R,), r, scaling)
        table[f"nested {r}"] = widen(reference.nested(ranks, r, scaling, weights), R)
        table[f"masked {r}"] = widen(reference.masked(ranks, r, scaling, weights), R)
    return table


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("ranks", "R", "scaling", "weighted"), CASES)
def test_every_profile_equals_the_formula(ranks, R, scaling, weighted, precision):
    x64, dtype = PRECISIONS[precision]
    hierarchy, weights = make(ranks, R, scaling, weighted)
    with jax.enable_x64(x64):
        got = {"lora": hierarchy.lora(), "matryoshka": hierarchy.matryoshka()}
        for r, readout in itertools.product(range(R + 1), PROFILES):
            got[f"{readout} {r}"] = readout_profile(hierarchy, readout, r)
        for name, profile in got.items():
            assert profile.dtype == dtype and profile.shape == (R,), name
    expected = expected_profiles(ranks, R, scaling, weights)
    assert got.keys() == expected.keys()
    for name, profile in got.items():
        rounded = expected[name].astype(dtype)
        np.testing.assert_allclose(profile, rounded, rtol=np.finfo(dtype).eps, atol=0, err_msg=name)


@pytest.mark.parametrize(("ranks", "R", "scaling", "weighted"), CASES)
def test_the_diagonal_gathers_the_sum_over_prefixes(ranks, R, scaling, weighted):
    hierarchy, weights = make(ranks, R, scaling, weighted)
    rng = np.random.default_rng(R)
    x, a, b = rng.normal(size=(3, 5)), rng.normal(size=(5, R)), rng.normal(size=(R, 4))
    with jax.enable_x64(True):
        product = p_scaled_product(jnp.asarray(x), jnp.asarray(a), jnp.asarray(b), hierarchy.matryoshka())
    np.testing.assert_allclose(product, reference.nested_sum(x, a, b, ranks, scaling, weights), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize(("ranks", "R"), RANKS.values(), ids=RANKS)
def test_rank_zero_is_the_base_and_masked_at_full_rank_is_the_training_diagonal(ranks, R, scaling):
    hierarchy, _ = make(ranks, R, scaling)
    for readout in PROFILES:
        assert not np.any(readout_profile(hierarchy, readout, 0))
    for readout in ("nested", "masked"):
        np.testing.assert_array_equal(readout_profile(hierarchy, readout, R), hierarchy.matryoshka())
    np.testing.assert_array_equal(hierarchy.prefix(R), hierarchy.lora())


@pytest.mark.parametrize("readout", PROFILES)
@pytest.mark.parametrize(("ranks", "R"), RANKS.values(), ids=RANKS)
def test_a_read_out_uses_no_column_beyond_its_rank(ranks, R, readout):
    hierarchy, _ = make(ranks, R, "rank")
    for r in range(R + 1):
        profile = np.asarray(readout_profile(hierarchy, readout, r))
        assert not np.any(profile[r:])
        reached = {"prefix": r, "nested": max((q for q in ranks if q <= r), default=0), "masked": min(r, ranks[-1])}
        assert np.all(profile[: reached[readout]] > 0)


@pytest.mark.parametrize("scaling", SCALINGS)
def test_prefix_at_is_prefix_for_a_traced_rank(scaling):
    hierarchy, _ = make((1, 2, 4, 8, 12), 12, scaling)
    ranks = jnp.arange(1, 13)
    traced = jax.jit(jax.vmap(hierarchy.prefix_at))(ranks)
    np.testing.assert_array_equal(traced, np.stack([hierarchy.prefix(int(r)) for r in ranks]))


@pytest.mark.parametrize(
    ("ranks", "R", "scaling"), [(*RANKS["powers"], "none"), (*RANKS["twelve"], "sqrt"), (*RANKS["short"], "rank")]
)
def test_the_draw_is_uniform_over_the_training_ranks(ranks, R, scaling):
    hierarchy, _ = make(ranks, R, scaling)
    count = 3000
    keys = jax.random.split(jax.random.key(7), count)
    drawn = np.asarray(jax.jit(jax.vmap(hierarchy.sample_prefix), compiler_options=FAST)(keys))
    lengths = np.count_nonzero(drawn, axis=1)
    assert set(lengths) == set(ranks)
    table = np.stack([hierarchy.prefix(r) for r in range(R + 1)])
    np.testing.assert_array_equal(drawn, table[lengths])
    share = 1 / len(ranks)
    spread = np.sqrt(share * (1 - share) / count)
    for r in ranks:
        assert abs(np.mean(lengths == r) - share) <= 4.5 * spread
    with jax.disable_jit():
        np.testing.assert_array_equal(hierarchy.sample_prefix(keys[3]), drawn[3])


@pytest.mark.parametrize(("ranks", "R", "scaling", "weighted"), CASES)
def test_a_truncated_hierarchy_reads_out_the_same_prefixes(ranks, R, scaling, weighted):
    hierarchy, _ = make(ranks, R, scaling, weighted)
    for r in range(1, R + 1):
        short = hierarchy.truncate(r)
        assert short.max_rank == r and short.ranks == tuple(sorted({q for q in ranks if q <= r} | {r}))
        for q in range(r + 1):
            np.testing.assert_array_equal(short.prefix(q), hierarchy.prefix(q)[:r])
            if q < r or r in ranks:
                np.testing.assert_array_equal(short.nested(q), hierarchy.nested(q)[:r])


def test_the_weights_of_a_truncated_hierarchy():
    hierarchy = RankHierarchy((1, 2, 4, 8), "rank", weights=(0.0, 3.0, 0.0, 5.0))
    assert hierarchy.truncate(8) == hierarchy
    assert hierarchy.truncate(4).weights == (0.0, 3.0, 0.0)
    assert hierarchy.truncate(3).weights == (0.0, 3.0, 1.0)
    assert hierarchy.truncate(1).weights is None  # none above zero is left
    assert RankHierarchy((1, 2, 4)).truncate(3) == RankHierarchy((1, 2, 3))
    for rank in (0, 9, 2.0):
        with pytest.raises(ValueError, match=rf"rank to truncate to must be an integer in 1\.\.8, got {rank}"):
            hierarchy.truncate(rank)


def test_default_ranks_are_the_powers_of_two_and_the_rank_itself():
    expected = {1: (1,), 2: (1, 2), 3: (1, 2, 3), 8: (1, 2, 4, 8), 12: (1, 2, 4, 8, 12), 32: (1, 2, 4, 8, 16, 32)}
    assert {R: powers_of_two(R) for R in expected} == expected


def test_a_hierarchy_is_frozen_hashable_and_normalised():
    hierarchy = RankHierarchy([np.int64(1), 2], weights=[1, 2])
    assert hierarchy == RankHierarchy((1, 2), weights=(1.0, 2.0), max_rank=2)
    assert hash(hierarchy) == hash(RankHierarchy((1, 2), weights=(1.0, 2.0)))
    assert hierarchy.max_rank == 2 and type(hierarchy.ranks[0]) is int
    with pytest.raises(AttributeError):
        hierarchy.scaling = "rank"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ranks": ()}, "at least one rank, got none"),
        ({"ranks": (2, 1)}, r"strictly increasing.*\(2, 1\)"),
        ({"ranks": (1, 2, 2)}, r"without repeats, got \(1, 2, 2\)"),
        ({"ranks": (1, 16), "max_rank": 8}, r"rank 16 of S is above.* R = 8; S is \(1, 16\)"),
        ({"ranks": (0, 1)}, r"integer in 1\.\., got 0"),
        ({"ranks": (-4, 1)}, r"integer in 1\.\., got -4"),
        ({"ranks": (1, 2.5)}, r"integer in 1\.\., got 2\.5"),
        ({"ranks": (True, 2)}, r"integer in 1\.\., got True"),
        ({"ranks": 4}, "sequence of integers, got 4"),
        ({"ranks": "14"}, "integer in 1.., got '1'"),
        ({"ranks": (1,), "max_rank": 0}, r"max_rank must be an integer in 1\.\., got 0"),
        ({"ranks": (1,), "scaling": "cube"}, "unknown scaling 'cube'; known: none, rank, sqrt"),
        ({"ranks": (1, 2), "weights": (1.0,)}, r"weights \(1.0,\) and ranks \(1, 2\) differ in length"),
        ({"ranks": (1, 2), "weights": (1.0, -1.0)}, r"not negative.*\(1.0, -1.0\)"),
        ({"ranks": (1, 2), "weights": (0.0, 0.0)}, "not all zero"),
        ({"ranks": (1, 2), "weights": (1.0, float("nan"))}, "finite.*nan"),
        ({"ranks": (1, 2), "weights": 1.0}, "weights must be a sequence of numbers, got 1.0"),
        ({"ranks": (1, 2), "weights": ("a", 1)}, "weights must be a sequence of numbers"),
    ],
)
def test_a_bad_hierarchy_is_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        RankHierarchy(**arguments)


@pytest.mark.parametrize("readout", PROFILES)
@pytest.mark.parametrize("rank", [-1, 5, 2.0, True, None])
def test_a_read_out_outside_zero_to_full_rank_is_refused(readout, rank):
    hierarchy = RankHierarchy((1, 2, 4))
    message = rf"rank of a read-out must be an integer in 0\.\.4, got {rank!r}"
    with pytest.raises(ValueError, match=message):
        readout_profile(hierarchy, readout, rank)
    with pytest.raises(ValueError, match=message):
        getattr(hierarchy, readout)(rank)


@pytest.mark.parametrize("rank", [0, 5, -1])
def test_a_scale_outside_one_to_full_rank_is_refused(rank):
    with pytest.raises(ValueError, match=rf"rank must be an integer in 1\.\.4, got {rank}"):
        RankHierarchy((1, 2, 4)).scale(rank)


@pytest.mark.parametrize("rank", [0, -3, 1.5, "8"])
def test_default_ranks_of_no_rank_are_refused(rank):
    with pytest.raises(ValueError, match=rf"max_rank must be an integer in 1\.\., got {rank!r}"):
        powers_of_two(rank)


def test_an_unknown_read_out_is_refused():
    with pytest.raises(
        ValueError, match=r"unknown read-out 'suffix'\. Known read-outs: prefix, squeeze, nested, masked"
    ):
        readout_profile(RankHierarchy((1, 2)), "suffix", 1)
