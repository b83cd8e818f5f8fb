"""Configs: every default, the product of trials, and a message for everything that is not allowed."""

import importlib
import json
import math
import pathlib

import ml_collections
import pytest

from mlora_jax.config import DEFAULTS, KEYS, changed_keys, check_key, further_methods, resolve, resolve_stored
from mlora_jax.core import METHODS, Method, Phase, RankHierarchy
from mlora_jax.study.keys import resolve_cell, without_study
from mlora_jax.trials import Trial, expand_trials

CONFIGS = sorted(path.stem for path in (pathlib.Path(__file__).parents[2] / "configs").glob("*.py"))
EXPERIMENTS = [name for name in CONFIGS if not name.startswith(("_", "pretrain", "kv_cache"))]


def nested(dotted, value):
    """{"a": {"b": value}} from "a.b"."""
    for key in reversed(dotted.split(".")):
        value = {key: value}
    return value


def test_an_empty_config_has_every_default():
    config = resolve({})
    assert config.to_dict() == DEFAULTS
    assert resolve(config) == config
    assert DEFAULTS["evaluation"]["readouts"].keys() == METHODS.keys()
    with pytest.raises(AttributeError, match='Did you mean "epochs"'):
        config.train.epoch = 5


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_file_is_valid(name):
    config = importlib.import_module(f"configs.{name}").get_config()
    assert isinstance(config, ml_collections.ConfigDict)
    assert expand_trials(resolve(config) if "study" not in config else without_study(resolve_cell(config)))


MINE = (("lora", 0.5), ("sandwich", 0.25), ("per_example", 0.25))
OWN = (("lora", 0.5, "fan_in"), ("lora", 0.5, "none", "soft_threshold"), "gate")


def test_methods_of_ones_own():
    config = resolve(
        {
            "methods": {"mine": MINE, "turned": (*MINE, "rotate"), "anew": (*MINE, "restart"), "own": OWN},
            "trials": {"method": ("mine", "turned", "renest")},
            "evaluation": {"readouts": {"mine": ("prefix", "squeeze")}},
        }
    )
    begins = lambda start: tuple(Phase(*pair, start if at else "") for at, pair in enumerate(MINE))  # noqa: E731
    found = further_methods(config)
    assert found.keys() == {"mine", "turned", "anew", "own"} and isinstance(found["mine"], Method)
    assert (found["mine"].phases, found["mine"].schedule) == (begins("squeeze"), "run")
    assert (found["turned"].phases, found["turned"].schedule) == (begins("squeeze_rotated"), "run")
    assert (found["anew"].phases, found["anew"].schedule) == (begins("squeeze"), "phase")
    own = found["own"]
    assert own.phases == (Phase("lora", 0.5, "fan_in"), Phase("lora", 0.5, "none", "soft_threshold")) and own.gate
    assert config.evaluation.readouts.mine == ("prefix", "squeeze")
    assert [trial.method for trial in expand_trials(config)] == ["mine", "turned", "renest"]
    assert json.loads(json.dumps(config.to_dict()))["methods"]["mine"][0] == ["lora", 0.5]
    assert resolve(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"methods": {"lora": MINE}}, "config.methods.lora is a method of that name already"),
        ({"methods": {"a/b": MINE}}, "config.methods.a/b: a name is made of letters"),
        (
            {"methods": {"mine": (*MINE, "rotat")}},
            "config.methods.mine .*unknown word 'rotat'; known: reset, rotate, restart, gate",
        ),
        ({"calibration": {"learning_rate": math.nan}}, "config.calibration.learning_rate must be positive and finite"),
        ({"train": {"epsilon": math.inf}}, "config.train.epsilon must be at least 0.0 and finite, got inf"),
        ({"methods": {"mine": ()}}, r"config.methods.mine must be phases like .*, got \(\)"),
        ({"methods": {"mine": (("lora", 0.5),)}}, r"config.methods.mine must be .*sum to 1, got \[0.5\]"),
        ({"methods": {"mine": (("lroa", 1.0),)}}, "config.methods.mine .*unknown policy 'lroa'; did you mean 'lora'"),
        ({"methods": {"mine": (("lora", 1.0), "turn")}}, "config.methods.mine .*unknown word 'turn'"),
        ({"methods": {"mine": "lora"}}, "config.methods.mine must be a tuple"),
        (
            {"methods": {"mine": (("lora",),)}},
            r"config.methods.mine .*a phase is a policy and its share .*got \('lora',\)",
        ),
        ({"methods": {"mine": (("lora", 1.0, "", "none", 5),)}}, "config.methods.mine .*a phase is a policy and its"),
        (
            {"methods": {"mine": (1.0,)}},
            "config.methods.mine .*a phase is a policy and its share of the steps.*got 1.0",
        ),
        ({"methods": {"mine": (("lora", 1.0), "rotate")}}, "config.methods.mine .*'rotate' changes how later phases"),
        (
            {"methods": {"mine": (("lora", 0.5), ("lora", 0.5, "none"), "rotate")}},
            "config.methods.mine .*'rotate' changes how later phases start, and every one of them names its own action",
        ),
        ({"trials": {"method": ("mine",)}}, "unknown method 'mine'"),
        (
            {"evaluation": {"readouts": {"matroyshka": ("prefix",)}}},
            "unknown method 'matroyshka'; did you mean 'matryo",
        ),
    ],
)
def test_methods_that_cannot_be_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        resolve(values)


