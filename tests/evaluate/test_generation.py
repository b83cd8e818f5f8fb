"""Greedy answers against `transformers.generate`, at several ranks of one adapter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from mlora_jax.adapt import adapt, split
from mlora_jax.core import RankHierarchy
from mlora_jax.data.tasks import Style, Task
from mlora_jax.evaluate import GenerationEvaluator, extract_answer
from mlora_jax.evaluate.generation import NOT_FINITE, greedy_decode
from mlora_jax.models import Tokenizer, load_decoder
from tests.tiny import write_checkpoint

ROWS = [{"prompt": p, "answer": "7", "choices": [], "label": -1} for p in ("How far ?", "a", "Natalia sold 48/2 =")]
NEW = 12


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("model"), tie_word_embeddings=False)


@pytest.fixture(scope="module")
def adapted(checkpoint):
    model = adapt(load_decoder(checkpoint), 6, ("q_proj", "down_proj"), key=jax.random.key(0))
    model.eval()
    graphdef, base, adapter, profile = split(model)
    keys = iter(jax.random.split(jax.random.key(1), 20))
    adapter = jax.tree.map(lambda x: 0.4 * jax.random.normal(next(keys), x.shape), adapter)
    return graphdef, base, adapter, profile


def evaluator(checkpoint, adapted, *, stop=(2,), task=None, rows=ROWS, **changes):
    graphdef, base, _, profile = adapted
    task = task or Task(name="own", styles={"default": Style(prompt="")}, metric="exact_match")
    options = {"max_length": 64, "max_new_tokens": NEW, "batch_size": 2, "pad_multiple": 8} | changes
    tokenizer = Tokenizer.load(checkpoint)
    return GenerationEvaluator(
        graphdef, base, profile, rows, tokenizer, seam="separate", task=task, stop=stop, **options
    )


def transformers_texts(checkpoint, adapter, p, stop):
    """A diag(p) B added to the weights in PyTorch, one prompt at a time."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(checkpoint), Tokenizer.load(checkpoint)
    for block, name in (("self_attn", "q_proj"), ("mlp", "down_proj")):
        pair = adapter["layers"][block][name]
        for index, layer in enumerate(model.model.layers):
            delta = np.asarray(pair["a"][index]) * np.asarray(p) @ np.asarray(pair["b"][index])
            with torch.no_grad():
                getattr(getattr(layer, block), name).weight += torch.tensor(delta.T)
    texts = []
    for row in ROWS:
        ids = tokenizer.encode(row["prompt"], bos=True)
        made = model.generate(
            torch.tensor([ids]),
            do_sample=False,
            max_new_tokens=NEW,
            eos_token_id=list(stop),
            pad_token_id=0,
            bos_token_id=1,
            attention_mask=torch.ones(1, len(ids)),
        )[0, len(ids) :].tolist()
        texts.append(tokenizer.decode(made[:-1] if made[-1] in stop else made))
    return texts


@pytest.mark.parametrize("rank", [0, 1, 4, 6])
def test_greedy_answers_equal_those_of_transformers(checkpoint, adapted, rank):
    p = RankHierarchy((1, 2, 4, 6)).prefix(rank)
    ours = evaluator(checkpoint, adapted).texts(adapted[2], p)
    assert ours == transformers_texts(checkpoint, adapted[2], p, (2,))
    assert len(set(ours)) > 1


def test_stop_tokens_end_a_row(checkpoint, adapted):
    p = jnp.zeros(6)
    _, base, adapter, _ = adapted
    free = evaluator(checkpoint, adapted)
    _, tokens, lengths = free._batches[0]
    made = np.asarray(free.compiled(base, adapter, p, tokens, lengths))
    stop = int(made[0, 3])
    first = int(np.flatnonzero(made[0] == stop)[0])
    again = np.asarray(evaluator(checkpoint, adapted, stop=(2, stop)).compiled(base, adapter, p, tokens, lengths))
    assert np.all(again[0, :first] == made[0, :first]) and np.all(again[0, first:] == -1)


def test_stop_strings_end_a_text(checkpoint, adapted):
    whole = evaluator(checkpoint, adapted).texts(adapted[2], jnp.zeros(6))
    ends = whole[0][2:4]
    task = Task(name="own", styles={"default": Style(prompt="")}, metric="exact_match", stop=(ends, "never"))
    cut = evaluator(checkpoint, adapted, task=task).texts(adapted[2], jnp.zeros(6))
    assert cut[0] == whole[0].partition(ends)[0] and len(cut[0]) < len(whole[0])


