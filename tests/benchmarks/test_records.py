"""The records of the speed benchmarks, the page that is made of them, and the order in which peers take turns."""

import json

import pytest

from benchmarks import gpu, records, shapes
from benchmarks.page import PAGE, page
from benchmarks.profile import part_seconds
from benchmarks.workers import WorkerError, compare, in_turns

MEASURED = {
    **records.measurements([2.0, 1.0, 4.0], 800, unit="tokens", first=12.0),
    "first_loss": 3.25,
    "loaded_mib": 300.0,
    "peak_mib": 1234.5,
    "executables": 3,
}
SETTINGS = {"about": "a model", "batch": 8, "steps": 4, "repeats": 3, "threads": 2, "tokens": 800, "targets": 500}


def training_record(**peers):
    return records.new_record("training", "a-shape", SETTINGS, {"ours": MEASURED, **peers}, made=records.origin())


def test_measurements_are_medians_with_their_spread():
    assert MEASURED["seconds"] == [2.0, 1.0, 4.0]
    assert MEASURED["tokens_per_second"] == {"median": 400.0, "low": 200.0, "high": 800.0}
    assert MEASURED["compile_seconds"] == 10.0  # the first pass without its own work


def test_a_first_pass_faster_than_the_median_compiled_nothing():
    assert records.measurements([2.0], 1, unit="tokens", first=1.0)["compile_seconds"] == 0.0


def test_a_record_is_one_line_with_its_origin(tmp_path):
    record = training_record()
    assert tuple(record) == records.KEYS
    assert record["versions"]["jax"] and record["hardware"]["cores"] > 0
    file = records.append(record, tmp_path / "new")
    assert file.name == "training.jsonl" and len(file.read_text().splitlines()) == 1
    assert records.read("training", tmp_path / "new") == [json.loads(json.dumps(record))]
    assert records.read("generation", tmp_path) == []


def test_a_record_without_a_key_is_refused(tmp_path):
    record = training_record()
    del record["hardware"]
    with pytest.raises(ValueError, match="hardware"):
        records.append(record, tmp_path)


def test_the_last_record_of_a_shape_counts():
    old, new = training_record(), training_record()
    assert records.latest([old, new])["a-shape"] is new


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("no file /home/someone/models/a/config.json here", "no file config.json here"),
        ("1/2 of the rows\nand more", "1/2 of the rows"),
        ("", ""),
    ],
)
def test_messages_lose_their_paths(message, shown):
    assert records.without_paths(message) == shown


def test_the_page_has_a_row_for_every_peer():
    slower = {**MEASURED, **records.measurements([8.0], 800, unit="tokens", first=9.0), "executables": 0}
    text = page([training_record(peft=slower, peft_compiled={"error": "InductorError: no | compiler"})], [], [], [])
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert "| this package | 400 (200 to 800) |  | 1,234 | 10.0 | 3 |  |  | 3.2500 |" in rows
    assert "| PEFT, eager | 100 (100 to 100) | 4.00 | 1,234 |  | 0 |  |  | 3.2500 |" in rows
    assert r"| PEFT, `torch.compile` | error: InductorError: no \| compiler |  |  |  |  |  |  |  |" in rows
    assert "4 steps of 8 examples, 800 tokens" in text and "2 threads" in text
    assert "no record of generation" in text and "The GPU part has not been run." in text


def test_the_page_shows_the_parts_of_a_step():
    parts = [{"products": 3.0, "the rest": 1.0}, {"products": 1.0}]
    made = records.origin()
    found = [
        records.new_record("profile", str(n), {"about": f"shape {n}"}, {"ours": {"parts": each}}, made=made)
        for n, each in enumerate(parts)
    ]
    text = page([training_record(peft=MEASURED)], found, [], [])
    assert "|  | shape 0 | shape 1 |" in text
    assert "| products | 75.0% | 100.0% |\n| the rest | 25.0% | 0.0% |" in text


def test_an_operation_belongs_to_one_part_of_a_step():
    program = """
  %while.1 = (f32[2]) while(%t), metadata={op_name="jit(alone)/while"}
  %dot.7 = f32[2]{0} dot(%a, %b), metadata={op_name="jit(alone)/transpose(jvp())/adapter/dot_general"}
  ROOT %fusion.2 = f32[2]{0} fusion(%dot.7), metadata={op_name="jit(alone)/attention/dot_general"}
  %copy.3 = f32[2]{0} copy(%dot.7)
"""
    found = part_seconds({"while.1": 9.0, "dot.7": 1.0, "fusion.2": 2.0, "copy.3": 3.0, "unknown.4": 4.0}, program)
    assert {part: seconds for part, seconds in found.items() if seconds} == {
        "attention without its projections": 2.0,
        "products with the adapter's factors": 1.0,
        "copies of the loop over layers": 3.0,
        "optimizer, norms, activations and the rest": 4.0,
    }


