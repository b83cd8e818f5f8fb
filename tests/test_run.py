"""The whole program on tiny models and data: what a run leaves behind, and that every config key does something."""

import copy
import csv
import json
import math

import jax
import pytest

from mlora_jax.config import DEFAULTS, expand_trials, resolve
from mlora_jax.run import model_folder, train
from mlora_jax.train.records import read_json_lines
from tests.tiny import write_checkpoint, write_jsonl, write_trec


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("inputs")
    return {
        "root": root,
        "model": str(write_checkpoint(root / "model")),
        "other_model": str(write_checkpoint(root / "other_model", seed=5, num_layers=1)),
        "raw": str(write_trec(root / "raw")),
        "cache": str(root / "cache"),
        "own": str(write_jsonl(root / "own.jsonl")),
        "other": str(write_jsonl(root / "other.jsonl", rows=4, shift=100)),
    }


def choice_config(folders):
    return {
        "model": {"path": folders["model"]},
        "data": {
            "task": "trec",
            "raw_dir": folders["raw"],
            "cache_dir": folders["cache"],
            "pad_multiple": 96,  # one shape, one compilation
            "max_length": 96,
        },
        "adapter": {"targets": ("v_proj", "up_proj")},
        "trials": {"rank": (4,), "learning_rate": (0.03,), "seed": (1,)},
        "train": {"epochs": 2, "batch_size": 4, "log_every": 1},
    }


def own_config(folders):
    config = choice_config(folders)
    config["data"] |= {"task": "jsonl", "file": folders["own"]}
    config["trials"]["method"] = ("lora",)
    config["evaluation"] = {"max_new_tokens": 2, "readouts": {"lora": ("prefix",)}}
    return config


def with_key(config, name, value):
    config = copy.deepcopy(config)
    *groups, key = name.split(".")
    at = config
    for group in groups:
        at = at.setdefault(group, {})
    at[key] = value
    return config


CLOCKS = ("time", "tokens_per_second")


def outcome(workdir):
    """Everything a run wrote that does not depend on the clock or on how the folder is called."""
    records = [
        {k: v for k, v in record.items() if k not in CLOCKS}
        for name in ("metrics.jsonl", "curves.jsonl")
        for record in read_json_lines(workdir / name)
    ]
    adapters = {
        path.parent.name: path.read_bytes() for path in sorted((workdir / "adapters").glob("*/adapter.safetensors"))
    }
    return records, adapters


