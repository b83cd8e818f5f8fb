"""The model and the data of a run: the keys that name them, and what is refused or told."""

import json
import shutil

import jax
import numpy as np
import pytest

from mlora_jax.config import resolve
from mlora_jax.report.folders import SPLITS
from mlora_jax.run.experiment import Experiment
from mlora_jax.run.inputs import model_folder
from mlora_jax.run.train import train
from mlora_jax.training.records import read_json_lines
from tests.data.conftest import CHATML, write_tokenizer
from tests.run.tiny_runs import choice_config, outcome, own_config, with_key


def test_overflow(folders, tmp_path):
    config = with_key(choice_config(folders), "data.max_length", 28)
    with pytest.raises(ValueError, match=r"train row \d+ has \d+ tokens, more than the limit data\.max_length=28"):
        train(config, tmp_path)
    found = []
    for overflow in ("drop", "truncate"):
        train(with_key(config, "data.overflow", overflow), tmp_path / overflow)
        found.append(outcome(tmp_path / overflow))
    assert found[0] != found[1]
    with pytest.raises(ValueError, match="'error', 'drop', 'truncate', got 'cut'"):
        train(with_key(config, "data.overflow", "cut"), tmp_path)


def test_keys_of_places(folders, tmp_path):
    config = with_key(choice_config(folders), "data.cache_dir", str(tmp_path / "cache"))
    train(config, tmp_path / "run")
    assert list((tmp_path / "cache").glob("**/*.array_record*"))
    other = tmp_path / "raw"
    shutil.copytree(folders["raw"], other)
    (other / "train_5500.label").write_text("HUM:ind Who else ?\n" * 5)
    assert Experiment.load(resolve(config)).examples.kept == 12
    moved = Experiment.load(resolve(with_key(config, "data.raw_dir", str(other)))).examples
    assert moved.kept == 5 and len({example.tokens.tobytes() for example in moved.examples}) == 1
    with pytest.raises(FileNotFoundError, match="nowhere"):
        train(with_key(config, "data.raw_dir", str(tmp_path / "nowhere")), tmp_path / "nowhere run")


def test_keys_of_own_data(folders, tmp_path):
    """A JSONL file by one config value, and every key that belongs to it."""
    config = own_config(folders)
    found = {}
    for name, value in {
        "": None,  # as it is
        "data.file": folders["other"],
        "data.evaluation_file": folders["other"],
        "data.holdout": 0.5,
        "data.task": "trec",  # the file decides
    }.items():
        train(with_key(config, name, value) if name else config, tmp_path / name / "run")
        records, adapters = outcome(tmp_path / name / "run")
        found[name] = [r["items"] for r in records if "items" in r], adapters
    assert found[""][0] == [2] * 4 and found["data.task"] == found[""]
    assert found["data.file"][0] == [1] * 4 and found["data.evaluation_file"][0] == [4] * 4
    assert found["data.holdout"][0] == [10] * 4
    for name in ("data.file", "data.evaluation_file", "data.holdout"):  # other rows to train on
        assert found[name][1].keys() == found[""][1].keys() and found[name][1] != found[""][1]
    with pytest.raises(ValueError, match=r"unknown task 'treck'.*did you mean 'trec'"):
        train(with_key(choice_config(folders), "data.task", "treck"), tmp_path / "task")


