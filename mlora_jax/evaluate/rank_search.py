"""The search behind `allocate_ranks`: a rank per group, their costs and a score, whatever a group stands for.

A *change* is (group, levels): so many levels up, or down if below zero. A *move* is changes of several groups at once.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

Ranks = tuple[int, ...]  # a rank per group
Change = tuple[int, int]
Move = tuple[Change, ...]

TRIES = 16  # moves that are measured and refused before their predictions are made anew, or the search ends


class _SpentError(Exception):
    """The limit of evaluations is reached."""


class SearchScores:
    """Scores of allocations, each computed once, and the best one within the budget.

    Args:
      score: ranks -> a number, higher is better.
      costs: per group, what one rank of it costs.
      budget: the most that the best one may cost.
      limit: how many scores may be computed.
      known: scores of earlier searches over the same groups; new ones are added.

    Attributes:
      best: of the allocations within the budget; the cheaper one of equal scores.
      history: (scores computed so far, ranks, score) at each improvement of the best.
      spent: scores computed.
    """

    def __init__(
        self,
        score: Callable[[Ranks], float],
        costs: Sequence[int],
        budget: int,
        limit: int,
        known: dict[Ranks, float],
    ):
        self._score, self._known, self._limit = score, known, limit
        self.costs, self.budget = costs, budget
        self.best: Ranks = ()
        self.history: list[tuple[int, Ranks, float]] = []
        self.spent = 0

    def __call__(self, ranks: Ranks) -> float:
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
        """Whether the score is higher, or the cost lower at an equal score."""
        self(ranks), self(other)
        return self._value(ranks) > self._value(other)

    def _value(self, ranks: Ranks) -> tuple[float, int]:
        return self._known[ranks], -self.cost(ranks)

    def look_back(self) -> None:
        """Takes every allocation that an earlier search measured into account."""
        for ranks in self._known:
            self._note(ranks)

    def cost(self, ranks: Ranks) -> int:
        return sum(rank * cost for rank, cost in zip(ranks, self.costs, strict=True))

    @contextlib.contextmanager
    def until_spent(self) -> Iterator[None]:
        """Ends the block when the limit is reached."""
        with contextlib.suppress(_SpentError):
            yield


def remove(scores: SearchScores, ranks: Ranks, levels: Sequence[int]) -> Ranks:
    """Takes levels away until the budget is met, each time the one that is missed least per unit of cost.

    Losses of former rounds serve as a queue: its first is measured again, and taken if it still is the first.

    Args:
      scores: of the search.
      ranks: to begin with, all of them levels.
      levels: increasing; the ranks that there are.
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

    Arguments as `remove`, `ranks` within the budget.

    Every single change is measured once and again when its group has moved. Sums of them predict what a move brings,
    and a move is made if its own score is better; when none of the best predictions holds, all are made anew.
    """
    gains: dict[Change, float] = {}  # perhaps of an earlier allocation
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
    """Moves within the budget whose changes' gains add up to more than zero, or to zero and are saved on; best first.

    A group alone; one up and one down, by as many levels as it takes or pays for; one up and as many downs as pay for
    it, or one down and as many ups as it pays for, the best ones per unit of cost. The gain of several levels is that
    of one, per unit of cost.
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
    """One level up or down, of every group that has such a level."""
    end = levels[-1 if by > 0 else 0]
    return [(group, by) for group, rank in enumerate(ranks) if rank != end]


def _moved(ranks: Ranks, move: Move, levels: Sequence[int]) -> Ranks:
    new = list(ranks)
    for group, by in move:
        new[group] = levels[levels.index(ranks[group]) + by]
    return tuple(new)
