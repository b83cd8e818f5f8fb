"""Declares every key that an experiment config may set, with its default, and checks configs."""

from mlora_jax.config.describe import help_text, keys_page
from mlora_jax.config.keys import CHANGEABLE, DEFAULTS, ELSEWHERE, KEYS, NAMED
from mlora_jax.config.keys_of_trials import DTYPES, MAX_SEED, OVERFLOWS, QUANTIZATIONS
from mlora_jax.config.methods import further_methods
from mlora_jax.config.reading import changed_keys, check_key, resolve, resolve_stored
from mlora_jax.config.schema import Group, Key
from mlora_jax.config.tasks import harness_tasks

__all__ = [
    "CHANGEABLE",
    "DEFAULTS",
    "DTYPES",
    "ELSEWHERE",
    "KEYS",
    "MAX_SEED",
    "NAMED",
    "OVERFLOWS",
    "QUANTIZATIONS",
    "Group",
    "Key",
    "changed_keys",
    "check_key",
    "further_methods",
    "harness_tasks",
    "help_text",
    "keys_page",
    "resolve",
    "resolve_stored",
]
