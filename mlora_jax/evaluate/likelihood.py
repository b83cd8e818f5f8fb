"""Measures accuracy by the log-likelihood of labels, for any adapter under any profile."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mlora_jax.evaluate.requests import choice_items
from mlora_jax.evaluate.scoring import Request, Scorer
from mlora_jax.models.tokenizer import Tokenizer


class ScoredEvaluator:
    """An evaluator that scores a fixed set of requests.

    Args:
      scorer: the scorer of the adapted decoder.
      requests: the requests, in any order.

    Attributes:
      compiled: the scorer's jitted function; its cache size counts compilations.
    """

    def __init__(self, scorer: Scorer, requests: Sequence[Request]) -> None:
        self._scorer, self._prepared = scorer, scorer.prepare(requests)
        self.compiled = scorer.compiled

    def __len__(self) -> int:
        """The number of batches."""
        return len(self._prepared.batches)

    @property
    def compilations(self) -> int:
        """The number of executables that have been compiled so far."""
        return self.compiled._cache_size()

    def run_batch(self, number: int, adapter: Any, p: Any) -> None:
        """Computes the batch of this index, so that a caller can time it."""
        self._scorer.run_batch(self._prepared.batches[number], adapter, p)


class ChoiceEvaluator(ScoredEvaluator):
    """Compares the likeliest choice with the right one: `evaluator(adapter, p)` returns one verdict per item.

    Args:
      scorer: the scorer of the adapted decoder.
      rows: dicts with prompt (str), choices (list of str) and label (int).
      tokenizer: the model's tokenizer.
      boundary: how prompt and choice are joined, see `Tokenizer.encode_pair`.

    Attributes:
      compiled: the scorer's jitted function; its cache size counts compilations.
      truncated: the number of items with a context that was cut on the left to fit.

    Raises:
      ValueError: a row is not a valid item, see `choice_items`, or a choice is longer than the model's context.
    """

    def __init__(self, scorer: Scorer, rows: Sequence[dict], tokenizer: Tokenizer, *, boundary: str) -> None:
        self._items = choice_items(rows, tokenizer, boundary=boundary)
        super().__init__(scorer, self._items.requests)
        self.truncated = self._items.cut_items(scorer.max_length)

    def __call__(self, adapter: Any, p: Any) -> np.ndarray:
        """The verdicts [items] bool on an adapter under the profile p: [R], or what `set_profile` takes."""
        return self._items.verdicts(self._scorer.score(self._prepared, adapter, p).log_likelihoods)
