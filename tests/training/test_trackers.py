"""What other people's dashboards are told: which runs there are, and when they end."""

import sys
import types

import pytest
import tensorboardX

from mlora_jax.training.trackers import make_trackers

RECORDS = [{"trial": trial, "step": 1, "time": 0.0, "loss": 0.5} for trial in ("a", "b")]


@pytest.fixture
def seen(monkeypatch):
    """(what, run) in the order in which Weights & Biases was told."""
    told = []

    class Run:
        def __init__(self, name):
            self._name = name
            told.append(("init", name))

        def log(self, values, step):
            told.append(("log", self._name))

        def finish(self):
            told.append(("finish", self._name))

    wandb = types.SimpleNamespace(init=lambda *, id, **_: Run(id))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    return told


def wandb(folder):
    folder.mkdir(parents=True, exist_ok=True)
    (tracker,) = make_trackers(folder, tensorboard=False, wandb_project="nested")
    return tracker


def test_runs_of_folders_of_one_name_differ_and_a_folder_keeps_its_own(tmp_path, seen):
    for folder in (tmp_path / "first/run", tmp_path / "second/run", tmp_path / "first/run"):
        wandb(folder).write(RECORDS[0])
    first, second, again = [name for what, name in seen if what == "init"]
    assert first == again != second and first.endswith("-a")
    (tmp_path / "first/run").rename(tmp_path / "moved")
    wandb(tmp_path / "moved").write(RECORDS[0])
    assert seen[-2] == ("init", first)


def test_a_run_of_weights_and_biases_ends_with_its_trial(tmp_path, seen):
    tracker = wandb(tmp_path)
    for record in RECORDS:
        tracker.write(record)
    tracker.finish(["a", "never written"])
    assert [name[-1] for what, name in seen if what == "finish"] == ["a"]
    tracker.close()
    assert [name[-1] for what, name in seen if what == "finish"] == ["a", "b"]


def test_event_files_are_closed_with_their_trial(tmp_path, monkeypatch):
    closed = []
    close = tensorboardX.SummaryWriter.close
    monkeypatch.setattr(tensorboardX.SummaryWriter, "close", lambda self: (closed.append(self.logdir[-1]), close(self)))
    (tracker,) = make_trackers(tmp_path, tensorboard=True, wandb_project="")
    for record in RECORDS:
        tracker.write(record)
    tracker.finish(["a", "never written"])
    assert closed == ["a"]
    tracker.close()
    assert closed == ["a", "b"]
