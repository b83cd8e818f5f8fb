"""What an adapter is worth at every rank."""

from mlora_jax.evaluate.curve import RankCurve, accuracy_and_error, rank_curve
from mlora_jax.evaluate.generation import GenerationEvaluator, extract_answer, greedy_decode
from mlora_jax.evaluate.likelihood import ChoiceEvaluator
from mlora_jax.evaluate.scoring import Prepared, Request, Scorer, Scores

__all__ = [
    "ChoiceEvaluator",
    "GenerationEvaluator",
    "Prepared",
    "RankCurve",
    "Request",
    "Scorer",
    "Scores",
    "accuracy_and_error",
    "extract_answer",
    "greedy_decode",
    "rank_curve",
]
