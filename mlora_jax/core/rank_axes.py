"""The position of the rank axis in every kind of leaf of an adapter, and functions that only need to know it.

Trees are `jax` pytrees such as `mlora_jax.split` returns, or plain nested dicts. The leaves of one layer's adapter
share a parent, the layer's path: the factors ``a`` [..., D, R] and ``b`` [..., R, F], and ``gate`` [..., R] if the
adapter has a trained vector that multiplies its profile. A profile tree has ``p`` [..., R] in the same place. The axes
before those count stacked layers and groups. A new kind of leaf is a new row of `RANK_AXES`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax

Tree = Any

RANK_AXES: Mapping[str, int] = {"a": -1, "b": -2, "gate": -1, "p": -1}

A, B = "a", "b"  # the names of the factors A [..., D, R] and B [..., R, F]
FACTORS = (A, B)  # the matrices A and B, which every adapted layer has; the other leaves are vectors
GATE = "gate"  # a trained vector that multiplies the profile; not every adapter has one
PROFILE = "p"  # a leaf of the profile tree, and not of the adapter
ADAPTER_LEAVES = tuple(name for name in RANK_AXES if name != PROFILE)
# Leaves of a profile tree that have no rank axis.
WITHOUT_RANK_AXIS = ("dropout_key",)


def path_names(path: Sequence[Any]) -> tuple[str, ...]:
    """Returns the names along a tree path, without the attribute by which a Variable holds its array."""
    names = key_names(path)
    return tuple(names[:-1] if len(path) and isinstance(path[-1], jax.tree_util.GetAttrKey) else names)


def key_names(path: Sequence[Any]) -> list[str]:
    """Returns the names of all keys of a tree path."""
    return [str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", k)))) for k in path]


def layer_name(parent: Iterable[str]) -> str:
    """Returns the name of a layer for messages: its dotted path, or "the adapter" for an empty path."""
    return ".".join(parent) or "the adapter"


def leaf_name(path: Sequence[Any]) -> str:
    """Returns the last name of a tree path, which must be a key of `RANK_AXES`.

    Raises:
      ValueError: the path ends in another name.
    """
    *parent, name = path_names(path)
    if name not in RANK_AXES:
        allowed = ", ".join(ADAPTER_LEAVES)
        raise ValueError(f"{'.'.join([*parent, name])} is no leaf of an adapter: those are named {allowed}")
    return name


def rank_of(name: str, leaf: Any) -> int:
    """Returns R of a leaf that has the name `name`, a key of `RANK_AXES`."""
    return leaf.shape[RANK_AXES[name]]


def has_gate(names: Iterable[str]) -> bool:
    """Returns true if one of the names of a layer's leaves is that of a gate."""
    return GATE in names


def cut_to_rank(name: str, leaf: Any, rank: int) -> jax.Array:
    """Returns the first `rank` entries of a leaf along its rank axis."""
    return jax.lax.slice_in_dim(leaf, 0, rank, axis=RANK_AXES[name])


def along_rank(name: str, vector: Any) -> Any:
    """Returns a vector [R] in the shape in which it broadcasts along the rank axis of a leaf.

    >>> along_rank("b", jax.numpy.ones(3)).shape
    (3, 1)
    """
    behind = -1 - RANK_AXES[name]
    return vector[(..., *(None,) * behind)] if behind else vector


def along_rank_of_layers(name: str, vectors: Any) -> Any:
    """Returns vectors [..., R], one for each matrix of a stack, in the shape in which they broadcast to a leaf.

    >>> along_rank_of_layers("a", jax.numpy.ones((2, 3))).shape, along_rank_of_layers("b", jax.numpy.ones((2, 3))).shape
    ((2, 1, 3), (2, 3, 1))
    """
    if name not in FACTORS:
        return vectors
    return vectors[..., None, :] if RANK_AXES[name] == -1 else vectors[..., None]


