"""The product of an adapted layer, and operations on pairs of factors: draw, truncate, scale and fold.

The functions on trees take `jax` pytrees whose leaves are named as in `mlora_jax.core.rank_axes`. The leaves of one
layer have the same parent: the factors ``a`` [..., D, R] and ``b`` [..., R, F], a ``gate`` [..., R] if the adapter has
one, the profile ``p`` [..., R], and the frozen kernel [..., D, F] at ``base/kernel`` or ``base/embedding``.
`mlora_jax.split` returns such trees, and plain nested dicts do as well.
"""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Callable, Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mlora_jax.core.hierarchy import check_rank
from mlora_jax.core.rank_axes import (
    FACTORS,
    PROFILE,
    WITHOUT_RANK_AXIS,
    along_rank,
    by_parent,
    cut_to_rank,
    key_names,
    layer_name,
    leaf_name,
    path_names,
    rank_of,
)

Tree = Any

# These are the names that a frozen layer may give to its matrix.
FROZEN = ("kernel", "embedding")

# The names of products that the policies of `jax.checkpoint` cannot see, because functions with gradients of their own
# compute them: ``x A``, and the output of an adapted layer.
RANK_SPACE, ADAPTED_OUTPUT = "rank_space", "adapted_output"

# (D, R) -> the bound of the uniform distribution that A starts from. "fan_rank" is the paper's rule, "fan_in" PEFT's.
INITIALIZERS: dict[str, Callable[[int, int], float]] = {
    "fan_rank": lambda features_in, rank: 1.0 / math.sqrt(rank),
    "fan_in": lambda features_in, rank: 1.0 / math.sqrt(features_in),
}

# (key, shape, dtype) -> the initial gate [..., R]. "normal" is the start of SoRA (arXiv 2311.11696), "uniform" that of
# CoDyRA (arXiv 2412.01004), and "zeros" that of AdaLoRA (arXiv 2303.10512).
GATE_INITIALIZERS: dict[str, Callable[[jax.Array, tuple[int, ...], Any], jax.Array]] = {
    "ones": lambda key, shape, dtype: jnp.ones(shape, dtype),
    "normal": jax.random.normal,
    "uniform": lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, minval=0.1, maxval=1.0),
    "zeros": lambda key, shape, dtype: jnp.zeros(shape, dtype),
}


def wide_dtype(dtype: Any) -> Any:
    """Returns the dtype in which numbers of a floating dtype are summed: float64 for float64, else float32.

    >>> wide_dtype(jnp.bfloat16) == jnp.float32
    True
    """
    return jnp.dtype(jnp.float64 if jnp.dtype(dtype) == jnp.float64 else jnp.float32)


def p_scaled_product(x: jax.Array, a: jax.Array, b: jax.Array, p: jax.Array, *, precision: Any = None) -> jax.Array:
    """Returns the adapter's contribution ``((x A) * p) B``.

    It is computed in the dtype of `x`: the fp32 master factors are cast to it, and the profile is applied to the
    float32 accumulator of ``x A`` before it is rounded.

    Args:
      x: [..., D] inputs.
      a: [D, R] first factor.
      b: [R, F] second factor.
      p: the rank profile [R]. It may have the first axes of `x` in front: for x [B, T, D], [B, R] is one profile per
        example and [B, T, R] is one per token.
      precision: the precision of both products, as in `jax.numpy.matmul`.

    Returns:
      [..., F] in the dtype of `x`. It is differentiable in reverse mode only (`jax.grad`, `jax.vjp`).

    Raises:
      ValueError: `p` has another R than the factors, or its leading axes are not the first ones of `x`.

    >>> p_scaled_product(jnp.ones((1, 2)), jnp.ones((2, 2)), jnp.ones((2, 3)), jnp.array([1.0, 0.5])).tolist()
    [[3.0, 3.0, 3.0]]
    """
    if p.shape[-1] != a.shape[-1] or p.ndim > x.ndim or p.shape[:-1] != x.shape[: p.ndim - 1]:
        raise ValueError(f"profile of shape {p.shape} does not fit x {x.shape} and A {a.shape}")
    accumulate = wide_dtype(x.dtype)
    with jax.named_scope("adapter"):
        # The stubs of jax.custom_vjp lose the type of what the function returns.
        hidden = cast("jax.Array", _matmul(x, a.astype(x.dtype), accumulate, precision))  # [..., R]
        hidden = checkpoint_name(hidden, RANK_SPACE)
        return _matmul(apply_profile(hidden, p).astype(x.dtype), b.astype(x.dtype), x.dtype, precision)  # [..., F]


