"""Causal attention on TPUs without an array of scores. It runs jax's splash attention kernel on a device or a mesh.

Axes: B batch, T tokens, H query heads, KV key and value heads, Hd features of a head.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

# The numbers of queries and keys that a kernel may hold at a time. The largest that divides T is used.
BLOCKS = (512, 256, 128)
# From this number of tokens the kernel takes less time than an array of scores; see docs/compile_report.md.
LEAST = 512


@dataclasses.dataclass(frozen=True)
class Flash:
    """When and where the kernel runs.

    Attributes:
      least: the smallest T at which the kernel runs; None: it never runs.
      mesh: the mesh on which the arrays lie; None: one device.
    """

    least: int | None = LEAST
    mesh: Mesh | None = None

    def takes(self, query: jax.Array, key: jax.Array) -> bool:
        """Returns whether the kernel runs for a query [B, T, H, Hd] and a key [B, T, KV, Hd]. It runs on TPUs only."""
        platform = jax.default_backend() if self.mesh is None else self.mesh.devices.flat[0].platform
        long = self.least is not None and query.shape[1] >= self.least
        return platform == "tpu" and long and fits_flash(query, key)


def fits_flash(query: jax.Array, key: jax.Array) -> bool:
    """Returns whether the kernel can run: there are as many keys as queries, a multiple of 128, of at most 32 bits.

    Args:
      query: [B, T, H, Hd].
      key: [B, T, KV, Hd].
    """
    same = query.shape[1] == key.shape[1] and query.shape[1] % BLOCKS[-1] == 0
    return same and query.dtype in (jnp.bfloat16, jnp.float32)


def product_flops(heads: int, length: int, features: int) -> float:
    """Counts the FLOPs of queries times keys in the kernel. It skips the blocks that causality hides entirely.

    Args:
      heads: the number of query heads, summed over all rows.
      length: T, the number of tokens of a row.
      features: Hd, the number of features of a head.

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
    segment_ids: jax.Array | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Computes softmax(q k' / sqrt(Hd)) v over the keys up to each query. The function can be differentiated.

    The compiler cannot partition a kernel, so on a mesh each device runs it on its own part. Heads are sharded over the
    axis `tensor` where its size divides the number of key heads. Rows are sharded over the axes that an enclosing
    `jax.vmap` names as its `spmd_axis_name`.

    Args:
      query: [B, T, H, Hd].
      key: [B, T, KV, Hd].
      value: [B, T, KV, Hd].
      mesh: the mesh on which the arrays lie; None: one device.
      segment_ids: integers [B, T]; a query sees keys of its own segment only. None: every row is one segment.
      interpret: whether to run the kernel's steps on any platform, which is slow and meant for tests.

    Returns:
      [B, T, H, Hd] in the dtype of `query`. The softmax is computed in float32.

    Source: Dao et al. (arXiv 2205.14135); the kernel is `jax.experimental.pallas.ops.tpu.splash_attention`.
    """
    # This import stands here because the kernel's language takes a second to import.
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    def own_part(query: jax.Array, key: jax.Array, value: jax.Array, *ids: jax.Array) -> jax.Array:
        length, heads, features = query.shape[1:]
        size = next(size for size in BLOCKS if length % size == 0)
        names = ("block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute",
                 "block_q_dq", "block_kv_dq")  # fmt: skip
        blocks: dict[str, Any] = dict.fromkeys(names, size)
        kernel = splash.make_splash_mha_single_device(
            splash.MultiHeadMask([splash.CausalMask((length, length))] * heads),
            block_sizes=splash.BlockSizes(**blocks),
            interpret=interpret,
        )
        # The query is divided in float32 and rounded once, because 1 / sqrt(Hd) is not a power of two for every Hd.
        query = (query.astype(jnp.float32) / math.sqrt(features)).astype(query.dtype)
        swapped = (x.transpose(0, 2, 1, 3) for x in (query, key, value))  # [B, H, T, Hd]
        # The kernel's declared type includes a pair, which it returns only where its residuals are asked for.
        segments = (splash.SegmentIds(x, x) for x in ids)
        return cast(jax.Array, jax.vmap(kernel)(*swapped, *segments)).transpose(0, 2, 1, 3)

    ids = () if segment_ids is None else (segment_ids.astype(jnp.int32),)
    if mesh is None or mesh.size == 1:
        return own_part(query, key, value, *ids)
    heads = "tensor" if key.shape[2] % mesh.shape["tensor"] == 0 else None
    spec = PartitionSpec(None, None, heads, None)
    specs = (*(spec,) * 3, *(PartitionSpec(None, None) for _ in ids))
    part = jax.shard_map(own_part, mesh=mesh, in_specs=specs, out_specs=spec, check_vma=False)
    return part(query, key, value, *ids)
