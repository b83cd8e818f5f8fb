"""Tokenises rows: prompt, answer, end-of-sequence token, with a loss mask on the answer and the end-of-sequence token.

An answer that is one of a row's choices has no end-of-sequence token, because it is scored without one.

It matters how the boundary between prompt and answer is tokenised. There are three ways:

- "separate" encodes prompt and answer on their own, as the reference code does.
- "joint" encodes them as one text and splits it where the prompt alone would end, as lm-evaluation-harness does. Tasks
  with choices use it, so that they are trained as they are scored.
- "lossless" does the same as "joint" if no text is lost, and otherwise encodes the answer as a continuation of the
  prompt. Own data use it, because the tokens always spell prompt and completion.

The same row gives different tokens in each of these ways, so a run states its boundary; see `Tokenizer.encode_pair`.
"""

import dataclasses
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from mlora_jax.data.chat import Piece
from mlora_jax.models.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
    """One tokenised row.

    Attributes:
      tokens: int32 [T].
      loss_mask: bool [T], True where the token is a target. It is False at 0, because nothing predicts this token.
      row: the number of the row in its split.
    """

    tokens: np.ndarray
    loss_mask: np.ndarray
    row: int = 0


@dataclasses.dataclass(frozen=True)
class Tokenized:
    """The tokenised rows of a split and the number of rows that were kept, dropped and truncated.

    Attributes:
      examples: the examples that were kept, in the order of the rows.
      kept: the number of rows that were kept.
      dropped: the number of rows that were left out.
      truncated: the number of kept rows that were cut to the limit.
    """

    examples: list[Example]
    kept: int
    dropped: int
    truncated: int


def _error(example: Example, max_length: int, name: str) -> None:
    raise ValueError(
        f"{name} has {len(example.tokens)} tokens, more than the limit data.max_length={max_length}: raise "
        "data.max_length, or set data.overflow='drop' (leave such rows out) or data.overflow='truncate' "
        "(cut them on the right)"
    )


def _drop(example: Example, max_length: int, name: str) -> None:
    del example, max_length, name
    return None


def _truncate(example: Example, max_length: int, name: str) -> Example | None:
    del name
    mask = example.loss_mask[:max_length]
    return Example(example.tokens[:max_length], mask, example.row) if mask.any() else None


# How an example that is longer than the limit is handled: it is an error, it is left out, or it is cut.
OVERFLOW = {"error": _error, "drop": _drop, "truncate": _truncate}


def tokenize(
    rows: Iterable[Mapping[str, Any]],
    tokenizer: Tokenizer,
    *,
    boundary: str,
    max_length: int,
    overflow: str = "error",
    split: str = "train",
) -> Tokenized:
    """Tokenises rows for training.

    A prompt begins with BOS if the model's tokenizer adds it. An answer ends in EOS, with two exceptions: the
    tokenizer's template ends the turns of a chat itself, and one of several choices has no end. The loss is on the
    answer and its end.

    Args:
      rows: the rows of `load_task`.
      tokenizer: the model's tokenizer.
      boundary: "separate", "joint" or "lossless".
      max_length: the limit of an example's length in tokens, with its end token.
      overflow: how a longer example is handled: "error"; "drop", which leaves it out; or "truncate", which cuts it on
        the right. An example whose whole answer would be cut counts as dropped.
      split: the name of the rows in errors.

    Raises:
      ValueError: the overflow is unknown, a row is over the limit under "error", a row has an empty answer or an empty
        prompt, "lossless" cannot tokenise a row, or no row is left.
    """
    if overflow not in OVERFLOW:
        raise ValueError(f"unknown data.overflow {overflow!r}, expected one of {', '.join(map(repr, OVERFLOW))}")
    if max_length < 2:
        raise ValueError(f"data.max_length must be at least 2, got {max_length}")
    examples: list[Example] = []
    dropped = truncated = quoted = 0
    for index, row in enumerate(rows):
        name = f"{split} row {row.get('row', index)}"
        example = encode_row(row, tokenizer, boundary=boundary, name=name, index=row.get("row", index))
        if len(example.tokens) > max_length:
            example = OVERFLOW[overflow](example, max_length, name)
            truncated += example is not None
        quoted += row.get("quotes_arguments", False)
        if example is None:
            dropped += 1
        else:
            examples.append(example)
    if not examples:
        why = f"all {dropped} rows are over data.max_length={max_length}" if dropped else "there are no rows"
        raise ValueError(f"nothing to train on in {split}: {why}")
    if quoted:
        logger.warning(
            "%d rows of %s hold tool calls whose arguments are JSON text, and the model's chat template writes such a "
            'text in quotes ("{\\"city\\": ...}"), as transformers\' apply_chat_template does with the same rows: to '
            "train calls with plain arguments, write the arguments in the file as an object",
            quoted,
            split,
        )
    return Tokenized(examples, kept=len(examples), dropped=dropped, truncated=truncated)


