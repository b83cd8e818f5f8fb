"""Shared fixtures of the tests, and the platform they run on."""

import importlib.metadata
import os
import pathlib
import tempfile

# Before jax is imported: four devices on the CPU, whatever the machine has. Most of a test's time is compiling, so
# machine code is not optimised and a program that another test has compiled is taken from there. XLA_FLAGS that are
# set already say how code is made instead.
DEVICES = "--xla_force_host_platform_device_count=4"
QUICKLY_COMPILED = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
if importlib.metadata.version("jaxlib").startswith("0.10."):
    # The older emitter of fused loops compiles a training step in a quarter of the time; later jaxlibs lack the flag.
    QUICKLY_COMPILED += " --xla_cpu_use_fusion_emitters=false"
if "PYTEST_XDIST_WORKER" not in os.environ:  # workers inherit all of it
    COMPILED = tempfile.TemporaryDirectory(prefix="mlora_jax_tests_")
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ.setdefault("XLA_FLAGS", QUICKLY_COMPILED)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = COMPILED.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import jax  # noqa: E402
import pytest  # noqa: E402

FLAGS = os.environ["XLA_FLAGS"]
os.environ["XLA_FLAGS"] = f"{DEVICES} {FLAGS}"
# Counts the devices, of which runs take the first one. Programs that tests start have one device.
jax.config.update("jax_default_device", jax.devices()[0])
os.environ["XLA_FLAGS"] = FLAGS
# Shapes that broadcast only because one has fewer axes are errors. Dtypes are strict in the core only: optax's bias
# correction raises a number to a power of another dtype.
jax.config.update("jax_numpy_rank_promotion", "raise")

SHARED = pathlib.Path(__file__).parents[1] / "../shared"


@pytest.fixture(scope="session")
def shared() -> pathlib.Path:
    """The folder of real checkpoints and data sets beside the repository; without it the test is skipped."""
    if not SHARED.is_dir():
        pytest.skip("../shared is absent")
    return SHARED.resolve()
