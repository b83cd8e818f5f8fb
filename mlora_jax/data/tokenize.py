"""Rows to tokens and loss mask: prompt, answer, end-of-sequence token; the loss is on the answer and the end.

An answer that is one of a row's choices has no end token: it is scored without one.

How the border between prompt and answer is tokenised matters. The boundary "separate" encodes the two on their
own (the reference code's way); "joint" encodes them as one text and cuts where the prompt alone would end
(lm-evaluation-harness's way, and so that of the tasks with choices, which are trained as they are scored);
"lossless" does so too where no text is lost by it, and elsewhere encodes the answer as what continues the prompt
(the way of own data: its tokens always spell prompt and completion). The same prompt gives other tokens either
way, so a run states its boundary; see `Tokenizer.encode_pair`.
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
        loss_mask: bool [T], True where the token is a target; never at 0, which nothing predicts.
        row: the row's number in its split.
    """

    tokens: np.ndarray
    loss_mask: np.ndarray
    row: int = 0


@dataclasses.dataclass(frozen=True)
class Tokenized:
    """What came of the rows: kept + dropped of them, `truncated` of the kept ones cut.

    Attributes:
        examples: the kept ones, in the rows' order.
        kept, dropped, truncated: counts of rows.
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


# What becomes of an example longer than the limit: an error, nothing, or a shorter one.
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

    A prompt begins with BOS if the model's tokenizer adds one; an answer ends in EOS (a chat written by the
    tokenizer's template ends its turns its own way, and one of several choices has no end). The loss is on the
    answer and what ends it.

    Args:
        rows: as `load_task` gives them.
        tokenizer: the model's.
        boundary: "separate", "joint" or "lossless".
        max_length: the longest example in tokens, its end token included.
        overflow: what to do with a longer one: "error", "drop", or "truncate" (cut on the right; one whose
            whole answer is cut away counts as dropped).
        split: what errors call the rows.

    Raises:
        ValueError: an unknown overflow, a row over the limit under "error", a row without anything to learn
            or to learn it from, one that "lossless" cannot tokenise, or no row left.
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
    """One row as tokens and loss mask, of any length.

    Raises:
        ValueError: an answer without tokens, a prompt without any before it, or what `encode_pair` refuses.
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
    """Checks that a model knows every token of some rows, their choices included.

    Args:
        rows: as `load_task` gives them.
        tokenizer: the model's.
        vocab_size: V of the model, which knows the ids below it.
        boundary: "separate", "joint" or "lossless".
        split: what errors call the rows.

    Raises:
        ValueError: a row holds a token whose id is V or more; the message names row, token, id and V.
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
    except ValueError:  # named by number in the model's own files only
        return "without a name"


def prompt_tokens(row: Mapping[str, Any], tokenizer: Tokenizer, *, boundary: str, name: str = "the row") -> list[int]:
    """The tokens that a row's last answer was trained to follow: what generation starts from."""
    example = encode_row(row, tokenizer, boundary=boundary, name=name)
    # The last answer runs to the end, so the last token without loss is the one before it.
    before = np.flatnonzero(~example.loss_mask)[-1] + 1
    return example.tokens[:before].tolist()


def _encode_joined(pieces: Sequence[Piece], tokenizer: Tokenizer) -> list[tuple[list[int], bool, bool]]:
    """Pieces of one text: encoded whole, and cut where the text up to a border alone has the same tokens."""
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
