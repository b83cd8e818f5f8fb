"""A tiny random checkpoint and tiny data of their own, for tests of the whole program."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
from flax import nnx

from mlora_jax.adapters import adapt, split
from mlora_jax.data.packing import RowShape, packed_arrays
from mlora_jax.models import Decoder, DecoderConfig, save_decoder
from mlora_jax.training.step import train_step
from mlora_jax.training.trials_step import NO_RULE, split_batch
from tests.data.conftest import write_tokenizer


def compile_step(graphdef, optimizer, *, chunk, widths=(16, 8), examples=8, rule=NO_RULE):
    """`train_step` of one trial on the batches of `pack_examples`; the state's buffers are reused."""

    @functools.partial(jax.jit, donate_argnums=2)
    def step(base, profile, state, batch, draw, schedule, key):
        micro_batch = examples // draw.profiles.shape[0]
        options = graphdef, optimizer, chunk, widths, micro_batch
        arguments = base, profile, state, *split_batch(batch), draw, schedule, key
        return train_step(*options, *arguments, rule=rule)

    return step


def pack_examples(*trials, widths=(16, 8), rows=1, passes=None):
    """One batch of one trial's examples, or of several trials' with their axis in front."""
    shape, count = RowShape(widths, rows), max(map(len, trials))
    arrays, plan = packed_arrays(trials, [range(len(each)) for each in trials], shape, passes or shape.passes(count))
    return plan | (arrays if len(trials) > 1 else {name: array[0] for name, array in arrays.items()})


def tiny_config(**changes) -> DecoderConfig:
    values = {
        "vocab_size": 330,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "max_position_embeddings": 128,
        "bos_token_id": 1,
        "eos_token_ids": (2,),
        "initializer_range": 0.3,
        "tie_word_embeddings": True,
    }
    return DecoderConfig(**(values | changes))


def write_checkpoint(folder: pathlib.Path, *, seed: int = 0, dtype=jnp.float32, **changes) -> pathlib.Path:
    save_decoder(folder, Decoder(tiny_config(**changes), dtype=dtype, rngs=nnx.Rngs(seed)))
    return write_tokenizer(folder, bos=True)


def adapted_trees(model, rank, targets):
    """(graphdef, base, adapter, profile) of a model with a fresh adapter, in evaluation mode."""
    adapted = adapt(model, rank, targets, key=jax.random.key(0))
    adapted.eval()
    return split(adapted)


def random_like(adapter, *, seed, scale=1.0):
    """Normal factors in the place of an adapter's own, B too, so that the adapter does something."""
    keys = iter(jax.random.split(jax.random.key(seed), len(jax.tree.leaves(adapter))))
    return jax.tree.map(lambda x: scale * jax.random.normal(next(keys), x.shape, x.dtype), adapter)


CONFIG = """
from ml_collections import ConfigDict

def get_config():
    return ConfigDict({config!r})
"""
# Answers of 3 to 6 tokens: the answer axis is 8 in every batch of 4, so a run compiles one step.
QUESTIONS = {
    "HUM:ind": ["Who was Galileo ?", "Who wrote Hamlet ?", "Who is the king ?"],
    "NUM:date": ["When did it begin ?", "How many are there ?", "What year was that ?"],
    "LOC:city": ["Where is Nice ?", "Where does it lie ?", "What city is it ?"],
    "ENTY:substance": ["What is an atom ?", "What burns best ?", "What is steel made of ?"],
}


def write_trec(folder: pathlib.Path) -> pathlib.Path:
    """Twelve training and twelve test questions in the published form."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f"{label} {question}" for label, questions in QUESTIONS.items() for question in questions]
    for name in ("train_5500.label", "TREC_10.label"):
        (folder / name).write_text("".join(f"{line}\n" for line in lines), encoding="latin-1")
    return folder


def trec_data(root: pathlib.Path, *, pad_multiple: int = 40) -> dict:
    """The `data` of a config: the questions, written into a folder. Padded to 40 tokens, all rows have one shape."""
    return {
        "task": "trec",
        "raw_dir": str(write_trec(root / "raw")),
        "cache_dir": str(root / "cache"),
        "pad_multiple": pad_multiple,
        "max_length": 96,
    }


def write_config(file: pathlib.Path, config: dict) -> pathlib.Path:
    """A config file as users write them."""
    file.write_text(CONFIG.format(config=config))
    return file


def write_jsonl(path: pathlib.Path, rows: int = 20, shift: int = 0) -> pathlib.Path:
    lines = [{"prompt": f"{n} and {n + shift} is", "completion": f" {2 * n + shift}"} for n in range(rows)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path
