"""Answers many prompts in a cache with few rows: a row that has ended is refilled by a prompt that waits."""

from __future__ import annotations

import collections
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mlora_jax.evaluate.logit_rules import NO_TOKEN
from mlora_jax.evaluate.programs import GenerationPrograms, PromptRows, State
from mlora_jax.evaluate.sampling import Sampling
from mlora_jax.evaluate.slots import CacheRows, PromptGroup, common_prefixes, group_prompts
from mlora_jax.parallel.arrays import put_replicated, put_rows
from mlora_jax.parallel.mesh import EVALUATED

PREFILLED = 1024  # a CPU prefills at least this many tokens at a time, if there are as many
REFILLED = 4  # rows are refilled when one in this many has ended, or earlier
SHARED = 2**15  # prefixes are shared where this saves the prefill of at least this many tokens


class Questions(NamedTuple):
    """Prompts and how they are answered.

    Attributes:
      prompts: the token ids of each prompt, of which there is at least one.
      p: the profile of all prompts in a form that `set_profile` takes, or the profiles [K, R] of all kinds.
      kinds: [prompts], the index of each prompt's profile in p; None if p is the profile of all prompts.
      limits: [prompts], the largest number of tokens of each answer, at least 1.
      numbers: the number of each prompt, on which draws depend.
      size: B, the number of rows of the cache.
      slots: S, the number of tokens that a row has room for.
      multiple: padded lengths of prompts are multiples of this.
      length: the padded length of all prompts; None: lengths are chosen so that little is padded.
      sampling: how tokens are drawn; None takes the likeliest tokens.
      stop: a function of an answer's tokens that says whether the answer ends, or None.
    """

    prompts: Sequence[Sequence[int]]
    p: Any
    kinds: np.ndarray | None
    limits: np.ndarray
    numbers: Sequence[int]
    size: int
    slots: int
    multiple: int
    length: int | None
    sampling: Sampling | None
    stop: Callable[[list[int]], bool] | None


def serve(programs: GenerationPrograms, base: Any, adapter: Any, asked: Questions) -> list[np.ndarray]:
    """Answers prompts. The rows decode together, and prompts wait in a queue for the rows that have ended.

    Args:
      programs: the compiled functions.
      base: the frozen tree.
      adapter: the tree of factors, where the mesh needs it.
      asked: the prompts.

    Returns:
      The tokens of each answer. `NOT_FINITE` comes last where the logits were not finite.
    """
    server = _Server(programs, base, adapter, asked)
    while server.queue or not server.rows.ended.all():
        while server.queue and server.rows.ended.sum() >= len(server.queue[0].members):
            server.refill()
        if not server.rows.ended.all():
            server.decode()
    return server.answers


