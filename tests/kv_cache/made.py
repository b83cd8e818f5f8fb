"""Random projections and ranks, and what they do to keys and values in NumPy."""

import numpy as np

from mlora_jax.kv_cache import Projections, Ranks


def random_projections(shape, seed=0, dtype=np.float32) -> Projections:
    """Orthogonal matrices that mix all features, and mean values that are not zero."""
    random = np.random.default_rng(seed)
    layers, heads, features = shape
    u = [np.linalg.qr(random.standard_normal((layers, heads, features, features)))[0].astype(dtype) for _ in range(2)]
    return Projections(*u, random.standard_normal(shape).astype(dtype))


def random_ranks(shape, seed=0) -> Ranks:
    """Ranks that differ between keys and values, layers and heads."""
    drawn = np.random.default_rng(seed).integers(1, shape[2], (2, *shape[:2]))
    return Ranks(*drawn.astype(np.int32))


def compressor(projections, ranks):
    """The `compress` of `numpy_decoder.logits`: keys and values as what is left of them after the cut."""

    def compress(layer, keys, values):
        keys, values = keys.copy(), values.copy()
        for head in range(keys.shape[1]):
            u = projections.u_k[layer, head][:, : ranks.k[layer, head]]
            keys[:, head] = keys[:, head] @ u @ u.T
            u, mean = projections.u_v[layer, head][:, : ranks.v[layer, head]], projections.mean_v[layer, head]
            values[:, head] = (values[:, head] - mean) @ u @ u.T + mean
        return keys, values

    return compress
