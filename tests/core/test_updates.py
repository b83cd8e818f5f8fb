"""Update rules: rates of columns and of leaves, and the soft threshold of gates."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlora_jax.core import UPDATES, RankHierarchy, draw_step, get_policy, get_update
from mlora_jax.core.transforms import AfterUpdate

R = 6
HIERARCHY = RankHierarchy((1, 2, 4, R))


@pytest.mark.parametrize(
    ("name", "rates"),
    [
        ("none", [1, 1, 1, 1, 1, 1]),
        ("upper_half", [0, 0, 0, 1, 1, 1]),
        ("first_column_3", [3, 1, 1, 1, 1, 1]),
        ("soft_threshold", [1, 1, 1, 1, 1, 1]),
        ("lora_plus", [1, 1, 1, 1, 1, 1]),
    ],
)
def test_rates_of_columns(name, rates):
    assert np.asarray(UPDATES[name].column_rates(HIERARCHY)).tolist() == rates
    draw = draw_step(get_policy("lora"), HIERARCHY, jax.random.key(0), 0, accumulation=2, update=UPDATES[name])
    assert draw.column_rates.tolist() == rates and draw.update_mask.tolist() == [1] * R


def test_a_column_that_a_policy_masks_has_the_rate_0():
    options = dict(accumulation=1, update=UPDATES["first_column_3"])
    draws = [draw_step(get_policy("dylora_frozen"), HIERARCHY, jax.random.key(0), at, **options) for at in range(40)]
    for draw in draws:
        (at,) = np.flatnonzero(draw.update_mask)
        expected = np.zeros(R)
        expected[at] = 3.0 if at == 0 else 1.0
        np.testing.assert_array_equal(draw.column_rates, expected)
    assert any(draw.update_mask[0] == 1 for draw in draws)


def test_the_soft_threshold_of_gates_is_that_of_numpy():
    gate = np.array([[0.5, -0.5, 2e-4, -2e-4, 0.0, 3e-4]], np.float32)
    adapter = {"layer": {"a": jnp.ones((1, 3, R)), "b": jnp.ones((1, R, 2)), "gate": jnp.asarray(gate)}}
    row = UPDATES["soft_threshold"]
    made = row.proximal(adapter, AfterUpdate(row.strength, 0.5, 1e-3))["layer"]
    np.testing.assert_allclose(made["gate"], np.sign(gate) * np.maximum(np.abs(gate) - 3e-4, 0), atol=1e-9)
    assert np.count_nonzero(made["gate"]) == 2
    np.testing.assert_array_equal(made["a"], adapter["layer"]["a"])
    np.testing.assert_array_equal(made["b"], adapter["layer"]["b"])


def test_the_threshold_rises_from_zero_in_seven_equal_stages():
    """Of 14 steps, two have each of the values 0, 1/6, ..., 1 times 7e-4; by NumPy."""
    row, gate = UPDATES["soft_threshold_rising"], jnp.ones((1, R))
    taken = []
    for step in range(14):
        after = AfterUpdate(jnp.asarray(row.strength), jnp.asarray((step + 1) / 14), jnp.asarray(1e-3))
        taken.append(1 - float(row.proximal({"layer": {"gate": gate}}, after)["layer"]["gate"][0, 0]))
    np.testing.assert_allclose(taken, np.repeat(np.linspace(0, 7e-4, 7), 2), atol=2e-7)


def test_the_threshold_of_codyra_is_zero_for_half_of_the_steps_and_rises_then():
    row, gate = UPDATES["soft_threshold_late"], jnp.array([[1.0, -1.0, 0.002, -0.002, 0.0, 0.5]])
    found = {}
    for progress in (0.25, 0.5, 0.75, 1.0):
        after = AfterUpdate(jnp.asarray(row.strength), jnp.asarray(progress), jnp.asarray(1e-3))
        found[progress] = np.asarray(row.proximal({"layer": {"gate": gate}}, after)["layer"]["gate"])
    for progress, threshold in {0.25: 0.0, 0.5: 0.0, 0.75: 0.0025, 1.0: 0.005}.items():
        expected = np.sign(gate) * np.maximum(np.abs(gate) - threshold, 0)
        np.testing.assert_allclose(found[progress], expected, atol=1e-7)
    assert np.count_nonzero(found[1.0]) == 3


def test_the_draw_has_the_rates_of_leaves_and_the_strength():
    options = dict(accumulation=1)
    draws = {
        name: draw_step(get_policy("lora"), HIERARCHY, jax.random.key(0), 0, update=UPDATES[name], **options)
        for name in ("none", "lora_plus", "soft_threshold")
    }
    assert {name: float(rate) for name, rate in draws["none"].leaf_rates.items()} == {"a": 1, "b": 1, "gate": 1}
    assert {name: float(rate) for name, rate in draws["lora_plus"].leaf_rates.items()} == {"a": 1, "b": 16, "gate": 1}
    assert float(draws["soft_threshold"].strength) == pytest.approx(3e-4) and float(draws["none"].strength) == 0
    # They are data: rules that differ in them alone share an executable.
    assert len({jax.tree.structure(draw) for draw in draws.values()}) == 1


def test_an_unknown_update_is_refused():
    with pytest.raises(ValueError, match="unknown update 'soft_treshold'; did you mean 'soft_threshold'"):
        get_update("soft_treshold")
