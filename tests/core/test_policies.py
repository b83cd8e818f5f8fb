"""Every row of the policy table: shapes, determinism, what is drawn, and the same draw under jit and vmap."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlora_jax.core import POLICIES, SCALINGS, RankHierarchy, draw_step, get_policy
from tests.oracles import numpy_reference as reference

HIERARCHY = RankHierarchy((1, 2, 4, 8, 12), "sqrt", weights=(1.0, 2.0, 0.5, 1.0, 3.0))
S, R = HIERARCHY.ranks, HIERARCHY.max_rank
KEY = jax.random.key(11)
FAST = {"xla_backend_optimization_level": 0}  # most of the time here is XLA compiling random bits

# What each method is, said a second time: profiles per step, how often it draws ("" never), and the ranks it draws.
ROWS = {
    "lora": (1, "", ()),
    "dylora": (1, "micro_batch", S),
    "dylora_original": (1, "step", tuple(range(1, R + 1))),
    "dylora_frozen": (1, "step", tuple(range(1, R + 1))),
    "matryoshka": (1, "", ()),
    "matryoshka_exact": (len(S), "", ()),
    "sandwich": (3, "micro_batch", S[1:-1]),
}


def fixed_profiles(ranks, scaling, weights):
    """[N, R] of the policies that draw nothing."""
    return {
        "lora": reference.profile_lora(ranks, scaling)[None],
        "matryoshka": reference.profile_matryoshka(ranks, scaling, weights)[None],
        "matryoshka_exact": np.stack([reference.prefix(ranks, r, scaling) for r in ranks]),
    }


@functools.cache
def drawer(name, hierarchy=HIERARCHY, accumulation=2):
    """(keys [K], steps [K]) -> Draw of profiles [K, M, N, 1, R] and masks [K, R], compiled once."""
    one = functools.partial(draw_step, POLICIES[name], hierarchy, accumulation=accumulation)
    return jax.jit(jax.vmap(one), compiler_options=FAST)


def steps_of(name, count, **options):
    """The draws of the first `count` steps under one key."""
    draw = jax.tree.map(np.asarray, drawer(name, **options)(jnp.stack([KEY] * count), jnp.arange(count)))
    return dataclasses.replace(draw, profiles=shared(draw.profiles))


def shared(profiles):
    """Profiles that all examples share, [..., N, 1, R], without that axis."""
    assert profiles.shape[-2] == 1
    return profiles[..., 0, :]


@functools.cache
def many_steps(name):
    """600 steps of two micro-batches."""
    return steps_of(name, 600)


def last_column(profiles):
    """The drawn rank: how many columns the last profile of a step uses."""
    return np.count_nonzero(profiles[..., -1, :], axis=-1)


def test_the_table_has_these_rows():
    assert POLICIES.keys() == ROWS.keys() | {"per_example"}


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("name", ROWS)
def test_shapes_and_dtypes(name, accumulation):
    policy = get_policy(name)
    one = functools.partial(draw_step, policy, HIERARCHY, accumulation=accumulation)
    draw = jax.eval_shape(one, KEY, 0)
    assert policy.count(HIERARCHY) == ROWS[name][0]
    assert draw.profiles.shape == (accumulation, ROWS[name][0], 1, R)
    assert draw.update_mask.shape == (R,)
    assert draw.loss_weights.shape == (ROWS[name][0],)
    assert draw.profiles.dtype == draw.update_mask.dtype == draw.loss_weights.dtype == jnp.float32
    assert policy.summary
    with jax.enable_x64(True):
        wide = jax.eval_shape(one, KEY, 0)
        assert wide.profiles.dtype == wide.update_mask.dtype == wide.loss_weights.dtype == jnp.float64


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("name", [name for name, (_, every, _) in ROWS.items() if not every])
def test_policies_that_draw_nothing_equal_the_formula(name, scaling):
    hierarchy = RankHierarchy(S, scaling, HIERARCHY.weights)
    expected = fixed_profiles(S, scaling, HIERARCHY.weights)[name].astype(np.float32)
    draw = draw_step(get_policy(name), hierarchy, KEY, 5, accumulation=2)
    np.testing.assert_allclose(shared(draw.profiles), np.stack([expected] * 2), rtol=1e-7, atol=0)


@pytest.mark.parametrize("name", ROWS)
def test_the_same_key_and_step_give_the_same_draw_and_others_differ_if_it_is_random(name):
    first = many_steps(name)
    again = drawer(name)(jnp.stack([jax.random.key(11)] * 600), jnp.full(600, 17))
    np.testing.assert_array_equal(shared(again.profiles), np.stack([first.profiles[17]] * 600))
    other = drawer(name)(jax.random.split(jax.random.key(12), 600), jnp.zeros(600, int)).profiles
    other = shared(other)
    distinct_steps, distinct_keys = (len(np.unique(np.asarray(x), axis=0)) for x in (first.profiles, other))
    assert (distinct_steps > 1) == (distinct_keys > 1) == bool(ROWS[name][1])


@pytest.mark.parametrize("name", ROWS)
def test_micro_batches_of_a_step_draw_as_often_as_the_row_says(name):
    profiles = many_steps(name).profiles
    differ = np.any(profiles[:, 0] != profiles[:, 1], axis=(1, 2))
    assert np.any(differ) == (ROWS[name][1] == "micro_batch")
    long = steps_of(name, 4, accumulation=3)
    np.testing.assert_array_equal(long.profiles[:, :2], profiles[:4])  # a draw does not depend on M
    np.testing.assert_array_equal(long.update_mask, many_steps(name).update_mask[:4])


@pytest.mark.parametrize("name", [name for name, (_, every, _) in ROWS.items() if every])
def test_every_rank_of_the_row_is_drawn_as_often_as_its_weight_and_no_other(name):
    profiles = many_steps(name).profiles
    ranks = ROWS[name][2]
    drawn = last_column(profiles)
    assert set(np.unique(drawn)) == set(ranks)
    expected = np.stack([reference.prefix((R,), r, "sqrt") for r in range(R + 1)])
    np.testing.assert_allclose(profiles[:, :, -1], expected[drawn], rtol=1e-6, atol=0)
    draws = drawn[:, 0]
    weights = HIERARCHY.weights if name == "dylora" else (1.0,) * len(ranks)
    for r, share in zip(ranks, np.array(weights) / sum(weights), strict=True):
        assert abs(np.mean(draws == r) - share) <= 4.5 * np.sqrt(share * (1 - share) / len(draws))


@pytest.mark.parametrize("name", ROWS)
def test_weights_change_what_is_trained_where_the_policy_says_so_and_equal_ones_nothing(name):
    plain, even, uneven = (
        steps_of(name, 60, hierarchy=RankHierarchy(S, "sqrt", weights))
        for weights in (None, (1.0,) * len(S), (1.0, 2.0, 0.5, 1.0, 3.0))
    )
    jax.tree.map(np.testing.assert_array_equal, plain, even)
    pairs = zip(jax.tree.leaves(plain), jax.tree.leaves(uneven), strict=True)
    differs = any(np.any(a != b) for a, b in pairs)
    assert differs == get_policy(name).uses_weights == (name in ("dylora", "matryoshka", "matryoshka_exact"))
    expected = np.array([1.0, 2.0, 0.5, 1.0, 3.0]) / 7.5 if name == "matryoshka_exact" else plain.loss_weights
    np.testing.assert_allclose(uneven.loss_weights, np.broadcast_to(expected, uneven.loss_weights.shape), rtol=1e-6)
    np.testing.assert_allclose(plain.loss_weights, np.full_like(plain.loss_weights, 1 / ROWS[name][0]), rtol=1e-6)


@pytest.mark.parametrize("name", ROWS)
def test_only_the_frozen_mode_holds_columns_still(name):
    draw = many_steps(name)
    if name != "dylora_frozen":
        assert np.all(draw.update_mask == 1)
        return
    ranks = last_column(draw.profiles)[:, 0]
    np.testing.assert_array_equal(draw.update_mask, np.eye(R)[ranks - 1])


@pytest.mark.parametrize(
    ("ranks", "between"), [((1, 2, 4, 8), {2, 4}), ((1, 3, 6), {3}), ((2, 6), {2, 6}), ((4,), {4})]
)
def test_sandwich_has_the_smallest_the_largest_and_one_between(ranks, between):
    hierarchy = RankHierarchy(ranks, "rank")
    profiles = steps_of("sandwich", 60, hierarchy=hierarchy, accumulation=1).profiles[:, 0]
    np.testing.assert_array_equal(profiles[:, 0], np.stack([hierarchy.prefix(ranks[0])] * 60))
    np.testing.assert_array_equal(profiles[:, 1], np.stack([hierarchy.prefix(ranks[-1])] * 60))
    assert set(last_column(profiles)) == between


def test_columns_above_the_training_ranks_belong_to_lora_and_the_original_dylora_only():
    hierarchy = RankHierarchy((1, 2), max_rank=5)
    reached = {}
    for name in ROWS:
        profiles = steps_of(name, 60, hierarchy=hierarchy, accumulation=1).profiles
        reached[name] = int(np.max(np.count_nonzero(profiles, axis=-1)))
    assert reached == dict.fromkeys(ROWS, 2) | {"lora": 5, "dylora_original": 5, "dylora_frozen": 5}


@pytest.mark.parametrize("name", ROWS)
def test_a_draw_is_the_same_under_jit_and_vmap_over_keys(name):
    policy = get_policy(name)
    keys, steps = jax.random.split(jax.random.key(2), 600), jnp.arange(600)
    together = drawer(name)(keys, steps)
    alone = draw_step(policy, HIERARCHY, keys[599], 599, accumulation=2)
    np.testing.assert_array_equal(together.profiles[599], alone.profiles)
    np.testing.assert_array_equal(together.update_mask[599], alone.update_mask)
    before = drawer(name)._cache_size()
    drawer(name)(keys, steps + 1000)
    assert drawer(name)._cache_size() == before  # the step is data


@pytest.mark.parametrize("name", ROWS)
def test_the_trained_function_is_the_diagonal_for_matryoshka_and_lora_otherwise(name):
    kind = "matryoshka" if name == "matryoshka" else "lora"
    expected = fixed_profiles(S, "sqrt", HIERARCHY.weights)[kind][0]
    np.testing.assert_allclose(get_policy(name).trained_profile(HIERARCHY), expected, rtol=1e-6)


@pytest.mark.parametrize("name", ROWS)
def test_the_trained_function_ends_with_the_ranks_that_are_trained(name):
    """Where S ends below R, the largest prefix has the scale of its own rank, and no further column."""
    trained = {"lora": 5, "dylora_original": 5, "dylora_frozen": 5}.get(name, 2)
    scale = 1 / np.sqrt(trained)
    expected = [1 + 2**-0.5, 2**-0.5, 0, 0, 0] if name == "matryoshka" else [scale] * trained + [0] * (5 - trained)
    found = get_policy(name).trained_profile(RankHierarchy((1, 2), "sqrt", max_rank=5))
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("matroyshka", "unknown policy 'matroyshka'; did you mean 'matryoshka'.*Known policies: lora, dylora"),
        ("DyLoRA", "unknown policy 'DyLoRA'"),
        ("", r"unknown policy ''\. Known policies:.*sandwich"),
    ],
)
def test_an_unknown_method_is_refused(name, message):
    with pytest.raises(ValueError, match=message):
        get_policy(name)


def drawn_profiles(hierarchy=HIERARCHY, *, accumulation=3, examples=8, key=KEY, step=5):
    policy = get_policy("per_example")
    draw = draw_step(policy, hierarchy, key, step, accumulation=accumulation, examples=examples)
    assert draw.profiles.shape == (accumulation, 1, examples, hierarchy.max_rank)
    assert np.all(draw.update_mask == 1) and draw.loss_weights.tolist() == [1.0]
    return np.asarray(draw.profiles[:, 0])


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize(("accumulation", "examples"), [(3, 8), (1, 3), (5, 4)])
def test_the_ranks_of_a_step_are_spread_evenly_over_its_examples(scaling, accumulation, examples):
    hierarchy, count = RankHierarchy(S, scaling), accumulation * examples
    seen = np.zeros(len(S))
    for step in range(60):
        profiles = drawn_profiles(hierarchy, accumulation=accumulation, examples=examples, step=step).reshape(count, R)
        drawn = np.count_nonzero(profiles, axis=-1)
        times = np.array([np.sum(drawn == rank) for rank in S])
        assert times.sum() == count
        assert set(times) <= {count // len(S), -(-count // len(S))}
        np.testing.assert_allclose(profiles, [reference.prefix(S, rank, scaling) for rank in drawn], rtol=1e-6)
        seen += times
    share = seen / seen.sum()
    assert np.all(np.abs(share - 1 / len(S)) <= 4.5 * np.sqrt(0.25 / 60) / max(1, count // len(S)))


def test_the_ranks_of_a_step_are_shuffled_over_micro_batches_and_steps():
    counts = [np.count_nonzero(drawn_profiles(step=step), axis=-1) for step in range(40)]  # [steps, M, B]
    assert len({tuple(step.ravel()) for step in counts}) == 40
    # A spread of the micro-batch would give each micro-batch of 8 every one of the five ranks.
    assert any(len(set(micro_batch)) < len(S) for step in counts for micro_batch in step)
    first = np.stack(counts)[:, 0, 0]
    assert set(first) == set(S)
    np.testing.assert_array_equal(drawn_profiles(step=7), drawn_profiles(step=7))
    assert np.any(drawn_profiles(key=jax.random.key(99)) != drawn_profiles())


def test_weights_are_the_shares_of_the_ranks():
    weights = (4.0, 0.0, 2.0, 1.0, 1.0)
    drawn = np.stack(
        [np.count_nonzero(drawn_profiles(RankHierarchy(S, weights=weights), step=n), axis=-1) for n in range(50)]
    )
    times = np.stack([np.sum(drawn == rank, axis=(1, 2)) for rank in S], axis=1)  # [steps, ranks]
    expected = 24 * np.array(weights) / 8
    np.testing.assert_array_equal(times, np.broadcast_to(expected, times.shape))
    uneven = RankHierarchy(S, weights=(1.0, 2.0, 3.0, 4.0, 1.0))
    expected = 24 * np.array(uneven.weights) / 11
    for step in range(50):
        drawn = np.count_nonzero(drawn_profiles(uneven, step=step), axis=-1)
        times = np.array([np.sum(drawn == rank) for rank in S])
        assert np.all((times >= np.floor(expected)) & (times <= np.ceil(expected)))
