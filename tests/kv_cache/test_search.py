"""The search of ranks, against a search written out in NumPy, and the budgets that follow from it."""

import numpy as np
import pytest
from flax import nnx

from mlora_jax.kv_cache import Meter, RankPath, Ranks, cache_shape, search_ranks, uniform_ranks
from mlora_jax.kv_cache.pca import principal_components
from mlora_jax.models import Decoder
from tests.kv_cache.test_training import text_rows
from tests.tiny import tiny_config

SHAPE = (2, 3, 6)


def curved(ranks: Ranks) -> float:
    """A loss in which every rank has a weight of its own and the ranks of a layer depend on each other."""
    lost = 6 - ranks.stacked
    weights = np.arange(1, 13).reshape(2, 2, 3) ** 1.5
    return float(np.sum(weights * lost**2) + np.sum(lost, axis=(0, 2)).prod())


def by_hand(share: float, wanted: int) -> list:
    """The search in plain Python, on [kind, layer, head]."""
    ranks, order = np.full((2, 2, 3), 6), []
    while len(order) < wanted:
        scored = []
        for index in range(12):
            place = np.unravel_index(index, ranks.shape)
            if ranks[place] > 2:
                ranks[place] -= 2
                scored.append((curved(Ranks(*ranks)), index))
                ranks[place] += 2
        for _, index in sorted(scored)[: max(1, int(share * len(scored)))][: wanted - len(order)]:
            ranks[np.unravel_index(index, ranks.shape)] -= 2
            order.append([int(i) for i in np.unravel_index(index, ranks.shape)])
    return order


@pytest.mark.parametrize("share", [0.01, 0.3, 1.0])
def test_the_search_is_greedy(share):
    path = search_ranks(curved, SHAPE, levels=3, budget=0.5, share=share)
    assert path.order.tolist() == by_hand(share, 18)
    assert path.step == 2 and path.shape == SHAPE


def test_a_smaller_share_finds_no_worse_ranks():
    fine, coarse = (search_ranks(curved, SHAPE, levels=3, budget=0.6, share=share).at(0.6) for share in (0.01, 1.0))
    assert curved(fine) < curved(coarse)


def test_one_search_gives_the_ranks_of_all_budgets():
    path = search_ranks(curved, SHAPE, levels=3, budget=0.4, share=0.2)
    full = Ranks.full(*SHAPE)
    before = full
    for budget in (1.0, 0.9, 0.75, 0.5, 0.4):
        ranks = path.at(budget)
        assert budget * full.entries - path.step < ranks.entries <= budget * full.entries
        assert (ranks.stacked <= before.stacked).all() and ranks.stacked.min() >= 2
        before = ranks
    assert path.at(1.0).stacked.tolist() == full.stacked.tolist()


def test_searched_ranks_lose_less_than_one_rank_of_as_many_bytes():
    model = Decoder(tiny_config(vocab_size=40), rngs=nnx.Rngs(0))
    rows, shape = text_rows(), cache_shape(model)
    start = principal_components(model, [(rows.tokens, np.full(8, 12, np.int32))])
    meter = Meter(model, start, rows, batch_size=8)
    path = search_ranks(lambda ranks: meter(ranks).divergence, shape, levels=4, budget=0.25, share=0.1)
    assert meter.compiled._cache_size() == 1
    for budget in (0.75, 0.5):
        ranks, uniform = path.at(budget), uniform_ranks(budget, *shape)
        assert ranks.entries == uniform.entries
        assert meter(ranks).divergence < 0.8 * meter(uniform).divergence


def test_the_rounds_are_reported():
    seen = []
    search_ranks(curved, SHAPE, levels=3, budget=0.5, share=0.5, report=lambda *values: seen.append(values))
    budgets = [budget for budget, _ in seen]
    assert budgets[:2] == pytest.approx([1 - 6 / 36, 1 - 12 / 36]) and budgets[-1] == 0.5
    assert [error for _, error in seen] == sorted(error for _, error in seen)


def test_settings_that_cannot_be():
    with pytest.raises(ValueError, match="levels=4 does not divide the 6 features"):
        search_ranks(curved, SHAPE, levels=4, budget=0.5, share=0.5)
    with pytest.raises(ValueError, match=r"search\.budget=0\.2 is below 1/levels = 0.3333"):
        search_ranks(curved, SHAPE, levels=3, budget=0.2, share=0.5)


def test_budgets_that_cannot_be():
    path = RankPath(np.zeros((1, 3), np.int32), 2, (1, 1, 4))
    for budget in (0, -0.5, 1.5, float("nan"), "half", None):
        for find in (path.at, lambda budget: uniform_ranks(budget, 1, 1, 4)):
            with pytest.raises(ValueError, match="kv_budget must be a number above 0 and at most 1, got"):
                find(budget)
    with pytest.raises(ValueError, match=r"kv_budget=0\.5 is below 0.75, the smallest budget that was searched"):
        path.at(0.5)
    with pytest.raises(ValueError, match=r"kv_budget=0\.2 keeps no entry of 4: it must be at least 0.25"):
        uniform_ranks(0.2, 1, 1, 4)
