"""Finds the layers whose paths match patterns."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence

# Messages list these kinds of layers, which have a kernel that an adapter fits.
SUPPORTED = "nnx.Linear, nnx.LinearGeneral, nnx.Einsum, nnx.Conv, nnx.Embed"


def matching(
    paths: Sequence[str],
    patterns: Sequence[str],
    *,
    shared: Mapping[str, str] | None = None,
    others: Mapping[str, str] | None = None,
) -> list[str]:
    """Returns the paths that some pattern matches, in their given order; every pattern must match at least one.

    Args:
      paths: the paths of all layers that an adapter fits.
      patterns: regular expressions. Each must match a whole path, or the whole part of a path after one of its dots.
      shared: a dictionary: a further path of a shared layer -> its first path. Patterns match first paths only; the
        error message needs the others.
      others: a dictionary: the path of a module that no adapter fits -> its kind, for the error message.

    Raises:
      ValueError: a pattern is not a regular expression or matches nothing; or `patterns` is empty, or one string.
    """
    if isinstance(patterns, str):
        raise ValueError(f"targets must be a sequence of patterns, got the string {patterns!r}")
    if not patterns:
        raise ValueError("targets must name at least one pattern, got none")
    found: set[str] = set()
    for pattern in patterns:
        try:
            re.compile(pattern)  # by itself, because "a)|(b" compiles inside the group below
            compiled = re.compile(rf"(?:.*\.)?(?:{pattern})")
        except re.error as error:
            raise ValueError(f"target {pattern!r} is no regular expression: {error}") from None
        hits = [path for path in paths if compiled.fullmatch(path)]
        known = {path for name, path in (shared or {}).items() if compiled.fullmatch(name)}
        if not hits and known:
            raise ValueError(f"target {pattern!r} names a shared layer, which goes by {', '.join(sorted(known))}")
        kinds = sorted({kind for path, kind in (others or {}).items() if compiled.fullmatch(path)})
        if not hits:
            tails = {path.rsplit(".", 1)[-1] for path in paths}
            near = difflib.get_close_matches(pattern, tails, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            if kinds:
                hint = f": {', '.join(kinds)} has no kernel that an adapter fits, as {SUPPORTED} have."
            there = ", ".join(sorted(paths)) or "none"
            raise ValueError(f"target {pattern!r} matches no linear layer{hint} Linear layers here: {there}")
        found.update(hits)
    return [path for path in paths if path in found]
