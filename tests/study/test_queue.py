"""The queue of a study's cell: learning rates until the best is not at the edge, then the other seeds."""

import math

import pytest

from mlora_jax.config import resolve
from mlora_jax.core import aurac
from mlora_jax.study import queue
from mlora_jax.study.keys import resolve_cell
from mlora_jax.study.queue import best_rate, run_cell, score, wanted
from mlora_jax.study.records import CellRecords
from mlora_jax.study.rivals import GROUPS, Rival, rivals_of, separate
from mlora_jax.training.curve_records import CurveRecord, CurvesOnRecord

OPTIONS = {"rates": (1e-4, 1e-3, 1e-2, 1e-1), "start": (1e-3, 1e-2), "seeds": (1, 2, 3)}
RIVAL = Rival("lora", "squeeze")


def record_of(trial, readout, split, accuracies):
    """A curve of one trial over its first powers of two."""
    ranks = (1, 2, 4, 8)[: len(accuracies)]
    return CurveRecord(trial, "trec", split, readout, ranks, accuracies, (None,) * len(ranks), 26)


def curves_of(scores, rival=RIVAL, rank=8):
    """What is on record; {(rate, seed): accuracy at every rank, or None of a trial that failed}."""
    found = CurvesOnRecord()
    for (rate, seed), accuracy in scores.items():
        trial = rival.trial(rank, rate, seed)
        if accuracy is None:
            found.failed[trial.name] = trial
        else:
            ranks = [r for r in (1, 2, 4, 8) if r <= trial.rank]
            record = record_of(trial, rival.readout, "validation", (accuracy,) * len(ranks))
            found.whole[record.key] = record
    return found


def asked(scores, rival=RIVAL):
    return [(trial.learning_rate, trial.seed) for trial in wanted(curves_of(scores, rival), rival, 8, OPTIONS)]


def test_the_rates_of_the_start_are_screened_with_one_seed():
    assert asked({}) == [(1e-3, 1), (1e-2, 1)]
    assert asked({(1e-3, 1): 0.5}) == [(1e-2, 1)]


@pytest.mark.parametrize(
    ("scores", "following"),
    [
        ({(1e-3, 1): 0.5, (1e-2, 1): 0.6}, [(1e-1, 1)]),  # the best is the largest of those tried
        ({(1e-3, 1): 0.7, (1e-2, 1): 0.6}, [(1e-4, 1)]),
        ({(1e-3, 1): 0.5, (1e-2, 1): 0.6, (1e-1, 1): 0.1}, [(1e-2, 2), (1e-2, 3)]),
        ({(1e-3, 1): 0.5, (1e-2, 1): 0.6, (1e-1, 1): 0.8}, [(1e-1, 2), (1e-1, 3)]),  # no larger one is there
        ({(1e-3, 1): 0.5, (1e-2, 1): 0.6, (1e-1, 1): None}, [(1e-2, 2), (1e-2, 3)]),  # failed
        ({(1e-3, 1): None, (1e-2, 1): None}, [(1e-4, 1)]),
        ({(1e-4, 1): None, (1e-3, 1): None, (1e-2, 1): None}, []),
        ({(1e-3, 1): 0.5, (1e-2, 1): 0.6, (1e-1, 1): 0.1, (1e-2, 3): 0.0}, [(1e-2, 2)]),
        ({(1e-3, 1): 0.5, (1e-2, 1): 0.6, (1e-1, 1): 0.1, (1e-2, 2): 0.2, (1e-2, 3): None}, [(1e-4, 1)]),
    ],
)
def test_what_comes_next(scores, following):
    assert asked(scores) == following


