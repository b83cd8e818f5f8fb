"""The read-outs of a run's trials: what was made of data is kept beside the adapter, and read again."""

from __future__ import annotations

import pathlib
from typing import Any

from mlora_jax.core import RankHierarchy, Reading, get_readout, read_out
from mlora_jax.parallel import hosts
from mlora_jax.parallel.arrays import fetch
from mlora_jax.run.experiment import Experiment
from mlora_jax.run.needs import collect
from mlora_jax.training.adapter_file import save_adapter
from mlora_jax.training.readout_files import adapter_beside, profiles_beside, read_profiles, write_profiles
from mlora_jax.trials import Trial


def read_out_trial(
    experiment: Experiment, trial: Trial, adapter: Any, hierarchy: RankHierarchy, readout: str, folder: pathlib.Path
) -> Reading:
    """A named read-out of a trained trial.

    Args:
      experiment: the run's.
      trial: one of its trials.
      adapter: its trained tree of factors.
      hierarchy: the adapter's ranks, scales and weights.
      readout: a key of `mlora_jax.core.READOUTS`; what it needs is collected from training data.
      folder: the adapter's folder. What was made of data is kept there, for
        `mlora_jax.training.readout_files.find_readout`, and fitted profiles are read again.
    """
    row, p = get_readout(readout), experiment.phases.trained_profile(trial)
    if row.stored == "profiles" and _on_first(profiles_beside(folder, readout).is_file):
        return Reading(adapter, hierarchy, readout, _stored_profiles(folder, readout))
    needed = collect(row.needs, experiment, trial, adapter, p, hierarchy=hierarchy)
    reading = read_out(adapter, hierarchy, readout, trained_profile=p, needed=needed)
    if row.stored == "profiles":
        hosts.on_first_process(lambda: write_profiles(folder, readout, hierarchy.ranks, needed["fitted_profiles"]))
        return reading._replace(profiles=_stored_profiles(folder, readout))
    if row.stored == "adapter":
        reading = reading._replace(adapter=fetch(reading.adapter))
        beside, description = adapter_beside(folder, readout), {"of": trial.name}
        hosts.on_first_process(lambda: save_adapter(beside, reading.adapter, reading.hierarchy, description))
    return reading


def _on_first(ask) -> bool:
    return hosts.broadcast(hosts.is_first() and ask())


def _stored_profiles(folder: pathlib.Path, readout: str) -> dict[int, Any]:
    """Reads the file and returns its contents in every process."""
    return hosts.broadcast(read_profiles(folder, readout) if hosts.is_first() else {})
