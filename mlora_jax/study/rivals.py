"""The rivals that the study compares, and the groups in which they are trained."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from mlora_jax.core import SCALINGS, powers_of_two
from mlora_jax.trials import Trial


@dataclasses.dataclass(frozen=True)
class Rival:
    """A rival, which is a row of the study's tables: a way to train an adapter and to read it out.

    Attributes:
      method: the name of a method, of `mlora_jax.core.METHODS` or of `config.methods`.
      readout: the read-out of the curve, a key of `mlora_jax.core.READOUTS`.
      scaling: the rule for s_r, a key of `mlora_jax.core.SCALINGS`.
      weights: the rule for w_r: "uniform" (1 each), "mean" (1 / |S| each), "inverse" (1 / s_r) or "ends" (a third for
        the smallest rank, a third for the largest, and the rest for those between: the sandwich rule as shares).
      rank: the rank at which the adapter is trained; None means R. A rival with a rank is measured at this rank only.
        The rivals of `separate` are of this kind: together they are LoRA trained at each rank by itself.
    """

    method: str
    readout: str = "prefix"
    scaling: str = "none"
    weights: str = "uniform"
    rank: int | None = None

    @property
    def name(self) -> str:
        """The name of the rival in tables."""
        readout = "" if self.readout == "prefix" else f" + {self.readout}"
        details = [] if self.scaling == "none" else [f"s = {self.scaling}"]
        details += [] if self.weights == "uniform" else [f"w = {self.weights}"]
        details += [] if self.rank is None else [f"R = {self.rank}"]
        return f"{self.method}{readout}{f' ({chr(44).join(details)})' if details else ''}".replace(",", ", ")

    def trial(self, rank: int, learning_rate: float, seed: int) -> Trial:
        """Returns one trial of this rival.

        Args:
          rank: the rank R of the study.
          learning_rate: the peak learning rate.
          seed: the seed.
        """
        own = self.rank or rank
        ranks = powers_of_two(own)
        scale = SCALINGS[self.scaling]
        weights = {
            "uniform": (),
            "mean": (1.0 / len(ranks),) * len(ranks),
            "inverse": tuple(1.0 / scale(r) for r in ranks),
            "ends": tuple(1 / 3 if r in (1, own) else 1 / 3 / max(len(ranks) - 2, 1) for r in ranks),
        }[self.weights]
        return Trial(self.method, learning_rate, seed, self.scaling, own, weights)


def separate(rank: int) -> tuple[Rival, ...]:
    """Returns LoRA trained at each rank of S by itself, each with its own learning rate: the ceiling of the study.

    Args:
      rank: the rank R of the study.
    """
    return tuple(Rival("lora", rank=r) for r in powers_of_two(rank))


def _matryoshka(*settings: tuple[str, str]) -> tuple[Rival, ...]:
    readouts = ("prefix", "nested", "masked", "squeeze", "calibrated")
    return tuple(Rival("matryoshka", readout, *setting) for setting in settings for readout in readouts)


_SETTINGS = [  # The scalings and weights that define P.
    (scaling, weights)
    for scaling in SCALINGS
    for weights in ("uniform", "mean", "inverse")
    if (scaling, weights) != ("none", "inverse")  # s_r is 1, so this equals "uniform".
]
# Name -> rivals, in the order in which the queue trains them.
GROUPS: dict[str, tuple[Rival, ...]] = {
    "leading": (
        Rival("lora"),
        Rival("lora", "squeeze"),
        Rival("dylora"),
        Rival("per_example"),
        Rival("renest"),
        Rival("renest_30_rotated"),
    ),
    "dearer": (  # These take more than one forward and backward pass per step.
        Rival("renest_sandwich"),
        Rival("sandwich"),
    ),
    "variants": (  # The configs of the cells define these methods.
        Rival("renest_50"),
        Rival("renest_30"),
        Rival("renest_rotated"),
    ),
    "recipe": (Rival("renest_30_first"),),  # renest_30_rotated; the first column has three times the learning rate
    "weighted": (
        Rival("renest_30", weights="ends"),
        Rival("per_example", weights="ends"),
    ),
    "matryoshka": _matryoshka(("none", "uniform"), ("rank", "mean")),
    "matryoshka_all": _matryoshka(*_SETTINGS),
    "instruct": (  # What the first look at instruct models left open, the cheapest answers first.
        Rival("lora"),
        Rival("lora", "squeeze"),
        Rival("renest"),
        Rival("matryoshka"),
        Rival("matryoshka", "masked"),
        Rival("matryoshka", "squeeze"),
        Rival("dylora"),
        Rival("renest_30_rotated"),
    ),
    "ceiling": tuple(Rival("lora", rank=rank) for rank in (1, 4, 16)),
    "scalings": tuple(
        Rival(method, scaling=scaling) for scaling in ("rank", "sqrt") for method in ("matryoshka", "dylora")
    ),
    "instruct_further": (
        Rival("lora", "squeeze_inputs"),
        Rival("matryoshka", "calibrated"),
        Rival("per_example"),
        Rival("matryoshka_exact"),
    ),
    "further": (
        Rival("dylora", "squeeze"),
        Rival("per_example", "squeeze"),
        Rival("lora", "squeeze_inputs"),
        Rival("lora", "calibrated"),
        Rival("dylora_original"),
        Rival("dylora_frozen"),
        Rival("matryoshka_exact"),
    ),
    "field": (  # The methods of other papers; docs/methods.md describes them.
        Rival("lora", "squeeze", "sqrt"),  # rsLoRA
        Rival("lora_plus", "squeeze"),
        Rival("scaled_adam", "squeeze"),
        Rival("lora_rite", "squeeze"),
        Rival("lora", "squeeze_randomized"),
        Rival("maestro"),
        Rival("maestro", "squeeze"),
        Rival("lora_squeeze"),
        Rival("lora_squeeze_annealed"),
        Rival("pissa", "squeeze"),
        Rival("olora", "squeeze"),
        Rival("svfit", "squeeze"),
        Rival("eva", "squeeze"),
        *(
            Rival(method, readout)
            for method in ("eva", "adalora", "sora", "sora_schedule", "codyra")
            for readout in ("ordered", "ordered_global", "squeeze")
            if (method, readout) != ("eva", "squeeze")
        ),
    ),
}


def rivals_of(groups: Sequence[str], rank: int) -> tuple[Rival, ...]:
    """Returns the rivals of some groups in their order, each once.

    Args:
      groups: keys of `GROUPS`, or "separate" for the rivals of `separate`.
      rank: the rank R of the study.

    Raises:
      ValueError: a group is unknown.
    """
    found: list[Rival] = []
    for group in groups:
        if group != "separate" and group not in GROUPS:
            raise ValueError(f"unknown group {group!r} of config.study.groups; known: separate, {', '.join(GROUPS)}")
        found += separate(rank) if group == "separate" else GROUPS[group]
    return tuple(dict.fromkeys(found))
