"""The smallest good rank, and the search for ranks per layer against every allocation there is."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mlora_jax import truncate
from mlora_jax.adapters import adapt, set_profile, split
from mlora_jax.core import RankHierarchy
from mlora_jax.evaluate import (
    RankCurve,
    Scorer,
    adapter_parameters,
    allocate_ranks,
    allocation_curve,
    layer_profiles,
    smallest_rank,
)
from mlora_jax.evaluate.requests import choice_items
from mlora_jax.models import Tokenizer, load_decoder
from tests.tiny import adapted_trees, write_checkpoint

HIERARCHY = RankHierarchy((1, 2, 4), "rank")
LEVELS = (0, 1, 2, 4)
# Two modules of two stacked layers and a plain one: D + F is 10, 17 and 9.
SHAPES = {"layers.up": ((2,), 4, 6), "layers.down": ((2,), 6, 11), "out": ((), 4, 5)}
WIDTHS = {path: wide + deep for path, (_, wide, deep) in SHAPES.items()}
GROUPS = [("layers.up", 0), ("layers.up", 1), ("layers.down", 0), ("layers.down", 1), ("out", 0)]


def fake_adapter():
    tree = {}
    for path, (leading, wide, deep) in SHAPES.items():
        at = tree
        for name in path.split("."):
            at = at.setdefault(name, {})
        at["a"], at["b"] = np.zeros((*leading, wide, 4)), np.zeros((*leading, 4, deep))
    return tree


def test_a_gate_counts_one_parameter_per_rank():
    plain, gated = ({"up": {"a": np.zeros((2, 5, 4)), "b": np.zeros((2, 4, 6))}} for _ in range(2))
    gated["up"]["gate"] = np.zeros((2, 4))
    for ranks, total in ((3, 6), ({"up": (1, 4)}, 5)):
        assert adapter_parameters(plain, ranks) == total * 11 and adapter_parameters(gated, ranks) == total * 12


def ranks_of(p):
    """(path, layer) -> rank, from a mapping of profiles."""
    found = {}
    for pattern, values in p.items():
        (path,) = (path for path in SHAPES if re.fullmatch(pattern, path))
        for layer, row in enumerate(np.reshape(values, (-1, 4))):
            rank = int(np.count_nonzero(row))
            np.testing.assert_allclose(row, np.asarray(HIERARCHY.prefix(rank)))
            found[path, layer] = rank
    return tuple(found[group] for group in GROUPS)


class Objective:
    """Each group's worth saturates at its own rate; two of them get in each other's way. Counts what it is asked."""

    def __init__(self, seed):
        rng = np.random.default_rng(seed)
        self.worth, self.need = rng.exponential(size=5), rng.uniform(0.5, 4, 5)
        self.clash = rng.normal(0, 0.1, (5, 5))
        self.asked = []

    def value(self, ranks):
        share = 1 - np.exp(-np.array(ranks) / self.need)
        return float(self.worth @ share + share @ self.clash @ share)

    def __call__(self, adapter, p):
        self.asked.append(ranks_of(p))
        return self.value(self.asked[-1])


def flat(allocation):
    return tuple(allocation.ranks[path][layer] for path, layer in GROUPS)


def cost(ranks, unit):
    prices = [WIDTHS[path] if unit == "parameters" else 1 for path, _ in GROUPS]
    return sum(rank * price for rank, price in zip(ranks, prices, strict=True))


@pytest.mark.parametrize(
    ("accuracies", "within", "expected"),
    [
        ((5, 7, 8, 8), 0.0, 4),
        ((5, 7, 8, 8), 0.1, 2),  # 0.8 - 0.1 is above 0.7 in floats
        ((5, 7, 8, 8), 0.09, 4),
        ((5, 7, 8, 8), 1.0, 1),
        ((9, 7, 8, 8), 0.0, 1),
        ((5, 9, 3, 8), 0.1, 2),
    ],
)
def test_the_smallest_rank_within_so_much_of_the_best(accuracies, within, expected):
    verdicts = [np.arange(10) < right for right in accuracies]
    assert smallest_rank(RankCurve.of("prefix", (1, 2, 4, 8), verdicts), within) == expected


@pytest.mark.parametrize("within", [-0.1, 2, np.nan])
def test_within_is_in_the_unit_of_accuracies(within):
    with pytest.raises(ValueError, match=rf"in 0..1, as accuracies are .* got {within}"):
        smallest_rank(RankCurve.of("prefix", (1,), [[1]]), within)


@pytest.mark.parametrize("unit", ["parameters", "rank"])
@pytest.mark.parametrize("seed", range(8))
def test_the_search_finds_the_best_of_all_allocations(seed, unit):
    objective = Objective(seed)
    every = {ranks: objective.value(ranks) for ranks in itertools.product(LEVELS, repeat=5)}
    for average in (1, 2):
        budget = average * cost((1,) * 5, unit)
        best = max(value for ranks, value in every.items() if cost(ranks, unit) <= budget)
        objective.asked.clear()
        found = allocate_ranks(objective, fake_adapter(), HIERARCHY, budget, unit=unit)
        assert cost(flat(found), unit) <= budget and found.score == every[flat(found)]
        uniform = every[(average,) * 5]
        # It is a local search, a tenth as long as the list of all: at least 95 % of what there is to gain.
        assert found.score >= best - 0.05 * (best - uniform)
        assert len(objective.asked) == len(set(objective.asked)) == found.evaluations < len(every) / 8
        assert found.parameters == cost(flat(found), "parameters") and found.total_rank == sum(flat(found))


@pytest.mark.parametrize("start", ["uniform", "full", "both"])
@pytest.mark.parametrize("planted", [(4, 0, 0, 0, 1), (0, 1, 2, 0, 0), (1, 1, 1, 1, 1), (2, 0, 1, 0, 4)])
def test_a_planted_allocation_is_found(planted, start):
    def objective(adapter, p):
        ranks = ranks_of(p)
        return sum(min(rank, want) for rank, want in zip(ranks, planted, strict=True)) - 1e-3 * sum(ranks)

    found = allocate_ranks(objective, fake_adapter(), HIERARCHY, cost(planted, "parameters"), start=start)
    assert flat(found) == planted


@pytest.mark.parametrize("limit", [1, 2, 7, 500])
@pytest.mark.parametrize("start", ["uniform", "full", "both"])
def test_the_limit_holds_and_the_uniform_prefix_is_never_beaten_by_the_result(limit, start):
    rng, drawn = np.random.default_rng(5), {}  # no structure at all

    def objective(adapter, p):
        return drawn.setdefault(ranks_of(p), rng.normal())

    found = allocate_ranks(objective, fake_adapter(), HIERARCHY, 2 * 63, start=start, limit=limit)
    assert found.evaluations == len(drawn) <= limit and (limit == 500 or len(drawn) == limit)
    scores = [entry.score for entry in found.history]
    assert scores == sorted(scores) and scores[-1] == found.score == drawn[flat(found)]
    assert scores[0] == drawn[(2,) * 5] and found.history[0][:2] == (1, 2 * 63)
    assert all(entry.parameters <= 2 * 63 for entry in found.history)


def test_the_search_is_deterministic_and_finer_levels_are_used():
    runs = [allocate_ranks(Objective(4), fake_adapter(), HIERARCHY, 100) for _ in range(2)]
    assert runs[0] == runs[1]
    fine = allocate_ranks(Objective(4), fake_adapter(), HIERARCHY, 100, levels=range(5))
    assert 3 in flat(fine) and fine.score > runs[0].score
    # 3 * 63 = 189: the uniform prefix of rank 3 is a start though 3 is not in S
    assert allocate_ranks(Objective(3), fake_adapter(), HIERARCHY, 190, limit=1).ranks["out"] == (3,)


@pytest.mark.parametrize(
    ("group", "tied"),
    [
        (lambda path, layer: path, [(0, 1), (2, 3)]),
        (lambda path, layer: layer, [(0, 2, 4), (1, 3)]),
    ],
)
def test_groups_share_a_rank(group, tied):
    objective = Objective(4)
    found = allocate_ranks(objective, fake_adapter(), HIERARCHY, 150, group=group)
    for ranks in objective.asked:
        assert all(len({ranks[at] for at in members}) == 1 for members in tied)
    every = {r for r in itertools.product(LEVELS, repeat=5) if all(len({r[a] for a in m}) == 1 for m in tied)}
    affordable = [objective.value(ranks) for ranks in every if cost(ranks, "parameters") <= 150]
    assert found.score == max(affordable) and len(set(flat(found))) > 1


def test_rows_of_the_allocation_curve():
    objective, seen, noted = Objective(2), [], []

    def evaluate(adapter, p):
        seen.append(ranks_of(p))
        return np.arange(100) < 10 * objective.value(seen[-1])

    rows = allocation_curve(objective, evaluate, fake_adapter(), HIERARCHY, (1, 2, 3), note=noted.append)
    assert noted == rows and [row.rank for row in rows] == [1, 2, 3]
    assert seen == [ranks for row in rows for ranks in ((row.rank,) * 5, flat(row.allocation))]
    assert len(objective.asked) == len(set(objective.asked)) == sum(row.allocation.evaluations for row in rows)
    for row in rows:
        assert row.parameters == 63 * row.rank >= row.allocation.parameters
        assert row.uniform_score == objective.value((row.rank,) * 5) <= row.allocation.score
        for estimate, ranks in ((row.uniform, (row.rank,) * 5), (row.allocated, flat(row.allocation))):
            assert estimate.value == pytest.approx(np.mean(np.arange(100) < 10 * objective.value(ranks)))
            assert estimate.low < estimate.value < estimate.high
        assert row.comparison.differences[0] == pytest.approx(row.allocated.value - row.uniform.value)
    scores = [row.allocation.score for row in rows]
    assert scores == sorted(scores)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"unit": "bytes"}, "unit must be one of parameters, rank, got 'bytes'"),
        ({"start": "empty"}, "start must be one of uniform, full, both, got 'empty'"),
        ({"limit": 0}, "limit must be at least 1, got 0"),
        ({"budget": -1}, "budget must be at least 0, got -1"),
        ({"levels": (0, 5)}, "every level must be an integer in 0..4, got 5"),
        ({"readout": "middle"}, "unknown read-out 'middle'"),
        ({"objective": lambda adapter, p: np.nan}, r"the objective is nan at the ranks \{'layers.down': \(1, 1\)"),
    ],
)
def test_unusable_options_are_named(options, message):
    given = {"objective": Objective(0), "budget": 63} | options
    with pytest.raises(ValueError, match=message):
        allocate_ranks(given.pop("objective"), fake_adapter(), HIERARCHY, given.pop("budget"), **given)


def test_unusable_ranks_are_named():
    good = {"layers.up": (1, 2), "layers.down": (0, 4), "out": (3,)}
    assert adapter_parameters(fake_adapter(), good) == 3 * 10 + 4 * 17 + 3 * 9
    for ranks, message in (
        ({"out": (3,)}, "must name the modules layers.down, layers.up, out; got out"),
        (good | {"out": (3, 3)}, r"out has 1 layers, got the ranks \(3, 3\)"),
        (good | {"out": (5,)}, "in 0..4, got 5"),
    ):
        with pytest.raises(ValueError, match=message):
            layer_profiles(fake_adapter(), ranks, HIERARCHY)
    with pytest.raises(ValueError, match=r"every budget must be an integer in 1..4, got 5"):
        allocation_curve(Objective(0), None, fake_adapter(), HIERARCHY, (5,))


class Nested(nnx.Module):
    """Paths of which one is the tail of another, on either side of it in the alphabet."""

    def __init__(self):
        self.up = nnx.Linear(3, 3, rngs=nnx.Rngs(0))
        self.inner = nnx.Dict(up=nnx.Linear(3, 3, rngs=nnx.Rngs(1)))
        self.way = nnx.Dict(up=nnx.Linear(3, 3, rngs=nnx.Rngs(1)))


@pytest.mark.parametrize("transform", [jax.jit, lambda function: function], ids=["jit", "plain"])
def test_every_profile_reaches_its_own_module(transform):
    """Under jit a dict comes in the order of its keys."""
    _, _, adapter, profile = split(adapt(Nested(), 4, (".*",), key=jax.random.key(0)))
    ranks = {"up": (1,), "inner.up": (2,), "way.up": (4,)}
    p = layer_profiles(adapter, ranks, HIERARCHY)
    new = transform(lambda p: set_profile(profile, p))(p)
    found = {".".join(map(str, path[:-1])): np.count_nonzero(leaf[...]) for path, leaf in nnx.to_flat_state(new)}
    assert {path: (rank,) for path, rank in found.items()} == ranks


ROWS = [
    {"prompt": f"{word} is it ?\nType:", "choices": [" place", " number", " person"], "label": n % 3}
    for n, word in enumerate(("Where", "When", "Who", "What", "Why", "How"))
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A scorer, and an adapter of which one layer of one module does all there is."""
    checkpoint = write_checkpoint(tmp_path_factory.mktemp("model"), num_layers=3)
    graphdef, base, adapter, profile = adapted_trees(load_decoder(checkpoint), 4, ("v_proj", "down_proj"))
    adapter["layers"]["mlp"]["down_proj"]["b"][...] = (
        jnp.zeros_like(adapter["layers"]["mlp"]["down_proj"]["b"][...])
        .at[1]
        .set(2 * jax.random.normal(jax.random.key(1), (4, 16)))
    )
    scorer = Scorer(graphdef, base, profile, max_length=128, batch_size=24, pad_multiple=64)
    prepared = scorer.prepare(choice_items(ROWS, Tokenizer.load(checkpoint), boundary="joint").requests)
    return scorer, prepared, adapter, profile


