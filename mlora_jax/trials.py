"""Trials: a run trains one for each combination of the values in `config.trials`.

A new axis is a field of `Trial` with a default, a row of `AXES`, and a key of `config.trials`.
"""

from __future__ import annotations

import dataclasses
import itertools
import typing
from collections.abc import Callable, Mapping
from typing import Any

from mlora_jax.config_type import ConfigDict
from mlora_jax.core import RankHierarchy, powers_of_two


@dataclasses.dataclass(frozen=True)
class Axis:
    """The ways in which a value of one axis of trials is written.

    Attributes:
      in_name: value -> its part of the name of a trial's folder.
      in_words: value -> its part of a caption.
    """

    in_name: Callable[[Any], str]
    in_words: Callable[[Any], str]


# The order is that of the parts of a name. A name and a caption leave out an axis that has its default value in
# `Trial`, so that the trials of older runs keep their names when an axis is added.
AXES: dict[str, Axis] = {
    "method": Axis(in_name=str, in_words=str),
    "rank": Axis(in_name=lambda rank: f"r{rank}", in_words=lambda rank: f"R = {rank}"),
    "scaling": Axis(in_name=str, in_words=lambda scaling: f"scaling {scaling}"),
    "weights": Axis(
        in_name=lambda weights: "-".join(f"w{_number(weight)}" for weight in weights),
        in_words=lambda weights: f"weights {', '.join(f'{weight:g}' for weight in weights)}",
    ),
    "learning_rate": Axis(in_name=lambda rate: f"lr{_number(rate)}", in_words=lambda rate: f"learning rate {rate:g}"),
    "seed": Axis(in_name=lambda seed: f"seed{seed}", in_words=lambda seed: f"seed {seed}"),
}


@dataclasses.dataclass(frozen=True)
class Trial:
    """One training run of the product in `config.trials`."""

    method: str
    learning_rate: float
    seed: int
    scaling: str
    rank: int
    weights: tuple[float, ...] = ()

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Trial:
        """Returns the trial that a mapping from `to_json` describes; other keys of the mapping are ignored.

        An axis that did not exist when the mapping was written is missing in it and gets its default value.

        Raises:
          ValueError: the mapping lacks an axis that has no default value.
        """
        missing = [name for name in REQUIRED_AXES if name not in values]
        if missing:
            raise ValueError(f"a trial needs {', '.join(missing)}")
        kinds = typing.get_type_hints(cls)
        return cls(**{name: _as_kind(values[name], kinds[name]) for name in kinds if name in values})

    def to_json(self) -> dict[str, Any]:
        """The values of all axes by name, for a line or a file of JSON."""
        return dataclasses.asdict(self)

    def without(self, *axes: str) -> tuple[tuple[str, Any], ...]:
        """Returns the names and values of all other axes, which trials that differ only in `axes` have in common."""
        return tuple((name, value) for name, value in vars(self).items() if name not in axes)

    @property
    def name(self) -> str:
        """A folder name that no other trial of the run has."""
        return "-".join(AXES[axis].in_name(value) for axis, value in _told(vars(self)))

    @property
    def in_words(self) -> str:
        """The values of its axes in words, for a caption or an error message."""
        return describe_axes(vars(self))

    def hierarchy(self, ranks: tuple[int, ...] = ()) -> RankHierarchy:
        """Returns the hierarchy of this trial; S is by default the powers of two up to the rank."""
        return RankHierarchy(ranks or powers_of_two(self.rank), self.scaling, self.weights or None, max_rank=self.rank)


_FIELDS = {field.name: field for field in dataclasses.fields(Trial)}
REQUIRED_AXES = tuple(name for name, field in _FIELDS.items() if field.default is dataclasses.MISSING)


def describe_axes(values: Mapping[str, Any]) -> str:
    """Returns the values of some axes of a trial in words, for captions and errors.

    Args:
      values: axis -> value.

    >>> describe_axes({"scaling": "sqrt", "rank": 8, "weights": ()})
    'R = 8, scaling sqrt'
    """
    return ", ".join(AXES[axis].in_words(value) for axis, value in _told(values))


def _told(values: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Returns the axes and values that are not the defaults, in the order of `AXES`."""
    return [(axis, values[axis]) for axis in AXES if axis in values and values[axis] != _FIELDS[axis].default]


def _as_kind(value: Any, kind: Any) -> Any:
    """Returns a value as it was before it went through JSON, which has no tuples and may turn 1.0 into 1."""
    if typing.get_origin(kind) is tuple:
        return tuple(value)
    return float(value) if kind is float else value


def _number(value: float) -> str:
    short = f"{value:g}"
    return short if float(short) == value else repr(float(value))


def expand_trials(config: ConfigDict) -> list[Trial]:
    """Returns the product of `config.trials` in the order of its keys, for every entry of its list if it has one."""
    axes = {name: config.trials[name] for name in _FIELDS}
    trials = [
        Trial(**dict(zip(axes, values, strict=True)))
        for entry in config.trials.list or ({},)
        for values in itertools.product(*(axes | dict(entry)).values())
    ]
    return list(dict.fromkeys(trials))


def readouts_of(config: ConfigDict, trial: Trial) -> tuple[str, ...]:
    """Returns the read-outs of a trial's method; a method that the config does not name is read out by prefix."""
    return config.evaluation.readouts.get(trial.method, ("prefix",))
