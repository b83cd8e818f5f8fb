"""The report of one run, from records whose numbers are known."""

import csv
import json
import re
import shutil
import subprocess

import numpy as np
import pytest

from mlora_jax.report import choose_rows, compare, read_runs, write_report
from mlora_jax.report.formats import escape_latex
from mlora_jax.training.records import read_json_lines
from tests.report.runs import write_run

TEST_ONLY = {
    ("lora", "prefix", 0.1): {"test": {1: (0.1, 0.2, 0.9), 2: (0.3, 0.4, 0.7)}},
    ("lora", "squeeze", 0.1): {"test": {1: (0.5, 0.6, 0.9), 2: (0.5, 0.6, 0.7)}},
    ("lora", "prefix", 0.2): {"test": {1: (0.2, 0.3, 0.9), 2: (0.4, 0.5, 0.7)}},
    ("lora", "squeeze", 0.2): {"test": {1: (0.4, 0.5, 0.9), 2: (0.4, 0.5, 0.7)}},
    ("matryoshka", "masked", 0.1): {"test": {1: (0.5, 0.5, 0.5), 2: (0.5, 0.5, 0.5)}},
}
# On the test split 0.2 is better for both; on the validation split 0.1 is, for lora.
BOTH_SPLITS = {
    ("lora", "prefix", 0.1): {
        "test": {1: (0.1, 0.2, 0.3), 2: (0.2, 0.3, 0.4)},
        "validation": {1: (0.5, 0.6, 0.7), 2: (0.5, 0.6, 0.7)},
    },
    ("lora", "prefix", 0.2): {
        "test": {1: (0.3, 0.4, 0.5), 2: (0.4, 0.5, 0.6)},
        "validation": {1: (0.4, 0.5, 0.6), 2: (0.4, 0.5, 0.6)},
    },
    ("matryoshka", "prefix", 0.1): {
        "test": {1: (0.6, 0.6, 0.6), 2: (0.6, 0.7, 0.6)},
        "validation": {1: (0.1, 0.1, 0.1), 2: (0.1, 0.1, 0.1)},
    },
    ("matryoshka", "prefix", 0.2): {
        "test": {1: (0.7, 0.7, 0.7), 2: (0.7, 0.8, 0.7)},
        "validation": {1: (0.2, 0.2, 0.2), 2: (0.2, 0.2, 0.2)},
    },
}
BOTH_BASES = (("test", 0.25), ("validation", 0.125))


def rows_of(path):
    (experiment,) = read_runs([path])
    return {(row.method, row.readout, row.learning_rate): row for row in experiment.rows}


def rates(rows):
    return {(row.method, row.readout): row.learning_rate for row in rows}


def read_csv(path):
    return list(csv.DictReader(path.read_text().splitlines()))


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "run", BOTH_SPLITS, base=BOTH_BASES)


def test_rows_are_means_and_deviations_over_seeds(tmp_path):
    (experiment,) = read_runs([write_run(tmp_path, TEST_ONLY)])
    assert experiment.base == {"test": 0.25} and len(experiment.rows) == 5 and experiment.failed == []
    row = rows_of(tmp_path)["lora", "prefix", 0.1]
    curves = np.array([(0.1, 0.2, 0.9), (0.3, 0.4, 0.7)])
    assert row.seeds == (1, 2) and list(row.test.accuracies) == [1, 2, 4] and "validation" not in row.measured
    for column, rank in enumerate((1, 2, 4)):
        assert row.test.accuracies[rank].mean == pytest.approx(curves[:, column].mean())
        assert row.test.accuracies[rank].deviation == pytest.approx(curves[:, column].std(ddof=1))
    expected = {
        "log2": np.trapezoid(curves, [0, 1, 2]) / 2,
        "linear": np.trapezoid(curves, [1, 2, 4]) / 3,
        "mean": curves.mean(1),
    }
    for name, values in expected.items():
        spread = getattr(row.test, name)
        assert spread.mean == pytest.approx(values.mean()) and spread.deviation == pytest.approx(values.std(ddof=1))


def test_learning_rate_is_chosen_per_method_and_read_out(tmp_path):
    rows = rows_of(write_run(tmp_path, TEST_ONLY)).values()
    choice = choose_rows(rows, "test")
    expected = {("lora", "prefix"): 0.2, ("lora", "squeeze"): 0.1, ("matryoshka", "masked"): 0.1}
    assert rates(choice.shown) == expected and choice.undecided == [] and choice.left_out == []
    assert rates(choice.chosen) == {key: expected[key] for key in (("lora", "prefix"), ("lora", "squeeze"))}


