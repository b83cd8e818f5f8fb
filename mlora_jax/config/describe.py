"""Describes the keys of a config for readers, in the list of `--help` and on the page docs/config.md."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from mlora_jax.config.schema import Group, Key

NAME = "NAME"  # this stands for a name that a config may give
WIDTH = 100  # --help has this many columns
_UNSET = object()
_HEADER = "| key | default | allowed | may change | meaning |\n| --- | --- | --- | --- | --- |\n"


def help_text(groups: Mapping[str, Group], values: Mapping[str, Any] | None = None) -> str:
    """Returns a paragraph for each group, with the default, the allowed values and the meaning of every key.

    Args:
      groups: name -> group of keys.
      values: a resolved config. If its value of a key is not the default, the value is shown too. None shows no values.

    >>> print(help_text({"train": Group(doc="Training.", keys={"epochs": Key(default=3, low=1, doc="Passes.")})}))
    config.train: Training.
      --config.train.epochs: Passes.
          [an integer, at least 1; default 3]
    """
    paragraphs = []
    for path, group, changeable in _sections(groups):
        lines = textwrap.wrap(f"config.{path}: {group.doc}", WIDTH, subsequent_indent="  ")
        for key, item, says_all in _rows(group):
            value = _value(values, f"{path}.{key}")
            facts = [item.allowed] * says_all
            facts += [] if key == NAME else [f"default {_shown(item.default)}"]
            facts += [] if value in (_UNSET, item.default) else [f"this config {_shown(value)}"]
            facts += ["may change in a begun run"] * (says_all and (changeable or item.changeable))
            name, facts = f"  --config.{path}.{key}: ", f"[{'; '.join(facts)}]"
            texts = (name + item.doc, " " * 6 + facts) if says_all else (name + facts,)
            for text in texts:
                lines += textwrap.wrap(text, WIDTH, subsequent_indent=" " * 6)
        paragraphs.append("\n".join(lines))
    return "\n\n".join(paragraphs)


def keys_page(groups: Mapping[str, Group]) -> str:
    """Returns a table for each group, in Markdown.

    Args:
      groups: name -> group of keys.
    """
    parts = []
    for path, group, changeable in _sections(groups):
        rows = ""
        for key, item, says_all in _rows(group):
            cells = (
                f"`{key}`",
                "" if key == NAME else f"`{_shown(item.default)}`",
                item.allowed if says_all else "as for NAME",
                "yes" if changeable or item.changeable else "no",
                item.doc if says_all else "",
            )
            rows += "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |\n"
        parts.append(f"## config.{path}\n\n{group.doc}\n\n{_HEADER}{rows}")
    return "\n".join(parts)


def _sections(groups: Mapping[str, Group]) -> Iterator[tuple[str, Group, bool]]:
    """Yields the dotted name and the declaration of every group, and whether a begun run may change all its keys."""
    for name, group in groups.items():
        yield name, group, group.changeable
        for path, inner in group.groups(f"{name}."):
            yield path, inner, group.changeable or inner.changeable


def _rows(group: Group) -> Iterator[tuple[str, Key, bool]]:
    """Yields the name and the declaration of each key, and whether its row is written in full.

    In a group whose keys are names, the row of `NAME` holds for all keys, so the other rows only give the defaults.
    """
    if group.names:
        yield NAME, group.names, True
    for name, item in group.keys.items():
        if isinstance(item, Key):
            yield name, item, group.names is None


def _value(values: Mapping[str, Any] | None, name: str) -> Any:
    found: Any = values
    for part in name.split("."):
        if found is None or part not in found:
            return _UNSET
        found = found[part]
    return found


def _shown(value: Any) -> str:
    """Returns a value as a command line or a config file writes it, with double quotes."""
    return repr(value).replace("'", '"')
