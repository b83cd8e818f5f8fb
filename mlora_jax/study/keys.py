"""The keys of a cell of the study: the group "study" of its config, which only `experiments.study` reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_collections

from mlora_jax.config import MAX_SEED, Group, Key, resolve
from mlora_jax.config_type import ConfigDict
from mlora_jax.study import rivals

NAME = "study"


def check_study(study: Mapping[str, Any]) -> None:
    """Raises ValueError if the values of `config.study` do not go together, or a group of rivals is unknown."""
    if list(study["rates"]) != sorted(study["rates"]) or not set(study["start"]) <= set(study["rates"]):
        raise ValueError(
            f"config.study.rates must be in rising order and hold those of config.study.start {study['start']}, "
            f"got {study['rates']}"
        )
    rivals.rivals_of(study["groups"], study["rank"])


STUDY = Group(
    doc="What experiments.study trains in place of config.trials. Other commands leave this group out.",
    check=check_study,
    changeable=True,
    keys={
        "groups": Key(
            default=("leading", "separate"),
            form=f"a tuple of some of {', '.join(sorted(('separate', *rivals.GROUPS)))}",
            doc="These groups of rivals are trained in this order; mlora_jax.study.rivals says what they are.",
        ),
        "rank": Key(default=32, low=1, doc="This is the rank R of the nested adapters."),
        "rates": Key(
            default=(1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1),
            above=0.0,
            filled=True,
            distinct=True,
            form="a rising tuple of numbers",
            doc="The best learning rate is chosen among these.",
        ),
        "start": Key(
            default=(1e-3, 3e-3, 1e-2),
            above=0.0,
            filled=True,
            distinct=True,
            form="a tuple of some of study.rates",
            doc="These learning rates are tried first. Others follow while the best one is at the edge of those tried.",
        ),
        "seeds": Key(
            default=(42, 666, 2408),
            low=0,
            high=MAX_SEED,
            filled=True,
            distinct=True,
            doc="The first seed screens the learning rates. The others follow at the best one.",
        ),
    },
)


def resolve_cell(config: Mapping[str, Any] | ConfigDict) -> ConfigDict:
    """Returns the config of a cell with every key present and checked, including those of the study.

    Args:
      config: a nested mapping that sets some of the keys of `mlora_jax.config.DEFAULTS` and of `STUDY`.

    Raises:
      ValueError: the same cases as for `mlora_jax.config.resolve`.
    """
    return resolve(config, {NAME: STUDY})


def without_study(config: ConfigDict) -> ConfigDict:
    """Returns a cell's config without the keys of the study, as every command except `experiments.study` reads it."""
    return ml_collections.ConfigDict({name: values for name, values in config.to_dict().items() if name != NAME}).lock()
