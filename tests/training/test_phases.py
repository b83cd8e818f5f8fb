"""Between phases: the function stays, moments follow, and every trial is squeezed as if it were alone."""

import copy
import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from mlora_jax.adapters import InputGram, adapt, set_profile, split, watch_inputs
from mlora_jax.config import DEFAULTS, resolve
from mlora_jax.core import ACTIONS, RankHierarchy, fold
from mlora_jax.core.squeeze import map_gradients, squeeze_factors
from mlora_jax.training.actions import act_on_trials
from mlora_jax.training.calibrate import calibrate
from mlora_jax.training.loop import BatchState, Cadence, Interrupted, LoopPhase, LoopState, train_trials
from mlora_jax.training.phases import TrialPhases
from mlora_jax.training.step import init_state, make_optimizer
from mlora_jax.training.trial_trees import TrialKeys
from mlora_jax.trials import Trial
from tests.training.observers import observer

D, F, R, L = 9, 7, 5, 3
OPTIMIZER = make_optimizer(beta1=0.9, beta2=0.999, epsilon=1e-8, weight_decay=0.1, clip=1.0)


@functools.cache
def pair(seed, dtype="float64"):
    """A [L, D, R], B [L, R, F], p [R]; NumPy."""
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(L, D, R)), rng.normal(size=(L, R, F)), rng.uniform(0.5, 2, R)
    return tuple(value.astype(dtype) for value in values)


def tree(a, b):
    return {"layer": {"a": jnp.asarray(a), "b": jnp.asarray(b)}}


def profile_tree(p):
    return {"layer": {"p": jnp.asarray(np.broadcast_to(p, (L, R)))}}


def gradients(delta_gradient, a, b, p):
    """NumPy: of a function of A diag(p) B with that gradient [L, D, F]."""
    return delta_gradient @ np.swapaxes(b * p[:, None], -1, -2), np.swapaxes(a * p, -1, -2) @ delta_gradient


def test_gradients_become_those_of_the_new_factors():
    with jax.enable_x64(True):
        a, b, p = pair(0)
        new, maps = squeeze_factors(tree(a, b), profile_tree(p), key=jax.random.key(0))
        delta = np.random.default_rng(1).normal(size=(L, D, F))
        mapped = map_gradients(tree(*gradients(delta, a, b, p)), maps)
        new_a, new_b = (np.asarray(new["layer"][name]) for name in "ab")
    for name, expected in zip("ab", gradients(delta, new_a, new_b, np.ones(R)), strict=True):
        np.testing.assert_allclose(mapped["layer"][name], expected, rtol=1e-9, atol=1e-9)


def test_squares_follow_as_if_columns_were_uncorrelated():
    with jax.enable_x64(True):
        a, b, p = pair(0)
        maps = squeeze_factors(tree(a, b), profile_tree(p), key=jax.random.key(0)).gradient_maps
        # Gradients of A whose columns are independent draws of known variances: what the mapped ones' squares become.
        variances = np.array([1.0, 4.0, 0.25, 2.0, 9.0])
        rng = np.random.default_rng(2)
        draws = rng.normal(size=(4000, D, R)) * np.sqrt(variances)
        matrix = np.asarray(maps["layer"]["a"])[0]
        measured = np.mean((draws @ matrix) ** 2, axis=(0, 1))
        squares = tree(np.broadcast_to(variances, (L, D, R)), np.zeros((L, R, F)))
        mapped = map_gradients(squares, maps, squared=True)["layer"]["a"][0, 0]
    np.testing.assert_allclose(mapped, measured, rtol=0.05)


def test_columns_that_do_not_exist_have_no_moments():
    a, b, p = pair(0, "float32")
    b = b.copy()
    b[:, 3:] = 0.0
    new, maps = squeeze_factors(tree(a, b), profile_tree(p), key=jax.random.key(0))
    assert not np.any(np.asarray(maps["layer"]["a"])[..., 3:]) and not np.any(np.asarray(maps["layer"]["b"])[:, 3:])
    assert not np.any(new["layer"]["b"][:, 3:]) and np.all(np.any(np.asarray(new["layer"]["a"]) != 0, axis=1))