def test_validation_split_decides_where_test_would_decide_otherwise(run):
    rows = rows_of(run).values()
    assert rates(choose_rows(rows, "validation").shown) == {("lora", "prefix"): 0.1, ("matryoshka", "prefix"): 0.2}
    assert rates(choose_rows(rows, "test").shown) == {("lora", "prefix"): 0.2, ("matryoshka", "prefix"): 0.2}


def test_equal_learning_rates_give_the_smallest(tmp_path):
    curve = {"test": {1: (0.5, 0.5, 0.5)}}
    rows = rows_of(write_run(tmp_path, {("lora", "prefix", rate): curve for rate in (0.2, 0.1, 0.3)})).values()
    assert rates(choose_rows(rows, "test").shown) == {("lora", "prefix"): 0.1}


def test_settings_are_chosen_apart(tmp_path):
    good, bad = {"test": {1: (0.5, 0.5, 0.5)}}, {"test": {1: (0.1, 0.1, 0.1)}}
    first = write_run(tmp_path / "a", {("lora", "prefix", 0.1): good, ("lora", "prefix", 0.2): bad})
    second = write_run(
        tmp_path / "b", {("lora", "prefix", 0.1): bad, ("lora", "prefix", 0.2): good}, weights=(1.0, 0.5, 2.0)
    )
    (experiment,) = read_runs([first, second])
    shown = choose_rows(experiment.rows, "test").shown
    assert {(row.setting.values["weights"], row.learning_rate) for row in shown} == {((), 0.1), ((1.0, 0.5, 2.0), 0.2)}
    assert str(shown[1].setting) == "R = 4, scaling none, weights 1, 0.5, 2"


def test_survivors_alone_do_not_win(tmp_path):
    curves = {
        ("lora", "prefix", 0.1): {"test": {1: (0.2, 0.2, 0.2), 2: (0.2, 0.2, 0.3)}},
        ("lora", "prefix", 0.2): {"test": {1: (0.9, 0.9, 0.9)}},
    }
    write_run(tmp_path, curves, failed=[("lora", 0.2, 2)], report={"choose_on": "test"})
    choice = choose_rows(rows_of(tmp_path).values(), "test")
    assert rates(choice.shown) == {("lora", "prefix"): 0.1} and rates(choice.left_out) == {("lora", "prefix"): 0.2}
    write_report(tmp_path)
    text = (tmp_path / "table.md").read_text()
    assert "Failed, the loss is not finite: lora-r4-none-lr0.2-seed2." in text
    assert "they lack more seeds than another learning rate: lora at 0.2 (seed 2 failed)." in text
    assert [row["failed_seeds"] for row in read_csv(tmp_path / "table.csv")] == ["", "2"]


def test_where_no_learning_rate_has_all_seeds_the_caption_names_what_is_missing(tmp_path):
    curves = {
        ("lora", "prefix", 0.1): {"test": {1: (0.2, 0.2, 0.2)}},
        ("lora", "prefix", 0.2): {"test": {2: (0.9, 0.9, 0.9)}},
    }
    trials = {"method": ["lora"], "learning_rate": [0.1], "seed": [1, 2], "rank": [4]}
    write_run(tmp_path, curves, failed=[("lora", 0.2, 1)], report={"choose_on": "test"}, trials=trials)
    write_report(tmp_path)
    text = (tmp_path / "table.md").read_text()
    assert (
        "Means over the seeds that finished: lora at 0.1 (seed 2 missing), lora at 0.2 (seed 1 failed)." in text
        and "Not chosen among" not in text
    )
    assert "compared by the seeds that all of them have, if there are any: lora." in text
    (row,) = choose_rows(rows_of(tmp_path).values(), "test").shown
    assert row.learning_rate == 0.2


SEEDS = {
    ("lora", "prefix", 0.1): {"test": {1: (0.2,) * 3, 2: (0.2,) * 3, 3: (0.95,) * 3}},
    ("lora", "prefix", 0.2): {"test": {1: (0.4,) * 3, 2: (0.4,) * 3}},
}


def test_more_seeds_at_one_learning_rate_do_not_decide(tmp_path):
    """0.1 has the greater number of seeds and the greater mean; 0.2 is better on the seeds that both have."""
    write_run(tmp_path, SEEDS, report={"choose_on": "test"})
    choice = choose_rows(rows_of(tmp_path).values(), "test")
    assert rates(choice.shown) == {("lora", "prefix"): 0.2} and choice.left_out == []
    write_report(tmp_path)
    text = (tmp_path / "table.md").read_text()
    assert "unlike seeds were compared by the seeds that all of them have, if there are any: lora." in text


