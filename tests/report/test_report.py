"""Tables and figures from records whose numbers are known."""

import csv
import json

import pytest

from mlora_jax.report import best_rows, read_rows, write_report
from mlora_jax.train.records import JsonLines, read_json_lines

# (method, read-out, learning rate) -> seed -> accuracies at ranks 1, 2, 4
CURVES = {
    ("lora", "prefix", 0.1): {1: (0.1, 0.2, 0.9), 2: (0.3, 0.4, 0.7)},
    ("lora", "squeeze", 0.1): {1: (0.5, 0.6, 0.9), 2: (0.5, 0.6, 0.7)},
    ("lora", "prefix", 0.2): {1: (0.2, 0.3, 0.9), 2: (0.4, 0.5, 0.7)},
    ("lora", "squeeze", 0.2): {1: (0.4, 0.5, 0.9), 2: (0.4, 0.5, 0.7)},
    ("matryoshka", "masked", 0.1): {1: (0.5, 0.5, 0.5), 2: (0.5, 0.5, 0.5)},
}


@pytest.fixture
def run(tmp_path):
    config = {"data": {"task": "trec"}, "model": {"path": "some/folder/base"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with JsonLines(tmp_path / "curves.jsonl") as records:
        records.write(trial="base", readout="base", at_rank=0, accuracy=0.25)
        for (method, readout, rate), seeds in CURVES.items():
            for seed, accuracies in seeds.items():
                for rank, accuracy in zip((1, 2, 4), accuracies, strict=True):
                    trial = {"method": method, "learning_rate": rate, "seed": seed, "scaling": "none"}
                    records.write(
                        trial=f"{method}{rate}{seed}",
                        rank=4,
                        weights=[],
                        **trial,
                        readout=readout,
                        at_rank=rank,
                        accuracy=accuracy,
                    )
    return tmp_path


def test_rows_are_means_and_deviations_over_seeds(run):
    records = read_rows(run)
    rows = records.rows
    assert records.base == 0.25 and len(rows) == 5 and records.failed == []
    row = next(row for row in rows if (row.method, row.readout, row.learning_rate) == ("lora", "prefix", 0.1))
    assert row.seeds == (1, 2) and list(row.accuracies) == [1, 2, 4]
    assert row.accuracies[1].mean == pytest.approx(0.2) and row.accuracies[1].deviation == pytest.approx(0.02**0.5)
    assert row.log2.mean == pytest.approx(((0.15 + 0.55) / 2 + (0.35 + 0.55) / 2) / 2)
    assert row.linear.mean == pytest.approx(((0.15 + 2 * 0.55) / 3 + (0.35 + 2 * 0.55) / 3) / 2)
    assert row.mean.mean == pytest.approx(2.6 / 6)


def test_best_learning_rate_of_each_method_and_read_out(run):
    best = best_rows(read_rows(run).rows)
    assert {(row.method, row.readout): row.learning_rate for row in best} == {
        ("lora", "prefix"): 0.2,
        ("lora", "squeeze"): 0.1,
        ("matryoshka", "masked"): 0.1,
    }


def test_written_report(run):
    write_report(run)
    text = (run / "table.md").read_text()
    assert text.startswith("# trec on base\n")
    assert "| method | learning rate | base | 1 | 2 | 4 | AURAC linear | AURAC log2 | mean |" in text
    assert "| lora | 0.2 | 0.250 | 0.300 ± 0.141 | 0.400 ± 0.141 | 0.800 ± 0.141 |" in text
    assert "| lora + squeeze | 0.1 |" in text and "| matryoshka (masked) | 0.1 |" in text
    assert "highest AURAC (log2) on this same test split" in text and "Every learning rate" in text
    rows = list(csv.DictReader((run / "table.csv").read_text().splitlines()))
    assert len(rows) == 5 and [row["best"] for row in rows].count("1") == 3
    assert float(rows[0]["rank_1"]) == pytest.approx(0.2) and float(rows[0]["base"]) == 0.25
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_failed_trials_are_named(run):
    lines = (run / "curves.jsonl").read_text().splitlines(keepends=True)
    failed = '{"schema": 1, "trial": "sandwich-lr9", "method": "sandwich", "failed": true}\n'
    (run / "curves.jsonl").write_text("".join([*lines, failed]))
    write_report(run)
    assert "Failed, the loss is not finite: sandwich-lr9." in (run / "table.md").read_text()
    assert len(read_rows(run).rows) == 5
    (run / "curves.jsonl").write_text(lines[0] + failed)
    write_report(run)
    assert "No trial finished. Accuracy of the base: 0.250." in (run / "table.md").read_text()


def test_a_damaged_record_is_named(run):
    with (run / "curves.jsonl").open("a") as file:
        file.write('{"schema": 1, "trial"\n')
    with pytest.raises(ValueError, match=r"curves\.jsonl:32: "):
        read_json_lines(run / "curves.jsonl")


def test_a_record_of_another_schema_is_named(run):
    (run / "curves.jsonl").write_text('{"schema": 7}\n')
    with pytest.raises(ValueError, match=r"curves\.jsonl:1: not a record of schema 1"):
        read_rows(run)
