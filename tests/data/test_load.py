"""Wordings, choices, own data, held-out rows, and what wrong values say."""

import collections

import pytest

from mlora_jax.data.load import hold_out, load_task
from mlora_jax.data.tasks import TASKS, Style, Task, find_task
from mlora_jax.models.tokenizer import BOUNDARIES

PAIRS = [{"prompt": f"ask {i} =>", "completion": f" say {i}", "id": i} for i in range(20)]


def test_gsm8k_styles_differ_at_the_boundary_and_share_a_build(raw, cache):
    folder = raw("gsm8k")
    reference = load_task("gsm8k", raw_dir=folder, cache_dir=cache)
    harness = load_task("gsm8k", raw_dir=folder, cache_dir=cache, style="harness")
    assert reference.build == harness.build
    assert (reference.boundary, harness.boundary) == ("separate", "lossless")
    assert reference.train[0] == {
        "prompt": "Question: One and one?\nAnswer: ",
        "answer": "1+1=<<1+1=2>>2\n#### 2",
        "choices": [],
        "label": -1,
        "row": 0,
    }
    one, other = reference.train[0], harness.train[0]
    assert other["prompt"] + other["answer"] == one["prompt"] + one["answer"]
    assert other["prompt"] == "Question: One and one?\nAnswer:"


def test_classifications_are_worded_as_documented(raw, cache):
    trec = load_task("trec", raw_dir=raw("trec"), cache_dir=cache)
    kinds = [" abbreviation", " entity", " description", " person", " place", " number"]
    assert trec.boundary == "joint"
    assert trec.train[1] == {
        "prompt": "Question: When did it begin ?\nType:",
        "answer": " number",
        "choices": kinds,
        "label": 5,
        "row": 1,
    }
    sst2 = load_task("sst2", raw_dir=raw("sst2"), cache_dir=cache)
    assert sst2.test[0] == {
        "prompt": "Review: very good\nSentiment:",
        "answer": " positive",
        "choices": [" negative", " positive"],
        "label": 1,
        "row": 0,
    }
    assert [row["answer"] for row in sst2.validation] == [" negative"]


def test_braces_in_a_text_are_text():
    row = Style(prompt="{text} =>", answer="{answer}").render({"text": "{0} {text}", "answer": "{label}"})
    assert (row["prompt"], row["answer"]) == ("{0} {text} =>", "{label}")


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_every_row_of_the_table_is_whole(task: Task):
    assert task.metric in ("choice", "exact_match", "tokens")
    assert task.builder.name == task.name
    assert all(style.boundary in BOUNDARIES for style in task.styles.values())
    assert task.style() is task.style(next(iter(task.styles)))


def test_rows_are_random_access(raw, cache):
    rows = load_task("trec", raw_dir=raw("trec"), cache_dir=cache).train
    assert rows[-1] == rows[2] == list(rows)[2]
    assert list(rows[1:]) == [rows[1], rows[2]] and rows[1:][0]["row"] == 1
    with pytest.raises(IndexError):
        rows[3]


def test_own_pairs_are_split_by_a_fixed_rule(jsonl, cache):
    data = load_task("", file=jsonl(PAIRS), cache_dir=cache, holdout=0.25)
    assert data.task.name == "jsonl" and data.boundary == "lossless"
    train, test = ([row["row"] for row in rows] for rows in (data.train, data.test))
    assert sorted(train + test) == list(range(20)) and len(test) == 5
    assert train == sorted(train) and set(test) == hold_out(20, 0.25)
    for row in data.train:
        number = row["row"]
        assert (row["prompt"], row["answer"]) == (f"ask {number} =>", f" say {number}")
        assert row["choices"] == [] and row["label"] == -1


def test_own_data_wins_over_a_task_and_its_folder(jsonl, cache, raw):
    data = load_task("gsm8k", raw_dir=raw("gsm8k"), file=jsonl(PAIRS), cache_dir=cache)
    assert data.task.name == "jsonl"


def test_an_evaluation_file_is_the_test_split(jsonl, cache):
    own, other = jsonl(PAIRS), jsonl(PAIRS[:2], "evaluation.jsonl")
    data = load_task("jsonl", file=own, evaluation_file=other, cache_dir=cache, holdout=0.5)
    assert (len(data.train), len(data.test)) == (20, 2)
    changed = jsonl(PAIRS[:3], "evaluation.jsonl")
    again = load_task("jsonl", file=own, evaluation_file=changed, cache_dir=cache)
    assert len(again.test) == 3 and again.build != data.build


