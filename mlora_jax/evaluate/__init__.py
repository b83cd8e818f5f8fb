"""What an adapter is worth at every rank, and which ranks to deploy."""

from mlora_jax.evaluate.choice import (
    Allocation,
    AllocationRow,
    adapter_parameters,
    allocate_ranks,
    allocation_curve,
    layer_profiles,
    smallest_rank,
)
from mlora_jax.evaluate.curve import RankCurve, accuracy_and_error, rank_curve, read_out
from mlora_jax.evaluate.generation import GenerationEvaluator, extract_answer, greedy_decode
from mlora_jax.evaluate.likelihood import ChoiceEvaluator
from mlora_jax.evaluate.requests import ChoiceRequests, prepare_choices
from mlora_jax.evaluate.statistics import Comparison, Interval, bootstrap_aurac, compare

__all__ = [
    "Allocation",
    "AllocationRow",
    "ChoiceEvaluator",
    "ChoiceRequests",
    "Comparison",
    "GenerationEvaluator",
    "Interval",
    "RankCurve",
    "accuracy_and_error",
    "adapter_parameters",
    "allocate_ranks",
    "allocation_curve",
    "bootstrap_aurac",
    "compare",
    "extract_answer",
    "greedy_decode",
    "layer_profiles",
    "prepare_choices",
    "rank_curve",
    "read_out",
    "smallest_rank",
]
