"""Read-outs that are made from training data and stored beside the adapter that they were made from."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mlora_jax.core import RankHierarchy, Reading, get_readout, read_out
from mlora_jax.disk import write_aside
from mlora_jax.training.adapter_file import DESCRIPTION


class StoredReadOut(NamedTuple):
    """A read-out of an adapter on disk, expressed by files and read-outs that need no data.

    Attributes:
      folder: the folder of the adapter to read.
      name: the read-out of that adapter, a key of `READOUTS`.
      profiles: rank -> p [R] where profiles are stored, otherwise None.
    """

    folder: pathlib.Path
    name: str
    profiles: Mapping[int, jax.Array] | None = None

    def read(self, adapter: Any, hierarchy: RankHierarchy, trained_profile: jax.Array | None) -> Reading:
        """Reads out the adapter of `folder`; the arguments are those of `mlora_jax.core.read_out`."""
        if self.profiles is not None:
            return Reading(adapter, hierarchy, self.name, self.profiles)
        return read_out(adapter, hierarchy, self.name, trained_profile=trained_profile)


def find_readout(folder: str | pathlib.Path, readout: str) -> StoredReadOut:
    """Finds where a read-out of an adapter is stored.

    Args:
      folder: the adapter's folder.
      readout: a key of `READOUTS`.

    Raises:
      FileNotFoundError: the read-out is made from data and was not made for this adapter.
      ValueError: the read-out is unknown, or a file is damaged.
    """
    folder = pathlib.Path(folder)
    stored = get_readout(readout).stored
    if stored == "profiles":
        return StoredReadOut(folder, readout, read_profiles(folder, readout))
    if stored == "adapter":
        own = adapter_beside(folder, readout)
        if not (own / DESCRIPTION).is_file():
            raise FileNotFoundError(_missing(folder, readout))
        return StoredReadOut(own, "prefix")
    return StoredReadOut(folder, readout)


def adapter_beside(folder: str | pathlib.Path, readout: str) -> pathlib.Path:
    """Returns the folder of the adapter that a read-out made, beside the adapter in `folder`."""
    return pathlib.Path(folder) / readout


def profiles_beside(folder: str | pathlib.Path, readout: str) -> pathlib.Path:
    """Returns the file of the profiles that a read-out fitted to the adapter in `folder`."""
    return pathlib.Path(folder) / f"{readout}.json"


def write_profiles(folder: str | pathlib.Path, readout: str, ranks: Sequence[int], profiles: np.ndarray) -> None:
    """Writes profiles [ranks, R] beside the adapter that they were fitted to."""
    with write_aside(profiles_beside(folder, readout)) as aside:
        aside.write_text(json.dumps({"ranks": list(ranks), "profiles": profiles.tolist()}) + "\n", "utf-8")


def read_profiles(folder: str | pathlib.Path, readout: str) -> dict[int, jax.Array]:
    """Reads the profiles that were fitted to an adapter.

    Args:
      folder: the adapter's folder.
      readout: a key of `READOUTS`.

    Returns:
      rank -> the profile [R] that was fitted to it.

    Raises:
      FileNotFoundError: no profiles were fitted to this adapter.
      ValueError: the file is damaged.
    """
    file = profiles_beside(folder, readout)
    if not file.is_file():
        raise FileNotFoundError(_missing(folder, readout))
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        return {rank: jnp.asarray(p, float) for rank, p in zip(record["ranks"], record["profiles"], strict=True)}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is damaged: {error}") from error


def _missing(folder: str | pathlib.Path, readout: str) -> str:
    return (
        f"the adapter in {folder} has no read-out {readout!r}, which is made of training data: run its experiment with "
        f"{readout!r} among config.evaluation.readouts of its method"
    )
