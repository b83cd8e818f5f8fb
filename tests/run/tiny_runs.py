"""Configs of tiny runs, and what such a run leaves."""

import copy
import math

import numpy as np

from mlora_jax.training.records import read_json_lines

CLOCKS = ("time", "tokens_per_second")


def choice_config(folders):
    """Questions of which one class is chosen; one trial of six steps."""
    return {
        "model": {"path": folders["model"]},
        "data": {
            "task": "trec",
            "raw_dir": folders["raw"],
            "cache_dir": folders["cache"],
            "pad_multiple": 40,  # one shape, one compilation
            "max_length": 96,
        },
        "adapter": {"targets": ("v_proj", "up_proj")},
        "trials": {"rank": (4,), "learning_rate": (0.03,), "seed": (1,)},
        "train": {"epochs": 2, "batch_size": 4, "log_every": 1},
        "validation": {"holdout": 0.0},
    }


def trials_of(folders, **trials):
    config = choice_config(folders)
    config["trials"] |= trials
    return config


def own_config(folders):
    """A JSONL file of one's own, answered in free text."""
    config = choice_config(folders)
    config["data"] |= {"task": "jsonl", "file": folders["own"]}
    config["trials"]["method"] = ("lora",)
    config["evaluation"] = {"max_new_tokens": 2, "readouts": {"lora": ("prefix",)}}
    return config


def with_key(config, name, value):
    """A copy of the config, with the value at a dotted name."""
    config = copy.deepcopy(config)
    *groups, key = name.split(".")
    at = config
    for group in groups:
        at = at.setdefault(group, {})
    at[key] = value
    return config


def records_without_clocks(workdir):
    return [
        {key: value for key, value in record.items() if key not in CLOCKS}
        for name in ("metrics.jsonl", "curves.jsonl")
        for record in read_json_lines(workdir / name)
    ]


def outcome(workdir):
    """Everything a run wrote that does not depend on the clock or on how the folder is called."""
    adapters = {
        path.parent.name: path.read_bytes() for path in sorted((workdir / "adapters").glob("*/adapter.safetensors"))
    }
    return records_without_clocks(workdir), adapters


def relative_difference(one, other):
    """Relative L2 norm of the difference of two adapters."""
    assert one.keys() == other.keys()
    norm = lambda tensors: math.sqrt(sum(float(np.sum(np.square(t, dtype=np.float64))) for t in tensors))  # noqa: E731
    return norm([one[name] - other[name] for name in one]) / norm(one.values())
