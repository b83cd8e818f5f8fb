"""Accuracy by label log-likelihood, for any adapter under any profile, in one executable per batch shape."""

from __future__ import annotations

import functools

import jax
import numpy as np

from mlora_jax.adapt import set_profile
from mlora_jax.evaluate.requests import ChoiceRequests
from mlora_jax.train.objective import answer_log_likelihoods


class ChoiceEvaluator:
    """Scores prepared requests: `evaluator(adapter, p)` gives one verdict per item.

    Args:
      graphdef: of the adapted decoder in evaluation mode.
      base: frozen tree.
      profile: profile tree; its values are replaced by the p of each call.
      requests: from `prepare_choices`.
      chunk: answer positions with logits at one time.

    Attributes:
      compiled: the jitted function (base, adapter, p, batch) -> [B, A]; its cache size counts compilations.
      truncated: items whose context was cut on the left to fit.
    """

    def __init__(self, graphdef, base, profile, requests: ChoiceRequests, *, chunk: int = 1024):
        @jax.jit
        def log_likelihoods(base, adapter, p, batch):
            return answer_log_likelihoods(graphdef, base, adapter, set_profile(profile, p), batch, chunk=chunk)

        self.compiled = log_likelihoods
        self._score = functools.partial(log_likelihoods, base)
        self._requests = requests
        self.truncated = requests.truncated
        self._batches = [jax.device_put(batch) for batch in requests.batches]

    def __call__(self, adapter, p) -> np.ndarray:
        """Verdicts [items] bool of an adapter under the profile p [R]."""
        # Fetched one by one: dozens of executions in flight can starve XLA's thread pool on a CPU of few cores.
        return self._requests.verdicts([self.run_batch(number, adapter, p) for number in range(len(self))])

    def __len__(self) -> int:
        """The number of batches."""
        return len(self._batches)

    @property
    def compilations(self) -> int:
        """Executables so far."""
        return self.compiled._cache_size()

    def run_batch(self, number: int, adapter, p) -> np.ndarray:
        """Log-likelihoods [B, A] of the tokens that one batch asks for."""
        return np.asarray(self._score(adapter, p, self._batches[number]))
