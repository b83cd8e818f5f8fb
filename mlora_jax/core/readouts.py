"""How a trained adapter is read out at a rank: one table of read-outs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mlora_jax.core.actions import ActionInput, get_action, run_action
from mlora_jax.core.hierarchy import RankHierarchy
from mlora_jax.core.rows import find_row

Tree = Any

# A read-out stores nothing, another adapter, or profiles beside the adapter that it is made from.
STORED = ("", "adapter", "profiles")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReadOut:
    """A row of `READOUTS`: an action on the trained adapter, and then a profile for every rank.

    Attributes:
      summary: one line for tables and errors.
      profile: (hierarchy, rank) -> [R], the profile that reads out the adapter itself; an adapter that an action makes
        is read out by prefix.
      action: a key of `mlora_jax.core.actions.ACTIONS`.
      stored: what is stored beside the trained adapter, one of `STORED`; the file or folder has the read-out's name.
      label: the name of a method under this read-out in tables and figures.
    """

    summary: str
    profile: Callable[[RankHierarchy, int], jax.Array] = RankHierarchy.prefix
    action: str = "none"
    stored: str = ""
    label: str = "{method} ({readout})"

    @property
    def needs(self) -> tuple[str, ...]:
        """The names of what it needs besides the adapter: the needs of its action."""
        return get_action(self.action).needs


# Adding a read-out is adding a row. Reports show them in this order.
READOUTS: dict[str, ReadOut] = {
    "prefix": ReadOut(summary="the first r columns at the scale s_r, as in the paper", label="{method}"),
    "squeeze": ReadOut(
        summary="prefixes of the truncated SVD of the trained function", action="squeeze", label="{method} + squeeze"
    ),
    "nested": ReadOut(summary="what the training sum becomes with only r columns", profile=RankHierarchy.nested),
    "masked": ReadOut(summary="the training diagonal cut at r", profile=RankHierarchy.masked),
    "squeeze_inputs": ReadOut(
        summary="prefixes of the truncated SVD of what the trained function makes of training data",
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
    """The form in which a trained adapter is measured or exported: an adapter and its profiles.

    Attributes:
      adapter: the tree of factors; another one than was trained if the read-out's action makes one.
      hierarchy: the ranks, scales and weights of that adapter.
      name: the read-out of that adapter, a key of `READOUTS`: "prefix" where an action has made it.
      profiles: a dictionary: rank of S -> [R], if the action gives the profiles; else None.
    """

    adapter: Tree
    hierarchy: RankHierarchy
    name: str
    profiles: Mapping[int, jax.Array] | None = None

    def profile(self, rank: int) -> jax.Array:
        """The profile [R] that serves a rank; zeros at rank 0, which is the base model.

        Raises:
          ValueError: a rank outside 0..R, or one that no profile was fitted to.
        """
        if self.profiles is None:
            return readout_profile(self.hierarchy, self.name, rank)
        return fitted_profile(self.profiles, rank)

    def curve(self) -> dict[int, jax.Array]:
        """Returns a dictionary: rank of S -> the profile [R] that serves it."""
        return {rank: self.profile(rank) for rank in self.hierarchy.ranks}


def get_readout(name: str) -> ReadOut:
    """Returns the read-out that has the given name.

    Raises:
      ValueError: there is none; the message names the nearest and all known ones.
    """
    return find_row(READOUTS, name, "read-out")


def readout_label(method: str, readout: str) -> str:
    """Returns the name of a method under a read-out in tables and figures; an unknown read-out stands in brackets.

    >>> readout_label("lora", "squeeze"), readout_label("lora", "masked")
    ('lora + squeeze', 'lora (masked)')
    """
    label = READOUTS[readout].label if readout in READOUTS else ReadOut.label
    return label.format(method=method, readout=readout)


def readouts_without_data() -> tuple[str, ...]:
    """The names of the read-outs that take nothing but the adapter."""
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
      trained_profile: [R], the profile of the trained function, which some actions keep; None is `hierarchy.lora()`.
      needed: a dictionary: the name of every need of the read-out -> its value.

    Raises:
      ValueError: an unknown read-out, or one whose needs are not given.
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
    # Weights belong to training: the prefixes of an adapter that an action has made carry none.
    changed = dataclasses.replace(action.hierarchy(hierarchy), weights=None)
    return Reading(made.adapter, changed, "prefix")


def readout_profile(hierarchy: RankHierarchy, readout: str, rank: int) -> jax.Array:
    """Returns the profile [R] at a rank in 0..R of a read-out that changes no adapter.

    Raises:
      ValueError: an unknown read-out, one that makes another adapter or fits profiles, or a rank outside 0..R.

    >>> readout_profile(RankHierarchy((1, 2)), "masked", 1).tolist()
    [2.0, 0.0]
    """
    row = get_readout(readout)
    if row.action != "none":
        known = ", ".join(name for name, other in READOUTS.items() if other.action == "none")
        raise ValueError(f"the read-out {readout!r} is not a profile of the adapter itself; those that are: {known}")
    return row.profile(hierarchy, rank)


def fitted_profile(profiles: Mapping[int, jax.Array], rank: int) -> jax.Array:
    """Returns the profile [R] that was fitted to a rank; zeros at rank 0.

    Raises:
      ValueError: none was fitted to it.
    """
    if rank and rank not in profiles:
        raise ValueError(f"the read-out is calibrated at the ranks {', '.join(map(str, profiles))}, not at {rank}")
    return profiles[rank] if rank else jnp.zeros_like(next(iter(profiles.values())))
