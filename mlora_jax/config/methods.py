"""Methods of one's own: `config.methods`."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mlora_jax.config_type import ConfigDict
from mlora_jax.core import GATE_INITIALIZERS, METHODS, Method, Phase, get_method
from mlora_jax.core.optimizers import OPTIMIZERS

# Words behind the phases of a method, and what they stand for. "reset" says what holds without it; run folders have it.
METHOD_OPTIONS: dict[str, dict[str, Any]] = {
    "reset": {},
    "rotate": {"start": "squeeze_rotated"},
    "restart": {"schedule": "phase"},
    "gate": {"gate": True},
    **{f"{name}_gate": {"gate": name} for name in GATE_INITIALIZERS},
    **{name: {"optimizer": name} for name in OPTIMIZERS},
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
        try:
            found[name] = _method(entries)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"config.methods.{name} must be phases like (('lora', 0.7), ('per_example', 0.3)), got {entries!r}: "
                f"{error}"
            ) from None
        if name in METHODS:
            if dataclasses.replace(METHODS[name], summary="") != dataclasses.replace(found[name], summary=""):
                raise ValueError(f"config.methods.{name} is a method of that name already: give yours another one")
            del found[name]
    return found


def _method(entries: Iterable[Any]) -> Method:
    """A method from its phases, each (policy, fraction[, start[, update]]), and words of `METHOD_OPTIONS`."""
    words = [entry for entry in entries if isinstance(entry, str)]
    unknown = [word for word in words if word not in METHOD_OPTIONS]
    if unknown:
        raise ValueError(f"unknown word {unknown[0]!r}; known: {', '.join(METHOD_OPTIONS)}")
    options = {key: value for word in words for key, value in METHOD_OPTIONS[word].items()}
    listed = [_phase(entry) for entry in entries if not isinstance(entry, str)]
    if "start" in options and all(phase.start for phase in listed[1:]):
        raise ValueError("'rotate' changes how later phases start, and every one of them names its own action")
    # A later phase that names no action starts with a squeeze.
    start = options.pop("start", "squeeze")
    later = (dataclasses.replace(phase, start=phase.start or start) for phase in listed[1:])
    phases = (*listed[:1], *later)
    return Method(phases=phases, summary=_summary(phases, options), **options)


def _phase(entry: Any) -> Phase:
    """Returns a phase as it is listed; its start is empty where none is named."""
    if not isinstance(entry, Sequence) or not 2 <= len(entry) <= 4:
        raise ValueError(
            f"a phase is a policy and its share of the steps, and then perhaps a start and an update; got {entry!r}"
        )
    policy, fraction, *others = entry
    return Phase(policy, float(fraction), *others)


def _summary(phases: Sequence[Phase], options: Mapping[str, Any]) -> str:
    parts = []
    for phase in phases:
        before = f"{phase.start}, then " if phase.start not in ("", "none") else ""
        behind = f" with {phase.update}" if phase.update != "none" else ""
        parts.append(f"{before}{phase.policy} for {phase.fraction:.0%} of the steps{behind}")
    notes = ["gated"] if options.get("gate") else []
    notes += ["the learning rate starts anew in every phase"] if options.get("schedule") == "phase" else []
    notes += [f"trained by {options['optimizer']}"] if "optimizer" in options else []
    return "; ".join([", ".join(parts), *notes])


def check_readout_methods(config: Mapping[str, Any]) -> None:
    """Raises ValueError if `config.evaluation.readouts` has a key that names no method."""
    methods = further_methods(config)
    for name in config["evaluation"]["readouts"]:
        get_method(name, methods)
