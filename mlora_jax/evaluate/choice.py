"""Chooses the ranks to deploy: the smallest rank that is nearly the best, or one rank per layer and module."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import numpy as np

from mlora_jax.core import RankHierarchy, readout_profile
from mlora_jax.core.hierarchy import check_rank
from mlora_jax.core.rank_axes import adapter_layers, leading_axes, parameters_per_rank
from mlora_jax.evaluate.curve import RankCurve
from mlora_jax.evaluate.rank_search import Ranks, SearchScores, exchange, remove
from mlora_jax.evaluate.statistics import Comparison, Interval, bootstrap_aurac, compare

# (adapter, {path pattern: p}) -> a number, higher is better. `set_profile` takes the mapping.
Objective = Callable[[object, Mapping[str, np.ndarray]], float]
UNITS = ("parameters", "rank")
STARTS = ("uniform", "full", "both")


def smallest_rank(curve: RankCurve, within: float = 0.01) -> int:
    """The smallest rank whose accuracy is at most `within` below the best of the curve.

    Args:
      curve: the rank-accuracy curve, with accuracies in 0..1.
      within: the accuracy that may be lost, in the unit of the accuracies: 0.01 is one percentage point.

    Raises:
      ValueError: `within` is outside 0..1.

    >>> smallest_rank(RankCurve.of("prefix", (1, 2, 4), [[0, 0, 1], [0, 1, 1], [1, 1, 1]]), within=0.34)
    2
    """
    if not 0 <= within <= 1:
        raise ValueError(f"within must be in 0..1, as accuracies are (0.01 is one percentage point), got {within}")
    least = max(curve.accuracies) - within - 1e-9  # 1e-9 absorbs rounding: 0.9 - 0.01 is not 0.89
    return next(r for r, accuracy in zip(curve.ranks, curve.accuracies, strict=True) if accuracy >= least)


class Improvement(NamedTuple):
    """An allocation that scores better than all before it.

    Attributes:
      evaluations: how many evaluations of the objective the search had made when it found the allocation.
      parameters: the number of adapter parameters.
      score: the value of the objective.
    """

    evaluations: int
    parameters: int
    score: float


@dataclasses.dataclass(frozen=True)
class Allocation:
    """A rank for every layer of every adapted module.

    Attributes:
      ranks: path of the module -> its ranks, one per stacked layer (a single one if the module is not stacked).
      parameters: the number of adapter parameters, the sum of r (D + F).
      total_rank: the sum of the ranks.
      score: the value of the objective.
      evaluations: the number of distinct allocations that the search evaluated.
      history: every improvement within the budget; the first entry is the uniform prefix.
    """

    ranks: dict[str, tuple[int, ...]]
    parameters: int
    total_rank: int
    score: float
    evaluations: int
    history: tuple[Improvement, ...]


def allocate_ranks(
    objective: Objective,
    adapter: Any,
    hierarchy: RankHierarchy,
    budget: int,
    *,
    unit: str = "parameters",
    readout: str = "prefix",
    levels: Sequence[int] | None = None,
    group: Callable[[str, int], Hashable] | None = None,
    start: str = "both",
    limit: int = 500,
) -> Allocation:
    """Searches the per-layer ranks that score best within a budget.

    A candidate is a profile per layer, which is data: a jitted objective compiles once for all candidates. Layers that
    must have the same rank form a group, and the ranks that a group may have are its levels.

    The search "uniform" begins with the largest uniform prefix that fits. It measures how much the score rises when a
    group goes up by one level, and how much it falls when a group goes down by one. Then it moves rank from where it
    is missed least to where it helps most: one group goes up while one or several go down, or one group goes down
    while one or several go up. The sum of the single changes predicts the effect of a move, but a move is made only if
    the objective itself rises. Only the groups that moved are measured again, until the predictions fail.

    The search "full" begins with R everywhere, repeatedly removes the level that is missed least per unit of cost
    until the budget is met, and then moves rank as "uniform" does. "both" runs both searches and keeps the better
    result. On the items that the objective uses, the result never scores worse than the uniform prefix: evaluate the
    result on other items.

    Args:
      objective: (adapter, {path pattern: p [L, R]}) -> a finite number, higher is better. Mean log-likelihood is
        smooth; accuracy on few items has plateaus on which the search ends early.
      adapter: the trained tree of factors.
      hierarchy: the adapter's ranks S, scales and weights.
      budget: the largest cost that the allocation may have.
      unit: the unit of the budget: "parameters" counts adapter parameters, the sum of r (D + F); "rank" counts the
        total rank, the sum of r.
      readout: a key of `READOUTS`; every layer is read out at its own rank.
      levels: the ranks that a layer may have; None stands for 0, S and R. The rank of the uniform prefix is always
        added.
      group: (path, layer) -> key. Layers with the same key get the same rank; with None, every layer of every module
        gets a rank of its own. ``lambda path, layer: layer`` gives all modules of a layer the same rank.
      start: "uniform", "full" or "both".
      limit: the largest number of evaluations of the objective.

    Returns:
      The best allocation that the search found.

    Raises:
      ValueError: a budget below 0, an unknown unit, start or read-out, a level outside 0..R, a limit below 1, a score
        that is not finite.
    """
    if unit not in UNITS:
        raise ValueError(f"unit must be one of {', '.join(UNITS)}, got {unit!r}")
    groups = _Groups.of(adapter, group)
    costs = groups.costs(in_ranks=unit == "rank")
    score = _scored(objective, adapter, groups, hierarchy, readout)
    return _allocate(score, groups, hierarchy, budget, costs, {}, levels, start, limit)


class AllocationRow(NamedTuple):
    """The uniform prefix of one rank, and the allocation that has at most as many adapter parameters.

    Attributes:
      rank: the rank of the uniform prefix.
      parameters: the adapter parameters of the uniform prefix; `allocation` has those of the allocation.
      uniform, allocated: the accuracies of both, in 0..1, with their bootstrap intervals.
      comparison: the allocation minus the uniform prefix on the same items, as a curve of one rank.
      uniform_score: the objective of the uniform prefix; `allocation` has the score of the allocation.
      allocation: the allocation that the search found.
    """

    rank: int
    parameters: int
    uniform: Interval
    allocated: Interval
    comparison: Comparison
    uniform_score: float
    allocation: Allocation


def allocation_curve(
    objective: Objective,
    evaluate: Callable[[object, Mapping[str, np.ndarray]], np.ndarray],
    adapter: Any,
    hierarchy: RankHierarchy,
    budgets: Sequence[int],
    *,
    readout: str = "prefix",
    levels: Sequence[int] | None = None,
    group: Callable[[str, int], Hashable] | None = None,
    start: str = "both",
    limit: int = 500,
    note: Callable[[AllocationRow], None] = lambda row: None,
) -> list[AllocationRow]:
    """Accuracy against adapter parameters: compares allocations with uniform prefixes of the same cost.

    The searches share their measurements: a score that is known from one budget is not computed again for another.

    Args:
      objective: the objective of the search, see `allocate_ranks`.
      evaluate: (adapter, {path pattern: p}) -> verdicts [items], on OTHER items than the objective's; an evaluator that
        passes the profiles to `set_profile`.
      adapter, hierarchy, readout, levels, group, start: as in `allocate_ranks`.
      budgets: ranks in 1..R; each stands for the parameters of the uniform prefix of that rank.
      limit: the largest number of evaluations of the objective for one budget.
      note: a function that is called with every row as soon as the row is computed.

    Returns:
      One row per budget.

    Raises:
      ValueError: a budget outside 1..R, or arguments that `allocate_ranks` refuses.
    """
    budgets = [check_rank(rank, "every budget", low=1, high=hierarchy.max_rank) for rank in budgets]
    groups, known, rows = _Groups.of(adapter, group), {}, []
    costs, score = groups.costs(), _scored(objective, adapter, groups, hierarchy, readout)
    for rank in budgets:
        parameters = rank * sum(costs)
        found = _allocate(score, groups, hierarchy, parameters, costs, known, levels, start, limit)
        uniform, allocated = (
            RankCurve.of(readout, (rank,), [evaluate(adapter, layer_profiles(adapter, ranks, hierarchy, readout))])
            for ranks in (groups.by_path((rank,) * len(costs)), found.ranks)
        )
        first, second = (bootstrap_aurac(curve.verdicts, curve.ranks) for curve in (uniform, allocated))
        difference = compare(allocated, uniform)
        rows.append(AllocationRow(rank, parameters, first, second, difference, found.history[0].score, found))
        note(rows[-1])
    return rows


def layer_profiles(
    adapter: Any, ranks: Mapping[str, Sequence[int]], hierarchy: RankHierarchy, readout: str = "prefix"
) -> dict[str, np.ndarray]:
    """The profiles that give every layer of every module its own rank, in the form that `set_profile` takes.

    Args:
      adapter: the tree of factors.
      ranks: path -> ranks, as in `Allocation.ranks`, for every module of the adapter.
      hierarchy: the adapter's ranks S, scales and weights.
      readout: a key of `READOUTS`.

    Returns:
      {pattern: p}. p has the leading axes of the module's stacked kernel, such as [L, R], or is [R] if the module is
      not stacked. A pattern matches its own module only, because a jitted function receives a dict in the order of its
      keys and "the first match wins" would depend on that order.

    Raises:
      ValueError: another set of modules or layers than the adapter has, a rank outside 0..R.
    """
    modules = _modules(adapter)
    if set(ranks) != set(modules):
        raise ValueError(f"ranks must name the modules {', '.join(sorted(modules))}; got {', '.join(sorted(ranks))}")
    used = {rank for rows in ranks.values() for rank in rows}
    by_rank = {rank: np.asarray(readout_profile(hierarchy, readout, rank)) for rank in used}
    found = {}
    for path, (leading, _) in modules.items():
        if len(ranks[path]) != math.prod(leading):
            raise ValueError(f"{path} has {math.prod(leading)} layers, got the ranks {tuple(ranks[path])}")
        rows = [by_rank[rank] for rank in ranks[path]]
        found[rf"\A{re.escape(path)}"] = np.stack(rows).reshape(*leading, -1)
    return found


def adapter_parameters(adapter: Any, ranks: Mapping[str, Sequence[int]] | int) -> int:
    """The number of parameters of an adapter that is cut to one rank, or to one rank per layer.

    The number is the sum of r (D + F), or of r (D + F + 1) with gates.

    Args:
      adapter: the tree of the adapter's leaves.
      ranks: path -> ranks, as in `Allocation.ranks`, or one rank for all layers.
    """
    modules = _modules(adapter)
    if not isinstance(ranks, Mapping):
        ranks = {path: (ranks,) * math.prod(leading) for path, (leading, _) in modules.items()}
    return sum(sum(ranks[path]) * width for path, (_, width) in modules.items())


def _modules(adapter: Any) -> dict[str, tuple[tuple[int, ...], int]]:
    """Path -> (leading axes, number of trained values per rank of one layer of the module)."""
    return {
        path: (leading_axes(leaves), parameters_per_rank(leaves)) for path, leaves in adapter_layers(adapter).items()
    }


@dataclasses.dataclass(frozen=True)
class _Groups:
    """The groups of layers that the search gives one rank each.

    Attributes:
      members: for every group, the (path, layer) pairs that share its rank.
      layers: path -> L, the number of layers of the module.
      widths: path -> the parameters of one rank of a layer: D + F, and one more with a gate.
    """

    members: tuple[tuple[tuple[str, int], ...], ...]
    layers: dict[str, int]
    widths: dict[str, int]

    @classmethod
    def of(cls, adapter: Any, group: Callable[[str, int], Hashable] | None) -> _Groups:
        modules = _modules(adapter)
        layers = {path: math.prod(leading) for path, (leading, _) in modules.items()}
        members: dict[Hashable, list[tuple[str, int]]] = {}
        for path, count in layers.items():
            for layer in range(count):
                members.setdefault(group(path, layer) if group else (path, layer), []).append((path, layer))
        widths = {path: width for path, (_, width) in modules.items()}
        return cls(tuple(map(tuple, members.values())), layers, widths)

    def costs(self, *, in_ranks: bool = False) -> tuple[int, ...]:
        """The cost of one rank of every group, in adapter parameters or in total rank."""
        return tuple(sum(1 if in_ranks else self.widths[path] for path, _ in members) for members in self.members)

    def by_path(self, ranks: Ranks) -> dict[str, tuple[int, ...]]:
        """Path -> the ranks of its layers, from one rank per group."""
        found = {path: [0] * count for path, count in self.layers.items()}
        for rank, members in zip(ranks, self.members, strict=True):
            for path, layer in members:
                found[path][layer] = rank
        return {path: tuple(rows) for path, rows in found.items()}


def _scored(
    objective: Objective, adapter: Any, groups: _Groups, hierarchy: RankHierarchy, readout: str
) -> Callable[[Ranks], float]:
    def score(ranks: Ranks) -> float:
        by_path = groups.by_path(ranks)
        value = float(objective(adapter, layer_profiles(adapter, by_path, hierarchy, readout)))
        if not math.isfinite(value):
            raise ValueError(f"the objective is {value} at the ranks {by_path}")
        return value

    return score


def _allocate(
    score: Callable[[Ranks], float],
    groups: _Groups,
    hierarchy: RankHierarchy,
    budget: int,
    costs: Sequence[int],
    known: dict[Ranks, float],
    levels: Sequence[int] | None,
    start: str,
    limit: int,
) -> Allocation:
    for name, value, least in (("budget", budget, 0), ("limit", limit, 1)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    if start not in STARTS:
        raise ValueError(f"start must be one of {', '.join(STARTS)}, got {start!r}")
    high = cast("int", hierarchy.max_rank)  # a hierarchy fills it in where it is None
    uniform = min(high, int(budget // sum(costs)))
    given = (0, *hierarchy.ranks, high) if levels is None else levels
    levels = sorted({check_rank(rank, "every level", low=0, high=high) for rank in given} | {uniform})
    scores = SearchScores(score, costs, budget, limit, known)
    with scores.until_spent():
        scores((uniform,) * len(costs))
        scores.look_back()
        if start != "full":
            exchange(scores, (uniform,) * len(costs), levels)
        if start != "uniform":
            exchange(scores, remove(scores, (levels[-1],) * len(costs), levels), levels)
    ranks, parameters = groups.by_path(scores.best), groups.costs()
    cost = lambda best: sum(rank * each for rank, each in zip(best, parameters, strict=True))  # noqa: E731
    history = tuple(Improvement(spent, cost(best), value) for spent, best, value in scores.history)
    total = sum(map(sum, ranks.values()))
    return Allocation(ranks, cost(scores.best), total, scores(scores.best), scores.spent, history)
