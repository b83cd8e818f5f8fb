"""Random numbers and batch statistics are threaded or refused; adapter dropout is explicit."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from mlora_jax import adapt, set_dropout_key, set_profile, split
from mlora_jax.adapters import AdaptedLinear, AdapterParam, DropoutKey
from tests.foreign import WIDTH, LaxScan, Noisy, Perceptron

R = 3
KEY = jax.random.key(5)
MUTABLE = (nnx.RngState, nnx.BatchStat)
X = jax.random.normal(jax.random.key(1), (8, WIDTH))
GOAL = jax.random.normal(jax.random.key(2), (8, 3))


def noisy():
    """Adapted, in training mode, with random B."""
    model = adapt(Noisy(nnx.Rngs(0)), R, ("inner", "out"), key=KEY)
    for layer in (model.inner, model.out):
        layer.b[...] = 0.3 * jax.random.normal(KEY, layer.b.shape)
    return model


def loss(model):
    return jnp.mean((model(X) - GOAL) ** 2)


def test_variables_that_a_call_would_write_are_refused_by_path():
    with pytest.raises(ValueError, match=r"update 4 variables") as error:
        split(noisy())
    for words in ("norm.mean", "norm.var", "dropout.rngs.count", "dropout.rngs.key", "model.eval()", "mutable="):
        assert words in str(error.value)


@pytest.mark.parametrize(
    ("mutable", "left"), [(nnx.RngState, ["norm.mean", "norm.var"]), (nnx.BatchStat, ["rngs.count", "rngs.key"])]
)
def test_threading_a_part_refuses_the_rest(mutable, left):
    with pytest.raises(ValueError, match="update 2 variables") as error:
        split(noisy(), mutable=mutable)
    assert all(path in str(error.value) for path in left)


def test_half_a_model_in_evaluation_mode_is_still_refused():
    model = noisy()
    model.dropout.eval()
    with pytest.raises(ValueError, match=r"update 2 variables.*norm\.mean"):
        split(model)
    model = noisy()
    model.norm.eval()
    with pytest.raises(ValueError, match=r"update 2 variables.*dropout\.rngs"):
        split(model)


class KeepsRngs(nnx.Module):
    """Stores its random numbers, and nothing of it has a mode."""

    def __init__(self, rngs):
        self.rngs, self.out = rngs, nnx.Linear(WIDTH, 3, rngs=rngs)

    def __call__(self, x):
        return self.out(x) + jax.random.normal(self.rngs.params(), (1, 3))


@pytest.mark.parametrize("evaluating", [False, True])
def test_random_numbers_without_a_mode_are_to_be_threaded(evaluating):
    model = adapt(KeepsRngs(nnx.Rngs(0)), R, ("out",), key=KEY)
    if evaluating:
        model.eval()
    with pytest.raises(ValueError, match=r"rngs\.default\.count.*thread it by mutable=nnx\.RngState$") as error:
        split(model)
    assert "eval()" not in str(error.value)
    model.deterministic = True  # a mode of its own
    split(model)
    del model.deterministic
    graphdef, *trees = split(model, mutable=nnx.RngState)
    assert nnx.merge(graphdef, *trees, copy=True)(X).shape == (8, 3)


def test_in_evaluation_mode_nothing_is_written_and_the_model_is_accepted():
    model = noisy()
    model.eval()
    graphdef, base, adapter, profile = split(model)
    run = jax.jit(lambda *trees: nnx.merge(graphdef, *trees)(X))
    np.testing.assert_array_equal(run(base, adapter, profile), run(base, adapter, profile))
    np.testing.assert_allclose(run(base, adapter, profile), model(X), rtol=0, atol=1e-6)
    assert "mean" in base["norm"] and "count" in base["dropout"]["rngs"]


def test_threaded_state_moves_and_equals_plain_nnx_training():
    model = noisy()
    graphdef, base, adapter, profile, threaded = split(model, mutable=MUTABLE)
    assert {type(leaf) for _, leaf in nnx.to_flat_state(threaded)} == {nnx.RngCount, nnx.RngKey, nnx.BatchStat}
    assert "mean" not in base["norm"] and "dropout" not in base
    optimizer = optax.adam(1e-2)
    plain_model = nnx.clone(model)  # NNX would write to the very variables that split gave out
    plain_optimizer = nnx.Optimizer(plain_model, optimizer, wrt=AdapterParam)

    @jax.jit
    def step(adapter, threaded, state):
        def objective(adapter):
            model = nnx.merge(graphdef, base, adapter, profile, threaded, copy=True)
            return loss(model), nnx.state(model, MUTABLE)

        (value, threaded), gradient = jax.value_and_grad(objective, has_aux=True)(adapter)
        updates, state = optimizer.update(gradient, state, adapter)
        return optax.apply_updates(adapter, updates), threaded, state, value

    @nnx.jit
    def plain_step(model, optimizer):
        value, gradient = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, AdapterParam))(model)
        optimizer.update(model, gradient)
        return value

    state, fresh, losses = optimizer.init(adapter), adapter, []
    for count in range(1, 6):
        before = threaded
        adapter, threaded, state, value = step(adapter, threaded, state)
        losses.append(float(value))
        assert float(value) == pytest.approx(float(plain_step(plain_model, plain_optimizer)), rel=1e-5)
        assert int(threaded["dropout"]["rngs"]["count"][...]) == count
        for name in ("mean", "var"):
            assert np.all(np.asarray(threaded["norm"][name][...] != before["norm"][name][...]))
    assert step._cache_size() == 1
    for ours, plain in ((adapter, AdapterParam), (threaded, MUTABLE)):
        for (path, got), (_, expected) in zip(
            nnx.to_flat_state(ours), nnx.to_flat_state(nnx.state(plain_model, plain)), strict=True
        ):
            if not jnp.issubdtype(got[...].dtype, jax.dtypes.prng_key):
                np.testing.assert_allclose(got[...], expected[...], rtol=0, atol=2e-6, err_msg=str(path))
    # From the first adapter again, the loss differs by the state alone: another mask.
    moved = float(step(fresh, threaded, optimizer.init(fresh))[3])
    assert abs(moved - losses[0]) > 1e-3


def identity_stack(dropout, layers=3, width=64):
    """Stacked layers that each return their dropped input: zero kernel, A and B the identity. x -> [L, B, D]."""

    class Parallel(nnx.Module):
        def __init__(self):
            make = nnx.vmap(lambda rngs: nnx.Linear(width, width, use_bias=False, rngs=rngs))
            self.layers = make(nnx.Rngs(0).split(layers))

        def __call__(self, x):
            graphdef, state = nnx.split(self.layers)
            return jax.lax.scan(lambda _, layer: (None, nnx.merge(graphdef, layer)(x)), None, state)[1]

    model = adapt(Parallel(), width, ("layers",), key=KEY, dropout=dropout)
    eye = jnp.broadcast_to(jnp.eye(width), (layers, width, width))
    model.layers.base.kernel[...] *= 0.0
    model.layers.a[...], model.layers.b[...] = eye, eye
    return model


def keyed_run(model):
    graphdef, base, adapter, profile = split(model)
    run = jax.jit(lambda profile, x: nnx.merge(graphdef, base, adapter, profile, copy=True)(x))
    return run, profile


def test_adapter_dropout_without_a_key_is_refused():
    model = adapt(Perceptron(nnx.Rngs(0)), R, ("left",), key=KEY, dropout=0.5)
    graphdef, *trees = split(model)
    for call in (lambda: model(X), lambda: jax.jit(lambda *t: nnx.merge(graphdef, *t)(X))(*trees)):
        with pytest.raises(ValueError, match=r"no random key: pass set_dropout_key\(profile, key\).* model.eval\(\)"):
            call()


def test_masks_differ_by_key_and_layer_and_example_and_keep_the_mean():
    rate = 0.25
    run, profile = keyed_run(identity_stack(rate))
    x = jnp.ones((16, 64))
    first, again, other = (run(set_dropout_key(profile, jax.random.key(k)), x) for k in (0, 0, 1))
    assert run._cache_size() == 1
    np.testing.assert_array_equal(first, again)
    dropped = np.asarray(first) == 0
    np.testing.assert_allclose(first[~dropped], 1 / (1 - rate), rtol=1e-6)
    for a, b in ((dropped, np.asarray(other) == 0), (dropped[0], dropped[1]), (dropped[1], dropped[2])):
        # Independent masks disagree in 2 rate (1 - rate) of the places.
        assert np.mean(a != b) == pytest.approx(2 * rate * (1 - rate), abs=0.07)
    assert np.mean(dropped[:, 0] != dropped[:, 1]) > 0.2
    means = [run(set_dropout_key(profile, jax.random.key(k)), x).mean() for k in range(20)]
    spread = np.sqrt(rate / (1 - rate) / (first.size * len(means)))
    assert abs(np.mean(means) - 1.0) < 4.5 * spread


def test_modules_have_their_own_masks():
    model = adapt(Perceptron(nnx.Rngs(0)), R, ("left", "right", "decoder"), key=KEY, dropout=0.5)
    profile = set_dropout_key(split(model)[3], KEY)
    keys = [leaf[...] for _, leaf in nnx.to_flat_state(profile) if isinstance(leaf, DropoutKey)]
    assert len({tuple(np.asarray(jax.random.key_data(key))) for key in keys}) == 3
    stacked = split(adapt(LaxScan(nnx.Rngs(0)), R, ("up",), key=KEY, dropout=0.5))[3]
    assert set_dropout_key(stacked, KEY)["layers"]["up"]["dropout_key"].shape == (3,)


def test_dropout_touches_the_adapter_and_not_the_base():
    model = adapt(Perceptron(nnx.Rngs(0)), R, (".*",), key=KEY, dropout=0.5)
    run, profile = keyed_run(model)
    bare, zero = keyed_run(adapt(Perceptron(nnx.Rngs(0)), R, (".*",), key=KEY))
    keyed = set_dropout_key(profile, KEY)
    np.testing.assert_array_equal(run(keyed, X), bare(zero, X))  # B = 0: the base model, whatever the mask


def test_evaluation_mode_is_exact_and_needs_no_key():
    dropping, plain = identity_stack(0.5), identity_stack(0.0)
    dropping.eval()
    (run, profile), (expected, zero) = keyed_run(dropping), keyed_run(plain)
    x = jax.random.normal(KEY, (4, 64))
    for tree in (profile, set_dropout_key(profile, KEY)):
        np.testing.assert_array_equal(run(tree, x), expected(zero, x))
    dropping.train()
    run, profile = keyed_run(dropping)
    assert np.any(run(set_dropout_key(profile, KEY), x) != expected(zero, x))


def test_rate_zero_has_no_key_and_no_random_numbers():
    model = identity_stack(0.0)
    _, profile = keyed_run(model)
    assert not any(isinstance(leaf, DropoutKey) for _, leaf in nnx.to_flat_state(profile))
    jax.tree.map(np.testing.assert_array_equal, set_dropout_key(profile, KEY), profile)
    graphdef, *trees = split(model)
    text = str(jax.make_jaxpr(lambda *t: nnx.merge(graphdef, *t)(jnp.ones((2, 64))))(*trees))
    assert "random" not in text and "threefry" not in text


def test_setting_a_profile_keeps_the_dropout_key_and_the_other_way_round():
    _, profile = keyed_run(identity_stack(0.5))
    p = jnp.arange(64.0)
    one = set_dropout_key(set_profile(profile, p), KEY)
    other = set_profile(set_dropout_key(profile, KEY), p)
    equal = jax.tree.map(lambda a, b: bool(jnp.all(a == b)), one, other)
    assert all(jax.tree.leaves(equal))
    np.testing.assert_array_equal(one["layers"]["p"][...], np.stack([p] * 3))


def test_dropout_is_traceable_under_vmap_over_trials():
    run, profile = keyed_run(identity_stack(0.5))
    x, keys = jnp.ones((4, 64)), jax.random.split(KEY, 3)
    together = jax.vmap(lambda key: run(set_dropout_key(profile, key), x))(keys)
    for k in range(3):
        np.testing.assert_array_equal(together[k], run(set_dropout_key(profile, keys[k]), x))


def test_adapters_of_a_model_follow_train_and_eval():
    model = adapt(Perceptron(nnx.Rngs(0)), R, (".*",), key=KEY, dropout=0.1)
    modes = lambda: {m.deterministic for _, m in nnx.iter_modules(model) if isinstance(m, AdaptedLinear)}  # noqa: E731
    assert modes() == {False}
    model.eval()
    assert modes() == {True}
    model.train()
    assert modes() == {False}
