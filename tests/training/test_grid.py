"""Batches of trials: grouping, even cuts, and how many fit in memory."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlora_jax.config import resolve
from mlora_jax.run import sizing
from mlora_jax.run.experiment import Experiment
from mlora_jax.training.grid import TrialBatch, cut_evenly, group_trials, largest_batch, memory_limit, memory_of
from mlora_jax.training.phases import AdapterForm
from mlora_jax.training.step import make_optimizer
from mlora_jax.trials import expand_trials


def test_groups_keep_the_order_of_the_config():
    assert group_trials(["b1", "a1", "b2", "c1", "a2"], lambda name: name[0]) == [["b1", "b2"], ["a1", "a2"], ["c1"]]


@given(st.integers(1, 60), st.integers(1, 20))
def test_cuts_lose_nothing_and_share_one_size(count, at_once):
    cuts = cut_evenly(range(count), at_once)
    assert [trial for trials, _ in cuts for trial in trials] == list(range(count))
    sizes, slots = [len(trials) for trials, _ in cuts], {slots for _, slots in cuts}
    assert slots == {max(sizes)} and max(sizes) <= at_once and max(sizes) - min(sizes) <= 1
    assert len(cuts) == -(-count // at_once)


def test_empty_slots_repeat_the_last_trial():
    assert TrialBatch("batch", ("x", "y"), 4).slotted == ("x", "y", "y", "y")


@pytest.mark.parametrize(("each", "shared", "limit", "most"), [(10, 100, 1000, 90), (7, 0, 100, 14), (10, 95, 105, 1)])
def test_the_largest_that_fits(each, shared, limit, most):
    asked = []

    def needed(count):
        asked.append(count)
        return shared + each * count

    assert largest_batch(needed, shared, 200, limit) == most
    assert len(asked) <= 3  # each is a compilation
    assert largest_batch(needed, shared, most - 1 or 1, limit) == (most - 1 or 1)


def test_uneven_programs_still_end_up_below_the_limit():
    def needed(count):
        return 50 + 10 * count + 100 * (count > 3)

    assert largest_batch(needed, 0, 40, 180) == 3


def test_one_trial_that_does_not_fit():
    with pytest.raises(ValueError, match=r"one trial needs 3.00 GiB and the limit is 1.00 GiB: .*memory_gib"):
        largest_batch(lambda count: 3 * 2**30 * count, 0, 8, 2**30)


def test_memory_of_a_program():
    big = jax.ShapeDtypeStruct((256, 1024), jnp.float32)  # 1 MiB
    product = jax.jit(lambda x: jnp.sin(x) @ jnp.cos(x).T).lower(big).compile()
    assert 1.25 * 2**20 <= memory_of(product) <= 4 * 2**20
    reused = jax.jit(lambda x: x + 1, donate_argnums=0).lower(big).compile()
    fresh = jax.jit(lambda x: x + 1).lower(big).compile()
    assert memory_of(fresh) - memory_of(reused) == 2**20


def test_limits():
    assert memory_limit(0.5) == 2**29
    stats = jax.local_devices()[0].memory_stats()
    assert stats is None and memory_limit(0.0) == 8 * 2**30
    assert np.isscalar(memory_limit(0.0))


def test_a_device_s_memory_is_not_planned_to_the_last_byte(monkeypatch):
    device = types.SimpleNamespace(memory_stats=lambda: {"bytes_limit": 1000})
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    assert memory_limit(0.0) == 950 and memory_limit(0.5) == 2**29


@pytest.mark.parametrize(("keep", "most"), [("last", 5), ("best", 3)])
def test_what_a_trial_needs_beside_its_step_counts(monkeypatch, keep, most):
    """A save copies its state, 3082 bytes here; a best adapter of 1 KiB is there and in the copy."""
    config = resolve(
        {"trials": {"rank": (4,)}, "validation": {"keep": keep, "every": 1}, "train": {"memory_gib": 23_000 / 2**30}}
    )
    optimizer = make_optimizer(beta1=0.9, beta2=0.999, epsilon=1e-8, weight_decay=0.0, clip=1.0)
    adapter = {"a": jnp.zeros((16, 16))}
    tiny = Experiment(config, None, None, None, types.SimpleNamespace(examples=[0] * 64), {})
    tiny._by_form[AdapterForm(4)] = types.SimpleNamespace(
        base={"w": jnp.zeros(250)}, adapter=adapter, optimizer=optimizer
    )
    monkeypatch.setattr(sizing, "compile_step", lambda experiment, trial, count, phase: 1000 + 1000 * count)
    monkeypatch.setattr(sizing, "memory_of", lambda compiled: compiled)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert sizing.fitting_trials(tiny, expand_trials(config)[:1] * 12) == most
