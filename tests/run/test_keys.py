"""Every config key does something: what a run leaves, or how it computes the same, is another."""

import dataclasses
import json
import shutil
import struct
import sys

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from mlora_jax.config import DEFAULTS, KEYS, resolve
from mlora_jax.core import RankHierarchy
from mlora_jax.evaluate.loading import load_adapted
from mlora_jax.interop import export_peft
from mlora_jax.run import sizing
from mlora_jax.run import train as run
from mlora_jax.run.describe import describe_experiment
from mlora_jax.run.experiment import Experiment
from mlora_jax.run.readouts import read_out_trial
from mlora_jax.run.starts import first_state
from mlora_jax.run.train import train
from mlora_jax.study.keys import STUDY
from mlora_jax.training.adapter_file import load_adapter
from mlora_jax.training.records import read_json_lines
from mlora_jax.trials import expand_trials, readouts_of
from tests.oracles.numpy_reference import profile_lora, profile_matryoshka
from tests.parallel import test_mesh
from tests.run import test_compilation_cache, test_harness_tasks, test_inputs
from tests.run.tiny_runs import choice_config, outcome, relative_difference, trials_of, with_key
from tests.study import test_queue

# Every key, and a value that must change what a run leaves. Keys that change shape or speed alone say so below.
CHANGES = {
    "model.path": lambda f: f["other_model"],
    "model.dtype": lambda f: "bfloat16",
    "model.quantization": lambda f: "int8",
    "data.task": None,  # test_own_data_key, as the keys that only own data has
    "data.max_length": lambda f: 28,
    "data.limit": lambda f: 8,
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
    "trials.list": lambda f: ({"method": "dylora"},),
    "validation.holdout": lambda f: 0.3,
    "evaluation.limit": lambda f: 5,
    "evaluation.readouts.matryoshka": lambda f: ("prefix",),
}
ELSEWHERE = {
    "train.loss_chunk": "test_keys_of_the_program",
    "train.remat": "test_keys_of_the_program",
    "train.row_widths": "test_keys_of_the_program",
    "train.rows_at_once": "test_keys_of_the_program",
    "evaluation.batch_size": "test_keys_of_the_program",
    "data.pad_multiple": "test_keys_of_the_program",
    "data.task": "test_keys_of_own_data",
    "data.overflow": "test_overflow",
    "data.raw_dir": "test_keys_of_places",
    "data.cache_dir": "test_keys_of_places",
    "data.style": "test_key_of_the_style",
    "adapter.start_from": "test_key_of_the_start",
    "data.file": "test_keys_of_own_data",
    "data.evaluation_file": "test_keys_of_own_data",
    "data.holdout": "test_keys_of_own_data",
    "data.ignored_keys": "test_key_of_what_is_not_read",
    "evaluation.max_new_tokens": "test_key_of_the_answers_length",
    "train.trials_at_once": "test_keys_of_the_batches",
    "train.memory_gib": "test_keys_of_the_batches",
    "validation.limit": "test_keys_of_validation",
    "validation.every": "test_keys_of_validation",
    "validation.measure": "test_keys_of_validation",
    "validation.keep": "test_keys_of_validation",
    "validation.patience": "test_keys_of_validation",
    "checkpoint.every": "test_keys_of_checkpoints",
    "checkpoint.keep": "test_keys_of_checkpoints",
    "compilation.cache": "test_key_of_the_compilation_cache",
    "records.tensorboard": "test_tensorboard",
    "records.wandb_project": "test_weights_and_biases",
    "report.choose_on": "test_key_of_the_report",
    "evaluation.tasks": "test_a_further_task_is_measured_without_training_again",
    "evaluation.raw_dir": "test_a_task_without_local_data_is_told",
    "calibration.steps": "test_keys_of_calibration",
    "calibration.learning_rate": "test_keys_of_calibration",
    "calibration.batches": "test_keys_of_calibration",
    **{f"study.{key}": "test_keys_of_the_study" for key in STUDY.keys},
    **{f"parallel.{key}": "test_keys_of_the_mesh" for key in ("trial", "data", "fsdp", "tensor", "engine")},
    **{
        f"parallel.{key}": "test_keys_of_the_processes"
        for key in ("distributed", "coordinator_address", "num_processes", "process_id")
    },
}


