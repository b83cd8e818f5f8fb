"""Prompt, answer and end as tokens; the loss on answer and end; long rows under each rule."""

import numpy as np
import pytest
import tokenizers
from transformers import AutoTokenizer

from mlora_jax.data.load import load_task
from mlora_jax.data.tokenize import encode_row, prompt_tokens, tokenize
from mlora_jax.models.token_roles import TokenRoles
from mlora_jax.models.tokenizer import Tokenizer
from mlora_jax.run.inputs import model_folder

ROWS = [
    {"prompt": "Question: How far ?\nType:", "answer": " number", "choices": [], "label": -1},
    {"prompt": "Hello there", "answer": " Good day to you", "choices": [], "label": -1},
]
LENGTHS = "error", "drop", "truncate"


def row_of(prompt_tokens_, answer_tokens):
    """A row of that many tokens: digits are tokens of their own in the small tokenizers."""
    return {"prompt": "7" * prompt_tokens_, "answer": "3" * answer_tokens}


def test_loss_is_on_the_answer_and_the_end_only(tokenizer):
    done = tokenize(ROWS, tokenizer, boundary="separate", max_length=100)
    assert (done.kept, done.dropped, done.truncated) == (2, 0, 0)
    for row, example in zip(ROWS, done.examples, strict=True):
        assert example.tokens.dtype == np.int32 and example.loss_mask.dtype == bool
        targets = example.tokens[example.loss_mask]
        assert targets[-1] == tokenizer.eos_id and (targets == tokenizer.eos_id).sum() == 1
        assert tokenizer.decode(targets[:-1]) == row["answer"]
        rest = example.tokens[~example.loss_mask]
        assert rest[0] == tokenizer.bos_id and tokenizer.decode(rest[1:]) == row["prompt"]
        assert not example.loss_mask[0]
    assert [example.row for example in done.examples] == [0, 1]


def test_own_pairs_are_trained_as_they_stand(jsonl, cache):
    """Borders within words and within white space: the tokens spell prompt and completion."""
    texts = ["Once upon a time", "The cat sat on the mat", "label=cat", "the goat's new home"]
    pairs = [{"prompt": t[:n], "completion": t[n:]} for t in texts for n in range(1, len(t)) if t[:n].strip()]
    tokenizer = Tokenizer.load(model_folder("quickstart"))
    data = load_task("jsonl", file=jsonl(pairs), cache_dir=cache, tokenizer=tokenizer)
    done = tokenize(data.train, tokenizer, boundary=data.boundary, max_length=64)
    for row, example in zip(data.train, done.examples, strict=True):
        assert tokenizer.decode(example.tokens) == row["prompt"] + row["answer"]
        prompt = prompt_tokens(row, tokenizer, boundary=data.boundary)
        assert prompt == tokenizer.encode(row["prompt"].rstrip(), bos=True)
        assert example.tokens[: len(prompt)].tolist() == prompt


def test_a_row_that_cannot_be_spelled_is_named():
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": 0, "</s>": 1, "upon": 2}, unk_token="<unk>"))
    words = Tokenizer(backend, TokenRoles(eos_id=1, pad_id=1, stops=(1,)))
    with pytest.raises(ValueError, match="train row 7: the tokenizer merges the end of the prompt 'up'"):
        tokenize([{"prompt": "up", "answer": "on", "row": 7}], words, boundary="lossless", max_length=9)


def test_a_choice_has_no_end(tokenizer):
    row = ROWS[0] | {"choices": [" number", " place"], "label": 0}
    (plain,), (choice,) = (tokenize([r], tokenizer, boundary="joint", max_length=100).examples for r in (ROWS[0], row))
    assert choice.tokens.tolist() == plain.tokens[:-1].tolist() and plain.tokens[-1] == tokenizer.eos_id
    assert choice.loss_mask.tolist() == plain.loss_mask[:-1].tolist()


def test_no_bos_where_the_tokenizer_adds_none(chat_tokenizer):
    (example,) = tokenize(ROWS[:1], chat_tokenizer, boundary="joint", max_length=100).examples
    assert chat_tokenizer.bos_id not in example.tokens
    assert chat_tokenizer.decode(example.tokens) == ROWS[0]["prompt"] + ROWS[0]["answer"]


@pytest.mark.parametrize("name", ("stories-260k", "tinystories-656k", "stories-3m"))
def test_real_tokenizers_agree_with_those_of_transformers(name, shared, cache):
    """The boundaries written out by hand over `AutoTokenizer`'s own backend, on real rows."""
    path = shared / "models" / name
    tokenizer = Tokenizer.load(path)
    plain = AutoTokenizer.from_pretrained(path).backend_tokenizer
    for style in ("reference", "harness"):
        data = load_task("gsm8k", raw_dir=str(shared / "data"), cache_dir=cache, style=style)
        for row in data.test[:20]:
            example = encode_row(row, tokenizer, boundary=data.boundary)
            if style == "reference":
                prompt = plain.encode(row["prompt"]).ids
                answer = plain.encode(row["answer"], add_special_tokens=False).ids
            else:
                prompt = plain.encode(row["prompt"]).ids
                # The whole text's ids, or where those do not begin with the prompt's, the answer's behind a line break.
                whole = plain.encode(row["prompt"] + row["answer"]).ids
                answer = whole[len(prompt) :]
                if whole[: len(prompt)] != prompt:
                    broken = plain.encode("\n", add_special_tokens=False).ids
                    behind = plain.encode("\n" + row["answer"], add_special_tokens=False).ids
                    answer = behind[len(broken) :]
                assert tokenizer.decode([*prompt, *answer]) == tokenizer.decode(whole)  # it has no "#"
            assert example.tokens.tolist() == [*prompt, *answer, 2]
            assert example.loss_mask.tolist() == [False] * len(prompt) + [True] * (len(answer) + 1)
            assert prompt_tokens(row, tokenizer, boundary=data.boundary) == prompt


