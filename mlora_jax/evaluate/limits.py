"""Counts, before training, the items that the limits of a run keep from being measured."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence

import numpy as np

from mlora_jax.config import harness_tasks
from mlora_jax.config_type import ConfigDict
from mlora_jax.data.load import TaskData
from mlora_jax.data.tokenize import encode_row
from mlora_jax.evaluate.exact_match import extract_answer
from mlora_jax.evaluate.requests import choice_items
from mlora_jax.evaluate.stop_strings import StopStrings
from mlora_jax.models.tokenizer import Tokenizer
from mlora_jax.parallel import hosts

logger = logging.getLogger(__name__)


def warn_of_limits(
    config: ConfigDict,
    data: TaskData,
    rows: Mapping[str, Sequence[dict]],
    tokenizer: Tokenizer,
    *,
    context: int,
    eos: Collection[int],
) -> None:
    """Logs a warning for every limit that test or validation items exceed, with their count and the key to change.

    Args:
      config: the resolved config.
      data: the task and how its rows are tokenized.
      rows: split -> the rows to evaluate on.
      tokenizer: the model's tokenizer.
      context: the model's context, in tokens.
      eos: the token ids that end an answer.

    Raises:
      ValueError: no validation item can be right although the accuracy on them decides about training, or a task of
        `config.evaluation.tasks` has answers that leave no room for a prompt.
    """
    _check_harness_tasks(config, context)
    generates = data.task.metric == "exact_match"
    find = _limits_of_generation if generates else _limits_of_scoring
    for split, some in rows.items():
        for warning in find(config, data, split, some, tokenizer, context, eos):
            if hosts.is_first():
                logger.warning("%s", warning)


def _check_harness_tasks(config: ConfigDict, context: int) -> None:
    names = dict.fromkeys(name for name, _ in harness_tasks(config.evaluation.tasks))
    if not names:
        return
    from mlora_jax.evaluate.language_model import MAX_GEN_TOKS  # slow to import
    from mlora_jax.evaluate.task_files import generated_tokens

    for name in names:
        if (generated_tokens(name, MAX_GEN_TOKS) or 0) >= context:
            raise ValueError(
                f"the answers of the task {name} of config.evaluation.tasks may have "
                f"{generated_tokens(name, MAX_GEN_TOKS)} tokens (max_gen_toks), which leaves no room for a prompt in "
                f"the model's context of {context} tokens: leave that task out, or measure another model"
            )


def _limits_of_generation(
    config: ConfigDict,
    data: TaskData,
    split: str,
    rows: Sequence[dict],
    tokenizer: Tokenizer,
    context: int,
    eos: Collection[int],
) -> Iterator[str]:
    limit = config.evaluation.max_new_tokens
    ends = StopStrings(tokenizer, data.task.stop)
    references = [_Reference(row, number, data, tokenizer, ends, eos) for number, row in enumerate(rows)]
    yield from _cut_prompts(config, split, [len(each.prompt) for each in references], context)
    wrong = [each for each in references if not each.is_right()]
    if wrong:
        yield (
            f"{len(wrong)} of {len(rows)} {split} items count as wrong even where a model answers with the reference "
            f"word for word, the first of them row {wrong[0].row}: {wrong[0].obstacle()}"
        )
    beyond = [each for each in references if each.is_right() and not each.is_right(limit)]
    if beyond:
        need = max(each.needed() for each in beyond)
        way_out = f"set config.evaluation.max_new_tokens={need} or more"
        if need >= context:
            way_out = f"the model's context has {context} tokens, so shorten those answers"
        yield (
            f"the reference answers of {len(beyond)} of {len(rows)} {split} items need more than "
            f"config.evaluation.max_new_tokens={limit} tokens, the longest {need}; an answer that is cut off before "
            f"its end counts as wrong: {way_out}"
        )
    # With a pattern, a shorter answer may be right, because the reasoning before the answer is not compared.
    if len(wrong) + len(beyond) < len(rows) or data.task.answer_pattern or not rows:
        return
    none = f"none of the {len(rows)} {split} items can be right, so their accuracy will be 0 at every rank"
    if split == "validation" and config.validation.every and config.validation.measure == "aurac":
        raise ValueError(
            f"{none}, and config.validation.measure='aurac' would have it decide which adapter is kept and when to "
            f"stop: raise config.evaluation.max_new_tokens={limit}, or set config.validation.measure='loss' or "
            "config.validation.every=0"
        )
    yield none


def _cut_prompts(config: ConfigDict, split: str, lengths: Sequence[int], context: int) -> Iterator[str]:
    new = config.evaluation.max_new_tokens
    longest = min(config.data.max_length, context - new)
    cut = [length for length in lengths if length > longest]
    if cut:
        way_out = f"set config.data.max_length={max(cut)} or more"
        if context - new < max(cut):
            way_out = (
                f"the model's context of {context} tokens has to hold config.evaluation.max_new_tokens={new} besides, "
                "so lower that or shorten the prompts"
            )
        yield (
            f"{len(cut)} of {len(lengths)} {split} prompts are longer than {longest} tokens, the longest {max(cut)}, "
            f"and lose their beginning: {way_out}"
        )


class _Reference:
    """The reference answer of a row, as the tokens that a model would have to generate."""

    def __init__(
        self, row: dict, number: int, data: TaskData, tokenizer: Tokenizer, ends: StopStrings, eos: Collection[int]
    ) -> None:
        self.row = row.get("row", number)
        example = encode_row(row, tokenizer, boundary=data.boundary, name=f"row {self.row} to evaluate on")
        # The last answer runs to the end, so the last token without loss is the one before it.
        before = int(np.flatnonzero(~example.loss_mask)[-1]) + 1
        tokens = example.tokens.tolist()
        self.prompt, answer = tokens[:before], tokens[before:]
        self.tokens = answer[: next((at for at, token in enumerate(answer) if token in eos), len(answer))]
        self._tokenizer, self._stop, self._pattern = tokenizer, data.task.stop, data.task.answer_pattern
        self._ends = ends
        self._text, self._answer = row["answer"], extract_answer(row["answer"], data.task.answer_pattern)

    def is_right(self, limit: int | None = None) -> bool:
        """Whether `GenerationEvaluator` would count the reference, cut to `limit` tokens, as right."""
        return extract_answer(self._ends.text(self.tokens[:limit]), self._pattern) == self._answer

    def needed(self) -> int:
        """The smallest number of tokens from which on every longer part of the reference counts as right."""
        count = len(self.tokens)
        while count and self.is_right(count - 1):
            count -= 1
        return count

    def obstacle(self) -> str:
        """Why the whole reference does not count as right."""
        if found := [string for string in self._stop if string in self._tokenizer.decode(self.tokens)]:
            return f"it holds the stop string {found[0]!r}, which ends an answer; the task sets it"
        return (
            f"its tokens up to the first that ends an answer spell {self._tokenizer.decode(self.tokens)[-40:]!r}, not "
            f"{self._text[-40:]!r}"
        )


def _limits_of_scoring(
    config: ConfigDict,
    data: TaskData,
    split: str,
    rows: Sequence[dict],
    tokenizer: Tokenizer,
    context: int,
    eos: Collection[int],
) -> Iterator[str]:
    del eos
    limit = config.data.max_length
    if data.task.metric == "choice":
        items = choice_items(rows, tokenizer, boundary=data.boundary)
        cut, what = items.cut_items(limit), "lose the beginning of their prompt"
        # The last token of a choice is predicted, but the model does not read it.
        need = max((len(before) + len(answer) - 1 for before, answer in items.requests), default=0)
    else:
        names = [f"evaluation row {row.get('row', number)}" for number, row in enumerate(rows)]
        encoded = [
            encode_row(row, tokenizer, boundary=data.boundary, name=name) for row, name in zip(rows, names, strict=True)
        ]
        lengths = [len(example.tokens) for example in encoded]
        cut, what = sum(length > limit for length in lengths), "lose the end of their answer"
        need = max(lengths, default=0)
    if cut:
        way_out = f"set config.data.max_length={need} or more"
        if need > context:
            way_out = f"the model's context has {context} tokens, so shorten them"
        yield (
            f"{cut} of {len(rows)} {split} items are longer than config.data.max_length={limit} tokens, the longest "
            f"needs {need}, and {what}: {way_out}"
        )
