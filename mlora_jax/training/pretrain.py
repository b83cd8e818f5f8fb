"""Pretrains the small decoder that the package ships, from the text that `quickstart_text` generates.

The stages are: generate the text, train the tokenizer, pack rows, train all parameters, write a Hugging Face folder.
Everything follows from the config, so `pretraining.json` in that folder says how to make the decoder again.
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tokenizers
from flax import nnx

from mlora_jax.core.ranges import LARGEST_FLOAT, LARGEST_INTEGER, SEEDS, Range
from mlora_jax.data import quickstart_text
from mlora_jax.disk import write_aside
from mlora_jax.models.config import DecoderConfig
from mlora_jax.models.decoder import Decoder
from mlora_jax.models.hugging_face import save_decoder
from mlora_jax.training.progress import RunProgress

RECORD_FILE = "pretraining.json"
BOS, EOS = "<s>", "</s>"

_COUNT = Range(low=1, high=LARGEST_INTEGER)
RANGES = {
    "seed": SEEDS,
    "text.documents": _COUNT,
    "text.held_out": _COUNT,
    "tokenizer.vocab_size": _COUNT,
    "model.initializer_range": Range(low=0.0, high=LARGEST_FLOAT),
    "train.steps": _COUNT,
    "train.batch_size": _COUNT,
    "train.length": Range(low=2, high=LARGEST_INTEGER),
    "train.learning_rate": Range(low=0.0, high=LARGEST_FLOAT, open_low=True),
    "train.warmup_steps": Range(low=0, high=LARGEST_INTEGER),
    "train.beta1": Range(low=0.0, high=0.999999),
    "train.beta2": Range(low=0.0, high=0.999999),
    "train.weight_decay": Range(low=0.0, high=LARGEST_FLOAT),
    "train.clip": Range(low=0.0, high=LARGEST_FLOAT, open_low=True),
}

_LOG_EVERY = 50  # steps between two logs, because reading a loss waits for the device


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> tokenizers.Tokenizer:
    """Trains a byte-level BPE tokenizer that begins a text with `<s>`.

    The tokenizer can encode any text, because symbols that the training text lacks become bytes.

    Args:
      texts: the training text.
      vocab_size: the largest number of tokens; merging ends earlier if every word is one token.

    Returns:
      The tokenizer. The ids 0 and 1 are `<s>` and `</s>`.

    Source: the `tokenizers` library; byte-level BPE as in GPT-2.

    Example:
      >>> tokenizer = train_tokenizer(["the fox", "the bear"] * 2, 300)
      >>> tokenizer.encode("the bear").tokens
      ['<s>', 'the', 'Ġbear']
    """
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[BOS, EOS],
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return tokenizer


def pack(documents: Iterable[Sequence[int]], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Puts whole documents one after the other into rows of equal length.

    Args:
      documents: the token ids of each document; none is longer than `length`.
      length: T, the number of tokens in a row.

    Returns:
      tokens int32 [N, T] and segment ids int32 [N, T]: 1, 2, ... by document within a row, 0 for padding.

    Raises:
      ValueError: a document is longer than a row.

    Example:
      >>> tokens, segments = pack([[5, 6], [7, 8, 9], [4]], 4)
      >>> tokens.tolist(), segments.tolist()
      ([[5, 6, 0, 0], [7, 8, 9, 4]], [[1, 1, 0, 0], [1, 1, 1, 2]])
    """
    rows: list[list[Sequence[int]]] = [[]]
    room = length
    for document in documents:
        if len(document) > length:
            raise ValueError(f"a document of {len(document)} tokens does not fit a row of train.length = {length}")
        if len(document) > room:
            rows.append([])
            room = length
        rows[-1].append(document)
        room -= len(document)
    tokens = np.zeros((len(rows), length), np.int32)
    segments = np.zeros_like(tokens)
    for row, kept in enumerate(rows):
        start = 0
        for segment, document in enumerate(kept, 1):
            tokens[row, start : start + len(document)] = document
            segments[row, start : start + len(document)] = segment
            start += len(document)
    return tokens, segments


