"""Declares the keys that say what is trained: base model, data, adapters, trials, and the user's own methods."""

from __future__ import annotations

from mlora_jax.config.schema import Group, Key
from mlora_jax.core import INITIALIZERS, SCALINGS
from mlora_jax.core.ranges import LARGEST_SEED

QUANTIZATIONS = ("", "int8", "nf4")
DTYPES = ("", "float32", "bfloat16", "float16", "float64")
OVERFLOWS = ("error", "drop", "truncate")
MAX_SEED = LARGEST_SEED

MODEL = Group(
    doc="The frozen base model.",
    keys={
        "path": Key(
            default="quickstart",
            form="a folder, OWNER/NAME, OWNER/NAME@REVISION or quickstart",
            doc='This is a Hugging Face folder or a hub id. "quickstart" is the base that the package ships.',
        ),
        "dtype": Key(
            default="float32",
            choices=DTYPES,
            doc='The base is kept and computed in this type. "" keeps the type on disk.',
        ),
        "quantization": Key(
            default="",
            choices=QUANTIZATIONS,
            doc='The kernels of the base are quantized to this format, which needs the extra `quant`. "" '
            "leaves them as they are.",
        ),
    },
)

DATA = Group(
    doc="The rows that adapters are trained and tested on.",
    keys={
        "task": Key(
            default="quickstart",
            form="a key of mlora_jax.data.TASKS",
            doc='This is the task to train on. It becomes "jsonl" as soon as data.file or data.evaluation_file is set.',
        ),
        "raw_dir": Key(
            default="",
            form="a folder",
            changeable=True,
            doc='The task\'s raw files are read from this folder. "" downloads the published ones.',
        ),
        "cache_dir": Key(
            default="",
            form="a folder",
            changeable=True,
            doc='Built data sets are kept in this folder. "" takes the folder that TFDS chooses.',
        ),
        "style": Key(
            default="",
            form="a style of the task",
            doc='Prompts are written in this style. "" takes the first style of the task.',
        ),
        "file": Key(
            default="",
            form="a file of JSON lines",
            doc='The task "jsonl" trains on the rows of this file, one JSON object per line.',
        ),
        "evaluation_file": Key(
            default="",
            form="a file of JSON lines",
            doc='The task "jsonl" tests on the rows of this file. "" holds rows of data.file out.',
        ),
        "ignored_keys": Key(
            default=(),
            entry=str,
            form="names of keys",
            doc='The task "jsonl" does not look at these keys of rows and messages. Any other key that it does not '
            "know is an error.",
        ),
        "holdout": Key(
            default=0.1,
            low=0.0,
            high=0.99,
            doc="This share of the training rows is held out to test on where a data set has no test rows.",
        ),
        "limit": Key(
            default=0,
            low=0,
            doc="At most this many training rows are used, the same ones in every run. 0 uses all.",
        ),
        "max_length": Key(
            default=512,
            low=2,
            doc="An example has at most this many tokens: prompt, answer and end of text together. It "
            "must not exceed the model's context.",
        ),
        "overflow": Key(
            default="error",
            choices=OVERFLOWS,
            doc="A longer example is an error, is dropped, or is truncated on the right.",
        ),
        "pad_multiple": Key(
            default=32,
            low=1,
            doc="An evaluation pads its batches to a multiple of this many tokens, so that few shapes are compiled.",
        ),
    },
)

ADAPTER = Group(
    doc="The adapters of all trials.",
    keys={
        "targets": Key(
            default=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
            form="a tuple of regular expressions",
            doc="Layers whose path, or its end after a dot, matches one of these patterns get an adapter.",
        ),
        "init": Key(
            default="fan_rank",
            choices=tuple(INITIALIZERS),
            doc='A begins uniform with the bound 1/sqrt(R) for "fan_rank" (the paper\'s) and 1/sqrt(D) for '
            '"fan_in" (PEFT\'s). B begins at zero.',
        ),
        "dropout": Key(
            default=0.0,
            low=0.0,
            high=0.999,
            doc="This share of the adapter's inputs is set to zero at each training step.",
        ),
        "ranks": Key(
            default=(),
            form="a rising tuple of ranks up to R",
            doc="These are the ranks S that are trained and measured. () takes the powers of two up to "
            "the trial's rank R, and R.",
        ),
        "start_from": Key(
            default="",
            form="a folder",
            doc='Training begins with the function of the PEFT adapter in this folder. "" begins with the '
            "base's function.",
        ),
    },
)

TRIALS = Group(
    doc="What a run trains: the product of these values, one trial per combination.",
    changeable=True,
    keys={
        "method": Key(
            default=("matryoshka",),
            filled=True,
            distinct=True,
            form="a tuple of names in mlora_jax.core.METHODS and config.methods",
            doc="Trials are trained by these methods.",
        ),
        "learning_rate": Key(
            default=(1e-3,),
            above=0.0,
            filled=True,
            distinct=True,
            doc="These are the learning rates at the end of the warm-up. They fall linearly to zero.",
        ),
        "seed": Key(
            default=(42,),
            low=0,
            high=MAX_SEED,
            filled=True,
            distinct=True,
            doc="A seed decides a trial's initial factors, order of rows, dropout and drawn ranks.",
        ),
        "scaling": Key(
            default=("none",),
            choices=tuple(SCALINGS),
            filled=True,
            distinct=True,
            doc='A prefix of rank r is scaled by 1 for "none", 1/r for "rank" and 1/sqrt(r) for "sqrt".',
        ),
        "rank": Key(
            default=(32,),
            low=1,
            filled=True,
            distinct=True,
            doc="These are the adapters' ranks R, the number of columns of A.",
        ),
        "weights": Key(
            default=((),),
            filled=True,
            distinct=True,
            form="a tuple of tuples with a number for each rank of S",
            doc="These are the weights w_r of the methods that use them, one tuple per trial. () is 1 for every rank.",
        ),
        "list": Key(
            default=(),
            form="a tuple of dicts of the keys above",
            doc="This list takes the place of the one product. Each entry is a dict of some of the keys "
            "above, with one value or a tuple of values for each, and stands for its own product. "
            "Keys that an entry leaves out are taken from above.",
        ),
    },
)

OWN_METHODS = Group(
    doc="Methods of your own, besides those of mlora_jax.core.METHODS. A begun run may add some, but not change them.",
    names=Key(
        default=(),
        form="phases like (('lora', 0.7), ('per_example', 0.3)), and perhaps 'rotate', 'restart', 'gate', "
        "'normal_gate' or the name of an optimizer",
        doc="The key is the method's name, and its value holds the phases in order. A phase is a policy, its "
        "share of the steps and, if wanted, the action that it starts with and its update rule (keys of "
        "mlora_jax.core.ACTIONS and mlora_jax.core.UPDATES). A later phase that names no action starts "
        'with "squeeze", which starts the optimizer\'s moments anew; "none" starts it without an action. '
        'Words may follow the phases: "rotate" takes the moments through the squeeze, "restart" lets the '
        'learning rate fall to zero in every phase, and "gate" trains a gate in every layer, which starts at ones; '
        '"NAME_gate" starts it by the row NAME of mlora_jax.core.GATE_INITIALIZERS. A key of '
        "mlora_jax.core.optimizers.OPTIMIZERS takes this optimizer in the place of Adam. The warm-up comes only once, "
        "at the start.",
    ),
)
