"""The compile report without the TPU compiler: layouts, errors, the search, and the programs on a CPU's devices."""

import dataclasses
import json

import jax
import pytest

from mlora_jax.compile_report.layout import choose_layout
from mlora_jax.compile_report.records import FLASH, Record, Records, out_of_memory, too_large
from mlora_jax.compile_report.report import LARGEST, Reporter, Row
from mlora_jax.compile_report.shapes import model_shape
from mlora_jax.compile_report.table import describe, markdown, write_tables
from mlora_jax.config import resolve
from mlora_jax.parallel.chips import CHIPS, GIB, Slice, parse_topology, topology
from mlora_jax.parallel.hlo_text import Shape
from tests.tiny import tiny_config


def four_devices(name):
    """Four of a CPU's devices in place of chips."""
    return Slice(name, CHIPS["v5e"], 4, tuple(jax.devices()[:4]))


OPEN = {"trial": 1, "data": -1, "fsdp": 1, "tensor": 1}


@pytest.mark.parametrize(
    ("chips", "base_gib", "memory_gib", "sizes", "accumulation"),
    [
        (4, 2.3, 16, (1, 4, 1, 1), 8),  # fits as a copy on every chip
        (4, 15.0, 16, (1, 1, 4, 1), 8),  # cut
        (16, 15.0, 16, (1, 4, 4, 1), 2),  # 32 rows on 16 chips
        (256, 15.0, 16, (8, 8, 4, 1), 1),  # more chips than rows: more trials
        (8, 15.0, 95, (1, 8, 1, 1), 4),
        (6, 2.3, 16, (3, 2, 1, 1), 8),
    ],
)
def test_the_layout_that_is_chosen(chips, base_gib, memory_gib, sizes, accumulation):
    amounts = dict(base_bytes=int(base_gib * GIB), memory=memory_gib * GIB)
    found = choose_layout(OPEN, chips=chips, batch=32, accumulation=8, **amounts)
    assert tuple(found.sizes.values()) == sizes and found.accumulation == accumulation and found.chosen


def test_a_layout_that_the_config_gives():
    given = OPEN | {"data": 2, "tensor": -1}
    found = choose_layout(given, chips=8, batch=32, accumulation=4, base_bytes=1, memory=1)
    assert found.sizes == {"trial": 1, "data": 2, "fsdp": 1, "tensor": 4} and not found.chosen
    assert (found.rows, found.accumulation) == (4, 4)
    with pytest.raises(ValueError, match="batch of 3 cannot be cut into data 2 x fsdp 1 = 2 parts"):
        choose_layout(given, chips=8, batch=3, accumulation=1, base_bytes=1, memory=1)


@pytest.mark.parametrize("name", ["v9z:2x2", "v5e", "v5e:2x2x2", "v5p:4x4", "v5e:0x4", "16x16"])
def test_an_unknown_topology_is_refused_before_the_compiler_is_looked_for(name):
    with pytest.raises(ValueError, match=f"unknown topology '{name}'.*v5e:2x2.*v5p:2x2x2.*v5e:16x16"):
        topology(name)


def test_published_numbers():
    """Bytes and FLOPs that are balanced on a v5e, from https://cloud.google.com/tpu/docs/v5e."""
    chip, shape = parse_topology("v5e:16x16")
    assert shape == (16, 16) and chip.flops / chip.memory_bandwidth == pytest.approx(240.5, rel=1e-3)
    assert [name for name in CHIPS if CHIPS[name].flops > chip.flops] == ["v6e", "v5p", "v4"]


def test_the_compilers_error_and_what_to_do():
    message = (
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 20.25G of "
        "15.75G hbm. Exceeded hbm capacity by 4.50G."
    )
    needed, limit = out_of_memory(message)
    assert (needed, limit) == (int(20.25 * GIB), int(15.75 * GIB))
    with pytest.raises(ValueError, match="does not compile: INTERNAL: something"):
        out_of_memory("INTERNAL: something")
    sizes = dict(row_shards=4, rows=2, micro_batches=4)

    def advice(parameters, rows=2):
        record = Record({}, False, needed, limit, parameters, 0, needed - parameters)
        return too_large(record, **sizes | {"rows": rows})

    assert advice(12 * GIB).startswith("does not fit: 20.25 GiB of 15.75 GiB on every chip, 4.50 GiB too much")
    assert "raise config.parallel.fsdp" in advice(12 * GIB)
    assert "raise config.parallel.data, or config.train.accumulation above 4" in advice(GIB)
    assert "raise config.parallel.tensor" in advice(GIB, rows=1)


