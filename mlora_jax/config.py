"""Every key an experiment config may set, its default, and the check that turns a config into plain values."""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from ml_collections import ConfigDict

from mlora_jax.core import (
    INITIALIZERS,
    METHODS,
    READOUTS,
    Method,
    Phase,
    RankHierarchy,
    get_method,
    powers_of_two,
)
from mlora_jax.core.ranges import SEEDS, check_number

# Groups whose keys are names of methods.
NAMED = ("config.methods", "config.evaluation.readouts")
QUANTIZATIONS = ("", "int8", "nf4")
DTYPES = ("", "float32", "bfloat16", "float16", "float64")
OVERFLOWS = ("error", "drop", "truncate")
FACTOR_READOUTS = (*READOUTS, "squeeze")  # those that take nothing but the adapter
READOUT_NAMES = (*FACTOR_READOUTS, "squeeze_inputs", "calibrated")
# Keys that a run may change when it is continued: they do not touch a trial that is trained already.
CHANGEABLE = (
    "trials",
    "report",
    "records",
    "study",
    "checkpoint",
    "parallel",
    "train.trials_at_once",
    "train.memory_gib",
    "data.raw_dir",
    "data.cache_dir",
    "evaluation.readouts",
    "evaluation.batch_size",
    "evaluation.tasks",
    "evaluation.raw_dir",
)

