"""Measures accuracy on the tokens of given answers, for any adapter under any profile."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mlora_jax.data.tokenize import tokenize
from mlora_jax.evaluate.likelihood import ScoredEvaluator
from mlora_jax.evaluate.requests import warn_of_not_finite
from mlora_jax.evaluate.scoring import Request, Scorer
from mlora_jax.models.tokenizer import Tokenizer


class TokenEvaluator(ScoredEvaluator):
    """Checks for each token of the answers whether it is the likeliest one after the true text before it.

    `evaluator(adapter, p)` returns one verdict per token, the end of an answer included, row by row. The tokens of one
    answer are not independent, so a standard error over them is too small.

    Args:
      scorer: the scorer of the adapted decoder.
      rows: dicts with prompt and answer (str).
      tokenizer: the model's tokenizer.
      boundary: how prompt and answer are joined, see `Tokenizer.encode_pair`.

    Attributes:
      compiled: the scorer's jitted function; its cache size counts compilations.
      truncated: the number of rows that are longer than the scorer's `max_length`. They are cut on the right as in
        training, or left out if nothing of their answer is left.

    Raises:
      ValueError: a row is not valid for training, or no row is short enough.
    """

    def __init__(self, scorer: Scorer, rows: Sequence[dict], tokenizer: Tokenizer, *, boundary: str) -> None:
        found = tokenize(
            rows, tokenizer, boundary=boundary, max_length=scorer.max_length, overflow="truncate", split="evaluation"
        )
        firsts = [int(np.argmax(example.loss_mask)) for example in found.examples]
        requests = [
            Request(tuple(example.tokens[:first].tolist()), tuple(example.tokens[first:].tolist()))
            for example, first in zip(found.examples, firsts, strict=True)
        ]
        super().__init__(scorer, requests)
        self.truncated = found.truncated + found.dropped

    def __call__(self, adapter: Any, p: Any) -> np.ndarray:
        """The verdicts [tokens] bool on an adapter under the profile p: [R], or what `set_profile` takes."""
        adapter, p = self._scorer.place(adapter, p)
        made = [self._scorer.run_batch(batch, adapter, p) for batch in self._prepared.batches]
        owners = np.concatenate(self._prepared.owners)
        values, greedy = (np.concatenate(parts)[owners >= 0] for parts in zip(*made, strict=True))  # without padding
        finite = np.isfinite(values)
        warn_of_not_finite(finite)
        # The order of the rows, not the order in which the scorer packed them.
        return (greedy & finite)[np.argsort(owners[owners >= 0], kind="stable")]