def test_a_learning_rate_that_is_not_finished_is_not_chosen(tmp_path):
    trials = {"method": ["lora"], "learning_rate": [0.2], "seed": [1, 2, 3], "rank": [4]}
    write_run(tmp_path, SEEDS, report={"choose_on": "test"}, trials=trials)
    choice = choose_rows(rows_of(tmp_path).values(), "test")
    assert rates(choice.shown) == {("lora", "prefix"): 0.1} and rates(choice.left_out) == {("lora", "prefix"): 0.2}
    write_report(tmp_path)
    text = (tmp_path / "table.md").read_text()
    assert "they lack more seeds than another learning rate: lora at 0.2 (seed 3 missing)." in text
    assert "unlike seeds" not in text


def test_report_of_one_run(run):
    write_report(run)
    text = (run / "table.md").read_text()
    assert text.startswith("# trec on base\n")
    assert "| method | learning rate | base | 1 | 2 | 4 | AURAC linear | AURAC log2 | mean |\n" in text
    assert (
        "| lora | 0.1 | 0.250 | 0.150 ± 0.071 | 0.250 ± 0.071 | 0.350 ± 0.071 | 0.267 ± 0.071 | 0.250 ± 0.071 |" in text
    )
    assert "R = 4, scaling none. Accuracy on the test split; seeds 1, 2; mean ± standard deviation over seeds." in text
    assert "highest mean AURAC (log2) on the validation split, held out of the training rows." in text
    # The table of every learning rate shows what the choice went by.
    assert re.search(r"Every learning rate:\n\n.*\| AURAC log2, validation \|\n", text)
    assert re.search(r"\| lora \| 0.1 \|.*\| 0.600 ± 0.000 \|\n\| lora \| 0.2 \|.*\| 0.500 ± 0.000 \|\n", text)
    for name in ("curves.png", "learning_rates.png"):
        assert (run / name).read_bytes().startswith(b"\x89PNG")


def test_choice_on_the_test_split_is_said(tmp_path):
    write_report(write_run(tmp_path, BOTH_SPLITS, report={"choose_on": "test"}))
    text = (tmp_path / "table.md").read_text()
    assert "highest mean AURAC (log2) on this same test split, which flatters it." in text
    first = next(line for line in text.splitlines() if line.startswith("| lora |"))
    assert first.startswith("| lora | 0.2 |") and "AURAC log2, validation" not in text


def test_without_a_validation_split_every_learning_rate_is_listed_and_none_chosen(tmp_path):
    write_report(write_run(tmp_path, TEST_ONLY))
    text = (tmp_path / "table.md").read_text()
    assert (
        "No learning rate is chosen, for want of accuracies on a validation split, and every one is listed: "
        "lora, lora + squeeze." in text
    )
    assert "with its highest" not in text and "Every learning rate" not in text and "Differences" not in text
    assert [line.split(" | ")[:2] for line in text.splitlines() if line.startswith(("| lora", "| mat"))] == [
        ["| lora", "0.1"],
        ["| lora", "0.2"],
        ["| lora + squeeze", "0.1"],
        ["| lora + squeeze", "0.2"],
        ["| matryoshka (masked)", "0.1"],
    ]
    assert [row["best"] for row in read_csv(tmp_path / "table.csv")] == ["", "", "", "", "1"]
    assert (tmp_path / "learning_rates.png").is_file() and (tmp_path / "curves.png").is_file()


def test_one_learning_rate_is_no_choice(tmp_path):
    write_run(tmp_path, {key: splits for key, splits in TEST_ONLY.items() if key[2] == 0.1})
    (tmp_path / "learning_rates.png").write_text("of an earlier run")
    write_report(tmp_path)
    text = (tmp_path / "table.md").read_text()
    assert "highest" not in text and "chosen" not in text and "Every learning rate" not in text
    assert not (tmp_path / "learning_rates.png").exists()
    assert [(row["best"], row["chosen_on"]) for row in read_csv(tmp_path / "table.csv")] == [("1", "")] * 3