# The type of a default is the type of the key. An empty string or tuple stands for "not set".
DEFAULTS: dict[str, Any] = {
    "model": {
        # A Hugging Face folder or a hub id, OWNER/NAME or OWNER/NAME@REVISION; "quickstart" is the package's own base.
        "path": "quickstart",
        "dtype": "float32",  # of the frozen base and of compute; "" keeps the dtype on disk
        "quantization": "",  # of the frozen base's kernels: int8 | nf4 (the extra `quant`); "" leaves them as they are
    },
    "data": {
        "task": "quickstart",  # a key of mlora_jax.data.TASKS; "jsonl" as soon as a file is given
        "raw_dir": "",  # folder of raw files; "" downloads the published ones
        "cache_dir": "",  # where built data sets are kept; "" is TFDS's own choice
        "style": "",  # prompt style; "" is the task's default
        "file": "",  # task "jsonl": own data, one JSON object a line
        "evaluation_file": "",  # task "jsonl": own test rows; "" holds rows of `file` out
        "ignored_keys": (),  # task "jsonl": keys of rows and messages that are not looked at
        "holdout": 0.1,  # share of the training rows held out to test on, where a data set has no test rows of its own
        "limit": 0,  # at most so many training rows, always the same ones; 0 is all
        "max_length": 512,  # tokens of prompt, answer and end together; at most the model's context
        "overflow": "error",  # what becomes of a longer example: error | drop | truncate
        "pad_multiple": 32,  # batches are padded to a multiple of this many tokens
    },
    "adapter": {
        "targets": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        "init": "fan_rank",  # fan_rank (the paper's) | fan_in (PEFT's)
        "dropout": 0.0,
        "ranks": (),  # S; () is the powers of two up to the trial's rank, and that rank
        "start_from": "",  # folder of a PEFT adapter whose function training begins with; "" begins with the base
    },
    "trials": {  # the run trains the product of these
        "method": ("matryoshka",),
        "learning_rate": (1e-3,),
        "seed": (42,),
        "scaling": ("none",),
        "rank": (32,),
        "weights": ((),),  # w_r of dylora and the matryoshkas, one tuple per trial; () is 1 for every rank
        # An explicit list in place of the one product: every entry is a dict of some of the keys above, a value or a
        # tuple of values each, and stands for its own product; the keys that it leaves out are taken from above.
        "list": (),
    },
    # Methods of one's own, besides those of mlora_jax.core.METHODS: a name and its phases in order, each a policy and
    # its share of the steps, with a squeeze in between: {"name": (("lora", 0.7), ("per_example", 0.3))}. "rotate" as
    # one more entry takes the optimizer's moments through the squeeze, which otherwise starts them anew; "restart"
    # starts the learning rate anew too, which then falls to zero in every phase. A warm-up comes once, at the start.
    "methods": {},
    "train": {
        "epochs": 3,
        "batch_size": 32,  # sequences per optimizer step
        "accumulation": 1,  # micro-batches per optimizer step
        "warmup_steps": 0,
        "beta1": 0.9,
        "beta2": 0.999,
        "epsilon": 1e-8,
        "weight_decay": 0.0,
        "clip": 1.0,  # global gradient norm; 0 turns clipping off
        "loss_chunk": 1024,  # answer positions whose logits exist at one time
        "log_every": 10,  # steps between lines of metrics.jsonl
        "remat": False,  # recompute a layer in the backward pass rather than keep its activations
        "trials_at_once": 0,  # trials in one batch; 0 is as many as fit in memory (on a CPU one, if that is faster)
        "memory_gib": 0.0,  # memory that a batch of trials may take; 0 is what the device reports, or 8 on a CPU
    },
    "validation": {  # on the data set's own validation split, or else on rows held out of its training split
        "holdout": 0.1,  # share of the training rows that is held out; 0 holds none out
        "limit": 512,  # at most so many rows are held out, or taken from the data set's own split
        "every": 0,  # optimizer steps between validations while training; 0 validates at the end only
        "measure": "aurac",  # what those look at: aurac (over log2 rank, by prefix) | loss (its mean over the prefixes)
        "keep": "last",  # the adapter that a trial ends with: last | best (by those validations)
        "patience": 0,  # a trial stops after so many validations without a better one; 0 never stops it
    },
    "parallel": {  # the mesh of all devices of all processes; its sizes multiply to their number
        "trial": 1,  # trials that train side by side
        "data": -1,  # parts of a batch's rows, each with a copy of the base; -1 is the most that the others leave
        "fsdp": 1,  # parts of the rows that share one base, gathered layer by layer, and one adapter and optimizer
        "tensor": 1,  # parts of every layer's features
        "engine": "jit",  # of the training step: jit | pmap (`data` only, one process)
        # Whether to join other processes: those of the cluster that jax detects (SLURM, GKE, Cloud TPU, Open MPI), or
        # those that the next three keys name.
        "distributed": False,
        "coordinator_address": "",  # HOST:PORT of the first process
        "num_processes": 0,
        "process_id": -1,  # of this process, 0 for the first
    },
    "checkpoint": {
        "every": 100,  # optimizer steps between checkpoints; 0 saves at the end of a batch only
        "keep": 2,  # how many of a batch are kept while it trains
    },
    "records": {  # besides metrics.jsonl and curves.jsonl
        "tensorboard": False,  # event files in WORKDIR/tensorboard
        "wandb_project": "",  # Weights & Biases, if installed; "" is off
    },
    "report": {
        "choose_on": "validation",  # the split on which the best learning rate is chosen: validation | test
    },
    "calibration": {  # of the read-outs that look at training data
        "steps": 200,  # optimizer steps of "calibrated"
        "learning_rate": 0.1,  # of the factors on each column, which begin at 1
        "batches": 8,  # of optimizer steps, of which "squeeze_inputs" takes the inputs
    },
    "study": {  # what experiments.study trains in place of the trials above
        # leading | dearer | separate | variants | weighted | matryoshka | matryoshka_all | further, in the order of
        # training: what they are is in mlora_jax.study.rivals.
        "groups": ("leading", "separate"),
        "rank": 32,  # R
        "rates": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1),  # the learning rates that there are
        "start": (1e-3, 3e-3, 1e-2),  # those tried first; others follow while the best is at the edge
        "seeds": (42, 666, 2408),  # the first one screens the learning rates
    },
    "evaluation": {
        # Tasks of lm-evaluation-harness on which every adapter is measured besides the run's own test rows: a name with
        # the number of examples that the task itself says, or a pair like ("gsm8k", 8).
        "tasks": (),
        "raw_dir": "",  # folder of raw data for those tasks; "" takes the harness's own, from the network
        "limit": 0,  # the first so many test rows, and items of each of those tasks; 0 is all
        "batch_size": 64,  # rows per forward pass
        "max_new_tokens": 256,  # tasks that generate; a prompt is cut on the left to leave so much of the context
        # Read-outs per method; a method that is not named here is read out by prefix. "squeeze" stands for the
        # best low-rank approximations of the trained function, "squeeze_inputs" for those of what it makes of training
        # data, "calibrated" for profiles fitted to training data.
        "readouts": {
            "lora": ("prefix", "squeeze"),
            "dylora": ("prefix",),
            "dylora_original": ("prefix",),
            "dylora_frozen": ("prefix",),
            "matryoshka": ("prefix", "nested", "masked"),
            "matryoshka_exact": ("prefix",),
            "sandwich": ("prefix",),
            "per_example": ("prefix",),
            "renest": ("prefix",),
            "renest_30_rotated": ("prefix",),
            "renest_sandwich": ("prefix",),
        },
    },
}