def test_a_row_at_the_limit_is_kept_and_one_above_is_not(chat_tokenizer):
    for overflow in LENGTHS:
        done = tokenize([row_of(5, 3)], chat_tokenizer, boundary="joint", max_length=9, overflow=overflow)
        assert (done.kept, done.dropped, done.truncated) == (1, 0, 0) and len(done.examples[0].tokens) == 9


def test_error_names_row_length_limit_and_three_ways_out(chat_tokenizer):
    rows = [row_of(2, 2), {**row_of(5, 4), "row": 41}]
    with pytest.raises(ValueError) as caught:
        tokenize(rows, chat_tokenizer, boundary="joint", max_length=9, split="train")
    assert str(caught.value) == (
        "train row 41 has 10 tokens, more than the limit data.max_length=9: raise data.max_length, or set "
        "data.overflow='drop' (leave such rows out) or data.overflow='truncate' (cut them on the right)"
    )


def test_drop_leaves_long_rows_out_and_counts_them(chat_tokenizer):
    rows = [row_of(2, 2), row_of(5, 4), row_of(3, 1), row_of(20, 1)]
    done = tokenize(rows, chat_tokenizer, boundary="joint", max_length=9, overflow="drop")
    assert (done.kept, done.dropped, done.truncated) == (2, 2, 0)
    assert [example.row for example in done.examples] == [0, 2]


def test_truncate_cuts_right_and_drops_rows_without_answer(chat_tokenizer):
    rows = [row_of(2, 2), row_of(5, 6), row_of(8, 3), row_of(9, 3), row_of(30, 3)]
    done = tokenize(rows, chat_tokenizer, boundary="joint", max_length=9, overflow="truncate")
    assert (done.kept, done.dropped, done.truncated) == (3, 2, 2)
    assert done.kept + done.dropped == len(rows)
    assert [int(example.loss_mask.sum()) for example in done.examples] == [3, 4, 1]
    for example, row in zip(done.examples, rows, strict=False):
        whole = encode_row(row, chat_tokenizer, boundary="joint")
        assert len(example.tokens) <= 9 and example.loss_mask.any()
        assert (example.tokens == whole.tokens[:9]).all() and (example.loss_mask == whole.loss_mask[:9]).all()


def test_real_overflow_is_counted(shared, cache):
    tokenizer = Tokenizer.load(shared / "models" / "stories-260k")
    rows = load_task("gsm8k", raw_dir=str(shared / "data"), cache_dir=cache).test[:200]
    lengths = [len(encode_row(row, tokenizer, boundary="separate").tokens) for row in rows]
    above = sum(length > 256 for length in lengths)
    assert 0 < above < 200
    dropped = tokenize(rows, tokenizer, boundary="separate", max_length=256, overflow="drop")
    assert (dropped.kept, dropped.dropped, dropped.truncated) == (200 - above, above, 0)
    cut = tokenize(rows, tokenizer, boundary="separate", max_length=256, overflow="truncate")
    assert cut.kept + cut.dropped == 200 and cut.kept == 200 - above + cut.truncated and cut.truncated > 0


WRONG = [
    (
        {"overflow": "shorten"},
        r"unknown data\.overflow 'shorten', expected one of 'error', 'drop', 'truncate'",
    ),
    ({"max_length": 1}, r"data\.max_length must be at least 2, got 1"),
    (
        {"max_length": 3, "overflow": "drop"},
        r"nothing to train on in train: all 2 rows are over data\.max_length=3",
    ),
    ({"boundary": "glued"}, r"train row 0: boundary 'glued' is not one of 'separate', 'joint', 'lossless'"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG)
def test_a_wrong_value_is_named(arguments, message, tokenizer):
    with pytest.raises(ValueError, match=message):
        tokenize(ROWS, tokenizer, **{"boundary": "joint", "max_length": 50, **arguments})


def test_nothing_to_learn_or_to_learn_it_from_is_an_error(tokenizer, chat_tokenizer):
    with pytest.raises(ValueError, match=r"train row 0: the answer '' has no tokens of its own"):
        tokenize([{"prompt": "a", "answer": ""}], tokenizer, boundary="joint", max_length=9)
    with pytest.raises(ValueError, match=r"train row 0: the prompt '' has no tokens, so nothing predicts"):
        tokenize([{"prompt": "", "answer": "a"}], chat_tokenizer, boundary="separate", max_length=9)
    with pytest.raises(ValueError, match=r"nothing to train on in train: there are no rows"):
        tokenize([], tokenizer, boundary="joint", max_length=9)
