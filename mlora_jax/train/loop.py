"""Training one trial: draw, step, log."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from mlora_jax.core.policies import Draw, Policy, draw_step
from mlora_jax.train.step import Schedule, TrialState, train_step

draw = jax.jit(draw_step, static_argnames=("policy", "hierarchy", "accumulation"))


class TrialKeys(NamedTuple):
    """The independent random keys of a trial; the data order takes the seed itself."""

    adapter: jax.Array
    draws: jax.Array
    dropout: jax.Array


def trial_keys(seed: int) -> TrialKeys:
    """The keys that follow from a trial's seed."""
    return TrialKeys(*(jax.random.fold_in(jax.random.key(seed), number) for number in range(3)))


def compile_step(graphdef, optimizer: optax.GradientTransformation, *, chunk: int) -> Callable:
    """`train_step` under `jax.jit`: one executable per number of profiles and batch shape, whatever the method.

    The trial state is donated. Arguments and results as `train_step` from `base` on.
    """
    return jax.jit(functools.partial(train_step, graphdef, optimizer, chunk), donate_argnums=(2,))


def train_trial(
    step: Callable,
    base,
    profile,
    state: TrialState,
    batches: Iterable[dict[str, np.ndarray]],
    *,
    policy: Policy,
    hierarchy,
    schedule: Schedule,
    keys: TrialKeys,
    log_every: int,
    log: Callable[[int, dict[str, Any]], None],
) -> TrialState:
    """Trains to the end of `batches`, or to the first log after a loss that is not finite.

    Args:
      step: from `compile_step`.
      base: frozen tree.
      profile: profile tree.
      state: the state to start from; its buffers are consumed.
      batches: step batches, arrays [M, B, ...].
      policy: draws the profiles.
      hierarchy: S, s_r, w_r and R.
      schedule: learning rate and lengths.
      keys: of the trial.
      log_every: steps between logs.
      log: called with (finished steps, values) where values has loss (mean over the steps since the last log),
        gradient_norm and learning_rate (of the last step), tokens_per_second, finite.

    Returns:
      The last finite state.
    """
    losses, tokens, since, metrics, done = [], 0, time.monotonic(), None, 0

    def flush():
        nonlocal losses, tokens, since
        values = {name: value.item() for name, value in jax.device_get(metrics).items()}
        values["loss"] = float(np.mean(jax.device_get(losses)))
        now = time.monotonic()
        values["tokens_per_second"] = tokens / (now - since)
        losses, tokens, since = [], 0, now
        log(done, values)
        return values["finite"]

    for done, batch in enumerate(batches, start=1):
        drawn: Draw = draw(policy, hierarchy, keys.draws, done - 1, accumulation=len(batch["tokens"]))
        state, metrics = step(base, profile, state, batch, drawn, schedule, keys.dropout)
        if losses:
            jax.block_until_ready(losses[-1])  # one step ahead of the device, no more: see ChoiceEvaluator
        losses.append(metrics["loss"])
        tokens += batch["tokens"].size
        if done % log_every == 0 and not flush():
            return state
    if losses:
        flush()
    return state
