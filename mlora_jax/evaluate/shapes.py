"""Chooses the array shapes of evaluation: few of them, because each compiles an executable, and with little padding."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence


def even_batch_size(rows: int, largest: int) -> int:
    """The smallest batch size that needs no more batches than the largest size does, so that little padding is added.

    >>> even_batch_size(500, 64), even_batch_size(12, 64), even_batch_size(0, 64)
    (63, 12, 1)
    """
    return -(-rows // -(-rows // largest)) if rows else 1


def few_lengths(lengths: Sequence[int], multiple: int, share: int) -> list[int]:
    """Rounds lengths up to a small set of padded lengths, so that few shapes compile.

    The set begins with all multiples that are needed. Again and again, the multiple whose merge into the next larger
    one adds the least padding is removed, as long as that padding is less than one token per `share` tokens.

    Args:
      lengths: the lengths to round; there may be none.
      multiple: padded lengths are multiples of this.
      share: at least 1; one merge may add less than the fraction 1 / share of all tokens as padding.

    Returns:
      The padded length of every length.

    >>> few_lengths([3, 9, 9, 15, 40], 8, 16), few_lengths([3, 9, 9, 15, 40], 8, 4)
    ([8, 16, 16, 16, 40], [16, 16, 16, 16, 40])
    """
    padded = [-(-length // multiple) * multiple for length in lengths]
    counts = {length: padded.count(length) for length in sorted(set(padded))}
    kept = list(counts)
    while len(kept) > 1:
        costs = [counts[low] * (high - low) for low, high in itertools.pairwise(kept)]
        least = costs.index(min(costs))
        if costs[least] * share >= sum(padded):
            break
        counts[kept[least + 1]] += counts[kept[least]]
        del kept[least]
    return [kept[bisect.bisect_left(kept, length)] for length in padded]


def pack(lengths: Sequence[int], row: int) -> list[list[int]]:
    """Packs texts into rows, longest text first, each into the fullest row that has room for it.

    Args:
      lengths: the length of each text, in tokens.
      row: the number of tokens of a row, at least the largest length.

    Returns:
      For each row, the indices of its texts by falling length.

    >>> pack([5, 3, 4, 2], 9)
    [[0, 2], [1, 3]]
    """
    rows: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (room, row), in rising order
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        at = bisect.bisect_left(rooms, (lengths[index], -1))
        if at == len(rooms):
            rooms.append((row, len(rows)))
            rows.append([])
        room, number = rooms.pop(at)
        rows[number].append(index)
        bisect.insort(rooms, (room - lengths[index], number))
    return rows
