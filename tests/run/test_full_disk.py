"""A full disk: one line that names the file, nothing lost, and what was trained after it is what it would have been."""

# ruff: noqa: F401, F811 (fixtures of another file)
import contextlib
import errno
import os
import re
import resource
import subprocess
import sys
import time
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from mlora_jax.core import RankHierarchy
from mlora_jax.disk import DiskFullError, disk_full, lack_of_room, write_aside
from mlora_jax.run import batch as run_batch
from mlora_jax.run import train as run
from mlora_jax.run.folder import RunFolder
from mlora_jax.training.adapter_file import save_adapter
from mlora_jax.training.checkpoint import Checkpoints, what_stands
from mlora_jax.training.curve_records import CurveRecord
from mlora_jax.training.records import JsonLines, read_json_lines

# Its fixtures are of the run that is interrupted here by a disk instead of a signal.
from tests.run.test_resume import (
    ROOT,
    command,
    config,
    finish,
    in_process,
    never_stopped,
    outcome,
    phased,
    resumed_from,
    saved_steps,
    start,
    undisturbed,
)

MEGABYTE = 1 << 20


class Disk:
    """A small file system of its own, which can be filled up to so many bytes, and emptied."""

    def __init__(self, folder):
        self.folder, self.ballast = folder, folder / "ballast"

    def fill(self, *, but=0):
        self.empty()
        left = os.statvfs(self.folder).f_bavail * os.statvfs(self.folder).f_frsize - but
        with self.ballast.open("wb", buffering=0) as file:
            with contextlib.suppress(OSError):
                while left > 0:
                    left -= file.write(bytes(min(left, MEGABYTE)))

    def empty(self):
        self.ballast.unlink(missing_ok=True)


@pytest.fixture
def disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root can mount a small disk, and not everywhere")
    yield Disk(folder)
    subprocess.run(["umount", "-l", str(folder)], check=True)


STAGES = {
    # what is about to be written -> (the function before which the disk fills up, bytes left, file, whether a
    # checkpoint is there by then)
    "config.json": ((run, "RunFolder"), 0, r"run/config\.json", False),
    "batches.json": ((RunFolder, "add"), 0, r"run/batches\.json", False),
    "verdicts": ((RunFolder, "save_verdicts"), 0, r"run/verdicts/test/base-base\.npy", False),
    "curves.jsonl": ((CurveRecord, "to_lines"), 0, r"run/curves\.jsonl", False),
    "metrics.jsonl": ((run, "train_batch"), 0, r"run/metrics\.jsonl", False),
    "the folder of a checkpoint": ((Checkpoints, "save"), 0, r"the checkpoint of step \d+ in .*batch-0000", True),
    "a checkpoint": ((Checkpoints, "save"), 12288, r"the checkpoint of step \d+ in .*batch-0000", True),
    "an adapter": ((run_batch, "save_adapter"), 0, r"adapters/\S+/adapter\.safetensors", True),
    "the ledger at the end": ((RunFolder, "finish"), 0, r"run/batches\.json", True),
}


# One for each way of writing; the others write by the same functions.
EVERYDAY = ("curves.jsonl", "a checkpoint", "an adapter", "the ledger at the end")


@pytest.mark.parametrize(
    "stage", [each if each in EVERYDAY else pytest.param(each, marks=pytest.mark.slow) for each in STAGES]
)
def test_what_found_no_room_is_named_and_nothing_is_lost(
    in_process, never_stopped, disk, monkeypatch, capfd, caplog, stage
):
    (owner, name), but, file, after_a_checkpoint = STAGES[stage]
    original, workdir, calls = getattr(owner, name), disk.folder / "run", []

    def fill_and_write(*arguments, **options):
        if not after_a_checkpoint or saved_steps(workdir):
            calls.append(name)
            if len(calls) == 1:
                disk.fill(but=but)
        return original(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fill_and_write)
        with pytest.raises(DiskFullError, match=rf"{file} could not be written: the disk is full") as caught:
            in_process(workdir, last=99, killed=True)  # a checkpoint after every step
    steps = saved_steps(workdir)
    assert bool(steps) == after_a_checkpoint
    said = str(caught.value)
    assert "\n" not in said and re.search(r"were free|that were free", said)
    assert said.endswith("Make room there, and run the same command again")
    stands = f"The last good checkpoint stands: step {steps[-1]} of batch-0000" if steps else "finished before stands"
    assert stands in said
    assert "Traceback" not in caplog.text + capfd.readouterr().err
    assert not list(workdir.glob("**/*.partial")) and not list(workdir.glob("**/*tmp*"))
    disk.empty()
    in_process(workdir)
    assert resumed_from(capfd.readouterr().out) == steps[-1:]
    assert outcome(workdir) == never_stopped
    disk.fill(but=24576)
    with pytest.raises(DiskFullError, match=r"run/\S+\.(md|tex|csv|png) could not be written: the disk is full"):
        run.write_report(workdir)


def stop_by_a_full_disk(config, disk, tmp_path):
    """Runs the command until its first checkpoint is there, fills the disk, and gives the step that it says stands."""
    process = start(command(tmp_path, config, disk.folder / "run"), config)
    while not saved_steps(disk.folder / "run"):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.005)
    disk.fill()
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 1, output
    line = re.fullmatch(
        r"error: .* could not be written: the disk is full.* were free.*\. The last good checkpoint stands: "
        r"step (\d+) of batch-0000\. Make room there, and run the same command again",
        output.splitlines()[-1],
    )
    assert line, output
    assert all(word not in output for word in ("Traceback", "ERROR", "No space left", "Event loop")), output
    return int(line[1])


