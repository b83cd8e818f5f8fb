"""The table of config keys: every row is whole, and every check that follows from it refuses and accepts."""

import math

import pytest

from mlora_jax.config import CHANGEABLE, DEFAULTS, KEYS, NAMED, Group, Key, changed_keys, check_key, resolve
from mlora_jax.core import METHODS
from mlora_jax.core.ranges import SEEDS
from mlora_jax.data.tokenize import OVERFLOW
from mlora_jax.models.decoder import REMAT
from mlora_jax.models.quantized import FORMATS
from mlora_jax.report import SPLITS
from mlora_jax.study.keys import STUDY, resolve_cell

LEAVES = {**dict(KEYS.leaves()), **dict(STUDY.leaves("study."))}
every_key = pytest.mark.parametrize("name", LEAVES)
# Keys that need a value of another key besides the default.
ALONG = {"validation.keep": {"validation.every": 5}, "validation.patience": {"validation.every": 5}}
# A value other than the default, where none follows from the key's type, bounds and choices.
OTHER = {
    "data.ignored_keys": ("mood",),
    "train.accumulation": 4,
    "train.row_widths": (64, 32),
    "adapter.ranks": (1, 4),
    "trials.method": ("lora", "sandwich"),
    "trials.weights": ((1.0,) * 6,),
    "trials.list": ({"method": ("lora",)},),
    "evaluation.tasks": ("gsm8k",),
    "study.groups": ("further",),
    "study.rates": (1e-3, 3e-3, 1e-2),
    "study.start": (3e-3,),
}


def nested(values):
    """{"a": {"b": value}} from {"a.b": value}."""
    config = {}
    for dotted, value in values.items():
        *groups, key = dotted.split(".")
        group = config
        for part in groups:
            group = group.setdefault(part, {})
        group[key] = value
    return config


def get(config, dotted):
    for key in dotted.split("."):
        config = config[key]
    return config


def flat(group, prefix=""):
    for key, value in group.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def resolved(name, value):
    """The values of all keys, of a config that sets this one."""
    return dict(flat(resolve_cell(nested({name: value} | ALONG.get(name, {}))).to_dict()))


def other_value(name, key):
    if name in OTHER:
        return OTHER[name]
    if key.kind is tuple:
        return tuple(reversed(key.default)) if len(key.default) > 1 else (other_entry(key),)
    return next(choice for choice in key.choices if choice != key.default) if key.choices else other_entry(key)


def other_entry(key):
    if key.choices:
        return key.choices[-1]
    value = key.default[0] if key.kind is tuple else key.default
    return {str: "other", bool: not value, int: value + 1 if type(value) is int else 0}.get(
        type(value), value * 0.5 + 0.01 if type(value) is float else None
    )


@every_key
def test_the_row_of_a_key_is_whole(name):
    key = LEAVES[name]
    assert key.doc.endswith(".") and key.doc[0] in '"A0123456789()' + "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    assert " " in key.doc and "  " not in key.doc
    assert key.read(key.default, name) == key.default
    key.validate(key.default, name)
    assert key.allowed


def test_the_groups_say_what_they_are():
    for name, group in (*KEYS.groups(), ("study", STUDY)):
        assert group.doc.endswith("."), name
        assert group.keys or group.names, name


def test_a_key_is_declared_by_words_or_by_bounds_not_twice():
    """Only what code cannot check by itself has words of its own for what is allowed."""
    for name, key in LEAVES.items():
        assert not (key.choices and (key.low, key.high, key.above) != (None,) * 3), name
        assert not (key.low is not None and key.above is not None), name
        if key.kind in (str, tuple) and not key.choices and key.entry_kind in (None, str, tuple):
            assert key.form or name == "adapter.targets", f"{name}: say what a value looks like"


@every_key
def test_a_key_can_be_set_and_changes_nothing_else(name):
    key = LEAVES[name]
    value = other_value(name, key)
    assert value != key.default
    also = {"data.task": "jsonl"} if name in ("data.file", "data.evaluation_file") else ALONG.get(name, {})
    assert resolved(name, value) == dict(flat(DEFAULTS | {"study": STUDY.defaults()})) | {name: value} | also


def one(key, value):
    """A value of the key that holds this number."""
    return (value,) if key.kind is tuple else value


BOUNDED = [name for name, key in LEAVES.items() if key.bounds]


@pytest.mark.parametrize("name", BOUNDED)
def test_a_number_outside_its_range_is_refused(name):
    key = LEAVES[name]
    number = key.entry_kind if key.kind is tuple else key.kind
    outside = [] if key.low is None else [key.low - 1]
    outside += [] if key.high is None else [key.high + 1]
    outside += [] if key.above is None else [key.above, key.above - 1]
    outside += [math.nan, math.inf] if number is float else []
    for value in map(number, outside):
        with pytest.raises(ValueError, match=rf"config\.{name} must be {key.bounds}, got {value}"):
            resolved(name, one(key, value))
    for value in (key.low, key.high):
        if value is not None and name not in ("study.rates", "study.start"):
            assert resolved(name, one(key, number(value)))[name] == one(key, value)


