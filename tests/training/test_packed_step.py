"""A step on packed rows is the step on rows of one example each, however the examples lie."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mlora_jax.adapters import adapt, fold_in_training, set_profile, split
from mlora_jax.core import Draw, RankHierarchy, draw_step, get_policy
from mlora_jax.data import Example, collate
from mlora_jax.models import Decoder
from mlora_jax.models import attention as attention_module
from mlora_jax.training.objective import answer_loss
from mlora_jax.training.step import Schedule, init_state, make_optimizer
from tests.tiny import compile_step, pack_examples, random_like, tiny_config

HIERARCHY = RankHierarchy((1, 2, 5))
OPTIMIZER = make_optimizer(beta1=0.9, beta2=0.999, epsilon=1e-8, weight_decay=0.0, clip=0.0)
# Targets with dense gradients by fold (v_proj), and the head, whose profiles follow the answers.
TARGETS = ("v_proj", "down_proj", "lm_head")
LENGTHS = (9, 30, 4, 17, 23, 12)


@pytest.fixture
def in_blocks(monkeypatch):
    """A CPU attends in blocks within each text, however few scores there are."""
    monkeypatch.setattr(attention_module, "LITTLE", 0)


def make_examples():
    generator = np.random.default_rng(3)
    return [
        Example(generator.integers(3, 300, length).astype(np.int32), np.arange(length) >= length - 1 - at % 3)
        for at, length in enumerate(LENGTHS)
    ]


def parts(*, unroll=False, folded=False, gate=False, **changes):
    model = Decoder(tiny_config(tie_word_embeddings=False, **changes), rngs=nnx.Rngs(0))
    model = adapt(model, 5, TARGETS, key=jax.random.key(0), gate=gate)
    model.unroll = unroll
    fold_in_training(model, on=folded)
    graphdef, base, adapter, profile = split(model)
    return graphdef, base, random_like(adapter, seed=1, scale=0.3), profile


def alone(graphdef, base, adapter, profile, examples, profiles):
    """The loss and gradient of a step, from one row and one profile [N, R] per example at a time."""
    answers = sum(int(example.loss_mask.sum()) for example in examples)

    def one(adapter, batch, p):
        values = set_profile(profile, p)
        return answer_loss(graphdef, base, adapter, values, batch, chunk=64) / answers

    gradient = jax.jit(jax.value_and_grad(one))
    found = []
    for example, many in zip(examples, profiles, strict=True):
        batch = {name: x[0] for name, x in collate([example], batch_size=1, length=32, answers=4).items()}
        found += [gradient(adapter, batch, p) for p in many]
    return jax.tree.map(lambda *terms: sum(terms) / len(profiles[0]), *found)


def packed(trees, examples, draw, **layout):
    """The loss, and the gradient as Adam's first moment after one step holds it."""
    graphdef, base, adapter, profile = trees
    step = compile_step(graphdef, OPTIMIZER, chunk=3, widths=layout["widths"], examples=len(examples))
    state = init_state(jax.tree.map(jnp.array, adapter), OPTIMIZER)
    batch = pack_examples(examples, **layout)
    state, metrics = step(base, profile, state, batch, draw, Schedule(1e-3, 0, 10), jax.random.key(0))
    return metrics["loss"], jax.tree.map(lambda moment: moment / 0.1, state.optimizer[1].mu)


def assert_equal(found, expected):
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    ours, theirs = (jax.tree_util.tree_leaves_with_path(tree) for tree in (found[1], expected[1]))
    for (path, one), (_, other) in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * max(1.0, float(jnp.abs(other).max())), err_msg=str(path))


def draw_of(method, accumulation):
    draw = draw_step(
        get_policy(method), HIERARCHY, jax.random.key(2), 0, accumulation=accumulation, examples=6 // accumulation
    )
    return jax.tree.map(jnp.asarray, draw)


def profiles_of(draw: Draw, count: int):
    """The profiles [N, R] of each example: of its own, or of its micro-batch."""
    drawn = np.asarray(draw.profiles)  # [M, N, E, R]
    size = count // len(drawn)
    return [drawn[at // size, :, at % size if draw.per_example else 0] for at in range(count)]


@pytest.mark.parametrize("layout", [dict(widths=(32,)), dict(widths=(64, 48, 16)), dict(widths=(48, 32), rows=2)])
@pytest.mark.parametrize(
    ("method", "accumulation"),
    [("lora", 1), ("dylora", 1), ("dylora", 3), ("per_example", 1), ("per_example", 2), ("matryoshka_exact", 2)],
)
@pytest.mark.usefixtures("in_blocks")
def test_loss_and_gradient_are_those_of_examples_alone(method, accumulation, layout):
    trees, examples, draw = parts(), make_examples(), draw_of(method, accumulation)
    assert_equal(packed(trees, examples, draw, **layout), alone(*trees, examples, profiles_of(draw, len(examples))))


@pytest.mark.parametrize(
    "form",
    [
        dict(unroll=True),
        dict(folded=True),
        dict(unroll=True, folded=True, gate=True),
        dict(sliding_window=5, sliding_layers=(True, False)),
    ],
    ids=["unrolled", "folded", "gate", "windows"],
)
@pytest.mark.usefixtures("in_blocks")
def test_every_form_of_the_program_computes_the_same(form):
    examples, draw = make_examples(), draw_of("matryoshka", 1)
    plain = {name: value for name, value in form.items() if name not in ("unroll", "folded")}
    expected = alone(*parts(**plain), examples, profiles_of(draw, len(examples)))
    assert_equal(packed(parts(**form), examples, draw, widths=(64, 32)), expected)


def test_a_batch_of_few_scores_computes_the_same():
    """Without blocks, as an accelerator does: by the mask of the texts."""
    trees, examples, draw = parts(), make_examples(), draw_of("per_example", 1)
    expected = alone(*trees, examples, profiles_of(draw, len(examples)))
    assert_equal(packed(trees, examples, draw, widths=(48,), rows=2), expected)


def test_steps_with_other_numbers_of_rows_share_the_executable():
    trees, examples = parts(), make_examples()
    graphdef, base, adapter, profile = trees
    step = compile_step(graphdef, OPTIMIZER, chunk=3, widths=(64, 32), examples=6)
    passes = []
    for some in (examples, examples[:1], examples[2:5]):
        arrays = pack_examples(some, widths=(64, 32), passes=7)
        passes.append(tuple(arrays["passes"]))
        state = init_state(jax.tree.map(jnp.array, adapter), OPTIMIZER)
        step(base, profile, state, arrays, draw_of("lora", 1), Schedule(1e-3, 0, 10), jax.random.key(0))
    assert len(set(passes)) > 1 and step._cache_size() == 1
