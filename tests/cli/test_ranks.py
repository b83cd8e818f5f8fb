"""`python -m experiments.ranks` on a run of a tiny model, as a user types it and as a function."""

import csv
import json
import os

import numpy as np
import pytest

from mlora_jax.cli.ranks import report
from mlora_jax.config import resolve
from mlora_jax.evaluate import rank_curve
from mlora_jax.report.ranks import draw_ranks, write_ranks
from mlora_jax.run.experiment import Experiment
from mlora_jax.run.rank_choice import choose_ranks
from mlora_jax.training.adapter_file import save_adapter
from mlora_jax.trials import expand_trials
from tests.cli.commands import run_command
from tests.tiny import random_like, trec_data, write_checkpoint

TRIAL = "matryoshka-r4-none-lr0.1-seed1"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder of a run with one adapter, drawn rather than trained, and its curves: (split, read-out) -> curve."""
    root = tmp_path_factory.mktemp("inputs")
    config = resolve(
        {
            "model": {"path": str(write_checkpoint(root / "model", initializer_range=3.0))},
            "data": trec_data(root),
            "adapter": {"targets": ("v_proj", "up_proj")},
            "trials": {"rank": (4,), "learning_rate": (0.1,), "seed": (1,)},
            "validation": {"holdout": 0.4},
        }
    )
    (trial,), experiment = expand_trials(config), Experiment.load(config)
    adapted, hierarchy = experiment.adapted(4), trial.hierarchy()
    adapter = random_like(adapted.adapter, seed=0, scale=30)
    curves = {
        (split, readout): rank_curve(
            evaluate, adapter, hierarchy, readout=readout, trained_profile=hierarchy.matryoshka()
        )
        for split, evaluate in adapted.evaluators.items()
        for readout in ("prefix", "squeeze")
    }
    assert trial.name == TRIAL
    save_adapter(root / "run" / "adapters" / TRIAL, adapter, hierarchy, {"finite": True})
    (root / "run" / "config.json").write_text(json.dumps(config.to_dict()))
    return root / "run", curves


@pytest.fixture
def run(made):
    return made[0]


def ranks(*arguments):
    return run_command("ranks", *arguments, environment=os.environ)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_the_command_writes_its_report_beside_the_records(made):
    run, curves = made
    before = contents(run)
    done = ranks(run, "--trial", TRIAL, "--budget=1,3", "--limit=12", "--within=0.1")
    assert done.returncode == 0, done.stderr
    after = contents(run)
    assert set(after) - set(before) == {"ranks.md", "ranks.csv", "ranks.png", "spectra.png"}
    assert all(after[name] == before[name] for name in before)
    text = after["ranks.md"].decode()
    assert text in done.stdout and f"report in {run}" in done.stdout
    assert f"# trec on model: {TRIAL}" in text and "the 5 validation items of the run" in text
    assert "the 12 test items" in text and "Smallest rank within 0.1 of the best" in text

    records = list(csv.DictReader(after["ranks.csv"].decode().splitlines()))
    found = {record["rank"]: record for record in records if record["kind"] == "curve"}
    for split, name in (("test", "accuracy"), ("validation", "chosen_on_accuracy")):
        measured = dict(zip(map(str, curves[split, "prefix"].ranks), curves[split, "prefix"].accuracies, strict=True))
        assert {rank: float(record[name]) for rank, record in found.items()} == measured
        assert len(set(measured.values())) > 1
    best = max(float(record["chosen_on_accuracy"]) for record in found.values())
    good = [int(rank) for rank, record in found.items() if float(record["chosen_on_accuracy"]) >= best - 0.1]
    assert [record["rank"] for record in found.values() if record["smallest"] == "1"] == [str(min(good))]

    # 2 layers of v_proj (16 + 8) and of up_proj (16 + 24)
    assert [int(record["parameters"]) for record in found.values()] == [128, 256, 512]
    assert [(r["kind"], r["rank"]) for r in records[3:]] == [
        (kind, rank) for rank in "13" for kind in ("uniform", "allocated")
    ]
    for uniform, allocated in zip(records[3::2], records[4::2], strict=True):
        parts = dict(part.split(": ") for part in allocated["ranks"].split("; "))
        chosen = {path.rsplit(".")[-1]: [int(rank) for rank in row.split()] for path, row in parts.items()}
        parameters = 24 * sum(chosen["v_proj"]) + 40 * sum(chosen["up_proj"])
        assert parameters == int(allocated["parameters"]) <= int(uniform["parameters"]) == 128 * int(uniform["rank"])
        assert float(allocated["score"]) >= float(uniform["score"]) and int(allocated["evaluations"]) <= 12
        difference = float(allocated["accuracy"]) - float(uniform["accuracy"])
        assert float(allocated["difference_accuracy"]) == pytest.approx(difference)


def test_half_of_the_test_items_and_a_squeezed_adapter(made, tmp_path):
    (run, curves), said = made, []
    options = {"choose_on": "test", "measure": "accuracy", "readout": "squeeze", "by": "module", "budgets": (2,)}
    found = choose_ranks(run, TRIAL, limit=5, say=said.append, **options)
    assert found.chosen_on == "the 6 test items of even number"
    assert found.reported_on == "the 6 test items of odd number"
    whole = dict(zip(curves["test", "squeeze"].ranks, curves["test", "squeeze"].accuracies, strict=True))
    halves = {row.rank: (row.chosen_on.value + row.test.value) / 2 for row in found.rows}
    assert halves == pytest.approx(whole)
    (row,) = found.budgets
    assert all(len(set(layers)) == 1 for layers in row.ranks.values())
    assert row.uniform_score == next(each.chosen_on.value for each in found.rows if each.rank == 2)
    assert any("average rank 2: uniform" in line for line in said)

    text = write_ranks(found, tmp_path / "out").read_text()
    assert text.count("| for uniform rank") == 1 and "searched by the accuracy" in text
    area = draw_ranks(found).axes[0]
    lines = {container.get_label(): container[0].get_xydata() for container in area.containers}
    np.testing.assert_allclose(lines["uniform rank"], [(row.parameters, row.test.value) for row in sorted(found.rows)])
    np.testing.assert_allclose(lines["rank per layer"], [(row.allocated_parameters, row.allocated.value)])
    (base,) = (line for line in area.lines if line.get_label() == "base")
    assert base.get_ydata()[0] == found.base


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trial_name": "lora"}, rf"has no trial 'lora'; its trials: {TRIAL}"),
        ({"workdir": "nowhere"}, "nowhere is not the folder of a run: it has no config.json"),
        ({"budgets": (1, 5)}, r"every budget must be an integer in 1\.\.4, got 5"),
        ({"within": 1.5}, r"in 0..1, as accuracies are .* got 1.5"),
        ({"choose_on": "train"}, "choose_on must be one of validation, test, got 'train'"),
        ({"measure": "loss"}, "measure must be one of likelihood, accuracy, got 'loss'"),
        ({"by": "head"}, "by must be one of both, layer, module, got 'head'"),
        ({"readout": "middle"}, "readout must be one of prefix, squeeze, nested, masked, .*, got 'middle'"),
    ],
)
def test_bad_input_is_named(run, options, message):
    given = {"workdir": run, "trial_name": TRIAL} | options
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        choose_ranks(given.pop("workdir"), given.pop("trial_name"), **given)


def test_stray_arguments_are_refused(run):
    before = contents(run)
    for arguments in (["ranks"], ["ranks", str(run), "stray"]):
        with pytest.raises(ValueError, match="name one run's folder"):
            report(arguments)
    assert contents(run) == before
