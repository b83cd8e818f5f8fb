"""Log-likelihoods of continuations, for any adapter under any profile, in one executable per batch shape.

Requests that share a context are one row of a batch: the context, and behind it the tokens of every continuation, each
of which sees the context and itself only. The context's keys and values are computed once, and a continuation of one
token adds nothing to the row: it is read off the context's last state.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from mlora_jax.adapt import set_profile
from mlora_jax.train.objective import answer_scores


class Request(NamedTuple):
    """The log-likelihood of some tokens behind others; at least one token id in each."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]


class Scores(NamedTuple):
    """Of requests, in their order.

    Attributes:
      log_likelihoods: [requests] float64, nats, summed over a continuation's tokens.
      greedy: [requests] bool, whether every token of the continuation is the likeliest one.
    """

    log_likelihoods: np.ndarray
    greedy: np.ndarray


@dataclasses.dataclass(frozen=True)
class Prepared:
    """Requests as fixed-shape batches.

    Attributes:
      batches: trees of arrays with leading B, on the device; of few different shapes.
      owners: per batch [n, 3] int: row and column of an asked token, and the request it belongs to.
      requests: how many there are.
      truncated: requests whose context was cut on the left to fit.
      rows: rows with tokens, over all batches.
    """

    batches: tuple[dict[str, Any], ...]
    owners: tuple[np.ndarray, ...]
    requests: int
    truncated: int
    rows: int

    def collect(self, results: Iterable[tuple[np.ndarray, np.ndarray]]) -> Scores:
        """The scores of the requests.

        Args:
          results: per batch log-likelihoods [B, A] and greedy [B, A], as `Scorer.run_batch` gives them.
        """
        totals, greedy = np.zeros(self.requests), np.ones(self.requests, bool)
        for owner, (values, likeliest) in zip(self.owners, results, strict=True):
            row, column, request = owner.T
            np.add.at(totals, request, np.asarray(values, np.float64)[row, column])
            np.logical_and.at(greedy, request, np.asarray(likeliest)[row, column])
        return Scores(totals, greedy)


class _Row(NamedTuple):
    """A context and continuations of it in one row of tokens.

    Attributes:
      context: token ids.
      runs: the further token ids to run, one sequence per segment.
      asked: (position whose state predicts, target, request).
    """

    context: tuple[int, ...]
    runs: list[tuple[int, ...]]
    asked: list[tuple[int, int, int]]

    @property
    def length(self) -> int:
        return len(self.context) + sum(map(len, self.runs))


