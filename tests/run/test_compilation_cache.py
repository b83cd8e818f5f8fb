"""Compiled programs are kept in a folder: what is taken from it, what is written, and what damage does."""

import json
import os
import pathlib
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache.compilation_cache import reset_cache

from mlora_jax import compilation_cache
from mlora_jax.compilation_cache import threads, use_compilation_cache
from tests.run.tiny_runs import choice_config, outcome

ROOT = pathlib.Path(__file__).parents[2]
OPTIONS = (
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_min_entry_size_bytes",
)

# A run in a process of its own: the programs that it needed and those that it compiled, and what jax's options are.
PROGRAM = """
import collections, json, sys
import jax

seen = collections.Counter()
jax.monitoring.register_event_listener(lambda name, **_: seen.update([name]))
from mlora_jax import train

train(json.loads(sys.argv[1]), sys.argv[2])
needed = seen["/jax/compilation_cache/compile_requests_use_cache"]
taken = seen["/jax/compilation_cache/cache_hits"]
print(json.dumps({"needed": needed, "compiled": needed - taken, "folder": jax.config.jax_compilation_cache_dir}))
"""


def run(config, workdir, **variables):
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    finished = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(config), str(workdir)],
        cwd=ROOT, env=environment | variables, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout.splitlines()[-1])


def test_key_of_the_compilation_cache(folders, tmp_path):
    """A second process that runs the same config compiles nothing, and a variable wins over the key."""
    config = choice_config(folders) | {"compilation": {"cache": str(tmp_path / "programs")}}
    first, second = (run(config, tmp_path / name) for name in ("first", "second"))
    assert first["compiled"] > 20 and second == first | {"compiled": 0}
    assert outcome(tmp_path / "first") == outcome(tmp_path / "second")
    assert first["folder"] is None  # train leaves the caller's options as they were
    (folder,) = (tmp_path / "programs").iterdir()
    config["compilation"]["cache"] = "off"
    third = run(config, tmp_path / "third", JAX_COMPILATION_CACHE_DIR=str(folder))
    assert third == second | {"folder": str(folder)}


@pytest.fixture
def no_folder():
    """jax as in a process that no variable has given a folder."""
    before = [getattr(jax.config, name) for name in OPTIONS]

    def set_to(values):
        for name, value in zip(OPTIONS, values, strict=True):
            jax.config.update(name, value)
        reset_cache()

    set_to((None, 1.0, 0))
    yield
    set_to(before)


def compile_something():
    """Compiles one program, however often the test has done so before, and checks what it computes."""
    result = jax.jit(lambda x: jnp.cumsum(x) * 2)(np.arange(5.0, dtype=np.float32))
    np.testing.assert_array_equal(result, [0, 2, 6, 12, 20])


def programs(folder):
    return sorted(path.name for path in folder.glob("threads-*/*-cache"))


def test_the_folder_is_in_the_users_cache_folder_or_as_given(no_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    before = [getattr(jax.config, name) for name in OPTIONS]
    for name, folder in (("", tmp_path / "user/mlora_jax/compiled"), (str(tmp_path / "own"), tmp_path / "own")):
        with use_compilation_cache(name):
            compile_something()
        assert len(programs(folder)) == 1 and folder.stat().st_mode & 0o077 == 0
    assert [getattr(jax.config, name) for name in OPTIONS] == before
    with use_compilation_cache("off"):
        compile_something()
    compile_something()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["own", "user"]
    assert len(programs(tmp_path / "own")) == 1


def test_the_options_are_as_before_after_an_error(no_folder, tmp_path):
    with pytest.raises(RuntimeError, match="stop"), use_compilation_cache(str(tmp_path)):
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / f"threads-{threads()}")
        raise RuntimeError("stop")
    assert jax.config.jax_compilation_cache_dir is None


def test_a_folder_that_the_calling_program_has_set_wins(no_folder, tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "theirs"))
    with use_compilation_cache(str(tmp_path / "own")):
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "theirs")
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 1.0 and not (tmp_path / "own").exists()


@pytest.mark.parametrize("name", ["", "below"])
def test_a_file_in_place_of_the_folder_is_reported(no_folder, tmp_path, caplog, name):
    (tmp_path / "file").write_text("")
    with use_compilation_cache(str(tmp_path / "file" / name)):
        compile_something()
    assert f"compiled programs cannot be kept in {tmp_path / 'file' / name}" in caplog.text


@pytest.mark.parametrize("cause", ["read only", "full"])
def test_a_folder_that_takes_nothing_more_is_still_read(no_folder, tmp_path, monkeypatch, cause):
    with use_compilation_cache(str(tmp_path)):
        compile_something()
    kept = programs(tmp_path)
    if cause == "full":
        monkeypatch.setattr(compilation_cache, "LEAST_ROOM", 1 << 60)
    else:
        monkeypatch.setattr(os, "access", lambda path, mode: tmp_path not in path.parents)  # root may write anywhere
    hits = []
    listener = lambda name, **_: hits.append(name) if name.endswith("/cache_hits") else None  # noqa: E731
    jax.monitoring.register_event_listener(listener)
    try:
        with use_compilation_cache(str(tmp_path)):
            compile_something()
            jax.jit(lambda x: x + 7)(np.ones(3, np.float32))
    finally:
        jax.monitoring.unregister_event_listener(listener)
    assert len(hits) == 1 and programs(tmp_path) == kept


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty"])
def test_a_damaged_entry_is_compiled(no_folder, tmp_path, damage):
    with use_compilation_cache(str(tmp_path)):
        compile_something()
    (file,) = tmp_path.glob("*/*-cache")
    data = file.read_bytes()
    middle = len(data) // 2
    flipped = data[:middle] + bytes(255 - byte for byte in data[middle : middle + 50]) + data[middle + 50 :]
    file.write_bytes({"flipped": flipped, "cut": data[:middle], "empty": b""}[damage])
    with use_compilation_cache(str(tmp_path)), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Error reading persistent compilation cache entry")
        compile_something()
    assert file.stat().st_size > 0  # the empty files that a full disk leaves are deleted and written again


def test_the_least_recently_used_programs_are_deleted(no_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(compilation_cache, "LARGEST", 250)
    for number, (written, read) in enumerate(((1, 9), (2, 2), (3, 3), (4, 4))):
        file = tmp_path / f"threads-{number % 2}" / f"jit_{number}-cache"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(bytes(100))
        os.utime(file, (read, written))
    (tmp_path / "threads-0/another file").write_bytes(bytes(500))
    with use_compilation_cache(str(tmp_path)):
        pass
    left = sorted(path.name for path in tmp_path.glob("threads-*/*"))
    assert left == ["another file", "jit_0-cache", "jit_3-cache"]


def test_programs_for_other_numbers_of_threads_are_kept_apart(no_folder, tmp_path, monkeypatch):
    for number in ("2", "3", "2"):
        monkeypatch.setenv("NPROC", number)
        with use_compilation_cache(str(tmp_path)):
            compile_something()
    assert [len(programs(tmp_path)), *sorted(path.name for path in tmp_path.iterdir())] == [2, "threads-2", "threads-3"]