def test_every_key_has_a_test():
    readouts = {f"evaluation.readouts.{method}" for method in DEFAULTS["evaluation"]["readouts"]}
    tested = {name for name, value in CHANGES.items() if value} | set(ELSEWHERE) | readouts
    assert tested == {name for name, _ in (*KEYS.leaves(), *STUDY.leaves("study."))}
    homes = (sys.modules[__name__], test_compilation_cache, test_inputs, test_harness_tasks, test_queue, test_mesh)
    assert all(any(hasattr(home, test) for home in homes) for test in ELSEWHERE.values())


@pytest.mark.parametrize("name", [name for name, value in CHANGES.items() if value])
def test_key_changes_the_outcome(folders, first_run, tmp_path, monkeypatch, name):
    monkeypatch.setattr(run, "write_report", lambda folder: None)  # figures take long and are not compared
    config = with_key(choice_config(folders), name, CHANGES[name](folders))
    if name == "data.max_length":
        config["data"]["overflow"] = "drop"
    train(config, tmp_path)
    records, adapters = outcome(tmp_path)
    if name in ("evaluation.limit", "evaluation.readouts.matryoshka", "adapter.ranks", "train.log_every"):
        assert records != first_run[0]
    else:
        assert list(adapters.values()) != list(first_run[1].values())


def test_the_learning_rate_of_a_method_with_phases(folders, tmp_path, monkeypatch):
    """It falls to zero over the run, or with "restart" in every phase; a warm-up is that of the run."""
    monkeypatch.setattr(run, "write_report", lambda folder: None)
    config = choice_config(folders)
    phases = (("lora", 0.5), ("per_example", 0.5))
    config["methods"] = {"on": phases, "anew": (*phases, "restart")}
    config["trials"] |= {"method": ("on", "anew"), "rank": (3,), "scaling": ("rank",)}
    config["train"] |= {"accumulation": 2, "warmup_steps": 1, "trials_at_once": 2}
    on, anew = train(config, tmp_path).trials
    rates = {"on": [0, 5, 4, 3, 2, 1], "anew": [0, 2, 1, 3, 2, 1]}  # 3, 2, 1 of 3 from step 3 on
    for name, of in (("on", 5), ("anew", 0)):
        records = [r for r in read_json_lines(tmp_path / "metrics.jsonl") if r["trial"].startswith(f"{name}-")]
        wanted = [0.03 * rate / (of or (2 if step < 3 else 3)) for step, rate in enumerate(rates[name])]
        np.testing.assert_allclose([record["learning_rate"] for record in records], wanted, rtol=1e-5, atol=1e-9)
    files = [load_file(trial.adapter / "adapter.safetensors") for trial in (on, anew)]
    assert all(np.any(files[0][key] != files[1][key]) for key in files[0])


def test_keys_of_calibration(folders, first_run, tmp_path):
    """The read-outs that look at training data, of the adapter that the first run trained."""
    config = choice_config(folders)
    trained = train(config, tmp_path).trials[0]

    def found(readout, **changed):
        experiment = Experiment.load(resolve(config | {"calibration": changed}))
        adapter, hierarchy, _ = load_adapter(trained.adapter, experiment.adapted(4).adapter)
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        read = read_out_trial(experiment, trained.trial, adapter, hierarchy, readout, folder)
        again = read_out_trial(experiment, trained.trial, adapter, hierarchy, readout, folder)
        np.testing.assert_array_equal(np.stack([*read.curve().values()]), np.stack([*again.curve().values()]))
        # What is on disk for other commands is the same.
        shutil.copytree(trained.adapter, folder, dirs_exist_ok=True)
        for rank, p in read.curve().items():
            loaded = load_adapted(checkpoint=config["model"]["path"], adapter=folder, rank=rank, readout=readout)
            np.testing.assert_array_equal(loaded.p, p)
        jax.tree.map(np.testing.assert_array_equal, loaded.adapter, read.adapter)
        return np.stack([*read.curve().values()]), np.asarray(jax.tree.leaves(read.adapter)[0])

    fitted, same = found("calibrated", steps=3)
    assert np.array_equal(fitted != 0, np.arange(4) < np.array([[1], [2], [4]]))
    assert not np.allclose(fitted, found("calibrated", steps=4)[0])
    assert not np.allclose(fitted, found("calibrated", steps=3, learning_rate=0.01)[0])
    profiles, squeezed = found("squeeze_inputs", batches=1)
    assert set(np.unique(profiles)) == {0.0, 1.0} and not np.allclose(squeezed, same)
    assert not np.allclose(squeezed, found("squeeze_inputs", batches=2)[1], rtol=1e-4)


