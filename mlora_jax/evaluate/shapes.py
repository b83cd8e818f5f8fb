"""Array shapes of evaluation: few different ones, since each is an executable, and little padding."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence


def even_batch_size(rows: int, largest: int) -> int:
    """The smallest size at which rows make no more batches than at the largest size: less padding at the end.

    >>> even_batch_size(500, 64), even_batch_size(12, 64), even_batch_size(0, 64)
    (63, 12, 1)
    """
    return -(-rows // -(-rows // largest)) if rows else 1


def few_lengths(lengths: Sequence[int], multiple: int, share: int) -> list[int]:
    """A padded length for every length, of which there are few.

    Beginning with every multiple that is needed, the one is given up for the next that adds the least padding, as long
    as that is less than one in `share` of all tokens.

    Args:
      lengths: may be none.
      multiple: that padded lengths are of.
      share: at least 1.

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
    """Texts in rows, each in the fullest one that has room for it; the longest texts come first.

    Args:
      lengths: of the texts, in tokens.
      row: tokens of a row, at least the largest length.

    Returns:
      Per row the indices of its texts, their lengths falling.

    >>> pack([5, 3, 4, 2], 9)
    [[0, 2], [1, 3]]
    """
    rows: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (room, row), rising
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        at = bisect.bisect_left(rooms, (lengths[index], -1))
        if at == len(rooms):
            rooms.append((row, len(rows)))
            rows.append([])
        room, number = rooms.pop(at)
        rows[number].append(index)
        bisect.insort(rooms, (room - lengths[index], number))
    return rows
