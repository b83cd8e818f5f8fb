"""The whole program on tiny models and data: what a run leaves behind, and what it does not go on with."""

import csv
import fcntl
import json
import math
import pathlib
import shutil

import pytest
from safetensors.numpy import load_file

from mlora_jax.config import resolve
from mlora_jax.run.train import train
from mlora_jax.training.records import read_json_lines
from mlora_jax.trials import expand_trials
from tests.run.tiny_runs import choice_config, outcome, own_config, relative_difference, trials_of, with_key


def test_a_run_does_not_go_on_with_other_data(folders, tmp_path):
    """Where the file was changed in between, or where another folder of raw data is named."""
    rows = pathlib.Path(folders["own"]).read_text().splitlines(keepends=True)
    (tmp_path / "own.jsonl").write_text("".join(rows))
    config = with_key(own_config(folders), "data.file", str(tmp_path / "own.jsonl"))
    first = train(config, tmp_path / "run").trials[0]
    more = with_key(config, "trials.learning_rate", (0.03, 0.01))
    (tmp_path / "own.jsonl").write_text("".join(reversed(rows)))
    with pytest.raises(ValueError, match=r"holds a run on other inputs: train rows.* changed since it began"):
        train(more, tmp_path / "run")
    (tmp_path / "own.jsonl").write_text("".join(rows))
    assert train(more, tmp_path / "run").trials[0].curves == first.curves


def test_a_run_does_not_go_on_with_another_base(folders, tmp_path):
    """One number of one tensor changed in the same file."""
    shutil.copytree(folders["model"], tmp_path / "model")
    config = with_key(own_config(folders), "model.path", str(tmp_path / "model"))
    train(config, tmp_path / "run")
    file = tmp_path / "model" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match="holds a run on other inputs: base model changed since it began"):
        train(with_key(config, "trials.learning_rate", (0.03, 0.01)), tmp_path / "run")


def test_embeddings_and_a_bad_start_are_refused_before_anything_is_trained(folders, tmp_path):
    for key, value, message in (
        ("adapter.targets", (".*",), r"config.adapter.targets \('\.\*',\) take embed_tokens too, which is no linear"),
        ("adapter.start_from", str(tmp_path / "nowhere"), "nowhere is not the folder of a PEFT adapter"),
        ("evaluation.raw_dir", str(tmp_path / "nowhere"), "there is no folder .*nowhere .config.evaluation.raw_dir"),
    ):
        config = with_key(with_key(choice_config(folders), key, value), "evaluation.tasks", ("trec",))
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            train(with_key(config, "train.trials_at_once", 0), tmp_path / "run")
    train(choice_config(folders), tmp_path / "run")  # the folder takes the corrected config


def test_a_task_that_there_is_not_is_found_before_anything_is_trained(folders, tmp_path):
    config = with_key(choice_config(folders), "evaluation.tasks", ("arc_chalenge",))
    with pytest.raises(ValueError, match=r"unknown task 'arc_chalenge' of config.evaluation.tasks; did you"):
        train(config, tmp_path)
    assert not (tmp_path / "batches.json").exists()


def test_a_run_leaves_what_the_design_lists(folders, tmp_path):
    config = choice_config(folders)
    config["trials"] |= {"method": ("lora", "dylora", "matryoshka", "sandwich"), "seed": (1, 2), "rank": (6,)}
    config["trials"]["scaling"] = ("sqrt",)
    config["train"] |= {"accumulation": 2, "trials_at_once": 6}
    results = train(config, tmp_path)
    assert len(results.trials) == 8 and not any(result.failed for result in results.trials)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["train"]["clip"] == 1.0 and stored["trials"]["rank"] == [6]

    metrics = read_json_lines(tmp_path / "metrics.jsonl")
    assert len(metrics) == 8 * 6  # 12 questions, 2 epochs, 4 a step
    assert all(math.isfinite(record["loss"]) for record in metrics)
    one = [record for record in metrics if record["trial"] == "sandwich-r6-sqrt-lr0.03-seed2"]
    first, last = one[0], one[-1]
    assert [record["step"] for record in one] == [1, 2, 3, 4, 5, 6]
    assert first["learning_rate"] == pytest.approx(0.03) and last["learning_rate"] == pytest.approx(0.03 / 6)

    curves = read_json_lines(tmp_path / "curves.jsonl")
    lora = [r for r in curves if r["trial"] == "lora-r6-sqrt-lr0.03-seed2"]
    assert [(r["readout"], r["at_rank"]) for r in lora] == [
        (readout, rank) for readout in ("prefix", "squeeze") for rank in (1, 2, 4, 6)
    ]
    assert all(r["items"] == 12 and 0 <= r["accuracy"] <= 1 for r in curves)
    by_readout = {r["readout"]: r["accuracy"] for r in lora if r["at_rank"] == 6}
    assert by_readout["prefix"] == by_readout["squeeze"]  # one function at full rank

    rows = list(csv.DictReader((tmp_path / "table.csv").read_text().splitlines()))
    assert [(row["method"], row["readout"]) for row in rows] == [
        ("lora", "prefix"),
        ("lora", "squeeze"),
        ("dylora", "prefix"),
        ("matryoshka", "prefix"),
        ("matryoshka", "nested"),
        ("matryoshka", "masked"),
        ("sandwich", "prefix"),
    ]
    assert {row["seeds"] for row in rows} == {"1 2"}
    assert "| lora + squeeze |" in (tmp_path / "table.md").read_text()
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    assert len(list((tmp_path / "adapters").glob("*/adapter.safetensors"))) == 8


