"""One report from many runs: what is merged, what is refused, what the caption says of how they differ."""

import csv

import pytest

from mlora_jax.report import choose_rows, read_runs, write_report, write_tables
from mlora_jax.report.table import scaling_summaries
from tests.report.runs import write_run
from tests.report.test_report import BOTH_BASES, BOTH_SPLITS

TRIALS = {"method": ["lora"], "learning_rate": [0.1], "seed": [1], "scaling": ["none"], "rank": [4], "weights": [[]]}


def curve(*seeds, height=0.5):
    return {"test": {seed: (height,) * 3 for seed in seeds}}


@pytest.fixture
def pair(tmp_path):
    """Two runs that hold different seeds of the same trials."""
    first = write_run(
        tmp_path / "first",
        {("lora", "prefix", 0.1): {"test": {1: (0.1, 0.1, 0.1)}}},
        model="/here/base",
        train={"epochs": 1, "log_every": 10},
        report={"choose_on": "test"},
    )
    second = write_run(
        tmp_path / "second",
        {("lora", "prefix", 0.1): {"test": {2: (0.3, 0.3, 0.3)}}, ("dylora", "prefix", 0.1): curve(1, 2)},
        model="/there/base/",
        train={"epochs": 3, "log_every": 5},
    )
    return first, second


def test_runs_of_one_task_and_base_are_merged(pair, tmp_path):
    out = tmp_path / "out"
    assert write_tables(pair, out) == [out / "table.md"]
    text = (out / "table.md").read_text()
    assert text.startswith("# trec on base\n") and f"Runs: {pair[0]}, {pair[1]}." in text
    assert "| lora | 0.1 | 0.250 | 0.200 ± 0.141 |" in text and "| dylora | 0.1 | 0.250 | 0.500 ± 0.000 |" in text
    assert "Runs differ in model.path: /here/base, /there/base/; train.epochs: 1, 3." in text
    assert sorted(path.name for path in out.iterdir()) == [
        "curves.png",
        "differences.csv",
        "differences.tex",
        "table.csv",
        "table.md",
        "table.tex",
    ]


def test_trials_raw_data_and_log_cadence_are_no_difference(tmp_path):
    runs = []
    for seed in (1, 2):
        trials = {**TRIALS, "seed": [seed]}
        places = {"task": "trec", "raw_dir": f"raw/{seed}"}
        train = {"epochs": 1, "log_every": seed}
        curves = {("lora", "prefix", 0.1): curve(seed)}
        runs.append(write_run(tmp_path / str(seed), curves, trials=trials, data=places, train=train))
    write_tables(runs, tmp_path / "out")
    assert "Runs differ" not in (tmp_path / "out/table.md").read_text()


def test_a_key_that_only_one_run_has_is_a_difference(tmp_path):
    first = write_run(tmp_path / "a", {("lora", "prefix", 0.1): curve(1)}, train={"epochs": 1})
    second = write_run(tmp_path / "b", {("lora", "prefix", 0.1): curve(2)}, train={"epochs": 1, "remat": True})
    write_tables([first, second], tmp_path / "out")
    assert "Runs differ in train.remat: not set, full." in (tmp_path / "out/table.md").read_text()


def test_a_former_value_of_a_key_is_no_difference(tmp_path):
    runs = [
        write_run(tmp_path / name, {("lora", "prefix", rate): curve(1)}, train={"epochs": 1, "remat": remat})
        for name, rate, remat in (("older", 0.1, True), ("newer", 0.2, "full"))
    ]
    write_tables(runs, tmp_path / "out", "test")
    assert "Runs differ" not in (tmp_path / "out/table.md").read_text()


def test_other_tasks_and_bases_get_their_own_files(tmp_path):
    rows = {("lora", "prefix", rate): curve(1, 2, height=rate) for rate in (0.1, 0.2)}
    runs = [
        write_run(tmp_path / "a", rows),
        write_run(tmp_path / "b", rows, task="sst2"),
        write_run(tmp_path / "c", rows, model="models/v3.2"),
    ]
    out = tmp_path / "out"
    written = write_tables(runs, out, "test")
    suffixes = ["-trec-base", "-sst2-base", "-trec-v3.2"]
    assert written == [out / f"table{suffix}.md" for suffix in suffixes]
    titles = ["# trec on base", "# sst2 on base", "# trec on v3.2"]
    assert [path.read_text().splitlines()[0] for path in written] == titles
    for suffix in suffixes:
        for name in ("curves{}.png", "learning_rates{}.png", "table{}.csv", "table{}.tex"):
            assert (out / name.format(suffix)).is_file()


