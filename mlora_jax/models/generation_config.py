"""Reads the `generation_config.json` of a checkpoint. Its settings are applied, have no effect, warn or are refused."""

from __future__ import annotations

import dataclasses
import math
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mlora_jax.models.json_file import read_json_object

GENERATION_FILE, CONFIG_FILE = "generation_config.json", "config.json"
APPLIED, WITHOUT_EFFECT, REFUSED, WARNED, SAMPLING, TOKENS = (
    "applied", "without effect", "refused", "warned", "sampling", "tokens",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Field:
    """One field of transformers' `GenerationConfig`.

    Args:
      effect: one of six. APPLIED: the field changes the logits as in transformers. WITHOUT_EFFECT: the field does not
        change a single greedy answer. REFUSED: generation raises an error. WARNED: generation logs a warning. SAMPLING:
        transformers applies the field to sampled answers only. Here the caller's settings decide how answers are
        sampled, and a warning names the field. TOKENS: `Tokenizer.load` reads the field.
      reason: the reason for this effect, for messages and for readers of this table.
      neutral: the values that mean the same as an absent field.
    """

    effect: str
    reason: str = ""
    neutral: tuple[Any, ...] = (None,)


_BEAMS = Field(WITHOUT_EFFECT, "It counts for beam search only, and num_beams is refused.")
_ASSISTED = Field(WITHOUT_EFFECT, "Assisted generation makes the text of the model alone.")
_OUTPUT = Field(WITHOUT_EFFECT, "It is about what `generate` returns beside the text.")
_CALLER = Field(WITHOUT_EFFECT, "The caller says it, as lm-eval's Hugging Face backend does.")
_COMPUTE = Field(WITHOUT_EFFECT, "It is about time and memory.")
_DRAWS = Field(SAMPLING, neutral=(None, 1.0))
_REMOTE = "it asks for a method of generation that transformers itself takes from the hub"
_CACHES = (None, "dynamic", "static", "offloaded", "offloaded_static", "hybrid", "sliding_window", "paged")

FIELDS: Mapping[str, Field] = {
    "max_length": _CALLER,
    "max_new_tokens": Field(WARNED, "the caller's number of tokens holds"),
    "min_length": Field(APPLIED, "It counts a row's own tokens; transformers counts the padding of its batch too."),
    "min_new_tokens": Field(APPLIED),
    "early_stopping": _BEAMS,
    "max_time": Field(WARNED, "answers have no limit of time"),
    "stop_strings": Field(
        REFUSED, "transformers needs the tokenizer for it, and lm-eval passes none: give stop strings to the command",
        (None, [], ""),
    ),
    "do_sample": _CALLER,
    "num_beams": Field(REFUSED, "there is no beam search", (None, 1)),
    "use_mtp": _ASSISTED,
    "use_cache": _COMPUTE,
    "cache_implementation": Field(WARNED, "the cache holds keys and values in the compute dtype", _CACHES),
    "cache_config": Field(WITHOUT_EFFECT, "It counts for a quantised cache only."),
    "max_cache_len": _COMPUTE,
    "temperature": _DRAWS,
    "top_k": Field(SAMPLING, neutral=(None, 0)),
    "top_p": _DRAWS,
    "min_p": Field(SAMPLING, neutral=(None, 0, 0.0)),
    "top_h": Field(SAMPLING),
    "typical_p": _DRAWS,
    "epsilon_cutoff": Field(SAMPLING, neutral=(None, 0.0)),
    "eta_cutoff": Field(SAMPLING, neutral=(None, 0.0)),
    "repetition_penalty": Field(APPLIED),
    "encoder_repetition_penalty": Field(APPLIED, "transformers takes the prompt for the encoder's input."),
    "length_penalty": _BEAMS,
    "no_repeat_ngram_size": Field(APPLIED),
    "bad_words_ids": Field(APPLIED),
    "renormalize_logits": Field(WITHOUT_EFFECT, "It moves all logits of a row alike."),
    "forced_bos_token_id": Field(APPLIED, "It counts behind a prompt of a single token."),
    "forced_eos_token_id": Field(APPLIED),
    "remove_invalid_values": Field(WITHOUT_EFFECT, "Logits that are not finite end an answer; a warning counts it."),
    "exponential_decay_length_penalty": Field(APPLIED),
    "suppress_tokens": Field(APPLIED),
    "begin_suppress_tokens": Field(APPLIED),
    "sequence_bias": Field(APPLIED),
    "token_healing": Field(REFUSED, "the last tokens of a prompt are not replaced", (None, False)),
    "guidance_scale": Field(REFUSED, "there is no classifier-free guidance", (None, 1, 1.0)),
    "watermarking_config": Field(REFUSED, "texts get no watermark"),
    "num_return_sequences": Field(REFUSED, "a prompt has one answer", (None, 1)),
    "output_attentions": _OUTPUT,
    "output_hidden_states": _OUTPUT,
    "output_scores": _OUTPUT,
    "output_logits": _OUTPUT,
    "return_dict_in_generate": _OUTPUT,
    "pad_token_id": Field(TOKENS),
    "bos_token_id": Field(TOKENS),
    "eos_token_id": Field(TOKENS),
    "encoder_no_repeat_ngram_size": Field(APPLIED, "transformers takes the prompt for the encoder's input."),
    "decoder_start_token_id": Field(WITHOUT_EFFECT, "It counts for models with an encoder only."),
    "is_assistant": _ASSISTED,
    "num_assistant_tokens": _ASSISTED,
    "num_assistant_tokens_schedule": _ASSISTED,
    "assistant_confidence_threshold": _ASSISTED,
    "prompt_lookup_num_tokens": _ASSISTED,
    "max_matching_ngram_size": _ASSISTED,
    "assistant_early_exit": _ASSISTED,
    "assistant_lookbehind": _ASSISTED,
    "target_lookbehind": _ASSISTED,
    "assistant_ensemble_weight": Field(WITHOUT_EFFECT, "It counts beside an assistant model, which no file names."),
    "speculation_type": _ASSISTED,
    "compile_config": _COMPUTE,
    "disable_compile": _COMPUTE,
    "continuous_batching_config": _COMPUTE,
    "low_memory": _COMPUTE,
    "penalty_alpha": Field(REFUSED, _REMOTE, (None, 0, 0.0)),
    "dola_layers": Field(REFUSED, _REMOTE),
    "diversity_penalty": _BEAMS,
    "num_beam_groups": _BEAMS,
    "constraints": Field(REFUSED, _REMOTE),
    "force_words_ids": Field(REFUSED, _REMOTE),
    "prefill_chunk_size": _COMPUTE,
    "_from_model_config": Field(WITHOUT_EFFECT, "It says how the file was made."),
    "transformers_version": Field(WITHOUT_EFFECT, "It says how the file was made."),
}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """The settings of a checkpoint that change the next token of its answers. The defaults change nothing.

    Args:
      file: the file that holds the settings.
      repetition_penalty: for tokens in the prompt or in the answer so far, it divides positive logits and multiplies
        other logits.
      encoder_repetition_penalty: for tokens in the prompt, it multiplies positive logits and divides other logits.
      no_repeat_ngram_size: no run of this many tokens occurs twice in prompt and answer; 0: runs may repeat.
      encoder_no_repeat_ngram_size: no run of this many tokens of the prompt occurs in the answer; 0: runs may repeat.
      sequence_bias: ((ids, bias), ...). The bias is added to the logit of the last id where the text ends with the ids
        before it.
      bad_words_ids: the sequences of ids that are never completed.
      min_length: no text ends before prompt and answer together have this many tokens.
      min_new_tokens: no text ends before the answer has this many tokens.
      forced_bos_token_id: the first token after a prompt of one token; None: no token is forced.
      forced_eos_token_id: the ids one of which is the last token of an answer that reaches its largest length.
      exponential_decay_length_penalty: (start, factor). Beyond `start` tokens of the answer, the logits of tokens that
        end it grow by |logit| * (factor ** (tokens - start) - 1).
      suppress_tokens: the ids that are never generated.
      begin_suppress_tokens: the ids that never begin an answer.
      refused: one sentence for each setting that cannot be applied.
      warnings: one sentence for each setting that is not applied.
      sampling: "name=value" for each setting of sampling that is not applied.
      max_new_tokens: the value in the file, which has no effect here; None: the file has none.
    """

    file: str = ""
    repetition_penalty: float = 1.0
    encoder_repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    encoder_no_repeat_ngram_size: int = 0
    sequence_bias: tuple[tuple[tuple[int, ...], float], ...] = ()
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    min_length: int = 0
    min_new_tokens: int = 0
    forced_bos_token_id: int | None = None
    forced_eos_token_id: tuple[int, ...] = ()
    exponential_decay_length_penalty: tuple[int, float] | None = None
    suppress_tokens: tuple[int, ...] = ()
    begin_suppress_tokens: tuple[int, ...] = ()
    refused: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    sampling: tuple[str, ...] = ()
    max_new_tokens: int | None = None

    def check(self) -> None:
        """Raises a ValueError that names every setting which generation would have to ignore."""
        if self.refused:
            raise ValueError(
                f"{self.file}: {'; '.join(self.refused)}. Remove this from the file to generate without it"
            )

    def applied(self) -> dict[str, Any]:
        """Returns, by name, the settings that change logits and differ from their defaults."""
        plain = GenerationSettings()
        return {name: getattr(self, name) for name in READERS if getattr(self, name) != getattr(plain, name)}


def read_generation_settings(folder: str | os.PathLike) -> GenerationSettings:
    """Reads the generation settings of a Hugging Face folder.

    As in transformers, they come from `generation_config.json`. Without this file they come from `config.json`, into
    which older versions wrote them.

    Args:
      folder: the folder.

    Returns:
      The settings. They also hold what cannot be applied, so that generation can refuse it while scoring goes on.

    Raises:
      ValueError: a file is not a JSON object.
    """
    folder = pathlib.Path(folder)
    config = read_json_object(folder / CONFIG_FILE) if (folder / CONFIG_FILE).is_file() else {}
    file = folder / GENERATION_FILE
    own = file.is_file()
    values = read_json_object(file) if own else {key: value for key, value in config.items() if key in FIELDS}
    return generation_settings(
        values, vocab_size=config.get("vocab_size"), file=str(file if own else folder / CONFIG_FILE)
    )


def generation_settings(values: Mapping[str, Any], *, vocab_size: int | None, file: str) -> GenerationSettings:
    """Reads the settings from the content of a `generation_config.json`.

    Args:
      values: the parsed JSON object.
      vocab_size: V. The ids of `bad_words_ids`, `sequence_bias` and forced tokens must be below it; None: V is unknown.
      file: the file that messages name.

    Returns:
      The settings. Those that cannot be applied are in `refused`.
    """
    fields: dict[str, Any] = {}
    told: dict[str, list[str]] = {REFUSED: [], WARNED: [], SAMPLING: []}
    for name, value in values.items():
        field = FIELDS.get(name, Field(WARNED, "it is no field that transformers or this program knows"))
        if any(value == neutral and isinstance(value, bool) == isinstance(neutral, bool) for neutral in field.neutral):
            continue
        if field.effect == APPLIED:
            try:
                fields[name] = READERS[name](value)
                _check_ids(fields[name] if name in _IDS_CHECKED else (), vocab_size)
            except (TypeError, ValueError, LookupError, AttributeError) as error:
                fields.pop(name, None)
                told[REFUSED].append(f"{name} {value!r} cannot be applied ({error})")
        elif field.effect in told:
            shown = f"{name}={value!r}"
            told[field.effect].append(
                {REFUSED: f"{shown} is not supported ({field.reason})",
                 WARNED: f"{shown} is not applied: {field.reason}",
                 SAMPLING: shown}[field.effect]
            )  # fmt: skip
    if "min_new_tokens" in fields:
        fields.pop("min_length", None)  # as in transformers, where min_new_tokens overwrites min_length
    suppressed = set(fields.get("suppress_tokens", ()))
    for name in ("forced_bos_token_id", "forced_eos_token_id"):
        forced = fields.get(name)
        forced = {forced} if isinstance(forced, int) else set(forced or ())
        if forced and forced <= suppressed:
            told[REFUSED].append(f"{name} {sorted(forced)} is also in suppress_tokens")
    longest = values.get("max_new_tokens")
    # Only the harness reports max_new_tokens.
    told[WARNED] = [text for text in told[WARNED] if not text.startswith("max_new_tokens=")]
    return GenerationSettings(
        file=file,
        refused=tuple(told[REFUSED]),
        warnings=tuple(told[WARNED]),
        sampling=tuple(told[SAMPLING]),
        max_new_tokens=longest if isinstance(longest, int) else None,
        **fields,
    )


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError("it must be an integer of at least 0")
    return value


def _positive(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError("it must be a positive number")
    return float(value)


def _ids(value: Any) -> tuple[int, ...]:
    value = [value] if isinstance(value, int) else value
    if not isinstance(value, list):
        raise ValueError("it must be a list of token ids")
    return tuple(_count(id) for id in value)


def _suppressed(value: Any) -> tuple[int, ...]:
    """Reads the ids to suppress. As in transformers, negative ids such as -1 stand for no token."""
    if not isinstance(value, list) or any(isinstance(id, bool) or not isinstance(id, int) for id in value):
        raise ValueError("it must be a list of token ids")
    return tuple(id for id in value if id >= 0)


def _sequences(value: Any) -> tuple[tuple[int, ...], ...]:
    if not isinstance(value, list) or not value or not all(isinstance(ids, list) and ids for ids in value):
        raise ValueError("it must be a list of lists of token ids, none of them empty")
    return tuple(_ids(ids) for ids in value)


def _biases(value: Any) -> tuple[tuple[tuple[int, ...], float], ...]:
    form = ValueError("it must be a list of pairs [[token id, ...], bias]")
    if not isinstance(value, list) or not value or not all(isinstance(x, list) and len(x) == 2 for x in value):
        raise form
    biases = {}  # where sequences are equal, the last one counts
    for sequence, bias in value:
        if not isinstance(sequence, list) or not sequence or not isinstance(bias, float) or math.isnan(bias):
            raise form
        biases[_ids(sequence)] = bias
    return tuple(biases.items())


def _decay(value: Any) -> tuple[int, float]:
    if not isinstance(value, list) or len(value) != 2:
        raise ValueError("it must be [start, factor]")
    return _count(value[0]), _positive(value[1])


def _check_ids(ids: Any, vocab_size: int | None) -> None:
    if isinstance(ids, Sequence):
        for each in ids:
            _check_ids(each, vocab_size)
    elif isinstance(ids, int) and vocab_size is not None and ids >= vocab_size:
        raise ValueError(f"token id {ids} is not below the vocabulary's size {vocab_size}")


# Field that is applied -> the function that reads its value in the file.
READERS: Mapping[str, Callable[[Any], Any]] = {
    "sequence_bias": _biases,
    "encoder_repetition_penalty": _positive,
    "repetition_penalty": _positive,
    "no_repeat_ngram_size": _count,
    "encoder_no_repeat_ngram_size": _count,
    "bad_words_ids": _sequences,
    "min_length": _count,
    "min_new_tokens": _count,
    "forced_bos_token_id": _count,
    "forced_eos_token_id": _ids,
    "exponential_decay_length_penalty": _decay,
    "suppress_tokens": _suppressed,
    "begin_suppress_tokens": _suppressed,
}
# transformers fails on ids beyond the vocabulary in these fields, and ignores such ids in others.
_IDS_CHECKED = ("sequence_bias", "bad_words_ids", "forced_bos_token_id", "forced_eos_token_id")
