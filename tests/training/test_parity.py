"""Twenty steps of every method against a plain PyTorch rendering of the formulas: same start, batches, draws."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mlora_jax.adapters import adapt, split
from mlora_jax.core import POLICIES, RankHierarchy, draw_step, get_policy
from mlora_jax.data import Example
from mlora_jax.models import load_decoder
from mlora_jax.training.step import Schedule, init_state, make_optimizer
from tests.oracles import torch_lora
from tests.tiny import compile_step, pack_examples

STEPS, RATE, WIDTHS = 20, 1e-3, (32, 16)
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TOLERANCE = {"float32": 1e-5, "float64": 1e-9}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A random model with untied embeddings and grouped heads, in float64 on disk."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=53,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
        tie_word_embeddings=False,
    )
    folder = tmp_path_factory.mktemp("model")
    LlamaForCausalLM(config).double().save_pretrained(folder)
    return folder


def make_rows(generator, rows):
    examples = []
    for _ in range(rows):
        length = int(generator.integers(5, 15))
        tokens = generator.integers(1, 53, length).astype(np.int32)
        mask = np.arange(length) >= length - int(generator.integers(1, 4))
        examples.append(Example(tokens, mask))
    return examples


def dense(examples, accumulation):
    """The oracle's form of a step: right-padded tokens and a mask over targets, [M, B, T]."""
    longest = max(len(example.tokens) for example in examples)
    tokens = np.stack([np.pad(e.tokens, (0, longest - len(e.tokens))) for e in examples])
    masks = np.stack([np.pad(e.loss_mask, (0, longest - len(e.tokens))) for e in examples])
    return {
        "tokens": tokens.reshape(accumulation, -1, longest),
        "loss_mask": masks.reshape(accumulation, -1, longest),
    }


def oracle_factors(adapter):
    """Our stacked factors under the paths and layers of transformers."""
    factors = {}
    for block in ("self_attn", "mlp"):
        for name, pair in adapter["layers"][block].items():
            for layer in range(pair["a"].shape[0]):
                path = f"model.layers.{layer}.{block}.{name}"
                factors[path] = (np.asarray(pair["a"][layer]), np.asarray(pair["b"][layer]))
    if "lm_head" in adapter:
        factors["lm_head"] = (np.asarray(adapter["lm_head"]["a"][...]), np.asarray(adapter["lm_head"]["b"][...]))
    return factors


@functools.cache
def shared_step(graphdef, **options):
    """Optimizer and step: methods of as many profiles differ in data alone, so they share an executable."""
    optimizer = make_optimizer(**options)
    return optimizer, compile_step(graphdef, optimizer, chunk=5, widths=WIDTHS, examples=4)


def compare(folder, dtype, method, hierarchy, *, accumulation, targets, start="fresh", loss_weights=None, **options):
    policy = get_policy(method)
    model = adapt(load_decoder(folder, dtype=jnp.dtype(dtype)), hierarchy.max_rank, targets, key=jax.random.key(3))
    graphdef, base, adapter, profile = split(model)
    if start == "warm":  # B away from zero, so that A learns from the first step on
        keys = iter(jax.random.split(jax.random.key(5), 100))
        adapter = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(next(keys), x.shape, x.dtype), adapter)
    first = oracle_factors(adapter)
    generator = np.random.default_rng(1)
    steps = [make_rows(generator, 4) for _ in range(STEPS)]
    sizes = dict(accumulation=accumulation, examples=4 // accumulation)
    draws = [draw_step(policy, hierarchy, jax.random.key(8), step, **sizes) for step in range(STEPS)]
    options = {"beta1": 0.9, "beta2": 0.999, "epsilon": 1e-8, "weight_decay": 0.0, "clip": 1.0, **options}
    optimizer, step = shared_step(graphdef, **options)
    state, schedule = init_state(adapter, optimizer), Schedule(RATE, 0, STEPS)
    for examples, draw in zip(steps, draws, strict=True):
        batch = pack_examples(examples, widths=WIDTHS)
        state, metrics = jax.block_until_ready(step(base, profile, state, batch, draw, schedule, jax.random.key(0)))
        assert metrics["finite"]
    expected = torch_lora.train(
        folder,
        dtype=getattr(torch, dtype),
        factors=first,
        batches=[dense(examples, accumulation) for examples in steps],
        profiles=np.stack([draw.profiles for draw in draws]),
        learning_rates=RATE * (1 - np.arange(STEPS) / STEPS),
        update_masks=np.stack([draw.update_mask for draw in draws]),
        clip=options["clip"],
        weight_decay=options["weight_decay"],
        loss_weights=loss_weights,
    )
    trained = oracle_factors(state.adapter)
    assert trained.keys() == expected.keys()
    pairs = [
        (ours, theirs, old)
        for k in trained
        for ours, theirs, old in zip(trained[k], expected[k], first[k], strict=True)
    ]
    error = np.sqrt(sum(np.sum((ours - theirs) ** 2) for ours, theirs, _ in pairs))
    size = np.sqrt(sum(np.sum(theirs**2) for _, theirs, _ in pairs))
    moved = np.sqrt(sum(np.sum((theirs - old) ** 2) for _, theirs, old in pairs))
    assert moved > 1e-3 * size, "the oracle did not train"
    print(f"parity {dtype} {method}: relative L2 {error / size:.2e}, of the way moved {error / moved:.2e}")
    assert error < TOLERANCE[dtype] * size


# The methods of several profiles a step take longest.
LONG = [(dtype, method) for dtype in ("float32", "float64") for method in ("matryoshka_exact", "sandwich")]
LONG.append(("float32", "per_example"))


@pytest.mark.parametrize(
    ("dtype", "method"),
    [
        pytest.param(*case, marks=[pytest.mark.slow] if case in LONG else [])
        for case in itertools.product(("float32", "float64"), POLICIES)
    ],
)
def test_twenty_steps(checkpoint, dtype, method):
    """R = 12 is no power of two; two micro-batches a step; scaling "sqrt"."""
    with jax.enable_x64(dtype == "float64"):
        compare(checkpoint, dtype, method, RankHierarchy((1, 2, 4, 8, 12), "sqrt"), accumulation=2, targets=TARGETS)


@pytest.mark.parametrize("method", ["lora", "dylora", "matryoshka", "matryoshka_exact"])
def test_twenty_steps_with_weights_decay_and_an_adapted_head(checkpoint, method):
    weights = (0.5, 2.0, 1.0)
    hierarchy = RankHierarchy((2, 3, 7), "rank", weights=weights, max_rank=9)
    with jax.enable_x64(True):
        compare(
            checkpoint,
            "float64",
            method,
            hierarchy,
            accumulation=1,
            targets=("lm_head", "q_proj", "down_proj"),
            start="warm",
            loss_weights=np.array(weights) / sum(weights) if method == "matryoshka_exact" else None,
            weight_decay=0.1,
            clip=0.05,
        )
