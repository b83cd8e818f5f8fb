"""Reads the entries of `config.evaluation.tasks`, which name tasks of lm-evaluation-harness."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def harness_tasks(entries: Iterable[Any]) -> list[tuple[str, int | None]]:
    """Returns the tasks of `config.evaluation.tasks` and their numbers of examples; None is the task's own number.

    Args:
      entries: names, and pairs of a name and a number of examples.

    Raises:
      ValueError: an entry is neither a name nor a pair of a name and a number, or an entry is repeated.

    >>> harness_tasks(("arc_challenge", ("gsm8k", 8)))
    [('arc_challenge', None), ('gsm8k', 8)]
    """
    found: list[tuple[str, int | None]] = []
    for entry in entries:
        name, shots = (entry, None) if isinstance(entry, str) else entry if _is_pair(entry) else ("", None)
        if not name or not isinstance(name, str) or not (shots is None or _is_count(shots)):
            raise ValueError(
                f"an entry of config.evaluation.tasks must be a name or a pair like ('gsm8k', 8), got {entry!r}"
            )
        if any(name == other and (shots == theirs or None in (shots, theirs)) for other, theirs in found):
            raise ValueError(
                f"config.evaluation.tasks repeats {name!r}: name it once, or several times with numbers of examples"
            )
        found.append((name, shots))
    return found


def _is_pair(entry: Any) -> bool:
    return isinstance(entry, (tuple, list)) and len(entry) == 2


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
