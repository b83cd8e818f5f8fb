"""Times the matrix products of a training step alone, each at its own shape: what the step cannot do without."""

from __future__ import annotations

import collections
import statistics
import time
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

REPEATS = 15
Product = tuple[int, int, int]  # [m, k] times [k, n]


def linear_products(layers: Mapping[str, tuple[int, int]], tokens: int, rank: int) -> collections.Counter[Product]:
    """Counts the products of one layer of a decoder on one row.

    A frozen kernel is multiplied forward and for the gradient of its input, a factor also for its own gradient.

    Args:
      layers: name -> (D, F) of each adapted linear layer.
      tokens: the width of the row.
      rank: R.
    """
    found: collections.Counter[Product] = collections.Counter()
    for features_in, features_out in layers.values():
        found[tokens, features_in, features_out] += 1
        found[tokens, features_out, features_in] += 1
        for features in (features_in, features_out):
            found[tokens, features, rank] += 1  # x A and g B^T
            found[tokens, rank, features] += 1  # h B and dh A^T
            found[features, tokens, rank] += 1  # the gradients of A and B
    return found


def step_products(
    config: Any, batches: Iterable[Mapping[str, Any]], widths: tuple[int, ...], *, rank: int, chunk: int
) -> tuple[collections.Counter[Product], float]:
    """Counts the products of some steps with one row in a pass, and the FLOPs of their attention.

    Args:
      config: the `DecoderConfig`.
      batches: packed batches of one trial.
      widths: the widths of their rows.
      rank: R.
      chunk: the number of answers whose logits are computed at one time.
    """
    heads, groups = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    hidden, inner = config.hidden_size, config.intermediate_size
    layers = {
        "q": (hidden, heads),
        "k": (hidden, groups),
        "v": (hidden, groups),
        "o": (heads, hidden),
        "gate": (hidden, inner),
        "up": (hidden, inner),
        "down": (inner, hidden),
    }
    found: collections.Counter[Product] = collections.Counter()
    attention = 0.0
    for batch in batches:
        number = 0
        for width, count in zip(widths, batch["passes"].tolist(), strict=True):
            for product, times in linear_products(layers, width, rank).items():
                found[product] += times * count * config.num_layers
            for row in batch["examples"][0, 0, number : number + count, 0, :width]:
                # Two products forward and five backward, over the pairs of a query and a key that it sees.
                lengths = np.unique(row, return_counts=True)[1]
                attention += 7 * 2.0 * heads * config.num_layers * float(np.sum(lengths * (lengths + 1) / 2))
            number += count
        size = min(chunk, widths[0])
        chunks = sum(-(-answers // size) for answers in batch["answers"].tolist())
        found[size, hidden, config.vocab_size] += chunks
        found[size, config.vocab_size, hidden] += chunks
    return found, attention


def product_seconds(products: Mapping[Product, int], attention: float) -> dict[str, float]:
    """Times every product once, float32, and adds up.

    The FLOPs of attention are counted at the rate of the fastest product, because its own products are too small to be
    timed alone.

    Args:
      products: product -> how often it is computed.
      attention: the FLOPs of attention.

    Returns:
      "seconds" of all of it, and the lowest and the highest "gflops" per second of a product.
    """
    generator, total, rates = np.random.default_rng(0), 0.0, []
    multiply = jax.jit(jnp.matmul)
    for (rows, inner, columns), times in products.items():
        left = jnp.asarray(generator.normal(size=(rows, inner)), jnp.float32)
        right = jnp.asarray(generator.normal(size=(inner, columns)), jnp.float32)
        jax.block_until_ready(multiply(left, right))
        seconds = []
        for _ in range(REPEATS):
            start = time.perf_counter()
            jax.block_until_ready(multiply(left, right))
            seconds.append(time.perf_counter() - start)
        total += times * statistics.median(seconds)
        rates.append(2.0 * rows * inner * columns / statistics.median(seconds))
    total += attention / max(rates)
    return {"seconds": total, "lowest_gflops": min(rates) / 1e9, "highest_gflops": max(rates) / 1e9}
