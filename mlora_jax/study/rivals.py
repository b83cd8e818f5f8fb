"""What the study compares."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from mlora_jax.core import SCALINGS, powers_of_two
from mlora_jax.trials import Trial


@dataclasses.dataclass(frozen=True)
class Rival:
    """A row of the study's tables: how an adapter is trained and how it is read out.

    Attributes:
      method: of `mlora_jax.core.METHODS` or of `config.methods`.
      readout: of the curve.
      scaling: s_r.
      weights: "uniform" (1 each), "mean" (1 / |S| each), "inverse" (1 / s_r) or "ends" (a third for the smallest rank,
        a third for the largest, the rest among those between: the sandwich rule as shares).
      rank: the rank it is trained at; None is R. A rival of another rank is measured at that one only: with the others
        of its kind it is LoRA trained at each rank by itself.
    """

    method: str
    readout: str = "prefix"
    scaling: str = "none"
    weights: str = "uniform"
    rank: int | None = None

    @property
    def name(self) -> str:
        """For tables."""
        readout = "" if self.readout == "prefix" else f" + {self.readout}"
        details = [] if self.scaling == "none" else [f"s = {self.scaling}"]
        details += [] if self.weights == "uniform" else [f"w = {self.weights}"]
        details += [] if self.rank is None else [f"R = {self.rank}"]
        return f"{self.method}{readout}{f' ({chr(44).join(details)})' if details else ''}".replace(",", ", ")

    def trial(self, rank: int, learning_rate: float, seed: int) -> Trial:
        """One training run of this rival in a study of rank R."""
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
    """LoRA trained at each rank of S by itself, with a learning rate of its own: the ceiling."""
    return tuple(Rival("lora", rank=r) for r in powers_of_two(rank))


def _matryoshka(*settings: tuple[str, str]) -> tuple[Rival, ...]:
    readouts = ("prefix", "nested", "masked", "squeeze", "calibrated")
    return tuple(Rival("matryoshka", readout, *setting) for setting in settings for readout in readouts)


_SETTINGS = [  # of P
    (scaling, weights)
    for scaling in SCALINGS
    for weights in ("uniform", "mean", "inverse")
    if (scaling, weights) != ("none", "inverse")  # s_r is 1: that is "uniform"
]
# In the order in which the queue takes them.
GROUPS: dict[str, tuple[Rival, ...]] = {
    "leading": (
        Rival("lora"),
        Rival("lora", "squeeze"),
        Rival("dylora"),
        Rival("per_example"),
        Rival("renest"),
        Rival("renest_30_rotated"),
    ),
    "dearer": (  # more than one forward and backward pass a step
        Rival("renest_sandwich"),
        Rival("sandwich"),
    ),
    "variants": (  # methods of the cells' configs
        Rival("renest_50"),
        Rival("renest_30"),
        Rival("renest_rotated"),
    ),
    "weighted": (
        Rival("renest_30", weights="ends"),
        Rival("per_example", weights="ends"),
    ),
    "matryoshka": _matryoshka(("none", "uniform"), ("rank", "mean")),
    "matryoshka_all": _matryoshka(*_SETTINGS),
    "further": (
        Rival("dylora", "squeeze"),
        Rival("per_example", "squeeze"),
        Rival("lora", "squeeze_inputs"),
        Rival("lora", "calibrated"),
        Rival("dylora_original"),
        Rival("dylora_frozen"),
        Rival("matryoshka_exact"),
    ),
}


def rivals_of(groups: Sequence[str], rank: int) -> tuple[Rival, ...]:
    """The rivals of some groups in their order, each once; "separate" is `separate(rank)`.

    Raises:
      ValueError: an unknown group.
    """
    found: list[Rival] = []
    for group in groups:
        if group != "separate" and group not in GROUPS:
            raise ValueError(f"unknown group {group!r} of config.study.groups; known: separate, {', '.join(GROUPS)}")
        found += separate(rank) if group == "separate" else GROUPS[group]
    return tuple(dict.fromkeys(found))
