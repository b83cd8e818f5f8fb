"""The table of config keys: each is declared once, with its default, meaning, allowed values and range.

The rows are in keys_of_trials.py, keys_of_training.py and keys_of_results.py. Everything else that is said of a key
follows from its row: the nested defaults, the checks of `resolve`, what a begun run may change, the list of `--help`
and docs/config.md.
"""

from __future__ import annotations

from typing import Any

from mlora_jax.config.keys_of_results import CALIBRATION, EVALUATION, REPORT
from mlora_jax.config.keys_of_training import CHECKPOINT, PARALLEL, RECORDS, TRAIN, VALIDATION
from mlora_jax.config.keys_of_trials import ADAPTER, DATA, MODEL, OWN_METHODS, TRIALS
from mlora_jax.config.schema import Group

KEYS = Group(
    doc="An experiment.",
    keys={
        "model": MODEL,
        "data": DATA,
        "adapter": ADAPTER,
        "trials": TRIALS,
        "methods": OWN_METHODS,
        "train": TRAIN,
        "validation": VALIDATION,
        "parallel": PARALLEL,
        "checkpoint": CHECKPOINT,
        "records": RECORDS,
        "report": REPORT,
        "calibration": CALIBRATION,
        "evaluation": EVALUATION,
    },
)
# Groups that only another command reads -> which one. Earlier versions kept them in every run's config.json.
ELSEWHERE = {"study": "experiments.study"}

DEFAULTS: dict[str, Any] = KEYS.defaults()
# Groups whose keys are names that a config may give.
NAMED = tuple(f"config.{name}" for name, group in KEYS.groups() if group.names)
# Groups and keys that a begun run may change; a group stands for all its keys.
CHANGEABLE = (*KEYS.changeable_names(), *ELSEWHERE)