@pytest.mark.parametrize("method", DEFAULTS["evaluation"]["readouts"])
def test_readouts_of_every_method(folders, method):
    config = resolve(with_key(choice_config(folders), f"evaluation.readouts.{method}", ("masked", "squeeze")))
    trial, other = (dataclasses.replace(expand_trials(config)[0], method=name) for name in (method, "mine"))
    assert readouts_of(config, trial) == ("masked", "squeeze") and readouts_of(config, other) == ("prefix",)
    with pytest.raises(
        ValueError, match=rf"config\.evaluation\.readouts\.{method} must be one of 'prefix', .*got 'middle'"
    ):
        resolve(with_key(choice_config(folders), f"evaluation.readouts.{method}", ("middle",)))


def test_key_of_the_start(folders, tmp_path):
    """Under its own training profile, each trial begins with the function of the PEFT adapter."""
    random = np.random.default_rng(0)
    factors = {
        "layers.self_attn.v_proj": {"a": random.normal(size=(2, 16, 3)), "b": random.normal(size=(2, 3, 8))},
        "layers.mlp.up_proj": {"a": random.normal(size=(2, 16, 3)), "b": random.normal(size=(2, 3, 24))},
    }
    factors = {path: {k: v.astype(np.float32) for k, v in pair.items()} for path, pair in factors.items()}
    folder = export_peft(tmp_path / "start", factors, RankHierarchy((3,)), 3, base_model=folders["model"])
    config = with_key(choice_config(folders), "adapter.start_from", str(folder))
    config["trials"] |= {"method": ("lora", "matryoshka"), "scaling": ("sqrt",), "seed": (1, 2)}
    experiment = Experiment.load(resolve(config))
    trials = expand_trials(experiment.config)
    adapters = first_state(experiment, trials)[0].adapter
    profiles = {"lora": profile_lora((1, 2, 4), "sqrt"), "matryoshka": profile_matryoshka((1, 2, 4), "sqrt")}
    for path, pair in factors.items():
        node = adapters
        for part in path.split("."):
            node = node[part]
        a, b = np.asarray(node["a"][...]), np.asarray(node["b"][...])  # [K, L, D, R], [K, L, R, F]
        for number, trial in enumerate(trials):
            np.testing.assert_allclose(
                (a * profiles[trial.method])[number] @ b[number], pair["a"] @ pair["b"], atol=1e-5
            )
        assert (a[0, ..., 3] != a[1, ..., 3]).all()  # what the file does not have is each seed's own
    config["trials"]["rank"] = (2,)
    with pytest.raises(ValueError, match="has rank 3, above the rank 2 to train: raise that"):
        experiment = Experiment.load(resolve(config))
        first_state(experiment, expand_trials(experiment.config))


def program(config, tmp_path, monkeypatch):
    """The shapes and texts of what a run compiles."""
    from mlora_jax.run import adapted, evaluators

    seen = {}

    class Spy(adapted.TrialsStep):
        def __call__(self, *arguments, **options):
            seen.setdefault("train", self.compile(*arguments, **options).as_text())
            return super().__call__(*arguments, **options)

    monkeypatch.setattr(adapted, "TrialsStep", Spy)

    class SpyScorer(evaluators.Scorer):
        def prepare(self, requests):
            prepared = super().prepare(requests)
            seen["evaluation"] = [batch["tokens"].shape for batch in prepared.batches]
            return prepared

    monkeypatch.setattr(evaluators, "Scorer", SpyScorer)
    train(config, tmp_path)
    return seen


