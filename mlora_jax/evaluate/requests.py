"""Scoring requests as fixed-shape batches: which tokens are run, and which of their log-likelihoods are asked for."""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Sequence

import numpy as np

from mlora_jax.models.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class ChoiceRequests:
    """The log-likelihood of every choice of every item, prepared once and scored for any adapter and rank.

    A choice of one token needs no run of its own: it is read off the row that runs the context, and a row that is
    the beginning of another row is dropped. So six one-word labels cost one row, not six.

    Attributes:
      batches: dicts with tokens [B, T] int32, positions, targets [B, A] int32, weights [B, A] float32: an `AnswerBatch`
        whose every entry of weight 1 is one asked token.
      owners: per batch [n, 3] int: (row, column) of an asked token and the flat choice it belongs to.
      offsets: [items + 1], where each item's choices begin in the flat list.
      labels: [items], the right choice.
      truncated: items whose context was cut on the left to fit.
    """

    batches: list[dict[str, np.ndarray]]
    owners: list[np.ndarray]
    offsets: np.ndarray
    labels: np.ndarray
    truncated: int

    def verdicts(self, log_likelihoods: Sequence[np.ndarray]) -> np.ndarray:
        """Whether the likeliest choice is the right one.

        Args:
          log_likelihoods: per batch [B, A], of the asked tokens.

        Returns:
          [items] bool. Of equally likely choices the first counts as chosen. An item with a log-likelihood that is not
          finite has no likeliest choice: it is wrong, and a logged warning has the count of such items.
        """
        totals = self.choice_log_likelihoods(log_likelihoods)
        spans = list(itertools.pairwise(self.offsets))
        chosen = np.asarray([np.argmax(totals[i:j]) for i, j in spans])
        finite = np.asarray([np.isfinite(totals[i:j]).all() for i, j in spans], bool)
        warn_of_not_finite(finite)
        return (chosen == self.labels) & finite

    def choice_log_likelihoods(self, log_likelihoods: Sequence[np.ndarray]) -> np.ndarray:
        """[choices] float64, the sum over each choice's tokens; arguments as `verdicts`."""
        totals = np.zeros(self.offsets[-1])
        for owner, values in zip(self.owners, log_likelihoods, strict=True):
            np.add.at(totals, owner[:, 2], np.asarray(values, np.float64)[owner[:, 0], owner[:, 1]])
        return totals


def prepare_choices(
    rows: Sequence[dict], tokenizer: Tokenizer, *, seam: str, max_length: int, batch_size: int, pad_multiple: int
) -> ChoiceRequests:
    """Tokenizes items with choices into `ChoiceRequests`.

    Args:
      rows: dicts with prompt (str), choices (list of str) and label (int).
      tokenizer: of the model.
      seam: how prompt and choice meet, see `Tokenizer.encode_pair`.
      max_length: a longer context loses tokens on its left.
      batch_size: the largest B; batches are cut evenly.
      pad_multiple: T is a multiple of this.

    Raises:
      ValueError: a row without choices, a label that is none of them, a prompt or choice without tokens of its own.
    """
    sequences: list[tuple[int, ...]] = []
    asked: list[list[tuple[int, int, int]]] = []  # per sequence: (position, target, flat choice)
    offsets, labels, truncated = [0], [], 0
    for number, row in enumerate(rows):
        choices = list(row["choices"])
        if not choices or not 0 <= int(row["label"]) < len(choices):
            raise ValueError(
                f"row {number} has label {row['label']} for {len(choices)} choices: {row['prompt'][:60]!r}"
            )
        cut, index = False, {}
        pairs = []
        for choice in choices:
            context, answer = tokenizer.encode_pair(row["prompt"], choice, seam=seam)
            if not answer or not context:
                raise ValueError(
                    f"row {number}: prompt or choice {choice!r} has no tokens of its own at the seam {seam!r}"
                )
            # The last answer token is predicted, never run.
            context_length = min(len(context), max_length - len(answer) + 1)
            if context_length < 1:
                raise ValueError(f"choice {choice!r} of row {number} alone is longer than {max_length} tokens")
            cut |= context_length < len(context)
            pairs.append((tuple(context[len(context) - context_length :]), tuple(answer)))
        runs = {context + answer[:-1] for context, answer in pairs}
        for run in sorted(runs, key=len, reverse=True):
            if not any(longer[: len(run)] == run for longer in index):
                index[run] = len(sequences)
                sequences.append(run)
                asked.append([])
        for flat, (context, answer) in enumerate(pairs, start=offsets[-1]):
            run = next(r for r in index if r[: len(context) + len(answer) - 1] == context + answer[:-1])
            first = len(context) - 1
            asked[index[run]] += [(first + j, token, flat) for j, token in enumerate(answer)]
        offsets.append(offsets[-1] + len(choices))
        labels.append(int(row["label"]))
        truncated += cut
    batches, owners = [], []
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    width = max((len(a) for a in asked), default=1)
    batch_size = even_batch_size(len(order), batch_size)
    for start in range(0, len(order), batch_size):
        members = order[start : start + batch_size]
        longest = max(len(sequences[i]) for i in members)
        batch, owner = _batch(members, sequences, asked, batch_size, -(-longest // pad_multiple) * pad_multiple, width)
        batches.append(batch)
        owners.append(owner)
    return ChoiceRequests(batches, owners, np.asarray(offsets), np.asarray(labels), truncated)


def warn_of_not_finite(finite: np.ndarray) -> None:
    """Logs one warning with the number of items [items] bool whose logits were not finite, if there are any."""
    if not np.all(finite):
        logger.warning(
            "%d of %d items count as wrong: the model's logits for them are not finite", np.sum(~finite), len(finite)
        )


def even_batch_size(rows: int, largest: int) -> int:
    """The smallest size at which rows make no more batches than at the largest size: less padding at the end.

    >>> even_batch_size(500, 64), even_batch_size(12, 64), even_batch_size(0, 64)
    (63, 12, 1)
    """
    return -(-rows // -(-rows // largest)) if rows else 1


def _batch(members, sequences, asked, batch_size, length, width):
    batch = {
        "tokens": np.zeros((batch_size, length), np.int32),
        "positions": np.zeros((batch_size, width), np.int32),
        "targets": np.zeros((batch_size, width), np.int32),
        "weights": np.zeros((batch_size, width), np.float32),
    }
    owner = []
    for row, member in enumerate(members):
        batch["tokens"][row, : len(sequences[member])] = sequences[member]
        for column, (position, target, flat) in enumerate(asked[member]):
            batch["positions"][row, column] = position
            batch["targets"][row, column] = target
            batch["weights"][row, column] = 1.0
            owner.append((row, column, flat))
    return batch, np.asarray(owner).reshape(-1, 3)
