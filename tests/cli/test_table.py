"""`python -m experiments.table` as a user types it."""

import os

import pytest

from tests.cli.commands import run_command
from tests.report.runs import write_run

SWEEP = {("lora", "prefix", rate): {"test": {1: (rate,) * 3, 2: (rate,) * 3}} for rate in (0.1, 0.2)}


def table(*arguments):
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    return run_command("table", *arguments, environment=environment)


def test_one_run_gets_its_report_beside_its_records(tmp_path):
    run = write_run(tmp_path / "run", SWEEP)
    done = table(run, "--choose_on", "test")
    assert done.returncode == 0, done.stderr
    assert done.stderr == "" and (run / "table.md").read_text() in done.stdout and f"report in {run}" in done.stdout
    assert "| lora | 0.2 | 0.250 | 0.200 ± 0.000 |" in done.stdout and (run / "learning_rates.png").is_file()


def test_many_runs_are_written_where_out_says(tmp_path):
    runs = [write_run(tmp_path / task, SWEEP, task=task) for task in ("trec", "sst2")]
    done = table(runs[0], f"--out={tmp_path / 'out'}", "--choose_on=test", runs[1])
    assert done.returncode == 0, done.stderr
    assert "# trec on base" in done.stdout and "# sst2 on base" in done.stdout
    assert {path.name for path in (tmp_path / "out").glob("*.md")} == {"table-trec-base.md", "table-sst2-base.md"}
    assert not list(runs[0].glob("table*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "error: name at least one run's folder"),
        (["{run}"], "error: trec on base: no learning rate can be chosen on the validation split for lora"),
        (["{run}", "{run}"], "error: of several runs, --out DIR must say where the table belongs"),
        (
            ["{run}", "{run}", "--out={run}"],
            "error: the trial lora, R = 4, scaling none, learning rate 0.1, seed 1 is in ",
        ),
        (["{run}/nowhere"], "nowhere is not the folder of a run: it has no config.json"),
        (["{run}", "--choose_on=train"], "value should be one of <validation|test>"),
    ],
)
def test_bad_input_is_one_line(tmp_path, arguments, message):
    run = write_run(tmp_path / "run", SWEEP)
    done = table(*(argument.format(run=run) for argument in arguments))
    assert done.returncode == 1
    assert message in done.stderr and "Traceback" not in done.stderr
    assert sorted(path.name for path in run.iterdir()) == ["config.json", "curves.jsonl"]