def test_a_rate_is_chosen_by_aurac_on_validation_or_the_accuracy_at_the_only_rank():
    trial = RIVAL.trial(4, 1e-3, 1)
    others = (("squeeze", "test"), ("prefix", "validation"))
    records = [
        record_of(trial, "squeeze", "validation", (0.1, 0.5, 0.6)),
        *(record_of(trial, *where, (0.9, 0.9, 0.9)) for where in others),
    ]
    curves = CurvesOnRecord({record.key: record for record in records})
    assert score(curves, RIVAL, trial) == aurac((0.1, 0.5, 0.6), (1, 2, 4))
    assert score(curves, Rival("lora", "masked"), trial) is None
    assert score(CurvesOnRecord(failed={trial.name: trial}), RIVAL, trial) == -math.inf
    alone = Rival("lora", rank=4)
    record = record_of(alone.trial(32, 1e-3, 1), "prefix", "validation", (0.1, 0.5, 0.6))
    assert score(CurvesOnRecord({record.key: record}), alone, record.trial) == 0.6
    assert best_rate({1e-3: 0.5, 1e-2: 0.5, 1e-1: None}) == 1e-3


def test_rivals_are_trials():
    sqrt = Rival("matryoshka", "masked", "sqrt", "inverse").trial(8, 1e-3, 1)
    assert (sqrt.scaling, sqrt.rank) == ("sqrt", 8)
    assert sqrt.weights == pytest.approx([r**0.5 for r in (1, 2, 4, 8)])
    assert Rival("matryoshka", weights="mean").trial(8, 1e-3, 1).weights == (0.25,) * 4
    assert Rival("per_example", weights="ends").trial(8, 1e-3, 1).weights == pytest.approx([1 / 3, 1 / 6, 1 / 6, 1 / 3])
    assert [rival.rank for rival in separate(12)] == [1, 2, 4, 8, 12]
    rivals = rivals_of([*GROUPS, "separate", "leading"], 8)
    assert len({rival.name for rival in rivals}) == len(rivals)
    assert Rival("matryoshka", "masked", "sqrt", "mean").name == "matryoshka + masked (s = sqrt, w = mean)"
    with pytest.raises(ValueError, match=r"unknown group 'best' of config.study.groups; known: separate, leading"):
        rivals_of(["best"], 8)


@pytest.mark.parametrize(
    ("key", "value"),
    [("groups", ("further",)), ("rank", 16), ("rates", (1e-3, 3e-3, 1e-2)), ("start", (3e-3,)), ("seeds", (7,))],
)
def test_keys_of_the_study(key, value):
    """Each changes the trials that are asked for, of a rival whose rates of the start are measured."""

    def all_asked(**changed):
        study = resolve_cell({"study": changed}).study
        rivals = rivals_of(study.groups, study.rank)
        measured = {(rate, 42): rate for rate in (1e-3, 3e-3, 1e-2)}
        curves = curves_of(measured, Rival("lora"), study.rank)
        return [trial for rival in rivals for trial in wanted(curves, rival, study.rank, study)]

    assert all_asked(**{key: value}) != all_asked()


def test_a_cell_is_trained_until_nothing_is_wanted(monkeypatch, tmp_path):
    """A stand-in for training whose validation is best at 1e-2."""
    best, calls, curves = 1e-2, [], CurvesOnRecord()

    def train(config, workdir, after_trial):
        resolve(config)
        calls.append([entry["learning_rate"][0] for entry in config["trials"]["list"]])
        assert config["evaluation"]["readouts"]["lora"] == ("prefix", "squeeze")
        for entry in config["trials"]["list"]:
            rival = Rival(entry["method"][0])
            trial = rival.trial(8, entry["learning_rate"][0], entry["seed"][0])
            accuracy = 1 / (1 + abs(math.log10(trial.learning_rate / best)))
            for name in ("prefix", "squeeze"):
                record = record_of(trial, name, "validation", (accuracy,) * 4)
                curves.whole[record.key] = record

    monkeypatch.setattr(queue, "train", train)
    monkeypatch.setattr(queue, "read_measured", lambda *places: CellRecords(curves))
    config = resolve_cell({"study": {"rank": 8}})
    run_cell(config, tmp_path, groups=("leading",))
    methods = len({rival.method for rival in GROUPS["leading"]})
    assert [len(call) for call in calls] == [3 * methods, methods, 2 * methods]
    assert set(calls[1]) == {3e-2} and set(calls[2]) == {1e-2}
    run_cell(config, tmp_path, groups=("leading",))
    assert len(calls) == 3
