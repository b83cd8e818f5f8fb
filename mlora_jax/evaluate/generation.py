"""Generates text with a static KV cache, for any adapter under any profile, with rows that are refilled as they end."""

from __future__ import annotations

import collections
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mlora_jax.adapters import fold_where_cheaper, set_profile
from mlora_jax.evaluate.logit_rules import NO_TOKEN, Texts, make_rules
from mlora_jax.evaluate.sampling import NOT_FINITE, Sampling, make_sampling, next_tokens
from mlora_jax.evaluate.shapes import even_batch_size, few_lengths
from mlora_jax.evaluate.slots import LENGTHS, PromptGroup, Rows, common_prefixes, group_prompts
from mlora_jax.models.generation_config import GenerationSettings
from mlora_jax.parallel.arrays import put_replicated, put_rows, put_weights, split_rows
from mlora_jax.parallel.mesh import EVALUATED, shards_of
from mlora_jax.parallel.rules import replicated

logger = logging.getLogger(__name__)

PREFILLED = 1024  # a CPU prefills at least this many tokens at a time, if there are as many
REFILLED = 4  # rows are refilled when one in this many has ended, or earlier
SHARED = 2**15  # prefixes are shared where this saves the prefill of at least this many tokens
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
    """The data that each row needs besides its tokens.

    Attributes:
      lengths: [B] int32, the number of tokens of the prompt.
      limits: [B] int32, the largest number of tokens to generate; 0 in padding rows.
      numbers: [B] int32, the number of the request, on which draws depend.
    """

    lengths: jax.Array
    limits: jax.Array
    numbers: jax.Array


class State(NamedTuple):
    """The state of all rows between two steps of decoding. On a mesh, every array begins with the parts of the rows.

    Attributes:
      cache: the KV cache, which holds the prompt and all tokens except the newest.
      newest: [B] int32, the newest token of each row.
      made: [B] int32, the number of tokens that each row has generated.
      done: [B] bool, whether the row has ended.
      tokens: [B, S] int32, as in `Texts`; None if the checkpoint's settings do not need them.
    """

    cache: Any
    newest: jax.Array
    made: jax.Array
    done: jax.Array
    tokens: jax.Array | None = None


class Serving(NamedTuple):
    """How the prompts of one call are answered.

    Attributes:
      prompts: the token ids of each prompt.
      p: the profile, or the profiles [K, R] of all kinds.
      kinds: the index of each prompt's profile in p; None if p is the profile of all prompts.
      numbers: the numbers of the prompts.
      size: B, the number of rows of the cache.
      slots: S, the number of slots of the cache.
      max_new_tokens: N.
      sampling: how tokens are drawn; None takes the likeliest tokens.
      stop: a function that says whether an answer ends, or None.
    """

    prompts: Sequence[Sequence[int]]
    p: Any
    kinds: np.ndarray | None
    numbers: Sequence[int]
    size: int
    slots: int
    max_new_tokens: int
    sampling: Sampling | None
    stop: Callable[[list[int]], bool] | None


