"""Which token stands before, ends and stops a text: the harness's Hugging Face backend on checkpoints that disagree."""

import json
import math

import pytest
from lm_eval.models.huggingface import HFLM

from mlora_jax.evaluate.language_model import NestedLM
from tests.evaluate.requests import instances
from tests.oracles.torch_generate import one_thread
from tests.tiny import write_checkpoint

CONTEXTS = ("Who was Galileo ?", "</s>Who was", "<s>How far", "a")
TEXTS = ("How far is it from Denver to Aspen ?", "</s>Galileo", "<s>Galileo", "x" * 140)
BOS_FREE = {"bos_token": None}
# What is written over tokenizer_config.json, config.json and generation_config.json (None: no file), and whether the
# post-processor stays; the tokenizer's BOS and EOS are <s> and </s>, 1 and 2.
FILES = {
    "as trained": ({}, {}, None, True),
    "BOS in config.json only": (BOS_FREE, {"bos_token_id": 1}, {"bos_token_id": 1, "eos_token_id": 2}, False),
    "no BOS, but one put before texts": (BOS_FREE, {"bos_token_id": 3}, None, True),
    "others": (
        {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"},
        {"bos_token_id": 1},
        {"eos_token_id": 2},
        True,
    ),
    "stops of generation_config.json": ({}, {"eos_token_id": [2, 80]}, {"eos_token_id": [60, 70]}, True),
    "generation_config.json without stops": ({}, {"eos_token_id": list(range(40, 300))}, {"top_k": 50}, True),
    "stops of config.json": ({}, {"eos_token_id": [2, *range(40, 90)]}, None, True),
    "added token": ({"additional_special_tokens": ["Who"], "pad_token": "</s>"}, {"pad_token_id": 0}, None, True),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("model"), vocab_size=332)


@pytest.fixture(scope="module")
def scorer(plain):
    return NestedLM.load(checkpoint=str(plain), batch_size=4).scorer


def change(file, values):
    file.write_text(json.dumps((json.loads(file.read_text()) if file.is_file() else {}) | values))


@pytest.fixture(scope="module", params=FILES)
def models(request, plain, scorer, tmp_path_factory):
    """(ours, the Hugging Face backend) on the same folder."""
    settings, config, generation, opens = FILES[request.param]
    folder = tmp_path_factory.mktemp("files")
    for file in plain.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    change(folder / "tokenizer_config.json", settings)
    change(folder / "config.json", config)
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    if not opens:
        change(folder / "tokenizer.json", {"post_processor": None})
    with one_thread():
        theirs = HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=1)
        ours = NestedLM.load(checkpoint=str(folder), batch_size=4)
        ours.scorer = scorer  # compiled once: the weights are the same
        yield request.param, ours, theirs


def test_the_tokens(models):
    name, ours, theirs = models
    assert (ours.prefix_token_id, ours.eot_token_id) == (theirs.prefix_token_id, theirs.eot_token_id)
    prefixes = {"BOS in config.json only": 2, "no BOS, but one put before texts": 2, "others": 3}
    assert ours.prefix_token_id == prefixes.get(name, 1)
    for text in (*CONTEXTS, *TEXTS, "", " </s>x", "<|im_start|>x"):
        for special in (None, False, True):
            assert ours.tok_encode(text, special) == theirs.tok_encode(text, special), (text, special)


def test_log_likelihoods(models):
    _, ours, theirs = models
    pairs = [(context, rest) for context in ("", *CONTEXTS) for rest in (" king", "</s>x", "<s>x")]
    requests = instances("loglikelihood", pairs)
    expected = theirs.loglikelihood(requests, disable_tqdm=True)
    for (value, greedy), (other, likeliest) in zip(ours.loglikelihood(requests, True), expected, strict=True):
        assert value == pytest.approx(other, rel=1e-5, abs=1e-4) and greedy == likeliest


def test_rolling_log_likelihoods(models):
    _, ours, theirs = models
    requests = instances("loglikelihood_rolling", [(text,) for text in TEXTS])
    expected = theirs.loglikelihood_rolling(requests, disable_tqdm=True)
    assert ours.loglikelihood_rolling(requests) == pytest.approx(expected, rel=1e-5, abs=1e-3)


def test_generated_texts(models):
    _, ours, theirs = models
    requests = instances("generate_until", [(text, {"max_gen_toks": 16}) for text in CONTEXTS])
    assert ours.generate_until(requests) == theirs.generate_until(requests, disable_tqdm=True)


def test_the_prefix_makes_a_difference(plain, tmp_path):
    """So that the equalities above say something."""
    found = []
    for values in ({}, BOS_FREE):
        for file in plain.iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        change(tmp_path / "tokenizer_config.json", values)
        change(tmp_path / "tokenizer.json", {"post_processor": None})
        found += NestedLM.load(checkpoint=str(tmp_path)).loglikelihood_rolling(
            instances("loglikelihood_rolling", [(TEXTS[0],)])
        )
    assert not math.isclose(*found, rel_tol=1e-3)


def test_a_token_that_the_model_lacks_is_refused(plain, tmp_path):
    """An additional token that the vocabulary lacks gets an id of its own, which has no embedding."""
    for file in plain.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    change(tmp_path / "tokenizer_config.json", {"additional_special_tokens": ["<1>", "<2>", "<3>"]})
    ours = NestedLM.load(checkpoint=str(tmp_path))
    assert ours.tok_encode("<2>") == [1, 331]
    with pytest.raises(ValueError, match=r"the text 'a <3> b' holds the token '<3>' of id 332, .* ids below 332 only"):
        ours.loglikelihood(instances("loglikelihood", [("a <3>", " b")]))