def test_bases_of_one_name_and_unlike_accuracy_are_kept_apart(tmp_path):
    runs = [
        write_run(tmp_path / f"{at}{seed}", {("lora", "prefix", 0.1): curve(seed)}, model=f"/{at}/last", base=base)
        for at, seed, base in (("a", 1, (("test", 0.25),)), ("b", 1, (("test", 0.5),)), ("a", 2, (("test", 0.25),)))
    ]
    out = tmp_path / "out"
    written = write_tables(runs, out)
    assert written == [out / "table-trec-last-1.md", out / "table-trec-last-2.md"]
    first, second = (path.read_text() for path in written)
    assert first.startswith(f"# trec on last (1)\n\nRuns: {runs[0]}, {runs[2]}.\n\nmodel.path: /a/last.\n")
    assert second.startswith(f"# trec on last (2)\n\nRuns: {runs[1]}.\n\nmodel.path: /b/last.\n")
    assert "trec on last (2), R = 4" in (out / "table-trec-last-2.tex").read_text()


@pytest.mark.parametrize(
    ("first", "second", "apart"),
    [
        ("/a/rows.jsonl", "/a/rows.jsonl", False),
        ("/a/rows.jsonl", "/b/rows.jsonl", False),  # the base is as accurate on both
        ("/a/rows.jsonl", "/a/others.jsonl", True),
    ],
)
def test_own_data_of_other_files_is_kept_apart(tmp_path, first, second, apart):
    runs = [
        write_run(tmp_path / str(n), {("lora", "prefix", 0.1): curve(n)}, data={"task": "jsonl", "file": file})
        for n, file in enumerate((first, second))
    ]
    written = write_tables(runs, tmp_path / "out")
    assert len(written) == 1 + apart
    text = written[0].read_text()
    assert (f"Runs differ in data.file: {first}, {second}." in text) == (first != second and not apart)
    assert (f"data.file: {first}." in text) == apart