def encode_row(
    row: Mapping[str, Any], tokenizer: Tokenizer, *, boundary: str, name: str = "the row", index: int = 0
) -> Example:
    """Tokenises one row, without a limit of its length.

    Args:
      row: a row of `load_task`.
      tokenizer: the model's tokenizer.
      boundary: "separate", "joint" or "lossless".
      name: the name of the row in errors.
      index: the number of the row in its split.

    Raises:
      ValueError: the answer has no tokens, no token comes before it, or `encode_pair` refuses the texts.
    """
    if "pieces" not in row:
        try:
            prompt, answer = tokenizer.encode_pair(row["prompt"], row["answer"], boundary=boundary)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        # A choice is scored without an end, so it is learned without one.
        parts = [(prompt, False, False), (answer, True, not row.get("choices"))]
    elif row["joined"]:
        parts = _encode_joined(row["pieces"], tokenizer)
    else:
        parts = [
            (tokenizer.encode(piece.text, bos=number == 0), piece.learned, piece.ended)
            for number, piece in enumerate(row["pieces"])
        ]
    tokens: list[int] = []
    mask: list[bool] = []
    for ids, learned, ended in parts:
        if learned and not ids:
            raise ValueError(f"{name}: the answer {row['answer'][:40]!r} has no tokens of its own")
        if learned and not tokens:
            raise ValueError(f"{name}: the prompt {row['prompt'][:40]!r} has no tokens, so nothing predicts the answer")
        ids = [*ids, tokenizer.eos_id] if ended else ids
        tokens += ids
        mask += [learned] * len(ids)
    return Example(np.asarray(tokens, np.int32), np.asarray(mask, bool), index)


def check_vocabulary(
    rows: Iterable[Mapping[str, Any]], tokenizer: Tokenizer, *, vocab_size: int, boundary: str, split: str
) -> None:
    """Checks that a model knows every token of some rows and of their choices.

    Args:
      rows: the rows of `load_task`.
      tokenizer: the model's tokenizer.
      vocab_size: V of the model; the model knows the ids below V.
      boundary: "separate", "joint" or "lossless".
      split: the name of the rows in errors.

    Raises:
      ValueError: a row holds a token whose id is V or more; the message names the row, the token, its id and V.
    """
    if tokenizer.largest_id < vocab_size:
        return
    for index, row in enumerate(rows):
        name = f"{split} row {row.get('row', index)}"
        for answer in row.get("choices") or [row["answer"]]:
            tokens = encode_row({**row, "answer": answer}, tokenizer, boundary=boundary, name=name).tokens
            if tokens.max() >= vocab_size:
                unknown = int(tokens[tokens >= vocab_size][0])
                raise ValueError(
                    f"{name} holds the token {_token(tokenizer, unknown)} of id {unknown}, and the model knows the "
                    f"ids below {vocab_size} only (vocab_size in its config.json): the folder's tokenizer is another "
                    "model's, or tokens were added to it and not to the model"
                )


def _token(tokenizer: Tokenizer, id: int) -> str:
    try:
        return repr(tokenizer.token(id))
    except ValueError:  # the model's files name this token only by its number
        return "without a name"


def prompt_tokens(row: Mapping[str, Any], tokenizer: Tokenizer, *, boundary: str, name: str = "the row") -> list[int]:
    """Returns the tokens that generation starts from: all tokens before the row's last answer.

    Args:
      row: a row of `load_task`.
      tokenizer: the model's tokenizer.
      boundary: "separate", "joint" or "lossless".
      name: the name of the row in errors.
    """
    example = encode_row(row, tokenizer, boundary=boundary, name=name)
    # The last answer reaches to the end, so the last token without loss is the one before it.
    before = np.flatnonzero(~example.loss_mask)[-1] + 1
    return example.tokens[:before].tolist()


def _encode_joined(pieces: Sequence[Piece], tokenizer: Tokenizer) -> list[tuple[list[int], bool, bool]]:
    """Encodes the pieces as one text and splits its tokens at the boundaries of the pieces.

    At a boundary, it splits after the tokens that the text up to the boundary has when it is encoded alone.
    """
    whole = tokenizer.encode("".join(piece.text for piece in pieces), bos=True)
    parts = []
    text, start = "", 0
    for number, piece in enumerate(pieces, start=1):
        text += piece.text
        end = len(whole)
        if number < len(pieces):
            end = max(start, _common_prefix(whole, tokenizer.encode(text, bos=True)))
        parts.append((whole[start:end], piece.learned, piece.ended))
        start = end
    return parts


def _common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))