class _Server:
    """What `serve` knows between two calls of a compiled function."""

    def __init__(self, programs: GenerationPrograms, base: Any, adapter: Any, asked: Questions) -> None:
        self._programs, self._base, self._adapter, self._asked = programs, base, adapter, asked
        self._sampling = self._put(asked.sampling)
        self._p = self._put(asked.p) if asked.kinds is None else None
        self._kinds = np.zeros(asked.size, np.int32)  # the kind of each row's profile
        groups = _groups(asked, programs)
        self._prefixes = self._share(groups)
        self.queue = collections.deque(groups)
        self.rows = CacheRows(asked.size, programs.shards, int(asked.limits.max()))
        self.answers: list[Any] = [None] * len(asked.prompts)
        self._state: State = programs.begin(asked.size, asked.slots, base, adapter)

    def _put(self, tree: Any) -> Any:
        return put_replicated(tree, self._programs.mesh)

    def _rows(self, *arrays: Any) -> PromptRows:
        return self._put(PromptRows(*(jnp.asarray(array, jnp.int32) for array in arrays)))

    def _share(self, groups: Sequence[PromptGroup]) -> dict[int, tuple[Any, jax.Array]]:
        """For each kind with a shared prefix: the cache of the prefix, and the number of its tokens."""
        asked, found = self._asked, {}
        for group in groups:
            if group.shared and group.kind not in found:
                tokens = np.zeros((1, -(-group.shared // asked.multiple) * asked.multiple), np.int32)
                tokens[0, : group.shared] = asked.prompts[group.members[0]][: group.shared]
                p = asked.p if asked.kinds is None else asked.p[group.kind]
                cache = self._programs.share(
                    asked.slots, self._base, self._adapter, jnp.asarray(p), jnp.asarray(tokens)
                )
                found[group.kind] = cache, jnp.asarray(group.shared, jnp.int32)
        return found

    def refill(self) -> None:
        """Prefills the first group of the queue into rows that have ended."""
        asked, rows, group = self._asked, self.rows, self.queue.popleft()
        members, at = rows.assign(group)
        if left := [member for member in group.members if member not in members]:  # a part of the rows was full
            self.queue.appendleft(group._replace(members=left))
        tokens = np.zeros((group.rows, group.length), np.int32)
        lengths, limits, numbers = np.full(group.rows, group.shared + 1), np.zeros(group.rows), np.zeros(group.rows)
        texts = None if self._state.tokens is None else np.full((group.rows, asked.slots), NO_TOKEN, np.int32)
        filled = [(place, member) for place, member in enumerate(members) if member >= 0]
        for place, member in filled:
            prompt = asked.prompts[member]
            tokens[place, : len(prompt) - group.shared] = prompt[group.shared :]
            if texts is not None:
                texts[place, : len(prompt)] = prompt
            lengths[place], limits[place], numbers[place] = len(prompt), asked.limits[member], asked.numbers[member]
            row = rows.row(place, group, at)
            rows.lengths[row], rows.limits[row], rows.numbers[row] = lengths[place], limits[place], numbers[place]
            self._kinds[row] = 0 if asked.kinds is None else asked.kinds[member]
        p, per_example = self._p, False
        if asked.kinds is not None:
            per_example = group.kind < 0
            kinds = asked.kinds[[max(member, 0) for member in members]] if per_example else group.kind
            p = self._put(jnp.asarray(asked.p[kinds]))
        mesh = self._programs.mesh
        self._state, shown = self._programs.prefill(
            *(asked.slots, per_example, self._base, self._adapter, p),
            jnp.asarray(tokens) if mesh is None else put_rows(tokens, mesh, 0, over=EVALUATED),
            self._rows(lengths, limits, numbers),
            *(self._put(texts), self._put(jnp.asarray(at)), self._prefixes.get(group.kind)),
            *(self._state, self._sampling),
        )
        shown, done = np.asarray(shown).reshape(-1, 1), np.asarray(self._state.done).reshape(-1)
        for place, _ in filled:
            row = rows.row(place, group, at)
            self._take(row, shown[place], bool(done[row]))

    def decode(self) -> None:
        """Decodes all rows for a few steps, or until the first group of the queue finds enough that have ended."""
        asked, rows, state = self._asked, self.rows, self._state
        done = self._put(jnp.asarray(rows.ended.reshape(state.done.shape)))
        enough = len(self.queue[0].members) if self.queue else asked.size
        self._state, shown = self._programs.decode(
            *(asked.kinds is not None, self._base, self._adapter),
            self._p if asked.kinds is None else self._put(jnp.asarray(asked.p[self._kinds])),
            state._replace(done=done),
            self._rows(rows.lengths, rows.limits, rows.numbers),
            *(self._put(jnp.asarray(enough, jnp.int32)), self._sampling),
        )
        shown, done = np.asarray(shown).reshape(asked.size, -1), np.asarray(self._state.done).reshape(-1)
        for row in np.flatnonzero(~rows.ended):
            self._take(int(row), shown[row], bool(done[row]))

    def _take(self, row: int, new: np.ndarray, done: bool) -> None:
        """Appends what a row has made, and keeps its answer if it has ended."""
        if self.rows.extend(row, new, self._asked.stop) or done:
            member, answer = self.rows.finish(row)
            self.answers[member] = answer


def _groups(asked: Questions, programs: GenerationPrograms) -> list[PromptGroup]:
    """The prompts that are prefilled together."""
    count, once = len(asked.prompts), len(asked.prompts) <= asked.size
    kinds = [0] * count if asked.kinds is None else asked.kinds.tolist()
    shared = [0] * count
    if programs.mesh is None and not isinstance(asked.p, Mapping):
        shared = common_prefixes(asked.prompts, kinds, SHARED)
    # On a CPU, prompts under one profile are prefilled together, because a product with a folded kernel is cheaper.
    apart = any(shared) or asked.kinds is None or (programs.on_cpu and not once)

    def rows(padded: int) -> int:
        most = asked.size if once else max(1, asked.size // REFILLED)
        if programs.on_cpu and programs.mesh is None:
            most = min(most, -(-PREFILLED // padded))
            return next(rows for rows in range(most, 0, -1) if asked.size % rows == 0)
        return -(-most // programs.shards) * programs.shards

    return group_prompts(
        [len(prompt) for prompt in asked.prompts],
        kinds if apart else [-1] * count,
        shared,
        rows=rows,
        multiple=asked.multiple,
        length=asked.length,
        one_length=once,
    )
