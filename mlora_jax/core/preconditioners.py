"""Gradients of a pair of factors that are seen from the product: what a step does to A B, not to A and to B.

Weights have the form ``A B``, with A [..., D, R] and B [..., R, F]; gradients have the shapes of their leaves.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mlora_jax.core.product import wide_dtype
from mlora_jax.core.rank_axes import FACTORS, A, by_parent, path_names
from mlora_jax.core.transforms import Numbers, Transform

Tree = Any


def block_mask(ranks: Sequence[int], width: int) -> np.ndarray:
    """Returns a mask [R, R] that is true where two columns belong to the same block of S.

    With an empty S all columns are one block. Otherwise the blocks are the columns between neighbouring ranks of S, and
    those above the largest. A matrix T with these blocks keeps every prefix whose rank is in S: the first r columns of
    ``A T`` span what the first r columns of A span.

    >>> block_mask((1, 2, 4), 4).astype(int).tolist()
    [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]
    """
    block = np.searchsorted(np.array(sorted(ranks)), np.arange(1, width + 1)) if ranks else np.zeros(width)
    return block[:, None] == block[None]


@jax.custom_batching.sequential_vmap
def _one_eigh(matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
    values, vectors = jnp.linalg.eigh(matrix)
    return values, vectors


def _eigh(matrices: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the eigenvalues [..., R] and eigenvectors [..., R, R] of symmetric matrices.

    A CPU factorises one matrix at a time, for the reason that `mlora_jax.core.squeeze` gives.
    """
    rows = matrices.reshape(-1, *matrices.shape[-2:])
    one_by_one = functools.partial(jax.lax.map, _one_eigh)
    batched = lambda x: tuple(jnp.linalg.eigh(x))  # noqa: E731
    values, vectors = jax.lax.platform_dependent(rows, cpu=one_by_one, default=batched)
    return values.reshape(matrices.shape[:-1]), vectors.reshape(matrices.shape)


