"""Read-outs: a read-out makes an adapter for each rank from a trained adapter. `READOUTS` is the table of them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mlora_jax.core.actions import ActionInput, get_action, run_action
from mlora_jax.core.hierarchy import RankHierarchy, check_rank
from mlora_jax.core.importance import layer_masks, spread_ranks
from mlora_jax.core.rows import find_row

Tree = Any

# Beside the trained adapter, a read-out stores nothing, another adapter, or profiles.
STORED = ("", "adapter", "profiles")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReadOut:
    """A row of `READOUTS`. It applies an action to the trained adapter and then gives a profile for every rank.

    Attributes:
      summary: one line for tables and errors.
      profile: (hierarchy, rank) -> [R], the profile that reads out the trained adapter itself. An adapter that an
        action made is read out by prefix.
      action: a key of `mlora_jax.core.actions.ACTIONS`.
      stored: the kind of result that is stored beside the trained adapter, one of `STORED`; its file or folder has the
        read-out's name.
      label: the name of a method under this read-out in tables and figures.
    """

    summary: str
    profile: Callable[[RankHierarchy, int], jax.Array] = RankHierarchy.prefix
    action: str = "none"
    stored: str = ""
    label: str = "{method} ({readout})"

    @property
    def needs(self) -> tuple[str, ...]:
        """Returns the names of the inputs that the read-out's action needs besides the adapter."""
        return get_action(self.action).needs


# To add a read-out, add a row. Reports show read-outs in this order.
READOUTS: dict[str, ReadOut] = {
    "prefix": ReadOut(summary="the first r columns at the scale s_r, as in the paper", label="{method}"),
    "squeeze": ReadOut(
        summary="prefixes of the truncated SVD of the trained function", action="squeeze", label="{method} + squeeze"
    ),
    "nested": ReadOut(summary="the training diagonal over the ranks of S up to r", profile=RankHierarchy.nested),
    "masked": ReadOut(summary="the training diagonal cut at r", profile=RankHierarchy.masked),
    "squeeze_randomized": ReadOut(
        summary="prefixes of a randomised SVD of the trained function",
        action="squeeze_randomized",
        label="{method} + randomised squeeze",
    ),
    "ordered": ReadOut(
        summary="the r largest components of the trained function in every layer",
        action="ordered",
        label="{method} + ordered",
    ),
    "ordered_global": ReadOut(
        summary="the largest components of the trained function, r per layer in the mean",
        action="ordered_global",
        label="{method} + ordered, globally",
    ),
    "squeeze_inputs": ReadOut(
        summary="prefixes of the truncated SVD of the trained function's outputs on training data",
        action="squeeze_inputs",
        stored="adapter",
    ),
    "calibrated": ReadOut(
        summary="profiles that are fitted to training data, one for each rank",
        action="calibrated",
        stored="profiles",
    ),
}


class Reading(NamedTuple):
    """An adapter and its profiles, in the form in which a trained adapter is measured or exported.

    Attributes:
      adapter: the tree of factors. It is the trained one, unless the read-out's action made another.
      hierarchy: the ranks, scales and weights of that adapter.
      name: the read-out of that adapter, a key of `READOUTS`. It is "prefix" if an action made the adapter.
      profiles: a dictionary: rank of S -> [R], if the action made profiles; otherwise None.
      norms: `ActionOutput.norms`, if a rank is spread over the layers; otherwise None.
    """

    adapter: Tree
    hierarchy: RankHierarchy
    name: str
    profiles: Mapping[int, jax.Array] | None = None
    norms: Mapping[str, np.ndarray] | None = None

    def layer_profile(self, rank: int) -> jax.Array:
        """Returns the profile [R] of a layer that has the given rank. At rank 0 it is zero.

        Args:
          rank: an integer in 0..R; if the action made profiles, 0 or a rank of S.

        Raises:
          ValueError: the rank is outside 0..R, or no profile was fitted to it.
        """
        if self.profiles is None:
            return readout_profile(self.hierarchy, self.name, rank)
        return fitted_profile(self.profiles, rank)

    def layer_ranks(self, rank: int) -> dict[str, np.ndarray] | None:
        """Returns a dictionary: path -> ranks [...] of its layers, whose mean is `rank`; None where all are equal.

        Raises:
          ValueError: the rank is outside 0..R.
        """
        if self.norms is None:
            return None
        return spread_ranks(self.norms, check_rank(rank, "rank of a read-out", low=0, high=self.hierarchy.max_rank))

    def profile(self, rank: int) -> jax.Array | dict[str, jax.Array]:
        """Returns the profile for a rank as `mlora_jax.set_profile` takes it. At rank 0 it is the base model's.

        It is an array [R], or a dictionary: pattern of a path -> [..., R] where ranks are spread over the layers.

        Args:
          rank: as in `layer_profile`; where ranks are spread, it is their mean.

        Raises:
          ValueError: the rank is outside 0..R, or no profile was fitted to it.
        """
        ranks = self.layer_ranks(rank)
        if ranks is None:
            return self.layer_profile(rank)
        masks = layer_masks(ranks, self.hierarchy.max_rank)
        return {re.escape(path): jnp.asarray(mask, float) for path, mask in masks.items()}

    def curve(self) -> dict[int, Any]:
        """Returns a dictionary: rank of S -> its profile, see `profile`."""
        return {rank: self.profile(rank) for rank in self.hierarchy.ranks}


