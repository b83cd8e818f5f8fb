"""Sets the rank profiles and dropout keys in the profile tree of a split model."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from mlora_jax.adapters.targets import matching
from mlora_jax.adapters.variables import DropoutKey, RankProfile
from mlora_jax.core.product import path_hash
from mlora_jax.core.rank_axes import path_names


def set_profile(
    profile_tree: nnx.State, p: jax.Array | Mapping[str, jax.Array], *, per_example: bool = False
) -> nnx.State:
    """Replaces every layer's profile by `p`. It is traceable, since a profile is data.

    Args:
      profile_tree: the profile tree that `split` returned.
      p: [R] for all layers; or [L, R], the leading axes of a stacked kernel and R, for one profile per layer; or, with
        `per_example`, [B, R] per example or [B, T, R] per token, for all layers; or a dictionary: pattern -> p in one
        of these forms. Patterns are those of `adapt`. The first pattern that matches a layer counts, and a layer that
        no pattern matches keeps its profile.
      per_example: if true, the axes of `p` before R are those of the batch. This is never guessed from a shape.

    Returns:
      A new profile tree, in the dtypes of the old one.

    Raises:
      ValueError: a shape does not fit a layer; a pattern matches no layer, or matches a path of a shared layer that is
        not its first; the dictionary is empty; or the tree has no rank profiles.
    """
    is_profile = lambda node: isinstance(node, RankProfile)  # noqa: E731
    leaves = jax.tree_util.tree_leaves_with_path(profile_tree, is_leaf=is_profile)
    paths = [".".join(path_names(path)[:-1]) for path, node in leaves if is_profile(node)]
    if not paths:
        raise ValueError("this tree has no rank profiles: pass the fourth value of split(model)")
    table = p if isinstance(p, Mapping) else None
    if table is not None and not table:
        raise ValueError(f"an empty mapping sets no profile; layers here: {', '.join(sorted(paths))}")
    shared = {name: ".".join(path_names(path)[:-1]) for path, node in leaves if is_profile(node) for name in node.names}
    chosen = {
        path: pattern for pattern in reversed(list(table or ())) for path in matching(paths, (pattern,), shared=shared)
    }

    def replace(path, node):
        if not is_profile(node):
            return node
        name = ".".join(path_names(path)[:-1])
        if table is not None and name not in chosen:
            return node
        value = p if table is None else table[chosen[name]]
        return node.replace(_fit_profile(name, node, jnp.asarray(value), per_example))

    return jax.tree_util.tree_map_with_path(replace, profile_tree, is_leaf=is_profile)


def set_dropout_key(profile_tree: nnx.State, key: jax.Array) -> nnx.State:
    """Gives every adapter's dropout its own random key. It is traceable, and leaves a tree without dropout unchanged.

    Args:
      profile_tree: the profile tree that `split` returned.
      key: a `jax.random.key`; use another one at every step.

    Returns:
      A new profile tree.
    """
    is_key = lambda node: isinstance(node, DropoutKey)  # noqa: E731

    def replace(path, node):
        if not is_key(node):
            return node
        own = jax.random.fold_in(key, path_hash(".".join(path_names(path)[:-1])))
        shape = node[...].shape
        return node.replace(jax.random.split(own, shape) if shape else own)

    return jax.tree_util.tree_map_with_path(replace, profile_tree, is_leaf=is_key)


def _fit_profile(name: str, node: RankProfile, value: jax.Array, per_example: bool) -> jax.Array:
    old = node[...]
    leading, rank = old.shape[: node.leading], old.shape[-1]
    full, by_layer = (*leading, rank), (*leading[: node.leading - node.groups], rank)
    if per_example:
        if value.ndim < 2 or value.shape[-1] != rank:
            raise ValueError(f"a profile per example of {name} must end in R = {rank}, like [B, R]; got {value.shape}")
        full = (*leading, *value.shape)
    elif value.shape not in ((rank,), by_layer, full):
        raise ValueError(
            f"a profile of {name} must have shape {(rank,)} or {by_layer}, got {value.shape}; "
            "pass per_example=True for a profile per example"
        )
    elif value.shape == by_layer:  # all groups of a layer get the same profile
        value = value.reshape(*by_layer[:-1], *(1,) * node.groups, rank)
    return jnp.broadcast_to(value, full).astype(old.dtype)