def apply_profile(hidden: jax.Array, p: jax.Array) -> jax.Array:
    """Returns ``(x A) * p``, the middle of the product, in the dtype of ``x A``.

    Args:
      hidden: ``x A`` [..., R].
      p: the profile as in `p_scaled_product`, with the leading axes of `hidden`.

    Raises:
      ValueError: `p` has another R than `hidden`, or its leading axes are not the first ones of `hidden`.
    """
    if p.shape[-1] != hidden.shape[-1] or p.ndim > hidden.ndim or p.shape[:-1] != hidden.shape[: p.ndim - 1]:
        raise ValueError(f"profile of shape {p.shape} does not fit x A of shape {hidden.shape}")
    return hidden * p.reshape(*p.shape[:-1], *(1,) * (hidden.ndim - p.ndim), p.shape[-1]).astype(hidden.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _matmul(x: jax.Array, w: jax.Array, dtype, precision) -> jax.Array:
    """Returns x [..., D] times w [D, F] as `dtype`. It is differentiable in reverse mode only.

    The gradient of w is computed as one product of two matrices. The gradient that jax would derive makes a CPU's
    compiler transpose the large cotangent in memory first, which takes longer than the product.
    """
    return jnp.matmul(x, w, precision=precision, preferred_element_type=dtype)


def _matmul_forward(x, w, dtype, precision):
    return _matmul(x, w, dtype, precision), (x, w)


def _matmul_backward(dtype, precision, operands, g):
    x, w = operands
    g = g.astype(x.dtype)
    rows = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
    return jnp.matmul(g, w.T, precision=precision), jnp.matmul(rows[0].T, rows[1], precision=precision)


_matmul.defvjp(_matmul_forward, _matmul_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def folded_product(
    x: jax.Array, kernel: jax.Array, a: jax.Array, b: jax.Array, p: jax.Array, precision: Any = None
) -> jax.Array:
    """Returns ``x (W + A diag(p) B)``, with one large product in place of a large and two thin ones.

    The gradients of the factors are made from that of the sum, ``x^T g``. On a CPU this takes less time than thin
    products where the kernel is small (see `folding_pays`). The kernel is frozen, and its gradient is zero.

    Args:
      x: [..., D] inputs, float32 or float64.
      kernel: W [D, F], in the dtype of `x`.
      a: [D, R] first factor.
      b: [R, F] second factor.
      p: [R], the profile that all inputs share.
      precision: the precision of all products, as in `jax.numpy.matmul`.

    Returns:
      [..., F] in the dtype of `x`. It is differentiable in reverse mode only.
    """
    return _folded_forward(x, kernel, a, b, p, precision)[0]


def _folded_forward(x, kernel, a, b, p, precision):
    matmul = functools.partial(jnp.matmul, precision=precision)
    folded = kernel + matmul((a * p[None]).astype(x.dtype), b.astype(x.dtype))
    return matmul(x, folded), (x, folded, a, b, p)


def _folded_backward(precision, saved, g):
    x, folded, a, b, p = saved
    matmul = functools.partial(jnp.matmul, precision=precision)
    rows = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
    by_sum = matmul(rows[0].T, rows[1])  # [D, F]
    by_a = matmul(by_sum, b.astype(x.dtype).T)  # [D, R], without p
    d_b = matmul((a * p[None]).astype(x.dtype).T, by_sum)
    d_p = jnp.sum(by_a * a.astype(x.dtype), axis=0)
    cast_like = lambda value, like: value.astype(like.dtype)  # noqa: E731
    d_a = cast_like(by_a * p[None].astype(x.dtype), a)
    return matmul(g, folded.T), None, d_a, cast_like(d_b, b), cast_like(d_p, p)


folded_product.defvjp(_folded_forward, _folded_backward)


def folding_pays(features_in: int, features_out: int, rank: int) -> bool:
    """Returns whether a CPU trains faster with `folded_product`, whose large products run three times as fast.

    Args:
      features_in: D.
      features_out: F.
      rank: R.

    >>> folding_pays(192, 512, 32), folding_pays(576, 1536, 32)
    (True, False)
    """
    return features_in * features_out <= 3 * 2 * rank * (features_in + features_out)


def initialize_factors(
    key: jax.Array,
    features_in: int,
    features_out: int,
    rank: int,
    *,
    leading: tuple[int, ...] = (),
    init: str = "fan_rank",
    dtype: Any = float,
) -> tuple[jax.Array, jax.Array]:
    """Draws A uniformly from +-bound and sets B to zero, so that the adapted model starts as the base model.

    Args:
      key: a `jax.random.key`.
      features_in: D.
      features_out: F.
      rank: R, at least 1.
      leading: the sizes of axes in front, such as (L,) for stacked layers.
      init: "fan_rank" for a bound of 1/sqrt(R), "fan_in" for 1/sqrt(D).
      dtype: the dtype of both factors; the default is jax's default float.

    Returns:
      A [*leading, D, R] and B [*leading, R, F].

    Raises:
      ValueError: `init` is unknown, or the rank is below 1.
    """
    check_rank(rank, "rank", low=1)
    if init not in INITIALIZERS:
        raise ValueError(f"unknown init {init!r}; known: {', '.join(INITIALIZERS)}")
    bound = INITIALIZERS[init](features_in, rank)
    a = jax.random.uniform(key, (*leading, features_in, rank), dtype, minval=-bound, maxval=bound)
    return a, jnp.zeros((*leading, rank, features_out), dtype)


def initialize_gate(key: jax.Array, shape: tuple[int, ...], *, init: str = "ones", dtype: Any = float) -> jax.Array:
    """Draws the initial gate, a trained vector that multiplies the profile.

    Args:
      key: the `jax.random.key` of the layer. The draw of the gate is independent of that of the factors.
      shape: the shape [..., R], with the leading axes of the factors.
      init: a key of `GATE_INITIALIZERS`.
      dtype: the gate's dtype; the default is jax's default float.

    Returns:
      The gate [..., R].

    Raises:
      ValueError: `init` is unknown.
    """
    if init not in GATE_INITIALIZERS:
        raise ValueError(f"unknown gate {init!r}; known: {', '.join(GATE_INITIALIZERS)}")
    return GATE_INITIALIZERS[init](jax.random.fold_in(key, path_hash("gate")), shape, dtype)


def truncate(adapter: Tree, rank: int) -> Tree:
    """Keeps the first `rank` columns of every A, rows of every B and entries of every gate.

    The result is a smaller, faster adapter. It needs a profile tree of the same rank, which this function makes from
    the old profile tree. Its hierarchy is `hierarchy.truncate(rank)`, and at `prefix(q)` of that hierarchy it computes
    the same function as the full adapter at `prefix(q)`:

        short = truncate(adapter, 2)
        values = set_profile(truncate(profile, 2), hierarchy.truncate(2).prefix(2))
        nnx.merge(graphdef, base, short, values)

    Args:
      adapter: a tree of an adapter's leaves, or a tree of profiles [..., R], which may be per example and have dropout
        keys.
      rank: the new rank, in 1..R.

    Raises:
      ValueError: the rank is outside 1..R of a layer, or the name of a leaf is not a key of `RANK_AXES`.

    >>> truncate({"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2)), "p": jnp.ones(4)}, 2)["b"].shape
    (2, 2)
    """

    def cut(path, leaf):
        *parent, name = path_names(path)
        if name in WITHOUT_RANK_AXIS:
            return leaf
        name = leaf_name(path)
        check_rank(rank, f"rank to truncate {layer_name(parent)} to", low=1, high=rank_of(name, leaf))
        return cut_to_rank(name, leaf, rank)

    return jax.tree_util.tree_map_with_path(cut, adapter)


def scale_ranks(adapter: Tree, factor: jax.Array) -> Tree:
    """Multiplies column i of every A, row i of every B and entry i of every gate by `factor` [R]."""

    def scale(path, leaf):
        return leaf * jnp.broadcast_to(along_rank(leaf_name(path), factor), leaf.shape).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(scale, adapter)


def scale_leaves(adapter: Tree, factors: Mapping[str, Any]) -> Tree:
    """Multiplies every leaf of an adapter by the factor that a dictionary has under the leaf's name."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf * jnp.asarray(factors[leaf_name(path)], leaf.dtype), adapter
    )


def fold(base: Tree, adapter: Tree, profile: Tree) -> Tree:
    """Adds every adapter to its frozen kernel: ``W + A diag(p) B``, or ``W + A diag(p * gate) B`` with a gate.

    The sum is computed in float32 or wider and stored in the kernel's dtype. The result can replace `base`: merge it
    with a zero profile, or read its kernels.

    If the kernel has more axes than ``A B`` (heads, or the window of a convolution), ``A B`` is reshaped to it. If
    these axes have another order than those of ``A B``, the variable that holds A has the attribute `kernel_layout`, a
    pair (sizes, order): the product is reshaped to [..., *sizes], and then its axes after the leading ones are put in
    that order. `mlora_jax.adapt` sets the attribute on layers that need it. A plain nested dict does not have it.

    Args:
      base: the frozen tree, with ``base/kernel`` [..., D, F] beside every pair of factors.
      adapter: a tree of an adapter's leaves.
      profile: a tree of profiles [..., R], not per example.

    Returns:
      A tree like `base`, with the same shapes and dtypes.

    Raises:
      ValueError: a pair of factors has no kernel in `base`, or its kernel has another size or is quantised; or a
        profile is per example.
    """
    factors, profiles = by_parent(adapter), by_parent(profile)
    layouts = _kernel_layouts(adapter)
    pending = set(factors)

    def add(path, leaf):
        keys = path_names(path)
        parent = keys[:-2]
        if keys[-2:-1] != ("base",) or keys[-1] not in FROZEN or parent not in factors:
            return leaf
        pending.discard(parent)
        a, b, scales = factors_and_scales(parent, factors, profiles)
        wide = wide_dtype(leaf.dtype)
        delta = jnp.matmul(a.astype(wide) * scales[..., None, :], b.astype(wide), precision="highest")
        if delta.size != leaf.size:
            raise ValueError(f"{'.'.join(keys)} has shape {leaf.shape}, but A B has shape {delta.shape}")
        sizes, order = layouts.get(parent, (delta.shape[-2:], (0, 1)))
        delta = delta.reshape(-1, *sizes).transpose(0, *(1 + axis for axis in order))
        return (leaf.astype(wide) + delta.reshape(leaf.shape)).astype(leaf.dtype)

    folded = jax.tree_util.tree_map_with_path(add, base)
    if pending:
        raise ValueError(_no_kernel(base, pending))
    return folded


def _no_kernel(base: Tree, parents: set[tuple[str, ...]]) -> str:
    names = ", ".join(sorted(map(layer_name, parents)))
    paths = [key_names(path) for path, _ in jax.tree_util.tree_leaves_with_path(base)]
    if any(path[: len(parent) + 1] == [*parent, "base"] and "qvalue" in path for parent in parents for path in paths):
        return (
            f"the kernels of {names} are quantised, and a sum would be rounded: fold into the original weights, "
            "those of the model loaded without quantisation"
        )
    return f"no base/kernel beside the factors of {names}"


def _kernel_layouts(adapter: Tree) -> dict[tuple[str, ...], tuple]:
    """Returns a dictionary: the parent of a pair -> the `kernel_layout` of its A, for all pairs that have one."""
    has_layout = lambda node: isinstance(getattr(node, "kernel_layout", None), tuple)  # noqa: E731
    nodes = jax.tree_util.tree_leaves_with_path(adapter, is_leaf=has_layout)
    return {tuple(key_names(path)[:-1]): node.kernel_layout for path, node in nodes if has_layout(node)}


def path_hash(path: str) -> int:
    """Returns a 32-bit number that depends only on a dotted path, to fold into a `jax.random.key`."""
    return zlib.crc32(path.encode())


def factors_and_scales(
    parent: tuple[str, ...], factors: Mapping, profiles: Mapping
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns one layer's factors and the scales of its ranks.

    Args:
      parent: the names along the layer's path.
      factors, profiles: the dictionaries that `by_parent` returns for an adapter and for its profile tree.

    Returns:
      A [..., D, R], B [..., R, F] and the profile times the gate, if there is one, [..., R].

    Raises:
      ValueError: a leaf is missing, or a profile or gate does not have the shape that A needs.
    """
    name = layer_name(parent)
    leaves = {**factors[parent], **profiles.get(parent, {})}
    missing = [role for role in FACTORS if role not in leaves] or [role for role in (PROFILE,) if role not in leaves]
    if missing:
        raise ValueError(f"{name} lacks {', '.join(missing)}")
    a, b, p = leaves["a"], leaves["b"], leaves[PROFILE]
    needed = (*a.shape[:-2], a.shape[-1])
    if p.shape != needed:
        raise ValueError(
            f"the profile of {name} has shape {p.shape}, but A {a.shape} needs {needed}: "
            "a profile per example has no single product A diag(p) B"
        )
    if leaves.get("gate", p).shape != needed:
        raise ValueError(f"the gate of {name} has shape {leaves['gate'].shape}, but A {a.shape} needs {needed}")
    return a, b, times_gate(p, leaves)


def times_gate(p: Any, leaves: Mapping[str, Any]) -> Any:
    """Returns a profile [R] or [..., R], times the gate [..., R] if there is one among a layer's leaves."""
    return p * leaves["gate"] if "gate" in leaves else p


def without_gate(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Returns one layer's factors with the gate, if there is one, multiplied into B: ``A diag(p) (diag(gate) B)``.

    Args:
      leaves: the layer's leaves by name, of jax or NumPy.

    Returns:
      {"a": [..., D, R], "b": [..., R, F]} in the dtypes that they have.
    """
    a, b = (leaves[name] for name in FACTORS)
    if "gate" not in leaves:
        return {"a": a, "b": b}
    return {"a": a, "b": (b * leaves["gate"][..., None]).astype(b.dtype)}
