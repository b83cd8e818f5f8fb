"""Plain text for training projections and for measuring them: documents, packed rows and rows of single documents."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from mlora_jax.models import Tokenizer
from mlora_jax.models.text_file import MalformedLineError, read_lines, read_text
from mlora_jax.training.pretrain import pack

FIELD = "text"  # the key of a document in a line of a .jsonl file


class TextRows(NamedTuple):
    """Packed documents.

    Attributes:
      tokens: int32 [N, T].
      segments: int32 [N, T], the document of each token within its row, from 1; 0 is padding.
    """

    tokens: np.ndarray
    segments: np.ndarray


def read_documents(path: str | os.PathLike) -> list[str]:
    """Returns the documents of a file.

    Args:
      path: a .json file with a list of texts, a .jsonl file of {"text": ...}, or a text file, which is one document.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file has another form, or no document.
    """
    file = pathlib.Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"there is no file of text {path}")
    documents = _READERS.get(file.suffix.lower(), lambda file: [read_text(file)])(file)
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise ValueError(f"{path} holds no text")
    return documents


def _json_list(file: pathlib.Path) -> list[str]:
    try:
        found = json.loads(read_text(file))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not JSON: {error}") from None
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
        raise ValueError(f"{file} must be a list of texts")
    return found


def _json_lines(file: pathlib.Path) -> list[str]:
    documents = []
    for number, line in read_lines(file):
        if not line.strip():
            continue
        try:
            text = json.loads(line)[FIELD]
        except (json.JSONDecodeError, KeyError, TypeError):
            text = None
        if not isinstance(text, str):
            raise MalformedLineError(file, number, f'it must be an object like {{"{FIELD}": "some text"}}')
        documents.append(text)
    return documents


_READERS = {".json": _json_list, ".jsonl": _json_lines}


def encode(documents: Sequence[str], tokenizer: Tokenizer, length: int) -> list[list[int]]:
    """Returns the tokens of documents, with BOS if the tokenizer adds it and with EOS, in pieces of at most a length.

    Args:
      documents: the texts.
      tokenizer: the base's tokenizer.
      length: the largest number of tokens of a piece. A piece of one token is dropped, because it predicts nothing.
    """
    pieces = []
    for document in documents:
        ids = [*tokenizer.encode(document, bos=True), tokenizer.eos_id]
        pieces += [ids[start : start + length] for start in range(0, len(ids), length)]
    return [piece for piece in pieces if len(piece) > 1]


def packed_rows(pieces: Sequence[Sequence[int]], length: int) -> TextRows:
    """Packs pieces into rows of equal length; no token sees another piece."""
    return TextRows(*pack(pieces, length))


def single_rows(
    pieces: Sequence[Sequence[int]], length: int, batch_size: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields batches with one piece per row.

    Args:
      pieces: the token ids of each piece, at most `length`.
      length: T.
      batch_size: B.

    Yields:
      tokens int32 [B, T], padded on the right, and the number of tokens of each row, int32 [B], 0 in padding rows.
    """
    for start in range(0, len(pieces), batch_size):
        tokens, lengths = np.zeros((batch_size, length), np.int32), np.zeros(batch_size, np.int32)
        for row, piece in enumerate(pieces[start : start + batch_size]):
            tokens[row, : len(piece)], lengths[row] = piece, len(piece)
        yield tokens, lengths