def test_the_command_ends_in_one_line(config, disk, tmp_path):
    """Whatever is being written when room ends, by whichever thread."""
    trials = {**config["trials"], "list": ({"method": "lora"},)}
    small = {**config, "trials": trials, "checkpoint": {"every": 1}, "validation": {}}
    step = stop_by_a_full_disk(small, disk, tmp_path)
    assert step == saved_steps(disk.folder / "run")[-1]


@pytest.mark.slow
def test_the_command_goes_on_when_there_is_room(config, undisturbed, disk, tmp_path):
    step = stop_by_a_full_disk(config, disk, tmp_path)
    disk.empty()
    assert resumed_from(finish(start(command(tmp_path, config, disk.folder / "run"), config))) == [step]
    assert outcome(disk.folder / "run") == undisturbed[0]


TENSORBOARD = """
import sys, time
from mlora_jax.training.trackers import TensorBoard
board = TensorBoard(sys.argv[1])
try:
    for step in range(3000):
        board.write({"trial": "a", "step": step, "time": 0.0, "loss": 1.0})
        time.sleep(0.001)
except OSError as error:
    sys.exit(f"error: {error}")
finally:
    board.close()
"""


def test_tensorboard_neither_hangs_nor_prints_a_traceback(disk):
    """Its thread ends where there is no room, and nobody empties its queue from then on."""
    disk.fill(but=8192)
    done = subprocess.run(
        [sys.executable, "-c", TENSORBOARD, str(disk.folder / "board")],
        cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 1
    assert re.fullmatch(
        r"error: .*/board/a could not be written: the disk is full, .* were free\. Make .*\n", done.stderr
    )


@contextlib.contextmanager
def no_file_above(size):
    """What an ordinary user can have instead of a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def write_records(folder):
    with JsonLines(folder / "records.jsonl") as records:
        records.write({"step": 1})
        records.write(*({"step": step, "text": "x" * 100} for step in range(2, 200)))


def write_text(folder):
    with write_aside(folder / "config.json") as aside:
        aside.write_text("x" * 20000)


def write_array(folder):
    with write_aside(folder / "base.npy") as aside, aside.open("wb") as file:
        np.save(file, np.zeros(20000))


def write_factors(folder):
    hierarchy = RankHierarchy((1, 2))
    adapter = {"q_proj": {"a": np.ones((3000, 2), np.float32), "b": np.ones((2, 3), np.float32)}}
    save_adapter(folder / "adapter", adapter, hierarchy, {})


def write_checkpoint(folder):
    noise = jnp.asarray(np.random.default_rng(0).normal(size=20000), jnp.float32)  # cannot be compressed
    with Checkpoints(folder / "checkpoints/batch-0000") as checkpoints:
        checkpoints.save(3, {"x": noise}, {})
        checkpoints.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        checkpoints.save(7, {"x": noise}, {})
        checkpoints.wait()


WRITES = {
    write_records: r"records\.jsonl could not be written: it is larger than a file may be there \(see ulimit -f\), "
    r"and it needs \d+\.\d kB",
    write_text: r"/config\.json could not",
    write_array: r"/base\.npy could not",
    write_factors: r"adapter/adapter\.safetensors could not be written: .* needs 24\.0 kB",
    write_checkpoint: r"the checkpoint of step 7 in .*/batch-0000 could not be written: .* needs \d+\.\d kB",
}


@pytest.mark.parametrize("write", WRITES)
def test_a_file_that_may_not_grow(tmp_path, caplog, write):
    with no_file_above(1 << 30 if write is write_checkpoint else 4096):
        with pytest.raises(DiskFullError, match=WRITES[write]) as caught:
            write(tmp_path)
    assert "\n" not in str(caught.value) and caught.value.__suppress_context__
    assert not list(tmp_path.glob("**/*partial")) and not list(tmp_path.glob("**/*tmp*"))
    assert "Traceback" not in caplog.text
    if write is write_records:  # the file is as it was before
        assert [record["step"] for record in read_json_lines(tmp_path / "records.jsonl")] == [1]
    if write is write_checkpoint:
        assert what_stands(tmp_path) == "The last good checkpoint stands: step 3 of batch-0000"


def test_how_much_room_is_missing(tmp_path, monkeypatch):
    """By `df`: what is free, and what a part of the file takes that will be removed."""
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=1_500_000))
    partial = tmp_path / "partial"
    partial.write_bytes(b"x" * 8192)
    taken = partial.stat().st_blocks * 512
    full = OSError(errno.ENOSPC, "No space left on device")
    said = str(disk_full(full, "adapter", tmp_path / "not/yet/there", partial=partial, needed=4_000_000 + taken))
    assert said == (
        "adapter could not be written: the disk is full. It needs about 4.0 MB, and 1.5 MB were free: 2.5 MB are "
        "missing. Make room there, and run the same command again"
    )
    quota = OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
    assert "x could not be written: the disk quota is used up, and it needs 5 bytes" in str(
        disk_full(quota, "x", tmp_path, needed=5)
    )


@pytest.mark.parametrize(
    ("error", "number"),
    [
        (OSError(errno.ENOSPC, "x"), errno.ENOSPC),
        (ValueError("RESOURCE_EXHAUSTED: writing: No space left on device [tensorstore_spec=..."), errno.ENOSPC),
        (OSError("1000000 requested and 8176 written"), errno.ENOSPC),
        (OSError(errno.EACCES, "Permission denied"), None),
        (ValueError("RESOURCE_EXHAUSTED: out of memory"), None),
        (None, None),
    ],
)
def test_which_errors_are_of_a_full_disk(error, number):
    assert lack_of_room(error) == number
    wrapped = RuntimeError("in a thread")
    wrapped.__cause__ = error
    assert lack_of_room(wrapped) == number
    if error is not None and number is None:
        assert disk_full(error, "x", "/") is None