def test_a_run_may_add_methods_but_not_change_them():
    old, new = ({"methods": {"mine": [["lora", first], ["lora", 1 - first]]}} for first in (0.5, 0.25))
    assert changed_keys({"methods": {}}, new) == []
    assert changed_keys(old, new) == [
        "config.methods.mine was [['lora', 0.5], ['lora', 0.5]] and is [['lora', 0.25], ['lora', 0.75]]"
    ]


def test_numbers_and_lists_are_taken_as_their_key_has_them():
    config = resolve({"trials": {"learning_rate": [1], "weights": [[1, 2]], "rank": [2]}, "train": {"clip": 0}})
    assert config.trials.learning_rate == (1.0,) and type(config.trials.learning_rate[0]) is float
    assert config.train.clip == 0.0 and type(config.train.clip) is float
    assert config.trials.weights == ((1, 2),)


def test_the_trials_are_the_product_in_order():
    axes = {"method": ("lora", "dylora"), "learning_rate": (1e-3, 5e-4), "seed": (1,), "scaling": ("none", "rank")}
    trials = expand_trials(resolve({"trials": axes | {"rank": (4, 12)}}))
    assert len(trials) == 16 and len({trial.name for trial in trials}) == 16
    assert trials[0] == Trial("lora", 1e-3, 1, "none", 4)
    assert trials[1] == Trial("lora", 1e-3, 1, "none", 12)
    assert trials[2] == Trial("lora", 1e-3, 1, "rank", 4)
    assert trials[-1] == Trial("dylora", 5e-4, 1, "rank", 12)
    assert trials[-1].hierarchy() == RankHierarchy((1, 2, 4, 8, 12), "rank")
    assert trials[-1].hierarchy((1, 3)) == RankHierarchy((1, 3), "rank", max_rank=12)
    weighted = Trial("matryoshka", 1e-3, 1, "sqrt", 2, (1.0, 0.5))
    assert weighted.hierarchy() == RankHierarchy((1, 2), "sqrt", (1.0, 0.5))


def test_a_list_of_trials_is_taken_entry_by_entry():
    entries = (
        {"method": "lora", "learning_rate": 1},
        {"method": ("dylora", "matryoshka"), "rank": 3, "weights": (1, 2, 3), "seed": [7, 8]},
        {"method": "lora", "learning_rate": (1e-3, 1.0)},  # 1.0 is in the first entry already
    )
    for given in (entries, ml_collections.ConfigDict({"list": entries}).list):
        config = resolve({"trials": {"list": given, "method": ("sandwich",), "rank": (4,)}})
        assert expand_trials(config) == [
            Trial("lora", 1.0, 42, "none", 4),
            *(Trial(m, 1e-3, s, "none", 3, (1.0, 2.0, 3.0)) for m in ("dylora", "matryoshka") for s in (7, 8)),
            Trial("lora", 1e-3, 42, "none", 4),
        ]
        json.dumps(config.to_dict())


