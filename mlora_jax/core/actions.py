"""What may happen to an adapter before a phase of training begins, or before it is read out: one table of actions.

An action is a pure function of arrays. It declares by name what it needs besides the adapter, such as second moments
of the inputs, and `mlora_jax.run.needs` collects that. Adding an action is adding a row to `ACTIONS`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mlora_jax.core.eva import eva_columns
from mlora_jax.core.hierarchy import RankHierarchy
from mlora_jax.core.importance import order_components
from mlora_jax.core.kernel_starts import olora_start, pissa_start, svfit_start
from mlora_jax.core.product import initialize_factors, initialize_gate, path_hash
from mlora_jax.core.randomized import squeeze_randomized
from mlora_jax.core.rank_axes import FACTORS, GATE, A, B, adapter_rank, by_parent, leading_axes, path_names
from mlora_jax.core.rows import find_row
from mlora_jax.core.squeeze import profile_like, squeeze_factors

Tree = Any

# Where an action may stand: before the first phase, before a later one, or at the end, as a part of a read-out.
PLACES = ("first", "later", "end")
# What becomes of the optimizer's state: it is kept, it starts anew, or its moments follow the change of the factors.
MOMENTS = ("kept", "reset", "mapped")


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("adapter", "trained_profile", "key", "needed"),
    meta_fields=("init", "gate_start"),
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class ActionInput:
    """The input of an action. All arrays may have one more axis in front, for K trials at once.

    Attributes:
      adapter: the tree of factors.
      trained_profile: [R], the profile of the function that the adapter computes and that an action may keep.
      key: a `jax.random.key`, or [K] of them.
      needed: a dictionary: the name of every need of the action -> the value that was collected for it.
      init: a key of `INITIALIZERS`, from which fresh columns are drawn.
      gate_start: a key of `GATE_INITIALIZERS`, from which a fresh adapter's gates are drawn.
    """

    adapter: Tree
    trained_profile: jax.Array
    key: jax.Array
    needed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    init: str = "fan_rank"
    gate_start: str = "ones"


class ActionOutput(NamedTuple):
    """The output of an action.

    Attributes:
      adapter: the new tree of factors.
      gradient_maps: the tree by which gradients of the old factors become gradients of the new ones, see
        `mlora_jax.core.squeeze.map_gradients`; None where the action gives none.
      profiles: [ranks of S, R], one profile for each rank; None where the fixed read-outs serve.
      norms: a dictionary: path of a layer -> [..., R], the norms of the layer's components from large to small, by
        which a read-out spreads ranks over layers; None where every layer has the same rank.
    """

    adapter: Tree
    gradient_maps: Tree | None = None
    profiles: jax.Array | None = None
    norms: Mapping[str, jax.Array] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Action:
    """A row of `ACTIONS`.

    Attributes:
      apply: (ActionInput) -> ActionOutput; traceable.
      summary: one line for tables and errors.
      needs: the names of what it needs besides the adapter, keys of `mlora_jax.run.needs.NEEDS`.
      places: the places where it may stand, some of `PLACES`.
      moments: what becomes of the optimizer's state, one of `MOMENTS`.
      hierarchy: computes the ranks, scales and weights of the new adapter from those of the old one. It is a function
        of the hierarchy alone, so that plans and reports know it without arrays.
      eager: whether `apply` only draws or picks arrays, and is not compiled.
      needs_gate: whether it makes gates, which the method must then have.
    """

    apply: Callable[[ActionInput], ActionOutput]
    summary: str
    needs: tuple[str, ...] = ()
    places: tuple[str, ...] = PLACES
    moments: str = "reset"
    hierarchy: Callable[[RankHierarchy], RankHierarchy] = lambda hierarchy: hierarchy
    eager: bool = False
    needs_gate: bool = False


def _keep(given: ActionInput) -> ActionOutput:
    return ActionOutput(given.adapter)


def _fresh(given: ActionInput, *, init: str) -> ActionOutput:
    """Draws A and a gate anew from the key and the path of their layer and sets B to zero."""
    drawn = {}
    for parent, leaves in by_parent(given.adapter).items():
        a, b = (leaves[name] for name in FACTORS)
        key = jax.random.fold_in(given.key, path_hash(".".join(parent)))
        leading, sizes = leading_axes(leaves), (a.shape[-2], b.shape[-1], a.shape[-1])
        fresh = initialize_factors(key, *sizes, leading=leading, init=init, dtype=a.dtype)
        drawn[parent] = dict(zip(FACTORS, fresh, strict=True))
        if GATE in leaves:
            shape, dtype = leaves[GATE].shape, leaves[GATE].dtype
            drawn[parent][GATE] = initialize_gate(key, shape, init=given.gate_start, dtype=dtype)

    return ActionOutput(_with_leaves(given.adapter, drawn))


def _small_normal(given: ActionInput) -> ActionOutput:
    """Draws A and B from the normal distribution with the deviation of AdaLoRA's code, and the gates anew."""
    drawn = {}
    for parent, leaves in by_parent(given.adapter).items():
        keys = jax.random.split(jax.random.fold_in(given.key, path_hash(".".join(parent))))
        drawn[parent] = {
            name: 0.02 * jax.random.normal(key, leaves[name].shape, leaves[name].dtype)
            for name, key in zip(FACTORS, keys, strict=True)
        }
        if GATE in leaves:
            drawn[parent][GATE] = initialize_gate(
                keys[0], leaves[GATE].shape, init=given.gate_start, dtype=leaves[GATE].dtype
            )
    return ActionOutput(_with_leaves(given.adapter, drawn))


