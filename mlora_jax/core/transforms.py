"""What optimizers and proximal steps are given and return: pure functions on the trees of an adapter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

Tree = Any


class Transform(NamedTuple):
    """A gradient transformation.

    Attributes:
      init: (adapter) -> state.
      update: (gradients, state, adapter) -> (updates, state).
    """

    init: Callable[[Tree], Any]
    update: Callable[[Tree, Any, Tree], tuple[Tree, Any]]


class Numbers(NamedTuple):
    """The numbers of Adam that a config sets, and the ranks S of the adapter.

    Attributes:
      beta1: the decay of the first moment.
      beta2: the decay of the second moment.
      epsilon: the number that is added to the root of the second moment.
      clip: the largest global norm; 0 turns clipping off.
      ranks: S, whose ranks are the edges of the blocks of an optimizer that works block by block.
    """

    beta1: float
    beta2: float
    epsilon: float
    clip: float
    ranks: tuple[int, ...] = ()


class AfterUpdate(NamedTuple):
    """The numbers that a proximal step may use besides the adapter. They are data.

    Attributes:
      strength: scalar, `Update.strength` of the trial's rule.
      progress: scalar in (0, 1], the share of the run's steps that are finished after this one.
      learning_rate: scalar, the learning rate of this step.
      optimizer: the state of the optimizer after this step.
    """

    strength: Any
    progress: Any
    learning_rate: Any
    optimizer: Any = None


class StepRule(NamedTuple):
    """The functions of an update rule that are a part of the compiled training step.

    Attributes:
      proximal: (adapter, `AfterUpdate`) -> adapter, applied after the update; None if there is none.
      perturb: (adapter, key) -> adapter, applied inside the loss: the gradient is taken through it, and what is trained
        is its argument. The key is another one at each step, and the same for all examples of a step. None if there is
        none.
    """

    proximal: Callable[[Tree, AfterUpdate], Tree] | None = None
    perturb: Callable[[Tree, jax.Array], Tree] | None = None
