"""Flags that take numbers and tuples, on absl's own parser: ranges, and which value counts where a flag comes twice."""

import ast
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from ml_collections import ConfigDict, config_flags

from mlora_jax.cli import export, generate, plan, ranks, study  # noqa: F401  define their flags
from mlora_jax.cli.config_flags import LastTupleParser
from mlora_jax.cli.number_flags import RANGES, integers
from mlora_jax.config import DEFAULTS
from mlora_jax.evaluate.loading import load_adapted
from mlora_jax.evaluate.sampling import make_sampling, nucleus
from mlora_jax.study.keys import resolve_cell
from mlora_jax.training.pretrain import pretrain

ROOT = pathlib.Path(__file__).parents[2]
TOO_LARGE = (2**31, 10**30)
BEYOND = ("nan", "inf", "-inf", "1e400")
# Flag -> the values at the ends of its range, and values outside.
NUMBERS = {
    "max_new_tokens": ((1, 2**31 - 1), (0, -1, *TOO_LARGE, "1.5", *BEYOND)),
    "batch_size": ((1, 2**31 - 1), (0, *TOO_LARGE)),
    "seed": ((0, 2**32 - 1), (-1, 2**32, 2**64, 10**30, "9" * 5000, "1.5", *BEYOND)),
    "temperature": ((0.0, 3e38), (-1e-9, 1e39, *BEYOND)),
    "top_p": ((1e-300, 1.0), (0.0, -0.1, 1.0000001, *BEYOND)),
    "within": ((0.0, 1.0), (-0.01, 1.01, *BEYOND)),
    "limit": ((1, 2**31 - 1), (0, *TOO_LARGE)),
    "timed_steps": ((1,), (0, *TOO_LARGE)),
    "teraflops": ((0.001, 1e6), (0.0, 1e39, *BEYOND)),
    "hours": ((0.0, 1e6), (-1.0, 2e6, *BEYOND)),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_the_range_of_a_number(name):
    flag = flags.FLAGS[name]
    inside, outside = NUMBERS[name]
    for value in inside:
        assert flag._parse(str(value)) == value
    for value in outside:
        with pytest.raises(flags.IllegalFlagValueError, match=f"flag --{name}="):
            flag._parse(str(value))


def test_every_number_flag_of_every_command_is_in_the_table():
    found = set()
    for file in (ROOT / "mlora_jax" / "cli").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                name = getattr(node.func, "attr", getattr(node.func, "id", ""))
                assert name not in ("DEFINE_integer", "DEFINE_float", "DEFINE_multi_integer", "DEFINE_multi_float")
                if name in ("define_integer", "define_float", "integers"):
                    found.add(node.args[0].value)
    assert found == set(RANGES)


@pytest.mark.parametrize(
    ("name", "values", "options", "expected"),
    [
        ("rank", ["0", "8"], {}, [0, 8]),
        ("budget", ["1"], {}, [1]),
        ("batch", ["4", "largest"], {"words": ("largest",)}, [4, "largest"]),
        ("levels", [], {}, []),
    ],
)
def test_lists_of_integers(name, values, options, expected):
    assert integers(name, values, **options) == expected


@pytest.mark.parametrize(
    ("name", "value", "options", "message"),
    [
        ("rank", "-1", {}, r"--rank must be integers in 0\.\.2147483647 with commas between them, got '1,-1'"),
        ("rank", "0", {"low": 1}, r"--rank must be integers in 1\.\.2147483647 with commas"),
        ("budget", "0", {}, r"--budget must be integers in 1\.\.2147483647"),
        ("levels", "2147483648", {}, r"--levels must be integers in 0\.\.2147483647"),
        ("budget", "x", {}, "--budget must be integers"),
        ("budget", "1.5", {}, "--budget must be integers"),
        ("budget", "²", {}, "--budget must be integers"),
        ("budget", "9" * 5000, {}, "--budget must be integers"),
        ("batch", "all", {"words": ("largest",)}, r"in 1\.\.2147483647 or largest with commas"),
    ],
)
def test_lists_of_other_things(name, value, options, message):
    with pytest.raises(ValueError, match=message):
        integers(name, ["1", value], **options)


def parsed(config: dict, *arguments: str) -> ConfigDict:
    """A config with overrides, by absl."""
    values, argv = flags.FlagValues(), ["command", *arguments]
    before = config_flags.config_flags._FIELD_TYPE_TO_PARSER[tuple]
    config_flags.register_flag_parser_for_type(tuple, LastTupleParser())
    try:
        holder = config_flags.DEFINE_config_dict("config", ConfigDict(config), flag_values=values, sys_argv=argv)
        assert values(argv) == ["command"]
    finally:
        config_flags.register_flag_parser_for_type(tuple, before)
    return holder.value


def tuple_keys(group: dict, path: str = ""):
    for key, value in group.items():
        if isinstance(value, dict):
            yield from tuple_keys(value, f"{path}{key}.")
        elif isinstance(value, tuple):
            yield f"{path}{key}"


@pytest.mark.parametrize("key", [*tuple_keys(DEFAULTS)])
def test_of_a_tuple_that_is_given_twice_the_last_value_counts(key):
    """As of any other flag of absl."""
    values, oracle = ["(1, 2)", "(3, 4, 5)", "7,"], flags.FlagValues()
    flags.DEFINE_string("key", "", "", flag_values=oracle)
    for given in (values, values[::-1], ["(1,)", "()"]):
        oracle(["command", *(f"--key={value}" for value in given)])
        for form in ("--config.{}={}", "-config.{}={}"):
            config = parsed(DEFAULTS, *(form.format(key, value) for value in given))
            assert _at(config, key) == ast.literal_eval(oracle["key"].value)
    config = parsed(DEFAULTS, f"--config.{key}", "(1, 2)", f"--config.{key}", "(3,)", "--config.train.epochs=4")
    assert (_at(config, key), config.train.epochs) == ((3,), 4)


def _at(config, key):
    for part in key.split("."):
        config = config[part]
    return config


def test_what_a_tuple_may_look_like_is_as_before():
    values = {
        "1e-4": (1e-4,),
        "1e-4,": (1e-4,),
        "[1e-4, 3]": (1e-4, 3),
        "lora": ("lora",),
        "('lora', 0.5), 'x'": (("lora", 0.5), "x"),
        "({'rank': 3},)": ({"rank": 3},),
    }
    for text, value in values.items():
        config = parsed({"t": (), "n": 0}, f"--config.t={text}")
        assert config.to_dict()["t"] == value
    with pytest.raises(flags.IllegalFlagValueError, match=r"flag --config\.t=a, b c"):
        parsed({"t": ()}, "--config.t=a, b c")


def test_the_command_trains_the_last_learning_rate_only():
    arguments = ["--config=quickstart", "--estimate"]
    rates = ["--config.trials.learning_rate=(1e-4, 2e-4)", "--config.trials.learning_rate=3e-4"]
    seeds = ["--config.trials.method=('lora',)", "--config.trials.seed=(1,)", "--config.trials.seed=(2,)"]
    command = [sys.executable, "-m", "experiments.plan", *arguments, *rates, *seeds]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200, check=True)
    assert "\n1 trials of " in done.stdout


