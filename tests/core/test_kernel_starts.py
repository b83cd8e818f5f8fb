"""Starts from the frozen kernel: the function begins as the base's, and the trained half is NumPy's SVD or QR."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlora_jax.core import ACTIONS, METHODS, ActionInput, RankHierarchy
from mlora_jax.core.actions import run_action

D, F, L = 11, 8, 2
STARTS = ("pissa", "olora", "svfit")


def started(name, rank, p, seed=0):
    rng = np.random.default_rng(seed)
    kernels = {"up": rng.normal(size=(L, D, F)), "down": rng.normal(size=(F, D))}
    adapter = {}
    for path, kernel in kernels.items():
        leading = kernel.shape[:-2]
        shapes = {"a": (*leading, kernel.shape[-2], rank), "b": (*leading, rank, kernel.shape[-1])}
        shapes |= {"gate": (*leading, rank)} if METHODS[name].gate else {}
        adapter[path] = {leaf: jnp.ones(shape) for leaf, shape in shapes.items()}
    needed = {"kernels": {path: {"kernel": jnp.asarray(kernel, jnp.float32)} for path, kernel in kernels.items()}}
    given = ActionInput(adapter=adapter, trained_profile=p, key=jax.random.key(0), needed=needed)
    return kernels, run_action(ACTIONS[name], given).adapter


def parts(leaves, p, columns):
    """NumPy: what some columns add to the kernel."""
    scales = np.asarray(p, np.float64) * np.asarray(leaves.get("gate", 1.0), np.float64)
    a, b = (np.asarray(leaves[name], np.float64) for name in "ab")
    return ((a * scales[..., None, :])[..., columns]) @ b[..., columns, :]


@pytest.mark.parametrize("name", STARTS)
@pytest.mark.parametrize("rank", [6, 7])
def test_step_zero_is_the_base_and_the_first_half_is_what_was_taken_out(name, rank):
    """Also under the profile of a Matryoshka diagonal, whose halves have other scales, and for an odd R."""
    for p in (RankHierarchy((1, 2, 4, rank), "sqrt").lora(), RankHierarchy((1, 2, 4, rank)).matryoshka()):
        kernels, made = started(name, rank, p)
        for path, kernel in kernels.items():
            whole = parts(made[path], p, slice(None))
            assert np.abs(whole).max() < 1e-5 * np.abs(kernel).max()
            first = parts(made[path], p, slice(0, rank // 2))
            if name == "olora":  # the first directions of the QR of W^T
                q, r = np.linalg.qr(np.swapaxes(kernel, -1, -2))
                taken = np.swapaxes(r[..., : rank // 2, :], -1, -2) @ np.swapaxes(q[..., : rank // 2], -1, -2)
                taken = taken * np.asarray(p, np.float64)[0] if np.ptp(np.asarray(p)) == 0 else None
            else:
                u, s, vt = np.linalg.svd(kernel, full_matrices=False)
                taken = (u * s[..., None, :])[..., : rank // 2] @ vt[..., : rank // 2, :]
            if taken is not None:
                np.testing.assert_allclose(first, taken, atol=1e-4)
            assert np.linalg.norm(first) > 0.1 * np.linalg.norm(kernel)


def test_factors_of_pissa_share_the_singular_values_and_svfit_trains_them_alone():
    p = RankHierarchy((6,), "rank").lora()
    kernels, made = started("pissa", 6, p)
    s = np.linalg.svd(kernels["up"], compute_uv=False)[:, :3] / np.asarray(p, np.float64)[:3]
    np.testing.assert_allclose(np.linalg.norm(made["up"]["a"][..., :3], axis=1), np.sqrt(s), rtol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(made["up"]["b"][:, :3], axis=2), np.sqrt(s), rtol=1e-4)
    _, made = started("svfit", 6, p)
    np.testing.assert_allclose(made["up"]["gate"], np.concatenate([s, s], axis=1), rtol=1e-4)
    (update,) = METHODS["svfit"].updates
    assert update.column_rates(RankHierarchy((1, 6))).tolist() == [1, 1, 1, 0, 0, 0]
    assert update.all_leaf_rates() == {"a": 0.0, "b": 0.0, "gate": 1.0}
    (update,) = METHODS["pissa"].updates
    assert update.column_rates(RankHierarchy((1, 7))).tolist() == [1, 1, 1, 0, 0, 0, 0]


def test_a_kernel_that_is_too_small_is_refused():
    for rank in (1, 2 * F + 2):
        with pytest.raises(ValueError, match=rf"takes R/2 of its directions, at most {F}; got R = {rank}"):
            started("pissa", rank, jnp.ones(rank))