def _with_leaves(adapter: Tree, made: Mapping[tuple[str, ...], Mapping[str, Any]]) -> Tree:
    """Returns the adapter with the leaves that `made` has under their layer and name; the others stay."""

    def replace(path, leaf):
        *parent, name = path_names(path)
        return made[tuple(parent)].get(name, leaf)

    return jax.tree_util.tree_map_with_path(replace, adapter)


def _squeeze(given: ActionInput, *, moments: str | None = None) -> ActionOutput:
    grams = None if moments is None else given.needed[moments]
    profiles = profile_like(given.adapter, given.trained_profile)
    adapter, maps = squeeze_factors(given.adapter, profiles, key=given.key, grams=grams, init=given.init)
    return ActionOutput(adapter, maps)


def _randomized(given: ActionInput, *, share: float) -> ActionOutput:
    profiles = profile_like(given.adapter, given.trained_profile)
    return ActionOutput(squeeze_randomized(given.adapter, profiles, share=share, key=given.key))


def _from_kernels(given: ActionInput, *, start: Callable[..., Mapping[str, jax.Array]]) -> ActionOutput:
    kernels = {parent: leaves["kernel"] for parent, leaves in by_parent(given.needed["kernels"]).items()}
    made = {}
    for parent, leaves in by_parent(given.adapter).items():
        found = start(kernels[parent], given.trained_profile)
        made[parent] = {name: found[name].astype(leaf.dtype) for name, leaf in leaves.items() if name in found}
    return ActionOutput(_with_leaves(given.adapter, made))


def _eva(given: ActionInput) -> ActionOutput:
    layers = by_parent(given.adapter)
    grams = {parent: leaves["gram"] for parent, leaves in by_parent(given.needed["input_statistics"]).items()}
    found = eva_columns({parent: grams[parent] for parent in layers}, adapter_rank(given.adapter))
    made = {
        parent: {A: found[parent].astype(leaves[A].dtype), B: jnp.zeros_like(leaves[B])}
        for parent, leaves in layers.items()
    }
    return ActionOutput(_with_leaves(given.adapter, made))


def _ordered(given: ActionInput, *, spread: bool) -> ActionOutput:
    adapter, norms = order_components(given.adapter, profile_like(given.adapter, given.trained_profile))
    return ActionOutput(adapter, norms=norms if spread else None)


def _without_scale(hierarchy: RankHierarchy) -> RankHierarchy:
    return dataclasses.replace(hierarchy, scaling="none")


# What is taken out of W at the start is at the end a part of the adapter, so it counts in every read-out.
_KERNEL_START: dict[str, Any] = dict(needs=("kernels",), places=("first",))
_SQUEEZE: dict[str, Any] = dict(places=("later", "end"), hierarchy=_without_scale)