def test_shapes_of_models(tmp_path):
    for name, layers in (("meta-llama/Llama-3.2-1B-Instruct", 16), ("Llama-3.1-8B", 32)):
        assert model_shape(name).num_layers == layers
    # Parameters as published: 1.24 and 8.03 billion.
    for name, count in (("Llama-3.2-1B", 1.2358e9), ("Llama-3.1-8B", 8.0303e9)):
        shape = model_shape(name)
        width, heads = shape.hidden_size, shape.head_dim * (shape.num_heads + shape.num_kv_heads)
        layer = 2 * width * heads + 3 * width * shape.intermediate_size + 2 * width
        tables = shape.vocab_size * width * (1 if shape.tie_word_embeddings else 2)
        assert tables + shape.num_layers * layer + width == pytest.approx(count, rel=1e-4)
    (tmp_path / "config.json").write_text(json.dumps(tiny_config().to_hugging_face()))
    assert model_shape(str(tmp_path)) == tiny_config()
    with pytest.raises(ValueError, match="the shape of the model 'Llama-9' is not known"):
        model_shape("Llama-9")


def test_flops_of_the_flash_kernels():
    """Blocks of 512 on and below the diagonal, for three rows of 32 heads."""
    queries, keys = Shape("bf16", (3, 32, 2048, 64)), Shape("bf16", (3, 8, 2048, 64))
    operands = [Shape("s8", (1, 4, 4)), queries, keys, keys]
    block = 2 * 64 * 512 * 512
    found = {name: flops(operands) / (3 * 32 * block * (4 + 3 + 2 + 1)) for name, flops in FLASH.items()}
    assert found == {"splash_mha_fwd": 2, "splash_mha_dq": 3, "splash_mha_dkv": 4}


def record(key, needed, limit=16 * GIB, **changes):
    seconds = {"compute": 2.0, "HBM": 3.0, "interconnect": 1.0}
    moved = [["all-gather", 4, 32, 2e9]]
    values = dict(
        fits=needed <= limit, needed=needed, limit=limit, parameters=GIB, optimizer=0, activations=needed - GIB
    )
    values |= dict(flops=1e12, main_bytes=1e9, moved=2e9, collectives=moved, seconds=seconds)
    return Record(key, **values | changes)


def test_records_are_found_again(tmp_path):
    path = tmp_path / "records.jsonl"
    made = []

    def make():
        made.append(1)
        return record({"program": "train"}, GIB)

    first = Records(path).get({"program": "train"}, make)
    again = Records(path)
    assert again.get({"program": "train"}, make) == first and len(made) == 1
    again.get({"program": "train", "rank": 2}, lambda: record({"program": "train", "rank": 2}, GIB))
    assert len(path.read_text().splitlines()) == 2


@pytest.mark.parametrize(("each", "held"), [(0.3, 2.5), (0.011, 15.0), (3.0, 9.0)])
def test_the_largest_batch(monkeypatch, each, held):
    """Memory that grows a little faster than linearly: the largest that fits is found, or nearly, in few attempts."""
    tried = []

    def needed(rows):
        return int((held + each * rows * (1 + rows / 20000)) * GIB)

    def train(self, row, layout):
        tried.append(layout.rows)
        return record({}, needed(layout.rows), parameters=int(held * GIB))

    monkeypatch.setattr(Reporter, "_train", train)
    reporter = Reporter(resolve({}), Records(), flash_from=None, programs=["train"], slices=four_devices)
    result = reporter.result(Row("Llama-3.2-1B", "v5e:2x2", 8, LARGEST))
    most = max(rows for rows in range(1, 5000) if needed(rows) <= 16 * GIB)
    assert result.records["train"].fits and result.layout.accumulation == 1
    rows = result.layout.rows
    assert 0.8 * most <= rows <= most
    assert len(tried) <= 4


