"""Reads the special and added tokens of a checkpoint from all the files that name them.

transformers 5 reads such tokens in this order, and so does this module:

1. `tokenizer_config.json`: the named tokens (`bos_token`, `eos_token` and any other key that ends in `_token`),
   `extra_special_tokens` or, where that is absent or empty, `additional_special_tokens`, and `added_tokens_decoder`.
2. Only where `tokenizer_config.json` has no `added_tokens_decoder`: `special_tokens_map.json`, whose entries replace
   those of step 1; then `added_tokens.json`; then `added_tokens` of `tokenizer.json`.

A token that the vocabulary lacks gets the next free id, even where a file gives it another id. `add_bos_token` and
`add_eos_token` have no effect: only the post-processor of `tokenizer.json` adds tokens before or after a text.

Source: `PreTrainedTokenizerBase._from_pretrained` and `TokenizersBackend.__init__` of transformers.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import tokenizers

from mlora_jax.models.json_file import read_json_object
from mlora_jax.models.text_file import read_text
from mlora_jax.models.tokenizer_classes import TokenizerClass, build_backend

TOKENIZER_FILE = "tokenizer.json"
CONFIG = "tokenizer_config.json"
MAP = "special_tokens_map.json"
ADDED = "added_tokens.json"
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

_FIELDS = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
_EXTRA = ("extra_special_tokens", "additional_special_tokens")
_TYPE = "__type"

Token = str | tokenizers.AddedToken


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenFiles:
    """The tokenizer of a folder, as its files describe it.

    Args:
      backend: the tokenizer with all its tokens, without truncation and padding.
      named: maps a role, such as "bos_token", to the text of its token.
      opening: the ids that the post-processor puts before every text.
      cleans_up: whether decoding removes the spaces before punctuation.
      values: the values of `tokenizer_config.json`.
    """

    backend: tokenizers.Tokenizer
    named: Mapping[str, str]
    opening: tuple[int, ...]
    cleans_up: bool
    values: Mapping[str, Any]


def read_token_files(folder: pathlib.Path, config: Mapping[str, Any]) -> TokenFiles:
    """Reads the tokenizer of a Hugging Face folder as `AutoTokenizer` of transformers 5 does.

    Args:
      folder: the folder, which has a `tokenizer.json`. The other files may be absent.
      config: the values of `config.json`.

    Returns:
      The tokenizer and its named tokens.

    Raises:
      ValueError: a file cannot be read, or an entry is not supported here or is refused by transformers.
    """
    values, file = _optional(folder / CONFIG), folder / TOKENIZER_FILE
    _check(folder / CONFIG, values)
    content = read_text(file)
    backend, row = build_backend(file, content, values, config)
    layout = json.loads(content)
    named, extra, added = _listed(folder, values, layout, row)
    _add(backend, named, extra, added, names_again=row is not None and row.names_again)
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = bool(values.get("split_special_tokens", False))
    return TokenFiles(
        backend=backend,
        named={role: str(token) for role, token in named.items()},
        opening=_opening(file, layout.get("post_processor")),
        cleans_up=_cleans_up(values, layout),
        values=values,
    )


def _cleans_up(values: Mapping[str, Any], layout: Mapping[str, Any]) -> bool:
    """Returns whether decoded texts are cleaned up. For BPE, transformers 5 needs a second key to do so."""
    forced = values.get("clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output", False)
    return bool(values.get("clean_up_tokenization_spaces")) and (bool(forced) or layout["model"]["type"] != "BPE")


def _optional(file: pathlib.Path) -> dict[str, Any]:
    return read_json_object(file) if file.is_file() else {}


def _check(file: pathlib.Path, values: Mapping[str, Any]) -> None:
    """Refuses the keys that make transformers read other files or run other code."""
    code = values.get("auto_map")
    if code and (not isinstance(code, dict) or code.get("AutoTokenizer")):
        raise ValueError(
            f"{file}: auto_map names a tokenizer that is Python code of the checkpoint, which is never run here: "
            f"remove the key if {TOKENIZER_FILE} alone says how text is read"
        )
    others = [name for name in values.get("fast_tokenizer_files") or () if name != TOKENIZER_FILE]
    if others:
        raise ValueError(
            f"{file}: fast_tokenizer_files names {', '.join(map(repr, others))}, but only {TOKENIZER_FILE} is read: "
            f"put the right one in its place and remove the key"
        )
    if values.get("init_inputs"):
        raise ValueError(f"{file}: init_inputs {values['init_inputs']!r} is not supported: remove the key")


def _listed(
    folder: pathlib.Path, values: Mapping[str, Any], layout: Mapping[str, Any], row: TokenizerClass | None
) -> tuple[dict[str, Token], list[Token], list[tokenizers.AddedToken]]:
    """Returns (role -> named token, further special tokens, added tokens in the order of their ids)."""
    file, source = folder / CONFIG, dict(values)
    if _EXTRA[1] in source and not source.get(_EXTRA[0]):
        source[_EXTRA[0]] = source.pop(_EXTRA[1])
    # These are the roles besides the usual ones. Roles in plain text or in extra_special_tokens come last.
    explicit: dict[str, Any] = {}
    own = [key for key, value in source.items() if _is_role(key) and key not in NAMED and isinstance(value, str)]
    explicit |= {key: source.pop(key) for key in own}
    if isinstance(source.get(_EXTRA[0]), dict):
        explicit |= source.pop(_EXTRA[0])
    explicit = explicit or source.pop("model_specific_special_tokens", None) or {}
    if not isinstance(explicit, dict):
        raise ValueError(f"{file}: model_specific_special_tokens is {explicit!r}, not an object")
    added: dict[int, tokenizers.AddedToken] = {}
    by_text: dict[str, tokenizers.AddedToken] = {}
    if "added_tokens_decoder" in source:
        for index, entry in source["added_tokens_decoder"].items():
            added[int(index)] = _added_token(file, f"added_tokens_decoder {index}", entry)
        by_text = {token.content: token for token in added.values()}
    else:
        _merge_map(folder / MAP, source)
        if isinstance(source.get(_EXTRA[0]), dict):
            explicit |= source.pop(_EXTRA[0])
        _merge_added(folder / ADDED, source, added, by_text)
        for entry in layout.get("added_tokens") or ():
            token = _added_token(folder / TOKENIZER_FILE, "added_tokens", entry)
            added[entry["id"]] = by_text[token.content] = token
    named = _named(file, source, explicit, by_text, row, layout)
    extra = source[_EXTRA[0]] if _EXTRA[0] in source else source.get(_EXTRA[1])
    if not isinstance(extra, list | None):
        raise ValueError(f"{file}: {_EXTRA[0]} is {extra!r}, not a list of tokens")
    return named, [_token(file, _EXTRA[0], token) for token in extra or ()], [added[index] for index in sorted(added)]


def _named(file, source, explicit, by_text, row: TokenizerClass | None, layout) -> dict[str, Token]:
    """Maps roles to tokens. The usual roles come first; tokens without an id get their ids in this order."""
    known = dict(row.named) if row is not None else {}
    padding = (layout.get("padding") or {}).get("pad_token")
    if padding is not None:
        known.setdefault("pad_token", padding)
    named: dict[str, Token] = {}
    for role in NAMED:
        if role not in source:
            value = known.get(role)
        elif source[role] is not None:
            value = _token(file, role, source[role])
            value = by_text.get(str(value), value)
        else:
            value = None
        if value is not None:
            named[role] = value
    for key, value in source.items():
        if _is_role(key) and key not in NAMED and (isinstance(value, str | tokenizers.AddedToken) or _marked(value)):
            named[key] = _token(file, key, value)
    return named | {role: _token(file, role, value) for role, value in explicit.items()}


def _merge_map(file: pathlib.Path, source: dict[str, Any]) -> None:
    """Replaces entries of `tokenizer_config.json` with those of `special_tokens_map.json`."""
    for key, value in _optional(file).items():
        if key not in (*NAMED, *_EXTRA) and not (_is_role(key) and isinstance(value, str | dict)):
            raise ValueError(f"{file}: {key!r} is {value!r}, which is no token: move it to {CONFIG}, or remove it")
        if isinstance(value, dict) and key != _EXTRA[0]:
            value = _added_token(file, key, value | {"special": True})
        elif isinstance(value, list) and key == _EXTRA[0]:
            merged = list(source.get(key) or [])
            for entry in value:
                token = _added_token(file, key, entry | {"special": True}) if isinstance(entry, dict) else entry
                if token not in merged:
                    merged.append(token)
            value = merged
        source[key] = value


def _merge_added(file: pathlib.Path, source, added, by_text) -> None:
    """Adds the tokens of `added_tokens.json`, which are special where another file names them."""
    special = {str(source[role]) for role in NAMED if source.get(role)}
    special |= {str(token) for token in source.get(_EXTRA[0]) or ()}
    for text, index in _optional(file).items():
        if isinstance(index, bool) or not isinstance(index, int):
            raise ValueError(f"{file}: the id of {text!r} is {index!r}, not an integer")
        named = text in special
        added[index] = by_text[text] = tokenizers.AddedToken(text, normalized=not named, special=named)


def _add(backend: tokenizers.Tokenizer, named, extra, added, *, names_again: bool) -> None:
    """Adds the tokens in the order of transformers, because new ids depend on this order."""
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    known |= {token.content for token in added}
    tokens: list[Token] = list(added)
    for token in (*named.values(), *extra):
        if str(token) not in known and token not in tokens:
            tokens.append(token)
    names = {str(token) for token in named.values()}
    made = [_special(token, names) for token in tokens]
    backend.add_tokens(made)
    if names_again:
        again = dict.fromkeys([*map(str, named.values()), *map(str, extra)])
        backend.add_tokens([tokenizers.AddedToken(text, special=True) for text in again])


def _special(token: Token, names: Iterable[str]) -> tokenizers.AddedToken:
    if isinstance(token, str):
        return tokenizers.AddedToken(token, special=True)
    if not token.special and token.content in names:
        token.special = True
    return token


def _is_role(key: str) -> bool:
    return key.endswith("_token")


def _marked(value: Any) -> bool:
    return isinstance(value, dict) and value.get(_TYPE) == "AddedToken"


def _token(file: pathlib.Path, key: str, value: Any) -> Token:
    """Reads a token from its text or from an object of type AddedToken, as in `tokenizer_config.json`."""
    if isinstance(value, str | tokenizers.AddedToken):
        return value
    if _marked(value):
        return _added_token(file, key, value)
    raise ValueError(
        f"{file}: {key} is {value!r}, which transformers 5 refuses too: write the token's text, or "
        f'{{"__type": "AddedToken", "content": ..}}'
    )


def _added_token(file: pathlib.Path, key: str, entry: Any) -> tokenizers.AddedToken:
    if not isinstance(entry, dict) or not isinstance(entry.get("content"), str):
        raise ValueError(f"{file}: {key} is {entry!r}, not an object with the token's text as content")
    return tokenizers.AddedToken(**{field: entry[field] for field in _FIELDS if field in entry})


def _opening(file: pathlib.Path, processor: Mapping[str, Any] | None) -> tuple[int, ...]:
    """Returns the ids that the post-processor puts before a text. Refuses one that puts ids after a text."""
    before, behind = _around(file, processor)
    if behind:
        raise ValueError(
            f"{file}: post_processor puts the ids {behind} behind every text, and so between a prompt and its answer: "
            f"remove them from the template"
        )
    return tuple(before)


def _around(file: pathlib.Path, processor: Mapping[str, Any] | None) -> tuple[list[int], list[int]]:
    if processor is None:
        return [], []
    kind = processor.get("type")
    if kind not in _PROCESSORS:
        raise ValueError(
            f"{file}: post_processor of type {kind!r} is not supported; supported are {', '.join(_PROCESSORS)}"
        )
    return _PROCESSORS[kind](file, processor)


def _template(file: pathlib.Path, processor: Mapping[str, Any]) -> tuple[list[int], list[int]]:
    sides: tuple[list[int], list[int]] = ([], [])
    texts = 0
    for piece in processor["single"]:
        if "Sequence" in piece:
            texts += 1
        else:
            sides[min(texts, 1)].extend(processor["special_tokens"][piece["SpecialToken"]["id"]]["ids"])
    if texts != 1:
        raise ValueError(f"{file}: the template of post_processor holds the text {texts} times, not once")
    return sides


def _sequence(file: pathlib.Path, processor: Mapping[str, Any]) -> tuple[list[int], list[int]]:
    before, behind = [], []
    for inner in processor["processors"]:  # each processes the output of the one before it
        left, right = _around(file, inner)
        before, behind = [*left, *before], [*behind, *right]
    return before, behind


_PROCESSORS = {
    "ByteLevel": lambda file, processor: ([], []),  # moves offsets only
    "TemplateProcessing": _template,
    "BertProcessing": lambda file, processor: ([processor["cls"][1]], [processor["sep"][1]]),
    "RobertaProcessing": lambda file, processor: ([processor["cls"][1]], [processor["sep"][1]]),
    "Sequence": _sequence,
}
