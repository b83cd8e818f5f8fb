"""Declares the keys for measuring and reporting: read-outs, evaluation and the choice of learning rates."""

from __future__ import annotations

from mlora_jax.config.schema import Group, Key
from mlora_jax.config.tasks import harness_tasks
from mlora_jax.core import METHODS, READOUTS

# Method -> its default read-outs, for the methods whose default is not ("prefix",).
DEFAULT_READOUTS = {
    "lora": ("prefix", "squeeze"),
    "matryoshka": ("prefix", "nested", "masked"),
    # The columns of these have no order of their own.
    "lora_plus": ("prefix", "squeeze"),
    "scaled_adam": ("prefix", "squeeze"),
    "lora_rite": ("prefix", "squeeze"),
    "maestro": ("prefix", "squeeze"),
    "lora_squeeze": ("prefix", "squeeze"),
    "lora_squeeze_annealed": ("prefix", "squeeze"),
    # A prefix of these would take directions out of W and leave out what was learned of them.
    "pissa": ("squeeze",),
    "olora": ("squeeze",),
    "svfit": ("squeeze",),
    "eva": ("prefix", "squeeze", "ordered_global"),
    "adalora": ("ordered", "ordered_global", "squeeze"),
    "codyra": ("ordered", "ordered_global", "squeeze"),
    "sora": ("ordered", "ordered_global", "squeeze"),
    "sora_schedule": ("ordered", "ordered_global", "squeeze"),
}

REPORT = Group(
    doc="The tables and figures of a run.",
    changeable=True,
    keys={
        "choose_on": Key(
            default="validation",
            choices=("validation", "test"),
            doc="The best learning rate of a method is chosen on this split.",
        ),
    },
)

CALIBRATION = Group(
    doc='The read-outs that look at training data: "calibrated" and "squeeze_inputs".',
    keys={
        "steps": Key(default=200, low=1, doc='The read-out "calibrated" takes this many optimizer steps.'),
        "learning_rate": Key(
            default=0.1,
            above=0.0,
            doc='The read-out "calibrated" fits a factor for each column at this learning rate. The '
            "factors begin at 1.",
        ),
        "batches": Key(
            default=8,
            low=1,
            doc='The read-out "squeeze_inputs" takes the inputs of this many optimizer steps\' batches.',
        ),
    },
)

_READOUTS = Key(
    default=("prefix",),
    choices=tuple(READOUTS),
    distinct=True,
    doc="Adapters of the method of this name are read out in these ways.",
)
EVALUATION = Group(
    doc="How every adapter is measured, at every rank of S.",
    keys={
        "tasks": Key(
            default=(),
            form="a tuple of names and of pairs like ('gsm8k', 8)",
            check=harness_tasks,
            changeable=True,
            doc="Every adapter is measured on these tasks of lm-evaluation-harness besides the run's own "
            "test rows. A name alone takes the number of examples that the task itself says.",
        ),
        "raw_dir": Key(
            default="",
            form="a folder",
            changeable=True,
            doc='The raw data of those tasks is read from this folder. "" takes the harness\'s own, from the network.',
        ),
        "limit": Key(
            default=0,
            low=0,
            doc="The first so many test rows, and items of each of those tasks, are measured. 0 measures all.",
        ),
        "batch_size": Key(default=64, low=1, changeable=True, doc="A forward pass takes this many rows."),
        "max_new_tokens": Key(
            default=256,
            low=1,
            doc="Tasks that generate an answer write at most this many tokens. A prompt is cut on the "
            "left so that they fit into the context.",
        ),
        "readouts": Group(
            doc="The read-outs of each method. A method that is not named is read out by prefix. "
            '"squeeze" makes the best low-rank approximations of the trained function, '
            '"squeeze_inputs" makes those of its outputs on training data, and "calibrated" fits profiles '
            "to training data.",
            changeable=True,
            keys={
                name: Key(**vars(_READOUTS) | {"default": DEFAULT_READOUTS.get(name, ("prefix",))}) for name in METHODS
            },
            names=_READOUTS,
        ),
    },
)
