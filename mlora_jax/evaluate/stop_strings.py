"""Strings that end an answer."""

from __future__ import annotations

from collections.abc import Sequence

from mlora_jax.models.tokenizer import Tokenizer


class StopStrings:
    """The strings that end an answer, as a `stop` function of `Generator.generate`.

    Args:
      tokenizer: the model's tokenizer.
      strings: the stop strings; there may be none.

    Raises:
      ValueError: a stop string is empty.
    """

    def __init__(self, tokenizer: Tokenizer, strings: Sequence[str]) -> None:
        if "" in strings:
            raise ValueError("a stop string must not be empty: every text would end before it begins")
        self._tokenizer, self._strings = tokenizer, tuple(strings)

    def __call__(self, tokens: list[int]) -> bool:
        """Whether the text of these tokens, special tokens included, contains one of the strings."""
        if not self._strings:
            return False
        text = self._tokenizer.decode(tokens, skip_special_tokens=False)
        return any(string in text for string in self._strings)

    def text(self, tokens: Sequence[int]) -> str:
        """The text of these tokens up to the first of the strings."""
        text = self._tokenizer.decode(tokens)
        return min((text.partition(string)[0] for string in self._strings), key=len, default=text)