class Scorer:
    """Scores requests: `score(prepare(requests), adapter, p)`.

    Args:
      graphdef: of the adapted decoder in evaluation mode.
      base: frozen tree.
      profile: profile tree; its values are replaced by the p of each call.
      max_length: tokens of context that the model has. A request that is longer loses tokens on the left and is a row
        of its own: as lm-evaluation-harness's Hugging Face backend does it, per choice. The last token of a
        continuation is predicted and never run.
      batch_size: the largest B.
      pad_multiple: T is a multiple of this.
      chunk: answer positions with logits at one time.

    Attributes:
      max_length: as given.
      compiled: the jitted function (base, adapter, p, batch) -> log-likelihoods and greedy [B, A]; its cache size
        counts compilations: one per batch shape, whatever the number of ranks and adapters.
    """

    def __init__(
        self, graphdef, base, profile, *, max_length: int, batch_size: int, pad_multiple: int, chunk: int = 1024
    ):
        @jax.jit
        def score(base, adapter, p, batch):
            values = set_profile(profile, p)
            answers = {name: batch[name] for name in ("tokens", "positions", "targets", "weights")}
            return answer_scores(graphdef, base, adapter, values, answers, chunk=chunk, layout=batch.get("layout"))

        self.compiled = score
        self._score = functools.partial(score, base)
        self.max_length = max_length
        self._batch_size, self._pad_multiple = batch_size, pad_multiple

    def prepare(self, requests: Sequence[Request]) -> Prepared:
        """Requests in any order as batches for `score`.

        Raises:
          ValueError: a context or continuation without tokens, or a continuation that is longer than the context.
        """
        rows, truncated = _pack(requests, self.max_length)
        rows.sort(key=lambda row: (-(-row.length // self._pad_multiple), len(row.asked)))
        size = even_batch_size(len(rows), self._batch_size)
        parts = [rows[start : start + size] for start in range(0, len(rows), size)]
        lengths = [max(-(-row.length // self._pad_multiple) * self._pad_multiple for row in part) for part in parts]
        widths: dict[int, int] = {}  # batches of one length share one width, and so one executable
        for part, length in zip(parts, lengths, strict=True):
            widths[length] = max(widths.get(length, 1), *(len(row.asked) for row in part))
        several = any(len(row.runs) > 1 for row in rows)
        made = [
            _batch(part, size, length, widths[length], several) for part, length in zip(parts, lengths, strict=True)
        ]
        batches, owners = zip(*made, strict=True) if made else ((), ())
        return Prepared(tuple(map(jax.device_put, batches)), owners, len(requests), truncated, len(rows))

    def score(self, prepared: Prepared, adapter, p) -> Scores:
        """The scores of prepared requests by an adapter under a profile p: [R], or what `set_profile` takes."""
        # Fetched one by one: dozens of executions in flight can starve XLA's thread pool on a CPU of few cores.
        return prepared.collect(self.run_batch(batch, adapter, p) for batch in prepared.batches)

    def run_batch(self, batch, adapter, p) -> tuple[np.ndarray, np.ndarray]:
        """Log-likelihoods and greedy [B, A] of the tokens that one batch asks for."""
        values, greedy = self._score(adapter, p, batch)
        return np.asarray(values), np.asarray(greedy)


def even_batch_size(rows: int, largest: int) -> int:
    """The smallest size at which rows make no more batches than at the largest size: less padding at the end.

    >>> even_batch_size(500, 64), even_batch_size(12, 64), even_batch_size(0, 64)
    (63, 12, 1)
    """
    return -(-rows // -(-rows // largest)) if rows else 1


def _pack(requests: Sequence[Request], max_length: int) -> tuple[list[_Row], int]:
    """Rows that hold every request, and how many of the requests were cut."""
    by_context: dict[tuple[int, ...], list[int]] = {}
    rows, truncated = [], 0
    for number, (context, continuation) in enumerate(requests):
        if not context or not continuation:
            raise ValueError(f"request {number} has {len(context)} tokens of context and {len(continuation)} after it")
        room = max_length - len(continuation) + 1
        if room < 1:
            raise ValueError(f"the continuation of request {number} alone is longer than {max_length} tokens")
        if len(context) > room:
            rows += _rows_of(tuple(context[-room:]), [(number, tuple(continuation))])
            truncated += 1
        else:
            by_context.setdefault(tuple(context), []).append(number)
    for context, numbers in by_context.items():
        rows += _rows_of(context, [(number, tuple(requests[number].continuation)) for number in numbers])
    return rows, truncated


def _rows_of(context: tuple[int, ...], members: list[tuple[int, tuple[int, ...]]]) -> list[_Row]:
    """Continuations (request, token ids) of one context as rows; usually one."""
    runs: list[tuple[int, ...]] = []  # a run that begins another is part of it
    for run in sorted({tokens[:-1] for _, tokens in members}, key=len, reverse=True):
        if run and not any(longer[: len(run)] == run for longer in runs):
            runs.append(run)
    # Attention grows with the square of a row, so that very many continuations are better off in several rows.
    room, rows = max(len(context), 256), [_Row(context, [], [])]
    for run in runs:
        if rows[-1].runs and rows[-1].length + len(run) > len(context) + room:
            rows.append(_Row(context, [], []))
        rows[-1].runs.append(run)
    for request, tokens in members:
        row, start = _place(rows, tokens[:-1])
        row.asked.append((len(context) - 1, tokens[0], request))
        row.asked.extend((start + j, token, request) for j, token in enumerate(tokens[1:]))
    return rows


def _place(rows: list[_Row], run: tuple[int, ...]) -> tuple[_Row, int]:
    """The row in which a run lies, and where it begins there."""
    for row in rows:
        start = len(row.context)
        for other in row.runs:
            if other[: len(run)] == run:
                return row, start
            start += len(other)
    return rows[0], len(rows[0].context)  # nothing to run: one token


def _batch(rows: list[_Row], size: int, length: int, width: int, several: bool):
    integers = functools.partial(np.zeros, dtype=np.int32)
    batch: dict[str, Any] = {name: integers((size, width)) for name in ("positions", "targets")}
    batch |= {"tokens": integers((size, length)), "weights": np.zeros((size, width), np.float32)}
    positions, segments = integers((size, length)), integers((size, length))
    positions[:] = np.arange(length)
    shared, owner = integers(size), []
    for number, row in enumerate(rows):
        start = shared[number] = len(row.context)
        batch["tokens"][number, :start] = row.context
        for segment, run in enumerate(row.runs, start=1):
            end = start + len(run)
            batch["tokens"][number, start:end], segments[number, start:end] = run, segment
            positions[number, start:end] = len(row.context) + np.arange(len(run))
            start = end
        for column, (position, target, request) in enumerate(row.asked):
            batch["positions"][number, column], batch["targets"][number, column] = position, target
            batch["weights"][number, column] = 1.0
            owner.append((number, column, request))
    if several:
        batch["layout"] = {"positions": positions, "segment_ids": segments, "shared": shared}
    return batch, np.asarray(owner, int).reshape(-1, 3)