def test_numbers_that_the_design_bounds_are_bounded():
    """Every number of the table but the sizes of the mesh, which `mesh_sizes` checks with the devices."""
    numbers = {name for name, key in LEAVES.items() if {key.kind, key.kind is tuple and key.entry_kind} & {int, float}}
    assert numbers - set(BOUNDED) == {f"parallel.{axis}" for axis in ("trial", "data", "fsdp", "tensor")}


@pytest.mark.parametrize("name", [name for name, key in LEAVES.items() if key.choices])
def test_a_word_that_is_no_choice_is_refused(name):
    key = LEAVES[name]
    with pytest.raises(ValueError, match=rf"config\.{name} must be one of .*'{key.choices[-1]}', got 'nothing'"):
        resolved(name, one(key, "nothing"))
    for word in key.choices:
        assert resolved(name, one(key, word))[name] == one(key, word)


@pytest.mark.parametrize("name", [name for name, key in LEAVES.items() if key.distinct])
def test_an_entry_that_comes_twice_is_refused(name):
    twice = (LEAVES[name].default or OTHER[name])[:1] * 2
    with pytest.raises(ValueError, match=rf"config\.{name} repeats a value: \("):
        resolved(name, twice)


@pytest.mark.parametrize("name", [name for name, key in LEAVES.items() if key.filled])
def test_no_entry_at_all_is_refused(name):
    with pytest.raises(ValueError, match=rf"config\.{name} must name at least one value, got \(\)"):
        resolved(name, ())


@every_key
def test_a_value_of_another_type_is_refused_with_the_key(name):
    key = LEAVES[name]
    value = {str: 3, bool: 1, int: True, float: "1", tuple: "word"}[key.kind]
    with pytest.raises(ValueError, match=rf"config\.{name} must be (of type {key.kind.__name__}|a tuple), like"):
        resolved(name, value)


@pytest.mark.parametrize("name", [name for name in LEAVES if not name.startswith("evaluation.readouts.")])
def test_a_misspelt_key_is_refused_with_the_nearest(name):
    wrong = f"{name}{name[-1]}"
    with pytest.raises(ValueError, match=rf"unknown config key config\.{wrong}; did you mean config\.{name}\? Keys of"):
        resolved(wrong, LEAVES[name].default)
    if not name.startswith("study."):
        with pytest.raises(ValueError, match=rf"unknown config key config\.{wrong}; did you mean config\.{name}\?"):
            check_key(f"config.{wrong}")


@every_key
def test_a_begun_run_may_change_what_the_table_says(name):
    key = LEAVES[name]
    old, new = nested({name: "before"}), nested({name: "after"})
    assert changed_keys(old, new) == [] if key.changeable else [f"config.{name} was 'before' and is 'after'"]


def test_the_table_allows_what_the_code_behind_it_takes():
    """The table may not import those parts of the package, so it says their names again."""
    assert set(LEAVES["data.overflow"].choices) == set(OVERFLOW)
    assert set(LEAVES["model.quantization"].choices) == {"", *FORMATS}
    assert LEAVES["train.remat"].choices == ("auto", *REMAT)
    assert set(LEAVES["report.choose_on"].choices) == set(SPLITS)
    assert LEAVES["trials.seed"].high == SEEDS.high
    assert DEFAULTS["evaluation"]["readouts"].keys() == METHODS.keys()


def test_what_a_begun_run_may_change():
    """What does not touch a trained trial: which trials there are, where data lies, sizes of batches, records."""
    assert set(CHANGEABLE) == {
        *("trials", "report", "records", "study", "checkpoint", "compilation", "parallel"),
        *("train.trials_at_once", "train.memory_gib", "data.raw_dir", "data.cache_dir"),
        *("evaluation.readouts", "evaluation.batch_size", "evaluation.tasks", "evaluation.raw_dir"),
    }
    assert NAMED == ("config.methods", "config.evaluation.readouts")


def test_a_group_checks_values_that_do_not_go_together():
    def check(values):
        if values["low"] > values["high"]:
            raise ValueError("config.own.low is above config.own.high")

    number = Key(doc="This is a bound.", default=1.0, above=-2.5)
    own = Group(doc="Own keys.", keys={"low": number, "high": number}, check=check)
    assert resolve({"own": {"low": 0}}, {"own": own}).own.to_dict() == {"low": 0.0, "high": 1.0}
    with pytest.raises(ValueError, match=r"config\.own\.low is above config\.own\.high"):
        resolve({"own": {"low": 2.0}}, {"own": own})
    with pytest.raises(ValueError, match=r"config\.own\.low must be above -2\.5 and finite, got -2\.5"):
        resolve({"own": {"low": -2.5}}, {"own": own})
    with pytest.raises(ValueError, match=r"unknown config key config\.own\. Keys of config: model, "):
        resolve({"own": {}})
