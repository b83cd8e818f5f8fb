"""Declares every config key once, with its default, meaning, allowed values and range.

The rows of the table are in keys_of_trials.py, keys_of_training.py and keys_of_results.py. The nested defaults, the
checks of `resolve`, the keys that a begun run may change, the list of `--help` and docs/config.md all follow from
these rows.
"""

from __future__ import annotations

from typing import Any

from mlora_jax.config.keys_of_results import CALIBRATION, EVALUATION, REPORT
from mlora_jax.config.keys_of_training import CHECKPOINT, COMPILATION, PARALLEL, RECORDS, TRAIN, VALIDATION
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
        "compilation": COMPILATION,
        "checkpoint": CHECKPOINT,
        "records": RECORDS,
        "report": REPORT,
        "calibration": CALIBRATION,
        "evaluation": EVALUATION,
    },
)
# Group that only another command reads -> that command. Earlier versions kept these groups in every run's config.json.
ELSEWHERE = {"study": "experiments.study"}

DEFAULTS: dict[str, Any] = KEYS.defaults()
# The dotted names of the groups whose keys are names that a config may give.
NAMED = tuple(f"config.{name}" for name, group in KEYS.groups() if group.names)
# The dotted names of the groups and keys that a begun run may change. A group stands for all its keys.
CHANGEABLE = (*KEYS.changeable_names(), *ELSEWHERE)
