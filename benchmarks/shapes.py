"""The models that the speed benchmarks train: real folders, and random weights in the shape of a known model."""

from __future__ import annotations

import dataclasses
import importlib.resources
import json
import pathlib
import random
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

BLOCK = 1_000_003  # random numbers are repeated after this many, a prime, so that no two rows of a matrix are equal
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
LLAMA_1B = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 128256,
    "rope_theta": 500000.0,
}
SMOLLM2_135M = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "rope_theta": 100000.0,
}
STORIES_15M = {
    "hidden_size": 288,
    "intermediate_size": 768,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "vocab_size": 32000,
}
TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
}


@dataclasses.dataclass(frozen=True)
class Shape:
    """A model and the batches on which it is trained.

    Attributes:
      about: a description for the table.
      batch: the number of examples in a step.
      folder: the name of a folder of real weights among the models; empty for random weights.
      config: the entries of `config.json` that differ from `random_model`'s, for random weights.
      row: the number of tokens that every example fills; 0 takes GSM8K's examples as they are.
      steps: the number of steps in a repeat, unless the command line says otherwise.
    """

    about: str
    batch: int
    folder: str = ""
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    row: int = 0
    steps: int = 10


SHAPES = {
    "stories-3m": Shape("stories-3m", batch=8, folder="stories-3m"),
    "random-15m": Shape("random weights, 15M parameters, vocabulary 32,000", batch=8, config=STORIES_15M),
    "smollm2-135m": Shape("SmolLM2-135M-Instruct", batch=4, folder="smollm2-135m-instruct", steps=5),
    "llama-1b-2-layers": Shape(
        "two of the 16 layers of Llama-3.2-1B, random weights",
        batch=1,
        config={**LLAMA_1B, "num_hidden_layers": 2},
        row=512,
        steps=3,
    ),
}
SMALL = Shape("random weights, tiny", batch=4, config=TINY, steps=2)


