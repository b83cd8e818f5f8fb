"""Intervals and paired comparisons against loops over resampled items, against coverage, and against scipy's tests."""

import dataclasses

import numpy as np
import pytest
from scipy.stats import binomtest

from mlora_jax.evaluate import RankCurve, bootstrap_aurac, compare
from mlora_jax.run.results import curve_of
from mlora_jax.training.curve_records import CurveRecord

RANKS = (1, 2, 8)


def simulate(items, seed, shift=0.0):
    """Verdicts that an item's difficulty ties together: [3, items] bool."""
    rng = np.random.default_rng(seed)
    skill = np.array([-0.5, 0.2, 1.0])[:, None] + shift
    return skill + 0.3 * rng.normal(size=(3, items)) > 1.5 * rng.normal(size=items)


def area(accuracies, axis):
    x = np.array(RANKS, float) if axis == "linear" else np.log2(RANKS)
    return sum((x[i + 1] - x[i]) * (accuracies[i + 1] + accuracies[i]) / 2 for i in range(2)) / (x[-1] - x[0])


def loop(values, axis, samples, *, jointly=True):
    """The sampled areas of values [ranks, items], an item drawn with all its ranks, or every rank on its own."""
    rng = np.random.default_rng(99)
    count, found = values.shape[1], []
    for _ in range(samples):
        draws = rng.integers(count, size=count)
        rows = [row[draws if jointly else rng.integers(count, size=count)] for row in values]
        found.append(area([row.mean() for row in rows], axis))
    return np.array(found)


@pytest.mark.parametrize("axis", ["linear", "log2"])
def test_the_interval_is_that_of_a_loop_over_items_drawn_with_all_their_ranks(axis):
    verdicts = simulate(80, 0)
    sampled = loop(verdicts, axis, 3000)
    found = bootstrap_aurac(verdicts, RANKS, axis=axis, samples=20_000)
    assert found.value == pytest.approx(area(verdicts.mean(1), axis))
    width = found.high - found.low
    np.testing.assert_allclose([found.low, found.high], np.quantile(sampled, [0.025, 0.975]), atol=0.05 * width)
    apart = np.quantile(loop(verdicts, axis, 1000, jointly=False), [0.025, 0.975])
    assert apart[1] - apart[0] < 0.85 * width  # what drawing every rank on its own would claim
    half = bootstrap_aurac(verdicts, RANKS, axis=axis, samples=20_000, confidence=0.5)
    np.testing.assert_allclose([half.low, half.high], np.quantile(sampled, [0.25, 0.75]), atol=0.05 * width)


def test_the_interval_covers_the_truth_as_often_as_it_says():
    truth = area(simulate(400_000, 1).mean(1), "log2")
    covered = {0.95: 0, 0.5: 0}
    for seed in range(500):
        verdicts = simulate(120, 1000 + seed)
        for confidence in covered:
            found = bootstrap_aurac(verdicts, RANKS, samples=500, confidence=confidence, seed=seed)
            covered[confidence] += found.low <= truth <= found.high
    assert 0.92 < covered[0.95] / 500 < 0.975  # 3 standard errors of the count are 0.03
    assert 0.43 < covered[0.5] / 500 < 0.57


def test_the_draws_follow_the_seed_and_the_order_of_items_does_not_matter():
    verdicts = simulate(60, 2)
    found = bootstrap_aurac(verdicts, RANKS)
    assert found == bootstrap_aurac(verdicts, RANKS, seed=0) != bootstrap_aurac(verdicts, RANKS, seed=1)
    assert found == bootstrap_aurac(verdicts[:, ::-1].astype(float), RANKS)


@pytest.mark.parametrize(("right", "total"), [(0, 7), (7, 7), (3, 1), (1, 1)])
def test_verdicts_that_are_all_alike_leave_no_doubt(right, total):
    verdicts = np.full((3, total), right >= total)
    assert bootstrap_aurac(verdicts, RANKS) == (float(right >= total),) * 3


