"""The read-outs of a run's trials: an adapter and one profile for every rank of S."""

from __future__ import annotations

import json
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mlora_jax.adapt import set_profile
from mlora_jax.config import Trial
from mlora_jax.core import RankHierarchy, readout_profile
from mlora_jax.evaluate import read_out
from mlora_jax.experiment import Experiment
from mlora_jax.models.hugging_face import write_aside
from mlora_jax.train.calibrate import calibrate
from mlora_jax.train.loop import trial_keys
from mlora_jax.train.objective import answer_loss

CALIBRATED = "calibrated.json"


class ReadOut(NamedTuple):
    """What an adapter is measured as.

    Attributes:
      adapter: tree of factors; another one than was trained if the read-out is a squeeze.
      profiles: rank of S -> p [R].
    """

    adapter: Any
    profiles: dict[int, jax.Array]


def read_out_trial(
    experiment: Experiment, trial: Trial, adapter, hierarchy: RankHierarchy, readout: str, folder
) -> ReadOut:
    """A named read-out of a trained trial.

    Args:
      experiment: of the run.
      trial: of it.
      adapter: trained tree.
      hierarchy: of the adapter.
      readout: of `READOUT_NAMES`. "calibrated" and "squeeze_inputs" run the model on training data.
      folder: of the adapter; profiles that were fitted are kept there and read again.
    """
    if readout == "calibrated":
        profiles = _calibrated(experiment, trial, adapter, hierarchy, pathlib.Path(folder) / CALIBRATED)
        return ReadOut(adapter, profiles)
    adapted = experiment.adapted(trial.rank)
    adapter, hierarchy, name = read_out(adapter, adapted.profile, hierarchy, readout, experiment.phases.function(trial))
    return ReadOut(adapter, {rank: readout_profile(hierarchy, name, rank) for rank in hierarchy.ranks})


def _calibrated(experiment: Experiment, trial: Trial, adapter, hierarchy: RankHierarchy, file: pathlib.Path) -> dict:
    if not file.is_file():
        adapted, options = experiment.adapted(trial.rank), experiment.config.calibration

        def loss(profiles, batch):
            values = set_profile(adapted.profile, profiles, per_example=True)
            return answer_loss(
                adapted.evaluation_graphdef,
                adapted.base,
                adapter,
                values,
                batch,
                chunk=experiment.config.train.loss_chunk,
            )

        profiles = calibrate(
            loss,
            hierarchy,
            _batches(experiment, trial),
            steps=options.steps,
            learning_rate=options.learning_rate,
            key=jax.random.fold_in(trial_keys(trial.seed).draws, experiment.steps),
        )
        with write_aside(file) as aside:
            aside.write_text(json.dumps({"ranks": hierarchy.ranks, "profiles": profiles.tolist()}) + "\n", "utf-8")
    return read_calibrated(file.parent)


def read_calibrated(folder) -> dict[int, jax.Array]:
    """rank -> the profile [R] that was fitted to it.

    Raises:
      FileNotFoundError: none was fitted to this adapter.
    """
    file = pathlib.Path(folder) / CALIBRATED
    if not file.is_file():
        raise FileNotFoundError(
            f"{folder} has no {CALIBRATED}: run its experiment with 'calibrated' among config.evaluation.readouts"
        )
    record = json.loads(file.read_text(encoding="utf-8"))
    return {rank: jnp.asarray(p, float) for rank, p in zip(record["ranks"], record["profiles"], strict=True)}


def _batches(experiment: Experiment, trial: Trial):
    """Training batches of a trial in its own order, micro-batches joined."""
    for arrays in experiment.pipeline([trial]):
        yield {name: np.reshape(part, (-1, part.shape[-1])) for name, part in arrays.items()}  # [M * B, ...]
