"""Exact match of greedy answers: prefill and decode with a KV cache, for any adapter under any profile."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mlora_jax.adapt import set_profile
from mlora_jax.data.tasks import Task
from mlora_jax.data.tokenize import prompt_tokens
from mlora_jax.evaluate.requests import warn_of_not_finite
from mlora_jax.evaluate.scoring import even_batch_size
from mlora_jax.models.tokenizer import Tokenizer

NOT_FINITE = -2  # in place of a token where no logit is the largest


def greedy_decode(
    model, tokens: jax.Array, lengths: jax.Array, *, max_new_tokens: int, stop: Sequence[int]
) -> jax.Array:
    """The likeliest next token, again and again.

    Args:
      model: a `Decoder`.
      tokens: [B, T] int32, right-padded prompts.
      lengths: [B] int32, tokens in each prompt, at least 1.
      max_new_tokens: N, how many tokens are made at most; decoding ends early when every row has stopped.
      stop: token ids that end a row.

    Returns:
      [B, N] int32; -1 from a row's stop token on. Where a row's logits are not finite it has `NOT_FINITE` and then -1.
      Traceable.
    """
    batch, length = tokens.shape
    cache = model.init_cache(batch, length + max_new_tokens)
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), tokens.shape)
    hidden, cache = model.hidden(tokens, positions=positions, cache=cache)
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)  # [B, 1, D]
    following = _likeliest(model.head(last[:, 0]))  # [B]
    made = jnp.full((batch, max_new_tokens), -1, jnp.int32)
    ends = jnp.asarray(list(stop), jnp.int32)

    def going(carry):
        step, _, _, done, _ = carry
        return (step < max_new_tokens) & ~jnp.all(done)

    def advance(carry):
        step, following, made, done, cache = carry
        done |= jnp.any(following[:, None] == ends, axis=-1)
        made = made.at[:, step].set(jnp.where(done, -1, following))
        done |= following == NOT_FINITE
        known = jnp.maximum(following, 0)[:, None]
        hidden, cache = model.hidden(known, positions=(lengths + step)[:, None], cache=cache)
        following = _likeliest(model.head(hidden[:, 0]))
        return step + 1, following, made, done, cache

    start = (jnp.zeros((), jnp.int32), following, made, jnp.zeros((batch,), bool), cache)
    return jax.lax.while_loop(going, advance, start)[2]


def _likeliest(logits: jax.Array) -> jax.Array:
    """The token [B] of the largest of the logits [B, V], or `NOT_FINITE`; the largest of NaN and others is NaN."""
    likeliest = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return jnp.where(jnp.isfinite(jnp.max(logits, axis=-1)), likeliest, NOT_FINITE)


def extract_answer(text: str, pattern: str) -> str:
    """The group of the first match of `pattern`, without commas and a final full stop; "" if nothing matches.

    That is the harness's strict match of GSM8K. An empty pattern takes the whole text without surrounding space.

    >>> extract_answer("so 1,000 in all.\\n#### 1,000", r"#### (-?[0-9.,]+)")
    '1000'
    """
    if not pattern:
        return text.strip()
    found = re.search(pattern, text)
    return found.group(1).replace(",", "").removesuffix(".") if found else ""


class GenerationEvaluator:
    """Greedy answers compared with the right ones: `evaluator(adapter, p)` gives one verdict per item.

    Args:
      graphdef: of the adapted decoder in evaluation mode.
      base: frozen tree.
      profile: profile tree; its values are replaced by the p of each call.
      rows: dicts with prompt and answer (str).
      tokenizer: of the model.
      seam: how prompt and answer meet, see `Tokenizer.encode_pair`.
      task: says how the answer is found in a text (`answer_pattern`) and which strings end one (`stop`).
      max_length: a longer prompt loses tokens on its left.
      max_new_tokens: N.
      batch_size: the largest B; batches are cut evenly.
      pad_multiple: prompt lengths are padded to a multiple of this.
      stop: token ids that end an answer.

    Attributes:
      compiled: the jitted function (base, adapter, p, tokens, lengths) -> [B, N]; its cache size counts compilations.
      truncated: items whose prompt was cut on the left to fit.
    """

    def __init__(
        self,
        graphdef,
        base,
        profile,
        rows: Sequence[dict],
        tokenizer: Tokenizer,
        *,
        seam: str,
        task: Task,
        max_length: int,
        max_new_tokens: int,
        batch_size: int,
        pad_multiple: int,
        stop: Sequence[int],
    ):
        @jax.jit
        def decode(base, adapter, p, tokens, lengths):
            model = nnx.merge(graphdef, base, adapter, set_profile(profile, p))
            return greedy_decode(model, tokens, lengths, max_new_tokens=max_new_tokens, stop=stop)

        self.compiled = decode
        self._decode = functools.partial(decode, base)
        self._tokenizer, self._task = tokenizer, task
        self._answers = [extract_answer(row["answer"], task.answer_pattern) for row in rows]
        for number, (row, answer) in enumerate(zip(rows, self._answers, strict=True)):
            if task.answer_pattern and not answer:
                raise ValueError(
                    f"answer {row['answer']!r} of row {number} has nothing that matches {task.answer_pattern}"
                )
        prompts = [
            prompt_tokens(row, tokenizer, seam=seam, name=f"row {row.get('row', number)} to evaluate on")
            for number, row in enumerate(rows)
        ]
        self.truncated = sum(len(prompt) > max_length for prompt in prompts)
        self._batches = _prompt_batches([p[-max_length:] for p in prompts], batch_size, pad_multiple)

    def __len__(self) -> int:
        """The number of batches."""
        return len(self._batches)

    def run_batch(self, number: int, adapter, p) -> np.ndarray:
        """The greedy tokens [B, N] that answer one batch of prompts, as `greedy_decode` gives them."""
        _, tokens, lengths = self._batches[number]
        return np.asarray(self._decode(adapter, p, tokens, lengths))

    def texts(self, adapter, p) -> list[str]:
        """The greedy answer to every prompt, up to the first stop string."""
        return self._generate(adapter, p)[0]

    def _generate(self, adapter, p) -> tuple[list[str], np.ndarray]:
        """The texts, and whether all logits behind each were finite [items]."""
        texts, finite = [""] * len(self._answers), np.ones(len(self._answers), bool)
        for number, (members, _, _) in enumerate(self._batches):
            made = self.run_batch(number, adapter, p)
            for row, member in enumerate(members):
                finite[member] = not np.any(made[row] == NOT_FINITE)
                text = self._tokenizer.decode([int(t) for t in made[row] if t >= 0])
                texts[member] = min((text.partition(end)[0] for end in self._task.stop), key=len, default=text)
        return texts, finite

    def __call__(self, adapter, p) -> np.ndarray:
        """Verdicts [items] bool of an adapter under the profile p [R].

        An item with logits that are not finite is wrong, and a logged warning has the count of such items.
        """
        texts, finite = self._generate(adapter, p)
        warn_of_not_finite(finite)
        found = [extract_answer(text, self._task.answer_pattern) for text in texts]
        return np.asarray([text == answer for text, answer in zip(found, self._answers, strict=True)], bool) & finite


def _prompt_batches(prompts, batch_size: int, pad_multiple: int):
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    batches = []
    batch_size = even_batch_size(len(order), batch_size)
    for start in range(0, len(order), batch_size):
        members = order[start : start + batch_size]
        longest = max(len(prompts[i]) for i in members)
        tokens = np.zeros((batch_size, -(-longest // pad_multiple) * pad_multiple), np.int32)
        lengths = np.ones((batch_size,), np.int32)
        for row, member in enumerate(members):
            tokens[row, : len(prompts[member])] = prompts[member]
            lengths[row] = len(prompts[member])
        batches.append((members, tokens, lengths))
    return batches