def test_one_executable_for_every_rank_and_verdicts_of_its_own_answers(checkpoint, adapted):
    hierarchy = RankHierarchy((1, 2, 4, 6))
    texts = evaluator(checkpoint, adapted).texts(adapted[2], hierarchy.prefix(4))
    rows = [row | {"answer": text if i else f"{text}x"} for i, (row, text) in enumerate(zip(ROWS, texts, strict=True))]
    scorer = evaluator(checkpoint, adapted, rows=rows, pad_multiple=64)
    verdicts = {rank: scorer(adapted[2], hierarchy.prefix(rank)).tolist() for rank in (0, 1, 2, 4, 6)}
    assert verdicts[4] == [False, True, True]
    assert any(verdicts[rank] != verdicts[4] for rank in verdicts)
    assert scorer.compiled._cache_size() == 1


class Countdown:
    """A decoder whose every token is one less than the one before; token 0 has no finite logits."""

    def init_cache(self, batch, length):
        return ()

    def hidden(self, tokens, *, positions, cache):
        return tokens[..., None].astype(float), cache

    def head(self, hidden):
        logits = -jnp.square(jnp.arange(8.0) - hidden + 1)
        return jnp.where(hidden == 0, jnp.nan, logits)


def test_logits_that_are_not_finite_end_a_row_and_are_marked():
    tokens, lengths = jnp.array([[7, 2, 0], [7, 7, 7], [0, 0, 0]]), jnp.array([2, 3, 1])
    made = greedy_decode(Countdown(), tokens, lengths, max_new_tokens=5, stop=(4,))
    assert made.tolist() == [[1, 0, NOT_FINITE, -1, -1], [6, 5, -1, -1, -1], [NOT_FINITE, -1, -1, -1, -1]]


def test_an_item_that_is_not_finite_is_wrong_and_told(checkpoint, adapted, caplog):
    """Even where the right answer is no text at all."""
    task = Task(name="own", styles={"default": Style(prompt="")}, metric="exact_match")
    rows = [row | {"answer": " "} for row in ROWS]
    scorer = evaluator(checkpoint, adapted, task=task, rows=rows)
    broken = jax.tree.map(lambda x: x * jnp.nan, adapted[2])
    assert scorer.texts(broken, jnp.ones(6)) == ["", "", ""] and not caplog.records
    assert not scorer(broken, jnp.ones(6)).any()
    assert [record.getMessage() for record in caplog.records] == [
        "3 of 3 items count as wrong: the model's logits for them are not finite"
    ]
    scorer(adapted[2], jnp.ones(6))
    assert len(caplog.records) == 1


def test_a_long_prompt_loses_its_left(checkpoint, adapted):
    assert evaluator(checkpoint, adapted).truncated == 0
    assert evaluator(checkpoint, adapted, max_length=4).truncated == 2


@pytest.mark.parametrize(
    ("text", "pattern", "expected"),
    [
        ("#### 72", r"#### (\-?[0-9\.\,]+)", "72"),
        ("so\n#### 1,200.\n", r"#### (\-?[0-9\.\,]+)", "1200"),
        ("#### -3 then #### 4", r"#### (\-?[0-9\.\,]+)", "-3"),
        ("no number", r"#### (\-?[0-9\.\,]+)", ""),
        ("  the whole text \n", "", "the whole text"),
    ],
)
def test_extract_answer(text, pattern, expected):
    assert extract_answer(text, pattern) == expected


def test_no_answer_found_is_no_match(checkpoint, adapted):
    """Neither text has a number, which must not count as agreement."""
    task = Task(name="own", styles={"default": Style(prompt="")}, metric="exact_match", answer_pattern=r"#### ([0-9]+)")
    rows = [row | {"answer": "#### 7"} for row in ROWS]
    scorer = evaluator(checkpoint, adapted, task=task, rows=rows)
    assert not scorer(adapted[2], jnp.zeros(6)).any()
    with pytest.raises(ValueError, match=r"answer '7' of row 0 has nothing that matches"):
        evaluator(checkpoint, adapted, task=task)
