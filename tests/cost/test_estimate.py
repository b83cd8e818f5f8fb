"""Costs by arithmetic: counted here anew, and held against what a measured plan says."""

import json
import math
import types

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from mlora_jax.cli.config_flags import read_config
from mlora_jax.cli.plan import print_estimate
from mlora_jax.compile_report.shapes import model_shape
from mlora_jax.config import resolve
from mlora_jax.cost.estimate import CHARACTERS_PER_TOKEN, HARNESS, estimate, task_requests
from mlora_jax.training.phases import AdapterForm
from mlora_jax.trials import expand_trials
from tests.tiny import QUESTIONS, write_checkpoint, write_trec

# The parameters of the published models, embeddings that are also the head counted once.
PARAMETERS = {"llama32_1b": 1_235_814_400, "llama31_8b": 8_030_261_248}
# D, width of q and o, width of k and v, width of the MLP, layers.
SHAPES = {"llama32_1b": (2048, 2048, 512, 8192, 16), "llama31_8b": (4096, 4096, 1024, 14336, 32)}


@pytest.mark.parametrize("name", PARAMETERS)
@pytest.mark.parametrize(("variant", "rank"), [("r32", 32), ("r256", 256)])
def test_the_papers_grids_are_counted_without_their_models(name, variant, rank):
    found = estimate(read_config(f"paper_gsm8k_{name}:{variant}"))
    width, q, kv, mlp, layers = SHAPES[name]
    ends = 2 * (width + q) + 2 * (width + kv) + 3 * (width + mlp)
    assert found.parameters == PARAMETERS[name] and found.base_bytes == 2 * PARAMETERS[name]
    assert found.adapter_parameters == {AdapterForm(rank): layers * rank * ends}
    assert found.adapter_bytes == 621 * 4 * layers * rank * ends
    assert found.trial_bytes == 16 * layers * rank * ends  # adapter, gradients, two moments
    assert (found.trials, found.rows, found.steps, found.passes) == (621, 7473 - 512, math.ceil(6961 * 3 / 32), 1.0)
    assert found.curves == 621 * 2 and found.tasks.curves == 621 * 2
    # Six operations for each parameter of a matrix and token: forward, again, and the gradient of the inputs.
    matrices = layers * (2 * width * q + 2 * width * kv + 3 * width * mlp)
    assert found.training_operations == pytest.approx(found.tokens * 6 * matrices, rel=0.6)
    assert found.training_operations > found.tokens * 6 * matrices


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    root = tmp_path_factory.mktemp("inputs")
    model = write_checkpoint(root / "model")
    (model / "model.safetensors").unlink()
    return {
        "model": {"path": str(model)},
        "data": {"task": "trec", "raw_dir": str(write_trec(root / "raw")), "cache_dir": str(root / "cache")},
        "adapter": {"targets": ("v_proj",)},
        "trials": {"rank": (6,), "method": ("lora", "sandwich"), "learning_rate": (0.01, 0.03)},
        "train": {"epochs": 2, "batch_size": 6},
        "validation": {"holdout": 0.25},
    }


def test_local_rows_are_counted_and_no_weights_are_read(config):
    found = estimate(config)
    assert (found.trials, found.rows, found.steps) == (4, 9, 3)  # 12 rows, 3 of them held out
    assert found.adapter_parameters == {AdapterForm(6): 2 * 6 * (16 + 8)}  # two layers; v_proj of 2 heads of 4 features
    assert found.passes == (1 + 3) / 2  # sandwich: three profiles a step
    assert found.curves == 2 * (2 * 2 + 2)  # two splits; lora has two read-outs
    characters = [len(f"Question: {text}\nType:") for texts in QUESTIONS.values() for text in texts]
    length = sum(characters) / 12 / CHARACTERS_PER_TOKEN
    assert found.tokens / (4 * 9 * 2) == pytest.approx(length + 2 + 8 / CHARACTERS_PER_TOKEN, rel=0.1)
    assert found.tasks == (0, 0, 0, ()) and found.task_operations == 0


def test_gates_are_counted(config, capsys, monkeypatch):
    methods = {"gated": (("lora", 1.0), "gate")}
    asked = {**config, "methods": methods, "trials": {**config["trials"], "method": ("lora", "gated")}}
    found, factors = estimate(asked), 2 * 6 * (16 + 8)
    assert found.adapter_parameters == {AdapterForm(6): factors, AdapterForm(6, gate=True): factors + 2 * 6}
    assert found.adapter_bytes == 4 * (2 * factors + 2 * (factors + 12)) and found.trial_bytes == 16 * (factors + 12)
    monkeypatch.setattr("mlora_jax.cli.plan.TERAFLOPS", types.SimpleNamespace(value=100.0))
    print_estimate(resolve(asked))
    assert "288 (R = 6), 300 (R = 6, with gates)" in capsys.readouterr().out


def test_recomputing_and_more_profiles_cost_more(config):
    plain, some, again = (
        estimate({**config, "train": {**config["train"], "remat": remat}}) for remat in ("none", "dots", "full")
    )
    one = estimate({**config, "trials": {**config["trials"], "method": ("lora",)}})
    assert plain.training_operations < some.training_operations < again.training_operations
    assert again.training_operations < 1.5 * plain.training_operations
    assert plain.training_operations == pytest.approx(4 * one.training_operations)  # 2 + 2 * 3 to 2 passes


def test_requests_of_the_further_tasks():
    config = resolve(
        {
            "trials": {"method": ("lora", "matryoshka"), "rank": (4,), "seed": (1, 2)},
            "evaluation": {"tasks": (("arc_challenge", 25), ("gsm8k", 8), "unheard_of"), "limit": 1200},
        }
    )
    found = task_requests(config, expand_trials(config))
    points = 2 * (2 + 3) * 3 + 1  # seeds, read-outs of both methods, S = 1, 2, 4; and the base
    assert (found.curves, found.unknown) == (2 * (2 + 3) * 3, ("unheard_of",))
    assert found.requests == points * (4 * 1172 + 1200)
    size = HARNESS["arc_challenge"]
    least = points * 1172 * 25 * (size.question + size.answer) / CHARACTERS_PER_TOKEN
    assert found.tokens > least


def test_the_command(config, capsys, monkeypatch):
    monkeypatch.setattr("mlora_jax.cli.plan.TERAFLOPS", types.SimpleNamespace(value=100.0))
    print_estimate(resolve({**config, "evaluation": {"tasks": ("unheard_of",)}}))
    said = capsys.readouterr().out
    assert "4 trials of 3 steps on 9 rows" in said and "device hours at 100 TFLOP/s" in said
    assert "0 requests at all ranks, without unheard_of, whose size is not known" in said


def test_what_is_not_known_is_asked_for(config):
    with pytest.raises(
        ValueError, match=r"the size of the task 'trec' is not known: give its rows by config\.data\.raw_dir"
    ):
        estimate({**config, "data": {"task": "trec"}})
    with pytest.raises(ValueError, match="the shape of the model 'nowhere' is not known"):
        estimate({**config, "model": {"path": "nowhere"}})
    with pytest.raises(ValueError, match=r"config\.model\.path is not set"):
        estimate({**config, "model": {"path": ""}})


def test_known_shapes_write_the_config_that_transformers_reads(tmp_path):
    """Against transformers' own count of the tensors of such a config, without making them."""
    for name in PARAMETERS:
        shape = model_shape(read_config(f"paper_gsm8k_{name}").model.path)
        (tmp_path / "config.json").write_text(json.dumps(shape.to_hugging_face()))
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
        assert model.num_parameters() == PARAMETERS[name]