# Sources: the start of A, arXiv 2605.07850 (fan_rank) and PEFT (fan_in); the truncated SVD, Eckart and Young (1936);
# its form that is weighted by the inputs, DRONE (NeurIPS 2021).
ACTIONS: dict[str, Action] = {
    "none": Action(apply=_keep, summary="the adapter as it is", moments="kept", eager=True),
    "fan_rank": Action(
        apply=functools.partial(_fresh, init="fan_rank"),
        summary="A uniform in +-1/sqrt(R), B zero",
        places=("first",),
        eager=True,
    ),
    "fan_in": Action(
        apply=functools.partial(_fresh, init="fan_in"),
        summary="A uniform in +-1/sqrt(D), B zero",
        places=("first",),
        eager=True,
    ),
    "peft": Action(
        apply=lambda given: ActionOutput(given.needed["peft_adapter"]),
        summary="the adapter of config.adapter.start_from",
        needs=("peft_adapter",),
        places=("first",),
        eager=True,
    ),
    "squeeze": Action(apply=_squeeze, summary="the truncated SVD of A B", **_SQUEEZE),
    "squeeze_rotated": Action(
        apply=_squeeze,
        summary="the truncated SVD of A B; the optimizer's moments follow it",
        moments="mapped",
        **_SQUEEZE,
    ),
    "squeeze_inputs": Action(
        apply=functools.partial(_squeeze, moments="hidden_moments"),
        summary="the truncated SVD of what A B makes of training data",
        needs=("hidden_moments",),
        **_SQUEEZE,
    ),
    "squeeze_randomized": Action(
        apply=functools.partial(_randomized, share=1.0),
        summary="the randomised SVD of A B",
        **_SQUEEZE,
    ),
    "squeeze_to_half": Action(
        apply=functools.partial(_randomized, share=0.5),
        summary="the randomised SVD of A B to rank R/2; the other columns are zero from then on",
        **_SQUEEZE,
    ),
    "squeeze_to_quarter": Action(
        apply=functools.partial(_randomized, share=0.25),
        summary="the randomised SVD of A B to rank R/4; the other columns are zero from then on",
        **_SQUEEZE,
    ),
    "pissa": Action(
        apply=functools.partial(_from_kernels, start=pissa_start),
        summary="the R/2 largest singular directions of W, taken out of W by the other R/2 columns",
        **_KERNEL_START,
    ),
    "olora": Action(
        apply=functools.partial(_from_kernels, start=olora_start),
        summary="the first R/2 directions of a QR of W, taken out of W by the other R/2 columns",
        **_KERNEL_START,
    ),
    "svfit": Action(
        apply=functools.partial(_from_kernels, start=svfit_start),
        summary="pissa with the singular values in the gates",
        needs_gate=True,
        **_KERNEL_START,
    ),
    "small_normal": Action(
        apply=_small_normal,
        summary="A and B normal with the deviation .02; gates that start at zero make it the base",
        places=("first",),
        eager=True,
        needs_gate=True,
    ),
    "eva": Action(
        apply=_eva,
        summary="A holds principal directions of the inputs, B is zero; the layers share R/2 columns each by variance",
        needs=("input_statistics",),
        places=("first",),
    ),
    "ordered": Action(
        apply=functools.partial(_ordered, spread=False),
        summary="the components of every layer by their norms",
        **_SQUEEZE,
    ),
    "ordered_global": Action(
        apply=functools.partial(_ordered, spread=True),
        summary="the components by their norms, with ranks that are spread over the layers",
        places=("end",),
        hierarchy=_without_scale,
    ),
    "calibrated": Action(
        apply=lambda given: ActionOutput(given.adapter, profiles=given.needed["fitted_profiles"]),
        summary="the adapter as it is, with profiles that are fitted to training data",
        needs=("fitted_profiles",),
        places=("end",),
        eager=True,
    ),
}


def get_action(name: str, place: str | None = None) -> Action:
    """Returns the action that has the given name.

    Args:
      name: a key of `ACTIONS`.
      place: the place where it is to stand, one of `PLACES`; None skips this check.

    Raises:
      ValueError: there is no such action, or it may not stand there.
    """
    action = find_row(ACTIONS, name, "action")
    if place is not None and place not in action.places:
        allowed = ", ".join(known for known, row in ACTIONS.items() if place in row.places)
        raise ValueError(f"the action {name!r} cannot stand in the place {place!r}; actions that can: {allowed}")
    return action


def run_action(action: Action, given: ActionInput) -> ActionOutput:
    """Runs an action and returns its output. The action is compiled unless it only draws or picks arrays."""
    return action.apply(given) if action.eager else jax.block_until_ready(_compiled(action, given))


@functools.partial(jax.jit, static_argnums=0)
def _compiled(action: Action, given: ActionInput) -> ActionOutput:
    return action.apply(given)
