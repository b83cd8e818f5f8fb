"""set_profile: a profile per layer, per pattern, per example and per token is data, and means what it says."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mlora_jax import RankHierarchy, adapt, set_profile, split
from mlora_jax.adapters import AdaptedLinear, fold_where_cheaper
from tests.adapters.layer_cases import forward
from tests.foreign import MODELS, WIDTH, Unrolled, build, randomize_b

R, B, T = 4, 3, 2  # B is also the number of stacked layers: only per_example tells the two apart
HIERARCHY = RankHierarchy((1, 2, 4), "sqrt")
X = jax.random.normal(jax.random.key(1), (B, WIDTH))
TOKENS = jax.random.normal(jax.random.key(2), (B, T, WIDTH))
P_ROWS = jnp.stack([HIERARCHY.prefix(r) for r in (4, 0, 1)])  # [B, R]


def adapted(name):
    model = adapt(build(name), R, (".*",), key=jax.random.key(5))
    randomize_b(model, jax.random.key(6))
    return model


def values(tree):
    return {".".join(map(str, path[:-1])): np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(tree)}


def close(got, expected):
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-6 * float(np.max(np.abs(expected))))


@pytest.mark.parametrize("name", MODELS)
def test_one_profile_reaches_every_layer_and_every_stacked_layer(name):
    _, _, _, profile = split(adapted(name))
    before = values(profile)
    new = set_profile(profile, HIERARCHY.prefix(3))
    assert jax.tree.structure(new) == jax.tree.structure(profile)
    for path, p in values(new).items():
        assert p.shape == before[path].shape and p.dtype == np.float32
        np.testing.assert_array_equal(p, np.broadcast_to(HIERARCHY.prefix(3), p.shape))
    assert all(np.all(p == 1) for p in values(profile).values())  # the given tree is as it was


@pytest.mark.parametrize("name", MODELS)
def test_a_profile_per_example_serves_every_row_at_its_own_rank(name):
    run, base, adapter, profile = forward(adapted(name))
    together = run(base, adapter, set_profile(profile, P_ROWS, per_example=True), X)
    for row in range(B):
        alone = run(base, adapter, set_profile(profile, P_ROWS[row]), X)
        close(together[row], alone[row])
    assert np.max(np.abs(together - run(base, adapter, profile, X))) > 0.01


@pytest.mark.parametrize("name", MODELS)
def test_a_profile_per_token_serves_every_token_at_its_own_rank(name):
    run, base, adapter, profile = forward(adapted(name))
    ranks = np.array([[4, 0], [1, 2], [3, 4]])
    per_token = jnp.stack([jnp.stack([HIERARCHY.prefix(int(r)) for r in row]) for row in ranks])  # [B, T, R]
    together = run(base, adapter, set_profile(profile, per_token, per_example=True), TOKENS)
    for r in range(R + 1):
        alone = run(base, adapter, set_profile(profile, HIERARCHY.prefix(r)), TOKENS)
        close(together[ranks == r], alone[ranks == r])
    per_example = run(base, adapter, set_profile(profile, P_ROWS, per_example=True), TOKENS)
    for row in range(B):  # [B, R] on [B, T, D]: the time axis is inserted, also where B equals T or L
        close(per_example[row], run(base, adapter, set_profile(profile, P_ROWS[row]), TOKENS)[row])


@pytest.mark.parametrize("name", ["nnx.scan", "lax.scan"])
def test_a_profile_per_stacked_layer_is_not_a_profile_per_example(name):
    run, base, adapter, profile = forward(adapted(name))
    by_layer = set_profile(profile, {r"layers\..*": P_ROWS})
    flat = Unrolled(adapted(name))
    for layer, p in zip(flat.layers, P_ROWS, strict=True):
        layer.up.p[...], layer.down.p[...] = p, p
    got = run(base, adapter, by_layer, X)
    close(got, flat(X))
    per_example = set_profile(profile, {r"layers\..*": P_ROWS}, per_example=True)
    assert values(by_layer)["layers.up"].shape == (3, R)
    assert values(per_example)["layers.up"].shape == (3, B, R)
    assert np.max(np.abs(run(base, adapter, per_example, X) - got)) > 0.01


def test_a_plain_profile_may_follow_one_per_example():
    _, _, _, profile = split(adapted("lax.scan"))
    back = set_profile(set_profile(profile, P_ROWS, per_example=True), HIERARCHY.prefix(2))
    jax.tree.map(np.testing.assert_array_equal, back, set_profile(profile, HIERARCHY.prefix(2)))


def test_patterns_choose_layers_and_the_first_match_wins():
    _, _, _, profile = split(adapted("perceptron"))
    p = [HIERARCHY.prefix(r) for r in range(R + 1)]
    new = values(set_profile(profile, {"heads.left": p[1], r"heads\..*": p[2], r"blocks\.0\..*|decoder": p[3]}))
    expected = {"heads.left": p[1], "heads.right": p[2]}
    expected |= dict.fromkeys(("blocks.0.layers.0", "blocks.0.layers.2", "decoder"), p[3])
    for path, got in new.items():
        np.testing.assert_array_equal(got, expected.get(path, np.ones(R)), err_msg=path)


@pytest.mark.parametrize(
    ("p", "options", "message"),
    [
        (jnp.ones(R + 1), {}, r"must have shape \(4,\) or \(\d?,? ?4,?\), got \(5,\)"),
        (jnp.ones(()), {}, r"must have shape .* got \(\)"),
        (jnp.ones((7, R)), {}, r"got \(7, 4\); pass per_example=True"),
        (jnp.ones((B, 7, R)), {}, r"got \(3, 7, 4\); pass per_example=True"),
        (jnp.ones(R), {"per_example": True}, r"must end in R = 4, like \[B, R\]; got \(4,\)"),
        (jnp.ones((B, R + 1)), {"per_example": True}, r"must end in R = 4, like \[B, R\]; got \(3, 5\)"),
        ({"upp": jnp.ones(R)}, {}, "target 'upp' matches no linear layer; did you mean 'up'.*layers.down"),
        ({"up": jnp.ones(2)}, {}, r"a profile of layers.up must have shape \(4,\) or \(3, 4\), got \(2,\)"),
        ({"out": jnp.ones((3, R))}, {}, r"a profile of out must have shape \(4,\) or \(4,\), got \(3, 4\)"),
    ],
)
def test_a_profile_of_a_wrong_shape_is_refused(p, options, message):
    _, _, _, profile = split(adapted("lax.scan"))
    with pytest.raises(ValueError, match=message):
        set_profile(profile, p, **options)


def test_a_shared_layer_goes_by_its_first_path_and_an_empty_mapping_is_refused():
    model = adapt(build("perceptron"), R, ("encoder", "left"), key=jax.random.key(5))  # encoder is decoder
    _, _, _, profile = split(model)
    with pytest.raises(ValueError, match=r"target 'encoder' names a shared layer, which goes by decoder$"):
        set_profile(profile, {"encoder": HIERARCHY.prefix(1)})
    np.testing.assert_array_equal(
        values(set_profile(profile, {"decoder": HIERARCHY.prefix(1)}))["decoder"], HIERARCHY.prefix(1)
    )
    with pytest.raises(ValueError, match=r"an empty mapping sets no profile; layers here: decoder, heads\.left"):
        set_profile(profile, {})


def test_a_tree_without_profiles_is_refused():
    _, base, adapter, _ = split(adapted("lax.scan"))
    for tree in (base, adapter):
        with pytest.raises(ValueError, match="no rank profiles: pass the fourth value of split"):
            set_profile(tree, HIERARCHY.prefix(1))


@pytest.mark.parametrize("name", MODELS)
def test_one_executable_serves_every_rank(name):
    graphdef, base, adapter, profile = split(adapted(name))

    @jax.jit
    def run(adapter, p, x):
        return nnx.merge(graphdef, base, adapter, set_profile(profile, p), copy=True)(x)

    outputs = [run(adapter, HIERARCHY.prefix(r), X) for r in range(R + 1)]
    outputs += [run(adapter, p, X) for p in (HIERARCHY.lora(), HIERARCHY.matryoshka(), HIERARCHY.masked(2))]
    assert run._cache_size() == 1
    assert np.min([np.max(np.abs(a - b)) for a, b in itertools.pairwise(outputs[: R + 1])]) > 1e-3
    close(outputs[2], adapted_output(name, HIERARCHY.prefix(2)))


def adapted_output(name, p):
    """Set by hand on the module itself, without split or set_profile."""
    model = adapted(name)
    for _, module in nnx.iter_modules(model):
        if isinstance(module, AdaptedLinear):
            module.p[...] = jnp.broadcast_to(p, module.p.shape)
    return model(X)


@pytest.mark.parametrize("name", MODELS)
def test_trials_on_one_base_under_vmap_equal_one_by_one(name):
    run, base, adapter, profile = forward(adapted(name))
    adapters = [jax.tree.map(lambda leaf, k=k: leaf * (1.0 + k) + 0.1 * k, adapter) for k in range(3)]
    profiles = [set_profile(profile, p) for p in (HIERARCHY.lora(), HIERARCHY.matryoshka(), HIERARCHY.prefix(1))]
    stack = lambda trees: jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)  # noqa: E731
    together = jax.jit(jax.vmap(run, in_axes=(None, 0, 0, None)))(base, stack(adapters), stack(profiles), X)
    for k in range(3):
        close(together[k], run(base, adapters[k], profiles[k], X))
    by_rank = jax.jit(jax.vmap(lambda p: run(base, adapter, set_profile(profile, p), X)))(P_ROWS)
    for k, p in enumerate(P_ROWS):
        close(by_rank[k], run(base, adapter, set_profile(profile, p), X))


@pytest.mark.parametrize("bias", [False, True])
def test_folding_where_it_is_cheaper_changes_what_is_computed_and_not_the_result(bias):
    def run(x, p, *, folds, dtype=jnp.float32, per_example=False):
        layer = nnx.Linear(6, 5, use_bias=bias, dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(0))
        model = adapt(layer, 4, ("model",), key=jax.random.key(1))
        graphdef, base, adapter, profile = split(model)
        adapter = jax.tree.map(
            lambda leaf: jnp.cos(jnp.arange(leaf.size, dtype=leaf.dtype)).reshape(leaf.shape), adapter
        )

        def call(adapter, p):
            merged = nnx.merge(graphdef, base, adapter, set_profile(profile, p, per_example=per_example))
            return (fold_where_cheaper(merged) if folds else merged)(x.astype(dtype))

        shapes = {v.aval.shape for e in jax.make_jaxpr(call)(adapter, p).eqns for v in e.outvars}
        return call(adapter, p), (*x.shape[:-1], 4) in shapes  # x A

    many, few = (jnp.sin(jnp.arange(6.0 * 3 * n)).reshape(3, n, 6) for n in (20, 1))
    p = jnp.array([2.0, 1.0, 0.5, 0.0])
    plain, beside = run(many, p, folds=False)
    folded, beside_too = run(many, p, folds=True)
    assert beside and not beside_too
    np.testing.assert_allclose(folded, plain, rtol=1e-5, atol=1e-5)
    for x, profile, options in (
        (few, p, {}),  # too few tokens
        (many, jnp.stack([p] * 3), {"per_example": True}),
        (many, p, {"dtype": jnp.bfloat16}),  # the sum would be rounded
    ):
        assert run(x, profile, folds=True, **options)[1]
