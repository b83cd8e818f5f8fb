"""Reads the JSON files of a Hugging Face folder."""

from __future__ import annotations

import json
import pathlib
from typing import Any

from mlora_jax.models.text_file import read_text


def read_json_object(file: pathlib.Path) -> dict[str, Any]:
    """Reads the JSON object that a file holds.

    Args:
      file: the file, which is UTF-8 text.

    Returns:
      The object.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is not text, is not JSON, or holds no object. The message names the file.
    """
    text = read_text(file)
    try:
        values = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{file} holds {type(values).__name__}, not an object")
    return values
