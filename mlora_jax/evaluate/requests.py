"""Turns items with choices into requests, and the scores of the requests into verdicts on the items."""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Sequence

import numpy as np

from mlora_jax.evaluate.scoring import Request
from mlora_jax.models.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class ChoiceItems:
    """Items that each have several choices.

    Attributes:
      requests: one request per choice, item by item.
      offsets: [items + 1], where each item's choices begin among the requests.
      labels: [items], the index of the right choice.
    """

    requests: tuple[Request, ...]
    offsets: np.ndarray
    labels: np.ndarray

    def verdicts(self, log_likelihoods: np.ndarray) -> np.ndarray:
        """Whether the likeliest choice is the right one.

        Args:
          log_likelihoods: [requests], nats.

        Returns:
          [items] bool. If several choices are equally likely, the first of them counts as chosen. An item with a
          log-likelihood that is not finite has no likeliest choice: it is wrong, and a logged warning counts such
          items.
        """
        spans = list(itertools.pairwise(self.offsets))
        chosen = np.asarray([np.argmax(log_likelihoods[i:j]) for i, j in spans])
        finite = np.asarray([np.isfinite(log_likelihoods[i:j]).all() for i, j in spans], bool)
        warn_of_not_finite(finite)
        return (chosen == self.labels) & finite

    def cut_items(self, max_length: int) -> int:
        """The number of items with a choice whose context must be cut to fit into `max_length` tokens."""
        cut = np.asarray([len(context) + len(answer) > max_length + 1 for context, answer in self.requests], bool)
        return sum(bool(cut[i:j].any()) for i, j in itertools.pairwise(self.offsets))


def choice_items(rows: Sequence[dict], tokenizer: Tokenizer, *, boundary: str) -> ChoiceItems:
    """Tokenizes rows with choices.

    Args:
      rows: dicts with prompt (str), choices (list of str) and label (int).
      tokenizer: the model's tokenizer.
      boundary: how prompt and choice are joined, see `Tokenizer.encode_pair`.

    Raises:
      ValueError: a row has no choices, a label is not the index of a choice, or a prompt or choice has no tokens of
        its own.
    """
    requests, offsets, labels = [], [0], []
    for number, row in enumerate(rows):
        choices = list(row["choices"])
        if not choices or not 0 <= int(row["label"]) < len(choices):
            raise ValueError(
                f"row {number} has label {row['label']} for {len(choices)} choices: {row['prompt'][:60]!r}"
            )
        for choice in choices:
            context, answer = tokenizer.encode_pair(row["prompt"], choice, boundary=boundary)
            if not answer or not context:
                raise ValueError(
                    f"row {number}: prompt or choice {choice!r} has no tokens of its own at the boundary {boundary!r}"
                )
            requests.append(Request(tuple(context), tuple(answer)))
        offsets.append(len(requests))
        labels.append(int(row["label"]))
    return ChoiceItems(tuple(requests), np.asarray(offsets), np.asarray(labels))


def warn_of_not_finite(finite: np.ndarray) -> None:
    """Logs a warning with the number of items whose entry in `finite` [items] is False, if there are any."""
    if not np.all(finite):
        logger.warning(
            "%d of %d items count as wrong: the model's logits for them are not finite", np.sum(~finite), len(finite)
        )