@pytest.fixture(scope="module")
def first_run(folders, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("first")
    train(choice_config(folders), workdir)
    return outcome(workdir)


def test_a_run_leaves_what_the_design_lists(folders, tmp_path):
    config = choice_config(folders)
    config["trials"] |= {"method": ("lora", "dylora", "matryoshka", "sandwich"), "seed": (1, 2), "rank": (6,)}
    config["trials"]["scaling"] = ("sqrt",)
    config["train"]["accumulation"] = 2
    results = train(config, tmp_path)
    assert len(results.trials) == 8 and not any(result.failed for result in results.trials)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["train"]["clip"] == 1.0 and stored["trials"]["rank"] == [6]

    metrics = read_json_lines(tmp_path / "metrics.jsonl")
    assert len(metrics) == 8 * 6  # 12 questions, 2 epochs, 4 a step
    first, last = metrics[0], metrics[5]
    assert (first["step"], last["step"]) == (1, 6) and all(math.isfinite(record["loss"]) for record in metrics)
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
    config["train"]["batch_size"] = 12  # all rows in every step, so that no step has other shapes
    compilations = train(config, tmp_path).compilations
    # S = (1, 2, 4): one profile a step for five methods, three for sandwich and matryoshka_exact.
    assert compilations == {"train": 2, "evaluation": 1}


def test_the_same_config_gives_the_same_bits(folders, first_run, tmp_path):
    train(choice_config(folders), tmp_path)
    assert outcome(tmp_path) == first_run


def test_a_diverging_trial_fails_and_the_others_go_on(folders, tmp_path):
    config = with_key(choice_config(folders), "trials.learning_rate", (3e38, 0.03))
    config["train"]["clip"] = 0.0
    results = train(config, tmp_path)
    assert [result.failed for result in results.trials] == [True, False]
    description = json.loads((results.trials[0].adapter / "adapter.json").read_text())
    assert description["finite"] is False
    text = (tmp_path / "table.md").read_text()
    assert f"Failed, the loss is not finite: {results.trials[0].trial.name}." in text
    assert "| matryoshka | 0.03 |" in text


# Every key, and a value that must change what a run leaves. Keys that change shape or speed alone say so below.
CHANGES = {
    "model.path": lambda f: f["other_model"],
    "model.dtype": lambda f: "bfloat16",
    "data.task": None,  # test_own_data_key, as the keys that only own data has
    "data.max_length": lambda f: 28,
    "data.overflow": None,
    "data.pad_multiple": None,
    "adapter.targets": lambda f: ("v_proj",),
    "adapter.init": lambda f: "fan_in",
    "adapter.dropout": lambda f: 0.5,
    "adapter.ranks": lambda f: (1, 4),
    "trials.method": lambda f: ("dylora",),
    "trials.learning_rate": lambda f: (0.01,),
    "trials.seed": lambda f: (2,),
    "trials.scaling": lambda f: ("rank",),
    "trials.rank": lambda f: (3,),
    "trials.weights": lambda f: ((3.0, 1.0, 1.0),),
    "train.epochs": lambda f: 3,
    "train.batch_size": lambda f: 6,
    "train.accumulation": lambda f: 2,
    "train.warmup_steps": lambda f: 3,
    "train.beta1": lambda f: 0.5,
    "train.beta2": lambda f: 0.9,
    "train.epsilon": lambda f: 1e-2,
    "train.weight_decay": lambda f: 0.5,
    "train.clip": lambda f: 0.01,
    "train.log_every": lambda f: 2,
    "evaluation.limit": lambda f: 5,
    "evaluation.readouts.matryoshka": lambda f: ("prefix",),
}
ELSEWHERE = {
    "train.loss_chunk": "test_keys_of_the_program",
    "train.remat": "test_keys_of_the_program",
    "evaluation.batch_size": "test_keys_of_the_program",
    "data.pad_multiple": "test_keys_of_the_program",
    "data.task": "test_keys_of_own_data",
    "data.overflow": "test_overflow",
    "data.raw_dir": "test_keys_of_places",
    "data.cache_dir": "test_keys_of_places",
    "data.style": "test_keys_of_own_data",
    "data.file": "test_keys_of_own_data",
    "data.evaluation_file": "test_keys_of_own_data",
    "data.holdout": "test_keys_of_own_data",
    "evaluation.max_new_tokens": "test_keys_of_own_data",
}


def all_keys(group=DEFAULTS, path=""):
    for key, value in group.items():
        yield from all_keys(value, f"{path}{key}.") if isinstance(value, dict) else (f"{path}{key}",)


def test_every_key_has_a_test():
    readouts = {f"evaluation.readouts.{method}" for method in DEFAULTS["evaluation"]["readouts"]}
    tested = {name for name, value in CHANGES.items() if value} | set(ELSEWHERE) | readouts
    assert tested == set(all_keys())
    assert all(test in globals() for test in ELSEWHERE.values())


@pytest.mark.parametrize("name", [name for name, value in CHANGES.items() if value])
def test_key_changes_the_outcome(folders, first_run, tmp_path, name):
    config = with_key(choice_config(folders), name, CHANGES[name](folders))
    if name == "data.max_length":
        config["data"]["overflow"] = "drop"
    train(config, tmp_path)
    records, adapters = outcome(tmp_path)
    if name in ("evaluation.limit", "evaluation.readouts.matryoshka", "adapter.ranks", "train.log_every"):
        assert records != first_run[0]
    else:
        assert list(adapters.values()) != list(first_run[1].values())


@pytest.mark.parametrize("method", DEFAULTS["evaluation"]["readouts"])
def test_readouts_of_every_method(folders, method):
    config = resolve(with_key(choice_config(folders), f"evaluation.readouts.{method}", ("masked", "squeeze")))
    assert config.evaluation.readouts[method] == ("masked", "squeeze")
    with pytest.raises(ValueError, match=f"unknown read-out 'middle' in config.evaluation.readouts.{method}"):
        resolve(with_key(choice_config(folders), f"evaluation.readouts.{method}", ("middle",)))


def program(config, tmp_path, monkeypatch):
    """The shapes and texts of what a run compiles."""
    from mlora_jax import run

    seen = {}
    compile_step = run.compile_step

    def spy(*args, **kwargs):
        step = compile_step(*args, **kwargs)

        def call(*inputs):
            seen.setdefault("train", step.lower(*inputs).as_text())
            return step(*inputs)

        call._cache_size = step._cache_size
        return call

    monkeypatch.setattr(run, "compile_step", spy)
    evaluator = run.ChoiceEvaluator

    def spy_evaluator(graphdef, base, profile, requests, **kwargs):
        seen["evaluation"] = [batch["tokens"].shape for batch in requests.batches]
        return evaluator(graphdef, base, profile, requests, **kwargs)

    monkeypatch.setattr(run, "ChoiceEvaluator", spy_evaluator)
    train(config, tmp_path)
    return seen


@pytest.mark.parametrize(
    ("name", "value", "where"),
    [
        ("train.loss_chunk", 3, "train"),
        ("train.remat", True, "train"),
        ("evaluation.batch_size", 5, "evaluation"),
        ("data.pad_multiple", 24, "train"),
    ],
)
def test_keys_of_the_program(folders, tmp_path, monkeypatch, name, value, where):
    """These change how the same numbers are computed."""
    config = with_key(choice_config(folders), "train.epochs", 1)
    before = program(config, tmp_path / "before", monkeypatch)
    monkeypatch.undo()
    after = program(with_key(config, name, value), tmp_path / "after", monkeypatch)
    assert before[where] != after[where]
    losses = [
        [record["loss"] for record in read_json_lines(tmp_path / run / "metrics.jsonl")] for run in ("before", "after")
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_overflow(folders, tmp_path):
    config = with_key(choice_config(folders), "data.max_length", 28)
    with pytest.raises(ValueError, match=r"train row \d+ has \d+ tokens, more than the limit data\.max_length=28"):
        train(config, tmp_path)
    found = []
    for overflow in ("drop", "truncate"):
        train(with_key(config, "data.overflow", overflow), tmp_path)
        found.append(outcome(tmp_path))
    assert found[0] != found[1]
    with pytest.raises(ValueError, match="'error', 'drop', 'truncate', got 'cut'"):
        train(with_key(config, "data.overflow", "cut"), tmp_path)


def test_keys_of_places(folders, tmp_path):
    config = with_key(choice_config(folders), "data.cache_dir", str(tmp_path / "cache"))
    train(config, tmp_path / "run")
    assert list((tmp_path / "cache").glob("**/*.array_record*"))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        train(with_key(config, "data.raw_dir", str(tmp_path / "nowhere")), tmp_path / "run")


def test_keys_of_own_data(folders, tmp_path):
    """A JSONL file by one config value, and every key that belongs to it."""
    config = own_config(folders)
    found = {}
    for name, value in {
        "evaluation.max_new_tokens": 2,  # as it was
        "data.file": folders["other"],
        "data.evaluation_file": folders["other"],
        "data.holdout": 0.5,
        "data.task": "trec",  # the file decides
    }.items():
        train(with_key(config, name, value), tmp_path)
        records, adapters = outcome(tmp_path)
        found[name] = [r["items"] for r in records if "items" in r], adapters
    plain = found["evaluation.max_new_tokens"]
    assert plain[0] == [2] * 4 and found["data.task"] == plain
    assert found["data.file"][0] == [1] * 3 or found["data.file"][1] != plain[1]
    assert found["data.evaluation_file"][0] == [4] * 4 and found["data.holdout"][0] == [10] * 4
    with pytest.raises(ValueError, match="unknown style 'poem'"):
        train(with_key(config, "data.style", "poem"), tmp_path)
    with pytest.raises(ValueError, match=r"unknown task 'treck'.*did you mean 'trec'"):
        train(with_key(choice_config(folders), "data.task", "treck"), tmp_path)


def test_bad_models(folders, tmp_path):
    config = choice_config(folders)
    with pytest.raises(ValueError, match=r"config\.model\.path is not set"):
        train(with_key(config, "model.path", ""), tmp_path)
    with pytest.raises(FileNotFoundError, match="no-such-model"):
        train(with_key(config, "model.path", "no-such-model"), tmp_path)
    with pytest.raises(ValueError, match="JAX_ENABLE_X64"):
        train(with_key(config, "model.dtype", "float64"), tmp_path)
    with pytest.raises(ValueError, match="target 'q_prj' matches no linear layer; did you mean 'q_proj'"):
        train(with_key(config, "adapter.targets", ("q_prj",)), tmp_path)


def test_names_of_trials_are_their_own(folders):
    config = choice_config(folders)
    config["trials"] |= {"scaling": ("none", "sqrt"), "weights": ((), (1.0, 2.0, 3.0)), "seed": (1, 2)}
    names = [trial.name for trial in expand_trials(resolve(config))]
    assert len(names) == 8 == len(set(names))


def test_shipped_model_is_a_folder():
    assert (model_folder("quickstart") / "config.json").is_file()
    assert jax.default_backend() == "cpu"
