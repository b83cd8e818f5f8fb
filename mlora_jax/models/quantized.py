"""A frozen base model with kernels that qwix quantises, so that weights which are only read need less memory.

The layers stay `nnx.Linear`. Their kernels are `qwix.QArray`s of codes and scales [L, D, F]. A call turns the kernel of
one layer at a time into a dense matrix of the compute dtype.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype

from mlora_jax.models.decoder import Decoder

# The error of a quantised base is measured on this number of rows of random tokens, each of this length.
_ROWS, _LENGTH = 2, 32


class Format(NamedTuple):
    """A format in which a kernel [D, F] is stored.

    Attributes:
      qtype: the type of the codes, in the terms of qwix.
      block: the number of neighbours along D that share a scale; None: a whole column shares one.
      source: the paper that describes the format.
    """

    qtype: Any
    block: int | None
    source: str


# Adding a format is adding a row.
FORMATS: Mapping[str, Format] = {
    "int8": Format(jnp.int8, None, "LLM.int8, arXiv 2208.07339, without its outliers"),
    "nf4": Format("nf4", 64, "QLoRA, arXiv 2305.14314, without double quantisation"),
}


@dataclasses.dataclass(frozen=True)
class Quantization:
    """The format of a quantised base, its size and its error.

    Attributes:
      format: a key of `FORMATS`.
      dense_bytes: the bytes of the kernels before they are quantised.
      stored_bytes: the bytes of the quantised kernels.
      logits_error: the norm of the difference of the logits, divided by the norm of the dense base's logits, on random
        tokens.
      same_choice: the share of these tokens after which both models find the same next token most likely.
    """

    format: str
    dense_bytes: int
    stored_bytes: int
    logits_error: float
    same_choice: float

    def __str__(self) -> str:
        return (
            f"base quantised to {self.format}: kernels {self.dense_bytes:,} -> {self.stored_bytes:,} bytes; on "
            f"random tokens the logits differ by {self.logits_error:.2%} of their norm, the most likely next token "
            f"is the same for {self.same_choice:.1%}"
        )


def quantize_decoder(model: Decoder, name: str) -> Decoder:
    """Returns a decoder with quantised kernels in its layers. Embeddings, norms, biases and the head stay the same.

    The quantised decoder takes adapters like a dense one. An adapter cannot be folded into quantised kernels, because
    the sum would be rounded. Fold it into the dense weights.

    Args:
      model: a decoder without adapters, which is not changed.
      name: "int8" (one scale per output feature) or "nf4" (4-bit NormalFloat with one scale for 64 inputs of an output
        feature, or for the largest divisor of D below 64).

    Returns:
      A new decoder, whose attribute `quantization` holds its size and its error.

    Raises:
      ValueError: the format is unknown; the model is quantised already or has adapters; or, for nf4, D has no divisor
        from 16 to 64.
      ModuleNotFoundError: qwix is not installed.
    """
    if name not in FORMATS:
        raise ValueError(f"unknown quantization {name!r}; known: {', '.join(FORMATS)}")
    if getattr(model, "quantization", None):
        raise ValueError(f"the model is quantised already, to {model.quantization.format}")
    qwix = _qwix()
    quantized = nnx.clone(model)
    dense = stored = 0
    for path, layer in nnx.iter_modules(quantized.layers):
        if not isinstance(layer, nnx.Linear):
            continue
        kernel = layer.kernel[...]
        where = "layers." + ".".join(map(str, path))
        if path[-1] == "base":
            raise ValueError(f"{where.rpartition('.')[0]} has an adapter: quantise the base model, then adapt it")
        codes = _quantize(qwix, kernel, FORMATS[name], where)
        dense, stored = dense + stored_bytes(kernel), stored + stored_bytes(codes)
        layer.kernel.set_value(codes)
        layer.promote_dtype, layer.dot_general = _promote, _dot_general
    error, same = compare_logits(model, quantized)
    quantized.quantization = Quantization(name, dense, stored, error, same)
    return quantized


def dequantize_decoder(model: Decoder) -> Decoder:
    """Returns a dense decoder with the values that a quantised decoder computes with.

    >>> from mlora_jax.models import DecoderConfig
    >>> config = DecoderConfig(vocab_size=9, hidden_size=16, intermediate_size=32, num_layers=2, num_heads=2)
    >>> model = quantize_decoder(Decoder(config, rngs=nnx.Rngs(0)), "int8")  # doctest: +SKIP
    >>> dequantize_decoder(model).layers.mlp.up_proj.kernel.shape  # doctest: +SKIP
    (2, 16, 32)
    """
    dense = nnx.clone(model)
    for _, layer in nnx.iter_modules(dense.layers):
        if isinstance(layer, nnx.Linear):
            layer.kernel.set_value(dense_kernel(layer.kernel.get_value()))
            layer.promote_dtype, layer.dot_general = promote_dtype, jax.lax.dot_general
    dense.quantization = None
    return dense


def dense_kernel(kernel: Any) -> jax.Array:
    """Returns a kernel [..., D, F] as an array; a quantised one with the values that the layer computes with."""
    return kernel if isinstance(kernel, jax.Array) else jax.jit(_qwix().dequantize)(kernel)


def compare_logits(dense: Decoder, quantized: Decoder) -> tuple[float, float]:
    """Returns (`logits_error`, `same_choice`) of a quantised base on random tokens; see `Quantization`."""
    tokens = jax.random.randint(jax.random.key(0), (_ROWS, _LENGTH), 0, dense.config.vocab_size)

    def logits(model):
        graphdef, state = nnx.split(model)
        return jax.jit(lambda state: nnx.merge(graphdef, state)(tokens))(state)

    @jax.jit
    def compare(expected, got):
        error = jnp.linalg.norm((got - expected).ravel()) / jnp.linalg.norm(expected.ravel())
        return error, jnp.mean(got.argmax(-1) == expected.argmax(-1))

    error, same = compare(logits(dense), logits(quantized))
    return float(error), float(same)


def stored_bytes(tree: Any) -> int:
    """Counts the bytes of a tree's arrays in the memory of a device.

    Two 4-bit codes share a byte there, while `nbytes` counts a byte for each.
    """
    leaves = [leaf for leaf in jax.tree.leaves(tree) if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)]
    return sum(-(-leaf.size * jax.dtypes.itemsize_bits(leaf.dtype) // 8) for leaf in leaves)


def _quantize(qwix, kernel: jax.Array, form: Format, where: str):
    block = _block(form, kernel.shape[-2], where)

    @jax.jit
    def each(kernel):
        # Layers are quantised one after the other, because the search for codes makes arrays many times the size of a
        # kernel.
        one = lambda matrix: qwix.quantize(  # noqa: E731
            matrix, form.qtype, channelwise_axes=(1,), tiled_axes={0: block} if block else None
        )
        return jax.lax.map(one, kernel)

    return each(kernel)


def _block(form: Format, features_in: int, where: str) -> int | None:
    if form.block is None:
        return None
    block = max(size for size in range(1, form.block + 1) if features_in % size == 0)
    if block < min(features_in, 16):
        raise ValueError(
            f"{where} has {features_in} input features, which do not cut into blocks of 16 to {form.block}: "
            "use quantization 'int8'"
        )
    return block


def _promote(arrays: Any, *, dtype: Any = None, inexact: bool = True) -> Any:
    """Does what `promote_dtype` of flax does where the kernel is a QArray, whose dtype is that of its dense matrix.

    The argument `inexact` belongs to the signature in flax. It changes nothing, because the arrays are floats.
    """
    x, kernel, bias = arrays
    dtype = dtype or jnp.result_type(*(array.dtype for array in arrays if array is not None))
    return x.astype(dtype), kernel.astype(dtype), None if bias is None else bias.astype(dtype)


def _dot_general(x, kernel, dimension_numbers, **options):
    qwix = _qwix()
    # The backward pass makes the dense matrix again. Otherwise the dense matrices of all layers would be kept at once.
    product = lambda x, kernel: qwix.dot_general(x, kernel, dimension_numbers, **options)  # noqa: E731
    return jax.checkpoint(product, prevent_cse=False)(x, kernel)


def _qwix():
    try:
        import qwix
    except ModuleNotFoundError as error:
        if error.name != "qwix":
            raise
        raise ModuleNotFoundError("a quantised base needs qwix: pip install 'mlora_jax[quant]'", name="qwix") from None
    return qwix