@pytest.mark.parametrize(
    ("name", "value", "where"),
    [
        ("train.loss_chunk", 3, "train"),
        ("train.remat", "dots", "train"),
        ("train.remat", "full", "train"),
        ("evaluation.batch_size", 5, "evaluation"),
        ("train.row_widths", (64,), "train"),
        ("train.rows_at_once", 2, "train"),
        ("data.pad_multiple", 32, "evaluation"),
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


def test_keys_of_the_batches(folders, tmp_path, monkeypatch):
    """How many trials train at once changes batches and compilations, and next to nothing else."""
    # On a CPU what is faster decides: here all at once. The clock of a busy machine may say otherwise.
    monkeypatch.setattr(sizing, "time_steps", lambda experiment, trials, steps: sizing.StepTiming(1, 1.0))
    config = trials_of(folders, method=("lora", "dylora"), seed=(1, 2, 3), learning_rate=(1e-3,), rank=(6,))
    config["train"] |= {"epochs": 7, "accumulation": 2}  # 21 steps
    sizes, adapters = {}, {}
    for name, changes in {
        "auto": {},
        "one": {"trials_at_once": 1},
        "four": {"trials_at_once": 4},
        "little memory": {"memory_gib": 0.002},
    }.items():
        train({**config, "train": config["train"] | changes}, tmp_path / name)
        batches = json.loads((tmp_path / name / "batches.json").read_text())["batches"]
        sizes[name] = [(len(batch["trials"]), batch["slots"]) for batch in batches]
        adapters[name] = {
            path.parent.name: load_file(path) for path in (tmp_path / name).glob("adapters/*/adapter.safetensors")
        }
    assert sizes["auto"] == [(6, 6)] and sizes["one"] == [(1, 1)] * 6 and sizes["four"] == [(3, 3)] * 2
    assert 1 < len(sizes["little memory"]) <= 6
    for name in ("auto", "four", "little memory"):
        for trial, alone in adapters["one"].items():
            assert relative_difference(alone, adapters[name][trial]) < 1e-5, (name, trial)
    with pytest.raises(ValueError, match=r"one trial needs .* GiB and the limit is 0\.00 GiB: raise config\.train"):
        train({**config, "train": config["train"] | {"memory_gib": 1e-6}}, tmp_path / "none")


def test_keys_of_validation(folders, tmp_path, monkeypatch):
    config = trials_of(folders, method=("lora",), learning_rate=(0.3,))
    config["train"] |= {"epochs": 8}
    config["validation"] = {"holdout": 0.25, "every": 2}
    steps = 18  # nine rows, eight epochs, four a step

    def run(name, **changes):
        train({**config, "validation": config["validation"] | changes}, tmp_path / name)
        records, adapters = outcome(tmp_path / name)
        seen = [r for r in records if any(key.startswith("validation_") for key in r)]
        losses = [r for r in records if "loss" in r]
        items = {r["items"] for r in records if r.get("split") == "validation"}
        return seen, losses, items, adapters

    seen, losses, items, last = run("aurac")
    assert [r["step"] for r in seen] == list(range(2, steps + 1, 2)) and len(losses) == steps and items == {3}
    assert all(0 <= r["validation_aurac"] <= 1 for r in seen)
    assert run("limit", limit=2)[2] == {2}
    assert [r["step"] for r in run("every", every=5)[0]] == [5, 10, 15, 18]

    by_loss = run("loss", measure="loss")
    assert by_loss[3] == last and all(0 < r["validation_loss"] < 20 for r in by_loss[0])
    assert len({r["validation_loss"] for r in by_loss[0]}) == 9

    from mlora_jax.run import batch as module

    def described(name):
        return json.loads((tmp_path / name / "adapters/lora-r4-none-lr0.3-seed1/adapter.json").read_text())

    for name, changes in {"best": {"keep": "best"}, "patience": {"keep": "best", "patience": 3}}.items():
        losses = iter([5.0, 3.0, 4.0, 3.5, 3.25, 7.0, 8.0, 9.0, 10.0])
        monkeypatch.setattr(module, "validation_score", lambda *arguments, losses=losses: next(losses))
        seen, steps_logged, _, adapters = run(name, measure="loss", **changes)
        assert described(name)["best"] == {"step": 4, "score": -3.0}
        assert adapters != last  # the best is not the last
        trained = 10 if name == "patience" else steps  # the fifth validation is the third without a better one
        assert described(name)["steps"] == len(steps_logged) == seen[-1]["step"] == trained
    with pytest.raises(ValueError, match=r"config\.validation\.patience needs validations while training"):
        resolve({"validation": {"patience": 2}})
    with pytest.raises(ValueError, match=r"validation\.every needs rows to validate on"):
        train({**config, "validation": {"holdout": 0.0, "every": 2}}, tmp_path / "no rows")


def test_validation_rows_that_are_too_long_for_their_loss_are_told(folders):
    config = with_key(choice_config(folders), "data.overflow", "truncate")
    config["validation"] = {"holdout": 0.5, "every": 2, "measure": "loss"}
    lengths = sorted(len(example.tokens) for example in Experiment.load(resolve(config)).validation.examples)
    assert len(lengths) == 6 and lengths[0] < lengths[-1]
    over = sum(length > lengths[0] for length in lengths)
    experiment = Experiment.load(resolve(with_key(config, "data.max_length", lengths[0])))
    assert experiment.validation.dropped == over
    assert f"6 ({over} too long for their loss) to validate on" in describe_experiment(experiment)
    with pytest.raises(ValueError, match=r"validation: all 6 rows are over data\.max_length"):
        Experiment.load(resolve(with_key(config, "data.max_length", lengths[0] - 1)))


def test_keys_of_checkpoints(folders, tmp_path, monkeypatch):
    from mlora_jax.run import batch as run

    seen, kept = [], []

    class Spy(run.Checkpoints):
        def __init__(self, folder, *, keep):
            kept.append(keep)
            super().__init__(folder, keep=keep)

        def save(self, step, *arguments):
            seen.append(step)
            super().save(step, *arguments)

    monkeypatch.setattr(run, "Checkpoints", Spy)
    config = choice_config(folders)
    for number, group in enumerate(({"every": 0}, {"every": 4, "keep": 1})):
        train({**config, "checkpoint": group}, tmp_path / str(number))
    assert seen == [6, 4, 6] and kept == [2, 1]
    assert outcome(tmp_path / "0") == outcome(tmp_path / "1")
    assert not list((tmp_path / "1/checkpoints").iterdir())  # a finished trial needs none


def test_key_of_the_report(folders, tmp_path):
    """Which split chooses the learning rate; changing it does not train anything again."""
    config = trials_of(folders, learning_rate=(0.03, 0.01))
    config["validation"] = {"holdout": 0.25}
    train(config, tmp_path)
    assert "this same test split" not in (tmp_path / "table.md").read_text()
    results = train({**config, "report": {"choose_on": "test"}}, tmp_path)
    assert results.compilations["train"] == 0
    text = (tmp_path / "table.md").read_text()
    assert "this same test split, which flatters it" in text
    assert (tmp_path / "learning_rates.png").stat().st_size > 10_000


def scalars(file):
    """(step, name, value) of every scalar in an event file: records of length, checksum, message, checksum."""
    from tensorboardX.proto.event_pb2 import Event

    data, at, found = file.read_bytes(), 0, []
    while at < len(data):
        (length,) = struct.unpack("<Q", data[at : at + 8])
        event = Event.FromString(data[at + 12 : at + 12 + length])
        found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
        at += 16 + length
    return found


def test_tensorboard(folders, tmp_path):
    config = with_key(choice_config(folders), "records.tensorboard", True)
    train(config, tmp_path)
    (file,) = tmp_path.glob("tensorboard/matryoshka-r4-none-lr0.03-seed1/events.*")
    losses = [(r["step"], "loss", pytest.approx(r["loss"])) for r in read_json_lines(tmp_path / "metrics.jsonl")]
    assert [scalar for scalar in scalars(file) if scalar[1] == "loss"] == losses
    assert {name for _, name, _ in scalars(file)} >= {"gradient_norm", "learning_rate", "tokens_per_second"}


def test_weights_and_biases(folders, tmp_path, monkeypatch):
    config = with_key(choice_config(folders), "records.wandb_project", "nested")
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ModuleNotFoundError, match=r"wandb_project='nested' needs wandb: pip install"):
        train(config, tmp_path / "without")
    seen = []

    class Run:
        def log(self, values, step):
            seen.append((step, values["loss"]))

        def finish(self):
            seen.append({r["trial"] for r in read_json_lines(tmp_path / "with/curves.jsonl")})

    class Wandb:
        @staticmethod
        def init(**options):
            seen.append(options)
            return Run()

    monkeypatch.setitem(sys.modules, "wandb", Wandb)
    train(config, tmp_path / "with")
    assert (seen[0]["project"], seen[0]["group"], seen[0]["resume"]) == ("nested", "with", "allow")
    assert seen[0]["name"] == "matryoshka-r4-none-lr0.03-seed1" and seen[-1] == set()  # before it is measured
    assert seen[1:-1] == [(r["step"], r["loss"]) for r in read_json_lines(tmp_path / "with/metrics.jsonl")]