def get_readout(name: str) -> ReadOut:
    """Returns the read-out that has the given name.

    Raises:
      ValueError: no read-out has this name; the message names the nearest and all known ones.
    """
    return find_row(READOUTS, name, "read-out")


def readout_label(method: str, readout: str) -> str:
    """Returns the name of a method under a read-out in tables and figures. An unknown read-out is put in brackets.

    >>> readout_label("lora", "squeeze"), readout_label("lora", "masked")
    ('lora + squeeze', 'lora (masked)')
    """
    label = READOUTS[readout].label if readout in READOUTS else ReadOut.label
    return label.format(method=method, readout=readout)


def readouts_without_data() -> tuple[str, ...]:
    """Returns the names of the read-outs that need no input besides the adapter."""
    return tuple(name for name, row in READOUTS.items() if not row.needs)


def read_out(
    adapter: Tree,
    hierarchy: RankHierarchy,
    readout: str,
    *,
    trained_profile: jax.Array | None = None,
    needed: Mapping[str, Any] | None = None,
) -> Reading:
    """Reads an adapter out.

    Args:
      adapter: the trained tree of factors.
      hierarchy: its ranks, scales and weights.
      readout: a key of `READOUTS`.
      trained_profile: [R], the profile of the trained function, which some actions preserve; None: `hierarchy.lora()`.
      needed: a dictionary: the name of every input in `ReadOut.needs` -> its value.

    Returns:
      The adapter that is measured or exported, and its profiles.

    Raises:
      ValueError: the read-out is unknown, or an input that it needs is missing.
    """
    row = get_readout(readout)
    action, needed = get_action(row.action, "end"), dict(needed or {})
    missing = [name for name in action.needs if name not in needed]
    if missing:
        raise ValueError(
            f"the read-out {readout!r} needs {', '.join(missing)}, which only a run can collect; read-outs that take "
            f"the adapter alone: {', '.join(readouts_without_data())}"
        )
    p = hierarchy.lora() if trained_profile is None else trained_profile
    made = run_action(action, ActionInput(adapter=adapter, trained_profile=p, key=jax.random.key(0), needed=needed))
    if row.action == "none":
        return Reading(adapter, hierarchy, readout)
    if made.profiles is not None:
        return Reading(made.adapter, hierarchy, readout, dict(zip(hierarchy.ranks, made.profiles, strict=True)))
    # Weights only matter in training, and an adapter that an action made is not trained any more.
    changed = dataclasses.replace(action.hierarchy(hierarchy), weights=None)
    norms = None if made.norms is None else {path: np.asarray(each) for path, each in made.norms.items()}
    return Reading(made.adapter, changed, "prefix", norms=norms)


def readout_profile(hierarchy: RankHierarchy, readout: str, rank: int) -> jax.Array:
    """Returns the profile [R] of a read-out that does not change the adapter.

    Args:
      hierarchy: the adapter's ranks, scales and weights.
      readout: a key of `READOUTS` whose action is "none".
      rank: an integer in 0..R.

    Raises:
      ValueError: the read-out is unknown, makes another adapter or fits profiles; or the rank is outside 0..R.

    >>> readout_profile(RankHierarchy((1, 2)), "masked", 1).tolist()
    [2.0, 0.0]
    """
    row = get_readout(readout)
    if row.action != "none":
        known = ", ".join(name for name, other in READOUTS.items() if other.action == "none")
        raise ValueError(f"the read-out {readout!r} is not a profile of the adapter itself; those that are: {known}")
    return row.profile(hierarchy, rank)


def fitted_profile(profiles: Mapping[int, jax.Array], rank: int) -> jax.Array:
    """Returns the profile [R] that was fitted to a rank, or zeros for rank 0.

    Args:
      profiles: a dictionary: rank -> the profile [R] that was fitted to it.
      rank: 0 or a key of `profiles`.

    Raises:
      ValueError: no profile was fitted to the rank.
    """
    if rank and rank not in profiles:
        raise ValueError(f"the read-out is calibrated at the ranks {', '.join(map(str, profiles))}, not at {rank}")
    return profiles[rank] if rank else jnp.zeros_like(next(iter(profiles.values())))
