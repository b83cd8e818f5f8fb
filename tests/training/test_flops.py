"""What a compiled training step multiplies, against the floor that follows from the shapes alone."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from mlora_jax.adapters import adapt, split
from mlora_jax.core import RankHierarchy, draw_step, get_policy
from mlora_jax.data import Example
from mlora_jax.models import Decoder, DecoderConfig
from mlora_jax.models.segments import BLOCKS
from mlora_jax.parallel.hlo import program_costs
from mlora_jax.training.step import Schedule, init_state, make_optimizer
from tests.tiny import compile_step, pack_examples

RANK, CHUNK, TOKENS = 8, 64, 256
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CONFIG = DecoderConfig(
    vocab_size=500,
    hidden_size=96,
    intermediate_size=160,
    num_layers=3,
    num_heads=6,
    num_kv_heads=2,
    max_position_embeddings=512,
)


def floor(config: DecoderConfig) -> float:
    """The FLOPs of one row of tokens, one chunk of answers, and one pair of blocks in each layer's attention.

    A frozen kernel is multiplied twice, forward and for the gradient of its input. A factor is multiplied three times,
    because it has a gradient itself. The first layer's inputs need no gradient.
    """
    heads, groups = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    hidden, inner = config.hidden_size, config.intermediate_size
    inputs = [(hidden, heads), (hidden, groups), (hidden, groups)]
    others = [(heads, hidden), (hidden, inner), (hidden, inner), (inner, hidden)]
    total = 0.0
    for layer in range(config.num_layers):
        for features_in, features_out in inputs + others:
            needs_input_gradient = layer > 0 or (features_in, features_out) in others
            total += 2.0 * TOKENS * features_in * features_out * (1 + needs_input_gradient)
            total += 2.0 * TOKENS * RANK * (features_in * (2 + needs_input_gradient) + features_out * 3)
    head = 2 * 2.0 * CHUNK * hidden * config.vocab_size
    pair = 7 * 2.0 * BLOCKS[0] ** 2 * heads  # two products forward, one of them again backward, and four gradients
    return total + head + pair * config.num_layers


@pytest.mark.parametrize(("unroll", "remat"), [(True, "none"), (False, "none"), (False, "dots")])
def test_a_step_multiplies_no_more_than_it_must(unroll, remat):
    """With "dots", neither the products of the adapters nor attention are computed again."""
    model = adapt(Decoder(CONFIG, rngs=nnx.Rngs(0)), RANK, TARGETS, key=jax.random.key(0))
    model.unroll, model.remat = unroll, remat
    graphdef, base, adapter, profile = split(model)
    optimizer = make_optimizer(beta1=0.9, beta2=0.999, epsilon=1e-8, weight_decay=0.0, clip=1.0)
    step = compile_step(graphdef, optimizer, chunk=CHUNK, widths=(TOKENS,), examples=1)
    example = Example(jnp.ones(TOKENS, jnp.int32), jnp.arange(TOKENS) >= TOKENS - CHUNK)
    draw = draw_step(get_policy("lora"), RankHierarchy((RANK,)), jax.random.key(0), 0, accumulation=1)
    batch = pack_examples([example], widths=(TOKENS,))
    arguments = base, profile, init_state(adapter, optimizer), batch, draw, Schedule(1e-3, 0, 10), jax.random.key(0)
    costs = program_costs(step.lower(*arguments).compile().as_text(), open_trips=1)
    # A loop over the layers computes the gradients of the first layer's inputs too.
    extra = 0.0 if unroll else 2.0 * TOKENS * CONFIG.hidden_size * (160 + 3 * RANK)
    assert costs.open_loops > 0
    assert costs.flops == pytest.approx(floor(CONFIG) + extra, rel=0.03)
