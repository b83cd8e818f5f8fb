"""Which file decides which token: begin, end, padding, prefix and stops, for training, scoring and generation."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

GENERATION_FILE = "generation_config.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenRoles:
    """The ids that training, scoring and generation take.

    - BOS, EOS and padding are the tokenizer's own `bos_token`, `eos_token` and `pad_token`, from the files that
      `token_files` names. The ids in `config.json` do not count for them. Training appends EOS to an answer.
    - Before a text without a context stands the prefix: BOS, or EOS where the tokenizer has no BOS.
    - Generation stops at EOS, which training taught, and at the `eos_token_id` of `generation_config.json`. Only where
      that file is absent does the `eos_token_id` of `config.json` count. So does transformers choose them.
    - A tokenizer without EOS, which the harness's Hugging Face backend cannot run, ends texts with the first of these
      ids; one without padding pads with EOS.

    Args:
      bos_id: id of the token that begins a text, or None.
      eos_id: id of the token that ends a text.
      pad_id: id that fills rows.
      stops: every id at which generation stops, `eos_id` first.

    Source: `HFLM.prefix_token_id` and `HFLM.eot_token_id` of lm-evaluation-harness;
    `GenerationMixin.adjust_generation_fn` of transformers.
    """

    bos_id: int | None = None
    eos_id: int
    pad_id: int
    stops: tuple[int, ...]

    @property
    def prefix_id(self) -> int:
        """What stands before a text without a context."""
        return self.eos_id if self.bos_id is None else self.bos_id


def token_roles(
    ids: Mapping[str, int], folder: pathlib.Path, generation: Mapping[str, Any] | None, config: Mapping[str, Any]
) -> TokenRoles:
    """The roles of tokens by the rule of `TokenRoles`.

    Args:
      ids: role ("bos_token", ..) -> id, of the tokenizer.
      folder: for messages.
      generation: values of `generation_config.json`, or None where there is no such file.
      config: values of `config.json`.

    Returns:
      The roles.

    Raises:
      ValueError: no file names a token that ends a text, an `eos_token_id` is no id, or BOS or EOS is a token that
        the model does not know.
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
