"""Records: appended in whole lines, dropped when they are not wanted, and readable by any JSON reader."""

import json
import math

import pytest

from mlora_jax.training.records import JsonLines, keep_records, read_json_lines


def test_records_are_appended(tmp_path):
    path = tmp_path / "records.jsonl"
    for start in (0, 2):
        with JsonLines(path) as records:
            records.write({"step": start}, {"step": start + 1})
    assert [record["step"] for record in read_json_lines(path)] == [0, 1, 2, 3]
    assert all(record["schema"] == 1 for record in read_json_lines(path))


def test_a_record_is_on_disk_at_once(tmp_path):
    with JsonLines(tmp_path / "records.jsonl") as records:
        records.write({"step": 1})
        assert read_json_lines(tmp_path / "records.jsonl")[0]["step"] == 1


def test_half_a_line_is_dropped(tmp_path):
    path = tmp_path / "records.jsonl"
    path.write_text('{"schema": 1, "step": 1}\n{"schema": 1, "st')
    with JsonLines(path) as records:
        records.write({"step": 2})
    assert [record["step"] for record in read_json_lines(path)] == [1, 2]


def test_numbers_that_json_lacks_are_null(tmp_path):
    path = tmp_path / "records.jsonl"
    with JsonLines(path) as records:
        records.write({"loss": math.nan, "deep": {"norm": -math.inf}, "rate": 0.5})
    strict = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert strict == {"schema": 1, "loss": None, "deep": {"norm": None}, "rate": 0.5}


def test_keep_some(tmp_path):
    path = tmp_path / "records.jsonl"
    with JsonLines(path) as records:
        for step in range(4):
            records.write({"step": step})
        records.keep(lambda record: record["step"] % 2)
        records.write({"step": 9})
    assert [record["step"] for record in read_json_lines(path)] == [1, 3, 9]
    keep_records(tmp_path / "missing.jsonl", lambda record: True)
    assert not (tmp_path / "missing.jsonl").exists()


@pytest.mark.parametrize("line", ["{", "[1]", '{"step": 1}', '{"schema": 2}'])
def test_a_foreign_line_is_named(tmp_path, line):
    path = tmp_path / "records.jsonl"
    path.write_text('{"schema": 1}\n' + line + "\n")
    with pytest.raises(ValueError, match=r"records.jsonl:2: "):
        read_json_lines(path)