def test_own_data_is_its_own_task(folders, tmp_path):
    config = own_config(folders)
    del config["data"]["task"]  # the default is another one
    train(config, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["data"]["task"] == "jsonl"
    assert (tmp_path / "table.md").read_text().startswith("# jsonl on model\n")
    assert {record["task"] for record in read_json_lines(tmp_path / "curves.jsonl")} == {"jsonl"}
    assert resolve({"data": {"evaluation_file": "own.jsonl"}}).data.task == "jsonl"
    assert resolve({}).data.task == "quickstart"


def test_key_of_what_is_not_read(folders, tmp_path):
    """A key that may say what is trained is refused, by its name and line, until it is ignored."""
    rows = [{"prompt": f"{n} is", "completion": f" {n}", "mood": n} for n in range(4)]
    (tmp_path / "own.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    config = with_key(own_config(folders), "data.file", str(tmp_path / "own.jsonl"))
    with pytest.raises(ValueError, match=r"own\.jsonl, line 1: the key 'mood' .* name it in data\.ignored_keys"):
        Experiment.load(resolve(config))
    assert Experiment.load(resolve(with_key(config, "data.ignored_keys", ("mood",)))).examples.kept == 3


def test_key_of_the_style(folders, tmp_path):
    """The same chats, in the words of the model's template or in those of the plain style."""
    model = tmp_path / "model"
    shutil.copytree(folders["model"], model)
    write_tokenizer(model, bos=True, chat_template=CHATML)
    chat = {"messages": [{"role": "user", "content": "How far ?"}, {"role": "assistant", "content": "48 miles"}]}
    (tmp_path / "own.jsonl").write_text(f"{json.dumps(chat)}\n" * 2)
    config = with_key(with_key(own_config(folders), "data.file", str(tmp_path / "own.jsonl")), "model.path", str(model))
    texts = {}
    for style in ("", "chat-template", "plain-chat"):
        experiment = Experiment.load(resolve(with_key(config, "data.style", style)))
        tokens = experiment.examples.examples[0].tokens
        texts[style] = experiment.tokenizer.decode(tokens, skip_special_tokens=False)
    template = "<|im_start|>user\nHow far ?<|im_end|>\n<|im_start|>assistant\n48 miles<|im_end|>\n"
    assert texts[""] == texts["chat-template"] == f"<s>{template}"
    assert texts["plain-chat"] == "<s>### User:\nHow far ?\n\n### Assistant:\n48 miles</s>"
    with pytest.raises(ValueError, match="unknown style 'poem'"):
        train(with_key(config, "data.style", "poem"), tmp_path / "style")


def test_key_of_the_answers_length(folders):
    """The tokens that are made for an answer at most."""
    lengths = {}
    for new in (2, 5):
        experiment = Experiment.load(resolve(with_key(own_config(folders), "evaluation.max_new_tokens", new)))
        adapted = experiment.adapted(4)
        lengths[new] = adapted.evaluators["test"].run_batch(0, adapted.adapter, np.zeros(4, np.float32)).shape[1]
    assert lengths == {2: 2, 5: 5}


def test_bad_models(folders, tmp_path):
    config = choice_config(folders)
    with pytest.raises(ValueError, match=r"config\.model\.path is not set"):
        train(with_key(config, "model.path", ""), tmp_path / "1")
    with pytest.raises(FileNotFoundError, match="no-such-model"):
        train(with_key(config, "model.path", "no-such-model"), tmp_path / "2")
    with pytest.raises(ValueError, match="JAX_ENABLE_X64"):
        train(with_key(config, "model.dtype", "float64"), tmp_path / "3")
    with pytest.raises(ValueError, match="target 'q_prj' matches no linear layer; did you mean 'q_proj'"):
        train(with_key(config, "adapter.targets", ("q_prj",)), tmp_path / "4")


def test_items_that_are_cut_are_counted_and_told(folders, tmp_path, capsys):
    config = choice_config(folders)
    config["validation"]["holdout"] = 0.25
    config["trials"]["method"] = ("lora",)
    found = {}
    for length in (96, 36):
        config["data"] |= {"max_length": length, "overflow": "truncate"}
        train(config, tmp_path / str(length))
        records = read_json_lines(tmp_path / str(length) / "curves.jsonl")
        found[length] = {split: {r["truncated"] for r in records if r["split"] == split} for split in SPLITS}
        told = capsys.readouterr()
        assert ("items cut on the left" in told.out + told.err) == (length == 36)
    assert found[96] == {"test": {0}, "validation": {0}}
    (cut,) = found[36]["test"]
    assert cut == 4 and len(found[36]["validation"]) == 1
    assert f": {cut} of 12 test items" in (tmp_path / "36/table.md").read_text()


@pytest.mark.parametrize(
    ("word", "row"), [("Where", "train row 6"), ("number", "train row 0"), ("Only here", "test row 1")]
)
def test_a_token_that_the_model_does_not_know(folders, tmp_path, word, row):
    """In a prompt, in a choice, in an evaluation row; one that no row holds does no harm."""
    model = tmp_path / "model"
    shutil.copytree(folders["model"], model)
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    kind = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    tokenizer["added_tokens"] += [{"id": 330, "content": "unused", **kind}]
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    raw = tmp_path / "raw"
    shutil.copytree(folders["raw"], raw)
    lines = (raw / "TREC_10.label").read_text().splitlines()
    (raw / "TREC_10.label").write_text("\n".join([lines[0], "HUM:ind Only here ?", *lines[2:]]))
    config = with_key(with_key(choice_config(folders), "model.path", str(model)), "data.raw_dir", str(raw))
    assert Experiment.load(resolve(config)).tokenizer.largest_id == 330
    tokenizer["added_tokens"] += [{"id": 331, "content": word, **kind}]
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(
        ValueError, match=rf"{row} holds the token '{word}' of id 331, and the model knows the ids below 330"
    ):
        Experiment.load(resolve(config))


def test_the_context_of_the_model(folders, tmp_path):
    """The tiny model's is 128 tokens."""
    config = own_config(folders)
    with pytest.raises(ValueError, match=r"config\.data\.max_length=129 is above the model's context of 128 tokens"):
        train(with_key(config, "data.max_length", 129), tmp_path / "long")
    with pytest.raises(
        ValueError, match=r"evaluation\.max_new_tokens=128 leaves no room for a prompt in .* 128 tokens"
    ):
        train(with_key(config, "evaluation.max_new_tokens", 128), tmp_path / "no room")
    longest = {}
    for new in (4, 126):
        config = with_key(with_key(own_config(folders), "evaluation.max_new_tokens", new), "data.max_length", 128)
        experiment = Experiment.load(resolve(config))
        evaluator = experiment.adapted(4).evaluators["test"]
        longest[new] = max(int(lengths.max()) for _, _, lengths in evaluator._batches), evaluator.truncated
    assert longest[4][0] > 2 and longest[4][1] == 0
    assert longest[126] == (2, 2)  # both test rows
    # Choices need no room beyond their own tokens.
    config = with_key(with_key(choice_config(folders), "evaluation.max_new_tokens", 200), "data.max_length", 128)
    assert Experiment.load(resolve(config)).examples.kept == 12


def test_the_path_of_a_model_may_begin_at_home(folders, monkeypatch):
    monkeypatch.setenv("HOME", str(folders["root"]))
    assert model_folder("~/model") == folders["root"] / "model"


def test_shipped_model_is_a_folder():
    assert (model_folder("quickstart") / "config.json").is_file()
    assert jax.default_backend() == "cpu"
