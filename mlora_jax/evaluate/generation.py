"""Generates text with a static KV cache, for any adapter under any profile, with rows that are refilled as they end."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from mlora_jax.evaluate.programs import GenerationPrograms
from mlora_jax.evaluate.sampling import NOT_FINITE, Sampling, make_sampling
from mlora_jax.evaluate.serving import Questions, serve
from mlora_jax.evaluate.shapes import even_batch_size, few_lengths
from mlora_jax.evaluate.slots import LENGTHS
from mlora_jax.models.generation_config import GenerationSettings
from mlora_jax.parallel.arrays import put_weights

logger = logging.getLogger(__name__)


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
      programs: the jitted functions.
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
        self.programs = GenerationPrograms(
            graphdef, profile, eos=eos, ends=eos if ends is None else ends, settings=settings, mesh=mesh
        )
        self._base = base
        self._max_length, self._batch_size, self._pad_multiple = max_length, batch_size, pad_multiple
        self.settings = settings or GenerationSettings()

    @property
    def compilations(self) -> int:
        """The number of executables that have been compiled so far, without those that only make empty arrays."""
        return self.programs.compilations

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
        made = self.raw_answers(
            adapter,
            prompts,
            p,
            max_new_tokens=max_new_tokens,
            sampling=make_sampling(temperature, top_p, seed),
            stop=stop,
            numbers=numbers,
        )
        if broken := sum(bool(np.any(answer == NOT_FINITE)) for answer in made):
            logger.warning(
                "%d of %d answers end early: the model's logits for them are not finite", broken, len(prompts)
            )
        return [answer[answer >= 0].tolist() for answer in made]

    def raw_answers(
        self,
        adapter: Any,
        prompts: Sequence[Sequence[int]],
        p: Any,
        *,
        max_new_tokens: int,
        sampling: Sampling | None = None,
        stop: Callable[[list[int]], bool] | None = None,
        numbers: Sequence[int] | None = None,
    ) -> list[np.ndarray]:
        """The answers of `generate`, without a warning of those whose logits are not finite.

        Args:
          adapter, prompts, p, max_new_tokens, stop, numbers: as in `generate`.
          sampling: how tokens are drawn; None takes the likeliest tokens.

        Returns:
          One int32 array [tokens] per prompt. Its last entry is `NOT_FINITE` if the answer ended for that reason.

        Raises:
          ValueError: as in `generate`.
        """
        if isinstance(p, Mapping):
            kinds = None
        else:
            p = np.asarray(p)
            if p.ndim not in (1, 2) or (p.ndim == 2 and len(p) != len(prompts)):
                raise ValueError(
                    f"p must have shape [R], or [{len(prompts)}, R] for {len(prompts)} prompts, got {list(p.shape)}"
                )
            p, kinds = _kinds_of(p) if p.ndim == 2 and len(p) else (p, None)
        self._check(max_new_tokens, sampling)
        self._check_prompts(prompts)
        if not prompts:
            return []
        max_new_tokens = min(max_new_tokens, self._max_length)  # bounds the length of arrays
        size = even_batch_size(len(prompts), self._batch_size)
        numbers = range(len(prompts)) if numbers is None else numbers
        how: dict[str, Any] = dict(p=p, kinds=kinds, numbers=numbers, size=size, sampling=sampling, stop=stop)
        return self._serve(adapter, prompts, max_new_tokens, None, **how)

    def place(self, adapter: Any) -> Any:
        """Puts an adapter where the mesh needs it, once for many calls of `answer`."""
        return put_weights(adapter, self.programs.mesh)

    def batches(self, prompts: Sequence[Sequence[int]]) -> list[PromptBatch]:
        """Sorts prompts by length into batches of one size, each padded to one of few multiples of `pad_multiple`.

        Raises:
          ValueError: a prompt has no tokens, or fills `max_length`.
        """
        self._check_prompts(prompts)
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        size = even_batch_size(len(order), self._batch_size)
        size = -(-size // self.programs.shards) * self.programs.shards
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
        p, kinds = _kinds_of(np.asarray(p)[:count]) if per_example else (p, None)
        numbers = range(size) if numbers is None else numbers
        how: dict[str, Any] = dict(p=p, kinds=kinds, numbers=numbers, size=size, sampling=sampling, stop=stop)
        answers = self._serve(adapter, prompts, max_new_tokens, length, **how)
        made = np.full((size, max_new_tokens), -1, np.int32)
        for row, answer in zip(made, answers, strict=False):
            row[: len(answer)] = answer
        return made

    def _serve(
        self,
        adapter: Any,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        length: int | None,
        *,
        size: int,
        **how: Any,
    ) -> list[np.ndarray]:
        """The answers as `serve` returns them; `length` is the padded length of all prompts, or None."""
        lengths = np.array([len(prompt) for prompt in prompts])
        longest = length or self._padded(int(lengths.max()))
        slots = max(longest, min(longest + self._padded(max_new_tokens), self._padded(self._max_length)))
        asked = Questions(
            prompts=prompts,
            limits=np.minimum(max_new_tokens, self._max_length - lengths),
            size=-(-size // self.programs.shards) * self.programs.shards,
            slots=slots,
            multiple=self._pad_multiple,
            length=length,
            **how,
        )
        return serve(self.programs, self._base, self.place(adapter), asked)

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

    def _padded(self, length: int) -> int:
        return -(-length // self._pad_multiple) * self._pad_multiple


@functools.cache
def warn_once(message: str) -> None:
    """Logs a warning, unless the same message was logged before."""
    logger.warning("%s", message)


def _kinds_of(p: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """The different profiles [K, R] among [B, R] and the index [B] of each; or the only one [R], and None."""
    different, kinds = np.unique(p, axis=0, return_inverse=True)
    return (different, kinds.reshape(-1)) if len(different) > 1 else (p[0], None)
