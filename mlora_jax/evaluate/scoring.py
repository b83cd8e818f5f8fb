"""Log-likelihoods of continuations, for any adapter under any profile, in one executable per batch shape.

Requests that share a context are one text: the context, and behind it the tokens of every continuation, each of which
sees the context and itself only. The context's keys and values are computed once, and a continuation of one token adds
nothing to the text: it is read off the context's last state. Rows of one length are packed with texts, so that hardly a
token is padding and all batches are of one shape.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from mlora_jax.adapters import set_profile
from mlora_jax.evaluate.shapes import even_batch_size, few_lengths, pack
from mlora_jax.models.attention import Spans
from mlora_jax.parallel.arrays import put_replicated, put_rows, put_weights
from mlora_jax.parallel.mesh import EVALUATED, shards_of
from mlora_jax.parallel.rules import replicated
from mlora_jax.training.objective import answer_scores

ROW = 1024  # tokens of a row, or more for a longer text
WIDTHS = 48  # see `few_lengths`; the widths of texts that attention is compiled for


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
    """Requests as batches of one shape.

    Attributes:
      batches: trees of arrays, on the device; on a mesh several at once, with a leading axis that lies along it.
      owners: per batch [A] int: the requests that its asked tokens belong to, -1 in padding.
      requests: how many there are.
      truncated: requests whose context was cut on the left to fit.
      texts: contexts with their continuations, over all batches.
    """

    batches: tuple[dict[str, Any], ...]
    owners: tuple[np.ndarray, ...]
    requests: int
    truncated: int
    texts: int

    def collect(self, results: Iterable[tuple[np.ndarray, np.ndarray]]) -> Scores:
        """The scores of the requests.

        Args:
          results: per batch log-likelihoods [A] and greedy [A], as `Scorer.run_batch` gives them.
        """
        totals, greedy = np.zeros(self.requests), np.ones(self.requests, bool)
        for owner, (values, likeliest) in zip(self.owners, results, strict=True):
            asked = owner >= 0
            np.add.at(totals, owner[asked], np.asarray(values, np.float64)[asked])
            np.logical_and.at(greedy, owner[asked], np.asarray(likeliest)[asked])
        return Scores(totals, greedy)


class _Text(NamedTuple):
    """A context and continuations of it.

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
      max_length: tokens of context that the model has. A request that is longer loses tokens on the left and is a text
        of its own: as lm-evaluation-harness's Hugging Face backend does it, per choice. The last token of a
        continuation is predicted and never run.
      batch_size: a batch has at most as many tokens as this many of the longest text.
      pad_multiple: T is a multiple of this.
      chunk: answer positions with logits at one time.
      mesh: None for one device. On a mesh as many batches are scored at once as it has parts of the rows.

    Attributes:
      max_length: as given.
      compiled: the jitted function (base, adapter, p, batch) -> log-likelihoods and greedy [A]; its cache size
        counts compilations: one per set of requests, whatever the number of ranks and adapters.
    """

    def __init__(
        self,
        graphdef,
        base,
        profile,
        *,
        max_length: int,
        batch_size: int,
        pad_multiple: int,
        chunk: int = 256,
        mesh: Mesh | None = None,
    ):
        @jax.jit
        def score(base, adapter, p, batch):
            def one(batch):
                values = set_profile(profile, p)
                answers = {name: batch[name] for name in ("tokens", "positions", "targets", "weights")}
                return answer_scores(graphdef, base, adapter, values, answers, chunk=chunk, layout=batch.get("layout"))

            if mesh is None:
                return one(batch)
            several = jax.vmap(one, spmd_axis_name=EVALUATED)(batch)
            return jax.lax.with_sharding_constraint(several, replicated(mesh))

        self.compiled = score
        self._score = functools.partial(score, base)
        self.max_length = max_length
        self._batch_size, self._pad_multiple = batch_size, pad_multiple
        self._mesh, self._shards = mesh, shards_of(mesh, EVALUATED)

    def prepare(self, requests: Sequence[Request]) -> Prepared:
        """Requests in any order as batches for `score`.

        Raises:
          ValueError: a context or continuation without tokens, or a continuation that is longer than the context.
        """
        texts, truncated = _texts(requests, self.max_length)
        lengths = [text.length for text in texts]
        widths = few_lengths(lengths, self._pad_multiple, WIDTHS)
        widest = max(widths, default=0)
        row = max(widest, min(ROW, self._batch_size * widest, sum(lengths)))
        row = -(-row // self._pad_multiple) * self._pad_multiple
        rows = pack(lengths, row)
        # A CPU does a row at a time fastest: what one layer hands to the next then stays in its cache.
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
        """Batches and owners, as many as there are parts on the mesh stacked into one."""
        groups = [made[start : start + self._shards] for start in range(0, len(made), self._shards)]
        nobody = made[-1][0], np.full_like(made[-1][1], -1)
        groups[-1] += [nobody] * (self._shards - len(groups[-1]))
        stacked = lambda *leaves: np.stack(leaves)  # noqa: E731
        return [
            (jax.tree.map(stacked, *(batch for batch, _ in group)), np.concatenate([owner for _, owner in group]))
            for group in groups
        ]

    def _put(self, batch):
        return put_rows(batch, self._mesh, 0, over=EVALUATED)

    def score(self, prepared: Prepared, adapter, p) -> Scores:
        """The scores of prepared requests by an adapter under a profile p: [R], or what `set_profile` takes."""
        adapter, p = self.place(adapter, p)
        # Fetched one by one: dozens of executions in flight can starve XLA's thread pool on a CPU of few cores.
        return prepared.collect(self.run_batch(batch, adapter, p) for batch in prepared.batches)

    def place(self, adapter, p) -> tuple:
        """Adapter and profile where the mesh wants them, for many calls of `run_batch`."""
        return put_weights(adapter, self._mesh), put_replicated(p, self._mesh)

    def run_batch(self, batch, adapter, p) -> tuple[np.ndarray, np.ndarray]:
        """Log-likelihoods and greedy [A] of the tokens that one batch asks for."""
        adapter, p = self.place(adapter, p)
        values, greedy = self._score(adapter, p, batch)
        return np.asarray(values).reshape(-1), np.asarray(greedy).reshape(-1)


class _Shape(NamedTuple):
    """What all batches have in common.

    Attributes:
      tokens: (B, T).
      widths: of texts, falling.
      texts: the most in a row.
      asked: the most in a batch: A.
      plain: every row is a context and at most one continuation, and needs no layout.
    """

    tokens: tuple[int, int]
    widths: tuple[int, ...]
    texts: int
    asked: int
    plain: bool


def _texts(requests: Sequence[Request], max_length: int) -> tuple[list[_Text], int]:
    """Texts that hold every request, and how many of the requests were cut."""
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
    """Continuations (request, token ids) of one context as texts; usually one."""
    runs: list[tuple[int, ...]] = []  # a run that begins another is part of it
    for run in sorted({tokens[:-1] for _, tokens in members}, key=len, reverse=True):
        if run and not any(longer[: len(run)] == run for longer in runs):
            runs.append(run)
    # Attention grows with the square of a text, so that very many continuations are better off in several.
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
    """The text in which a run lies, and where it begins there."""
    for text in texts:
        start = len(text.context)
        for other in text.runs:
            if other[: len(run)] == run:
                return text, start
            start += len(other)
    return texts[0], len(texts[0].context)  # nothing to run: one token


def _batch(rows: list[list[tuple[_Text, int]]], shape: _Shape) -> tuple[dict[str, Any], np.ndarray]:
    """Rows of texts (and their widths) as arrays, and the owners of the asked tokens."""
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
        spans = Spans(tuple(starts.values()), shape.widths)
        batch["layout"] = {"positions": positions, "segment_ids": segments, "parent_ids": parents, "spans": spans}
    return batch, np.pad(np.asarray(owner, int), (0, shape.asked - len(owner)), constant_values=-1)
