"""A run's folder: whose it is, and what it remembers of the machine."""

import jax
import pytest

from mlora_jax.config import resolve
from mlora_jax.run.folder import METRICS, RunFolder, only_one_run
from mlora_jax.training.curve_records import BASE, CURVES, CurveRecord
from mlora_jax.training.records import JsonLines
from mlora_jax.trials import expand_trials


def planned(path, config):
    """A folder whose trials are in a batch."""
    folder, trials = RunFolder(path, config), tuple(expand_trials(config))
    folder.add([(trials, len(trials))])
    return folder


def test_a_run_goes_on_in_the_precision_in_which_it_began(tmp_path):
    planned(tmp_path, resolve({}))
    assert len(RunFolder(tmp_path, resolve({})).batches) == 1
    with jax.enable_x64(True), pytest.raises(ValueError, match=r"holds a run that began with JAX_ENABLE_X64=0: set"):
        RunFolder(tmp_path, resolve({}))


@pytest.mark.parametrize("begun", ["logged", "saved", "trained"])
def test_a_folder_in_which_nothing_was_trained_or_measured_takes_another_config(tmp_path, begun):
    """The corrections that errors about data, memory and targets ask for; what was planned is planned anew."""
    planned(tmp_path, resolve({}))
    (tmp_path / CURVES).touch()
    (tmp_path / METRICS).touch()
    corrected = resolve({"data": {"max_length": 99}, "train": {"remat": "full"}})
    assert RunFolder(tmp_path, corrected).batches == []
    folder = planned(tmp_path, corrected)
    assert len(RunFolder(tmp_path, corrected).batches) == 1
    (batch,) = folder.batches
    if begun == "logged":
        with JsonLines(tmp_path / METRICS) as metrics:
            metrics.write({"trial": batch.trials[0].name, "step": 1})
    elif begun == "saved":
        (folder.checkpoints(batch) / "1").mkdir(parents=True)
    else:
        folder.finish(batch)
    with pytest.raises(ValueError, match=r"another config: config\.data\.max_length was 99"):
        RunFolder(tmp_path, resolve({}))


def test_a_folder_with_a_measurement_alone_keeps_its_config(tmp_path):
    RunFolder(tmp_path, resolve({}))
    with JsonLines(tmp_path / CURVES) as curves:
        curves.write(*CurveRecord(None, "trec", "test", BASE, (0,), (0.5,), (0.1,), 26).to_lines())
    with pytest.raises(ValueError, match=r"config\.train\.remat was 'auto'"):
        RunFolder(tmp_path, resolve({"train": {"remat": "full"}}))


def test_files_that_a_kill_left_half_written_are_removed(tmp_path):
    halves = [tmp_path / ".batches.json.17.partial", tmp_path / "adapters/lora/.adapter.safetensors.17.partial"]
    whole = tmp_path / "adapters/lora/adapter.safetensors"
    whole.parent.mkdir(parents=True)
    for file in (*halves, whole):
        file.write_text("{")
    RunFolder(tmp_path, resolve({}))
    assert whole.is_file() and not any(file.exists() for file in halves)


def test_a_bucket_is_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with (
        pytest.raises(ValueError, match=r"must be a folder, got gs://bucket/run: mount"),
        only_one_run("gs://bucket/run"),
    ):
        pass
    assert not list(tmp_path.iterdir())
