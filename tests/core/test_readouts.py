"""The table of read-outs: every row has all that reports, exports and runs ask for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlora_jax.core import READOUTS, RankHierarchy, Reading, get_readout, read_out, readout_profile
from mlora_jax.core.readouts import STORED, fitted_profile, readout_label, readouts_without_data

HIERARCHY = RankHierarchy((1, 3, 4), "sqrt", (1.0, 2.0, 1.0))


@pytest.fixture
def adapter():
    a, b = jax.random.normal(jax.random.key(0), (2, 6, 4)), jax.random.normal(jax.random.key(1), (2, 4, 5))
    return {"layer": {"a": a, "b": b}}


@pytest.mark.parametrize("name", READOUTS)
def test_every_row_is_whole(name):
    row = READOUTS[name]
    assert row.summary and row.stored in STORED and row.label.format(method="lora", readout=name)
    assert (name in readouts_without_data()) == (not row.needs)
    # What is made of data is kept: other commands have no training data.
    assert bool(row.needs) == bool(row.stored)


def test_labels():
    labels = [readout_label("lora", name) for name in (*READOUTS, "middle")]
    assert labels[:3] == ["lora", "lora + squeeze", "lora (nested)"] and labels[-1] == "lora (middle)"
    assert len(set(labels)) == len(labels)


@pytest.mark.parametrize("name", ["prefix", "nested", "masked"])
def test_profiles_of_the_adapter_itself(adapter, name):
    reading = read_out(adapter, HIERARCHY, name)
    assert reading.adapter is adapter and reading.hierarchy == HIERARCHY and reading.name == name
    for rank, p in reading.curve().items():
        np.testing.assert_array_equal(p, getattr(HIERARCHY, name)(rank))
        np.testing.assert_array_equal(p, readout_profile(HIERARCHY, name, rank))


def test_a_squeezed_adapter_is_read_out_by_prefix_with_scale_1(adapter):
    reading = read_out(adapter, HIERARCHY, "squeeze", trained_profile=HIERARCHY.matryoshka())
    assert reading.name == "prefix" and reading.hierarchy == RankHierarchy((1, 3, 4), "none")
    assert [p.tolist() for p in reading.curve().values()] == [[1, 0, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    whole = reading.adapter["layer"]["a"] @ reading.adapter["layer"]["b"]
    a, b = (np.asarray(adapter["layer"][name]) for name in "ab")
    expected = a * np.asarray(HIERARCHY.matryoshka()) @ b
    np.testing.assert_allclose(whole, expected, rtol=1e-4, atol=1e-4)


def test_fitted_profiles_are_looked_up(adapter):
    fitted = jnp.array([[0.5, 0, 0, 0], [0.1, 0.2, 0.3, 0], [1.0, 2, 3, 4]])
    reading = read_out(adapter, HIERARCHY, "calibrated", needed={"fitted_profiles": fitted})
    assert reading.adapter is adapter and reading.hierarchy == HIERARCHY
    np.testing.assert_array_equal(np.stack([*reading.curve().values()]), fitted)
    assert not np.any(reading.profile(0))
    with pytest.raises(ValueError, match="is calibrated at the ranks 1, 3, 4, not at 2"):
        reading.profile(2)
    with pytest.raises(ValueError, match="not at 9"):
        fitted_profile(reading.profiles, 9)


def test_what_cannot_be_read_out_is_refused(adapter):
    with pytest.raises(ValueError, match=r"unknown read-out 'middle'\. Known read-outs: prefix, squeeze"):
        get_readout("middle")
    with pytest.raises(ValueError, match=r"'squeeze_inputs' needs hidden_moments, .* alone: prefix, squeeze, nested"):
        read_out(adapter, HIERARCHY, "squeeze_inputs")
    with pytest.raises(ValueError, match="'squeeze' is not a profile of the adapter itself; those that are: prefix, n"):
        readout_profile(HIERARCHY, "squeeze", 1)
    with pytest.raises(ValueError, match=r"rank of a read-out must be an integer in 0..4, got 5"):
        Reading(adapter, HIERARCHY, "prefix").profile(5)
