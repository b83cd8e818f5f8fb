"""Read-outs that look at data, as they lie beside the adapter that they were made from."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mlora_jax.core import RankHierarchy, readout_profile
from mlora_jax.disk import write_aside
from mlora_jax.train.adapter_file import DESCRIPTION

CALIBRATED = "calibrated.json"  # the profiles of "calibrated"
SQUEEZED = "squeeze_inputs"  # folder of the adapter whose prefixes are the read-out of that name


class FoundReadOut(NamedTuple):
    """A read-out of an adapter on disk, in terms of what needs no data.

    Attributes:
      folder: of the adapter to read.
      readout: of that adapter: a key of `READOUTS`, "squeeze" or "calibrated".
      profiles: of "calibrated": rank -> p [R]; None of the others.
    """

    folder: pathlib.Path
    readout: str
    profiles: Mapping[int, jax.Array] | None = None

    def profile(self, hierarchy: RankHierarchy, readout: str, rank: int) -> jax.Array:
        """p [R] at a rank in 0..R; `readout` is what `mlora_jax.evaluate.read_out` makes of `self.readout`.

        Raises:
          ValueError: a rank that nothing was fitted to.
        """
        return readout_profile(hierarchy, readout, rank) if self.profiles is None else fitted(self.profiles, rank)


def find_readout(folder, readout: str) -> FoundReadOut:
    """Where a read-out of an adapter lies.

    Args:
      folder: of the adapter.
      readout: of `READOUT_NAMES`.

    Raises:
      FileNotFoundError: one that looks at data, and was not made for this adapter.
      ValueError: a damaged file.
    """
    folder = pathlib.Path(folder)
    if readout == "calibrated":
        return FoundReadOut(folder, readout, read_profiles(folder))
    if readout == "squeeze_inputs":
        if not (folder / SQUEEZED / DESCRIPTION).is_file():
            raise FileNotFoundError(_missing(folder, readout))
        return FoundReadOut(folder / SQUEEZED, "prefix")
    return FoundReadOut(folder, readout)


def fitted(profiles: Mapping[int, jax.Array], rank: int) -> jax.Array:
    """The profile [R] that was fitted to a rank; zeros at rank 0.

    Raises:
      ValueError: none was.
    """
    if rank and rank not in profiles:
        raise ValueError(f"the read-out is calibrated at the ranks {', '.join(map(str, profiles))}, not at {rank}")
    return profiles[rank] if rank else jnp.zeros_like(next(iter(profiles.values())))


def write_profiles(folder, ranks: Sequence[int], profiles: np.ndarray) -> None:
    """Keeps profiles [ranks, R] beside the adapter that they were fitted to."""
    with write_aside(pathlib.Path(folder) / CALIBRATED) as aside:
        aside.write_text(json.dumps({"ranks": list(ranks), "profiles": profiles.tolist()}) + "\n", "utf-8")


def read_profiles(folder) -> dict[int, jax.Array]:
    """rank -> the profile [R] that was fitted to it.

    Raises:
      FileNotFoundError: none was fitted to this adapter.
      ValueError: a damaged file.
    """
    file = pathlib.Path(folder) / CALIBRATED
    if not file.is_file():
        raise FileNotFoundError(_missing(folder, "calibrated"))
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        return {rank: jnp.asarray(p, float) for rank, p in zip(record["ranks"], record["profiles"], strict=True)}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is damaged: {error}") from error


def _missing(folder, readout: str) -> str:
    return (
        f"the adapter in {folder} has no read-out {readout!r}, which is made of training data: run its experiment with "
        f"{readout!r} among config.evaluation.readouts of its method"
    )
