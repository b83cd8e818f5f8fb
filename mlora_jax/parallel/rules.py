"""Where every array lies: rules from an array's path to the axes of the mesh that its own axes are cut along.

`tensor` cuts features as Megatron does (Shoeybi et al., arXiv 1909.08053): the outputs of the projections that begin a
block and the inputs of those that end it, so that a block sums once. `fsdp` cuts the other axis of a kernel, which is
gathered where it is used. Factors follow their kernel: A its inputs, B its outputs. The layer axis is never cut: a scan
over cut layers would gather them all.
"""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mlora_jax.core.rank_axes import FACTORS, RANK_AXES, path_names

_BEGIN = r"(q|k|v|gate|up)_proj"
_END = r"(o|down)_proj"
_BOTH = ("tensor", "fsdp")
# The tail of a layer's path; what the inputs of its adapter, D of A, are cut along; what the outputs, F of B, are.
_FEATURES: tuple[tuple[str, tuple], ...] = (
    (_BEGIN, ("fsdp", _BOTH)),
    (_END, (_BOTH, "fsdp")),
    (r"embed_tokens", (_BOTH, "fsdp")),
    (r"lm_head", ("fsdp", _BOTH)),
)


def _beside_rank(factor: str, features) -> tuple:
    """The entries of a factor's last two axes: the rank axis is whole, the other one is cut along `features`."""
    entries = [features, features]
    entries[RANK_AXES[factor]] = None
    return tuple(entries)


# A path's tail, and what its array's last axes are cut along. What no rule names is on every device: norms, profiles
# and gates among others.
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


def spec_of(path: str, shape: tuple[int, ...], mesh: Mesh, *, trials: bool = False, gathered: bool = False):
    """The `PartitionSpec` of one array.

    Args:
      path: dotted, such as layers.mlp.up_proj.kernel.
      shape: of the array. An axis of the mesh that does not divide the array's is left out there.
      mesh: with all of `AXES`.
      trials: whether the first axis of the array counts trials.
      gathered: as where it is used: nothing lies along `fsdp`.

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


def _fitting(entry, size: int, mesh: Mesh, left_out: tuple[str, ...]):
    """The axes of an entry that divide a size; None if none does."""
    names = (entry,) if isinstance(entry, str) else entry or ()
    names = tuple(name for name in names if name not in left_out and mesh.shape[name] > 1)
    while names and size % math.prod(mesh.shape[name] for name in names):
        names = names[:-1]
    return names[0] if len(names) == 1 else names or None


def shardings(tree, mesh: Mesh, *, trials: bool = False):
    """The sharding of every array of a tree, by its path.

    Args:
      tree: of arrays or `jax.ShapeDtypeStruct`s: what `mlora_jax.split` gives, or a state of training.
      mesh: with all of `AXES`.
      trials: whether the first axis of every array counts trials.
    """

    def one(path, leaf):
        spec = spec_of(".".join(path_names(path)), leaf.shape, mesh, trials=trials)
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(one, tree)


def rows_sharding(mesh: Mesh, ndim: int, axis: int, *, trials: bool = False, over=("data", "fsdp")) -> NamedSharding:
    """The sharding of an array whose `axis` counts rows, and whose first one counts trials if it has `trials`."""
    entries: list[Any] = [None] * ndim
    entries[axis] = over
    if trials:
        entries[0] = "trial"
    return NamedSharding(mesh, PartitionSpec(*entries))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same on every device."""
    return NamedSharding(mesh, PartitionSpec())


@dataclasses.dataclass(frozen=True)
class Placement:
    """What a decoder keeps to while it runs on a mesh: see `Decoder.placement`.

    Attributes:
      mesh: with all of `AXES`.
    """

    mesh: Mesh

    def weights(self, tree):
        """Weights of one layer, gathered over `fsdp` where they are used."""

        def one(path, leaf):
            if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
                return leaf
            spec = spec_of(".".join(path_names(path)), leaf.shape, self.mesh, gathered=True)
            return jax.lax.with_sharding_constraint(leaf, NamedSharding(self.mesh, spec))

        return jax.tree_util.tree_map_with_path(one, tree)

    def activations(self, x: jax.Array) -> jax.Array:
        """[B, T, D] of one shard of the rows, whole on each of its devices."""
        return jax.lax.with_sharding_constraint(x, replicated(self.mesh))
