"""Accuracy on the tokens of answers against the plain computation: one full pass of transformers per row."""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from mlora_jax.evaluate import RankCurve, Scorer, TokenEvaluator
from mlora_jax.models import load_decoder
from tests.tiny import adapted_trees

ROWS = [
    {"prompt": "### Response:\n", "answer": "Good day to you, how far is it?", "choices": []},
    {"prompt": "Hello there", "answer": " 48/2 = 24 clips", "choices": []},
    {"prompt": "### User:\nHello there\n\n### Assistant:\n", "answer": "Good day", "choices": []},
]


@pytest.fixture(scope="module")
def adapted(checkpoint):
    return adapted_trees(load_decoder(checkpoint), 4, ("q_proj",))


def evaluator_of(adapted, tokenizer, rows=ROWS, max_length=128):
    graphdef, base, _, profile = adapted
    scorer = Scorer(graphdef, base, profile, max_length=max_length, batch_size=2, pad_multiple=8)
    return TokenEvaluator(scorer, rows, tokenizer, boundary="separate")


@functools.cache
def reference(checkpoint):
    return AutoModelForCausalLM.from_pretrained(checkpoint)


def likeliest(checkpoint, tokens):
    """The likeliest next token at every position, by transformers."""
    with torch.no_grad():
        return reference(checkpoint)(torch.tensor([tokens])).logits[0].argmax(-1).tolist()


def pieces(tokenizer, row):
    """Prompt and answer with its end, put together here."""
    prompt = tokenizer.encode(row["prompt"], bos=True)
    return prompt, [*tokenizer.encode(row["answer"], bos=False), tokenizer.eos_id]


def expected_of(checkpoint, tokenizer, rows, max_length):
    """Verdicts of all answer tokens, and how many rows are cut."""
    expected, cut = [], 0
    for row in rows:
        prompt, answer = pieces(tokenizer, row)
        tokens = (prompt + answer)[:max_length]
        found = likeliest(checkpoint, tokens)
        expected += [found[at - 1] == tokens[at] for at in range(len(prompt), len(tokens))]
        cut += len(prompt) + len(answer) > max_length
    return expected, cut


@pytest.mark.parametrize("max_length", [128, 20])
def test_verdicts_are_those_of_one_pass_a_row(checkpoint, tokenizer, adapted, max_length):
    expected, cut = expected_of(checkpoint, tokenizer, ROWS, max_length)
    evaluator = evaluator_of(adapted, tokenizer, max_length=max_length)
    verdicts = evaluator(adapted[2], jnp.zeros(4))
    assert verdicts.tolist() == expected
    assert evaluator.truncated == cut and (cut > 0) == (max_length == 20)


def test_likeliest_tokens_are_right(checkpoint, tokenizer, adapted):
    """Answers that are the likeliest token behind their prompt, where that is text."""
    rows = []
    for word in "how far is it from Denver to Aspen one long string of cliches".split():
        text = tokenizer.decode(likeliest(checkpoint, tokenizer.encode(word, bos=True))[-1:])
        rows += [{"prompt": word, "answer": answer, "choices": []} for answer in (text, "Question") if answer.strip()]
    expected, _ = expected_of(checkpoint, tokenizer, rows, 128)
    verdicts = evaluator_of(adapted, tokenizer, rows)(adapted[2], jnp.zeros(4))
    assert verdicts.tolist() == expected and any(expected)


def test_a_curve_takes_the_verdicts(tokenizer, adapted):
    evaluator = evaluator_of(adapted, tokenizer)
    verdicts = [evaluator(adapted[2], jnp.zeros(4).at[:rank].set(1.0)) for rank in (1, 4)]
    curve = RankCurve.of("prefix", (1, 4), verdicts)
    assert curve.items == len(verdicts[0]) and evaluator.compilations == 1 and len(evaluator) >= 1
    assert curve.accuracies[0] == pytest.approx(np.mean(verdicts[0]))


def test_tokens_that_are_not_finite_are_wrong_and_told(tokenizer, adapted, caplog):
    graphdef, base, adapter, profile = adapted
    broken = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), adapter)
    with caplog.at_level(logging.WARNING):
        verdicts = evaluator_of((graphdef, base, broken, profile), tokenizer)(broken, jnp.ones(4))
    assert not verdicts.any() and "logits for them are not finite" in caplog.text