def test_the_page_shows_generation_and_gpu():
    made = records.origin()
    answers = {**MEASURED, **records.measurements([7.0], 700, unit="answers", first=9.0), "equal": 0.995}
    settings = {**SETTINGS, "items": 100, "task": "gsm8k", "shots": 0, "ranks": [0, 1], "gen_tokens": 128}
    settings |= {"batch_size": 16, "adapter": "trained"}
    generation = records.new_record("generation", "m", settings, {"ours": answers, "harness": answers}, made=made)
    used = {**MEASURED, "utilisation": 0.41, "device_peak_mib": 20480.0}
    part = records.new_record(
        "gpu", "p", {"about": "a part", "work": "8 steps", "repeats": 3}, {"ours": used}, made=made
    )
    text = page([], [], [generation], [part])
    assert "99.5%" in text and "| 1.00 |" in text
    assert "| this package | 400 (200 to 800) | 41.0% | 20,480 | 10.0 |" in text
    assert "no record of training" in text and "has not been run" not in text


def test_the_page_in_the_docs_is_that_of_the_results():
    found = (records.read(name) for name in ("training", "profile", "generation", "gpu"))
    assert PAGE.read_text(encoding="utf-8") == page(*found), "run `python -m benchmarks.training --page`"


def test_every_peer_is_first_in_turn():
    order = [*in_turns(["a", "b", "c"], 3)]
    assert order[0::3] == ["a", "b", "c"]
    assert all(sorted(order[start : start + 3]) == ["a", "b", "c"] for start in (0, 3, 6))
    assert [*in_turns([], 2)] == []


class FakeWorker:
    """Answers like a worker; from its call number `broken` on it raises."""

    def __init__(self, name, calls, broken=None):
        self.name, self.calls, self.broken, self.count = name, calls, broken, 0

    def ask(self, method):
        self.calls.append((self.name, method))
        self.count += 1
        if self.broken is not None and self.count > self.broken:
            raise WorkerError("it broke")
        return {"seconds": float(self.count)}


def test_peers_take_turns_after_a_first_pass():
    calls = []
    found = compare({name: FakeWorker(name, calls) for name in "ab"}, repeats=2, say=lambda line: None)
    assert [name for name, method in calls if method == "run"] == ["a", "b", "a", "b", "b", "a"]
    assert found["a"]["first"] == {"seconds": 2.0} and [run["seconds"] for run in found["a"]["runs"]] == [3.0, 4.0]


@pytest.mark.parametrize("broken", [0, 1, 2])
def test_a_peer_that_fails_does_not_stop_the_others(broken):
    calls = []
    workers = {"a": FakeWorker("a", calls, broken=broken), "b": FakeWorker("b", calls)}
    found = compare(workers, repeats=2, say=lambda line: None)
    assert found["a"]["error"] == "it broke" and len(found["b"]["runs"]) == 2
    assert sum(name == "a" for name, _ in calls) == broken + 1  # it is not asked again


def test_a_tokenizer_is_cut_to_a_vocabulary():
    vocabulary = {"<s>": 0, "a": 1, "b": 2, "c": 3, "ab": 4, "abc": 5}
    whole = {
        "model": {"type": "BPE", "vocab": vocabulary, "merges": [["a", "b"], "ab c"]},
        "added_tokens": [{"id": 0, "content": "<s>"}],
    }
    cut = shapes.cut_tokenizer(whole, 5)
    assert cut["model"]["vocab"] == {"<s>": 0, "a": 1, "b": 2, "c": 3, "ab": 4}
    assert cut["model"]["merges"] == [["a", "b"]] and cut["added_tokens"] == whole["added_tokens"]
    assert shapes.cut_tokenizer(whole, 6) == whole
    with pytest.raises(ValueError, match="Unigram"):
        shapes.cut_tokenizer({"model": {"type": "Unigram", "vocab": vocabulary}}, 5)


def test_rows_are_as_long_as_asked(tmp_path):
    file = shapes.write_rows(
        tmp_path / "rows.jsonl", ["one two", "three"], rows=2, length=8, count_tokens=lambda text: len(text.split())
    )
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(rows) == 2
    for row in rows:
        assert len(row["prompt"].split()) >= 4 and len(row["completion"].split()) >= 8


def test_the_flops_of_a_model_are_those_of_its_kernels():
    config = {**shapes.TINY, "num_hidden_layers": 1}
    part = gpu.Part("", config, {}, rows=1, row=16, rank=4, steps=1)
    kernels = [(32, 32), (16, 32), (16, 32), (32, 32), (48, 32), (48, 32), (32, 48)]
    frozen = sum(rows * columns for rows, columns in kernels)
    adapter = 4 * sum(rows + columns for rows, columns in kernels)
    attention = 3 * 2 * 16**2 * 32  # forward and twice backward
    assert gpu.model_flops(part, 16, 8) == 16 * (4 * frozen + 6 * adapter) + attention + 8 * 4 * 512 * 32
