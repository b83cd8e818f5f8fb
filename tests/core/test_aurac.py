"""AURAC on both axes against NumPy loops, and every curve it refuses."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlora_jax.core import AXES, aurac, summarize
from tests.oracles import numpy_reference as reference

CURVES = {
    "one rank": ([0.7], [4]),
    "two ranks": ([0.2, 0.8], [1, 2]),
    "powers": ([0.1, 0.3, 0.35, 0.6, 0.55], [1, 2, 4, 8, 16]),
    "uneven": ([0.9, 0.1, 0.5], [3, 5, 12]),
    "arrays": (np.array([0.125, 0.5], np.float32), np.array([2, 6])),
}


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("name", CURVES)
def test_the_area_equals_the_trapezoids(name, axis):
    accuracies, ranks = CURVES[name]
    area = aurac(accuracies, ranks, axis)
    assert type(area) is float
    assert area == pytest.approx(reference.aurac(accuracies, ranks, axis), rel=1e-14)


def test_hand_computed_areas():
    assert aurac([0.0, 1.0, 0.0], [1, 2, 4], "log2") == pytest.approx(0.5, abs=1e-15)
    assert aurac([0.0, 1.0, 1.0], [1, 2, 4], "linear") == pytest.approx(2.5 / 3, abs=1e-15)
    assert aurac([0.0, 1.0, 1.0], [1, 2, 4]) == aurac([0.0, 1.0, 1.0], [1, 2, 4], "log2") == pytest.approx(0.75)


@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_the_area_is_a_mean(data):
    ranks = sorted(data.draw(st.sets(st.integers(1, 300), min_size=1, max_size=8)))
    heights = data.draw(st.lists(st.floats(0, 1), min_size=len(ranks), max_size=len(ranks)))
    slope, offset = data.draw(st.floats(-3, 3)), data.draw(st.floats(-3, 3))
    for axis in AXES:
        area = aurac(heights, ranks, axis)
        assert min(heights) - 1e-12 <= area <= max(heights) + 1e-12
        assert aurac([slope * h + offset for h in heights], ranks, axis) == pytest.approx(
            slope * area + offset, abs=1e-12
        )


def test_the_summary_holds_both_areas_and_the_plain_mean():
    accuracies, ranks = CURVES["uneven"]
    summary = summarize(accuracies, ranks)
    assert summary.linear == aurac(accuracies, ranks, "linear")
    assert summary.log2 == aurac(accuracies, ranks, "log2")
    assert summary.mean == pytest.approx(0.5, abs=1e-15)


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize(
    ("accuracies", "ranks", "message"),
    [
        ([0.1, 0.2], [2, 1], r"strictly increasing.*\[2\.0, 1\.0\]"),
        ([0.1, 0.2, 0.3], [1, 2, 2], r"without repeats, got \[1\.0, 2\.0, 2\.0\]"),
        ([0.1, 0.2], [0, 1], r"positive, got \[0\.0, 1\.0\]"),
        ([0.1, 0.2], [-2, 1], r"positive, got \[-2\.0, 1\.0\]"),
        ([0.1], [0], "positive"),
        ([0.1, 0.2], [1, math.nan], "ranks must be positive.*nan"),
        ([0.1, 0.2], [1, math.inf], "ranks must be positive.*inf"),
        ([0.1, 0.2, 0.3], [1, 2], r"one length.*\[0\.1, 0\.2, 0\.3\] and \[1, 2\]"),
        ([], [1], "one length"),
        ([0.5], [], "one length"),
        (0.5, 1, "two lists of one length"),
        ([[0.1, 0.2]], [[1, 2]], "two lists of one length"),
        ([], [], "empty"),
        ([0.1, math.nan], [1, 2], r"accuracies must be finite, got \[0\.1, nan\]"),
        ([math.nan], [1], "accuracies must be finite"),
        ([0.1, math.inf], [1, 2], "accuracies must be finite.*inf"),
    ],
)
def test_a_bad_curve_is_refused_with_its_values(accuracies, ranks, message, axis):
    with pytest.raises(ValueError, match=message):
        aurac(accuracies, ranks, axis)
    with pytest.raises(ValueError, match=message):
        summarize(accuracies, ranks)


def test_an_unknown_axis_is_refused():
    with pytest.raises(ValueError, match="unknown axis 'log10'; known: linear, log2"):
        aurac([0.5], [1], "log10")


def test_the_error_of_numpy_curves_prints_plain_numbers():
    with pytest.raises(ValueError, match=r": \[0\.5\] and \[1, 2\]$"):
        aurac(list(np.array([0.5])), list(np.array([1, 2])))
