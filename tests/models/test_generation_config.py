"""Every field of transformers' GenerationConfig has a row, and files are read as there."""

import json

import pytest
from transformers import GenerationConfig

from mlora_jax.evaluate.logit_rules import RULES
from mlora_jax.models.generation_config import (
    APPLIED,
    FIELDS,
    READERS,
    REFUSED,
    SAMPLING,
    WARNED,
    GenerationSettings,
    generation_settings,
    read_generation_settings,
)

# A value of every field that is not without effect, other than its neutral ones.
TELLING = {
    "max_new_tokens": 9, "min_length": 7, "min_new_tokens": 4, "max_time": 1.5, "stop_strings": ["a"], "num_beams": 3,
    "cache_implementation": "quantized", "temperature": 0.6, "top_k": 50, "top_p": 0.9, "min_p": 0.1, "top_h": 0.4,
    "typical_p": 0.9, "epsilon_cutoff": 1e-3, "eta_cutoff": 1e-3, "repetition_penalty": 1.3,
    "encoder_repetition_penalty": 1.2, "no_repeat_ngram_size": 3, "bad_words_ids": [[3], [4, 5]],
    "forced_bos_token_id": 3, "forced_eos_token_id": [2, 5], "exponential_decay_length_penalty": [2, 1.1],
    "suppress_tokens": [4, 99], "begin_suppress_tokens": [5], "sequence_bias": [[[3, 4], 1.5]], "token_healing": True,
    "guidance_scale": 2.0, "watermarking_config": {"bias": 2.0}, "num_return_sequences": 2,
    "encoder_no_repeat_ngram_size": 2, "penalty_alpha": 0.6, "dola_layers": "low", "constraints": [1],
    "force_words_ids": [[3]],
}  # fmt: skip


def settings_of(values, vocab_size=16):
    return generation_settings(values, vocab_size=vocab_size, file="generation_config.json")


def test_every_field_of_transformers_has_a_row():
    """A field that a new version of transformers adds has to be settled."""
    assert set(GenerationConfig().to_dict()) | set(GenerationConfig._get_default_generation_params()) == set(FIELDS)


def test_every_row_is_what_it_says():
    assert {name for name, field in FIELDS.items() if field.effect == APPLIED} == set(READERS)
    assert {*RULES, "begin_suppress_tokens"} == set(READERS)
    assert set(TELLING) == {name for name, row in FIELDS.items() if row.effect in (APPLIED, REFUSED, WARNED, SAMPLING)}
    for name, value in TELLING.items():
        found, effect = settings_of({name: value}), FIELDS[name].effect
        assert (name in found.applied()) == (effect == APPLIED), name
        assert [name in text for text in found.refused] == [True] * (effect == REFUSED), name
        assert [text.startswith(name) for text in found.sampling] == [True] * (effect == SAMPLING), name
        if effect == WARNED and name != "max_new_tokens":
            assert len(found.warnings) == 1 and name in found.warnings[0]
    assert settings_of({"max_new_tokens": 9}).max_new_tokens == 9


@pytest.mark.parametrize("name", FIELDS)
def test_the_defaults_of_transformers_change_nothing(name):
    """Neither null, nor what `generate` takes where nothing is said, except for draws from the likeliest 50."""
    for value in (None, GenerationConfig._get_default_generation_params().get(name)):
        found = settings_of({name: value})
        assert found == GenerationSettings(file=found.file) or (name, value) == ("top_k", 50)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"repetition_penalty": 0.0}, r"repetition_penalty 0.0 cannot be applied \(it must be a positive number\)"),
        ({"repetition_penalty": "1.2"}, "repetition_penalty '1.2' cannot be applied"),
        ({"no_repeat_ngram_size": True}, "no_repeat_ngram_size True cannot be applied .*integer of at least 0"),
        ({"min_new_tokens": -1}, "min_new_tokens -1 cannot be applied"),
        ({"bad_words_ids": [3]}, r"bad_words_ids \[3\] cannot be applied .*list of lists"),
        ({"bad_words_ids": [[16]]}, "token id 16 is not below the vocabulary's size 16"),
        ({"sequence_bias": [[[3], 1]]}, r"sequence_bias .* pairs \[\[token id, ...\], bias\]"),
        ({"sequence_bias": [[[-3], 1.0]]}, "sequence_bias .*integer of at least 0"),
        ({"suppress_tokens": "3"}, "suppress_tokens '3' cannot be applied .*list of token ids"),
        ({"exponential_decay_length_penalty": [3]}, r"it must be \[start, factor\]"),
        ({"forced_eos_token_id": [2], "suppress_tokens": [2, 3]}, r"forced_eos_token_id \[2\] is also in suppress_tok"),
        ({"num_beams": 4}, r"^g.*json: num_beams=4 is not supported \(there is no beam search\). Remove this from"),
        ({"num_beams": 4, "guidance_scale": 1.5}, "num_beams=4 .*; guidance_scale=1.5 is not supported"),
    ],
)
def test_what_cannot_be_applied_is_refused_by_name(values, message):
    with pytest.raises(ValueError, match=message):
        settings_of(values).check()


def test_an_unknown_field_is_named_and_tokens_that_are_none_are_dropped():
    assert "chat_format='x' is not applied" in settings_of({"chat_format": "x"}).warnings[0]
    assert settings_of({"suppress_tokens": [-1, 3]}).suppress_tokens == (3,)
    both = settings_of({"min_new_tokens": 3, "min_length": 9})
    assert (both.min_new_tokens, both.min_length) == (3, 0)


def test_the_older_place_counts_only_without_the_newer(tmp_path):
    """As `AutoModelForCausalLM.from_pretrained(folder).generation_config`, see test_generation_settings.py."""
    assert read_generation_settings(tmp_path) == GenerationSettings(file=str(tmp_path / "config.json"))
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 8, "rope_theta": 5.0, "repetition_penalty": 1.5}))
    assert read_generation_settings(tmp_path).applied() == {"repetition_penalty": 1.5}
    assert not read_generation_settings(tmp_path).warnings
    (tmp_path / "generation_config.json").write_text("{}")
    assert not read_generation_settings(tmp_path).applied()
