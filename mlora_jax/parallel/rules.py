"""The sharding of every array: rules that map the path of an array to axes of the mesh.

`tensor` shards features as Megatron does (Shoeybi et al., arXiv 1909.08053): the outputs of the projections that begin
a block and the inputs of those that end it, so that a block needs one sum over devices. `fsdp` shards the other axis of
a kernel, which is gathered where it is used. Factors follow their kernel: A is sharded like the kernel's inputs, B like
its outputs. The layer axis is never sharded, because a scan over sharded layers would gather all of them.
"""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from mlora_jax.core.rank_axes import FACTORS, RANK_AXES, path_names

Tree = Any

_BEGIN = r"(q|k|v|gate|up)_proj"
_END = r"(o|down)_proj"
_BOTH = ("tensor", "fsdp")
# The end of a layer's path; the mesh axes of its adapter's inputs (D of A) and those of its outputs (F of B).
_FEATURES: tuple[tuple[str, tuple], ...] = (
    (_BEGIN, ("fsdp", _BOTH)),
    (_END, (_BOTH, "fsdp")),
    (r"embed_tokens", (_BOTH, "fsdp")),
    (r"lm_head", ("fsdp", _BOTH)),
)


def _beside_rank(factor: str, features: str | tuple[str, ...]) -> tuple:
    """The entries of a factor's last two axes: the rank axis is not sharded, the other one is, over `features`."""
    entries: list[str | tuple[str, ...] | None] = [features, features]
    entries[RANK_AXES[factor]] = None
    return tuple(entries)


# The end of a path, and the mesh axes of the array's last axes. Arrays that match no rule, such as norms, profiles and
# gates, are replicated.
RULES: tuple[tuple[str, tuple], ...] = (
    (rf"{_BEGIN}(\.base)?\.kernel.*", ("fsdp", "tensor")),  # [D, F]
    (rf"{_END}(\.base)?\.kernel.*", ("tensor", "fsdp")),  # [F, D]
    (rf"{_BEGIN}(\.base)?\.bias", ("tensor",)),
    (r"embed_tokens(\.base)?\.embedding", ("tensor", "fsdp")),  # [V, D]
    (r"lm_head(\.base)?\.kernel", ("fsdp", "tensor")),  # [D, V]
    *(
        (rf"{layer}\.{factor}", _beside_rank(factor, features))
        for layer, both in _FEATURES
        for factor, features in zip(FACTORS, both, strict=True)
    ),
)
_COMPILED = tuple((re.compile(rf"(?:.*\.)?{pattern}"), axes) for pattern, axes in RULES)


def spec_of(
    path: str, shape: tuple[int, ...], mesh: Mesh | AbstractMesh, *, trials: bool = False, gathered: bool = False
) -> PartitionSpec:
    """Returns the `PartitionSpec` of one array.

    Args:
      path: the dotted path of the array, such as layers.mlp.up_proj.kernel.
      shape: the shape of the array. An axis is not sharded over mesh axes that do not divide it.
      mesh: a mesh with all of `mesh.AXES`.
      trials: whether the first axis of the array counts trials.
      gathered: whether to leave out `fsdp`, as where the array is used.

    >>> mesh = jax.sharding.AbstractMesh((1, 2, 2, 2), ("trial", "data", "fsdp", "tensor"))
    >>> tuple(spec_of("layers.mlp.up_proj.kernel", (4, 8, 16), mesh))
    (None, 'fsdp', 'tensor')
    >>> tuple(spec_of("layers.mlp.up_proj.kernel", (4, 8, 15), mesh))
    (None, 'fsdp', None)
    """
    axes = next((axes for pattern, axes in _COMPILED if pattern.fullmatch(path)), ())
    axes = axes[-len(shape) :] if shape else ()
    first = ["trial"] if trials else []
    free = [None] * (len(shape) - len(axes) - len(first))
    left_out = ("fsdp",) if gathered else ()
    entries = [*first, *free, *axes]
    return PartitionSpec(*(_fitting(entry, size, mesh, left_out) for entry, size in zip(entries, shape, strict=True)))


def _fitting(
    entry: str | tuple[str, ...] | None, size: int, mesh: Mesh | AbstractMesh, left_out: tuple[str, ...]
) -> str | tuple[str, ...] | None:
    """Returns the axes of an entry that divide a size, or None if none does."""
    names = (entry,) if isinstance(entry, str) else entry or ()
    names = tuple(name for name in names if name not in left_out and mesh.shape[name] > 1)
    while names and size % math.prod(mesh.shape[name] for name in names):
        names = names[:-1]
    return names[0] if len(names) == 1 else names or None


def shardings(tree: Tree, mesh: Mesh, *, trials: bool = False) -> Tree:
    """Returns the sharding of every array of a tree by its path.

    Args:
      tree: a tree of arrays or `jax.ShapeDtypeStruct`s, such as the result of `mlora_jax.split` or a state of training.
      mesh: a mesh with all of `mesh.AXES`.
      trials: whether the first axis of every array counts trials.

    Returns:
      A tree of `NamedSharding`s.
    """

    def one(path: Any, leaf: Any) -> NamedSharding:
        spec = spec_of(".".join(path_names(path)), leaf.shape, mesh, trials=trials)
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(one, tree)


def rows_sharding(
    mesh: Mesh, ndim: int, axis: int, *, trials: bool = False, over: tuple[str, ...] = ("data", "fsdp")
) -> NamedSharding:
    """Returns the sharding of an array over its rows.

    Args:
      mesh: a mesh with all of `mesh.AXES`.
      ndim: the number of axes of the array.
      axis: the axis that counts rows.
      trials: whether the first axis counts trials; it is then sharded over `trial`.
      over: the axes of the mesh that the rows are sharded over.
    """
    entries: list[Any] = [None] * ndim
    entries[axis] = over
    if trials:
        entries[0] = "trial"
    return NamedSharding(mesh, PartitionSpec(*entries))


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Returns the sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


@dataclasses.dataclass(frozen=True)
class Placement:
    """The shardings that a decoder asks for while it runs on a mesh, see `Decoder.placement`.

    Attributes:
      mesh: a mesh with all of `mesh.AXES`.
    """

    mesh: Mesh

    def weights(self, tree: Tree) -> Tree:
        """Gathers the weights of one layer over `fsdp`, where they are used."""

        def one(path: Any, leaf: Any) -> Any:
            if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
                return leaf
            spec = spec_of(".".join(path_names(path)), leaf.shape, self.mesh, gathered=True)
            return jax.lax.with_sharding_constraint(leaf, NamedSharding(self.mesh, spec))

        return jax.tree_util.tree_map_with_path(one, tree)

    def activations(self, x: jax.Array) -> jax.Array:
        """Replicates activations [B, T, D] of one shard of the rows on all devices of that shard."""
        return jax.lax.with_sharding_constraint(x, replicated(self.mesh))
