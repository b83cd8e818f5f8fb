"""Training on a mesh of eight forced CPU devices gives what one device gives, and moves what it should."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
HIDDEN, INNER, LAYERS, VOCABULARY, R, TRIALS = 64, 96, 3, 128, 6, 4
MIXED = {"data": 2, "fsdp": 2, "tensor": 2}
PER_LAYER = 4 * 2 * HIDDEN + 2 * (HIDDEN + INNER) + (INNER + HIDDEN)
FACTORS = R * (LAYERS * PER_LAYER + HIDDEN + VOCABULARY)  # numbers of one adapter
KERNELS = LAYERS * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * INNER) + 2 * VOCABULARY * HIDDEN  # and of the base


def compare(*options, meshes=None) -> list[dict]:
    """The lines of the benchmark, in a process of its own: devices are forced before jax is imported."""
    command = [sys.executable, "-m", "benchmarks.meshes", *options]
    command += ["--meshes", json.dumps(meshes)] if meshes else []
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"PYTHONWARNINGS": ""})
    assert found.returncode == 0, found.stderr[-3000:]
    return [json.loads(line) for line in found.stdout.splitlines()]


def check(records: list[dict], tolerance: float, itemsize: int) -> None:
    assert records[0]["mesh"] == {} and len(records) > 1
    for record in records[1:]:
        mesh = record["mesh"]
        assert record["losses"] < tolerance and record["adapter"] < tolerance, record
        # What is cut lies on a device in parts, but for norms and counters.
        assert record["base_bytes"] < itemsize * (KERNELS / (mesh.get("fsdp", 1) * mesh.get("tensor", 1)) + 2000)
        trials = TRIALS // mesh.get("trial", 1)
        if "tensor" not in mesh:
            assert record["state_bytes"] < trials * (itemsize * 3 * FACTORS / mesh.get("fsdp", 1) + 100)
        if "fsdp" in mesh:
            # One layer at a time: a kernel's part of it, a factor of all trials, or the table of tokens.
            assert 0 < record["largest_gather"] <= max(HIDDEN * INNER, VOCABULARY * HIDDEN) < LAYERS * HIDDEN * HIDDEN
        if set(mesh) <= {"data", "engine"}:
            # Gradients of the factors, once a step whatever the accumulation; the loss and the count of answers.
            assert set(record["moved"]) == {"all-reduce"}
            assert record["moved"]["all-reduce"]["bytes"] == TRIALS * (itemsize * FACTORS + itemsize) + 4 * TRIALS


def test_rows_on_eight_devices_and_a_mixed_mesh():
    check(compare("--steps", "2", meshes=[{}, {"data": 8}, MIXED]), 1e-5, 4)


@pytest.mark.slow
@pytest.mark.parametrize(("options", "tolerance", "itemsize"), [((), 1e-5, 4), (("--float64",), 1e-9, 8)])
def test_every_mesh_for_twenty_steps(options, tolerance, itemsize):
    check(compare(*options), tolerance, itemsize)


@pytest.mark.slow
def test_a_profile_for_every_example():
    meshes = [{}, {"data": 8}, {"data": 8, "engine": "pmap"}, {"trial": 2, "fsdp": 2, "tensor": 2}]
    check(compare("--method", "per_example", meshes=meshes), 1e-5, 4)
