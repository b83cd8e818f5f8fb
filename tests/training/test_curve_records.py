"""Curves on record: the lines of each kind, and the rule that a curve is whole or absent."""

import dataclasses
import json

import pytest

from mlora_jax.training.curve_records import (
    BASE,
    CURVES,
    CurveKey,
    CurveRecord,
    HarnessRun,
    drop_partial_curves,
    failed_line,
    read_curves,
)
from mlora_jax.training.records import JsonLines
from mlora_jax.trials import AXES, REQUIRED_AXES, Trial, describe_axes

TRIAL = Trial("lora", 0.01, 42, "sqrt", 4, (1.0, 0.5, 0.25))
OWN = CurveRecord(TRIAL, "trec", "test", "prefix", (1, 2, 4), (0.1, 0.2, 0.4), (0.01, 0.02, 0.04), 26, truncated=3)
HARNESS = dataclasses.replace(OWN, task="gsm8k", shots=5, harness=HarnessRun("lm-eval 0.4.13", "exact_match", None))
BASE_RECORD = CurveRecord(None, "trec", "test", BASE, (0,), (0.05,), (None,), 26)

# The lines as runs have always written them, their keys in this order.
OWN_LINE = (
    '{"schema": 1, "trial": "lora-r4-sqrt-w1-w0.5-w0.25-lr0.01-seed42", "method": "lora", "learning_rate": 0.01, '
    '"seed": 42, "scaling": "sqrt", "rank": 4, "weights": [1.0, 0.5, 0.25], "task": "trec", "split": "test", '
    '"shots": 0, "readout": "prefix", "at_rank": 1, "of_ranks": 3, "accuracy": 0.1, "stderr": 0.01, "items": 26, '
    '"truncated": 3}'
)
HARNESS_LINE = (
    '{"schema": 1, "trial": "lora-r4-sqrt-w1-w0.5-w0.25-lr0.01-seed42", "method": "lora", "learning_rate": 0.01, '
    '"seed": 42, "scaling": "sqrt", "rank": 4, "weights": [1.0, 0.5, 0.25], "harness": "lm-eval 0.4.13", '
    '"task": "gsm8k", "shots": 5, "asked_shots": null, "metric": "exact_match", "split": "test", '
    '"truncated_requests": 3, "readout": "prefix", "at_rank": 1, "of_ranks": 3, "accuracy": 0.1, "stderr": 0.01, '
    '"items": 26}'
)
BASE_LINE = (
    '{"schema": 1, "trial": "base", "task": "trec", "split": "test", "shots": 0, "readout": "base", "at_rank": 0, '
    '"of_ranks": 1, "accuracy": 0.05, "stderr": null, "items": 26, "truncated": 0}'
)
FAILED_LINE = (
    '{"schema": 1, "trial": "lora-r4-sqrt-w1-w0.5-w0.25-lr0.01-seed42", "method": "lora", "learning_rate": 0.01, '
    '"seed": 42, "scaling": "sqrt", "rank": 4, "weights": [1.0, 0.5, 0.25], "failed": true}'
)


@pytest.fixture
def file(tmp_path):
    return tmp_path / CURVES


def write(file, *lines):
    with JsonLines(file) as records:
        records.write(*lines)


@pytest.mark.parametrize(
    ("lines", "first"),
    [
        (OWN.to_lines(), OWN_LINE),
        (HARNESS.to_lines(), HARNESS_LINE),
        (BASE_RECORD.to_lines(), BASE_LINE),
        ([failed_line(TRIAL)], FAILED_LINE),
    ],
    ids=["own", "harness", "base", "failed"],
)
def test_lines_are_what_they_have_always_been(file, lines, first):
    write(file, *lines)
    assert file.read_text().splitlines()[0] == first


def test_what_is_written_is_read(file):
    failed = dataclasses.replace(TRIAL, seed=7)
    write(file, *BASE_RECORD.to_lines(), *reversed(OWN.to_lines()), failed_line(failed), *HARNESS.to_lines())
    found = read_curves(file)
    assert found.whole == {record.key: record for record in (BASE_RECORD, OWN, HARNESS)}
    assert found.failed == {failed.name: failed} and found.base() == {"test": BASE_RECORD}
    assert OWN.key == CurveKey(TRIAL.name, "test", "prefix") and OWN.key in found
    assert HARNESS.key == CurveKey(TRIAL.name, "test", "prefix", "gsm8k", None)
    assert found.get(CurveKey(TRIAL.name, "validation", "prefix")) is None
    assert read_curves(file.with_name("nowhere")).whole == {}


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_a_curve_that_lacks_a_rank_is_absent(file, missing):
    partial = [line for number, line in enumerate(OWN.to_lines()) if number != missing]
    write(file, *BASE_RECORD.to_lines(), *partial, failed_line(TRIAL), *HARNESS.to_lines())
    assert set(read_curves(file).whole) == {BASE_RECORD.key, HARNESS.key}
    drop_partial_curves(file)
    assert [json.loads(line).get("task") for line in file.read_text().splitlines()] == ["trec", None, *["gsm8k"] * 3]
    write(file, *OWN.to_lines())  # measured again
    before = file.read_text()
    drop_partial_curves(file)
    assert OWN.key in read_curves(file) and file.read_text() == before


def test_half_a_line_at_the_end_is_no_record(file):
    write(file, *OWN.to_lines())
    file.write_text(file.read_text()[:-20])
    assert OWN.key not in read_curves(file)


def test_old_records_say_less(file):
    kept = ("trial", *dataclasses.asdict(TRIAL), "split", "readout", "at_rank", "of_ranks", "accuracy")
    write(file, *({name: line[name] for name in kept} for line in OWN.to_lines()))
    (record,) = read_curves(file)
    assert (record.accuracies, record.items, record.standard_errors) == (OWN.accuracies, None, (None,) * 3)


@pytest.mark.parametrize("lacking", ["trial", *REQUIRED_AXES, "split", "readout", "at_rank", "of_ranks", "accuracy"])
def test_a_line_that_lacks_something_is_named(file, lacking):
    lines = OWN.to_lines()
    del lines[1][lacking]
    write(file, *lines)
    with pytest.raises(ValueError, match=rf"curves\.jsonl: record 2 has no {lacking}$"):
        read_curves(file)


def test_a_trial_goes_through_json():
    assert Trial.from_json(json.loads(json.dumps({**TRIAL.to_json(), "other": 1}))) == TRIAL
    rate = Trial.from_json({**TRIAL.to_json(), "learning_rate": 1}).learning_rate
    assert isinstance(rate, float)
    older = {name: value for name, value in TRIAL.to_json().items() if name != "weights"}
    assert Trial.from_json(older) == dataclasses.replace(TRIAL, weights=())
    with pytest.raises(ValueError, match=r"^a trial needs method, rank$"):
        Trial.from_json({"learning_rate": 1.0, "seed": 1, "scaling": "none"})


def test_every_axis_has_its_wording_and_defaults_are_left_out():
    assert set(AXES) == {field.name for field in dataclasses.fields(Trial)}
    plain = dataclasses.replace(TRIAL, weights=())
    assert plain.name == "lora-r4-sqrt-lr0.01-seed42"
    assert plain.in_words == "lora, R = 4, scaling sqrt, learning rate 0.01, seed 42"
    assert describe_axes(dict(TRIAL.without("method", "learning_rate", "seed"))) == (
        "R = 4, scaling sqrt, weights 1, 0.5, 0.25"
    )
