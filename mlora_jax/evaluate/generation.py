"""Generation with a static KV cache, for any adapter under any profile, in two executables per batch shape."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

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

LENGTHS = 16  # see `few_lengths`: a length is two executables, and most of their time may be their compilation
PREFILLED = 1024  # tokens at least that a CPU prefills at a time, if a batch has as many
STEPS = 16  # of decoding at most before the host looks for stop strings
SHARDS = "shards"  # the name of the axis over parts of the rows


class PromptBatch(NamedTuple):
    """Prompts of similar length as arrays of a fixed shape.

    Attributes:
      members: n <= B, which prompts the first rows are; the rows after them are padding.
      tokens: [B, T] int32, right-padded.
      lengths: [B] int32; 1 in padding.
    """

    members: list[int]
    tokens: np.ndarray
    lengths: np.ndarray


class PromptRows(NamedTuple):
    """What every row of a batch goes by: all [B] int32."""

    lengths: jax.Array  # of the prompt
    limits: jax.Array  # tokens to make at most; 0 in padding
    numbers: jax.Array  # of the request, for draws


class _State(NamedTuple):
    """Between two steps."""

    cache: Any  # holds the prompt and all but the newest token
    newest: jax.Array  # [B] int32
    made: jax.Array  # int32 scalar, tokens made by the rows that are not done
    done: jax.Array  # [B] bool
    tokens: jax.Array | None = None  # [B, S] int32 of `Texts`, where the checkpoint's settings look at them


# On a mesh all but `made` has the mesh's parts of the rows in front: [S, B / S].
_STATE_AXES = _State(0, 0, None, 0, 0)


class Generator:
    """Answers prompts: `generator.generate(adapter, prompts, p, max_new_tokens=64)` gives their tokens.

    Prompts are sorted by length and run in batches. A batch is prefilled by one compiled function and decoded by
    another, in a KV cache of a fixed number of slots, until every row has stopped. Both compile once per shape of a
    batch, whatever the number of adapters and ranks: a profile is data.

    Args:
      graphdef: of the adapted decoder in evaluation mode.
      base: frozen tree.
      profile: profile tree; its values are replaced by the p of each call.
      max_length: of prompt and answer together, in tokens: the model's context. An answer ends where it is full.
      batch_size: the largest B; batches are cut evenly.
      pad_multiple: the lengths of prompts and answers that there are slots for are multiples of this.
      eos: token ids that end an answer and are left out of it.
      ends: every id that ends a text, which rules such as a least length hide; None: those of `eos`.
      settings: of the checkpoint, which change what the next token is; None: they change nothing. What cannot be
        applied of them is refused with the first answer, or a warning names it.
      mesh: None for one device. On a mesh the rows of a batch lie along all axes but `tensor`.

    Attributes:
      settings: of the checkpoint.
      prefill, decode: the jitted functions; their cache sizes count compilations.
    """

    def __init__(
        self,
        graphdef,
        base,
        profile,
        *,
        max_length: int,
        batch_size: int,
        pad_multiple: int,
        eos: Sequence[int],
        ends: Sequence[int] | None = None,
        settings: GenerationSettings | None = None,
        mesh: Mesh | None = None,
    ):
        text_ends = np.asarray(sorted(set(eos if ends is None else ends)), np.int32)
        ends = np.asarray(sorted(set(eos)), np.int32)
        rules = make_rules(settings)

        def choose(model, hidden, rows: PromptRows, sampling, made, done, tokens):
            """The next token [B] of hidden states [B, D], that token or -1 where the row is over, who is done."""
            logits = chosen_from = model.head(hidden)
            if rules is not None:
                chosen_from = rules(logits, Texts(tokens, rows.lengths, made, rows.limits, text_ends))
            newest = next_tokens(chosen_from, sampling, rows.numbers, made)
            if rules is not None:  # a rule may hide a logit that is not finite
                newest = jnp.where(jnp.isfinite(jnp.max(logits, axis=-1)), newest, NOT_FINITE)
            over = done | jnp.any(newest[:, None] == ends, axis=-1)
            shown = jnp.where(over, -1, newest)
            return newest, shown, over | (newest == NOT_FINITE) | (made + 1 >= rows.limits)

        def extended(tokens, rows, newest, made):
            """The rows of tokens with the newest, if there are any."""
            if tokens is None:
                return None
            return tokens.at[jnp.arange(len(tokens)), rows.lengths + made].set(jnp.maximum(newest, 0), mode="drop")

        def prefill(slots, per_example, base, adapter, p, tokens, rows, sampling):
            values = set_profile(profile, p, per_example=per_example)
            model = fold_where_cheaper(nnx.merge(graphdef, base, adapter, values))
            hidden, cache = model.prefill(tokens, slots)
            last = jnp.take_along_axis(hidden, (rows.lengths - 1)[:, None, None], axis=1)[:, 0]  # [B, D]
            made = jnp.zeros((), jnp.int32)
            texts = None if rules is None else begin_texts(tokens, rows.lengths, slots)
            newest, shown, done = choose(model, last, rows, sampling, made, rows.limits < 1, texts)
            return _State(cache, newest, made + 1, done, extended(texts, rows, newest, made)), shown

        def decode(per_example, base, adapter, p, state, rows, sampling):
            model = nnx.merge(graphdef, base, adapter, set_profile(profile, p, per_example=per_example))
            layers = model.single_layers()  # outside the loop, which would slice every weight at every step

            def going(carry):
                step, state, _ = carry
                left = ~jnp.all(state.done)
                # All parts of the rows go on together: they may have to talk within a layer.
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
        if mesh is not None:
            prefill, decode = (functools.partial(self._on_mesh, function) for function in (prefill, decode))
        self.prefill = jax.jit(prefill, static_argnums=(0, 1))
        self.decode = jax.jit(decode, static_argnums=0, donate_argnums=4)
        self._base = base
        self._max_length, self._batch_size, self._pad_multiple = max_length, batch_size, pad_multiple
        self.settings = settings or GenerationSettings()

    def _on_mesh(self, function, *arguments):
        """`prefill` or `decode` over parts of the rows; what the host looks at is the same on every device."""
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
        done, shown = jax.lax.with_sharding_constraint((state.done, shown), replicated(self._mesh))
        return state._replace(done=done), shown

    @property
    def compilations(self) -> int:
        """Executables so far: of prefill and of decode, each one per shape of a batch."""
        return self.prefill._cache_size() + self.decode._cache_size()

    def generate(
        self,
        adapter,
        prompts: Sequence[Sequence[int]],
        p,
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        stop: Callable[[list[int]], bool] | None = None,
        numbers: Sequence[int] | None = None,
    ) -> list[list[int]]:
        """The tokens that answer each prompt, without the one that ended it.

        Args:
          adapter: tree of factors.
          prompts: token ids, at least one and fewer than `max_length` each.
          p: [R] for all prompts; [len(prompts), R] for a rank of its own each, which may mix in a batch; or a mapping
            that `set_profile` takes, for all prompts.
          max_new_tokens: N, tokens of an answer at most.
          temperature: 0 takes the likeliest token.
          top_p: see `Sampling`.
          seed: of the draws.
          stop: whether an answer so far ends. It is asked once for several tokens, so it has to stay true where it is
            true, as "this string is in the text" does. An answer is cut after the first token that makes it true.
          numbers: of the prompts, below 2 ** 31: what draws depend on besides the seed. None numbers them from 0.

        Returns:
          One list per prompt. An answer ends before logits that are not finite, and a logged warning counts those.

        Raises:
          ValueError: a prompt without tokens or without room for one more, a p of another shape, options outside
            their range, or settings of the checkpoint that cannot be applied.
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
        max_new_tokens = min(max_new_tokens, self._max_length)  # arrays are made of this length
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

    def place(self, adapter):
        """An adapter where the mesh wants it, for many calls of `answer`."""
        return put_weights(adapter, self._mesh)

    def batches(self, prompts: Sequence[Sequence[int]]) -> list[PromptBatch]:
        """Sorts prompts by length into batches of one size, each padded to one of few multiples of `pad_multiple`.

        Raises:
          ValueError: a prompt without tokens, or without room for one more in `max_length`.
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
        adapter,
        batch: PromptBatch,
        p,
        *,
        max_new_tokens: int,
        per_example: bool = False,
        sampling: Sampling | None = None,
        stop: Callable[[list[int]], bool] | None = None,
        numbers: Sequence[int] | None = None,
    ) -> np.ndarray:
        """Answers one of the `batches`.

        Args:
          adapter: tree of factors.
          batch: of prompts.
          p: as `set_profile` takes it, with `per_example` for the B rows of the batch.
          max_new_tokens: N.
          per_example: whether the axes of p before R are those of the batch.
          sampling: None for the likeliest tokens.
          stop: as in `generate`.
          numbers: [B], of the requests; None are the batch's rows.

        Returns:
          [B, N] int32; -1 from the token on that ended a row, and after the last. Where a row's logits are not finite
          it has `NOT_FINITE` and then -1.
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

    def _prefill(self, slots: int, adapter, p, per_example: bool, tokens: np.ndarray, rows: PromptRows, sampling):
        """A batch's state and first tokens [B]: on a CPU by parts, which stay in its cache from layer to layer."""
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
    """Logs a warning that was not logged before."""
    logger.warning("%s", message)


def _cut(row: np.ndarray, start: int, stop: Callable[[list[int]], bool]) -> bool:
    """Whether a row [N] stops; its tokens from `start` on are new, and those after the one that stops it become -1."""
    tokens = row[row >= 0].tolist()
    if len(tokens) <= start or not stop(tokens):
        return False
    kept = next(kept for kept in range(start + 1, len(tokens) + 1) if stop(tokens[:kept]))
    row[kept:] = -1
    return True
