"""The embedded default: the base cannot do the task, LoRA at full rank can, and accuracy rises with rank."""

import itertools

import pytest

from mlora_jax.cli.config_flags import read_config
from mlora_jax.run.train import train


def quickstart(tmp_path, **trials):
    config = read_config("configs/quickstart.py")
    config.data.cache_dir = str(tmp_path / "cache")
    config.trials.update(trials)
    return train(config, tmp_path / "run")


def test_what_the_quickstart_promises(tmp_path, monkeypatch, request):
    monkeypatch.chdir(request.config.rootpath)
    results = quickstart(tmp_path, method=("lora",), seed=(42,), learning_rate=(1e-2,))
    assert results.base_accuracy["test"] < 0.3
    curves = {curve.readout: curve for curve in results.trials[0].curves["test"]}
    assert curves["prefix"].accuracies[-1] > 0.9
    squeezed = curves["squeeze"].accuracies
    assert squeezed[0] < 0.5 < squeezed[-2]
    assert all(later > earlier - 0.02 for earlier, later in itertools.pairwise(squeezed))


@pytest.mark.slow
def test_the_whole_quickstart(tmp_path, monkeypatch, request):
    monkeypatch.chdir(request.config.rootpath)
    results = quickstart(tmp_path)
    assert not any(result.failed for result in results.trials)
    text = (results.workdir / "table.md").read_text()
    for method in ("lora", "lora + squeeze", "dylora", "dylora_original", "dylora_frozen", "matryoshka", "sandwich"):
        assert f"| {method} |" in text