NOT_FINITE = (float("nan"), float("inf"), -float("inf"), 1e39)


def numbers(group: dict, path: str = ""):
    """Key -> how a value is put there, for every key of a config that holds a number or several."""
    for key, value in group.items():
        name = f"{path}{key}"
        if isinstance(value, dict):
            yield from numbers(value, f"{name}.")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield name, type(value), lambda number: number
        elif isinstance(value, tuple) and value and isinstance(value[0], (int, float)):
            yield name, type(value[0]), lambda number: (number,)
    if not path:
        yield "trials.weights", float, lambda number: ((number,) * 6,)
        yield "adapter.ranks", int, lambda number: (number,)
        yield "methods.own", float, lambda number: (("lora", number),)
        yield "evaluation.tasks", int, lambda number: (("gsm8k", number),)
        yield "trials.list", float, lambda number: ({"learning_rate": number},)


@pytest.mark.parametrize(("key", "kind", "put"), [pytest.param(*each, id=each[0]) for each in numbers(DEFAULTS)])
def test_no_key_of_a_config_takes_a_number_that_arrays_cannot_hold(key, kind, put):
    for number in (2**32, 10**30, -(10**30)) if kind is int else NOT_FINITE:
        config: dict = {}
        group, name = config, key
        while "." in name:
            first, _, name = name.partition(".")
            group = group.setdefault(first, {})
        group[name] = put(number)
        if key == "study.rates":
            config["study"]["start"] = put(number)
        if key == "trials.weights":
            config["trials"]["method"] = ("matryoshka",)
        with pytest.raises(ValueError, match=key.split(".")[0]):
            resolve_cell(config)


