"""The roles of tokens in training, scoring and generation (begin, end, padding, prefix, stops), and their sources."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

GENERATION_FILE = "generation_config.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenRoles:
    """The ids that training, scoring and generation use.

    - BOS, EOS and padding are the tokenizer's own `bos_token`, `eos_token` and `pad_token`, from the files that
      `token_files` names. The ids in `config.json` do not count for them. Training appends EOS to an answer.
    - The prefix stands before a text that has no context. It is BOS, or EOS where the tokenizer has no BOS.
    - Generation stops at EOS, which the model learns in training, and at the `eos_token_id` of
      `generation_config.json`. If that file is absent, the `eos_token_id` of `config.json` counts instead. transformers
      follows the same rule.
    - If the tokenizer has no EOS, the first of these ids ends texts. The Hugging Face backend of the harness cannot run
      such a tokenizer. If the tokenizer has no padding token, EOS fills rows.

    Args:
      bos_id: the id of the token that begins a text, or None.
      eos_id: the id of the token that ends a text.
      pad_id: the id that fills rows.
      stops: every id at which generation stops, with `eos_id` first.

    Source: `HFLM.prefix_token_id` and `HFLM.eot_token_id` of lm-evaluation-harness;
    `GenerationMixin.adjust_generation_fn` of transformers.
    """

    bos_id: int | None = None
    eos_id: int
    pad_id: int
    stops: tuple[int, ...]

    @property
    def prefix_id(self) -> int:
        """The id of the token that stands before a text without a context."""
        return self.eos_id if self.bos_id is None else self.bos_id


def token_roles(
    ids: Mapping[str, int], folder: pathlib.Path, generation: Mapping[str, Any] | None, config: Mapping[str, Any]
) -> TokenRoles:
    """Chooses the roles of tokens by the rules of `TokenRoles`.

    Args:
      ids: maps a role of the tokenizer, such as "bos_token", to its id.
      folder: the folder that messages name.
      generation: the values of `generation_config.json`, or None where there is no such file.
      config: the values of `config.json`.

    Returns:
      The roles.

    Raises:
      ValueError: no file names a token that ends a text, an `eos_token_id` is not an id, or the model does not know
        BOS or EOS.
    """
    size = config.get("vocab_size")
    for role in ("bos_token", "eos_token"):
        if role in ids and isinstance(size, int) and ids[role] >= size:
            raise ValueError(
                f"{folder}: the {role} of the tokenizer has the id {ids[role]}, and the model knows the ids below "
                f"{size} only (vocab_size in config.json): name a token of the vocabulary as {role} in "
                f"tokenizer_config.json, or null for none"
            )
    file, values = ("config.json", config) if generation is None else (GENERATION_FILE, generation)
    told = values.get("eos_token_id")
    told = [] if told is None else told if isinstance(told, list) else [told]
    for id in told:
        if isinstance(id, bool) or not isinstance(id, int):
            raise ValueError(f"{folder / file}: eos_token_id holds {id!r}, not the id of a token")
    stops = [id for id in told if id >= 0]  # old files write -1 for none
    if "eos_token" in ids:
        stops.insert(0, ids["eos_token"])
    if not stops:
        raise ValueError(
            f"{folder}: no token ends a text: name it as eos_token in tokenizer_config.json, where transformers looks "
            f"for it"
        )
    return TokenRoles(
        bos_id=ids.get("bos_token"),
        eos_id=stops[0],
        pad_id=ids.get("pad_token", stops[0]),
        stops=tuple(dict.fromkeys(stops)),
    )
