"""A run that also measures its adapters on tasks of the harness."""

import json

import numpy as np
import pytest

from mlora_jax.config import harness_tasks, resolve
from mlora_jax.evaluate import bootstrap_aurac, compare
from mlora_jax.evaluate.harness import item_verdicts
from mlora_jax.run.train import train
from mlora_jax.training.records import read_json_lines
from tests.evaluate.raw_data import write_raw
from tests.tiny import write_checkpoint


def config_of(root):
    return {
        "model": {"path": str(root / "model")},
        "data": {
            "task": "trec",
            "raw_dir": str(root / "raw" / "trec"),
            "cache_dir": str(root / "cache"),
            "pad_multiple": 40,  # one shape
            "max_length": 96,
        },
        "adapter": {"ranks": (1, 3, 6)},
        "trials": {"method": ("lora", "matryoshka"), "rank": (6,), "learning_rate": (0.03,), "scaling": ("sqrt",)},
        "train": {"epochs": 30, "batch_size": 4, "accumulation": 2},
        "validation": {"limit": 3},
        "evaluation": {"tasks": ("trec",), "raw_dir": str(root / "raw")},
    }


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("inputs")
    write_checkpoint(root / "model", max_position_embeddings=512)
    write_raw(root / "raw")
    return root


@pytest.fixture(scope="module")
def first(root, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    return train(config_of(root), workdir)


def test_the_harness_and_the_run_agree_on_the_same_items(first):
    """TREC in the harness is the run's own task: same wording, same items."""
    records = [r for r in read_json_lines(first.workdir / "curves.jsonl") if r.get("harness")]
    assert {r["harness"].split()[0] for r in records} == {"lm-eval"} and {r["shots"] for r in records} == {0}
    base = [r["accuracy"] for r in records if r["trial"] == "base"]
    assert base == [first.base_accuracy["test"]]
    for result in first.trials:
        (curves,) = result.task_curves.values()
        assert curves == result.curves["test"]
        assert len(curves) == {"lora": 2, "matryoshka": 3}[result.trial.method]
        assert len(np.unique(curves[0].accuracies)) > 1 or result.trial.method != "lora"


def test_a_further_task_is_measured_without_training_again(root, first):
    config = config_of(root)
    config["evaluation"]["tasks"] = ("trec", ("arc_challenge", 2))
    before = (first.workdir / "metrics.jsonl").read_bytes()
    results = train(config, first.workdir)
    assert results.compilations["train"] == 0 and (first.workdir / "metrics.jsonl").read_bytes() == before
    for result in results.trials:
        assert set(result.task_curves) == {("trec", 0), ("arc_challenge", 2)}
        assert result.task_curves["arc_challenge", 2][0].items == 4
    records = read_json_lines(first.workdir / "curves.jsonl")
    assert len(
        {
            json.dumps({k: r.get(k) for k in ("trial", "task", "split", "readout", "at_rank", "harness")})
            for r in records
        }
    ) == len(records)
    table = (first.workdir / "table-arc_challenge-2.md").read_text()
    assert table.startswith("# arc_challenge, 2 shots on model") and "lora + squeeze" in table
    assert (first.workdir / "curves-arc_challenge-2.png").is_file()
    assert (first.workdir / "table.md").read_text().startswith("# trec on model")
    again = train(config, first.workdir)
    assert again.compilations == {"train": 0, "evaluation": 0}


def test_half_written_curves_are_measured_again(root, first):
    """Of a kill between two lines, and of nothing else."""
    path = first.workdir / "curves.jsonl"
    whole = path.read_text().splitlines(keepends=True)
    last = max(n for n, line in enumerate(whole) if json.loads(line).get("harness"))
    path.write_text("".join(whole[:last]))
    config = config_of(root)
    measured = {json.loads(line)["task"] for line in whole}
    config["evaluation"]["tasks"] = ("trec", ("arc_challenge", 2))[: len(measured)]
    train(config, first.workdir)
    assert sorted(path.read_text().splitlines(keepends=True)) == sorted(whole)


@pytest.mark.parametrize("entry", ["", 3, ("gsm8k",), ("gsm8k", -1), ("gsm8k", "8"), ("gsm8k", True), (3, 3)])
def test_unusable_entries(entry):
    with pytest.raises(ValueError, match="must be a name or a pair like"):
        resolve({"evaluation": {"tasks": (entry,)}})


def test_entries():
    assert harness_tasks(("a", ("b", 2), ["b", 3])) == [("a", None), ("b", 2), ("b", 3)]
    for twice in (("a", "a"), ("a", ("a", 2)), (("a", 2), ["a", 2])):
        with pytest.raises(ValueError, match="repeats 'a'"):
            harness_tasks(twice)


def test_a_task_without_local_data_is_told(root, first):
    """And the others are measured."""
    config = config_of(root)
    config["evaluation"]["tasks"] = ("winogrande", "trec")
    results = train(config, first.workdir)
    assert ("trec", 0) in results.trials[0].task_curves
    table = (first.workdir / "table.md").read_text()
    assert "Not compared: winogrande: no folder winogrande" in table
    train(config_of(root), first.workdir)
    assert "Not compared" not in (first.workdir / "table.md").read_text()


def test_items_of_two_adapters_can_be_compared(first):
    """The per-item results of a finished run give paired differences and intervals."""
    lora, matryoshka = (next(iter(result.task_curves.values())) for result in first.trials)
    found = compare(lora[0], matryoshka[0])
    assert found.differences == pytest.approx(np.subtract(lora[0].accuracies, matryoshka[0].accuracies))
    assert bootstrap_aurac(lora[1].verdicts, lora[1].ranks).value == pytest.approx(lora[1].log2)


def sample(doc, value, metric="acc", name="none"):
    return {"doc_id": doc, "filter": name, "metrics": [metric], metric: value}


def test_verdicts_of_groups_and_filters():
    tasks = {"b": [sample(1, 1.0), sample(0, 0.0)], "a": [sample(0, 1.0)]}
    verdicts, metric = item_verdicts({"samples": tasks})
    assert verdicts.tolist() == [True, False, True] and metric == "acc"
    filters = [sample(0, value, "exact_match", name) for name, value in (("flexible", 1.0), ("strict-match", 0.0))]
    verdicts, metric = item_verdicts({"samples": {"gsm8k": filters}})
    assert verdicts.tolist() == [False] and metric == "exact_match, strict-match"
    with pytest.raises(ValueError, match="x has bleu, but none of acc, exact_match"):
        item_verdicts({"samples": {"x": [sample(0, 1.0, "bleu")]}})
    with pytest.raises(ValueError, match="acc of x is not 0 or 1"):
        item_verdicts({"samples": {"x": [sample(0, 0.5)]}})