def test_seeds_up_to_32_bits_are_taken():
    config = {"trials": {"seed": (0, 2**32 - 1), "list": ({"seed": 2**32 - 1},)}, "study": {"seeds": (2**32 - 1,)}}
    assert resolve_cell(config).trials.seed == (0, 2**32 - 1)


@pytest.mark.parametrize("seed", [-1, 2**32, 2**64, 10**30])
def test_a_seed_of_draws_that_would_be_another_one_is_refused(seed):
    with pytest.raises(ValueError, match=f"seed must be at least 0 and at most 4294967295, got {seed}$"):
        make_sampling(1.0, 1.0, seed)
    with pytest.raises(ValueError, match=f"seed must be at least 0 and at most 4294967295, got {seed}$"):
        load_adapted(checkpoint="x", seed=seed)


def test_the_largest_seed_is_no_other_seed():
    """NumPy's view of the key's 64 bits is the oracle."""
    for seed in (0, 2**31, 2**32 - 1):
        key = jax.random.key_data(make_sampling(1.0, 1.0, seed).key)
        assert np.asarray(key).tolist() == [0, seed]


def test_the_smallest_top_p_takes_the_likeliest_token():
    logits = jnp.log(jnp.array([0.2, 0.5, 0.3]))
    kept = nucleus(logits, make_sampling(1.0, 1e-300, 0).top_p)
    assert np.isfinite(kept).tolist() == [False, True, False]


@pytest.mark.parametrize("option", ["batch_size", "pad_multiple"])
def test_numbers_among_the_harness_model_arguments(option):
    with pytest.raises(ValueError, match=f"{option} must be at least 1 and at most 2147483647, got 0"):
        load_adapted(checkpoint="x", **{option: 0})


@pytest.mark.parametrize(
    ("key", "value"),
    [("seed", 2**32), ("train.learning_rate", float("nan")), ("train.steps", 0), ("train.batch_size", 10**30)],
)
def test_numbers_of_pretraining(tmp_path, key, value):
    group, _, name = key.rpartition(".")
    config = {"seed": 0, "text": {}, "tokenizer": {}, "model": {}, "train": {}}
    (config[group] if group else config)[name] = value
    with pytest.raises(ValueError, match=f"config.{key} must be at least|config.{key} must be above"):
        pretrain(config, tmp_path / "out")


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "--run=x", "--rank=1", "--prompt=a", "--seed=4294967296"],
        ["pretrain", "--config=configs/pretrain_quickstart.py", "--out={out}", "--config.train.learning_rate=nan"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_number_outside_its_range_is_no_traceback(tmp_path, arguments):
    arguments = [argument.format(out=tmp_path) for argument in arguments]
    command = [sys.executable, "-m", f"experiments.{arguments[0]}", *arguments[1:]]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "4294967296 is not an integer that is" in done.stderr or "learning_rate must be above 0" in done.stderr