class Generator:
    """Answers prompts: `generator.generate(adapter, prompts, p, max_new_tokens=64)` returns the tokens of the answers.

    The KV cache has a fixed number of rows. One compiled function prefills a few prompts into rows of the cache, and
    another one decodes all rows. A row that has ended is refilled by a waiting prompt, under any profile, so that few
    rows decode padding. A prefill compiles once per padded length of prompts, decoding once per size of the cache, for
    any number of adapters and ranks: a profile is data.

    Args:
      graphdef: the graph definition of the adapted decoder in evaluation mode.
      base: the frozen tree.
      profile: the profile tree; its values are replaced by the p of each call.
      max_length: the model's context, in tokens: the largest length of prompt and answer together. An answer ends
        when the context is full.
      batch_size: the largest number of rows of the cache.
      pad_multiple: the cache has slots for prompts and answers whose lengths are multiples of this.
      eos: the token ids that end an answer and are not part of it.
      ends: all token ids that end a text, which rules such as a least length exclude; None stands for those of `eos`.
      settings: the checkpoint's generation settings, which may change the next token; None changes nothing. With the
        first answer, settings that cannot be applied raise an error or log a warning.
      mesh: None for one device. On a mesh, the rows of a batch are sharded over all axes except `tensor`.

    Attributes:
      settings: the checkpoint's generation settings.
      begin, share, prefill, decode: the jitted functions: an empty state, the cache of a prefix, a prefill into rows of
        the state, and at most `STEPS` steps of decoding. The cache sizes of the last three count compilations.
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

        platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
        self._on_cpu = on_cpu = platform == "cpu"

        def written(whole, part, at, axis=0):
            """The rows of an array with some of them replaced; a row beyond the array is not written."""
            return whole.at[(*(slice(None),) * axis, at)].set(part, mode="drop")

        def begin(size, slots, base, adapter):
            model = nnx.merge(graphdef, base, adapter, profile)
            none = jnp.zeros((size,), jnp.int32)
            texts = None if rules is None else jnp.full((size, slots), NO_TOKEN)
            cache = model.init_cache(size, slots, stacked=not on_cpu)
            return State(cache, none, none, jnp.ones((size,), bool), texts)

        def share(slots, base, adapter, p, tokens):
            model = fold_where_cheaper(nnx.merge(graphdef, base, adapter, set_profile(profile, p)))
            return cast("Any", model).prefill(tokens, slots, stacked=not on_cpu)[1]

        def prefill(slots, per_example, base, adapter, p, tokens, rows, texts, at, prefix, state, sampling):
            values = set_profile(profile, p, per_example=per_example)
            model = cast("Any", fold_where_cheaper(nnx.merge(graphdef, base, adapter, values)))
            if prefix is None:
                hidden, cache = model.prefill(tokens, slots, stacked=not on_cpu)
                last = rows.lengths - 1
            else:
                cache, shared = prefix
                cache = jax.tree.map(lambda x: jnp.repeat(x, len(tokens), axis=x.ndim - 4), cache)
                positions = jnp.broadcast_to(shared + jnp.arange(tokens.shape[1]), tokens.shape)
                hidden, cache = model.hidden(tokens, positions=positions, cache=cache)
                last = jnp.maximum(rows.lengths - 1 - shared, 0)
            hidden = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]  # [n, D]
            made = jnp.zeros_like(rows.lengths)
            newest, shown, done = choose(model, hidden, rows, sampling, made, rows.limits < 1, texts)
            texts = extended(texts, rows, newest, made)
            # The slots behind a prompt are written, too: what is not finite in them would reach the row's next answer.
            cache = jax.tree.map(lambda x, part: written(x, part, at, axis=x.ndim - 4), state.cache, cache)
            part = State((), newest, made + 1, done, texts)
            rest = jax.tree.map(lambda x, part: written(x, part, at), state._replace(cache=()), part)
            return rest._replace(cache=cache), shown

        def decode(per_example, base, adapter, p, state, rows, enough, sampling):
            model = nnx.merge(graphdef, base, adapter, set_profile(profile, p, per_example=per_example))
            # Outside the loop, which would otherwise slice every weight at every step.
            layers = model.single_layers() if on_cpu else None

            def going(carry):
                step, state, _ = carry
                ended = jnp.sum(state.done)
                # All parts of the rows continue together, because they may communicate within a layer.
                return (step < STEPS) & ((ended if mesh is None else jax.lax.psum(ended, SHARDS)) < enough)

            def advance(carry):
                step, state, shown = carry
                cache, newest, made, done, texts = state
                positions = (rows.lengths + made - 1)[:, None]
                tokens = jnp.maximum(newest, 0)[:, None]
                hidden, cache = model.hidden(tokens, positions=positions, cache=cache, layers=layers)
                newest, new, over = choose(model, hidden[:, 0], rows, sampling, made, done, texts)
                texts = extended(texts, rows, newest, made)
                made = jnp.where(done, made, made + 1)
                return step + 1, State(cache, newest, made, over, texts), shown.at[:, step].set(new)

            shown = jnp.full((len(state.done), STEPS), -1, jnp.int32)
            _, state, shown = jax.lax.while_loop(going, advance, (jnp.zeros((), jnp.int32), state, shown))
            return state, shown

        self._mesh, self._shards = mesh, shards_of(mesh, EVALUATED)
        # Any, because the type of a jitted function in jax lacks `_cache_size`.
        self.begin: Any = jax.jit(begin if mesh is None else functools.partial(self._begin_on_mesh, begin), static_argnums=(0, 1))
        self.share: Any = jax.jit(share, static_argnums=0)
        self.prefill: Any = jax.jit(
            prefill if mesh is None else functools.partial(self._prefill_on_mesh, prefill),
            static_argnums=(0, 1),
            donate_argnums=10,
        )
        self.decode: Any = jax.jit(
            decode if mesh is None else functools.partial(self._decode_on_mesh, decode),
            static_argnums=0,
            donate_argnums=4,
        )
        self._base = base
        self._max_length, self._batch_size, self._pad_multiple = max_length, batch_size, pad_multiple
        self.settings = settings or GenerationSettings()

    def _begin_on_mesh(self, begin: Callable[..., Any], size: int, *arguments: Any) -> State:
        state = begin(size // self._shards, *arguments)
        state = jax.tree.map(lambda x: jnp.broadcast_to(x, (self._shards, *x.shape)), state)
        return jax.lax.with_sharding_constraint(state, self.placed(state))

    def _prefill_on_mesh(self, prefill: Callable[..., Any], slots: int, per_example: bool, *arguments: Any) -> Any:
        base, adapter, p, tokens, rows, texts, at, prefix, state, sampling = arguments
        parts = functools.partial(jax.tree.map, functools.partial(split_rows, axis=0, shards=self._shards))
        return self._mapped(
            functools.partial(prefill, slots, per_example),
            (None, None, 0 if per_example else None, 0, 0, 0, 0, None, 0, None),
            *(base, adapter, parts(p) if per_example else p),
            *(parts(tokens), parts(rows), parts(texts), parts(at), prefix, state, sampling),
        )

    def _decode_on_mesh(self, decode: Callable[..., Any], per_example: bool, *arguments: Any) -> Any:
        base, adapter, p, state, rows, enough, sampling = arguments
        parts = functools.partial(jax.tree.map, functools.partial(split_rows, axis=0, shards=self._shards))
        return self._mapped(
            functools.partial(decode, per_example),
            (None, None, 0 if per_example else None, 0, 0, None, None),
            *(base, adapter, parts(p) if per_example else p, state, parts(rows), enough, sampling),
        )

    def _mapped(self, function: Callable[..., Any], axes: tuple, *arguments: Any) -> tuple[State, jax.Array]:
        """Runs a function on the parts of the rows; what the host reads is the same on every device."""
        mapped = jax.vmap(function, in_axes=axes, out_axes=(0, 0), axis_name=SHARDS, spmd_axis_name=EVALUATED)
        state, shown = mapped(*arguments)
        state = jax.lax.with_sharding_constraint(state, self.placed(state))
        return state, jax.lax.with_sharding_constraint(shown, replicated(cast("Mesh", self._mesh)))

    def placed(self, state: State) -> State:
        """The shardings of a state on the mesh: rows over `EVALUATED`, heads over `tensor`, `done` on every device.

        Args:
          state: a state whose arrays, or their shapes, begin with the parts of the rows.
        """
        mesh = cast("Mesh", self._mesh)
        rows = lambda x: NamedSharding(mesh, PartitionSpec(EVALUATED, *(None,) * (x.ndim - 1)))  # noqa: E731

        def heads(x):
            over = "tensor" if x.shape[-3] % mesh.shape["tensor"] == 0 else None
            return NamedSharding(mesh, PartitionSpec(EVALUATED, *(None,) * (x.ndim - 4), over, None, None))

        others = jax.tree.map(rows, state._replace(cache=()))
        return others._replace(cache=jax.tree.map(heads, state.cache), done=replicated(mesh))

    @property
    def compilations(self) -> int:
        """The number of executables that have been compiled so far, without those that only make empty arrays."""
        return sum(function._cache_size() for function in (self.share, self.prefill, self.decode))

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
            kinds = None
        else:
            p = np.asarray(p)
            if p.ndim not in (1, 2) or (p.ndim == 2 and len(p) != len(prompts)):
                raise ValueError(
                    f"p must have shape [R], or [{len(prompts)}, R] for {len(prompts)} prompts, got {list(p.shape)}"
                )
            p, kinds = np.unique(p, axis=0, return_inverse=True) if p.ndim == 2 and len(p) else (p, None)
            if kinds is not None and len(p) == 1:
                p, kinds = p[0], None
        sampling = make_sampling(temperature, top_p, seed)
        self._check(max_new_tokens, sampling)
        self._check_prompts(prompts)
        if not prompts:
            return []
        max_new_tokens = min(max_new_tokens, self._max_length)  # bounds the length of arrays
        longest = self._padded(max(len(prompt) for prompt in prompts))
        size = -(-even_batch_size(len(prompts), self._batch_size) // self._shards) * self._shards
        made = self._serve(
            adapter,
            Serving(
                prompts,
                p,
                kinds,
                range(len(prompts)) if numbers is None else numbers,
                size,
                self._slots(longest, max_new_tokens),
                max_new_tokens,
                sampling,
                stop,
            ),
        )
        if broken := sum(bool(np.any(answer == NOT_FINITE)) for answer in made):
            logger.warning(
                "%d of %d answers end early: the model's logits for them are not finite", broken, len(prompts)
            )
        return [answer[answer >= 0].tolist() for answer in made]

    def place(self, adapter: Any) -> Any:
        """Puts an adapter where the mesh needs it, once for many calls of `answer`."""
        return put_weights(adapter, self._mesh)

    def batches(self, prompts: Sequence[Sequence[int]]) -> list[PromptBatch]:
        """Sorts prompts by length into batches of one size, each padded to one of few multiples of `pad_multiple`.

        Raises:
          ValueError: a prompt has no tokens, or fills `max_length`.
        """
        self._check_prompts(prompts)
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
        self._check(max_new_tokens, sampling)
        size, length = batch.tokens.shape
        count = len(batch.members)
        prompts = [row[:own].tolist() for row, own in zip(batch.tokens, batch.lengths, strict=True)][:count]
        kinds = None
        if per_example:
            p, kinds = np.unique(np.asarray(p)[:count], axis=0, return_inverse=True)
        numbers = range(size) if numbers is None else numbers
        slots = self._slots(length, max_new_tokens)
        answers = self._serve(
            adapter, Serving(prompts, p, kinds, numbers, size, slots, max_new_tokens, sampling, stop), length
        )
        made = np.full((size, max_new_tokens), -1, np.int32)
        for row, answer in zip(made, answers, strict=False):
            row[: len(answer)] = answer
        return made

    def _check(self, max_new_tokens: int, sampling: Sampling | None) -> None:
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        self.settings.check()
        for sentence in self.settings.warnings:
            warn_once(f"{self.settings.file}: {sentence}")
        if sampling is not None and self.settings.sampling:
            warn_once(f"{self.settings.file}: draws do not apply {', '.join(self.settings.sampling)}: ask for it")

    def _check_prompts(self, prompts: Sequence[Sequence[int]]) -> None:
        for number, prompt in enumerate(prompts):
            if not 0 < len(prompt) < self._max_length:
                raise ValueError(
                    f"prompt {number} has {len(prompt)} tokens: it must have at least one, and fewer than the "
                    f"{self._max_length} that prompt and answer may have together"
                )

    def _serve(self, adapter: Any, asked: Serving, length: int | None = None) -> list[np.ndarray]:
        """The tokens of each answer; `NOT_FINITE` comes last where the logits were not finite.

        Args:
          adapter: the tree of factors.
          asked: what is asked.
          length: T, the padded length of all prompts; None: as few prompts as possible are padded much.
        """
        adapter = self.place(adapter)
        put = functools.partial(put_replicated, mesh=self._mesh)
        groups, prefixes = self._groups(adapter, asked, length)
        queue = collections.deque(groups)
        rows = Rows(asked.size, self._shards, asked.max_new_tokens)
        owned = np.zeros((asked.size,), np.int32)  # the kind of each row's profile
        answers: list[Any] = [None] * len(asked.prompts)
        sampling = put(asked.sampling)
        alike = None if asked.kinds is not None else put(asked.p)
        state = self.begin(asked.size, asked.slots, self._base, adapter)

        def take(row: int, new: np.ndarray, done: bool) -> None:
            if rows.extend(row, new, asked.stop) or done:
                member, answer = rows.finish(row)
                answers[member] = answer

        while queue or not rows.ended.all():
            while queue and rows.ended.sum() >= len(queue[0].members):
                group = queue.popleft()
                members, at = rows.assign(group)
                if left := [member for member in group.members if member not in members]:
                    queue.appendleft(group._replace(members=left))
                filled = [(position, member) for position, member in enumerate(members) if member >= 0]
                for position, member in filled:
                    row = rows.row(position, group, at)
                    rows.lengths[row] = len(asked.prompts[member])
                    rows.limits[row] = min(asked.max_new_tokens, self._max_length - rows.lengths[row])
                    rows.numbers[row] = asked.numbers[member]
                    owned[row] = 0 if asked.kinds is None else asked.kinds[member]
                state, shown = self._prefill(adapter, asked, group, members, at, prefixes.get(group.kind), state, sampling)
                shown, done = np.asarray(shown).reshape(-1), np.asarray(state.done).reshape(-1)
                for position, _ in filled:
                    row = rows.row(position, group, at)
                    take(row, shown[position : position + 1], bool(done[row]))
            if rows.ended.all():
                continue
            done = put(jnp.asarray(rows.ended.reshape(state.done.shape)))
            enough = len(queue[0].members) if queue else asked.size
            data = put((*self._rows(rows.lengths, rows.limits, rows.numbers), jnp.asarray(enough, jnp.int32)))
            state, shown = self.decode(
                asked.kinds is not None,
                self._base,
                adapter,
                alike if asked.kinds is None else put(jnp.asarray(asked.p[owned])),
                state._replace(done=done),
                PromptRows(*data[:3]),
                data[3],
                sampling,
            )
            shown, done = np.asarray(shown).reshape(asked.size, -1), np.asarray(state.done).reshape(-1)
            for row in np.flatnonzero(~rows.ended):
                take(row, shown[row], bool(done[row]))
        return answers

    def _groups(
        self, adapter: Any, asked: Serving, length: int | None
    ) -> tuple[list[PromptGroup], dict[int, tuple[Any, jax.Array]]]:
        """The groups of prompts, and for each kind that has a shared prefix: the cache of it and its length."""
        count, once = len(asked.prompts), len(asked.prompts) <= asked.size
        kinds = np.zeros(count, int) if asked.kinds is None else asked.kinds
        shared = [0] * count
        if self._mesh is None and not isinstance(asked.p, Mapping):
            shared = common_prefixes(asked.prompts, kinds.tolist(), SHARED)
        # On a CPU, prompts of one profile are prefilled together, because their kernels are folded.
        apart = any(shared) or asked.kinds is None or (self._on_cpu and not once)

        def rows(padded: int) -> int:
            most = asked.size if once else max(1, asked.size // REFILLED)
            if self._on_cpu and self._mesh is None:
                most = min(most, -(-PREFILLED // padded))
                return next(rows for rows in range(most, 0, -1) if asked.size % rows == 0)
            return -(-most // self._shards) * self._shards

        groups = group_prompts(
            [len(prompt) for prompt in asked.prompts],
            kinds.tolist() if apart else [-1] * count,
            shared,
            rows=rows,
            multiple=self._pad_multiple,
            together=once,
        )
        if length is not None:
            groups = [group._replace(length=length) for group in groups]
        prefixes = {}
        for group in groups:
            if group.shared and group.kind not in prefixes:
                tokens = np.zeros((1, self._padded(group.shared)), np.int32)
                tokens[0, : group.shared] = asked.prompts[group.members[0]][: group.shared]
                p = asked.p if asked.kinds is None else asked.p[group.kind]
                cache = self.share(asked.slots, self._base, adapter, jnp.asarray(p), jnp.asarray(tokens))
                prefixes[group.kind] = cache, jnp.asarray(group.shared, jnp.int32)
        return groups, prefixes

    def _prefill(
        self,
        adapter: Any,
        asked: Serving,
        group: PromptGroup,
        members: Sequence[int],
        at: np.ndarray,
        prefix: tuple[Any, jax.Array] | None,
        state: State,
        sampling: Sampling | None,
    ) -> tuple[State, jax.Array]:
        """Prefills prompts into rows of the state; -1 among the members is padding."""
        put = functools.partial(put_replicated, mesh=self._mesh)
        tokens, lengths = np.zeros((group.rows, group.length), np.int32), np.full(group.rows, group.shared + 1)
        limits, numbers = np.zeros(group.rows), np.zeros(group.rows)
        texts = None if state.tokens is None else np.full((group.rows, asked.slots), NO_TOKEN, np.int32)
        for row, member in enumerate(members):
            if member < 0:
                continue
            prompt = asked.prompts[member]
            tokens[row, : len(prompt) - group.shared] = prompt[group.shared :]
            lengths[row], numbers[row] = len(prompt), asked.numbers[member]
            limits[row] = min(asked.max_new_tokens, self._max_length - len(prompt))
            if texts is not None:
                texts[row, : len(prompt)] = prompt
        per_example = asked.kinds is not None and group.kind < 0
        p = asked.p
        if asked.kinds is not None:
            p = p[group.kind] if group.kind >= 0 else p[asked.kinds[[max(member, 0) for member in members]]]
            p = jnp.asarray(p)
        rows, texts = put((PromptRows(*self._rows(lengths, limits, numbers)), texts))
        tokens = put_rows(tokens, self._mesh, 0, over=EVALUATED) if self._mesh is not None else jnp.asarray(tokens)
        return self.prefill(
            *(asked.slots, per_example, self._base, adapter, put(p), tokens, rows, texts),
            *(put(jnp.asarray(at)), prefix, state, sampling),
        )

    @staticmethod
    def _rows(*arrays: np.ndarray) -> tuple[jax.Array, ...]:
        return tuple(jnp.asarray(array, jnp.int32) for array in arrays)

    def _slots(self, longest: int, max_new_tokens: int) -> int:
        """The slots of a cache for prompts whose padded length is at most `longest`."""
        return max(longest, min(longest + self._padded(max_new_tokens), self._padded(self._max_length)))

    def _padded(self, length: int) -> int:
        return -(-length // self._pad_multiple) * self._pad_multiple


@functools.cache
def warn_once(message: str) -> None:
    """Logs a warning, unless the same message was logged before."""
    logger.warning("%s", message)
