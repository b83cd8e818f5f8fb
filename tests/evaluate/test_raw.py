"""Local data of the harness's tasks: converters, what is missing, and the task files on them."""

import bz2
import json
import socket

import pytest

from mlora_jax.data.published import arc_row, hellaswag_rows
from mlora_jax.data.tasks import TASKS
from mlora_jax.evaluate.raw import LocalTask, local_tasks, own_task
from mlora_jax.evaluate.task_files import HARNESS_FILES, harness_tasks_folder, load_tasks, write_local_tasks
from tests.evaluate import raw_data

ITEM = ("Roofing: A man: he sits. he", "3", "sleeps.", "falls.", "sings.", "eats.")


def write_hellaswag(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    with bz2.open(path, "wt", encoding="utf-8") as file:
        file.write("".join(f"{line}\n" for line in lines))
    return path


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_):
        raise AssertionError("a network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def request_texts(loaded, name, shots=0):
    task = loaded["tasks"][name]
    task.set_config(key="num_fewshot", value=shots)
    task.set_fewshot_seed(seed=1234)
    task.build_all_requests()
    return [instance.args for instance in task.instances]


def test_arc_in_the_instruction_form_becomes_the_published_schema():
    rows = [arc_row(row, number) for number, row in enumerate(raw_data.instruction_rows(shift=1))]
    for (question, choices), row in zip(raw_data.QUESTIONS, rows, strict=True):
        assert row["question"] == question and row["choices"] == {"text": [*choices], "label": ["A", "B", "C", "D"]}
    assert [row["answerKey"] for row in rows] == ["B", "C", "D", "A"]
    assert arc_row(rows[0], 5) is rows[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"instruction": "Is ice cold?"}, "not the instruction form"),
        ({"answer": "answer5"}, "'answer5' is none of answer1, answer2, answer3, answer4"),
    ],
)
def test_a_row_of_arc_that_is_none_is_named(tmp_path, changes, message):
    rows = raw_data.instruction_rows()
    rows[2] |= changes
    raw_data.write_lines(tmp_path / "arc_easy" / "test.jsonl", rows)
    with pytest.raises(ValueError, match=message) as error:
        local_tasks(tmp_path, ["arc_easy"])
    assert "test.jsonl, row 2" in str(error.value)


def test_hellaswag_in_six_lines_an_item(tmp_path):
    path = write_hellaswag(tmp_path / "hellaswag" / "hellaswag_val_full.txt.bz2", (*ITEM, *ITEM))
    first, second = hellaswag_rows(path)
    assert first["activity_label"] == "Roofing" and first["ctx"] == "A man: he sits. he"
    assert first["endings"] == ["sleeps.", "falls.", "sings.", "eats."] and first["label"] == "3"
    assert second == first | {"ind": 1}
    reason = local_tasks(tmp_path, ["hellaswag"])["hellaswag"]
    assert "no split train" in reason and "split validation lacks the fields ctx_a, ctx_b" in reason
    write_hellaswag(path, (*ITEM, "Roofing: A man", "7", *ITEM[2:]))
    with pytest.raises(ValueError, match="line 7: expected 'ACTIVITY: CONTEXT'"):
        hellaswag_rows(path)


def test_what_is_missing_is_a_reason(tmp_path):
    raw_data.write_lines(tmp_path / "gsm8k" / "test.jsonl", raw_data.gsm8k_rows())
    raw_data.write_lines(tmp_path / "winogrande" / "train.jsonl", raw_data.winogrande_rows())
    short = [{key: value for key, value in row.items() if key != "answer"} for row in raw_data.winogrande_rows()]
    raw_data.write_lines(tmp_path / "winogrande" / "validation.jsonl", short)
    for split in ("test", "dev"):
        raw_data.write_lines(tmp_path / "mmlu" / f"{split}.jsonl", raw_data.mmlu_rows(["anatomy"]))
    found = local_tasks(tmp_path, ["gsm8k", "winogrande", "mmlu", "arc_easy", "trec"])
    assert "no split train, which few-shot examples come from" in found["gsm8k"]
    assert "the split validation lacks the field answer" in found["winogrande"]
    assert "no folder arc_easy" in found["arc_easy"] and "no train_5500.label" in found["trec"]
    assert isinstance(found["mmlu"], LocalTask)  # complete as far as it goes, but not MMLU
    unavailable = {}
    load_tasks([], raw_dir=str(tmp_path), unavailable=unavailable)
    assert not unavailable
    with pytest.raises(ValueError, match="lacks 56 subject"):
        load_tasks(["mmlu"], raw_dir=str(tmp_path), cache_dir=str(tmp_path / "cache"))
    loaded = load_tasks(["mmlu", "gsm8k"], raw_dir=str(tmp_path), unavailable=unavailable)
    assert [*unavailable] == ["mmlu", "gsm8k"] and not loaded["tasks"]
    with pytest.raises(ValueError, match="no local form is known of the task 'piqa'"):
        local_tasks(tmp_path, ["piqa"])