def next_token_loss(graphdef: nnx.GraphDef, state: nnx.State, tokens: jax.Array, segments: jax.Array) -> jax.Array:
    """Returns the mean cross-entropy of the next token within each packed document.

    Args:
      graphdef: the graph definition of the decoder.
      state: the parameters of the decoder.
      tokens: int32 [B, T].
      segments: int32 [B, T], as `pack` returns them; no document attends to another.

    Returns:
      Nats per token, a float32 scalar.
    """
    logits = nnx.merge(graphdef, state)(tokens, segment_ids=segments)[:, :-1]  # [B, T-1, V]
    counted = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    return jnp.sum(losses * counted) / jnp.sum(counted)


def make_optimizer(train: Mapping[str, Any]) -> optax.GradientTransformation:
    """Makes AdamW with a linear warm-up, a cosine decay to a tenth of the peak, and clipping by global norm.

    Args:
      train: the group `train` of the config.

    Returns:
      The optimizer.

    Raises:
      ValueError: the warm-up leaves no steps after it.

    Source: Loshchilov and Hutter (arXiv 1711.05101).
    """
    rate = train["learning_rate"]
    if train["warmup_steps"] >= train["steps"]:
        raise ValueError(f"train.steps = {train['steps']} must be above train.warmup_steps = {train['warmup_steps']}")
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, train["warmup_steps"], train["steps"], rate / 10)
    return optax.chain(
        optax.clip_by_global_norm(train["clip"]),
        optax.adamw(schedule, train["beta1"], train["beta2"], weight_decay=train["weight_decay"]),
    )


def make_step(
    graphdef: nnx.GraphDef, optimizer: optax.GradientTransformation
) -> Callable[[Any, Any, Any, Any], tuple[Any, Any, jax.Array]]:
    """Compiles the training step over all parameters.

    Args:
      graphdef: the graph definition of the decoder.
      optimizer: the optimizer that `make_optimizer` returned.

    Returns:
      A function of (state, optimizer state, tokens [B, T], segments [B, T]) that returns the new state, the new
      optimizer state and the loss before the step. It reuses the buffers of its first two arguments.
    """

    def step(state, optimizer_state, tokens, segments):
        loss, gradient = jax.value_and_grad(next_token_loss, argnums=1)(graphdef, state, tokens, segments)
        updates, optimizer_state = optimizer.update(gradient, optimizer_state, state)
        return optax.apply_updates(state, updates), optimizer_state, loss

    return jax.jit(step, donate_argnums=(0, 1))


