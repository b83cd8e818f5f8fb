"""Adapters with a gate: profile times gate is what every product, tree function and file makes of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mlora_jax import adapt, fold, set_profile, split, squeeze, truncate
from mlora_jax.adapters import AdapterParam, InputGram, fold_where_cheaper, watch_inputs
from mlora_jax.core import GATE_INITIALIZERS
from mlora_jax.core.product import scale_ranks
from tests.adapters.layer_cases import (
    CASES,
    HIERARCHY,
    KEY,
    B,
    P,
    R,
    T,
    adapted,
    close,
    each_case,
    forward,
    frozen,
    frozen_of,
    some_cases,
)

ALL = jnp.array([1.5, 0.5, 2.0, 0.75])  # a profile without a zero


def gated(layer, **options):
    """(forward, base, adapter, profile) with random B and gates, none of which is one."""
    run, base, adapter, profile = forward(adapted(layer, gate="normal", **options))
    adapter["gate"][...] = adapter["gate"][...] + jnp.where(adapter["gate"][...] < 0, -0.25, 0.25)
    return run, base, adapter, profile


@each_case
def test_the_product_is_that_of_profile_times_gate_and_a_gate_of_ones_is_no_gate(name):
    case = CASES[name]
    layer, x = case.build(), case.x()
    plain_run, _, plain, plain_profile = forward(adapted(layer))
    run, base, adapter, profile = gated(layer)
    profile = set_profile(profile, P)
    assert set(plain) == {"a", "b"}
    ones = jax.tree.map(jnp.copy, adapter)
    ones["gate"][...] = jnp.ones_like(ones["gate"][...])
    np.testing.assert_array_equal(run(base, ones, profile, x), plain_run(base, plain, set_profile(plain_profile, P), x))
    assert adapter["gate"].shape == profile["p"].shape and isinstance(adapter["gate"], AdapterParam)
    scales = np.asarray(P, np.float64) * np.asarray(adapter["gate"][...], np.float64)
    expected = case.kernel(frozen(layer), adapter["a"], adapter["b"], scales)
    close(frozen_of(fold(base, adapter, profile)), expected, 1e-6)
    got = run(base, adapter, profile, x)
    frozen(layer)[...] = jnp.asarray(expected, jnp.float32)
    close(got, layer(x))


@some_cases
def test_prefix_is_truncate_is_fold_and_a_squeeze_keeps_the_function(name):
    case = CASES[name]
    x = case.x()
    run, base, adapter, profile = gated(case.build())
    zero = set_profile(profile, jnp.zeros(R))
    at_two = set_profile(profile, HIERARCHY.prefix(2))
    expected = run(base, adapter, at_two, x)
    assert np.max(np.abs(expected - run(base, adapter, zero, x))) > 0.05
    short = truncate(adapter, 2)
    assert short["gate"].shape == (*adapter["gate"].shape[:-1], 2)
    close(run(base, short, truncate(at_two, 2), x), expected)
    close(run(fold(base, adapter, at_two), adapter, zero, x), expected)
    keep = jnp.array([1.0, 1.0, 0.0, 0.0])
    scaled = scale_ranks(adapter, keep)
    np.testing.assert_array_equal(scaled["gate"], np.asarray(adapter["gate"][...]) * np.asarray(keep))
    close(run(base, scaled, set_profile(profile, HIERARCHY.prefix(2)), x), expected)
    trained = set_profile(profile, ALL)
    new, hierarchy = squeeze(adapter, trained)
    np.testing.assert_array_equal(new["gate"], np.ones_like(adapter["gate"]))
    close(run(base, new, set_profile(profile, hierarchy.prefix(R)), x), run(base, adapter, trained, x), 2e-5)


@some_cases
def test_gradients_reach_the_gate_and_only_where_the_profile_is_not_zero(name):
    case = CASES[name]
    run, base, adapter, profile = gated(case.build())
    profile = set_profile(profile, P)
    found = jax.jit(jax.grad(lambda adapter: jnp.sum(run(base, adapter, profile, case.x()) ** 2)))(adapter)
    # A factor of column i of A is a factor of entry i of the gate, and a factor of row i of B: Euler's identity.
    by_gate = adapter["gate"][...] * found["gate"][...]
    assert np.all(np.abs(by_gate[..., :3]) > 1e-3) and not np.any(found["gate"][...][..., 3])
    close(np.sum(adapter["a"][...] * found["a"][...], axis=-2), by_gate, 1e-5)
    close(np.sum(adapter["b"][...] * found["b"][...], axis=-1), by_gate, 1e-5)


@some_cases
def test_every_example_has_its_own_profile_times_the_one_gate(name):
    case = CASES[name]
    run, base, adapter, profile = gated(case.build())
    x, axis = case.x(), int(name == "batch axis")  # the first axis of x that is no group
    rows = jnp.stack([HIERARCHY.prefix(r) for r in (4, 0, 1)])
    got = np.moveaxis(run(base, adapter, set_profile(profile, rows, per_example=True), x), axis, 0)
    for row, p in enumerate(rows):
        alone = np.moveaxis(run(base, adapter, set_profile(profile, p), x), axis, 0)
        close(got[row], alone[row])


def test_a_stack_of_layers_has_a_gate_per_layer():
    case = CASES["linear"]
    stack = nnx.vmap(case.make, in_axes=0, out_axes=0)(nnx.Rngs(0).split(2))
    graphdef, base, adapter, profile = split(adapted(stack, gate="normal"))
    profile = set_profile(profile, P)
    assert adapter["gate"].shape == (2, R) and len(np.unique(adapter["gate"])) == 2 * R
    layer = lambda _, trees: (None, nnx.merge(graphdef, *trees)(case.x()))  # noqa: E731
    got = jax.lax.scan(layer, None, (base, adapter, profile))[1]
    for number in range(2):
        a, b, gate, w, bias = (
            np.asarray(leaf[...][number], np.float64)
            for leaf in (adapter["a"], adapter["b"], adapter["gate"], stack.kernel, stack.bias)
        )
        close(got[number], np.asarray(case.x()) @ (w + (a * np.asarray(P) * gate) @ b) + bias)


def test_folding_where_cheaper_and_watching_inputs_know_the_gate():
    case = CASES["linear"]
    model = adapted(case.build(), gate="normal")
    model.p[...] = P
    x = jax.random.normal(KEY, (64, 6))
    hidden = (np.asarray(x, np.float64) @ np.asarray(model.a)) * np.asarray(P) * np.asarray(model.gate)
    expected = model.base(x) + hidden @ np.asarray(model.b)
    close(model(x), expected)
    folding = fold_where_cheaper(nnx.clone(model))
    assert "platform_index" in str(jax.make_jaxpr(folding)(x))
    close(folding(x), expected)
    graphdef, base, adapter, profile, grams = split(watch_inputs(model), mutable=InputGram)
    watched = nnx.merge(graphdef, base, adapter, profile, grams)
    watched(x)
    close(watched.gram, hidden.T @ hidden)
    squeezed, _ = squeeze(adapter, profile, grams=nnx.state(watched, InputGram))
    for r in (1, 2):  # the outputs on these inputs are approximated as well as their rank allows
        error = np.linalg.norm(hidden @ model.b[...] - np.asarray(x) @ squeezed["a"][:, :r] @ squeezed["b"][:r])
        tail = np.linalg.svd(hidden @ np.asarray(model.b), compute_uv=False)[r:]
        np.testing.assert_allclose(error, np.linalg.norm(tail), rtol=1e-4)


def test_a_quantised_base_takes_a_gate():
    pytest.importorskip("qwix")
    from mlora_jax.models import Decoder, quantize_decoder
    from tests.tiny import tiny_config

    model = quantize_decoder(Decoder(tiny_config(num_layers=1, hidden_size=64), rngs=nnx.Rngs(0)), "int8")
    model = adapt(model, R, ("q_proj", "down_proj"), key=KEY, gate="normal")
    graphdef, base, adapter, profile = split(model)
    adapter = jax.tree.map(lambda leaf: leaf + 0.1, adapter)
    tokens = jnp.arange(5)[None]
    run = jax.jit(lambda adapter: nnx.merge(graphdef, base, adapter, set_profile(profile, P))(tokens))
    merged = jax.tree.map(lambda leaf: leaf, adapter)
    for layer in (merged["layers"]["self_attn"]["q_proj"], merged["layers"]["mlp"]["down_proj"]):
        layer["b"][...] = layer["b"][...] * layer["gate"][...][..., None]
        layer["gate"][...] = jnp.ones_like(layer["gate"][...])
    close(run(merged), run(adapter), 1e-5)
    assert np.max(np.abs(run(adapter) - run(jax.tree.map(jnp.zeros_like, adapter)))) > 0.01


@pytest.mark.parametrize("init", GATE_INITIALIZERS)
def test_how_a_gate_starts(init):
    layer = nnx.Linear(6, 7, rngs=nnx.Rngs(0))
    model = adapt(layer, 200, (".*",), key=KEY, gate=init)
    plain = adapt(layer, 200, (".*",), key=KEY)
    x = jax.random.normal(KEY, (B, T, 6))
    np.testing.assert_array_equal(model(x), layer(x))
    np.testing.assert_array_equal(model.a, plain.a)
    gate = np.asarray(model.gate)
    if init in ("ones", "zeros"):
        assert np.all(gate == (init == "ones"))
    else:
        mean, deviation = {"normal": (0.0, 1.0), "uniform": (0.55, 0.9 / np.sqrt(12))}[init]
        assert abs(np.mean(gate) - mean) < 0.3 * deviation and 0.8 < np.std(gate) / deviation < 1.2
        assert len(np.unique(gate)) == 200 and (init != "uniform" or np.all((gate >= 0.1) & (gate <= 1)))
        other = adapt(nnx.Dict(other=layer), 200, (".*",), key=KEY, gate=init).other
        assert not np.any(np.asarray(other.gate) == gate)


@pytest.mark.parametrize("gate", ["twos", 1, None])
def test_an_unknown_gate_is_refused(gate):
    with pytest.raises(ValueError, match=r"unknown gate .*; allowed: True, False, 'ones', 'normal'"):
        adapt(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), R, (".*",), key=KEY, gate=gate)
