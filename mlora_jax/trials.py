"""Trials: what a run trains, one for each combination of method, learning rate, seed, scaling, rank and weights."""

from __future__ import annotations

import dataclasses
import itertools

from ml_collections import ConfigDict

from mlora_jax.core import RankHierarchy, powers_of_two


@dataclasses.dataclass(frozen=True)
class Trial:
    """One training run of the product in `config.trials`."""

    method: str
    learning_rate: float
    seed: int
    scaling: str
    rank: int
    weights: tuple[float, ...] = ()

    @property
    def name(self) -> str:
        """A folder name that no other trial of the run has."""
        weights = "".join(f"-w{_number(w)}" for w in self.weights)
        rate = _number(self.learning_rate)
        return f"{self.method}-r{self.rank}-{self.scaling}{weights}-lr{rate}-seed{self.seed}"

    def hierarchy(self, ranks: tuple[int, ...] = ()) -> RankHierarchy:
        """S (by default the powers of two up to the rank), scaling and weights of this trial."""
        return RankHierarchy(ranks or powers_of_two(self.rank), self.scaling, self.weights or None, max_rank=self.rank)


def _number(value: float) -> str:
    short = f"{value:g}"
    return short if float(short) == value else repr(float(value))


def expand_trials(config: ConfigDict) -> list[Trial]:
    """The product of `config.trials` in the order of its keys, or those of its list one after the other."""
    axes = {field.name: config.trials[field.name] for field in dataclasses.fields(Trial)}
    trials = [
        Trial(**dict(zip(axes, values, strict=True)))
        for entry in config.trials.list or ({},)
        for values in itertools.product(*(axes | dict(entry)).values())
    ]
    return list(dict.fromkeys(trials))
