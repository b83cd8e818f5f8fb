"""Applies the rules of a checkpoint's `generation_config.json` to the logits of the next token, as transformers does.

Axes: B batch, S slots of a row, V vocabulary. Source of every rule: `generation/logits_process.py` of transformers.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mlora_jax.models.generation_config import GenerationSettings

NO_TOKEN = -1  # marks the slots of a row that hold no token yet


class Texts(NamedTuple):
    """The texts of a batch as far as they are generated.

    Attributes:
      tokens: [B, S] int32, prompt and answer of each row, followed by `NO_TOKEN`.
      prompts: [B] int32, the number of tokens of each prompt.
      made: [B] int32, the number of tokens that each answer has so far.
      limits: [B] int32, the largest number of tokens that each answer may have.
      ends: [E], the token ids that end a text.
    """

    tokens: jax.Array
    prompts: jax.Array
    made: jax.Array
    limits: jax.Array
    ends: np.ndarray

    @property
    def lengths(self) -> jax.Array:
        """The number of tokens [B] of every row."""
        return self.prompts + self.made

    def last(self, count: int) -> jax.Array:
        """The last `count` tokens [B, count] of every row; they have no meaning where a row has fewer."""
        positions = self.lengths[:, None] - count + jnp.arange(count)[None]
        return jnp.take_along_axis(self.tokens, jnp.maximum(positions, 0), axis=1)


def _among(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """Marks [B, V] bool the tokens of the vocabulary that are in `tokens` [B, S]; negative entries are skipped."""
    rows, beyond = jnp.arange(len(logits))[:, None], logits.shape[-1]
    marked = jnp.zeros(logits.shape, bool)
    return marked.at[rows, jnp.where(tokens < 0, beyond, tokens)].set(True, mode="drop")


def _biased(biases: Sequence[tuple[tuple[int, ...], float]], logits: jax.Array, texts: Texts) -> jax.Array:
    total = jnp.zeros(logits.shape, logits.dtype)
    by_length: dict[int, list] = {}
    for ids, bias in biases:
        by_length.setdefault(len(ids), []).append((ids, bias))
    for length, group in sorted(by_length.items()):
        sequences, values = np.array([ids for ids, _ in group]), np.array([bias for _, bias in group], np.float32)
        heads, completing = sequences[:, :-1], sequences[:, -1]
        found = jnp.all(texts.last(length - 1)[:, None] == heads[None], axis=-1)  # [B, n]
        found &= texts.lengths[:, None] >= length - 1
        total = total.at[:, completing].add(jnp.where(found, values[None], 0.0).astype(total.dtype))
    return logits + total


def _penalised(penalty: float, logits: jax.Array, among: jax.Array) -> jax.Array:
    return jnp.where(among, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)


def _repeated(penalty: float, logits: jax.Array, texts: Texts) -> jax.Array:
    return _penalised(penalty, logits, _among(logits, texts.tokens))


def _prompts(texts: Texts) -> jax.Array:
    return jnp.where(jnp.arange(texts.tokens.shape[1])[None] < texts.prompts[:, None], texts.tokens, NO_TOKEN)


def _of_the_prompt(penalty: float, logits: jax.Array, texts: Texts) -> jax.Array:
    return _penalised(1 / penalty, logits, _among(logits, _prompts(texts)))


def _without_runs(size: int, logits: jax.Array, texts: Texts, *, of: Callable[[Texts], jax.Array]) -> jax.Array:
    tokens = of(texts)
    if tokens.shape[1] < size:
        return logits
    windows = tokens.shape[1] - size + 1
    completed = tokens[:, size - 1 :]  # [B, W], the last token of every run
    matches = completed >= 0  # a run with a negative last token extends past the text
    for index, token in enumerate(jnp.unstack(texts.last(size - 1), axis=1) if size > 1 else ()):
        matches &= tokens[:, index : index + windows] == token[:, None]
    return jnp.where(_among(logits, jnp.where(matches, completed, NO_TOKEN)), -jnp.inf, logits)


def _without_bad_words(words: Sequence[tuple[int, ...]], logits: jax.Array, texts: Texts) -> jax.Array:
    ends = {(int(id),) for id in texts.ends}
    return _biased([(ids, -np.inf) for ids in words if ids not in ends], logits, texts)


def _unended(logits: jax.Array, texts: Texts, early: jax.Array) -> jax.Array:
    return jnp.where(early, logits.at[:, texts.ends].set(-jnp.inf), logits)


def _long(least: int, logits: jax.Array, texts: Texts) -> jax.Array:
    return _unended(logits, texts, texts.lengths[:, None] < least)


def _long_answer(least: int, logits: jax.Array, texts: Texts) -> jax.Array:
    return _unended(logits, texts, texts.made[:, None] < least)


def _forced(ids: Any, logits: jax.Array, now: jax.Array) -> jax.Array:
    ids = np.atleast_1d(ids)
    return jnp.where(now[:, None], jnp.full_like(logits, -jnp.inf).at[:, ids].set(0.0), logits)


def _forced_begin(id: int, logits: jax.Array, texts: Texts) -> jax.Array:
    return _forced(id, logits, texts.lengths == 1)


def _forced_end(ids: tuple[int, ...], logits: jax.Array, texts: Texts) -> jax.Array:
    return _forced(ids, logits, texts.made + 1 == texts.limits)


def _ended_sooner(decay: tuple[int, float], logits: jax.Array, texts: Texts) -> jax.Array:
    start, factor = decay
    ends, made = logits[:, texts.ends], texts.made[:, None]
    grown = jnp.abs(ends) * (jnp.power(factor, (made - start).astype(logits.dtype)) - 1)
    grown = jnp.where(jnp.isfinite(ends), grown, 0.0)
    return jnp.where(made > start, logits.at[:, texts.ends].add(grown.astype(logits.dtype)), logits)


def _suppressed(ids: tuple[int, ...], logits: jax.Array, texts: Texts) -> jax.Array:
    return logits.at[:, np.array(ids)].set(-jnp.inf, mode="drop")


# Field of `GenerationSettings` -> (its value, logits [B, V], texts) -> logits, in the order of transformers.
# `begin_suppress_tokens` is not a row, because it depends on two fields: `LogitRules` applies it last.
RULES: dict[str, Callable[[Any, jax.Array, Texts], jax.Array]] = {
    "sequence_bias": _biased,
    "encoder_repetition_penalty": _of_the_prompt,
    "repetition_penalty": _repeated,
    "no_repeat_ngram_size": functools.partial(_without_runs, of=lambda texts: texts.tokens),
    "encoder_no_repeat_ngram_size": functools.partial(_without_runs, of=_prompts),
    "bad_words_ids": _without_bad_words,
    "min_length": _long,
    "min_new_tokens": _long_answer,
    "forced_bos_token_id": _forced_begin,
    "forced_eos_token_id": _forced_end,
    "exponential_decay_length_penalty": _ended_sooner,
    "suppress_tokens": _suppressed,
}


@dataclasses.dataclass(frozen=True)
class LogitRules:
    """The rules of one checkpoint: `rules(logits, texts)` gives the logits to choose the next token from.

    Args:
      settings: the checkpoint's generation settings, at least one of which changes logits.

    >>> rules = LogitRules(GenerationSettings(repetition_penalty=2.0, suppress_tokens=(0,)))
    >>> texts = Texts(jnp.array([[2, -1]]), jnp.array([1]), jnp.array([0]), jnp.array([1]), np.array([1]))
    >>> rules(jnp.array([[1.0, 4.0, 6.0]]), texts).tolist()
    [[-inf, 4.0, 3.0]]
    """

    settings: GenerationSettings

    def __call__(self, logits: jax.Array, texts: Texts) -> jax.Array:
        """The logits [B, V] after all rules."""
        applied = self.settings.applied()
        for name, rule in RULES.items():
            if name in applied:
                logits = rule(applied[name], logits, texts)
        if "begin_suppress_tokens" in applied:
            begin = texts.prompts
            if "forced_bos_token_id" in applied:  # after a prompt of one token, the forced token comes first
                begin = jnp.where(begin > 1, begin, begin + 1)
            suppressed = _suppressed(applied["begin_suppress_tokens"], logits, texts)
            logits = jnp.where((texts.lengths == begin)[:, None], suppressed, logits)
        return logits


def make_rules(settings: GenerationSettings | None) -> LogitRules | None:
    """The rules of a checkpoint, or None if its settings change no logits."""
    return LogitRules(settings) if settings is not None and settings.applied() else None
