"""The compiled functions of generation: an empty state, prefills into rows of it, and steps of decoding."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mlora_jax.adapters import fold_where_cheaper, set_profile
from mlora_jax.evaluate.logit_rules import NO_TOKEN, Texts, make_rules
from mlora_jax.evaluate.sampling import NOT_FINITE, next_tokens
from mlora_jax.models.generation_config import GenerationSettings
from mlora_jax.parallel.arrays import split_rows
from mlora_jax.parallel.mesh import EVALUATED, shards_of
from mlora_jax.parallel.rules import replicated

STEPS = 16  # the host looks for stop strings after at most this many steps of decoding
SHARDS = "shards"  # the name of the axis over parts of the rows


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


class GenerationPrograms:
    """The jitted functions that generate text. Adapters and profiles are data, so that new ones compile nothing.

    On a mesh, B and n below are divided by the number of parts of the rows, over which the functions run by `jax.vmap`.

    Args:
      graphdef: the graph definition of the adapted decoder in evaluation mode.
      profile: the profile tree; its values are replaced.
      eos, ends, settings, mesh: as in `Generator`.

    Attributes:
      begin: (B, S, base, adapter) -> a `State` whose rows have all ended.
      share: (S, base, adapter, p, tokens [1, T]) -> the cache of one row, for the first tokens of many prompts.
      prefill: (S, per_example, base, adapter, p, tokens [n, T], rows, texts, at, prefix, state, sampling) -> the state
        with n prompts in its rows `at` [n] int32 (one beyond the last row: none), and their first tokens [n] int32.
        `rows` are `PromptRows` [n]. `texts` are the prompts [n, S] as in `Texts`, if the state keeps them. `prefix` is
        None, or a cache that `share` returned and the number of its tokens, which precede the T tokens.
      decode: (per_example, base, adapter, p, state, rows, enough, sampling) -> the state after at most `STEPS` steps,
        and the tokens [B, STEPS] int32, -1 where a row makes none. No step begins when `enough` (int32) rows have
        ended.
        `rows` are `PromptRows` [B].
      mesh, shards: the mesh or None, and the number of parts of the rows.
      on_cpu: whether the functions run on a CPU.
    """

    def __init__(
        self,
        graphdef: Any,
        profile: Any,
        *,
        eos: Sequence[int],
        ends: Sequence[int],
        settings: GenerationSettings | None,
        mesh: Mesh | None,
    ) -> None:
        text_ends = np.asarray(sorted(set(ends)), np.int32)
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
        self.on_cpu = on_cpu = platform == "cpu"

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
            layers = model.single_layers() if on_cpu or model.cache_form is not None else None

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

        self.mesh, self.shards = mesh, shards_of(mesh, EVALUATED)
        # Any, because the type of a jitted function in jax lacks `_cache_size`.
        self.begin: Any = jax.jit(
            begin if mesh is None else functools.partial(self._begin_on_mesh, begin), static_argnums=(0, 1)
        )
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

    def _begin_on_mesh(self, begin: Callable[..., Any], size: int, *arguments: Any) -> State:
        state = begin(size // self.shards, *arguments)
        state = jax.tree.map(lambda x: jnp.broadcast_to(x, (self.shards, *x.shape)), state)
        return jax.lax.with_sharding_constraint(state, self.placed(state))

    def _prefill_on_mesh(self, prefill: Callable[..., Any], slots: int, per_example: bool, *arguments: Any) -> Any:
        base, adapter, p, tokens, rows, texts, at, prefix, state, sampling = arguments
        parts = functools.partial(jax.tree.map, functools.partial(split_rows, axis=0, shards=self.shards))
        return self._mapped(
            functools.partial(prefill, slots, per_example),
            (None, None, 0 if per_example else None, 0, 0, 0, 0, None, 0, None),
            *(base, adapter, parts(p) if per_example else p),
            *(parts(tokens), parts(rows), parts(texts), parts(at), prefix, state, sampling),
        )

    def _decode_on_mesh(self, decode: Callable[..., Any], per_example: bool, *arguments: Any) -> Any:
        base, adapter, p, state, rows, enough, sampling = arguments
        parts = functools.partial(jax.tree.map, functools.partial(split_rows, axis=0, shards=self.shards))
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
        return state, jax.lax.with_sharding_constraint(shown, replicated(cast("Mesh", self.mesh)))

    def placed(self, state: State) -> State:
        """The shardings of a state on the mesh: rows over `EVALUATED`, heads over `tensor`, `done` on every device.

        Args:
          state: a state whose arrays, or their shapes, begin with the parts of the rows.
        """
        mesh = cast("Mesh", self.mesh)
        rows = lambda x: NamedSharding(mesh, PartitionSpec(EVALUATED, *(None,) * (x.ndim - 1)))  # noqa: E731

        def heads(x):
            over = "tensor" if x.shape[-3] % mesh.shape["tensor"] == 0 else None
            return NamedSharding(mesh, PartitionSpec(EVALUATED, *(None,) * (x.ndim - 4), over, None, None))

        others = jax.tree.map(rows, state._replace(cache=()))
        return others._replace(cache=jax.tree.map(heads, state.cache), done=replicated(mesh))

    @property
    def compilations(self) -> int:
        """The number of executables that have been compiled so far, without those of `begin`."""
        return sum(function._cache_size() for function in (self.share, self.prefill, self.decode))
