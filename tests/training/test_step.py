"""The training step: schedule, accumulation, several profiles, masks, frozen trials, many trials at once."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from flax import nnx
from peft.optimizers import create_loraplus_optimizer

from mlora_jax.adapters import adapt, split
from mlora_jax.core import POLICIES, UPDATES, Draw, RankHierarchy, draw_step, get_policy
from mlora_jax.core.rank_axes import by_parent
from mlora_jax.data import Example
from mlora_jax.models import Decoder
from mlora_jax.training.step import (
    PackedRows,
    Passes,
    Schedule,
    init_state,
    learning_rate_at,
    make_optimizer,
)
from tests.tiny import compile_step, pack_examples, tiny_config

HIERARCHY = RankHierarchy((1, 2, 4, 6))
ADAMW = {"beta1": 0.9, "beta2": 0.999, "epsilon": 1e-8, "weight_decay": 0.0, "clip": 1.0}


@functools.cache
def parts(seed, dtype, dropout, options):
    model = Decoder(tiny_config(), dtype=dtype, rngs=nnx.Rngs(0))
    adapted = adapt(model, 6, ("v_proj", "up_proj"), key=jax.random.key(seed), dropout=dropout)
    graphdef, base, adapter, profile = split(adapted)
    optimizer = make_optimizer(**(ADAMW | dict(options)))
    return compiled(graphdef, options, dtype, dropout), base, profile, jax.tree.map(np.asarray, adapter), optimizer


@functools.cache
def compiled(graphdef, options, dtype, dropout):
    return compile_step(graphdef, make_optimizer(**(ADAMW | dict(options))), chunk=8)


def make(seed=0, dtype=jnp.float32, dropout=0.0, **options):
    """(step, base, profile, state); the step is compiled once for equal arguments, the state is fresh."""
    step, base, profile, adapter, optimizer = parts(seed, dtype, dropout, tuple(options.items()))
    return step, base, profile, init_state(jax.tree.map(jnp.array, adapter), optimizer)


def make_examples(count=8, seed=0):
    generator = np.random.default_rng(seed)
    lengths = generator.integers(4, 9, count)
    return [
        Example(generator.integers(3, 300, n).astype(np.int32), np.arange(n) >= n - 1 - i % 3)
        for i, n in enumerate(lengths)
    ]


def batch_of(seed=0):
    return pack_examples(make_examples(seed=seed))


def take(step, base, profile, state, *, batch=None, draw=None, accumulation=1, rate=1e-2, total=10, key=None):
    batch = batch_of() if batch is None else batch
    draw = draw or draw_step(get_policy("lora"), HIERARCHY, jax.random.key(0), 0, accumulation=accumulation)
    draw = jax.tree.map(np.asarray, draw)
    key = jax.random.key(0) if key is None else key
    return jax.block_until_ready(step(base, profile, state, batch, draw, Schedule(rate, 0, total), key))


def difference(left, right):
    pairs = zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
    return max(float(jnp.max(jnp.abs(a - b))) for a, b in pairs)


@pytest.mark.parametrize("warmup", [0, 3])
def test_schedule_is_that_of_transformers(warmup):
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.7)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, warmup, 11)
    for step in range(12):
        np.testing.assert_allclose(
            learning_rate_at(Schedule(0.7, warmup, 11), step), schedule.get_last_lr()[0], rtol=1e-6, atol=1e-9
        )
        optimizer.step()
        schedule.step()


def test_accumulation_equals_one_large_batch():
    ends = []
    for accumulation in (1, 2, 4):
        step, base, profile, state = make()
        for number in range(4):
            options = dict(batch=batch_of(seed=number), accumulation=accumulation)
            state, metrics = take(step, base, profile, state, **options)
        ends.append((state.adapter, metrics["loss"]))
    assert difference(ends[0], ends[1]) < 1e-5
    assert difference(ends[0], ends[2]) < 1e-5


def test_loss_is_the_weighted_mean_over_profiles():
    step, base, profile, state = make()
    state, _ = take(step, base, profile, state)
    adapter, optimizer = jax.tree.map(np.asarray, state.adapter), jax.tree.map(np.asarray, state.optimizer)
    profiles = [HIERARCHY.prefix(1), HIERARCHY.prefix(6)]

    def loss(*chosen, weights=None):
        fresh = state._replace(adapter=jax.tree.map(jnp.array, adapter), optimizer=jax.tree.map(jnp.array, optimizer))
        fresh = fresh._replace(step=jnp.array(1), finite=jnp.array(True), stopped=jnp.array(False))
        weights = jnp.full(len(chosen), 1 / len(chosen)) if weights is None else jnp.array(weights)
        draw = Draw(jnp.stack(chosen)[None, :, None], jnp.ones(6), jnp.ones(6), weights)
        return float(take(step, base, profile, fresh, draw=draw)[1]["loss"])

    both, first, last = loss(*profiles), loss(profiles[0]), loss(profiles[1])
    assert abs(first - last) > 1e-4
    np.testing.assert_allclose(both, (first + last) / 2, rtol=1e-5)
    weighted = loss(*profiles, weights=(0.9, 0.1))
    np.testing.assert_allclose(weighted, 0.9 * first + 0.1 * last, rtol=1e-5)


def test_frozen_mode_moves_one_column_and_row_and_nothing_else():
    step, base, profile, state = make()
    moved = set()
    for number in range(6):
        draw = draw_step(get_policy("dylora_frozen"), HIERARCHY, jax.random.key(1), number, accumulation=1)
        column = int(np.argmax(draw.update_mask))
        old = jax.tree.map(np.asarray, state.adapter)
        state, _ = take(step, base, profile, state, draw=draw)
        for (path, before), after in zip(
            jax.tree_util.tree_leaves_with_path(old), jax.tree.leaves(state.adapter), strict=True
        ):
            axis = -1 if "'a'" in str(path) else -2
            changed = np.any(
                np.asarray(before != after), axis=tuple(i for i in range(after.ndim) if i != after.ndim + axis)
            )
            assert set(np.flatnonzero(changed)) <= {column}
            moved |= set(np.flatnonzero(changed))
    assert len(moved) > 1


def test_a_trial_that_is_not_finite_is_frozen_and_stays_so():
    step, base, profile, state = make()
    state, metrics = take(step, base, profile, state)
    good = jax.tree.map(np.asarray, (state.adapter, state.optimizer))
    broken = Draw(jnp.full((1, 1, 1, 6), jnp.nan), jnp.ones(6), jnp.ones(6), jnp.ones(1))
    state, metrics = take(step, base, profile, state, draw=broken)
    assert not metrics["finite"]
    state, metrics = take(step, base, profile, state)
    assert np.isfinite(metrics["loss"]) and not metrics["finite"] and not state.finite and state.step == 1
    assert difference(good, (state.adapter, state.optimizer)) == 0


def test_an_update_that_breaks_the_adapter_is_not_kept():
    step, base, profile, state = make()
    state, _ = take(step, base, profile, state)
    good = jax.tree.map(np.asarray, (state.adapter, state.optimizer))
    state, metrics = take(step, base, profile, state, rate=np.float32(np.inf))
    assert np.isfinite(metrics["loss"]) and np.isfinite(metrics["gradient_norm"])
    assert not metrics["finite"] and not state.finite and state.step == 1
    assert difference(good, (state.adapter, state.optimizer)) == 0


def test_bfloat16_base_keeps_float32_factors():
    step, base, profile, state = make(dtype=jnp.bfloat16)
    state, metrics = take(step, base, profile, state)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.adapter)} == {jnp.dtype("float32")}
    assert metrics["loss"].dtype == jnp.float32
    kernels = {leaf.dtype for leaf in jax.tree.leaves(base) if jnp.issubdtype(leaf.dtype, jnp.floating)}
    assert kernels == {jnp.dtype("bfloat16")}


@pytest.mark.parametrize(
    ("option", "value"), [("beta1", 0.5), ("beta2", 0.9), ("epsilon", 1e-2), ("weight_decay", 0.3), ("clip", 1e-3)]
)
def test_every_optimizer_option_changes_training(option, value):
    ends = []
    for options in ({}, {option: value}):
        step, base, profile, state = make(**options)
        for number in range(3):
            state, _ = take(step, base, profile, state, batch=batch_of(seed=number))
        ends.append(state.adapter)
    assert difference(*ends) > 1e-6


def test_dropout_depends_on_the_key_and_the_step_only():
    step, base, profile, state = make(dropout=0.5)
    saved = jax.tree.map(np.asarray, state)

    def loss(key, at=1):
        fresh = jax.tree.map(jnp.asarray, saved)._replace(step=jnp.array(at))
        fresh = fresh._replace(adapter=jax.tree.map(lambda x: x + 0.1, fresh.adapter))
        return float(take(step, base, profile, fresh, key=jax.random.key(key))[1]["loss"])

    assert loss(0) == loss(0)
    assert loss(0) != loss(1)
    assert loss(0, at=1) != loss(0, at=2)


def test_one_executable_for_all_methods_with_as_many_profiles():
    step, base, profile, state = make(beta1=0.8)  # a step of its own, not yet compiled for any shape
    for method in POLICIES.keys() - {"matryoshka_exact", "sandwich", "per_example"}:
        draw = draw_step(get_policy(method), HIERARCHY, jax.random.key(0), 0, accumulation=1)
        state, _ = take(step, base, profile, state, draw=draw, rate=1e-3 * len(method), total=len(method))
    assert step._cache_size() == 1
    draw = draw_step(get_policy("matryoshka_exact"), HIERARCHY, jax.random.key(0), 0, accumulation=1)
    state, _ = take(step, base, profile, state, draw=draw)
    assert step._cache_size() == 2


def test_lora_plus_moves_b_16_times_as_far_in_the_same_executable():
    """The ratio is that of the parameter groups that PEFT makes for LoRA+."""
    linear = torch.nn.Sequential(torch.nn.Linear(4, 4))
    tuned = peft.get_peft_model(linear, peft.LoraConfig(r=2, target_modules=["0"]))
    ratio = dict(UPDATES["lora_plus"].leaf_rates)["b"]
    groups = create_loraplus_optimizer(tuned, torch.optim.AdamW, lr=1e-2, loraplus_lr_ratio=ratio)
    rates = {name: group["lr"] for group in groups.param_groups for name, p in tuned.named_parameters()
             if any(p is each for each in group["params"])}  # fmt: skip
    expected = {name: next(rate for key, rate in rates.items() if f"lora_{name.upper()}" in key) for name in "ab"}
    moved = {}
    step, base, profile, _ = make(beta2=0.99)
    for name in ("none", "lora_plus"):
        state = make(beta2=0.99)[3]
        state = state._replace(adapter=jax.tree.map(lambda x: x + 0.1, state.adapter))
        before = by_parent(jax.tree.map(np.asarray, state.adapter))
        options = dict(accumulation=2, update=UPDATES[name])
        draw = draw_step(get_policy("matryoshka"), HIERARCHY, jax.random.key(0), 0, **options)
        after = by_parent(take(step, base, profile, state, draw=draw)[0].adapter)
        moved[name] = {path: {leaf: after[path][leaf] - old for leaf, old in leaves.items()}
                       for path, leaves in before.items()}  # fmt: skip
    for path, leaves in moved["none"].items():
        for leaf, plain in leaves.items():
            times = moved["lora_plus"][path][leaf] / plain
            np.testing.assert_allclose(times, expected[leaf] / 1e-2, rtol=2e-3)
    assert expected == {"a": 1e-2, "b": 0.16} and step._cache_size() == 1


def test_the_soft_threshold_follows_the_update_of_the_gates():
    """A gate that Adam does not move falls by lambda at each step until it is zero; the schedule begins with zero."""
    model = adapt(Decoder(tiny_config(), rngs=nnx.Rngs(0)), 6, ("up_proj",), key=jax.random.key(0), gate="normal")
    graphdef, base, adapter, profile = split(model)
    optimizer, row = make_optimizer(**ADAMW), UPDATES["soft_threshold_rising"]
    state = init_state(adapter, optimizer)  # B is zero, and so is the gradient of a gate
    gates = [np.asarray(by_parent(state.adapter)["layers", "mlp", "up_proj"]["gate"])]
    step = compile_step(graphdef, optimizer, chunk=8, rule=row.rule)
    draw = draw_step(get_policy("lora"), HIERARCHY, jax.random.key(0), 0, accumulation=1, update=row)
    draw = dataclasses.replace(draw, column_rates=jnp.zeros(6), strength=jnp.asarray(0.6))
    for number in range(7):
        state, _ = take(step, base, profile, state, batch=batch_of(seed=number), draw=draw, total=7)
        gates.append(np.asarray(by_parent(state.adapter)["layers", "mlp", "up_proj"]["gate"]))
    for number, (before, after) in enumerate(itertools.pairwise(gates)):
        expected = np.sign(before) * np.maximum(np.abs(before) - 0.1 * number, 0)
        np.testing.assert_allclose(after, expected, atol=1e-6)
    assert np.any(gates[-1] == 0) and not np.any(gates[1] == 0)


def test_trials_under_vmap_equal_trials_alone():
    step, base, profile, _ = make()
    methods, rates = ("lora", "dylora", "matryoshka"), (1e-2, 3e-3, 1e-3)
    examples = [[make_examples(seed=10 * trial + number) for number in range(4)] for trial in range(3)]
    draws = [
        [draw_step(get_policy(m), HIERARCHY, jax.random.key(trial), n, accumulation=1) for n in range(4)]
        for trial, m in enumerate(methods)
    ]
    alone = []
    for trial in range(3):
        state = make(seed=trial)[3]
        for number in range(4):
            state, _ = take(
                step,
                base,
                profile,
                state,
                batch=pack_examples(examples[trial][number]),
                draw=draws[trial][number],
                rate=rates[trial],
            )
        alone.append(state.adapter)
    stack = lambda trees: jax.tree.map(lambda *xs: jnp.stack(xs), *trees)  # noqa: E731
    state = stack([make(seed=trial)[3] for trial in range(3)])
    in_batch = {name: None if name in Passes._fields else 0 for name in (*PackedRows._fields, *Passes._fields)}
    together = jax.jit(jax.vmap(step, in_axes=(None, None, 0, in_batch, 0, Schedule(0, None, None), 0)))
    keys = jnp.stack([jax.random.key(0)] * 3)
    for number in range(4):
        batch, draw = pack_examples(*(each[number] for each in examples)), stack([d[number] for d in draws])
        state, _ = jax.block_until_ready(
            together(base, profile, state, batch, draw, Schedule(jnp.array(rates), 0, 10), keys)
        )
    assert difference(stack(alone), state.adapter) < 1e-5


def test_a_gate_is_trained_with_the_factors_and_masked_with_them():
    """On stacked layers and on the head, whose profiles follow the answers, with a profile per example."""
    model = Decoder(tiny_config(tie_word_embeddings=False), rngs=nnx.Rngs(0))
    model = adapt(model, 6, ("up_proj", "lm_head"), key=jax.random.key(0), gate=True)
    graphdef, base, adapter, profile = split(model)
    optimizer = make_optimizer(**ADAMW)
    state = init_state(jax.tree.map(lambda leaf: leaf + 0.1, adapter), optimizer)
    before = jax.tree.map(np.asarray, state.adapter)
    mask = jnp.array([1.0, 1.0, 1.0, 0.0, 0.0, 0.0])
    draw = Draw(jnp.stack([HIERARCHY.prefix(6)] * 8)[None, None], mask, mask, jnp.ones(1), per_example=True)
    step = compile_step(graphdef, optimizer, chunk=8)
    state, metrics = take(step, base, profile, state, draw=draw)
    assert metrics["finite"]
    for layer in (("layers", "mlp", "up_proj"), ("lm_head",)):
        new, old = state.adapter, before
        for name in layer:
            new, old = new[name], old[name]
        moved = np.asarray(new["gate"][...]) != np.asarray(old["gate"][...])
        np.testing.assert_array_equal(moved, np.broadcast_to(np.asarray(mask) > 0, moved.shape))
