"""Measures the accuracy of an adapter at every rank, and chooses which ranks to deploy."""

from mlora_jax.evaluate.choice import (
    Allocation,
    AllocationRow,
    adapter_parameters,
    allocate_ranks,
    allocation_curve,
    layer_profiles,
    smallest_rank,
)
from mlora_jax.evaluate.curve import RankCurve, accuracy_and_error, rank_curve
from mlora_jax.evaluate.exact_match import GenerationEvaluator, extract_answer
from mlora_jax.evaluate.generation import Generator
from mlora_jax.evaluate.likelihood import ChoiceEvaluator
from mlora_jax.evaluate.scoring import Prepared, Request, Scorer, Scores
from mlora_jax.evaluate.statistics import Comparison, Interval, bootstrap_aurac, compare
from mlora_jax.evaluate.stop_strings import StopStrings
from mlora_jax.evaluate.token_accuracy import TokenEvaluator

__all__ = [
    "Allocation",
    "AllocationRow",
    "ChoiceEvaluator",
    "Comparison",
    "GenerationEvaluator",
    "Generator",
    "Interval",
    "Prepared",
    "RankCurve",
    "Request",
    "Scorer",
    "Scores",
    "StopStrings",
    "TokenEvaluator",
    "accuracy_and_error",
    "adapter_parameters",
    "allocate_ranks",
    "allocation_curve",
    "bootstrap_aurac",
    "compare",
    "extract_answer",
    "layer_profiles",
    "rank_curve",
    "smallest_rank",
]
