"""Runs that are killed, stopped or damaged go on and end in the same bits as one that was left alone."""

import functools
import json
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from mlora_jax.config import resolve
from mlora_jax.run import batch as run_batch
from mlora_jax.run import train as run
from mlora_jax.run.experiment import Experiment
from mlora_jax.run.train import Interrupted, train
from mlora_jax.training.records import read_json_lines
from tests.conftest import QUICKLY_COMPILED
from tests.run.tiny_runs import records_without_clocks
from tests.tiny import trec_data, write_checkpoint, write_config

ROOT = pathlib.Path(__file__).parents[2]
STEPS = 30


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    root = tmp_path_factory.mktemp("inputs")
    return {
        "model": {"path": str(write_checkpoint(root / "model"))},
        "data": trec_data(root),
        "adapter": {"targets": ("v_proj", "up_proj"), "dropout": 0.1},
        "trials": {
            "rank": (6,),
            "learning_rate": (0.03,),
            "scaling": ("sqrt",),
            "list": (
                {"method": ("lora", "dylora_frozen"), "seed": (1, 2)},
                {"method": "dylora", "learning_rate": 3e38},  # fails
            ),
        },
        "train": {"epochs": 12, "batch_size": 4, "accumulation": 2, "log_every": 4, "trials_at_once": 3},
        "evaluation": {"limit": 6, "readouts": {"lora": ("prefix",)}},
        "validation": {"holdout": 0.2, "every": 8, "measure": "loss", "keep": "best", "patience": 3},
        "checkpoint": {"every": 3},
    }


def command(tmp_path, config, workdir):
    file = write_config(tmp_path / "killed.py", config)
    return [sys.executable, "-m", "experiments.run", "--config", str(file), "--workdir", str(workdir)]