def test_hold_out_is_spread_stable_and_never_empty():
    # The first two of `for r in 0 1 2 .. 9; do printf 0:$r | sha256sum; done | sort`.
    assert hold_out(10, 0.2) == {4, 7}
    assert len(hold_out(3, 0.01)) == 1
    held = hold_out(10_000, 0.1)
    tenths = collections.Counter(row // 1000 for row in held)
    assert len(held) == 1000 and all(70 < tenths[tenth] < 130 for tenth in range(10))
    moved = held ^ {row for row in hold_out(10_100, 0.1) if row < 10_000}
    assert len(moved) < 20


MALFORMED = [
    ('{"prompt": "a"', "not JSON: Expecting ',' delimiter at column 15"),
    ('"text"', "expected a JSON object, got str"),
    (
        {"id": "a"},
        r"expected \{\"prompt\": \.\.\., \"completion\": \.\.\.\}, .* or .*, found the keys \['id'\]",
    ),
    ({"prompt": "a"}, r"the key 'completion' is missing \(found \['prompt'\]\)"),
    ({"prompt": 3, "completion": "b"}, "the key 'prompt' must be text, got int 3"),
    ({"prompt": "a", "completion": ""}, "the key 'completion' is empty"),
    ({"messages": []}, "'messages' must be a list of messages that is not empty"),
    ({"messages": ["hi"]}, "message 1 must be an object, got str"),
    ({"messages": [{"role": "user"}]}, r"the content of message 1 is missing \(found \['role'\]\)"),
    (
        {"messages": [{"role": "boss", "content": "a"}]},
        "message 1 has the unknown role 'boss', expected one of system",
    ),
    (
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": None}]},
        "message 2 has neither content nor tool_calls",
    ),
    (
        '{"messages": [{"role": "user", "content": "a", "name": "\\ud800"}, {"role": "assistant", "content": "b"}]}',
        "the chat holds half a surrogate pair",
    ),
    ({"messages": [{"role": "user", "content": "a"}]}, "the chat has no message from the assistant"),
    ({"messages": [{"role": "assistant", "content": "a"}]}, "the chat begins with the assistant"),
]


@pytest.mark.parametrize(("line", "message"), MALFORMED)
def test_a_malformed_own_line_is_named(line, message, jsonl, cache):
    with pytest.raises(ValueError, match=rf"own\.jsonl, line 3: {message}"):
        load_task("jsonl", file=jsonl([*PAIRS[:2], line, PAIRS[2]]), cache_dir=cache)


WRONG = [
    (
        {"name": "trek"},
        r"unknown task 'trek' \(data\.task\): did you mean 'trec'\? expected one of 'gsm8k', 'trec', ",
    ),
    (
        {"name": "gsm8k", "style": "poem"},
        r"unknown style 'poem' of the task 'gsm8k' \(data\.style\), .*'reference', 'h",
    ),
    ({"name": "jsonl"}, r"the task 'jsonl' needs a file: set data\.file to a JSONL file of"),
    ({"name": "", "evaluation_file": "a.jsonl"}, r"the task 'jsonl' needs a file"),
    (
        {"name": "jsonl", "file": "OWN", "style": "harness"},
        r"unknown style 'harness' .*'chat-template', 'plain-chat'",
    ),
    (
        {"name": "jsonl", "file": "OWN", "holdout": 0.0},
        r"data\.holdout must be above 0 and below 1, got 0\.0",
    ),
    (
        {"name": "jsonl", "file": "OWN", "holdout": 1.0},
        r"data\.holdout must be above 0 and below 1, got 1\.0",
    ),
    (
        {"name": "jsonl", "file": "OWN", "holdout": 0.99},
        r"data\.holdout=0\.99 of 20 row\(s\) leaves none to train on",
    ),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG)
def test_a_wrong_value_is_named_with_the_way_out(arguments, message, jsonl, cache):
    own = jsonl(PAIRS)
    arguments = {key: own if value == "OWN" else value for key, value in arguments.items()}
    with pytest.raises(ValueError, match=message):
        load_task(**arguments, cache_dir=cache)


def test_a_missing_own_file_is_named_with_its_folder(tmp_path, cache):
    with pytest.raises(FileNotFoundError, match=rf"no file absent\.jsonl in the folder {tmp_path}"):
        load_task("jsonl", file=str(tmp_path / "absent.jsonl"), cache_dir=cache)


def test_the_default_cache_is_in_the_users_cache_folder(jsonl, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    assert load_task("jsonl", file=jsonl(PAIRS)).build.is_relative_to(tmp_path / "user" / "mlora_jax")


def test_find_task_lists_all_names():
    with pytest.raises(
        ValueError, match=r"expected one of 'gsm8k', 'trec', 'sst2', .*'winogrande', 'quickstart', 'jsonl'"
    ):
        find_task("zzz")