def test_one_trial_in_two_folders_is_an_error_that_names_both(tmp_path):
    first = write_run(tmp_path / "first", {("lora", "prefix", 0.1): curve(1, 2)})
    second = write_run(tmp_path / "second", {}, failed=[("lora", 0.1, 2)])
    with pytest.raises(
        ValueError,
        match=r"the trial lora, R = 4, scaling none, learning rate 0.1, seed 2 is in .*first and in .*second; ",
    ):
        write_tables([first, second], tmp_path / "out")
    with pytest.raises(ValueError, match=r"is in .*first and in .*first; "):
        write_tables([first, first], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    # The same trial of another task is another trial.
    other = write_run(tmp_path / "other", {("lora", "prefix", 0.1): curve(1, 2)}, task="sst2")
    assert len(read_runs([first, other])) == 2


def test_other_ranks_of_read_outs_are_another_table(tmp_path):
    first = write_run(tmp_path / "a", {("lora", "prefix", 0.1): curve(1)})
    second = write_run(tmp_path / "b", {("lora", "prefix", 0.1): {"test": {2: (0.4, 0.6)}}})
    write_tables([first, second], tmp_path / "out")
    text = (tmp_path / "out/table.md").read_text()
    assert "R = 4, scaling none, S = 1, 2. " in text and "R = 4, scaling none, S = 1, 2, 4. " in text
    assert "| lora | 0.1 | 0.250 | 0.400 | 0.600 |" in text and "| lora | 0.1 | 0.250 | 0.500 | 0.500 | 0.500 |" in text
    tex = (tmp_path / "out/table.tex").read_text()
    assert r"lora & 0.1 & 0.250 & $0.400$ & $0.600$ & " in tex and tex.count(r"\begin{table}") == 2


def test_unlike_bases_are_told(tmp_path):
    first = write_run(tmp_path / "a", {("lora", "prefix", 0.1): curve(1)})
    second = write_run(tmp_path / "b", {("lora", "prefix", 0.1): curve(2)}, base=(("test", 0.5),))
    write_tables([first, second], tmp_path / "out")
    text = (tmp_path / "out/table.md").read_text()
    assert f"differs between the runs: 0.250 in {first}, 0.500 in {second}; the first is shown." in text
    assert "| lora | 0.1 | 0.250 |" in text


def test_unfinished_runs_are_named(tmp_path):
    first = write_run(tmp_path / "a", {("lora", "prefix", 0.1): curve(1)}, trials=TRIALS)
    second = write_run(tmp_path / "b", {("lora", "prefix", 0.1): curve(2)}, trials={**TRIALS, "seed": [2, 3]})
    write_tables([first, second], tmp_path / "out")
    text = (tmp_path / "out/table.md").read_text()
    assert f"1 of 2 trials of {second} are not finished." in text and text.count("not finished") == 1


SPLIT = {
    ("lora", "prefix", 0.1): {"test": {1: (0.1,) * 3}, "validation": {1: (0.9,) * 3}},
    ("lora", "prefix", 0.2): {"test": {1: (0.9,) * 3}, "validation": {1: (0.1,) * 3}},
}
BASES = (("test", 0.2), ("validation", 0.2))


def chosen(path):
    rows = csv.DictReader(path.read_text().splitlines())
    return [row["learning_rate"] for row in rows if row["best"] == "1"]


@pytest.mark.parametrize(
    ("configs", "choose_on", "expected"),
    [
        (({}, {}), None, "0.1"),
        (({}, {}), "test", "0.2"),
        (({"choose_on": "test"}, {"choose_on": "test"}), None, "0.2"),
        (({"choose_on": "test"}, {"choose_on": "test"}), "validation", "0.1"),
        (({"choose_on": "test"}, {"choose_on": "validation"}), None, "0.1"),
    ],
)
def test_the_split_of_the_choice(tmp_path, configs, choose_on, expected):
    runs = [
        write_run(tmp_path / str(rate), {key: SPLIT[key] for key in SPLIT if key[2] == rate}, base=BASES, report=config)
        for rate, config in zip((0.1, 0.2), configs, strict=True)
    ]
    write_tables(runs, tmp_path / "out", choose_on)
    assert chosen(tmp_path / "out/table.csv") == [expected]
    text = (tmp_path / "out/table.md").read_text()
    assert ("same test split" in text) == (expected == "0.2") and "Runs differ" not in text


def test_no_validation_split_to_choose_on_is_an_error_with_the_way_out(tmp_path):
    only_test = {key: {"test": splits["test"]} for key, splits in SPLIT.items()}
    run = write_run(tmp_path / "run", only_test)
    with pytest.raises(
        ValueError, match=r"no learning rate can be chosen on the validation split for lora: .*--choose_on"
    ):
        write_tables([run], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    write_tables([run], tmp_path / "out", "test")
    assert chosen(tmp_path / "out/table.csv") == ["0.2"]
    write_report(run)
    assert "No learning rate is chosen" in (run / "table.md").read_text()
    with pytest.raises(ValueError, match="choose_on must be one of validation, test, got 'train'"):
        write_tables([run], tmp_path / "out", "train")


def test_validation_of_some_seeds_only_is_no_ground_to_choose_on(tmp_path):
    half = {key: {**splits, "test": {1: (0.5,) * 3, 2: (0.5,) * 3}} for key, splits in SPLIT.items()}
    with pytest.raises(ValueError, match="no learning rate can be chosen"):
        write_tables([write_run(tmp_path / "run", half, base=BASES)], tmp_path / "out")


def test_scalings_stand_side_by_side_at_their_chosen_rates(tmp_path):
    runs = [
        write_run(tmp_path / scaling, curves, base=BOTH_BASES, scaling=scaling)
        for scaling, curves in (
            ("none", BOTH_SPLITS),
            ("sqrt", {key: splits for key, splits in BOTH_SPLITS.items() if key[0] == "lora"}),
        )
    ]
    (path,) = write_tables(runs, tmp_path / "out")
    text = path.read_text()
    # lora: 0.1 is chosen on validation, AURAC (log2) 0.2 and 0.3 of its seeds; matryoshka: 0.2, 0.7 and 0.75.
    assert "| method | none | sqrt |\n| --- | ---: | ---: |\n" in text
    assert "| lora | 0.250 ± 0.071 | 0.250 ± 0.071 |\n| matryoshka | 0.725 ± 0.035 |  |\n" in text
    assert "R = 4, ranks 1, 2, 4. AURAC (log2) on the test split by scaling" in text and "the base has 0.250" in text
    assert r"lora & $0.250 \pm 0.071$ & $0.250 \pm 0.071$ \\" in (tmp_path / "out/table.tex").read_text()
    write_report(runs[0])
    assert "by scaling" not in (runs[0] / "table.md").read_text()  # one scaling: nothing to set side by side


def test_rates_that_nothing_chose_have_no_place_among_the_scalings(tmp_path):
    curves = {key: {"test": splits["test"]} for key, splits in BOTH_SPLITS.items()}
    for scaling in ("none", "sqrt"):
        write_run(tmp_path / scaling, curves, scaling=scaling)
    (experiment,) = read_runs([tmp_path / "none", tmp_path / "sqrt"])
    choice = choose_rows(experiment.rows, "validation")
    assert choice.undecided and not scaling_summaries(experiment, choice)
