"""Which prompts are prefilled together, and which row of the cache answers which prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from mlora_jax.evaluate.shapes import few_lengths

LENGTHS = 16  # the `share` of `few_lengths`: each length costs an executable, which may compile longer than it runs


class PromptGroup(NamedTuple):
    """Prompts that are prefilled together.

    Attributes:
      members: the indices of the prompts, at most `rows`.
      rows: n, the number of rows that the prefill has; those without a prompt are padding.
      length: T, the number of tokens of each row.
      kind: the index of the profile that all members have; -1 if they have profiles of their own.
      shared: the number of first tokens that all prompts of this kind have in common and that are prefilled only once.
        The T tokens of a row follow them.
    """

    members: list[int]
    rows: int
    length: int
    kind: int
    shared: int


def group_prompts(
    lengths: Sequence[int],
    kinds: Sequence[int],
    shared: Sequence[int],
    *,
    rows: Callable[[int], int],
    multiple: int,
    length: int | None = None,
    one_length: bool = False,
) -> list[PromptGroup]:
    """Puts prompts of similar length into groups, longest first within a kind.

    The longest come first, so that the last rows to be answered, beside which other rows are empty, are short ones.

    Args:
      lengths: the number of tokens of each prompt.
      kinds: the index of each prompt's profile; -1 for all prompts if profiles may share a group.
      shared: the number of tokens of each prompt that are prefilled before, the same within a kind.
      rows: T -> n, the number of rows of a prefill of T tokens each.
      multiple: T is a multiple of this.
      length: T of all groups; None: T is chosen.
      one_length: whether all groups have the same T.

    Returns:
      The groups in the order in which they are to be prefilled.

    >>> [g.members for g in group_prompts([3, 9, 4], [0, 0, 1], [0] * 3, rows=lambda _: 2, multiple=8)]
    [[1, 0], [2]]
    """
    own = [whole - first for whole, first in zip(lengths, shared, strict=True)]
    padded = few_lengths(own, multiple, LENGTHS)
    if one_length or length is not None:
        padded = [length or max(padded)] * len(padded)
    order = sorted(range(len(own)), key=lambda i: (kinds[i], -own[i]))
    groups: list[PromptGroup] = []
    for i in order:
        last = groups[-1] if groups else None
        if last is None or last.kind != kinds[i] or len(last.members) == last.rows:
            groups.append(PromptGroup([i], rows(padded[i]), padded[i], kinds[i], shared[i]))
        else:
            last.members.append(i)
    return groups


def common_prefixes(prompts: Sequence[Sequence[int]], kinds: Sequence[int], least: int) -> list[int]:
    """The number of first tokens of each prompt that all prompts of its kind have in common.

    At least one token of each prompt is not counted, because the first answer token comes from it.

    Args:
      prompts: the token ids of each prompt.
      kinds: the index of each prompt's profile.
      least: the least number of tokens, over all prompts, whose prefill is saved; with fewer, all counts are 0, because
        more executables are compiled where prefixes are shared.

    >>> common_prefixes([[1, 2, 3], [1, 2, 4], [1, 9]], [0, 0, 1], least=1)
    [2, 2, 0]
    """
    alike: dict[int, list[list[int]]] = {}
    for prompt, kind in zip(prompts, kinds, strict=True):
        alike.setdefault(kind, []).append([*prompt[:-1]])
    lengths = {kind: _alike(min(each), max(each)) if len(each) > 1 else 0 for kind, each in alike.items()}
    saved = sum(length * (len(alike[kind]) - 1) for kind, length in lengths.items())
    return [lengths[kind] if saved >= least else 0 for kind in kinds]


def _alike(first: Sequence[int], last: Sequence[int]) -> int:
    """The number of first items that two sequences have in common. All sequences between them have these, too."""
    return next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))


class CacheRows:
    """The rows of the cache: which prompt each of them answers, and the tokens that it has generated.

    Args:
      size: B, the number of rows.
      shards: the number of parts of the rows; a prefill has the same number of rows in each part.
      width: the largest number of tokens of an answer.

    Attributes:
      lengths, limits, numbers: [B] int32, the fields of `PromptRows`.
      ended: [B] bool, whether a row waits for another prompt.
    """

    def __init__(self, size: int, shards: int, width: int) -> None:
        self.lengths = np.ones(size, np.int32)
        self.limits, self.numbers = np.zeros(size, np.int32), np.zeros(size, np.int32)
        self.ended = np.ones(size, bool)
        self.owners = np.full(size, -1)
        self._shards = shards
        self._tokens, self._counts = np.full((size, width), -1, np.int32), np.zeros(size, np.int32)

    def assign(self, group: PromptGroup) -> tuple[list[int], np.ndarray]:
        """Finds rows for prompts of a group.

        Args:
          group: the group, with at most as many members as rows have ended.

        Returns:
          The prompts, or -1, of the n rows of the prefill; and the row [n] of the cache that each of them is written
          to, counted within its part, or one beyond the part.
        """
        part, each = len(self.ended) // self._shards, group.rows // self._shards
        waiting, members, at = [*group.members], [], np.full(group.rows, part, np.int32)
        for shard in range(self._shards):
            free = np.flatnonzero(self.ended[shard * part : (shard + 1) * part])
            for place in range(each):
                members.append(waiting.pop(0) if waiting and place < len(free) else -1)
                if members[-1] >= 0:
                    at[len(members) - 1] = free[place]
        for place, member in enumerate(members):
            if member >= 0:
                row = place // each * part + at[place]
                self.owners[row], self.ended[row], self._counts[row] = member, False, 0
        return members, at

    def row(self, place: int, group: PromptGroup, at: np.ndarray) -> int:
        """The row of the cache, counted over all parts, of a row of a prefill."""
        return place // (group.rows // self._shards) * (len(self.ended) // self._shards) + int(at[place])

    def extend(self, row: int, new: np.ndarray, stop: Callable[[list[int]], bool] | None) -> bool:
        """Appends the tokens [n] that a row has made, up to the first -1, and says whether `stop` ends the answer."""
        start = int(self._counts[row])
        new = new[new != -1]
        end = min(start + len(new), self._tokens.shape[1])
        self._tokens[row, start:end] = new[: end - start]
        self._counts[row] = end
        if stop is None:
            return False
        tokens = [token for token in self._tokens[row, :end].tolist() if token >= 0]
        if len(tokens) <= start or not stop(tokens):
            return False
        self._counts[row] = next(kept for kept in range(start + 1, len(tokens) + 1) if stop(tokens[:kept]))
        return True

    def finish(self, row: int) -> tuple[int, np.ndarray]:
        """Frees a row; returns its prompt and the tokens of the answer."""
        member, self.owners[row], self.ended[row] = int(self.owners[row]), -1, True
        return member, self._tokens[row, : self._counts[row]].copy()
