"""Scores of choices against the plain computation: one full pass of transformers per choice."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from mlora_jax.adapt import adapt, split
from mlora_jax.core import RankHierarchy
from mlora_jax.evaluate import ChoiceEvaluator, prepare_choices
from mlora_jax.models import Tokenizer, load_decoder
from tests.tiny import write_checkpoint

ROWS = [
    {"prompt": "Where is Nice ?\nType:", "choices": [" place", " number", " a far city"], "label": 0},
    {"prompt": "When ?\nType:", "choices": [" n", " number", " number of them"], "label": 1},
    {"prompt": "What is an atom ? What does it mean ?\nType:", "choices": [" a", " b"], "label": 1},
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def tokenizer(checkpoint):
    return Tokenizer.load(checkpoint)


@pytest.fixture(scope="module")
def adapted(checkpoint):
    model = adapt(load_decoder(checkpoint), 6, ("q_proj", "down_proj"), key=jax.random.key(0))
    model.eval()
    return split(model)


def prepare(tokenizer, **changes):
    options = {"seam": "joint", "max_length": 128, "batch_size": 2, "pad_multiple": 8}
    return prepare_choices(ROWS, tokenizer, **(options | changes))


def scores(adapted, requests, p):
    graphdef, base, adapter, profile = adapted
    evaluator = ChoiceEvaluator(graphdef, base, profile, requests)
    values = [np.asarray(evaluator.compiled(base, adapter, p, batch)) for batch in requests.batches]
    return requests.choice_log_likelihoods(values), evaluator(adapter, p), evaluator


def plain_scores(checkpoint, tokenizer, max_length):
    """log p(choice | prompt) by transformers, one choice at a time, the context cut on the left."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    totals = []
    for row in ROWS:
        for choice in row["choices"]:
            context, answer = tokenizer.encode_pair(row["prompt"], choice, seam="joint")
            tokens = (context + answer)[-(max_length + 1) :]
            with torch.no_grad():
                values = torch.log_softmax(model(torch.tensor([tokens[:-1]])).logits[0], dim=-1)
            totals.append(sum(values[i - 1, tokens[i]].item() for i in range(len(tokens) - len(answer), len(tokens))))
    return np.array(totals)


@pytest.mark.parametrize("max_length", [128, 12])
def test_scores_equal_one_pass_per_choice(checkpoint, tokenizer, adapted, max_length):
    requests = prepare(tokenizer, max_length=max_length)
    expected = plain_scores(checkpoint, tokenizer, max_length)
    found, verdicts, _ = scores(adapted, requests, jnp.zeros(6))
    np.testing.assert_allclose(found, expected, atol=1e-4)
    starts = np.cumsum([0, *(len(row["choices"]) for row in ROWS)])
    best = [np.argmax(expected[i:j]) for i, j in itertools.pairwise(starts)]
    np.testing.assert_array_equal(verdicts, np.array(best) == [row["label"] for row in ROWS])
    assert (requests.truncated > 0) == (max_length == 12)


def test_a_choice_that_begins_another_needs_no_row_of_its_own(tokenizer):
    requests = prepare(tokenizer)
    rows = sum(int(np.any(batch["tokens"], axis=1).sum()) for batch in requests.batches)
    assert rows < sum(len(row["choices"]) for row in ROWS)
    asked = sum(int(batch["weights"].sum()) for batch in requests.batches)
    lengths = [len(tokenizer.encode_pair(r["prompt"], c, seam="joint")[1]) for r in ROWS for c in r["choices"]]
    assert asked == sum(lengths)


def test_one_executable_for_every_rank_and_read_out(tokenizer, adapted):
    requests = prepare(tokenizer, pad_multiple=64)
    _, base, adapter, profile = adapted
    evaluator = ChoiceEvaluator(adapted[0], base, profile, requests)
    batch = jax.device_put(requests.batches[0])
    adapter = jax.tree.map(lambda x: x + 0.1, adapter)
    seen = set()
    for scaling in ("none", "rank"):
        hierarchy = RankHierarchy((1, 2, 4, 6), scaling)
        for rank in range(7):
            for readout in (hierarchy.prefix, hierarchy.nested, hierarchy.masked):
                values = evaluator.compiled(base, adapter, readout(rank), batch)
                seen.add(float(jnp.sum(values)))
    assert evaluator.compiled._cache_size() == 1
    assert len(seen) > 15


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_an_item_that_is_not_finite_is_wrong_and_told(tokenizer, value, caplog):
    """Whichever choice is the right one; the other items count as ever."""
    rows = [{"prompt": "x", "choices": [" a", " b"], "label": label} for label in (0, 1, 0, 1)]
    requests = prepare_choices(rows, tokenizer, seam="joint", max_length=9, batch_size=4, pad_multiple=8)
    (batch,), (owner,) = requests.batches, requests.owners
    values = np.full(batch["targets"].shape, -1.0)
    for row, column, flat in owner:
        values[row, column] = {0: value, 2: value, 3: value, 4: -0.5, 7: -0.5}.get(flat, -1.0)
    assert requests.verdicts([values]).tolist() == [False, False, True, True]
    assert [record.getMessage() for record in caplog.records] == [
        "2 of 4 items count as wrong: the model's logits for them are not finite"
    ]
    caplog.clear()
    requests.verdicts([np.where(np.isfinite(values), values, -1.0)])
    assert not caplog.records


def test_an_adapter_that_is_not_finite_scores_nothing(tokenizer, adapted, caplog):
    graphdef, base, adapter, profile = adapted
    evaluator = ChoiceEvaluator(graphdef, base, profile, prepare(tokenizer))
    broken = jax.tree.map(lambda x: x * jnp.nan, adapter)
    assert not evaluator(broken, jnp.ones(6)).any() and len(caplog.records) == 1
    assert "3 of 3 items count as wrong" in caplog.text


def test_unusable_rows(tokenizer):
    for row in ({"prompt": "x", "choices": [], "label": 0}, {"prompt": "x", "choices": [" a"], "label": 1}):
        with pytest.raises(ValueError, match=f"label {row['label']} for {len(row['choices'])} choices"):
            prepare_choices([row], tokenizer, seam="joint", max_length=9, batch_size=2, pad_multiple=8)
    with pytest.raises(ValueError, match="row 0: prompt or choice '' has no tokens of its own"):
        rows = [{"prompt": "x", "choices": ["", " a"], "label": 1}]
        prepare_choices(rows, tokenizer, seam="joint", max_length=9, batch_size=2, pad_multiple=8)
    with pytest.raises(ValueError, match="alone is longer than 2 tokens"):
        prepare(tokenizer, max_length=2)