def by_parent(tree: Tree) -> dict[tuple[str, ...], dict[str, Any]]:
    """Returns a dictionary: the names along a layer's path -> {name of a leaf: leaf}."""
    grouped: dict[tuple[str, ...], dict[str, Any]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        *parent, name = path_names(path)
        grouped.setdefault(tuple(parent), {})[name] = leaf
    return grouped


def adapter_layers(adapter: Tree) -> dict[str, dict[str, Any]]:
    """Returns the leaves of every layer by the layer's dotted path, after a check that the tree is an adapter.

    Args:
      adapter: tree of an adapter's leaves, arrays or `jax.ShapeDtypeStruct`s.

    Returns:
      {path: {"a": [..., D, R], "b": [..., R, F]}}, with "gate" [..., R] in a layer that has one.

    Raises:
      ValueError: the tree is empty, has a leaf that no adapter has, lacks a factor, or has a layer whose leaves differ
        in R or in their leading axes.

    >>> list(adapter_layers({"up": {"a": jax.numpy.ones((3, 2)), "b": jax.numpy.ones((2, 4))}})["up"])
    ['a', 'b']
    """
    layers = by_parent(adapter)
    complaints = [complaint for parent, leaves in layers.items() for complaint in _complaints(parent, leaves)]
    if complaints or not layers:
        why = complaints[0] if complaints else "it has no leaves"
        raise ValueError(f"this tree is no adapter: {why}. Pass the third value of split(model)")
    return {".".join(parent): leaves for parent, leaves in layers.items()}


def _complaints(parent: tuple[str, ...], leaves: Mapping[str, Any]) -> list[str]:
    unknown = [name for name in leaves if name not in ADAPTER_LEAVES]
    missing = [name for name in FACTORS if name not in leaves]
    found = [f"{'.'.join([*parent, name])} is none of {', '.join(ADAPTER_LEAVES)}" for name in unknown]
    found += [f"{layer_name(parent)} lacks {name}" for name in missing]
    if not found and len({(*_leading(name, leaf), rank_of(name, leaf)) for name, leaf in leaves.items()}) > 1:
        shapes = ", ".join(f"{name} {tuple(leaf.shape)}" for name, leaf in leaves.items())
        found.append(f"the leaves of {layer_name(parent)} do not fit together: {shapes}")
    return found


def _leading(name: str, leaf) -> tuple[int, ...]:
    own_axes = 2 if name in FACTORS else 1
    if leaf.ndim < own_axes:
        raise ValueError(f"a leaf {name} must have at least {own_axes} axes, got the shape {tuple(leaf.shape)}")
    return tuple(leaf.shape[: leaf.ndim - own_axes])


def leading_axes(leaves: Mapping[str, Any]) -> tuple[int, ...]:
    """Returns the sizes of the axes before a layer's matrices: the axes of a stack, then the axes of groups."""
    return _leading(FACTORS[0], leaves[FACTORS[0]])


def parameters_per_rank(leaves: Mapping[str, Any]) -> int:
    """Returns the number of trained parameters of one rank of one matrix of a layer: D + F, plus one for a gate."""
    matrices = math.prod(leading_axes(leaves))
    return sum(math.prod(leaf.shape) // (matrices * rank_of(name, leaf)) for name, leaf in leaves.items())


def leaf_ranks(adapter: Tree) -> dict[str, int]:
    """Returns a dictionary: the dotted path of a leaf -> its R.

    Raises:
      ValueError: the name of a leaf is not a key of `RANK_AXES`.
    """
    leaves = jax.tree_util.tree_leaves_with_path(adapter)
    return {".".join(path_names(path)): rank_of(leaf_name(path), leaf) for path, leaf in leaves}


def adapter_rank(adapter: Tree) -> int:
    """Returns R, the rank of an adapter.

    Raises:
      ValueError: the leaves differ in R, or there are none.
    """
    ranks = sorted(set(leaf_ranks(adapter).values()))
    if len(ranks) != 1:
        raise ValueError(f"there must be one R for the whole adapter, got {ranks}")
    return ranks[0]
