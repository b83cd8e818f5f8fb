"""AdaLoRA: the importance of every component from the sensitivity of its entries, and a budget of components.

The function of a layer is ``A diag(gate) B``: the gate holds what the paper calls singular values. The sensitivities
are a part of the optimizer's state, and the proximal step after the update reads them.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mlora_jax.core.product import wide_dtype
from mlora_jax.core.rank_axes import FACTORS, GATE, RANK_AXES, A, by_parent, leading_axes, leaf_name, path_names
from mlora_jax.core.transforms import AfterUpdate, Numbers, Transform

Tree = Any

BETA = 0.85  # the decay of both averages
ORTHOGONAL = 0.1  # the weight of the regulariser; that of the authors' scripts


class Sensitivity(NamedTuple):
    """The averages of the sensitivity of every entry, trees like the adapter.

    Attributes:
      smoothed: the average of ``|w g|``.
      uncertainty: the average of the distance of ``|w g|`` from `smoothed`.
    """

    smoothed: Tree
    uncertainty: Tree


def sensitivities(numbers: Numbers, *, beta: float = BETA, orthogonal: float = ORTHOGONAL) -> Transform:
    """Adds the gradient of the regulariser to that of the loss, and averages the sensitivities of all entries.

        loss <- loss + orthogonal * mean over all A and B of (|A^T A - I|_F, |B B^T - I|_F)
        I <- |w g|;  smoothed <- beta smoothed + (1 - beta) I
        uncertainty <- beta uncertainty + (1 - beta) |I - smoothed|

    Args:
      numbers: the numbers of Adam, which follows; not used.
      beta: the decay of both averages, beta_1 = beta_2 of the paper.
      orthogonal: the weight of the regulariser.

    Source: AdaLoRA, arXiv 2303.10512, equations 8 to 11, and the authors' code, whose regulariser has no square. There
    w is the weight after the step, and here it is that before it. Gradients are clipped before the regulariser.
    """
    del numbers

    def init(adapter) -> Sensitivity:
        zeros = jax.tree.map(jnp.zeros_like, adapter)
        return Sensitivity(zeros, zeros)

    def update(gradients, state: Sensitivity, adapter):
        whole = jax.tree.map(jnp.add, gradients, jax.grad(lambda each: orthogonal * _distance(each))(adapter))
        now = jax.tree.map(lambda w, g: jnp.abs(w * g), adapter, whole)
        mean = lambda old, new: beta * old + (1 - beta) * new  # noqa: E731
        smoothed = jax.tree.map(mean, state.smoothed, now)
        away = jax.tree.map(lambda new, average: jnp.abs(new - average), now, smoothed)
        return whole, Sensitivity(smoothed, jax.tree.map(mean, state.uncertainty, away))

    return Transform(init, update)


def _distance(adapter: Tree) -> jax.Array:
    """Returns the mean over all factors of the distance of their Gram matrix from the identity."""
    total, count = jnp.zeros((), float), 0
    for leaves in by_parent(adapter).values():
        for name in FACTORS:
            tall = leaves[name] if name == A else jnp.swapaxes(leaves[name], -1, -2)
            tall = tall.astype(wide_dtype(tall.dtype))
            gram = jnp.matmul(jnp.swapaxes(tall, -1, -2), tall, precision="highest")
            away = gram - jnp.broadcast_to(jnp.eye(gram.shape[-1], dtype=gram.dtype), gram.shape)
            # The gradient of a norm does not exist where the norm is zero.
            norms = jnp.sqrt(jnp.sum(jnp.square(away), axis=(-2, -1)) + jnp.finfo(gram.dtype).tiny)
            total, count = total + jnp.sum(norms).astype(total.dtype), count + norms.size
    return total / count


def importances(state: Sensitivity) -> dict[tuple[str, ...], jax.Array]:
    """Returns the importance of every component: ``s(gate_i) + mean_d s(A_di) + mean_f s(B_if)``.

    The score s of an entry is its smoothed sensitivity times its uncertainty.

    Args:
      state: the averages.

    Returns:
      A dictionary: the names along a layer's path -> [..., R].

    Source: AdaLoRA, arXiv 2303.10512, equation 7.
    """
    scores = jax.tree.map(jnp.multiply, state.smoothed, state.uncertainty)
    found = {}
    for parent, leaves in by_parent(scores).items():
        # The mean over the axis beside the rank axis: D of A and F of B.
        means = [jnp.mean(leaves[name], axis=-1 - (RANK_AXES[name] == -1)) for name in FACTORS]
        found[parent] = leaves[GATE] + sum(means)
    return found


def budget_at(progress: Any, components: int, target: int, *, first: float = 0.1, last: float = 0.5) -> jax.Array:
    """Returns how many components of all layers have a gate after a share of the steps; int32.

    With t from 0 to 1 between the shares `first` and 1 - `last`: ``floor(target + (components - target) (1 - t)^3)``.

    Args:
      progress: the share of the steps that are finished.
      components: the number of components of all layers, the budget at the start.
      target: the budget at the end.
      first: the share of the steps at the start during which all components stay.
      last: the share of the steps at the end during which the budget is the target.

    Source: AdaLoRA, arXiv 2303.10512, equation 12. The paper's shares differ between tasks; .1 and .5 are near those of
    its GLUE runs.
    """
    share = jnp.clip((jnp.asarray(progress, float) - first) / (1 - last - first), 0.0, 1.0)
    exact = target + (components - target) * (1 - share) ** 3
    return jnp.floor(exact + 1e-3).astype(jnp.int32)  # rounding must not take a component of a whole number


def keep_budget(adapter: Tree, after: AfterUpdate, *, target: float = 2 / 3) -> Tree:
    """Sets the gates of all components to zero but for the most important ones, as many as the budget has.

    A gate that is zero has a gradient and may come back at a later step. The budget falls at every step; the authors
    let it fall at every tenth to hundredth step of longer runs.

    Args:
      adapter: the tree of factors and gates.
      after: the numbers of the step. The state of the optimizer has the sensitivities.
      target: the rank that stays per layer in the mean, as a share of R. The default is that of PEFT, 8 of 12.

    Source: AdaLoRA, arXiv 2303.10512, algorithm 1.
    """
    is_state = lambda node: isinstance(node, Sensitivity)  # noqa: E731
    state = next(node for node in jax.tree.leaves(after.optimizer, is_leaf=is_state) if is_state(node))
    scores = importances(state)
    every = jnp.concatenate([score.reshape(-1) for score in scores.values()])
    layers = sum(math.prod(leading_axes(leaves)) for leaves in by_parent(adapter).values())
    rank = every.size // layers
    budget = budget_at(after.progress, every.size, int(target * rank + 1e-9) * layers)
    place = jnp.argsort(jnp.argsort(-every, stable=True), stable=True).astype(jnp.int32)
    kept, start, masks = place < budget, 0, {}
    for parent, score in scores.items():
        masks[parent] = kept[start : start + score.size].reshape(score.shape)
        start += score.size

    def cut(path, leaf):
        if leaf_name(path) != GATE:
            return leaf
        return jnp.where(masks[path_names(path)[:-1]], leaf, jnp.zeros_like(leaf))

    return jax.tree_util.tree_map_with_path(cut, adapter)