def test_no_compilation_per_rank_or_method(folders, tmp_path):
    config = choice_config(folders)
    config["trials"] |= {
        "method": ("lora", "dylora", "dylora_original", "dylora_frozen", "matryoshka", "sandwich", "matryoshka_exact"),
        "learning_rate": (0.03, 0.01),
    }
    config["report"] = {"choose_on": "test"}
    config["train"] |= {"batch_size": 12, "trials_at_once": 5}  # all rows in every step: one shape
    compilations = train(config, tmp_path).compilations
    # S = (1, 2, 4): one profile a step for five methods, three for sandwich and matryoshka_exact.
    assert compilations == {"train": 2, "evaluation": 1}


def test_the_same_config_gives_the_same_bits(folders, first_run, tmp_path):
    train(choice_config(folders), tmp_path)
    assert outcome(tmp_path) == first_run


def test_a_diverging_trial_fails_and_the_others_go_on(folders, tmp_path):
    config = with_key(choice_config(folders), "trials.learning_rate", (3e38, 0.03))
    config["train"] |= {"clip": 0.0, "trials_at_once": 2}
    config["report"] = {"choose_on": "test"}
    results = train(config, tmp_path)
    assert [result.failed for result in results.trials] == [True, False]
    description = json.loads((results.trials[0].adapter / "adapter.json").read_text())
    assert description["finite"] is False
    text = (tmp_path / "table.md").read_text()
    assert f"Failed, the loss is not finite: {results.trials[0].trial.name}." in text
    assert "| matryoshka | 0.03 |" in text


def test_order_and_company_change_nothing(folders, tmp_path):
    """The same trial first or last, among others or not."""
    config = trials_of(folders, learning_rate=(1e-3,), rank=(6,), scaling=("sqrt",))
    config["train"] |= {"epochs": 7, "accumulation": 2, "trials_at_once": 3}
    ours = {"method": "dylora", "seed": 5}
    found = []
    for number, entries in enumerate(
        [(ours,), (ours, {"method": "lora", "seed": (6, 7)}), ({"method": ("matryoshka", "lora"), "seed": 7}, ours)]
    ):
        config["trials"]["list"] = entries
        train(config, tmp_path / str(number))
        metrics = read_json_lines(tmp_path / str(number) / "metrics.jsonl")
        name = "dylora-r6-sqrt-lr0.001-seed5"
        found.append(load_file(tmp_path / str(number) / "adapters" / name / "adapter.safetensors"))
        assert len([record for record in metrics if record["trial"] == name]) == 21
    assert relative_difference(found[0], found[1]) < 1e-5 and relative_difference(found[0], found[2]) < 1e-5


def test_one_process_at_a_time(folders, tmp_path):
    with (tmp_path / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match=f"another process is running in {tmp_path}"):
            train(choice_config(folders), tmp_path)


def test_names_of_trials_are_their_own(folders):
    config = choice_config(folders)
    config["trials"] |= {"scaling": ("none", "sqrt"), "weights": ((), (1.0, 2.0, 3.0)), "seed": (1, 2)}
    names = [trial.name for trial in expand_trials(resolve(config))]
    assert len(names) == 8 == len(set(names))
