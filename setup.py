"""Metadata and extras; tool settings are in pyproject.toml."""

import pathlib

from setuptools import find_packages, setup

# The peers of the speed benchmarks, which are oracles of the tests as well.
PEERS = [
    # What the harness's own Hugging Face backend, the oracle of the task scores, imports.
    "accelerate>=1.0",
    "peft>=0.19",
    # The CPU build; any other version pulls in gigabytes of CUDA libraries that no test uses.
    "torch==2.13.0",
    "transformers>=5.0",
]
EXTRAS = {
    "bench": PEERS,
    "cuda": ["jax[cuda12]"],
    # A frozen base in int8 or nf4.
    "quant": ["qwix>=0.1.8"],
    # TPUs, and the compiler for them, which experiments.compile_report needs without a TPU.
    "tpu": ["jax[tpu]"],
    "wandb": ["wandb>=0.19"],
    "test": [
        *PEERS,
        "hypothesis",
        "ipykernel",
        "jupytext",
        "nbclient",
        "nbformat",
        # Checks types; it comes as an npm package, which the first call fetches.
        "pyright[nodejs]>=1.1.400",
        "pytest>=8",
        "pytest-xdist>=3.6",
        "qwix>=0.1.8",
        "ruff",
        # Its digits, which come with it, are what the notebook on vision transformers learns.
        "scikit-learn>=1.5",
    ],
}

COMMANDS = ("run", "table", "generate", "export", "lm-eval", "plan", "ranks", "study", "compile-report", "kv-cache")

setup(
    name="mlora_jax",
    version="0.1.0",
    description="Nested low-rank adaptation for JAX and Flax: train one LoRA adapter, read it out at every rank.",
    long_description=pathlib.Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    # One name only in site-packages: the configs become a part of the package.
    packages=[*find_packages(include=["mlora_jax", "mlora_jax.*"]), "mlora_jax.configs"],
    package_dir={"mlora_jax.configs": "configs"},
    include_package_data=True,
    package_data={"mlora_jax": ["py.typed", "assets/**/*", "data/builders/**/*", "evaluate/tasks/*.yaml"]},
    install_requires=[
        "jax>=0.10.2",
        "flax>=0.12.8",
        "optax>=0.2.8",
        "grain>=0.2.18",
        "orbax-checkpoint>=0.12.8",
        # Reads and writes array_record files; TensorFlow is neither needed nor installed.
        "tensorflow-datasets>=4.9.10",
        "array_record>=0.8.3",
        "importlib_resources>=6.0",
        "ml-collections>=1.1.0",
        "absl-py>=2.1",
        "safetensors>=0.5",
        "huggingface_hub>=1.31",
        "tokenizers>=0.21",
        "jinja2>=3.1.6",
        "rich>=13",
        "tensorboardX>=2.6",
        "matplotlib>=3.9",
        "numpy>=2.0",
        "scipy>=1.13",
        # Task wording, few-shot sampling, filters and metrics; imported only where tasks of its are evaluated.
        "lm-eval>=0.4.13",
        # Reads data sets that are published as Parquet; it comes with lm-eval's `datasets` anyway.
        "pyarrow>=24.0",
    ],
    extras_require=EXTRAS,
    entry_points={
        "console_scripts": [f"mlora-{name} = mlora_jax.cli.commands:{name.replace('-', '_')}" for name in COMMANDS]
    },
)