def test_one_seed_has_no_spread(tmp_path):
    curves = {
        ("lora", "prefix", 0.1): {"test": {1: (0.2, 0.2, 0.2)}},
        ("dylora", "prefix", 0.1): {"test": {1: (0.3, 0.3, 0.3), 2: (0.3, 0.3, 0.5)}},
    }
    write_report(write_run(tmp_path / "b", curves))
    assert "Differences" not in (tmp_path / "b/table.md").read_text()  # one row with a spread: nothing to compare
    curves["sandwich", "prefix", 0.1] = curves["dylora", "prefix", 0.1]
    write_report(write_run(tmp_path / "a", curves))
    text = (tmp_path / "a/table.md").read_text()
    assert "| lora | 0.1 | 0.250 | 0.200 | 0.200 | 0.200 | 0.200 | 0.200 | 0.200 |\n" in text
    assert "a row of one seed has no spread, so nothing can be said: lora." in text
    assert "| 1 lora |  | (-0.125) | (-0.125) |\n| 2 dylora | (+0.125) |  | +0.000 |\n" in text
    assert "Means over the seeds that finished: lora at 0.1 (seed 2 missing)." in text
    assert [row["clear"] for row in read_csv(tmp_path / "a/differences.csv")][:2] == ["", ""]
    alone = {key: {"test": {1: splits["test"][1]}} for key, splits in curves.items()}
    write_report(write_run(tmp_path / "c", alone))
    text = (tmp_path / "c/table.md").read_text()
    assert "Differences" not in text and "seed 1." in text and "±" not in text


def test_a_difference_is_clear_where_the_bands_do_not_overlap(tmp_path):
    # AURAC 0.5 ± 0.1414, 0.75 ± 0.0707 and 0.72 ± 0.0707: 0.25 exceeds the sum 0.2121, 0.22 does too, 0.03 does not.
    curves = {
        ("lora", "prefix", 0.1): {"test": {1: (0.4,) * 3, 2: (0.6,) * 3}},
        ("matryoshka", "prefix", 0.1): {"test": {1: (0.7,) * 3, 2: (0.8,) * 3}},
        ("sandwich", "prefix", 0.1): {"test": {1: (0.67,) * 3, 2: (0.77,) * 3}},
        ("dylora", "prefix", 0.1): {"test": {1: (0.65,) * 3, 2: (0.75,) * 3}},
    }
    rows = rows_of(write_run(tmp_path, curves))
    lora, dylora, matryoshka, sandwich = (
        rows[name, "prefix", 0.1] for name in ("lora", "dylora", "matryoshka", "sandwich")
    )
    assert compare(lora, matryoshka).value == pytest.approx(-0.25) and compare(lora, matryoshka).clear is True
    assert compare(matryoshka, lora).value == pytest.approx(0.25) and compare(matryoshka, lora).clear is True
    assert compare(matryoshka, sandwich).clear is False
    assert compare(lora, dylora).value == pytest.approx(-0.2) and compare(lora, dylora).clear is False
    write_report(tmp_path)
    text = (tmp_path / "table.md").read_text()
    assert "the bands mean ± one standard deviation over seeds do not overlap." in text
    assert "| 1 lora |  | -0.200 | **-0.250** | **-0.220** |\n" in text
    assert "| 3 matryoshka | **+0.250** | +0.050 |  | +0.030 |\n" in text
    pairs = {(row["first_method"], row["second_method"]): row for row in read_csv(tmp_path / "differences.csv")}
    assert len(pairs) == 6
    assert pairs["lora", "matryoshka"]["clear"] == "1" and pairs["lora", "dylora"]["clear"] == "0"
    assert float(pairs["lora", "dylora"]["difference"]) == pytest.approx(-0.2)
    assert float(pairs["lora", "dylora"]["first_aurac_log2_std"]) == pytest.approx(0.02**0.5)


def test_csv_holds_every_row_with_full_precision(run):
    write_report(run)
    rows = read_csv(run / "table.csv")
    assert [(row["method"], row["learning_rate"], row["best"]) for row in rows] == [
        ("lora", "0.1", "1"),
        ("lora", "0.2", "0"),
        ("matryoshka", "0.1", "0"),
        ("matryoshka", "0.2", "1"),
    ]
    assert float(rows[0]["rank_1_std"]) == pytest.approx(np.std([0.1, 0.2], ddof=1), abs=1e-15)
    assert float(rows[0]["aurac_linear"]) == pytest.approx(0.8 / 3, abs=1e-15)
    assert float(rows[0]["validation_aurac_log2"]) == pytest.approx(0.6, abs=1e-15)
    assert float(rows[1]["validation_rank_4"]) == pytest.approx(0.6, abs=1e-15)
    assert (rows[0]["base"], rows[0]["validation_base"]) == ("0.25", "0.125")
    assert {row["chosen_on"] for row in rows} == {"validation"} and rows[0]["seeds"] == "1 2"


