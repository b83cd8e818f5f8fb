"""Reads the entries of `config.trials.list`, and checks that every trial of a config can be trained."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, cast

from ml_collections import ConfigDict

from mlora_jax.config.keys_of_trials import TRIALS
from mlora_jax.config.methods import further_methods
from mlora_jax.config.schema import Group, Key
from mlora_jax.core import METHODS, Method, get_action, get_method
from mlora_jax.trials import expand_trials

# An entry of the list may name every key of `config.trials` except the list itself.
AXES = Group(doc=TRIALS.doc, keys={name: key for name, key in TRIALS.keys.items() if name != "list"})
LIST = "config.trials.list"


def read_entries(entries: Iterable[Any]) -> tuple[dict[str, tuple], ...]:
    """Returns the entries of `config.trials.list`, each as a dictionary: key of `config.trials` -> tuple of values.

    Args:
      entries: the entries as a config gives them.

    Raises:
      ValueError: an entry is not a dict, names an unknown key, or gives a value of the wrong type.
    """
    return tuple(_read_entry(entry, f"{LIST}[{number}]") for number, entry in enumerate(entries))


def _read_entry(entry: Any, name: str) -> dict[str, tuple]:
    if not isinstance(entry, (Mapping, ConfigDict)):
        raise ValueError(f"{name} must be a dict of some of {', '.join(AXES.keys)}; got {entry!r}")
    AXES.check_names(entry, name)
    values = {}
    for key, value in cast(Mapping[str, Any], entry).items():
        several = isinstance(value, (tuple, list))
        if key == "weights" and several:  # one trial's weights, or a tuple of such
            several = any(isinstance(item, (tuple, list)) for item in value)
        values[key] = cast(Key, AXES.at(key)).read(value if several else (value,), f"{name}.{key}")
    return values


def check_trials(config: Mapping[str, Any]) -> None:
    """Checks that every trial of a config can be trained.

    Args:
      config: a config with every key, whose values are each allowed, with the entries that `read_entries` returned.

    Raises:
      ValueError: an entry of the list holds a value that is not allowed, a method is unknown, a trial cannot be
        trained since its rank, S and weights do not go together, or `config.adapter.start_from` does not fit the
        methods.
    """
    methods = further_methods(config)
    for number, entry in enumerate(config["trials"]["list"]):
        AXES.validate(entry, f"{LIST}[{number}]")
    for axes in (config["trials"], *config["trials"]["list"]):
        for method in axes.get("method", ()):
            get_method(method, methods)
    trials = expand_trials(ConfigDict(config))
    _check_starts({trial.method: get_method(trial.method, methods) for trial in trials}, config["adapter"])
    for trial in trials:
        try:
            trial.hierarchy(config["adapter"]["ranks"])
        except ValueError as error:
            raise ValueError(f"config.trials cannot make {trial}: {error}") from None
        if trial.weights and not get_method(trial.method, methods).uses_weights:
            users = ", ".join(name for name, method in {**METHODS, **methods}.items() if method.uses_weights)
            raise ValueError(
                f"config.trials.weights {trial.weights} would change nothing for {trial.method!r}; methods with "
                f"weights: {users}. config.trials.list can give them weights of their own"
            )


def _check_starts(methods: Mapping[str, Method], adapter: Mapping[str, Any]) -> None:
    """Raises ValueError if a method starts from a PEFT adapter that is not given, or none starts from the given one."""
    starts = {name: method.phases[0].start for name, method in methods.items()}
    from_peft = [name for name, start in starts.items() if start and "peft_adapter" in get_action(start).needs]
    if from_peft and not adapter["start_from"]:
        raise ValueError(
            f"the method {from_peft[0]!r} starts with {starts[from_peft[0]]!r}: set config.adapter.start_from to the "
            "folder of a PEFT adapter"
        )
    if adapter["start_from"] and not from_peft and all(starts.values()):
        named = ", ".join(f"{name} with {start!r}" for name, start in starts.items())
        raise ValueError(f"no trial would start from config.adapter.start_from, since the methods start: {named}")
