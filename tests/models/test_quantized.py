"""A quantised base: its values, its bytes, and that adapters on it train and read out as on a dense one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mlora_jax import RankHierarchy, adapt, fold, set_profile, split
from mlora_jax.config import QUANTIZATIONS, resolve
from mlora_jax.models import Decoder, load_decoder, quantize_decoder, save_decoder
from mlora_jax.models.quantized import FORMATS, compare_logits, dequantize_decoder, stored_bytes
from mlora_jax.run.inputs import load_model
from mlora_jax.training.objective import answer_loss
from tests.tiny import tiny_config, write_checkpoint

pytest.importorskip("qwix")  # of the extra `quant`, and of `test`

R, LAYERS = 4, 6
HIERARCHY = RankHierarchy((1, 2, 4))
TOKENS = jax.random.randint(jax.random.key(1), (3, 16), 0, 330)
ANSWERS = {
    "tokens": TOKENS,
    "positions": jnp.broadcast_to(jnp.arange(4, 9), (3, 5)),
    "targets": TOKENS[:, 5:10],
    "weights": jnp.ones((3, 5)),
}
# The 16 levels of NormalFloat, as bitsandbytes' `create_normal_map` prints them.
LEVELS = np.array([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])  # fmt: skip

each_format = pytest.mark.parametrize("name", FORMATS)


def decoder(dtype=jnp.float32, **changes):
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_layers": LAYERS, "initializer_range": 0.1}
    return Decoder(tiny_config(**sizes, **changes), dtype=dtype, rngs=nnx.Rngs(0))


def kernels(model):
    return {".".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(nnx.state(model)) if "kernel" in path}


def adapted(model, **options):
    """(graphdef, base, adapter, profile) with random B."""
    graphdef, base, adapter, profile = split(adapt(model, R, ("q_proj", "up_proj", "down_proj"), key=jax.random.key(2)))
    adapter = jax.tree.map(lambda leaf: leaf + 0.1 * jax.random.normal(jax.random.key(3), leaf.shape), adapter)
    return graphdef, base, adapter, set_profile(profile, HIERARCHY.matryoshka())


def value_and_gradient(graphdef):
    loss = lambda adapter, base, profile: answer_loss(graphdef, base, adapter, profile, ANSWERS, chunk=8)  # noqa: E731
    return jax.jit(jax.value_and_grad(loss))


def reference(name, kernel):
    """What a kernel [L, D, F] becomes, in NumPy; NaN for a tie of two codes, which either may win."""
    kernel = np.asarray(kernel, np.float64)
    if name == "int8":
        scale = np.abs(kernel).max(axis=1, keepdims=True) / 127.5
        codes = kernel / scale
        tie = (np.abs(np.abs(codes - np.floor(codes)) - 0.5) < 1e-3) & (codes < 127)
        return np.where(tie, np.nan, np.clip(np.round(codes), -128, 127) * scale)
    blocks = kernel.reshape(kernel.shape[0], -1, 64, kernel.shape[2])
    scale = np.abs(blocks).max(axis=2, keepdims=True)
    nearest = np.abs((blocks / scale)[..., None] - LEVELS).argmin(-1)
    return (LEVELS[nearest] * scale).reshape(kernel.shape)


@each_format
def test_kernels_are_rounded_as_the_format_says_and_all_else_is_as_it_was(name):
    model = decoder(tie_word_embeddings=False)
    quantized = quantize_decoder(model, name)
    dense = dequantize_decoder(quantized)
    inside = {path for path in kernels(model) if path.startswith("layers")}
    assert len(inside) == 7
    for path, leaf in kernels(dense).items():
        kernel = kernels(model)[path][...]
        expected = reference(name, kernel) if path in inside else kernel
        got = np.where(np.isnan(expected), np.nan, leaf[...])
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-6)
        assert np.mean(np.isnan(expected)) < 0.02
    others = lambda model: {path: x for path, x in nnx.to_flat_state(nnx.state(model)) if "kernel" not in path}  # noqa: E731
    assert others(model).keys() == others(quantized).keys()
    jax.tree.map(np.testing.assert_array_equal, others(model), others(quantized))
    np.testing.assert_allclose(quantized(TOKENS), dense(TOKENS), rtol=0, atol=2e-5)


@each_format
def test_the_logits_error_is_that_of_the_rounded_kernels_and_is_reported(name):
    model = decoder()
    quantized = quantize_decoder(model, name)
    found = quantized.quantization
    tokens = jax.random.randint(jax.random.key(0), (2, 32), 0, 330)
    expected, got = np.asarray(model(tokens)), np.asarray(dequantize_decoder(quantized)(tokens))
    error = np.linalg.norm(got - expected) / np.linalg.norm(expected)
    assert found.logits_error == pytest.approx(error, rel=1e-3)
    assert found.same_choice == pytest.approx(np.mean(got.argmax(-1) == expected.argmax(-1)), abs=0.02)
    low, high = {"int8": (1e-4, 0.03), "nf4": (0.02, 0.6)}[name]
    assert low < found.logits_error < high
    assert f"quantised to {name}: kernels {found.dense_bytes:,} -> {found.stored_bytes:,} bytes" in str(found)
    assert compare_logits(model, model) == (0.0, 1.0)


@each_format
def test_an_adapter_trains_as_on_a_dense_base_of_the_same_values(name):
    quantized = quantize_decoder(decoder(), name)
    graphdef, base, adapter, profile = adapted(quantized)
    dense_graphdef, dense_base, *_ = adapted(dequantize_decoder(quantized))
    loss, gradient = value_and_gradient(graphdef)(adapter, base, profile)
    expected, dense_gradient = value_and_gradient(dense_graphdef)(adapter, dense_base, profile)
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    for got, wanted in zip(jax.tree.leaves(gradient), jax.tree.leaves(dense_gradient), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=0, atol=2e-5 * float(jnp.max(jnp.abs(wanted))))
    assert jax.tree.structure(gradient) == jax.tree.structure(adapter)


@pytest.mark.slow
def test_trials_on_one_quantised_base_under_vmap_equal_one_by_one():
    graphdef, base, adapter, profile = adapted(quantize_decoder(decoder(), "nf4"))
    adapters = jax.tree.map(lambda leaf: jnp.stack([leaf, 0.5 * leaf, -leaf]), adapter)
    values = jnp.stack([HIERARCHY.prefix(r) for r in (1, 2, 4)])
    step = value_and_gradient(graphdef)
    one = lambda adapter, p: step(adapter, base, set_profile(profile, p))  # noqa: E731
    losses, gradients = jax.jit(jax.vmap(one))(adapters, values)
    for k in range(3):
        loss, gradient = one(jax.tree.map(lambda leaf, k=k: leaf[k], adapters), values[k])
        assert float(losses[k]) == pytest.approx(float(loss), rel=1e-5)
        for got, wanted in zip(jax.tree.leaves(gradients), jax.tree.leaves(gradient), strict=True):
            np.testing.assert_allclose(got[k], wanted, rtol=0, atol=2e-5 * float(jnp.max(jnp.abs(wanted))))


@pytest.mark.slow
def test_memory_falls_by_two_and_by_nearly_four_also_while_training():
    model = decoder(jnp.bfloat16)
    kernel_bytes = stored_bytes(nnx.state(model.layers, nnx.PathContains("kernel")))
    largest = max(leaf[...][0].size for path, leaf in kernels(model).items())
    analyses, stored = {}, {}
    for name in ("", *FORMATS):
        base_model = quantize_decoder(model, name) if name else model
        graphdef, base, adapter, profile = adapted(base_model)
        compiled = value_and_gradient(graphdef).lower(adapter, base, profile).compile()
        analyses[name], stored[name] = compiled.memory_analysis(), stored_bytes(base)
        if name:
            found = base_model.quantization
            assert found.dense_bytes == kernel_bytes
            ratio = kernel_bytes / found.stored_bytes
            assert {"int8": 1.9, "nf4": 3.7}[name] < ratio < {"int8": 2.0, "nf4": 4.0}[name]
            # The compiler's own count of what it is given: two codes of four bits share a byte.
            saved = analyses[""].argument_size_in_bytes - analyses[name].argument_size_in_bytes
            assert saved == pytest.approx(found.dense_bytes - found.stored_bytes, rel=0.01)
            assert stored[""] - stored[name] == found.dense_bytes - found.stored_bytes
            # Dense matrices exist one layer at a time, in the backward pass too.
            more = analyses[name].temp_size_in_bytes - analyses[""].temp_size_in_bytes
            assert more < 5 * 4 * largest < kernel_bytes


def test_folding_and_saving_are_refused_and_say_what_to_do(tmp_path):
    quantized = quantize_decoder(decoder(), "nf4")
    _, base, adapter, profile = adapted(quantized)
    with pytest.raises(ValueError, match=r"layers\.mlp\.down_proj, .* are quantised.*fold into the original weights"):
        fold(base, adapter, profile)
    with pytest.raises(ValueError, match="cannot save a base quantised to nf4: save the model it was made from"):
        save_decoder(tmp_path / "model", quantized)
    assert not (tmp_path / "model").exists()


def test_what_cannot_be_quantised_is_refused():
    model = decoder()
    with pytest.raises(ValueError, match="unknown quantization 'int3'; known: int8, nf4"):
        quantize_decoder(model, "int3")
    with pytest.raises(ValueError, match="quantised already, to int8"):
        quantize_decoder(quantize_decoder(model, "int8"), "nf4")
    with pytest.raises(ValueError, match=r"layers\.self_attn\.q_proj has an adapter: quantise the base model"):
        quantize_decoder(adapt(model, R, ("q_proj",), key=jax.random.key(0)), "int8")
    with pytest.raises(ValueError, match=r"down_proj has 134 input features, which do not cut into blocks of 16 to 64"):
        quantize_decoder(Decoder(tiny_config(intermediate_size=134), rngs=nnx.Rngs(0)), "nf4")


@each_format
def test_a_config_quantises_the_base_that_it_names(name, tmp_path):
    folder = write_checkpoint(tmp_path / "model")
    options = {"path": str(folder), "quantization": name}
    model, _ = load_model(resolve({"model": options}))
    expected = quantize_decoder(load_decoder(folder, dtype=jnp.float32), name)
    np.testing.assert_array_equal(model(TOKENS), expected(TOKENS))
    assert model.quantization == expected.quantization
    assert set(QUANTIZATIONS) == {"", *FORMATS}
    with pytest.raises(ValueError, match=r"config\.model\.quantization .*int4"):
        resolve({"model": options | {"quantization": "int4"}})
