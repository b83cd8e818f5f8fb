"""Methods of one's own: `config.methods`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from mlora_jax.core import METHODS, Method, Phase, get_method

# Carry -> what a method's summary says of it.
_CARRIED = {
    "reset": "moments reset",
    "rotate": "moments rotated",
    "restart": "moments and learning rate started anew",
}


def further_methods(config: Mapping[str, Any] | ConfigDict) -> dict[str, Method]:
    """The methods of `config.methods`. One that the table of methods has in the same words by now is left out.

    Args:
      config: a config with every key present.

    Raises:
      ValueError: the table has a method of that name in other words, or the method cannot be; the message names it.
    """
    found = {}
    for name, entries in config["methods"].items():
        if not re.fullmatch(r"[\w-]+", name):
            raise ValueError(f"config.methods.{name}: a name is made of letters, digits, _ and -")
        *pairs, last = entries or ((),)
        carry, pairs = (last, pairs) if isinstance(last, str) else ("reset", [*pairs, last])
        try:
            phases = tuple(Phase(policy, float(fraction)) for policy, fraction in pairs)
            found[name] = Method(phases=phases, summary=_summary(phases, carry), carry=carry)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"config.methods.{name} must be phases like (('lora', 0.7), ('per_example', 0.3)), got {entries!r}: "
                f"{error}"
            ) from None
        if name in METHODS:
            if (METHODS[name].phases, METHODS[name].carry) != (found[name].phases, found[name].carry):
                raise ValueError(f"config.methods.{name} is a method of that name already: give yours another one")
            del found[name]
    return found


def _summary(phases: tuple[Phase, ...], carry: str) -> str:
    parts = ", squeezed, ".join(f"{phase.policy} for {phase.fraction:.0%} of the steps" for phase in phases)
    return f"{parts}; {_CARRIED.get(carry, carry)}" if len(phases) > 1 else parts


def check_readout_methods(config: Mapping[str, Any]) -> None:
    """Raises ValueError if `config.evaluation.readouts` has a key that names no method."""
    methods = further_methods(config)
    for name in config["evaluation"]["readouts"]:
        get_method(name, methods)
