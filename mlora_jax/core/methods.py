"""Training methods: policies one after the other, with a squeeze between them."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

import jax

from mlora_jax.core.hierarchy import RankHierarchy
from mlora_jax.core.policies import POLICIES, Policy, get_policy

# What becomes of the optimizer's moments, and of the learning rate, where the factors are squeezed.
CARRIES = ("reset", "rotate", "restart")


@dataclasses.dataclass(frozen=True)
class Phase:
    """A part of a training run.

    Attributes:
      policy: a key of `POLICIES`.
      fraction: its share of the steps, above 0.
    """

    policy: str
    fraction: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """How an adapter is trained: one policy, or several in turn.

    Between two phases the factors are squeezed (`mlora_jax.squeeze`): the function that the ending phase trains at full
    rank stays, and its columns come in the order of their worth. Its scale is inside the factors from then on, so later
    phases use a scaling of none.

    Attributes:
      phases: at least one; their fractions sum to 1.
      summary: one line for tables and errors.
      carry: of `CARRIES`; "rotate" takes the optimizer's moments along with the factors, "reset" starts them anew, and
        "restart" the learning rate too: it falls to zero in every phase (warm restarts, arXiv 1608.03983).

    Raises:
      ValueError: no phase, an unknown policy, fractions that do not sum to 1, an unknown carry.

    >>> Method(phases=(Phase("lora", 0.7), Phase("per_example", 0.3)), summary="").starts(100)
    (0, 70)
    """

    phases: tuple[Phase, ...]
    summary: str
    carry: str = "reset"

    def __post_init__(self):
        if not self.phases:
            raise ValueError("a method needs at least one phase")
        for phase in self.phases:
            get_policy(phase.policy)
        fractions = [phase.fraction for phase in self.phases]
        if not all(0 < fraction <= 1 for fraction in fractions) or not math.isclose(sum(fractions), 1, abs_tol=1e-6):
            raise ValueError(f"the fractions of a method's phases must be above 0 and sum to 1, got {fractions}")
        if self.carry not in CARRIES:
            raise ValueError(f"unknown carry {self.carry!r}; known: {', '.join(CARRIES)}")

    @property
    def policies(self) -> tuple[Policy, ...]:
        """One per phase."""
        return tuple(get_policy(phase.policy) for phase in self.phases)

    @property
    def uses_weights(self) -> bool:
        """Whether training depends on the hierarchy's weights w_r."""
        return any(policy.uses_weights for policy in self.policies)

    @property
    def trained_profile(self) -> Callable[[RankHierarchy], jax.Array]:
        """`Policy.trained_profile` of the last phase."""
        return self.policies[-1].trained_profile

    def starts(self, steps: int) -> tuple[int, ...]:
        """The number of finished steps at which each phase begins.

        Raises:
          ValueError: too few steps for every phase to have one.
        """
        share, starts = 0.0, [0]
        for phase in self.phases[:-1]:
            share += phase.fraction
            starts.append(round(share * steps))
        if any(later <= earlier for earlier, later in zip(starts, (*starts[1:], steps), strict=True)):
            names = ", ".join(phase.policy for phase in self.phases)
            raise ValueError(
                f"{steps} optimizer steps are too few for the phases {names}, which would begin after {starts} of "
                "them: train for more epochs or on smaller batches, or choose another method"
            )
        return tuple(starts)

    def anneals_from(self, steps: int) -> tuple[int, ...]:
        """The number of finished steps at which the learning rate is at its peak and begins to fall to zero.

        >>> both = Phase("lora", 0.7), Phase("per_example", 0.3)
        >>> [Method(phases=both, summary="", carry=carry).anneals_from(100) for carry in ("reset", "restart")]
        [(0,), (0, 70)]
        """
        return self.starts(steps) if self.carry == "restart" else (0,)

    def hierarchy(self, hierarchy: RankHierarchy, phase: int = -1) -> RankHierarchy:
        """S, scales and weights in a phase, of a trial that starts with `hierarchy`; by default at the end."""
        if phase % len(self.phases) == 0:
            return hierarchy
        return dataclasses.replace(hierarchy, scaling="none")

    def cost(self, hierarchy: RankHierarchy) -> float:
        """Forward and backward passes relative to LoRA over the whole run; squeezing is not counted."""
        counts = [policy.count(self.hierarchy(hierarchy, at)) for at, policy in enumerate(self.policies)]
        return sum(phase.fraction * count for phase, count in zip(self.phases, counts, strict=True))


def _one_phase(policy: str) -> Method:
    return Method(phases=(Phase(policy, 1.0),), summary=POLICIES[policy].summary)


# Every policy is a method of one phase. Adding a method is adding a row.
METHODS: Mapping[str, Method] = MappingProxyType(
    {
        **{name: _one_phase(name) for name in POLICIES},
        "renest": Method(
            phases=(Phase("lora", 0.7), Phase("per_example", 0.3)),
            summary="LoRA, squeezed after 70 % of the steps, then a prefix for each example",
        ),
        "renest_30_rotated": Method(
            phases=(Phase("lora", 0.3), Phase("per_example", 0.7)),
            summary="renest, squeezed after 30 % of the steps, the optimizer's moments taken along",
            carry="rotate",
        ),
        "renest_sandwich": Method(
            phases=(Phase("lora", 0.5), Phase("sandwich", 0.5)),
            summary="LoRA, squeezed after half of the steps, then the sandwich rule",
        ),
    }
)


def get_method(name: str, further: Mapping[str, Method] = MappingProxyType({})) -> Method:
    """The method of that name.

    Args:
      name: a key of `METHODS` or of `further`.
      further: methods besides those of the table.

    Raises:
      ValueError: there is none; the message names the nearest and all known ones.
    """
    known = {**METHODS, **further}
    if name not in known:
        near = difflib.get_close_matches(str(name), known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise ValueError(f"unknown method {name!r}{hint} Known methods: {', '.join(known)}")
    return known[name]
