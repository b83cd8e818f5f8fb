"""The pipeline of a tokenizer: the one in `tokenizer.json`, or one that a tokenizer class of transformers builds.

Most classes use `tokenizer.json` unchanged. Some build normalizer, pre-tokenizer and decoder themselves, and use only
the vocabulary, the merges and the post-processor of the file. `AutoTokenizer` of transformers 5 chooses the class by
its own rules, which `class_name` follows.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

logger = logging.getLogger(__name__)

# The classes that use tokenizer.json unchanged.
AS_IT_STANDS = (
    "TokenizersBackend", "PreTrainedTokenizer", "PreTrainedTokenizerFast", "PythonBackend", "BloomTokenizer",
    "ParakeetTokenizer",
)  # fmt: skip
# Model type -> the class that transformers registers for it. The other model types of the decoder have none.
_REGISTERED = {
    "qwen2": "Qwen2Tokenizer", "qwen3": "Qwen2Tokenizer", "mistral": "TokenizersBackend",
    "ministral": "TokenizersBackend",
}  # fmt: skip
# Model types whose checkpoints often name a wrong class, which transformers therefore ignores.
_MISNAMED = ("qwen2",)
_QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _other_steps(written, made, model) -> Iterator[str]:
    for step in ("normalizer", "pre_tokenizer"):
        there, here = (repr(getattr(tokenizer, step)) for tokenizer in (written, made))
        if _without_offsets(there) != _without_offsets(here):
            yield f"takes {here} as {step}, not {there}"


def _without_offsets(step: str) -> str:
    return step.replace("trim_offsets=False", "trim_offsets=True")  # trim_offsets changes no ids


def _lost_characters(written, made, model) -> Iterator[str]:
    # Normalizer and pre-tokenizer are not compared, because files from before transformers 5 write them differently.
    if model.get("unk_token") and not all(f"<0x{byte:02X}>" in model["vocab"] for byte in range(256)):
        yield f"leaves out characters that the vocabulary lacks, and does not write {model['unk_token']} for them"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerClass:
    """A class that builds its own pipeline.

    Args:
      build: a function (vocab, merges, values of `tokenizer_config.json`) -> the tokenizer without added tokens.
      named: maps a role to its token where `tokenizer_config.json` does not have the key.
      differences: a function (tokenizer of `tokenizer.json`, tokenizer that the class builds, model in
        `tokenizer.json`) -> the differences between the two tokenizers, for a warning.
      names_again: whether the class adds its named and extra tokens a second time, as plain special tokens.
    """

    build: Callable[[Mapping[str, int], list[tuple[str, str]], Mapping[str, Any]], tokenizers.Tokenizer]
    named: Mapping[str, str | None]
    differences: Callable[..., Iterator[str]] = _other_steps
    names_again: bool = False


def _llama(vocab, merges, values):
    made = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, fuse_unk=True, byte_fallback=True))
    prefix = values.get("add_prefix_space")
    prefix = True if prefix is None else bool(prefix)
    scheme = ("always" if values.get("legacy", False) else "first") if prefix else "never"
    made.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = decoders.Sequence([*steps, decoders.Strip(content=" ", left=1)] if prefix else steps)
    return made


def _byte_level_model(vocab, merges):
    return models.BPE(
        vocab=vocab, merges=merges, continuing_subword_prefix="", end_of_word_suffix="", fuse_unk=False
    )  # fmt: skip


def _qwen2(vocab, merges, values):
    made = tokenizers.Tokenizer(_byte_level_model(vocab, merges))
    made.normalizer = normalizers.NFC()
    words = pre_tokenizers.Split(tokenizers.Regex(_QWEN2_WORDS), behavior="isolated", invert=False)
    prefix = bool(values.get("add_prefix_space"))
    letters = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=False)
    made.pre_tokenizer, made.decoder = pre_tokenizers.Sequence([words, letters]), decoders.ByteLevel()
    return made


def _gpt2(vocab, merges, values):
    made = tokenizers.Tokenizer(_byte_level_model(vocab, merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=bool(values.get("add_prefix_space")))
    made.decoder = decoders.ByteLevel()
    return made


_END = "<|endoftext|>"
CLASSES = {
    "LlamaTokenizer": TokenizerClass(
        build=_llama,
        named={"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"},
        differences=_lost_characters,
    ),
    "Qwen2Tokenizer": TokenizerClass(
        build=_qwen2,
        named={"unk_token": _END, "bos_token": None, "eos_token": _END, "pad_token": _END},
        names_again=True,
    ),
    "GPT2Tokenizer": TokenizerClass(
        build=_gpt2, named={"unk_token": _END, "bos_token": _END, "eos_token": _END, "pad_token": None}
    ),
}


def class_name(values: Mapping[str, Any], config: Mapping[str, Any], *, byte_level: bool) -> str:
    """Returns the name of the class that `AutoTokenizer` of transformers 5 chooses, without "Fast" at its end.

    Args:
      values: the values of `tokenizer_config.json`.
      config: the values of `config.json`.
      byte_level: whether "ByteLevel" occurs in `tokenizer.json`.

    Returns:
      A key of `CLASSES`, or any other name.

    Source: `AutoTokenizer.from_pretrained` in transformers/models/auto/tokenization_auto.py.
    """
    model_type: Any = config.get("model_type", "")
    registered = _REGISTERED.get(model_type)
    told = str(values.get("tokenizer_class") or config.get("tokenizer_class") or "").removesuffix("Fast")
    if told == "LlamaTokenizer" and byte_level and model_type not in _MISNAMED:
        return AS_IT_STANDS[0]
    if not told or registered is None or told == registered:
        return told or registered or AS_IT_STANDS[0]
    if registered in AS_IT_STANDS:
        return registered
    return registered if model_type in _MISNAMED else told


def build_backend(
    file: pathlib.Path, content: str, values: Mapping[str, Any], config: Mapping[str, Any]
) -> tuple[tokenizers.Tokenizer, TokenizerClass | None]:
    """Builds the tokenizer of a folder, without the tokens that other files than `tokenizer.json` add.

    Args:
      file: the path of `tokenizer.json`, for messages.
      content: the text of this file.
      values: the values of `tokenizer_config.json`.
      config: the values of `config.json`.

    Returns:
      (the tokenizer, the row of its class). The row is None where `tokenizer.json` is used unchanged.

    Raises:
      ValueError: the file cannot be read, or the class is not known here or does not fit the file.
    """
    try:
        written = tokenizers.Tokenizer.from_str(content)
    except Exception as error:  # The library raises no narrower class.
        raise ValueError(f"{file} cannot be read ({error}): download it again") from None
    name = class_name(values, config, byte_level='"ByteLevel"' in content)
    if name in AS_IT_STANDS:
        return written, None
    way_out = (
        f'write "tokenizer_class": "PreTrainedTokenizerFast" into {file.parent / "tokenizer_config.json"} to read '
        f"tokenizer.json as it stands"
    )
    if name not in CLASSES:
        raise ValueError(
            f"tokenizer_class {name!r} of {file.parent} may change what tokenizer.json says, and is not known here "
            f"(known: {', '.join(CLASSES)}): {way_out}"
        )
    model = json.loads(content)["model"]
    if model.get("type", "BPE") != "BPE" or not isinstance(model.get("vocab"), dict) or "merges" not in model:
        raise ValueError(
            f"tokenizer_class {name!r} is built on a model of type BPE, but {file} holds one of type "
            f"{model.get('type')!r}: {way_out}"
        )
    merges: list[Any] = [
        tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]
    ]
    made = CLASSES[name].build(model["vocab"], merges, values)
    for difference in CLASSES[name].differences(written, made, model):
        logger.warning("tokenizer_class %r %s, as in transformers 5, unlike %s: %s", name, difference, file, way_out)
    return made, CLASSES[name]
