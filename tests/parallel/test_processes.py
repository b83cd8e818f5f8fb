"""Two processes of four devices each train, die, go on, evaluate, and end where one process on one device ends."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from safetensors.numpy import load_file

from mlora_jax.training.records import read_json_lines
from tests.tiny import write_config

ROOT = pathlib.Path(__file__).parents[2]
FORCED = "--xla_force_host_platform_device_count={}"


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> pathlib.Path:
    root = tmp_path_factory.mktemp("inputs")
    values = {
        "model": {"path": "quickstart"},
        "data": {"task": "quickstart", "limit": 96, "cache_dir": str(root / "cache")},
        # A squeeze between its phases, and profiles per example behind it.
        "trials": {
            "method": ("renest",),
            "learning_rate": (0.003, 0.03),
            "seed": (1,),
            "scaling": ("sqrt",),
            "rank": (6,),
        },
        "train": {"epochs": 5, "batch_size": 32, "accumulation": 2, "log_every": 1, "trials_at_once": 2},
        "validation": {"holdout": 0.2, "limit": 32, "every": 6, "keep": "best"},
        "evaluation": {"limit": 48},
        "checkpoint": {"every": 3},
        "compilation": {"cache": str(root / "programs")},  # a run of one process fills it, one of two leaves it alone
    }
    return write_config(root / "config.py", values)


def start(config: pathlib.Path, workdir: pathlib.Path, devices: int, *options: str) -> subprocess.Popen:
    flags = " ".join(flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag)
    environment = os.environ | {"XLA_FLAGS": f"{flags} {FORCED.format(devices)}", "PYTHONUNBUFFERED": "1"}
    # Gloo's connections refuse programs from a cache that other processes have filled, also from this variable's.
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    command = [sys.executable, "-m", "experiments.run", "--config", str(config), "--workdir", str(workdir), *options]
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=environment, **output)


def start_two(config: pathlib.Path, workdir: pathlib.Path, *options: str) -> list[subprocess.Popen]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    shared = ("--config.parallel.distributed=True", f"--config.parallel.coordinator_address={address}", *options)
    own = lambda number: ("--config.parallel.num_processes=2", f"--config.parallel.process_id={number}")  # noqa: E731
    return [start(config, workdir, 4, *shared, *own(number)) for number in range(2)]


def finish(*processes: subprocess.Popen) -> list[str]:
    texts = [process.communicate(timeout=900)[0] for process in processes]
    for number, (process, text) in enumerate(zip(processes, texts, strict=True)):
        print(f"--- process {number}\n{text}")
        assert process.returncode == 0, text[-3000:]
    return texts


def wait_for_step(workdir: pathlib.Path, step: int) -> None:
    end = time.monotonic() + 600
    while time.monotonic() < end:
        file = workdir / "metrics.jsonl"
        if file.is_file() and any(record["step"] >= step for record in read_json_lines(file)):
            return
        time.sleep(0.2)
    raise AssertionError(f"{workdir} did not come to step {step}")


def check_equal(workdir: pathlib.Path, reference: pathlib.Path) -> None:
    losses = [
        {(r["trial"], r["step"]): r["loss"] for r in read_json_lines(path / "metrics.jsonl") if "loss" in r}
        for path in (workdir, reference)
    ]
    assert losses[0].keys() == losses[1].keys()
    for key, loss in losses[1].items():
        assert losses[0][key] == pytest.approx(loss, rel=1e-4), key
    names = sorted(path.name for path in (reference / "adapters").iterdir())
    assert names == sorted(path.name for path in (workdir / "adapters").iterdir()) and len(names) == 2
    for name in names:
        (file,) = (reference / "adapters" / name).glob("*.safetensors")
        expected, found = load_file(file), load_file(workdir / "adapters" / name / file.name)
        assert expected.keys() == found.keys()
        for tensor, values in expected.items():
            distance = np.linalg.norm(found[tensor] - values) / np.linalg.norm(values)
            assert distance < 1e-3, (name, tensor, distance)  # the squeeze and Adam's quotient multiply rounding
    curves = [
        {(r["trial"], r["split"], r["at_rank"]): r["accuracy"] for r in read_json_lines(path / "curves.jsonl")}
        for path in (workdir, reference)
    ]
    assert curves[0] == curves[1] and len(set(curves[0].values())) > 2


@pytest.mark.slow
def test_two_processes_die_go_on_and_equal_one(config, tmp_path):
    finish(start(config, tmp_path / "one", 1))
    two = start_two(config, tmp_path / "two", "--config.parallel.fsdp=2")
    wait_for_step(tmp_path / "two", 8)
    for process in two:
        process.kill()
    for process in two:
        process.communicate()
    first, second = finish(*start_two(config, tmp_path / "two", "--config.parallel.fsdp=2"))
    assert "8 x cpu (data 4, fsdp 2, 2 processes)" in first
    assert "goes on from step 6" in first or "goes on from step 9" in first
    assert "AURAC" in first and not any("AURAC" in line for line in second.splitlines())  # the first one writes
    check_equal(tmp_path / "two", tmp_path / "one")


@pytest.mark.slow
def test_a_signal_to_one_process_stops_both_and_another_number_of_devices_goes_on(config, tmp_path):
    finish(start(config, tmp_path / "one", 1))
    two = start_two(config, tmp_path / "moved", "--config.parallel.tensor=2")
    wait_for_step(tmp_path / "moved", 4)
    two[1].send_signal(signal.SIGTERM)
    texts = [process.communicate(timeout=600)[0] for process in two]
    assert [process.returncode for process in two] == [143, 143], texts
    assert "stopped by a signal, all is saved" in texts[0]
    (text,) = finish(start(config, tmp_path / "moved", 2, "--config.parallel.fsdp=2"))
    assert "goes on from step" in text and "2 x cpu (fsdp 2)" in text
    check_equal(tmp_path / "moved", tmp_path / "one")


@pytest.mark.slow
def test_what_the_first_process_refuses_all_refuse(config, tmp_path):
    finish(start(config, tmp_path / "run", 1, "--config.train.epochs=1"))
    for process in start_two(config, tmp_path / "run", "--config.train.epochs=2"):
        text = process.communicate(timeout=300)[0]
        assert process.returncode == 1 and "holds a run of another config" in text, text[-2000:]


def test_an_address_without_a_number_of_processes(config, tmp_path):
    from mlora_jax.parallel import hosts

    options = {"distributed": True, "coordinator_address": "127.0.0.1:1", "num_processes": 0, "process_id": 1}
    with pytest.raises(ValueError, match=r"needs config\.parallel\.num_processes too"):
        hosts.join(options)
    assert hosts.count() == 1 and hosts.is_first() and hosts.broadcast({"a": 1}) == {"a": 1} and hosts.largest(3) == 3
