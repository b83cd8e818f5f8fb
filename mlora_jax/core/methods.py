"""Training methods. A method is a sequence of phases; a phase has a policy, a start action and an update rule."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax

from mlora_jax.core.actions import get_action
from mlora_jax.core.hierarchy import RankHierarchy
from mlora_jax.core.optimizers import get_optimizer
from mlora_jax.core.policies import POLICIES, Policy, get_policy
from mlora_jax.core.product import GATE_INITIALIZERS
from mlora_jax.core.rows import find_row
from mlora_jax.core.updates import Update, get_update

# The learning rate decays once over the whole run, or anew over every phase (warm restarts, arXiv 1608.03983).
SCHEDULES = ("run", "phase")


@dataclasses.dataclass(frozen=True)
class Phase:
    """A part of a training run.

    Attributes:
      policy: the rule that draws the profiles of its steps, a key of `POLICIES`.
      fraction: its share of the steps, above 0.
      start: the action on the adapter before its first step, a key of `ACTIONS`. If it is empty, the first phase starts
        as the experiment's config says (`adapter.init`, `adapter.start_from`), and a later phase has no action.
      update: the rule that changes Adam's update, a key of `UPDATES`.
    """

    policy: str
    fraction: float
    start: str = ""
    update: str = "none"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """How an adapter is trained: one phase, or several one after the other.

    Attributes:
      phases: at least one; their fractions sum to 1.
      summary: one line for tables and errors.
      schedule: the span over which the learning rate decays, one of `SCHEDULES`.
      gate: the start of the gates, a key of `mlora_jax.core.GATE_INITIALIZERS`, if every adapted layer has a gate, a
        trained vector that multiplies its profile; true is "ones". False: there are no gates.
      optimizer: the optimizer of all phases, a key of `mlora_jax.core.optimizers.OPTIMIZERS`.

    Raises:
      ValueError: no phase; an unknown policy, action or update; an action in a place where it cannot stand; an update
        of gates without gates; an unknown start of gates; an unknown optimizer, or one that cannot train gates or
        follow an action; fractions that do not sum to 1; an unknown schedule.

    >>> Method(phases=(Phase("lora", 0.7), Phase("per_example", 0.3, "squeeze")), summary="").starts(100)
    (0, 70)
    """

    phases: tuple[Phase, ...]
    summary: str
    schedule: str = "run"
    gate: bool | str = False
    optimizer: str = "adam"

    def __post_init__(self) -> None:
        if not self.phases:
            raise ValueError("a method needs at least one phase")
        for number, phase in enumerate(self.phases):
            get_policy(phase.policy)
            if phase.start and get_action(phase.start, "later" if number else "first").needs_gate and not self.gate:
                raise ValueError(f"the action {phase.start!r} makes gates, and the method has none: set gate=True")
            if get_update(phase.update).needs_gate and not self.gate:
                raise ValueError(f"the update {phase.update!r} acts on gates, and the method has none: set gate=True")
        fractions = [phase.fraction for phase in self.phases]
        if not all(0 < fraction <= 1 for fraction in fractions) or not math.isclose(sum(fractions), 1, abs_tol=1e-6):
            raise ValueError(f"the fractions of a method's phases must be above 0 and sum to 1, got {fractions}")
        if isinstance(self.gate, str) and self.gate not in GATE_INITIALIZERS:
            raise ValueError(f"unknown gate {self.gate!r}; known: {', '.join(GATE_INITIALIZERS)}")
        optimizer = get_optimizer(self.optimizer)
        if self.gate and not optimizer.gates:
            raise ValueError(f"the optimizer {self.optimizer!r} trains no gates, and the method has some")
        for phase in self.phases:
            needed = get_update(phase.update).needs_optimizer
            if needed and needed != self.optimizer:
                raise ValueError(
                    f"the update {phase.update!r} reads the state of the optimizer {needed!r}, and the method has "
                    f"{self.optimizer!r}"
                )
        following = [
            phase.start for phase in self.phases if phase.start and get_action(phase.start).moments == "mapped"
        ]
        if following and not optimizer.mapped:
            raise ValueError(
                f"the moments of the optimizer {self.optimizer!r} cannot follow the action {following[0]!r}; an action "
                "that starts them anew can stand there"
            )
        if self.schedule not in SCHEDULES:
            raise ValueError(f"unknown schedule {self.schedule!r}; known: {', '.join(SCHEDULES)}")

    @property
    def gate_start(self) -> str:
        """The key of `GATE_INITIALIZERS` from which gates start, if there are any."""
        return self.gate if isinstance(self.gate, str) else "ones"

    @property
    def policies(self) -> tuple[Policy, ...]:
        """The policy of every phase."""
        return tuple(get_policy(phase.policy) for phase in self.phases)

    @property
    def updates(self) -> tuple[Update, ...]:
        """The update rule of every phase."""
        return tuple(get_update(phase.update) for phase in self.phases)

    @property
    def uses_weights(self) -> bool:
        """Whether training depends on the hierarchy's weights w_r."""
        return any(policy.uses_weights for policy in self.policies)

    def trained_profile(self, hierarchy: RankHierarchy, phase: int = -1) -> jax.Array:
        """The profile [R] of the function that a phase trains at full rank, by default the last one.

        Args:
          hierarchy: the hierarchy of the phase, as the method `hierarchy` returns it.
          phase: the index of the phase.
        """
        return self.policies[phase].trained_profile(hierarchy)

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

        >>> both = Phase("lora", 0.7), Phase("per_example", 0.3, "squeeze")
        >>> [Method(phases=both, summary="", schedule=each).anneals_from(100) for each in SCHEDULES]
        [(0,), (0, 70)]
        """
        return self.starts(steps) if self.schedule == "phase" else (0,)

    def hierarchy(self, hierarchy: RankHierarchy, phase: int = -1) -> RankHierarchy:
        """Returns the hierarchy of a phase, by default the last, of a trial that starts with `hierarchy`."""
        for each in self.phases[: phase % len(self.phases) + 1]:
            hierarchy = get_action(each.start or "none").hierarchy(hierarchy)
        return hierarchy

    def cost(self, hierarchy: RankHierarchy) -> float:
        """Returns the forward and backward passes of a whole run relative to LoRA's; actions are not counted."""
        counts = [policy.count(self.hierarchy(hierarchy, at)) for at, policy in enumerate(self.policies)]
        return sum(phase.fraction * count for phase, count in zip(self.phases, counts, strict=True))


