"""A run's folder: whose it is, and what it remembers of the machine."""

import jax
import pytest

from mlora_jax.config import expand_trials, resolve
from mlora_jax.run_folder import RunFolder


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