def _power(matrices: jax.Array, power: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """Returns the symmetric matrices with their eigenvalues [..., R] replaced by ``power(eigenvalues)``."""
    values, vectors = _eigh(matrices)
    return _product(vectors * power(values)[..., None, :], jnp.swapaxes(vectors, -1, -2))


def _product(*matrices: jax.Array) -> jax.Array:
    return functools.reduce(functools.partial(jnp.matmul, precision="highest"), matrices)


def _tall(name: str, leaf: jax.Array) -> jax.Array:
    """Returns a factor, or its gradient, with the rank axis last: A [..., D, R] or B^T [..., F, R], in a wide dtype."""
    leaf = leaf.astype(wide_dtype(leaf.dtype))
    return leaf if name == A else jnp.swapaxes(leaf, -1, -2)


def _gram(tall: jax.Array, mask: np.ndarray) -> jax.Array:
    return jnp.where(mask, _product(jnp.swapaxes(tall, -1, -2), tall), 0.0)


_OTHER = dict(zip(FACTORS, reversed(FACTORS), strict=True))


def _each_factor(gradients: Tree, change: Callable[[tuple[str, ...], str, jax.Array], jax.Array]) -> Tree:
    """Returns gradients in which every factor's is ``change(parent, name, tall gradient)``; others stay as they are."""

    def one(path, leaf):
        *parent, name = path_names(path)
        if name not in FACTORS:
            return leaf
        return _tall(name, change(tuple(parent), name, _tall(name, leaf))).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(one, gradients)


def scaled_gradients(numbers: Numbers, *, blocks: bool = False, damping: float = 1e-6) -> Transform:
    """Multiplies the gradient of each factor by the inverse Gram matrix of the other factor, and has no state.

        g_A <- g_A (B B^T + damping I)^-1,    g_B <- (A^T A + damping I)^-1 g_B

    Without damping, a step along these gradients changes ``A B`` by the same amount for ``A T`` and ``T^-1 B``. Adam's
    division of single entries, which follows it, does not have this property.

    Args:
      numbers: the numbers of Adam; only S is used.
      blocks: whether Gram matrices are cut to the blocks of S, see `block_mask`.
      damping: the number on the diagonal; the default is that of the authors' code.

    Source: Riemannian preconditioned LoRA, arXiv 2402.02347, "scaled AdamW".
    """
    ranks = numbers.ranks if blocks else ()

    def update(gradients, state, adapter):
        leaves = by_parent(adapter)

        def change(parent, name, gradient):
            other = _tall(_OTHER[name], leaves[parent][_OTHER[name]])
            gram = _gram(other, block_mask(ranks, other.shape[-1]))
            return _product(gradient, _power(gram, lambda values: 1 / (values + damping)))

        return _each_factor(gradients, change), state

    return Transform(lambda adapter: (), update)


class RiteState(NamedTuple):
    """The state of LoRA-RITE; every dictionary has the dotted path of a leaf as its key.

    Attributes:
      count: int32 scalar, the number of finished steps.
      first: the first moments [..., rows, R] in the basis of the last step.
      second: the second moments [..., R, R] in the basis of the last step.
      basis: the basis [..., other rows, R] of the other factor in the last step.
    """

    count: jax.Array
    first: dict[str, jax.Array]
    second: dict[str, jax.Array]
    basis: dict[str, jax.Array]


def lora_rite(numbers: Numbers, *, blocks: bool = False, skip: float = 1.0) -> Transform:
    """LoRA-RITE: Adam with r x r second moments in the basis of the other factor.

    With ``B = C U`` for the symmetric root ``C = (B B^T)^1/2`` and orthonormal rows of U, for A at step t:

        g = g_A C^-1                                  the unmagnified gradient
        P = U_t U_(t-1)^T                             from the basis of the last step to that of this one
        V_t = b2 P V_(t-1) P^T + (1 - b2) g^T g / D
        M_t = b1 M_(t-1) P^T + (1 - b1) g (V_t^1/2 + epsilon)^-1
        A <- A - rate M_t C^-1

    and the same for B with A in the place of B. The decays b1 and b2 are corrected for the bias of the start. The
    change of ``A B`` does not depend on which pair of factors represents the product.

    Gradients are clipped to the norm `numbers.clip` after they are unmagnified, because their norm before depends on
    the representation, and a factor whose unmagnified gradient has a root mean square above `skip` rests for a step.
    Directions in which the other factor is zero have no update. As in the authors' code the mass that escapes from the
    second moment when the basis turns is not added by default.

    Args:
      numbers: the numbers of Adam. The authors' epsilon is 1e-6.
      blocks: whether all matrices [R, R] are cut to the blocks of S, see `block_mask`: then the change of every prefix
        whose rank is in S does not depend on the representation either.
      skip: the largest root mean square.

    Source: LoRA-RITE, arXiv 2410.20625, algorithm 1, and the authors' PyTorch version for clipping, skipping, the mean
    over rows and the correction of decays. They take the triangular factor of a QR for C; both lead to the same update.
    """
    ranks = numbers.ranks if blocks else ()

    def factors(adapter):
        for parent, leaves in by_parent(adapter).items():
            for name in FACTORS:
                yield parent, name, ".".join([*parent, name]), _tall(_OTHER[name], leaves[_OTHER[name]])

    def init(adapter) -> RiteState:
        first, second, basis = {}, {}, {}
        leaves = by_parent(adapter)
        for parent, name, key, other in factors(adapter):
            own = _tall(name, leaves[parent][name])
            first[key], basis[key] = jnp.zeros_like(own), jnp.zeros_like(other)
            second[key] = jnp.zeros((*other.shape[:-2], *other.shape[-1:] * 2), other.dtype)
        return RiteState(jnp.zeros((), jnp.int32), first, second, basis)

    def update(gradients, state: RiteState, adapter):
        given, roots, basis, unmagnified = by_parent(gradients), {}, {}, {}
        for parent, name, key, other in factors(adapter):
            gram = _gram(other, block_mask(ranks, other.shape[-1]))
            floor = other.shape[-1] * jnp.finfo(gram.dtype).eps * jnp.max(jnp.abs(gram), axis=(-2, -1))[..., None]
            roots[key] = _power(gram, functools.partial(_inverse_root, floor=floor))
            basis[key] = _product(other, roots[key])
            own = _product(_tall(name, given[parent][name]), roots[key])
            size = jnp.sqrt(jnp.mean(jnp.square(own), axis=(-2, -1), keepdims=True))
            unmagnified[key] = jnp.where(size > skip, 0.0, own)
        unmagnified = _clipped(unmagnified, numbers.clip)
        count = state.count + 1
        decay1, decay2 = (_corrected(beta, count) for beta in (numbers.beta1, numbers.beta2))
        first, second, steps = {}, {}, {}
        for key, own in unmagnified.items():
            mask = block_mask(ranks, own.shape[-1])
            turn = jnp.where(mask, _product(jnp.swapaxes(basis[key], -1, -2), state.basis[key]), 0.0)
            turned = _product(turn, state.second[key], jnp.swapaxes(turn, -1, -2))
            second[key] = decay2 * turned + (1 - decay2) * _gram(own, mask) / own.shape[-2]
            scale = _power(second[key], lambda values: 1 / (jnp.sqrt(jnp.maximum(values, 0.0)) + numbers.epsilon))
            moved = _product(state.first[key], jnp.swapaxes(turn, -1, -2))
            first[key] = decay1 * moved + (1 - decay1) * _product(own, scale)
            steps[key] = _product(first[key], roots[key])
        made = _each_factor(gradients, lambda parent, name, _: steps[".".join([*parent, name])])
        return made, RiteState(count, first, second, basis)

    return Transform(init, update)


def _inverse_root(values: jax.Array, *, floor: jax.Array) -> jax.Array:
    real = values > floor
    return jnp.where(real, 1 / jnp.sqrt(jnp.where(real, values, 1.0)), 0.0)


def _corrected(beta: float, count: jax.Array) -> jax.Array:
    """Returns the decay of step `count`, counted from 1, with which a mean from zero has no bias; Adafactor's rule."""
    step = count.astype(float)
    power = jnp.power(jnp.asarray(beta, step.dtype), step - 1)
    return beta * (1 - power) / (1 - beta * power)


def _clipped(tree: dict[str, jax.Array], largest: float) -> dict[str, jax.Array]:
    if not largest:
        return tree
    norm = jnp.sqrt(sum(jnp.sum(jnp.square(leaf)) for leaf in tree.values()))
    return {key: leaf * (largest / jnp.maximum(norm, largest)).astype(leaf.dtype) for key, leaf in tree.items()}