TINY = {
    "model": {"dtype": "float32"},
    "data": {"max_length": 32},
    "train": {"batch_size": 8, "accumulation": 2, "loss_chunk": 16},
    "evaluation": {"batch_size": 6, "max_new_tokens": 8},
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A reporter on four of a CPU's devices in place of chips, and the model's folder."""
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps(tiny_config().to_hugging_face()))
    said = []
    return Reporter(resolve(TINY), Records(), flash_from=None, say=said.append, slices=four_devices), str(folder), said


def test_a_row_from_end_to_end(tiny):
    reporter, folder, said = tiny
    row = Row(folder, "v5e:2x2", 4, 8)
    result = reporter.result(row)
    assert set(result.records) == {"train", "prefill", "decode"} and len(said) == 3
    train, prefill, decode = result.records.values()
    assert result.layout.sizes == {"trial": 1, "data": 4, "fsdp": 1, "tensor": 1} and result.requests == 8
    # By hand: weights that a token passes, forward and the gradient of its input, and half of the tokens' logits; that
    # and the factors' own products are most of it.
    shape = tiny_config()
    width, tokens = shape.hidden_size, 8 * 32 // 4
    heads = shape.head_dim * (shape.num_heads + shape.num_kv_heads)
    layers = shape.num_layers * (2 * width * heads + 3 * width * shape.intermediate_size)
    least = tokens * 2 * 2 * (layers + shape.vocab_size * width / 2)
    assert least < train.flops < 2 * least
    assert 2 * tokens * layers < prefill.flops
    # A token of each of the two rows on a chip, through the weights and the head.
    assert 2 * 2 * (layers + shape.vocab_size * width) <= decode.flops < 4 * 2 * (layers + shape.vocab_size * width)
    # Data parallel: gradients of the adapter and scalars, and nothing else.
    factors = train.optimizer / 3
    assert {kind for kind, *_ in train.collectives} == {"all-reduce"}
    assert 1.5 * factors <= train.moved <= 1.6 * factors
    # The next tokens of eight rows.
    assert prefill.moved < 1000 and train.needed > train.parameters + train.optimizer
    text = describe(result)
    for part in ("data 4", "train: batch 8 in 2 micro-batches of 1 rows a chip", "all-reduce over 4 chips", "bound by"):
        assert part in text
    reporter.result(row)
    assert len(said) == 3


def test_gates_and_a_proximal_step_are_part_of_the_program(tiny):
    """Four numbers more in every adapted matrix, with as many gradients, moments and bytes to reduce."""
    reporter, folder, _ = tiny
    own = {"methods": {"gated": (("lora", 1.0, "", "soft_threshold"), "gate")}, "trials": {"method": ("gated",)}}
    gated = Reporter(resolve({**TINY, **own}), records := Records(), flash_from=None, slices=four_devices)
    row = Row(folder, "v5e:2x2", 4, 8)
    plain, other = (each.result(row).records["train"] for each in (reporter, gated))
    ungated = Reporter(resolve({**TINY, "methods": own["methods"]}), records, flash_from=None, slices=four_devices)
    assert ungated.result(row).records["train"].optimizer == plain.optimizer  # not the gated program from the records
    gates = 4 * 7 * tiny_config().num_layers
    assert other.optimizer - plain.optimizer == pytest.approx(3 * 4 * gates, rel=0.05)
    assert other.moved > plain.moved


def test_the_table(tiny, tmp_path):
    reporter, folder, _ = tiny
    result = reporter.result(Row(folder, "v5e:2x2", 4, 8))
    lacking = record({}, 20 * GIB)
    failing = dataclasses.replace(result, records={"train": lacking})
    path = tmp_path / "report.md"
    path.write_text("# Title\n\nText.\n\n## Old\n\n| x |\n")
    write_tables(path, markdown([result, failing]))
    text = path.read_text()
    assert text.startswith("# Title\n\nText.\n\n## Training\n\n| slice |") and "Old" not in text
    tables = [[line.count("|") for line in part.splitlines() if line] for part in text.split("## ")[1:]]
    assert [len(lines) - 1 for lines in tables] == [4, 3] and all(len(set(lines[1:])) == 1 for lines in tables)
    assert "4.00 GiB too much" in text and "## Prefill and decode" in text