def test_a_comparison_against_the_definitions():
    first, second = simulate(90, 3, 0.4), simulate(90, 3)
    found = compare(RankCurve.of("prefix", RANKS, first), RankCurve.of("nested", RANKS, second), samples=20_000)
    signed = first.astype(float) - second
    assert found.ranks == RANKS
    np.testing.assert_allclose(found.differences, first.mean(1) - second.mean(1))
    deviations = [np.sqrt(sum((x - row.mean()) ** 2 for x in row) / 89) for row in signed]
    np.testing.assert_allclose(found.standard_errors, np.array(deviations) / 90**0.5)
    for p_value, row in zip(found.p_values, signed, strict=True):
        wins, losses = int(np.sum(row > 0)), int(np.sum(row < 0))
        assert p_value == pytest.approx(binomtest(wins, wins + losses).pvalue, rel=1e-9)
    assert found.aurac.value == pytest.approx(area(signed.mean(1), "log2"))
    width = found.aurac.high - found.aurac.low
    expected = np.quantile(loop(signed, "log2", 3000), [0.025, 0.975])
    np.testing.assert_allclose([found.aurac.low, found.aurac.high], expected, atol=0.05 * width)
    alone = bootstrap_aurac(first, RANKS)
    assert width < 0.8 * (alone.high - alone.low)  # pairing is worth something


@pytest.mark.parametrize(("wins", "losses"), [(0, 0), (1, 0), (5, 5), (2, 9), (30, 11), (0, 40)])
def test_mcnemar(wins, losses):
    row = np.array([1] * wins + [-1] * losses + [0] * 6)
    first, second = RankCurve.of("prefix", (4,), [row > 0]), RankCurve.of("prefix", (4,), [row < 0])
    expected = binomtest(wins, wins + losses).pvalue if wins + losses else 1.0
    for found in (compare(first, second), compare(second, first)):
        assert found.p_values == pytest.approx((expected,), rel=1e-9)
    assert compare(first, second).differences[0] == -compare(second, first).differences[0]


def test_errors_of_equal_accuracies_in_simulation_are_those_claimed():
    found = [
        compare(*(RankCurve.of("prefix", RANKS, simulate(200, seed + offset)) for offset in (0, 5000)), samples=1)
        for seed in range(400)
    ]
    claimed = np.mean([each.standard_errors for each in found], axis=0)
    np.testing.assert_allclose(np.std([each.differences for each in found], axis=0), claimed, rtol=0.12)
    assert np.mean([np.array(each.p_values) < 0.05 for each in found]) < 0.06


def test_a_curve_keeps_its_verdicts_out_of_comparisons():
    verdicts = simulate(40, 4)
    curve = RankCurve.of("prefix", RANKS, verdicts)
    np.testing.assert_array_equal(curve.verdicts, verdicts)
    record = CurveRecord(None, "trec", "test", "prefix", RANKS, curve.accuracies, curve.standard_errors, 40)
    assert curve_of(record) == curve and curve_of(record).verdicts is None and "verdicts" not in repr(curve)
    assert dataclasses.replace(curve, items=41) != curve


GOOD = RankCurve.of("prefix", (1, 2), np.eye(2))


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: bootstrap_aurac([[0, 1], [1, np.nan]], (1, 2)), "0 or 1, got nan for item 1 at rank 2"),
        (lambda: bootstrap_aurac([[0, 0.5], [2, 1]], (1, 2)), "got 0.5 for item 1 at rank 1, one of 2 such"),
        (lambda: bootstrap_aurac([[0, 1], [1]], (1, 2)), r"the same items, got \[2, 1\] of them"),
        (lambda: bootstrap_aurac([[0, 1]], (1, 2)), r"each of the ranks \(1, 2\), got \(1, 2\)"),
        (lambda: bootstrap_aurac(np.ones((2, 0)), (1, 2)), r"got \(2, 0\)"),
        (lambda: bootstrap_aurac(np.eye(2), (2, 1)), r"strictly increasing without repeats, got \[2.0, 1.0\]"),
        (lambda: bootstrap_aurac(np.eye(2), (1, 2), axis="log"), "unknown axis 'log'"),
        (lambda: bootstrap_aurac(np.eye(2), (1, 2), samples=0), "samples must be at least 1, got 0"),
        (lambda: bootstrap_aurac(np.eye(2), (1, 2), confidence=95), "between 0 and 1, got 95"),
        (lambda: compare(GOOD, RankCurve.of("prefix", (1, 4), np.eye(2))), r"ranks: \(1, 2\) and \(1, 4\)"),
        (lambda: compare(GOOD, RankCurve.of("prefix", (1, 2), np.ones((2, 3)))), "different items: 2 and 3"),
        (
            lambda: compare(GOOD, dataclasses.replace(GOOD, verdicts=None)),
            r"the second curve \(prefix, ranks \(1, 2\)\) has no verdicts",
        ),
    ],
)
def test_unusable_input_is_named(act, message):
    with pytest.raises(ValueError, match=message):
        act()
