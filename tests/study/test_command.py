"""`python -m experiments.study`: cells are found, trained group by group, stopped, gone on with and reported."""

import contextlib
import json
import os
import pathlib
import shutil
import signal
import threading
import types

import pytest
from absl import flags
from absl.testing import flagsaver

import mlora_jax
from mlora_jax.cli import config_flags, study
from mlora_jax.run import batch as run_batch
from mlora_jax.run import experiment as experiment_module
from mlora_jax.run import train as run
from mlora_jax.study import queue, report, rivals
from mlora_jax.study.rivals import Rival
from tests.tiny import write_checkpoint, write_config, write_trec

GROUPS = {"first": (Rival("lora"),), "second": (Rival("dylora"),)}
# Of each cell, method, seeds and number of trials. Cell by cell all those of `large` would come first.
ROUNDS = [
    ("large", "lora", {1}, 2),
    ("tiny", "lora", {2}, 1),
    ("tiny", "lora", {3}, 1),
    ("large", "dylora", {1}, 2),
]


def write_cell(folder, name, **config):
    folder.mkdir(exist_ok=True)
    write_config(folder / f"study_{name}.py", config)


def _nobody_listens(number, frame):
    raise AssertionError("a signal came and the command did not listen")


@pytest.fixture(scope="module", autouse=True)
def places(tmp_path_factory):
    """The flags that say where models and data lie. What the package ships are two cells and two groups."""
    root = tmp_path_factory.mktemp("inputs")
    write_checkpoint(root / "models/base")
    write_trec(root / "data/questions")
    shared = {
        "model": {"path": "base"},
        "data": {
            "task": "trec",
            "raw_dir": "questions",
            "cache_dir": str(root / "cache"),
            "pad_multiple": 40,  # one shape
            "max_length": 96,
        },
        "adapter": {"targets": ("v_proj",)},
        "train": {"epochs": 1, "batch_size": 4, "log_every": 1, "trials_at_once": 1},
        "validation": {"holdout": 0.25},
        "evaluation": {"limit": 4, "readouts": {"lora": ("prefix",)}},
        "checkpoint": {"every": 0},
    }
    two = {"groups": ("first", "second"), "rates": (0.01, 0.1), "start": (0.01, 0.1), "seeds": (1,)}
    write_cell(root / "configs", "large", **shared, study={"rank": 2, **two})
    one = {"groups": ("first",), "rates": (0.1,), "start": (0.1,), "seeds": (2, 3)}
    write_cell(root / "configs", "tiny", **shared, study={"rank": 2, **one})
    before = signal.signal(signal.SIGTERM, _nobody_listens)
    adapted, make_adapted = {}, experiment_module.make_adapted

    def adapt_once(experiment, form):
        if form not in adapted:
            adapted[form] = make_adapted(experiment, form)
        return adapted[form]

    with pytest.MonkeyPatch.context() as patch:
        # All cells are of one model and task here, so that they can have one set of executables.
        patch.setattr(experiment_module, "make_adapted", adapt_once)
        for module in (study, config_flags):
            patch.setattr(module, "SHIPPED", root / "configs")
        patch.setattr(rivals, "GROUPS", GROUPS)
        patch.setattr(run, "write_report", lambda folder: None)  # of each cell's run: figures take long
        yield {"models": str(root / "models"), "data": str(root / "data")}
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="module")
def rounds(places):
    """What was trained: (cell, methods, seeds, number of trials) of every round, in order."""
    del places
    seen, train = [], queue.train

    def record(config, workdir, **options):
        trials = config["trials"]["list"]
        methods = dict.fromkeys(entry["method"][0] for entry in trials)
        seen.append((workdir.name, ", ".join(methods), {entry["seed"][0] for entry in trials}, len(trials)))
        return train(config, workdir, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(queue, "train", record)
        yield seen


def command(places, workdir, **values):
    """The command with these flags, in this process."""
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    with flagsaver.flagsaver(**(places | {"workdir": str(workdir)} | values)):
        study._study([])


@pytest.fixture(scope="module")
def finished(places, rounds, tmp_path_factory):
    """(the folder of a study that nobody stopped, its rounds of training)."""
    folder = tmp_path_factory.mktemp("finished")
    rounds.clear()
    command(places, folder)
    return folder, [*rounds]


@pytest.fixture
def copy(finished, rounds, tmp_path):
    """That study to change at will; no round is on record."""
    rounds.clear()
    return pathlib.Path(shutil.copytree(finished[0], tmp_path / "copy"))


def outcome(folder):
    """Everything of a study that does not depend on the clock: its report, and the adapters behind it."""
    files = [folder / "study.md", folder / "study.csv", *folder.glob("*/adapters/*/adapter.safetensors")]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def drop_report(folder):
    for file in folder.glob("study.*"):
        file.unlink()


def test_the_groups_of_all_cells_are_trained_in_turn(finished, places):
    folder, trained = finished
    assert trained == ROUNDS
    text = (folder / "study.md").read_text()
    assert "### large\n" in text and "### tiny\n" in text and "nfinished" not in text
    lines = (folder / "study.csv").read_text().splitlines()
    seen = [tuple(line.split(",")[at] for at in (0, 1, 4, 5)) for line in lines[1:]]
    pairs = [("large", "lora", "1"), ("large", "dylora", "1"), ("tiny", "lora", "2"), ("tiny", "lora", "3")]
    assert seen == [(*pair, rank) for pair in pairs for rank in "12"]
    assert (folder / "study.png").stat().st_size > 10_000


def test_a_second_call_trains_nothing_and_writes_the_same_report(finished, places, copy, rounds, capsys):
    drop_report(copy)
    command(places, copy)
    assert rounds == [] and outcome(copy) == outcome(finished[0]) and (copy / "study.png").is_file()
    assert capsys.readouterr().out == (copy / "study.md").read_text() + "\n"


def test_a_study_goes_on_from_its_records_without_its_folders(finished, places, copy, rounds, tmp_path):
    """Every finished trial is in the records at once; another machine has them and nothing else."""
    records = tmp_path / "records"
    shutil.rmtree(copy / "tiny")
    command(places, copy, records=str(records), cells=["tiny"])
    assert rounds == ROUNDS[1:3]
    assert [file.name for file in records.iterdir()] == ["tiny.jsonl"]
    whole = (records / "tiny.jsonl").read_text().splitlines(keepends=True)
    lines = [json.loads(line) for line in whole]
    assert {line["version"] for line in lines[1:]} == {mlora_jax.__version__}
    assert sum("verdicts" in line for line in lines) == len(lines) - 1 > 4
    rounds.clear()
    command(places, tmp_path / "empty", records=str(records), cells=["tiny"])
    assert rounds == [] and not (tmp_path / "empty/tiny").exists()
    texts = [(folder / "study.md").read_text() for folder in (tmp_path / "empty", finished[0])]
    assert cell_text(texts[0], "tiny") == cell_text(texts[1], "tiny")
    # What a later machine lost is trained again, and only that.
    last = next(at for at, line in enumerate(lines) if line.get("seed") == 3)
    (records / "tiny.jsonl").write_text("".join(whole[:last]))
    command(places, tmp_path / "other", records=str(records), cells=["tiny"])
    assert rounds == ROUNDS[2:3]
    again = [json.loads(line) for line in (records / "tiny.jsonl").read_text().splitlines()]
    strip = lambda found: [{k: v for k, v in line.items() if k != "date"} for line in found]  # noqa: E731
    assert strip(again) == strip(lines)


def cell_text(report, cell):
    """The table of one cell in a report."""
    return report[report.index(f"### {cell}\n") :].split("\n### ")[0]


def test_without_training_it_only_reports(finished, places, copy, rounds, tmp_path):
    drop_report(copy)
    shutil.rmtree(copy / "tiny")
    command(places, copy, train=False)
    text = (copy / "study.md").read_text()
    assert "### large\n" in text and "- tiny: lora\n" in text and "- large" not in text
    assert rounds == [] and not (copy / "tiny").exists()
    command(places, tmp_path / "new", train=False)
    assert "- large: lora, dylora\n- tiny: lora\n" in (tmp_path / "new/study.md").read_text()
    assert rounds == [] and not (tmp_path / "new/large").exists()


def test_the_report_of_some_cells_keeps_the_others_that_are_there(finished, places, copy, rounds):
    drop_report(copy)
    command(places, copy, cells=["tiny"])
    assert rounds == [] and outcome(copy) == outcome(finished[0])
    shutil.rmtree(copy / "large")
    command(places, copy, cells=["tiny"])
    text = (copy / "study.md").read_text()
    assert "### tiny\n" in text and "large" not in text  # neither asked for nor there
    command(places, copy, cells=["large"], train=False)
    text = (copy / "study.md").read_text()
    assert "### tiny\n" in text and "- large: lora, dylora\n" in text


def test_an_unknown_cell_is_one_line(places, tmp_path, monkeypatch):
    monkeypatch.setattr(study.flags, "mark_flag_as_required", lambda name: None)
    monkeypatch.setattr(study.app, "run", lambda action: action(["study"]))
    with flagsaver.flagsaver(**places, workdir=str(tmp_path / "run"), cells=["tiny", "larg"]):
        with pytest.raises(SystemExit, match=r"^error: there is no cell 'larg'; cells: large, tiny$"):
            study.main()
    assert not (tmp_path / "run").exists()


def test_models_and_data_are_found(places, tmp_path, monkeypatch):
    """Under the two folders; without one data are downloaded, and the shipped base has a name of its own."""
    own = {"model": {"path": "quickstart"}, "data": {"task": "quickstart"}}
    questions = {"model": {"path": "base"}, "data": {"task": "trec", "raw_dir": "questions"}}
    for name, values in {"own": own, "questions": questions}.items():
        write_cell(tmp_path / "configs", name, **values, study={"groups": ("first",)})
    for module in (study, config_flags):
        monkeypatch.setattr(module, "SHIPPED", tmp_path / "configs")
    seen = set()

    def run_cell(config, workdir, **options):
        seen.add((workdir.name, config.model.path, config.data.raw_dir))

    monkeypatch.setattr(queue, "run_cell", run_cell)
    monkeypatch.setattr(report, "write_study", lambda workdir, cells, records: "")
    base = f"{places['models']}/base"
    command(places, tmp_path)
    assert seen == {("own", "quickstart", ""), ("questions", base, f"{places['data']}/questions")}
    seen.clear()
    command(places | {"data": ""}, tmp_path)
    assert seen == {("own", "quickstart", ""), ("questions", base, "")}


class Clock:
    """Timers and the time of day, by hand."""

    def __init__(self):
        self.now, self.timers = 1000.0, []

    def monotonic(self):
        return self.now

    def Timer(self, interval, function, args):  # noqa: N802
        self.timers.append(types.SimpleNamespace(interval=interval, fire=lambda: function(*args)))
        self.timers[-1].start = self.timers[-1].cancel = lambda: None
        return self.timers[-1]


@pytest.mark.parametrize("stop", ["in training", "between two rounds", "when the time is over"])
def test_a_stopped_study_reports_and_goes_on(finished, places, copy, rounds, monkeypatch, stop):
    """In the second round of a cell, or before it."""
    shutil.rmtree(copy / "tiny")
    clock, log, train = Clock(), run_batch.log_values, queue.train

    def log_and_stop(*arguments):
        log(*arguments)
        if stop == "in training" and len(rounds) == 2:
            clock.timers[0].fire()  # sends the signal

    def train_and_stop(*arguments, **options):
        train(*arguments, **options)
        if stop == "between two rounds":
            os.kill(os.getpid(), signal.SIGTERM)
        elif stop == "when the time is over":
            clock.now += 2 * 3600

    with monkeypatch.context() as patch:
        patch.setattr(run_batch, "log_values", log_and_stop)
        patch.setattr(queue, "train", train_and_stop)
        patch.setattr(study, "time", clock)
        patch.setattr(study, "threading", clock)
        with pytest.raises(SystemExit) as left:
            command(places, copy, cells=["tiny"], hours=2.0)
    assert left.value.code == 128 + signal.SIGTERM and [timer.interval for timer in clock.timers] == [7200.0]
    text = (copy / "study.md").read_text()
    assert "### large\n" in text and "### tiny\n" in text and "| lora (unfinished) | 1.00 |" in text
    saved = [path for path in copy.glob("tiny/checkpoints/*/*") if path.name.isdigit()]
    assert len(saved) == (stop == "in training") and rounds == ROUNDS[1 : 2 + len(saved)]
    rounds.clear()
    command(places, copy)
    assert rounds == ROUNDS[2:3] and outcome(copy) == outcome(finished[0])


@pytest.mark.parametrize("hours", [0.0, 0.5])
@pytest.mark.parametrize("error", [None, ValueError("no such model")])
def test_no_timer_is_left_when_the_report_is_written(places, tmp_path, monkeypatch, hours, error):
    """It would end the report."""
    running = lambda: [  # noqa: E731
        thread.interval
        for thread in threading.enumerate()
        if isinstance(thread, threading.Timer) and not thread.finished.is_set()
    ]
    seen = []

    def run_cell(*arguments, **options):
        seen.append(running())
        if error:
            raise error

    def write_study(workdir, cells, records):
        seen.append(running())
        return ""

    monkeypatch.setattr(queue, "run_cell", run_cell)
    monkeypatch.setattr(report, "write_study", write_study)
    with pytest.raises(ValueError, match="no such model") if error else contextlib.nullcontext():
        command(places, tmp_path, hours=hours)
    *training, reporting = seen
    assert training and training == [[1800.0] if hours else []] * len(training) and reporting == []
