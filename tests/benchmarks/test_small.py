"""The speed benchmarks run with tiny sizes, each peer in a process of its own."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
pytestmark = pytest.mark.slow


def run(module, *options) -> list[dict]:
    """The records of a benchmark. Warnings of the peers' libraries are not ours."""
    command = [sys.executable, "-m", f"benchmarks.{module}", "--small", "--repeats", "1", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"PYTHONWARNINGS": ""})
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def need(*packages):
    for package in packages:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")


def test_training_beside_peft():
    need("torch", "peft", "transformers")
    (record,) = run("training", "--peers", "ours,peft")  # compiling takes torch a minute or more
    ours, peft = record["peers"]["ours"], record["peers"]["peft"]
    # The base's loss on the same answer tokens: both train the same examples.
    assert ours["first_loss"] == pytest.approx(peft["first_loss"], abs=1e-4)
    assert record["settings"]["sequences"] == 8
    assert 0 < record["settings"]["targets"] < record["settings"]["tokens"]
    for peer in (ours, peft):
        assert len(peer["seconds"]) == 1 and peer["tokens_per_second"]["median"] > 0
        assert peer["peak_mib"] >= peer["loaded_mib"] > 0
    assert ours["executables"] >= 1


def test_the_parts_of_a_step_take_most_of_its_time():
    command = [sys.executable, "-m", "benchmarks.profile", "--small", "--threads", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    ours = json.loads(done.stdout)["peers"]["ours"]
    parts = ours["parts"]
    assert parts["logits and loss"] > 0 and parts["attention without its projections"] > 0
    assert 0.3 * ours["seconds"] < sum(parts.values()) < 2 * ours["seconds"]


def test_generation_beside_the_harness_and_generate():
    need("torch", "transformers", "accelerate")
    (record,) = run("generation")
    peers = record["peers"]
    assert set(peers) == {"ours", "harness", "generate"}
    assert peers["harness"]["equal"] == peers["generate"]["equal"] == 1.0
    assert record["settings"]["items"] == 2 and record["settings"]["ranks"] == [0, 4]
    assert peers["ours"]["accuracies"] == peers["harness"]["accuracies"]


def test_the_gpu_program_on_a_cpu():
    parts = {record["shape"]: record for record in run("gpu", "--parts", "grid-small,decode-small")}
    (together,) = parts["grid-small"]["peers"].values()
    assert together["tokens_per_second"]["median"] > 0 and together["flops_per_second"] > 0
    assert together["executables"] == 1
    assert together["utilisation"] is None  # the peak of a CPU is not known
    decoding = parts["decode-small"]["peers"]["ours"]
    assert decoding["executables"] == 2 and decoding["tokens_per_second"]["median"] > 0


def test_no_peer_starts_without_time():
    records = run("gpu", "--minutes", "0")
    assert len(records) == 3
    assert {peer["skipped"] for record in records for peer in record["peers"].values()} == {"no time was left"}