def start(command, config, *, fill_cache=False):
    """One run in a process of its own. Executables are kept by the undisturbed run and read by the others."""
    environment = os.environ | {
        "XLA_FLAGS": QUICKLY_COMPILED,
        "JAX_COMPILATION_CACHE_DIR": str(pathlib.Path(config["model"]["path"]).parent / "executables"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0" if fill_cache else "1e9",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(process):
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def outcome(workdir):
    """Everything a run leaves that does not depend on the clock."""
    files = [*(workdir / "adapters").glob("*/[!.]*"), *workdir.glob("table.*"), workdir / "batches.json"]
    contents = {str(path.relative_to(workdir)): path.read_bytes() for path in sorted(files)}
    return records_without_clocks(workdir), contents


# A rank above the eight outputs of v_proj, so that the squeeze draws columns afresh.
TURNED = {"method": "turned", "seed": (1, 2), "rank": 9}


@pytest.fixture(scope="module")
def phased(config):
    """The same run with a method of two phases in its first batch, at step 15 squeezed."""
    trials = {**config["trials"], "list": (TURNED, *config["trials"]["list"])}
    return {**config, "methods": {"turned": (("lora", 0.5), ("per_example", 0.5), "rotate")}, "trials": trials}


@pytest.fixture(scope="module")
def undisturbed(config, tmp_path_factory):
    return left_alone(config, tmp_path_factory.mktemp("undisturbed"))


@pytest.fixture(scope="module")
def undisturbed_phased(phased, tmp_path_factory):
    return left_alone(phased, tmp_path_factory.mktemp("undisturbed_phased"))


def left_alone(config, folder):
    """What a run leaves that nobody touches, and the seconds it takes."""
    since = time.monotonic()
    finish(start(command(folder, config, folder / "run"), config, fill_cache=True))
    return outcome(folder / "run"), time.monotonic() - since


def resumed_from(output):
    """The steps from which the batches of a start went on."""
    return [int(step) for step in re.findall(r"goes on from step (\d+)", output)]


def kill_at_random(tmp_path, config, seconds, *, kills, seed):
    """Starts a run again and again, each time killed, at last behind some checkpoint; then it may finish.

    Returns `resumed_from` of all.
    """
    chance, killed, resumed = random.Random(seed), 0, []
    while killed < kills:
        process = start(command(tmp_path, config, tmp_path / "run"), config)
        moment = chance.uniform(0.2, 0.9) * seconds
        if killed == kills - 1:
            behind = chance.randrange(1, STEPS - 9)  # before the squeeze or after it
            while max(saved_steps(tmp_path / "run"), default=0) < behind and process.poll() is None:
                time.sleep(0.01)
            moment = chance.uniform(0, 0.2)
        try:
            process.communicate(timeout=moment)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            resumed += resumed_from(process.communicate()[0])
            killed += 1
        else:
            assert process.returncode == 0
            shutil.rmtree(tmp_path / "run")  # it was faster: kill another one
    return resumed + resumed_from(finish(start(command(tmp_path, config, tmp_path / "run"), config)))


def saved_steps(workdir):
    """Of the first batch's checkpoints that are whole."""
    return sorted(int(path.name) for path in workdir.glob("checkpoints/batch-0000/*") if path.name.isdigit())


def test_killed_after_a_checkpoint(config, undisturbed, tmp_path):
    process = start(command(tmp_path, config, tmp_path / "run"), config)
    while not saved_steps(tmp_path / "run"):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    saved = saved_steps(tmp_path / "run")
    assert resumed_from(finish(start(command(tmp_path, config, tmp_path / "run"), config))) == saved[-1:]
    assert 0 < saved[-1] < STEPS
    assert outcome(tmp_path / "run") == undisturbed[0]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_killed_at_many_random_moments(phased, undisturbed_phased, tmp_path, seed):
    expected, seconds = undisturbed_phased
    resumed = kill_at_random(tmp_path, phased, seconds, kills=5, seed=100 + seed)
    assert resumed and min(resumed) > 0  # some of the kills came while a batch trained
    assert outcome(tmp_path / "run") == expected


class KilledError(Exception):
    """Stands for a kill."""


@pytest.fixture(scope="module")
def in_process(phased):
    """The method of two phases alone, ten steps, squeezed after the fifth, in this process."""
    scores, log = run_batch.validation_score, run_batch.BatchObserver.log
    config = {
        **phased,
        "trials": {**phased["trials"], "list": (TURNED,)},
        "train": {**phased["train"], "epochs": 4, "log_every": 1, "trials_at_once": 2},
        "validation": {**phased["validation"], "every": 4, "patience": 0},
    }
    loaded = functools.cache(lambda: Experiment.load(resolve(config)))

    def start(workdir, *, last=None, killed=False):
        """Trains until so many steps are logged, and then a signal comes; or a kill during the step behind them."""

        def log_and_stop(observer, step, slot, values):
            log(observer, step, slot, values)
            if killed and step == last + 1:
                raise KilledError
            if not killed and (step, slot) == (last, 1):
                os.kill(os.getpid(), signal.SIGTERM)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(run, "write_report", lambda folder: None)  # figures take long
            patch.setattr(run, "Experiment", SimpleNamespace(load=lambda config: loaded()))  # and so does compiling
            # Ever higher losses, so that only a run that knows where its last phase began keeps the right adapter.
            rising = lambda of, trial, step, adapter: step + scores(of, trial, step, adapter)  # noqa: E731
            patch.setattr(run_batch, "validation_score", rising)
            patch.setattr(run_batch.BatchObserver, "log", log_and_stop if last else log)
            train({**config, "checkpoint": {"every": 1 if killed else 0}}, workdir)

    return start


@pytest.fixture(scope="module")
def never_stopped(in_process, tmp_path_factory):
    folder = tmp_path_factory.mktemp("never_stopped")
    in_process(folder)
    return outcome(folder)


@pytest.mark.parametrize("last", [3, 5, 6, 8])  # in the first phase, at its end, behind the squeeze, in the second one
@pytest.mark.parametrize("killed", [False, True])
def test_stopped_around_a_squeeze(in_process, never_stopped, tmp_path, capsys, last, killed):
    with pytest.raises(KilledError if killed else Interrupted):
        in_process(tmp_path, last=last, killed=killed)
    assert max(saved_steps(tmp_path)) == last
    assert max(record["step"] for record in read_json_lines(tmp_path / "metrics.jsonl")) == last + killed
    capsys.readouterr()
    in_process(tmp_path)
    assert resumed_from(capsys.readouterr().out) == [last]
    assert outcome(tmp_path) == never_stopped


def wait_for(workdir, process, steps):
    """Until some trial has logged so many steps."""
    for _ in range(6000):
        assert process.poll() is None, process.communicate()[0]
        text = (workdir / "metrics.jsonl").read_text() if (workdir / "metrics.jsonl").is_file() else ""
        if any(json.loads(line)["step"] >= steps for line in text.splitlines(keepends=True) if line.endswith("\n")):
            return
        time.sleep(0.01)
    raise AssertionError("it never came that far")


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_saves_before_it_leaves(config, undisturbed, tmp_path, number):
    config = {**config, "checkpoint": {"every": 0}}  # nothing is saved before the signal
    process = start(command(tmp_path, config, tmp_path / "run"), config)
    wait_for(tmp_path / "run", process, 4)
    process.send_signal(number)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 128 + number, output
    assert "run the same command to go on" in output and "Traceback" not in output
    steps = saved_steps(tmp_path / "run")
    assert len(steps) == 1 and 4 <= steps[0] < STEPS
    output = finish(start(command(tmp_path, config, tmp_path / "run"), config))
    assert resumed_from(output) == steps
    assert outcome(tmp_path / "run") == undisturbed[0]


@pytest.mark.slow
def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before(config, undisturbed, tmp_path):
    process = start(command(tmp_path, config, tmp_path / "run"), config)
    wait_for(tmp_path / "run", process, 8)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    folder = tmp_path / "run/checkpoints/batch-0000"
    before, newest = saved_steps(tmp_path / "run")
    for path in (folder / str(newest)).rglob("d/*"):
        path.write_bytes(b"")
    output = finish(start(command(tmp_path, config, tmp_path / "run"), config))
    assert f"the checkpoint of step {newest}" in output and "is damaged and removed" in output
    assert resumed_from(output) == [before]
    assert outcome(tmp_path / "run") == undisturbed[0]


def test_a_finished_run_only_writes_its_report_again(config, undisturbed, tmp_path):
    workdir = tmp_path / "run"
    small = {**config, "trials": {**config["trials"], "list": ({"method": "lora", "seed": (1, 2)},)}}
    first = train(small, workdir)
    assert first.compilations["train"] and not first.trials[0].failed
    before = outcome(workdir)
    (workdir / "table.md").unlink()
    # Without model and data: nothing is computed.
    shutil.move(small["data"]["cache_dir"], tmp_path / "cache")
    shutil.move(small["model"]["path"], tmp_path / "model")
    try:
        again = train(small, workdir)
    finally:
        shutil.move(tmp_path / "cache", small["data"]["cache_dir"])
        shutil.move(tmp_path / "model", small["model"]["path"])
    assert again.compilations == {"train": 0, "evaluation": 0}
    assert again.trials == first.trials and again.base_accuracy == first.base_accuracy
    assert outcome(workdir) == before

    more = {**small, "trials": {**small["trials"], "learning_rate": (0.03, 0.01)}}
    results = train(more, workdir)
    assert len(results.trials) == 4 and results.trials[:2] == first.trials
    records, files = outcome(workdir)
    assert len(records) > len(before[0]) and [r for r in records if r in before[0]] == before[0]
    assert all(files[name] == data for name, data in before[1].items() if name.startswith("adapters"))
    trained = {record["trial"] for record in records if "loss" in record} - {t.trial.name for t in first.trials}
    assert trained == {"lora-r6-sqrt-lr0.01-seed1", "lora-r6-sqrt-lr0.01-seed2"}

    with pytest.raises(ValueError, match=r"holds a run of another config: config\.train\.epochs was 12 and is 25"):
        train({**more, "train": {**more["train"], "epochs": 25}}, workdir)