def test_changed_keys_are_those_that_touch_trained_trials():
    old = resolve({}).to_dict()
    new = resolve({"train": {"epochs": 5, "trials_at_once": 2}, "trials": {"seed": (1, 2)}, "checkpoint": {"every": 7}})
    assert changed_keys(old, new.to_dict()) == ["config.train.epochs was 3 and is 5"]
    assert changed_keys(old, old) == []


def test_a_key_that_is_new_since_a_run_began_had_its_default():
    old = json.loads(json.dumps(resolve({}).to_dict()))
    del old["calibration"], old["train"]["clip"]
    assert changed_keys(old, json.loads(json.dumps(resolve({}).to_dict()))) == []
    changed = resolve({"train": {"clip": 2.0}, "calibration": {"steps": 7}}).to_dict()
    assert changed_keys(old, json.loads(json.dumps(changed))) == [
        "config.train.clip was 1.0 and is 2.0",
        "config.calibration.steps was 200 and is 7",
    ]


def test_a_run_that_an_earlier_version_began_goes_on():
    """Earlier versions kept the keys of the study in every run's config.json."""
    stored = json.loads(json.dumps(resolve({"trials": {"seed": (7,)}}).to_dict())) | {"study": {"rank": 4}}
    assert resolve_stored(stored) == resolve({"trials": {"seed": (7,)}})
    assert changed_keys(stored, json.loads(json.dumps(resolve({}).to_dict()))) == []
    with pytest.raises(ValueError, match=r"unknown config key config\.study: only experiments\.study reads it"):
        resolve(stored)
    with pytest.raises(ValueError, match=r"unknown config key config\.nothing\. Keys"):
        resolve_stored(stored | {"nothing": {}})


def test_the_names_of_different_trials_differ():
    make = lambda rate=1e-3, weights=(): Trial("lora", rate, 42, "none", 2, weights).name  # noqa: E731
    assert make() == "lora-r2-none-lr0.001-seed42"
    assert make(5e-5, (1.0, 0.5)) == "lora-r2-none-w1-w0.5-lr5e-05-seed42"
    assert len({make(), make(1.0000001e-3), make(weights=(1.0, 0.3)), make(weights=(1.0, 0.30000001))}) == 4


UNKNOWN = {
    "modle": "unknown config key config.modle; did you mean config.model\\? Keys of config: model, data, adapter",
    "train.epoch": "unknown config key config.train.epoch; did you mean config.train.epochs\\?",
    "trials.learningrate": "did you mean config.trials.learning_rate\\?",
    "adapter.rank": "did you mean config.adapter.ranks\\?",
    "data.zzz": r"unknown config key config.data.zzz\. Keys of config.data: task, raw_dir",
}


@pytest.mark.parametrize(("name", "message"), UNKNOWN.items(), ids=UNKNOWN)
def test_an_unknown_key_is_refused_with_the_nearest(name, message):
    for config in (nested(name, 1), ml_collections.ConfigDict(nested(name, 1))):
        with pytest.raises(ValueError, match=message):
            resolve(config)
    with pytest.raises(ValueError, match=message):
        check_key(f"config.{name}")


def test_keys_of_the_command_line():
    for name, _ in KEYS.leaves():
        check_key(f"config.{name}")
    check_key("workdir")
    check_key("configuration.zzz")
    with pytest.raises(ValueError, match=r"config\.train\.epochs is a value and has no key 'more'"):
        check_key("config.train.epochs.more")
    check_key("config.methods.mine")
    with pytest.raises(ValueError, match=r"config\.methods\.mine is a value and has no key 'more'"):
        check_key("config.methods.mine.more")