def states(count, action, *, seeds=None):
    """The squeezed state of `count` trials with moments, and the state before."""
    seeds = range(count) if seeds is None else seeds
    trials = []
    for seed in seeds:
        a, b, _ = pair(seed, "float32")
        state = init_state(tree(a, b), OPTIMIZER)
        _, optimizer = OPTIMIZER.update(tree(0.1 * a, 0.2 * b), state.optimizer, state.adapter)
        trials.append(state._replace(optimizer=optimizer, step=jnp.array(7)))
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *trials)
    profiles = jnp.stack([jnp.asarray(pair(seed, "float32")[2]) for seed in seeds])
    keys = jnp.stack([jax.random.key(seed) for seed in seeds])
    return act_on_trials(ACTIONS[action], OPTIMIZER, stacked, profiles, keys, {}), stacked


@pytest.mark.parametrize("action", ["squeeze", "squeeze_rotated"])
def test_all_trials_keep_their_functions_and_are_what_they_would_be_alone(action):
    together, before = states(3, action)
    for seed in range(3):
        a, b, p = pair(seed, "float32")
        new = jax.tree.map(lambda leaf, seed=seed: np.asarray(leaf[seed]), together.adapter)["layer"]
        np.testing.assert_allclose(new["a"] @ new["b"], (a * p) @ b, rtol=1e-4, atol=1e-4)
        alone, _ = states(1, action, seeds=[seed])
        for one, other in zip(jax.tree.leaves(alone), jax.tree.leaves(together), strict=True):
            np.testing.assert_allclose(one[0], other[seed], rtol=1e-5, atol=1e-5)
    assert together.step.tolist() == before.step.tolist() == [7, 7, 7]


