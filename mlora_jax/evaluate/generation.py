"""Generates text with a static KV cache, for any adapter under any profile, in two executables per batch shape."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from mlora_jax.adapters import fold_where_cheaper, set_profile
from mlora_jax.evaluate.logit_rules import Texts, begin_texts, make_rules
from mlora_jax.evaluate.sampling import NOT_FINITE, Sampling, make_sampling, next_tokens
from mlora_jax.evaluate.shapes import even_batch_size, few_lengths
from mlora_jax.models.generation_config import GenerationSettings
from mlora_jax.parallel.arrays import put_replicated, put_rows, put_weights, split_rows
from mlora_jax.parallel.mesh import EVALUATED, shards_of
from mlora_jax.parallel.rules import replicated

logger = logging.getLogger(__name__)

LENGTHS = 16  # the `share` of `few_lengths`: a length costs two executables, which may compile longer than they run
PREFILLED = 1024  # a CPU prefills at least this many tokens at a time, if the batch has as many
STEPS = 16  # the host looks for stop strings after at most this many steps of decoding
SHARDS = "shards"  # the name of the axis over parts of the rows


class PromptBatch(NamedTuple):
    """Prompts of similar length as arrays of a fixed shape.

    Attributes:
      members: the indices of the prompts in the first n <= B rows; the rows after them are padding.
      tokens: [B, T] int32, right-padded.
      lengths: [B] int32, the number of tokens of each prompt; 1 in padding rows.
    """

    members: list[int]
    tokens: np.ndarray
    lengths: np.ndarray


class PromptRows(NamedTuple):
    """The data that each row of a batch needs besides its tokens.

    Attributes:
      lengths: [B] int32, the number of tokens of the prompt.
      limits: [B] int32, the largest number of tokens to generate; 0 in padding rows.
      numbers: [B] int32, the number of the request, on which draws depend.
    """

    lengths: jax.Array
    limits: jax.Array
    numbers: jax.Array


class _State(NamedTuple):
    """The state of a batch between two steps of decoding.

    Attributes:
      cache: the KV cache, which holds the prompt and all tokens except the newest.
      newest: [B] int32, the newest token of each row.
      made: int32 scalar, the number of tokens that the rows that are not done have generated.
      done: [B] bool, whether the row has ended.
      tokens: [B, S] int32, as in `Texts`; None if the checkpoint's settings do not need them.
    """

    cache: Any
    newest: jax.Array
    made: jax.Array
    done: jax.Array
    tokens: jax.Array | None = None


# On a mesh, every field but `made` has a leading axis over the parts of the rows: [S, B / S]. These are axes for vmap,
# not arrays, hence `_make`.
_STATE_AXES = _State._make((0, 0, None, 0, 0))


class Generator:
    """Answers prompts: `generator.generate(adapter, prompts, p, max_new_tokens=64)` returns the tokens of the answers.

    Prompts are sorted by length and run in batches. One compiled function prefills a batch and another one decodes it,
    in a KV cache with a fixed number of slots, until every row has stopped. Both compile once per shape of a batch,
    for any number of adapters and ranks: a profile is data.

    Args:
      graphdef: the graph definition of the adapted decoder in evaluation mode.
      base: the frozen tree.
      profile: the profile tree; its values are replaced by the p of each call.
      max_length: the model's context, in tokens: the largest length of prompt and answer together. An answer ends
        when the context is full.
      batch_size: the largest B; the prompts are divided evenly among the batches.
      pad_multiple: the cache has slots for prompts and answers whose lengths are multiples of this.
      eos: the token ids that end an answer and are not part of it.
      ends: all token ids that end a text, which rules such as a least length exclude; None stands for those of `eos`.
      settings: the checkpoint's generation settings, which may change the next token; None changes nothing. With the
        first answer, settings that cannot be applied raise an error or log a warning.
      mesh: None for one device. On a mesh, the rows of a batch are sharded over all axes except `tensor`.

    Attributes:
      settings: the checkpoint's generation settings.
      prefill, decode: the jitted functions; their cache sizes count compilations.
    """

    def __init__(
        self,
        graphdef: Any,
        base: Any,
        profile: Any,
        *,
        max_length: int,
        batch_size: int,
        pad_multiple: int,
        eos: Sequence[int],
        ends: Sequence[int] | None = None,
        settings: GenerationSettings | None = None,
        mesh: Mesh | None = None,
    ) -> None:
        text_ends = np.asarray(sorted(set(eos if ends is None else ends)), np.int32)
        answer_ends = np.asarray(sorted(set(eos)), np.int32)
        rules = make_rules(settings)

        def choose(model, hidden, rows: PromptRows, sampling, made, done, tokens):
            """From hidden states [B, D]: the next token [B], that token or -1 if the row has ended, who is done."""
            logits = chosen_from = model.head(hidden)
            if rules is not None:
                chosen_from = rules(logits, Texts(tokens, rows.lengths, made, rows.limits, text_ends))
            newest = next_tokens(chosen_from, sampling, rows.numbers, made)
            if rules is not None:  # a rule may hide a logit that is not finite
                newest = jnp.where(jnp.isfinite(jnp.max(logits, axis=-1)), newest, NOT_FINITE)
            over = done | jnp.any(newest[:, None] == answer_ends[None], axis=-1)
            shown = jnp.where(over, -1, newest)
            return newest, shown, over | (newest == NOT_FINITE) | (made + 1 >= rows.limits)

        def extended(tokens, rows, newest, made):
            """The rows of tokens with the newest token appended; None if there are no rows."""
            if tokens is None:
                return None
            return tokens.at[jnp.arange(len(tokens)), rows.lengths + made].set(jnp.maximum(newest, 0), mode="drop")

        def prefill(slots, per_example, base, adapter, p, tokens, rows, sampling):
            values = set_profile(profile, p, per_example=per_example)
            model = cast("Any", fold_where_cheaper(nnx.merge(graphdef, base, adapter, values)))
            hidden, cache = model.prefill(tokens, slots)
            last = jnp.take_along_axis(hidden, (rows.lengths - 1)[:, None, None], axis=1)[:, 0]  # [B, D]
            made = jnp.zeros((), jnp.int32)
            texts = None if rules is None else begin_texts(tokens, rows.lengths, slots)
            newest, shown, done = choose(model, last, rows, sampling, made, rows.limits < 1, texts)
            return _State(cache, newest, made + 1, done, extended(texts, rows, newest, made)), shown

        def decode(per_example, base, adapter, p, state, rows, sampling):
            model = nnx.merge(graphdef, base, adapter, set_profile(profile, p, per_example=per_example))
            layers = model.single_layers()  # outside the loop, which would otherwise slice every weight at every step

            def going(carry):
                step, state, _ = carry
                left = ~jnp.all(state.done)
                # All parts of the rows continue together, because they may communicate within a layer.
                left = left if mesh is None else jax.lax.pmax(left.astype(jnp.int32), SHARDS) > 0
                return (step < STEPS) & left

            def advance(carry):
                step, state, shown = carry
                cache, newest, made, done, texts = state
                positions = (rows.lengths + made - 1)[:, None]
                tokens = jnp.maximum(newest, 0)[:, None]
                hidden, cache = model.hidden(tokens, positions=positions, cache=cache, layers=layers)
                newest, new, done = choose(model, hidden[:, 0], rows, sampling, made, done, texts)
                texts = extended(texts, rows, newest, made)
                return step + 1, _State(cache, newest, made + 1, done, texts), shown.at[:, step].set(new)

            shown = jnp.full((len(state.done), STEPS), -1, jnp.int32)
            _, state, shown = jax.lax.while_loop(going, advance, (jnp.zeros((), jnp.int32), state, shown))
            return state, shown

        self._mesh, self._shards = mesh, shards_of(mesh, EVALUATED)
        # Any, because the type of a jitted function in jax lacks `_cache_size`.
        self.prefill: Any = jax.jit(self._placed(prefill), static_argnums=(0, 1))
        self.decode: Any = jax.jit(self._placed(decode), static_argnums=0, donate_argnums=4)
        self._base = base
        self._max_length, self._batch_size, self._pad_multiple = max_length, batch_size, pad_multiple
        self.settings = settings or GenerationSettings()

    def _placed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`prefill` or `decode` for the mesh; without a mesh, the function itself."""
        return function if self._mesh is None else functools.partial(self._on_mesh, self._mesh, function)

    def _on_mesh(self, mesh: Mesh, function: Callable[..., Any], *arguments: Any) -> tuple[_State, jax.Array]:
        """Runs `prefill` or `decode` on parts of the rows; the outputs for the host are the same on every device."""
        *static, per_example, base, adapter, p, what, rows, sampling = arguments
        parts = functools.partial(split_rows, axis=0, shards=self._shards)
        p = parts(p) if per_example else p
        decodes = isinstance(what, _State)
        mapped = jax.vmap(
            functools.partial(function, *static, per_example),
            in_axes=(None, None, 0 if per_example else None, _STATE_AXES if decodes else 0, 0, None),
            out_axes=(_STATE_AXES, 0),
            axis_name=SHARDS,
            spmd_axis_name=EVALUATED,
        )
        state, shown = mapped(base, adapter, p, what if decodes else parts(what), jax.tree.map(parts, rows), sampling)
        done, shown = jax.lax.with_sharding_constraint((state.done, shown), replicated(mesh))
        return state._replace(done=done), shown

    @property
    def compilations(self) -> int:
        """The number of executables that have been compiled so far: two per shape of a batch."""
        return self.prefill._cache_size() + self.decode._cache_size()

    def generate(
        self,
        adapter: Any,
        prompts: Sequence[Sequence[int]],
        p: Any,
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        stop: Callable[[list[int]], bool] | None = None,
        numbers: Sequence[int] | None = None,
    ) -> list[list[int]]:
        """The tokens that answer each prompt, without the token that ended the answer.

        Args:
          adapter: the tree of factors.
          prompts: the token ids of each prompt, at least one and fewer than `max_length`.
          p: the profile [R] for all prompts; [len(prompts), R] for one profile per prompt, which may differ within a
            batch; or a mapping that `set_profile` takes, for all prompts.
          max_new_tokens: N, the largest number of tokens of an answer.
          temperature: the temperature of the draws; 0 takes the likeliest token.
          top_p: the probability of the nucleus, see `Sampling`.
          seed: the seed of the draws.
          stop: a function of an answer's tokens so far that says whether the answer ends. It is called only once every
            few tokens, so once true it must stay true, as "this string is in the text" does. An answer is cut after
            the first token that makes it true.
          numbers: the numbers of the prompts, below 2 ** 31; a draw depends on the seed and on this number. None
            numbers the prompts from 0.

        Returns:
          One list per prompt. An answer ends before logits that are not finite; a logged warning counts such answers.

        Raises:
          ValueError: a prompt has no tokens or leaves no room for an answer, p has another shape, an option is outside
            its range, or a setting of the checkpoint cannot be applied.
        """
        if isinstance(p, Mapping):
            each = None
        else:
            p = np.asarray(p)
            each = p if p.ndim == 2 else None
            if p.ndim not in (1, 2) or (each is not None and len(each) != len(prompts)):
                raise ValueError(
                    f"p must have shape [R], or [{len(prompts)}, R] for {len(prompts)} prompts, got {list(p.shape)}"
                )
        sampling = make_sampling(temperature, top_p, seed)
        max_new_tokens = min(max_new_tokens, self._max_length)  # bounds the length of arrays
        numbers = range(len(prompts)) if numbers is None else numbers
        answers: list[list[int]] = [[] for _ in prompts]
        adapter, broken = self.place(adapter), 0
        for batch in self.batches(prompts):
            picked = [*batch.members, *batch.members[:1] * (len(batch.tokens) - len(batch.members))]
            made = self.answer(
                adapter,
                batch,
                p if each is None else each[picked],
                per_example=each is not None,
                max_new_tokens=max_new_tokens,
                sampling=sampling,
                stop=stop,
                numbers=[numbers[member] for member in picked],
            )
            for member, row in zip(batch.members, made, strict=False):
                broken += int(np.any(row == NOT_FINITE))
                answers[member] = row[row >= 0].tolist()
        if broken:
            logger.warning(
                "%d of %d answers end early: the model's logits for them are not finite", broken, len(prompts)
            )
        return answers

    def place(self, adapter: Any) -> Any:
        """Puts an adapter where the mesh needs it, once for many calls of `answer`."""
        return put_weights(adapter, self._mesh)

    def batches(self, prompts: Sequence[Sequence[int]]) -> list[PromptBatch]:
        """Sorts prompts by length into batches of one size, each padded to one of few multiples of `pad_multiple`.

        Raises:
          ValueError: a prompt has no tokens, or fills `max_length`.
        """
        for number, prompt in enumerate(prompts):
            if not 0 < len(prompt) < self._max_length:
                raise ValueError(
                    f"prompt {number} has {len(prompt)} tokens: it must have at least one, and fewer than the "
                    f"{self._max_length} that prompt and answer may have together"
                )
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        size = even_batch_size(len(order), self._batch_size)
        size = -(-size // self._shards) * self._shards
        parts = [order[start : start + size] for start in range(0, len(order), size)]
        padded = few_lengths([len(prompts[members[-1]]) for members in parts], self._pad_multiple, LENGTHS)
        batches = []
        for members, length in zip(parts, padded, strict=True):
            tokens = np.zeros((size, length), np.int32)
            lengths = np.ones((size,), np.int32)
            for row, member in enumerate(members):
                tokens[row, : len(prompts[member])] = prompts[member]
                lengths[row] = len(prompts[member])
            batches.append(PromptBatch(members, tokens, lengths))
        return batches

    def answer(
        self,
        adapter: Any,
        batch: PromptBatch,
        p: Any,
        *,
        max_new_tokens: int,
        per_example: bool = False,
        sampling: Sampling | None = None,
        stop: Callable[[list[int]], bool] | None = None,
        numbers: Sequence[int] | None = None,
    ) -> np.ndarray:
        """Answers one of the `batches`.

        Args:
          adapter: the tree of factors.
          batch: one batch of prompts.
          p: the profile, in a form that `set_profile` takes; with `per_example`, one profile for each of the B rows.
          max_new_tokens: N, the largest number of tokens of an answer.
          per_example: whether p has the axis of the batch before R.
          sampling: how tokens are drawn; None takes the likeliest tokens.
          stop: a function that says whether an answer ends, as in `generate`.
          numbers: [B], the numbers of the requests; None stands for the indices of the rows.

        Returns:
          [B, N] int32. A row is -1 from the token that ended it, and after its last token. A row whose logits are not
          finite has `NOT_FINITE` there and then -1.

        Raises:
          ValueError: `max_new_tokens` is below 1, or a setting of the checkpoint cannot be applied.
        """
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        self.settings.check()
        for sentence in self.settings.warnings:
            warn_once(f"{self.settings.file}: {sentence}")
        if sampling is not None and self.settings.sampling:
            warn_once(f"{self.settings.file}: draws do not apply {', '.join(self.settings.sampling)}: ask for it")
        size, length = batch.tokens.shape
        limits = np.minimum(max_new_tokens, self._max_length - batch.lengths)
        limits[len(batch.members) :] = 0
        numbers = range(size) if numbers is None else numbers
        rows = PromptRows(*(jnp.asarray(np.asarray(x), jnp.int32) for x in (batch.lengths, limits, numbers)))
        slots = max(length, min(length + self._padded(max_new_tokens), self._padded(self._max_length)))
        adapter, p = self.place(adapter), put_replicated(p, self._mesh)
        rows, sampling = put_replicated((rows, sampling), self._mesh)
        state, shown = self._prefill(slots, adapter, p, per_example, batch.tokens, rows, sampling)
        made = np.full((size, max_new_tokens), -1, np.int32)
        made[:, 0], start, at = np.asarray(shown).reshape(-1), 0, 1
        going = limits > 0
        while True:
            ended = np.array(state.done).reshape(-1)
            if stop is not None:
                for row in np.flatnonzero(going):
                    ended[row] |= _cut(made[row], start, stop)
            going = ~ended
            if not going.any():
                return made
            done = put_replicated(jnp.asarray(ended.reshape(state.done.shape)), self._mesh)
            state, shown = self.decode(per_example, self._base, adapter, p, state._replace(done=done), rows, sampling)
            start, at = at, min(at + STEPS, max_new_tokens)
            made[:, start:at] = np.asarray(shown).reshape(size, -1)[:, : at - start]

    def _prefill(
        self,
        slots: int,
        adapter: Any,
        p: Any,
        per_example: bool,
        tokens: np.ndarray,
        rows: PromptRows,
        sampling: Sampling | None,
    ) -> tuple[_State, jax.Array]:
        """The state and the first tokens [B] of a batch.

        A CPU prefills the batch in parts that are small enough to stay in its cache from layer to layer.
        """
        size, length = tokens.shape
        if self._mesh is not None:
            tokens = put_rows(tokens, self._mesh, 0, over=EVALUATED)
            return self.prefill(slots, per_example, self._base, adapter, p, tokens, rows, sampling)
        part = -(-PREFILLED // length) if jax.default_backend() == "cpu" else size
        part = next(part for part in range(min(part, size), 0, -1) if size % part == 0)
        made = []
        for start in range(0, size, part):
            own = slice(start, start + part)
            some, values = jax.tree.map(lambda x, own=own: x[own], rows), p[own] if per_example else p
            tokens_of = jnp.asarray(tokens[own])
            made.append(self.prefill(slots, per_example, self._base, adapter, values, tokens_of, some, sampling))
        if len(made) == 1:
            return made[0]
        return jax.tree.map(lambda *parts: jnp.concatenate(parts) if parts[0].ndim else parts[0], *made)

    def _padded(self, length: int) -> int:
        return -(-length // self._pad_multiple) * self._pad_multiple


@functools.cache
def warn_once(message: str) -> None:
    """Logs a warning, unless the same message was logged before."""
    logger.warning("%s", message)


def _cut(row: np.ndarray, start: int, stop: Callable[[list[int]], bool]) -> bool:
    """Whether a row [N] with new tokens from `start` on stops; sets the tokens after the one that stops it to -1."""
    tokens = row[row >= 0].tolist()
    if len(tokens) <= start or not stop(tokens):
        return False
    kept = next(kept for kept in range(start + 1, len(tokens) + 1) if stop(tokens[:kept]))
    row[kept:] = -1
    return True
