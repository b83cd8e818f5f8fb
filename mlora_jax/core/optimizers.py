"""Optimizers for pairs of factors: what comes before Adam, or stands in its place. `OPTIMIZERS` is the table of them.

Every row makes a pair of pure functions with the contract of an `optax.GradientTransformation`, on trees whose leaves
are named as in `mlora_jax.core.rank_axes`. A method names one row for all of its phases, so that its state has one
shape. To add an optimizer, add a row.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

from mlora_jax.core.adalora import sensitivities
from mlora_jax.core.preconditioners import lora_rite, scaled_gradients
from mlora_jax.core.rows import find_row
from mlora_jax.core.transforms import Numbers, Transform


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizer:
    """A row of `OPTIMIZERS`.

    Attributes:
      summary: one line for tables and errors.
      before: (Numbers) -> Transform between the clipping of gradients and Adam; None if there is none.
      instead: (Numbers) -> Transform in the place of clipping and of Adam; None if Adam stays.
      gates: whether it can train gates.
      mapped: whether its state can follow a change of the factors (an action whose moments are "mapped").
    """

    summary: str
    before: Callable[[Numbers], Transform] | None = None
    instead: Callable[[Numbers], Transform] | None = None
    gates: bool = True
    mapped: bool = True


OPTIMIZERS: dict[str, Optimizer] = {
    "adam": Optimizer(summary="Adam"),
    "adalora": Optimizer(
        summary="Adam with AdaLoRA's regulariser; the sensitivity of every entry is averaged",
        before=sensitivities,
        mapped=False,
    ),
    "scaled_adam": Optimizer(
        summary="Adam on gradients that are scaled by the other factor's inverse Gram matrix",
        before=scaled_gradients,
        mapped=False,
    ),
    "scaled_adam_blocks": Optimizer(
        summary="scaled_adam, block by block of S",
        before=functools.partial(scaled_gradients, blocks=True),
        mapped=False,
    ),
    "lora_rite": Optimizer(
        summary="LoRA-RITE, whose update does not depend on the pair of factors",
        instead=lora_rite,
        gates=False,
        mapped=False,
    ),
    "lora_rite_blocks": Optimizer(
        summary="LoRA-RITE, block by block of S, whose update of every prefix does not depend on the pair of factors",
        instead=functools.partial(lora_rite, blocks=True),
        gates=False,
        mapped=False,
    ),
}


def get_optimizer(name: str) -> Optimizer:
    """Returns the optimizer that has the given name.

    Raises:
      ValueError: no optimizer has this name; the message names the nearest and all known ones.
    """
    return find_row(OPTIMIZERS, name, "optimizer")
