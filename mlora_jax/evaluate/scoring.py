"""Computes log-likelihoods of continuations, for any adapter under any profile, in one executable per batch shape.

Requests that share a context form one text: the context, followed by the tokens of every continuation. A continuation
attends to the context and to itself only. The keys and values of the context are computed once. A continuation of one
token adds nothing to the text, because the last state of the context predicts it. The texts are packed into rows of one
length, so that there is little padding and all batches have the same shape.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, cast

import jax
import numpy as np
from jax.sharding import Mesh

from mlora_jax.adapters import set_profile
from mlora_jax.evaluate.shapes import even_batch_size, few_lengths, pack
from mlora_jax.models.attention import Spans
from mlora_jax.parallel.arrays import put_replicated, put_rows, put_weights
from mlora_jax.parallel.mesh import EVALUATED, shards_of
from mlora_jax.parallel.rules import replicated
from mlora_jax.training.objective import AnswerBatch, answer_scores

ROW = 1024  # tokens of a row; a longer text makes the rows longer
WIDTHS = 48  # the `share` of `few_lengths`, for the widths of texts that attention is compiled for


class Request(NamedTuple):
    """A request for the log-likelihood of a continuation after a context.

    Attributes:
      context: token ids, at least one.
      continuation: token ids, at least one.
    """

    context: tuple[int, ...]
    continuation: tuple[int, ...]


class Scores(NamedTuple):
    """The scores of requests, in their order.

    Attributes:
      log_likelihoods: [requests] float64, nats, summed over a continuation's tokens.
      greedy: [requests] bool, whether every token of the continuation is the likeliest one.
    """

    log_likelihoods: np.ndarray
    greedy: np.ndarray


@dataclasses.dataclass(frozen=True)
class Prepared:
    """Requests as batches of one shape.

    Attributes:
      batches: trees of arrays on the device. On a mesh, one tree holds several batches, with a leading axis that is
        sharded over the mesh.
      owners: for every batch [A] int, the requests that its predicted tokens belong to; -1 in padding.
      requests: the number of requests.
      truncated: the number of requests whose context was cut on the left to fit.
      texts: the number of texts (a context with its continuations) in all batches.
    """

    batches: tuple[dict[str, Any], ...]
    owners: tuple[np.ndarray, ...]
    requests: int
    truncated: int
    texts: int

    def collect(self, results: Iterable[tuple[np.ndarray, np.ndarray]]) -> Scores:
        """The scores of the requests.

        Args:
          results: for every batch, the log-likelihoods [A] and greedy [A] that `Scorer.run_batch` returns.
        """
        totals, greedy = np.zeros(self.requests), np.ones(self.requests, bool)
        for owner, (values, likeliest) in zip(self.owners, results, strict=True):
            asked = owner >= 0
            np.add.at(totals, owner[asked], np.asarray(values, np.float64)[asked])
            np.logical_and.at(greedy, owner[asked], np.asarray(likeliest)[asked])
        return Scores(totals, greedy)


class _Text(NamedTuple):
    """A context and some of its continuations.

    Attributes:
      context: the token ids of the context.
      runs: the token ids that follow the context, one sequence per segment.
      asked: for every token to predict, (position of the state that predicts it, token id, index of the request).
    """

    context: tuple[int, ...]
    runs: list[tuple[int, ...]]
    asked: list[tuple[int, int, int]]

    @property
    def length(self) -> int:
        """The number of tokens."""
        return len(self.context) + sum(map(len, self.runs))


class Scorer:
    """Scores requests: `score(prepare(requests), adapter, p)`.

    Args:
      graphdef: the graph definition of the adapted decoder in evaluation mode.
      base: the frozen tree.
      profile: the profile tree; its values are replaced by the p of each call.
      max_length: the model's context, in tokens. A longer request loses tokens on the left and becomes a text of its
        own, as in lm-evaluation-harness's Hugging Face backend, which cuts each choice by itself. The last token of a
        continuation is predicted, but the model does not read it.
      batch_size: a batch has at most as many tokens as this number of texts of the largest length.
      pad_multiple: T is a multiple of this.
      chunk: the number of answer positions whose logits are in memory at one time.
      mesh: None for one device. On a mesh, one batch is scored for each part of the rows at the same time.

    Attributes:
      max_length: as given.
      compiled: the jitted function (base, adapter, p, batch) -> log-likelihoods and greedy [A]. Its cache size counts
        compilations: one per set of requests, for any number of ranks and adapters.
    """

    def __init__(
        self,
        graphdef: Any,
        base: Any,
        profile: Any,
        *,
        max_length: int,
        batch_size: int,
        pad_multiple: int,
        chunk: int = 256,
        mesh: Mesh | None = None,
    ) -> None:
        @jax.jit
        def score(base, adapter, p, batch):
            def one(batch):
                values = set_profile(profile, p)
                answers = AnswerBatch(
                    tokens=batch["tokens"],
                    positions=batch["positions"],
                    targets=batch["targets"],
                    weights=batch["weights"],
                )
                return answer_scores(graphdef, base, adapter, values, answers, chunk=chunk, layout=batch.get("layout"))

            if mesh is None:
                return one(batch)
            several = jax.vmap(one, spmd_axis_name=EVALUATED)(batch)
            return jax.lax.with_sharding_constraint(several, replicated(mesh))

        self.compiled: Any = score  # the type of a jitted function in jax lacks `_cache_size`
        self._score = functools.partial(score, base)
        self.max_length = max_length
        self._batch_size, self._pad_multiple = batch_size, pad_multiple
        self._mesh, self._shards = mesh, shards_of(mesh, EVALUATED)

    def with_base(self, base: Any) -> Scorer:
        """Returns a scorer of another frozen tree of the same structure, which shares the compiled programs."""
        other = copy.copy(self)
        other._score = functools.partial(self.compiled, base)
        return other

    def prepare(self, requests: Sequence[Request]) -> Prepared:
        """Makes batches for `score` from requests in any order.

        Raises:
          ValueError: a context or continuation has no tokens, or a continuation is longer than `max_length`.
        """
        texts, truncated = _texts(requests, self.max_length)
        lengths = [text.length for text in texts]
        widths = few_lengths(lengths, self._pad_multiple, WIDTHS)
        widest = max(widths, default=0)
        row = max(widest, min(ROW, self._batch_size * widest, sum(lengths)))
        row = -(-row // self._pad_multiple) * self._pad_multiple
        rows = pack(lengths, row)
        # A CPU is fastest with one row at a time, because the outputs of a layer then stay in its cache.
        most = self._batch_size * widest // self._shards // max(row, 1)
        largest = 1 if jax.default_backend() == "cpu" else max(1, most)
        size = even_batch_size(-(-len(rows) // self._shards), largest)
        parts = [rows[start : start + size] for start in range(0, len(rows), size)]
        shape = _Shape(
            tokens=(size, row),
            widths=tuple(sorted(set(widths), reverse=True)),
            texts=max((len(numbers) for numbers in rows), default=0),
            asked=max((sum(len(texts[number].asked) for each in part for number in each) for part in parts), default=0),
            plain=all(len(numbers) == 1 and len(texts[numbers[0]].runs) < 2 for numbers in rows),
        )
        made = [_batch([[(texts[n], widths[n]) for n in numbers] for numbers in part], shape) for part in parts]
        batches, owners = zip(*(made if self._mesh is None else self._joined(made)), strict=True) if made else ((), ())
        put = jax.device_put if self._mesh is None else self._put
        return Prepared(tuple(map(put, batches)), owners, len(requests), truncated, len(texts))

    def _joined(self, made: list) -> list:
        """Stacks batches, and concatenates their owners, in groups with one batch for each part of the mesh."""
        groups = [made[start : start + self._shards] for start in range(0, len(made), self._shards)]
        nobody = made[-1][0], np.full_like(made[-1][1], -1)
        groups[-1] += [nobody] * (self._shards - len(groups[-1]))
        stacked = lambda *leaves: np.stack(leaves)  # noqa: E731
        return [
            (jax.tree.map(stacked, *(batch for batch, _ in group)), np.concatenate([owner for _, owner in group]))
            for group in groups
        ]

    def _put(self, batch: dict[str, Any]) -> dict[str, Any]:
        return put_rows(batch, self._mesh, 0, over=EVALUATED)

    def score(self, prepared: Prepared, adapter: Any, p: Any) -> Scores:
        """Scores prepared requests with an adapter under a profile p: [R], or what `set_profile` takes."""
        adapter, p = self.place(adapter, p)
        # Fetched one by one: dozens of executions in flight can starve XLA's thread pool on a CPU of few cores.
        return prepared.collect(self.run_batch(batch, adapter, p) for batch in prepared.batches)

    def place(self, adapter: Any, p: Any) -> tuple[Any, Any]:
        """Puts an adapter and a profile where the mesh needs them, once for many calls of `run_batch`."""
        return put_weights(adapter, self._mesh), put_replicated(p, self._mesh)

    def run_batch(self, batch: dict[str, Any], adapter: Any, p: Any) -> tuple[np.ndarray, np.ndarray]:
        """The log-likelihoods [A] of the tokens that one batch predicts, and whether each is the likeliest [A]."""
        adapter, p = self.place(adapter, p)
        values, greedy = self._score(adapter, p, batch)
        return np.asarray(values).reshape(-1), np.asarray(greedy).reshape(-1)


class _Shape(NamedTuple):
    """The shapes that all batches share.

    Attributes:
      tokens: (B, T).
      widths: the widths of texts, in falling order.
      texts: the largest number of texts in a row.
      asked: A, the largest number of predicted tokens in a batch.
      plain: whether every row is one context with at most one continuation, so that no layout is needed.
    """

    tokens: tuple[int, int]
    widths: tuple[int, ...]
    texts: int
    asked: int
    plain: bool


def _texts(requests: Sequence[Request], max_length: int) -> tuple[list[_Text], int]:
    """Groups requests into texts, and counts the requests that were cut."""
    by_context: dict[tuple[int, ...], list[int]] = {}
    texts, truncated = [], 0
    for number, (context, continuation) in enumerate(requests):
        if not context or not continuation:
            raise ValueError(f"request {number} has {len(context)} tokens of context and {len(continuation)} after it")
        room = max_length - len(continuation) + 1
        if room < 1:
            raise ValueError(f"the continuation of request {number} alone is longer than {max_length} tokens")
        if len(context) > room:
            texts += _texts_of(tuple(context[-room:]), [(number, tuple(continuation))])
            truncated += 1
        else:
            by_context.setdefault(tuple(context), []).append(number)
    for context, numbers in by_context.items():
        texts += _texts_of(context, [(number, tuple(requests[number].continuation)) for number in numbers])
    return texts, truncated


def _texts_of(context: tuple[int, ...], members: list[tuple[int, tuple[int, ...]]]) -> list[_Text]:
    """Groups the continuations (request, token ids) of one context into texts, usually a single one."""
    runs: list[tuple[int, ...]] = []  # without those that are the beginning of another run
    for run in sorted({tokens[:-1] for _, tokens in members}, key=len, reverse=True):
        if run and not any(longer[: len(run)] == run for longer in runs):
            runs.append(run)
    # The cost of attention grows with the square of a text, so very many continuations go into several texts.
    room, texts = max(len(context), 256), [_Text(context, [], [])]
    for run in runs:
        if texts[-1].runs and texts[-1].length + len(run) > len(context) + room:
            texts.append(_Text(context, [], []))
        texts[-1].runs.append(run)
    for request, tokens in members:
        text, start = _place(texts, tokens[:-1])
        text.asked.append((len(context) - 1, tokens[0], request))
        text.asked.extend((start + j, token, request) for j, token in enumerate(tokens[1:]))
    return texts


def _place(texts: list[_Text], run: tuple[int, ...]) -> tuple[_Text, int]:
    """The text that contains a run, and the position where the run begins."""
    for text in texts:
        start = len(text.context)
        for other in text.runs:
            if other[: len(run)] == run:
                return text, start
            start += len(other)
    return texts[0], len(texts[0].context)  # a continuation of one token has an empty run


def _batch(rows: list[list[tuple[_Text, int]]], shape: _Shape) -> tuple[dict[str, Any], np.ndarray]:
    """Makes arrays from rows of texts (with their widths), and the owners of the predicted tokens."""
    integers = functools.partial(np.zeros, dtype=np.int32)
    batch: dict[str, Any] = {name: integers(shape.asked) for name in ("positions", "targets")}
    batch |= {"tokens": integers(shape.tokens), "weights": np.zeros(shape.asked, np.float32)}
    positions, segments, parents = (integers(shape.tokens) for _ in range(3))
    starts = {width: np.full((len(batch["tokens"]), shape.texts), -1, np.int32) for width in shape.widths}
    owner: list[int] = []
    for number, row in enumerate(rows):
        start = segment = 0
        for text, width in row:
            places = starts[width][number]
            places[np.argmax(places < 0)] = start
            for position, target, request in text.asked:
                batch["positions"][len(owner)] = number * shape.tokens[1] + start + position
                batch["targets"][len(owner)], batch["weights"][len(owner)] = target, 1.0
                owner.append(request)
            parent = segment = segment + 1  # 0 is padding
            for begin, run in ((0, text.context), *((len(text.context), run) for run in text.runs)):
                end = start + len(run)
                batch["tokens"][number, start:end] = run
                segments[number, start:end], parents[number, start:end] = segment, parent
                positions[number, start:end] = begin + np.arange(len(run))
                start, segment = end, segment + 1
    if not shape.plain:
        spans = Spans(cast("tuple[jax.Array, ...]", tuple(starts.values())), shape.widths)  # still on the host
        batch["layout"] = {"positions": positions, "segment_ids": segments, "parent_ids": parents, "spans": spans}
    return batch, np.pad(np.asarray(owner, int), (0, shape.asked - len(owner)), constant_values=-1)