@dataclasses.dataclass(frozen=True)
class Trial:
    """One training run of the product in `config.trials`."""

    method: str
    learning_rate: float
    seed: int
    scaling: str
    rank: int
    weights: tuple[float, ...] = ()

    @property
    def name(self) -> str:
        """A folder name that no other trial of the run has."""
        weights = "".join(f"-w{_number(w)}" for w in self.weights)
        rate = _number(self.learning_rate)
        return f"{self.method}-r{self.rank}-{self.scaling}{weights}-lr{rate}-seed{self.seed}"

    def hierarchy(self, ranks: tuple[int, ...] = ()) -> RankHierarchy:
        """S (by default the powers of two up to the rank), scaling and weights of this trial."""
        return RankHierarchy(ranks or powers_of_two(self.rank), self.scaling, self.weights or None, max_rank=self.rank)


def _number(value: float) -> str:
    short = f"{value:g}"
    return short if float(short) == value else repr(float(value))


def resolve(config: Mapping[str, Any] | ConfigDict) -> ConfigDict:
    """The config with every key present and checked.

    Args:
      config: nested mapping that sets some of the keys of `DEFAULTS`.

    Returns:
      A locked `ConfigDict` with all keys.

    Raises:
      ValueError: an unknown key (the message names the nearest one), a value of another type, or a value that is not
        allowed (method, scaling, rank, S, dtype, overflow, read-out, a number outside its range).
    """
    given = config.to_dict() if isinstance(config, ConfigDict) else config
    merged = _merge(DEFAULTS, given, "config")
    entries = enumerate(merged["trials"]["list"])
    merged["trials"]["list"] = tuple(_trial_entry(entry, f"config.trials.list[{n}]") for n, entry in entries)
    if merged["data"]["file"] or merged["data"]["evaluation_file"]:
        merged["data"]["task"] = "jsonl"  # own data is its own task, whatever the key was left at
    _check(merged)
    return ConfigDict(merged).lock()


def expand_trials(config: ConfigDict) -> list[Trial]:
    """The product of `config.trials` in the order of its keys, or those of its list one after the other."""
    axes = {field.name: config.trials[field.name] for field in dataclasses.fields(Trial)}
    trials = [
        Trial(**dict(zip(axes, values, strict=True)))
        for entry in config.trials.list or ({},)
        for values in itertools.product(*(axes | dict(entry)).values())
    ]
    return list(dict.fromkeys(trials))


