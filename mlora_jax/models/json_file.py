"""The JSON files of a Hugging Face folder."""

from __future__ import annotations

import json
import pathlib
from typing import Any

from mlora_jax.models.text_file import read_text


def read_json_object(file: pathlib.Path) -> dict[str, Any]:
    """The object that a file holds.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it holds no text, no JSON, or none that is an object; the message names it.
    """
    text = read_text(file)
    try:
        values = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{file} holds {type(values).__name__}, not an object")
    return values
