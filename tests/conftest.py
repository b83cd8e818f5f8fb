"""Shared fixtures of the tests, and the platform they run on."""

import os
import pathlib
import tempfile

# Before jax is imported: four devices on the CPU, whatever the machine has. Most of a test's time is compiling, so
# machine code is not optimised and a program that another test has compiled is taken from there.
FLAGS = "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"
if "PYTEST_XDIST_WORKER" not in os.environ:  # workers inherit all of it
    COMPILED = tempfile.TemporaryDirectory(prefix="mlora_jax_tests_")
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = f"{FLAGS} {os.environ.get('XLA_FLAGS', '')}".strip()  # of two the last one counts
    os.environ["JAX_COMPILATION_CACHE_DIR"] = COMPILED.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import pytest  # noqa: E402

SHARED = pathlib.Path(__file__).parents[1] / "../shared"


@pytest.fixture(scope="session")
def shared() -> pathlib.Path:
    """The folder of real checkpoints and data sets beside the repository; without it the test is skipped."""
    if not SHARED.is_dir():
        pytest.skip("../shared is absent")
    return SHARED.resolve()