def test_a_folder_of_another_task_is_not_taken_for_this_one(tmp_path):
    raw_data.write_raw(tmp_path)
    assert isinstance(local_tasks(tmp_path / "arc_challenge", ["arc_challenge"])["arc_challenge"], LocalTask)
    assert "no folder" in local_tasks(tmp_path / "arc_challenge", ["arc_easy"])["arc_easy"]


@pytest.mark.parametrize("form", ["json", "jsonl"])
def test_the_published_schema_is_taken_as_it_is(tmp_path, form):
    rows = raw_data.winogrande_rows()
    for split in ("train", "validation"):
        raw_data.write_lines(tmp_path / "winogrande" / f"{split}.{form}", rows)
    assert local_tasks(tmp_path, ["winogrande"])["winogrande"].splits == {"validation": rows, "train": rows}


def test_harness_tasks_on_local_data_ask_what_the_harness_asks(tmp_path, no_network):
    raw = raw_data.write_raw(tmp_path / "raw")
    for split in ("train", "validation"):
        raw_data.write_lines(raw / "winogrande" / f"{split}.jsonl", raw_data.winogrande_rows())
        raw_data.write_lines(raw / "hellaswag" / f"{split}.jsonl", raw_data.hellaswag_rows(split))
    names = ["arc_challenge", "gsm8k", "winogrande", "hellaswag"]
    loaded = load_tasks(names, raw_dir=str(raw), cache_dir=str(tmp_path / "cache"))
    assert sorted(loaded["tasks"]) == sorted(names)
    context, choice = request_texts(loaded, "arc_challenge")[0]
    assert (context, choice) == ("Question: Is ice cold?\nAnswer:", " yes")
    ((context, options), *_) = request_texts(loaded, "gsm8k", shots=2)
    assert context.count("Question:") == 3 and context.endswith("Question: 5 and 6 are how many?\nAnswer:")
    assert "Question:" in options["until"]
    ((context, ending), *_) = request_texts(loaded, "winogrande")
    assert context == "The red trophy does not fit, as the trophy" and ending == " is too big."
    ((context, ending), *_) = request_texts(loaded, "hellaswag")
    assert context == "Roofing: A man of the validation is sitting on a roof. He" and ending == " sleeps.. Well"
    for name in names:  # wording, metrics and filters are the packaged file's
        source = json.loads(next((tmp_path / "cache" / "lm_eval_tasks").rglob(f"{name}.yaml")).read_text())
        assert source["include"] == str(harness_tasks_folder() / HARNESS_FILES[name])


@pytest.mark.parametrize("name", ["trec", "sst2", "quickstart"])
def test_our_task_files_word_a_row_as_the_table_of_tasks_does(tmp_path, name):
    if name == "sst2":
        for file in ("train", "dev", "test"):
            (tmp_path / "sst2").mkdir(exist_ok=True)
            (tmp_path / "sst2" / f"{file}.tsv").write_text("a joy to watch\t1\ndull\t0\n")
    raw_data.write_raw(tmp_path)
    cache = str(tmp_path / "cache")
    loaded = load_tasks([name], raw_dir=str(tmp_path), cache_dir=cache)
    rows = own_task(name, raw_dir=str(tmp_path), cache_dir=cache).splits["test"][:8]
    rendered = [TASKS[name].style().render(row) for row in rows]
    expected = [(row["prompt"], choice) for row in rendered for choice in row["choices"]]
    assert request_texts(loaded, name)[: len(expected)] == expected
    task = loaded["tasks"][name]
    assert [task.doc_to_target(doc) for doc in list(task.eval_docs)[:8]] == [row["label"] for row in rendered]


def test_files_are_written_once_and_again_when_the_data_change(tmp_path):
    raw = raw_data.write_raw(tmp_path / "raw")
    folder = tmp_path / "tasks"

    def write():
        found = local_tasks(raw, ["gsm8k"])
        write_local_tasks(folder, found.values())
        file = folder / "gsm8k.yaml"
        return json.loads(file.read_text())["dataset_kwargs"]["data_files"]["test"], file.stat().st_mtime_ns

    first = write()
    assert write() == first
    raw_data.write_lines(raw / "gsm8k" / "test.jsonl", raw_data.gsm8k_rows(90))
    second = write()
    assert second[0] != first[0]


@pytest.mark.slow
def test_mmlu_on_local_data_has_its_groups(tmp_path, no_network):
    subjects = [file.stem[5:] for file in (harness_tasks_folder() / "mmlu" / "default").glob("mmlu_*.yaml")]
    for split in ("test", "dev"):
        raw_data.write_lines(tmp_path / "mmlu" / f"{split}.jsonl", raw_data.mmlu_rows(subjects))
    loaded = load_tasks(["mmlu"], raw_dir=str(tmp_path), cache_dir=str(tmp_path / "cache"))
    assert len(loaded["tasks"]) == len(subjects) == 57
    assert {"mmlu", "mmlu_stem", "mmlu_humanities"} <= set(loaded["groups"])