@pytest.mark.parametrize(
    ("former", "now"), [(False, "none"), (True, "full"), ("True", "full"), ("false", "none"), ("dots", "dots")]
)
def test_remat_takes_the_values_that_it_formerly_had(former, now):
    """The bools are in the config.json of older runs; as texts they come from command lines."""
    assert resolve(nested("train.remat", former)).train.remat == now
    stored = json.loads(json.dumps(resolve({}).to_dict()))
    stored["train"]["remat"] = former
    assert resolve_stored(stored).train.remat == now
    assert changed_keys(stored, stored | {"train": stored["train"] | {"remat": now}}) == []
    other = stored | {"train": stored["train"] | {"remat": "dots" if now != "dots" else "full"}}
    assert changed_keys(stored, other) == [
        f"config.train.remat was {now!r} and is {other['train']['remat']!r}",
    ]
    with pytest.raises(
        ValueError, match=r"config\.train\.remat must be one of 'auto', 'none', 'dots', 'full', got 'some'"
    ):
        resolve(nested("train.remat", "some"))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("train", 3, "config.train must be a group of keys, got 3"),
        ("train.epochs", 1.5, "config.train.epochs must be of type int, like 3; got 1.5"),
        ("train.epochs", True, "config.train.epochs must be of type int.*got True"),
        ("train.remat", 1, "config.train.remat must be of type str"),
        ("train.clip", "1", "config.train.clip must be of type float, like 1.0; got '1'"),
        ("model.path", None, "config.model.path must be of type str"),
        ("trials.method", "lora", r"config.trials.method must be a tuple, like \('matryoshka',\); got 'lora'"),
        ("adapter.targets", "q_proj", "config.adapter.targets must be a tuple.*got 'q_proj'"),
        ("adapter.targets", (1,), "an entry of config.adapter.targets must be of type str"),
        ("adapter.ranks", 4, "config.adapter.ranks must be a tuple"),
        ("trials.seed", (1.5,), "an entry of config.trials.seed must be of type int"),
        ("trials.weights", (1.0, 2.0), r"an entry of config.trials.weights must be a tuple.*got 1\.0"),
    ],
)
def test_a_value_of_another_type_is_refused(name, value, message):
    with pytest.raises(ValueError, match=message):
        resolve(nested(name, value))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"trials": {"method": ("lorra",)}},
            "unknown method 'lorra'; did you mean 'lora'\\? Known methods: lora, dylora",
        ),
        (
            {"trials": {"scaling": ("none", "cube")}},
            "an entry of config.trials.scaling must be one of 'none', 'rank', 'sqrt', got 'cube'",
        ),
        ({"trials": {"rank": (0,)}}, "an entry of config.trials.rank must be at least 1, got 0"),
        ({"trials": {"rank": (8, -1)}}, "an entry of config.trials.rank must be at least 1, got -1"),
        ({"trials": {"rank": (8,)}, "adapter": {"ranks": (1, 16)}}, "rank 16 of S is above the adapter's rank R = 8"),
        ({"adapter": {"ranks": (4, 2)}}, r"strictly increasing without repeats, got \(4, 2\)"),
        ({"adapter": {"ranks": (2, 2)}}, r"strictly increasing without repeats, got \(2, 2\)"),
        ({"adapter": {"ranks": (0, 2)}}, r"every rank of S must be an integer in 1\.\., got 0"),
        ({"adapter": {"ranks": ("a",)}}, "every rank of S must be an integer"),
        ({"trials": {"weights": ((1.0,),)}}, r"weights \(1\.0,\) and ranks .* differ in length"),
        (
            {"trials": {"weights": ((3.0, 1.0),), "rank": (2,), "method": ("matryoshka", "sandwich")}},
            r"weights \(3\.0, 1\.0\) would change nothing for 'sandwich'; .*: dylora, .*, renest_30_rotated\. ",
        ),
        ({"trials": {"weights": (("a",),)}}, "weights must be a sequence of numbers"),
        ({"trials": {"weights": ((0.0, 0.0),), "rank": (2,)}}, "not all zero"),
        ({"trials": {"method": ()}}, r"config.trials.method must name at least one value, got \(\)"),
        ({"trials": {"seed": (1, 1)}}, r"config.trials.seed repeats a value: \(1, 1\)"),
        (
            {"trials": {"learning_rate": (0.0,)}},
            r"an entry of config.trials.learning_rate must be positive and finite, got 0\.0",
        ),
        ({"trials": {"learning_rate": (float("inf"),)}}, "config.trials.learning_rate must be positive and finite"),
        (
            {"trials": {"seed": (1, -1)}},
            "an entry of config.trials.seed must be at least 0 and at most 4294967295, got -1",
        ),
        ({"trials": {"list": (3,)}}, r"config.trials.list\[0\] must be a dict of some of method, learning_rate"),
        ({"trials": {"list": ({"methods": "lora"},)}}, r"config.trials.list\[0\].methods; did you mean .*method"),
        ({"trials": {"list": ({"method": "lor"},)}}, "unknown method 'lor'; did you mean 'lora'"),
        ({"trials": {"list": ({"rank": ()},)}}, r"config.trials.list\[0\].rank must name at least one value"),
        ({"trials": {"learning_rate": (float("nan"),)}}, "config.trials.learning_rate must be positive and finite"),
        (
            {"train": {"batch_size": 6, "accumulation": 4}},
            "config.train.batch_size 6 is no multiple of .*accumulation 4",
        ),
        (
            {"evaluation": {"readouts": {"lora": ("suffix",)}}},
            "an entry of config.evaluation.readouts.lora must be one of 'prefix', .*'squeeze', .*got 'suffix'",
        ),
        (
            {"evaluation": {"readouts": {"lora": ("prefix", "squeeze", "prefix")}}},
            r"config.evaluation.readouts.lora repeats a value: \('prefix', 'squeeze', 'prefix'\)",
        ),
    ],
)
def test_a_value_that_is_not_allowed_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        resolve(config)


