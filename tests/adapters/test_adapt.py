"""adapt and split on models that are not ours: what is wrapped, shared, differentiated, read out and refused."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from mlora_jax import RankHierarchy, adapt, fold, set_dropout_key, set_profile, split, truncate
from mlora_jax.adapters import AdaptedLinear, AdapterParam, RankProfile
from tests.adapters.layer_cases import forward
from tests.foreign import (
    MODELS,
    PERCEPTRON_LAYERS,
    WIDTH,
    LaxScan,
    NNXScan,
    Perceptron,
    Unrolled,
    build,
    randomize_b,
)

R = 4
HIERARCHY = RankHierarchy((1, 2, 4), "sqrt")
KEY = jax.random.key(5)
X = jax.random.normal(jax.random.key(1), (5, WIDTH))


def adapted(name, targets=(".*",), *, trained=True, **options):
    """An adapted model; `trained` gives B random values in place of zeros."""
    model = adapt(build(name), R, targets, key=KEY, **options)
    if trained:
        randomize_b(model, KEY)
    return model


def paths(tree):
    return {".".join(map(str, path)) for path, _ in nnx.to_flat_state(tree)}


@pytest.mark.parametrize("name", MODELS)
def test_a_fresh_adapter_computes_the_base_model_bit_for_bit(name):
    model = build(name)
    new = adapt(model, R, (".*",), key=KEY)
    np.testing.assert_array_equal(new(X), model(X))
    run, *trees = forward(new)
    graphdef, state = nnx.split(model)
    base = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x))(state, X)
    np.testing.assert_array_equal(run(*trees, X), base)


@pytest.mark.parametrize("name", MODELS)
def test_rank_zero_is_the_base_model_bit_for_bit(name):
    run, base, adapter, profile = forward(adapted(name))
    fresh = jax.tree.map(jnp.zeros_like, adapter)
    zero = set_profile(profile, HIERARCHY.prefix(0))
    full = set_profile(profile, HIERARCHY.prefix(R))
    np.testing.assert_array_equal(run(base, adapter, zero, X), run(base, fresh, full, X))
    assert np.max(np.abs(run(base, adapter, full, X) - run(base, adapter, zero, X))) > 0.05


def test_every_container_is_searched_and_a_shared_layer_stays_shared():
    model = adapt(Perceptron(nnx.Rngs(0)), R, (".*",), key=KEY)
    assert isinstance(model.encoder, AdaptedLinear) and model.encoder is model.decoder
    wrapped = [model.blocks[0].layers[0], model.blocks[0].layers[2], model.blocks[1], *model.heads.values()]
    wrapped += [model.plain[0], model.plain[1]["inner"], model.plain[2][0]]
    assert all(isinstance(layer, AdaptedLinear) for layer in wrapped)
    assert model.blocks[0].layers[1] is nnx.relu
    _, base, adapter, profile = split(model)
    layers = set(PERCEPTRON_LAYERS) - {"encoder"}  # NNX keeps shared arrays at one path
    assert paths(adapter) == {f"{layer}.{name}" for layer in layers for name in "ab"}
    assert paths(profile) == {f"{layer}.p" for layer in layers}
    assert {"norm.scale", "heads.left.base.kernel", "heads.left.base.bias"} <= paths(base)


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (("encoder",), {"decoder"}),
        (("heads.left",), {"heads.left"}),
        (("left", "right"), {"heads.left", "heads.right"}),
        ((r"heads\..*",), {"heads.left", "heads.right"}),
        ((r"blocks\.\d\.layers\.\d", "inner"), {"blocks.0.layers.0", "blocks.0.layers.2", "plain.1.inner"}),
        (["left|1"], {"heads.left", "blocks.1"}),
        ((r"layers\.0",), {"blocks.0.layers.0"}),
    ],
)
def test_patterns_match_whole_paths_or_whole_tails(targets, expected):
    _, _, adapter, _ = split(adapt(Perceptron(nnx.Rngs(0)), R, targets, key=KEY))
    assert {path[:-2] for path in paths(adapter)} == expected


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (("lefft",), "target 'lefft' matches no linear layer; did you mean 'left'\\? Linear layers here: .*heads.left"),
        (("eft",), "target 'eft' matches no linear layer"),  # a tail begins after a dot
        (("left", "middle"), r"target 'middle' matches no linear layer\..*blocks\.0\.layers\.0.*plain\.2\.0"),
        (("norm",), "target 'norm' matches no linear layer"),
        ("left", "targets must be a sequence of patterns, got the string 'left'"),
        ((), "targets must name at least one pattern"),
        (("le(ft",), r"target 'le\(ft' is no regular expression: .*"),
        (("le)|(ft",), r"target 'le\)\|\(ft' is no regular expression"),
    ],
)
def test_bad_targets_are_refused(targets, message):
    with pytest.raises(ValueError, match=message):
        adapt(Perceptron(nnx.Rngs(0)), R, targets, key=KEY)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 0}, r"rank must be an integer in 1\.\., got 0"),
        ({"rank": 2.0}, r"rank must be an integer in 1\.\., got 2\.0"),
        ({"init": "xavier"}, "unknown init 'xavier'; known: fan_rank, fan_in"),
        ({"dropout": 1.0}, r"adapter dropout must be in \[0, 1\), got 1\.0"),
        ({"dropout": -0.1}, r"adapter dropout must be in \[0, 1\), got -0\.1"),
        ({"dropout": float("nan")}, r"adapter dropout must be in \[0, 1\), got nan"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        adapt(Perceptron(nnx.Rngs(0)), **({"rank": R, "targets": ("left",), "key": KEY} | arguments))


def test_adapting_twice_and_splitting_a_bare_model_are_refused():
    model = Perceptron(nnx.Rngs(0))
    with pytest.raises(ValueError, match="already has adapters; adapt the base model instead"):
        adapt(adapt(model, R, ("left",), key=KEY), R, ("right",), key=KEY)
    with pytest.raises(ValueError, match=r"no adapters: call adapt\(model, rank, targets"):
        split(model)
    with pytest.raises(ValueError, match=r"target '\.\*' matches no linear layer.* here: none"):
        adapt(nnx.LayerNorm(3, rngs=nnx.Rngs(0)), R, (".*",), key=KEY)


class Tied(nnx.Module):
    """Two layers with one kernel, of which a third holder is an embedding."""

    def __init__(self, rngs):
        self.first, self.second = (nnx.Linear(WIDTH, WIDTH, rngs=rngs) for _ in range(2))
        self.embed, self.free = nnx.Embed(WIDTH, 3, rngs=rngs), nnx.Linear(WIDTH, 3, rngs=rngs)
        self.second.kernel = self.first.kernel
        self.heads = nnx.data([nnx.Linear(WIDTH, 3, rngs=rngs)])
        self.heads[0].kernel = self.embed.embedding
        self.again = self.free  # a layer that is shared as a whole is not tied to another

    def __call__(self, x):
        return self.free(self.second(self.first(x))) + self.heads[0](x)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (("second",), r"second\.kernel and first\.kernel are one variable"),
        (("first",), r"first\.kernel and second\.kernel are one variable"),
        (("first", "second"), r"first\.kernel and second\.kernel are one variable.*of its own"),
        ((r"heads\.0",), r"heads\.0\.kernel and embed\.embedding are one variable"),
    ],
)
def test_a_kernel_that_is_tied_to_another_layer_is_refused(targets, message):
    model = Tied(nnx.Rngs(0))
    with pytest.raises(ValueError, match=message):
        adapt(model, R, targets, key=KEY)
    new = adapt(model, R, ("free",), key=KEY)
    assert isinstance(new.free, AdaptedLinear) and new.again is new.free


def test_the_given_model_is_left_alone_and_its_arrays_are_shared():
    model = Perceptron(nnx.Rngs(0))
    before = nnx.to_pure_dict(nnx.state(model))
    new = adapt(model, R, (".*",), key=KEY)
    assert not any(isinstance(module, AdaptedLinear) for _, module in nnx.iter_modules(model))
    jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(nnx.state(model)), before)
    assert new.heads.left.base.kernel[...] is model.heads.left.kernel[...]
    assert new.norm.scale[...] is model.norm.scale[...]
    new.heads.left.base.kernel[...] += 1.0
    np.testing.assert_array_equal(model.heads.left.kernel[...], before["heads"]["left"]["kernel"])


def test_an_adapted_layer_tells_its_features_and_bias_and_refuses_its_kernel():
    model = adapt(Perceptron(nnx.Rngs(0)), R, ("left", r"blocks\.0\.layers\.2"), key=KEY)
    left = model.heads.left
    assert (left.in_features, left.out_features) == (WIDTH, 4) and left.bias is left.base.bias
    assert model.blocks[0].layers[2].bias is None
    with pytest.raises(AttributeError, match=r"call the layer, read the frozen one at layer\.base\.kernel.*fold"):
        _ = left.kernel
    assert not hasattr(left, "kernel")


def test_a_lone_linear_layer_is_a_model_too():
    model = adapt(nnx.Linear(WIDTH, 3, rngs=nnx.Rngs(0)), R, ("model",), key=KEY)
    _, base, adapter, profile = split(model)
    assert paths(base) == {"base.kernel", "base.bias"} and paths(adapter) == {"a", "b"} and paths(profile) == {"p"}
    folded = fold(base, adapter, profile)
    np.testing.assert_array_equal(folded["base"]["kernel"][...], model.base.kernel[...])


@pytest.mark.parametrize("name", MODELS)
def test_factors_lead_with_the_axes_of_their_kernel(name):
    for _, module in nnx.iter_modules(adapt(build(name), R, (".*",), key=KEY)):
        if isinstance(module, AdaptedLinear):
            *leading, D, F = module.base.kernel.shape
            assert module.a.shape == (*leading, D, R) and module.b.shape == (*leading, R, F)
            assert module.p.shape == (*leading, R) and np.all(module.p[...] == 1)
            assert not np.any(module.b[...]) and np.all(np.abs(module.a[...]) <= R**-0.5)
    stacked = adapt(NNXScan(nnx.Rngs(0)), R, ("up",), key=KEY, init="fan_in").layers.up
    assert stacked.a.shape == (3, WIDTH, R)
    assert WIDTH**-0.5 * 0.8 < np.max(np.abs(stacked.a[...])) <= WIDTH**-0.5 < R**-0.5
    assert len(np.unique(stacked.a[...])) == 3 * WIDTH * R


def test_the_initial_a_of_a_layer_does_not_depend_on_the_other_targets():
    make = lambda targets, key=KEY: adapt(Perceptron(nnx.Rngs(0)), R, targets, key=key)  # noqa: E731
    everything, left = make((".*",)), make(("left",))
    np.testing.assert_array_equal(everything.heads.left.a[...], left.heads.left.a[...])
    by_name = [make((name,)).encoder.a[...] for name in ("encoder", "decoder")]  # one layer, two names
    np.testing.assert_array_equal(*by_name)
    assert np.all(left.heads.left.a[...] != everything.heads.right.a[...])
    assert np.all(left.heads.left.a[...] != make(("left",), jax.random.key(6)).heads.left.a[...])


@pytest.mark.parametrize("name", MODELS)
def test_split_sorts_every_variable_into_its_tree_and_merge_undoes_it(name):
    model = adapted(name)
    graphdef, base, adapter, profile = split(model)
    for tree, kind in ((adapter, AdapterParam), (profile, RankProfile), (base, nnx.Param)):
        assert all(type(leaf) is kind for _, leaf in nnx.to_flat_state(tree))
    assert paths(base) | paths(adapter) | paths(profile) == paths(nnx.state(model))
    np.testing.assert_array_equal(nnx.merge(graphdef, base, adapter, profile)(X), model(X))


@pytest.mark.parametrize("name", MODELS)
def test_prefix_and_truncate_and_fold_are_one_function(name):
    run, base, adapter, profile = forward(adapted(name))
    zero = set_profile(profile, HIERARCHY.prefix(0))
    for r in (1, 3, R):
        at_rank = set_profile(profile, HIERARCHY.prefix(r))
        expected = run(base, adapter, at_rank, X)
        short = truncate(adapter, r)
        assert all(min(leaf.shape[-2:]) <= r for leaf in jax.tree.leaves(short))
        tolerance = {"rtol": 0, "atol": 2e-6 * float(jnp.max(jnp.abs(expected)))}
        np.testing.assert_allclose(run(base, short, truncate(at_rank, r), X), expected, **tolerance)
        np.testing.assert_allclose(run(fold(base, adapter, at_rank), adapter, zero, X), expected, **tolerance)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_truncated_model_reads_out_every_smaller_rank(dropout):
    model = adapted("lax.scan", dropout=dropout)
    model.eval()
    run, base, adapter, profile = forward(model)
    profile = set_dropout_key(profile, KEY)
    short, short_profile, hierarchy = truncate(adapter, 3), truncate(profile, 3), HIERARCHY.truncate(3)
    for q in range(4):
        expected = run(base, adapter, set_profile(profile, HIERARCHY.prefix(q)), X)
        got = run(base, short, set_profile(short_profile, hierarchy.prefix(q)), X)
        np.testing.assert_allclose(got, expected, rtol=0, atol=2e-6 * float(jnp.max(jnp.abs(expected))))
    rows = jnp.stack([HIERARCHY.prefix(r) for r in (1, 3, 0, 2, 3)])
    per_example = set_profile(profile, rows, per_example=True)
    expected = run(base, adapter, per_example, X)
    got = run(base, short, truncate(per_example, 3), X)
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-6 * float(jnp.max(jnp.abs(expected))))


@pytest.mark.parametrize("kind", [NNXScan, LaxScan])
def test_a_stack_equals_its_layers_one_by_one(kind):
    model = adapted("nnx.scan")
    stack, flat = adapt(kind(nnx.Rngs(0)), R, (".*",), key=KEY), Unrolled(model)
    nnx.update(stack, nnx.state(model))
    assert isinstance(flat.layers[1].up, AdaptedLinear) and flat.layers[1].up.a.shape == (WIDTH, R)
    for r in (0, 2, R):
        for copy in (stack, flat):
            for _, module in nnx.iter_modules(copy):
                if isinstance(module, AdaptedLinear):
                    module.p[...] = jnp.broadcast_to(HIERARCHY.nested(r), module.p.shape)
        np.testing.assert_allclose(stack(X), flat(X), rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", MODELS)
def test_training_moves_the_adapter_alone_and_lowers_the_loss(name):
    model = adapt(build(name), R, (".*",), key=KEY)
    graphdef, base, adapter, profile = split(model)
    profile = set_profile(profile, HIERARCHY.matryoshka())
    optimizer = optax.adam(1e-2)
    goal = jax.random.normal(jax.random.key(3), model(X).shape)

    @jax.jit
    def step(adapter, state):
        def loss(adapter):
            return jnp.mean((nnx.merge(graphdef, base, adapter, profile, copy=True)(X) - goal) ** 2)

        value, gradient = jax.value_and_grad(loss)(adapter)
        updates, state = optimizer.update(gradient, state, adapter)
        return optax.apply_updates(adapter, updates), state, value, gradient

    state, losses = optimizer.init(adapter), []
    for _ in range(25):
        adapter, state, value, gradient = step(adapter, state)
        losses.append(float(value))
    assert jax.tree.structure(gradient) == jax.tree.structure(adapter)
    assert all(np.any(np.asarray(leaf) != 0) for leaf in jax.tree.leaves(gradient))
    assert losses[-1] < 0.5 * losses[0]
    assert step._cache_size() == 1
    jax.tree.map(np.testing.assert_array_equal, base, split(adapt(build(name), R, (".*",), key=KEY))[1])


@pytest.mark.parametrize("name", ["perceptron", "lax.scan"])
def test_columns_that_no_rank_uses_get_no_gradient(name):
    run, base, adapter, profile = forward(adapted(name))
    gradient = jax.jit(jax.grad(lambda adapter, profile: jnp.sum(run(base, adapter, profile, X) ** 2)))
    for r in (0, 1, 3):
        for path, leaf in nnx.to_flat_state(gradient(adapter, set_profile(profile, HIERARCHY.prefix(r)))):
            axis = {"a": -1, "b": -2}[path[-1]]
            columns = np.moveaxis(np.asarray(leaf[...]), axis, 0).reshape(R, -1)
            assert not np.any(columns[r:]), path
            assert np.all(np.any(columns[:r] != 0, axis=1)), path


def test_the_base_computes_in_its_own_dtype_and_the_factors_stay_float32():
    model = nnx.Linear(WIDTH, 3, param_dtype=jnp.bfloat16, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    new = adapt(model, R, (".*",), key=KEY)
    assert new.a.dtype == new.b.dtype == new.p.dtype == jnp.float32
    assert new(X).dtype == jnp.bfloat16
    np.testing.assert_array_equal(new(X), model(X))
    graphdef, base, adapter, profile = split(new)
    gradient = jax.grad(lambda a: jnp.sum(nnx.merge(graphdef, base, a, profile)(X)).astype(float))(adapter)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(gradient))
    folded = fold(base, adapter, profile)
    assert folded["base"]["kernel"].dtype == jnp.bfloat16
    with jax.enable_x64(True):
        wide = adapt(nnx.Linear(WIDTH, 3, param_dtype=jnp.float64, rngs=nnx.Rngs(0)), R, (".*",), key=KEY)
        assert wide.a.dtype == wide.p.dtype == wide(jnp.ones((2, WIDTH))).dtype == jnp.float64
