"""Fills in and checks the config that a file gives, and compares a config with the one that a run began with."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

import ml_collections

from mlora_jax.config.checks import check_numbers
from mlora_jax.config.grid import check_trials, read_entries
from mlora_jax.config.keys import CHANGEABLE, ELSEWHERE, KEYS
from mlora_jax.config.methods import check_readout_methods
from mlora_jax.config.schema import Group, Key
from mlora_jax.config_type import ConfigDict


def resolve(config: Mapping[str, Any] | ConfigDict, groups: Mapping[str, Group] = MappingProxyType({})) -> ConfigDict:
    """Returns a config with every key present and checked.

    Args:
      config: a nested mapping that sets some of the keys of `DEFAULTS`.
      groups: a dictionary: name -> a group that the config may have besides those of `KEYS`, such as that of the study.

    Returns:
      A locked `ConfigDict` with all keys.

    Raises:
      ValueError: a key is unknown, and the message names the nearest one; a value has the wrong type, is outside its
        range or is not one of the choices; or two values do not fit together.
    """
    given = config.to_dict() if isinstance(config, ml_collections.ConfigDict) else config
    _check_elsewhere(name for name in given if name not in groups)
    table = Group(doc=KEYS.doc, keys={**KEYS.keys, **groups})
    values = table.read(given, "config")
    values["trials"]["list"] = read_entries(values["trials"]["list"])
    if values["data"]["file"] or values["data"]["evaluation_file"]:
        values["data"]["task"] = "jsonl"  # rows of the user's own are a task of their own, whatever the key says
    table.validate(values, "config")
    check_readout_methods(values)
    check_numbers(values)
    check_trials(values)
    return ml_collections.ConfigDict(values).lock()


def resolve_stored(config: Mapping[str, Any]) -> ConfigDict:
    """Returns the config of a run's config.json, with every key present and checked.

    Args:
      config: the content of config.json. An earlier version may have written it with groups that a run does not read;
        they are left out.

    Raises:
      ValueError: a key or a value is not allowed, as for `resolve`.
    """
    return resolve({name: values for name, values in config.items() if name not in ELSEWHERE})


def changed_keys(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Returns the differences between two resolved configs, without those that a begun run allows.

    Args:
      old: the content of the config.json of a begun run. If an earlier version wrote it, keys may be missing; they have
        their defaults.
      new: the config with which the run shall go on, in the form of JSON, with lists instead of tuples.

    Returns:
      A line for each key that differs, like "config.train.epochs was 3 and is 4".
    """
    return _changed(KEYS, old, new, "")


def _changed(group: Group, old: Mapping[str, Any], new: Mapping[str, Any], path: str) -> list[str]:
    found = []
    defaults = json.loads(json.dumps(group.defaults()))
    for key in dict.fromkeys((*old, *new)):
        name, before, after = f"{path}{key}", old.get(key, defaults.get(key)), new.get(key)
        inner = group.keys.get(key)
        before = inner.renewed(before) if isinstance(inner, Key) else before
        added = key not in old and key not in group.keys  # a name of the user's own that is new in this run
        if name in CHANGEABLE or before == after or added:
            continue
        if isinstance(inner, Group) and isinstance(before, Mapping) and isinstance(after, Mapping):
            found += _changed(inner, before, after, f"{name}.")
        else:
            found.append(f"config.{name} was {before!r} and is {after!r}")
    return found


def _check_elsewhere(names: Iterable[str]) -> None:
    for name in names:
        if name in ELSEWHERE:
            raise ValueError(
                f"unknown config key config.{name}: only {ELSEWHERE[name]} reads it, from the config file of a cell. "
                f"Keys of config: {', '.join(KEYS.keys)}"
            )


def check_key(name: str) -> None:
    """Raises a ValueError if a dotted name begins with "config." and is not a key of a config.

    Args:
      name: the dotted name.

    Raises:
      ValueError: there is no such key; the message names the nearest one and all keys of the group.

    >>> check_key("config.train.epoch")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    ValueError: unknown config key config.train.epoch; did you mean config.train.epochs? Keys of config.train: ...
    """
    first, *keys = name.split(".")
    if first != "config":
        return
    _check_elsewhere(keys[:1])
    item: Group | Key = KEYS
    path = "config"
    for key in keys:
        if isinstance(item, Key):
            raise ValueError(f"{path} is a value and has no key {key!r}")
        item.check_names((key,), path)
        item, path = item.at(key), f"{path}.{key}"
