"""Declarations of config keys, from which their types, ranges, choices, defaults and error messages follow."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, cast

from ml_collections import ConfigDict

# Type of a value -> the words of docs/config.md and --help for one such value and for several.
KINDS = {
    bool: ("True or False", ""),
    int: ("an integer", "integers"),
    float: ("a number", "numbers"),
    str: ("text", "texts"),
    tuple: ("a tuple", "tuples"),
    dict: ("a dict", "dicts"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Key:
    """The declaration of one key of a config. For a tuple, the bounds and choices hold for every entry.

    Attributes:
      doc: whole sentences that say what the key decides, with its unit.
      default: the value of a config that does not set the key. Its type is the type of the key; an empty string or
        tuple stands for "not set".
      choices: the values that are allowed; empty if every value of the type is allowed.
      low: the smallest value that is allowed.
      high: the largest value that is allowed.
      above: a bound that every allowed value exceeds.
      entry: the type of a tuple's entries; by default that of the default's first entry. Entries of an empty default
        are not checked by type unless it is given.
      filled: if true, a tuple needs at least one entry.
      distinct: if true, a tuple must not repeat an entry.
      former: a dictionary: a value that an earlier version took, as lower-case text -> the value that it stands for.
      form: words of docs/config.md and --help for the form of a value, instead of those that follow from its type.
      check: a function that raises a ValueError if a value is not allowed for another reason.
      changeable: if true, a run that has begun may go on with another value, because the key does not affect the trials
        that are already trained.
    """

    doc: str
    default: Any
    choices: tuple = ()
    low: float | None = None
    high: float | None = None
    above: float | None = None
    entry: type | None = None
    filled: bool = False
    distinct: bool = False
    former: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    form: str = ""
    check: Callable[[Any], object] | None = None
    changeable: bool = False

    @property
    def kind(self) -> type:
        """Returns the type of a value."""
        return type(self.default)

    @property
    def entry_kind(self) -> type | None:
        """Returns the type of a tuple's entries; None if it is not checked."""
        return self.entry or (type(self.default[0]) if self.default else None)

    def renewed(self, value: Any) -> Any:
        """Returns the value that a former value stands for, and any other value as it is.

        >>> key = Key(default="none", former={"true": "full"}, doc="What is computed again.")
        >>> key.renewed(True), key.renewed("True"), key.renewed(1)
        ('full', 'full', 1)
        """
        return self.former.get(str(value).lower(), value) if isinstance(value, (bool, str)) else value

    def read(self, value: Any, name: str) -> Any:
        """Returns a value in the type of the key: a list becomes a tuple, and an integer a float if needed.

        Args:
          value: the value that a config gives.
          name: the key's dotted name, for the error message.

        Raises:
          ValueError: the value has another type.
        """
        if self.kind is not tuple:
            return _typed(self.renewed(value), self.kind, self.default, name)
        if not isinstance(value, (tuple, list)):
            raise ValueError(f"{name} must be a tuple, like {self.default!r}; got {value!r}")
        entries = tuple(tuple(item) if isinstance(item, list) else item for item in value)
        if self.entry_kind is None:
            return entries
        like = self.default[0] if self.default else None
        return tuple(_typed(item, self.entry_kind, like, f"an entry of {name}") for item in entries)

    def validate(self, value: Any, name: str) -> None:
        """Raises a ValueError if a value is not allowed.

        Args:
          value: a value of the type of the key.
          name: the key's dotted name, for the error message.
        """
        several = self.kind is tuple
        if several and self.filled and not value:
            raise ValueError(f"{name} must name at least one value, got ()")
        if several and self.distinct and len(set(value)) != len(value):
            raise ValueError(f"{name} repeats a value: {value}")
        for item in value if several else (value,):
            item_name = f"an entry of {name}" if several else name
            if self.choices and item not in self.choices:
                raise ValueError(f"{item_name} must be one of {', '.join(map(repr, self.choices))}, got {item!r}")
            if not self._in_bounds(item):
                raise ValueError(f"{item_name} must be {self.bounds}, got {item}")
        if self.check:
            self.check(value)

    def _in_bounds(self, value: Any) -> bool:
        if not self.bounds:
            return True  # without bounds the value may be of any type
        low, high = -math.inf if self.low is None else self.low, math.inf if self.high is None else self.high
        return low <= value <= high and not math.isinf(value) and (self.above is None or value > self.above)

    @property
    def bounds(self) -> str:
        """Returns the bounds in words, as in "at least 1"; an empty text if there are none."""
        words = [] if self.above is None else ["positive" if self.above == 0 else f"above {self.above}"]
        words += [] if self.low is None else [f"at least {self.low}"]
        words += [] if self.high is None else [f"at most {self.high}"]
        number = self.entry_kind if self.kind is tuple else self.kind
        if words and self.high is None and number is float:
            words.append("finite")
        return " and ".join(words)

    @property
    def allowed(self) -> str:
        """Returns a description of the allowed values, in words."""
        several = self.kind is tuple
        one, more = KINDS[self.kind]
        if several:
            one = f"a tuple of {KINDS[self.entry_kind][1]}" if self.entry_kind else "a tuple"
        if self.choices:
            more = ", ".join(f'"{choice}"' for choice in self.choices)
            one = f"a tuple of some of {more}" if several else f"one of {more}"
        parts = [self.form or one, f"{'each ' * several}{self.bounds}" if self.bounds else ""]
        parts += ["at least one entry" if self.filled else "", "no entry twice" if self.distinct else ""]
        return ", ".join(part for part in parts if part)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group:
    """The declaration of keys that belong together.

    Attributes:
      doc: whole sentences that say what the keys are about.
      keys: name -> `Key` or `Group`.
      names: the declaration of every key that is not in `keys`, if the group's keys are names that a config may give,
        such as those of methods; None if all keys are in `keys`.
      check: a function that raises a ValueError if values that are each allowed do not fit together.
      changeable: if true, a run that has begun may go on with other values of all the keys.
    """

    doc: str
    keys: Mapping[str, Key | Group] = dataclasses.field(default_factory=dict)
    names: Key | None = None
    check: Callable[[Mapping[str, Any]], object] | None = None
    changeable: bool = False

    def defaults(self) -> dict[str, Any]:
        """Returns the default of every key, nested as in a config."""
        return {k: item.defaults() if isinstance(item, Group) else item.default for k, item in self.keys.items()}

    def leaves(self, path: str = "", changeable: bool = False) -> Iterator[tuple[str, Key]]:
        """Yields the dotted name and the declaration of every key of this group and of the groups in it, in order.

        Args:
          path: the dotted name of this group with a dot behind it; empty for the whole config.
          changeable: true if a group around this one says that a begun run may change all keys.
        """
        changeable = changeable or self.changeable
        for name, item in self.keys.items():
            if isinstance(item, Group):
                yield from item.leaves(f"{path}{name}.", changeable)
            else:
                yield f"{path}{name}", dataclasses.replace(item, changeable=item.changeable or changeable)

    def groups(self, path: str = "") -> Iterator[tuple[str, Group]]:
        """Yields the dotted name and the declaration of every group in this one, outer groups first.

        Args:
          path: the dotted name of this group with a dot behind it; empty for the whole config.
        """
        for name, item in self.keys.items():
            if isinstance(item, Group):
                yield f"{path}{name}", item
                yield from item.groups(f"{path}{name}.")

    def changeable_names(self, path: str = "") -> Iterator[str]:
        """Yields the dotted names of the groups and keys that a begun run may change; a group stands for all its keys.

        Args:
          path: the dotted name of this group with a dot behind it; empty for the whole config.
        """
        for name, item in self.keys.items():
            if item.changeable:
                yield f"{path}{name}"
            elif isinstance(item, Group):
                yield from item.changeable_names(f"{path}{name}.")

    def at(self, key: str) -> Key | Group:
        """Returns the declaration of a key.

        Args:
          key: the name of the key in this group.

        Raises:
          KeyError: the group has no such key. Call `check_names` first for a message that helps a user.
        """
        if key not in self.keys and self.names is not None:
            return self.names
        return self.keys[key]

    def check_names(self, given: Iterable[str], path: str) -> None:
        """Raises a ValueError if one of the given names is not a key of the group.

        Args:
          given: the names.
          path: the dotted name of this group, for the message, which also lists the nearest key and all keys.
        """
        for key in given:
            if key not in self.keys and self.names is None:
                near = difflib.get_close_matches(str(key), self.keys, n=1)
                hint = f"; did you mean {path}.{near[0]}?" if near else "."
                raise ValueError(f"unknown config key {path}.{key}{hint} Keys of {path}: {', '.join(self.keys)}")

    def read(self, given: Mapping[str, Any], path: str) -> dict[str, Any]:
        """Returns the values that a config gives, each in the type of its key, and the defaults of the other keys.

        Args:
          given: some of the keys and their values, nested.
          path: the dotted name of this group, for messages.

        Raises:
          ValueError: a key is unknown, or a value has another type than its key.
        """
        self.check_names(given, path)
        values = {}
        for key in dict.fromkeys((*self.keys, *given)):
            item, name = self.at(key), f"{path}.{key}"
            if isinstance(item, Key):
                values[key] = item.read(given.get(key, item.default), name)
                continue
            inner = given.get(key, {})
            if not isinstance(inner, (Mapping, ConfigDict)):
                raise ValueError(f"{name} must be a group of keys, got {inner!r}")
            values[key] = item.read(cast(Mapping[str, Any], inner), name)
        return values

    def validate(self, values: Mapping[str, Any], path: str) -> None:
        """Raises a ValueError if a value is not allowed, or if values do not fit together.

        Args:
          values: the keys of this group and their values, nested.
          path: the dotted name of this group, for the message.
        """
        for key, value in values.items():
            self.at(key).validate(value, f"{path}.{key}")
        if self.check:
            self.check(values)


def _typed(value: Any, kind: type, like: Any, name: str) -> Any:
    """Returns a value in a type, or raises a ValueError if it has another one; `like` is an example for the message."""
    example = "" if like is None else f", like {like!r}"
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is tuple and not isinstance(value, tuple):
        raise ValueError(f"{name} must be a tuple{example}; got {value!r}")
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError(f"{name} must be of type {kind.__name__}{example}; got {value!r}")
    return value
