"""Actions on the adapters and the optimizer states of trials that train together."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import optax

from mlora_jax.core.actions import Action, ActionInput
from mlora_jax.core.squeeze import Tree, map_gradients
from mlora_jax.training.step import TrialState


def act_on_trials(
    action: Action,
    optimizer: optax.GradientTransformation,
    state: TrialState,
    trained_profiles: jax.Array,
    keys: jax.Array,
    needed: Mapping[str, Any],
    *,
    init: str = "fan_rank",
) -> TrialState:
    """Applies an action to all layers of K trials in one program.

    Args:
      action: a row of `ACTIONS` that may stand before a later phase.
      optimizer: the optimizer that `make_optimizer` returned.
      state: the state of K trials.
      trained_profiles: [K, R], the profile of the function that each trial computes.
      keys: [K] `jax.random.key`s for fresh columns.
      needed: the name of every need of the action -> its value, with a leading K.
      init: a key of `INITIALIZERS`, from which fresh columns are drawn.

    Returns:
      The state with the new adapters and with the optimizer state that the action's `moments` prescribes.
    """
    given = ActionInput(
        adapter=state.adapter, trained_profile=trained_profiles, key=keys, needed=dict(needed), init=init
    )
    return _act(action, optimizer, state, given)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _act(action: Action, optimizer: optax.GradientTransformation, state: TrialState, given: ActionInput) -> TrialState:
    made = action.apply(given)
    state = state._replace(adapter=made.adapter)
    return state._replace(optimizer=_OPTIMIZER_STATES[action.moments](optimizer, state, made.gradient_maps))


def _mapped(optimizer, state: TrialState, maps: Tree) -> Any:
    """Maps the moments of Adam to the new factors; the second moments are mapped as if columns were uncorrelated."""
    del optimizer
    return jax.tree.map(functools.partial(_map_moments, maps=maps), state.optimizer, is_leaf=_is_adam)


# `Action.moments` -> (optimizer, state, gradient maps) -> the optimizer's state.
_OPTIMIZER_STATES = {
    "kept": lambda optimizer, state, maps: state.optimizer,
    "reset": lambda optimizer, state, maps: jax.vmap(optimizer.init)(state.adapter),
    "mapped": _mapped,
}


def _is_adam(node: Any) -> bool:
    return isinstance(node, optax.ScaleByAdamState)


def _map_moments(node: Any, *, maps: Tree) -> Any:
    if not _is_adam(node):
        return node
    return node._replace(mu=map_gradients(node.mu, maps), nu=map_gradients(node.nu, maps, squared=True))