def random_model(
    folder: pathlib.Path, config: Mapping[str, Any], *, tokenizer: pathlib.Path, dtype: str = "float32"
) -> pathlib.Path:
    """Writes a Llama of random weights with tied embeddings as a Hugging Face folder.

    Args:
      folder: the folder to write; it is made.
      config: entries of `config.json`: the sizes, and whatever differs from the values here.
      tokenizer: a folder with a tokenizer; one larger than the vocabulary is cut to it, see `cut_tokenizer`.
      dtype: "float32" or "bfloat16".

    Returns:
      The folder.
    """
    folder.mkdir(parents=True)
    known = json.loads((tokenizer / "config.json").read_text(encoding="utf-8"))
    values = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": dtype,
        **{name: known[name] for name in ("bos_token_id", "eos_token_id") if name in known},
        **config,
    }
    values.setdefault("head_dim", values["hidden_size"] // values["num_attention_heads"])
    (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    for name in TOKENIZER_FILES:
        if (tokenizer / name).is_file():
            shutil.copyfile(tokenizer / name, folder / name)
    read = json.loads((tokenizer / "tokenizer.json").read_text(encoding="utf-8"))
    cut = json.dumps(cut_tokenizer(read, values["vocab_size"]), ensure_ascii=False)
    (folder / "tokenizer.json").write_text(cut, encoding="utf-8")
    kind = np.dtype(ml_dtypes.bfloat16) if dtype == "bfloat16" else np.dtype(dtype)
    block = (0.02 * np.random.default_rng(0).standard_normal(BLOCK, np.float32)).astype(kind)
    tensors = {
        name: np.ones(shape, kind) if len(shape) == 1 else np.resize(block, shape)
        for name, shape in llama_shapes(values).items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def llama_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Returns the name and shape of every tensor of a Llama with tied embeddings, kernels as [F, D].

    Args:
      config: the entries of its `config.json`.
    """
    width, inner, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], width),
        "model.norm.weight": (width,),
    }
    kernels = {
        "self_attn.q_proj": (queries, width),
        "self_attn.k_proj": (keys, width),
        "self_attn.v_proj": (keys, width),
        "self_attn.o_proj": (width, queries),
        "mlp.gate_proj": (inner, width),
        "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner),
    }
    for layer in range(config["num_hidden_layers"]):
        names = {**kernels, "input_layernorm": (width,), "post_attention_layernorm": (width,)}
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in names.items()}
    return shapes


def cut_tokenizer(tokenizer: Mapping[str, Any], size: int) -> dict[str, Any]:
    """Returns the content of a `tokenizer.json` of byte-pair encoding with only the tokens below an id.

    The merges of the tokens that are kept stay in their order, so the result is a tokenizer of that size which the same
    text would have given.

    Args:
      tokenizer: the content of the file.
      size: the number of tokens to keep; a smaller tokenizer is returned as it is.

    Raises:
      ValueError: tokens would have to go, and the tokenizer is not one of byte-pair encoding.
    """
    model = tokenizer["model"]
    if max(model["vocab"].values()) < size:
        return dict(tokenizer)
    if model["type"] != "BPE":
        raise ValueError(f"a tokenizer of type {model['type']!r} cannot be cut to {size} tokens; expected 'BPE'")
    kept = {token: number for token, number in model["vocab"].items() if number < size}
    pairs = [(merge, merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]]
    merges = [merge for merge, (left, right) in pairs if left in kept and right in kept and left + right in kept]
    added = [token for token in tokenizer.get("added_tokens", ()) if token["id"] < size]
    return {**tokenizer, "model": {**model, "vocab": kept, "merges": merges}, "added_tokens": added}


def shipped_tokenizer() -> pathlib.Path:
    """Returns the folder of the tokenizer that the package ships, for random weights without any other folder."""
    return pathlib.Path(str(importlib.resources.files("mlora_jax") / "assets" / "quickstart"))


def gsm8k_texts(raw_dir: pathlib.Path) -> list[str]:
    """Returns the questions and answers of GSM8K's training rows in their order, alternately.

    Args:
      raw_dir: the folder of `train.jsonl`.
    """
    lines = (raw_dir / "train.jsonl").read_text(encoding="utf-8").splitlines()
    return [text for line in lines for text in (json.loads(line)["question"], json.loads(line)["answer"])]


def made_up_texts(count: int) -> list[str]:
    """Returns questions and answers of arithmetic, alternately, for machines without a data set.

    Args:
      count: the number of texts.
    """
    draw = random.Random(0)
    texts = []
    while len(texts) < count:
        numbers = [draw.randint(2, 99) for _ in range(draw.randint(2, 12))]
        texts.append(f"What is {' plus '.join(map(str, numbers))}?")
        texts.append(f"The numbers {', '.join(map(str, numbers))} add up to {sum(numbers)}.")
    return texts[:count]


def write_rows(file: pathlib.Path, texts: Sequence[str], *, rows: int, length: int, count_tokens: Any) -> pathlib.Path:
    """Writes own data for a run: rows that each have at least some number of tokens, half of them in the completion.

    Args:
      file: the file of JSON lines to write.
      texts: questions and answers, alternately; they begin again after the last one.
      rows: the number of rows.
      length: the least number of tokens of prompt and completion together; 0 makes a row of one question and its
        answer.
      count_tokens: text -> the number of its tokens.

    Returns:
      The file.
    """
    stream = _repeated(texts)

    def gather(least: int) -> str:
        parts, tokens = [], 0
        while tokens < least or not parts:
            parts.append(next(stream))
            tokens += count_tokens(parts[-1])
        return "\n".join(parts)

    lines = [{"prompt": gather(length // 2) + "\n", "completion": gather(length)} for _ in range(rows)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return file


def _repeated(texts: Sequence[str]) -> Iterator[str]:
    while True:
        yield from texts