def _one_phase(policy: str) -> Method:
    return Method(phases=(Phase(policy, 1.0),), summary=POLICIES[policy].summary)


def _lora(summary: str, *, start: str = "", update: str = "none", **options: Any) -> Method:
    """Returns a method of one phase with LoRA's profile."""
    return Method(phases=(Phase("lora", 1.0, start, update),), summary=summary, **options)


# The methods of other papers; docs/methods.md has their equations and what differs from their authors' code.
FIELD: dict[str, Method] = {
    "lora_plus": _lora("LoRA+, arXiv 2402.12354", update="lora_plus"),
    "scaled_adam": _lora("scaled AdamW of Riemannian preconditioned LoRA, arXiv 2402.02347", optimizer="scaled_adam"),
    "lora_rite": _lora("LoRA-RITE, arXiv 2410.20625", optimizer="lora_rite"),
    "lora_squeeze": Method(
        phases=(Phase("lora", 0.9), Phase("lora", 0.1, "squeeze_to_half")),
        summary="LoRA-Squeeze, arXiv 2602.10993: LoRA of rank R, squeezed to R/2 for the last 10 % of the steps",
    ),
    "lora_squeeze_annealed": Method(
        phases=(Phase("lora", 0.4), Phase("lora", 0.3, "squeeze_to_half"), Phase("lora", 0.3, "squeeze_to_quarter")),
        summary="LoRA-Squeeze in training: the rank falls from R to R/2 after 40 % and to R/4 after 70 % of the steps",
    ),
    "pissa": _lora("PiSSA, arXiv 2404.02948, of rank R/2", start="pissa", update="lower_half"),
    "olora": _lora("OLoRA, arXiv 2406.01775, of rank R/2", start="olora", update="lower_half"),
    "svfit": _lora("SVFit, arXiv 2409.05926, of rank R/2", start="svfit", update="lower_half_gates", gate="ones"),
    "eva": _lora("EVA, arXiv 2410.07170, of rank R/2 in the mean over layers", start="eva"),
    "maestro": _lora("Maestro, arXiv 2308.14929", update="ordered_dropout"),
    "adalora": _lora(
        "AdaLoRA, arXiv 2303.10512, whose budget falls to 2/3 of the components",
        start="small_normal",
        update="budget",
        gate="zeros",
        optimizer="adalora",
    ),
    "sora": _lora("SoRA, arXiv 2311.11696, without a schedule", update="soft_threshold", gate="normal"),
    "codyra": _lora("CoDyRA, arXiv 2412.01004", update="soft_threshold_late", gate="uniform"),
    "sora_schedule": _lora("SoRA from dense to sparse", update="soft_threshold_rising", gate="normal"),
}

# Every policy is a method of one phase. Adding a method is adding a row.
METHODS: Mapping[str, Method] = MappingProxyType(
    {
        **{name: _one_phase(name) for name in POLICIES},
        "renest": Method(
            phases=(Phase("lora", 0.7), Phase("per_example", 0.3, "squeeze")),
            summary="LoRA, squeezed after 70 % of the steps, then a prefix for each example",
        ),
        "renest_30_rotated": Method(
            phases=(Phase("lora", 0.3), Phase("per_example", 0.7, "squeeze_rotated")),
            summary="renest, squeezed after 30 % of the steps, the optimizer's moments taken along",
        ),
        "renest_sandwich": Method(
            phases=(Phase("lora", 0.5), Phase("sandwich", 0.5, "squeeze")),
            summary="LoRA, squeezed after half of the steps, then the sandwich rule",
        ),
        **FIELD,
    }
)


def get_method(name: str, further: Mapping[str, Method] = MappingProxyType({})) -> Method:
    """Returns the method that has the given name.

    Args:
      name: a key of `METHODS` or of `further`.
      further: methods besides those of the table.

    Raises:
      ValueError: there is none; the message names the nearest and all known ones.
    """
    return find_row({**METHODS, **further}, name, "method")