def test_csv_leaves_empty_what_was_not_measured(tmp_path):
    both = {("lora", "prefix", 0.1): BOTH_SPLITS["lora", "prefix", 0.1]}
    only_test = {("dylora", "prefix", 0.1): {"test": {1: (0.5, 0.5, 0.5)}}}
    write_report(write_run(tmp_path, both | only_test, base=BOTH_BASES))
    lora, dylora = read_csv(tmp_path / "table.csv")
    assert dylora["validation_aurac_log2"] == "" and dylora["validation_rank_1"] == "" and dylora["rank_1_std"] == ""
    assert float(lora["validation_aurac_log2"]) == pytest.approx(0.6)


SPECIAL = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "|": r"\textbar{}",
    "/": r"/\allowbreak{}",
}


def test_latex_characters_are_escaped():
    assert escape_latex("a_b & 5% of #1 ${x}") == r"a\_b \& 5\% of \#1 \$\{x\}"
    for character, written in SPECIAL.items():
        assert escape_latex(f"a{character}b") == f"a{written}b"


@pytest.fixture(scope="module")
def two_settings(tmp_path_factory):
    """A run of two settings, chosen on the test split, with a name and a number of columns that LaTeX minds."""
    curves = {("dylora_frozen", "squeeze", *key[2:]): splits for key, splits in BOTH_SPLITS.items() if key[0] == "lora"}
    curves["sandwich", "prefix", 0.1] = curves["dylora_frozen", "squeeze", 0.1]
    run = write_run(tmp_path_factory.mktemp("run"), BOTH_SPLITS, base=BOTH_BASES)
    records = (run / "curves.jsonl").read_text()
    other = write_run(tmp_path_factory.mktemp("other"), curves, base=BOTH_BASES, scaling="sqrt", truncated=3)
    (run / "curves.jsonl").write_text(records + (other / "curves.jsonl").read_text())
    config = {"data": {"task": "trec"}, "model": {"path": "some/folder/a_base"}, "report": {"choose_on": "test"}}
    (run / "config.json").write_text(json.dumps(config))
    write_report(run)
    return run