def test_a_method_as_older_versions_wrote_it():
    """The last word "reset" was the way to say that the moments start anew, which is what happens without it."""
    pairs = (("lora", 0.5), ("per_example", 0.5))
    config = resolve({"methods": {"old": (*pairs, "reset"), "plain": pairs, "empty": (pairs[0], (*pairs[1], ""))}})
    found = further_methods(config)
    assert found["old"] == found["plain"] == found["empty"]
    assert [phase.start for phase in found["old"].phases] == ["", "squeeze"]


def test_the_start_from_a_peft_adapter_fits_the_methods():
    """Of the trials' methods: those of the table that no trial has do not count."""
    methods = {"warm": (("lora", 1.0, "peft"),), "cold": (("lora", 1.0, "fan_in"),)}

    def start(folder, *names):
        return resolve({"methods": methods, "trials": {"method": names}, "adapter": {"start_from": folder}})

    with pytest.raises(
        ValueError, match=r"method 'warm' starts with 'peft': set config.adapter.start_from to the folder"
    ):
        start("", "lora", "warm")
    with pytest.raises(ValueError, match=r"no trial would start from config.adapter.start_from.*: cold with 'fan_in'"):
        start("folder", "cold")
    for folder, names in [("", ("cold", "lora")), ("folder", ("cold", "lora")), ("folder", ("cold", "warm"))]:
        assert start(folder, *names).adapter.start_from == folder


def test_a_method_that_became_one_of_the_table_stays_readable():
    """A folder of a run keeps its config; the table grows."""
    same = (("lora", 0.3), ("per_example", 0.7), "rotate")
    config = resolve({"methods": {"renest_30_rotated": same}, "trials": {"method": ("renest_30_rotated",)}})
    assert further_methods(config) == {}
    with pytest.raises(ValueError, match=r"config.methods.renest_30_rotated is a method of that name already"):
        resolve({"methods": {"renest_30_rotated": same[:2]}})
