"""Checkpoints: what is read is what was saved, and a damaged one is never taken for a sound one."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlora_jax.training.checkpoint import Checkpoints


def state_at(step):
    return {
        "factor": jnp.arange(24.0).reshape(2, 3, 4) / 7 + step,
        "counts": (jnp.full((2,), step, jnp.int32), jnp.array([True, False])),
    }


TEMPLATE = jax.tree.map(jnp.zeros_like, state_at(0))


def saved(folder, *steps, keep=3):
    with Checkpoints(folder, keep=keep) as checkpoints:
        for step in steps:
            checkpoints.save(step, state_at(step), {"losses": [[0.1, float("nan")]], "step": step})
    return folder


def restored(folder):
    with Checkpoints(folder, keep=3) as checkpoints:
        return checkpoints.restore(TEMPLATE)


def test_the_newest_comes_back_bit_for_bit(tmp_path):
    found = restored(saved(tmp_path / "run", 3, 10, 9 + 2))
    assert found.step == 11 and found.values["step"] == 11
    assert found.values["losses"][0][0] == 0.1 and np.isnan(found.values["losses"][0][1])
    assert jax.tree.structure(found.state) == jax.tree.structure(TEMPLATE)
    for old, new in zip(jax.tree.leaves(state_at(11)), jax.tree.leaves(found.state), strict=True):
        assert old.dtype == new.dtype and np.array_equal(old, new)


def test_nothing_to_restore(tmp_path):
    assert restored(tmp_path / "run") is None


def test_only_the_newest_are_kept(tmp_path):
    saved(tmp_path, 1, 2, 3, 4, keep=2)
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"3", "4"}


def test_a_declined_save_is_an_error(tmp_path):
    with Checkpoints(saved(tmp_path, 5)) as checkpoints:
        with pytest.raises(OSError, match=r"the checkpoint of step 5 in .* was not written"):
            checkpoints.save(5, state_at(5), {})
        checkpoints.save(6, state_at(6), {})


def test_a_save_during_a_save_waits(tmp_path):
    with Checkpoints(tmp_path, keep=20) as checkpoints:
        for step in range(12):
            checkpoints.save(step, state_at(step), {})
    assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == 12


def test_what_is_saved_is_the_state_at_that_moment(tmp_path):
    """Training reuses the buffers while they are written."""
    reuse = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf * 0, tree), donate_argnums=0)
    with Checkpoints(tmp_path) as checkpoints:
        state = state_at(8)
        checkpoints.save(8, state, {})
        jax.block_until_ready(reuse(state))
    assert np.array_equal(restored(tmp_path).state["factor"], state_at(8)["factor"])


def files_of(folder, step):
    return sorted(path for path in (folder / str(step)).rglob("*") if path.is_file())


def cut_arrays(folder, step):
    for path in (folder / str(step) / "state").rglob("d/*"):
        with path.open("r+b") as file:
            file.truncate(7)


def flip_bits(folder, step):
    """Other values in a sound file."""
    path = max((folder / str(step) / "state").rglob("d/*"), key=lambda file: file.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)


def empty_values(folder, step):
    (folder / str(step) / "values" / "metadata").write_text("")


def other_arrays(folder, step):
    """A sound checkpoint of another state under this step's values."""
    shutil.rmtree(folder / str(step) / "state")
    shutil.copytree(folder / "1" / "state", folder / str(step) / "state")


def no_arrays(folder, step):
    for path in files_of(folder, step):
        if "state" in path.parts:
            path.unlink()


def no_values(folder, step):
    shutil.rmtree(folder / str(step) / "values")


@pytest.mark.parametrize("damage", [cut_arrays, flip_bits, empty_values, other_arrays, no_arrays, no_values])
def test_a_damaged_one_is_removed_for_the_one_before(tmp_path, caplog, damage):
    saved(tmp_path, 1, 2, 4)
    damage(tmp_path, 4)
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        found = checkpoints.restore(TEMPLATE)
        assert found.step == 2 and np.array_equal(found.state["factor"], state_at(2)["factor"])
        assert f"the checkpoint of step 4 in {tmp_path} is damaged and removed" in caplog.text
        checkpoints.save(4, state_at(4), {})  # the step comes again
    assert restored(tmp_path).step == 4


def test_one_of_which_a_large_array_is_cut(tmp_path, caplog):
    """Its index is whole: orbax finds the array, and cannot read it."""
    state = {"factor": jnp.asarray(np.random.default_rng(0).normal(size=(64, 1024)), jnp.float32)}
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        checkpoints.save(1, state, {})
        checkpoints.save(2, state, {})
    largest = max((tmp_path / "2" / "state").rglob("d/*"), key=lambda file: file.stat().st_size)
    with largest.open("r+b") as file:
        file.truncate(largest.stat().st_size // 2)
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        assert checkpoints.restore(state).step == 1
    assert f"the checkpoint of step 2 in {tmp_path} is damaged and removed" in caplog.text


@pytest.mark.parametrize(
    "error",
    [
        OSError(5, "Input/output error"),
        ValueError("PERMISSION_DENIED: Error reading"),
        RuntimeError("RESOURCE_EXHAUSTED"),
    ],
)
def test_what_cannot_be_read_now_stays(tmp_path, monkeypatch, error):
    saved(tmp_path, 1, 2)

    def fail(*arguments, **named):
        raise error

    with Checkpoints(tmp_path, keep=3) as checkpoints:
        monkeypatch.setattr(checkpoints._manager, "restore", fail)
        with pytest.raises(type(error)) as raised:
            checkpoints.restore(TEMPLATE)
        assert raised.value is error
    assert restored(tmp_path).step == 2


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        ({"factor": jnp.zeros((2, 3, 5))}, r"factor was float32\[2, 3, 4\] and is float32\[2, 3, 5\]"),
        ({"factor": jnp.zeros((2, 3, 4), jnp.bfloat16)}, r"factor was float32\[2, 3, 4\] and is bfloat16\[2, 3, 4\]"),
        ({"more": jnp.zeros(2)}, r"more was not there and is float32\[2\]"),
    ],
)
def test_one_of_other_arrays_is_refused_and_stays(tmp_path, other, difference):
    saved(tmp_path, 1, 2)
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        with pytest.raises(
            ValueError, match=rf"the checkpoint of step 2 in .* other arrays than this run's: {difference}"
        ):
            checkpoints.restore({**TEMPLATE, **other})
    assert restored(tmp_path).step == 2


def test_when_all_are_damaged_training_begins_anew(tmp_path, caplog):
    saved(tmp_path, 1, 2)
    for step in (1, 2):
        cut_arrays(tmp_path, step)
    assert restored(tmp_path) is None
    assert caplog.text.count("is damaged and removed") == 2


def test_a_checkpoint_that_was_being_written_is_none(tmp_path):
    saved(tmp_path, 1, 2)
    (tmp_path / "2").rename(tmp_path / "2.orbax-checkpoint-tmp-7")
    assert restored(tmp_path).step == 1
