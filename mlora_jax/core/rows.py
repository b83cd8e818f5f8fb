"""Looks up a row of a table by its name."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import TypeVar

Row = TypeVar("Row")


def find_row(table: Mapping[str, Row], name: str, kind: str) -> Row:
    """Returns the row that has the given name.

    Args:
      table: name -> row.
      name: the name of the wanted row.
      kind: the noun for a row, in the singular, for the message, such as "policy".

    Raises:
      ValueError: no row has this name; the message names the nearest and all known ones.

    >>> find_row({"one": 1}, "one", "number")
    1
    """
    if name not in table:
        near = difflib.get_close_matches(str(name), table, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise ValueError(f"unknown {kind} {name!r}{hint} Known {_plural(kind)}: {', '.join(table)}")
    return table[name]


def _plural(kind: str) -> str:
    return f"{kind[:-1]}ies" if kind.endswith("y") else f"{kind}s"
