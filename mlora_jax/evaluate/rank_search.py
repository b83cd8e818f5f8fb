"""The search of `allocate_ranks`, in terms of groups that have one rank each, their costs and a score.

A *change* is (group, levels): the group goes up by so many levels, or down if the number is negative. A *move* changes
one or several groups at once.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

Ranks = tuple[int, ...]  # one rank per group
Change = tuple[int, int]
Move = tuple[Change, ...]

TRIES = 16  # after so many moves that bring no gain, predictions are made anew, or the search ends


class _SpentError(Exception):
    """Raised when the limit of evaluations is reached."""


class SearchScores:
    """The scores of allocations, each computed once, and the best allocation within the budget.

    Args:
      score: ranks -> a number, higher is better.
      costs: the cost of one rank of each group.
      budget: the largest cost that the best allocation may have.
      limit: the largest number of scores that may be computed.
      known: ranks -> scores from earlier searches over the same groups; new scores are added to it.

    Attributes:
      costs, budget: as given.
      best: the best allocation within the budget; if scores are equal, the cheaper one.
      history: (number of scores computed so far, ranks, score) at each improvement of the best.
      spent: the number of scores computed.
    """

    def __init__(
        self,
        score: Callable[[Ranks], float],
        costs: Sequence[int],
        budget: int,
        limit: int,
        known: dict[Ranks, float],
    ) -> None:
        self._score, self._known, self._limit = score, known, limit
        self.costs, self.budget = costs, budget
        self.best: Ranks = ()
        self.history: list[tuple[int, Ranks, float]] = []
        self.spent = 0

    def __call__(self, ranks: Ranks) -> float:
        """The score of an allocation."""
        if ranks not in self._known:
            if self.spent >= self._limit:
                raise _SpentError
            self.spent += 1
            self._known[ranks] = self._score(ranks)
        self._note(ranks)
        return self._known[ranks]

    def _note(self, ranks: Ranks) -> None:
        if self.cost(ranks) <= self.budget and (not self.best or self._value(ranks) > self._value(self.best)):
            self.best = ranks
            self.history.append((self.spent, ranks, self._known[ranks]))

    def exceeds(self, ranks: Ranks, other: Ranks) -> bool:
        """Whether `ranks` score higher than `other`, or cost less at an equal score."""
        for each in (ranks, other):
            self(each)
        return self._value(ranks) > self._value(other)

    def _value(self, ranks: Ranks) -> tuple[float, int]:
        return self._known[ranks], -self.cost(ranks)

    def look_back(self) -> None:
        """Considers every allocation that an earlier search measured."""
        for ranks in self._known:
            self._note(ranks)

    def cost(self, ranks: Ranks) -> int:
        """The cost of an allocation."""
        return sum(rank * cost for rank, cost in zip(ranks, self.costs, strict=True))

    @contextlib.contextmanager
    def until_spent(self) -> Iterator[None]:
        """Leaves the block when the limit of evaluations is reached."""
        with contextlib.suppress(_SpentError):
            yield


def remove(scores: SearchScores, ranks: Ranks, levels: Sequence[int]) -> Ranks:
    """Removes levels until the budget is met, each time the level that is missed least per unit of cost.

    The losses from earlier rounds are in a queue. The first of them is measured again, and its level is removed if its
    loss is still the smallest.

    Args:
      scores: the scores of the search.
      ranks: the ranks to begin with; each of them is a level.
      levels: the ranks that a group may have, increasing.

    Returns:
      The ranks that meet the budget.
    """

    def loss(group: int) -> float:
        less = _moved(ranks, ((group, -1),), levels)
        return (scores(ranks) - scores(less)) / (scores.cost(ranks) - scores.cost(less))

    queue = [(loss(group), group) for group, _ in _changes(ranks, -1, levels)]
    heapq.heapify(queue)
    while scores.cost(ranks) > scores.budget:
        _, group = heapq.heappop(queue)
        now = loss(group)
        if queue and (now, group) > queue[0]:
            heapq.heappush(queue, (now, group))
            continue
        ranks = _moved(ranks, ((group, -1),), levels)
        if ranks[group] > levels[0]:
            heapq.heappush(queue, (loss(group), group))
    return ranks


def exchange(scores: SearchScores, ranks: Ranks, levels: Sequence[int]) -> Ranks:
    """Moves levels between groups as long as the score rises, or the cost falls at an equal score.

    Every single change is measured once, and again after its group has moved. Sums of single changes predict the gain
    of a move, and a move is made if its own score is better. If none of the best moves is better, all changes are
    measured again.

    Args:
      scores: the scores of the search.
      ranks: the ranks to begin with, within the budget.
      levels: the ranks that a group may have, increasing.

    Returns:
      The ranks from which no move leads to a better score.
    """
    gains: dict[Change, float] = {}  # some may be measured at an earlier allocation
    while True:
        fresh = not gains
        for change in (*_changes(ranks, 1, levels), *_changes(ranks, -1, levels)):
            if change not in gains:
                gains[change] = scores(_moved(ranks, (change,), levels)) - scores(ranks)
        moves = _promising(scores, ranks, levels, gains)[:TRIES]
        better = next((move for move in moves if scores.exceeds(_moved(ranks, move, levels), ranks)), None)
        if better is not None:
            ranks = _moved(ranks, better, levels)
            for group, _ in better:
                gains.pop((group, 1), None)
                gains.pop((group, -1), None)
        elif fresh:
            return ranks
        else:
            gains.clear()


def _promising(scores: SearchScores, ranks: Ranks, levels: Sequence[int], gains: Mapping[Change, float]) -> list[Move]:
    """The moves within the budget whose predicted gain is above zero, or is zero at a lower cost; best first.

    These moves are tried: one group alone; one group up and one down, by as many levels as the budget needs or allows;
    one group up and the best groups down that pay for it; one group down and the best groups up that it pays for. The
    best groups are those with the best gain per unit of cost. Several levels are predicted to have the same gain per
    unit of cost as one level.
    """
    at = [levels.index(rank) for rank in ranks]
    slack = scores.budget - scores.cost(ranks)

    def price(change: Change) -> int:
        group, by = change
        return scores.costs[group] * (levels[at[group] + by] - ranks[group])

    def gain(change: Change) -> float:
        one = (change[0], 1 if change[1] > 0 else -1)
        return gains[one] * price(change) / price(one)

    ups, downs = _changes(ranks, 1, levels), _changes(ranks, -1, levels)
    ups.sort(key=lambda up: (-gains[up] / price(up), up))
    downs.sort(key=lambda down: (gains[down] / price(down), down))
    found: list[Move] = [(change,) for change in (*ups, *downs)]
    for up, down in itertools.product(ups, downs):
        if up[0] != down[0]:
            deeper = ((down[0], -by) for by in range(1, at[down[0]] + 1))
            found += [(up, each) for each in deeper if price(up) + price(each) <= slack][:1]
            higher = ((up[0], by) for by in range(len(levels) - 1 - at[up[0]], 0, -1))
            found += [(each, down) for each in higher if price(each) + price(down) <= slack][:1]
    for up in ups:
        others = [down for down in downs if down[0] != up[0]]
        freed = itertools.accumulate((-price(down) for down in others), initial=slack)
        found.append((up, *(down for down, before in zip(others, freed, strict=False) if before < price(up))))
    for down in downs:
        room, taken = slack - price(down), []
        for up in ups:
            if up[0] != down[0] and gains[up] > 0 and price(up) <= room:
                taken.append(up)
                room -= price(up)
        found.append((down, *taken))
    promise = {tuple(sorted(move)): math.fsum(map(gain, move)) for move in found}
    total = {move: sum(map(price, move)) for move in promise}
    able = [move for move, hope in promise.items() if total[move] <= slack and (hope, -total[move]) > (0.0, 0)]
    return sorted(able, key=lambda move: (-promise[move], total[move], move))


def _changes(ranks: Ranks, by: int, levels: Sequence[int]) -> list[Change]:
    """The changes by one level up (`by` = 1) or down (-1) of all groups that have such a level."""
    end = levels[-1 if by > 0 else 0]
    return [(group, by) for group, rank in enumerate(ranks) if rank != end]


def _moved(ranks: Ranks, move: Move, levels: Sequence[int]) -> Ranks:
    """The ranks after a move."""
    new = list(ranks)
    for group, by in move:
        new[group] = levels[levels.index(ranks[group]) + by]
    return tuple(new)
