"""Greedy answers against `transformers.generate`, at several ranks of one adapter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlora_jax.core import RankHierarchy
from mlora_jax.data.tasks import Style, Task
from mlora_jax.evaluate import GenerationEvaluator, extract_answer
from mlora_jax.models import Tokenizer, load_decoder
from tests.oracles.torch_generate import greedy
from tests.tiny import adapted_trees, random_like, write_checkpoint

ROWS = [{"prompt": p, "answer": "7", "choices": [], "label": -1} for p in ("How far ?", "a", "Natalia sold 48/2 =")]
NEW = 12


@pytest.fixture(scope="module")
def untied(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("model"), tie_word_embeddings=False)


@pytest.fixture(scope="module")
def adapted(untied):
    graphdef, base, adapter, profile = adapted_trees(load_decoder(untied), 6, ("q_proj", "down_proj"))
    return graphdef, base, random_like(adapter, seed=1, scale=0.4), profile


def evaluator(untied, adapted, *, stop=(2,), task=None, rows=ROWS, **changes):
    graphdef, base, _, profile = adapted
    task = task or Task(name="own", styles={"default": Style(prompt="")}, metric="exact_match")
    options = {"max_length": 64, "max_new_tokens": NEW, "batch_size": 2, "pad_multiple": 16} | changes
    tokenizer = Tokenizer.load(untied)
    return GenerationEvaluator(
        graphdef, base, profile, rows, tokenizer, boundary="separate", task=task, stop=stop, **options
    )


def transformers_texts(untied, adapter, p, stop):
    factors = {}
    for block, name in (("self_attn", "q_proj"), ("mlp", "down_proj")):
        pair = adapter["layers"][block][name]
        factors[f"{block}.{name}"] = np.asarray(pair["a"][...]), np.asarray(pair["b"][...])
    tokenizer = Tokenizer.load(untied)
    prompts = [tokenizer.encode(row["prompt"], bos=True) for row in ROWS]
    answers, _ = greedy(untied, factors, p, prompts, max_new_tokens=NEW, eos=stop)
    return [tokenizer.decode(made) for made in answers]


@pytest.mark.parametrize("rank", [0, 1, 4, 6])
def test_greedy_answers_equal_those_of_transformers(untied, adapted, rank):
    p = RankHierarchy((1, 2, 4, 6)).prefix(rank)
    ours = evaluator(untied, adapted).texts(adapted[2], p)
    assert ours == transformers_texts(untied, adapted[2], p, (2,))
    assert len(set(ours)) > 1


def test_stop_tokens_end_a_row(untied, adapted):
    p = jnp.zeros(6)
    made = evaluator(untied, adapted).run_batch(0, adapted[2], p)
    assert made.shape == (2, NEW)
    stop = int(made[0, 3])
    first = int(np.flatnonzero(made[0] == stop)[0])
    again = evaluator(untied, adapted, stop=(2, stop)).run_batch(0, adapted[2], p)
    assert np.all(again[0, :first] == made[0, :first]) and np.all(again[0, first:] == -1)


def test_stop_strings_end_a_text(untied, adapted):
    whole = evaluator(untied, adapted).texts(adapted[2], jnp.zeros(6))
    ends = whole[0][2:4]
    task = Task(name="own", styles={"default": Style(prompt="")}, metric="exact_match", stop=(ends, "never"))
    cut = evaluator(untied, adapted, task=task).texts(adapted[2], jnp.zeros(6))
    assert cut[0] == whole[0].partition(ends)[0] and len(cut[0]) < len(whole[0])


def test_two_executables_for_every_rank_and_verdicts_of_its_own_answers(untied, adapted):
    hierarchy = RankHierarchy((1, 2, 4, 6))
    texts = evaluator(untied, adapted).texts(adapted[2], hierarchy.prefix(4))
    rows = [row | {"answer": text if i else f"{text}x"} for i, (row, text) in enumerate(zip(ROWS, texts, strict=True))]
    scorer = evaluator(untied, adapted, rows=rows, pad_multiple=64)
    verdicts = {rank: scorer(adapted[2], hierarchy.prefix(rank)).tolist() for rank in (0, 1, 2, 4, 6)}
    assert verdicts[4] == [False, True, True]
    assert any(verdicts[rank] != verdicts[4] for rank in verdicts)
    assert scorer.compilations == 2  # prefill and decode


def test_an_item_that_is_not_finite_is_wrong_and_told(untied, adapted, caplog):
    """Even where the right answer is no text at all."""
    task = Task(name="own", styles={"default": Style(prompt="")}, metric="exact_match")
    rows = [row | {"answer": " "} for row in ROWS]
    scorer = evaluator(untied, adapted, task=task, rows=rows)
    broken = jax.tree.map(lambda x: x * jnp.nan, adapted[2])
    assert scorer.texts(broken, jnp.ones(6)) == ["", "", ""] and not caplog.records
    assert not scorer(broken, jnp.ones(6)).any()
    assert [record.getMessage() for record in caplog.records] == [
        "3 of 3 items count as wrong: the model's logits for them are not finite"
    ]
    scorer(adapted[2], jnp.ones(6))
    assert len(caplog.records) == 1


def test_a_long_prompt_loses_its_left(untied, adapted):
    assert evaluator(untied, adapted).truncated == 0
    assert evaluator(untied, adapted, max_length=4).truncated == 2


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


def test_no_answer_found_is_no_match(untied, adapted):
    """Neither text has a number, which must not count as agreement."""
    task = Task(name="own", styles={"default": Style(prompt="")}, metric="exact_match", answer_pattern=r"#### ([0-9]+)")
    rows = [row | {"answer": "#### 7"} for row in ROWS]
    scorer = evaluator(untied, adapted, task=task, rows=rows)
    assert not scorer(adapted[2], jnp.zeros(6)).any()
    with pytest.raises(ValueError, match=r"answer '7' of row 0 has nothing that matches"):
        evaluator(untied, adapted, task=task)
