"""What the runs of several test files begin with."""

import pytest

from mlora_jax.run.train import train
from tests.run.tiny_runs import choice_config, outcome
from tests.tiny import write_checkpoint, write_jsonl, write_trec


@pytest.fixture(scope="session")
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


@pytest.fixture(scope="session")
def first_run(folders, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("first")
    train(choice_config(folders), workdir)
    return outcome(workdir)
