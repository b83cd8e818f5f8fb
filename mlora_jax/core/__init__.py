"""The mathematics of nested low-rank adapters, as pure functions on arrays. It imports only jax and numpy."""

from mlora_jax.core.actions import ACTIONS, Action, ActionInput, ActionOutput, get_action
from mlora_jax.core.aurac import AXES, CurveSummary, aurac, summarize
from mlora_jax.core.hierarchy import SCALINGS, RankHierarchy, powers_of_two
from mlora_jax.core.methods import METHODS, Method, Phase, get_method
from mlora_jax.core.policies import POLICIES, Draw, Policy, draw_step, get_policy
from mlora_jax.core.product import (
    GATE_INITIALIZERS,
    INITIALIZERS,
    fold,
    initialize_factors,
    p_scaled_product,
    truncate,
)
from mlora_jax.core.readouts import READOUTS, Reading, ReadOut, get_readout, read_out, readout_profile
from mlora_jax.core.squeeze import squeeze
from mlora_jax.core.updates import UPDATES, Update, get_update

__all__ = [
    "ACTIONS",
    "AXES",
    "GATE_INITIALIZERS",
    "INITIALIZERS",
    "METHODS",
    "POLICIES",
    "READOUTS",
    "SCALINGS",
    "UPDATES",
    "Action",
    "ActionInput",
    "ActionOutput",
    "CurveSummary",
    "Draw",
    "Method",
    "Phase",
    "Policy",
    "RankHierarchy",
    "ReadOut",
    "Reading",
    "Update",
    "aurac",
    "draw_step",
    "fold",
    "get_action",
    "get_method",
    "get_policy",
    "get_readout",
    "get_update",
    "initialize_factors",
    "p_scaled_product",
    "powers_of_two",
    "read_out",
    "readout_profile",
    "squeeze",
    "summarize",
    "truncate",
]
