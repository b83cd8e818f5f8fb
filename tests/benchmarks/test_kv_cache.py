"""The page on the KV cache, the example on it, and the whole measurement with tiny sizes."""

import json
import re

import pytest

from benchmarks import records
from benchmarks.kv_cache import areas
from benchmarks.kv_cache_page import FIGURE, PAGE, page, write_page
from tests.benchmarks.test_small import run
from tests.tiny import write_checkpoint


def cell(budget, accuracy, perplexity, **speed):
    scores = {"accuracy": accuracy, "standard_error": 0.02, "same": 0.9, "items": 100, "metric": "acc"}
    values = {"budget": budget, "bytes_per_token": int(1000 * budget), "perplexity": perplexity, "divergence": 0.1}
    return values | {"accuracies": {"arc_easy": scores}} | speed


def made_record():
    timed = {"cache_bytes": 2**20, "tokens_per_second": 12.34, "times": 1.5}
    peers = {
        "pca": {"cells": [cell(1.0, 0.5, 10.0), cell(0.4, 0.3, 40.0)]},
        "searched": {"cells": [cell(1.0, 0.5, 10.0, **timed), cell(0.4, 0.49, 12.0, **timed)]},
    }
    for values in peers.values():
        values["areas"] = areas(values["cells"])
    settings = {
        "about": "a-model", "tasks": "arc_easy", "shots": 0, "limit": 100, "steps": 300, "length": 512,
        "test_rows": 16, "context": 2048, "rows": 1, "decoded": 32, "repeats": 5, "dtype": "float32",
        "training_seconds": 120.0, "config": {"train": {"batch_size": 4}},
    }  # fmt: skip
    return records.new_record("kv_cache", "a-model", settings, peers, made=records.origin())


def test_areas_are_means_over_bytes():
    found = areas([cell(1.0, 0.5, 10.0), cell(0.5, 0.4, 10.0), cell(0.4, 0.2, 10.0)])
    assert found["arc_easy"] == pytest.approx((0.45 * 500 + 0.3 * 100) / 600)
    assert found["log_perplexity"] == pytest.approx(2.302585, abs=1e-5)


def test_the_page_has_a_row_for_every_budget_and_way():
    text = page([made_record()])
    rows = text.splitlines()
    assert "| 40% | PCA, one rank | 400 | 40.000 | 0.300 ± 0.020 | 90.0% |  |  |  |" in rows
    assert "| 40% | trained, searched ranks | 400 | 12.000 | 0.490 ± 0.020 | 90.0% | 1.00 | 12.3 | 1.50 |" in rows
    assert "| trained, searched ranks | 2.3937 | 0.4950 |" in rows
    assert "accuracy on arc_easy is: PCA, one rank 40.0%; trained, searched ranks 2.0%." in text
    assert "which took 2 minutes with the search" in text and FIGURE in text


def test_the_page_is_written_with_its_figure(tmp_path):
    file = tmp_path / "kv_cache.md"
    assert "There is no record yet." in write_page(tmp_path, file).read_text()
    assert not (tmp_path / FIGURE).exists()
    records.append(made_record(), tmp_path)
    write_page(tmp_path, file)
    assert (tmp_path / FIGURE).read_bytes().startswith(b"\x89PNG") and "a-model" in file.read_text()


@pytest.mark.slow
def test_the_example_on_the_page_runs(tmp_path, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", page([]), flags=re.DOTALL)
    folder = write_checkpoint(tmp_path / "model", max_position_embeddings=256)
    texts = tmp_path / "text.json"
    texts.write_text(json.dumps([f"Who wrote {word} ? It was the king." for word in ("ab", "cd", "ef") * 60]))
    for name, value in (("HuggingFaceTB/SmolLM2-135M-Instruct", folder), ("TEXT.json", texts)):
        assert name in code
        code = code.replace(name, str(value))
    exec(compile(code, "example", "exec"), {})
    one, searched, size = capsys.readouterr().out.splitlines()
    assert one.startswith("one rank Measured(") and searched.startswith("searched Measured(")
    assert size == "16384 bytes instead of 32768"


@pytest.mark.slow
def test_the_whole_measurement_with_tiny_sizes():
    (record,) = run("kv_cache")
    cells = {(way, cell["budget"]): cell for way, values in record["peers"].items() for cell in values["cells"]}
    assert len(cells) == 15 and record["settings"]["steps"] == 2
    for (way, budget), each in cells.items():
        assert budget - 0.25 <= each["bytes_per_token"] / 256 <= budget
        assert each["accuracies"]["arc_easy"]["items"] == 2 and each["perplexity"] > 1
        if way != "pca":
            assert each["cache_bytes"] == each["bytes_per_token"] * 32 * 2 and each["tokens_per_second"] > 0
    assert cells["pca", 1.0]["divergence"] < 1e-5 < cells["pca", 0.25]["divergence"]
    assert set(record["peers"]["searched"]["areas"]) == {"log_perplexity", "arc_easy"}


def test_the_committed_page_is_that_of_the_records():
    assert PAGE.read_text(encoding="utf-8") == page([*records.latest(records.read("kv_cache")).values()])