def further_methods(config: Mapping | ConfigDict) -> dict[str, Method]:
    """The methods of `config.methods`. One that the table of methods has in the same words by now is left out.

    Raises:
      ValueError: one that the table has in other words, or that cannot be; the message names it.
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
    kept = {"reset": "moments reset", "rotate": "moments rotated", "restart": "moments and learning rate started anew"}
    return f"{parts}; {kept.get(carry, carry)}" if len(phases) > 1 else parts


def harness_tasks(entries: Iterable) -> list[tuple[str, int | None]]:
    """The tasks of `config.evaluation.tasks` and their numbers of examples; None is the task's own.

    Raises:
      ValueError: an entry that is neither a name nor a name and a number, or one that comes twice.
    """
    found = []
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


def _is_pair(entry) -> bool:
    return isinstance(entry, (tuple, list)) and len(entry) == 2


def _is_count(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def changed_keys(old: Mapping[str, Any], new: Mapping[str, Any], path: str = "") -> list[str]:
    """The keys, other than `CHANGEABLE`, in which two resolved configs differ: "train.epochs was 3 and is 4".

    A key that the old one lacks, since it was written before there was such a key, has its default there.
    """
    found, defaults = [], _get(DEFAULTS, path.rstrip(".")) if path else DEFAULTS
    for key in dict.fromkeys((*old, *new)):
        name, before, after = f"{path}{key}", old.get(key, _as_json(defaults.get(key))), new.get(key)
        if name in CHANGEABLE or before == after or (path == "methods." and key not in old):
            continue
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            found += changed_keys(before, after, f"{name}.")
        else:
            found.append(f"config.{name} was {before!r} and is {after!r}")
    return found


def _as_json(value):
    return json.loads(json.dumps(value))


def check_key(name: str) -> None:
    """Raises ValueError if a dotted name begins with "config." and is no key of a config; names the nearest one."""
    first, *keys = name.split(".")
    group, path = DEFAULTS, "config"
    for key in keys if first == "config" else ():
        if not isinstance(group, Mapping):
            raise ValueError(f"{path} is a value and has no key {key!r}")
        _check_keys(group, (key,), path)
        group, path = group.get(key, ()), f"{path}.{key}"  # a name that is new to a group of `NAMED` is a value


def _check_keys(defaults: Mapping, given: Iterable[str], path: str) -> None:
    for key in given:
        if key not in defaults and path not in NAMED:
            near = difflib.get_close_matches(str(key), defaults, n=1)
            hint = f"; did you mean {path}.{near[0]}?" if near else "."
            raise ValueError(f"unknown config key {path}.{key}{hint} Keys of {path}: {', '.join(defaults)}")


def _merge(defaults: Mapping, given: Mapping, path: str) -> dict:
    _check_keys(defaults, given, path)
    merged = {}
    for key, default in defaults.items():
        name = f"{path}.{key}"
        value = given.get(key, default)
        if isinstance(default, Mapping):
            if not isinstance(value, (Mapping, ConfigDict)):
                raise ValueError(f"{name} must be a group of keys, got {value!r}")
            merged[key] = _merge(default, value, name)
        else:
            merged[key] = _typed(value, default, name)
    if path in NAMED:
        merged |= {key: _typed(value, (), f"{path}.{key}") for key, value in given.items() if key not in defaults}
    return merged


def _trial_entry(entry, name: str) -> dict[str, tuple]:
    axes = {key: default for key, default in DEFAULTS["trials"].items() if key != "list"}
    if not isinstance(entry, (Mapping, ConfigDict)):
        raise ValueError(f"{name} must be a dict of some of {', '.join(axes)}; got {entry!r}")
    _check_keys(axes, entry, name)
    values = {}
    for key, value in entry.items():
        several = isinstance(value, (tuple, list))
        if key == "weights" and several:  # one trial's weights, or a tuple of such
            several = any(isinstance(item, (tuple, list)) for item in value)
        values[key] = _typed(value if several else (value,), axes[key], f"{name}.{key}")
    return values


def _typed(value, default, name: str):
    if isinstance(default, tuple) and isinstance(value, (tuple, list)):
        value = tuple(tuple(item) if isinstance(item, list) else item for item in value)
        if default and isinstance(default[0], (float, int, str, tuple)):
            return tuple(_typed(item, default[0], f"an entry of {name}") for item in value)
        return value
    if isinstance(default, tuple):
        raise ValueError(f"{name} must be a tuple, like {default!r}; got {value!r}")
    kind = type(default)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError(f"{name} must be of type {kind.__name__}, like {default!r}; got {value!r}")
    return value


# (key, smallest, largest); None is no bound.
RANGES = (
    ("data.holdout", 0.0, 0.99),
    ("validation.holdout", 0.0, 0.99),
    ("validation.limit", 1, None),
    ("validation.every", 0, None),
    ("validation.patience", 0, None),
    ("checkpoint.every", 0, None),
    ("calibration.steps", 1, None),
    ("calibration.batches", 1, None),
    ("study.rank", 1, None),
    ("checkpoint.keep", 1, None),
    ("train.trials_at_once", 0, None),
    ("train.memory_gib", 0.0, None),
    ("data.limit", 0, None),
    ("data.max_length", 2, None),
    ("data.pad_multiple", 1, None),
    ("adapter.dropout", 0.0, 0.999),
    ("parallel.num_processes", 0, None),
    ("parallel.process_id", -1, None),
    ("train.epochs", 1, None),
    ("train.batch_size", 1, None),
    ("train.accumulation", 1, None),
    ("train.warmup_steps", 0, None),
    ("train.beta1", 0.0, 0.999999),
    ("train.beta2", 0.0, 0.999999),
    ("train.epsilon", 0.0, None),
    ("train.weight_decay", 0.0, None),
    ("train.clip", 0.0, None),
    ("train.loss_chunk", 1, None),
    ("train.log_every", 1, None),
    ("evaluation.limit", 0, None),
    ("evaluation.batch_size", 1, None),
    ("evaluation.max_new_tokens", 1, None),
)
CHOICES = (
    ("model.dtype", DTYPES),
    ("model.quantization", QUANTIZATIONS),
    ("data.overflow", OVERFLOWS),
    ("adapter.init", tuple(INITIALIZERS)),
    ("validation.measure", ("aurac", "loss")),
    ("validation.keep", ("last", "best")),
    ("report.choose_on", ("validation", "test")),
    ("parallel.engine", ("jit", "pmap")),
)


def _check(config: dict) -> None:
    for name, low, high in RANGES:
        value = _get(config, name)
        if not low <= value <= (math.inf if high is None else high) or math.isinf(value):
            raise ValueError(
                f"config.{name} must be at least {low} and {f'at most {high}' if high else 'finite'}, got {value}"
            )
    if not 0 < (rate := config["calibration"]["learning_rate"]) < math.inf:
        raise ValueError(f"config.calibration.learning_rate must be positive and finite, got {rate}")
    for name, allowed in CHOICES:
        if _get(config, name) not in allowed:
            raise ValueError(
                f"config.{name} must be one of {', '.join(map(repr, allowed))}, got {_get(config, name)!r}"
            )
    if config["train"]["batch_size"] % config["train"]["accumulation"]:
        raise ValueError(
            f"config.train.batch_size {config['train']['batch_size']} is no multiple of "
            f"config.train.accumulation {config['train']['accumulation']}"
        )
    methods = further_methods(config)
    for method, readouts in config["evaluation"]["readouts"].items():
        get_method(method, methods)
        if len(set(readouts)) != len(readouts):
            raise ValueError(f"config.evaluation.readouts.{method} repeats a value: {readouts}")
        for readout in readouts:
            if readout not in READOUT_NAMES:
                raise ValueError(
                    f"unknown read-out {readout!r} in config.evaluation.readouts.{method}; "
                    f"known: {', '.join(READOUT_NAMES)}"
                )
    harness_tasks(config["evaluation"]["tasks"])
    _check_study(config["study"])
    axes = {key: values for key, values in config["trials"].items() if key != "list"}
    _check_axes(axes, "config.trials", methods)
    for number, entry in enumerate(config["trials"]["list"]):
        _check_axes(entry, f"config.trials.list[{number}]", methods)
    _check_numbers(config, "config")
    for trial in expand_trials(ConfigDict(config)):
        try:
            trial.hierarchy(config["adapter"]["ranks"])
        except ValueError as error:
            raise ValueError(f"config.trials cannot make {trial}: {error}") from None
        if trial.weights and not get_method(trial.method, methods).uses_weights:
            users = ", ".join(name for name, method in {**METHODS, **methods}.items() if method.uses_weights)
            raise ValueError(
                f"config.trials.weights {trial.weights} would change nothing for {trial.method!r}; methods with "
                f"weights: {users}. config.trials.list can give them weights of their own"
            )
    parallel = config["parallel"]
    if parallel["engine"] == "pmap" and any(parallel[axis] != 1 for axis in ("trial", "fsdp", "tensor")):
        raise ValueError("config.parallel.engine='pmap' cuts the rows only: leave trial, fsdp and tensor at 1")
    if not config["validation"]["every"]:
        for key, default in (("keep", "last"), ("patience", 0)):
            if config["validation"][key] != default:
                raise ValueError(
                    f"config.validation.{key} needs validations while training: set config.validation.every"
                )


def _check_numbers(value, name: str) -> None:
    """Raises ValueError for a number that arrays cannot hold, wherever in a config it stands."""
    if isinstance(value, Mapping):
        for key, each in value.items():
            _check_numbers(each, f"{name}.{key}")
    elif isinstance(value, tuple):
        for each in value:
            _check_numbers(each, name if name.startswith("an entry of ") else f"an entry of {name}")
    elif not name.endswith(("trials.seed", "study.seeds", ".list.seed")):  # these have a range of their own
        check_number(name, value)


def _check_study(study: Mapping) -> None:
    for name in ("rates", "start", "seeds"):
        if not study[name] or len(set(study[name])) != len(study[name]):
            raise ValueError(f"config.study.{name} must name at least one value and none twice, got {study[name]}")
    if any(not 0 < rate < math.inf for rate in study["rates"]):
        raise ValueError(f"config.study.rates must be positive and finite, got {study['rates']}")
    if any(seed not in SEEDS for seed in study["seeds"]):
        raise ValueError(f"config.study.seeds must be in 0..{SEEDS.high}, got {study['seeds']}")
    if list(study["rates"]) != sorted(study["rates"]) or not set(study["start"]) <= set(study["rates"]):
        raise ValueError(
            f"config.study.rates must be in rising order and hold those of config.study.start {study['start']}, "
            f"got {study['rates']}"
        )


def _check_axes(axes: Mapping, path: str, methods: Mapping[str, Method]) -> None:
    for axis, values in axes.items():
        if not values:
            raise ValueError(f"{path}.{axis} must name at least one value, got ()")
        if len(set(values)) != len(values):
            raise ValueError(f"{path}.{axis} repeats a value: {values}")
    for method in axes.get("method", ()):
        get_method(method, methods)
    if any(not 0 < rate < math.inf for rate in axes.get("learning_rate", ())):
        raise ValueError(f"{path}.learning_rate must be positive and finite, got {axes['learning_rate']}")
    if any(seed not in SEEDS for seed in axes.get("seed", ())):
        raise ValueError(f"{path}.seed must be in 0..{SEEDS.high}, got {axes['seed']}")


def _get(config: Mapping, dotted: str):
    for key in dotted.split("."):
        config = config[key]
    return config
