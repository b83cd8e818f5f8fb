"""The compile report with the TPU compiler; skipped where it is not installed."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from mlora_jax.parallel.chips import has_compiler
from tests.tiny import tiny_config

ROOT = pathlib.Path(__file__).parents[2]
needs_compiler = pytest.mark.skipif(not has_compiler(), reason="no TPU compiler: the extra `tpu` installs it")
TINY = {
    "hidden_size": 256, "intermediate_size": 512, "num_heads": 4, "num_kv_heads": 2, "head_dim": 64,
    "max_position_embeddings": 1024,
}  # fmt: skip


def run(*arguments):
    command = [
        sys.executable,
        "-m",
        "experiments.compile_report",
        "--config",
        "configs/paper_gsm8k_llama32_1b.py",
        *arguments,
    ]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture
def model(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(tiny_config(**TINY).to_hugging_face()))
    return str(tmp_path)


def test_bad_input_ends_in_one_line(model):
    found = run("--topology", "v9z:2x2", "--model", model)
    assert found.returncode == 1 and found.stderr.startswith("error: unknown topology 'v9z:2x2'")


@pytest.mark.slow
@needs_compiler
def test_every_program_and_the_kernel(model, tmp_path):
    records = tmp_path / "records.jsonl"
    length = ("--config.data.max_length=512", "--config.evaluation.max_new_tokens=128")
    # Two chips take half of the heads each.
    mesh = ("--config.parallel.data=2", "--config.parallel.tensor=2")
    common = ("--model", model, "--topology", "v5e:2x2", "--effort", "-1", "--records", str(records), *length, *mesh)
    with_kernel, without = run(*common), run(*common, "--flash_from", "0")
    for found in (with_kernel, without):
        assert found.returncode == 0, found.stderr
        for program in ("train", "prefill", "decode"):
            assert f"{program}, per chip" in found.stdout
        assert "mesh trial 1 x data 2 x fsdp 1 x tensor 2" in found.stdout and "of 15.75 GiB" in found.stdout
    kept = [json.loads(line) for line in records.read_text().splitlines()]
    kernel, plain = (
        {each["key"]["program"]: each for each in kept if (each["key"]["flash_from"] is None) == none}
        for none in (False, True)
    )
    # The kernel computes gradients in two passes, and keeps no scores: a little more to compute, less to move. A row of
    # 512 tokens is one block, so that it leaves nothing out.
    assert plain["train"]["flops"] < kernel["train"]["flops"] < 1.2 * plain["train"]["flops"]
    assert plain["prefill"]["flops"] == kernel["prefill"]["flops"]
    for program in ("train", "prefill"):
        assert kernel[program]["main_bytes"] < 0.95 * plain[program]["main_bytes"]
    # Megatron's sums over `tensor` in every layer, and gradients over `data`.
    assert {(kind, group) for kind, group, *_ in kernel["train"]["collectives"]} >= {("all-reduce", 2)}
    again = run(*common)
    assert again.stdout == with_kernel.stdout and "compiling" not in again.stderr


@pytest.mark.slow
@needs_compiler
def test_a_base_that_does_not_fit():
    """15 GiB of weights on chips of 16, and 16 that are cut in four."""
    shape = ("--model", "Llama-3.1-8B", "--topology", "v5e:2x2", "--program", "train", "--effort", "-1")
    found = run(*shape, "--config.parallel.data=4")
    assert found.returncode == 0, found.stderr
    assert "GiB of 15.75 GiB on every chip" in found.stdout and "raise config.parallel.fsdp" in found.stdout
