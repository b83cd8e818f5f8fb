"""Own rows that readers of other programs get wrong: characters that look like line ends, ends in a text, few rows."""

import json

import jax
import numpy as np
import pytest
import transformers

from mlora_jax.config import resolve
from mlora_jax.data.load import load_task
from mlora_jax.data.pipeline import make_pipeline
from mlora_jax.data.tokenize import Example, encode_row, tokenize
from mlora_jax.training.trial_trees import trial_keys
from mlora_jax.trials import expand_trials
from tests.data.conftest import write_tokenizer

LARGEST = 2**32 - 1
# Each ends a line for str.splitlines, and none does in JSON lines; NUL ends a text in C.
HARD = ["\u2028", "\u2029", "\u0085", "\u000b", "\u000c", "\u001c", "\u0000", "\ufeff", "\U0001f600"]


@pytest.mark.parametrize("escaped", [True, False])
def test_only_a_line_feed_ends_a_line(tmp_path, cache, tokenizer, escaped):
    """Rows are those of the json library on what stands between line feeds, and their tokens spell them."""
    rows = [{"prompt": f"a{letter}b {n}", "completion": f" c{letter}{letter}d"} for n, letter in enumerate(HARD)]
    rows += [{"prompt": "last", "completion": " one"}]
    data = "\n".join(json.dumps(row, ensure_ascii=escaped) for row in rows).encode()
    (tmp_path / "own.jsonl").write_bytes(data)
    (tmp_path / "test.jsonl").write_bytes(data + b"\n")
    expected = [json.loads(line) for line in data.split(b"\n")]
    task = load_task(
        "jsonl", file=str(tmp_path / "own.jsonl"), evaluation_file=str(tmp_path / "test.jsonl"), cache_dir=cache
    )
    for found in (task.train, task.test):
        assert [(row["prompt"], row["answer"]) for row in found] == [(r["prompt"], r["completion"]) for r in expected]
    done = tokenize(task.train, tokenizer, boundary=task.boundary, max_length=64)
    for row, example in zip(expected, done.examples, strict=True):
        assert tokenizer.decode(example.tokens) == row["prompt"] + row["completion"]


def test_chats_keep_such_characters(tmp_path, cache, chat_tokenizer):
    chats = [[{"role": "user", "content": f"a{c}b"}, {"role": "assistant", "content": f"{c}c"}] for c in HARD]
    lines = [json.dumps({"messages": chat}, ensure_ascii=False) for chat in chats]
    (tmp_path / "own.jsonl").write_text("\n".join(lines), encoding="utf-8", newline="")
    file = str(tmp_path / "own.jsonl")
    task = load_task("jsonl", file=file, evaluation_file=file, cache_dir=cache, tokenizer=chat_tokenizer)
    for chat, row in zip(chats, task.train, strict=True):
        tokens = encode_row(row, chat_tokenizer, boundary=task.boundary).tokens
        spelled = chat_tokenizer.decode(tokens, skip_special_tokens=False)
        assert all(message["content"] in spelled for message in chat)


@pytest.mark.parametrize("boundary", ["separate", "joint", "lossless"])
@pytest.mark.parametrize("answer", [" number</s>", " number</s> place", "</s>"])
def test_an_end_that_stands_in_the_answer_is_one_token_and_learned(tmp_path, tokenizer, boundary, answer):
    """The ids are those of transformers for the text, and the end of the example behind them."""
    theirs = transformers.AutoTokenizer.from_pretrained(write_tokenizer(tmp_path, bos=True))
    example = encode_row({"prompt": "How far ?", "answer": answer}, tokenizer, boundary=boundary)
    prompt = theirs("How far ?").input_ids
    assert example.tokens.tolist() == [*theirs("How far ?" + answer).input_ids, theirs.eos_token_id]
    assert example.loss_mask.tolist() == [False] * len(prompt) + [True] * (len(example.tokens) - len(prompt))
    assert (example.tokens == theirs.eos_token_id).sum() == 2


@pytest.mark.parametrize(("rows", "batch", "parts"), [(1, 8, 1), (3, 8, 2), (7, 8, 4)])
def test_fewer_rows_than_a_batch(rows, batch, parts):
    """All of them are in every epoch, and what fills the batch up weighs nothing."""
    mask = np.array([False, False, True, True])
    examples = [Example(np.full(4, 100 + row, np.int32), mask, row) for row in range(rows)]
    pipeline = make_pipeline(examples, seed=LARGEST, batch_size=batch, accumulation=parts, epochs=2)
    weights = np.concatenate([each["weights"].reshape(-1, each["weights"].shape[-1]) for each in pipeline])
    first = np.concatenate([each["tokens"].reshape(-1, each["tokens"].shape[-1])[:, 0] for each in pipeline])
    seen = first[weights.any(axis=-1)] - 100
    assert pipeline.steps == -(-2 * rows // batch)
    assert sorted(seen[:rows]) == sorted(seen[rows:]) == list(range(rows))
    assert weights.sum() == 2 * 2 * rows and not first[~weights.any(axis=-1)].any()


def test_every_seed_of_32_bits_is_a_seed_of_its_own():
    """None is cut to fewer bits or taken with a sign: NumPy's and jax's generators tell them apart too."""
    seeds = [0, 1, 2**31 - 1, 2**31, LARGEST - 1, LARGEST]
    assert len({int(np.random.RandomState(seed).randint(2**31)) for seed in seeds}) == len(seeds)
    config = resolve({"model": {"path": "quickstart"}, "data": {"task": "quickstart"}, "trials": {"seed": seeds}})
    assert [trial.seed for trial in expand_trials(config)] == seeds
    keys = [tuple(jax.random.key_data(trial_keys(seed).adapter).tolist()) for seed in seeds]
    assert len(set(keys)) == len(seeds)
    expected = jax.random.fold_in(jax.random.wrap_key_data(np.array([0, LARGEST], np.uint32)), 0)
    assert keys[-1] == tuple(jax.random.key_data(expected).tolist())
    mask = np.array([False, True])
    examples = [Example(np.full(2, row, np.int32), mask, row) for row in range(40)]
    orders = [tuple(e.row for e in make_pipeline(examples, seed=seed, batch_size=40).examples_at(0)) for seed in seeds]
    assert len(set(orders)) == len(seeds)