def pretrain(config: Mapping[str, Any], folder: str | os.PathLike, *, command: str = "") -> dict[str, Any]:
    """Generates the text, trains the tokenizer and the decoder, and writes the Hugging Face folder.

    Args:
      config: the groups of `configs/pretrain_quickstart.py`, and its seed.
      folder: the folder to write; it is made if it does not exist.
      command: the command that asked for this, which goes into the record.

    Returns:
      The record, which is also written as `pretraining.json`: the command, the config, the held-out loss in nats per
      token, the number of parameters, the SHA-256 of weights and tokenizer, and the versions of jax and tokenizers.

    Raises:
      ValueError: a number is outside its range, the model has an impossible size, a document is longer than a row, or
        there are fewer rows than a batch needs.
    """
    for key, within in RANGES.items():
        group, _, name = key.rpartition(".")
        if name in (values := config[group] if group else config):
            within.check(f"config.{key}", values[name])
    folder = pathlib.Path(folder)
    seed, text, train = config["seed"], config["text"], config["train"]

    documents = list(quickstart_text.documents(text["documents"], seed=seed))
    tokenizer = train_tokenizer(documents, config["tokenizer"]["vocab_size"])
    rows = _packed(tokenizer, documents, train["length"])
    # The seed of the held-out text is negative, which no person would choose for the training text.
    held_out = _packed(tokenizer, quickstart_text.documents(text["held_out"], seed=-1 - seed), train["length"])

    vocabulary = tokenizer.get_vocab()
    shape = DecoderConfig(
        vocab_size=tokenizer.get_vocab_size(),
        bos_token_id=vocabulary[BOS],
        eos_token_ids=(vocabulary[EOS],),
        **config["model"],
    )
    graphdef, state = nnx.split(Decoder(shape, rngs=nnx.Rngs(seed)))
    optimizer = make_optimizer(train)
    step, optimizer_state = make_step(graphdef, optimizer), optimizer.init(state)

    with RunProgress() as progress:
        progress.expect({"pretraining": train["steps"]})
        start = time.monotonic()
        batches = _batches(rows, train["batch_size"], train["steps"], seed)
        for number, (tokens, segments) in enumerate(batches, 1):
            state, optimizer_state, loss = step(state, optimizer_state, tokens, segments)
            if number % _LOG_EVERY == 0 or number == train["steps"]:
                loss = float(loss)  # this waits for the device, so it comes before the clock is read
                speed = number * tokens.size / (time.monotonic() - start)
                left = train["steps"] - number
                progress.advance("pretraining", left, step=number, loss=loss, tokens_per_second=speed)
        held_out_loss = float(jax.jit(next_token_loss, static_argnums=0)(graphdef, state, *held_out))
        progress.say(f"held-out loss {held_out_loss:.4f} nats per token")

    save_decoder(folder, nnx.merge(graphdef, state))
    _save_tokenizer(folder, tokenizer, shape.max_position_embeddings)
    record = {
        "command": command,
        "config": json.loads(json.dumps(_plain(config))),
        "held_out_loss": round(held_out_loss, 4),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(state)),
        "sha256": {
            name: hashlib.sha256((folder / name).read_bytes()).hexdigest()
            for name in ("model.safetensors", "tokenizer.json")
        },
        "versions": {"jax": jax.__version__, "tokenizers": tokenizers.__version__},
    }
    with write_aside(folder / RECORD_FILE) as file:
        file.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return record


def _packed(tokenizer: tokenizers.Tokenizer, documents: Iterable[str], length: int) -> tuple[np.ndarray, np.ndarray]:
    end = tokenizer.get_vocab()[EOS]
    encoded = tokenizer.encode_batch(list(documents))
    return pack(([*one.ids, end] for one in encoded), length)


def _batches(rows: tuple[np.ndarray, ...], batch_size: int, steps: int, seed: int) -> Iterator[tuple[np.ndarray, ...]]:
    """Yields the batches of all steps; every epoch is a new permutation of the rows."""
    count = len(rows[0])
    if count < batch_size:
        raise ValueError(f"the text fills {count} rows, less than train.batch_size = {batch_size}: more text.documents")
    random = np.random.default_rng(seed)
    order = np.concatenate([random.permutation(count) for _ in range(-(-steps * batch_size // count))])
    for start in range(0, steps * batch_size, batch_size):
        yield tuple(array[order[start : start + batch_size]] for array in rows)


def _save_tokenizer(folder: pathlib.Path, tokenizer: tokenizers.Tokenizer, length: int) -> None:
    """Writes `tokenizer.json`, and the settings that the transformers library needs."""
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": EOS,
        "add_bos_token": True,
        "add_eos_token": False,
        "model_max_length": length,
        "clean_up_tokenization_spaces": False,
    }
    with write_aside(folder / "tokenizer.json") as file:
        tokenizer.save(str(file))
    with write_aside(folder / "tokenizer_config.json") as file:
        file.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _plain(config: Any) -> Any:
    """Returns nested mappings as dicts, which JSON can hold."""
    return {key: _plain(value) for key, value in config.items()} if hasattr(config, "items") else config