@pytest.mark.parametrize("name", ["table.tex", "differences.tex"])
def test_latex_is_a_table_with_a_caption_per_setting(two_settings, name):
    lines = (two_settings / name).read_text().splitlines()
    assert r"% Needs \usepackage{booktabs,graphicx}." in lines
    if name == "table.tex":  # first both scalings side by side
        end = lines.index(r"\end{table}")
        assert "R = 4, ranks 1, 2, 4. AURAC (log2) on the test split by scaling" in "".join(lines[:end])
        assert r"method & none & sqrt \\" in lines[:end]
        lines = lines[end + 1 :]
    captions = [line for line in lines if line.startswith(r"\caption{")]
    for caption, scaling in zip(captions, ("none", "sqrt"), strict=True):
        assert caption.startswith(rf"\caption{{trec on a\_base, R = 4, scaling {scaling}. ") and caption.endswith("}")
        assert "on this same test split, which flatters it." in caption and "±" not in caption
        assert ("3 of 12 test items" in caption) == (name == "table.tex")
        assert ("Bold: clear, " in caption and "row less column" in caption) == (name == "differences.tex")
    environments = [line for line in lines if line.startswith((r"\begin", r"\end"))]
    assert len(environments) == 8 and len(set(environments)) == 4
    columns = len(re.search(r"\\begin\{tabular\}\{(l(r+))\}", "\n".join(lines))[1])
    cells = [line for line in lines if line.endswith(r" \\")]
    assert len(cells) == 2 * (1 + 2)
    for line in cells:
        assert len(re.findall(r"(?<!\\)&", line)) == columns - 1
        assert line.count("$") % 2 == 0 and not re.search(r"(?<!\\)[_#%]", line) and "±" not in line
    assert any(r"dylora\_frozen + squeeze" in line for line in cells)


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="pdflatex is not installed")
def test_a_document_takes_the_latex(two_settings):
    body = r"\begin{document}\input{table.tex}\input{differences.tex}\end{document}"
    (two_settings / "paper.tex").write_text(rf"\documentclass{{article}}\usepackage{{booktabs,graphicx}}{body}")
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "paper.tex"]
    done = subprocess.run(command, cwd=two_settings, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout
    assert "Overfull" not in done.stdout
    captions = (two_settings / "paper.aux").read_text()
    assert captions.count("which flatters it.") == 4 and captions.count("Bold: clear") == 2


def test_latex_numbers(run):
    write_report(run)
    assert r"lora & 0.1 & 0.250 & $0.150 \pm 0.071$ & " in (run / "table.tex").read_text()
    assert r"2 matryoshka & $\mathbf{+0.475}$ &  \\" in (run / "differences.tex").read_text()


def test_cut_items_are_told(tmp_path):
    write_report(write_run(tmp_path / "none", BOTH_SPLITS, base=BOTH_BASES))
    write_report(write_run(tmp_path / "some", BOTH_SPLITS, base=BOTH_BASES, truncated=3))
    told = "Prompts cut on the left to fit config.data.max_length or the context: "
    assert told not in (tmp_path / "none/table.md").read_text()
    for name in ("table.md", "table.tex"):
        text = (tmp_path / "some" / name).read_text().replace(r"\_", "_")
        assert f"{told}3 of 12 test items, 3 of 12 validation items." in text


def test_nothing_but_failed_trials(tmp_path):
    write_run(tmp_path, {}, failed=[("sandwich", 0.1, 1)])
    for name in ("curves.png", "differences.csv", "differences.tex"):
        (tmp_path / name).write_text("of an earlier run")
    write_report(tmp_path)
    text = (tmp_path / "table.md").read_text()
    assert "Failed, the loss is not finite: sandwich-r4-none-lr0.1-seed1." in text
    assert "No trial finished. Accuracy of the base: 0.250." in text
    assert "No trial finished" in (tmp_path / "table.tex").read_text()
    assert not [name for name in ("curves.png", "differences.csv", "differences.tex") if (tmp_path / name).exists()]


def test_unfinished_trials_are_counted_and_half_written_curves_left_out(tmp_path):
    trials = {"method": ["lora"], "learning_rate": [0.1], "seed": [1, 2, 3, 4], "scaling": ["none"], "rank": [4]}
    curves = {("lora", "prefix", 0.1): {"test": {1: (0.2, 0.2, 0.2), 2: (0.9, 0.9)}}}
    write_run(tmp_path, curves, failed=[("lora", 0.1, 4)], trials={**trials, "weights": [[]]})
    write_report(tmp_path)
    text = (tmp_path / "table.md").read_text()
    assert "2 of 4 trials are not finished." in text and "| lora | 0.1 | 0.250 | 0.200 | 0.200 | 0.200 |" in text


def test_a_curve_without_its_last_ranks_is_left_out_though_no_other_has_them(run):
    lines = (run / "curves.jsonl").read_text().splitlines(keepends=True)
    (run / "curves.jsonl").write_text("".join(line for line in lines if '"at_rank": 4' not in line))
    (experiment,) = read_runs([run])
    assert experiment.rows == [] and experiment.base["test"] == 0.25


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"schema": 1, "trial"\n', r"curves\.jsonl:33: "),
        ('{"schema": 7}\n', r"curves\.jsonl:33: not a record of schema 1"),
        ('{"schema": 1, "trial": "x", "failed": true}\n', r"curves\.jsonl: record 33 has no method, learning_rate"),
        ('{"schema": 1, "trial": "base"}\n', r"record 33 has no split, readout, at_rank, of_ranks, accuracy"),
    ],
)
def test_a_damaged_record_is_named(tmp_path, line, message):
    write_run(tmp_path, TEST_ONLY)
    assert len(read_json_lines(tmp_path / "curves.jsonl")) == 31
    with (tmp_path / "curves.jsonl").open("a") as file:
        shared = '"schema": 1, "trial": "base", "split": "x", "readout": "", "at_rank": 0, "of_ranks": 1'
        file.write(f'{{{shared}, "accuracy": 0}}\n{line}')
    with pytest.raises(ValueError, match=message):
        write_report(tmp_path)


def test_a_folder_without_a_run_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"is not the folder of a run: it has no config\.json"):
        write_report(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"data": {"task": "trec"}, "model": {"path": "base"}}))
    with pytest.raises(FileNotFoundError, match=r"has no curves\.jsonl: the run has not measured anything yet"):
        write_report(tmp_path)
    (tmp_path / "curves.jsonl").write_text("")
    with pytest.raises(ValueError, match="holds no accuracy of the base model on the test split"):
        write_report(tmp_path)
