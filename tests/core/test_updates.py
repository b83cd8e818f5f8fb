"""Update rules: rates of columns, and the soft threshold of gates."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlora_jax.core import UPDATES, RankHierarchy, draw_step, get_policy, get_update

R = 6
HIERARCHY = RankHierarchy((1, 2, 4, R))


@pytest.mark.parametrize(
    ("name", "rates"),
    [
        ("none", [1, 1, 1, 1, 1, 1]),
        ("upper_half", [0, 0, 0, 1, 1, 1]),
        ("first_column_3", [3, 1, 1, 1, 1, 1]),
        ("soft_threshold", [1, 1, 1, 1, 1, 1]),
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
    made = UPDATES["soft_threshold"].proximal(adapter)["layer"]
    np.testing.assert_allclose(made["gate"], np.sign(gate) * np.maximum(np.abs(gate) - 3e-4, 0), atol=1e-9)
    assert np.count_nonzero(made["gate"]) == 2
    np.testing.assert_array_equal(made["a"], adapter["layer"]["a"])
    np.testing.assert_array_equal(made["b"], adapter["layer"]["b"])


def test_an_unknown_update_is_refused():
    with pytest.raises(ValueError, match="unknown update 'soft_treshold'; did you mean 'soft_threshold'"):
        get_update("soft_treshold")
