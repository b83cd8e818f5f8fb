"""The decoder against a float64 NumPy rendering, and the same function under cache, packing and transforms."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mlora_jax.models.config import DecoderConfig, RopeScaling
from mlora_jax.models.decoder import REMAT, Decoder
from mlora_jax.models.decoder_layers import RMSNorm, rope_frequencies, segment_positions
from tests.oracles import numpy_decoder

CONFIG = DecoderConfig(
    vocab_size=37, hidden_size=24, intermediate_size=40, num_layers=3, num_heads=6, num_kv_heads=2, head_dim=8,
    rope_theta=100.0, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 16), rms_norm_eps=1e-5, attention_bias=True,
    mlp_bias=True, initializer_range=0.3,
)  # fmt: skip
TIED = DecoderConfig(
    vocab_size=37, hidden_size=24, intermediate_size=40, num_layers=2, num_heads=4, num_kv_heads=4,
    tie_word_embeddings=True, initializer_range=0.3,
)  # fmt: skip

# Everything in which layers may differ, normalised queries and keys, and a bias on some projections only.
MIXED = dataclasses.replace(
    CONFIG, sliding_window=5, sliding_layers=(True, False, True), rotary_layers=(True, False, True), qk_norm=True,
    attention_output_bias=False,
)  # fmt: skip
SLIDING = dataclasses.replace(TIED, sliding_window=4)

SHAPE = (2, 20)  # One shape wherever it does not matter: one compilation.


def make(config, dtype=jnp.float32, seed=0):
    """A decoder none of whose arrays is special: norms are not one, biases not zero."""
    random = np.random.default_rng(seed)
    model = nnx.eval_shape(lambda: Decoder(config, dtype=dtype, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(model)
    filled = []
    for path, leaf in nnx.to_flat_state(state):
        array = 0.35 * random.standard_normal(leaf.shape) + (path[-1] == "weight")
        filled.append((path, leaf.replace(jnp.asarray(array.astype(leaf.dtype)))))
    return nnx.merge(graphdef, nnx.from_flat_state(filled))


@functools.partial(jax.jit, static_argnums=0)
def _apply(graphdef, state, tokens, options):
    return nnx.merge(graphdef, state)(tokens, **options)


def logits_of(model, tokens, **options):
    """The compiled model; eagerly every small operation would compile on its own."""
    return np.asarray(_apply(*nnx.split(model), jnp.asarray(tokens), options))


def tokens_of(config, shape, seed=1):
    return np.random.default_rng(seed).integers(0, config.vocab_size, shape).astype(np.int32)


def named(model):
    return {".".join(path): np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(nnx.state(model))}


@pytest.mark.parametrize("config", [CONFIG, TIED, MIXED], ids=["untied", "tied", "mixed"])
def test_float64_equals_the_formulas(config):
    tokens = tokens_of(config, SHAPE)
    with jax.enable_x64(True):
        model = make(config, jnp.float64)
        logits = logits_of(model, tokens)
        assert logits.dtype == jnp.float64
        weights = named(model)
    expected = numpy_decoder.logits(weights, config, tokens)
    assert np.abs(expected).max() > 3
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("config", [CONFIG, TIED], ids=["untied", "tied"])
def test_float32_equals_the_formulas(config):
    tokens = tokens_of(config, SHAPE)
    model = make(config)
    logits = logits_of(model, tokens)
    assert logits.dtype == jnp.float32
    weights = {name: array.astype(np.float64) for name, array in named(model).items()}
    np.testing.assert_allclose(logits, numpy_decoder.logits(weights, config, tokens), rtol=0, atol=1e-4)


def test_attribute_names_and_the_layer_axis():
    state = named(make(CONFIG))
    assert state["layers.self_attn.q_proj.kernel"].shape == (3, 24, 48)
    assert state["layers.self_attn.k_proj.bias"].shape == (3, 16)
    assert state["layers.mlp.down_proj.kernel"].shape == (3, 40, 24)
    assert state["layers.input_layernorm.weight"].shape == (3, 24)
    assert state["lm_head.kernel"].shape == (24, 37)
    assert "lm_head.bias" not in state
    tied = make(TIED)
    assert not hasattr(tied, "lm_head")
    assert not [name for name in named(tied) if name.endswith("bias")]
    for module in (tied.layers.self_attn, tied.layers.mlp):
        projections = [value for name, value in vars(module).items() if name.endswith("_proj")]
        assert projections and all(type(projection) is nnx.Linear for projection in projections)


def test_fresh_weights_differ_between_layers_and_follow_the_seed():
    config = DecoderConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_layers=4, num_heads=4, initializer_range=0.05
    )
    first, again, other = (named(Decoder(config, rngs=nnx.Rngs(seed))) for seed in (0, 0, 1))
    for name in first:
        np.testing.assert_array_equal(first[name], again[name])
    kernels = [name for name in first if name.startswith("layers") and name.endswith("kernel")]
    drawn = [first[name][layer].ravel() for name in kernels for layer in range(4)]
    drawn += [first["embed_tokens.embedding"].ravel(), first["lm_head.kernel"].ravel(), other[kernels[0]][0].ravel()]
    assert len({array.tobytes() for array in drawn}) == len(drawn)
    for array in drawn:
        assert abs(array.std() - 0.05) < 0.003


def test_graphs_of_equal_models_are_equal():
    # What jit keys its cache on: another seed must not compile again.
    assert nnx.graphdef(make(CONFIG, seed=0)) == nnx.graphdef(make(CONFIG, seed=1))
    assert hash(nnx.graphdef(make(CONFIG, seed=0))) == hash(nnx.graphdef(make(CONFIG, seed=1)))


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize(
    ("config", "dtype"),
    [(CONFIG, jnp.float32), (CONFIG, jnp.float64), (MIXED, jnp.float32), (SLIDING, jnp.float32)],
    ids=["float32", "float64", "mixed", "sliding"],
)
def test_greedy_decoding_with_a_cache_equals_the_full_forward(config, dtype, stacked):
    with jax.enable_x64(dtype == jnp.float64):
        model = make(config, dtype)
        graphdef, state = nnx.split(model)
        full = jax.jit(lambda tokens: nnx.merge(graphdef, state)(tokens))

        @jax.jit
        def cached(tokens, positions, cache):
            model = nnx.merge(graphdef, state)
            hidden, cache = model.hidden(tokens, positions=positions, cache=cache)
            return model.head(hidden), cache

        lengths, new, tolerance = np.array([3, 9, 1, 6]), 8, 1e-11 if dtype == jnp.float64 else 1e-4
        prompt = tokens_of(config, (4, 9))  # What lies beyond a row's length is junk.
        cache = model.init_cache(4, 9 + new, stacked=stacked)
        heads, features, layers = config.num_kv_heads, config.head_dim, config.num_layers
        shapes = (4, heads, features, 17), (4, heads, 17, features)
        found = [leaf.shape for leaf in jax.tree.leaves(cache)]
        assert found == ([(layers, *shape) for shape in shapes] if stacked else [*shapes] * layers)
        assert {leaf.dtype for leaf in jax.tree.leaves(cache)} == {jnp.dtype(dtype)}
        logits, cache = cached(jnp.asarray(prompt), jnp.broadcast_to(jnp.arange(9), (4, 9)), cache)
        rows = [list(row[:length]) for row, length in zip(prompt, lengths, strict=True)]
        latest = np.asarray(logits)[np.arange(4), lengths - 1]
        for step in range(new):
            picked = latest.argmax(-1)
            for row, token in zip(rows, picked, strict=True):
                row.append(token)
            where = jnp.asarray(lengths + step)[:, None]
            logits, cache = cached(jnp.asarray(picked, jnp.int32)[:, None], where, cache)
            latest = np.asarray(logits)[:, 0]
            whole = np.zeros((4, 17), np.int32)
            for index, row in enumerate(rows):
                whole[index, : len(row)] = row
            expected = np.asarray(full(jnp.asarray(whole)))[np.arange(4), lengths + step]
            np.testing.assert_allclose(latest, expected, rtol=0, atol=tolerance)
            np.testing.assert_array_equal(latest.argmax(-1), expected.argmax(-1))


def test_a_token_is_written_where_its_position_says():
    model = make(TIED)
    graphdef, state = nnx.split(model)

    @jax.jit
    def write(positions, cache):
        return nnx.merge(graphdef, state).hidden(jnp.ones((2, 1), jnp.int32), positions=positions, cache=cache)[1]

    empty = model.init_cache(2, 4)
    for layer in write(jnp.array([[1], [3]]), empty):
        for changed in (np.any(layer.k != 0, axis=(1, 2)), np.any(layer.v != 0, axis=(1, 3))):  # [B, S]
            np.testing.assert_array_equal(changed, [[False, True, False, False], [False, False, False, True]])
    for leaf in jax.tree.leaves(write(jnp.full((2, 1), 4), empty)):
        np.testing.assert_array_equal(leaf, jnp.zeros_like(leaf))  # Beyond the cache.


def test_prefill_is_a_run_into_an_empty_cache():
    model, tokens = make(CONFIG), jnp.asarray(tokens_of(CONFIG, SHAPE))
    hidden, cache = model.prefill(tokens, 23)
    expected, by_steps = model.hidden(tokens, cache=model.init_cache(SHAPE[0], 23))
    np.testing.assert_allclose(hidden, expected, atol=1e-5)
    for mine, other in zip(jax.tree.leaves(cache), jax.tree.leaves(by_steps), strict=True):
        np.testing.assert_allclose(mine, other, atol=1e-5)
    again, _ = model.hidden(tokens, cache=model.init_cache(SHAPE[0], 23), layers=model.single_layers())
    np.testing.assert_array_equal(again, expected)
    _, stacked = model.prefill(tokens, 23, stacked=True)
    for mine, other in zip((stacked.k, stacked.v), zip(*cache, strict=True), strict=True):
        np.testing.assert_array_equal(mine, jnp.stack(other))


def test_a_step_of_decoding_copies_no_cache():
    """Beside the cache, which it was given to write in place, it needs little memory."""
    model = make(CONFIG)
    graphdef, state = nnx.split(model)

    def steps(state, cache):
        model = nnx.merge(graphdef, state)
        layers = model.single_layers()

        def one(step, cache):
            where = jnp.full((4, 1), step)
            return model.hidden(jnp.ones((4, 1), jnp.int32), positions=where, cache=cache, layers=layers)[1]

        return jax.lax.fori_loop(0, 9, one, cache)

    cache = model.init_cache(4, 4096)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
    compiled = jax.jit(steps, donate_argnums=1).lower(state, cache).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < size / 3  # One layer's keys and values.


def test_right_padding_changes_nothing_before_it():
    model = make(CONFIG)
    tokens = tokens_of(CONFIG, SHAPE)
    other = tokens.copy()
    other[:, 7:] = (other[:, 7:] + 1) % CONFIG.vocab_size
    first, second = logits_of(model, tokens), logits_of(model, other)
    np.testing.assert_allclose(first[:, :7], second[:, :7], rtol=0, atol=1e-6)
    assert np.abs(first[:, 7:] - second[:, 7:]).max() > 0.1


@pytest.mark.parametrize(
    ("config", "dtype"),
    [(CONFIG, jnp.float32), (CONFIG, jnp.float64), (MIXED, jnp.float32)],
    ids=["float32", "float64", "mixed"],
)
def test_packed_segments_equal_rows_of_their_own(config, dtype):
    lengths = (7, 1, 12)
    with jax.enable_x64(dtype == jnp.float64):
        model = make(config, dtype)
        tokens = tokens_of(CONFIG, SHAPE)
        segments = np.broadcast_to(np.repeat([4, 2, 3], lengths), SHAPE)  # Any labels do.
        packed = logits_of(model, tokens, segment_ids=jnp.asarray(segments))
        begin = 0
        for length in lengths:
            own = np.roll(tokens, -begin, axis=1)  # The segment first; what follows is padding.
            alone = logits_of(model, own)[:, :length]
            found = packed[:, begin : begin + length]
            np.testing.assert_allclose(found, alone, rtol=0, atol=1e-11 if dtype == jnp.float64 else 1e-4)
            begin += length
        assert np.abs(packed - logits_of(model, tokens))[:, lengths[0] :].max() > 0.1


def test_positions_begin_again_with_every_segment():
    segments = jnp.array([[1, 1, 1, 2, 2, 0, 0, 0], [3, 3, 3, 3, 3, 3, 3, 3], [1, 2, 3, 3, 4, 5, 5, 5]])
    positions = segment_positions(segments)
    expected = [[0, 1, 2, 0, 1, 0, 1, 2], [0, 1, 2, 3, 4, 5, 6, 7], [0, 0, 0, 1, 0, 0, 1, 2]]
    np.testing.assert_array_equal(positions, expected)
    assert positions.dtype == jnp.int32


def test_positions_reach_the_rotary_embedding():
    model = make(TIED)
    tokens = jnp.asarray(tokens_of(TIED, SHAPE))
    plain = logits_of(model, tokens)
    shifted = logits_of(
        model, tokens, positions=jnp.broadcast_to(jnp.arange(20) + 40, SHAPE)
    )  # Rotary positions are relative.
    stretched = logits_of(model, tokens, positions=jnp.broadcast_to(jnp.arange(20) * 3, SHAPE))
    np.testing.assert_allclose(shifted, plain, rtol=0, atol=2e-4)
    assert np.abs(stretched - plain).max() > 0.05


@pytest.mark.parametrize("config", [CONFIG, MIXED], ids=["full", "mixed"])
def test_continuations_share_a_context(config):
    """A row of a context and two continuations of it against one row for each."""
    model, (tokens, _) = make(config), tokens_of(config, SHAPE)
    segments = np.array([0] * 8 + [1] * 5 + [2] * 4 + [9] * 3)
    positions = np.where(segments == 2, np.arange(20) - 5, np.arange(20))
    options = {"segment_ids": segments, "positions": positions, "parent_ids": np.where(segments == 9, 9, 0)}
    found = logits_of(model, tokens[None], **{name: jnp.asarray(value)[None] for name, value in options.items()})[0]
    for segment in (1, 2):
        own = np.concatenate([tokens[:8], tokens[segments == segment], np.zeros(20, np.int32)])[:20]
        expected = logits_of(model, own[None])[0]
        count = (segments == segment).sum()
        np.testing.assert_allclose(found[segments == segment], expected[8 : 8 + count], atol=1e-4)
    np.testing.assert_allclose(found[:8], expected[:8], atol=1e-4)


def test_no_array_holds_the_masks_of_all_layers():
    """A window is a number in the scan; one that hides nothing costs nothing, one of all layers is outside the scan."""

    def masks(config, scanned):
        jaxpr = jax.make_jaxpr(make(config).hidden)(jnp.zeros(SHAPE, jnp.int32)).jaxpr
        (scan,) = (equation for equation in jaxpr.eqns if equation.primitive.name == "scan")
        equations = scan.params["jaxpr"].jaxpr.eqns if scanned else jaxpr.eqns
        shapes = [variable.aval.shape for variable in (*scan.invars, *scan.outvars)]
        assert not any(shape[-2:] == (20, 20) for shape in shapes if len(shape) > 4)
        return sum(equation.primitive.name == "ge" for equation in equations)

    assert [masks(MIXED, scanned) for scanned in (True, False)] == [1, 0]
    assert [masks(SLIDING, scanned) for scanned in (True, False)] == [0, 1]
    wide = dataclasses.replace(MIXED, sliding_window=20)
    assert [masks(wide, scanned) for scanned in (True, False)] == [0, 0]


def test_a_row_that_is_done_still_sees_something():
    """Decoding goes on with positions beyond the cache in rows that have ended."""
    model = make(SLIDING)
    cache = model.init_cache(1, 8)
    hidden, _ = model.hidden(jnp.ones((1, 1), jnp.int32), positions=jnp.array([[30]]), cache=cache)
    assert np.isfinite(hidden).all()


def test_a_shared_context_needs_segments_and_positions():
    model, tokens = make(CONFIG), jnp.zeros((1, 4), jnp.int32)
    for given in ({"segment_ids": tokens}, {"positions": tokens}):
        with pytest.raises(ValueError, match="parent_ids needs segment_ids and positions"):
            model.hidden(tokens, parent_ids=tokens, **given)


def test_segments_and_a_cache_exclude_each_other():
    model = make(TIED)
    tokens = jnp.zeros((1, 4), jnp.int32)
    with pytest.raises(ValueError, match="segment_ids and cache"):
        model.hidden(tokens, segment_ids=tokens, cache=model.init_cache(1, 4))


def test_llama3_frequencies_keep_short_waves_and_stretch_long_ones():
    config = DecoderConfig(
        vocab_size=8, hidden_size=128, intermediate_size=8, num_layers=1, num_heads=1, rope_theta=500000.0,
        rope_scaling=RopeScaling(32.0, 1.0, 4.0, 8192),
    )  # fmt: skip
    plain = 500000.0 ** (-np.arange(64) / 64)
    scaled = rope_frequencies(config)
    lengths = 2 * np.pi / plain
    short, long = lengths < 8192 / 4, lengths > 8192
    assert short.any() and long.any() and (~short & ~long).any()
    np.testing.assert_allclose(scaled[short], plain[short], rtol=1e-14)
    np.testing.assert_allclose(scaled[long], plain[long] / 32, rtol=1e-14)
    between = (scaled / plain)[~short & ~long]
    assert ((between > 1 / 32) & (between < 1) & (np.diff(between, prepend=1.0) < 0)).all()


class LowRank(nnx.Module):
    """An adapter of this test: wraps a stacked Linear with stacked factors and a profile per example."""

    def __init__(self, base, a, b, p):
        self.base, self.a, self.b, self.p = base, nnx.Variable(a), nnx.Variable(b), nnx.Variable(p)

    def __call__(self, x):
        p = self.p[...] if self.p.ndim == 1 else self.p[...][:, None]  # [R] or [B, 1, R]
        return self.base(x) + ((x @ self.a[...]) * jnp.expand_dims(p, range(x.ndim - p.ndim))) @ self.b[...]


def adapted(seed=0, profile=None, config=CONFIG):
    """The model with an adapter in q_proj and down_proj, and what belongs to the adapter, by path."""
    model, random = make(config), np.random.default_rng(seed)
    p = jnp.ones((config.num_layers, 4)) if profile is None else jnp.asarray(profile)
    for module, name in ((model.layers.self_attn, "q_proj"), (model.layers.mlp, "down_proj")):
        base = getattr(module, name)
        layers, inputs, outputs = base.kernel.shape
        a = jnp.asarray(random.standard_normal((layers, inputs, 4)) / 5, jnp.float32)
        b = jnp.asarray(random.standard_normal((layers, 4, outputs)) / 5, jnp.float32)
        setattr(module, name, LowRank(base, a, b, p))
    return model


def folded(model, profile):
    """The same function without the wrapper: W + A diag(p) B in a plain decoder; `profile` [L, R]."""
    plain = make(CONFIG)
    for place, name in ((("self_attn"), "q_proj"), (("mlp"), "down_proj")):
        wrapper, target = getattr(getattr(model.layers, place), name), getattr(getattr(plain.layers, place), name)
        product = jnp.einsum("ldr,lr,lrf->ldf", wrapper.a[...], jnp.asarray(profile), wrapper.b[...])
        target.kernel[...] = target.kernel[...] + product
    return plain


def test_an_adapter_in_a_projections_place_is_scanned_with_it():
    profile = np.random.default_rng(3).uniform(0, 1, (3, 4)).astype(np.float32)
    model = adapted(profile=profile)
    tokens = jnp.asarray(tokens_of(CONFIG, SHAPE))
    logits = logits_of(model, tokens)
    np.testing.assert_allclose(logits, logits_of(folded(model, profile), tokens), rtol=0, atol=1e-4)
    assert np.abs(logits - logits_of(make(CONFIG), tokens)).max() > 0.5


def test_a_profile_per_example_is_scanned_by_layer():
    profile = np.random.default_rng(3).uniform(0, 1, (3, 2, 4)).astype(np.float32)  # [L, B, R]
    model = adapted(profile=profile)
    tokens = jnp.asarray(tokens_of(CONFIG, SHAPE))
    together = logits_of(model, tokens)
    for example in range(2):
        alone = logits_of(folded(model, profile[:, example]), tokens)
        np.testing.assert_allclose(together[example], alone[example], rtol=0, atol=1e-4)


def test_one_function_under_jit_vmap_grad_and_remat():
    tokens = jnp.asarray(tokens_of(CONFIG, SHAPE))
    model = adapted(0)
    mine = lambda path, _: any(name in ("a", "b", "p") for name in path)  # noqa: E731
    graphdef, adapter, base = nnx.split(model, mine, ...)
    _, other, _ = nnx.split(adapted(1), mine, ...)
    model.remat = "full"
    remat_graphdef = nnx.graphdef(model)
    assert remat_graphdef != graphdef

    def objective(graphdef, adapter):
        logits = nnx.merge(graphdef, adapter, base)(tokens)
        return -jax.nn.log_softmax(logits)[..., 0].mean()

    gradient = jax.value_and_grad(objective, argnums=1)
    alone = jax.jit(lambda one: gradient(remat_graphdef, one))
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), adapter, other)
    losses, together = jax.jit(jax.vmap(lambda one: gradient(graphdef, one)))(stacked)
    expected = -jax.nn.log_softmax(logits_of(adapted(0), tokens))[..., 0].mean()
    np.testing.assert_allclose(losses[0], expected, rtol=1e-5)
    assert abs(losses[0] - losses[1]) > 1e-3
    for index, one in enumerate((adapter, other)):
        loss, gradients = alone(one)
        np.testing.assert_allclose(loss, losses[index], rtol=1e-5)
        for leaf, both in zip(jax.tree.leaves(gradients), jax.tree.leaves(together), strict=True):
            assert np.abs(leaf).max() > 1e-4
            np.testing.assert_allclose(leaf, both[index], rtol=1e-3, atol=1e-5)
    # What a layer keeps for the backward pass, stacked: without remat the inside of the SwiGLU block too.
    traced = [str(jax.make_jaxpr(lambda one, g=g: gradient(g, one))(adapter)) for g in (graphdef, remat_graphdef)]
    assert ["f32[3,2,20,40]" in text for text in traced] == [True, False]


def test_remat_policies_compute_the_same_and_keep_less():
    """Gradients are equal, and the more is computed again, the less memory the compiled gradient takes."""
    config = dataclasses.replace(CONFIG, num_layers=8)
    tokens = jnp.asarray(tokens_of(config, (4, 64)))
    model = adapted(0, config=config)
    mine = lambda path, _: any(name in ("a", "b", "p") for name in path)  # noqa: E731
    found, bytes_taken = {}, {}
    for policy in REMAT:
        model.remat = policy
        graphdef, adapter, base = nnx.split(model, mine, ...)

        def objective(adapter, graphdef=graphdef, base=base):
            return -jax.nn.log_softmax(nnx.merge(graphdef, adapter, base)(tokens))[..., 0].mean()

        # As trials are trained: under vmap, and the policy sees the products of one trial.
        stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), adapter)
        compiled = jax.jit(jax.vmap(jax.grad(objective))).lower(stacked).compile()
        found[policy] = jax.tree.leaves(compiled(stacked))
        bytes_taken[policy] = compiled.memory_analysis().temp_size_in_bytes
    assert bytes_taken["full"] < 0.7 * bytes_taken["dots"] and bytes_taken["dots"] < 0.9 * bytes_taken["none"]
    for policy in ("dots", "full"):
        for leaf, expected in zip(found[policy], found["none"], strict=True):
            np.testing.assert_allclose(leaf, expected, rtol=1e-4, atol=1e-6)


def test_an_adapter_wider_than_the_model_leaves_its_dtype_alone():
    model = make(CONFIG, jnp.bfloat16)
    for module in (model.layers.self_attn, model.layers.mlp):
        for name in [name for name in vars(module) if name.endswith("_proj")]:
            base = getattr(module, name)
            layers, inputs, outputs = base.kernel.shape
            wide = LowRank(base, jnp.ones((layers, inputs, 2)), jnp.ones((layers, 2, outputs)), jnp.ones((layers, 2)))
            setattr(module, name, wide)
    tokens = jnp.zeros(SHAPE, jnp.int32)
    assert jax.eval_shape(model.hidden, tokens).dtype == jnp.bfloat16
    hidden, cache = jax.eval_shape(lambda tokens: model.hidden(tokens, cache=model.init_cache(*SHAPE)), tokens)
    assert {hidden.dtype, *(leaf.dtype for leaf in jax.tree.leaves(cache))} == {jnp.dtype(jnp.bfloat16)}


class Counter(nnx.BatchStat):
    """State that a wrapped layer advances."""


class Noisy(nnx.Module):
    """Drops inputs of a stacked Linear and counts its calls."""

    def __init__(self, base, dropout, count):
        self.base, self.dropout, self.count = base, dropout, Counter(count)

    def __call__(self, x):
        self.count[...] += 1
        return self.base(self.dropout(x))


def test_random_state_inside_a_layer_advances():
    model = make(CONFIG)
    dropout = jax.vmap(lambda key: nnx.state(nnx.Dropout(0.5, rngs=nnx.Rngs(key))))(
        jax.random.split(jax.random.key(0), 3)
    )
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: nnx.Dropout(0.5, rngs=nnx.Rngs(0))))
    model.layers.mlp.up_proj = Noisy(model.layers.mlp.up_proj, nnx.merge(graphdef, dropout), jnp.arange(3))
    graphdef, state = nnx.split(model)

    @jax.jit
    def run(state):
        model = nnx.merge(graphdef, state)
        return model(jnp.asarray(tokens_of(CONFIG, SHAPE))), nnx.state(model)

    first, state = run(state)
    second, state = run(state)
    assert np.abs(first - second).max() > 0.01
    np.testing.assert_array_equal(nnx.merge(graphdef, state).layers.mlp.up_proj.count[...], jnp.arange(3) + 2)


def test_bfloat16_computes_in_bfloat16_and_reduces_in_float32():
    model = make(CONFIG, jnp.bfloat16)
    tokens = jnp.asarray(tokens_of(CONFIG, SHAPE))
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model))} == {jnp.dtype(jnp.bfloat16)}
    jaxpr, hidden = jax.make_jaxpr(lambda tokens: model.hidden(tokens), return_shape=True)(tokens)
    assert hidden.dtype == jnp.bfloat16
    text = str(jaxpr)
    assert "bf16[2,20,40]" in text and " f32[2,20,40]" not in text.replace(":", " ")  # The SwiGLU block's inside.
    assert "f32[2,2,20,20]" in text  # Scores of attention, per group.
    wide = make(CONFIG)
    nnx.update(wide, jax.tree.map(lambda x: x.astype(jnp.float32), nnx.state(model)))
    exact = logits_of(wide, tokens)
    assert np.abs(logits_of(model, tokens) - exact).max() < 0.05 * np.abs(exact).max()


@pytest.mark.parametrize("config", [CONFIG, TIED], ids=["untied", "tied"])
def test_logits_of_a_bfloat16_model_are_accumulated_in_float32(config):
    model = make(config, jnp.bfloat16)
    hidden = jnp.asarray(np.random.default_rng(0).standard_normal((5, 24)), jnp.bfloat16)
    weights = named(model)
    head = weights["lm_head.kernel"] if "lm_head.kernel" in weights else weights["embed_tokens.embedding"].T
    expected = np.asarray(hidden, np.float64) @ head.astype(np.float64)
    logits = model.head(hidden)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5)


def test_norm_of_bfloat16_is_the_exact_norm_rounded_once():
    norm = RMSNorm(4096, eps=1e-5, dtype=jnp.bfloat16)
    random = np.random.default_rng(0)
    norm.weight[...] = jnp.asarray(random.uniform(0.5, 2, 4096), jnp.bfloat16)
    x = jnp.asarray(100 * random.standard_normal((8, 4096)), jnp.bfloat16)
    wide = np.asarray(x, np.float64)
    exact = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-5) * np.asarray(norm.weight[...], np.float64)
    out = norm(x)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(out, np.float64), exact, rtol=2**-8 * 1.01)


def test_an_unknown_token_is_seen():
    logits = logits_of(make(TIED), np.array([[1, 2], [1, TIED.vocab_size]]))
    assert np.isfinite(logits[0]).all() and np.isnan(logits[1, 1]).all()