def test_the_layer_that_matters_gets_the_rank_and_nothing_is_compiled_again(tiny):
    scorer, prepared, adapter, profile = tiny

    def distance(adapter, p):
        """How near an adapter comes to its function at full rank; any smooth objective would do."""
        return -float(np.mean((scores(p) - target) ** 2))

    def scores(p):
        return scorer.score(prepared, adapter, p).log_likelihoods

    modules = {"layers.self_attn.v_proj": (4,) * 3, "layers.mlp.down_proj": (4,) * 3}
    target = scores(layer_profiles(adapter, modules, HIERARCHY))
    before = scorer.compiled._cache_size()
    one_rank = adapter_parameters(adapter, 1)
    found = allocate_ranks(distance, adapter, HIERARCHY, one_rank, start="full")
    assert scorer.compiled._cache_size() == before and found.evaluations > 10
    assert found.ranks == {"layers.self_attn.v_proj": (0, 0, 0), "layers.mlp.down_proj": (0, 4, 0)}
    assert found.score == pytest.approx(0, abs=1e-10) and found.history[0].score < -1e-4
    assert found.parameters == 4 * 40 <= one_rank == sum(x.size for x in jax.tree.leaves(truncate(adapter, 1)))

    # One rank everywhere is one rank everywhere, however it is said.
    for rank in (0, 1, 3):
        uniform = layer_profiles(adapter, {path: (rank,) * 3 for path in modules}, HIERARCHY)
        np.testing.assert_array_equal(scores(uniform), scores(HIERARCHY.prefix(rank)))
        assert jax.tree.all(
            jax.tree.map(jnp.array_equal, set_profile(profile, uniform), set_profile(profile, HIERARCHY.prefix(rank)))
        )
