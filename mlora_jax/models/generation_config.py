"""What a checkpoint's `generation_config.json` says of generation: applied, without effect, refused or warned of."""

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
      effect: APPLIED: changes the logits as in transformers. WITHOUT_EFFECT: changes no text of one greedy answer.
        REFUSED: generation raises an error. WARNED: generation logs a warning. SAMPLING: counts only for draws, to
        which it is not applied: a draw is made as its caller asks, and a warning names the field. TOKENS: read by
        `Tokenizer.load`.
      reason: of that, for a message or a reader.
      neutral: values that are as good as an absent field.
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
    """What changes the next token of a checkpoint's answers beside its weights; the default changes nothing.

    Args:
      file: where it is said.
      repetition_penalty: divides positive logits of tokens in the prompt or the answer so far, multiplies others.
      encoder_repetition_penalty: multiplies positive logits of tokens in the prompt, divides others.
      no_repeat_ngram_size: tokens of a run that must not occur twice in prompt and answer; 0: none.
      encoder_no_repeat_ngram_size: tokens of a run of the prompt that must not occur in the answer; 0: none.
      sequence_bias: ((ids, bias), ...): added to the logit of the last id where the ids before it end the text.
      bad_words_ids: sequences of ids that are never completed.
      min_length: no end of text before prompt and answer have so many tokens.
      min_new_tokens: no end of text before so many tokens of the answer.
      forced_bos_token_id: the first token behind a prompt of one token; None: none is forced.
      forced_eos_token_id: ids of which one is the last token of an answer that has all its tokens.
      exponential_decay_length_penalty: (start, factor): beyond `start` tokens of the answer the logits of its end
        grow by |logit| * (factor ** (tokens - start) - 1).
      suppress_tokens: ids that are never made.
      begin_suppress_tokens: ids that do not begin an answer.
      refused: what cannot be applied, a sentence each.
      warnings: what is not applied, a sentence each.
      sampling: settings of draws that are not applied, "name=value" each.
      max_new_tokens: of the file, which takes no effect here; None: the file has none.
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
        """The settings that change logits, by name, without those that change nothing."""
        plain = GenerationSettings()
        return {name: getattr(self, name) for name in READERS if getattr(self, name) != getattr(plain, name)}


def read_generation_settings(folder: str | os.PathLike) -> GenerationSettings:
    """Reads the settings of generation of a Hugging Face folder.

    As in transformers they are those of `generation_config.json`; without this file, those that older versions put into
    `config.json`.

    Args:
      folder: the folder.

    Returns:
      The settings. What cannot be used is in them, for generation to refuse: a model may be scored without it.

    Raises:
      ValueError: a file that is no JSON object.
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
    """The settings in the content of a `generation_config.json`.

    Args:
      values: the parsed JSON object.
      vocab_size: V, above all ids of `bad_words_ids`, `sequence_bias` and forced tokens; None: unknown.
      file: for messages.

    Returns:
      The settings, with what cannot be used in `refused`.
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
        fields.pop("min_length", None)  # as in transformers, where the former overwrites the latter
    suppressed = set(fields.get("suppress_tokens", ()))
    for name in ("forced_bos_token_id", "forced_eos_token_id"):
        forced = fields.get(name)
        forced = {forced} if isinstance(forced, int) else set(forced or ())
        if forced and forced <= suppressed:
            told[REFUSED].append(f"{name} {sorted(forced)} is also in suppress_tokens")
    longest = values.get("max_new_tokens")
    told[WARNED] = [text for text in told[WARNED] if not text.startswith("max_new_tokens=")]  # only the harness tells
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
    """Ids to suppress; transformers takes such as -1 for no token at all."""
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
    biases = {}  # of equal sequences the last counts
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


# Of the fields that are applied -> how the value of the file is read.
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
# Transformers fails on an id beyond the vocabulary in these, and ignores one in others.
_IDS_CHECKED = ("sequence_bias", "bad_words_ids", "forced_bos_token_id", "forced_eos_token_id")
