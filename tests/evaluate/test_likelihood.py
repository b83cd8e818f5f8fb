"""Scores of choices against the plain computation: one full pass of transformers per choice."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from mlora_jax.evaluate import ChoiceEvaluator, Scorer
from mlora_jax.evaluate.requests import choice_items
from mlora_jax.models import load_decoder
from tests.tiny import adapted_trees

ROWS = [
    {"prompt": "Where is Nice ?\nType:", "choices": [" place", " number", " a far city"], "label": 0},
    {"prompt": "When ?\nType:", "choices": [" n", " number", " number of them"], "label": 1},
    {"prompt": "What is an atom ? What does it mean ?\nType:", "choices": [" a", " b"], "label": 1},
]


@pytest.fixture(scope="module")
def adapted(checkpoint):
    return adapted_trees(load_decoder(checkpoint), 6, ("q_proj", "down_proj"))


def evaluator_of(adapted, tokenizer, rows=ROWS, **changes):
    graphdef, base, _, profile = adapted
    scorer = Scorer(graphdef, base, profile, **({"max_length": 128, "batch_size": 2, "pad_multiple": 8} | changes))
    return ChoiceEvaluator(scorer, rows, tokenizer, boundary="joint")


def plain_scores(checkpoint, tokenizer, max_length):
    """log p(choice | prompt) by transformers, one choice at a time, the context cut on the left."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    totals = []
    for row in ROWS:
        for choice in row["choices"]:
            context, answer = tokenizer.encode_pair(row["prompt"], choice, boundary="joint")
            tokens = (context + answer)[-(max_length + 1) :]
            with torch.no_grad():
                values = torch.log_softmax(model(torch.tensor([tokens[:-1]])).logits[0], dim=-1)
            totals.append(sum(values[i - 1, tokens[i]].item() for i in range(len(tokens) - len(answer), len(tokens))))
    return np.array(totals)


@pytest.mark.parametrize("max_length", [128, 12])
def test_verdicts_equal_one_pass_per_choice(checkpoint, tokenizer, adapted, max_length):
    expected = plain_scores(checkpoint, tokenizer, max_length)
    starts = np.cumsum([0, *(len(row["choices"]) for row in ROWS)])
    best = [int(np.argmax(expected[i:j])) for i, j in itertools.pairwise(starts)]
    for shift in range(2):  # the labels as the model has them, and all of them wrong
        rows = [row | {"label": (label + shift) % len(row["choices"])} for row, label in zip(ROWS, best, strict=True)]
        evaluator = evaluator_of(adapted, tokenizer, rows, max_length=max_length)
        np.testing.assert_array_equal(evaluator(adapted[2], jnp.zeros(6)), shift == 0)
    assert (evaluator.truncated > 0) == (max_length == 12)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_an_item_that_is_not_finite_is_wrong_and_told(tokenizer, value, caplog):
    """Whichever choice is the right one; the other items count as ever."""
    rows = [{"prompt": "x", "choices": [" a", " b"], "label": label} for label in (0, 1, 0, 1)]
    items = choice_items(rows, tokenizer, boundary="joint")
    values = np.array([value, -1.0, value, value, -0.5, -1.0, -1.0, -0.5])
    assert items.verdicts(values).tolist() == [False, False, True, True]
    assert [record.getMessage() for record in caplog.records] == [
        "2 of 4 items count as wrong: the model's logits for them are not finite"
    ]
    caplog.clear()
    items.verdicts(np.where(np.isfinite(values), values, -1.0))
    assert not caplog.records


def test_an_adapter_that_is_not_finite_scores_nothing(tokenizer, adapted, caplog):
    broken = jax.tree.map(lambda x: x * jnp.nan, adapted[2])
    assert not evaluator_of(adapted, tokenizer)(broken, jnp.ones(6)).any() and len(caplog.records) == 1
    assert "3 of 3 items count as wrong" in caplog.text


def test_unusable_rows(tokenizer, adapted):
    for row in ({"prompt": "x", "choices": [], "label": 0}, {"prompt": "x", "choices": [" a"], "label": 1}):
        with pytest.raises(ValueError, match=f"label {row['label']} for {len(row['choices'])} choices"):
            choice_items([row], tokenizer, boundary="joint")
    with pytest.raises(ValueError, match="row 0: prompt or choice '' has no tokens of its own"):
        choice_items([{"prompt": "x", "choices": ["", " a"], "label": 1}], tokenizer, boundary="joint")
    with pytest.raises(ValueError, match="alone is longer than 2 tokens"):
        evaluator_of(adapted, tokenizer, max_length=2)
