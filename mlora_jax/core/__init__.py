"""The mathematics of nested low-rank adapters: pure functions on arrays. Imports jax and numpy only."""

from mlora_jax.core.aurac import AXES, CurveSummary, aurac, summarize
from mlora_jax.core.hierarchy import READOUTS, SCALINGS, RankHierarchy, powers_of_two, readout_profile
from mlora_jax.core.methods import CARRIES, METHODS, Method, Phase, get_method
from mlora_jax.core.policies import POLICIES, Draw, Policy, draw_step, get_policy
from mlora_jax.core.product import (
    GATE_INITIALIZERS,
    INITIALIZERS,
    fold,
    initialize_factors,
    p_scaled_product,
    truncate,
)
from mlora_jax.core.squeeze import squeeze

__all__ = [
    "AXES",
    "CARRIES",
    "GATE_INITIALIZERS",
    "INITIALIZERS",
    "METHODS",
    "POLICIES",
    "READOUTS",
    "SCALINGS",
    "CurveSummary",
    "Draw",
    "Method",
    "Phase",
    "Policy",
    "RankHierarchy",
    "aurac",
    "draw_step",
    "fold",
    "get_method",
    "get_policy",
    "initialize_factors",
    "p_scaled_product",
    "powers_of_two",
    "readout_profile",
    "squeeze",
    "summarize",
    "truncate",
]
