"""What an adapter is worth at every rank."""

from mlora_jax.evaluate.curve import RankCurve, accuracy_and_error, rank_curve
from mlora_jax.evaluate.exact_match import GenerationEvaluator, extract_answer
from mlora_jax.evaluate.generation import Generator, StopStrings
from mlora_jax.evaluate.likelihood import ChoiceEvaluator
from mlora_jax.evaluate.requests import ChoiceRequests, prepare_choices

__all__ = [
    "ChoiceEvaluator",
    "ChoiceRequests",
    "GenerationEvaluator",
    "Generator",
    "RankCurve",
    "StopStrings",
    "accuracy_and_error",
    "extract_answer",
    "prepare_choices",
    "rank_curve",
]