def test_what_becomes_of_the_optimizer():
    adam = lambda state: next(node for node in jax.tree.leaves(state.optimizer, is_leaf=is_adam) if is_adam(node))  # noqa: E731
    is_adam = lambda node: isinstance(node, optax.ScaleByAdamState)  # noqa: E731
    reset, before = states(2, "squeeze")
    assert adam(reset).count.tolist() == [0, 0] and not any(np.any(x) for x in jax.tree.leaves(adam(reset).mu))
    rotated, _ = states(2, "squeeze_rotated")
    assert adam(rotated).count.tolist() == adam(before).count.tolist() == [1, 1]
    old, new = adam(before), adam(rotated)
    functions = jnp.stack([jnp.asarray(pair(seed, "float32")[2]) for seed in range(2)])
    profiles = {"layer": {"p": jnp.broadcast_to(functions[:, None], (2, L, R))}}
    maps = squeeze_factors(before.adapter, profiles, key=jax.random.key(0)).gradient_maps["layer"]
    np.testing.assert_allclose(new.mu["layer"]["a"], old.mu["layer"]["a"] @ maps["a"], rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(new.nu["layer"]["b"], maps["b"] ** 2 @ old.nu["layer"]["b"], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("action", ["squeeze", "squeeze_rotated"])
def test_the_moments_of_a_gate_become_zero(action):
    a, b, p = pair(0, "float32")
    gate = np.random.default_rng(1).uniform(0.5, 2, (L, R)).astype(np.float32)
    adapter = {"layer": tree(a, b)["layer"] | {"gate": jnp.asarray(gate)}}
    state = init_state(adapter, OPTIMIZER)
    _, optimizer = OPTIMIZER.update(adapter, state.optimizer, adapter)
    before = jax.tree.map(lambda leaf: leaf[None], state._replace(optimizer=optimizer))
    keys = jnp.stack([jax.random.key(0)])
    after = act_on_trials(ACTIONS[action], OPTIMIZER, before, jnp.asarray(p)[None], keys, {})
    new = jax.tree.map(lambda leaf: np.asarray(leaf[0]), after.adapter)["layer"]
    np.testing.assert_array_equal(new["gate"], np.ones((L, R)))
    np.testing.assert_allclose(new["a"] @ new["b"], (a * (p * gate)[:, None]) @ b, rtol=1e-4, atol=1e-4)
    is_adam = lambda node: isinstance(node, optax.ScaleByAdamState)  # noqa: E731
    old, adam = (
        next(node for node in jax.tree.leaves(each.optimizer, is_leaf=is_adam) if is_adam(node))
        for each in (before, after)
    )
    for moments, moments_before in ((adam.mu, old.mu), (adam.nu, old.nu)):
        assert np.any(moments_before["layer"]["gate"]) and not np.any(moments["layer"]["gate"])
        assert np.any(moments["layer"]["a"]) == (action == "squeeze_rotated")


def phases_of(method, steps=100, **trials):
    config = resolve({"trials": {"method": (method,), "rank": (8,), **trials}, "train": {"accumulation": 2}})
    (scaling,), (weights,) = config.trials.scaling, config.trials.weights
    return TrialPhases(config, steps), Trial(method, 1e-3, 42, scaling, 8, weights)


def test_draws_are_those_of_the_phase():
    phases, trial = phases_of("renest", scaling=("sqrt",))
    keys = jax.vmap(lambda key: jax.random.split(key, 3))(jax.random.split(jax.random.key(0), 1))
    first, last = (phases.draws([trial], at, TrialKeys(*(keys[:, i] for i in range(3))))(70).profiles for at in (0, 1))
    assert first.shape == (1, 2, 1, 1, 8) and last.shape == (1, 2, 1, 16, 8)
    np.testing.assert_allclose(first, np.full(first.shape, 1 / np.sqrt(8)), rtol=1e-6)
    assert set(np.unique(last)) == {0.0, 1.0}  # the scale is in the factors
    np.testing.assert_array_equal(np.sort(np.count_nonzero(last, axis=-1).ravel()), np.repeat([1, 2, 4, 8], 8))


def test_what_a_trial_is_read_out_with():
    phases, trial = phases_of("renest", scaling=("sqrt",), weights=((1.0, 1.0, 1.0, 2.0),))
    before = RankHierarchy((1, 2, 4, 8), "sqrt", (1.0, 1.0, 1.0, 2.0))
    after = RankHierarchy((1, 2, 4, 8), "none", (1.0, 1.0, 1.0, 2.0))
    assert phases.hierarchy(trial) == after
    assert [phases.hierarchy_at(trial, step) for step in (1, 70, 71, 100)] == [before, before, after, after]
    assert phases.trained_profile(trial).tolist() == [1.0] * 8
    assert phases.cost(trial) == 1.0
    assert phases_of("renest_sandwich")[0].cost(phases_of("renest_sandwich")[1]) == 2.0


def test_trials_of_unlike_phases_do_not_train_together():
    shapes = {
        name: phases_of(name)[0].shape(phases_of(name)[1]) for name in ("lora", "per_example", "renest", "dylora")
    }
    assert shapes["lora"] == shapes["dylora"] != shapes["per_example"]
    assert len(shapes["renest"]) == 2 and [shape.end for shape in shapes["renest"]] == [70, 100]


def test_grams_order_by_what_the_inputs_make_of_each_direction():
    rng = np.random.default_rng(5)
    with jax.enable_x64(True):
        a, b, p = pair(3)
        inputs = rng.normal(size=(L, 200, D)) * np.logspace(0, -2, D)
        grams = {"layer": {"gram": jnp.asarray(np.swapaxes(inputs @ (a * p), -1, -2) @ (inputs @ (a * p)))}}
        new, maps = squeeze_factors(tree(a, b), profile_tree(p), key=jax.random.key(0), grams=grams)
        new_a, new_b = (np.asarray(new["layer"][name]) for name in "ab")
        delta = rng.normal(size=(L, D, F))
        mapped = map_gradients(tree(*gradients(delta, a, b, p)), maps)["layer"]
    np.testing.assert_allclose(new_a @ new_b, (a * p) @ b, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(np.linalg.norm(new_a, axis=1), np.linalg.norm(new_b, axis=2), rtol=1e-9)
    for name, expected in zip("ab", gradients(delta, new_a, new_b, np.ones(R)), strict=True):
        np.testing.assert_allclose(mapped[name], expected, rtol=1e-7, atol=1e-7)
    exact = inputs @ ((a * p) @ b)
    tails = np.sqrt(np.cumsum(np.linalg.svd(exact, compute_uv=False)[:, ::-1] ** 2, axis=-1)[:, ::-1])  # [L, F]
    for r in range(1, R):
        error = np.linalg.norm(exact - inputs @ (new_a[:, :, :r] @ new_b[:, :r]), axis=(1, 2))
        np.testing.assert_allclose(error, tails[:, r], rtol=1e-6)


def test_directions_that_no_input_takes_are_kept_and_come_last():
    with jax.enable_x64(True):
        a, b, p = pair(4)
        b = b.copy()
        b[:, 4] = b[:, 3]  # rank 4
        seen = np.zeros((D, D))
        seen[0, 0] = 1.0  # inputs along one axis
        grams = {"layer": {"gram": jnp.asarray(np.swapaxes(a * p, -1, -2) @ seen @ (a * p))}}
        new, _ = squeeze_factors(tree(a, b), profile_tree(p), key=jax.random.key(0), grams=grams)
        new_a, new_b = (np.asarray(new["layer"][name]) for name in "ab")
    np.testing.assert_allclose(new_a @ new_b, (a * p) @ b, rtol=1e-5, atol=1e-6)
    assert not np.any(new_b[:, 4]) and np.all(np.isfinite(new_a))
    first = np.linalg.norm(seen @ ((a * p) @ b) - seen @ (new_a[:, :, :1] @ new_b[:, :1]), axis=(1, 2))
    assert np.all(first < 1e-6)


def test_fold_of_the_squeezed_is_fold_of_the_old():
    a, b, p = pair(2, "float32")
    base = {"layer": {"base": {"kernel": jnp.zeros((L, D, F))}}}
    new, _ = squeeze_factors(tree(a, b), profile_tree(p), key=jax.random.key(0))
    kernel = lambda *trees: fold(base, *trees)["layer"]["base"]["kernel"]  # noqa: E731
    np.testing.assert_allclose(
        kernel(new, profile_tree(np.ones(R))), kernel(tree(a, b), profile_tree(p)), rtol=1e-4, atol=1e-5
    )


class Stopped:
    """train_trials over numbers: a step adds 1, a phase starts by times 10, a validation scores the number itself."""

    def __init__(self, starts, *, patience=0):
        times_ten = lambda trials: trials._replace(adapter=10 * trials.adapter)  # noqa: E731
        self.phases = [LoopPhase(at, times_ten, lambda at: None, None, self.step) for at in (0, *starts)]
        self.saved, self.patience = None, patience

    @staticmethod
    def step(trials, batch, draw, schedule):
        del batch, draw, schedule
        metrics = {"loss": jnp.zeros(1), "finite": jnp.ones(1, bool)}
        return trials._replace(adapter=trials.adapter + 1, step=trials.step + 1), metrics

    def run(self, stop_at=None, steps=10):
        one = init_state(jnp.zeros(()), optax.identity())
        state = BatchState(jax.tree.map(lambda leaf: leaf[None], one), jnp.zeros(1))
        loop, start = LoopState.of(1), 0
        if self.saved:
            state, values = self.saved
            loop = LoopState(**copy.deepcopy(values))
            start = loop.step

        def save(state, loop):
            self.saved = jax.tree.map(jnp.copy, state), copy.deepcopy(dataclasses.asdict(loop))

        return train_trials(
            self.phases,
            itertools.repeat({"real_tokens": np.float32(1)}, steps - start),
            state,
            loop,
            steps=steps,
            cadence=Cadence(log=5, validate=2, save=0, patience=self.patience),
            observer=observer(
                validate=lambda at, adapters, slots: [-float(adapters[0])],
                save=save,
                interrupted=lambda: 15 if loop.step == stop_at else 0,
            ),
        )


@pytest.mark.parametrize("stop_at", [3, 4, 5, 7, 9])
def test_a_run_stopped_before_at_and_after_a_start_ends_as_one_that_was_not(stop_at):
    whole = Stopped([4, 7]).run()
    assert whole.trials.adapter.tolist() == [(4 * 10 + 3) * 10 + 3]
    broken = Stopped([4, 7])
    with pytest.raises(Interrupted):
        broken.run(stop_at)
    ended = broken.run()
    assert ended.trials.adapter.tolist() == whole.trials.adapter.tolist()
    assert ended.best.tolist() == whole.best.tolist()


def test_validations_before_the_last_phase_choose_nothing():
    # The scores fall all the time: the best of all is the first, the best of the last phase is at step 8.
    assert Stopped([7]).run().best.tolist() == [7 * 10 + 1]
    assert Stopped([]).run().best.tolist() == [2]
    # Without progress for two validations a trial stops, but not before its last phase.
    assert Stopped([], patience=2).run(steps=20).trials.adapter.tolist() == [6]
    assert Stopped([7], patience=2).run(steps=20).trials.adapter.tolist() == [70 + 12 - 7]


def squared(targets):
    """A loss [B] with its least value where the profile of every rank of S is its target."""
    columns = jnp.sum(targets != 0, axis=1)

    def loss(trees, profiles, batch):
        row = jnp.argmin(jnp.abs(jnp.sum(profiles != 0, axis=1)[:, None] - columns[None]), axis=1)
        return jnp.sum(jnp.square(profiles - trees[row]) * batch["weights"])

    return loss


BATCHES = itertools.repeat({"tokens": np.zeros((9, 4), int), "weights": np.ones((9, 1), np.float32)})


@pytest.mark.parametrize("weights", [None, (1.0, 0.0, 8.0)])
def test_calibration_finds_the_numbers_of_every_rank(weights):
    """Also of one that has no weight in training."""
    hierarchy = RankHierarchy((1, 2, 6), "sqrt", weights)
    targets = jnp.array([[3.0, 0, 0, 0, 0, 0], [0.5, 2.0, 0, 0, 0, 0], [1.0, 2.0, 3.0, 0.1, 0.2, 0.3]])
    options = dict(trained_profile=hierarchy.lora(), batches=BATCHES, key=jax.random.key(0))
    found = calibrate(squared(targets), targets, hierarchy, steps=300, learning_rate=0.3, **options)
    np.testing.assert_allclose(found, targets, atol=0.02)
    few = calibrate(squared(targets), targets, hierarchy, steps=1, learning_rate=0.1, **options)
    fixed = [hierarchy.prefix, hierarchy.nested, lambda r: hierarchy.lora() * (np.arange(6) < r)]
    for r, row, target in zip((1, 2, 6), few, targets, strict=True):
        best = min((np.asarray(p(r)) for p in fixed), key=lambda p: np.sum((p - target) ** 2))
        np.testing.assert_allclose(np.abs(row[:r] / best[:r] - 1), 0.1, rtol=1e-4)
        assert not np.any(row[r:])


@pytest.mark.parametrize("scaling", ["none", "rank", "sqrt"])
@pytest.mark.parametrize("best", ["prefix", "nested", "masked"])
def test_calibration_is_no_worse_than_a_fixed_read_out(scaling, best):
    """At the default steps and rate, for every rank, though the diagonal of the paper is far from the prefix."""
    hierarchy = RankHierarchy((1, 2, 4, 8, 16), scaling, tuple(1 / r for r in (1, 2, 4, 8, 16)))
    targets = jnp.stack([getattr(hierarchy, best)(r) for r in hierarchy.ranks])
    targets *= 1 + 0.2 * np.sin(1 + np.arange(targets.size)).reshape(targets.shape)
    options = DEFAULTS["calibration"]
    found = calibrate(
        squared(targets), targets, hierarchy, hierarchy.matryoshka(), BATCHES,
        steps=options["steps"], learning_rate=options["learning_rate"], key=jax.random.key(0),
    )  # fmt: skip
    for name in ("prefix", "nested", "masked"):
        fixed = np.stack([getattr(hierarchy, name)(r) for r in hierarchy.ranks])
        assert np.all(np.sum((found - targets) ** 2, axis=1) < np.sum((fixed - targets) ** 2, axis=1))


def test_what_b_is_given_is_summed_up_layer_by_layer():
    def layer(key):
        return nnx.Linear(D, F, rngs=nnx.Rngs(key))

    class Stack(nnx.Module):
        def __init__(self):
            graphdef = nnx.graphdef(layer(jax.random.key(0)))
            states = jax.vmap(lambda key: nnx.state(layer(key)))(jax.random.split(jax.random.key(0), L))
            self.layers = nnx.merge(graphdef, states)

    model = watch_inputs(adapt(Stack(), R, ("layers",), key=jax.random.key(1)))
    graphdef, base, adapter, profile, grams = split(model, mutable=InputGram)
    x = np.random.default_rng(0).normal(size=(4, 6, D)).astype(np.float32)
    real = (np.arange(6) < np.array([[6], [2], [3], [1]])).astype(np.float32)
    p = np.array([3.0, 2.0, 2.0, 1.0, 1.0], np.float32)
    values = set_profile(profile, jnp.asarray(real[..., None] * p), per_example=True)

    def one(state, gram):
        layers = nnx.merge(graphdef, base, adapter, values, grams).layers
        graph, _ = nnx.split(layers)
        single = nnx.merge(graph, state, gram)
        single(jnp.asarray(x))
        return nnx.state(single, InputGram)

    layers = nnx.merge(graphdef, base, adapter, values, grams).layers
    _, gram, rest = nnx.split(layers, InputGram, ...)
    found = jax.vmap(one)(rest, gram)["gram"]
    for number in range(L):
        hidden = (x @ np.asarray(adapter["layers"]["a"])[number] * p)[real > 0]
        np.testing.assert_allclose(found[number], hidden.T @ hidden, rtol=1e-4)
