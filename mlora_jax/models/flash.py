"""Causal attention on TPUs without an array of scores: jax's splash attention kernel, on one device or a mesh.

Axes: B batch, T tokens, H query heads, KV key and value heads, Hd features of a head.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

BLOCKS = (512, 256, 128)  # queries and keys that a kernel holds at a time; the largest that divides T
LEAST = 512  # tokens from which the kernel takes less time than an array of scores; see docs/compile_report.md


@dataclasses.dataclass(frozen=True)
class Flash:
    """When and where the kernel runs.

    Attributes:
      least: T from which it does; None: never.
      mesh: that arrays lie on; None for one device.
    """

    least: int | None = LEAST
    mesh: Mesh | None = None

    def takes(self, query: jax.Array, key: jax.Array) -> bool:
        """Whether it runs for these, [B, T, H, Hd] and [B, T, KV, Hd]: on TPUs alone."""
        platform = jax.default_backend() if self.mesh is None else self.mesh.devices.flat[0].platform
        long = self.least is not None and query.shape[1] >= self.least
        return platform == "tpu" and long and fits_flash(query, key)


def fits_flash(query: jax.Array, key: jax.Array) -> bool:
    """Whether the kernel takes these: as many keys as queries, a multiple of 128, in at most 32 bits.

    Args:
      query: [B, T, H, Hd].
      key: [B, T, KV, Hd].
    """
    same = query.shape[1] == key.shape[1] and query.shape[1] % BLOCKS[-1] == 0
    return same and query.dtype in (jnp.bfloat16, jnp.float32)


def product_flops(heads: int, length: int, features: int) -> float:
    """FLOPs of queries times keys in the kernel: in the blocks of a row that causality leaves.

    Args:
      heads: query heads, over all rows.
      length: T.
      features: Hd.

    >>> product_flops(1, 1024, 64) == 2 * 64 * 3 * 512**2
    True
    """
    size = next(size for size in BLOCKS if length % size == 0)
    blocks = length // size * (length // size + 1) // 2
    return 2.0 * heads * features * size * size * blocks


def flash_attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mesh: Mesh | None = None,
    *,
    interpret: bool = False,
) -> jax.Array:
    """softmax(q k' / sqrt(Hd)) v over the keys up to each query; differentiable.

    The compiler cannot cut a kernel, so on a mesh it is run on each device's part: heads along `tensor` where that
    divides those of the keys. Rows lie along the axes of the mesh that a `jax.vmap` around has as its `spmd_axis_name`.

    Args:
      query: [B, T, H, Hd].
      key: [B, T, KV, Hd].
      value: [B, T, KV, Hd].
      mesh: that the arrays lie on; None for one device.
      interpret: run the kernel's steps on any platform, slowly; for tests.

    Returns:
      [B, T, H, Hd] in the dtype of `query`; softmax in float32.

    Source: Dao et al. (arXiv 2205.14135); the kernel is `jax.experimental.pallas.ops.tpu.splash_attention`.
    """
    # Here rather than above: the kernel's language takes a second to import.
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    def own_part(query, key, value):
        length, heads, features = query.shape[1:]
        size = next(size for size in BLOCKS if length % size == 0)
        blocks = {name: size for name in ("block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv",
                                          "block_kv_dkv_compute", "block_q_dq", "block_kv_dq")}  # fmt: skip
        kernel = splash.make_splash_mha_single_device(
            splash.MultiHeadMask([splash.CausalMask((length, length))] * heads),
            block_sizes=splash.BlockSizes(**blocks),
            interpret=interpret,
        )
        # In float32 before it is rounded: 1 / sqrt(Hd) is no power of two for every Hd.
        query = (query.astype(jnp.float32) / math.sqrt(features)).astype(query.dtype)
        swapped = (x.transpose(0, 2, 1, 3) for x in (query, key, value))  # [B, H, T, Hd]
        return jax.vmap(kernel)(*swapped).transpose(0, 2, 1, 3)

    if mesh is None or mesh.size == 1:
        return own_part(query, key, value)
    heads = "tensor" if key.shape[2] % mesh.shape["tensor"] == 0 else None
    spec = PartitionSpec(None, None, heads, None)
    return jax.shard_map(own_part, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec, check_vma=False)(query, key, value)
