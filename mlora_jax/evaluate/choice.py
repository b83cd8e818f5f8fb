"""Which rank to deploy: the smallest that is nearly the best, and a rank of its own for every layer and module."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np

from mlora_jax.core import RankHierarchy, readout_profile
from mlora_jax.core.hierarchy import check_rank
from mlora_jax.core.product import path_names
from mlora_jax.evaluate.curve import Evaluator, RankCurve
from mlora_jax.evaluate.rank_search import Ranks, SearchScores, exchange, remove
from mlora_jax.evaluate.statistics import Comparison, Interval, bootstrap_aurac, compare

# (adapter, {path pattern: p}) -> a number, higher is better. The mapping is what `set_profile` takes.
Objective = Callable[[object, Mapping[str, np.ndarray]], float]
UNITS = ("parameters", "rank")
STARTS = ("uniform", "full", "both")


def smallest_rank(curve: RankCurve, within: float = 0.01) -> int:
    """The smallest rank whose accuracy is at most `within` below the best of the curve.

    Args:
      curve: accuracies in 0..1.
      within: in the unit of the accuracies: 0.01 is one percentage point.

    Raises:
      ValueError: `within` is outside 0..1.

    >>> smallest_rank(RankCurve.of("prefix", (1, 2, 4), [[0, 0, 1], [0, 1, 1], [1, 1, 1]]), within=0.34)
    2
    """
    if not 0 <= within <= 1:
        raise ValueError(f"within must be in 0..1, as accuracies are (0.01 is one percentage point), got {within}")
    least = max(curve.accuracies) - within - 1e-9  # rounding: 0.9 - 0.01 is not 0.89
    return next(r for r, accuracy in zip(curve.ranks, curve.accuracies, strict=True) if accuracy >= least)


class Improvement(NamedTuple):
    """A better allocation than all before it: how many evaluations it took, its adapter parameters and its score."""

    evaluations: int
    parameters: int
    score: float


@dataclasses.dataclass(frozen=True)
class Allocation:
    """A rank for every layer of every adapted module.

    Attributes:
      ranks: path of the module -> ranks, one per stacked layer (one in all for a module that is not stacked).
      parameters: of the adapter, sum of r (D + F).
      total_rank: sum of the ranks.
      score: the objective's.
      evaluations: distinct allocations that the search looked at.
      history: every improvement within the budget, beginning with the uniform prefix.
    """

    ranks: dict[str, tuple[int, ...]]
    parameters: int
    total_rank: int
    score: float
    evaluations: int
    history: tuple[Improvement, ...]


def allocate_ranks(
    objective: Objective,
    adapter,
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

    A candidate is a profile per layer, which is data: a jitted objective compiles once for all of them.

    "uniform" begins with the largest uniform prefix that fits, measures what every group gains by its next level and
    loses by its last, and moves rank from where it is missed least to where it helps most: one group up at the cost of
    one or several, or one down for the good of one or several. Sums of single changes predict, but a move is made only
    if the objective itself rises; only the groups that moved are measured anew until predictions fail. "full" begins
    with R everywhere, takes away the level that is missed least per unit of cost until the budget is met, and then
    moves as "uniform" does. "both" keeps the better one. The result is never worse than the uniform prefix by the
    objective, on the items the objective sees: score the outcome on others.

    Args:
      objective: (adapter, {path pattern: p [L, R]}) -> a finite number, higher is better. Mean log-likelihood is
        smooth; accuracy on few items has plateaus on which the search ends early.
      adapter: trained tree.
      hierarchy: S, scales and weights.
      budget: the most that the allocation may cost.
      unit: of the budget: adapter "parameters", the sum of r (D + F), or total "rank", the sum of r.
      readout: a key of `READOUTS`; every layer is read out at its own rank.
      levels: ranks that a layer may have; None is 0, S and R. The uniform prefix's is always one of them.
      group: (path, layer) -> key; those of one key have one rank. None gives every layer of every module its own.
        ``lambda path, layer: layer`` searches over layers alone.
      start: "uniform", "full" or "both".
      limit: the most evaluations of the objective.

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
    """The uniform prefix of one rank, and the allocation for no more adapter parameters.

    Attributes:
      rank: of the uniform prefix.
      parameters: of the uniform prefix; the allocation's own are in `allocation`.
      uniform, allocated: accuracies in 0..1 with their bootstrap intervals.
      comparison: allocated less uniform on the same items, a curve of one rank.
      uniform_score: the objective's, of the uniform prefix; the allocation's is in `allocation`.
      allocation: the ranks.
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
    evaluate: Evaluator,
    adapter,
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
    """Accuracy against adapter parameters: allocations beside uniform prefixes of the same cost.

    What one budget's search has measured is not measured again for another.

    Args:
      objective: searched on, see `allocate_ranks`.
      evaluate: (adapter, p) -> verdicts [items], on OTHER items than the objective's; an `Evaluator` whose p goes
        through `set_profile`.
      adapter, hierarchy, readout, levels, group, start: as `allocate_ranks`.
      budgets: ranks in 1..R; each stands for the parameters of the uniform prefix of that rank.
      limit: the most evaluations of the objective for one budget.
      note: called with every row as soon as it is there.

    Returns:
      One row per budget.

    Raises:
      ValueError: a budget outside 1..R, and what `allocate_ranks` refuses.
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
        intervals = (bootstrap_aurac(curve.verdicts, curve.ranks) for curve in (uniform, allocated))
        difference = compare(allocated, uniform)
        rows.append(AllocationRow(rank, parameters, *intervals, difference, found.history[0].score, found))
        note(rows[-1])
    return rows


def layer_profiles(
    adapter, ranks: Mapping[str, Sequence[int]], hierarchy: RankHierarchy, readout: str = "prefix"
) -> dict[str, np.ndarray]:
    """What `set_profile` takes for a rank per layer of every module.

    Args:
      adapter: tree of factors.
      ranks: as `Allocation.ranks`; every module of the adapter.
      hierarchy: S, scales and weights.
      readout: a key of `READOUTS`.

    Returns:
      {pattern: p}, p [L, R] with the leading axes of the module's stacked kernel, or [R] without any. A pattern matches
      its own module only: a jitted function sees a dict in the order of its keys, so none may count on being first.

    Raises:
      ValueError: another set of modules or layers than the adapter has, a rank outside 0..R.
    """
    modules = _modules(adapter)
    if set(ranks) != set(modules):
        raise ValueError(f"ranks must name the modules {', '.join(sorted(modules))}; got {', '.join(sorted(ranks))}")
    used = {rank for rows in ranks.values() for rank in rows}
    by_rank = {rank: np.asarray(readout_profile(hierarchy, readout, rank)) for rank in used}
    found = {}
    for path, (leading, _, _) in modules.items():
        if len(ranks[path]) != math.prod(leading):
            raise ValueError(f"{path} has {math.prod(leading)} layers, got the ranks {tuple(ranks[path])}")
        rows = [by_rank[rank] for rank in ranks[path]]
        found[rf"\A{re.escape(path)}"] = np.stack(rows).reshape(*leading, hierarchy.max_rank)
    return found


def adapter_parameters(adapter, ranks: Mapping[str, Sequence[int]] | int) -> int:
    """Parameters of an adapter cut to a rank per layer, or to one rank: the sum of r (D + F)."""
    modules = _modules(adapter)
    if not isinstance(ranks, Mapping):
        ranks = {path: (ranks,) * math.prod(leading) for path, (leading, _, _) in modules.items()}
    return sum(sum(ranks[path]) * (wide + deep) for path, (_, wide, deep) in modules.items())


def _modules(adapter) -> dict[str, tuple[tuple[int, ...], int, int]]:
    """Path -> (leading axes, D, F) of every adapted layer."""
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(adapter):
        *parent, role = path_names(path)
        shapes.setdefault(".".join(parent), {})[role] = leaf.shape
    return {path: (both["a"][:-2], both["a"][-2], both["b"][-1]) for path, both in shapes.items()}


@dataclasses.dataclass(frozen=True)
class _Groups:
    """What the search gives one rank each.

    Attributes:
      members: per group the (path, layer) that share its rank.
      layers: path -> L.
      widths: path -> D + F.
    """

    members: tuple[tuple[tuple[str, int], ...], ...]
    layers: dict[str, int]
    widths: dict[str, int]

    @classmethod
    def of(cls, adapter, group: Callable[[str, int], Hashable] | None) -> _Groups:
        modules = _modules(adapter)
        layers = {path: math.prod(leading) for path, (leading, _, _) in modules.items()}
        members: dict[Hashable, list[tuple[str, int]]] = {}
        for path, count in layers.items():
            for layer in range(count):
                members.setdefault(group(path, layer) if group else (path, layer), []).append((path, layer))
        widths = {path: wide + deep for path, (_, wide, deep) in modules.items()}
        return cls(tuple(map(tuple, members.values())), layers, widths)

    def costs(self, *, in_ranks: bool = False) -> tuple[int, ...]:
        """Per group what one rank of it costs, in adapter parameters or in total rank."""
        return tuple(sum(1 if in_ranks else self.widths[path] for path, _ in members) for members in self.members)

    def by_path(self, ranks: Ranks) -> dict[str, tuple[int, ...]]:
        found = {path: [0] * count for path, count in self.layers.items()}
        for rank, members in zip(ranks, self.members, strict=True):
            for path, layer in members:
                found[path][layer] = rank
        return {path: tuple(rows) for path, rows in found.items()}


def _scored(objective: Objective, adapter, groups: _Groups, hierarchy, readout: str) -> Callable[[Ranks], float]:
    def score(ranks: Ranks) -> float:
        by_path = groups.by_path(ranks)
        value = float(objective(adapter, layer_profiles(adapter, by_path, hierarchy, readout)))
        if not math.isfinite(value):
            raise ValueError(f"the objective is {value} at the ranks {by_path}")
        return value

    return score


def _allocate(score, groups: _Groups, hierarchy, budget, costs, known, levels, start, limit) -> Allocation:
    for name, value, least in (("budget", budget, 0), ("limit", limit, 1)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    if start not in STARTS:
        raise ValueError(f"start must be one of {', '.join(STARTS)}, got {start!r}")
    high = hierarchy.max_rank
    uniform = min(high, int(budget // sum(costs)))
    levels = (0, *hierarchy.ranks, high) if levels is None else levels
    levels = sorted({check_rank(rank, "every level", low=0, high=high) for rank in levels} | {uniform})
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
