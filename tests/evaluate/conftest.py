"""The tiny checkpoint that most evaluators are tried on."""

import pathlib

import pytest

from mlora_jax.models import Tokenizer
from tests.tiny import write_checkpoint


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> pathlib.Path:
    return write_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def tokenizer(checkpoint) -> Tokenizer:
    return Tokenizer.load(checkpoint)
