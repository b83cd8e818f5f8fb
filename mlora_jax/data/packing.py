"""Packs the examples of a step into rows, so that hardly any token of a row is padding.

A row has one of a few widths. The widths are chosen from the lengths of the examples, once for a run, so every step has
arrays of the same shapes. Only the number of rows of each width differs between steps, and it is data.

A *shard* is the part of a step's examples that one device, or one group of devices, computes. A *pass* is the work on
`rows` rows of one width at a time. All trials and shards of a step go through the same passes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mlora_jax.data.tokenize import Example

UNIT = 64  # the widths are multiples of this, or of less where all examples are short
MOST_WIDTHS = 5  # a width costs the compilation of one body of the training step
PADDING = 0.04  # no width is added once this share of the tokens is padding
WIDEST = 1024  # from here on, wider rows make no matrix product faster
LEAST = 128  # below this a narrower row saves next to no time
SAMPLED = 512  # the examples of sampled steps that the widths are chosen by, if a step has fewer


class RowShape(NamedTuple):
    """The shapes of the rows of a run.

    Attributes:
      widths: the widths of rows in tokens, in falling order. The first one holds every example.
      rows: the number of rows of a pass.
    """

    widths: tuple[int, ...]
    rows: int = 1

    def passes(self, examples: int) -> int:
        """Returns the largest number of passes that a shard with this number of examples takes."""
        return -(-examples // self.rows) + len(self.widths) - 1

    def counts(self, widths: Sequence[int]) -> list[int]:
        """Returns the number of passes of each width that rows of these widths take."""
        return [-(-widths.count(width) // self.rows) for width in self.widths]

    def tokens(self, passes: Sequence[int] | np.ndarray) -> int:
        """Returns the number of tokens that a shard computes, padding included.

        Args:
          passes: the number of passes of each width.
        """
        return self.rows * int(np.dot(passes, self.widths))


@dataclasses.dataclass(frozen=True)
class Packed:
    """The rows of all members of a step. A member is the shard of a trial.

    Attributes:
      widths: the width of each row, in falling order.
      rows: for each member and row, the examples in the row, as indices into the member's list.
    """

    widths: tuple[int, ...]
    rows: tuple[tuple[tuple[int, ...], ...], ...]


def fill(lengths: Sequence[int], room: int) -> list[int]:
    """Chooses numbers whose sum is the largest one that does not exceed `room`.

    Args:
      lengths: positive numbers.
      room: the bound, at least 0.

    Returns:
      The indices of the chosen numbers, in rising order.

    >>> fill([5, 4, 3], 8)
    [0, 2]
    """
    # Bit s of reachable[i] says whether some of the first i numbers have the sum s.
    mask, reachable = (1 << room + 1) - 1, [1]
    for length in lengths:
        reachable.append((reachable[-1] | reachable[-1] << length) & mask)
    left, chosen = reachable[-1].bit_length() - 1, []
    for index in range(len(lengths), 0, -1):
        if not reachable[index - 1] >> left & 1:
            chosen.append(index - 1)
            left -= lengths[index - 1]
    return chosen[::-1]


def _row_of(items: list[tuple[int, int]], width: int) -> list[int]:
    """Returns which items (length, index), longest first, share a row of this width with the longest that fits."""
    first = next((at for at, (length, _) in enumerate(items) if length <= width), None)
    if first is None:
        return []
    others = items[first + 1 :]
    chosen = fill([length for length, _ in others], width - items[first][0])
    return [first, *(first + 1 + at for at in chosen)]


def pack(lengths: Sequence[int], widths: Sequence[int]) -> list[tuple[int, list[int]]]:
    """Packs examples into rows. Each row holds the longest example that is left, in the width that wastes least.

    Args:
      lengths: the numbers of tokens of the examples.
      widths: the widths that rows may have; the largest one holds every example.

    Returns:
      The rows as (width, indices of the examples in it).

    >>> pack([60, 30, 30, 20], [128, 64])
    [(128, [0, 1, 2]), (64, [3])]
    """
    items = sorted(((length, index) for index, length in enumerate(lengths)), key=lambda item: (-item[0], item[1]))
    rows = []
    while items:
        best: tuple[float, int, list[int]] | None = None
        for width in sorted(widths, reverse=True):
            if width < items[0][0]:
                continue
            chosen = _row_of(items, width)
            waste = 1.0 - sum(items[at][0] for at in chosen) / width
            if best is None or waste < best[0]:
                best = waste, width, chosen
        if best is None:
            raise ValueError(f"no row holds an example of {items[0][0]} tokens; the widths are {tuple(widths)}")
        _, width, chosen = best
        rows.append((width, [items[at][1] for at in chosen]))
        items = _without(items, chosen)
    return rows


def _without(items: list[tuple[int, int]], chosen: Sequence[int]) -> list[tuple[int, int]]:
    gone = set(chosen)
    return [item for at, item in enumerate(items) if at not in gone]


def pack_members(members: Sequence[Sequence[int]], shape: RowShape) -> Packed:
    """Packs the examples of several members into rows of common widths.

    The member with the most tokens is packed first. The others are packed into rows of the same widths, and rows are
    added where these do not suffice.

    Args:
      members: for each member, the numbers of tokens of its examples.
      shape: the shapes of the rows.
    """
    order = sorted(range(len(members)), key=lambda at: (-sum(members[at]), at))
    slots: list[int] = []  # the widths of the rows
    rows: list[list[list[int]]] = [[] for _ in members]
    for member in order:
        items = sorted(
            ((length, index) for index, length in enumerate(members[member])), key=lambda item: (-item[0], item[1])
        )
        for width in slots:
            chosen = _row_of(items, width)
            rows[member].append([items[at][1] for at in chosen])
            items = _without(items, chosen)
        for width, chosen in pack([length for length, _ in items], shape.widths):
            slots.append(width)
            rows[member].append([items[at][1] for at in chosen])
    most = max(map(len, members))
    if len(slots) > most:  # one row of the largest width for each example always suffices
        slots, rows = [shape.widths[0]] * most, [[[index] for index in range(len(member))] for member in members]
    falling = sorted(range(len(slots)), key=lambda at: -slots[at])
    rows = [[each[at] if at < len(each) else [] for at in falling] for each in rows]
    return Packed(tuple(slots[at] for at in falling), tuple(tuple(map(tuple, each)) for each in rows))


def share_out(lengths: Sequence[int], shards: int) -> list[list[int]]:
    """Shares the examples of a step out among shards, with about as many tokens and at most as many examples in each.

    Args:
      lengths: the numbers of tokens of the examples.
      shards: the number of shards.

    Returns:
      For each shard, the indices of its examples in rising order.

    >>> share_out([9, 5, 4, 1], 2)
    [[0, 3], [1, 2]]
    """
    most, tokens, parts = -(-len(lengths) // shards), [0] * shards, [[] for _ in range(shards)]
    for index in sorted(range(len(lengths)), key=lambda at: (-lengths[at], at)):
        shard = min((at for at in range(shards) if len(parts[at]) < most), key=lambda at: (tokens[at], at))
        parts[shard].append(index)
        tokens[shard] += lengths[index]
    return [sorted(part) for part in parts]


def _sampled_steps(lengths: np.ndarray, examples: int) -> list[list[int]]:
    """Returns the lengths of the examples of some steps, which are always the same for the same lengths."""
    random, steps = np.random.default_rng(0), max(4, SAMPLED // examples)
    return [random.choice(lengths, min(examples, len(lengths)), replace=False).tolist() for _ in range(steps)]


def choose_widths(lengths: Sequence[int], examples: int, *, most: int = MOST_WIDTHS) -> tuple[int, ...]:
    """Chooses the widths of rows: the fewest that leave little padding, at most `most` of them.

    The first width is the one from which rows become no better. Then the width that saves the most padding in some
    sampled steps is added, and again, unless all rows are short.

    Args:
      lengths: the numbers of tokens of all examples.
      examples: the number of examples of a shard in a step.
      most: the largest number of widths.

    Returns:
      The widths in falling order.
    """
    longest, mean = max(lengths), float(np.mean(lengths))
    unit = next(unit for unit in (16, 32, UNIT) if unit == UNIT or longest <= 4 * unit)
    whole = -(-longest // unit) * unit
    # A row that all examples of most steps do not fill would be padding for the most part.
    while whole < WIDEST and 2 * whole <= examples * mean:
        whole *= 2
    if whole < LEAST:
        return (whole,)
    step = unit * max(1, -(-whole // unit) // 16)
    steps = _sampled_steps(np.asarray(lengths), examples)

    def padding(widths: tuple[int, ...]) -> float:
        rows = [row for one in steps for row in pack(one, widths)]
        return 1.0 - sum(map(sum, steps)) / sum(width for width, _ in rows)

    widths, left = (whole,), padding((whole,))
    while left > PADDING and len(widths) < most:
        tried = [(*widths, width) for width in range(step, whole, step) if width not in widths]
        if not tried:
            break
        found = min(tried, key=padding)
        if (least := padding(found)) >= left:
            break
        widths, left = found, least
    return tuple(sorted(widths, reverse=True))


def choose_row_shape(
    lengths: Sequence[int], examples: int, *, accumulation: int = 1, accelerator: bool = False
) -> RowShape:
    """Chooses the shapes of the rows of a run.

    A CPU takes one row at a time, in one of several widths. An accelerator takes as many rows at a time as the examples
    of a micro-batch need, all of one width, because it needs large products more than it minds a few tokens of padding.

    Args:
      lengths: the numbers of tokens of all examples.
      examples: the number of examples of a shard in a step.
      accumulation: M, the number of parts that a step is computed in.
      accelerator: whether the device is a GPU or a TPU.
    """
    if not accelerator:
        return RowShape(choose_widths(lengths, examples))
    width = max(128, 1 << (max(lengths) - 1).bit_length())
    tokens = float(np.mean(lengths)) * examples / accumulation
    return RowShape((width,), max(1, round(tokens / width)))


def packed_arrays(
    members: Sequence[Sequence[Example]], numbers: Sequence[Sequence[int]], shape: RowShape, passes: int
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Makes the arrays of the rows of a step.

    Token t > 0 of an example is predicted by the logits at t - 1, so a target at t appears as position t - 1.

    Args:
      members: for each member, its examples.
      numbers: for each member, the numbers of its examples in the step.
      shape: the shapes of the rows.
      passes: P, the size of the axis of passes.

    Returns:
      (arrays, plan). The arrays have a leading axis over the members; b is the number of rows of a pass and T the
      largest width. Rows that are narrower than T use the first tokens only.

      - tokens [P, b, T] int32, padding 0;
      - examples [P, b, T] int32: the number of the token's example in the step, -1 for padding;
      - positions [P, b T] int32: the places of the answers in the pass, its rows one after the other;
      - targets [P, b T] int32, and weights [P, b T] float32, 1 for a target and 0 for padding.

      The plan holds passes [number of widths] int32, the number of passes of each width, and answers [P] int32, the
      largest number of answers that a member has in each pass.
    """
    packed = pack_members([[len(example.tokens) for example in member] for member in members], shape)
    counts = shape.counts(packed.widths)
    rows, most = shape.rows, shape.widths[0]
    made = {
        "tokens": np.zeros((len(members), passes, rows, most), np.int32),
        "examples": np.full((len(members), passes, rows, most), -1, np.int32),
        "positions": np.zeros((len(members), passes, rows * most), np.int32),
        "targets": np.zeros((len(members), passes, rows * most), np.int32),
        "weights": np.zeros((len(members), passes, rows * most), np.float32),
    }
    answers = np.zeros((len(members), passes), np.int32)
    first_row = {width: packed.widths.index(width) for width in dict.fromkeys(packed.widths)}
    first_pass = dict(zip(shape.widths, np.cumsum([0, *counts])[:-1].tolist(), strict=True))
    for member, (examples, own) in enumerate(zip(members, numbers, strict=True)):
        for at, (width, inside) in enumerate(zip(packed.widths, packed.rows[member], strict=True)):
            further, row = divmod(at - first_row[width], rows)
            place, start = (member, first_pass[width] + further), 0
            for index in inside:
                example = examples[index]
                end = start + len(example.tokens)
                made["tokens"][(*place, row, slice(start, end))] = example.tokens
                made["examples"][(*place, row, slice(start, end))] = own[index]
                targets = np.flatnonzero(example.loss_mask)
                few = slice(answers[place], answers[place] + len(targets))
                made["positions"][(*place, few)] = row * width + start + targets - 1
                made["targets"][(*place, few)] = example.tokens[targets]
                made["weights"][(*place, few)] = 1.0
                answers[place] += len(targets)
                start = end
    return made, {"passes": np.array(counts, np.int32), "answers": answers.max(axis=0)}
