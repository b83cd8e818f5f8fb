"""Real checkpoints and data, where they are at hand: the commands of the README, shortened."""

import pytest

from mlora_jax.cli.config_flags import read_config
from mlora_jax.run.train import train


def shortened(shared, tmp_path, monkeypatch, request, name, model="stories-260k"):
    monkeypatch.chdir(request.config.rootpath)
    config = read_config(f"configs/{name}.py")
    config.model.path = str(shared / "models" / model)
    config.data.raw_dir = str(shared / "data")
    config.data.cache_dir = str(tmp_path / "cache")
    config.train.epochs = 1
    return config


@pytest.mark.slow
def test_trec_learns(shared, tmp_path, monkeypatch, request):
    config = shortened(shared, tmp_path, monkeypatch, request, "trec_stories_3m")
    config.trials.update(method=("lora",), seed=(42,), learning_rate=(1e-2,), rank=(6,))
    config.evaluation.limit = 200
    results = train(config, tmp_path / "run")
    assert results.trials[0].curves["test"][0].accuracies[-1] > results.base_accuracy["test"] + 0.2
    assert results.trials[0].curves["test"][0].ranks == (1, 2, 4, 6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["trec_stories_3m", "sst2_stories_3m"])
def test_choice_configs(shared, tmp_path, monkeypatch, request, name):
    config = shortened(shared, tmp_path, monkeypatch, request, name)
    config.trials.seed = (42,)
    config.evaluation.limit = 200
    results = train(config, tmp_path / "run")
    assert {result.trial.method for result in results.trials} == {"lora", "dylora", "matryoshka"}
    assert (tmp_path / "run/curves.png").is_file()


@pytest.mark.slow
def test_gsm8k_config(shared, tmp_path, monkeypatch, request):
    """The model cannot solve a problem; the path from prompt to exact match is what runs here."""
    config = shortened(shared, tmp_path, monkeypatch, request, "gsm8k_stories_3m")
    config.trials.method = ("matryoshka",)
    config.evaluation.update(limit=8, max_new_tokens=16)
    results = train(config, tmp_path / "run")
    curves = results.trials[0].curves["test"]
    assert len(curves) == 3 and curves[0].items == 8
